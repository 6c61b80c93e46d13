//! Services: from an address and port to one backend.
//!
//! Pure, like every decision: the socket hooks, the packet path, tests on hash maps and a trace run this code over
//! [`ServiceHost`]. A look-up costs the same whatever the number of services: at most three hash look-ups tell what
//! answers at an address ([`find`]), then three array look-ups lead to a backend ([`choose`]).

mod errors;
mod fragments;
mod pick;
mod translate;

pub use errors::{ICMP_LEN, translate_error};
pub use fragments::complete;
pub use pick::{Choice, maglev_hash};
use podway_abi::services::{
    ANY_V4, Affinity, AffinityKey, Backend, FragmentKey, FragmentPorts, Frontend, FrontendKey, Origin,
    SetWord, SlotPair, SourceRange, Translation, address_flags, frontend_flags, route, scope, set_kind,
};
use podway_abi::{Addr, CtKey};
pub use translate::{Step, translate, translate_back};

use crate::same_addr;

/// Where the decisions about services find their tables. Every look-up returns a copy.
pub trait ServiceHost {
    /// What answers at an address and port.
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend>;
    /// The [`address_flags`] of an address; 0 when it has no entry.
    fn address(&self, addr: &Addr) -> u32;
    /// Whether an address lies in a range of cluster IPs.
    fn in_service_range(&self, addr: &Addr) -> bool;
    /// One word of the table of sets.
    fn set(&self, index: u32) -> Option<SetWord>;
    /// Two slots: the pair at half of a slot's index.
    fn slots(&self, pair: u32) -> Option<SlotPair>;
    /// Two entries of the Maglev array.
    fn maglev(&self, pair: u32) -> Option<SlotPair>;
    /// A backend by its number.
    fn backend(&self, id: u32) -> Option<Backend>;
    /// The backend that a client had.
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    /// Whether a sender lies in one of a service's source ranges.
    fn in_source_ranges(&self, key: &SourceRange) -> bool;
    /// Into what the packets of a flow are translated.
    fn translation(&self, key: &CtKey) -> Option<Translation>;
    /// Writes a translation unless there is one already; says whether it did. The one write that a decision needs at
    /// once: two flows must not get the same port. A host that must not change anything says whether it could.
    fn claim(&self, key: &CtKey, translation: &Translation) -> bool;
    /// The address of the node that replaces a masqueraded source of one family, or [`Addr::UNSPECIFIED`].
    fn masquerade(&self, v4: bool) -> Addr;
    /// Whether the node itself was a backend of somebody beyond it: answers may be among what its stack sends.
    fn node_serves(&self) -> bool;
    /// The ports of a fragmented datagram.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    /// A number that nobody can predict.
    fn random(&self) -> u32;
    /// Now, in nanoseconds of `CLOCK_MONOTONIC`.
    fn now_ns(&self) -> u64;
}

/// Who asks for what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Query {
    /// Who counts as one client: the sender's address, or a number for it ([`podway_abi::services::client`]).
    pub client: Addr,
    /// The sender's address; [`Addr::UNSPECIFIED`] while a socket has not chosen it.
    pub src: Addr,
    /// The address that was asked for.
    pub dst: Addr,
    /// The sender's port, host byte order; 0 while a socket has none.
    pub src_port: u16,
    /// The port that was asked for, host byte order.
    pub dst_port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Who it is.
    pub origin: Origin,
    /// Whether the client keeps its backend without session affinity too: each datagram of an unconnected socket
    /// asks anew.
    pub sticky: bool,
}

impl Query {
    /// Nothing asked.
    pub const NONE: Self = Self {
        client: Addr::UNSPECIFIED,
        src: Addr::UNSPECIFIED,
        dst: Addr::UNSPECIFIED,
        src_port: 0,
        dst_port: 0,
        proto: 0,
        origin: Origin::External,
        sticky: false,
    };
}

/// What a query comes to.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// No service answers there.
    Untouched,
    /// The backend in [`Choice`].
    Backend,
    /// The address belongs to a service that has no such port: the sender is told.
    Undefined,
    /// The address is in a range of cluster IPs, and no service has it: silence, since it may be a service's soon.
    Unassigned,
    /// Nobody serves: the sender is told.
    Reject,
    /// Nobody serves on this node though only this node's endpoints count: silence.
    Drop,
    /// The sender is outside of the service's source ranges.
    OutOfRange,
    /// Source ranges apply and the sender's address is not known yet.
    UnknownSource,
}

