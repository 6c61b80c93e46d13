//! Translation of packets, for what the socket hooks do not see: what comes from the network, and raw packets of pods.
//!
//! A flow has two translations, both known by the flow's key before them: that of the client's packets towards the
//! backend, and that of the backend's answers. The connection table knows the flow by what it is between node and
//! backend, so that both directions meet in one entry.

use podway_abi::{
    Addr, Hook, Reason,
    services::{
        MASQUERADE_FIRST_PORT, MASQUERADE_PORTS, Origin, Translation, address_flags, translation_flags,
    },
};

use super::{Choice, Outcome, Query, ServiceHost, choose};
use crate::{
    Scratch, Tuple,
    packet::{flags, proto, tcp},
    same_addr, track,
};

/// How often a port is looked for before the packet is given up; its sender tries again.
const PORT_TRIES: u32 = 8;

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// It is no service's business.
    Plain,
    /// It was translated towards a backend.
    Forward,
    /// It was translated towards a backend, and its source is this node's now.
    Masqueraded,
    /// It is an answer, and was translated back.
    Back,
}

/// Translates a packet in `scratch` if it belongs to a service, and makes the flow's key that of the connection table.
///
/// `from_b` is the packet's end of its key. `known` says that the flow is in the connection table already, as a plain
/// one or as one that is translated back.
///
/// # Errors
/// The reason for which the packet has to be dropped; [`Reason::Rejected`] when its sender has to be told.
#[inline(always)]
pub fn translate(
    host: &impl ServiceHost,
    scratch: &mut Scratch,
    from_b: bool,
    known: bool,
    origin: Origin,
) -> Result<Step, Reason> {
    // Three subprograms beside one another instead of one above the other: the stack is for the deepest of them.
    match known_translation(host, scratch, from_b) {
        Known::Nothing => {}
        Known::Step(step) => return Ok(step),
    }
    if !asks(scratch, known, origin) {
        return Ok(Step::Plain);
    }
    match choose(host, &scratch.query, &mut scratch.choice) {
        Outcome::Untouched => Ok(Step::Plain),
        Outcome::Undefined | Outcome::Reject => Err(Reason::Rejected),
        Outcome::Unassigned => Err(Reason::NoService),
        Outcome::Drop => Err(Reason::NoLocalEndpoint),
        Outcome::OutOfRange | Outcome::UnknownSource => Err(Reason::OutOfSourceRange),
        Outcome::Backend => {
            let masquerade = begin(host, scratch, from_b)?;
            if !take_ends(host, scratch, masquerade) {
                return Err(Reason::NoMasqueradePort);
            }
            Ok(if masquerade { Step::Masqueraded } else { Step::Forward })
        }
    }
}

/// What the table of translations says.
enum Known {
    /// The packet has been dealt with.
    Step(Step),
    /// Nothing, or nothing that still holds.
    Nothing,
}

#[inline(never)]
fn known_translation(host: &impl ServiceHost, scratch: &mut Scratch, from_b: bool) -> Known {
    if !is_translatable(scratch) {
        return Known::Step(Step::Plain);
    }
    let Some(translation) = host.translation(&scratch.ct_key) else { return Known::Nothing };
    if (translation.flags & translation_flags::FROM_B != 0) != from_b {
        return Known::Nothing;
    }
    if translation.flags & translation_flags::FORWARD == 0 {
        // The flow stays the one between node and backend.
        change(scratch, &translation);
        return Known::Step(Step::Back);
    }
    if !still_good(host, scratch, &translation) {
        return Known::Nothing;
    }
    // For the service's counters; of a backend that has gone they are nobody's.
    scratch.choice.service = host.backend(translation.backend).map_or(u32::MAX, |b| b.service);
    let masqueraded = !same_addr(&translation.src, &scratch.packet.src);
    apply(scratch, &translation);
    Known::Step(if masqueraded { Step::Masqueraded } else { Step::Forward })
}

#[inline(always)]
fn is_translatable(scratch: &Scratch) -> bool {
    let packet = &scratch.packet;
    packet.has(flags::PORTS) && matches!(packet.proto, proto::TCP | proto::UDP | proto::SCTP)
}

/// Whether the services have to be asked about a packet without a translation, and what.
#[inline(always)]
fn asks(scratch: &mut Scratch, known: bool, origin: Origin) -> bool {
    let packet = &scratch.packet;
    // A connection that is under way without a translation is nobody's, and most of what a node gets for itself.
    let under_way = packet.proto == proto::TCP && packet.tcp_flags & (tcp::SYN | tcp::ACK) != tcp::SYN;
    if under_way && (known || !matches!(origin, Origin::Pod)) {
        return false;
    }
    scratch.query = Query {
        client: packet.src,
        src: packet.src,
        dst: packet.dst,
        src_port: packet.src_port,
        dst_port: packet.dst_port,
        proto: packet.proto,
        origin,
        sticky: false,
    };
    true
}

/// Translates a packet back if it is the answer of a translated flow, and says whether it is.
#[inline(never)]
pub fn translate_back(host: &impl ServiceHost, scratch: &mut Scratch, from_b: bool) -> bool {
    match host.translation(&scratch.ct_key) {
        Some(translation)
            if translation.flags & translation_flags::FORWARD == 0
                && (translation.flags & translation_flags::FROM_B != 0) == from_b =>
        {
            change(scratch, &translation);
            true
        }
        _ => false,
    }
}

