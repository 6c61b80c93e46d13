//! Probes of a container, as the kubelet runs them: from the node to the pod's address, by the numbers that the
//! manifest gives.
//!
//! A stand-in is not the program of the image. Whatever it is asked over HTTP it answers with 200, and what it cannot
//! be asked at all (TLS, gRPC, a command of the image) passes once it has the port open, or runs. A container that
//! runs a command of this machine is asked all of it but TLS and gRPC, where an open port has to do as well.
//!
//! Initial delays and success thresholds of startup and readiness probes are for programs that take time to start. A
//! stand-in does not, so until its first success it is asked once a second from the start, and one success will do; a
//! StatefulSet of three would take minutes otherwise.
//!
//! <https://kubernetes.io/docs/concepts/workloads/pods/probes/>

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use podway_link::Netns;
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::container::{Place, command_in};
use crate::standin::{Port, Protocol};

/// Longest head of an answer that is looked at, in bytes.
const HEAD_LIMIT: usize = 4 << 10;
/// Longest output of a command that an event shows, in characters.
const OUTPUT_LIMIT: usize = 200;
/// Output of a command that is read, in bytes.
const OUTPUT_READ: u64 = 4 << 10;
/// How often a stand-in is asked before its first success.
const EARLY_PERIOD: Duration = Duration::from_secs(1);
/// Verdicts that may wait.
const VERDICTS: usize = 16;

/// Which of the three it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
    fn field(self) -> &'static str {
        match self {
            Self::Startup => "startupProbe",
            Self::Liveness => "livenessProbe",
            Self::Readiness => "readinessProbe",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        })
    }
}

/// What a probe asks.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ask {
    /// An HTTP request; 200 to 399 is good.
    Http { host: Option<String>, port: u16, path: String, headers: Vec<(String, String)> },
    /// A connection.
    Connect { host: Option<String>, port: u16 },
    /// A command of this machine in the pod; its exit code has to be 0.
    Exec(Vec<String>),
    /// Nothing: that the stand-in runs is all it can answer.
    Runs,
    /// The manifest makes no sense: the probe fails with this.
    Broken(String),
}

/// One probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Probe {
    kind: Kind,
    ask: Ask,
    /// Whether the container is a stand-in, which has nothing to start up.
    stand_in: bool,
    initial_delay: Duration,
    period: Duration,
    timeout: Duration,
    success: u32,
    failure: u32,
    /// `terminationGracePeriodSeconds` of the probe, in place of the pod's.
    grace: Option<Duration>,
}

/// The probes of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Probes {
    startup: Option<Probe>,
    liveness: Option<Probe>,
    readiness: Option<Probe>,
}

/// What probes found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The container has started.
    Started,
    /// It is ready, or no more.
    Ready(bool),
    /// A try failed.
    Unhealthy(String),
    /// It has to be restarted.
    Kill { message: String, grace: Option<Duration> },
}

impl Probes {
    /// Reads the probes of an entry of `spec.containers`. `stand_in` says that no program of its own runs in it.
    pub(super) fn of(container: &Value, ports: &[Port], stand_in: bool) -> Self {
        let read = |kind: Kind| Probe::of(kind, &container[kind.field()], ports, stand_in);
        Self {
            startup: read(Kind::Startup),
            liveness: read(Kind::Liveness),
            readiness: read(Kind::Readiness),
        }
    }

    /// TCP ports that the probes name by number.
    pub(super) fn ports(container: &Value) -> Vec<u16> {
        let mut out = Vec::new();
        for kind in [Kind::Startup, Kind::Liveness, Kind::Readiness] {
            for action in ["httpGet", "tcpSocket", "grpc"] {
                let port =
                    container[kind.field()][action]["port"].as_u64().and_then(|p| u16::try_from(p).ok());
                out.extend(port.filter(|p| *p > 0 && !out.contains(p)));
            }
        }
        out
    }

    /// Whether the container counts as started without being asked.
    pub(super) fn starts_at_once(&self) -> bool {
        self.startup.is_none()
    }

    /// Whether the container counts as ready without being asked.
    pub(super) fn is_ready_at_once(&self) -> bool {
        self.startup.is_none() && self.readiness.is_none()
    }

