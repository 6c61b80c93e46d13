//! As much of the Container Runtime Interface (`runtime.v1`, k8s.io/cri-api) as a pod needs: gRPC through curl, and the
//! messages as what they are on the wire (protobuf encoding: a field's number and type, then its value).

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::image::IMAGE;
use crate::lab::text;

/// A client of a runtime's socket.
pub(super) struct Cri {
    socket: PathBuf,
}

/// A message on its way.
#[derive(Default, Clone)]
pub(super) struct Message(Vec<u8>);

/// A port of the node that leads to a port of the pod.
pub(super) struct Port {
    pub(super) host: u16,
    pub(super) container: u16,
}

impl Message {
    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn text(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    fn message(self, field: u64, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }

    fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// The fields of a message: number, and the value of those that have a length, or the number.
fn fields(mut rest: &[u8]) -> Vec<(u64, Vec<u8>, u64)> {
    let mut found = Vec::new();
    let varint = |rest: &mut &[u8]| {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, tail) = rest.split_first().expect("a complete message");
            *rest = tail;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        value
    };
    while !rest.is_empty() {
        let key = varint(&mut rest);
        let value = varint(&mut rest);
        match key & 7 {
            0 => found.push((key >> 3, Vec::new(), value)),
            2 => {
                let (bytes, tail) = rest.split_at(usize::try_from(value).unwrap());
                found.push((key >> 3, bytes.to_vec(), 0));
                rest = tail;
            }
            other => panic!("wire type {other} in a CRI message"),
        }
    }
    found
}

fn text_of(message: &[u8], field: u64) -> String {
    let found = fields(message).into_iter().find(|(number, ..)| *number == field);
    String::from_utf8(found.map(|(_, bytes, _)| bytes).unwrap_or_default()).unwrap()
}

impl Cri {
    pub(super) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// A call of `RuntimeService`; the error is the runtime's message.
    fn call(&self, method: &str, request: &Message) -> Result<Vec<u8>, String> {
        let mut frame = vec![0];
        frame.extend_from_slice(&u32::try_from(request.0.len()).unwrap().to_be_bytes());
        frame.extend_from_slice(&request.0);
        let directory = tempfile::tempdir().unwrap();
        let (headers, body) = (directory.path().join("headers"), directory.path().join("body"));
        let mut curl = Command::new("curl")
            .args([
                "-sS",
                "--max-time",
                "60",
                "--http2-prior-knowledge",
                "-H",
                "content-type: application/grpc",
            ])
            .args(["-H", "te: trailers", "--data-binary", "@-", "--unix-socket"])
            .arg(&self.socket)
            .arg("-D")
            .arg(&headers)
            .arg("-o")
            .arg(&body)
            .arg(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        curl.stdin.take().unwrap().write_all(&frame).unwrap();
        let output = curl.wait_with_output().unwrap();
        assert!(output.status.success(), "{method}: {}", text(&output));
        let headers = fs::read_to_string(headers).unwrap();
        let header =
            |name: &str| headers.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim();
        if header("grpc-status:") != "0" {
            return Err(format!("{method}: {}", header("grpc-message:")));
        }
        let body = fs::read(body).unwrap_or_default();
        Ok(body.get(5..).unwrap_or_default().to_vec())
    }

    /// Whether it serves.
    pub(super) fn is_up(&self) -> bool {
        self.socket.exists() && self.call("Version", &Message::default()).is_ok()
    }

    /// Runs a pod's sandbox; returns its id and the request that its containers repeat.
    pub(super) fn run_sandbox(
        &self,
        name: &str,
        ports: &[Port],
        annotations: &[(&str, &str)],
    ) -> Result<(String, Message), String> {
        let metadata = Message::default().text(1, name).text(2, &format!("uid-{name}")).text(3, "default");
        let mut config = Message::default().message(1, &metadata);
        for port in ports {
            // Protocol 0 is TCP and, like all defaults, not written.
            let port = Message::default().number(2, port.container.into()).number(3, port.host.into());
            config = config.message(5, &port);
        }
        for (key, value) in annotations {
            config = config.message(7, &Message::default().text(1, key).text(2, value));
        }
        // `linux`, which this runtime wants to be there.
        config = config.message(8, &Message::default());
        let answer = self.call("RunPodSandbox", &Message::default().message(1, &config))?;
        Ok((text_of(&answer, 1), config))
    }

    /// Runs a container in a sandbox; returns its id.
    pub(super) fn run_container(&self, sandbox: &(String, Message), shell: &str) -> String {
        let config = Message::default()
            .message(1, &Message::default().text(1, "main"))
            .message(2, &Message::default().text(1, IMAGE))
            .text(3, "/bin/sh")
            .text(3, "-c")
            .text(3, shell)
            .message(15, &Message::default());
        let request = Message::default().text(1, &sandbox.0).message(2, &config).message(3, &sandbox.1);
        let id = text_of(&self.call("CreateContainer", &request).unwrap(), 1);
        self.call("StartContainer", &Message::default().text(1, &id)).unwrap();
        id
    }

    /// A command in a container: its exit code and output.
    pub(super) fn exec(&self, container: &str, command: &[&str]) -> (u64, String) {
        let mut request = Message::default().text(1, container);
        for word in command {
            request = request.text(2, word);
        }
        let answer = self.call("ExecSync", &request.number(3, 20)).unwrap();
        let code = fields(&answer).iter().find(|(number, ..)| *number == 3).map_or(0, |(.., code)| *code);
        (code, text_of(&answer, 1) + &text_of(&answer, 2))
    }

    /// Stops and removes a sandbox with its containers.
    pub(super) fn remove_sandbox(&self, id: &str) -> Result<(), String> {
        let request = Message::default().text(1, id);
        self.call("StopPodSandbox", &request)?;
        self.call("RemovePodSandbox", &request).map(drop)
    }

    /// Ids of all sandboxes.
    pub(super) fn sandboxes(&self) -> Vec<String> {
        let Ok(answer) = self.call("ListPodSandbox", &Message::default()) else { return Vec::new() };
        fields(&answer)
            .iter()
            .filter(|(number, ..)| *number == 1)
            .map(|(_, item, _)| text_of(item, 1))
            .collect()
    }
}
