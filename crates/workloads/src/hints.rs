//! Hints on endpoints: which zones and nodes should use them.
//!
//! Two ways lead there. `spec.trafficDistribution` (KEP-3015) gives each endpoint to its own zone or node. The annotation
//! [`TOPOLOGY_MODE`] with the value `Auto` (KEP-2433) shares the endpoints out among the zones in proportion to the
//! processors of their nodes, and gives no hints where that would leave some zone overloaded.

use std::{collections::BTreeMap, fmt};

use serde_json::{Value, json};

use crate::read;

/// Annotation of a Service that asks for [`assign`].
pub const TOPOLOGY_MODE: &str = "service.kubernetes.io/topology-mode";

/// Its older name.
pub const TOPOLOGY_AWARE_HINTS: &str = "service.kubernetes.io/topology-aware-hints";

/// How much more than its share an endpoint may get, when endpoints cannot be split as the processors are.
const OVERLOAD: f64 = 0.2;

/// Hints of one endpoint under `trafficDistribution`: it is for its own zone, and for its own node where that is
/// preferred. Endpoints that are not ready get none.
pub fn by_distribution(
    distribution: Option<&str>,
    ready: bool,
    node: Option<&str>,
    zone: Option<&str>,
) -> Option<Value> {
    let for_node = match distribution.filter(|_| ready)? {
        "PreferClose" | "PreferSameZone" => None,
        "PreferSameNode" => node,
        _ => return None,
    };
    let mut hints = json!({});
    if let Some(zone) = zone {
        hints["forZones"] = json!([{ "name": zone }]);
    }
    if let Some(node) = for_node {
        hints["forNodes"] = json!([{ "name": node }]);
    }
    (zone.is_some() || for_node.is_some()).then_some(hints)
}

/// What counts of a node.
#[derive(Clone, Copy, Debug)]
pub struct NodeShare<'a> {
    /// Whether pods can be placed there: it is ready and not of the control plane.
    pub usable: bool,
    /// Its zone.
    pub zone: Option<&'a str>,
    /// `status.allocatable.cpu` in thousandths.
    pub milli_cpu: u64,
}

/// Thousandths in a quantity of processors, as far as those are written in objects: `2`, `"2"`, `"1.5"`, `"500m"`.
pub(crate) fn milli(quantity: &Value) -> Option<u64> {
    let text = match quantity {
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        _ => return None,
    };
    let (digits, unit) = match text.strip_suffix('m') {
        Some(digits) => (digits, 1.0),
        None => (text.as_str(), 1000.0),
    };
    let value: f64 = digits.parse().ok()?;
    (0.0..1e12).contains(&value).then_some((value * unit).round() as u64)
}

/// Each zone's share of all processors; `None` when that of some node is unknown, or there is but one zone.
pub fn zone_shares<'a>(nodes: impl IntoIterator<Item = NodeShare<'a>>) -> Option<BTreeMap<String, f64>> {
    let mut by_zone: BTreeMap<String, u64> = BTreeMap::new();
    for node in nodes.into_iter().filter(|node| node.usable) {
        let zone = node.zone.filter(|zone| !zone.is_empty() && node.milli_cpu > 0)?;
        *by_zone.entry(zone.to_owned()).or_insert(0) += node.milli_cpu;
    }
    let total: u64 = by_zone.values().sum();
    let share = |(zone, cpu): (String, u64)| (zone, cpu as f64 / total as f64);
    (by_zone.len() > 1).then(|| by_zone.into_iter().map(share).collect())
}

/// Why there are no hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoHints {
    /// The zone or the processors of some node are unknown, or there is one zone only.
    UnknownNodes,
    /// There are fewer endpoints than zones.
    FewEndpoints,
    /// However they were shared out, the endpoints of some zone would get too much.
    Overload,
    /// The zone of an endpoint is unknown.
    UnknownZone,
    /// Some zone would get no endpoint.
    EmptyZone,
}

impl fmt::Display for NoHints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoHints::UnknownNodes => {
                "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes"
            }
            NoHints::FewEndpoints => "Insufficient number of endpoints",
            NoHints::Overload => {
                "Unable to allocate minimum required endpoints to each zone without overloading"
            }
            NoHints::UnknownZone => "One or more endpoints do not have a zone specified",
            NoHints::EmptyZone => "No hints allocated for zone",
        })
    }
}

/// How many endpoints a zone should have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allocation {
    /// Fewer would overload them.
    pub minimum: i64,
    /// More would overload those of others.
    pub maximum: i64,
    /// As the processors are shared.
    pub desired: f64,
}

