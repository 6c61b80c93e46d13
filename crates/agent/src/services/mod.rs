//! Services on this node: objects in, one table, one mechanism of the kernel that serves it.
//!
//! ```text
//!   API server ─▶ feed ─┬▶ driver: compiler (pure) ─▶ table ─▶ kernel: eBPF, …
//!                       │          ├─▶ health checks        └─▶ audit, counters ─▶ metrics, events
//!                       │          └─▶ report ◀─ query ◀─ `podway services`
//!                       └▶ lb: addresses of load balancers, and who answers for them
//! ```
//!
//! The driver is one plain thread; nothing here is waited for by those who attach pods.

pub mod config;
pub mod health_checks;
pub mod metrics;
pub mod query;

mod driver;
mod feed;
mod kernel;
mod lb;
pub(crate) mod mechanisms;
mod report;
mod view;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use podway_bpf_host::Datapath;
use podway_kube::Client;
use podway_kube::watch::Change;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::events::Reporter;
use crate::flows::Directory;
use crate::metrics::Metrics;
use crate::status::Status;
use config::ServicesConfig;
use driver::{Driver, Parts};
use feed::Input;
use health_checks::HealthChecks;
use lb::{Announcer, Board, Controller};
use mechanisms::Mechanisms;

/// How long the end waits for the Lease to be given back.
const RELEASE: Duration = Duration::from_secs(1);

/// What services need of the rest of the agent.
pub(crate) struct Surroundings<'a> {
    pub(crate) node: &'a str,
    pub(crate) run_dir: &'a Path,
    pub(crate) client: &'a Client,
    pub(crate) runtime: &'a Runtime,
    pub(crate) datapath: &'a Arc<Datapath>,
    pub(crate) status: &'a Arc<Status>,
    pub(crate) metrics: &'a Arc<Metrics>,
    pub(crate) reporter: &'a Arc<Reporter>,
    pub(crate) stopping: &'a Arc<AtomicBool>,
    /// Where services are looked up by those who show flows.
    pub(crate) directory: Option<&'a Arc<Directory>>,
}

/// Everything that runs for services.
#[derive(Debug)]
pub(crate) struct Services {
    queue: SyncSender<Input>,
    board: Arc<Board>,
    threads: Vec<JoinHandle<()>>,
    stop: watch::Sender<bool>,
    controller: tokio::task::JoinHandle<()>,
}

impl Services {
    /// Starts threads and watches, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// A thread or the socket for questions cannot be made.
    pub(crate) fn start(config: &ServicesConfig, with: &Surroundings<'_>) -> io::Result<Self> {
        let (queue, inputs) = mpsc::sync_channel(driver::QUEUE);
        let board = Arc::new(Board::default());
        let own_metrics = Arc::clone(&with.metrics.services);
        let pools = Arc::clone(&own_metrics.pools);
        let driver = Driver::new(Parts {
            node: with.node.to_owned(),
            config: config.clone(),
            mechanisms: Mechanisms::new(config, with.datapath),
            health_checks: HealthChecks::new(with.runtime.handle().clone()),
            status: Arc::clone(with.status),
            metrics: Arc::clone(with.metrics),
            own_metrics,
            reporter: Arc::clone(with.reporter),
        });
        let mut threads = vec![
            std::thread::Builder::new()
                .name("podway-services".into())
                .stack_size(2 << 20)
                .spawn(move || driver.run(&inputs))?,
        ];
        let announcer =
            Announcer::new(with.node, Arc::clone(&board), Arc::clone(with.status), Arc::clone(with.reporter));
        let stopping = Arc::clone(with.stopping);
        threads.push(
            std::thread::Builder::new()
                .name("podway-announce".into())
                .stack_size(256 << 10)
                .spawn(move || announcer.run(&stopping))?,
        );
        query::start(&with.run_dir.join(query::SOCKET), queue.clone())?;
        let _guard = with.runtime.enter();
        feed::start(with.client, config.load_balancer_pool.clone(), &board, with.directory.cloned(), &queue);
        let (stop, stopped) = watch::channel(false);
        let controller = Controller::new(
            with.client.clone(),
            (with.node, &config.load_balancer_pool),
            Arc::clone(&board),
            Arc::clone(with.status),
            Arc::clone(with.reporter),
            pools,
        );
        let controller = with.runtime.spawn(controller.run(stopped));
        Ok(Self { queue, board, threads, stop, controller })
    }

    /// Where changes of Nodes go.
    pub(crate) fn nodes(&self) -> NodesIn {
        NodesIn { queue: self.queue.clone(), board: Arc::clone(&self.board) }
    }

    /// Ends; what is in the kernel stays.
    pub(crate) fn stop(self, runtime: &Runtime) {
        self.stop.send(true).ok();
        if runtime.block_on(async { tokio::time::timeout(RELEASE, self.controller).await }).is_err() {
            warn!(
                "the lease of load balancer addresses is not given back; another agent takes it when it has run out"
            );
        }
        // A full queue is being worked on.
        if self.queue.send(Input::Stop).is_err() {
            warn!("the thread of services has ended before");
        }
        for thread in self.threads {
            if thread.join().is_err() {
                warn!("a thread of services panicked");
            }
        }
    }
}

/// Takes what the watch of Nodes tells.
#[derive(Debug, Clone)]
pub(crate) struct NodesIn {
    queue: SyncSender<Input>,
    board: Arc<Board>,
}

impl NodesIn {
    pub(crate) async fn tell(&self, change: Change) {
        self.board.nodes(&change);
        feed::send(&self.queue, Input::Nodes(change)).await;
    }
}

/// Removes what every mechanism of services left, for an agent that does not serve them any more.
pub(crate) fn remove(config: &ServicesConfig, datapath: &Arc<Datapath>) {
    for line in Mechanisms::new(config, datapath).remove_others() {
        info!(removed = line, "services are not served any more");
    }
}
