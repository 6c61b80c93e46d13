//! Services: reached by everybody from everywhere, in every mode; rolled, killed and vandalised under load.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::lab::{Lab, can_run, podway, run, text, wait_for};

/// Three servers on three nodes, a client that is none of them, and Services of every type before the servers.
const SHOP: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 5
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule,
         labelSelector: {matchLabels: {app: web}}}
      containers:
      - name: web
        image: web
        ports: [{name: http, containerPort: 8080}, {name: dns, containerPort: 5353, protocol: UDP}]
        readinessProbe: {httpGet: {port: http}, periodSeconds: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node-1
  containers: [{name: main, image: client, ports: [{containerPort: 9000}]}]
---
apiVersion: v1
kind: Service
metadata: {name: inner}
spec:
  clusterIP: 10.96.0.50
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: nobody}
spec:
  clusterIP: 10.96.0.51
  selector: {app: nobody}
  ports: [{port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: outer}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.52
  loadBalancerIP: 172.18.200.10
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http, nodePort: 30080}]
---
apiVersion: v1
kind: Service
metadata: {name: local}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.53
  externalTrafficPolicy: Local
  healthCheckNodePort: 30999
  loadBalancerIP: 172.18.200.11
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http, nodePort: 30081}]
"#;

/// The client beyond the nodes, and where it comes from.
const OUTSIDE: &str = "172.19.0.2";

/// What a server says of itself and of who asked, as seen from a place in the lab.
fn ask(lab: &Lab, place: &[&str], url: &str) -> Result<Value, String> {
    let command = ["--", "curl", "-sS", "--max-time", "3", url];
    let output = lab.run(&[place, &command].concat());
    if !output.status.success() {
        return Err(text(&output));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| format!("{e}: {}", text(&output)))
}

fn client(lab: &Lab, url: &str) -> Result<Value, String> {
    ask(lab, &["exec", "client"], url)
}

fn outside(lab: &Lab, url: &str) -> Result<Value, String> {
    ask(lab, &["outside", "exec"], url)
}

/// Asks until it is answered.
fn settled(what: &str, mut ask: impl FnMut() -> Result<Value, String>) -> Value {
    let mut last = Err(String::new());
    wait_for(what, Duration::from_secs(20), || {
        last = ask();
        last.is_ok()
    });
    last.unwrap()
}

fn ingress(lab: &Lab, service: &str) -> Vec<String> {
    let service = lab.get(&["service", service]);
    let list = service["status"]["loadBalancer"]["ingress"].as_array().cloned().unwrap_or_default();
    list.iter().map(|i| i["ip"].as_str().unwrap().to_owned()).collect()
}

fn announced_by(lab: &Lab, service: &str) -> String {
    let service = lab.get(&["service", service]);
    service["metadata"]["annotations"]["podway.dev/announced-by"].as_str().unwrap_or_default().to_owned()
}

