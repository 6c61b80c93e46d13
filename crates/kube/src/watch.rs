//! A list of objects, kept current.
//!
//! [`start`] lists a kind and then watches it, forever, and tells a bounded channel what happened as a sequence
//! of [`Change`]s.
//!
//! Guaranteed:
//! - The first object change is [`Change::Synced`] with the complete list; nothing is told from a half-read list.
//! - After a lost connection the watch resumes where it was. When the server no longer knows that place (410
//!   Gone, or a server whose history is shorter than ours), the complete list comes again as one `Synced`, and
//!   it replaces what was known in one step: objects that did not change never disappear in between.
//! - While the server is away the receiver keeps what it has, and is told so ([`Change::Interrupted`]), and told
//!   when the server answers again ([`Change::Resumed`]). A server that vanished without a word, whose connections
//!   look alive, is noticed within 20 seconds.
//! - Objects are raw JSON: one malformed object neither stops nor delays the others.
//!
//! Not guaranteed: that every intermediate state of an object is seen.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use kube::Api;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, Event, InitialListStrategy, watcher};
use serde_json::Value;
use tokio::sync::mpsc;
use tracing::debug;

use crate::client::Client;
use crate::error::Error;
use crate::raw::{Kind, RawObject};

/// Seconds after which a watch is asked for anew. A connection whose other side vanished without a word is
/// replaced little later; the API servers of a thousand-node cluster see 33 such requests a second.
pub const WATCH_TIMEOUT: u32 = 30;

/// Objects per page of a list. A page is held as text and as values at once, so this bounds the memory peak.
const PAGE_SIZE: u32 = 100;

/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Pause between two questions whether the server is back.
const PING_EVERY: Duration = Duration::from_secs(2);

/// When a watch has told nothing for this long, the server is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(10);

/// What happened to the watched kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Change<T = Value> {
    /// The complete set of objects; replaces all that was known.
    Synced(Vec<T>),
    /// An object was created or changed.
    Applied(T),
    /// An object was deleted; this is its last state.
    Deleted(T),
    /// The server cannot be reached or refuses. What is known stays valid until something else is told.
    Interrupted(String),
    /// The server answers again after an [`Change::Interrupted`].
    Resumed,
}

/// Lists and watches `kind` in all namespaces, until the receiver is dropped. Must be called inside a tokio runtime.
///
/// `buffer` is the number of changes that may wait; a slow receiver slows the watch down and loses nothing.
#[must_use]
pub fn start(client: &Client, kind: Kind, buffer: usize) -> mpsc::Receiver<Change> {
    start_parsed(client, kind, buffer, |value| value)
}

/// The same, with every object turned into something else as soon as it is read: a list of many large objects is never
/// held as JSON.
#[must_use]
pub fn start_parsed<T: Send + 'static>(
    client: &Client,
    kind: Kind,
    buffer: usize,
    parse: impl Fn(Value) -> T + Send + Sync + 'static,
) -> mpsc::Receiver<Change<T>> {
    let (tx, rx) = mpsc::channel(buffer.max(1));
    let client = client.clone();
    tokio::spawn(async move {
        let mut reporter = Reporter { tx, away: false };
        // Each turn starts from a fresh list. `None` says that nobody listens any more.
        while follow(&client, kind, &parse, &mut reporter).await.is_some() {
            debug!(kind = kind.kind, "listing anew");
        }
    });
    rx
}

/// The receiver is gone.
struct Closed;

struct Reporter<T> {
    tx: mpsc::Sender<Change<T>>,
    away: bool,
}

impl<T> Reporter<T> {
    async fn tell(&mut self, change: Change<T>) -> Result<(), Closed> {
        match &change {
            Change::Interrupted(_) => self.away = true,
            Change::Resumed => self.away = false,
            Change::Synced(_) | Change::Applied(_) | Change::Deleted(_) if self.away => {
                self.away = false;
                self.tx.send(Change::Resumed).await.map_err(|_| Closed)?;
            }
            _ => {}
        }
        self.tx.send(change).await.map_err(|_| Closed)
    }
}

