//! HTTP/1.1 for the store: connections and their limits, who may come in, and which handler answers.

mod body;
mod discovery;
mod media;
mod openapi;
mod protobuf;
mod query;
mod resource;
mod review;
mod route;
mod scale;
mod stream;
mod view;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::error::ApiError;
use crate::store::Store;
use route::Route;

/// Connections of one listener; more wait in the listen queue. A watch over HTTP/1.1 holds one.
const MAX_CONNECTIONS: usize = 1024;
/// Time to send a request's headers, idle time before them included: longer than clients keep idle connections (90 s),
/// so that it is they who close them.
const HEADER_TIMEOUT: Duration = Duration::from_secs(120);
/// Path under which the whole API is served again to those who know the token.
const PATH_PREFIX: &str = "/token/";
/// Pause after a failed accept, which mostly means that the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type ResponseBody = UnsyncBoxBody<Bytes, Infallible>;

/// The secret that clients must bring: as `Authorization: Bearer …`, or as the first part of the URL's path
/// ([`BearerToken::path_prefix`]). The latter is for kubectl, which sends no token over plain HTTP.
#[derive(Clone)]
pub struct BearerToken(String);

impl BearerToken {
    /// A long, random text of letters, digits and dashes.
    pub fn new(token: impl Into<String>) -> Self {
        Self(token.into())
    }

    /// What to put behind host and port in a kubeconfig's `server`, such as `/token/8f2e…`. With it no further token
    /// is needed; treat the whole URL as the secret.
    pub fn path_prefix(&self) -> String {
        format!("{PATH_PREFIX}{}", self.0)
    }

    /// Compares without telling by its time how much was right.
    fn admits(&self, presented: &str) -> bool {
        let (a, b) = (self.0.as_bytes(), presented.as_bytes());
        a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken(…)")
    }
}

/// Serves a store over plain HTTP/1.1 on a listening socket, until the future is dropped; its connections end with
/// it. With a token, every request must bring it, except those for health and version. Several listeners may serve
/// one store. Must be polled within a tokio runtime with I/O and time enabled.
///
/// # Errors
/// Only at the start, if the socket cannot be handed to tokio; failing connections are logged.
pub async fn serve(
    listener: std::net::TcpListener,
    store: Arc<Store>,
    auth: Option<BearerToken>,
) -> io::Result<Infallible> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let server = Arc::new(Server { store, auth, address: listener.local_addr()?.to_string() });
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, Arc::clone(&server)));
                }
                Err(error) => {
                    tracing::warn!(%error, "API server cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
        }
    }
}

async fn connection(stream: TcpStream, server: Arc<Server>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot switch off Nagle's algorithm");
    }
    let service = service_fn(|request| {
        let server = Arc::clone(&server);
        async move { Ok::<_, Infallible>(server.respond(request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "API connection ended");
    }
}

struct Server {
    store: Arc<Store>,
    auth: Option<BearerToken>,
    address: String,
}

impl Server {
    async fn respond(&self, request: Request<Incoming>) -> Response<ResponseBody> {
        let method = request.method().clone();
        let (path, authorized) = self.admit(&request);
        let path = path.to_owned();
        let response = match self.answer(request, &path, authorized).await {
            Ok(response) => response,
            Err(error) => json_response(
                StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
                &error.to_status(),
            ),
        };
        tracing::debug!(%method, path, status = response.status().as_u16(), "API request");
        response
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        path: &str,
        authorized: bool,
    ) -> Result<Response<ResponseBody>, ApiError> {
        // Whether a path exists is told only to those who may see it.
        let route = Route::parse(&self.store, path);
        if !authorized && !route.as_ref().is_ok_and(Route::is_public) {
            return Err(ApiError::unauthorized());
        }
        let route = route?;
        let route = match route {
            Route::Resource(target) => return resource::answer(&self.store, target, request).await,
            Route::AccessReview => return review::answer(request).await,
            other => other,
        };
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(ApiError::method_not_allowed());
        }
        Ok(match route {
            Route::Health => text_response("ok"),
            Route::Version => json_response(StatusCode::OK, &version()),
            Route::OpenApiV2 | Route::OpenApiV3Index | Route::OpenApiV3 { .. } => {
                openapi::answer(&self.store, &route, request.headers())?
            }
            other => json_response(StatusCode::OK, &discovery::answer(&self.store, &other, &self.address)?),
        })
    }

    /// The path without the token, and whether the request brought the right one.
    fn admit<'a>(&self, request: &'a Request<Incoming>) -> (&'a str, bool) {
        let path = request.uri().path();
        let in_path = path.strip_prefix(PATH_PREFIX).map(|rest| {
            let end = rest.find('/').unwrap_or(rest.len());
            rest.split_at(end)
        });
        let presented = request
            .headers()
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, presented)| presented.trim());
        let admits = |presented: &str| self.auth.as_ref().is_none_or(|token| token.admits(presented));
        match (in_path, presented) {
            (Some((presented, rest)), _) => (rest, admits(presented)),
            (None, Some(presented)) => (path, admits(presented)),
            (None, None) => (path, self.auth.is_none()),
        }
    }
}

fn version() -> Value {
    json!({
        "major": "1", "minor": "36", "gitVersion": concat!("v1.36.0+podway-", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none", "compiler": "rustc", "platform": "linux/amd64"
    })
}

fn respond_with(
    status: StatusCode,
    content_type: &'static str,
    body: ResponseBody,
) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-cache, private"));
    response
}

fn bytes_response(status: StatusCode, body: impl Into<Bytes>) -> Response<ResponseBody> {
    respond_with(status, "application/json", Full::new(body.into()).boxed_unsync())
}

fn json_response(status: StatusCode, body: &Value) -> Response<ResponseBody> {
    bytes_response(status, body.to_string())
}

fn text_response(body: &'static str) -> Response<ResponseBody> {
    respond_with(
        StatusCode::OK,
        "text/plain; charset=utf-8",
        Full::new(Bytes::from_static(body.as_bytes())).boxed_unsync(),
    )
}
