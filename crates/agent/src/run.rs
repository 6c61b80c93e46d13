//! An agent from start to end: composes the rooms, owns their threads.
//!
//! Threads: the control loop, 8 for CNI and one that takes its connections, one that deletes links, one that
//! watches links, two for the path MTU proof, one that sweeps the connection table; and a tokio runtime with
//! two for the API server, metrics and signals. All of them in the network namespace of the caller.
//!
//! The end (SIGTERM, SIGINT) finishes CNI operations that have begun and touches nothing in the kernel: pods go
//! on, and the next agent takes over.

use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use podway_bpf_host::Datapath;
use podway_cni::Protocol;
use podway_kube::events::EventWriter;
use podway_kube::{Client, Kind, watch};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{debug, info, warn};

use crate::attach::{AttachError, Attacher};
use crate::cni_server::CniServer;
use crate::config::{AgentConfig, ConfigError, NetworkMode};
use crate::control::{Control, Message, Parts, QUEUE};
use crate::events::{AttachEvents, Reporter};
use crate::flows::{self, Directory, Flows};
use crate::host_ports::Reserved;
use crate::http::{self, Pages};
use crate::leases::Leases;
use crate::metrics::{Metrics, Sources};
use crate::monitor::{self, Interest};
use crate::mtu_proof::MtuProof;
use crate::network::NetworkError;
use crate::run_dir::{self, RunDirError};
use crate::services::config::ServiceMode;
use crate::services::{self, NodesIn, Services, Surroundings};
use crate::status::Status;
use crate::{clock, crash};

/// How often flows that are over are removed from the connection table.
const SWEEP: Duration = Duration::from_secs(10);
/// Most flows whose end one sweep tells; a table that is emptied at once has more than anybody reads.
const ENDS: usize = 16_384;
/// How often the API server's name is looked up.
const LOCATE_AGAIN: Duration = Duration::from_secs(300);
/// And when that failed.
const LOCATE_SOON: Duration = Duration::from_secs(10);
/// How long the end waits for links that are being deleted. The rest is found by the next agent.
const DRAIN: Duration = Duration::from_secs(3);

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A setting cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The run directory cannot be had.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The API server's address or credentials cannot be read.
    #[error(transparent)]
    Api(#[from] podway_kube::Error),
    /// The kernel's programs and tables.
    #[error(transparent)]
    Datapath(#[from] podway_bpf_host::Error),
    /// What is attached cannot be read.
    #[error("taking over what is attached: {0}")]
    Adopt(#[from] AttachError),
    /// The node's network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Damage that only a new start puts right.
    #[error("{0}; start the agent anew")]
    Damaged(String),
    /// Threads, sockets, signals.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> AgentError {
    move |source| AgentError::Io { what, source }
}

/// Runs an agent until SIGTERM or SIGINT.
///
/// # Errors
/// It cannot start. Once it runs, only the signal ends it, and [`AgentError::Damaged`]: all other problems are told by
/// log, events, metrics and `/readyz`, and tried again.
pub fn run(config: AgentConfig) -> Result<(), AgentError> {
    config.validate()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(4)
        .thread_stack_size(512 << 10)
        .thread_name("podway-io")
        .enable_all()
        .build()
        .map_err(failed("starting the runtime"))?;
    // Before anything of the kernel is touched: these are the mistakes that people make.
    let client = runtime.block_on(Client::new(&config.credentials))?;
    let run_dir = config.instance.run_dir();
    let _lock = run_dir::take(&run_dir)?;
    info!(node = config.node_name, instance = %config.instance, api = client.server(), "agent starts");
    if let Ok(step) = std::env::var(crash::VARIABLE) {
        warn!(step, "this agent dies on order ({})", crash::VARIABLE);
    }

    let metrics_address = config.metrics_address;
    let (end, mut ended) = tokio::sync::mpsc::channel(1);
    let running = Running::start(config, &runtime, &client, end)?;
    let server = CniServer::start(&run_dir.join(run_dir::SOCKET), &running.attacher, &running.metrics)
        .map_err(failed("listening on the CNI socket"))?;
    if let Some(address) = metrics_address {
        let pages = Pages {
            metrics: Arc::clone(&running.metrics),
            status: Arc::clone(&running.status),
            attacher: Arc::clone(&running.attacher),
        };
        runtime.spawn(http::serve(address, pages));
    }

    let damage = runtime.block_on(until_end(&mut ended)).map_err(failed("waiting for signals"))?;
    info!("agent ends; the pods go on");
    server.stop();
    running.stop(&runtime);
    runtime.shutdown_timeout(Duration::from_secs(1));
    damage.map_or(Ok(()), |why| Err(AgentError::Damaged(why)))
}

/// A signal, or a reason to end with a failure.
async fn until_end(ended: &mut tokio::sync::mpsc::Receiver<String>) -> io::Result<Option<String>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        Some(why) = ended.recv() => return Ok(Some(why)),
    }
    Ok(None)
}