/// One life of a watcher. Returns `Some` when a new list is needed, `None` when the receiver is gone.
async fn follow<T>(
    client: &Client,
    kind: Kind,
    parse: &(impl Fn(Value) -> T + Sync),
    reporter: &mut Reporter<T>,
) -> Option<()> {
    let api: Api<RawObject> = Api::all_with(client.inner().clone(), &kind.api_resource());
    let config = watcher::Config {
        timeout: Some(WATCH_TIMEOUT),
        page_size: Some(PAGE_SIZE),
        initial_list_strategy: InitialListStrategy::ListWatch,
        ..watcher::Config::default()
    };
    let mut stream = pin!(watcher(api, config));
    let mut backoff = DefaultBackoff::default();
    let mut listed = Vec::new();
    loop {
        let tx = reporter.tx.clone();
        let item = tokio::select! {
            () = tx.closed() => return None,
            item = stream.next() => item?,
            () = until_back(client), if reporter.away => {
                reporter.tell(Change::Resumed).await.ok()?;
                continue;
            }
            why = until_silent(client), if !reporter.away => {
                reporter.tell(Change::Interrupted(format!("watching {}: {why}", kind.plural))).await.ok()?;
                continue;
            }
        };
        let told = match item {
            // A list that failed half-way starts over, and so does what was read of it.
            Ok(Event::Init) => {
                listed = Vec::new();
                continue;
            }
            Ok(Event::InitApply(object)) => {
                listed.push(parse(object.into_value()));
                continue;
            }
            Ok(Event::InitDone) => reporter.tell(Change::Synced(std::mem::take(&mut listed))).await,
            Ok(Event::Apply(object)) => reporter.tell(Change::Applied(parse(object.into_value()))).await,
            Ok(Event::Delete(object)) => reporter.tell(Change::Deleted(parse(object.into_value()))).await,
            Err(error) => {
                if is_gone(&error) {
                    return Some(());
                }
                reporter.tell(Change::Interrupted(describe(kind, &error))).await.ok()?;
                let pause = backoff.next().unwrap_or(LONGEST_PAUSE).min(LONGEST_PAUSE);
                tokio::select! {
                    () = reporter.tx.closed() => return None,
                    () = tokio::time::sleep(pause) => continue,
                }
            }
        };
        told.ok()?;
        backoff.reset();
    }
}

/// Ends when the server does not answer twice in a row. Whatever it answers, it is there.
async fn until_silent(client: &Client) -> Error {
    loop {
        tokio::time::sleep(SILENCE).await;
        let first = client.ping().await;
        if first.as_ref().is_ok() || first.as_ref().is_err_and(is_answer) {
            continue;
        }
        match client.ping().await {
            Ok(()) => {}
            Err(error) if is_answer(&error) => {}
            Err(error) => return error,
        }
    }
}

fn is_answer(error: &Error) -> bool {
    matches!(error, Error::Request { source, .. } if matches!(**source, kube::Error::Api(_)))
}

async fn until_back(client: &Client) {
    loop {
        tokio::time::sleep(PING_EVERY).await;
        if client.ping().await.is_ok() {
            return;
        }
    }
}

/// Whether the server refuses the place from which we want to go on: 410 as an HTTP status when the watch
/// starts (inside the stream the watcher lists anew by itself), or a resourceVersion that is ahead of the
/// server's, as after a restore from a backup.
fn is_gone(error: &watcher::Error) -> bool {
    let status = match error {
        watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status,
        _ => return false,
    };
    status.code == 410
        || status
            .details
            .as_ref()
            .is_some_and(|d| d.causes.iter().any(|c| c.reason == "ResourceVersionTooLarge"))
}

