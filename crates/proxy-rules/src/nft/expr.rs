//! Rules as the kernel has them: expressions that work on registers.
//!
//! They are built here and not from nft's text, because nft's language has no way to use the result of one map as part
//! of the key of the next, and that is what makes a fixed number of rules serve any number of services.

use nix::libc;
use podway_services::table::{Family, SetKind};

use super::{
    abi::{DATA_VALUE, DATA_VERDICT, EXPR_DATA, EXPR_NAME, LIST_ELEMENT, VERDICT_CHAIN, VERDICT_CODE},
    abi::{VERDICT_DROP, VERDICT_GOTO},
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

/// Where a look-up of a frontend leaves the plan; the service's number follows it.
const PLAN: Register = Register(8);
const SERVICE: Register = Register(9);
/// The random slot; with the number before it, the key of a backend.
const SLOT: Register = Register(10);
/// The chosen backend: address, then port.
const CHOSEN: Register = Register(11);
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

    /// Finds the frontend of the packet, or ends the rule.
    pub(super) fn frontend(self, node_port: bool) -> Self {
        if node_port {
            self.load_protocol(Register(0)).load_port(Register(1)).lookup(
                Set::NodePorts,
                Register(0),
                Some(PLAN),
            )
        } else {
            let end = self.words();
            self.load_address(Register(0), false)
                .load_protocol(Register(end))
                .load_port(Register(end + 1))
                .lookup(Set::Frontends, Register(0), Some(PLAN))
        }
    }

    /// After [`Self::frontend`]: goes to the chain of its plan.
    pub(super) fn follow_plan(self, plans: Set) -> Self {
        let set = plans.name().to_owned();
        self.expr("lookup", |e| {
            put_text(e, 1, &set);
            put_number(e, 2, PLAN.number());
            put_number(e, 3, VERDICT);
        })
    }

    /// After [`Self::frontend`]: takes one of `count` backends at random, or ends the rule.
    pub(super) fn choose(self, kind: SetKind, count: u32) -> Self {
        self.expr("numgen", |e| {
            put_number(e, 1, SLOT.number());
            put_number(e, 2, count);
            put_number(e, 3, 1);
        })
        .lookup(Set::backends(kind), SERVICE, Some(CHOSEN))
    }

    /// After [`Self::frontend`]: takes the backend that the client had, if it still serves, or ends the rule.
    pub(super) fn remembered(self, kind: SetKind) -> Self {
        let words = self.words();
        let mut rule = self.load_address(Register(SERVICE.0 - words), true).lookup(
            Set::Affinity,
            Register(SERVICE.0 - words),
            Some(SLOT),
        );
        // Number, address and port lie one behind the other: the key of the members.
        rule = rule.lookup(Set::members(kind), SERVICE, None);
        rule
    }

    /// After [`Self::remembered`]: it counts from now.
    pub(super) fn refresh(self, seconds: u32) -> Self {
        let key = Register(SERVICE.0 - self.words());
        self.dynset(1, key, SLOT, Some(seconds))
    }

    /// After [`Self::choose`]: the client gets this one for so long.
    pub(super) fn remember(self, seconds: u32) -> Self {
        let key = Register(SERVICE.0 - self.words());
        // What is there names a backend that is gone; updating would keep it.
        self.load_address(key, true).dynset(2, key, CHOSEN, None).dynset(0, key, CHOSEN, Some(seconds))
    }

    /// Translates to the chosen backend.
    pub(super) fn translate(self) -> Self {
        self.translate_to(CHOSEN)
    }

    /// Translates to the remembered backend.
    pub(super) fn translate_remembered(self) -> Self {
        self.translate_to(SLOT)
    }

    fn translate_to(self, from: Register) -> Self {
        let family = self.protocol_family();
        let port = Register(from.0 + self.words());
        self.expr("nat", |e| {
            put_number(e, 1, 1);
            put_number(e, 2, family);
            put_number(e, 3, from.number());
            put_number(e, 5, port.number());
        })
    }

    /// The source of the packet is in a set.
    pub(super) fn source_in(self, set: Set) -> Self {
        self.load_address(Register(0), true).lookup(set, Register(0), None)
    }

    /// The destination of the packet is in a set.
    pub(super) fn destination_in(self, set: Set) -> Self {
        self.load_address(Register(0), false).lookup(set, Register(0), None)
    }

    /// After [`Self::frontend`] of an address: the source is in none of its ranges.
    pub(super) fn outside_ranges(self) -> Self {
        let words = self.words();
        // Destination, number and source lie one behind the other.
        let start = Register(SERVICE.0 - words);
        let name = Set::Ranges.name();
        self.load_address(start, false).load_address(SLOT, true).expr("lookup", |e| {
            put_text(e, 1, name);
            put_number(e, 2, start.number());
            put_number(e, 5, 1);
        })
    }

    /// Source and destination are the same pod.
    pub(super) fn hairpin(self) -> Self {
        let words = self.words();
        self.load_address(Register(0), true).load_address(Register(words), false).lookup(
            Set::Hairpin,
            Register(0),
            None,
        )
    }

    /// The packet is of a protocol.
    pub(super) fn protocol(self, number: u8) -> Self {
        self.load_protocol(Register(0)).compare(Register(0), 0, &[number])
    }

    /// Connection tracking cannot make sense of the packet.
    pub(super) fn invalid(self) -> Self {
        self.expr("ct", |e| {
            put_number(e, 1, Register(0).number());
            put_number(e, 2, 0);
        })
        .bitwise(1, 0)
        .compare(Register(0), 1, &[0; 4])
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

    fn lookup(self, set: Set, key: Register, to: Option<Register>) -> Self {
        self.expr("lookup", |e| {
            put_text(e, 1, set.name());
            put_number(e, 2, key.number());
            if let Some(to) = to {
                put_number(e, 3, to.number());
            }
        })
    }

    /// Adds (0), updates (1) or deletes (2) an element of the affinity map.
    fn dynset(self, operation: u32, key: Register, data: Register, timeout_s: Option<u32>) -> Self {
        self.expr("dynset", |e| {
            put_text(e, 1, Set::Affinity.name());
            put_number(e, 3, operation);
            put_number(e, 4, key.number());
            put_number(e, 5, data.number());
            if let Some(seconds) = timeout_s {
                put_attr(e, 6, &(u64::from(seconds) * 1000).to_be_bytes());
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
