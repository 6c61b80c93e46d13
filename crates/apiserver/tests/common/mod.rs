//! A served store and a small blocking HTTP client, so that tests see the bytes that any client sees.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::print_stdout, reason = "a skipped test says so")]

pub mod kubectl;

use podway_apiserver::{BearerToken, Store, StoreConfig, serve};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;

/// A served store; ends with the value.
pub struct Server {
    pub store: Arc<Store>,
    pub address: SocketAddr,
    _runtime: Runtime,
}

impl Server {
    pub fn start(config: StoreConfig, auth: Option<BearerToken>) -> Self {
        let store = Arc::new(Store::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(serve(listener, Arc::clone(&store), auth));
        Self { store, address, _runtime: runtime }
    }

    /// Sends a request and returns status and body.
    pub fn call(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, Value) {
        let (status, mut reader) = self.open(method, path, headers, body);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub fn get(&self, path: &str) -> (u16, Value) {
        self.call("GET", path, &[], "")
    }

    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.call("POST", path, &[("Content-Type", "application/json")], &body.to_string())
    }

    /// Opens a stream of JSON lines.
    pub fn watch(&self, path: &str, headers: &[(&str, &str)]) -> Lines {
        let (status, reader) = self.open("GET", path, headers, "");
        assert_eq!(status, 200, "{path}");
        Lines(BufReader::new(reader))
    }

    fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> (u16, Box<dyn Read + Send>) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
        stream.write_all(request.as_bytes()).unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        let mut chunked = false;
        loop {
            line.clear();
            reader.read_line(&mut line).unwrap();
            if line.trim().is_empty() {
                break;
            }
            chunked |= line.to_lowercase().trim() == "transfer-encoding: chunked";
        }
        (status, if chunked { Box::new(Chunks { reader, left: 0 }) } else { Box::new(reader) })
    }
}

/// The content of a chunked body.
struct Chunks {
    reader: BufReader<TcpStream>,
    left: usize,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            let mut line = String::new();
            while line.trim().is_empty() {
                line.clear();
                if self.reader.read_line(&mut line)? == 0 {
                    return Ok(0);
                }
            }
            self.left = usize::from_str_radix(line.trim(), 16).unwrap();
            if self.left == 0 {
                return Ok(0);
            }
        }
        let most = buffer.len().min(self.left);
        let read = self.reader.read(&mut buffer[..most])?;
        self.left -= read;
        Ok(read)
    }
}

/// Events of a watch; ends with the stream.
pub struct Lines(BufReader<Box<dyn Read + Send>>);

impl Iterator for Lines {
    type Item = Value;

    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }
}

/// A recorded answer of a real API server, or `None` with a message if there are no records here.
pub fn recorded(name: &str) -> Option<String> {
    let base = std::env::var_os("PODWAY_CASES").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/cases")),
        PathBuf::from,
    );
    let path = base.join("kube-api").join(name);
    let text = std::fs::read_to_string(&path).ok();
    if text.is_none() {
        println!("skipped: {} is not here (set PODWAY_CASES)", path.display());
    }
    text
}
