//! What kube-controller-manager, the scheduler and the service allocators do, as one pure function.
//!
//! [`reconcile`] looks at a snapshot of a cluster's objects and says what has to be written so that Deployments get
//! their ReplicaSets, ReplicaSets their Pods, Pods a node, Services their addresses, and so on. It does no I/O, has no
//! clock and no memory: the same snapshot gives the same answer, and a snapshot that is as it should be gives an empty
//! one. Whoever holds the objects calls it after every change and applies the result:
//!
//! ```
//! use podway_workloads::{Config, Op, World, reconcile};
//! # let objects: Vec<serde_json::Value> = Vec::new();
//! # let now = jiff::Timestamp::UNIX_EPOCH;
//! let plan = reconcile(&World::new(now, &objects), &Config::default());
//! for op in plan.ops {
//!     match op {
//!         Op::Create(object) | Op::Update(object) | Op::UpdateStatus(object) => drop(object),
//!         Op::Delete(deletion) => drop(deletion),
//!         Op::Event(event) => drop(event.to_object(now)),
//!     }
//! }
//! // and again at plan.recheck_at, or when an object changes.
//! ```
//!
//! [`defaults::apply`] fills in what the API server would, and belongs before an object enters the store.
//!
//! May use: JSON values, address arithmetic. Never: I/O, clocks, threads.

mod config;
pub mod defaults;
mod endpoints;
mod events;
pub mod expand;
pub mod hints;
mod names;
mod nodes;
mod op;
mod placement;
mod planner;
mod read;
mod scheduler;
mod selector;
mod services;
mod workloads;
mod world;

#[cfg(test)]
mod lifecycle_tests;
#[cfg(test)]
mod recorded_tests;
#[cfg(test)]
mod testing;

pub use config::{Config, ReservedAddress};
pub use op::{Deletion, Event, EventType, Involved, Op, rfc3339};
pub use planner::Plan;
pub use read::Malformed;
pub use world::World;

use planner::Planner;

/// Everything that has to be written now, given this snapshot.
///
/// Level-triggered: an operation that failed or got lost is asked for again by the next call, and after all have been
/// applied the next call asks for nothing (until time passes or something changes). Controllers that wait for others
/// (a ReplicaSet needs the uid that the store gives it before it can own pods) go one step a call.
pub fn reconcile(world: &World<'_>, config: &Config) -> Plan {
    let mut planner = Planner::new(world, config);
    for event in &world.unreadable {
        planner.say(event.clone());
    }
    nodes::reconcile(&mut planner);
    workloads::reconcile(&mut planner);
    scheduler::reconcile(&mut planner);
    services::reconcile(&mut planner);
    endpoints::reconcile(&mut planner);
    events::retract(&mut planner);
    events::expire(&mut planner);
    planner.finish()
}
