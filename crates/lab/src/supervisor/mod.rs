//! The process that is a lab: API server, controllers, agents and pods, from `lab up` to `lab down`.
//!
//! The cluster's objects live in this process alone. When it dies, agents and pods go on running but nobody
//! answers for them any more; `lab down` removes them, and `lab up` makes the lab anew.

mod agents;
mod controllers;
mod nodes;
mod seed;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use podway_apiserver::{BearerToken, KindInfo, Store, StoreConfig};
use podway_link::Netns;
use tokio::signal::unix::{SignalKind, signal};

use crate::cgroup::Cgroup;
use crate::runner::{NodeTable, Runner};
use crate::spec::{API_PORT, LabName, LabSpec, MAX_NODES};
use crate::state::{StateDir, SupervisorFile, kubeconfig};
use nodes::Nodes;
pub(crate) use seed::node as node_object;

/// Said on standard output once the lab can be used.
pub const READY: &str = "ready\n";
/// Name of the link to this binary that makes it the CNI plugin.
const CNI_PLUGIN: &str = "podway-cni";
/// Changes that a watcher may be behind. 50 pods that come and go at once are some thousand.
const WATCH_WINDOW: usize = 16_384;
/// Threads for API, controllers and pods together; the work is mostly waiting.
const THREADS: usize = 2;

/// Runs the lab that `lab up` has described and wired, until SIGTERM.
///
/// # Errors
/// When the lab is not there or a part of it cannot start.
pub fn run(lab: &LabName) -> anyhow::Result<()> {
    // On its own, so that a Ctrl-C for the command that started it is not for it.
    nix::unistd::setsid().context("start a session")?;
    let state = StateDir::of(lab);
    let Some(file) = state.lab()? else {
        bail!("lab {lab} has no description in {}; make it with podway lab up", state.path().display())
    };
    let cgroup = Cgroup::of_lab(lab)?;
    let own = cgroup.child("supervisor");
    own.create()?;
    own.join()?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .max_blocking_threads(usize::from(MAX_NODES))
        .enable_all()
        .build()?
        .block_on(supervise(file.spec, file.token, &state, &cgroup))
}

async fn supervise(spec: LabSpec, token: String, state: &StateDir, cgroup: &Cgroup) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let store = Arc::new(Store::new(StoreConfig {
        watch_window: WATCH_WINDOW,
        defaulter: Some(Arc::new(|kind: &KindInfo, object| {
            if !kind.custom {
                podway_workloads::defaults::apply(&kind.kind, object);
            }
        })),
        ..StoreConfig::default()
    }));
    seed::seed(&store, &spec).context("first objects of the cluster")?;

    let fabric = Netns::open_named(&spec.name.fabric_netns())?;
    let mut listeners = Vec::new();
    for address in spec.fabric_addresses() {
        let address = SocketAddr::new(address, API_PORT);
        let bound = fabric.run(|| TcpListener::bind(address))?;
        listeners.push(bound.with_context(|| format!("listen on {address} of the fabric"))?);
    }
    let local = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen on 127.0.0.1")?;
    let api_port = local.local_addr()?.port();
    listeners.push(local);
    for listener in listeners {
        let serving = podway_apiserver::serve(listener, store.clone(), Some(BearerToken::new(&*token)));
        tokio::spawn(async move {
            let Err(error) = serving.await;
            tracing::error!(%error, "API server");
        });
    }
    let local = format!("127.0.0.1:{api_port}");
    state.write("kubeconfig", kubeconfig(&spec.name, &local, &token, true).as_bytes())?;

    let api = spec.fabric_addresses().first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let inside = kubeconfig(&spec.name, &SocketAddr::new(api, API_PORT).to_string(), &token, false);
    let nodes = Arc::new(Nodes {
        spec: spec.clone(),
        store: store.clone(),
        cgroup: cgroup.clone(),
        table: Arc::new(NodeTable::new()),
        kubeconfig: inside,
    });
    let prepared =
        spec.node_plans().into_iter().map(|plan| nodes.prepare(plan)).collect::<Result<Vec<_>, _>>()?;
    let plugin = state.path().join("bin").join(CNI_PLUGIN);
    link_self(&plugin)?;

    let mut agents = Vec::new();
    for node in prepared {
        agents.push(nodes.start_agent(&node));
        nodes.table.insert(node);
    }
    tokio::spawn(controllers::run(store.clone(), controllers::config(&spec)));
    let runner = Arc::new(Runner::new(&spec, store.clone(), nodes.table.clone(), plugin));
    tokio::spawn(runner.run());
    tokio::spawn(nodes.clone().keep_links());
    tokio::spawn(nodes.keep(agents));

    state.write_supervisor(&SupervisorFile::of_self(api_port)?)?;
    tracing::info!(lab = %spec.name, nodes = spec.nodes, api = local, "lab is up");
    {
        let mut out = std::io::stdout().lock();
        // Whoever started this may have gone; the lab is up all the same.
        let _ = out.write_all(READY.as_bytes()).and_then(|()| out.flush());
    }
    terminate.recv().await;
    tracing::info!("ends on SIGTERM; agents and pods run on until podway lab down");
    Ok(())
}

/// A link that leads to the program of whoever follows it: the CNI plugin is always the supervisor's own build.
fn link_self(path: &Path) -> anyhow::Result<()> {
    let make = || -> std::io::Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        match std::os::unix::fs::symlink("/proc/self/exe", path) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(()),
        }
    };
    make().with_context(|| format!("link {}", path.display()))
}
