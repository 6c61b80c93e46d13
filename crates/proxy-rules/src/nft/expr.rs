//! Rules as the kernel has them: expressions that work on registers.
//!
//! Only what the nft program of Debian 12 can show is used: a rule that it cannot makes `nft list ruleset` end itself, for
//! everybody on the node. It cannot use what one look-up found as the key of the next.

use std::net::IpAddr;

use nix::libc;
use podway_services::table::{Family, SetKind};

use super::{
    abi::{DATA_VALUE, DATA_VERDICT, EXPR_DATA, EXPR_NAME, LIST_ELEMENT, VERDICT_CHAIN, VERDICT_CODE},
    abi::{VERDICT_ACCEPT, VERDICT_DROP, VERDICT_GOTO},
    layout::Set,
};
use crate::{
    MASQUERADE_MARK,
    netlink::{put_attr, put_nested, put_number, put_text},
};

/// One of the kernel's sixteen registers of four bytes.
#[derive(Clone, Copy, Debug)]
struct Register(u32);

impl Register {
    const fn number(self) -> u32 {
        // NFT_REG32_00 is 8.
        8 + self.0
    }
}

const FIRST: Register = Register(0);
/// A chosen backend: address, then port.
const CHOSEN: Register = Register(8);
const VERDICT: u32 = 0;

/// Random ports of the masquerade: without, two nodes' worth of clients behind one address collide.
const RANDOM_PORTS: u32 = 1 << 4;

/// The expressions of one rule.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    family: Family,
    bytes: Vec<u8>,
}

impl Rule {
    pub(super) fn new(family: Family) -> Self {
        Self { family, bytes: Vec::new() }
    }

    /// The list of expressions as an attribute's content.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Goes to the chain of the packet's frontend, if it is for one.
    pub(super) fn dispatch(self, node_port: bool) -> Self {
        let set = if node_port { Set::NodePorts } else { Set::Frontends };
        self.load_frontend(0, node_port).lookup_at(set.name(), FIRST, Some(VERDICT), false)
    }

    /// Takes one of `count` backends of the packet's frontend at random, or ends the rule.
    pub(super) fn choose(self, kind: SetKind, node_port: bool, count: u32) -> Self {
        let set = Set::backends(kind, node_port);
        self.random(count).load_frontend(1, node_port).lookup_at(
            set.name(),
            FIRST,
            Some(CHOSEN.number()),
            false,
        )
    }

    /// One time out of `count`.
    pub(super) fn one_in(self, count: u32) -> Self {
        self.random(count).compare(FIRST, 0, &[0; 4])
    }

    /// Translates to the chosen backend.
    pub(super) fn translate(self) -> Self {
        self.translate_from(CHOSEN)
    }

    /// Translates to this backend.
    pub(super) fn translate_to(self, backend: &(IpAddr, u16)) -> Self {
        let (addr, port) = backend;
        let octets = match addr {
            IpAddr::V4(addr) => addr.octets().to_vec(),
            IpAddr::V6(addr) => addr.octets().to_vec(),
        };
        let behind = Register(FIRST.0 + self.words());
        self.constant(FIRST, &octets).constant(behind, &port.to_be_bytes()).translate_from(FIRST)
    }

    /// The client is in a set of those that had a backend lately.
    pub(super) fn remembered(self, set: &str) -> Self {
        self.load_address(FIRST, true).lookup_at(set, FIRST, None, false)
    }

    /// The client is in that set for so long from now.
    pub(super) fn remember(self, set: &str, seconds: u32) -> Self {
        self.load_address(FIRST, true).expr("dynset", |e| {
            put_text(e, 1, set);
            // Update.
            put_number(e, 3, 1);
            put_number(e, 4, FIRST.number());
            put_attr(e, 6, &(u64::from(seconds) * 1000).to_be_bytes());
        })
    }

    /// The source is none of those that may send to this frontend.
    pub(super) fn outside_ranges(self) -> Self {
        let client = self.words() + 2;
        self.load_frontend(0, false).load_address(Register(client), true).lookup_at(
            Set::Ranges.name(),
            FIRST,
            None,
            true,
        )
    }

