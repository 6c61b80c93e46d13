//! What this node tells people: Kubernetes Events on its Node object, and the same in the log.

use std::sync::{Mutex, OnceLock};

use podway_kube::events::{Event, EventWriter, Severity, Subject};
use tracing::{info, warn};

use crate::attach::{Observer, lock};
use crate::leases::pool::Exhausted;

/// Reports about one node.
#[derive(Debug)]
pub struct Reporter {
    node: String,
    uid: Mutex<String>,
    writer: OnceLock<EventWriter>,
}

impl Reporter {
    /// A reporter that only logs until it has a writer.
    #[must_use]
    pub fn new(node: &str) -> Self {
        Self { node: node.to_owned(), uid: Mutex::new(String::new()), writer: OnceLock::new() }
    }

    /// Sets where events go.
    pub fn set_writer(&self, writer: EventWriter) {
        // A second one would be a programming error without consequence: the first goes on.
        self.writer.set(writer).ok();
    }

    /// Sets the UID of the Node, once it is known.
    pub fn set_uid(&self, uid: &str) {
        uid.clone_into(&mut lock(&self.uid));
    }

    /// Something needs attention. `key` tells occurrences of one reason apart.
    pub fn warning(&self, reason: &'static str, key: &str, message: &str) {
        warn!(reason, "{message}");
        self.send(Severity::Warning, reason, key, message);
    }

    /// Something is as it should be again.
    pub fn normal(&self, reason: &'static str, key: &str, message: &str) {
        info!(reason, "{message}");
        self.send(Severity::Normal, reason, key, message);
    }

    /// Something about another object than this node.
    pub fn about(
        &self,
        subject: Subject,
        severity: Severity,
        reason: &'static str,
        key: &str,
        message: &str,
    ) {
        let object = match &subject.namespace {
            Some(namespace) => format!("{namespace}/{}", subject.name),
            None => subject.name.clone(),
        };
        let kind = subject.kind.as_str();
        match severity {
            Severity::Warning => warn!(reason, kind, object, "{message}"),
            Severity::Normal => info!(reason, kind, object, "{message}"),
        }
        let Some(writer) = self.writer.get() else { return };
        writer.record(Event { subject, severity, reason, message: message.to_owned(), key: key.to_owned() });
    }

    /// Events that were given up.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.writer.get().map_or(0, EventWriter::lost)
    }

    fn send(&self, severity: Severity, reason: &'static str, key: &str, message: &str) {
        let Some(writer) = self.writer.get() else { return };
        writer.record(Event {
            subject: Subject::node(&self.node, &lock(&self.uid)),
            severity,
            reason,
            message: message.to_owned(),
            key: key.to_owned(),
        });
    }
}

/// Hands what attaching meets to a reporter.
#[derive(Debug)]
pub struct AttachEvents(pub std::sync::Arc<Reporter>);

impl Observer for AttachEvents {
    fn exhausted(&self, error: &Exhausted) {
        // Without any podCIDR the node is not ready, which is told in another way.
        if !error.usage.is_empty() {
            self.0.warning("AddressesExhausted", "", &error.to_string());
        }
    }
}