    /// Runs the probes of one process of the container, for as long as somebody listens to the verdicts.
    pub(super) fn run(
        &self,
        place: &Place,
        env: Vec<(String, std::ffi::OsString)>,
    ) -> (Running, mpsc::Receiver<Verdict>) {
        let (verdicts, receiver) = mpsc::channel(VERDICTS);
        let mut tasks = tokio::task::JoinSet::new();
        if *self != Self::default() {
            tasks.spawn(watch(self.clone(), place.clone(), env, verdicts));
        }
        (Running { _tasks: tasks }, receiver)
    }
}

/// Probes that are being run; they end with it.
pub(super) struct Running {
    _tasks: tokio::task::JoinSet<()>,
}

async fn watch(
    probes: Probes,
    place: Place,
    env: Vec<(String, std::ffi::OsString)>,
    verdicts: mpsc::Sender<Verdict>,
) {
    let begun = Instant::now();
    if let Some(startup) = &probes.startup {
        startup.watch(&place, &env, begun, &verdicts).await;
        let _ = verdicts.send(Verdict::Started).await;
        if probes.readiness.is_none() {
            let _ = verdicts.send(Verdict::Ready(true)).await;
        }
    }
    let one = |probe: Option<Probe>| {
        let (place, env, verdicts) = (&place, &env, &verdicts);
        async move {
            if let Some(probe) = probe {
                probe.watch(place, env, begun, verdicts).await;
            }
        }
    };
    tokio::join!(one(probes.liveness), one(probes.readiness));
}

impl Probe {
    fn of(kind: Kind, probe: &Value, ports: &[Port], stand_in: bool) -> Option<Self> {
        if !probe.is_object() {
            return None;
        }
        let number = |field: &str, default: u64| probe[field].as_u64().unwrap_or(default);
        let seconds = |field: &str, default: u64| Duration::from_secs(number(field, default));
        let count =
            |field: &str, default: u64| u32::try_from(number(field, default)).unwrap_or(u32::MAX).max(1);
        Some(Self {
            kind,
            ask: ask(probe, ports, stand_in)
                .unwrap_or_else(|cause| Ask::Broken(format!("{}.{cause}", kind.field()))),
            stand_in,
            initial_delay: seconds("initialDelaySeconds", 0),
            period: seconds("periodSeconds", 10).max(Duration::from_secs(1)),
            timeout: seconds("timeoutSeconds", 1).max(Duration::from_secs(1)),
            success: count("successThreshold", 1),
            failure: count("failureThreshold", 3),
            grace: probe["terminationGracePeriodSeconds"].as_u64().map(Duration::from_secs),
        })
    }

    /// Asks again and again. A startup probe is done with its first success; the others end with their listener.
    async fn watch(
        &self,
        place: &Place,
        env: &[(String, std::ffi::OsString)],
        begun: Instant,
        verdicts: &mpsc::Sender<Verdict>,
    ) {
        let mut count = Count::default();
        if self.stand_in && self.kind != Kind::Liveness && self.succeeds_early(place, env, begun).await {
            if self.kind == Kind::Startup || verdicts.send(Verdict::Ready(true)).await.is_err() {
                return;
            }
            count = Count { last: Some(true), run: self.success };
        } else {
            tokio::time::sleep_until(begun + self.initial_delay).await;
        }
        let mut ticks = tokio::time::interval(self.period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let result = match tokio::time::timeout(self.timeout, self.try_once(place, env)).await {
                Ok(result) => result,
                Err(_) => Err(format!("no answer in {} s", self.timeout.as_secs())),
            };
            if let Err(cause) = &result {
                let message = format!("{} probe failed: {cause}", self.kind);
                if verdicts.send(Verdict::Unhealthy(message)).await.is_err() {
                    return;
                }
            }
            let Some(good) = count.add(result.is_ok(), self.success, self.failure) else { continue };
            let verdict = match (self.kind, good) {
                (Kind::Startup, true) => return,
                (Kind::Liveness, true) => continue,
                (Kind::Readiness, good) => Verdict::Ready(good),
                (kind, false) => Verdict::Kill {
                    message: format!("{} probe failed", kind.to_string().to_lowercase()),
                    grace: self.grace,
                },
            };
            if verdicts.send(verdict).await.is_err() {
                return;
            }
        }
    }

