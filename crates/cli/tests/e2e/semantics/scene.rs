//! The lab that the semantics are tried in, with clients in all places, and what is expected of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::client::{CONNECT_MS, Client, Kind, Outcome};
use crate::lab::{Lab, podway, text};

/// Three servers on three nodes, of which the first and the third are in one zone; a client on the first node, and one
/// there that has the node's network.
const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: w1, labels: {app: web}}
spec:
  nodeName: node-1
  containers:
  - {name: main, image: web, ports: [{containerPort: 8080}, {containerPort: 8081}, {containerPort: 5353, protocol: UDP},
     {name: odd, containerPort: 8090}]}
---
apiVersion: v1
kind: Pod
metadata: {name: w2, labels: {app: web}}
spec:
  nodeName: node-2
  containers:
  - {name: main, image: web, ports: [{containerPort: 8080}, {containerPort: 8081}, {containerPort: 5353, protocol: UDP},
     {name: odd, containerPort: 8091}]}
---
apiVersion: v1
kind: Pod
metadata: {name: w3, labels: {app: web}}
spec:
  nodeName: node-3
  containers:
  - {name: main, image: web, ports: [{containerPort: 8080}, {containerPort: 8081}, {containerPort: 5353, protocol: UDP},
     {name: odd, containerPort: 8092}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node-1
  containers: [{name: main, image: client, ports: [{containerPort: 9000}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: bare}
spec:
  nodeName: node-1
  containers: [{name: main, image: bare, ports: [{containerPort: 9000}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: host, labels: {app: host}}
spec:
  nodeName: node-1
  hostNetwork: true
  containers: [{name: main, image: host, ports: [{containerPort: 18080}]}]
"#;

/// How long a change may take until everybody serves it.
const LIMIT: Duration = Duration::from_secs(6);

/// How many tries it takes that one of `n` equally likely ones is missed less than once in ten million times.
const TRIES: usize = 18;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

pub(super) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// What a client is to meet.
#[derive(Clone, Debug)]
pub(super) enum Want {
    /// Exactly these pods, each of them.
    By(Vec<&'static str>, Saw),
    /// Only one of these, always the same.
    One(Vec<&'static str>),
    Refused,
    Silence,
    /// Whatever it is, no answer.
    Nobody,
}

/// The source that servers have to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Saw {
    Client,
    NotClient,
    Any,
}

pub(super) fn by(pods: &[&'static str]) -> Want {
    Want::By(pods.to_vec(), Saw::Any)
}

impl Want {
    pub(super) fn seeing(self, saw: Saw) -> Self {
        match self {
            Self::By(pods, _) => Self::By(pods, saw),
            other => other,
        }
    }
}

/// The n-th cluster IP of those that are not given out otherwise.
pub(super) fn vip(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 96, 0, n]),
        Family::V6 => format!("fd00:10:96::{n:x}").parse().unwrap(),
    }
}

/// Address of the n-th node.
pub(super) fn node(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([172, 18, 1, n]),
        Family::V6 => format!("fd00:172:18::1:{n:x}").parse().unwrap(),
    }
}

/// The n-th address of the lab's pool for load balancers.
pub(super) fn balanced(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([172, 18, 200, n]),
        Family::V6 => format!("fd00:172:18::200:{n:x}").parse().unwrap(),
    }
}

/// A Service of both families at the n-th cluster IPs, of the servers' HTTP port, with more in its `spec`.
#[expect(clippy::needless_pass_by_value, reason = "callers write the value in place")]
pub(super) fn service(name: &str, n: u8, spec: Value) -> Value {
    let mut all = json!({
        "clusterIPs": [vip(Family::V4, n), vip(Family::V6, n)],
        "ipFamilyPolicy": "RequireDualStack",
        "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
    });
    for (key, value) in spec.as_object().unwrap() {
        all[key] = value.clone();
    }
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": all})
}

/// The servers' own selector.
pub(super) fn web() -> Value {
    json!({"app": "web"})
}

pub(super) struct Scene {
    pub(super) lab: Lab,
    pub(super) mode: &'static str,
    clients: BTreeMap<&'static str, Client>,
    pub(super) faults: Vec<String>,
    what: &'static str,
    checks: usize,
}

impl Scene {
    pub(super) fn new(name: &'static str, mode: &'static str, options: &[&str]) -> Self {
        let base = ["--nodes", "3", "--family", "dual", "--service-mode", mode];
        let lab = Lab::of(name, PODS, &[&base, options].concat());
        Self { lab, mode, clients: BTreeMap::new(), faults: Vec::new(), what: "", checks: 0 }
    }

    /// Does one of the semantics' checks.
    pub(super) fn run(&mut self, what: &'static str, check: fn(&mut Self)) {
        let only = std::env::var("SEMANTICS").unwrap_or_default();
        if !what.contains(&only) {
            return;
        }
        self.what = what;
        let (begun, checks, faults) = (Instant::now(), self.checks, self.faults.len());
        check(self);
        println!(
            "{}: {what}: {} expectations, {} not met, {:.1} s",
            self.mode,
            self.checks - checks,
            self.faults.len() - faults,
            begun.elapsed().as_secs_f64()
        );
    }

    /// Fails when anything was not as it had to be.
    pub(super) fn end(self) {
        println!("{}: {} expectations, {} not met", self.mode, self.checks, self.faults.len());
        assert!(self.faults.is_empty(), "\n{}", self.faults.join("\n"));
        assert!(self.checks > 0, "nothing was tried");
    }

    pub(super) fn is_ebpf(&self) -> bool {
        self.mode == "ebpf"
    }

    /// Creates or replaces objects.
    pub(super) fn apply(&self, objects: &[Value]) {
        self.objects("apply", objects);
    }

    pub(super) fn delete(&self, objects: &[Value]) {
        self.objects("delete", objects);
    }

    fn objects(&self, verb: &str, objects: &[Value]) {
        let file = tempfile::Builder::new().suffix(".json").tempfile().unwrap();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        std::fs::write(file.path(), list.to_string()).unwrap();
        let output = self.lab.run(&[verb, "-f", file.path().to_str().unwrap()]);
        assert!(output.status.success(), "{}: {verb}: {}", self.what, text(&output));
    }

    /// Makes a pod ready or not.
    pub(super) fn ready(&self, pod: &str, ready: bool) {
        let output = self.lab.run(&["ready", pod, if ready { "on" } else { "off" }]);
        assert!(output.status.success(), "{}: {}", self.what, text(&output));
    }

    /// A slice of a Service without a selector for each family: pods with `ready`, `serving`, `terminating`.
    pub(super) fn slices(
        &mut self,
        service: &str,
        pods: &[(&'static str, [bool; 3])],
        port: u16,
    ) -> Vec<Value> {
        self.slices_of(service, pods, json!([{"name": "http", "port": port, "protocol": "TCP"}]))
    }

    #[expect(clippy::needless_pass_by_value, reason = "callers write the value in place")]
    pub(super) fn slices_of(
        &mut self,
        service: &str,
        pods: &[(&'static str, [bool; 3])],
        ports: Value,
    ) -> Vec<Value> {
        let mut slices = Vec::new();
        for family in FAMILIES {
            let endpoints: Vec<Value> = pods
                .iter()
                .map(|(pod, [ready, serving, terminating])| {
                    json!({
                        "addresses": [self.address(pod, family)],
                        "nodeName": format!("node-{}", &pod[1..]),
                        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
                    })
                })
                .collect();
            let kind = if family == Family::V4 { "IPv4" } else { "IPv6" };
            slices.push(json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{service}-{}", kind.to_lowercase()),
                    "labels": {
                        "kubernetes.io/service-name": service,
                        "endpointslice.kubernetes.io/managed-by": "test.example.com",
                    },
                },
                "addressType": kind,
                "endpoints": endpoints,
                "ports": ports,
            }));
        }
        slices
    }

    /// Address of a client's place.
    pub(super) fn address(&mut self, place: &'static str, family: Family) -> IpAddr {
        // Not to be reached from everywhere, but routed.
        let far = node(family, 2);
        self.client(place).source(far)
    }

    /// The client in a place: a pod by its name, `node-1`, `outside`, or `packets`: the pod `bare`'s network, and the
    /// control group of neither pod nor node.
    pub(super) fn client(&mut self, place: &'static str) -> &mut Client {
        let lab = self.lab.name;
        self.clients.entry(place).or_insert_with(|| {
            let words = |list: &[&str]| list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
            if place == "packets" {
                let netns = format!("--net=/run/netns/podway-{lab}-pod-default-bare");
                return Client::start("nsenter".as_ref(), &[netns]);
            }
            let arguments = match place {
                "outside" => words(&["lab", "outside", "exec", "--name", lab, "--"]),
                node if node.starts_with("node-") => {
                    words(&["lab", "node", "exec", "--name", lab, node, "--"])
                }
                pod => words(&["lab", "exec", "--name", lab, pod, "--"]),
            };
            Client::start(podway().as_os_str(), &arguments)
        })
    }

    /// Forgets the client in a place, whose pod goes.
    pub(super) fn leave(&mut self, place: &str) {
        self.clients.remove(place);
    }

    /// All pods' clients: the one whose sockets are translated, and with eBPF the one whose packets are.
    pub(super) fn pods(&self) -> &'static [&'static str] {
        if self.is_ebpf() { &["client", "packets"] } else { &["client"] }
    }

    pub(super) fn fault(&mut self, text: &str) {
        println!("{}: {}: NOT MET: {text}", self.mode, self.what);
        self.faults.push(format!("{}: {}: {text}", self.mode, self.what));
    }

    /// A condition that holds.
    pub(super) fn holds(&mut self, what: &str, holds: bool) {
        self.checks += 1;
        if !holds {
            self.fault(what);
        }
    }

    /// A condition that comes to hold.
    pub(super) fn comes(&mut self, what: &str, mut holds: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        let mut held = holds(self);
        while !held && begun.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(100));
            held = holds(self);
        }
        self.holds(what, held);
    }

    /// TCP connections, new ones all.
    pub(super) fn tcp(&mut self, from: &'static str, to: (IpAddr, u16), want: &Want) {
        self.expect(from, Kind::Tcp, to.into(), 1, want);
    }

    /// Datagrams, each from a socket of its own.
    pub(super) fn udp(&mut self, from: &'static str, to: (IpAddr, u16), want: &Want) {
        self.expect(from, Kind::ConnectedUdp, to.into(), 1, want);
    }

    /// What is expected comes about within the time that a change may take.
    pub(super) fn expect(
        &mut self,
        from: &'static str,
        kind: Kind,
        to: SocketAddr,
        size: usize,
        want: &Want,
    ) {
        self.checks += 1;
        let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
        let own = match want {
            Want::By(_, Saw::Client | Saw::NotClient) => Some(self.address(from, family)),
            _ => None,
        };
        let times = match want {
            Want::By(pods, _) if pods.len() > 1 => TRIES * pods.len(),
            Want::One(_) => 12,
            Want::By(..) => 2,
            // The kernel tells a client of refused datagrams once in a second.
            Want::Refused | Want::Silence | Want::Nobody => 1,
        };
        // A message about a packet that left in this very call finds the socket busy; the kernel then tells an IPv6
        // client with the next SYN.
        let late = self.is_ebpf() && kind == Kind::Tcp && !to.is_ipv4() && matches!(want, Want::Refused);
        let connect_ms = if late { 2 * CONNECT_MS } else { CONNECT_MS };
        let begun = Instant::now();
        let client = self.client(from);
        let mut outcomes = client.patient_tries(kind, to, times, size, connect_ms);
        while let Err(why) = judge(&outcomes, want, own) {
            if begun.elapsed() > LIMIT {
                let text = format!("{from} to {to} ({kind:?}), wanted {want:?}: {why}");
                self.fault(&text);
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
            outcomes = client.patient_tries(kind, to, times, size, connect_ms);
        }
    }
}

fn judge(outcomes: &[Outcome], want: &Want, own: Option<IpAddr>) -> Result<(), String> {
    let mut served = BTreeSet::new();
    for outcome in outcomes {
        let fits = match (outcome, want) {
            (Outcome::Served { pod, saw, .. }, Want::By(pods, wanted)) => {
                served.insert(pod.as_str());
                pods.contains(&pod.as_str())
                    && match wanted {
                        Saw::Client => Some(*saw) == own,
                        Saw::NotClient => Some(*saw) != own,
                        Saw::Any => true,
                    }
            }
            (Outcome::Served { pod, .. }, Want::One(pods)) => {
                served.insert(pod.as_str());
                pods.contains(&pod.as_str())
            }
            (Outcome::Refused, Want::Refused) | (Outcome::Silence, Want::Silence) => true,
            (other, Want::Nobody) => !matches!(other, Outcome::Served { .. }),
            _ => false,
        };
        if !fits {
            return Err(format!("{outcome:?}"));
        }
    }
    match want {
        Want::By(pods, _) if served.len() != pods.len() => Err(format!("only {served:?}")),
        Want::One(_) if served.len() != 1 => Err(format!("all of {served:?}")),
        _ => Ok(()),
    }
}
