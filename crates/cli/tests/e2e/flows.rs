//! `podway flows`: flows begin and end, drops have reasons, names are right, and all of it goes on when agents die.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::lab::{Lab, can_run, podway, run, text, wait_for};

/// A client and two servers, one of them on the other node, behind a Service.
const SHOP: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec:
  nodeName: node-1
  containers: [{name: main, image: client, ports: [{containerPort: 9000}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: near, labels: {app: web, tier: front}}
spec:
  nodeName: node-1
  containers: [{name: main, image: web, ports: [{name: http, containerPort: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: far, labels: {app: web}}
spec:
  nodeName: node-2
  containers: [{name: main, image: web, ports: [{name: http, containerPort: 8080}]}]
---
apiVersion: v1
kind: Service
metadata: {name: shop}
spec:
  clusterIP: 10.96.0.60
  selector: {tier: front}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: nobody}
spec:
  clusterIP: 10.96.0.61
  selector: {app: nobody}
  ports: [{port: 80}]
"#;

/// Flows of the lab that fit, oldest first.
fn flows(lab: &Lab, options: &[&str]) -> Vec<Value> {
    let output = run(&[&["flows", "--lab", lab.name, "-o", "json"], options].concat());
    assert!(output.status.success(), "{options:?}: {}", text(&output));
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines = lines.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    lines.map(|mut l| l["flow"].take()).filter(|f| !f.is_null()).collect()
}

/// Waits for flows that fit.
fn found(lab: &Lab, what: &str, options: &[&str]) -> Vec<Value> {
    let mut last = Vec::new();
    wait_for(what, Duration::from_secs(15), || {
        last = flows(lab, options);
        !last.is_empty()
    });
    last
}

fn ask(lab: &Lab, url: &str) {
    lab.exec("client", &["curl", "-sS", "-o", "/dev/null", "--max-time", "5", url]);
}

/// A reader that follows, killed at the end.
struct Following {
    child: Child,
    lines: mpsc::Receiver<Value>,
}

impl Following {
    fn start(lab: &Lab, options: &[&str]) -> Self {
        let mut child = Command::new(podway())
            .args([&["flows", "--lab", lab.name, "--follow", "-o", "json"], options].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if tell.send(serde_json::from_str(&line).unwrap()).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    fn next(&self, limit: Duration) -> Option<Value> {
        self.lines.recv_timeout(limit).ok().map(|mut line| line["flow"].take())
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn name(end: &Value) -> String {
    format!(
        "{}/{}",
        end["pod"]["namespace"].as_str().unwrap_or("?"),
        end["pod"]["name"].as_str().unwrap_or("?")
    )
}

#[test]
fn flows_begin_and_end_and_drops_have_reasons() {
    if !can_run() {
        return;
    }
    let lab = Lab::of("flwflows", SHOP, &["--nodes", "2"]);
    let near = lab.pod_ip("near").to_string();
    let far = lab.pod_ip("far").to_string();

    // On one node.
    ask(&lab, &format!("http://{near}:8080/"));
    let to_near = ["--from-pod", "client", "--to-pod", "near", "--all"];
    wait_for("start and end", Duration::from_secs(15), || flows(&lab, &to_near).len() >= 2);
    let both = flows(&lab, &to_near);
    let [start, end] = &both[..] else { panic!("{both:?}") };
    assert_eq!((&start["event"], &end["event"]), (&"start".into(), &"end".into()));
    for flow in [start, end] {
        assert_eq!((&flow["verdict"], &flow["protocol"]), (&"FORWARDED".into(), &"TCP".into()), "{flow}");
        assert_eq!(
            (name(&flow["source"]), name(&flow["destination"])),
            ("default/client".into(), "default/near".into())
        );
        assert_eq!((&flow["node"], &flow["destination"]["port"]), (&"node-1".into(), &8080.into()));
        assert_eq!(flow["destination"]["pod"]["labels"]["tier"], "front");
    }
    assert_eq!((&start["reason"], &start["tcpFlags"]), (&"delivered".into(), &"SYN".into()));
    assert!(start["time"].as_str() < end["time"].as_str());
    assert_eq!(end["ended"], "closed");
    let number = |flow: &Value, key: &str| flow[key].as_u64().unwrap_or_else(|| panic!("{key} of {flow}"));
    assert!(number(end, "packets") >= 4 && number(end, "replyBytes") > 200, "{end}");

    // On two: each tells what it sees.
    ask(&lab, &format!("http://{far}:8080/"));
    let to_far = ["--to-pod", "far", "--event", "start", "--all"];
    wait_for("both nodes", Duration::from_secs(15), || flows(&lab, &to_far).len() == 2);
    let nodes: Vec<(Value, Value)> =
        flows(&lab, &to_far).iter().map(|f| (f["node"].clone(), f["direction"].clone())).collect();
    assert_eq!(nodes, [("node-1".into(), "egress".into()), ("node-2".into(), "ingress".into())]);
    assert_eq!(flows(&lab, &[&to_far[..], &["--node", "node-2"]].concat()).len(), 1);

    // Through a Service, whose address no packet had: the socket was connected to the endpoint.
    ask(&lab, "http://10.96.0.60/");
    let through = found(&lab, "a flow through the Service", &["--service", "shop", "--last", "1"]);
    let service = &through[0]["service"];
    assert_eq!(
        (&service["name"], &service["ip"], &service["port"]),
        (&"shop".into(), &"10.96.0.60".into(), &80.into())
    );
    assert_eq!(
        (name(&through[0]["destination"]), &through[0]["destination"]["port"]),
        ("default/near".into(), &8080.into())
    );
    assert_eq!(flows(&lab, &["--ip", "10.96.0.60", "--all"]).len(), through.len());

    // Drops: a Service that nobody serves; asked by raw packets, which no socket translates.
    let refused = "import socket,struct
s=socket.socket(socket.AF_INET,socket.SOCK_RAW,socket.IPPROTO_RAW)
def ip(src,dst,proto,data):
    return struct.pack('!BBHHHBBH4s4s',0x45,0,20+len(data),1,0,64,proto,0,socket.inet_aton(src),socket.inet_aton(dst))+data
import sys
own,other=sys.argv[1],sys.argv[2]
udp=struct.pack('!HHHH',4000,80,8,0)
s.sendto(ip(own,'10.96.0.61',17,udp),('10.96.0.61',0))
s.sendto(ip('192.0.2.77',other,17,udp),(other,0))
";
    let client = lab.pod_ip("client").to_string();
    lab.exec("client", &["python3", "-c", refused, &client, &near]);
    let dropped = found(&lab, "a refused packet", &["--reason", "service_rejected"]);
    assert_eq!((&dropped[0]["verdict"], &dropped[0]["event"]), (&"DROPPED".into(), &"drop".into()));
    assert_eq!(
        (name(&dropped[0]["source"]), &dropped[0]["service"]["name"]),
        ("default/client".into(), &"nobody".into())
    );
    let forged = found(&lab, "a forged packet", &["--verdict", "dropped", "--reason", "spoofed_address"]);
    assert_eq!(name(&forged[0]["source"]), "default/client", "the link says who it was");
    assert_eq!(forged[0]["source"]["ip"], "192.0.2.77");

    filters_and_formats(&lab);
    metrics(&lab);
    agents_die_and_flows_go_on(&lab, &near);
}

fn filters_and_formats(lab: &Lab) {
    let all = flows(lab, &["--all"]);
    let count = |options: &[&str]| flows(lab, &[options, &["--all"]].concat()).len();
    assert!(count(&["--verdict", "forwarded"]) + count(&["--verdict", "dropped"]) >= all.len());
    for (options, some) in [
        (&["--label", "tier=front"][..], true),
        (&["--label", "tier=back"], false),
        (&["--namespace", "default"], true),
        (&["--namespace", "kube-system"], false),
        (&["--port", "8080", "--protocol", "tcp"], true),
        (&["--port", "8080", "--protocol", "udp"], false),
        (&["--ip", "192.0.2.0/24"], true),
        (&["--pod", "default/"], true),
        (&["--since", "1h"], true),
        (&["--since", "2200-01-01T00:00:00Z"], false),
    ] {
        assert_eq!(count(options) > 0, some, "{options:?}");
    }
    let times: Vec<&str> = all.iter().filter_map(|f| f["time"].as_str()).collect();
    assert!(times.is_sorted(), "{times:?}");
    assert_eq!(flows(lab, &["--last", "3"]).len(), 3);
    assert_eq!(flows(lab, &["--last", "3"]), flows(lab, &["--all"]).split_off(all.len().saturating_sub(3)));

    let compact =
        text(&run(&["flows", "--lab", lab.name, "--from-pod", "client", "--to-pod", "near", "--all"]));
    assert!(
        compact.contains("default/client:") && compact.contains("-> default/near:8080 TCP FORWARDED start"),
        "{compact}"
    );
    let table = text(&run(&["flows", "--lab", lab.name, "-o", "table"]));
    assert!(table.starts_with("TIME ") && table.contains("DROPPED"), "{table}");
    let instance = format!("{}/node-1", lab.name);
    assert!(run(&["flows", "--instance", &instance, "--last", "1"]).status.success());

    for (options, code, part) in [
        (&["--verdict", "maybe"][..], 2, "--verdict \"maybe\": is no verdict"),
        (&["--reason", "bad_luck"], 2, "spoofed_address"),
        (&["--since", "yesterday"], 2, "is no time"),
        (&["--node", "node-9"], 1, "there are node-1, node-2"),
    ] {
        let output = run(&[&["flows", "--lab", lab.name], options].concat());
        assert_eq!(output.status.code(), Some(code), "{options:?}");
        assert!(text(&output).contains(part), "{options:?}: {}", text(&output));
    }
    let output = run(&["flows", "--instance", "flwnone/node-1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("no agent tells flows at"), "{}", text(&output));
}

fn metrics(lab: &Lab) {
    let metric = |prefix: &str| lab.metric("node-1", prefix);
    assert!(metric("podway_flow_events_total{event=\"start\",reason=\"none\",outcome=\"told\"}") >= 3.0);
    assert!(
        metric("podway_flow_events_total{event=\"drop\",reason=\"spoofed_address\",outcome=\"told\"}") >= 1.0
    );
    assert!(metric("podway_flow_history_entries") >= 5.0);
    assert!(metric("podway_flow_names{kind=\"pod\"}") >= 3.0);
    let pressure = metric("podway_table_pressure_ratio{table=\"endpoints\"}");
    assert!(pressure > 0.0 && pressure < 0.01, "{pressure}");
}

fn agents_die_and_flows_go_on(lab: &Lab, near: &str) {
    let url = format!("http://{near}:8080/");
    let following = Following::start(lab, &["--to-pod", "near", "--event", "start"]);
    std::thread::sleep(Duration::from_millis(500));
    let asked = Instant::now();
    ask(lab, &url);
    let flow = following.next(Duration::from_secs(5)).expect("the flow");
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    assert_eq!(name(&flow["source"]), "default/client");
    assert!(following.next(Duration::from_millis(300)).is_none(), "only what was asked for");

    let pid = lab.agent_pid("node-1");
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    // The programs go on telling, and the next agent reads it.
    ask(lab, &url);
    wait_for("a new agent", Duration::from_secs(30), || {
        lab.try_agent_pid("node-1").is_some_and(|p| p != pid)
    });
    wait_for("its socket", Duration::from_secs(20), || {
        run(&["flows", "--instance", &format!("{}/node-1", lab.name)]).status.success()
    });
    let told = found(
        lab,
        "the flow of meanwhile",
        &["--node", "node-1", "--to-pod", "near", "--event", "start", "--all"],
    );
    assert_eq!(told.len(), 1, "{told:?}");
    // Who follows is told what happened meanwhile, once, and what happens now.
    let meanwhile = following.next(Duration::from_secs(5)).expect("what happened without an agent");
    assert_eq!(meanwhile["time"], told[0]["time"]);
    ask(lab, &url);
    let after = following.next(Duration::from_secs(5)).expect("what happens with the new agent");
    assert!(after["time"].as_str() > meanwhile["time"].as_str());
    wait_for("flows of the new agent", Duration::from_secs(15), || {
        flows(lab, &["--node", "node-1", "--to-pod", "near", "--event", "end", "--all"]).len() >= 2
    });
}
