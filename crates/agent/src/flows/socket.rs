//! The way to the history: a socket that only root can reach answers one question per connection, a line for each
//! flow. The lines are those of [`podway_flows::query`].

use std::io::{self, BufRead, BufReader, BufWriter, Read as _, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use podway_flows::flow::LossCause;
use podway_flows::{Answer, Entry, Filter, Flow, Loss, Query};
use tracing::debug;

use super::Flows;
use crate::attach::lock;
use crate::clock;

/// Name of the socket in the run directory.
pub const SOCKET: &str = "flows.sock";
/// Connections that are answered at the same time.
const READERS: usize = 16;
/// How long a question may take to come, and a line to be taken.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest question.
const QUESTION_MAX: u64 = 64 << 10;
/// Entries that are taken from the history at once.
const CHUNK: usize = 256;
/// How often it is looked whether a reader that follows is still there.
const LOOK: Duration = Duration::from_secs(1);

/// Listens, and answers until the process ends.
///
/// # Errors
/// The socket cannot be made.
pub(super) fn start(path: &Path, flows: &Arc<Flows>) -> io::Result<()> {
    // Only the agent that has the run directory's lock gets here.
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let flows = Arc::clone(flows);
    std::thread::Builder::new().name("podway-flow-ask".into()).stack_size(256 << 10).spawn(move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => take(&flows, stream),
                Err(error) => {
                    debug!(%error, "cannot take a connection that asks for flows");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    })?;
    Ok(())
}

fn take(flows: &Arc<Flows>, stream: UnixStream) {
    let busy = flows.readers.fetch_add(1, Ordering::SeqCst) >= READERS;
    let own = Arc::clone(flows);
    let answer = move || {
        let result = if busy {
            refuse(&stream, format!("{READERS} readers are being answered; end one of them"))
        } else {
            serve(&own, &stream)
        };
        if let Err(error) = result {
            debug!(%error, "somebody who asked for flows went away");
        }
        own.readers.fetch_sub(1, Ordering::SeqCst);
    };
    let started =
        std::thread::Builder::new().name("podway-flow-out".into()).stack_size(512 << 10).spawn(answer);
    if let Err(error) = started {
        flows.readers.fetch_sub(1, Ordering::SeqCst);
        debug!(%error, "no thread for somebody who asks for flows");
    }
}

fn refuse(mut stream: &UnixStream, why: String) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    write_line(&mut stream, &Answer::Error(why))
}

fn serve(flows: &Flows, stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(QUESTION_MAX)).read_line(&mut line)?;
    let query: Query = match serde_json::from_str(&line) {
        Ok(query) => query,
        Err(error) => return refuse(stream, format!("the question makes no sense: {error}")),
    };
    let filter = match Filter::parse(&query.filter) {
        Ok(filter) => filter,
        Err(error) => return refuse(stream, error.to_string()),
    };
    let mut out = BufWriter::with_capacity(32 << 10, stream);
    let (mut at, end) = range(flows, &query, &filter);
    let mut reading = Reading { flows, filter: &filter, since: query.since };
    while at < end {
        at = reading.some(at, end, &mut out)?;
    }
    write_line(&mut out, &Answer::Done(flows.summary()))?;
    out.flush()?;
    if !query.follow {
        return Ok(());
    }
    // What follows is new.
    reading.since = None;
    let mut looked = Instant::now();
    while !flows.stopping.load(Ordering::SeqCst) {
        let next = reading.some(at, u64::MAX, &mut out)?;
        if next == at {
            out.flush()?;
            let history = lock(&flows.history);
            if history.next() == at {
                drop(flows.more.wait_timeout(history, LOOK));
            }
        }
        at = next;
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            if is_gone(stream)? {
                return Ok(());
            }
        }
    }
    out.flush()
}

/// Numbers of the entries that a question about the past is about: the first, and the one after the last.
fn range(flows: &Flows, query: &Query, filter: &Filter) -> (u64, u64) {
    let history = lock(&flows.history);
    let end = history.next();
    let Some(wanted) = query.last else { return (history.first(), end) };
    let mut first = end;
    let mut left = wanted;
    for (number, entry) in history.newest_first() {
        if left == 0 {
            break;
        }
        match entry {
            Entry::Record(record) if filter.matches(record) => {
                left -= 1;
                first = number;
            }
            _ => {}
        }
    }
    (first, end)
}

