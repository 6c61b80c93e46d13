//! Kubernetes Events, written behind the caller's back.
//!
//! [`EventWriter::record`] never blocks and never fails: it hands the event to a task, which writes it as a
//! core/v1 Event. The same occurrence again (equal [`Event::key`] for the same object and reason) does not make a
//! second object but raises `count` and `lastTimestamp` of the first, at most once every [`REPEAT_EVERY`].
//!
//! Limits: [`QUEUE`] events wait for the task, [`REMEMBERED`] occurrences are remembered. What does not fit, and
//! what the server refuses [`ATTEMPTS`] times, is logged and counted ([`EventWriter::lost`]), not kept: an event
//! is a message to people, and the state it speaks of is in the metrics as well.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event as ApiEvent, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::client::Client;

/// Events that may wait for the writer.
pub const QUEUE: usize = 128;
/// Occurrences whose repetition is recognised.
pub const REMEMBERED: usize = 256;
/// Attempts to write one event.
pub const ATTEMPTS: u32 = 6;
/// Repetitions of one occurrence are written at most this often.
pub const REPEAT_EVERY: Duration = Duration::from_secs(10);

/// First pause after a failed attempt; doubles from there.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// How often repetitions that were held back are looked at.
const TICK: Duration = Duration::from_secs(5);

/// Whether an event calls for a person.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Something is as it should be (again).
    Normal,
    /// Something needs attention.
    Warning,
}

/// The object that an event is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    /// `v1`, `apps/v1`, …
    pub api_version: String,
    /// Kind of the object.
    pub kind: String,
    /// Namespace; `None` for cluster-scoped objects, whose events live in `default`.
    pub namespace: Option<String>,
    /// Name of the object.
    pub name: String,
    /// UID; empty when not known. `kubectl describe` finds events by it.
    pub uid: String,
}

impl Subject {
    /// An object of core/v1 in a namespace.
    #[must_use]
    pub fn namespaced(kind: &str, namespace: &str, name: &str, uid: &str) -> Self {
        Self {
            api_version: "v1".into(),
            kind: kind.to_owned(),
            namespace: Some(namespace.to_owned()),
            name: name.to_owned(),
            uid: uid.to_owned(),
        }
    }

    /// A Node.
    #[must_use]
    pub fn node(name: &str, uid: &str) -> Self {
        Self {
            api_version: "v1".into(),
            kind: "Node".into(),
            namespace: None,
            name: name.to_owned(),
            uid: uid.to_owned(),
        }
    }
}

/// Something worth telling the people who look at an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What it is about.
    pub subject: Subject,
    /// Normal or Warning.
    pub severity: Severity,
    /// One CamelCase word.
    pub reason: &'static str,
    /// What happened, what was expected and what to do.
    pub message: String,
    /// Tells occurrences of the same reason on the same object apart (for example the other node's name).
    pub key: String,
}

/// Hands events to the task that writes them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EventWriter {
    tx: mpsc::Sender<Event>,
    lost: Arc<AtomicU64>,
}

impl EventWriter {
    /// Starts the writing task. Must be called inside a tokio runtime; the task ends when the last handle is gone.
    ///
    /// `component` and `instance` (usually the node's name) say who reports.
    #[must_use]
    pub fn start(client: &Client, component: &str, instance: &str) -> Self {
        Self::start_paced(client, component, instance, REPEAT_EVERY, TICK)
    }

    fn start_paced(
        client: &Client,
        component: &str,
        instance: &str,
        repeat_every: Duration,
        tick: Duration,
    ) -> Self {
        let (tx, rx) = mpsc::channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let writer = Writer {
            client: client.inner().clone(),
            component: component.to_owned(),
            instance: instance.to_owned(),
            known: BTreeMap::new(),
            lost: Arc::clone(&lost),
            repeat_every,
        };
        tokio::spawn(writer.run(rx, tick));
        Self { tx, lost }
    }

    /// Queues an event. Never blocks; callable from any thread.
    pub fn record(&self, event: Event) {
        if let Err(error) = self.tx.try_send(event) {
            self.lost.fetch_add(1, Ordering::Relaxed);
            let (mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) = error;
            warn!(reason = event.reason, message = event.message, "event not written: too many wait already");
        }
    }

    /// Events that were given up since the start.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

type Key = (Subject, &'static str, String);

struct Known {
    object: String,
    namespace: String,
    count: i32,
    written: Instant,
    /// A repetition that waits for its turn.
    held: Option<Event>,
}

struct Writer {
    client: kube::Client,
    component: String,
    instance: String,
    known: BTreeMap<Key, Known>,
    lost: Arc<AtomicU64>,
    repeat_every: Duration,
}

impl Writer {
    async fn run(mut self, mut rx: mpsc::Receiver<Event>, tick: Duration) {
        let mut tick = tokio::time::interval(tick);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = rx.recv() => match event {
                    Some(event) => self.take(event).await,
                    None => return,
                },
                _ = tick.tick() => self.write_held().await,
            }
        }
    }

