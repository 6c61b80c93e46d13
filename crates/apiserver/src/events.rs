//! The two shapes of an Event: core/v1, in which it is stored, and events.k8s.io/v1. Pure.
//!
//! They are the only kind that Kubernetes itself serves in two groups and that clients of both mix: a controller
//! writes the new shape, `kubectl describe` reads the old one.

use serde_json::{Map, Value};

use crate::kinds::KindInfo;

/// Group of the newer shape.
pub(crate) const GROUP: &str = "events.k8s.io";

/// Field names: core/v1, events.k8s.io/v1. All other fields are the same in both.
const FIELDS: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

/// The field's name in the newer shape.
pub(crate) fn new_name(core: &str) -> &str {
    FIELDS.iter().find(|(old, _)| *old == core).map_or(core, |(_, new)| new)
}

/// Renames the fields of the newer shape to those of the stored one.
pub(crate) fn to_core(fields: &mut Map<String, Value>) {
    for (old, new) in FIELDS {
        if let Some(value) = fields.remove(new) {
            fields.insert(old.to_owned(), value);
        }
    }
}

/// A field selector for the newer shape, for the stored one.
pub(crate) fn selector_to_core(text: &str) -> String {
    text.replace("regarding.", "involvedObject.").replace("reportingController", "reportingComponent")
}

/// The newer kind, as discovery lists it.
pub(crate) fn alias(core: &KindInfo) -> KindInfo {
    KindInfo { group: GROUP.to_owned(), ..core.clone() }
}
