//! The network.
//!
//! `p1` and `p2` are pods on the node, `r1` and `r2` pods elsewhere, `o1` and `o2` clients outside of the cluster.
//! Every pod answers on port 8080, TCP and UDP, with its name and who asked.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use podway_link::Netns;
use podway_services::table::{Family, NodeView, Protocol};

pub const PORT: u16 = 8080;
/// Name, number in its network.
const MEMBERS: [(&str, &str, &str); 6] = [
    ("p1", "10.244.0.11", "fd00:244::b"),
    ("p2", "10.244.0.12", "fd00:244::c"),
    ("r1", "10.244.1.11", "fd00:244:1::b"),
    ("r2", "10.244.1.12", "fd00:244:1::c"),
    ("o1", "192.168.50.2", "fd00:50::2"),
    ("o2", "192.168.51.2", "fd00:51::2"),
];
const GATEWAY: (&str, &str) = ("192.168.50.1", "fd00:50::1");

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The address of a member.
pub fn address(name: &str, family: Family) -> IpAddr {
    let of = |pair: (&str, &str)| ip(if family == Family::V4 { pair.0 } else { pair.1 });
    if name == "node" {
        return of(GATEWAY);
    }
    let (_, v4, v6) = MEMBERS.iter().find(|m| m.0 == name).unwrap_or_else(|| panic!("no member {name}"));
    of((v4, v6))
}

pub struct World {
    prefix: String,
    stop: Arc<AtomicBool>,
}

/// What became of one try.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Who answered, and whom it saw.
    Served {
        by: String,
        saw: IpAddr,
    },
    Refused,
    Silence,
    Other(String),
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl World {
    /// Builds it; what a run before left behind is removed first.
    pub fn new(name: &str) -> Self {
        let prefix = format!("pwt-{name}-");
        let world = Self { prefix, stop: Arc::new(AtomicBool::new(false)) };
        world.clear();
        for member in ["node", "p1", "p2", "r1", "r2", "o1", "o2"] {
            let ns = Netns::create_named(&world.ns(member)).unwrap();
            drop(ns);
        }
        let node = world.ns("node");
        for setting in [
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv4.conf.all.rp_filter=0",
            "net.ipv4.conf.default.rp_filter=0",
            "net.ipv4.icmp_ratelimit=0",
            "net.ipv6.icmp.ratelimit=0",
        ] {
            run("ip", &["netns", "exec", &node, "sysctl", "-qw", setting]);
        }
        for (member, v4, v6) in MEMBERS {
            let ns = world.ns(member);
            let link = format!("to-{member}");
            run(
                "ip",
                &["-n", &node, "link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &ns],
            );
            let sysctl = format!("net.ipv6.conf.{link}.accept_dad=0");
            run("ip", &["netns", "exec", &node, "sysctl", "-qw", &sysctl]);
            run("ip", &["netns", "exec", &ns, "sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=0"]);
            run("ip", &["-n", &node, "link", "set", &link, "up"]);
            run("ip", &["-n", &ns, "link", "set", "eth0", "up"]);
            run("ip", &["-n", &ns, "addr", "add", &format!("{v4}/32"), "dev", "eth0"]);
            run("ip", &["-n", &ns, "addr", "add", &format!("{v6}/128"), "dev", "eth0", "nodad"]);
            let (gw4, gw6) = match member {
                "o1" => GATEWAY,
                "o2" => ("192.168.51.1", "fd00:51::1"),
                _ => ("169.254.1.1", "fd00:fe::1"),
            };
            // The same address on every link to a pod, as a gateway that is only a neighbour.
            run("ip", &["-n", &node, "addr", "add", &format!("{gw4}/32"), "dev", &link]);
            run("ip", &["-n", &node, "addr", "add", &format!("{gw6}/128"), "dev", &link, "nodad"]);
            run("ip", &["-n", &node, "route", "add", &format!("{v4}/32"), "dev", &link]);
            run("ip", &["-n", &node, "-6", "route", "add", &format!("{v6}/128"), "dev", &link]);
            run("ip", &["-n", &ns, "route", "add", &format!("{gw4}/32"), "dev", "eth0"]);
            run("ip", &["-n", &ns, "route", "add", "default", "via", gw4, "src", v4]);
            run("ip", &["-n", &ns, "-6", "route", "add", &format!("{gw6}/128"), "dev", "eth0"]);
            run("ip", &["-n", &ns, "-6", "route", "add", "default", "via", gw6, "src", v6]);
        }
        // The way out: what is for nobody goes there.
        run(
            "ip",
            &[
                "-n",
                &node,
                "route",
                "add",
                "default",
                "via",
                "192.168.50.2",
                "dev",
                "to-o1",
                "src",
                GATEWAY.0,
            ],
        );
        run(
            "ip",
            &[
                "-n",
                &node,
                "-6",
                "route",
                "add",
                "default",
                "via",
                "fd00:50::2",
                "dev",
                "to-o1",
                "src",
                GATEWAY.1,
            ],
        );
        for pod in ["p1", "p2", "r1", "r2"] {
            world.serve(pod, PORT);
        }
        world
    }

    pub fn ns(&self, member: &str) -> String {
        format!("{}{member}", self.prefix)
    }

    pub fn enter<R: Send>(&self, member: &str, f: impl FnOnce() -> R + Send) -> R {
        Netns::open_named(&self.ns(member)).unwrap().run(f).unwrap()
    }

    /// The view that the writers get.
    pub fn view(&self) -> NodeView {
        NodeView {
            name: "node".into(),
            zone: None,
            addresses: [GATEWAY.0, GATEWAY.1, "192.168.51.1", "fd00:51::1"].map(ip).into(),
            node_port_addresses: [GATEWAY.0, GATEWAY.1].map(ip).into(),
            pod_cidrs: ["10.244.0.0/16", "fd00:244::/32"].map(|n| n.parse().unwrap()).into(),
            service_cidrs: ["10.96.0.0/16", "fd00:96::/112"].map(|n| n.parse().unwrap()).into(),
            masquerade_all: false,
            ..NodeView::default()
        }
    }

    /// Starts a member's servers on a port.
    pub fn serve(&self, member: &str, port: u16) {
        let (tcp, udp): (Vec<TcpListener>, Vec<UdpSocket>) = self.enter(member, || {
            let any: [IpAddr; 2] = [address(member, Family::V4), address(member, Family::V6)];
            (
                any.iter().map(|a| TcpListener::bind((*a, port)).unwrap()).collect(),
                any.iter().map(|a| UdpSocket::bind((*a, port)).unwrap()).collect(),
            )
        });
        for listener in tcp {
            let (name, stop) = (member.to_owned(), Arc::clone(&self.stop));
            // accept() waits that long, too; hundreds of threads that looked every moment would take the machine.
            socket2::SockRef::from(&listener).set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((mut stream, peer)) => {
                            let _ = write!(stream, "{name} {}", peer.ip().to_canonical());
                        }
                        Err(_) => thread::sleep(Duration::from_millis(1)),
                    }
                }
            });
        }
        for socket in udp {
            let (name, stop) = (member.to_owned(), Arc::clone(&self.stop));
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            thread::spawn(move || {
                let mut buffer = [0; 512];
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                        let _ =
                            socket.send_to(format!("{name} {}", peer.ip().to_canonical()).as_bytes(), peer);
                    }
                }
            });
        }
    }

    /// Tries a number of times, each from a new socket.
    pub fn tries(&self, from: &str, protocol: Protocol, to: SocketAddr, count: usize) -> Vec<Outcome> {
        self.enter(from, || (0..count).map(|_| attempt(protocol, to)).collect())
    }

    fn clear(&self) {
        for name in Netns::list_named(&self.prefix).unwrap_or_default() {
            let _ = Netns::delete_named(&name);
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.clear();
    }
}