/// Everything that runs but the servers.
struct Running {
    attacher: Arc<Attacher>,
    metrics: Arc<Metrics>,
    status: Arc<Status>,
    stopping: Arc<AtomicBool>,
    wake: SyncSender<Message>,
    threads: Vec<JoinHandle<()>>,
    services: Option<Services>,
}

impl Running {
    fn start(
        config: AgentConfig,
        runtime: &tokio::runtime::Runtime,
        client: &Client,
        end: tokio::sync::mpsc::Sender<String>,
    ) -> Result<Self, AgentError> {
        let stopping = Arc::new(AtomicBool::new(false));
        let status = Arc::new(Status::new());
        let metrics = Arc::new(Metrics::new());
        let reporter = Arc::new(Reporter::new(&config.node_name));
        let (wake, messages) = mpsc::sync_channel(QUEUE);
        // Before anything is read, so that no change falls in between.
        let interest = Arc::new(Mutex::new(Interest::default()));
        let watching = monitor::start(Arc::clone(&interest), wake.clone(), Arc::clone(&stopping))
            .map_err(failed("watching links"))?;

        let datapath = Arc::new(Datapath::load(&config.instance.pin_dir())?);
        status.set("datapath", true, "programs are loaded");
        let journal = config.instance.run_dir().join(run_dir::LEASES);
        let leases = Leases::open(&journal, &clock::boot_id(), clock::now_ms());
        let observer = Box::new(AttachEvents(Arc::clone(&reporter)));
        let attacher = Attacher::new(Arc::clone(&datapath), leases, observer)
            .map_err(failed("starting the thread that deletes links"))?;
        let attacher = Arc::new(attacher);
        attacher.set_reserved_ports(own_ports(&config));
        let found = attacher.adopt()?;
        info!(
            pods = found.live,
            left_behind = found.doomed,
            ended = found.ended,
            "took over what is attached"
        );
        metrics.connect(Sources {
            attacher: Arc::clone(&attacher),
            datapath: Arc::clone(&datapath),
            status: Arc::clone(&status),
            reporter: Arc::clone(&reporter),
            services: Arc::clone(&metrics.services),
        });

        let proof = MtuProof::start(config.probe_port, Arc::clone(&status), Arc::clone(&reporter))
            .map_err(failed("starting the path MTU proof"))?;
        let parts = Parts {
            datapath: Arc::clone(&datapath),
            attacher: Arc::clone(&attacher),
            status: Arc::clone(&status),
            metrics: Arc::clone(&metrics),
            reporter: Arc::clone(&reporter),
            proof,
            interest,
            end,
        };
        let node_name = config.node_name.clone();
        let (services_config, run_dir) = (config.services.clone(), config.instance.run_dir());
        let flows_config = config.flows;
        let control = Control::new(config, parts)?;
        let mut threads = vec![watching];
        threads.push(thread("podway-control", move || control.run(&messages))?);
        let flows = Flows::start(
            flows_config,
            &flows::Surroundings {
                node: &node_name,
                run_dir: &run_dir,
                client,
                runtime,
                datapath: &datapath,
                attacher: &attacher,
                stopping: &stopping,
                services: services_config.mode != ServiceMode::None,
            },
        )
        .map_err(failed("starting the reader of flows"))?;
        let flows = flows.map(|(flows, thread)| {
            threads.push(thread);
            flows
        });
        if let Some(flows) = &flows {
            metrics.flows.connect(flows);
        }
        let directory = flows.as_ref().map(|flows| Arc::clone(flows.directory()));
        let surroundings = Surroundings {
            node: &node_name,
            run_dir: &run_dir,
            client,
            runtime,
            datapath: &datapath,
            status: &status,
            metrics: &metrics,
            reporter: &reporter,
            stopping: &stopping,
            directory: directory.as_ref(),
        };
        let services = match services_config.mode {
            ServiceMode::None => {
                services::remove(&services_config, &datapath);
                None
            }
            _ => Some(Services::start(&services_config, &surroundings).map_err(failed("starting services"))?),
        };
        let (counters, flag) = (Arc::clone(&metrics), Arc::clone(&stopping));
        threads.push(thread("podway-sweep", move || sweep(&datapath, &counters, flows.as_deref(), &flag))?);

        let _guard = runtime.enter();
        reporter.set_writer(EventWriter::start(client, "podway-agent", &node_name));
        runtime.spawn(locate(client.clone(), wake.clone()));
        let nodes = services.as_ref().map(Services::nodes);
        runtime.spawn(forward(watch::start(client, Kind::NODE, 64), wake.clone(), nodes, directory));
        Ok(Self { attacher, metrics, status, stopping, wake, threads, services })
    }