    /// Asks once a second until the initial delay is over; whether it was answered well.
    async fn succeeds_early(
        &self,
        place: &Place,
        env: &[(String, std::ffi::OsString)],
        begun: Instant,
    ) -> bool {
        loop {
            if matches!(tokio::time::timeout(self.timeout, self.try_once(place, env)).await, Ok(Ok(()))) {
                return true;
            }
            if Instant::now() + EARLY_PERIOD > begun + self.initial_delay {
                return false;
            }
            tokio::time::sleep(EARLY_PERIOD).await;
        }
    }

    async fn try_once(&self, place: &Place, env: &[(String, std::ffi::OsString)]) -> Result<(), String> {
        match &self.ask {
            Ask::Runs => Ok(()),
            Ask::Broken(cause) => Err(cause.clone()),
            Ask::Connect { host, port } => connect(place, host.as_deref(), *port).await.map(drop),
            Ask::Http { host, port, path, headers } => {
                let mut stream = connect(place, host.as_deref(), *port).await?;
                let request = request(&authority(place, host.as_deref(), *port)?, path, headers);
                let head = exchange(&mut stream, &request).await.map_err(|e| format!("GET {path}: {e}"))?;
                judge(&head)
            }
            Ask::Exec(command) => execute(place, env, command).await,
        }
    }
}

/// Results in a row: a change of mind takes as many as the thresholds say.
#[derive(Debug, Default)]
struct Count {
    last: Option<bool>,
    run: u32,
}

impl Count {
    /// Adds a result. Returns it once it has come often enough in a row, and each time after that.
    fn add(&mut self, good: bool, success: u32, failure: u32) -> Option<bool> {
        self.run = if self.last == Some(good) { self.run.saturating_add(1) } else { 1 };
        self.last = Some(good);
        (self.run >= if good { success } else { failure }).then_some(good)
    }
}

fn ask(probe: &Value, ports: &[Port], stand_in: bool) -> Result<Ask, String> {
    let host = |action: &Value| action["host"].as_str().filter(|h| !h.is_empty()).map(str::to_owned);
    let http = &probe["httpGet"];
    if http.is_object() {
        let (host, port) = (host(http), port(&http["port"], ports).map_err(|e| format!("httpGet.{e}"))?);
        if http["scheme"].as_str().is_some_and(|s| s.eq_ignore_ascii_case("https")) {
            return Ok(Ask::Connect { host, port });
        }
        let path = http["path"].as_str().unwrap_or_default();
        let headers: Vec<(String, String)> = http["httpHeaders"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|h| Some((h["name"].as_str()?.to_owned(), h["value"].as_str()?.to_owned())))
            .collect();
        let breaks = |t: &str| t.contains(|c: char| c.is_control());
        if breaks(path) || path.contains(' ') {
            return Err("httpGet.path: has blanks or control characters; write them as %20".into());
        }
        if headers.iter().any(|(name, value)| breaks(name) || breaks(value) || name.contains([':', ' '])) {
            return Err("httpGet.httpHeaders: a name or value has characters that no header can have".into());
        }
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        return Ok(Ask::Http { host, port, path, headers });
    }
    for action in ["tcpSocket", "grpc"] {
        let value = &probe[action];
        if value.is_object() {
            let port = port(&value["port"], ports).map_err(|e| format!("{action}.{e}"))?;
            return Ok(Ask::Connect { host: host(value), port });
        }
    }
    if probe["exec"].is_object() {
        if stand_in {
            return Ok(Ask::Runs);
        }
        let command: Option<Vec<String>> = probe["exec"]["command"]
            .as_array()
            .map(|c| c.iter().filter_map(|a| a.as_str().map(str::to_owned)).collect());
        return match command {
            Some(command) if !command.is_empty() => Ok(Ask::Exec(command)),
            _ => Err("exec.command: missing or empty".into()),
        };
    }
    Err("httpGet, tcpSocket, grpc or exec: one of them has to be there".into())
}

/// A number, or the name of one of the container's ports.
fn port(value: &Value, ports: &[Port]) -> Result<u16, String> {
    let number = match value {
        Value::Number(number) => number.as_u64().and_then(|p| u16::try_from(p).ok()),
        Value::String(text) => match text.parse::<u16>() {
            Ok(number) => Some(number),
            Err(_) => {
                let named = ports.iter().find(|p| p.protocol == Protocol::Tcp && p.name == *text);
                return named.map(|p| p.port).ok_or_else(|| {
                    format!("port: no TCP port of the container is named {text:?}; name one so in its ports")
                });
            }
        },
        _ => None,
    };
    number.filter(|p| *p > 0).ok_or_else(|| format!("port: {value} is not 1 to 65535 and no name of a port"))
}