/// Seconds for which the socket of unconnected datagrams keeps its backend while it is silent (RFC 4787 REQ-5).
pub const STICKY_S: u32 = 180;

/// Finds what answers: [`Outcome::Backend`] stands for "`out` is the frontend".
#[inline(never)]
pub fn find(host: &impl ServiceHost, query: &Query, out: &mut Frontend) -> Outcome {
    let mut key =
        FrontendKey { addr: query.dst, port: query.dst_port, proto: query.proto, scope: scope::ADDRESS };
    if let Some(frontend) = host.frontend(&key) {
        *out = frontend;
        return Outcome::Backend;
    }
    // Where node ports answer on loopback too, they do so for the node; for anybody else loopback is their own.
    if is_loopback(&query.dst) && !matches!(query.origin, Origin::Node) {
        return Outcome::Untouched;
    }
    let bits = host.address(&query.dst);
    if bits & address_flags::NODE_PORTS != 0 {
        key.addr = if query.dst.is_v4() { ANY_V4 } else { Addr::UNSPECIFIED };
        key.scope = scope::NODE;
        if let Some(frontend) = host.frontend(&key) {
            *out = frontend;
            return Outcome::Backend;
        }
    }
    if bits & address_flags::VIP != 0 {
        return Outcome::Undefined;
    }
    if bits == 0 && host.in_service_range(&query.dst) { Outcome::Unassigned } else { Outcome::Untouched }
}

/// Decides about one query: [`find`], the route of its origin, the source ranges, and a backend of the set.
#[inline(always)]
pub fn choose(host: &impl ServiceHost, query: &Query, choice: &mut Choice) -> Outcome {
    let mut frontend = Frontend::default();
    choice.service = u32::MAX;
    match find(host, query, &mut frontend) {
        Outcome::Backend => {}
        outcome => return outcome,
    }
    choose_at(host, query, &frontend, choice)
}

/// The rest of [`choose`] once the frontend is known.
#[inline(never)]
pub fn choose_at(
    host: &impl ServiceHost,
    query: &Query,
    frontend: &Frontend,
    choice: &mut Choice,
) -> Outcome {
    choice.service = frontend.service;
    choice.remember = false;
    let bits = frontend.route(query.origin);
    choice.masquerade = bits & route::MASQUERADE != 0;
    if frontend.flags & frontend_flags::SOURCE_RANGES != 0 {
        match in_ranges(host, query, frontend.service) {
            Outcome::Backend => {}
            outcome => return outcome,
        }
    }
    let kind = match bits & route::TARGET {
        route::CLUSTER => set_kind::CLUSTER,
        route::LOCAL => set_kind::LOCAL,
        route::REJECT => return Outcome::Reject,
        _ => return Outcome::Drop,
    };
    if pick::pick(host, query, frontend, kind, choice) { Outcome::Backend } else { Outcome::Reject }
}

/// Whether the node itself may send is in its route; everybody else has to be in the list, which is complete: it holds
/// the service's own addresses as well, from which a load balancer checks its backends.
#[inline(always)]
fn in_ranges(host: &impl ServiceHost, query: &Query, service: u32) -> Outcome {
    if matches!(query.origin, Origin::Node) {
        return Outcome::Backend;
    }
    if same_addr(&query.src, &Addr::UNSPECIFIED) {
        return Outcome::UnknownSource;
    }
    if host.in_source_ranges(&SourceRange { service, addr: query.src }) {
        Outcome::Backend
    } else {
        Outcome::OutOfRange
    }
}

/// Whether an address is of `127.0.0.0/8` or `::1`.
#[inline(always)]
pub fn is_loopback(addr: &Addr) -> bool {
    if addr.is_v4() {
        return u32::from_be(addr.v4_word()) >> 24 == 127;
    }
    let [w0, w1, w2, w3] = addr.words;
    (w0 | w1 | w2) == 0 && w3 == 1u32.to_be()
}
