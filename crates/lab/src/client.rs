//! A small client of the lab's API server, for the commands of this machine.
//!
//! It speaks the same HTTP as everybody else; the address and the token come from the lab's files.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::spec::LabName;
use crate::state::StateDir;

/// Longest answer. The largest list is that of a lab's pods.
const ANSWER_LIMIT: usize = 256 << 20;
/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A connection to a lab's API server.
#[derive(Debug)]
pub struct Client {
    address: SocketAddr,
    token: String,
    connection: Option<SendRequest<Full<Bytes>>>,
}

/// What the API answered.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub code: StatusCode,
    /// The object: what was asked for, or a `Status` that says why not.
    pub body: Value,
}

impl Answer {
    /// The body of a success, or the message of the refusal.
    ///
    /// # Errors
    /// With the server's message.
    pub fn ok(self) -> anyhow::Result<Value> {
        if self.code.is_success() {
            return Ok(self.body);
        }
        bail!("{}", self.body["message"].as_str().unwrap_or(self.code.as_str()))
    }
}

impl Client {
    /// For a running lab.
    ///
    /// # Errors
    /// When there is no such lab or nobody runs it, with what to do.
    pub fn of_lab(lab: &LabName) -> anyhow::Result<Self> {
        let state = StateDir::of(lab);
        let Some(file) = state.lab()? else {
            bail!("there is no lab {lab}; podway lab list shows those that are, podway lab up makes one");
        };
        match state.supervisor()? {
            Some(s) if s.is_alive() => Ok(Self {
                address: (Ipv4Addr::LOCALHOST, s.api_port).into(),
                token: file.token,
                connection: None,
            }),
            _ => bail!(
                "nobody runs lab {lab} any more (its log: {}); remove it with: podway lab down {lab}",
                state.supervisor_log().display()
            ),
        }
    }

    /// For a server of a test, on this machine.
    #[cfg(test)]
    pub(crate) fn of_test(port: u16, token: &str) -> Self {
        Self { address: (Ipv4Addr::LOCALHOST, port).into(), token: token.to_owned(), connection: None }
    }

    /// Reads an object or a list.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub async fn read(&mut self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::GET, path, None).await?.ok()
    }

    /// One request.
    ///
    /// # Errors
    /// When the server cannot be reached or what it says is no JSON. A refusal is an [`Answer`].
    pub async fn call(&mut self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Answer> {
        self.send(method, path, "application/json", body).await
    }

    /// Changes fields of an object by a JSON merge patch (RFC 7396) and returns the object.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub async fn merge(&mut self, path: &str, patch: &Value) -> anyhow::Result<Value> {
        self.send(Method::PATCH, path, "application/merge-patch+json", Some(patch)).await?.ok()
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        media: &'static str,
        body: Option<&Value>,
    ) -> anyhow::Result<Answer> {
        let what = format!("{method} {path}");
        let work = self.exchange(method, path, media, body);
        match tokio::time::timeout(TIMEOUT, work).await {
            Ok(answer) => {
                if answer.is_err() {
                    self.connection = None;
                }
                answer.with_context(|| format!("lab's API server at {}: {what}", self.address))
            }
            Err(_) => {
                self.connection = None;
                bail!("lab's API server at {}: {what}: no answer in {} s", self.address, TIMEOUT.as_secs())
            }
        }
    }

    async fn exchange(
        &mut self,
        method: Method,
        path: &str,
        media: &'static str,
        body: Option<&Value>,
    ) -> anyhow::Result<Answer> {
        let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.address.to_string())
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
            .header(header::CONTENT_TYPE, media)
            .header(header::ACCEPT, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let connection = match &mut self.connection {
            Some(open) if !open.is_closed() => open,
            slot => {
                let stream = TcpStream::connect(self.address).await?;
                let (sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
                // Its errors come back through the sender.
                tokio::spawn(connection);
                slot.insert(sender)
            }
        };
        connection.ready().await?;
        let response = connection.send_request(request).await?;
        let code = response.status();
        let bytes = Limited::new(response.into_body(), ANSWER_LIMIT)
            .collect()
            .await
            .map_err(|e| anyhow::anyhow!("read the answer: {e}"))?
            .to_bytes();
        let body = serde_json::from_slice(&bytes).with_context(|| format!("answer {code} is no JSON"))?;
        Ok(Answer { code, body })
    }
}
