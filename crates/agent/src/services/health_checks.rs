//! Health-check node ports: how a load balancer in front of the cluster learns which nodes have endpoints of a Service
//! with `externalTrafficPolicy: Local` (`spec.healthCheckNodePort`).
//!
//! One small HTTP server for each, which answers any path with 200 while this node has an endpoint that is ready, and
//! with 503 otherwise. The body and the headers are those of kube-proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tracing::debug;

use crate::attach::lock;
use crate::config::ListenAddress;
use crate::http::listen;

/// Connections that one port serves at the same time; more wait in the socket's queue.
const CONNECTIONS: usize = 8;
/// A connection may last this long.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a request's header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between attempts to listen on a port that is taken.
const RETRY: Duration = Duration::from_secs(5);
/// Ports that are served at the most: the whole default range of node ports.
pub const PORTS_MAX: usize = 2768;
/// Of kube-proxy (KEP-1860 follow-up): load balancers may weigh nodes by it.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What one port answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Namespace of the Service.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Endpoints on this node that are ready.
    pub local: usize,
}

impl Answer {
    fn response(&self, healthy: bool) -> Response<Full<Bytes>> {
        let body = json!({
            "service": {"namespace": self.namespace, "name": self.name},
            "localEndpoints": self.local,
            "serviceProxyHealthy": healthy,
        });
        let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
        if self.local == 0 || !healthy {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        }
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(WEIGHT, HeaderValue::from(self.local));
        response
    }
}

/// What happened to a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// Whose port.
    pub answer: Answer,
    /// Which port.
    pub port: u16,
    /// Why it cannot be served.
    pub cause: String,
}

/// All ports of this node.
#[derive(Debug)]
pub struct HealthChecks {
    runtime: Handle,
    healthy: Arc<AtomicBool>,
    open: BTreeMap<u16, Open>,
    troubles: Arc<Mutex<BTreeMap<u16, String>>>,
    told: BTreeSet<(u16, String)>,
}

#[derive(Debug)]
struct Open {
    answer: Arc<Mutex<Answer>>,
    task: JoinHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl HealthChecks {
    /// No port yet. The servers run on `runtime`, whose threads must be in the node's network namespace.
    #[must_use]
    pub fn new(runtime: Handle) -> Self {
        Self {
            runtime,
            healthy: Arc::new(AtomicBool::new(true)),
            open: BTreeMap::new(),
            troubles: Arc::default(),
            told: BTreeSet::new(),
        }
    }

    /// Opens, changes and closes ports so that they are these. Beyond [`PORTS_MAX`], the highest are left out.
    pub fn set(&mut self, wanted: &BTreeMap<u16, Answer>) {
        self.open.retain(|port, _| wanted.contains_key(port));
        lock(&self.troubles).retain(|port, _| wanted.contains_key(port));
        self.told.retain(|(port, _)| wanted.contains_key(port));
        for (port, answer) in wanted.iter().take(PORTS_MAX) {
            if let Some(open) = self.open.get(port) {
                answer.clone_into(&mut lock(&open.answer));
                continue;
            }
            let shared = Arc::new(Mutex::new(answer.clone()));
            let task = self.runtime.spawn(serve(
                *port,
                Arc::clone(&shared),
                Arc::clone(&self.healthy),
                Arc::clone(&self.troubles),
            ));
            self.open.insert(*port, Open { answer: shared, task });
        }
    }

    /// Sets whether the service layer of this node works.
    pub fn set_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Ordering::Relaxed);
    }

    /// Troubles that were not told yet.
    pub fn new_troubles(&mut self) -> Vec<Trouble> {
        let now = lock(&self.troubles).clone();
        // One that ended and comes back is told again.
        self.told.retain(|(port, cause)| now.get(port) == Some(cause));
        let mut out = Vec::new();
        for (port, cause) in now {
            let Some(open) = self.open.get(&port) else { continue };
            if self.told.insert((port, cause.clone())) {
                out.push(Trouble { answer: lock(&open.answer).clone(), port, cause });
            }
        }
        out
    }

    /// Number of ports.
    #[must_use]
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

async fn serve(
    port: u16,
    answer: Arc<Mutex<Answer>>,
    healthy: Arc<AtomicBool>,
    troubles: Arc<Mutex<BTreeMap<u16, String>>>,
) {
    let listener = loop {
        match listen(ListenAddress { ip: None, port }).await {
            Ok(listener) => break listener,
            Err(error) => {
                lock(&troubles).insert(port, error.to_string());
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    lock(&troubles).remove(&port);
    accept(&listener, &answer, &healthy).await;
}

async fn accept(listener: &TcpListener, answer: &Arc<Mutex<Answer>>, healthy: &Arc<AtomicBool>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!(%error, "cannot take a health check's connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (answer, healthy) = (Arc::clone(answer), Arc::clone(healthy));
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |_: Request<Incoming>| {
                let response = lock(&answer).response(healthy.load(Ordering::Relaxed));
                async move { Ok::<_, Infallible>(response) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service);
            if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_TIMEOUT, served).await {
                debug!(%error, "a health check's connection broke");
            }
            drop(place);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    use super::*;

    fn answer(local: usize) -> Answer {
        Answer { namespace: "x".into(), name: "a".into(), local }
    }

    fn ask(port: u16) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    }

    fn until<T>(what: &str, mut get: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(15);
        loop {
            if let Some(found) = get() {
                return found;
            }
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn a_port_answers_while_its_service_has_it() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut checks = HealthChecks::new(runtime.handle().clone());
        let port = free_port();
        checks.set(&BTreeMap::from([(port, answer(2))]));
        let text = until("an answer", || ask(port));
        assert!(
            text.starts_with("HTTP/1.1 200") && text.contains("x-load-balancing-endpoint-weight: 2"),
            "{text}"
        );
        let body: serde_json::Value = serde_json::from_str(text.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!(
            body,
            json!({"service": {"namespace": "x", "name": "a"}, "localEndpoints": 2, "serviceProxyHealthy": true})
        );
        checks.set(&BTreeMap::from([(port, answer(0))]));
        let text = ask(port).unwrap();
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("\"localEndpoints\":0"), "{text}");
        checks.set(&BTreeMap::from([(port, answer(1))]));
        checks.set_healthy(false);
        assert!(ask(port).unwrap().starts_with("HTTP/1.1 503"));
        checks.set(&BTreeMap::new());
        assert!(checks.is_empty());
        until("the port to close", || ask(port).is_none().then_some(()));
    }

    #[test]
    fn a_taken_port_is_told_once_and_served_when_it_is_free() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut checks = HealthChecks::new(runtime.handle().clone());
        let holder = TcpListener::bind("[::]:0").unwrap();
        let port = holder.local_addr().unwrap().port();
        checks.set(&BTreeMap::from([(port, answer(1))]));
        let troubles = until("a trouble", || Some(checks.new_troubles()).filter(|t| !t.is_empty()));
        assert_eq!((troubles[0].port, troubles[0].answer.name.as_str()), (port, "a"));
        assert!(checks.new_troubles().is_empty());
        drop(holder);
        until("an answer", || ask(port).filter(|t| t.starts_with("HTTP/1.1 200")));
        assert!(checks.new_troubles().is_empty() && checks.len() == 1);
    }
}
