//! How services are, for people: a socket that only root can reach answers one question per connection, in JSON.
//!
//! The question is one line: `services`, or `services NAMESPACE/NAME`. The answer is a JSON object and the end of the
//! stream; `{"error": "…"}` when there is none.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::time::Duration;

use serde_json::{Value, json};
use tracing::{debug, warn};

use super::feed::Input;

/// Name of the socket in the run directory.
pub const SOCKET: &str = "services.sock";
/// How long one side waits for the other.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest question: the verb, a namespace, a name.
const QUESTION_MAX: u64 = 600;

/// A question, and where the answer goes.
#[derive(Debug)]
pub(super) struct Question {
    /// One Service, or all.
    pub(super) service: Option<(String, String)>,
    pub(super) answer: SyncSender<Value>,
}

/// Listens, and answers until the process ends. Connections are served one after the other.
///
/// # Errors
/// The socket cannot be made.
pub(super) fn start(path: &Path, queue: SyncSender<Input>) -> io::Result<()> {
    // Only the agent that has the run directory's lock gets here.
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    std::thread::Builder::new().name("podway-query".into()).stack_size(256 << 10).spawn(move || {
        for stream in listener.incoming() {
            match stream.and_then(|stream| serve(stream, &queue)) {
                Ok(()) => {}
                Err(error) => debug!(%error, "a question about services was not answered"),
            }
        }
    })?;
    Ok(())
}

fn serve(mut stream: UnixStream, queue: &SyncSender<Input>) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new((&stream).take(QUESTION_MAX)).read_line(&mut line)?;
    let answer = match read(line.trim_end()) {
        Err(why) => json!({"error": why}),
        Ok(service) => {
            let (answer, answered) = mpsc::sync_channel(1);
            match queue.try_send(Input::Question(Question { service, answer })) {
                Ok(()) => answered
                    .recv_timeout(PATIENCE)
                    .unwrap_or_else(|_| json!({"error": "the agent is busy with services; ask again"})),
                Err(TrySendError::Full(_)) => json!({"error": "the agent is busy with services; ask again"}),
                Err(TrySendError::Disconnected(_)) => {
                    warn!("nobody looks after services");
                    json!({"error": "the agent does not look after services"})
                }
            }
        }
    };
    stream.write_all(answer.to_string().as_bytes())
}

fn read(line: &str) -> Result<Option<(String, String)>, String> {
    let mut words = line.split(' ');
    match (words.next(), words.next(), words.next()) {
        (Some("services"), None, _) => Ok(None),
        (Some("services"), Some(name), None) => name
            .split_once('/')
            .map(|(namespace, name)| Some((namespace.to_owned(), name.to_owned())))
            .ok_or_else(|| format!("{name:?} is not NAMESPACE/NAME")),
        _ => Err(format!("{line:?} is no question; there are: services, services NAMESPACE/NAME")),
    }
}

/// Asks the agent whose run directory this is about all services, or one by namespace and name.
///
/// # Errors
/// No agent answers, or it has no answer; the text says which and why.
pub fn ask(run_dir: &Path, service: Option<(&str, &str)>) -> Result<Value, String> {
    let path = run_dir.join(SOCKET);
    let ask = || -> io::Result<String> {
        let mut stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(PATIENCE * 2))?;
        let question = match service {
            None => "services\n".to_owned(),
            Some((namespace, name)) => format!("services {namespace}/{name}\n"),
        };
        stream.write_all(question.as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    let text = ask().map_err(|e| format!("no agent answers at {}: {e}", path.display()))?;
    let value: Value =
        serde_json::from_str(&text).map_err(|e| format!("the agent's answer is not JSON: {e}"))?;
    match value.get("error").and_then(Value::as_str) {
        Some(why) => Err(why.to_owned()),
        None => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_answered_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (queue, inputs) = mpsc::sync_channel(4);
        start(&dir.path().join(SOCKET), queue).unwrap();
        let answering = std::thread::spawn(move || {
            for _ in 0..2 {
                let Ok(Input::Question(question)) = inputs.recv() else { panic!("no question") };
                question.answer.send(json!({"asked": question.service})).unwrap();
            }
        });
        assert_eq!(ask(dir.path(), None).unwrap()["asked"], Value::Null);
        assert_eq!(ask(dir.path(), Some(("a", "b"))).unwrap()["asked"], json!(["a", "b"]));
        answering.join().unwrap();
        assert!(ask(dir.path(), None).unwrap_err().contains("does not look after services"));
        assert!(ask(Path::new("/nonexistent"), None).unwrap_err().contains("no agent answers"));
        for (line, part) in
            [("x", "no question"), ("services a", "NAMESPACE/NAME"), ("services a/b c", "no question")]
        {
            assert!(read(line).unwrap_err().contains(part), "{line}");
        }
    }
}
