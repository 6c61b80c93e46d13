//! Events that the programs tell user space: flows that begin and end, packets that are dropped.

use crate::{Addr, Mac, REASON_SLOTS, assert_layout};

/// Bytes of the ring buffer: at least 25,000 events, a quarter of a second at 100,000 a second.
pub const EVENT_RING_BYTES: u32 = 1 << 22;
/// Bytes in the ring buffer from which on the reader is woken; below it reads at its own pace.
pub const EVENT_WAKE_BYTES: u64 = EVENT_RING_BYTES as u64 / 4;
/// Slots in which each CPU remembers flows whose drops it has told of.
pub const EVENT_MEMORY: u32 = 2_048;
/// For this long further drops of a flow for the same reason are counted instead of told, nanoseconds.
pub const EVENT_REPEAT_NS: u64 = 1_000_000_000;
/// Limits of events hold for windows of `1 << EVENT_WINDOW_SHIFT` nanoseconds: 67 ms.
pub const EVENT_WINDOW_SHIFT: u32 = 26;
/// Buckets of limits on each CPU: one for each reason, then those of [`bucket`].
pub const EVENT_BUCKETS: u32 = REASON_SLOTS + 2;

/// Buckets other than those of reasons, each of which has the number of its reason.
pub mod bucket {
    /// Flows that begin.
    pub const START: u32 = crate::REASON_SLOTS;
    /// Flows that end.
    pub const END: u32 = crate::REASON_SLOTS + 1;
}

/// What happened.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventKind {
    /// A flow began: its first packet was let through.
    Start = 1,
    /// A flow ended: RST, or FIN of both sides.
    End = 2,
    /// A packet was dropped.
    Drop = 3,
}

impl EventKind {
    /// Every kind.
    pub const ALL: [EventKind; 3] = [EventKind::Start, EventKind::End, EventKind::Drop];

    /// The kind with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Start),
            2 => Some(Self::End),
            3 => Some(Self::Drop),
            _ => None,
        }
    }

    /// The name used in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::End => "end",
            Self::Drop => "drop",
        }
    }
}

/// Bits of [`Event::flags`].
pub mod event_flags {
    /// The packet was read: its ends and protocol count. Without it only interface, hook and reason do.
    pub const PARSED: u8 = 1 << 0;
    /// The packet came to [`super::Event::asked`], and goes to the destination instead.
    pub const SERVICE: u8 = 1 << 1;
    /// Its source is this node instead of [`super::Event::client`].
    pub const MASQUERADED: u8 = 1 << 2;
    /// An answer was seen.
    pub const REPLIED: u8 = 1 << 3;
    /// TCP: a RST ended the flow.
    pub const RESET: u8 = 1 << 4;
    /// Nothing was heard of the flow for as long as it is remembered.
    pub const EXPIRED: u8 = 1 << 5;
}

/// One event, as it lies in the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Event {
    /// When, nanoseconds of `CLOCK_MONOTONIC`.
    pub time_ns: u64,
    /// Of a flow that ended: when it began, on the same clock to the tick.
    pub created_ns: u64,
    /// Packets from the end that opened the flow, and back. Of a drop: how many were dropped since the last event for
    /// the same flow and reason on this CPU, this one included.
    pub packets: [u64; 2],
    /// Bytes from the network layer up, likewise.
    pub bytes: [u64; 2],
    /// The end that opened the flow; of a drop the sender.
    pub src: Addr,
    /// The other end.
    pub dst: Addr,
    /// With [`event_flags::SERVICE`]: what was asked for.
    pub asked: Addr,
    /// With [`event_flags::MASQUERADED`]: who asked.
    pub client: Addr,
    /// The node at the other end of the tunnel, or [`Addr::UNSPECIFIED`].
    pub node: Addr,
    /// Port of the source, host byte order; the identifier of an ICMP echo.
    pub src_port: u16,
    /// Port of the destination.
    pub dst_port: u16,
    /// With [`event_flags::SERVICE`]: the port that was asked for.
    pub asked_port: u16,
    /// With [`event_flags::MASQUERADED`]: the port of who asked.
    pub client_port: u16,
    /// Interface that the packet came in on; for what goes out, the one it goes out on.
    pub ifindex: u32,
    /// Link-layer sender, for drops.
    pub src_mac: Mac,
    /// IP protocol number.
    pub proto: u8,
    /// See [`EventKind`].
    pub kind: u8,
    /// Number of the [`crate::Hook`].
    pub hook: u8,
    /// Number of the [`crate::Reason`]; of an end 0.
    pub reason: u8,
    /// TCP flags of the packet.
    pub tcp_flags: u8,
    /// See [`event_flags`].
    pub flags: u8,
    /// Always 0.
    pub pad: [u8; 8],
}
assert_layout!(Event, 160);

/// What is told, and how much of it. As a table starts, zeros: nothing.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct EventConfig {
    /// Most events for flows that begin, for each CPU and window; likewise for those that end.
    pub flows_per_window: u32,
    /// Most events for packets that are dropped, for each CPU, reason and window.
    pub drops_per_window: u32,
}
assert_layout!(EventConfig, 8);

/// Of one bucket on one CPU: the present window, and counts since the table was made.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct EventBucket {
    /// Number of the window.
    pub window: u64,
    /// Events in it.
    pub in_window: u64,
    /// Events that were told.
    pub told: u64,
    /// Events that were not told because there were too many, or the same had been told shortly before.
    pub limited: u64,
    /// Events that were lost because the ring buffer was full.
    pub lost: u64,
}
assert_layout!(EventBucket, 40);

/// A flow whose drop was told of.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Remembered {
    /// Hash of its ends and the reason.
    pub hash: u64,
    /// When it was told.
    pub told_ns: u64,
    /// Packets dropped since.
    pub packets: u64,
    /// Bytes dropped since.
    pub bytes: u64,
}
assert_layout!(Remembered, 32);

#[cfg(feature = "aya")]
#[expect(unsafe_code, reason = "aya reads and writes map bytes as these types")]
mod pod {
    // SAFETY: `repr(C)`, made of integers only, without padding (`assert_layout!`): every bit pattern is a value and
    // every byte is initialised. Needed because only this crate may implement it here.
    unsafe impl aya::Pod for super::EventConfig {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::EventBucket {}
}
