//! What a reconcile asks its caller to do. Values only: applying them is the caller's business.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::names;

/// One write to the API, to be applied in order.
///
/// An operation may be refused by the store (a conflict, a name already taken, an object that has gone): the
/// caller then drops it and reconciles again from a fresh snapshot.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// Create this object. It carries `apiVersion`, `kind`, `metadata.name` and, when namespaced,
    /// `metadata.namespace`; the store adds uid, resourceVersion and creationTimestamp.
    Create(Value),
    /// Replace the whole object except its status. `metadata.resourceVersion` is the snapshot's, so that a store
    /// with optimistic locking refuses the write when somebody else was faster.
    Update(Value),
    /// Replace the object's status. The rest of the value is the snapshot's.
    UpdateStatus(Value),
    /// Delete an object.
    Delete(Deletion),
    /// Record an event. [`Event::to_object`] makes the `v1` Event to create.
    Event(Event),
}

/// Which object to delete, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deletion {
    /// For example `v1` or `apps/v1`.
    pub api_version: &'static str,
    /// For example `Pod`.
    pub kind: &'static str,
    /// Empty for cluster-scoped kinds.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// Precondition: delete only the object with this uid. A StatefulSet reuses names, so a late deletion without
    /// the precondition would hit the successor. Empty when the snapshot's object had none.
    pub uid: String,
    /// `gracePeriodSeconds` of the deletion; absent means the object's own default.
    pub grace: Option<u64>,
}

/// `type` of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventType {
    /// Something expected happened.
    Normal,
    /// Somebody has to look at it.
    Warning,
}

impl EventType {
    /// The API's spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// The object that an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Involved {
    /// For example `apps/v1`.
    pub api_version: String,
    /// For example `Deployment`.
    pub kind: String,
    /// Empty for cluster-scoped kinds.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`, or empty when the object has none.
    pub uid: String,
}

/// An event to record about an object.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Event {
    /// The object it is about.
    pub involved: Involved,
    /// Normal or warning.
    pub type_: EventType,
    /// One CamelCase word, such as `FailedScheduling`.
    pub reason: &'static str,
    /// For people: what, why, and what to do.
    pub message: String,
    /// Which controller says so (`source.component`).
    pub component: &'static str,
}

impl Event {
    /// The namespace in which the event is kept: the object's, or `default` for cluster-scoped objects.
    pub fn namespace(&self) -> &str {
        if self.involved.namespace.is_empty() { "default" } else { &self.involved.namespace }
    }

    /// The name of the event object: the object's name and a hash of everything that makes the event what it is.
    /// The same event has the same name, which is how a reconcile knows that it has been said already.
    pub fn name(&self) -> String {
        let mut hash = names::Fnv64::new();
        for part in [
            self.involved.kind.as_str(),
            &self.involved.namespace,
            &self.involved.name,
            &self.involved.uid,
            self.type_.as_str(),
            self.reason,
            &self.message,
        ] {
            hash.write(part.as_bytes());
            hash.write(&[0]);
        }
        // A name has at most 253 bytes, and parts that end in a letter or digit.
        let object = names::truncated(&self.involved.name, 236).trim_end_matches(['-', '.']);
        let object = if object.is_empty() { "unnamed" } else { object };
        format!("{object}.{:016x}", hash.finish())
    }

    /// The `v1` Event object to create, first and last seen at `now`.
    pub fn to_object(&self, now: Timestamp) -> Value {
        let stamp = rfc3339(now);
        json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": { "name": self.name(), "namespace": self.namespace() },
            "involvedObject": {
                "apiVersion": self.involved.api_version,
                "kind": self.involved.kind,
                "namespace": self.involved.namespace,
                "name": self.involved.name,
                "uid": self.involved.uid,
            },
            "type": self.type_.as_str(),
            "reason": self.reason,
            "message": self.message,
            "source": { "component": self.component },
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        })
    }
}

/// The API's `metav1.Time`: RFC 3339, UTC, whole seconds.
pub fn rfc3339(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_names_are_valid_and_tell_events_apart() {
        let event = |name: &str, message: &str| Event {
            involved: Involved {
                api_version: "v1".into(),
                kind: "Pod".into(),
                namespace: "default".into(),
                name: name.into(),
                uid: "1".into(),
            },
            type_: EventType::Normal,
            reason: "Scheduled",
            message: message.into(),
            component: "default-scheduler",
        };
        let long = format!("{}-{}", "x".repeat(235), "y".repeat(17));
        for name in ["web-0", &long, ""] {
            let event_name = event(name, "a").name();
            assert!(event_name.len() <= 253 && !event_name.starts_with('.') && !event_name.contains("-."));
            assert_eq!(event_name, event(name, "a").name());
            assert_ne!(event_name, event(name, "b").name());
        }
        let object = event("web-0", "a").to_object(Timestamp::UNIX_EPOCH);
        assert_eq!(object["lastTimestamp"], "1970-01-01T00:00:00Z");
        assert_eq!(object["involvedObject"]["kind"], "Pod");
    }
}