/// How many endpoints each zone should have.
///
/// # Errors
/// They cannot be shared out.
pub fn allocations(
    shares: Option<&BTreeMap<String, f64>>,
    endpoints: usize,
) -> Result<BTreeMap<String, Allocation>, NoHints> {
    let shares = shares.ok_or(NoHints::UnknownNodes)?;
    if shares.len() > endpoints {
        return Err(NoHints::FewEndpoints);
    }
    let mut allocations = BTreeMap::new();
    let mut least = 0;
    for (zone, share) in shares {
        let desired = share * endpoints as f64;
        let minimum = (desired / (1.0 + OVERLOAD)).ceil() as i64;
        least += minimum;
        allocations.insert(zone.clone(), Allocation { minimum, maximum: 0, desired });
    }
    let spare = endpoints as i64 - least;
    if spare < 0 {
        return Err(NoHints::Overload);
    }
    allocations.values_mut().for_each(|allocation| allocation.maximum = allocation.minimum + spare);
    Ok(allocations)
}

/// Endpoints by slice; how the slice is written decides whether its hints may be touched.
#[derive(Clone, Debug, Default)]
pub struct Slices {
    /// Slices that are written in any case.
    pub written: Vec<Vec<Value>>,
    /// Slices that are as they should be, apart from hints.
    pub unchanged: Vec<Vec<Value>>,
}

impl Slices {
    /// How many endpoints are ready: those that say so.
    pub fn ready(&self) -> usize {
        self.written.iter().chain(&self.unchanged).flatten().filter(|endpoint| is_ready(endpoint)).count()
    }

    /// How many there are.
    pub fn total(&self) -> usize {
        self.written.iter().chain(&self.unchanged).map(Vec::len).sum()
    }
}

fn is_ready(endpoint: &Value) -> bool {
    read::is_true(endpoint, "conditions.ready")
}

fn zone_of(endpoint: &Value) -> Option<&str> {
    read::text(endpoint, "zone").filter(|zone| !zone.is_empty())
}

fn hint_for(zone: &str) -> Value {
    json!({ "forZones": [{ "name": zone }] })
}

/// Removes all hints; returns which of the unchanged slices had any.
pub fn remove(slices: &mut Slices) -> Vec<bool> {
    let clear = |endpoints: &mut Vec<Value>| {
        let mut had = false;
        for endpoint in endpoints {
            had |= endpoint.as_object_mut().is_some_and(|endpoint| endpoint.remove("hints").is_some());
        }
        had
    };
    slices.written.iter_mut().for_each(|endpoints| {
        clear(endpoints);
    });
    slices.unchanged.iter_mut().map(clear).collect()
}

/// Hints for `Auto`: shares the ready endpoints out among the zones. Returns which of the unchanged slices have changed,
/// and how many endpoints each zone has, or why there are no hints.
///
/// Unchanged slices keep their hints as long as these fit, so that few endpoints move and few slices are written.
pub fn assign(
    slices: &mut Slices,
    shares: Option<&BTreeMap<String, f64>>,
) -> (Vec<bool>, Result<BTreeMap<String, i64>, NoHints>) {
    let allocations = match allocations(shares, slices.ready()) {
        Ok(allocations) => allocations,
        Err(why) => return (remove(slices), Err(why)),
    };
    let mut ready = slices.written.iter().chain(&slices.unchanged).flatten().filter(|e| is_ready(e));
    if ready.any(|endpoint| zone_of(endpoint).is_none()) {
        return (remove(slices), Err(NoHints::UnknownZone));
    }
    let mut by_zone: BTreeMap<String, i64> = BTreeMap::new();
    let mut changed = Vec::with_capacity(slices.unchanged.len());
    for endpoints in &slices.unchanged {
        let fitting = by_hint(endpoints, &by_zone, &allocations);
        changed.push(fitting.is_none());
        for (zone, count) in fitting.unwrap_or_default() {
            *by_zone.entry(zone).or_insert(0) += count;
        }
    }
    let rewritten = slices.unchanged.iter_mut().zip(&changed).filter(|(_, changed)| **changed);
    let mut open: Vec<&mut Vec<Value>> =
        slices.written.iter_mut().chain(rewritten.map(|(endpoints, _)| endpoints)).collect();
    for endpoint in open.iter_mut().flat_map(|endpoints| endpoints.iter_mut()) {
        let zone = zone_of(endpoint).filter(|_| is_ready(endpoint)).map(str::to_owned);
        match zone {
            Some(zone) => {
                endpoint["hints"] = hint_for(&zone);
                *by_zone.entry(zone).or_insert(0) += 1;
            }
            None => {
                endpoint.as_object_mut().map(|endpoint| endpoint.remove("hints"));
            }
        }
    }
    let (giving, receiving) = giving_and_receiving(&allocations, &by_zone);
    for (zone, moved) in redistribute(&mut open, giving, receiving) {
        *by_zone.entry(zone).or_insert(0) += moved;
    }
    by_zone.retain(|_, count| *count != 0);
    if allocations.keys().any(|zone| !by_zone.contains_key(zone)) {
        return (remove(slices), Err(NoHints::EmptyZone));
    }
    (changed, Ok(by_zone))
}