    async fn take(&mut self, event: Event) {
        let key = (event.subject.clone(), event.reason, event.key.clone());
        if let Some(known) = self.known.get_mut(&key) {
            known.count = known.count.saturating_add(1);
            if known.written.elapsed() < self.repeat_every {
                known.held = Some(event);
                return;
            }
            self.repeat(key, event).await;
            return;
        }
        self.create(key, event).await;
    }

    async fn write_held(&mut self) {
        let due: Vec<Key> = self
            .known
            .iter()
            .filter(|(_, k)| k.held.is_some() && k.written.elapsed() >= self.repeat_every)
            .map(|(key, _)| key.clone())
            .collect();
        for key in due {
            if let Some(event) = self.known.get_mut(&key).and_then(|k| k.held.take()) {
                self.repeat(key, event).await;
            }
        }
    }

    async fn create(&mut self, key: Key, event: Event) {
        let now = now();
        let namespace = event.subject.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let object = object_name(&event.subject.name, now.0);
        let api: Api<ApiEvent> = Api::namespaced(self.client.clone(), &namespace);
        let body = self.body(&event, &object, &namespace, &now);
        if !self.post(&api, &body, &event).await {
            return;
        }
        self.make_room();
        let known = Known { object, namespace, count: 1, written: Instant::now(), held: None };
        self.known.insert(key, known);
    }

    async fn repeat(&mut self, key: Key, event: Event) {
        let Some(known) = self.known.get(&key) else { return self.create(key, event).await };
        let api: Api<ApiEvent> = Api::namespaced(self.client.clone(), &known.namespace);
        let patch = serde_json::json!({
            "count": known.count,
            "lastTimestamp": now(),
            "message": event.message,
        });
        let object = known.object.clone();
        let result = api.patch(&object, &PatchParams::default(), &Patch::Merge(&patch)).await;
        match result {
            Ok(_) => {
                if let Some(known) = self.known.get_mut(&key) {
                    known.written = Instant::now();
                }
            }
            // Events expire on the server (an hour by default): start a new one.
            Err(kube::Error::Api(status)) if status.code == 404 => {
                self.known.remove(&key);
                self.create(key, event).await;
            }
            Err(error) => {
                debug!(reason = event.reason, %error, "repetition of an event not written, trying again later");
                if let Some(known) = self.known.get_mut(&key) {
                    known.written = Instant::now();
                    known.held.get_or_insert(event);
                }
            }
        }
    }

    /// Tries until the server accepts; says whether it did.
    async fn post(&self, api: &Api<ApiEvent>, body: &ApiEvent, event: &Event) -> bool {
        let mut pause = FIRST_PAUSE;
        for attempt in 1..=ATTEMPTS {
            match api.create(&PostParams::default(), body).await {
                Ok(_) => return true,
                // A refusal (bad request, forbidden, namespace gone) does not get better by asking again.
                Err(kube::Error::Api(status)) if (400..429).contains(&status.code) => {
                    warn!(reason = event.reason, message = event.message, error = %status.message,
                        "event refused by the API server");
                    break;
                }
                Err(error) if attempt == ATTEMPTS => {
                    warn!(reason = event.reason, message = event.message, %error, "event not written");
                }
                Err(error) => {
                    debug!(reason = event.reason, %error, attempt, "event not written yet");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
            }
        }
        self.lost.fetch_add(1, Ordering::Relaxed);
        false
    }

    /// Forgets the occurrence that was written longest ago when there is no room for another.
    fn make_room(&mut self) {
        while self.known.len() >= REMEMBERED {
            let Some(oldest) = self.known.iter().min_by_key(|(_, k)| k.written).map(|(key, _)| key.clone())
            else {
                return;
            };
            self.known.remove(&oldest);
        }
    }

    fn body(&self, event: &Event, object: &str, namespace: &str, now: &Time) -> ApiEvent {
        ApiEvent {
            metadata: ObjectMeta {
                name: Some(object.to_owned()),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some(event.subject.api_version.clone()),
                kind: Some(event.subject.kind.clone()),
                namespace: event.subject.namespace.clone(),
                name: Some(event.subject.name.clone()),
                uid: Some(event.subject.uid.clone()).filter(|u| !u.is_empty()),
                ..ObjectReference::default()
            },
            type_: Some(
                match event.severity {
                    Severity::Normal => "Normal",
                    Severity::Warning => "Warning",
                }
                .to_owned(),
            ),
            reason: Some(event.reason.to_owned()),
            message: Some(event.message.clone()),
            first_timestamp: Some(now.clone()),
            last_timestamp: Some(now.clone()),
            count: Some(1),
            source: Some(EventSource {
                component: Some(self.component.clone()),
                host: Some(self.instance.clone()),
            }),
            reporting_component: Some(self.component.clone()),
            reporting_instance: Some(self.instance.clone()),
            ..ApiEvent::default()
        }
    }
}

fn now() -> Time {
    Time(jiff::Timestamp::now())
}

/// `<object>.<time>`: unique, and sorted by time among the events of one object. Names are limited to 253 bytes.
fn object_name(subject: &str, at: jiff::Timestamp) -> String {
    let mut end = subject.len().min(200);
    while !subject.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}.{:x}", &subject[..end], at.as_nanosecond())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testserver::{Reply, Server};

