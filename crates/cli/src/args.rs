//! The command line, as clap parses it. The doc comments are what `--help` prints.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use podway_agent::logging::LogFormat;
use podway_agent::{Instance, ListenAddress, config};
use podway_lab::delay::DELAY_MAX_MICROS;
use podway_lab::faults;
use podway_lab::roll::Workload;
use podway_lab::spec::{self, LabName, LabSpec};

use crate::bench::Bench;
use crate::flows::Flows;
use crate::policy::Policy;

/// Kubernetes networking in one binary
#[derive(Debug, Parser)]
#[command(name = "podway", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Whole clusters in network namespaces on this machine, made from unchanged manifests
    #[command(subcommand)]
    Lab(Lab),
    /// Run the agent of a node, in the node's network namespace
    Agent(Agent),
    /// Remove every trace of an agent from this node: links, routes, rules, programs, files
    ///
    /// With --of kube-proxy: what kube-proxy left in this network namespace instead, in any of its modes: chains named
    /// KUBE-* and the rules that lead to them, nftables tables, IPVS virtual servers and their device. Nothing else is
    /// touched. Exits with 1 when something is still there.
    Cleanup(Cleanup),
    /// Show Services as a node serves them: where they answer, by whom, and why each endpoint is used or not
    Services(Services),
    /// Show what moves and what is dropped: flows that begin and end, and drops with their reason
    Flows(Flows),
    /// Work out what network policies come to, and why
    #[command(subcommand)]
    Policy(Policy),
    /// List the connections that the datapath tracks
    Conntrack(Conntrack),
    /// Measure Podway beside what it competes with, on this machine
    #[command(subcommand)]
    Bench(Bench),
    /// Parts that other commands start
    #[command(subcommand, hide = true)]
    Internal(Internal),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Lab {
    /// Make a lab from manifests and wait until its pods are ready
    ///
    /// Manifests are files or folders of YAML or JSON, unchanged. Every pod becomes a network namespace; in place of
    /// each container runs a stand-in that listens on the container's ports and answers with who and where it is. The
    /// annotation lab.podway.dev/command.CONTAINER on a pod names a command of this machine to run instead.
    ///
    /// Giving the same command again updates the objects of the running lab.
    Up(Up),
    /// Create the objects of manifests in a running lab, or make them what the manifests say now
    ///
    /// Takes effect at once and does not wait for pods: podway lab status shows how far they are. Exits with 1 when
    /// an object was left out.
    Apply(Manifests),
    /// Delete the objects of manifests from a running lab
    ///
    /// Objects that are not there are no mistake. Pods end in their own time (terminationGracePeriodSeconds).
    Delete(Manifests),
    /// Show nodes, pods and what is not ready
    Status(Show),
    /// List the labs of this machine
    List(Format),
    /// Show what happened, oldest first
    Events(Events),
    /// Show the log of a node's agent, of a pod's container, or of the lab itself
    Logs(Logs),
    /// Run a command inside a pod
    Exec(Exec),
    /// Open a shell on a node or in a pod
    Shell(Shell),
    /// Replace the pods of a workload one after the other, as kubectl rollout restart does, and wait for the new ones
    ///
    /// Each pod has its termination grace: a stand-in goes on answering for a moment after SIGTERM and finishes what
    /// is open.
    Roll(Roll),
    /// Switch the readiness of a pod off, and on again
    ///
    /// A pod that is off is not ready and leaves its services' endpoints; it runs on and answers those who ask it
    /// directly. On means: as ready as its containers and probes say.
    Ready(Ready),
    /// Work on a node
    #[command(subcommand)]
    Node(Node),
    /// Break the link between two nodes, in both directions, slow it down, or mend it
    ///
    /// The options of the newest command are all that is wrong between the two. Nobody is told of a lost packet, as on
    /// a broken link; podway lab status shows what is broken.
    Link(Link),
    /// Work as a client from beyond the cluster
    ///
    /// It is on a network of its own behind a router, and has a route to the nodes' addresses, but to no pod and to
    /// no service.
    #[command(subcommand)]
    Outside(Outside),
    /// Print the lab's kubeconfig, or its path: sudo kubectl --kubeconfig "$(sudo podway lab kubeconfig --path)" get pods
    Kubeconfig(Kubeconfig),
    /// Check that every pod and node reaches every other, by ICMP and TCP, with its own source address
    ///
    /// And every Service with a ready endpoint: its cluster IPs from every pod, its node ports and load balancers from
    /// beyond the cluster (TCP).
    ///
    /// Exits with 1 when a path is not as it should be.
    Check(Show),
    /// Remove a lab with everything in it; works after any crash
    Down(Down),
}

