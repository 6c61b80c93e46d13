//! Drives the pure controllers: after every change of the store, and when they ask to be called again.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use podway_apiserver::{
    ApiError, DeleteOptions, GroupResource, Precondition, ResourceKey, Store, Subresource, WriteOptions,
};
use podway_workloads::{Config, Op, Plan, World, reconcile};

use crate::events;
use crate::spec::LabSpec;

/// Changes that come within this time are looked at together.
const DEBOUNCE: Duration = Duration::from_millis(15);
/// Rounds without a pause. Each round may lead to the next (Deployment, ReplicaSet, Pod, placement, endpoints).
const ROUNDS: u32 = 50;
/// The pause when the rounds are used up: something is refused again and again.
const COOL_DOWN: Duration = Duration::from_secs(1);

/// What the controllers look at.
const RESOURCES: &[(&str, &str)] = &[
    ("", "nodes"),
    ("", "pods"),
    ("", "services"),
    ("", "endpoints"),
    ("", "events"),
    ("", "namespaces"),
    ("", "replicationcontrollers"),
    ("apps", "controllerrevisions"),
    ("apps", "daemonsets"),
    ("apps", "deployments"),
    ("apps", "replicasets"),
    ("apps", "statefulsets"),
    ("batch", "cronjobs"),
    ("batch", "jobs"),
    ("discovery.k8s.io", "endpointslices"),
];

pub(super) fn config(spec: &LabSpec) -> Config {
    Config { cluster_cidrs: spec.cluster_cidrs(), service_cidrs: spec.service_cidrs(), ..Config::default() }
}

/// Runs for as long as the lab does.
pub(super) async fn run(store: Arc<Store>, config: Config) {
    let resources: Vec<GroupResource> =
        RESOURCES.iter().map(|(group, resource)| GroupResource::new(*group, *resource)).collect();
    let mut changes = store.changes();
    let mut rounds = 0;
    loop {
        changes.borrow_and_update();
        let plan = look(&store, &resources, &config);
        let recheck = plan.recheck_at;
        let idle = plan.ops.is_empty();
        for op in plan.ops {
            apply(&store, op);
        }
        if idle {
            rounds = 0;
            let wait = recheck.map(|at| at.duration_since(Timestamp::now()).try_into().unwrap_or(DEBOUNCE));
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(wait.unwrap_or_default().max(DEBOUNCE)), if wait.is_some() => {}
            }
            tokio::time::sleep(DEBOUNCE).await;
        } else if rounds < ROUNDS {
            rounds += 1;
            tokio::task::yield_now().await;
        } else {
            tracing::warn!(rounds, "controllers do not come to rest");
            rounds = 0;
            tokio::time::sleep(COOL_DOWN).await;
        }
    }
}

fn look(store: &Store, resources: &[GroupResource], config: &Config) -> Plan {
    let snapshot = store.snapshot(resources);
    let world = World::new(Timestamp::now(), snapshot.objects.iter().map(|o| &**o));
    reconcile(&world, config)
}

fn apply(store: &Store, op: Op) {
    let (verb, result) = match op {
        Op::Create(object) => ("create", store.create(object, WriteOptions::default()).map(drop)),
        Op::Update(object) => (
            "update",
            store
                .key_of(&object)
                .and_then(|key| store.update(&key, object, Subresource::Main, WriteOptions::default()))
                .map(drop),
        ),
        Op::UpdateStatus(object) => ("update status", store.update_status(object).map(drop)),
        Op::Delete(deletion) => {
            let options = DeleteOptions {
                grace_period_seconds: deletion.grace,
                precondition: Precondition {
                    uid: (!deletion.uid.is_empty()).then_some(deletion.uid),
                    resource_version: None,
                },
                ..DeleteOptions::default()
            };
            let result = match store.kind_of(deletion.api_version, deletion.kind) {
                Some(kind) => {
                    let resource = kind.group_resource();
                    let key = ResourceKey { resource, namespace: deletion.namespace, name: deletion.name };
                    store.delete(&key, &options).map(drop)
                }
                None => Err(ApiError::bad_request(format!("no kind {}", deletion.kind))),
            };
            ("delete", result)
        }
        Op::Event(event) => {
            events::write(store, &event);
            return;
        }
    };
    match result {
        Ok(()) => {}
        // Somebody was faster; the next look sees what is there now.
        Err(error) if error.is_conflict() || error.is_not_found() || error.is_already_exists() => {
            tracing::debug!(verb, %error, "overtaken");
        }
        Err(error) => tracing::warn!(verb, %error, "controller's write refused"),
    }
}
