//! What a node offers and what a pod asks of one: taints, tolerations, node selectors and node affinity.
//! The scheduler and the DaemonSet controller share it.

use serde_json::Value;

use crate::read::{self, Malformed};
use crate::selector::{NodeTerm, Selector};
use crate::world::Object;

/// What a taint does to pods that do not tolerate it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    NoSchedule,
    PreferNoSchedule,
    NoExecute,
}

/// A taint of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Taint<'a> {
    pub(crate) key: &'a str,
    pub(crate) value: &'a str,
    effect: Effect,
}

/// A node, as far as placing pods is concerned.
#[derive(Debug, Clone)]
pub(crate) struct NodeInfo<'a> {
    pub(crate) object: Object<'a>,
    taints: Vec<Taint<'a>>,
    /// `status.allocatable.pods`; nothing when the node does not say.
    pub(crate) max_pods: Option<usize>,
}

impl<'a> NodeInfo<'a> {
    pub(crate) fn parse(node: &Object<'a>) -> Result<Self, Malformed> {
        let mut taints = Vec::new();
        for (i, taint) in read::list(node.value, "spec.taints")?.iter().enumerate() {
            let inside = |error: Malformed| error.within(&format!("spec.taints[{i}]"));
            let effect = match read::string(taint, "effect").map_err(inside)?.unwrap_or_default() {
                "NoSchedule" => Effect::NoSchedule,
                "PreferNoSchedule" => Effect::PreferNoSchedule,
                "NoExecute" => Effect::NoExecute,
                other => {
                    let cause = format!("{other:?} is not one of NoSchedule, PreferNoSchedule, NoExecute");
                    return Err(inside(Malformed::new("effect", cause)));
                }
            };
            let key = read::string(taint, "key").map_err(inside)?.unwrap_or_default();
            let value = read::string(taint, "value").map_err(inside)?.unwrap_or_default();
            taints.push(Taint { key, value, effect });
        }
        // What the node controllers would write as taints, read from where they would read it.
        let mut implied = |key| {
            if !taints.iter().any(|taint| taint.key == key) {
                taints.push(Taint { key, value: "", effect: Effect::NoSchedule });
            }
        };
        if read::boolean(node.value, "spec.unschedulable")?.unwrap_or(false) {
            implied("node.kubernetes.io/unschedulable");
        }
        match read::condition(node.value, "Ready").and_then(|condition| read::text(condition, "status")) {
            Some("True") => {}
            Some("Unknown") => implied("node.kubernetes.io/unreachable"),
            // Nobody has ever said that it is: as with False, every node is born with this taint.
            _ => implied("node.kubernetes.io/not-ready"),
        }
        let max_pods = match read::at(node.value, "status.allocatable.pods") {
            Some(Value::String(text)) => text.parse().ok(),
            Some(number) => number.as_u64().and_then(|n| usize::try_from(n).ok()),
            None => None,
        };
        Ok(Self { object: *node, taints, max_pods })
    }

    pub(crate) fn label(&self, key: &str) -> Option<&'a str> {
        read::label(self.object.labels, key)
    }
}

#[derive(Debug, Clone)]
struct Toleration<'a> {
    /// None: every key.
    key: Option<&'a str>,
    /// None: every value.
    value: Option<&'a str>,
    /// None: every effect.
    effect: Option<Effect>,
}

impl<'a> Toleration<'a> {
    fn parse(toleration: &'a Value) -> Result<Self, Malformed> {
        let key = read::string(toleration, "key")?.filter(|key| !key.is_empty());
        let value = read::string(toleration, "value")?.unwrap_or_default();
        let value = match read::string(toleration, "operator")?.filter(|o| !o.is_empty()).unwrap_or("Equal") {
            "Exists" => None,
            "Equal" if key.is_none() => {
                return Err(Malformed::new("key", "required when the operator is Equal"));
            }
            "Equal" => Some(value),
            other => {
                return Err(Malformed::new("operator", format!("{other:?} is not one of Exists, Equal")));
            }
        };
        let effect = match read::string(toleration, "effect")?.unwrap_or_default() {
            "" => None,
            "NoSchedule" => Some(Effect::NoSchedule),
            "PreferNoSchedule" => Some(Effect::PreferNoSchedule),
            "NoExecute" => Some(Effect::NoExecute),
            other => {
                let cause = format!("{other:?} is not one of NoSchedule, PreferNoSchedule, NoExecute");
                return Err(Malformed::new("effect", cause));
            }
        };
        Ok(Self { key, value, effect })
    }