    /// The node itself is the sender.
    pub(super) fn sent_by_node(self) -> Self {
        self.expr("fib", |e| {
            put_number(e, 1, FIRST.number());
            // The type of the source address.
            put_number(e, 2, 3);
            put_number(e, 3, 1);
        })
        .compare(FIRST, 0, &u32::from(libc::RTN_LOCAL).to_ne_bytes())
    }

    /// The source of the packet is in a set.
    pub(super) fn source_in(self, set: Set) -> Self {
        self.load_address(FIRST, true).lookup_at(set.name(), FIRST, None, false)
    }

    /// The destination of the packet is in a set.
    pub(super) fn destination_in(self, set: Set) -> Self {
        self.load_address(FIRST, false).lookup_at(set.name(), FIRST, None, false)
    }

    /// Source and destination are the same pod.
    pub(super) fn hairpin(self) -> Self {
        let words = self.words();
        self.load_address(FIRST, true).load_address(Register(words), false).lookup_at(
            Set::Hairpin.name(),
            FIRST,
            None,
            false,
        )
    }

    /// The packet is of a protocol.
    pub(super) fn protocol(self, number: u8) -> Self {
        self.load_protocol(Register(0)).compare(Register(0), 0, &[number])
    }

    /// Connection tracking cannot make sense of the packet.
    pub(super) fn invalid(self) -> Self {
        self.state(1)
    }

    /// The packet answers another one, and is no first packet of a connection itself.
    pub(super) fn related(self) -> Self {
        self.state(4)
    }

    /// Connection tracking has a bit for the packet.
    fn state(self, bit: u32) -> Self {
        self.expr("ct", |e| {
            put_number(e, 1, FIRST.number());
            put_number(e, 2, 0);
        })
        .bitwise(bit, 0)
        .compare(FIRST, 1, &[0; 4])
    }

    /// The source of the packet is to be replaced.
    pub(super) fn marked(self) -> Self {
        self.load_mark().bitwise(MASQUERADE_MARK, 0).compare(Register(0), 1, &[0; 4])
    }

    /// Sets or clears our bit of the packet's mark.
    pub(super) fn mark(self, on: bool) -> Self {
        self.load_mark().bitwise(!MASQUERADE_MARK, if on { MASQUERADE_MARK } else { 0 }).expr("meta", |e| {
            put_number(e, 2, 3);
            put_number(e, 3, Register(0).number());
        })
    }

    /// The node's address replaces the source.
    pub(super) fn masquerade(self) -> Self {
        self.expr("masq", |e| put_number(e, 1, RANDOM_PORTS))
    }

    /// Goes to a chain for good.
    pub(super) fn goto(self, chain: &str) -> Self {
        self.verdict(VERDICT_GOTO, Some(chain))
    }

    /// Leaves the packet alone.
    pub(super) fn accept(self) -> Self {
        self.verdict(VERDICT_ACCEPT, None)
    }

    /// Discards.
    pub(super) fn drop(self) -> Self {
        self.verdict(VERDICT_DROP, None)
    }

    /// Discards and tells a TCP sender.
    pub(super) fn reset(self) -> Self {
        self.expr("reject", |e| put_number(e, 1, 1))
    }

    /// Discards and tells any other sender.
    pub(super) fn unreachable(self) -> Self {
        // Port unreachable: ICMP code 3, ICMPv6 code 4.
        let code = if self.family == Family::V4 { 3 } else { 4 };
        self.expr("reject", |e| {
            put_number(e, 1, 0);
            put_attr(e, 2, &[code]);
        })
    }

    /// Registers that an address takes.
    const fn words(&self) -> u32 {
        match self.family {
            Family::V4 => 1,
            Family::V6 => 4,
        }
    }

    const fn protocol_family(&self) -> u32 {
        match self.family {
            Family::V4 => libc::NFPROTO_IPV4 as u32,
            Family::V6 => libc::NFPROTO_IPV6 as u32,
        }
    }

    fn load_address(self, to: Register, source: bool) -> Self {
        let (offset, length) = match (self.family, source) {
            (Family::V4, true) => (12, 4),
            (Family::V4, false) => (16, 4),
            (Family::V6, true) => (8, 16),
            (Family::V6, false) => (24, 16),
        };
        self.payload(to, 1, offset, length)
    }

