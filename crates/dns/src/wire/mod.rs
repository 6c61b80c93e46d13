//! Messages of RFC 1035 and RFC 6891: only what the hot path needs, written for it. Nothing here allocates, and no
//! packet makes it panic.

mod query;
mod records;
mod reply;

pub use query::{Edns, Query, Refused, read};
pub use records::{Malformed, Message, Record, RecordData};
pub use reply::{Reply, Section};

/// Length of a message's header.
pub const HEADER: usize = 12;
/// Where the name of the question is.
pub const QNAME: u16 = HEADER as u16;
/// What every resolver takes over UDP without EDNS (RFC 1035 section 2.3.4).
pub const PLAIN_UDP: usize = 512;
/// What is sent over UDP at most, so that nothing is fragmented (DNS Flag Day 2020).
pub const MAX_UDP: usize = 1232;
/// What a length of two bytes allows over TCP.
pub const MAX_TCP: usize = 65_535;

/// Types of records.
pub mod rtype {
    /// IPv4 address.
    pub const A: u16 = 1;
    /// Name server.
    pub const NS: u16 = 2;
    /// Another name.
    pub const CNAME: u16 = 5;
    /// Start of authority.
    pub const SOA: u16 = 6;
    /// Name of an address.
    pub const PTR: u16 = 12;
    /// What RFC 8482 answers with when it is asked for everything.
    pub const HINFO: u16 = 13;
    /// Mail exchanger.
    pub const MX: u16 = 15;
    /// Text.
    pub const TXT: u16 = 16;
    /// IPv6 address.
    pub const AAAA: u16 = 28;
    /// Where a service is.
    pub const SRV: u16 = 33;
    /// Another tree of names.
    pub const DNAME: u16 = 39;
    /// EDNS (RFC 6891).
    pub const OPT: u16 = 41;
    /// Signature (RFC 4034).
    pub const RRSIG: u16 = 46;
    /// Incremental transfer of a zone.
    pub const IXFR: u16 = 251;
    /// Transfer of a zone.
    pub const AXFR: u16 = 252;
    /// All types.
    pub const ANY: u16 = 255;
}

/// The Internet.
pub const CLASS_IN: u16 = 1;

/// What became of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rcode {
    /// Answered; perhaps with nothing.
    NoError,
    /// The query is malformed.
    FormErr,
    /// It cannot be said now.
    ServFail,
    /// There is no such name.
    NxDomain,
    /// Such queries are not understood.
    NotImp,
    /// Such queries are not answered.
    Refused,
    /// The version of EDNS is not understood (RFC 6891 section 6.1.3).
    BadVers,
}

impl Rcode {
    /// As on the wire; beyond 15 part of it is in the OPT record.
    pub const fn number(self) -> u16 {
        match self {
            Self::NoError => 0,
            Self::FormErr => 1,
            Self::ServFail => 2,
            Self::NxDomain => 3,
            Self::NotImp => 4,
            Self::Refused => 5,
            Self::BadVers => 16,
        }
    }

    /// As people know it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoError => "NOERROR",
            Self::FormErr => "FORMERR",
            Self::ServFail => "SERVFAIL",
            Self::NxDomain => "NXDOMAIN",
            Self::NotImp => "NOTIMP",
            Self::Refused => "REFUSED",
            Self::BadVers => "BADVERS",
        }
    }
}

/// Bits of the header's second and third byte, as one number.
pub(crate) mod flag {
    /// A response.
    pub(crate) const QR: u16 = 1 << 15;
    /// The answerer is an authority.
    pub(crate) const AA: u16 = 1 << 10;
    /// Cut off.
    pub(crate) const TC: u16 = 1 << 9;
    /// Recursion desired.
    pub(crate) const RD: u16 = 1 << 8;
    /// Recursion available.
    pub(crate) const RA: u16 = 1 << 7;
    /// Authentic data (RFC 4035).
    pub(crate) const AD: u16 = 1 << 5;
    /// Checking disabled (RFC 4035).
    pub(crate) const CD: u16 = 1 << 4;
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes([four[0], four[1], four[2], four[3]]))
}