/// How many endpoints of a slice its hints give to each zone; `None` when the hints do not fit any more: some are
/// missing, are for a zone that needs none, or would be more than a zone may have on top of what it has.
pub fn by_hint(
    endpoints: &[Value],
    given: &BTreeMap<String, i64>,
    allocations: &BTreeMap<String, Allocation>,
) -> Option<BTreeMap<String, i64>> {
    let mut by_zone = BTreeMap::new();
    for endpoint in endpoints.iter().filter(|endpoint| is_ready(endpoint)) {
        let zones = read::list(endpoint, "hints.forZones").ok().filter(|zones| !zones.is_empty())?;
        let names: Option<Vec<&str>> = zones.iter().map(|zone| read::text(zone, "name")).collect();
        let names = names.filter(|names| names.iter().all(|name| allocations.contains_key(*name)))?;
        *by_zone.entry(names[0].to_owned()).or_insert(0) += 1;
    }
    let fits = |(zone, count): (&String, &i64)| {
        allocations[zone].maximum >= count + given.get(zone).copied().unwrap_or(0)
    };
    by_zone.iter().all(fits).then_some(by_zone)
}

/// Which zones have endpoints to give and which need some, in whole endpoints that can be moved: the sums are equal.
/// Less than a whole one on either side stays where it is.
pub fn giving_and_receiving(
    allocations: &BTreeMap<String, Allocation>,
    given: &BTreeMap<String, i64>,
) -> (BTreeMap<String, i64>, BTreeMap<String, i64>) {
    let mut surplus: BTreeMap<&str, f64> = BTreeMap::new();
    let mut need: BTreeMap<&str, f64> = BTreeMap::new();
    for (zone, allocation) in allocations {
        let over = given.get(zone).copied().unwrap_or(0) as f64 - allocation.desired;
        if over > 0.0 {
            surplus.insert(zone, over);
        } else if over < 0.0 {
            need.insert(zone, -over);
        }
    }
    let (mut giving, mut receiving) = (BTreeMap::new(), BTreeMap::new());
    while let (Some((from, has)), Some((to, needs))) = (most(&surplus), most(&need)) {
        if has < 1.0 && needs < 1.0 {
            break;
        }
        let moved = has.min(needs).floor().max(1.0);
        surplus.insert(from, has - moved);
        need.insert(to, needs - moved);
        *giving.entry(from.to_owned()).or_insert(0) += moved as i64;
        *receiving.entry(to.to_owned()).or_insert(0) += moved as i64;
    }
    (giving, receiving)
}

/// The zone with the most, the first by name of several; nothing when none has any.
fn most<'a>(zones: &BTreeMap<&'a str, f64>) -> Option<(&'a str, f64)> {
    let mut best: Option<(&str, f64)> = None;
    for (zone, count) in zones {
        if *count > best.map_or(0.0, |(_, most)| most) {
            best = Some((zone, *count));
        }
    }
    best
}

/// Moves hints from zones with endpoints to give to those that need some; returns by how much each zone changes.
pub fn redistribute(
    slices: &mut [&mut Vec<Value>],
    mut giving: BTreeMap<String, i64>,
    mut receiving: BTreeMap<String, i64>,
) -> BTreeMap<String, i64> {
    let mut moved = BTreeMap::new();
    for endpoint in slices.iter_mut().flat_map(|endpoints| endpoints.iter_mut()) {
        let Some(from) = zone_of(endpoint).filter(|_| is_ready(endpoint)).map(str::to_owned) else {
            continue;
        };
        let Some(to) = receiving.iter().find(|(_, needs)| **needs > 0).map(|(zone, _)| zone.clone()) else {
            break;
        };
        let Some(left) = giving.get_mut(&from).filter(|left| **left > 0) else { continue };
        *left -= 1;
        *receiving.entry(to.clone()).or_insert(0) -= 1;
        *moved.entry(from).or_insert(0) -= 1;
        *moved.entry(to.clone()).or_insert(0) += 1;
        endpoint["hints"] = hint_for(&to);
    }
    moved
}

/// Whether a Service asks for `Auto`. It goes before `trafficDistribution`.
pub(crate) fn wants_auto(service: &Value) -> bool {
    let annotations = service.pointer("/metadata/annotations").and_then(Value::as_object);
    let value = |key| annotations.and_then(|annotations| annotations.get(key)).and_then(Value::as_str);
    value(TOPOLOGY_MODE)
        .or_else(|| value(TOPOLOGY_AWARE_HINTS))
        .is_some_and(|mode| mode.eq_ignore_ascii_case("auto"))
}

/// Labels of nodes that are not for ordinary pods.
pub const CONTROL_PLANE: [&str; 2] =
    ["node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master"];