    fn load_port(self, to: Register) -> Self {
        // The same place in TCP, UDP and SCTP.
        self.payload(to, 2, 2, 2)
    }

    fn payload(self, to: Register, base: u32, offset: u32, length: u32) -> Self {
        self.expr("payload", |e| {
            put_number(e, 1, to.number());
            put_number(e, 2, base);
            put_number(e, 3, offset);
            put_number(e, 4, length);
        })
    }

    fn load_protocol(self, to: Register) -> Self {
        self.expr("meta", |e| {
            put_number(e, 2, 16);
            put_number(e, 1, to.number());
        })
    }

    fn load_mark(self) -> Self {
        self.expr("meta", |e| {
            put_number(e, 2, 3);
            put_number(e, 1, Register(0).number());
        })
    }

    /// Protocol and port of the packet, and its destination before them, in registers from the n-th on.
    fn load_frontend(self, first: u32, node_port: bool) -> Self {
        if node_port {
            return self.load_protocol(Register(first)).load_port(Register(first + 1));
        }
        let words = self.words();
        self.load_address(Register(first), false)
            .load_protocol(Register(first + words))
            .load_port(Register(first + words + 1))
    }

    fn random(self, count: u32) -> Self {
        self.expr("numgen", |e| {
            put_number(e, 1, FIRST.number());
            put_number(e, 2, count);
            put_number(e, 3, 1);
        })
    }

    fn constant(self, to: Register, value: &[u8]) -> Self {
        self.expr("immediate", |e| {
            put_number(e, 1, to.number());
            put_nested(e, 2, |d| put_attr(d, DATA_VALUE, value));
        })
    }

    fn translate_from(self, from: Register) -> Self {
        let family = self.protocol_family();
        let port = Register(from.0 + self.words());
        self.expr("nat", |e| {
            put_number(e, 1, 1);
            put_number(e, 2, family);
            put_number(e, 3, from.number());
            put_number(e, 5, port.number());
        })
    }

    fn lookup_at(self, set: &str, key: Register, to: Option<u32>, inverted: bool) -> Self {
        self.expr("lookup", |e| {
            put_text(e, 1, set);
            put_number(e, 2, key.number());
            if let Some(to) = to {
                put_number(e, 3, to);
            }
            if inverted {
                put_number(e, 5, 1);
            }
        })
    }

    /// Numbers that the kernel computes are in host order.
    fn bitwise(self, mask: u32, xor: u32) -> Self {
        self.expr("bitwise", |e| {
            put_number(e, 1, Register(0).number());
            put_number(e, 2, Register(0).number());
            put_number(e, 3, 4);
            put_nested(e, 4, |d| put_attr(d, DATA_VALUE, &mask.to_ne_bytes()));
            put_nested(e, 5, |d| put_attr(d, DATA_VALUE, &xor.to_ne_bytes()));
        })
    }

    fn compare(self, register: Register, operation: u32, value: &[u8]) -> Self {
        self.expr("cmp", |e| {
            put_number(e, 1, register.number());
            put_number(e, 2, operation);
            put_nested(e, 3, |d| put_attr(d, DATA_VALUE, value));
        })
    }

    fn verdict(self, code: i32, chain: Option<&str>) -> Self {
        self.expr("immediate", |e| {
            put_number(e, 1, VERDICT);
            put_nested(e, 2, |d| put_verdict(d, code, chain));
        })
    }

    fn expr(mut self, name: &str, fill: impl FnOnce(&mut Vec<u8>)) -> Self {
        put_nested(&mut self.bytes, LIST_ELEMENT, |e| {
            put_text(e, EXPR_NAME, name);
            put_nested(e, EXPR_DATA, fill);
        });
        self
    }
}

/// A verdict as data.
pub(super) fn put_verdict(to: &mut Vec<u8>, code: i32, chain: Option<&str>) {
    put_nested(to, DATA_VERDICT, |v| {
        put_attr(v, VERDICT_CODE, &code.to_be_bytes());
        if let Some(chain) = chain {
            put_text(v, VERDICT_CHAIN, chain);
        }
    });
}
