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

#[test]
fn workloads_roll_and_readiness_is_switched() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_roll", &WEB.replace("REPLICAS", "2"), &["--nodes", "2"]);
    let names = || -> Vec<String> {
        let pods = lab.get(&["pods", "-n", "shop"]);
        let items = pods["items"].as_array().unwrap();
        items.iter().map(|p| p["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let before = names();
    let rolled = lab.run(&["roll", "deploy/web", "-n", "shop"]);
    assert!(rolled.status.success(), "{}", text(&rolled));
    // Old pods may still be in their grace period; they are no part of it.
    let check = lab.run(&["check"]);
    assert!(check.status.success(), "{}", text(&check));
    wait_for("the old pods to end", Duration::from_secs(10), || names().len() == 2);
    assert!(names().iter().all(|n| !before.contains(n)), "{before:?} {:?}", names());
    let nobody = lab.run(&["roll", "deploy/none", "-n", "shop"]);
    assert!(!nobody.status.success() && text(&nobody).contains("none"), "{}", text(&nobody));

    wait_for("two endpoints", Duration::from_secs(5), || ready_endpoints(&lab) == 2);
    let pod = format!("shop/{}", names()[0]);
    let switch = |state: &str| {
        let output = lab.run(&["ready", &pod, state]);
        assert!(output.status.success(), "{}", text(&output));
    };
    switch("off");
    let took = wait_for("one endpoint", Duration::from_secs(5), || ready_endpoints(&lab) == 1);
    println!("out of the endpoints after {took:?}");
    let status = lab.run(&["status"]);
    assert!(text(&status).contains("readiness is switched off"), "{}", text(&status));
    assert!(lab.events("Unhealthy").iter().any(|m| m.contains("switched off")));
    switch("on");
    wait_for("both endpoints", Duration::from_secs(5), || ready_endpoints(&lab) == 2);
    assert!(!lab.run(&["ready", "shop/none", "off"]).status.success());

    let mut file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    std::io::Write::write_all(&mut file, STUBBORN.as_bytes()).unwrap();
    let path = file.path().to_str().unwrap();
    assert!(lab.run(&["apply", "-f", path]).status.success());
    wait_for("the stubborn one to be ready", Duration::from_secs(10), || {
        lab.run(&["status"]).status.success()
    });
    assert!(lab.run(&["delete", "-f", path]).status.success());
    let check = lab.run(&["check"]);
    let out = text(&check);
    assert!(
        check.status.success() && out.contains("not part of it: shop/stubborn is being deleted"),
        "{out}"
    );
}

/// A pod that takes its whole grace period.
const STUBBORN: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: stubborn
  namespace: shop
  annotations: {lab.podway.dev/command.main: "trap '' TERM; while :; do sleep 1; done"}
spec: {terminationGracePeriodSeconds: 20, containers: [{name: main, image: stubborn}]}
"#;

/// One pod that nothing is wrong with, one whose port nobody serves, one that never starts in the eyes of its
/// startup probe, and one that decides by a file whether it is well.
const PROBED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: good}
spec:
  containers:
  - name: main
    image: good
    ports: [{name: http, containerPort: 8080}]
    startupProbe: {httpGet: {port: http, path: /started}, periodSeconds: 1}
    readinessProbe: {httpGet: {port: http, path: /ready}, initialDelaySeconds: 1}
    livenessProbe: {exec: {command: [no-such-program]}}
---
apiVersion: v1
kind: Pod
metadata: {name: undeclared}
spec:
  containers: [{name: main, image: undeclared, readinessProbe: {tcpSocket: {port: 9001}}}]
---
apiVersion: v1
kind: Pod
metadata: {name: deaf}
spec:
  containers:
  - name: main
    image: deaf
    ports: [{containerPort: 8080}]
    readinessProbe: {tcpSocket: {port: 9999}, periodSeconds: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: late}
spec:
  containers:
  - name: main
    image: late
    ports: [{containerPort: 8080}]
    startupProbe: {tcpSocket: {port: 9999}, periodSeconds: 1, failureThreshold: 2}
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Pod
metadata:
  name: moody
  annotations: {lab.podway.dev/command.main: "exec sleep 1000"}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: moody
    readinessProbe: {exec: {command: [test, -e, "FILE.ready"]}, periodSeconds: 1, failureThreshold: 1}
    livenessProbe: {exec: {command: [sh, -c, "echo sick; test ! -e FILE.sick"]}, periodSeconds: 1, failureThreshold: 2}
"#;

#[test]
fn probes_decide_who_is_ready_and_who_is_restarted() {
    if !can_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mood = dir.path().join("mood");
    let file = dir.path().join("probed.yaml");
    fs::write(&file, PROBED.replace("FILE", mood.to_str().unwrap())).unwrap();
    let lab = Lab::up("t_probes", &[&file], &["--nodes", "1", "--no-wait"]);
    let container = |pod: &str| lab.get(&["pod", pod])["status"]["containerStatuses"][0].clone();
    let ready = |pod: &str| container(pod)["ready"] == true;
    let limit = Duration::from_secs(15);
    let took = wait_for("the good one to be ready", limit, || ready("good"));
    println!("good after {took:?}");
    wait_for("the one without declared ports to be ready", limit, || ready("undeclared"));

    wait_for("complaints about the deaf one", limit, || {
        lab.events("Unhealthy").iter().any(|m| m.contains("Readiness probe failed: connect to"))
    });
    assert!(!ready("deaf"));
    assert_eq!(container("deaf")["restartCount"], 0);
    assert_eq!(container("deaf")["started"], true);
    let status = lab.run(&["status"]);
    assert!(
        text(&status).contains("pod default/deaf: container main: Readiness probe failed"),
        "{}",
        text(&status)
    );

    wait_for("the late one to be restarted", limit, || container("late")["restartCount"].as_u64() > Some(0));
    assert_eq!(container("late")["started"], false);
    assert!(!ready("late"));
    assert!(
        lab.events("Killing").iter().any(|m| m.contains("startup probe failed")),
        "{:?}",
        lab.events("Killing")
    );

    let touch = |suffix: &str| fs::write(mood.with_extension(suffix), "").unwrap();
    assert!(!ready("moody"));
    touch("ready");
    wait_for("the moody one to be ready", limit, || ready("moody"));
    fs::remove_file(mood.with_extension("ready")).unwrap();
    wait_for("the moody one to be unready", limit, || !ready("moody"));
    touch("ready");
    touch("sick");
    wait_for("the sick one to be restarted", limit, || container("moody")["restartCount"].as_u64() > Some(0));
    assert!(
        lab.events("Unhealthy").iter().any(|m| m.contains("Liveness probe failed: sh") && m.contains("sick"))
    );
    fs::remove_file(mood.with_extension("sick")).unwrap();
    wait_for("the moody one to be well again", limit, || ready("moody"));
}

/// A pod on every node.
const EVERYWHERE: &str = r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: every}
spec:
  selector: {matchLabels: {app: every}}
  template:
    metadata: {labels: {app: every}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: every, ports: [{containerPort: 8080}]}]