    fn tolerates(&self, taint: &Taint<'_>) -> bool {
        self.key.is_none_or(|key| key == taint.key)
            && self.value.is_none_or(|value| value == taint.value)
            && self.effect.is_none_or(|effect| effect == taint.effect)
    }
}

/// What a pod's spec says about the node itself.
#[derive(Debug, Clone)]
pub(crate) struct NodeRules<'a> {
    selector: Selector<'a>,
    /// Any of these terms; nothing when there is no such affinity.
    required: Option<Vec<NodeTerm<'a>>>,
    preferred: Vec<(i64, NodeTerm<'a>)>,
    tolerations: Vec<Toleration<'a>>,
}

impl<'a> NodeRules<'a> {
    /// From a pod's `spec`.
    pub(crate) fn parse(spec: &'a Value) -> Result<Self, Malformed> {
        const REQUIRED: &str =
            "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms";
        const PREFERRED: &str = "affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution";
        let mut required = None;
        if read::at(spec, REQUIRED).is_some() {
            let terms = required.insert(Vec::new());
            for (i, term) in read::list(spec, REQUIRED)?.iter().enumerate() {
                terms.push(NodeTerm::parse(term).map_err(|e| e.within(&format!("{REQUIRED}[{i}]")))?);
            }
        }
        let mut preferred = Vec::new();
        for (i, item) in read::list(spec, PREFERRED)?.iter().enumerate() {
            let inside = |error: Malformed| error.within(&format!("{PREFERRED}[{i}]"));
            let weight = read::count(item, "weight").map_err(inside)?.unwrap_or(0);
            if let Some(term) = read::at(item, "preference") {
                let term = NodeTerm::parse(term).map_err(|e| inside(e.within("preference")))?;
                preferred.push((weight, term));
            }
        }
        let mut tolerations = Vec::new();
        for (i, toleration) in read::list(spec, "tolerations")?.iter().enumerate() {
            tolerations
                .push(Toleration::parse(toleration).map_err(|e| e.within(&format!("tolerations[{i}]")))?);
        }
        Ok(Self {
            selector: Selector::from_map(read::labels(spec, "nodeSelector")?),
            required,
            preferred,
            tolerations,
        })
    }

    /// nodeSelector and required node affinity.
    pub(crate) fn select(&self, node: &Object<'_>) -> bool {
        self.selector.matches(node.labels)
            && self.required.as_ref().is_none_or(|terms| terms.iter().any(|term| term.matches(node)))
    }

    /// The first taint with one of these effects that the pod does not tolerate.
    pub(crate) fn untolerated<'n>(&self, node: &NodeInfo<'n>, effects: &[Effect]) -> Option<Taint<'n>> {
        let hurts = |taint: &&Taint<'n>| {
            effects.contains(&taint.effect) && !self.tolerations.iter().any(|t| t.tolerates(taint))
        };
        node.taints.iter().find(hurts).copied()
    }

    /// How much the pod would like this node: weights of preferred terms, less one for each soft taint.
    pub(crate) fn preference(&self, node: &NodeInfo<'_>) -> i64 {
        let liked: i64 = self.preferred.iter().filter(|(_, t)| t.matches(&node.object)).map(|(w, _)| w).sum();
        let soft = |taint: &&Taint<'_>| {
            taint.effect == Effect::PreferNoSchedule && !self.tolerations.iter().any(|t| t.tolerates(taint))
        };
        liked - i64::try_from(node.taints.iter().filter(soft).count()).unwrap_or(i64::MAX)
    }
}