/// Everybody reaches every Service as its type promises.
fn everybody_reaches_every_service(name: &'static str, mode: &str) {
    if !can_run() {
        return;
    }
    let lab = Lab::of(name, SHOP, &["--nodes", "3", "--service-mode", mode]);
    settled("the VIP to answer", || client(&lab, "http://10.96.0.50/"));
    // All servers get their share, and see the client's own address.
    let client_ip = lab.pod_ip("client").to_string();
    let mut pods = std::collections::BTreeSet::new();
    for _ in 0..40 {
        let answer = client(&lab, "http://10.96.0.50/").unwrap();
        assert_eq!(answer["peerAddress"], client_ip.as_str(), "{answer}");
        pods.insert(answer["pod"].as_str().unwrap().to_owned());
    }
    assert_eq!(pods.len(), 3, "{pods:?}");
    // A node is a client as well; so is a server of its own Service.
    for node in ["node-1", "node-2"] {
        settled("a node's own connection", || ask(&lab, &["node", "exec", node], "http://10.96.0.50/"));
    }
    let server = pods.first().unwrap();
    let mut itself = false;
    for _ in 0..40 {
        let answer = ask(&lab, &["exec", server], "http://10.96.0.50/").unwrap();
        itself |= answer["pod"] == server.as_str();
    }
    assert!(itself, "a pod never reached itself through its own Service");
    // The API server answers at its Service.
    let version = lab.exec("client", &["curl", "-sS", "--max-time", "3", "http://10.96.0.1:443/healthz"]);
    assert!(!version.is_empty());

    // Nobody serves: told at once, not after a time-out.
    for url in ["http://10.96.0.51/", "http://10.96.0.50:81/"] {
        let begun = Instant::now();
        let refused = client(&lab, url).unwrap_err();
        assert!(refused.contains("refused") || refused.contains("onnect"), "{url}: {refused}");
        assert!(begun.elapsed() < Duration::from_secs(2), "{url} took {:?}", begun.elapsed());
    }

    // From beyond the cluster: node ports at every node, with the node's address under Cluster.
    for node in 1..=3 {
        let url = format!("http://172.18.1.{node}:30080/");
        let answer = settled("a node port", || outside(&lab, &url));
        assert_ne!(answer["peerAddress"], OUTSIDE, "{answer}");
        // Under Local the node's own server answers, and sees who asks.
        let url = format!("http://172.18.1.{node}:30081/");
        let answer = settled("a local node port", || outside(&lab, &url));
        assert_eq!(answer["peerAddress"], OUTSIDE, "{answer}");
        assert_eq!(answer["node"], format!("node-{node}").as_str(), "{answer}");
    }

    // Load balancers: addresses from the pool, written back, answered for by one node.
    wait_for("addresses", Duration::from_secs(20), || {
        ingress(&lab, "outer") == ["172.18.200.10"] && ingress(&lab, "local") == ["172.18.200.11"]
    });
    settled("a load balancer", || outside(&lab, "http://172.18.200.10/"));
    let answer = settled("a local load balancer", || outside(&lab, "http://172.18.200.11/"));
    assert_eq!(answer["peerAddress"], OUTSIDE, "{answer}");
    assert_eq!(answer["node"], announced_by(&lab, "local").as_str(), "{answer}");
    // Pods reach them too, by the short way.
    settled("a pod at a load balancer", || client(&lab, "http://172.18.200.11/"));
    let healthy = outside(&lab, "http://172.18.1.1:30999/").unwrap();
    assert_eq!((&healthy["localEndpoints"], &healthy["service"]["name"]), (&1.into(), &"local".into()));

    // What the node says of it.
    let shown = run(&["services", "default/local", "--lab", lab.name, "--node", "node-2", "-o", "json"]);
    assert!(shown.status.success(), "{}", text(&shown));
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["mode"], mode);
    let endpoints = shown["service"]["ports"][0]["endpoints"].as_array().unwrap();
    assert_eq!(endpoints.len(), 3);
    assert_eq!(endpoints.iter().filter(|e| e["nodeLocal"] == "used").count(), 1, "{endpoints:?}");
    let list = text(&run(&["services", "--lab", lab.name]));
    assert!(list.contains(&format!("served by {mode}")) && list.contains("default/inner"), "{list}");

    // Released when the type changes.
    let kubeconfig = lab.run(&["kubeconfig", "--path"]);
    let kubeconfig = String::from_utf8_lossy(&kubeconfig.stdout).trim().to_owned();
    let patched = Command::new("kubectl")
        .args([
            "--kubeconfig",
            &kubeconfig,
            "patch",
            "service",
            "outer",
            "-p",
            r#"{"spec":{"type":"ClusterIP"}}"#,
        ])
        .output()
        .unwrap();
    assert!(patched.status.success(), "{}", text(&patched));
    wait_for("the address to be released", Duration::from_secs(20), || ingress(&lab, "outer").is_empty());
    wait_for("nobody to answer for it", Duration::from_secs(20), || {
        outside(&lab, "http://172.18.200.10/").is_err()
    });
    settled("the other one to go on", || outside(&lab, "http://172.18.200.11/"));
}

#[test]
fn services_by_ebpf() {
    everybody_reaches_every_service("t_svc_ebpf", "ebpf");
}

/// Connections, one after the other and several at a time, until it is told to stop. Counts those that failed.
struct Load {
    child: Child,
    stop: tempfile::TempPath,
    out: tempfile::TempPath,
}

impl Load {
    /// From a place in the lab, every request on a connection of its own.
    fn start(lab: &Lab, place: &[&str], url: &str) -> Self {
        let stop = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let out = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let script = format!(
            "while [ -e {stop} ]; do curl -s --parallel --parallel-max 6 --max-time 20 -H 'Connection: close' \
             -o /dev/null -w '%{{http_code}} %{{errormsg}}\\n' '{url}?[1-60]' >>{out}; done",
            stop = stop.display(),
            out = out.display(),
        );
        let (verb, rest) = place.split_at(if place[0] == "outside" { 2 } else { 1 });
        let child = Command::new(podway())
            .arg("lab")
            .args(verb)
            .args(["--name", lab.name])
            .args(rest)
            .args(["--", "sh", "-c", &script])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let load = Self { child, stop, out };
        wait_for("the load to begin", Duration::from_secs(10), || load.done() > 100);
        load
    }