    fn stop(self, runtime: &tokio::runtime::Runtime) {
        self.stopping.store(true, Ordering::SeqCst);
        self.attacher.drain(DRAIN);
        // A full queue is being worked on; the loop takes the message soon.
        if self.wake.send(Message::Stop).is_err() {
            warn!("the control loop has ended before");
        }
        if let Some(services) = self.services {
            services.stop(runtime);
        }
        for thread in self.threads {
            if thread.join().is_err() {
                warn!("a thread of the agent panicked");
            }
        }
    }
}

/// Ports of the node that no pod may take away from the agent.
fn own_ports(config: &AgentConfig) -> Vec<Reserved> {
    let mut own =
        vec![Reserved { protocol: Protocol::Udp, port: config.probe_port, what: "the path MTU proof" }];
    if let NetworkMode::Vxlan { port, .. } = config.mode {
        own.push(Reserved { protocol: Protocol::Udp, port, what: "the VXLAN tunnel" });
    }
    if let Some(address) = &config.metrics_address {
        own.push(Reserved { protocol: Protocol::Tcp, port: address.port, what: "metrics and health" });
    }
    own
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, AgentError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(512 << 10)
        .spawn(body)
        .map_err(failed("starting a thread"))
}

/// Tells the control loop where the API server is, as far as that can be known: behind a name may be others
/// later on.
async fn locate(client: Client, wake: SyncSender<Message>) {
    let Some(host) = client.host() else { return };
    let mut known: Vec<IpAddr> = Vec::new();
    loop {
        let pause = match tokio::net::lookup_host(host.clone()).await {
            Ok(found) => {
                let mut found: Vec<IpAddr> = found.map(|a| a.ip()).collect();
                found.sort_unstable();
                found.dedup();
                if found == known {
                    LOCATE_AGAIN
                } else {
                    match wake.try_send(Message::ApiServer(found.clone())) {
                        Ok(()) => {
                            known = found;
                            LOCATE_AGAIN
                        }
                        Err(TrySendError::Full(_)) => Duration::from_millis(100),
                        Err(TrySendError::Disconnected(_)) => return,
                    }
                }
            }
            Err(error) => {
                debug!(host = host.0, %error, "the API server's name has no address now");
                LOCATE_SOON
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// From the watch, which is asynchronous, to the control loop, which is not.
async fn forward(
    mut changes: tokio::sync::mpsc::Receiver<watch::Change>,
    wake: SyncSender<Message>,
    services: Option<NodesIn>,
    directory: Option<Arc<Directory>>,
) {
    while let Some(change) = changes.recv().await {
        if let Some(directory) = &directory {
            directory.nodes(&change);
        }
        if let Some(services) = &services {
            services.tell(change.clone()).await;
        }
        let mut message = Message::Nodes(change);
        loop {
            match wake.try_send(message) {
                Ok(()) => break,
                Err(TrySendError::Full(back)) => {
                    message = back;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(TrySendError::Disconnected(_)) => return,
            }
        }
    }
}

fn sweep(datapath: &Datapath, metrics: &Metrics, flows: Option<&Flows>, stopping: &AtomicBool) {
    let mut waited = Duration::ZERO;
    let step = Duration::from_millis(500);
    while !stopping.load(Ordering::SeqCst) {
        std::thread::sleep(step);
        waited += step;
        if waited < SWEEP {
            continue;
        }
        waited = Duration::ZERO;
        let mut ended = Vec::new();
        match datapath.sweep_conntrack(|event| {
            if flows.is_some() && ended.len() < ENDS {
                ended.push(*event);
            }
        }) {
            Ok(report) => {
                if let Some(flows) = flows {
                    flows.swept(&ended);
                }
                metrics.conntrack_swept(report.removed);
                debug!(live = report.live, removed = report.removed, "swept the connection table");
            }
            Err(error) => warn!(%error, "cannot sweep the connection table"),
        }
    }
}
