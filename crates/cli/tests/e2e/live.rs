//! Changes of a running lab: manifests in and out, and what the commands say about it.

use std::{fs, time::Duration};

use crate::lab::{Lab, PAIR, can_run, text, wait_for};

const WEB: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: REPLICAS
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: web, image: web, ports: [{name: http, containerPort: 8080}]}]
"#;

fn ready_endpoints(lab: &Lab) -> usize {
    let slices = lab.get(&["endpointslices", "-n", "shop"]);
    let endpoints = slices["items"].as_array().unwrap().iter().filter_map(|s| s["endpoints"].as_array());
    endpoints.flatten().filter(|e| e["conditions"]["ready"] == true).count()
}

#[test]
fn manifests_come_and_go_in_a_running_lab() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_live", PAIR, &["--nodes", "2"]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("web.yaml");
    let path = file.to_str().unwrap();
    let said = |output: &std::process::Output| String::from_utf8_lossy(&output.stdout).into_owned();

    fs::write(&file, WEB.replace("REPLICAS", "1")).unwrap();
    let first = lab.run(&["apply", "-f", path]);
    assert!(first.status.success(), "{}", text(&first));
    assert_eq!(said(&first), "3 objects created, 0 updated\n");
    let took = wait_for("a ready endpoint", Duration::from_secs(5), || ready_endpoints(&lab) == 1);
    println!("pod ready and in the EndpointSlice after {took:?}");

    fs::write(&file, WEB.replace("REPLICAS", "3")).unwrap();
    let again = lab.run(&["apply", "-f", dir.path().to_str().unwrap()]);
    assert_eq!(said(&again), "0 objects created, 3 updated\n", "{}", text(&again));
    let took = wait_for("three ready endpoints", Duration::from_secs(5), || ready_endpoints(&lab) == 3);
    println!("scaled after {took:?}");

    // Giving the pair again must not disturb its running pods.
    let uid = |pod: &str| lab.get(&["pod", pod])["metadata"]["uid"].clone();
    let pair = dir.path().join("pair.yaml");
    fs::write(&pair, PAIR).unwrap();
    let before = (uid("a"), lab.pod_ip("a"));
    let same = lab.run(&["apply", "-f", pair.to_str().unwrap()]);
    assert!(same.status.success(), "{}", text(&same));
    assert_eq!((uid("a"), lab.pod_ip("a")), before);

    let broken = dir.path().join("broken.yaml");
    fs::write(&broken, "kind: Service\nmetadata: {name: x}\n---\n".to_owned() + PAIR).unwrap();
    let refused = lab.run(&["apply", "-f", broken.to_str().unwrap()]);
    let out = text(&refused);
    assert_eq!(refused.status.code(), Some(1), "{out}");
    assert!(out.contains("apiVersion: missing") && out.contains("0 objects created, 2 updated"), "{out}");

    let gone = lab.run(&["delete", "-f", path]);
    assert_eq!(said(&gone), "3 objects deleted, 0 were not there\n", "{}", text(&gone));
    wait_for("the namespace to vanish", Duration::from_secs(10), || {
        !lab.kubectl(&["namespace", "shop"]).status.success()
    });
    let nothing = lab.run(&["delete", "-f", path]);
    assert_eq!(said(&nothing), "0 objects deleted, 3 were not there\n", "{}", text(&nothing));
    assert!(lab.run(&["check"]).status.success());
}