    fn done(&self) -> usize {
        fs::read_to_string(&self.out).unwrap_or_default().lines().count()
    }

    /// Ends it. Returns how many succeeded, and every failure.
    fn end(mut self) -> (usize, Vec<String>) {
        fs::remove_file(&self.stop).unwrap();
        self.child.wait().unwrap();
        let lines = fs::read_to_string(&self.out).unwrap();
        let (good, bad): (Vec<&str>, Vec<&str>) = lines.lines().partition(|l| l.starts_with("200"));
        (good.len(), bad.into_iter().map(str::to_owned).collect())
    }
}

fn rolled_under_load(name: &'static str, mode: &str) {
    if !can_run() {
        return;
    }
    let lab = Lab::of(name, SHOP, &["--nodes", "3", "--service-mode", mode]);
    settled("the VIP to answer", || client(&lab, "http://10.96.0.50/"));
    settled("a node port", || outside(&lab, "http://172.18.1.1:30080/"));
    let inner = Load::start(&lab, &["exec", "client"], "http://10.96.0.50/");
    let outer = Load::start(&lab, &["outside", "exec"], "http://172.18.1.1:30080/");
    for _ in 0..4 {
        let rolled = lab.run(&["roll", "deploy/web"]);
        assert!(rolled.status.success(), "{}", text(&rolled));
    }
    for (what, load) in [("inside", inner), ("outside", outer)] {
        let (good, bad) = load.end();
        println!("{mode}, {what}: {good} requests, {} failed", bad.len());
        assert!(bad.is_empty(), "{what}: {} of {good} failed: {:?}", bad.len(), &bad[..bad.len().min(5)]);
    }
}

#[test]
fn a_rolling_restart_fails_no_request_by_ebpf() {
    rolled_under_load("t_roll_ebpf", "ebpf");
}

#[test]
fn agents_that_are_killed_fail_no_request() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_svc_kill", SHOP, &["--nodes", "3"]);
    settled("the VIP to answer", || client(&lab, "http://10.96.0.50/"));
    settled("a load balancer", || outside(&lab, "http://172.18.200.10/"));
    let inner = Load::start(&lab, &["exec", "client"], "http://10.96.0.50/");
    let outer = Load::start(&lab, &["outside", "exec"], "http://172.18.200.10/");
    for round in 0..20 {
        let node = format!("node-{}", round % 3 + 1);
        let before = lab.agent_pid(&node);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(before), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        // The supervisor starts another one 200 ms later.
        std::thread::sleep(Duration::from_millis(1000));
        wait_for("another agent", Duration::from_secs(10), || {
            lab.try_agent_pid(&node).is_some_and(|pid| pid != before)
        });
    }
    for (what, load) in [("inside", inner), ("outside", outer)] {
        let (good, bad) = load.end();
        println!("20 agents killed, {what}: {good} requests, {} failed", bad.len());
        assert!(bad.is_empty(), "{what}: {} of {good} failed: {:?}", bad.len(), &bad[..bad.len().min(5)]);
    }
}

#[test]
fn an_address_moves_when_its_node_loses_power() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_svc_move", SHOP, &["--nodes", "3"]);
    settled("a load balancer", || outside(&lab, "http://172.18.200.10/"));
    let first = announced_by(&lab, "outer");
    // The client is on node-1, which is no reason to spare it.
    let stopped = lab.run(&["node", "stop", &first]);
    assert!(stopped.status.success(), "{}", text(&stopped));
    let begun = Instant::now();
    settled("the load balancer elsewhere", || outside(&lab, "http://172.18.200.10/"));
    println!("answered again after {:?}", begun.elapsed());
    assert_ne!(announced_by(&lab, "outer"), first);
}

