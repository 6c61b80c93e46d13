//! The surroundings of the agents under test.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use podway_agent::Instance;
use podway_apiserver::{ResourceKey, Store, StoreConfig};
use podway_cni::protocol::{self, AddRequest, CheckRequest, DelRequest, GcRequest, Response};
use podway_cni::{AddResult, Args, CniError, RuntimeConfig};
use podway_link::{AddressFlags, Netlink, Netns, VethSpec};
use serde_json::{Value, json};

/// Prefix of everything that is made here.
pub(crate) const PREFIX: &str = "pwt-agent";
const FABRIC: &str = "pwt-agent-fabric";
const NETWORK: &str = "pods";

/// Two nodes, a bridge between them, and an API server on it.
pub(crate) struct World {
    runtime: tokio::runtime::Runtime,
    pub(crate) store: Arc<Store>,
    server: Option<tokio::task::JoinHandle<()>>,
    pub(crate) fabric: Netns,
    pub(crate) nodes: Vec<TestNode>,
    directory: tempfile::TempDir,
}

/// One node and its agent.
pub(crate) struct TestNode {
    pub(crate) name: String,
    pub(crate) ns: Netns,
    pub(crate) instance: Instance,
    agent: Option<Child>,
    log: PathBuf,
    kubeconfig: PathBuf,
}

/// One pod: a namespace, attached or not.
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) ns: Netns,
}

impl World {
    pub(crate) fn new() -> Self {
        remove_leftovers();
        let directory = tempfile::tempdir().unwrap();
        let fabric = Netns::create_named(FABRIC).unwrap();
        let mut netlink = Netlink::open_in(&fabric).unwrap();
        let bridge = netlink.create_bridge("br0", 1500).unwrap();
        let nodad = AddressFlags { nodad: true, ..AddressFlags::default() };
        netlink.add_address(bridge.index, "172.18.0.1/16".parse().unwrap(), nodad).unwrap();
        netlink.set_up(bridge.index).unwrap();
        let kubeconfig = directory.path().join("kubeconfig");
        fs::write(
            &kubeconfig,
            "apiVersion: v1\nkind: Config\ncurrent-context: t\n\
             clusters: [{name: t, cluster: {server: \"http://172.18.0.1:6443\"}}]\n\
             contexts: [{name: t, context: {cluster: t, user: t}}]\nusers: [{name: t, user: {}}]\n",
        )
        .unwrap();
        let mut nodes = Vec::new();
        for number in 1..=2u8 {
            let name = format!("n{number}");
            let ns = Netns::create_named(&format!("{PREFIX}-{name}")).unwrap();
            let port = netlink
                .create_veth(&VethSpec {
                    name: format!("p{number}"),
                    mtu: 1500,
                    mac: None,
                    alias: None,
                    up: true,
                    addr_gen_none: false,
                    peer_name: "eth0".into(),
                    peer_mac: None,
                    peer_mtu: 1500,
                    peer_ns: Some(&ns),
                })
                .unwrap();
            netlink.set_master(port.index, Some(bridge.index)).unwrap();
            let mut inside = Netlink::open_in(&ns).unwrap();
            let eth0 = inside.link_by_name("eth0").unwrap().unwrap().index;
            for address in [format!("172.18.1.{number}/16"), format!("fd00:172:18::{number}/64")] {
                inside.add_address(eth0, address.parse().unwrap(), nodad).unwrap();
            }
            inside.set_up(eth0).unwrap();
            nodes.push(TestNode {
                instance: Instance::parse(&format!("{PREFIX}/{name}")).unwrap(),
                log: directory.path().join(format!("{name}.log")),
                kubeconfig: kubeconfig.clone(),
                name,
                ns,
                agent: None,
            });
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let store = Arc::new(Store::new(StoreConfig::default()));
        let mut world = Self { runtime, store, server: None, fabric, nodes, directory };
        world.start_api();
        for number in 1..=2 {
            world.put_node(&node_object(number));
        }
        world
    }

    /// A world whose agents are ready.
    pub(crate) fn ready() -> Self {
        Self::ready_with(&[])
    }

    /// A world whose agents have options and are ready.
    pub(crate) fn ready_with(options: &[&str]) -> Self {
        let mut world = Self::new();
        for node in &mut world.nodes {
            node.start(&[], options);
        }
        for node in &world.nodes {
            node.wait_ready();
        }
        world
    }

    pub(crate) fn start_api(&mut self) {
        let listener = self.fabric.run(|| TcpListener::bind("172.18.0.1:6443")).unwrap().unwrap();
        let store = Arc::clone(&self.store);
        self.server = Some(self.runtime.spawn(async move {
            let ended = podway_apiserver::serve(listener, store, None).await;
            panic!("the API server ended: {ended:?}");
        }));
    }

    pub(crate) fn stop_api(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
            self.runtime.block_on(server).ok();
        }
    }