"#;

#[test]
fn nodes_come_go_and_lose_power() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_nodes", EVERYWHERE, &["--nodes", "2", "--family", "dual"]);
    let said = |args: &[&str]| {
        let output = lab.run(args);
        assert!(output.status.success(), "{args:?}: {}{}", text(&output), text(&lab.run(&["logs"])));
        String::from_utf8(output.stdout).unwrap()
    };
    let settle = |counts: &str| {
        wait_for(counts, Duration::from_secs(30), || text(&lab.run(&["status"])).contains(counts));
    };
    assert_eq!(said(&["node", "add", "--zone", "zone-9"]), "node-3 is ready\n");
    settle("nodes 3/3 ready, pods 3/3 ready");
    assert!(said(&["status"]).contains("zone-9"));
    said(&["check"]);

    let start = std::time::Instant::now();
    assert_eq!(said(&["node", "stop", "node-2"]), "node-2 is stopped\n");
    println!("stopped after {:?}", start.elapsed());
    wait_for("status to show it", Duration::from_secs(5), || {
        let status = text(&lab.run(&["status"]));
        status.contains("stopped") && status.contains("nodes 2/3 ready, pods 2/3 ready")
    });
    // Who is left reaches who is left, and nobody answers on the stopped node.
    let check = text(&lab.run(&["check"]));
    assert!(check.contains("24 of 24 paths") && check.contains("node-2: stopped"), "{check}");
    let dead = lab.run(&["node", "exec", "node-1", "--", "ping", "-c1", "-W1", "172.18.1.2"]);
    assert!(!dead.status.success(), "{}", text(&dead));
    assert_eq!(said(&["node", "start", "node-2"]), "node-2 is ready\n");
    settle("nodes 3/3 ready, pods 3/3 ready");
    said(&["check"]);

    // A removed node takes its pods along, whether it has power or not, and leaves nothing.
    said(&["node", "stop", "node-3"]);
    assert_eq!(said(&["node", "remove", "node-3"]), "node-3 is gone\n");
    assert_eq!(said(&["node", "remove", "node-2"]), "node-2 is gone\n");
    settle("nodes 1/1 ready, pods 1/1 ready");
    let left: Vec<String> =
        ["/run/netns", "/run/podway/t_nodes", "/sys/fs/bpf/podway/t_nodes", "/run/podway/labs/t_nodes/nodes"]
            .iter()
            .flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten())
            .map(|entry| entry.path().display().to_string())
            .filter(|path| path.contains("t_nodes") && (path.ends_with("node-2") || path.ends_with("node-3")))
            .collect();
    assert_eq!(left, Vec::<String>::new());
    let unknown = lab.run(&["node", "stop", "node-2"]);
    assert!(text(&unknown).contains("has no node node-2; it has: node-1"), "{}", text(&unknown));
    // A name can be used again.
    assert_eq!(said(&["node", "add"]), "node-2 is ready\n");
    settle("nodes 2/2 ready, pods 2/2 ready");
    said(&["check"]);
}

