//! Reading queries.

use super::{HEADER, PLAIN_UDP, Rcode, flag, rtype, u16_at, u32_at};
use crate::name::Lower;

/// What the client says by its OPT record (RFC 6891).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns {
    /// Longest answer that it takes over UDP; never less than 512.
    pub size: u16,
    /// Whether it wants records of DNSSEC (RFC 3225).
    pub dnssec: bool,
}

/// A query with one question.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Its packet, of which answers repeat the question.
    pub packet: &'a [u8],
    /// What the answer has to repeat.
    pub id: u16,
    /// Flags as sent.
    pub flags: u16,
    /// Name of the question in lower case.
    pub name: Lower,
    /// Type of the question.
    pub qtype: u16,
    /// Class of the question.
    pub class: u16,
    /// EDNS, when the client speaks it.
    pub edns: Option<Edns>,
}

impl<'a> Query<'a> {
    /// The question as sent: name, type and class.
    #[inline]
    pub fn question(&self) -> &'a [u8] {
        let end = HEADER + self.name.wire().len() + 4;
        &self.packet[HEADER..end]
    }

    /// The name as sent, whose case answers repeat.
    #[inline]
    pub fn name_as_sent(&self) -> &'a [u8] {
        &self.packet[HEADER..HEADER + self.name.wire().len()]
    }

    /// Whether the client wants somebody to ask others.
    pub fn recursion_desired(&self) -> bool {
        self.flags & flag::RD != 0
    }

    /// Whether it wants records of DNSSEC.
    pub fn dnssec(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec)
    }

    /// Longest answer that may be sent to it over UDP.
    #[inline]
    pub fn udp_limit(&self) -> usize {
        self.edns.map_or(PLAIN_UDP, |edns| usize::from(edns.size).min(super::MAX_UDP))
    }
}

/// What is no query that can be answered by its question.
#[derive(Clone, Copy, Debug)]
pub enum Refused<'a> {
    /// Nobody gets an answer: it has no header, or is a response.
    Ignored,
    /// The header is answered, and the question when there is one.
    Answered {
        /// With this.
        rcode: Rcode,
        /// The packet.
        packet: &'a [u8],
        /// Where the question ends, when it could be read.
        question_end: Option<usize>,
        /// EDNS, when it was understood.
        edns: Option<Edns>,
    },
}

/// Reads a packet.
///
/// # Errors
/// It is no query that can be looked at further, with what its sender is to be told.
#[inline]
pub fn read(packet: &[u8]) -> Result<Query<'_>, Refused<'_>> {
    let (Some(id), Some(flags)) = (u16_at(packet, 0), u16_at(packet, 2)) else {
        return Err(Refused::Ignored);
    };
    if packet.len() < HEADER || flags & flag::QR != 0 {
        return Err(Refused::Ignored);
    }
    let answered = |rcode, question_end, edns| Refused::Answered { rcode, packet, question_end, edns };
    if (flags >> 11) & 0xf != 0 {
        return Err(answered(Rcode::NotImp, None, None));
    }
    let counts = [4, 6, 8, 10].map(|at| u16_at(packet, at).unwrap_or(0));
    let malformed = answered(Rcode::FormErr, None, None);
    if counts[0] != 1 {
        return Err(malformed);
    }
    let Some(name) = Lower::from_wire(&packet[HEADER..]) else { return Err(malformed) };
    let at = HEADER + name.wire().len();
    let (Some(qtype), Some(class)) = (u16_at(packet, at), u16_at(packet, at + 2)) else {
        return Err(malformed);
    };
    let end = at + 4;
    // A query has no answers. Records of authority come with IXFR only, which is refused whatever they say.
    let edns = match (counts[1], counts[2], counts[3]) {
        (0, 0, 0) if packet.len() == end => None,
        (0, 0, more) => match opt(packet, end, more) {
            Ok(edns) => edns,
            Err(rcode) => {
                let edns =
                    (rcode == Rcode::BadVers).then_some(Edns { size: PLAIN_UDP as u16, dnssec: false });
                return Err(answered(rcode, Some(end), edns));
            }
        },
        _ if qtype == rtype::IXFR => None,
        _ => return Err(answered(Rcode::FormErr, Some(end), None)),
    };
    Ok(Query { packet, id, flags, name, qtype, class, edns })
}

/// Additional records: OPT is understood, others (TSIG, say) are passed over.
fn opt(packet: &[u8], mut at: usize, count: u16) -> Result<Option<Edns>, Rcode> {
    let mut found = None;
    for _ in 0..count {
        let owner_end = super::records::skip_name(packet, at).ok_or(Rcode::FormErr)?;
        let header = |offset| u16_at(packet, owner_end + offset).ok_or(Rcode::FormErr);
        let (kind, size, len) = (header(0)?, header(2)?, header(8)?);
        let ttl = u32_at(packet, owner_end + 4).ok_or(Rcode::FormErr)?;
        let next = owner_end + 10 + usize::from(len);
        if next > packet.len() {
            return Err(Rcode::FormErr);
        }
        if kind == rtype::OPT {
            // One, and of the root (RFC 6891 section 6.1.1).
            if found.is_some() || owner_end != at + 1 {
                return Err(Rcode::FormErr);
            }
            if (ttl >> 16) & 0xff != 0 {
                return Err(Rcode::BadVers);
            }
            found = Some(Edns { size: size.max(PLAIN_UDP as u16), dnssec: ttl & 0x8000 != 0 });
        }
        at = next;
    }
    Ok(found)
}
