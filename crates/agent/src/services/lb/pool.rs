//! Pools of load balancer addresses: from the command line and from `LoadBalancerPool` objects.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use serde_json::Value;

use super::service::{LbService, strings};

/// Name of the pool that the command line makes.
pub(crate) const FLAG_POOL: &str = "command-line";
/// Most addresses of one family that are looked through for a free one.
const SEARCH_MAX: usize = 1 << 20;

/// Addresses from one to another, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    first: u128,
    last: u128,
    v6: bool,
}

impl Range {
    /// The addresses of a prefix that hosts can have: without network and broadcast address (IPv4), and without the
    /// routers' anycast address (RFC 4291 section 2.6.1), unless the prefix is too small to do without.
    #[must_use]
    pub(crate) fn of(net: IpNet) -> Self {
        let (first, last) = (number(net.network()), number(net.broadcast()));
        let v6 = matches!(net, IpNet::V6(_));
        let (first, last) = match (v6, last - first) {
            (_, 0 | 1) => (first, last),
            (false, _) => (first + 1, last - 1),
            (true, _) => (first + 1, last),
        };
        Self { first, last, v6 }
    }

    /// `FIRST-LAST`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (first, last) =
            text.split_once('-').ok_or_else(|| format!("{text:?} is no range such as FIRST-LAST"))?;
        let parse =
            |part: &str| part.trim().parse::<IpAddr>().map_err(|_| format!("{part:?} is no IP address"));
        let (first, last) = (parse(first)?, parse(last)?);
        if first.is_ipv4() != last.is_ipv4() {
            return Err(format!("{text:?} begins in one family and ends in another"));
        }
        if first > last {
            return Err(format!("{text:?} ends before it begins"));
        }
        Ok(Self { first: number(first), last: number(last), v6: first.is_ipv6() })
    }

    fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv6() == self.v6 && (self.first..=self.last).contains(&number(address))
    }

    fn size(&self) -> u128 {
        (self.last - self.first).saturating_add(1)
    }

    fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let v6 = self.v6;
        (self.first..=self.last).take(SEARCH_MAX).map(move |n| address(n, v6))
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", address(self.first, self.v6), address(self.last, self.v6))
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

fn address(number: u128, v6: bool) -> IpAddr {
    if v6 {
        IpAddr::V6(Ipv6Addr::from(number))
    } else {
        // Ranges of IPv4 are made of IPv4 addresses.
        IpAddr::V4(Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)))
    }
}

/// One requirement of a label selector.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
}

impl Requirement {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Self::NotIn(key, values) => labels.get(key).is_none_or(|v| !values.contains(v)),
            Self::Exists(key) => labels.contains_key(key),
            Self::DoesNotExist(key) => !labels.contains_key(key),
        }
    }
}

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pool {
    /// Name of the object, or [`FLAG_POOL`].
    pub(crate) name: String,
    ranges: Vec<Range>,
    selector: Option<Vec<Requirement>>,
    namespaces: Option<BTreeSet<String>>,
}

impl Pool {
    /// A pool of the command line; none when there is nothing in it.
    #[must_use]
    pub(crate) fn of_flags(cidrs: &[IpNet]) -> Option<Self> {
        (!cidrs.is_empty()).then(|| Self {
            name: FLAG_POOL.to_owned(),
            ranges: cidrs.iter().copied().map(Range::of).collect(),
            selector: None,
            namespaces: None,
        })
    }

