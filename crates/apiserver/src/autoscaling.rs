//! The two versions of a HorizontalPodAutoscaler: autoscaling/v2, in which it is stored, and autoscaling/v1, which
//! `kubectl autoscale` writes. Pure.
//!
//! It is the only built-in kind whose versions differ in their fields. The older one has a single target, CPU, as a
//! number; what it cannot say (other metrics, behavior, conditions) is not shown in it, and stays when it is written.

use serde_json::{Value, json};

use crate::json;
use crate::kinds::KindInfo;

const GROUP: &str = "autoscaling";
const KIND: &str = "HorizontalPodAutoscaler";
const OLDER: &str = "v1";

/// A part of the object: its name, the older version's number, the newer one's list, where the number is within an
/// entry's `resource`, and what only the newer one has.
struct Part {
    name: &'static str,
    number: &'static str,
    list: &'static str,
    holder: &'static str,
    newer: &'static str,
}

const PARTS: [Part; 2] = [
    Part {
        name: "spec",
        number: "targetCPUUtilizationPercentage",
        list: "metrics",
        holder: "target",
        newer: "behavior",
    },
    Part {
        name: "status",
        number: "currentCPUUtilizationPercentage",
        list: "currentMetrics",
        holder: "current",
        newer: "conditions",
    },
];

impl Part {
    /// The number of a metric that the older version can say: the utilization of CPU.
    fn utilization<'a>(&self, metric: &'a Value) -> Option<&'a Value> {
        let resource = &metric["resource"];
        let is_cpu = metric["type"] == "Resource" && resource["name"] == "cpu";
        json::at(resource, &[self.holder, "averageUtilization"]).filter(|_| is_cpu)
    }

    fn metric(&self, utilization: &Value) -> Value {
        let mut value = json!({"averageUtilization": utilization});
        if self.holder == "target" {
            value["type"] = json!("Utilization");
        }
        json!({"type": "Resource", "resource": {"name": "cpu", self.holder: value}})
    }
}

/// Whether objects of this kind have another shape in this version than they are stored in.
pub(crate) fn is_older(kind: &KindInfo, version: &str) -> bool {
    kind.is(GROUP, KIND) && version == OLDER
}

/// A stored object in the older shape, without its type.
pub(crate) fn to_older(stored: &Value) -> Value {
    let mut object = stored.clone();
    for part in &PARTS {
        let Some(fields) = object.get_mut(part.name).and_then(Value::as_object_mut) else { continue };
        let list = fields.remove(part.list).unwrap_or(Value::Null);
        let metrics = list.as_array().map(Vec::as_slice).unwrap_or_default();
        if let Some(number) = metrics.iter().find_map(|metric| part.utilization(metric)) {
            fields.insert(part.number.to_owned(), number.clone());
        }
        fields.remove(part.newer);
    }
    object
}

/// Gives an object that a client wrote in the older shape that of the stored one, and what the older one cannot say
/// from `current`. One in the newer shape stays as it is.
pub(crate) fn to_stored(kind: &KindInfo, object: &mut Value, current: Option<&Value>) {
    let older = json::get_str(object, &["apiVersion"]).strip_prefix(GROUP).and_then(|v| v.strip_prefix('/'));
    if older != Some(OLDER) || !kind.is(GROUP, KIND) {
        return;
    }
    for part in &PARTS {
        let Some(fields) = object.get_mut(part.name).and_then(Value::as_object_mut) else { continue };
        let now = |field: &str| current.and_then(|c| json::at(c, &[part.name, field])).cloned();
        let list = fields.remove(part.list).or_else(|| now(part.list));
        let mut metrics = list.and_then(|l| l.as_array().cloned()).unwrap_or_default();
        metrics.retain(|metric| part.utilization(metric).is_none());
        if let Some(number) = fields.remove(part.number).filter(|number| !number.is_null()) {
            metrics.insert(0, part.metric(&number));
        }
        if !metrics.is_empty() {
            fields.insert(part.list.to_owned(), Value::Array(metrics));
        }
        if let (false, Some(kept)) = (fields.contains_key(part.newer), now(part.newer)) {
            fields.insert(part.newer.to_owned(), kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind() -> KindInfo {
        KindInfo::new(GROUP, "v2", KIND, "horizontalpodautoscalers", true)
    }

    fn cpu(percent: i64) -> Value {
        json!({"type": "Resource", "resource": {"name": "cpu",
            "target": {"type": "Utilization", "averageUtilization": percent}}})
    }

    #[test]
    fn the_target_is_a_number_in_one_and_a_metric_in_the_other() {
        let memory = json!({"type": "Resource", "resource": {"name": "memory",
            "target": {"type": "AverageValue", "averageValue": "1Gi"}}});
        let behavior = json!({"scaleDown": {"selectPolicy": "Disabled"}});
        let written = |spec: Value| json!({"apiVersion": "autoscaling/v1", "spec": spec});
        let stored = |spec: Value| json!({"apiVersion": "autoscaling/v1", "spec": spec});
        let current = stored(json!({"maxReplicas": 3, "metrics": [memory, cpu(80)], "behavior": behavior}));
        for (what, object, current, want) in [
            (
                "created",
                written(json!({"maxReplicas": 3, "targetCPUUtilizationPercentage": 50})),
                None,
                stored(json!({"maxReplicas": 3, "metrics": [cpu(50)]})),
            ),
            ("created without", written(json!({"maxReplicas": 3})), None, stored(json!({"maxReplicas": 3}))),
            (
                "changed",
                written(json!({"maxReplicas": 4, "targetCPUUtilizationPercentage": 50})),
                Some(&current),
                stored(json!({"maxReplicas": 4, "metrics": [cpu(50), memory], "behavior": behavior})),
            ),
            (
                "taken away",
                written(json!({"maxReplicas": 3, "targetCPUUtilizationPercentage": null})),
                Some(&current),
                stored(json!({"maxReplicas": 3, "metrics": [memory], "behavior": behavior})),
            ),
        ] {
            let mut object = object;
            to_stored(&kind(), &mut object, current);
            assert_eq!(object, want, "{what}");
        }
        let shown = to_older(&current);
        assert_eq!(shown["spec"], json!({"maxReplicas": 3, "targetCPUUtilizationPercentage": 80}));
    }

    #[test]
    fn the_status_has_what_it_can_say() {
        let stored = json!({"status": {"currentReplicas": 2, "desiredReplicas": 2, "conditions": [{"type": "x"}],
            "currentMetrics": [{"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": 7}}}]}});
        let older = to_older(&stored);
        assert_eq!(
            older["status"],
            json!({"currentReplicas": 2, "desiredReplicas": 2, "currentCPUUtilizationPercentage": 7})
        );
        let mut again = older;
        again["apiVersion"] = json!("autoscaling/v1");
        to_stored(&kind(), &mut again, Some(&stored));
        assert_eq!(again["status"], stored["status"]);
    }

    #[test]
    fn nothing_else_is_touched() {
        let newer = json!({"apiVersion": "autoscaling/v2", "spec": {"metrics": [cpu(1), cpu(2)]}});
        let odd = json!({"apiVersion": "autoscaling/v1", "spec": "odd", "status": []});
        for object in [newer, odd] {
            let mut same = object.clone();
            to_stored(&kind(), &mut same, None);
            assert_eq!(same, object);
        }
        let other = KindInfo::new("example.com", "v1", KIND, "x", true);
        assert!(is_older(&kind(), "v1") && !is_older(&kind(), "v2") && !is_older(&other, "v1"));
    }
}
