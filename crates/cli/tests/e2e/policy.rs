//! `podway policy` in running labs: who may talk to whom, why, what a change would do, what really arrives, and what
//! flows come to as policies.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;

use crate::lab::{Lab, can_run, run, text, wait_for};

/// Two who ask and one who is asked, on two nodes.
const SHOP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: payments}
---
apiVersion: v1
kind: Namespace
metadata: {name: checkout}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: api, namespace: payments}
spec:
  selector: {matchLabels: {app: api}}
  template:
    metadata: {labels: {app: api}}
    spec: {containers: [{name: main, image: api, ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: checkout, labels: {app: web}}
spec:
  nodeName: node-1
  containers: [{name: main, image: web, ports: [{containerPort: 80}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: stray, labels: {app: stray}}
spec:
  nodeName: node-2
  containers: [{name: main, image: stray, ports: [{containerPort: 80}]}]
"#;

/// Only checkout's pods, and only to one port.
const PAYMENTS_INGRESS: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: payments-ingress, namespace: payments}
spec:
  podSelector: {matchLabels: {app: api}}
  ingress:
    - from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: checkout}}}]
      ports: [{port: 8080}]
"#;

fn file(yaml: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    file.write_all(yaml.as_bytes()).unwrap();
    file
}

fn policy(args: &[&str]) -> Output {
    run(&[&["policy"], args].concat())
}

fn json(args: &[&str]) -> Value {
    let output = policy(&[args, &["-o", "json"]].concat());
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {}", text(&output)))
}

fn kubeconfig(lab: &Lab) -> PathBuf {
    let output = lab.run(&["kubeconfig", "--path"]);
    assert!(output.status.success(), "{}", text(&output));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

fn kubectl(lab: &Lab, args: &[&str]) {
    let output =
        Command::new("kubectl").arg("--kubeconfig").arg(kubeconfig(lab)).args(args).output().unwrap();
    assert!(output.status.success(), "kubectl {args:?}: {}", text(&output));
}

/// Name of the only pod of a workload.
fn pod_of(lab: &Lab, namespace: &str, app: &str) -> String {
    let pods = lab.get(&["pods", "-n", namespace, "-l", &format!("app={app}")]);
    format!("{namespace}/{}", pods["items"][0]["metadata"]["name"].as_str().unwrap())
}

#[test]
fn a_running_lab_is_checked_explained_and_compared() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_polread", &[SHOP, PAYMENTS_INGRESS].join("---"), &["--nodes", "2"]);
    let config = kubeconfig(&lab);
    let config = config.to_str().unwrap();
    let sources: [&[&str]; 3] =
        [&["--lab", lab.name], &["--kubeconfig", config], &["--kubeconfig", config, "--context", lab.name]];
    for source in sources {
        let seen = json(&[&["check"], source].concat());
        assert_eq!(
            (&seen["everything"], &seen["something"], &seen["nothing"]),
            (&4.into(), &1.into(), &1.into())
        );
        for (who, port, code, said) in [
            ("checkout/web", "8080", 0, "allowed by payments/payments-ingress ingress rule 1"),
            ("checkout/web", "80", 1, "denied by default: no rule of payments/payments-ingress allows it"),
            ("stray", "8080", 1, "kubernetes.io/metadata.name=checkout; it is default"),
        ] {
            let output = policy(&[&["explain", who, "payments/api", port], source].concat());
            assert_eq!(output.status.code(), Some(code), "{}", text(&output));
            assert!(text(&output).contains(said), "{}", text(&output));
        }
        let open = file(&PAYMENTS_INGRESS.replace("kubernetes.io/metadata.name: checkout", ""));
        let change = policy(&[&["diff", open.path().to_str().unwrap()], source].concat());
        assert_eq!(change.status.code(), Some(1), "{}", text(&change));
        assert!(text(&change).contains("opens    default/stray"), "{}", text(&change));
    }
    let output = policy(&["check", "--kubeconfig", config, "--context", "other"]);
    assert!(!output.status.success() && text(&output).contains("other"), "{}", text(&output));
    let output = policy(&["check", "--lab", "t_nosuch"]);
    assert!(
        !output.status.success() && text(&output).contains("there is no lab t_nosuch"),
        "{}",
        text(&output)
    );
}

