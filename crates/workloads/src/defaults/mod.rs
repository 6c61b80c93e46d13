//! What the API server fills in when an object is created: the defaults of the versioned API types, and the effects of
//! the admission plugins that are always on (DefaultTolerationSeconds, Priority, ServiceAccount).
//!
//! Only adds; a field that is there stays, also when it is of a wrong type: reporting that is validation's business.

mod pod;
mod service;

use serde_json::{Map, Value, json};

/// Fill in the defaults of `object`, an object of `kind` in the kind's current version (`apps/v1`, `batch/v1`,
/// `networking.k8s.io/v1`, …). Kinds without defaults are left alone. Applying it again changes nothing.
///
/// Call it before an object enters the store, on creation and on update. The parts that need the cluster (a Service's
/// addresses and families) are [`crate::reconcile`]'s.
pub fn apply(kind: &str, object: &mut Value) {
    let Some(object) = object.as_object_mut() else { return };
    match kind {
        "Pod" => pod::pod(object),
        "Deployment" => deployment(object),
        "ReplicaSet" => replica_set(object),
        "ReplicationController" => replication_controller(object),
        "StatefulSet" => stateful_set(object),
        "DaemonSet" => daemon_set(object),
        "Job" => job(object),
        "CronJob" => cron_job(object),
        "Service" => service::service(object),
        "Endpoints" => service::endpoints(object),
        "EndpointSlice" => service::endpoint_slice(object),
        "NetworkPolicy" => network_policy(object),
        "Namespace" => namespace(object),
        "Secret" => set(object, "type", || json!("Opaque")),
        "PersistentVolumeClaim" => with(object, "spec", |spec| {
            set(spec, "volumeMode", || json!("Filesystem"));
        }),
        _ => {}
    }
}

/// Insert unless the key has a value; null counts as absent.
fn set(map: &mut Map<String, Value>, key: &str, value: impl FnOnce() -> Value) {
    if map.get(key).is_none_or(Value::is_null) {
        map.insert(key.to_owned(), value());
    }
}

/// Run `f` on the object at `key`, if there is one.
fn with(map: &mut Map<String, Value>, key: &str, f: impl FnOnce(&mut Map<String, Value>)) {
    if let Some(Value::Object(inner)) = map.get_mut(key) {
        f(inner);
    }
}

/// Run `f` on the object at `key`, which is created empty when absent.
fn with_new(map: &mut Map<String, Value>, key: &str, f: impl FnOnce(&mut Map<String, Value>)) {
    set(map, key, || json!({}));
    with(map, key, f);
}

/// Run `f` on each object in the list at `key`.
fn each(map: &mut Map<String, Value>, key: &str, f: impl Fn(&mut Map<String, Value>)) {
    if let Some(Value::Array(items)) = map.get_mut(key) {
        items.iter_mut().filter_map(Value::as_object_mut).for_each(f);
    }
}

fn text<'m>(map: &'m Map<String, Value>, key: &str) -> Option<&'m str> {
    map.get(key).and_then(Value::as_str)
}

/// Defaults of `spec.template`.
fn template(spec: &mut Map<String, Value>) {
    with(spec, "template", |template| {
        with_new(template, "metadata", |_| {});
        with_new(template, "spec", pod::spec);
    });
}

fn deployment(object: &mut Map<String, Value>) {
    with(object, "spec", |spec| {
        set(spec, "replicas", || json!(1));
        template(spec);
        with_new(spec, "strategy", |strategy| {
            set(strategy, "type", || json!("RollingUpdate"));
            if text(strategy, "type") == Some("RollingUpdate") {
                with_new(strategy, "rollingUpdate", |rolling| {
                    set(rolling, "maxUnavailable", || json!("25%"));
                    set(rolling, "maxSurge", || json!("25%"));
                });
            }
        });
        set(spec, "revisionHistoryLimit", || json!(10));
        set(spec, "progressDeadlineSeconds", || json!(600));
    });
}

fn replica_set(object: &mut Map<String, Value>) {
    with(object, "spec", |spec| {
        set(spec, "replicas", || json!(1));
        template(spec);
    });
}

fn replication_controller(object: &mut Map<String, Value>) {
    let labels = object.get("spec").and_then(|spec| spec.pointer("/template/metadata/labels")).cloned();
    with(object, "spec", |spec| {
        set(spec, "replicas", || json!(1));
        if let Some(labels) = &labels {
            set(spec, "selector", || labels.clone());
        }
        template(spec);
    });
    if let Some(labels) = labels {
        with_new(object, "metadata", |metadata| set(metadata, "labels", || labels));
    }
}

fn stateful_set(object: &mut Map<String, Value>) {
    with(object, "spec", |spec| {
        set(spec, "podManagementPolicy", || json!("OrderedReady"));
        with_new(spec, "updateStrategy", |strategy| {
            set(strategy, "type", || json!("RollingUpdate"));
            if text(strategy, "type") == Some("RollingUpdate") {
                with_new(strategy, "rollingUpdate", |rolling| set(rolling, "partition", || json!(0)));
            }
        });
        with_new(spec, "persistentVolumeClaimRetentionPolicy", |policy| {
            set(policy, "whenDeleted", || json!("Retain"));
            set(policy, "whenScaled", || json!("Retain"));
        });
        set(spec, "replicas", || json!(1));
        set(spec, "revisionHistoryLimit", || json!(10));
        template(spec);
    });
}

fn daemon_set(object: &mut Map<String, Value>) {
    with(object, "spec", |spec| {
        with_new(spec, "updateStrategy", |strategy| {
            set(strategy, "type", || json!("RollingUpdate"));
            if text(strategy, "type") == Some("RollingUpdate") {
                with_new(strategy, "rollingUpdate", |rolling| {
                    set(rolling, "maxUnavailable", || json!(1));
                    set(rolling, "maxSurge", || json!(0));
                });
            }
        });
        set(spec, "revisionHistoryLimit", || json!(10));
        template(spec);
    });
}