    pub(crate) fn put_node(&self, object: &Value) {
        self.store.put(object.clone()).unwrap();
    }

    pub(crate) fn delete_node(&self, name: &str) {
        self.store.delete(&ResourceKey::new("", "nodes", "", name), &Default::default()).unwrap();
    }

    /// Events as `reason: message`.
    pub(crate) fn events(&self) -> Vec<String> {
        let events = podway_apiserver::GroupResource::new("", "events");
        let list = self.store.list(&events, None, &Default::default()).unwrap();
        let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
        list.items.iter().map(|e| format!("{}: {}", text(e, "reason"), text(e, "message"))).collect()
    }

    /// Sets the MTU of the bridge's port towards a node: what is larger is lost on the way without a word.
    pub(crate) fn set_port_mtu(&self, number: u8, mtu: u32) {
        let mut netlink = Netlink::open_in(&self.fabric).unwrap();
        let port = netlink.link_by_name(&format!("p{number}")).unwrap().unwrap();
        netlink.set_mtu(port.index, mtu).unwrap();
    }

    pub(crate) fn pod(&self, name: &str) -> Pod {
        Pod { name: name.into(), ns: Netns::create_named(&format!("{PREFIX}-pod-{name}")).unwrap() }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os("PODWAY_TEST_LOGS").is_some() {
            for node in &self.nodes {
                let log = fs::read_to_string(&node.log).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(40).collect();
                println!("--- last lines of the agent on {}", node.name);
                tail.iter().rev().for_each(|line| println!("{line}"));
            }
            println!("--- logs were in {}", self.directory.path().display());
        }
        for node in &mut self.nodes {
            node.kill();
        }
        self.stop_api();
        remove_leftovers();
    }
}

/// Removes what this or an earlier run made.
fn remove_leftovers() {
    for node in ["n1", "n2"] {
        let instance = Instance::parse(&format!("{PREFIX}/{node}")).unwrap();
        let name = format!("{PREFIX}-{node}");
        // Only inside of a namespace of ours: elsewhere it would be the machine's own network.
        let Ok(ns) = Netns::open_named(&name) else {
            podway_bpf_host::Datapath::remove_all(&instance.pin_dir()).ok();
            continue;
        };
        let report = ns.run(|| podway_agent::cleanup(&instance, true)).unwrap().unwrap();
        assert_eq!(report.failed, Vec::<String>::new());
    }
    for name in Netns::list_named(PREFIX).unwrap() {
        Netns::delete_named(&name).unwrap();
    }
    fs::remove_dir_all(format!("/run/podway/{PREFIX}")).ok();
    fs::remove_dir(format!("/sys/fs/bpf/podway/{PREFIX}")).ok();
}

/// Node `n<number>` as a kubelet registers it.
pub(crate) fn node_object(number: u8) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": format!("n{number}")},
        "spec": {"podCIDRs": [format!("10.244.{number}.0/24"), format!("fd00:10:244:{number}::/64")]},
        "status": {"addresses": [
            {"type": "InternalIP", "address": format!("172.18.1.{number}")},
            {"type": "InternalIP", "address": format!("fd00:172:18::{number}")},
        ]},
    })
}

