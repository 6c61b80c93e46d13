//! An event with the names that its addresses had when it happened: what the history keeps.

use std::sync::Arc;

use podway_abi::events::{Event, EventKind, event_flags};
use podway_abi::{Addr, Hook, Reason};

use crate::flow::{Direction, Ended, EventName, Verdict};
use crate::identity::{Identity, ServiceName};
use crate::names::{Names, UnixNanos};

/// One event, joined.
#[derive(Clone, Debug)]
pub struct Record {
    /// When it happened.
    pub time: UnixNanos,
    /// When the flow began; of others than ends the same as [`Record::time`].
    pub began: UnixNanos,
    /// What the programs told.
    pub event: Event,
    /// The end that opened the flow, or sent the packet.
    pub source: Option<Arc<Identity>>,
    /// The other end; behind a service, the endpoint.
    pub destination: Option<Arc<Identity>>,
    /// Who asked, where the source is this node in its place.
    pub client: Option<Arc<Identity>>,
    /// The service that was asked.
    pub service: Option<Arc<ServiceName>>,
}

/// What the kernel's clock says, and what the clock on the wall said at the same time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Unix time minus `CLOCK_MONOTONIC`.
    pub offset: UnixNanos,
}

impl Clock {
    /// When something happened.
    #[must_use]
    pub fn unix(&self, monotonic_ns: u64) -> UnixNanos {
        i64::try_from(monotonic_ns).unwrap_or(i64::MAX).saturating_add(self.offset)
    }
}

impl Record {
    /// Joins an event with names. `sender` is the pod at the other end of the interface that the packet came in on, if
    /// it is one's: a packet that could not be read, or claims another sender, is still that pod's.
    #[must_use]
    pub fn join(event: &Event, clock: Clock, names: &Names, sender: Option<&Arc<Identity>>) -> Self {
        let time = clock.unix(event.time_ns);
        let is_end = event.kind == EventKind::End as u8;
        let began = if is_end { clock.unix(event.created_ns).min(time) } else { time };
        let has = |flag: u8| event.flags & flag != 0;
        let at = |address: &Addr| names.at(address, began).cloned();
        let (mut source, mut destination, mut client, mut service) = (None, None, None, None);
        if has(event_flags::PARSED) {
            source = at(&event.src);
            destination = at(&event.dst);
            let (address, port) = if has(event_flags::SERVICE) {
                (&event.asked, event.asked_port)
            } else {
                (&event.dst, event.dst_port)
            };
            service = names.service(address, port, event.proto).cloned();
        }
        if has(event_flags::MASQUERADED) {
            client = at(&event.client);
        }
        if event.kind == EventKind::Drop as u8
            && let Some(pod) = sender
        {
            source = Some(Arc::clone(pod));
        }
        Self { time, began, event: *event, source, destination, client, service }
    }

    /// What happened.
    #[must_use]
    pub fn name(&self) -> EventName {
        match EventKind::from_number(self.event.kind) {
            Some(EventKind::Start) => EventName::Start,
            Some(EventKind::End) => EventName::End,
            // A kind that this build does not know cannot come from its own programs.
            Some(EventKind::Drop) | None => EventName::Drop,
        }
    }

    /// What became of the packet.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        if self.name() == EventName::Drop { Verdict::Dropped } else { Verdict::Forwarded }
    }

    /// Why; of ends nothing.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        if self.name() == EventName::End {
            return None;
        }
        Reason::ALL.iter().copied().find(|r| *r as u8 == self.event.reason)
    }

    /// Where.
    #[must_use]
    pub fn hook(&self) -> Option<Hook> {
        Hook::ALL.into_iter().find(|h| *h as u8 == self.event.hook)
    }

    /// Towards a pod of this node, or away from it.
    #[must_use]
    pub fn direction(&self) -> Direction {
        match self.hook() {
            Some(Hook::ToPod | Hook::FromUplink | Hook::FromTunnel) => Direction::Ingress,
            _ => Direction::Egress,
        }
    }

    /// How a flow ended.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        if self.name() != EventName::End {
            return None;
        }
        Some(if self.has(event_flags::RESET) {
            Ended::Reset
        } else if self.has(event_flags::EXPIRED) {
            Ended::Expired
        } else {
            Ended::Closed
        })
    }

    /// Whether a bit of [`event_flags`] is set.
    #[must_use]
    pub fn has(&self, flag: u8) -> bool {
        self.event.flags & flag != 0
    }
}