/// A connection stays with its backend for as long as it lives, also with one that is about to end. Datagrams and new
/// connections move when it has left its service.
#[inline(always)]
fn still_good(host: &impl ServiceHost, scratch: &Scratch, translation: &Translation) -> bool {
    let packet = &scratch.packet;
    if packet.proto == proto::TCP && packet.tcp_flags & (tcp::SYN | tcp::ACK) != tcp::SYN {
        return true;
    }
    host.backend(translation.backend).is_some_and(|b| b.incarnation == translation.incarnation)
}

/// The first packet of a translated flow: both translations but for a masqueraded source's port, and whether there is
/// one.
#[inline(never)]
fn begin(host: &impl ServiceHost, scratch: &mut Scratch, from_b: bool) -> Result<bool, Reason> {
    let choice: &Choice = &scratch.choice;
    let now_ns = host.now_ns();
    let external = matches!(scratch.query.origin, Origin::External);
    // A pod that reaches itself would take its own address for a forged one; and what comes from beyond the cluster has
    // to come back to this node unless the backend is on it.
    let mut masquerade =
        choice.masquerade || same_addr(&choice.addr, &scratch.query.src) || (external && !choice.local);
    // The node itself would take its own address for a forged one; its answers are met where they leave it.
    if host.address(&choice.addr) & address_flags::OWN != 0 {
        masquerade = false;
        scratch.node_serves = scratch.route.hook == Hook::FromUplink as u8;
    }
    if scratch.query.proto == proto::SCTP && choice.port != scratch.query.dst_port {
        return Err(Reason::SctpPort);
    }
    scratch.forward.key = scratch.ct_key;
    scratch.forward.value.created_ns = now_ns;
    scratch.forward.value.src = scratch.query.src;
    scratch.forward.value.dst = scratch.choice.addr;
    scratch.forward.value.src_port = scratch.query.src_port;
    scratch.forward.value.dst_port = scratch.choice.port;
    scratch.forward.value.flags =
        translation_flags::FORWARD | if from_b { translation_flags::FROM_B } else { 0 };
    scratch.forward.value.backend = scratch.choice.backend;
    scratch.forward.value.incarnation = scratch.choice.incarnation;
    if masquerade {
        scratch.forward.value.src = host.masquerade(choice.addr.is_v4());
        if same_addr(&scratch.forward.value.src, &Addr::UNSPECIFIED) {
            return Err(Reason::NoMasqueradePort);
        }
    }
    scratch.back.value.created_ns = now_ns;
    scratch.back.value.src = scratch.query.dst;
    scratch.back.value.dst = scratch.query.src;
    scratch.back.value.src_port = scratch.query.dst_port;
    scratch.back.value.dst_port = scratch.query.src_port;
    scratch.back.value.backend = scratch.choice.backend;
    scratch.back.value.incarnation = scratch.choice.incarnation;
    Ok(masquerade)
}

/// The ends that the flow has from here on, with a port of the node's that no other flow has when it is masqueraded.
#[inline(never)]
fn take_ends(host: &impl ServiceHost, scratch: &mut Scratch, masquerade: bool) -> bool {
    let mut tries = 0;
    loop {
        if masquerade && scratch.query.proto != proto::SCTP {
            let offset = host.random() & (MASQUERADE_PORTS - 1);
            scratch.forward.value.src_port = MASQUERADE_FIRST_PORT.wrapping_add(offset as u16);
        }
        // Field by field, as below: a copy of the whole would stand on the stack.
        remember_ends(scratch);
        scratch.packet.src = scratch.forward.value.src;
        scratch.packet.dst = scratch.forward.value.dst;
        scratch.packet.src_port = scratch.forward.value.src_port;
        scratch.packet.dst_port = scratch.forward.value.dst_port;
        scratch.from_b = track::key(&scratch.packet, &mut scratch.back.key);
        scratch.back.value.flags = if scratch.from_b { 0 } else { translation_flags::FROM_B };
        if !masquerade || host.claim(&scratch.back.key, &scratch.back.value) {
            break;
        }
        tries += 1;
        if tries >= PORT_TRIES {
            return false;
        }
    }
    scratch.ct_key = scratch.back.key;
    scratch.new_translation = true;
    true
}

/// Makes the packet what the translation says, and the flow that of the connection table.
#[inline(always)]
fn apply(scratch: &mut Scratch, translation: &Translation) {
    change(scratch, translation);
    scratch.from_b = track::key(&scratch.packet, &mut scratch.ct_key);
}

#[inline(always)]
fn change(scratch: &mut Scratch, translation: &Translation) {
    remember_ends(scratch);
    let packet = &mut scratch.packet;
    packet.src = translation.src;
    packet.dst = translation.dst;
    packet.src_port = translation.src_port;
    packet.dst_port = translation.dst_port;
}

/// What the packet was when it came, however often a port was looked for.
#[inline(always)]
fn remember_ends(scratch: &mut Scratch) {
    if !scratch.rewrite {
        let packet = &scratch.packet;
        scratch.was =
            Tuple { src: packet.src, dst: packet.dst, src_port: packet.src_port, dst_port: packet.dst_port };
        scratch.rewrite = true;
    }
}