impl TestNode {
    pub(crate) fn start(&mut self, environment: &[(&str, &str)], options: &[&str]) {
        assert!(self.agent.is_none());
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["agent", &self.name])
            .arg(&self.kubeconfig)
            .arg(self.instance.to_string())
            .args(options)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.agent = Some(self.ns.run(move || command.spawn()).unwrap().unwrap());
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().ok();
            agent.wait().unwrap();
        }
    }

    /// SIGTERM; returns whether it ended by itself.
    pub(crate) fn terminate(&mut self) -> bool {
        let mut agent = self.agent.take().unwrap();
        // `wait` closes it, which would end the agent in its own way.
        let _stdin = agent.stdin.take();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(agent.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        agent.wait().unwrap().success()
    }

    pub(crate) fn has_died(&mut self) -> bool {
        let died = self.agent.as_mut().is_some_and(|a| a.try_wait().unwrap().is_some());
        if died {
            self.agent = None;
        }
        died
    }

    pub(crate) fn restart(&mut self) {
        self.kill();
        self.start(&[], &[]);
        self.wait_ready();
    }

    pub(crate) fn wait_ready(&self) {
        wait(&format!("{} to be ready", self.name), 20, || {
            matches!(self.call(protocol::Command::Status, None), Ok(Response::Ok(_)))
        });
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.instance.run_dir().join("agent.sock")
    }

    fn call(&self, command: protocol::Command, ns: Option<&Netns>) -> Result<Response, protocol::CallError> {
        protocol::call(&self.socket(), command, ns.map(|ns| ns.as_fd()))
    }

    fn ask(&self, command: protocol::Command, ns: Option<&Netns>) -> Result<Option<AddResult>, CniError> {
        match self.call(command, ns) {
            Ok(Response::Ok(result)) => Ok(result),
            Ok(Response::Err(error)) => Err(error),
            Err(error) => Err(CniError::try_again(error.to_string())),
        }
    }

    pub(crate) fn add(&self, pod: &Pod) -> Result<Vec<IpAddr>, CniError> {
        self.add_as(&pod.name, pod)
    }

    /// ADD of a pod's namespace for a container of another name.
    pub(crate) fn add_as(&self, container: &str, pod: &Pod) -> Result<Vec<IpAddr>, CniError> {
        self.add_with(container, pod, &RuntimeConfig::default())
    }

    /// ADD with what the runtime asks for by capability.
    pub(crate) fn add_with(
        &self,
        container: &str,
        pod: &Pod,
        runtime: &RuntimeConfig,
    ) -> Result<Vec<IpAddr>, CniError> {
        let request = AddRequest {
            container_id: container.into(),
            ifname: "eth0".into(),
            netns_path: format!("/run/netns/{PREFIX}-pod-{}", pod.name),
            args: args(pod),
            network: NETWORK.into(),
            runtime: runtime.clone(),
        };
        let result = self.ask(protocol::Command::Add(request), Some(&pod.ns))?.unwrap();
        Ok(result.ips.iter().map(|ip| ip.address.addr()).collect())
    }

    pub(crate) fn del(&self, container: &str) -> Result<(), CniError> {
        let request = DelRequest {
            container_id: container.into(),
            ifname: "eth0".into(),
            netns_path: String::new(),
            args: Args::default(),
            network: NETWORK.into(),
        };
        self.ask(protocol::Command::Del(request), None).map(drop)
    }

    pub(crate) fn check(&self, pod: &Pod) -> Result<(), CniError> {
        let request = CheckRequest {
            container_id: pod.name.clone(),
            ifname: "eth0".into(),
            netns_path: String::new(),
            args: args(pod),
            network: NETWORK.into(),
            addresses: Vec::new(),
        };
        self.ask(protocol::Command::Check(request), Some(&pod.ns)).map(drop)
    }

    pub(crate) fn gc(&self, valid: &[&str]) -> Result<(), CniError> {
        let valid_attachments = valid
            .iter()
            .map(|id| podway_cni::config::Attachment {
                container_id: (*id).to_owned(),
                ifname: "eth0".into(),
            })
            .collect();
        let request = GcRequest { network: NETWORK.into(), valid_attachments };
        self.ask(protocol::Command::Gc(request), None).map(drop)
    }

    /// Names of the host sides of pods.
    pub(crate) fn pod_links(&self) -> Vec<String> {
        let links = Netlink::open_in(&self.ns).unwrap().links().unwrap();
        links
            .into_iter()
            .map(|l| l.name)
            .filter(|n| n.starts_with("pw"))
            .filter(|n| n != "podway_vxlan")
            .collect()
    }

    /// Files under `links` of the pin directory that belong to pods.
    pub(crate) fn pod_pins(&self) -> usize {
        let links = fs::read_dir(self.instance.pin_dir().join("links")).unwrap();
        links.flatten().filter(|e| e.file_name().to_string_lossy().contains("_pod")).count()
    }

    pub(crate) fn http(&self, path: &str) -> (u16, String) {
        let request = format!("GET {path} HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n");
        let mut stream = self.ns.run(|| TcpStream::connect("127.0.0.1:9950")).unwrap().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let code = text.split_whitespace().nth(1).unwrap().parse().unwrap();
        (code, text.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    /// The value of a metric, by the beginning of its line.
    pub(crate) fn metric(&self, begin: &str) -> f64 {
        let (_, text) = self.http("/metrics");
        let line = text.lines().find(|l| l.starts_with(begin));
        line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("{begin} in\n{text}"))
    }

    /// Nothing of any pod is left; addresses may rest.
    pub(crate) fn assert_empty(&self) {
        wait(&format!("the links on {} to go", self.name), 10, || self.pod_links().is_empty());
        wait(&format!("the pins on {} to go", self.name), 10, || self.pod_pins() == 0);
        assert_eq!(self.metric("podway_pods "), 0.0);
        assert_eq!(self.metric("podway_host_ports "), 0.0);
        let (_, page) = self.http("/metrics");
        for line in page.lines().filter(|l| l.starts_with("podway_addresses{") && l.contains("\"leased\"")) {
            assert!(line.ends_with(" 0"), "leases on {}: {line}", self.name);
        }
        assert_eq!(self.metric("podway_table_entries{table=\"sources\"}"), 0.0);
        assert_eq!(self.metric("podway_table_entries{table=\"endpoints\"}"), 0.0);
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        Netns::delete_named(&format!("{PREFIX}-pod-{}", self.name)).ok();
    }
}

fn args(pod: &Pod) -> Args {
    Args(
        [("K8S_POD_NAMESPACE", "test"), ("K8S_POD_NAME", pod.name.as_str())]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into(),
    )
}

/// Sends a datagram and gets an answer; the receiver must see the sender's own address.
pub(crate) fn exchange(from: (&Netns, IpAddr), to: (&Netns, IpAddr)) -> Result<(), String> {
    let open = |(ns, ip): (&Netns, IpAddr)| -> Result<UdpSocket, String> {
        let socket = ns.run(|| UdpSocket::bind((ip, 0))).unwrap().map_err(|e| format!("bind {ip}: {e}"))?;
        socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
        Ok(socket)
    };
    let (client, server) = (open(from)?, open(to)?);
    let target = server.local_addr().unwrap();
    let mut last = String::new();
    for _ in 0..3 {
        let mut buffer = [0; 16];
        let done = client
            .send_to(b"ping", target)
            .and_then(|_| server.recv_from(&mut buffer))
            .and_then(|(_, peer)| server.send_to(b"pong", peer).map(|_| peer))
            .and_then(|peer| client.recv_from(&mut buffer).map(|_| peer));
        match done {
            Ok(peer) if peer.ip() == from.1 => return Ok(()),
            Ok(peer) => return Err(format!("{} was seen as {}", from.1, peer.ip())),
            Err(error) => last = error.to_string(),
        }
    }
    Err(format!("{} -> {}: {last}", from.1, to.1))
}

/// Waits for a condition.
pub(crate) fn wait(what: &str, seconds: u64, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < deadline, "waited {seconds} s for {what}");
        std::thread::sleep(Duration::from_millis(30));
    }
}