#[test]
fn what_does_not_arrive_contradicts_what_is_allowed() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_polver", SHOP, &["--nodes", "2", "--family", "dual"]);
    let verify = || json(&["verify", "--lab", lab.name]);
    let seen = verify();
    assert_eq!((&seen["contradictions"], &seen["denied"]), (&0.into(), &0.into()), "{seen}");
    assert_eq!(seen["allowed"], seen["allowedArrived"]);
    let api = pod_of(&lab, "payments", "api");
    for rule in [
        "add table inet t",
        "add chain inet t c { type filter hook input priority 0 ; }",
        "add rule inet t c meta nfproto ipv4 tcp dport 8080 drop",
    ] {
        lab.exec(&api, &[&["nft"], &rule.split(' ').collect::<Vec<_>>()[..]].concat());
    }
    let seen = verify();
    let wrong: Vec<String> = seen["probes"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|p| p["agrees"] == false)
        .map(|p| {
            format!("{} {} {} {}", p["source"], p["target"], p["probe"], p["heard"]["result"])
                .replace('"', "")
        })
        .collect();
    let expected = ["checkout/web", "default/stray"].map(|who| format!("{who} {api} TCP 8080 silence"));
    assert_eq!(wrong, expected, "{seen}");
    let one = policy(&["verify", "--lab", lab.name, "--from", "stray", "--to", &api, "--port", "8080"]);
    assert_eq!(one.status.code(), Some(1), "{}", text(&one));
    assert!(text(&one).contains("2 probes: of 2 allowed ones 1 arrived"), "{}", text(&one));
    let none = policy(&["verify", "--lab", lab.name, "--from", "nobody"]);
    assert_eq!(none.status.code(), Some(2), "{}", text(&none));
    assert!(text(&none).contains("there is no pod default/nobody"), "{}", text(&none));
}

#[test]
fn policies_that_are_learned_allow_what_was_seen_and_nothing_else() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_pollearn", SHOP, &["--nodes", "2"]);
    let api = pod_of(&lab, "payments", "api");
    let address = lab.get(&["pod", "-n", "payments", api.split_once('/').unwrap().1]);
    let address = address["status"]["podIP"].as_str().unwrap();
    lab.exec("checkout/web", &["curl", "-sf", "-m", "5", &format!("http://{address}:8080/")]);
    lab.exec("default/stray", &["ping", "-c", "1", "-W", "2", address]);
    let learned = || policy(&["learn", "--lab", lab.name]);
    wait_for("the flows are told", Duration::from_secs(10), || {
        let said = text(&learned());
        said.contains("3 policies, which allow 1 kinds") && said.contains("default/stray to payments/api")
    });
    let said = text(&learned());
    assert!(said.contains("ICMP (rules can allow it only together with everything)"), "{said}");
    assert!(!said.contains("was not seen and would be allowed"), "{said}");
    // The same from lines of JSON.
    let flows = run(&["flows", "--lab", lab.name, "--all", "-o", "json"]);
    let lines = file(&String::from_utf8(flows.stdout).unwrap());
    let from_lines = policy(&["learn", lines.path().to_str().unwrap()]);
    assert_eq!(from_lines.stdout, learned().stdout);
    let policies = file(&String::from_utf8(learned().stdout).unwrap());
    kubectl(&lab, &["apply", "-f", policies.path().to_str().unwrap()]);
    let seen = json(&["check", "--lab", lab.name]);
    assert_eq!(
        (&seen["everything"], &seen["something"], &seen["nothing"]),
        (&0.into(), &1.into(), &5.into()),
        "{seen}"
    );
    let open = seen["pairs"].as_array().unwrap().iter().find(|p| p["allowed"] != "nothing").unwrap();
    assert_eq!((&open["source"], &open["allowed"]), (&"checkout/web".into(), &"TCP 8080".into()));
}