/// A pod whose container says something and ends, again and again.
const LOUD: &str = r#"
apiVersion: v1
kind: Pod
metadata:
  name: loud
  annotations: {lab.podway.dev/command.main: "echo one; echo two; exit 3"}
spec: {nodeName: node-1, containers: [{name: main, image: loud}]}
"#;

#[test]
fn events_logs_and_shells_show_what_goes_on() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_look", PAIR, &["--nodes", "2"]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("loud.yaml");
    fs::write(&file, LOUD).unwrap();
    assert!(lab.run(&["apply", "-f", file.to_str().unwrap()]).status.success());
    let said = |args: &[&str]| {
        let output = lab.run(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    wait_for("the failure to be told", Duration::from_secs(10), || said(&["events"]).contains("BackOff"));
    let about = said(&["events", "--for", "pod/loud", "--warnings"]);
    assert!(
        about.lines().skip(1).all(|l| l.contains("Pod default/loud") && l.contains("Warning")),
        "{about}"
    );
    let json: serde_json::Value = serde_json::from_str(&said(&["events", "-o", "json"])).unwrap();
    assert!(
        json.as_array().unwrap().iter().any(|e| e["reason"] == "BackOff" && e["name"] == "loud"),
        "{json}"
    );
    assert_eq!(said(&["events", "-n", "nowhere"]).lines().count(), 1);

    assert_eq!(said(&["logs", "loud", "--tail", "1"]), "two\n");
    assert!(said(&["logs", "default/loud", "-c", "main"]).starts_with("one\ntwo\n"));
    assert!(said(&["logs", "node-2"]).lines().count() > 1);
    assert!(said(&["logs", "--tail", "100"]).contains("lab is up"));
    let unknown = lab.run(&["logs", "loud", "-c", "other"]);
    assert!(!unknown.status.success() && text(&unknown).contains("it has: main"), "{}", text(&unknown));

    for (target, hostname) in [("node-2", "node-2"), ("default/a", "a"), ("b", "b")] {
        let mut shell = std::process::Command::new(crate::lab::podway())
            .args(["lab", "shell", "--name", lab.name, target])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut shell.stdin.take().unwrap(), b"hostname\n").unwrap();
        let output = shell.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), hostname);
    }
    let nobody = lab.run(&["shell", "node-9"]);
    assert!(!nobody.status.success(), "{}", text(&nobody));
}

#[test]
fn the_client_outside_reaches_nodes_alone() {
    if !can_run() {
        return;
    }
    for (name, family) in [("t_outside4", "ipv4"), ("t_outside6", "ipv6")] {
        let lab = Lab::of(name, PAIR, &["--nodes", "2", "--family", family]);
        let outside = |command: &[&str]| lab.run(&[&["outside", "exec", "--"], command].concat());
        let node =
            lab.get(&["node", "node-2"])["status"]["addresses"][0]["address"].as_str().unwrap().to_owned();
        let ping = outside(&["ping", "-c3", "-i0.1", "-W2", &node]);
        assert!(text(&ping).contains("3 received"), "{}", text(&ping));
        let pod = lab.pod_ip("b").to_string();
        let refused = outside(&["ping", "-c1", "-W1", &pod]);
        assert!(text(&refused).to_lowercase().contains("network is unreachable"), "{}", text(&refused));
        // The other way, a pod is one of its node's connections.
        let client = if family == "ipv4" { "172.19.0.2" } else { "fd00:172:19::2" };
        let out = lab.exec("a", &["ping", "-c2", "-i0.1", "-W2", client]);
        assert!(out.contains("2 received"), "{out}");
        assert!(lab.run(&["check"]).status.success());
    }
}