fn address(place: &Place, host: Option<&str>, port: u16) -> Result<SocketAddr, String> {
    let ip: IpAddr = match host {
        Some(host) => host.trim_matches(['[', ']']).parse().map_err(|_| {
            format!("host {host:?} is no IP address, and a lab has no names for nodes to look up")
        })?,
        None => *place.addresses.first().ok_or("the pod has no address")?,
    };
    Ok(SocketAddr::new(ip, port))
}

fn authority(place: &Place, host: Option<&str>, port: u16) -> Result<String, String> {
    Ok(address(place, host, port)?.to_string())
}

/// Connects from the node's namespace. A socket belongs to the namespace that it was made in, so only its making has
/// to happen there.
async fn connect(place: &Place, host: Option<&str>, port: u16) -> Result<TcpStream, String> {
    let address = address(place, host, port)?;
    let node = place.on.netns.clone();
    let socket =
        tokio::task::spawn_blocking(move || socket(&node, address)).await.map_err(|e| e.to_string())??;
    TcpSocket::from_std_stream(socket.into())
        .connect(address)
        .await
        .map_err(|e| format!("connect to {address}: {e}"))
}

fn socket(node: &Path, address: SocketAddr) -> Result<Socket, String> {
    let namespace = Netns::open(node).map_err(|e| e.to_string())?;
    let make = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    namespace.run(make).map_err(|e| e.to_string())?.map_err(|e: std::io::Error| format!("socket: {e}"))
}

fn request(authority: &str, path: &str, headers: &[(String, String)]) -> String {
    let mut out = format!("GET {path} HTTP/1.1\r\n");
    let given = |name: &str| headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    for (name, value) in [("Host", authority), ("User-Agent", "kube-probe/1.36"), ("Accept", "*/*")] {
        if !given(name) {
            out.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    for (name, value) in headers {
        out.push_str(&format!("{name}: {value}\r\n"));
    }
    out.push_str("Connection: close\r\n\r\n");
    out
}

/// Sends a request and reads the status line of the answer.
async fn exchange(stream: &mut TcpStream, request: &str) -> std::io::Result<String> {
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    let mut block = [0; 512];
    while !head.contains(&b'\n') && head.len() < HEAD_LIMIT {
        match stream.read(&mut block).await? {
            0 => break,
            n => head.extend_from_slice(&block[..n]),
        }
    }
    Ok(String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned())
}

fn judge(status_line: &str) -> Result<(), String> {
    let code =
        status_line.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)?.parse::<u16>().ok());
    match code {
        Some(200..400) => Ok(()),
        Some(code) => Err(format!("HTTP status {code}")),
        None => Err("the answer is no HTTP".into()),
    }
}

