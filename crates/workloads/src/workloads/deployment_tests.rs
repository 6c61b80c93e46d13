use serde_json::{Value, json};

use crate::Config;
use crate::testing::Cluster;

fn deployment(replicas: u64, image: &str, strategy: &Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "strategy": strategy,
            "template": {"metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "c", "image": image}]}}}})
}

fn images(cluster: &Cluster) -> Vec<&str> {
    cluster.pods("web-").iter().map(|pod| pod["spec"]["containers"][0]["image"].as_str().unwrap()).collect()
}

#[test]
fn a_rollout_keeps_within_surge_and_unavailability() {
    for (surge, unavailable, most, least) in [
        (json!(1), json!(0), 5, 4),
        (json!(0), json!(1), 4, 3),
        (json!("50%"), json!("25%"), 6, 3),
        (json!(0), json!(0), 4, 3),
    ] {
        let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}});
        let mut cluster = Cluster::with_nodes(Config::default(), 2);
        cluster.apply(deployment(4, "x:1", &strategy));
        cluster.run();
        cluster.apply(deployment(4, "x:2", &strategy));
        // One operation round and one kubelet round at a time, and look between.
        for _ in 0..100 {
            cluster.step();
            let pods = cluster.pods("web-");
            let alive = pods.iter().filter(|p| p["metadata"].get("deletionTimestamp").is_none());
            let ready = alive.clone().filter(|p| p.to_string().contains(r#""type":"Ready""#)).count();
            assert!(alive.count() <= most, "surge {surge}");
            assert!(ready >= least, "unavailable {unavailable}: only {ready} ready");
            cluster.run_kubelets();
        }
        assert_eq!(images(&cluster), ["x:2"; 4]);
        let sets = cluster.all("ReplicaSet");
        assert_eq!(sets.len(), 2);
        let deployment = cluster.find("Deployment", "default", "web").unwrap();
        assert_eq!(deployment["metadata"]["annotations"]["deployment.kubernetes.io/revision"], "2");
    }
}

#[test]
fn recreate_ends_the_old_before_it_starts_the_new() {
    let strategy = json!({"type": "Recreate", "rollingUpdate": null});
    let mut cluster = Cluster::with_nodes(Config::default(), 2);
    cluster.apply(deployment(3, "x:1", &strategy));
    cluster.run();
    cluster.apply(deployment(3, "x:2", &strategy));
    for _ in 0..30 {
        cluster.step();
        let images = images(&cluster);
        assert!(images.iter().all(|image| *image == images[0]), "{images:?}");
        cluster.run_kubelets();
    }
    assert_eq!(images(&cluster), ["x:2"; 3]);
}

#[test]
fn going_back_uses_the_old_set_again_and_history_is_limited() {
    let strategy = json!({});
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    for image in ["x:1", "x:2", "x:3", "x:1"] {
        let mut deployment = deployment(1, image, &strategy);
        deployment["spec"]["revisionHistoryLimit"] = 1.into();
        cluster.apply(deployment);
        cluster.run();
    }
    // x:2 fell out of the history of one; x:1 had done so, too, and is there again.
    assert_eq!(cluster.all("ReplicaSet").len(), 2);
    assert_eq!(images(&cluster), ["x:1"]);
    let active = cluster.all("ReplicaSet").into_iter().find(|set| set["spec"]["replicas"] == 1).unwrap();
    assert_eq!(active["metadata"]["annotations"]["deployment.kubernetes.io/revision"], "4");

    cluster.apply(deployment(1, "x:3", &strategy));
    let names: Vec<_> =
        cluster.all("ReplicaSet").into_iter().map(|s| s["metadata"]["name"].clone()).collect();
    cluster.run();
    let after: Vec<_> =
        cluster.all("ReplicaSet").into_iter().map(|s| s["metadata"]["name"].clone()).collect();
    assert_eq!(names, after);
}

#[test]
fn names_and_labels_have_the_usual_shape() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    cluster.apply(deployment(1, "x:1", &json!({})));
    cluster.run();
    let set = cluster.all("ReplicaSet")[0];
    let hash = set["metadata"]["labels"]["pod-template-hash"].as_str().unwrap();
    assert_eq!(set["metadata"]["name"], format!("web-{hash}"));
    assert_eq!(set["spec"]["selector"]["matchLabels"], json!({"app": "web", "pod-template-hash": hash}));
    let pod = cluster.pods("web-")[0];
    assert!(pod["metadata"]["name"].as_str().unwrap().starts_with(&format!("web-{hash}-")));
    assert_eq!(pod["metadata"]["generateName"], format!("web-{hash}-"));
    let events: Vec<_> = cluster.all("Event").into_iter().map(|e| e["reason"].as_str().unwrap()).collect();
    for reason in ["ScalingReplicaSet", "SuccessfulCreate", "Scheduled"] {
        assert!(events.contains(&reason), "{events:?}");
    }
}

