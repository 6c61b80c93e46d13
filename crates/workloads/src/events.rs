//! Events do not stay for ever.

use std::collections::HashSet;

use crate::endpoints;
use crate::planner::Planner;
use crate::read;
use crate::services;
use crate::world::{INVALID_COMPONENT, Kind, Object};

/// Delete events that nobody has repeated for the configured time.
pub(crate) fn expire(planner: &mut Planner<'_, '_>) {
    let world = planner.world;
    for event in world.all(Kind::Event).iter().filter(|event| !event.deleting) {
        let Some(at) = last_seen(event).and_then(|seen| seen.checked_add(planner.config.event_ttl).ok())
        else {
            continue;
        };
        if at <= world.now {
            planner.delete(Kind::Event, event);
        } else {
            planner.recheck_at(at);
        }
    }
}

/// Delete warnings about Services that no longer hold: the Service was corrected, or what it asks for became free.
///
/// Every Service is judged in every round, so what has not been said again is over. Pods and workloads need none of
/// this, because their own status says how they are.
pub(crate) fn retract(planner: &mut Planner<'_, '_>) {
    let world = planner.world;
    let holds: HashSet<(String, String)> =
        planner.said.iter().map(|event| (event.namespace().to_owned(), event.name())).collect();
    let ours = |event: &&Object<'_>| {
        let component = read::text(event.value, "source.component");
        !event.deleting
            && read::text(event.value, "type") == Some("Warning")
            && read::text(event.value, "involvedObject.kind") == Some("Service")
            && [services::COMPONENT, endpoints::COMPONENT, INVALID_COMPONENT].map(Some).contains(&component)
    };
    for event in world.all(Kind::Event).iter().filter(ours) {
        if !holds.contains(&(event.namespace.to_owned(), event.name.to_owned())) {
            planner.delete(Kind::Event, event);
        }
    }
}

/// Of either API: `v1` has `lastTimestamp`, `events.k8s.io/v1` has `series` and `eventTime`.
fn last_seen(event: &Object<'_>) -> Option<jiff::Timestamp> {
    [
        "series.lastObservedTime",
        "lastTimestamp",
        "deprecatedLastTimestamp",
        "eventTime",
        "metadata.creationTimestamp",
    ]
    .iter()
    .find_map(|path| read::text(event.value, path)?.parse().ok())
}