async fn execute(
    place: &Place,
    env: &[(String, std::ffi::OsString)],
    command: &[String],
) -> Result<(), String> {
    let mut child = command_in(place)
        .arg("--")
        .args(command)
        .env_clear()
        .envs(env.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("start {}: {e}", command[0]))?;
    let mut said = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        // More than that is not shown; the pipe closes and the command notices.
        let _ = stdout.take(OUTPUT_READ).read_to_end(&mut said).await;
    }
    let status = child.wait().await.map_err(|e| format!("wait: {e}"))?;
    if status.success() {
        return Ok(());
    }
    let said: String = String::from_utf8_lossy(&said).trim().chars().take(OUTPUT_LIMIT).collect();
    Err(format!("{}: {status}{}{said}", command[0], if said.is_empty() { "" } else { ": " }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ports() -> Vec<Port> {
        vec![
            Port { port: 53, protocol: Protocol::Udp, name: "dns".into() },
            Port { port: 8080, protocol: Protocol::Tcp, name: "http".into() },
        ]
    }

    #[test]
    fn what_a_probe_asks_follows_from_the_manifest() {
        let connect = |port| Ask::Connect { host: None, port };
        for (probe, stand_in, want) in [
            (json!({"tcpSocket": {"port": 9}}), true, Ok(connect(9))),
            (json!({"tcpSocket": {"port": "http"}}), true, Ok(connect(8080))),
            (json!({"tcpSocket": {"port": "81"}}), true, Ok(connect(81))),
            (json!({"grpc": {"port": 9555}}), false, Ok(connect(9555))),
            (json!({"httpGet": {"port": "http", "scheme": "HTTPS", "path": "/"}}), true, Ok(connect(8080))),
            (
                json!({"httpGet": {"port": 80, "path": "health", "host": "10.0.0.1",
                                   "httpHeaders": [{"name": "X", "value": "1"}]}}),
                true,
                Ok(Ask::Http {
                    host: Some("10.0.0.1".into()),
                    port: 80,
                    path: "/health".into(),
                    headers: vec![("X".into(), "1".into())],
                }),
            ),
            (json!({"exec": {"command": ["redis-cli"]}}), true, Ok(Ask::Runs)),
            (json!({"exec": {"command": ["true"]}}), false, Ok(Ask::Exec(vec!["true".into()]))),
            (json!({"exec": {}}), false, Err("exec.command")),
            (json!({"tcpSocket": {"port": "dns"}}), true, Err("tcpSocket.port: no TCP port")),
            (json!({"httpGet": {"port": 0}}), true, Err("httpGet.port: 0 is not")),
            (json!({"httpGet": {}}), true, Err("httpGet.port")),
            (json!({"httpGet": {"port": 1, "path": "/a b"}}), true, Err("httpGet.path")),
            (
                json!({"httpGet": {"port": 1, "httpHeaders": [{"name": "X", "value": "1\r\nY: 2"}]}}),
                true,
                Err("httpGet.httpHeaders"),
            ),
            (json!({}), true, Err("one of them")),
        ] {
            match (ask(&probe, &ports(), stand_in), want) {
                (Ok(got), Ok(want)) => assert_eq!(got, want, "{probe}"),
                (Err(got), Err(want)) => assert!(got.contains(want), "{probe}: {got}"),
                (got, want) => panic!("{probe}: {got:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn numbers_have_the_defaults_of_kubernetes() {
        let probe = |value: Value| Probe::of(Kind::Liveness, &value, &ports(), true).expect("a probe");
        let plain = probe(json!({"tcpSocket": {"port": 1}}));
        let seconds = Duration::from_secs;
        assert_eq!((plain.initial_delay, plain.period, plain.timeout), (seconds(0), seconds(10), seconds(1)));
        assert_eq!((plain.success, plain.failure, plain.grace), (1, 3, None));
        let odd = probe(json!({"tcpSocket": {"port": 1}, "periodSeconds": 0, "failureThreshold": 0,
                               "timeoutSeconds": -1, "terminationGracePeriodSeconds": 5}));
        assert_eq!(
            (odd.period, odd.failure, odd.timeout, odd.grace),
            (seconds(1), 1, seconds(1), Some(seconds(5)))
        );
        assert_eq!(Probe::of(Kind::Startup, &Value::Null, &ports(), true), None);
        let named = probe(json!({"httpGet": {"port": "web"}}));
        assert!(
            matches!(&named.ask, Ask::Broken(m) if m.starts_with("livenessProbe.httpGet.port")),
            "{named:?}"
        );
    }

    #[test]
    fn thresholds_count_results_in_a_row() {
        let mut count = Count::default();
        for (good, want) in [
            (false, None),
            (false, Some(false)),
            (true, None),
            (false, None),
            (true, None),
            (true, None),
            (true, Some(true)),
            (true, Some(true)),
        ] {
            assert_eq!(count.add(good, 3, 2), want);
        }
    }

    #[test]
    fn answers_are_judged_by_their_status() {
        for (line, good) in [
            ("HTTP/1.1 200 OK", true),
            ("HTTP/1.0 302 Found", true),
            ("HTTP/1.1 404 Not Found", false),
            ("HTTP/1.1 503", false),
            ("{\"pod\":\"a\"}", false),
            ("", false),
        ] {
            assert_eq!(judge(line).is_ok(), good, "{line}");
        }
        let text = request("10.0.0.1:80", "/", &[("host".into(), "shop".into())]);
        assert!(text.contains("host: shop\r\n") && !text.contains("Host: 10.0.0.1"), "{text}");
        let ports = Probes::ports(&json!({"readinessProbe": {"grpc": {"port": 7}},
                                          "livenessProbe": {"httpGet": {"port": "http"}},
                                          "startupProbe": {"tcpSocket": {"port": 7}}}));
        assert_eq!(ports, [7]);
    }
}
