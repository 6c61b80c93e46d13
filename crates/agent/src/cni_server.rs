//! The socket that the CNI plugin talks to, and the threads behind it.
//!
//! Attaching is a chain of system calls, so it runs on plain threads. [`WORKERS`] operations run at the same
//! time, [`WAITING`] more connections wait here and the rest in the socket's own queue, where the plugin's
//! timeout ends them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use podway_cni::protocol::{self, AddRequest, CheckRequest, DelRequest, GcRequest, Handler};
use podway_cni::{AddResult, CniError};
use tracing::{debug, info, warn};

use crate::attach::{Attacher, lock};
use crate::metrics::Metrics;

/// Operations at the same time.
pub const WORKERS: usize = 8;
/// Connections that wait for a worker.
pub const WAITING: usize = 64;
/// The deepest call chain (attaching a program) needs far less.
const STACK: usize = 512 << 10;

/// The running server.
#[derive(Debug)]
pub struct CniServer {
    path: PathBuf,
    stopping: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl CniServer {
    /// Listens on `path`, which is replaced when something is there. The caller makes sure that it is the only
    /// agent of its instance.
    ///
    /// # Errors
    /// The socket cannot be made, or a thread not be started.
    pub fn start(path: &Path, attacher: &Arc<Attacher>, metrics: &Arc<Metrics>) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let stopping = Arc::new(AtomicBool::new(false));
        let (queue, connections) = mpsc::sync_channel(WAITING);
        let connections = Arc::new(Mutex::new(connections));
        let mut threads = Vec::with_capacity(WORKERS + 1);
        let spawn = |name: String, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name).stack_size(STACK).spawn(body)
        };
        for n in 0..WORKERS {
            let connections = Arc::clone(&connections);
            let service = Service { attacher: Arc::clone(attacher), metrics: Arc::clone(metrics) };
            threads.push(spawn(format!("podway-cni-{n}"), Box::new(move || work(&connections, &service)))?);
        }
        let flag = Arc::clone(&stopping);
        threads.push(spawn("podway-cni".into(), Box::new(move || accept(&listener, &queue, &flag)))?);
        Ok(Self { path: path.to_owned(), stopping, threads })
    }

    /// Takes no more requests, finishes those that it has, and removes the socket.
    pub fn stop(mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Wakes the accepting thread; when this fails nobody can connect any more either.
        UnixStream::connect(&self.path).ok();
        std::fs::remove_file(&self.path).ok();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                warn!("a thread of the CNI server panicked");
            }
        }
    }
}

fn accept(listener: &UnixListener, queue: &SyncSender<UnixStream>, stopping: &AtomicBool) {
    loop {
        let connection = listener.accept();
        if stopping.load(Ordering::SeqCst) {
            return;
        }
        match connection {
            Ok((stream, _)) => {
                if queue.send(stream).is_err() {
                    return;
                }
            }
            Err(error) => {
                // Out of file descriptors or memory: it passes, and trying at full speed does not help.
                warn!(%error, "cannot take a connection on the CNI socket");
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
}

fn work(connections: &Mutex<Receiver<UnixStream>>, service: &Service) {
    loop {
        // The lock is held while waiting: one worker waits for a connection, the others for the lock.
        let next = lock(connections).recv();
        let Ok(stream) = next else { return };
        // A panic costs its connection; the plugin reports that it got no answer, and the runtime cleans up.
        let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            protocol::serve_connection(stream, service)
        }));
        match served {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "a CNI connection broke"),
            Err(_) => tracing::error!("a CNI operation panicked"),
        }
    }
}

struct Service {
    attacher: Arc<Attacher>,
    metrics: Arc<Metrics>,
}

impl Service {
    fn measured<T>(
        &self,
        command: &'static str,
        what: &str,
        f: impl FnOnce() -> Result<T, CniError>,
    ) -> Result<T, CniError> {
        let begun = Instant::now();
        let result = f();
        let took = begun.elapsed();
        let code = result.as_ref().err().map_or(0, |e| e.code);
        self.metrics.cni(command, code, took);
        let ms = f64::from(u32::try_from(took.as_micros()).unwrap_or(u32::MAX)) / 1000.0;
        match &result {
            // Asked every few seconds; a change is logged where it happens.
            _ if command == "STATUS" => {}
            Ok(_) => info!(command, what, ms, "CNI"),
            Err(error) => warn!(command, what, ms, %error, "CNI"),
        }
        result
    }
}

impl Handler for Service {
    fn add(&self, request: AddRequest, netns: OwnedFd) -> Result<AddResult, CniError> {
        let what = describe(&request.container_id, &request.ifname, &request.args);
        self.measured("ADD", &what, || self.attacher.add(&request, netns))
    }

    fn del(&self, request: DelRequest) -> Result<(), CniError> {
        let what = describe(&request.container_id, &request.ifname, &request.args);
        self.measured("DEL", &what, || self.attacher.del(&request))
    }

    fn check(&self, request: CheckRequest, netns: OwnedFd) -> Result<(), CniError> {
        let what = describe(&request.container_id, &request.ifname, &request.args);
        self.measured("CHECK", &what, || self.attacher.check(&request, netns))
    }

    fn gc(&self, request: GcRequest) -> Result<(), CniError> {
        let what = format!("{} valid attachments", request.valid_attachments.len());
        self.measured("GC", &what, || self.attacher.gc(&request))
    }

    fn status(&self) -> Result<(), CniError> {
        self.measured("STATUS", "", || self.attacher.status())
    }
}

fn describe(container_id: &str, ifname: &str, args: &podway_cni::Args) -> String {
    match (args.pod_namespace(), args.pod_name()) {
        (Some(namespace), Some(name)) => format!("{namespace}/{name} {container_id}/{ifname}"),
        _ => format!("{container_id}/{ifname}"),
    }
}
