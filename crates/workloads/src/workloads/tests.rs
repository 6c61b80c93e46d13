//! ReplicaSets, StatefulSets, DaemonSets and Jobs in small clusters.

use serde_json::{Value, json};

use crate::Config;
use crate::testing::Cluster;

fn workload(kind: &str, name: &str, spec: &Value) -> Value {
    let api_version = if kind == "Job" { "batch/v1" } else { "apps/v1" };
    let mut object = json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name},
        "spec": {"template": {"metadata": {"labels": {"app": name}},
            "spec": {"containers": [{"name": "c", "image": "x:1"}]}}}});
    if kind != "Job" {
        object["spec"]["selector"] = json!({"matchLabels": {"app": name}});
    }
    for (key, value) in spec.as_object().unwrap() {
        object["spec"][key] = value.clone();
    }
    object
}

fn names(cluster: &Cluster, prefix: &str) -> Vec<String> {
    cluster.pods(prefix).iter().map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

fn set_image(cluster: &mut Cluster, kind: &str, name: &str, image: &str) {
    let mut object = cluster.find(kind, "default", name).unwrap().clone();
    object["spec"]["template"]["spec"]["containers"][0]["image"] = image.into();
    cluster.apply(object);
}

#[test]
fn replica_sets_spare_what_serves_best() {
    let mut cluster = Cluster::with_nodes(Config::default(), 2);
    cluster.apply(workload("ReplicaSet", "rs", &json!({"replicas": 3})));
    cluster.run();
    let all = names(&cluster, "rs-");
    cluster.set_ready("default", &all[1], false);
    cluster.apply(workload("ReplicaSet", "rs", &json!({"replicas": 2})));
    cluster.run();
    assert_eq!(names(&cluster, "rs-"), [all[0].clone(), all[2].clone()]);
    // The cheap one goes before an equal one.
    let mut cheap = cluster.find("Pod", "default", &all[0]).unwrap().clone();
    cheap["metadata"]["annotations"] = json!({"controller.kubernetes.io/pod-deletion-cost": "-5"});
    cluster.apply(cheap);
    cluster.apply(workload("ReplicaSet", "rs", &json!({"replicas": 1})));
    cluster.run();
    assert_eq!(names(&cluster, "rs-"), [all[2].clone()]);
}

#[test]
fn pods_are_adopted_released_and_replaced() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    cluster.apply_yaml("{apiVersion: v1, kind: Pod, metadata: {name: loner, labels: {app: rs}}, spec: {containers: [{name: c}]}}");
    cluster.apply(workload("ReplicaSet", "rs", &json!({"replicas": 2})));
    cluster.run();
    assert_eq!(names(&cluster, "rs-").len(), 1, "the loner counts");
    assert_eq!(
        cluster.find("Pod", "default", "loner").unwrap()["metadata"]["ownerReferences"][0]["name"],
        "rs"
    );
    let mut loner = cluster.find("Pod", "default", "loner").unwrap().clone();
    loner["metadata"]["labels"]["app"] = "quarantine".into();
    cluster.apply(loner);
    cluster.run();
    assert_eq!(cluster.find("Pod", "default", "loner").unwrap()["metadata"]["ownerReferences"], json!([]));
    assert_eq!(names(&cluster, "rs-").len(), 2);
    // Failed ones are replaced and stay for a look.
    let name = names(&cluster, "rs-")[0].clone();
    cluster.set_phase("default", &name, "Failed");
    cluster.run();
    assert_eq!(names(&cluster, "rs-").len(), 3);
    assert_eq!(cluster.find("ReplicaSet", "default", "rs").unwrap()["status"]["replicas"], 2);
}

