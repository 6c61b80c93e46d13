//! The plugin against an agent that answers over a real socket.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test stops at the first surprise, a skipped one says so"
)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use podway_cni::plugin::run;
use podway_cni::protocol::{
    AddRequest, CheckRequest, DelRequest, FRAME_MAX, GcRequest, Handler, PROTOCOL_VERSION, serve_connection,
};
use podway_cni::{AddResult, CniError, Dns, Interface, IpConfig, Route, code};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Remembers what it was asked.
#[derive(Default)]
struct Agent {
    calls: Mutex<Vec<String>>,
    refuse: Option<CniError>,
}

impl Agent {
    fn record(&self, call: String) -> Result<(), CniError> {
        self.calls.lock().expect("no test panics while it holds the lock").push(call);
        self.refuse.clone().map_or(Ok(()), Err)
    }
}

fn inode(fd: &OwnedFd) -> u64 {
    rustix::fs::fstat(fd).map(|stat| stat.st_ino).unwrap_or_default()
}

impl Handler for Agent {
    fn add(&self, request: AddRequest, netns: OwnedFd) -> Result<AddResult, CniError> {
        let pod = (request.args.pod_namespace(), request.args.pod_name());
        let AddRequest { container_id, ifname, netns_path, network, .. } = &request;
        let call = format!("ADD {network} {container_id} {ifname} {pod:?} {} {netns_path}", inode(&netns));
        let runtime = json!(request.runtime);
        self.record(if request.runtime.is_empty() { call } else { format!("{call} {runtime}") })?;
        Ok(result())
    }

    fn del(&self, request: DelRequest) -> Result<(), CniError> {
        self.record(format!("DEL {} {} {}", request.network, request.container_id, request.ifname))
    }

    fn check(&self, request: CheckRequest, netns: OwnedFd) -> Result<(), CniError> {
        self.record(format!("CHECK {} {:?} {}", request.container_id, request.addresses, inode(&netns)))
    }

    fn gc(&self, request: GcRequest) -> Result<(), CniError> {
        self.record(format!("GC {} {:?}", request.network, request.valid_attachments))
    }

    fn status(&self) -> Result<(), CniError> {
        self.record("STATUS".into())
    }
}

fn result() -> AddResult {
    let net = |text: &str| text.parse().expect("an address of the test");
    let ip = |text: &str| text.parse().expect("an address of the test");
    AddResult {
        interfaces: vec![
            Interface {
                name: "pw0123456789ab".into(),
                mac: "02:00:00:00:00:01".into(),
                mtu: Some(1450),
                sandbox: None,
            },
            Interface {
                name: "eth0".into(),
                mac: "02:00:00:00:00:02".into(),
                mtu: Some(1450),
                sandbox: Some("/run/netns/x".into()),
            },
        ],
        ips: vec![
            IpConfig { address: net("10.244.1.7/32"), gateway: Some(ip("169.254.1.1")), interface: Some(1) },
            IpConfig {
                address: net("fd00:10:244:1::7/128"),
                gateway: Some(ip("fe80::1")),
                interface: Some(1),
            },
        ],
        routes: vec![Route {
            dst: net("0.0.0.0/0"),
            gw: Some(ip("169.254.1.1")),
            mtu: Some(1450),
            scope: None,
        }],
        dns: Dns::default(),
    }
}

/// An agent that listens, and a namespace that is not ours.
struct Setup {
    directory: TempDir,
    agent: Arc<Agent>,
    server: Option<JoinHandle<()>>,
    container: Option<Child>,
}

impl Setup {
    fn new(agent: Agent) -> io::Result<Self> {
        let directory = TempDir::new()?;
        let listener = UnixListener::bind(directory.path().join("agent.sock"))?;
        let agent = Arc::new(agent);
        let served = Arc::clone(&agent);
        let server = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // A connection without a byte ends the server.
                let mut first = [0];
                match rustix::net::recv(&stream, &mut first, rustix::net::RecvFlags::PEEK) {
                    Ok((_, 0)) | Err(_) => return,
                    Ok(_) => drop(serve_connection(stream, &*served)),
                }
            }
        });
        // `unshare` of util-linux makes the namespace; it needs root.
        let container = Command::new("unshare").args(["--net", "sleep", "30"]).spawn().ok();
        Ok(Self { directory, agent, server: Some(server), container })
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    /// The container's namespace, or none when this process may not make one.
    fn netns(&self) -> Option<(String, u64)> {
        let path = format!("/proc/{}/ns/net", self.container.as_ref()?.id());
        let inode =
            |path: &str| std::fs::metadata(path).map(|m| std::os::unix::fs::MetadataExt::ino(&m)).ok();
        let own = inode("/proc/self/ns/net");
        for _ in 0..200 {
            match inode(&path) {
                found if found.is_some() && found != own => return Some((path, found?)),
                _ => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        }
        None
    }

    fn calls(&self) -> Vec<String> {
        self.agent.calls.lock().expect("no test panics while it holds the lock").clone()
    }

    fn call(&self, command: &str, netns: &str, config: Value) -> (Option<Value>, bool) {
        let mut config = config;
        config["socket"] = json!(self.socket());
        config["name"] = json!("podway");
        config["type"] = json!("podway-cni");
        let environment: BTreeMap<&str, OsString> = BTreeMap::from([
            ("CNI_COMMAND", command.into()),
            ("CNI_CONTAINERID", "c0ffee".into()),
            ("CNI_IFNAME", "eth0".into()),
            ("CNI_NETNS", netns.into()),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=checkout-1".into()),
        ]);
        run(|name| environment.get(name).cloned(), config.to_string().as_bytes())
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        drop(UnixStream::connect(self.socket()));
        if let Some(server) = self.server.take() {
            drop(server.join());
        }
        if let Some(mut container) = self.container.take() {
            drop(container.kill());
            drop(container.wait());
        }
    }
}