#[test]
fn a_stuck_rollout_times_out() {
    let mut cluster = Cluster::new(Config::default());
    let mut deployment = deployment(1, "x:1", &json!({}));
    deployment["spec"]["progressDeadlineSeconds"] = 60.into();
    cluster.apply(deployment);
    cluster.settle();
    let reason = |cluster: &Cluster| {
        let deployment = cluster.find("Deployment", "default", "web").unwrap();
        let conditions = deployment["status"]["conditions"].as_array().unwrap();
        conditions.iter().find(|c| c["type"] == "Progressing").unwrap()["reason"].clone()
    };
    assert_eq!(reason(&cluster), "ReplicaSetUpdated");
    let plan = crate::reconcile(&crate::World::new(cluster.now, cluster.objects.values()), &cluster.config);
    let at = plan.recheck_at.unwrap();
    assert_eq!(at.duration_since(cluster.now).as_secs(), 60);
    cluster.now = at;
    cluster.settle();
    assert_eq!(reason(&cluster), "ProgressDeadlineExceeded");
    // And it recovers.
    cluster.add_node(1);
    cluster.run();
    assert_eq!(reason(&cluster), "NewReplicaSetAvailable");
}

#[test]
fn min_ready_seconds_delay_availability() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    let mut deployment = deployment(1, "x:1", &json!({}));
    deployment["spec"]["minReadySeconds"] = 30.into();
    cluster.apply(deployment);
    cluster.run();
    let status = |cluster: &Cluster| cluster.find("Deployment", "default", "web").unwrap()["status"].clone();
    assert_eq!(
        (status(&cluster)["readyReplicas"].as_i64(), status(&cluster).get("availableReplicas")),
        (Some(1), None)
    );
    cluster.now += jiff::SignedDuration::from_secs(30);
    cluster.settle();
    assert_eq!(status(&cluster)["availableReplicas"], 1);
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    cluster.apply(deployment(2, "x:1", &json!({})));
    cluster.run();
    let mut paused = deployment(4, "x:2", &json!({}));
    paused["spec"]["paused"] = true.into();
    cluster.apply(paused);
    cluster.run();
    assert_eq!(images(&cluster), ["x:1"; 4]);
    let mut resumed = deployment(4, "x:2", &json!({}));
    resumed["spec"]["paused"] = false.into();
    cluster.apply(resumed);
    cluster.run();
    assert_eq!(images(&cluster), ["x:2"; 4]);
}

#[test]
fn orphaned_sets_are_adopted() {
    let mut cluster = Cluster::with_nodes(Config::default(), 1);
    cluster.apply(deployment(2, "x:1", &json!({})));
    cluster.run();
    let pods: Vec<_> = cluster.pods("web-").into_iter().cloned().collect();
    // Deleted with --cascade=orphan, then applied again.
    let mut set = cluster.all("ReplicaSet")[0].clone();
    set["metadata"].as_object_mut().unwrap().remove("ownerReferences");
    let key =
        ("ReplicaSet".to_owned(), "default".to_owned(), set["metadata"]["name"].as_str().unwrap().to_owned());
    cluster.objects.insert(key, set);
    cluster.delete("Deployment", "default", "web");
    cluster.apply(deployment(2, "x:1", &json!({})));
    cluster.run();
    assert_eq!(cluster.pods("web-").into_iter().cloned().collect::<Vec<_>>(), pods);
    assert_eq!(cluster.all("ReplicaSet").len(), 1);
}

#[test]
fn broken_specs_are_named() {
    for (path, value, message) in [
        (
            "/spec/replicas",
            json!("three"),
            "spec.replicas: expected an integer from 0 to 2147483647, found \"three\"",
        ),
        (
            "/spec/selector",
            json!({"matchLabels": {"app": "other"}}),
            "spec.selector: does not match spec.template.metadata.labels",
        ),
        ("/spec/strategy", json!({"type": "BlueGreen"}), "spec.strategy.type: \"BlueGreen\" is not one of"),
        (
            "/spec/template",
            json!({"metadata": {"labels": {"app": "web"}}}),
            "spec.template.spec.containers: at least one",
        ),
    ] {
        let mut cluster = Cluster::with_nodes(Config::default(), 1);
        let mut broken = deployment(1, "x:1", &json!({}));
        *broken.pointer_mut(path).unwrap() = value;
        cluster.apply(broken);
        let mut good = deployment(1, "x:1", &json!({}));
        good["metadata"]["name"] = "good".into();
        cluster.apply(good);
        cluster.run();
        let events = cluster.events("web");
        assert!(events.len() == 1 && events[0].starts_with(message), "{events:?}");
        assert_eq!(cluster.pods("good-").len(), 1);
    }
}