fn job(object: &mut Map<String, Value>) {
    with(object, "spec", job_spec);
}

fn job_spec(spec: &mut Map<String, Value>) {
    let absent = |spec: &Map<String, Value>, key| spec.get(key).is_none_or(Value::is_null);
    // A work queue (only parallelism given) has no number of completions.
    if absent(spec, "completions") && absent(spec, "parallelism") {
        set(spec, "completions", || json!(1));
    }
    set(spec, "parallelism", || json!(1));
    set(spec, "backoffLimit", || json!(6));
    set(spec, "completionMode", || json!("NonIndexed"));
    set(spec, "suspend", || json!(false));
    let replacement = if absent(spec, "podFailurePolicy") { "TerminatingOrFailed" } else { "Failed" };
    set(spec, "podReplacementPolicy", || json!(replacement));
    template(spec);
}

fn cron_job(object: &mut Map<String, Value>) {
    with(object, "spec", |spec| {
        set(spec, "concurrencyPolicy", || json!("Allow"));
        set(spec, "suspend", || json!(false));
        set(spec, "successfulJobsHistoryLimit", || json!(3));
        set(spec, "failedJobsHistoryLimit", || json!(1));
        with(spec, "jobTemplate", |template| with(template, "spec", self::template));
    });
}

fn network_policy(object: &mut Map<String, Value>) {
    with(object, "spec", |spec| {
        set(spec, "podSelector", || json!({}));
        for direction in ["ingress", "egress"] {
            each(spec, direction, |rule| each(rule, "ports", |port| set(port, "protocol", || json!("TCP"))));
        }
        let has_egress = spec.get("egress").and_then(Value::as_array).is_some_and(|rules| !rules.is_empty());
        set(
            spec,
            "policyTypes",
            || if has_egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) },
        );
    });
}

fn namespace(object: &mut Map<String, Value>) {
    with(object, "metadata", |metadata| {
        // NetworkPolicies select namespaces by this label, which the API server guarantees.
        let Some(name) = text(metadata, "name").map(str::to_owned) else { return };
        with_new(metadata, "labels", |labels| {
            labels.insert("kubernetes.io/metadata.name".into(), name.into());
        });
    });
    with_new(object, "spec", |spec| set(spec, "finalizers", || json!(["kubernetes"])));
    with_new(object, "status", |status| set(status, "phase", || json!("Active")));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(kind: &str, mut object: Value) -> Value {
        apply(kind, &mut object);
        let once = object.clone();
        apply(kind, &mut object);
        assert_eq!(object, once, "defaults of {kind} are not idempotent");
        object
    }

    #[test]
    fn wrong_types_are_left_alone() {
        for kind in ["Pod", "Deployment", "Service", "StatefulSet", "Job", "NetworkPolicy", "Namespace"] {
            for object in
                [json!(1), json!({"spec": 3}), json!({"spec": {"template": [], "ports": {}}}), json!(null)]
            {
                let spec = object.get("spec").cloned();
                let after = applied(kind, object);
                if spec.as_ref().is_some_and(Value::is_number) {
                    assert_eq!(after["spec"], 3);
                }
            }
        }
    }

    #[test]
    fn deployment_strategy_and_limits() {
        let object = applied("Deployment", json!({"spec": {"template": {"spec": {"containers": []}}}}));
        assert_eq!(
            object["spec"]["strategy"],
            json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}})
        );
        assert_eq!(object["spec"]["replicas"], 1);
        assert_eq!(object["spec"]["template"]["spec"]["dnsPolicy"], "ClusterFirst");
        // Admission's additions are for pods, not for templates.
        assert!(object["spec"]["template"]["spec"].get("tolerations").is_none());
        let object =
            applied("Deployment", json!({"spec": {"replicas": 0, "strategy": {"type": "Recreate"}}}));
        assert_eq!(object["spec"]["strategy"], json!({"type": "Recreate"}));
        assert_eq!(object["spec"]["replicas"], 0);
    }

    #[test]
    fn replication_controller_takes_the_template_labels() {
        let object = applied(
            "ReplicationController",
            json!({"metadata": {"name": "a"}, "spec": {"template": {"metadata": {"labels": {"app": "x"}}, "spec": {}}}}),
        );
        assert_eq!(object["spec"]["selector"], json!({"app": "x"}));
        assert_eq!(object["metadata"]["labels"], json!({"app": "x"}));
    }

    #[test]
    fn job_work_queue_has_no_completions() {
        let object = applied("Job", json!({"spec": {"parallelism": 3}}));
        assert!(object["spec"].get("completions").is_none());
        assert_eq!(applied("Job", json!({"spec": {}}))["spec"]["completions"], 1);
    }

    #[test]
    fn network_policy_types_follow_the_rules_present() {
        let both = applied("NetworkPolicy", json!({"spec": {"egress": [{"ports": [{"port": 53}]}]}}));
        assert_eq!(both["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
        assert_eq!(both["spec"]["egress"][0]["ports"][0]["protocol"], "TCP");
        assert_eq!(
            applied("NetworkPolicy", json!({"spec": {"egress": []}}))["spec"]["policyTypes"],
            json!(["Ingress"])
        );
    }

    #[test]
    fn namespace_has_its_name_as_label() {
        let object = applied("Namespace", json!({"metadata": {"name": "shop"}}));
        assert_eq!(object["metadata"]["labels"]["kubernetes.io/metadata.name"], "shop");
        assert_eq!(object["status"]["phase"], "Active");
    }
}