fn describe(kind: Kind, error: &watcher::Error) -> String {
    let mut text = format!("watching {}: {error}", kind.plural);
    // The chain of causes ends in what a person can act upon ("connection refused").
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use serde_json::json;

    use super::*;
    use crate::testserver::{Reply, Request, Server};

    fn node(name: &str, version: u32) -> Value {
        json!({"apiVersion":"v1","kind":"Node","metadata":{"name":name,"resourceVersion":version.to_string()}})
    }

    fn list(version: u32, items: &[Value]) -> Reply {
        let body = json!({"apiVersion":"v1","kind":"NodeList",
            "metadata":{"resourceVersion":version.to_string()},"items":items});
        Reply::json(200, &body)
    }

    fn event(what: &str, object: &Value) -> String {
        json!({"type":what,"object":object}).to_string()
    }

    fn gone() -> Value {
        json!({"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Expired","code":410,
            "message":"too old resource version"})
    }

    async fn next(rx: &mut mpsc::Receiver<Change>) -> Change {
        tokio::time::timeout(Duration::from_secs(20), rx.recv())
            .await
            .expect("a change in time")
            .expect("open")
    }

    /// Answers lists with `lists` (the last one again and again), watches with `watches`, then holds them open.
    async fn scripted(lists: Vec<Reply>, watches: Vec<Reply>) -> Server {
        let (list_at, watch_at) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Server::start(move |request: &Request| {
            if request.path.starts_with("/version") {
                return Reply::json(200, &json!({}));
            }
            if request.path.contains("watch=true") {
                let at = watch_at.fetch_add(1, Ordering::SeqCst);
                return watches.get(at).cloned().unwrap_or_else(|| Reply::stream(vec![]));
            }
            let at = list_at.fetch_add(1, Ordering::SeqCst).min(lists.len() - 1);
            lists[at].clone()
        })
        .await
    }

    #[tokio::test]
    async fn a_malformed_object_does_not_stop_the_others() {
        let broken = json!({"metadata":{"name":"broken","resourceVersion":"2","labels":"oops"},"spec":7});
        let lists = vec![list(5, &[node("a", 1), broken.clone(), node("b", 3)])];
        let mut worse = broken.clone();
        worse["metadata"]["resourceVersion"] = json!("6");
        let stream = vec![
            event("MODIFIED", &worse),
            event("ADDED", &node("c", 7)),
            event("BOOKMARK", &node("", 8)),
            event("DELETED", &node("a", 9)),
        ];
        let server = scripted(lists, vec![Reply::stream(stream)]).await;
        let mut rx = start(&server.client().await, Kind::NODE, 8);
        assert_eq!(next(&mut rx).await, Change::Synced(vec![node("a", 1), broken, node("b", 3)]));
        assert_eq!(next(&mut rx).await, Change::Applied(worse));
        assert_eq!(next(&mut rx).await, Change::Applied(node("c", 7)));
        assert_eq!(next(&mut rx).await, Change::Deleted(node("a", 9)));
    }

    #[tokio::test]
    async fn gone_in_the_stream_or_at_its_start_lists_anew() {
        for refused in [Reply::stream(vec![event("ERROR", &gone())]), Reply::json(410, &gone())] {
            let lists = vec![list(5, &[node("a", 1)]), list(9, &[node("a", 1), node("b", 8)])];
            let server = scripted(lists, vec![refused]).await;
            let mut rx = start(&server.client().await, Kind::NODE, 8);
            assert_eq!(next(&mut rx).await, Change::Synced(vec![node("a", 1)]));
            let mut change = next(&mut rx).await;
            while matches!(change, Change::Interrupted(_) | Change::Resumed) {
                change = next(&mut rx).await;
            }
            assert_eq!(change, Change::Synced(vec![node("a", 1), node("b", 8)]));
        }
    }

    #[tokio::test]
    async fn a_server_with_a_shorter_history_is_listed_anew() {
        let ahead = json!({"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Timeout","code":504,
            "message":"Too large resource version: 5, current: 2",
            "details":{"causes":[{"reason":"ResourceVersionTooLarge","message":"Too large resource version"}]}});
        let lists = vec![list(5, &[node("a", 1)]), list(2, &[node("b", 2)])];
        let server = scripted(lists, vec![Reply::json(504, &ahead)]).await;
        let mut rx = start(&server.client().await, Kind::NODE, 8);
        assert_eq!(next(&mut rx).await, Change::Synced(vec![node("a", 1)]));
        assert_eq!(next(&mut rx).await, Change::Synced(vec![node("b", 2)]));
    }

    #[tokio::test]
    async fn an_outage_is_told_and_the_watch_resumes_where_it_was() {
        let lists = vec![list(5, &[node("a", 1)])];
        let watches = vec![
            Reply::stream(vec![event("ADDED", &node("b", 6))]).closed(),
            Reply::status(503, "ServiceUnavailable"),
            Reply::stream(vec![event("ADDED", &node("c", 7))]),
        ];
        let mut server = scripted(lists, watches).await;
        let mut rx = start(&server.client().await, Kind::NODE, 8);
        assert_eq!(next(&mut rx).await, Change::Synced(vec![node("a", 1)]));
        assert_eq!(next(&mut rx).await, Change::Applied(node("b", 6)));
        let Change::Interrupted(why) = next(&mut rx).await else { panic!("the outage must be told") };
        assert!(why.contains("watching nodes") && why.contains("ServiceUnavailable"), "{why}");
        assert_eq!(next(&mut rx).await, Change::Resumed);
        assert_eq!(next(&mut rx).await, Change::Applied(node("c", 7)));
        let mut watched_from = Vec::new();
        while let Some(request) = server.try_next() {
            if request.path.contains("watch=true") {
                let at = request.path.split("resourceVersion=").nth(1).unwrap_or("").split('&').next();
                watched_from.push(at.unwrap_or("").to_owned());
            }
        }
        assert_eq!(watched_from, ["5", "6", "6"]);
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_noticed_and_told_when_it_speaks_again() {
        let silent = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let (flag, pings) = (std::sync::Arc::clone(&silent), std::sync::Arc::new(AtomicUsize::new(0)));
        let counter = std::sync::Arc::clone(&pings);
        let server = Server::start(move |request: &Request| {
            if request.path.starts_with("/version") {
                counter.fetch_add(1, Ordering::SeqCst);
                // An answer that never comes: the connection stays open.
                return if flag.load(Ordering::SeqCst) {
                    Reply::nothing()
                } else {
                    Reply::json(200, &json!({}))
                };
            }
            if request.path.contains("watch=true") { Reply::stream(vec![]) } else { list(5, &[]) }
        })
        .await;
        let mut rx = start(&server.client().await, Kind::NODE, 8);
        assert_eq!(next(&mut rx).await, Change::Synced(vec![]));
        let begun = std::time::Instant::now();
        let Change::Interrupted(why) = next(&mut rx).await else { panic!("the silence must be told") };
        assert!(why.contains("has not answered for 4 s"), "{why}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        assert_eq!(pings.load(Ordering::SeqCst), 2);
        silent.store(false, Ordering::SeqCst);
        assert_eq!(next(&mut rx).await, Change::Resumed);
    }

    fn alive_tasks() -> usize {
        tokio::runtime::Handle::current().metrics().num_alive_tasks()
    }

    #[tokio::test]
    async fn the_task_ends_with_its_receiver() {
        let server = scripted(vec![list(5, &[])], vec![]).await;
        let client = server.client().await;
        let before = alive_tasks();
        let rx = start(&client, Kind::NODE, 1);
        assert!(alive_tasks() > before);
        drop(rx);
        tokio::time::timeout(Duration::from_secs(5), async {
            while alive_tasks() > before {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .expect("the watching task ends");
    }
}