    fn narrow(peer: &str, message: &str) -> Event {
        Event {
            subject: Subject::node("node-1", "u-1"),
            severity: Severity::Warning,
            reason: "PathMTUNarrow",
            message: message.into(),
            key: peer.into(),
        }
    }

    fn echo(request: &crate::testserver::Request) -> Reply {
        Reply::json(201, &serde_json::from_str::<Value>(&request.body).unwrap())
    }

    #[tokio::test]
    async fn a_repetition_raises_the_count_of_the_same_object() {
        let mut server = Server::start(|request| match request.method.as_str() {
            "POST" => echo(request),
            _ => Reply::json(200, &json!({"metadata":{"name":"e"},"involvedObject":{}})),
        })
        .await;
        let (pace, tick) = (Duration::from_secs(1), Duration::from_millis(100));
        let writer = EventWriter::start_paced(&server.client().await, "podway-agent", "node-1", pace, tick);
        writer.record(narrow("node-2", "first"));
        let created = server.next().await;
        assert_eq!(
            (created.method.as_str(), created.path.as_str()),
            ("POST", "/api/v1/namespaces/default/events")
        );
        let body: Value = serde_json::from_str(&created.body).unwrap();
        assert_eq!(body["type"], "Warning");
        assert_eq!(body["count"], 1);
        assert_eq!(
            body["involvedObject"],
            json!({"apiVersion":"v1","kind":"Node","name":"node-1","uid":"u-1"})
        );
        // Two at once: one is written, with the count of both.
        writer.record(narrow("node-2", "second"));
        writer.record(narrow("node-2", "third"));
        let patched = server.next().await;
        assert_eq!(patched.method, "PATCH");
        let name = body["metadata"]["name"].as_str().unwrap();
        assert_eq!(patched.path, format!("/api/v1/namespaces/default/events/{name}"));
        let patch: Value = serde_json::from_str(&patched.body).unwrap();
        assert_eq!((&patch["count"], &patch["message"]), (&json!(3), &json!("third")));
        // Another pair of nodes is another event.
        writer.record(narrow("node-3", "fourth"));
        assert_eq!(server.next().await.method, "POST");
        assert_eq!(writer.lost(), 0);
    }

    #[tokio::test]
    async fn an_expired_event_is_written_anew() {
        let mut server = Server::start(|request| match request.method.as_str() {
            "POST" => echo(request),
            _ => Reply::status(404, "NotFound"),
        })
        .await;
        let pace = Duration::from_millis(20);
        let writer = EventWriter::start_paced(&server.client().await, "podway-agent", "node-1", pace, pace);
        writer.record(narrow("node-2", "first"));
        server.next().await;
        writer.record(narrow("node-2", "again"));
        assert_eq!(server.next().await.method, "PATCH");
        assert_eq!(server.next().await.method, "POST");
    }

    #[tokio::test]
    async fn a_refused_event_is_counted_and_the_next_one_is_written() {
        let mut server = Server::start(|request| {
            if request.body.contains("refuse me") { Reply::status(403, "Forbidden") } else { echo(request) }
        })
        .await;
        let writer = EventWriter::start(&server.client().await, "podway-agent", "node-1");
        writer.record(narrow("node-2", "refuse me"));
        server.next().await;
        writer.record(narrow("node-3", "take me"));
        assert!(server.next().await.body.contains("take me"));
        assert_eq!(writer.lost(), 1);
    }

    #[tokio::test]
    async fn a_full_queue_loses_events_and_says_so() {
        let (tx, _rx) = mpsc::channel(1);
        let writer = EventWriter { tx, lost: Arc::default() };
        for _ in 0..3 {
            writer.record(narrow("node-2", "x"));
        }
        assert_eq!(writer.lost(), 2);
    }

    #[test]
    fn long_names_are_cut_at_a_character() {
        let name = object_name(&"ä".repeat(150), jiff::Timestamp::UNIX_EPOCH);
        assert_eq!(name, format!("{}.0", "ä".repeat(100)));
    }
}