#[test]
fn pools_are_exhausted_by_name_and_refuse_what_is_not_theirs() {
    if !can_run() {
        return;
    }
    let service = |name: &str, extra: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{type: LoadBalancer, ports: [{{port: 80}}]{extra}}}\n---\n"
        )
    };
    let yaml: String = [
        service("a", ""),
        service("b", ""),
        service("c", ""),
        service("stranger", ", loadBalancerIP: 192.0.2.1"),
        service("other", ", loadBalancerClass: example.com/other"),
    ]
    .concat();
    let lab = Lab::of("t_svc_pool", &yaml, &["--nodes", "1", "--load-balancer-pool", "172.18.201.0/30"]);
    wait_for("two addresses", Duration::from_secs(20), || {
        ["a", "b"].iter().all(|s| ingress(&lab, s).len() == 1)
    });
    let said = |reason: &str, parts: &[&str]| {
        wait_for(reason, Duration::from_secs(10), || {
            lab.events(reason).iter().any(|m| parts.iter().all(|p| m.contains(p)))
        });
    };
    said("LoadBalancerPoolExhausted", &["default/c", "pool default"]);
    said("LoadBalancerRequestRefused", &["default/stranger", "192.0.2.1"]);
    assert!(ingress(&lab, "other").is_empty() && ingress(&lab, "c").is_empty());
    let pool = Path::new("loadbalancerpools/default");
    assert_eq!(lab.get(&[pool.to_str().unwrap()])["spec"]["cidrs"][0], "172.18.201.0/30");
    // One goes, the one that waited gets its address.
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    fs::write(file.path(), service("a", "")).unwrap();
    let deleted = lab.run(&["delete", "-f", file.path().to_str().unwrap()]);
    assert!(deleted.status.success(), "{}", text(&deleted));
    wait_for("the third address", Duration::from_secs(20), || ingress(&lab, "c").len() == 1);
}

#[test]
fn services_by_nftables() {
    everybody_reaches_every_service("t_svc_nft", "nftables");
}

#[test]
fn services_by_iptables() {
    everybody_reaches_every_service("t_svc_ipt", "iptables");
}

#[test]
fn a_rolling_restart_fails_no_request_by_nftables() {
    rolled_under_load("t_roll_nft", "nftables");
}

/// Another program throws away what serves Services: it is back within the audit's period, told and counted.
fn vandalised(name: &'static str, mode: &str, crime: &[&str]) {
    if !can_run() {
        return;
    }
    let lab = Lab::of(name, SHOP, &["--nodes", "1", "--service-mode", mode]);
    settled("the VIP to answer", || client(&lab, "http://10.96.0.50/"));
    let repairs = || lab.metric("node-1", "podway_repairs_total{what=\"services\"}");
    assert!(repairs().is_nan(), "{}", repairs());
    lab.on_node("node-1", crime);
    assert!(client(&lab, "http://10.96.0.50/").is_err(), "the crime had no effect");
    let begun = Instant::now();
    settled("the repair", || client(&lab, "http://10.96.0.50/"));
    println!("{mode}: answered again after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    wait_for("the count", Duration::from_secs(5), || repairs() >= 1.0);
    wait_for("the event", Duration::from_secs(5), || {
        lab.events("ServicesRepaired").iter().any(|m| m.contains("somebody else changed"))
    });
}

#[test]
fn rules_of_nftables_that_somebody_deletes_come_back() {
    vandalised("t_van_nft", "nftables", &["nft", "delete", "table", "ip", "podway-services"]);
}

#[test]
fn rules_of_iptables_that_somebody_deletes_come_back() {
    vandalised("t_van_ipt", "iptables", &["iptables", "-t", "nat", "-F"]);
}

#[test]
fn a_mode_takes_the_place_of_another_and_leaves_nothing_of_it() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_svc_modes", SHOP, &["--nodes", "1", "--service-mode", "nftables"]);
    settled("the VIP to answer", || client(&lab, "http://10.96.0.50/"));
    assert!(lab.on_node("node-1", &["nft", "list", "tables"]).contains("podway-services"));
    // The same node with another agent.
    let pid = lab.agent_pid("node-1");
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let mut arguments: Vec<String> =
        line.split(|b| *b == 0).skip(1).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
    arguments.retain(|a| !a.is_empty());
    let mode = arguments.iter().position(|a| a == "--service-mode").unwrap() + 1;
    arguments[mode] = "ebpf".into();
    let netns = format!("/run/netns/podway-{}-node-1", lab.name);
    let kill = |pid: i32, signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    // The supervisor starts another one at once; it cannot, while this one has the lock.
    let mut other = loop {
        kill(lab.agent_pid("node-1"), nix::sys::signal::Signal::SIGKILL);
        let mut child = Command::new("nsenter")
            .arg(format!("--net={netns}"))
            .arg(podway())
            .args(&arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(500));
        if child.try_wait().unwrap().is_none() {
            break child;
        }
    };
    wait_for("the old mode's rules to go", Duration::from_secs(30), || {
        !lab.on_node("node-1", &["nft", "list", "tables"]).contains("podway-services")
    });
    settled("the new mode to answer", || client(&lab, "http://10.96.0.50/"));
    kill(i32::try_from(other.id()).unwrap(), nix::sys::signal::Signal::SIGKILL);
    other.wait().unwrap();
}