struct Reading<'a> {
    flows: &'a Flows,
    filter: &'a Filter,
    since: Option<i64>,
}

impl Reading<'_> {
    /// Writes what fits of the next entries; says from where to go on.
    fn some(&self, from: u64, end: u64, out: &mut impl Write) -> io::Result<u64> {
        let most = usize::try_from(end - from).unwrap_or(usize::MAX).min(CHUNK);
        let mut next = from;
        let (missed, chunk) = {
            let history = lock(&self.flows.history);
            let (missed, entries) = history.read(from, most);
            let mut chunk = Vec::new();
            for (number, entry) in entries {
                next = number + 1;
                let wanted = match entry {
                    Entry::Record(record) => self.filter.matches(record),
                    Entry::Lost(..) => true,
                };
                if wanted && self.since.is_none_or(|since| entry.time() >= since) {
                    chunk.push(entry.clone());
                }
            }
            (missed, chunk)
        };
        if missed > 0 {
            self.flows.missed.fetch_add(missed, Ordering::Relaxed);
            self.lost(clock::unix_ns(), missed, LossCause::ReaderTooSlow, out)?;
        }
        for entry in chunk {
            match entry {
                Entry::Record(record) => {
                    write_line(out, &Answer::Flow(Box::new(Flow::of(&record, &self.flows.node))))?;
                }
                Entry::Lost(time, events) => self.lost(time, events, LossCause::RingBufferFull, out)?,
            }
        }
        Ok(next)
    }

    fn lost(&self, time: i64, events: u64, cause: LossCause, out: &mut impl Write) -> io::Result<()> {
        let time = podway_flows::flow::rfc3339(time);
        write_line(out, &Answer::Lost(Loss { time, node: self.flows.node.clone(), events, cause }))
    }
}

fn write_line(out: &mut impl Write, answer: &Answer) -> io::Result<()> {
    serde_json::to_writer(&mut *out, answer)?;
    out.write_all(b"\n")
}

/// Whether the other side has closed. It says nothing after its question, so that anything to be read is the end.
fn is_gone(stream: &UnixStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

/// Why there is no answer, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("no agent tells flows at {0}: {1}")]
    NoAgent(String, io::Error),
    /// The agent has no answer to this question.
    #[error("{0}")]
    Refused(String),
    /// The agent has ended, or the connection broke.
    #[error("the agent at {0} has ended{1}")]
    Ended(String, String),
}

/// Asks the agent whose run directory this is, and hands over its lines until there are no more or `each` says that it
/// has enough (`false`).
///
/// # Errors
/// No agent answers, it has no answer, or it went away in the middle.
pub fn ask(run_dir: &Path, query: &Query, mut each: impl FnMut(Answer) -> bool) -> Result<(), AskError> {
    let path = run_dir.join(SOCKET);
    let place = path.display().to_string();
    let ended = |why: &dyn std::fmt::Display| AskError::Ended(place.clone(), format!(": {why}"));
    let mut stream = UnixStream::connect(&path).map_err(|e| AskError::NoAgent(place.clone(), e))?;
    let mut question = serde_json::to_vec(query).map_err(|e| AskError::Refused(e.to_string()))?;
    question.push(b'\n');
    stream.write_all(&question).map_err(|e| ended(&e))?;
    let mut done = false;
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(|e| ended(&e))?;
        let answer: Answer = serde_json::from_str(&line)
            .map_err(|e| AskError::Refused(format!("the agent's answer is not understood: {e}")))?;
        match answer {
            Answer::Error(why) => return Err(AskError::Refused(why)),
            answer => {
                done |= matches!(answer, Answer::Done(_));
                if !each(answer) {
                    return Ok(());
                }
            }
        }
    }
    if done && !query.follow { Ok(()) } else { Err(AskError::Ended(place, String::new())) }
}