/// How long silence is waited for.
const PATIENCE: Duration = Duration::from_millis(400);

fn attempt(protocol: Protocol, to: SocketAddr) -> Outcome {
    let start = Instant::now();
    let answer = match protocol {
        Protocol::Tcp => TcpStream::connect_timeout(&to, PATIENCE).and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        }),
        Protocol::Udp => {
            let any: IpAddr = if to.is_ipv4() { ip("0.0.0.0") } else { ip("::") };
            UdpSocket::bind((any, 0)).and_then(|socket| exchange(&socket, to))
        }
        Protocol::Sctp => panic!("no SCTP sockets here"),
    };
    outcome(answer, start)
}

fn exchange(socket: &UdpSocket, to: SocketAddr) -> io::Result<String> {
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"?")?;
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// One datagram on a socket that stays: a flow that goes on.
pub fn ask(socket: &UdpSocket, to: SocketAddr) -> Outcome {
    let start = Instant::now();
    let answer = (|| {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(b"?", to)?;
        let mut buffer = [0; 512];
        let (length, _) = socket.recv_from(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    })();
    outcome(answer, start)
}

fn outcome(answer: io::Result<String>, start: Instant) -> Outcome {
    match answer {
        Ok(text) => match text.split_once(' ') {
            Some((by, saw)) => Outcome::Served { by: by.into(), saw: ip(saw) },
            None => Outcome::Other(format!("answer {text:?}")),
        },
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            // "At once" is part of it.
            if start.elapsed() < PATIENCE / 2 {
                Outcome::Refused
            } else {
                Outcome::Other("refused late".into())
            }
        }
        // What netfilter says to a process of the node itself whose datagram it rejects.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Outcome::Refused,
        Err(e) if matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => Outcome::Silence,
        Err(e) => Outcome::Other(e.to_string()),
    }
}
