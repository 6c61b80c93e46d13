//! Events of the lab's own parts, written into the lab's API.

use jiff::Timestamp;
use podway_apiserver::{Store, Subresource, WriteOptions, get_str};
use podway_workloads::{Event, EventType, Involved, rfc3339};
use serde_json::Value;

/// Records an event about `object`. The same event again counts up instead of making a second one.
pub(crate) fn record(
    store: &Store,
    object: &Value,
    component: &'static str,
    type_: EventType,
    reason: &'static str,
    message: impl Into<String>,
) {
    let event = Event {
        involved: Involved {
            api_version: get_str(object, &["apiVersion"]).to_owned(),
            kind: get_str(object, &["kind"]).to_owned(),
            namespace: get_str(object, &["metadata", "namespace"]).to_owned(),
            name: get_str(object, &["metadata", "name"]).to_owned(),
            uid: get_str(object, &["metadata", "uid"]).to_owned(),
        },
        type_,
        reason,
        message: message.into(),
        component,
    };
    write(store, &event);
}

/// Writes an event of the controllers or of [`record`].
pub(crate) fn write(store: &Store, event: &Event) {
    let now = Timestamp::now();
    let object = event.to_object(now);
    let Ok(key) = store.key_of(&object) else { return };
    let again = store.modify(&key, Subresource::Main, |known| {
        let count = known["count"].as_u64().unwrap_or(1);
        known["count"] = count.saturating_add(1).into();
        known["lastTimestamp"] = rfc3339(now).into();
        Ok(())
    });
    if again.is_err()
        && let Err(error) = store.create(object, WriteOptions::default())
    {
        // An event about an object whose namespace is going has no place to be.
        tracing::debug!(%error, reason = event.reason, message = event.message, "event not recorded");
    }
}
