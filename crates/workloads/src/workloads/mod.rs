//! Controllers that turn workload objects into pods.
//!
//! Each counts its pods from the snapshot rather than trusting somebody's status, creates what is missing, deletes what
//! is too much, and writes its status when that has changed.

mod daemonset;
mod deployment;
mod job;
mod pods;
mod replicas;
mod revisions;
mod statefulset;

#[cfg(test)]
mod tests;

pub(crate) use pods::owner_reference;

use crate::planner::Planner;
use crate::read::Malformed;
use crate::world::{Kind, Object};

/// Run every workload controller.
pub(crate) fn reconcile<'a>(planner: &mut Planner<'_, 'a>) {
    each(planner, Kind::Deployment, deployment::reconcile);
    each(planner, Kind::ReplicaSet, replicas::reconcile_set);
    each(planner, Kind::ReplicationController, replicas::reconcile_controller);
    each(planner, Kind::StatefulSet, statefulset::reconcile);
    each(planner, Kind::DaemonSet, daemonset::reconcile);
    each(planner, Kind::Job, job::reconcile);
}

fn each<'w, 'a>(
    planner: &mut Planner<'w, 'a>,
    kind: Kind,
    reconcile: fn(&mut Planner<'w, 'a>, &Object<'a>) -> Result<(), Malformed>,
) {
    let world = planner.world;
    for object in world.all(kind) {
        // An object on its way out is the garbage collector's.
        if object.deleting {
            continue;
        }
        if let Err(error) = reconcile(planner, object) {
            planner.malformed(object, &error);
        }
    }
}
