//! TCP (and SCTP one-to-one) connections: HTTP/1.1 when the first bytes say so, one line of JSON otherwise.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{Answer, HttpRequest, Phase, Protocol, Shared};

/// A client that says nothing for this long is told who answers.
const SILENCE: Duration = Duration::from_millis(500);
/// Between two looks at the first bytes when they do not suffice yet.
const PEEK_AGAIN: Duration = Duration::from_millis(10);
/// A connection without a request ends after this, so that forgotten clients do not use up the limit.
const IDLE: Duration = Duration::from_secs(60);
/// hyper's smallest buffer: requests of a lab are small, and tens of stand-ins run at once.
const BUFFER: usize = 8192;
/// How long a raw client may keep sending after its answer before the connection is reset.
const LINGER: Duration = Duration::from_secs(1);
const METHODS: [&[u8]; 9] =
    [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"CONNECT ", b"TRACE "];

/// Accepts until the phase is `Closed`.
pub(crate) async fn serve(listener: TcpListener, protocol: Protocol, shared: Arc<Shared>) {
    let mut phase = shared.phase.clone();
    loop {
        let permit = tokio::select! {
            permit = shared.connections.clone().acquire_owned() => permit,
            _ = phase.wait_for(|p| *p == Phase::Closed) => return,
        };
        let Ok(permit) = permit else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = phase.wait_for(|p| *p == Phase::Closed) => return,
        };
        let Ok((stream, peer)) = accepted else {
            // Out of descriptors or a connection that died in the backlog: let others finish first.
            tokio::time::sleep(PEEK_AGAIN).await;
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            connection(stream, peer, protocol, &shared).await;
            drop(permit);
        });
    }
}

/// Errors of one connection are its client's: nothing here outlives them.
async fn connection(stream: TcpStream, peer: SocketAddr, protocol: Protocol, shared: &Arc<Shared>) {
    let Ok(local) = stream.local_addr() else { return };
    let answer = Answer::new(&shared.identity, protocol, local, peer);
    if protocol == Protocol::Tcp && speaks_http(&stream).await {
        http(stream, answer, shared).await;
    } else {
        raw(stream, &answer).await;
    }
}

async fn speaks_http(stream: &TcpStream) -> bool {
    let look = async {
        let mut first = [0; 8];
        loop {
            let Ok(n) = stream.peek(&mut first).await else { return false };
            let seen = &first[..n];
            if n == 0 || !METHODS.iter().any(|m| m.starts_with(seen) || seen.starts_with(m)) {
                return false;
            }
            if METHODS.iter().any(|m| seen.starts_with(m)) {
                return true;
            }
            tokio::time::sleep(PEEK_AGAIN).await;
        }
    };
    tokio::time::timeout(SILENCE, look).await.unwrap_or(false)
}

async fn raw(mut stream: TcpStream, answer: &Answer) {
    if stream.write_all(&answer.line()).await.is_err() || stream.shutdown().await.is_err() {
        return;
    }
    // Closing with unread bytes resets the connection and can destroy the answer on its way.
    let mut rest = [0; 512];
    let drained = async { while matches!(stream.read(&mut rest).await, Ok(n) if n > 0) {} };
    let _ = tokio::time::timeout(LINGER, drained).await;
}

async fn http(stream: TcpStream, answer: Answer, shared: &Arc<Shared>) {
    let service = service_fn(|request: Request<Incoming>| {
        let mut answer = answer.clone();
        let closing = *shared.phase.borrow() != Phase::Open;
        async move {
            answer.http = Some(describe(&request));
            // The body is read so that the connection can carry the next request.
            let mut body = request.into_body();
            while let Some(Ok(_)) = body.frame().await {}
            let mut response = Response::new(Full::new(Bytes::from(answer.line())));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            if closing {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .max_buf_size(BUFFER)
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let mut phase = shared.phase.clone();
    let closed = async move {
        if phase.wait_for(|p| *p == Phase::Closed).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::pin!(closed);
    let mut told = false;
    loop {
        tokio::select! {
            _ = connection.as_mut() => return,
            () = closed.as_mut(), if !told => {
                told = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

fn describe(request: &Request<Incoming>) -> HttpRequest {
    let mut headers = BTreeMap::<String, String>::new();
    for (name, value) in request.headers() {
        let value = String::from_utf8_lossy(value.as_bytes());
        headers
            .entry(name.as_str().to_owned())
            .and_modify(|v| {
                v.push_str(", ");
                v.push_str(&value);
            })
            .or_insert_with(|| value.into_owned());
    }
    HttpRequest {
        method: request.method().to_string(),
        path: request.uri().path_and_query().map_or_else(|| request.uri().to_string(), ToString::to_string),
        host: request
            .headers()
            .get(HOST)
            .map(|h| String::from_utf8_lossy(h.as_bytes()).into_owned())
            .or_else(|| request.uri().authority().map(ToString::to_string))
            .unwrap_or_default(),
        headers,
    }
}
