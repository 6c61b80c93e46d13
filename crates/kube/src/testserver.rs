//! An HTTP server on loopback that answers as a test says, for what a well-behaved API server never does.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::client::{Client, Credentials};

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) body: String,
}

#[derive(Debug, Clone)]
pub(crate) struct Reply {
    code: u16,
    body: String,
    /// Lines of a watch; the connection then stays open.
    lines: Option<Vec<String>>,
    close: bool,
    /// No answer at all.
    mute: bool,
}

impl Reply {
    pub(crate) fn nothing() -> Self {
        Self { mute: true, ..Self::json(200, &Value::Null) }
    }

    pub(crate) fn json(code: u16, body: &Value) -> Self {
        Self { code, body: body.to_string(), lines: None, close: true, mute: false }
    }

    pub(crate) fn status(code: u16, reason: &str) -> Self {
        let body = json!({"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure",
            "message":format!("scripted {reason}"),"reason":reason,"code":code});
        Self::json(code, &body)
    }

    pub(crate) fn stream(lines: Vec<String>) -> Self {
        Self { code: 200, body: String::new(), lines: Some(lines), close: false, mute: false }
    }

    pub(crate) fn closed(self) -> Self {
        Self { close: true, ..self }
    }
}

pub(crate) struct Server {
    port: u16,
    seen: mpsc::UnboundedReceiver<Request>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (tx, seen) = mpsc::unbounded_channel();
        let answer = Arc::new(answer);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&answer), tx.clone()));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { port, seen, task }
    }

    pub(crate) async fn client(&self) -> Client {
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: t\n\
             clusters: [{{name: t, cluster: {{server: \"http://127.0.0.1:{}\"}}}}]\n\
             contexts: [{{name: t, context: {{cluster: t, user: t}}}}]\n\
             users: [{{name: t, user: {{token: secret}}}}]\n",
            self.port
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), kubeconfig).unwrap();
        Client::new(&Credentials::Kubeconfig(file.path().to_owned())).await.unwrap()
    }

    /// The next request that was made.
    pub(crate) async fn next(&mut self) -> Request {
        tokio::time::timeout(Duration::from_secs(10), self.seen.recv())
            .await
            .expect("a request")
            .expect("open")
    }

    pub(crate) fn try_next(&mut self) -> Option<Request> {
        self.seen.try_recv().ok()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    stream: TcpStream,
    answer: Arc<impl Fn(&Request) -> Reply>,
    seen: mpsc::UnboundedSender<Request>,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let mut words = line.split_whitespace();
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
    let (method, path) = (method.to_owned(), path.trim_end_matches('?').to_owned());
    let mut length = 0;
    loop {
        line.clear();
        stream.read_line(&mut line).await?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let request = Request { method, path, body: String::from_utf8_lossy(&body).into_owned() };
    let reply = answer(&request);
    seen.send(request).ok();
    if reply.mute {
        let mut rest = Vec::new();
        return stream.read_to_end(&mut rest).await.map(drop);
    }
    let head = format!("HTTP/1.1 {} Scripted\r\nContent-Type: application/json\r\n", reply.code);
    let Some(lines) = reply.lines else {
        let rest = format!("Content-Length: {}\r\nConnection: close\r\n\r\n{}", reply.body.len(), reply.body);
        stream.write_all((head + &rest).as_bytes()).await?;
        return stream.shutdown().await;
    };
    stream.write_all((head + "Transfer-Encoding: chunked\r\n\r\n").as_bytes()).await?;
    for line in lines {
        stream.write_all(format!("{:x}\r\n{line}\n\r\n", line.len() + 1).as_bytes()).await?;
    }
    stream.flush().await?;
    if reply.close {
        stream.write_all(b"0\r\n\r\n").await?;
        return stream.shutdown().await;
    }
    // Until the client hangs up.
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.map(drop)
}