fn skipped(netns: Option<(String, u64)>) -> Option<(String, u64)> {
    if netns.is_none() {
        println!("skipped: needs root");
    }
    netns
}

#[test]
fn add_hands_over_what_the_runtime_asks_for() {
    let setup = Setup::new(Agent::default()).unwrap();
    let Some((netns, _)) = skipped(setup.netns()) else { return };
    let runtime = json!({
        "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "" }],
        "bandwidth": { "ingressRate": 1000, "ingressBurst": 2000, "egressRate": 0, "egressBurst": 0 },
    });
    let capabilities = json!({ "portMappings": true, "bandwidth": true });
    let config = json!({ "cniVersion": "1.0.0", "capabilities": capabilities, "runtimeConfig": runtime });
    let (output, success) = setup.call("ADD", &netns, config);
    assert!(success, "{output:?}");
    let call = setup.calls().remove(0);
    let wanted = r#"{"bandwidth":{"ingress":{"burst":2000,"rate":1000}},"portMappings":[{"containerPort":80,"hostPort":8080,"protocol":"tcp"}]}"#;
    assert!(call.ends_with(wanted), "{call}");
}

#[test]
fn add_hands_over_the_namespace_and_answers_in_each_version() {
    let setup = Setup::new(Agent::default()).unwrap();
    let Some((netns, inode)) = skipped(setup.netns()) else { return };
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let (output, success) = setup.call("ADD", &netns, json!({ "cniVersion": version }));
        let output = output.unwrap();
        assert!(success, "{output}");
        let (old, newest) = (version < "1.0.0", version == "1.1.0");
        let mut wanted = json!({
            "cniVersion": version,
            "interfaces": [
                { "name": "pw0123456789ab", "mac": "02:00:00:00:00:01" },
                { "name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/x" },
            ],
            "ips": [
                { "address": "10.244.1.7/32", "gateway": "169.254.1.1", "interface": 1 },
                { "address": "fd00:10:244:1::7/128", "gateway": "fe80::1", "interface": 1 },
            ],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "169.254.1.1" }],
        });
        if old {
            wanted["ips"][0]["version"] = json!("4");
            wanted["ips"][1]["version"] = json!("6");
        }
        if newest {
            wanted["interfaces"][0]["mtu"] = json!(1450);
            wanted["interfaces"][1]["mtu"] = json!(1450);
            wanted["routes"][0]["mtu"] = json!(1450);
        }
        assert_eq!(output, wanted, "{version}");
    }
    let call = format!("ADD podway c0ffee eth0 (Some(\"shop\"), Some(\"checkout-1\")) {inode} {netns}");
    assert_eq!(setup.calls(), vec![call; 4]);
}

#[test]
fn a_previous_result_is_kept_and_ours_comes_behind_it() {
    let setup = Setup::new(Agent::default()).unwrap();
    let Some((netns, _)) = skipped(setup.netns()) else { return };
    let previous = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{ "name": "first", "vendor": "kept" }],
        "ips": [{ "address": "192.0.2.1/24", "interface": 0 }],
        "dns": { "nameservers": ["192.0.2.53"] },
        "extra": 7,
    });
    let config = json!({ "cniVersion": "1.0.0", "prevResult": previous, "dns": { "search": ["ours"] } });
    let (output, success) = setup.call("ADD", &netns, config);
    let output = output.unwrap();
    assert!(success, "{output}");
    assert_eq!(output["interfaces"][0], json!({ "name": "first", "vendor": "kept" }));
    assert_eq!(output["interfaces"].as_array().map(Vec::len), Some(3));
    assert_eq!(output["ips"][0], json!({ "address": "192.0.2.1/24", "interface": 0 }));
    // Our second interface is the third of all.
    assert_eq!(output["ips"][1]["interface"], 2);
    assert_eq!(output["dns"], json!({ "nameservers": ["192.0.2.53"] }));
    assert_eq!(output["extra"], 7);
    // Without one, the configuration's DNS settings are ours to hand on.
    let config = json!({ "cniVersion": "1.0.0", "dns": { "search": ["ours"] } });
    assert_eq!(setup.call("ADD", &netns, config).0.unwrap()["dns"], json!({ "search": ["ours"] }));
}