#[test]
fn stateful_sets_start_in_order_and_stop_in_reverse() {
    let mut cluster = Cluster::with_nodes(Config::default(), 2);
    cluster.apply(workload("StatefulSet", "db", &json!({"replicas": 3, "serviceName": "db-hl"})));
    for expected in 1..=3 {
        cluster.settle();
        assert_eq!(names(&cluster, "db-").len(), expected);
        // Waits while the last is not ready.
        cluster.settle();
        assert_eq!(names(&cluster, "db-").len(), expected);
        cluster.run_kubelets();
    }
    let pod = cluster.find("Pod", "default", "db-2").unwrap();
    assert_eq!(pod["spec"]["hostname"], "db-2");
    assert_eq!(pod["spec"]["subdomain"], "db-hl");
    assert_eq!(pod["metadata"]["labels"]["statefulset.kubernetes.io/pod-name"], "db-2");
    assert_eq!(pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"], "2");
    let set = cluster.find("StatefulSet", "default", "db").unwrap();
    assert_eq!(pod["metadata"]["labels"]["controller-revision-hash"], set["status"]["updateRevision"]);

    cluster.apply(workload("StatefulSet", "db", &json!({"replicas": 1})));
    cluster.settle();
    let leaving = |cluster: &Cluster| -> Vec<bool> {
        cluster.pods("db-").iter().map(|pod| pod["metadata"].get("deletionTimestamp").is_some()).collect()
    };
    assert_eq!(leaving(&cluster), [false, false, true], "one at a time, from the end");
    cluster.run();
    assert_eq!(names(&cluster, "db-"), ["db-0"]);
}

#[test]
fn stateful_set_partition_holds_back_and_keeps_the_old_template() {
    let mut cluster = Cluster::with_nodes(Config::default(), 2);
    let partition = json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 1}});
    cluster.apply(workload(
        "StatefulSet",
        "db",
        &json!({"replicas": 3, "podManagementPolicy": "Parallel", "updateStrategy": partition}),
    ));
    cluster.settle();
    assert_eq!(names(&cluster, "db-").len(), 3, "parallel");
    cluster.run();
    set_image(&mut cluster, "StatefulSet", "db", "x:2");
    cluster.run();
    let images = |cluster: &Cluster| -> Vec<Value> {
        cluster.pods("db-").iter().map(|pod| pod["spec"]["containers"][0]["image"].clone()).collect()
    };
    assert_eq!(images(&cluster), ["x:1", "x:2", "x:2"]);
    cluster.delete("Pod", "default", "db-0");
    cluster.run();
    assert_eq!(images(&cluster), ["x:1", "x:2", "x:2"], "comes back from the stored revision");
    let status = cluster.find("StatefulSet", "default", "db").unwrap()["status"].clone();
    assert_ne!(status["currentRevision"], status["updateRevision"]);
    assert_eq!(status["updatedReplicas"], 2);

    let all = json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 0}});
    let mut set = cluster.find("StatefulSet", "default", "db").unwrap().clone();
    set["spec"]["updateStrategy"] = all;
    cluster.apply(set);
    cluster.run();
    assert_eq!(images(&cluster), ["x:2", "x:2", "x:2"]);
    let status = &cluster.find("StatefulSet", "default", "db").unwrap()["status"];
    assert_eq!(status["currentRevision"], status["updateRevision"]);
    assert_eq!(cluster.all("ControllerRevision").len(), 2);
}

#[test]
fn a_stateful_set_reports_a_name_that_is_taken() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    cluster.apply_yaml("{apiVersion: v1, kind: Pod, metadata: {name: db-0, labels: {a: b}}, spec: {containers: [{name: c}]}}");
    cluster.apply(workload("StatefulSet", "db", &json!({"replicas": 1})));
    cluster.run();
    assert_eq!(cluster.events("db"), ["pod \"db-0\" exists and is not the set's; delete or rename it"]);
}

#[test]
fn daemons_run_where_they_fit() {
    let mut cluster = Cluster::with_nodes(Config::default(), 3);
    for (node, spec) in [
        ("tainted", json!({"taints": [{"key": "gpu", "effect": "NoSchedule"}]})),
        ("cordoned", json!({"unschedulable": true})),
        ("evicting", json!({"taints": [{"key": "gone", "effect": "NoExecute"}]})),
    ] {
        cluster.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}, "spec": spec,
            "status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
    }
    cluster.apply(workload("DaemonSet", "ds", &json!({})));
    cluster.run();
    let nodes = |cluster: &Cluster| -> Vec<String> {
        let mut nodes: Vec<_> = cluster
            .pods("ds-")
            .iter()
            .map(|pod| pod["spec"]["nodeName"].as_str().unwrap().to_owned())
            .collect();
        nodes.sort();
        nodes
    };
    assert_eq!(nodes(&cluster), ["cordoned", "node-1", "node-2", "node-3"]);
    // A soft taint on a node with a daemon lets it stay; a hard one does not.
    let mut node = cluster.find("Node", "", "node-1").unwrap().clone();
    node["spec"]["taints"] = json!([{"key": "a", "effect": "NoSchedule"}]);
    cluster.apply(node);
    let mut node = cluster.find("Node", "", "node-2").unwrap().clone();
    node["spec"]["taints"] = json!([{"key": "a", "effect": "NoExecute"}]);
    cluster.apply(node);
    cluster.run();
    assert_eq!(nodes(&cluster), ["cordoned", "node-1", "node-3"]);
    let status = &cluster.find("DaemonSet", "default", "ds").unwrap()["status"];
    assert_eq!((&status["desiredNumberScheduled"], &status["numberMisscheduled"]), (&json!(2), &json!(1)));
}

