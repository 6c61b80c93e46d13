//! `/metrics`, `/healthz` and `/readyz` over HTTP/1.1.
//!
//! - `/healthz`: 200 while the control loop goes on, else 503.
//! - `/readyz`: 200 while pods can be attached, else 503; the body has every concern on a line of its own,
//!   `[+]` or `[-]`, in either case. An API server that is away shows there, and does not make the node unready:
//!   pods are attached from what is remembered.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{debug, error, info};

use crate::attach::{Attacher, Readiness};
use crate::config::ListenAddress;
use crate::metrics::Metrics;
use crate::status::Status;

/// Connections served at the same time; more wait in the socket's queue.
const CONNECTIONS: usize = 16;
/// A connection may last this long: a page takes milliseconds.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for the request's header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between attempts to listen.
const RETRY: Duration = Duration::from_secs(10);

/// What the pages show.
#[derive(Debug, Clone)]
pub struct Pages {
    /// For `/metrics`.
    pub metrics: Arc<Metrics>,
    /// For the others.
    pub status: Arc<Status>,
    /// For `/readyz`.
    pub attacher: Arc<Attacher>,
}

/// Serves for ever. An address that cannot be listened on (a taken port) is reported and tried again: it is no
/// reason to leave pods without network.
pub async fn serve(address: ListenAddress, pages: Pages) {
    let listener = loop {
        match listen(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                error!(%address, %error, "cannot serve metrics and health; set --metrics-address, trying again");
                pages.status.set("metrics", false, format!("cannot listen on {address}: {error}"));
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    pages.status.set("metrics", true, format!("on {address}"));
    info!(%address, "serving metrics and health");
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let pages = pages.clone();
                tokio::spawn(async move {
                    connection(stream, pages).await;
                    drop(place);
                });
            }
            Err(error) => {
                debug!(%error, "cannot take an HTTP connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

pub(crate) async fn listen(address: ListenAddress) -> io::Result<TcpListener> {
    let at = |ip: IpAddr| SocketAddr::new(ip, address.port);
    match address.ip {
        Some(ip) => TcpListener::bind(at(ip)).await,
        // One socket takes both families; without IPv6 in the kernel, only IPv4.
        None => match TcpListener::bind(at(Ipv6Addr::UNSPECIFIED.into())).await {
            Ok(listener) => Ok(listener),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => Err(e),
            Err(_) => TcpListener::bind(at(Ipv4Addr::UNSPECIFIED.into())).await,
        },
    }
}

async fn connection(stream: TcpStream, pages: Pages) {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let pages = pages.clone();
        async move {
            let method = request.method().clone();
            let path = request.uri().path().to_owned();
            // Reading the kernel's tables blocks.
            let page = tokio::task::spawn_blocking(move || page(&method, &path, &pages)).await;
            let (code, kind, body) = page.unwrap_or_else(|_| {
                (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", "the page could not be made\n".into())
            });
            let mut response = Response::new(Full::new(Bytes::from(body)));
            *response.status_mut() = code;
            response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
            Ok::<_, Infallible>(response)
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_TIMEOUT, served).await {
        debug!(%error, "an HTTP connection broke");
    }
}

const TEXT: &str = "text/plain; charset=utf-8";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

fn page(method: &Method, path: &str, pages: &Pages) -> (StatusCode, &'static str, String) {
    if method != Method::GET && method != Method::HEAD {
        return (StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n".into());
    }
    match path {
        "/metrics" => match pages.metrics.text() {
            Ok(text) => (StatusCode::OK, OPENMETRICS, text),
            Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, TEXT, "a value has no text\n".into()),
        },
        "/healthz" => {
            let (code, text) = healthz(&pages.status);
            (code, TEXT, text)
        }
        "/readyz" => {
            let (code, text) = readyz(&pages.status, &pages.attacher.readiness());
            (code, TEXT, text)
        }
        _ => (StatusCode::NOT_FOUND, TEXT, "there are /metrics, /healthz and /readyz\n".into()),
    }
}

fn healthz(status: &Status) -> (StatusCode, String) {
    let snapshot = status.snapshot();
    if snapshot.alive() {
        return (StatusCode::OK, "ok\n".into());
    }
    let seconds = snapshot.turned.elapsed().as_secs();
    (StatusCode::SERVICE_UNAVAILABLE, format!("the control loop has not turned for {seconds} s\n"))
}

fn readyz(status: &Status, readiness: &Readiness) -> (StatusCode, String) {
    let mut text = String::new();
    let (code, verdict) = match readiness {
        Readiness::Ready => (StatusCode::OK, "ready".to_owned()),
        Readiness::NotReady(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}")),
    };
    for (concern, condition) in &status.snapshot().conditions {
        let sign = if condition.ok { '+' } else { '-' };
        let _ = writeln!(text, "[{sign}] {concern}: {}", condition.text);
    }
    let _ = writeln!(text, "{verdict}");
    (code, text)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn readyz_names_every_concern_and_the_verdict_is_that_of_attaching() {
        let status = Status::new();
        status.set("api", false, "away");
        status.set("network", true, "pod MTU 1450");
        let (code, text) = readyz(&status, &Readiness::Ready);
        assert_eq!(code, StatusCode::OK);
        assert_eq!(text, "[-] api: away\n[+] network: pod MTU 1450\nready\n");
        let (code, text) = readyz(&status, &Readiness::NotReady("no podCIDR".into()));
        assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.ends_with("not ready: no podCIDR\n"));
    }

    #[test]
    fn healthz_notices_a_stuck_loop() {
        let status = Status::new();
        assert_eq!(healthz(&status).0, StatusCode::OK);
        let long_ago = Instant::now().checked_sub(crate::status::STUCK_AFTER);
        status.update(|s| s.turned = long_ago.expect("the machine is up for longer than that"));
        assert_eq!(healthz(&status).0, StatusCode::SERVICE_UNAVAILABLE);
    }
}