#[test]
fn the_other_operations_say_nothing_when_they_succeed() {
    let setup = Setup::new(Agent::default()).unwrap();
    let version = json!({ "cniVersion": "1.1.0" });
    // DEL with the namespace gone, and without any.
    for netns in ["/run/netns/gone", ""] {
        assert_eq!(setup.call("DEL", netns, version.clone()), (None, true));
    }
    assert_eq!(setup.call("STATUS", "", version.clone()), (None, true));
    let attachments = json!([{ "containerID": "a", "ifname": "eth0" }]);
    let gc = json!({ "cniVersion": "1.1.0", "cni.dev/valid-attachments": attachments });
    assert_eq!(setup.call("GC", "", gc), (None, true));
    assert_eq!(
        setup.calls(),
        [
            "DEL podway c0ffee eth0".to_owned(),
            "DEL podway c0ffee eth0".to_owned(),
            "STATUS".to_owned(),
            "GC podway [Attachment { container_id: \"a\", ifname: \"eth0\" }]".to_owned(),
        ]
    );
    let Some((netns, inode)) = skipped(setup.netns()) else { return };
    let previous = json!({
        "interfaces": [{ "name": "pw1" }, { "name": "eth0", "sandbox": "/x" }, { "name": "net1", "sandbox": "/x" }],
        "ips": [
            { "address": "10.244.1.7/32", "interface": 1 },
            { "address": "192.0.2.1/24", "interface": 2 },
            { "address": "fd00::7/128" },
        ],
    });
    let check = json!({ "cniVersion": "0.4.0", "prevResult": previous });
    assert_eq!(setup.call("CHECK", &netns, check), (None, true));
    let call = format!("CHECK c0ffee [10.244.1.7/32, fd00::7/128] {inode}");
    assert_eq!(setup.calls().last(), Some(&call), "the addresses of another interface are not ours to check");
}

#[test]
fn the_agents_refusal_is_told_word_for_word() {
    let refuse =
        CniError::new(code::TRY_AGAIN, "no address left in 10.244.1.0/24").details("254 of 254 leased");
    let setup = Setup::new(Agent { refuse: Some(refuse), ..Agent::default() }).unwrap();
    let (output, success) = setup.call("DEL", "", json!({ "cniVersion": "0.4.0" }));
    assert!(!success);
    let wanted = json!({
        "cniVersion": "0.4.0",
        "code": 11,
        "msg": "no address left in 10.244.1.0/24",
        "details": "254 of 254 leased",
    });
    assert_eq!(output, Some(wanted));
}

#[test]
fn without_an_agent_the_runtime_is_asked_to_try_again() {
    let setup = Setup::new(Agent::default()).unwrap();
    // A socket file that nobody listens on, as after a kill -9 of the agent.
    let stale = setup.directory.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    for (command, wanted) in [("DEL", code::TRY_AGAIN), ("STATUS", code::NOT_AVAILABLE)] {
        for socket in [stale.clone(), setup.directory.path().join("none.sock")] {
            let config = json!({ "cniVersion": "1.1.0", "name": "podway", "socket": socket });
            let variables = [("CNI_COMMAND", command), ("CNI_CONTAINERID", "c0ffee"), ("CNI_IFNAME", "eth0")];
            let variable = |name: &str| Some(OsString::from(variables.iter().find(|(n, _)| *n == name)?.1));
            let (output, success) = run(variable, config.to_string().as_bytes());
            let output = output.unwrap();
            assert!(!success);
            assert_eq!(output["code"], wanted, "{output}");
            assert!(output["msg"].as_str().unwrap().contains(socket.to_str().unwrap()), "{output}");
        }
    }
}

#[test]
fn an_agent_that_hangs_does_not_hang_the_plugin() {
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    // Room for one connection, and nobody takes it.
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&socket).unwrap();
    let config = json!({ "cniVersion": "1.1.0", "name": "podway", "socket": socket });
    let variable = |name: &str| (name == "CNI_COMMAND").then(|| OsString::from("STATUS"));
    let since = std::time::Instant::now();
    let (output, success) = run(variable, config.to_string().as_bytes());
    assert!(!success);
    assert_eq!(output.as_ref().unwrap()["code"], code::NOT_AVAILABLE, "{output:?}");
    assert!(since.elapsed() < std::time::Duration::from_secs(10));
}