#[test]
fn daemon_rollouts_keep_their_bounds() {
    for (rolling, most, least) in
        [(json!({"maxUnavailable": 1}), 3, 2), (json!({"maxUnavailable": 0, "maxSurge": 1}), 4, 3)]
    {
        let mut cluster = Cluster::with_nodes(Config::default(), 3);
        let strategy = json!({"type": "RollingUpdate", "rollingUpdate": rolling});
        cluster.apply(workload("DaemonSet", "ds", &json!({"updateStrategy": strategy})));
        cluster.run();
        set_image(&mut cluster, "DaemonSet", "ds", "x:2");
        for _ in 0..40 {
            cluster.step();
            let pods = cluster.pods("ds-");
            let alive: Vec<_> =
                pods.iter().filter(|p| p["metadata"].get("deletionTimestamp").is_none()).collect();
            let ready = alive.iter().filter(|p| p.to_string().contains(r#""type":"Ready""#)).count();
            assert!(alive.len() <= most && ready >= least, "{} pods, {ready} ready", alive.len());
            cluster.run_kubelets();
        }
        let pods = cluster.pods("ds-");
        assert_eq!(pods.len(), 3);
        assert!(pods.iter().all(|pod| pod["spec"]["containers"][0]["image"] == "x:2"), "{strategy}");
        assert_eq!(
            cluster.find("DaemonSet", "default", "ds").unwrap()["status"]["updatedNumberScheduled"],
            3
        );
    }
}

#[test]
fn jobs_run_to_completion() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    let spec = json!({"completions": 3, "parallelism": 2, "completionMode": "Indexed", "ttlSecondsAfterFinished": 60});
    cluster.apply(workload("Job", "job", &spec));
    cluster.run();
    assert_eq!(names(&cluster, "job-").len(), 2);
    let pod = cluster.pods("job-0-")[0];
    assert_eq!(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"], "0");
    assert_eq!(pod["metadata"]["labels"]["batch.kubernetes.io/job-name"], "job");
    let first = names(&cluster, "job-0-")[0].clone();
    cluster.set_phase("default", &first, "Succeeded");
    cluster.run();
    assert_eq!(names(&cluster, "job-2-").len(), 1);
    let job = |cluster: &Cluster| cluster.find("Job", "default", "job").cloned();
    assert_eq!(job(&cluster).unwrap()["status"]["completedIndexes"], "0");
    // A failure is tried again.
    let failed = names(&cluster, "job-1-")[0].clone();
    cluster.set_phase("default", &failed, "Failed");
    cluster.run();
    for name in names(&cluster, "job-") {
        if cluster.find("Pod", "default", &name).unwrap()["status"]["phase"] == "Running" {
            cluster.set_phase("default", &name, "Succeeded");
        }
    }
    cluster.run();
    let status = job(&cluster).unwrap()["status"].clone();
    assert_eq!((&status["succeeded"], &status["failed"]), (&json!(3), &json!(1)));
    assert_eq!(status["completedIndexes"], "0-2");
    assert!(
        status["conditions"]
            .as_array()
            .unwrap()
            .iter()
            .any(|c| c["type"] == "Complete" && c["status"] == "True")
    );
    cluster.now += jiff::SignedDuration::from_secs(61);
    cluster.run();
    assert_eq!(job(&cluster), None);
    assert!(cluster.pods("job-").is_empty());
}

#[test]
fn jobs_give_up_after_their_backoff_limit() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    cluster.apply(workload("Job", "job", &json!({"backoffLimit": 1})));
    for _ in 0..2 {
        cluster.run();
        let running: Vec<_> =
            cluster.pods("job-").into_iter().filter(|p| p["status"]["phase"] == "Running").collect();
        let name = running[0]["metadata"]["name"].as_str().unwrap().to_owned();
        cluster.set_phase("default", &name, "Failed");
    }
    cluster.run();
    assert_eq!(names(&cluster, "job-").len(), 2);
    let job = cluster.find("Job", "default", "job").unwrap();
    assert!(
        job["status"]["conditions"].as_array().unwrap().iter().any(|c| c["reason"] == "BackoffLimitExceeded")
    );
    assert_eq!(cluster.events("job"), ["Job has reached the specified backoff limit"]);
}

#[test]
fn suspended_jobs_and_cron_jobs_run_nothing() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    cluster.apply(workload("Job", "job", &json!({"suspend": true})));
    cluster.apply(json!({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "cron"}, "spec": {
        "schedule": "* * * * *", "jobTemplate": {"spec": {"template": {"spec": {"containers": [{"name": "c"}]}}}}}}));
    cluster.run();
    assert!(cluster.all("Pod").is_empty());
    cluster.apply(workload("Job", "job", &json!({"suspend": false})));
    cluster.run();
    assert_eq!(cluster.all("Pod").len(), 1);
}
