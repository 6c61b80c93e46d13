//! Host ports and bandwidth limits of manifests, in a lab.

use serde_json::Value;

use crate::lab::{Lab, can_run, text};

const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  nodeName: node-1
  containers: [{name: main, image: web, ports: [{containerPort: 8080, hostPort: 8090}]}]
---
apiVersion: v1
kind: Pod
metadata:
  name: slow
  annotations:
    kubernetes.io/ingress-bandwidth: 10M
    kubernetes.io/egress-bandwidth: 20M
    lab.podway.dev/command.main: "exec iperf3 --server --interval 0"
spec: {nodeName: node-2, containers: [{name: main, image: iperf}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec: {nodeName: node-1, containers: [{name: main, image: client}]}
"#;

#[test]
fn manifests_open_host_ports_and_limit_bandwidth() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("t_capable", PODS, &["--nodes", "2"]);
    let url = "http://172.18.1.1:8090/";
    let outside = lab.run(&["outside", "exec", "--", "curl", "-sf", "--max-time", "5", url]);
    assert!(outside.status.success(), "{}", text(&outside));
    for pod in ["client", "web", "slow"] {
        lab.exec(pod, &["curl", "-sf", "--max-time", "5", url]);
    }
    let slow = lab.pod_ip("slow").to_string();
    for (direction, limit) in [(&[][..], 10e6), (&["-R"], 20e6)] {
        let mut command = vec!["iperf3", "-J", "-c", &slow, "-t", "4", "-O", "1"];
        command.extend(direction);
        let result: Value = serde_json::from_str(&lab.exec("client", &command)).unwrap();
        let rate = result["end"]["sum_received"]["bits_per_second"].as_f64().unwrap();
        println!("limit {limit}: {rate:.0} bits a second");
        assert!((0.7 * limit..1.1 * limit).contains(&rate), "{rate} bits a second with a limit of {limit}");
    }
}