    /// Reads a `LoadBalancerPool`.
    ///
    /// # Errors
    /// The object's name, the field and the cause.
    pub(crate) fn read(value: &Value) -> Result<Self, String> {
        let name = value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or("?").to_owned();
        let bad = |field: &str, cause: &str| format!("LoadBalancerPool {name}: {field}: {cause}");
        let mut ranges = Vec::new();
        let texts = |field: &'static str| -> Result<Vec<String>, String> {
            let Some(list) = value.pointer(&format!("/spec/{field}")).filter(|l| !l.is_null()) else {
                return Ok(Vec::new());
            };
            let list = list.as_array().ok_or_else(|| bad(&format!("spec.{field}"), "is no list"))?;
            list.iter()
                .enumerate()
                .map(|(i, v)| {
                    let text =
                        v.as_str().ok_or_else(|| bad(&format!("spec.{field}[{i}]"), "is no string"))?;
                    Ok(text.to_owned())
                })
                .collect()
        };
        for (i, text) in texts("cidrs")?.iter().enumerate() {
            let field = format!("spec.cidrs[{i}]");
            let net: IpNet = text
                .parse()
                .map_err(|_| bad(&field, &format!("{text:?} is no CIDR such as 192.0.2.0/24")))?;
            if net.trunc() != net {
                let cause = format!("{net} has host bits set; the range is {}", net.trunc());
                return Err(bad(&field, &cause));
            }
            usable(net.addr()).map_err(|cause| bad(&field, &cause))?;
            ranges.push(Range::of(net));
        }
        for (i, text) in texts("ranges")?.iter().enumerate() {
            let field = format!("spec.ranges[{i}]");
            let range = Range::parse(text).map_err(|cause| bad(&field, &cause))?;
            usable(address(range.first, range.v6)).map_err(|cause| bad(&field, &cause))?;
            ranges.push(range);
        }
        if ranges.is_empty() {
            return Err(bad("spec", "has neither cidrs nor ranges, so there is no address in it"));
        }
        let namespaces = texts("namespaces")?;
        Ok(Self {
            ranges,
            selector: selector(value.pointer("/spec/serviceSelector")).map_err(|(f, c)| bad(&f, &c))?,
            namespaces: (!namespaces.is_empty()).then(|| namespaces.into_iter().collect()),
            name,
        })
    }

    /// Whether Services like this one may have addresses of it.
    #[must_use]
    pub(crate) fn serves(&self, service: &LbService) -> bool {
        self.namespaces.as_ref().is_none_or(|n| n.contains(&service.name.0))
            && self.selector.as_ref().is_none_or(|s| s.iter().all(|r| r.matches(&service.labels)))
    }

    /// Whether an address is in it.
    #[must_use]
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        self.ranges.iter().any(|r| r.contains(address))
    }

    /// What it has, as prefixes.
    pub(crate) fn prefixes(&self) -> Vec<IpNet> {
        let of = |range: &Range| -> Vec<IpNet> {
            match (address(range.first, range.v6), address(range.last, range.v6)) {
                (IpAddr::V4(first), IpAddr::V4(last)) => {
                    Ipv4Subnets::new(first, last, 0).map(IpNet::V4).collect()
                }
                (IpAddr::V6(first), IpAddr::V6(last)) => {
                    Ipv6Subnets::new(first, last, 0).map(IpNet::V6).collect()
                }
                // Both ends of a range are of one family.
                _ => Vec::new(),
            }
        };
        self.ranges.iter().flat_map(of).collect()
    }

    /// Whether it has addresses of a family.
    #[must_use]
    pub(crate) fn has_family(&self, v6: bool) -> bool {
        self.ranges.iter().any(|r| r.v6 == v6)
    }

    /// Number of addresses of a family.
    #[must_use]
    pub(crate) fn size(&self, v6: bool) -> u128 {
        self.ranges.iter().filter(|r| r.v6 == v6).fold(0, |sum, r| sum.saturating_add(r.size()))
    }

    /// The first address of a family that is not taken.
    #[must_use]
    pub(crate) fn free(&self, v6: bool, taken: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        self.ranges.iter().filter(|r| r.v6 == v6).flat_map(Range::addresses).find(|a| !taken(*a))
    }

    /// Made for some Services rather than for all.
    #[must_use]
    pub(crate) fn is_special(&self) -> bool {
        self.selector.is_some() || self.namespaces.is_some()
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges: Vec<String> = self.ranges.iter().map(ToString::to_string).collect();
        write!(f, "{} ({})", self.name, ranges.join(", "))
    }
}

/// What no service can answer at.
fn usable(address: IpAddr) -> Result<(), String> {
    let mapped = matches!(address, IpAddr::V6(a) if a.to_ipv4_mapped().is_some());
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || mapped {
        return Err(format!("{address} cannot be the address of a load balancer"));
    }
    Ok(())
}

type Bad = (String, String);

