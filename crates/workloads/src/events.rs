//! Events do not stay for ever.

use crate::planner::Planner;
use crate::read;
use crate::world::{Kind, Object};

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