#[test]
fn an_agent_that_dies_within_an_operation_is_told_as_try_again() {
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        // Each answer ends the connection at another place: before any byte, in the length, in the body, and
        // with what makes no sense.
        for answer in [&b""[..], &[0, 0], &[0, 0, 0, 9, b'{'], &[0, 0, 0, 2, b'{', b'}'], &[0xff; 8]] {
            let (mut stream, _) = listener.accept().unwrap();
            let mut length = [0; 4];
            stream.read_exact(&mut length).unwrap();
            let mut body = vec![0; u32::from_be_bytes(length) as usize];
            stream.read_exact(&mut body).unwrap();
            stream.write_all(answer).unwrap();
        }
    });
    for wanted in [code::TRY_AGAIN, code::TRY_AGAIN, code::TRY_AGAIN, code::DECODE, code::DECODE] {
        let config = json!({ "cniVersion": "1.1.0", "name": "podway", "socket": socket });
        let variables = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c0ffee"), ("CNI_IFNAME", "eth0")];
        let variable = |name: &str| Some(OsString::from(variables.iter().find(|(n, _)| *n == name)?.1));
        let (output, success) = run(variable, config.to_string().as_bytes());
        assert!(!success);
        assert_eq!(output.as_ref().unwrap()["code"], wanted, "{output:?}");
    }
    server.join().unwrap();
}

/// Sends bytes to the agent's side and returns the code of its answer, if it gives one.
fn send(bytes: &[u8]) -> (io::Result<()>, Option<u64>, Vec<String>) {
    let (mut client, server) = UnixStream::pair().unwrap();
    let agent = Agent::default();
    let served = std::thread::scope(|scope| {
        let server = scope.spawn(|| serve_connection(server, &agent));
        client.write_all(bytes).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        server.join().unwrap()
    });
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap_or_default();
    let answer: Option<Value> = answer.get(4..).and_then(|body| serde_json::from_slice(body).ok());
    let code = answer.and_then(|answer| answer["err"]["code"].as_u64());
    (served, code, agent.calls.into_inner().unwrap())
}

fn frame(body: &str) -> Vec<u8> {
    [&u32::try_from(body.len()).unwrap().to_be_bytes()[..], body.as_bytes()].concat()
}

#[test]
fn the_agents_side_survives_what_is_no_request() {
    let add =
        json!({ "container_id": "a", "ifname": "eth0", "netns_path": "/x", "args": {}, "network": "podway" });
    let too_long = u32::try_from(FRAME_MAX + 1).unwrap().to_be_bytes();
    let decode = Some(u64::from(code::DECODE));
    let cases: &[(&str, Vec<u8>, Option<u64>)] = &[
        ("nothing", vec![], None),
        ("half a length", vec![0, 0], None),
        ("half a body", frame("{}")[..5].to_vec(), None),
        ("no JSON", frame("hello"), decode),
        ("not a request", frame("{}"), decode),
        ("unknown command", frame(r#"{"version":2,"command":{"reboot":{}}}"#), decode),
        ("a length of 1 MiB and a byte", too_long.to_vec(), decode),
        ("4 GiB announced", vec![0xff; 4], decode),
        ("deep", frame(&"[".repeat(100_000)), decode),
        (
            "an ADD without the namespace",
            frame(&json!({ "version": PROTOCOL_VERSION, "command": { "add": add } }).to_string()),
            Some(5),
        ),
        (
            "another protocol",
            frame(&json!({ "version": PROTOCOL_VERSION + 1, "command": "status" }).to_string()),
            Some(11),
        ),
    ];
    for (case, bytes, code) in cases {
        let (served, answered, calls) = send(bytes);
        assert_eq!(answered, *code, "{case}");
        assert_eq!(served.is_err(), code.is_none(), "{case}");
        assert_eq!(calls, Vec::<String>::new(), "{case}: nothing was done");
    }
    let (served, answered, calls) =
        send(&frame(&json!({ "version": PROTOCOL_VERSION, "command": "status" }).to_string()));
    assert!(served.is_ok() && answered.is_none());
    assert_eq!(calls, ["STATUS"]);
}

#[test]
fn namespaces_that_come_along_do_not_stay_open() {
    let setup = Setup::new(Agent::default()).unwrap();
    let Some((netns, _)) = skipped(setup.netns()) else { return };
    let open = || {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .flatten()
            .filter(|fd| {
                std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("net:["))
            })
            .count()
    };
    for _ in 0..50 {
        assert!(setup.call("ADD", &netns, json!({ "cniVersion": "1.1.0" })).1);
    }
    // Other tests of this file may have a few open at the moment.
    assert!(open() < 10, "{} namespaces open", open());
}