fn selector(value: Option<&Value>) -> Result<Option<Vec<Requirement>>, Bad> {
    let Some(value) = value.filter(|v| !v.is_null()) else { return Ok(None) };
    let mut out: Vec<Requirement> =
        strings(value.get("matchLabels")).into_iter().map(|(k, v)| Requirement::In(k, vec![v])).collect();
    let expressions = value.get("matchExpressions").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    for (i, expression) in expressions.iter().enumerate() {
        let field = |name: &str| format!("spec.serviceSelector.matchExpressions[{i}].{name}");
        let text = |name: &str| expression.get(name).and_then(Value::as_str).unwrap_or_default();
        let values = expression.get("values").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let values: Vec<String> = values.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        let key = text("key").to_owned();
        if key.is_empty() {
            return Err((field("key"), "is required".into()));
        }
        let operator = text("operator");
        if values.is_empty() == matches!(operator, "In" | "NotIn") {
            return Err((field("values"), format!("does not fit operator {operator:?}")));
        }
        out.push(match operator {
            "In" => Requirement::In(key, values),
            "NotIn" => Requirement::NotIn(key, values),
            "Exists" => Requirement::Exists(key),
            "DoesNotExist" => Requirement::DoesNotExist(key),
            other => {
                return Err((
                    field("operator"),
                    format!("{other:?} is not In, NotIn, Exists or DoesNotExist"),
                ));
            }
        });
    }
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn read(spec: &Value) -> Result<Pool, String> {
        Pool::read(&json!({"metadata": {"name": "p"}, "spec": spec}))
    }

    #[test]
    fn a_pool_hands_out_what_hosts_can_have() {
        let pool =
            read(&json!({"cidrs": ["192.0.2.0/30", "2001:db8::/64"], "ranges": ["192.0.2.9-192.0.2.10"]}));
        let pool = pool.unwrap();
        assert_eq!((pool.size(false), pool.size(true)), (4, u128::from(u64::MAX)));
        let mut taken = BTreeSet::new();
        while let Some(free) = pool.free(false, |a| taken.contains(&a)) {
            taken.insert(free);
        }
        let got: Vec<String> = taken.iter().map(ToString::to_string).collect();
        assert_eq!(got, ["192.0.2.1", "192.0.2.2", "192.0.2.9", "192.0.2.10"]);
        assert_eq!(pool.free(true, |_| false), Some(ip("2001:db8::1")));
        let prefixes = pool.prefixes();
        assert!(prefixes.contains(&"192.0.2.9/32".parse().unwrap()), "{prefixes:?}");
        assert!(prefixes.iter().any(|p| p.contains(&ip("2001:db8::ffff"))));
        assert!(!prefixes.iter().any(|p| p.contains(&ip("192.0.2.3"))));
        assert!(pool.contains(ip("2001:db8::ffff")) && !pool.contains(ip("192.0.2.3")));
        for (cidr, size) in [("192.0.2.7/32", 1), ("192.0.2.6/31", 2), ("2001:db8::/127", 2)] {
            let pool = read(&json!({"cidrs": [cidr]})).unwrap();
            assert_eq!(pool.size(false) + pool.size(true), size, "{cidr}");
        }
    }

    #[test]
    fn malformed_pools_are_refused_by_field() {
        for (spec, part) in [
            (json!({}), "spec: has neither"),
            (json!({"cidrs": ["x"]}), "spec.cidrs[0]: \"x\" is no CIDR"),
            (json!({"cidrs": ["192.0.2.1/24"]}), "the range is 192.0.2.0/24"),
            (json!({"cidrs": ["127.0.0.0/8"]}), "cannot be the address"),
            (json!({"cidrs": "192.0.2.0/24"}), "is no list"),
            (json!({"ranges": ["192.0.2.9-192.0.2.1"]}), "ends before it begins"),
            (json!({"ranges": ["192.0.2.9-2001:db8::1"]}), "spec.ranges[0]"),
            (json!({"ranges": ["a"]}), "FIRST-LAST"),
            (
                json!({"cidrs": ["192.0.2.0/24"],
                       "serviceSelector": {"matchExpressions": [{"key": "a", "operator": "Like"}]}}),
                "operator",
            ),
        ] {
            let error = read(&spec).unwrap_err();
            assert!(error.starts_with("LoadBalancerPool p: ") && error.contains(part), "{spec}: {error}");
        }
    }

    #[test]
    fn selectors_and_namespaces_choose_services() {
        let service = |namespace: &str, tier: &str| {
            LbService::read(
                &json!({"metadata": {"namespace": namespace, "name": "a", "labels": {"tier": tier}},
                                    "spec": {"type": "LoadBalancer"}}),
            )
            .unwrap()
        };
        let pool = read(&json!({"cidrs": ["192.0.2.0/24"], "namespaces": ["shop"],
            "serviceSelector": {"matchLabels": {"tier": "web"},
                "matchExpressions": [{"key": "old", "operator": "DoesNotExist"},
                                     {"key": "tier", "operator": "NotIn", "values": ["db"]}]}}));
        let pool = pool.unwrap();
        assert!(pool.is_special());
        assert!(pool.serves(&service("shop", "web")));
        assert!(!pool.serves(&service("shop", "db")));
        assert!(!pool.serves(&service("other", "web")));
    }
}