#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Name of the lab; not needed when there is only one
    #[arg(long, env = "PODWAY_LAB")]
    pub(crate) name: Option<LabName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people
    Text,
    /// For programs
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct Format {
    /// How to print
    #[arg(short, long, value_enum, default_value = "text")]
    pub(crate) output: OutputFormat,
}

#[derive(Debug, Args)]
pub(crate) struct Manifests {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Manifest files and folders
    #[arg(short, long = "filename", required = true, num_args = 1.., value_name = "FILE|DIR")]
    pub(crate) filenames: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Mode {
    /// In VXLAN, over any network between the nodes
    Vxlan,
    /// Routed by node address, for nodes on one link
    Direct,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Family {
    Ipv4,
    Ipv6,
    /// IPv4 and IPv6
    Dual,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum UnderlayFamily {
    Ipv4,
    Ipv6,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ServiceMode {
    /// Programs and tables of eBPF: at the socket where there is one, else packet by packet
    Ebpf,
    /// Rules and maps of nftables
    Nftables,
    /// Rules of iptables (iptables-restore, of whichever kind is in use)
    Iptables,
    /// Virtual servers of IPVS
    Ipvs,
    /// Not by Podway
    None,
}

impl ServiceMode {
    pub(crate) fn of_agent(self) -> podway_agent::services::config::ServiceMode {
        use podway_agent::services::config::ServiceMode as Of;
        match self {
            Self::Ebpf => Of::Ebpf,
            Self::Nftables => Of::Nftables,
            Self::Iptables => Of::Iptables,
            Self::Ipvs => Of::Ipvs,
            Self::None => Of::None,
        }
    }

    fn of_lab(self) -> spec::ServiceMode {
        match self {
            Self::Ebpf => spec::ServiceMode::Ebpf,
            Self::Nftables => spec::ServiceMode::Nftables,
            Self::Iptables => spec::ServiceMode::Iptables,
            Self::Ipvs => spec::ServiceMode::Ipvs,
            Self::None => spec::ServiceMode::None,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct WhichInstance {
    /// Which agent of this machine: node, or LAB/NODE
    #[arg(long, env = "PODWAY_INSTANCE", default_value = Instance::DEFAULT, value_parser = Instance::parse)]
    pub(crate) instance: Instance,
}

#[derive(Debug, Args)]
pub(crate) struct Agent {
    /// Name of this node's Node object
    #[arg(long, env = "NODE_NAME")]
    pub(crate) node_name: String,
    /// How to reach the API server [default: the service account of the pod that this runs in]
    #[arg(long)]
    pub(crate) kubeconfig: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) instance: WhichInstance,
    /// How packets travel to other nodes
    #[arg(long, value_enum, default_value = "vxlan")]
    pub(crate) mode: Mode,
    /// Address family between the nodes [default: that of the Node's first InternalIP]
    #[arg(long, value_enum)]
    pub(crate) underlay_family: Option<UnderlayFamily>,
    /// UDP port of VXLAN
    #[arg(long, default_value_t = config::DEFAULT_VXLAN_PORT)]
    pub(crate) vxlan_port: u16,
    /// VXLAN network identifier
    #[arg(long, default_value_t = config::DEFAULT_VNI)]
    pub(crate) vxlan_vni: u32,
    /// MTU of pods in bytes, instead of the one that fits the underlay
    #[arg(long)]
    pub(crate) pod_mtu: Option<u32>,
    /// Give what leaves the cluster the node's address
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub(crate) masquerade: bool,
    /// Destination that sees the pods' own addresses; may be given several times
    #[arg(long, value_name = "CIDR", value_parser = cidr)]
    pub(crate) masquerade_exclude: Vec<IpNet>,
    /// Where to serve /metrics, /healthz and /readyz
    #[arg(long, default_value_t = ListenAddress { ip: None, port: config::DEFAULT_METRICS_PORT })]
    pub(crate) metrics_address: ListenAddress,
    /// Serve no metrics and no health
    #[arg(long, conflicts_with = "metrics_address")]
    pub(crate) no_metrics: bool,
    /// UDP port of the path MTU proof, the same on all nodes
    #[arg(long, default_value_t = podway_link::probe::DEFAULT_PORT)]
    pub(crate) probe_port: u16,
    /// By what mechanism Services are served
    ///
    /// What another mode has left on this node is removed once the new one is in force.
    #[arg(long, value_enum, default_value = "ebpf")]
    pub(crate) service_mode: ServiceMode,
    /// Range of cluster IPs; may be given several times
    ///
    /// Addresses in there that no Service has go nowhere, instead of to wherever the node's routes lead.
    #[arg(long, value_name = "CIDR", value_parser = cidr)]
    pub(crate) service_cidr: Vec<IpNet>,
    /// Serve node ports at the node's addresses in this range only; may be given several times [default: all but
    /// loopback and link-local ones]
    #[arg(long, value_name = "CIDR", value_parser = cidr)]
    pub(crate) node_port_addresses: Vec<IpNet>,
    /// Give what goes to cluster IPs the node's address, also when a pod sends it; not with ebpf
    #[arg(long)]
    pub(crate) masquerade_all: bool,
    /// How IPVS chooses among endpoints: rr, lc, sh, mh and others of the kernel's schedulers [default: rr]
    #[arg(long, value_name = "NAME")]
    pub(crate) ipvs_scheduler: Option<podway_agent::services::config::Scheduler>,
    /// Root of the processes whose sockets are translated, a folder of the unified control group hierarchy [default:
    /// where that is mounted]
    #[arg(long, value_name = "DIR")]
    pub(crate) cgroup: Option<PathBuf>,
    /// Addresses for Services of type LoadBalancer, besides those of LoadBalancerPool objects; the same on all nodes;
    /// may be given several times
    #[arg(long, value_name = "CIDR", value_parser = cidr)]
    pub(crate) load_balancer_pool: Vec<IpNet>,
    /// Tell flows that begin and end, and drops (podway flows)
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub(crate) flows: bool,
    /// Most events of flows that are remembered
    #[arg(long, value_name = "N", default_value_t = podway_agent::flows::FlowsConfig::default().history)]
    pub(crate) flow_history: usize,
    /// How log lines look: text or json
    #[arg(long, default_value = "json")]
    pub(crate) log_format: LogFormat,
}

#[derive(Debug, Args)]
pub(crate) struct Cleanup {
    #[command(flatten)]
    pub(crate) instance: WhichInstance,
    /// Whose traces to remove, if not an agent's
    #[arg(long, value_enum, value_name = "WHOSE")]
    pub(crate) of: Option<Whose>,
    /// Show what would be removed, and remove nothing
    #[arg(long, requires = "of")]
    pub(crate) dry_run: bool,
    /// Even while the agent (or kube-proxy) runs
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Whose {
    /// What kube-proxy left
    KubeProxy,
}

#[derive(Debug, Args)]
pub(crate) struct Services {
    /// NAMESPACE/NAME of one Service, to see everything about it
    #[arg(value_name = "NAMESPACE/NAME", value_parser = service_name)]
    pub(crate) service: Option<(String, String)>,
    /// Which agent of this machine: node, or LAB/NODE [default: a node of the lab when one is named or is the only
    /// one, else node]
    #[arg(long, env = "PODWAY_INSTANCE", value_parser = Instance::parse, conflicts_with_all = ["lab", "node"])]
    pub(crate) instance: Option<Instance>,
    /// Name of a lab on this machine
    #[arg(long, env = "PODWAY_LAB")]
    pub(crate) lab: Option<LabName>,
    /// Node of the lab [default: its first]
    #[arg(long)]
    pub(crate) node: Option<String>,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Conntrack {
    #[command(flatten)]
    pub(crate) instance: WhichInstance,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Manifest files and folders
    #[arg(required = true, value_name = "FILE|DIR")]
    pub(crate) manifests: Vec<PathBuf>,
    /// Name of the lab
    #[arg(long, env = "PODWAY_LAB", default_value = "lab")]
    pub(crate) name: LabName,
    /// Number of nodes
    #[arg(long, default_value_t = 3)]
    pub(crate) nodes: u16,
    /// Number of zones that the nodes are dealt out to [default: 2, or 1 with a single node]
    #[arg(long)]
    pub(crate) zones: Option<u16>,
    /// How packets travel between nodes
    #[arg(long, value_enum, default_value = "vxlan")]
    pub(crate) mode: Mode,
    /// Address families of pods and services
    #[arg(long, value_enum, default_value = "ipv4")]
    pub(crate) family: Family,
    /// Address family between the nodes [default: that of the pods; ipv4 for dual]
    #[arg(long, value_enum)]
    pub(crate) underlay_family: Option<UnderlayFamily>,
    /// MTU between the nodes in bytes
    #[arg(long, default_value_t = 1500)]
    pub(crate) underlay_mtu: u32,
    /// MTU of pods to force on the agents instead of the one that fits
    #[arg(long)]
    pub(crate) pod_mtu: Option<u32>,
    /// UDP port of VXLAN
    #[arg(long, default_value_t = 8472)]
    pub(crate) vxlan_port: u16,
    /// VXLAN network identifier
    #[arg(long, default_value_t = 1)]
    pub(crate) vxlan_vni: u32,
    /// By what mechanism Services are served
    #[arg(long, value_enum, default_value = "ebpf")]
    pub(crate) service_mode: ServiceMode,
    /// Give what goes to cluster IPs the node's address, also when a pod sends it; not with ebpf
    #[arg(long)]
    pub(crate) masquerade_all: bool,
    /// How IPVS chooses among endpoints: rr, lc, sh, mh and others of the kernel's schedulers [default: rr]
    #[arg(long, value_name = "NAME")]
    pub(crate) ipvs_scheduler: Option<podway_agent::services::config::Scheduler>,
    /// Addresses for Services of type LoadBalancer, on the network of the nodes; may be given several times [default:
    /// 172.18.200.0/24 and fd00:172:18::200:0/112, as far as pods have the family]
    #[arg(long, value_name = "CIDR", value_parser = cidr)]
    pub(crate) load_balancer_pool: Vec<IpNet>,
    /// Return once the objects are loaded, without waiting for pods
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Longest wait for pods, such as 90, 90s or 3m
    #[arg(long, default_value = "2m", value_parser = duration, conflicts_with = "no_wait")]
    pub(crate) timeout: Duration,
}

impl Up {
    pub(crate) fn spec(&self) -> LabSpec {
        LabSpec {
            name: self.name.clone(),
            nodes: self.nodes,
            zones: self.zones.unwrap_or_else(|| self.nodes.clamp(1, 2)),
            mode: match self.mode {
                Mode::Vxlan => spec::Mode::Vxlan,
                Mode::Direct => spec::Mode::Direct,
            },
            family: match self.family {
                Family::Ipv4 => spec::Family::Ipv4,
                Family::Ipv6 => spec::Family::Ipv6,
                Family::Dual => spec::Family::Dual,
            },
            underlay_family: match (self.underlay_family, self.family) {
                (Some(UnderlayFamily::Ipv6), _) | (None, Family::Ipv6) => spec::UnderlayFamily::Ipv6,
                (Some(UnderlayFamily::Ipv4), _) | (None, _) => spec::UnderlayFamily::Ipv4,
            },
            underlay_mtu: self.underlay_mtu,
            pod_mtu: self.pod_mtu,
            vxlan_port: self.vxlan_port,
            vxlan_vni: self.vxlan_vni,
            service_mode: self.service_mode.of_lab(),
            masquerade_all: self.masquerade_all,
            ipvs_scheduler: self.ipvs_scheduler.as_ref().map(|s| s.name().to_owned()),
            load_balancer_pool: self.load_balancer_pool.clone(),
        }
    }
}

fn service_name(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err(format!("{text:?} is not NAMESPACE/NAME, such as default/kubernetes")),
    }
}

/// `ADDRESS/LENGTH`, with an error that says which of the two is wrong.
fn cidr(text: &str) -> Result<IpNet, String> {
    let (address, length) = text.split_once('/').unwrap_or((text, ""));
    let Ok(address) = address.parse::<IpAddr>() else {
        return Err(format!("{address:?} is no IP address; write ADDRESS/LENGTH such as 192.0.2.0/24"));
    };
    let longest = if address.is_ipv4() { 32 } else { 128 };
    match length.parse() {
        Ok(length) if length <= longest => IpNet::new(address, length).map_err(|e| e.to_string()),
        _ if length.is_empty() => {
            Err(format!("the prefix length is missing; {text}/{longest} is this address alone"))
        }
        _ => Err(format!("prefix length {length:?} is not 0 to {longest}")),
    }
}

/// A number of seconds, or with `s`, `m` or `h` behind it.
fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no time such as 90, 90s or 3m");
    let (number, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(number) if text.ends_with('m') => (number, 60),
        Some(number) if text.ends_with('h') => (number, 3600),
        Some(number) => (number, 1),
        None => (text, 1),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    number.checked_mul(unit).filter(|s| *s <= 86_400).map(Duration::from_secs).ok_or_else(bad)
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    #[command(flatten)]
    pub(crate) which: Which,
    /// The pod; without a namespace that of default
    #[arg(value_name = "[NAMESPACE/]POD")]
    pub(crate) pod: String,
    /// The container whose environment the command gets [default: the first]
    #[arg(short, long)]
    pub(crate) container: Option<String>,
    /// The command of this machine to run there
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Only about objects of this namespace
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
    /// Only about this object, such as pod/web-0 or node/node-1
    #[arg(long = "for", value_name = "KIND/NAME", value_parser = kind_and_name)]
    pub(crate) about: Option<(String, String)>,
    /// Only warnings
    #[arg(long)]
    pub(crate) warnings: bool,
    /// Go on with what happens from now on, until interrupted
    #[arg(short, long, conflicts_with = "output")]
    pub(crate) follow: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// `KIND/NAME`.
fn kind_and_name(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((kind, name)) if !kind.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((kind.to_owned(), name.to_owned()))
        }
        _ => Err(format!("{text:?} is not KIND/NAME, such as pod/web-0")),
    }
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    #[command(flatten)]
    pub(crate) which: Which,
    /// A node such as node-1, or a pod; without it the lab's own log
    #[arg(value_name = "NODE|[NAMESPACE/]POD")]
    pub(crate) target: Option<String>,
    /// The container of the pod [default: the first]
    #[arg(short, long)]
    pub(crate) container: Option<String>,
    /// Only this many lines from the end
    #[arg(long, value_name = "LINES")]
    pub(crate) tail: Option<usize>,
    /// Go on with what is written from now on, until interrupted
    #[arg(short, long)]
    pub(crate) follow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Shell {
    #[command(flatten)]
    pub(crate) which: Which,
    /// A node such as node-1, or a pod; without a namespace that of default
    #[arg(value_name = "NODE|[NAMESPACE/]POD")]
    pub(crate) target: String,
    /// The container whose environment the shell gets [default: the first]
    #[arg(short, long)]
    pub(crate) container: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Roll {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Deployment, StatefulSet or DaemonSet, such as deploy/web
    #[arg(value_name = "KIND/NAME")]
    pub(crate) workload: Workload,
    /// Namespace of the workload
    #[arg(short, long, default_value = "default")]
    pub(crate) namespace: String,
    /// Return once the roll has begun
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Longest wait for the roll's end, such as 90, 90s or 3m
    #[arg(long, default_value = "2m", value_parser = duration, conflicts_with = "no_wait")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct Ready {
    #[command(flatten)]
    pub(crate) which: Which,
    /// The pod; without a namespace that of default
    #[arg(value_name = "[NAMESPACE/]POD")]
    pub(crate) pod: String,
    #[arg(value_enum)]
    pub(crate) state: Switch,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Node {
    /// Run a command in a node's network namespace
    Exec(NodeExec),
    /// Add a node and wait until it is ready
    Add(NodeAdd),
    /// Remove a node: its pods end in their own time, then everything of it goes
    Remove(NodeName),
    /// Take the power from a node: its agent and its pods are killed, its link goes down
    ///
    /// The Node object stays and is not ready. Pods that are bound to it stay bound and are not ready; nobody else
    /// takes their place, as in the first five minutes of such a failure in a real cluster.
    Stop(NodeName),
    /// Give a stopped node its power back: its agent comes up and adopts its pods, whose containers start again
    Start(NodeName),
}

#[derive(Debug, Args)]
pub(crate) struct NodeAdd {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Zone of the node [default: the next one in turn]
    #[arg(long)]
    pub(crate) zone: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct NodeName {
    #[command(flatten)]
    pub(crate) which: Which,
    /// The node, such as node-1
    pub(crate) node: String,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("fault").required(true).multiple(true))]
pub(crate) struct Link {
    #[command(flatten)]
    pub(crate) which: Which,
    /// The nodes, such as node-1 node-2
    #[arg(value_name = "NODE", num_args = 2, required = true)]
    pub(crate) nodes: Vec<String>,
    /// Let nothing pass
    #[arg(long, group = "fault", conflicts_with_all = ["up", "mtu", "loss", "delay"])]
    pub(crate) down: bool,
    /// Let everything pass again
    #[arg(long, group = "fault", conflicts_with_all = ["mtu", "loss", "delay"])]
    pub(crate) up: bool,
    /// Lose IP packets that are larger than this, in bytes
    #[arg(long, group = "fault", value_name = "BYTES", value_parser = clap::value_parser!(u32).range(68..=65_535))]
    pub(crate) mtu: Option<u32>,
    /// Lose this share of packets, in percent, such as 5 or 0.1
    #[arg(long, group = "fault", value_name = "PERCENT", value_parser = faults::percentage)]
    pub(crate) loss: Option<u32>,
    /// Let packets arrive later by this many milliseconds in each direction, such as 50 or 0.5; 0 is no delay
    #[arg(long, group = "fault", value_name = "MS", value_parser = faults::milliseconds)]
    pub(crate) delay: Option<u32>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Outside {
    /// Run a command there
    Exec(OutsideExec),
}

#[derive(Debug, Args)]
pub(crate) struct OutsideExec {
    #[command(flatten)]
    pub(crate) which: Which,
    /// The command of this machine to run there
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct NodeExec {
    #[command(flatten)]
    pub(crate) which: Which,
    /// The node, such as node-1
    pub(crate) node: String,
    /// The command of this machine to run there
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Kubeconfig {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Print where the file is instead of what is in it
    #[arg(long)]
    pub(crate) path: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Down {
    /// Name of the lab; not needed when there is only one
    #[arg(value_name = "LAB", conflicts_with_all = ["all", "name"])]
    pub(crate) lab: Option<LabName>,
    /// The same, as other commands have it [env: PODWAY_LAB=]
    #[arg(long, conflicts_with = "all")]
    pub(crate) name: Option<LabName>,
    /// Remove all labs of this machine
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Internal {
    /// Run a lab
    Supervise {
        /// Its name
        lab: LabName,
    },
    /// Stand in for a container
    StandIn {
        /// File that says for whom
        config: PathBuf,
    },
    /// Delay the packets between two nodes of a lab
    Delay {
        /// The lab
        lab: LabName,
        /// One node
        a: String,
        /// The other
        b: String,
        /// How long in each direction, in microseconds
        #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(DELAY_MAX_MICROS)))]
        micros: u32,
    },
    /// Become a program inside a pod or node
    PodExec(PodExec),
}

#[derive(Debug, Args)]
pub(crate) struct PodExec {
    /// Control group to join
    #[arg(long)]
    pub(crate) cgroup: Option<PathBuf>,
    /// Network namespace to enter
    #[arg(long)]
    pub(crate) netns: Option<PathBuf>,
    /// Host name
    #[arg(long)]
    pub(crate) hostname: Option<String>,
    /// File to see as /etc/hosts
    #[arg(long)]
    pub(crate) hosts: Option<PathBuf>,
    /// File to see as /etc/resolv.conf
    #[arg(long)]
    pub(crate) resolv_conf: Option<PathBuf>,
    /// See the /sys of the network namespace
    #[arg(long)]
    pub(crate) own_sysfs: bool,
    /// What the program is told to be called
    #[arg(long)]
    pub(crate) arg0: Option<OsString>,
    /// The program
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<OsString>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn objects_are_named_by_kind_and_name() {
        for (text, good) in
            [("pod/a", true), ("pod", false), ("/a", false), ("pod/", false), ("a/b/c", false)]
        {
            assert_eq!(kind_and_name(text).is_ok(), good, "{text}");
        }
    }

    #[test]
    fn prefixes_say_what_is_wrong() {
        for (text, part) in [
            ("192.0.2.0/24", ""),
            ("2001:db8::/32", ""),
            ("1.2.3.4/99", "prefix length \"99\" is not 0 to 32"),
            ("::1/129", "not 0 to 128"),
            ("1.2.3.4/-1", "prefix length"),
            ("1.2.3.4", "1.2.3.4/32 is this address alone"),
            ("1.2.3/8", "\"1.2.3\" is no IP address"),
        ] {
            let error = cidr(text).err();
            assert_eq!(error.is_none(), part.is_empty(), "{text}: {error:?}");
            assert!(error.unwrap_or_default().contains(part), "{text}");
        }
    }

    #[test]
    fn times_and_defaults() {
        for (text, seconds) in [
            ("90", Some(90)),
            ("90s", Some(90)),
            ("3m", Some(180)),
            ("1h", Some(3600)),
            ("", None),
            ("m", None),
            ("-1", None),
            ("1d", None),
            ("999h", None),
        ] {
            assert_eq!(duration(text).ok(), seconds.map(Duration::from_secs), "{text}");
        }
        for (line, family, underlay, zones) in [
            ("podway lab up x", spec::Family::Ipv4, spec::UnderlayFamily::Ipv4, 2),
            ("podway lab up x --family ipv6 --nodes 1", spec::Family::Ipv6, spec::UnderlayFamily::Ipv6, 1),
            ("podway lab up x --family dual --zones 3", spec::Family::Dual, spec::UnderlayFamily::Ipv4, 3),
            ("podway lab up x --underlay-family ipv6", spec::Family::Ipv4, spec::UnderlayFamily::Ipv6, 2),
        ] {
            let Command::Lab(Lab::Up(up)) = Cli::try_parse_from(line.split(' ')).expect(line).command else {
                panic!("{line}")
            };
            let spec = up.spec();
            assert_eq!((spec.family, spec.underlay_family, spec.zones), (family, underlay, zones), "{line}");
            assert_eq!(spec.validate(), Ok(()), "{line}");
        }
        for line in [
            "podway lab up",
            "podway lab up x --name a-b",
            "podway lab exec p ls",
            "podway lab down a --all",
            "podway lab link a b",
            "podway lab link a --down",
            "podway lab link a b --up --loss 5",
            "podway lab link a b --mtu 10",
            "podway lab link a b --down --delay 5",
            "podway lab link a b --up --delay 5",
            "podway lab link a b --delay 10001",
            "podway lab link a b --delay=-1",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
