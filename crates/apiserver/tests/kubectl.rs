//! A real kubectl against the server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::kubectl::Kubectl;
use podway_apiserver::{DeleteOptions, ResourceKey};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// What the tests ask of kubectl.
trait Asked {
    fn line(&self, line: &str) -> Command;
    fn try_run(&self, line: &str, input: &str) -> Result<String, String>;
    fn run(&self, line: &str) -> String;
    fn apply(&self, manifest: &Value) -> String;
    fn table(&self, line: &str) -> Vec<Vec<String>>;
}

impl Asked for Kubectl {
    fn line(&self, line: &str) -> Command {
        let mut command = self.command();
        command.args(line.split_whitespace());
        command
    }

    fn try_run(&self, line: &str, input: &str) -> Result<String, String> {
        let mut child = self
            .line(line)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    fn run(&self, line: &str) -> String {
        self.try_run(line, "").unwrap_or_else(|error| panic!("kubectl {line}: {error}"))
    }

    fn apply(&self, manifest: &Value) -> String {
        self.try_run("apply --validate=false -f -", &manifest.to_string()).unwrap()
    }

    /// Rows of a printed table, without those of its ages.
    fn table(&self, line: &str) -> Vec<Vec<String>> {
        self.run(line).lines().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
    }
}

fn list(items: &[Value]) -> Value {
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

fn shop(image: &str) -> Value {
    let labels = json!({"app": "web"});
    list(&[
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}),
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"replicas": 2, "selector": {"matchLabels": labels}, "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": "web", "image": image, "ports": [{"containerPort": 80}]}]}}}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.7", "selector": labels, "ports": [{"port": 80}]}}),
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "shop", "labels": labels},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}}),
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "status": {
            "addresses": [{"type": "InternalIP", "address": "172.18.1.1"}],
            "conditions": [{"type": "Ready", "status": "True"}]}}),
    ])
}

#[test]
fn objects_are_applied_shown_changed_and_deleted() {
    let Some(kubectl) = Kubectl::start() else { return };
    let applied = kubectl.apply(&shop("web:1"));
    assert_eq!(applied.matches(" created").count(), 5, "{applied}");
    let again = kubectl.apply(&shop("web:1"));
    assert_eq!(again.matches(" unchanged").count(), 5, "{again}");
    let changed = kubectl.apply(&shop("web:2"));
    assert_eq!(changed.matches(" configured").count(), 1, "{changed}");

    let table = kubectl.table("get deploy -n shop -o wide");
    assert_eq!(
        table[0],
        ["NAME", "READY", "UP-TO-DATE", "AVAILABLE", "AGE", "CONTAINERS", "IMAGES", "SELECTOR"]
    );
    assert_eq!(table[1][..4], ["web", "0/2", "0", "0"]);
    assert_eq!(table[1][5..], ["web", "web:2", "app=web"]);
    let table = kubectl.table("get svc -A");
    assert_eq!(table[1][..6], ["shop", "web", "ClusterIP", "10.96.0.7", "<none>", "80/TCP"]);
    let table = kubectl.table("get nodes -o wide");
    assert_eq!((table[1][1].as_str(), table[1][4].as_str()), ("Ready", "172.18.1.1"));
    let table = kubectl.table("get pods -A --field-selector spec.nodeName=n1 -l app=web");
    assert_eq!(table[1][..4], ["shop", "p", "0/1", "Pending"]);
    let yaml = kubectl.run("get pod p -n shop -o yaml");
    assert!(yaml.contains("kind: Pod\n") && yaml.contains("  nodeName: n1\n"), "{yaml}");
    let described = kubectl.run("describe pod p -n shop");
    assert!(described.contains("Node:         n1/"), "{described}");
    assert!(kubectl.run("describe svc web -n shop").contains("10.96.0.7"));
    assert!(kubectl.run("get all -A").contains("deployment.apps/web"));

    kubectl.run("label pod p -n shop tier=front");
    kubectl.run("annotate pod p -n shop note=x");
    kubectl.run("scale deploy web -n shop --replicas=5");
    kubectl.run(
        r#"patch svc web -n shop --type=json -p [{"op":"replace","path":"/spec/ports/0/port","value":81}]"#,
    );
    kubectl.run(r#"patch deploy web -n shop -p {"spec":{"template":{"spec":{"containers":[{"name":"web","tty":true}]}}}}"#);
    kubectl.run("set image deploy/web -n shop web=web:3");
    let fields = "-o jsonpath={.spec.replicas},{.spec.template.spec.containers[*].image},{.spec.template.spec.containers[0].tty}";
    assert_eq!(kubectl.run(&format!("get deploy web -n shop {fields}")), "5,web:3,true");
    let table = kubectl.table("get pod p -n shop --show-labels");
    assert_eq!(table[1].last().unwrap(), "app=web,tier=front");

    assert!(kubectl.run("cordon n1").contains("cordoned"));
    assert_eq!(kubectl.table("get nodes")[1][1], "Ready,SchedulingDisabled");
    assert!(kubectl.run("create namespace other").contains("created"));
    assert!(kubectl.run("create configmap c -n other --from-literal=a=b").contains("created"));
    assert_eq!(kubectl.run("get cm c -n other -o jsonpath={.data.a}"), "b");

    let error = kubectl.try_run("get pod nope -n shop", "").unwrap_err();
    assert!(error.contains("Error from server (NotFound): pods \"nope\" not found"), "{error}");
    let error = kubectl.try_run("logs p -n shop", "").unwrap_err();
    assert!(error.contains("podway lab logs"), "{error}");

    kubectl.run("delete pod p -n shop --wait=false");
    assert_eq!(kubectl.table("get pod p -n shop")[1][2], "Terminating");
    let key = ResourceKey::new("", "pods", "shop", "p");
    let server = &kubectl.server;
    std::thread::scope(|scope| {
        let deletion = scope.spawn(|| kubectl.run("delete pod p -n shop"));
        std::thread::sleep(std::time::Duration::from_millis(300));
        server.store.delete(&key, &DeleteOptions::now()).unwrap();
        assert!(deletion.join().unwrap().contains("deleted"));
    });
    kubectl.run("delete ns shop");
    assert!(kubectl.try_run("get ns shop", "").is_err());
}

#[test]
fn a_watch_prints_changes() {
    let Some(kubectl) = Kubectl::start() else { return };
    let mut watch = kubectl.line("get configmaps -w").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let object = |data: Value| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": data});
    kubectl.server.store.put(object(json!({}))).unwrap();
    let mut cells =
        || -> Vec<String> { lines.next().unwrap().unwrap().split_whitespace().map(str::to_owned).collect() };
    assert_eq!(cells(), ["NAME", "DATA", "AGE"]);
    assert_eq!(cells()[..2], ["c", "0"]);
    kubectl.server.store.put(object(json!({"a": "1"}))).unwrap();
    assert_eq!(cells()[..2], ["c", "1"]);
    watch.kill().unwrap();
    watch.wait().unwrap();
}

#[test]
fn custom_kinds_and_draining() {
    let Some(kubectl) = Kubectl::start() else { return };
    let version = json!({"name": "v1", "served": true, "storage": true,
        "additionalPrinterColumns": [{"name": "Size", "type": "integer", "jsonPath": ".spec.size"}]});
    kubectl.apply(&json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced", "versions": [version],
            "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "shortNames": ["wd"]}}}));
    assert!(kubectl.run("wait --for condition=established crd/widgets.example.com").contains("met"));
    kubectl.apply(&json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "w"},
        "spec": {"size": 3}}));
    assert_eq!(kubectl.table("get wd"), [["NAME", "SIZE"], ["w", "3"]]);

    kubectl.apply(&shop("web:1"));
    let store = &kubectl.server.store;
    let key = ResourceKey::new("", "pods", "shop", "p");
    std::thread::scope(|scope| {
        let drain = scope.spawn(|| kubectl.run("drain n1 --force --timeout=15s"));
        while store.get(&key).is_ok_and(|pod| pod["metadata"].get("deletionTimestamp").is_none())
            && !drain.is_finished()
        {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        store.delete(&key, &DeleteOptions::now()).unwrap();
        // Clients before 1.21 say "deleted".
        let said = drain.join().unwrap();
        assert!(
            ["drained", "deleted"].iter().any(|word| said.contains(&format!("node/n1 {word}"))),
            "{said}"
        );
    });
}
