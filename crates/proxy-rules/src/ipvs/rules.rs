//! The nftables table beside IPVS: what IPVS cannot do itself. It refuses and drops, marks for the virtual servers by
//! mark, masquerades, and records which virtual servers are ours.
//!
//! IPVS takes packets in the hooks `input` (priority 99) and `output` (−98); refusing comes before it. Whose source is
//! replaced is decided before it, too, while the packet still has the service's address, and carried to the hook
//! `postrouting` by a bit of the connection's mark. The packet's own mark cannot carry it: IPVS compares that as a
//! whole.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use podway_services::table::{Family, Protocol};
use serde_json::Value;

use super::netlink::ServerKey;
use super::plan::{
    ALLOWED, Element, FRONTENDS, HAIRPIN, MARKED, MARKS, MASQUERADES, PODS, RANGED, RESERVED, SERVERS,
    VERDICTS, VIPS, mark_text, prefix, protocol_name,
};
use crate::foreign::tools::{self, ToolError};
use crate::{Error, MASQUERADE_MARK, Result};

/// The table's name; `inet` holds both families.
pub(crate) const TABLE: &str = "podway-ipvs";

/// Address, protocol and port.
const TUPLE: &str = "ADDR . inet_proto . inet_service";

/// Every set and map: name, keyword, type, flags.
const SETS: [(&str, &str, &str, &str); 18] = [
    (SERVERS, "set", TUPLE, ""),
    (MARKED, "set", "mark", ""),
    (VIPS, "set", "ADDR", ""),
    (FRONTENDS, "set", TUPLE, ""),
    (VERDICTS[0], "map", "ADDR . inet_proto . inet_service : verdict", ""),
    (VERDICTS[1], "map", "ADDR . inet_proto . inet_service : verdict", ""),
    (VERDICTS[2], "map", "ADDR . inet_proto . inet_service : verdict", ""),
    (MARKS[0], "map", "ADDR . inet_proto . inet_service : mark", ""),
    (MARKS[1], "map", "ADDR . inet_proto . inet_service : mark", ""),
    (MARKS[2], "map", "ADDR . inet_proto . inet_service : mark", ""),
    (MASQUERADES[0], "set", TUPLE, ""),
    (MASQUERADES[1], "set", TUPLE, ""),
    (MASQUERADES[2], "set", TUPLE, ""),
    (RANGED, "set", TUPLE, ""),
    (ALLOWED, "set", "ADDR . inet_proto . inet_service . ADDR", "interval"),
    (HAIRPIN, "set", "ADDR . ADDR", ""),
    (PODS, "set", "ADDR", "interval"),
    (RESERVED, "set", "ADDR", "interval"),
];

/// Rules by chain. `IP` is `ip` or `ip6`, `4` at the end of a set's name the family; rules with `IP` are there for
/// both families.
const RULES: [(&str, &str, &[&str]); 6] = [
    ("refuse", "", &["meta l4proto tcp reject with tcp reset", "reject with icmpx port-unreachable"]),
    (
        "prerouting",
        "type filter hook prerouting priority mangle; policy accept;",
        &[
            // What the node sends to itself was judged on its way out.
            "iif lo return",
            "meta l4proto != { tcp, udp, sctp } return",
            "ct state new IP daddr . meta l4proto . th dport @ranged4 IP daddr . meta l4proto . th dport . IP saddr != @allowed4 drop",
            "ct state new IP saddr @pods4 IP daddr . meta l4proto . th dport @masquerade_pod4 ct mark set ct mark or BIT",
            "ct state new IP saddr != @pods4 IP daddr . meta l4proto . th dport @masquerade_external4 ct mark set ct mark or BIT",
            "IP saddr @pods4 meta mark set IP daddr . meta l4proto . th dport map @marks_pod4",
            "IP saddr != @pods4 meta mark set IP daddr . meta l4proto . th dport map @marks_external4",
        ],
    ),
    (
        "input",
        "type filter hook input priority filter - 5; policy accept;",
        &[
            "iif lo return",
            "meta l4proto != { tcp, udp, sctp } return",
            "ct state != new return",
            "IP saddr @pods4 IP daddr . meta l4proto . th dport vmap @verdicts_pod4",
            "IP saddr != @pods4 IP daddr . meta l4proto . th dport vmap @verdicts_external4",
            "IP daddr @vips4 IP daddr . meta l4proto . th dport != @frontends4 goto refuse",
        ],
    ),
    (
        "output",
        "type filter hook output priority mangle; policy accept;",
        &[
            "ct state new IP daddr @reserved4 IP daddr != @vips4 drop",
            "meta l4proto != { tcp, udp, sctp } return",
            "ct state new IP daddr . meta l4proto . th dport vmap @verdicts_node4",
            "ct state new IP daddr @vips4 IP daddr . meta l4proto . th dport != @frontends4 goto refuse",
            "ct state new IP daddr . meta l4proto . th dport @masquerade_node4 ct mark set ct mark or BIT",
            // A socket of the node that connects to an address on our device is given that address as its own.
            "ct state new IP saddr @vips4 IP daddr . meta l4proto . th dport @frontends4 ct mark set ct mark or BIT",
            "meta mark set IP daddr . meta l4proto . th dport map @marks_node4",
        ],
    ),
    (
        "forward",
        "type filter hook forward priority filter - 5; policy accept;",
        &["ct state new IP daddr @reserved4 IP daddr != @vips4 drop"],
    ),
    (
        "postrouting",
        "type nat hook postrouting priority srcnat - 5; policy accept;",
        &[
            "ct mark and BIT == BIT ct mark set ct mark and REST masquerade fully-random",
            // A pod that is its own endpoint would otherwise answer itself past us.
            "IP saddr . IP daddr @hairpin4 masquerade fully-random",
        ],
    ),
];

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// What is in the kernel.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    pub(crate) elements: BTreeSet<Element>,
    /// The rules, chain by chain, as nft prints them.
    pub(crate) rules: Vec<String>,
    /// Elements that are none of ours.
    pub(crate) strange: Vec<String>,
}

/// Makes table, sets and chains, and writes the rules anew, in one transaction. Elements stay. A table that an older
/// release made in another way is replaced.
pub(crate) fn write_rules() -> Result<()> {
    let text = definition();
    match run(&text) {
        Err(Error::Refused { .. }) => {
            run(&format!("add table inet {TABLE}\ndelete table inet {TABLE}\n{text}"))
        }
        result => result,
    }
}

fn definition() -> String {
    let mut text = format!("add table inet {TABLE}\n");
    for (family, digit, addr) in [("ip", '4', "ipv4_addr"), ("ip6", '6', "ipv6_addr")] {
        let _ = family;
        for (name, keyword, kind, flags) in SETS {
            let kind = kind.replace("ADDR", addr);
            let flags = if flags.is_empty() { String::new() } else { format!(" flags {flags};") };
            let _ = writeln!(text, "add {keyword} inet {TABLE} {name}{digit} {{ type {kind};{flags} }}");
        }
    }
    for (chain, hook, _) in RULES {
        let hook = if hook.is_empty() { String::new() } else { format!(" {{ {hook} }}") };
        let _ = writeln!(text, "add chain inet {TABLE} {chain}{hook}\nflush chain inet {TABLE} {chain}");
    }
    for (chain, _, rules) in RULES {
        for rule in rules {
            if rule.contains("IP ") {
                for (family, digit) in [("ip", '4'), ("ip6", '6')] {
                    let rule = in_family(rule, family, digit);
                    let _ = writeln!(text, "add rule inet {TABLE} {chain} {rule}");
                }
            } else {
                let _ = writeln!(text, "add rule inet {TABLE} {chain} {}", in_family(rule, "", ' '));
            }
        }
    }
    text
}

/// A rule of one family: the words `IP`, `BIT` (of the connection's mark) and `REST` (the others), and the digit at the end of each set's name.
fn in_family(rule: &str, family: &str, digit: char) -> String {
    let words = rule.split(' ').map(|word| match word {
        "IP" => family.to_owned(),
        "BIT" => format!("{MASQUERADE_MARK:#010x}"),
        "REST" => format!("{:#010x}", !MASQUERADE_MARK),
        set if set.starts_with('@') => format!("{}{digit}", set.trim_end_matches('4')),
        word => word.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Removes and adds elements in one transaction.
pub(crate) fn change(remove: &BTreeSet<Element>, add: &BTreeSet<Element>) -> Result<()> {
    let mut text = String::new();
    for (command, elements) in [("delete", remove), ("add", add)] {
        let mut by_set: BTreeMap<(&str, Family), Vec<String>> = BTreeMap::new();
        for element in elements {
            let value = element.value.as_ref().map_or_else(String::new, |v| format!(" : {v}"));
            by_set.entry((element.set, element.family)).or_default().push(format!("{}{value}", element.key));
        }
        for ((set, family), elements) in by_set {
            let digit = digit(family);
            let _ =
                writeln!(text, "{command} element inet {TABLE} {set}{digit} {{ {} }}", elements.join(", "));
        }
    }
    if text.is_empty() { Ok(()) } else { run(&text) }
}

/// What the table holds; `None` when there is no such table.
pub(crate) fn list() -> Result<Option<Listed>> {
    let text = match tools::run("nft", &["-j", "list", "table", "inet", TABLE], "") {
        Ok(text) => text,
        Err(ToolError::Failed { said, .. }) if said.contains("No such file or directory") => return Ok(None),
        Err(error) => return Err(refused(error)),
    };
    let whole: Value = serde_json::from_str(&text).map_err(|error| Error::Refused {
        mechanism: "nft",
        object: format!("table inet {TABLE}"),
        cause: format!("its JSON cannot be read: {error}"),
    })?;
    let mut listed = Listed::default();
    for object in whole["nftables"].as_array().into_iter().flatten() {
        if let Some(rule) = object.get("rule") {
            listed.rules.push(format!("{} {}", rule["chain"].as_str().unwrap_or_default(), rule["expr"]));
        }
        let Some(body) = object.get("set").or_else(|| object.get("map")) else { continue };
        let name = body["name"].as_str().unwrap_or_default();
        let known = SETS.iter().find_map(|(set, ..)| {
            let family = match name.strip_prefix(set)? {
                "4" => Family::V4,
                "6" => Family::V6,
                _ => return None,
            };
            Some((*set, family))
        });
        let Some((set, family)) = known else {
            listed.strange.push(format!("set {name}"));
            continue;
        };
        for value in body["elem"].as_array().into_iter().flatten() {
            let (key, value) = match value.as_array().map(Vec::as_slice) {
                Some([key, value]) => (key, Some(value)),
                _ => (value, None),
            };
            let key = key_text(key, set == MARKED);
            match (key, value.map(value_text)) {
                (Some(key), None) => drop(listed.elements.insert(Element { set, family, key, value: None })),
                (Some(key), Some(Some(value))) => {
                    listed.elements.insert(Element { set, family, key, value: Some(value) });
                }
                _ => listed.strange.push(format!("an element of {name}")),
            }
        }
    }
    Ok(Some(listed))
}

/// Deletes the table. Returns whether there was one.
pub(crate) fn delete() -> Result<bool> {
    match tools::run("nft", &["delete", "table", "inet", TABLE], "") {
        Ok(_) => Ok(true),
        Err(ToolError::Failed { said, .. }) if said.contains("No such file or directory") => Ok(false),
        Err(error) => Err(refused(error)),
    }
}

/// The virtual servers that are recorded as ours.
pub(crate) fn own_servers() -> HashSet<ServerKey> {
    let listed = list().ok().flatten().unwrap_or_default();
    listed.elements.iter().filter_map(recorded).collect()
}

/// The virtual server that an element records.
pub(crate) fn recorded(element: &Element) -> Option<ServerKey> {
    match element.set {
        MARKED => {
            let mark = u32::from_str_radix(element.key.strip_prefix("0x")?, 16).ok()?;
            Some(ServerKey::Mark(mark, element.family))
        }
        SERVERS => {
            let mut parts = element.key.split(" . ");
            let (addr, protocol, port) = (parts.next()?, parts.next()?, parts.next()?);
            let protocol = PROTOCOLS.iter().find(|p| protocol_name(**p) == protocol)?;
            Some(ServerKey::Address(addr.parse().ok()?, port.parse().ok()?, *protocol))
        }
        _ => None,
    }
}

fn digit(family: Family) -> char {
    match family {
        Family::V4 => '4',
        Family::V6 => '6',
    }
}

/// One key, or the parts of one, in the form of our own elements.
fn key_text(value: &Value, mark: bool) -> Option<String> {
    if let Some(parts) = value.get("concat").and_then(Value::as_array) {
        let mut parts: Vec<String> = parts.iter().map(|part| key_text(part, false)).collect::<Option<_>>()?;
        // Without /etc/protocols nft prints numbers.
        if let [_, protocol, _, ..] = parts.as_mut_slice()
            && let Some(name) = PROTOCOLS.iter().find(|p| p.number().to_string() == *protocol)
        {
            *protocol = protocol_name(*name).to_owned();
        }
        return Some(parts.join(" . "));
    }
    if let Some(body) = value.get("prefix") {
        let addr: IpAddr = body["addr"].as_str()?.parse().ok()?;
        return Some(prefix(&IpNet::new(addr, u8::try_from(body["len"].as_u64()?).ok()?).ok()?));
    }
    match value {
        Value::Number(number) if mark => Some(mark_text(u32::try_from(number.as_u64()?).ok()?)),
        Value::Number(number) => Some(number.to_string()),
        // Addresses in one form, names as they are.
        Value::String(text) => Some(text.parse::<IpAddr>().map_or_else(|_| text.clone(), |a| a.to_string())),
        _ => None,
    }
}

fn value_text(value: &Value) -> Option<String> {
    if let Some(number) = value.as_u64() {
        return Some(mark_text(u32::try_from(number).ok()?));
    }
    let (word, body) = value.as_object()?.iter().next()?;
    Some(match body.get("target").and_then(Value::as_str) {
        Some(target) => format!("{word} {target}"),
        None => word.clone(),
    })
}

fn run(text: &str) -> Result<()> {
    tools::run("nft", &["-f", "-"], text).map(drop).map_err(refused)
}

fn refused(error: ToolError) -> Error {
    match error {
        ToolError::CannotRun { tool, source } => {
            Error::Missing { program: tool, package: "nftables", source }
        }
        ToolError::Failed { said, .. } => {
            Error::Refused { mechanism: "nft", object: format!("table inet {TABLE}"), cause: said }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::foreign::testing::Scratch;

    #[test]
    fn rules_are_written_for_both_families() {
        let text = definition();
        assert!(text.contains(
            "add rule inet podway-ipvs forward ct state new ip6 daddr @reserved6 ip6 daddr != @vips6 drop"
        ));
        assert!(
            text.contains(
                "add rule inet podway-ipvs postrouting ct mark and 0x00800000 == 0x00800000 ct mark"
            )
        );
        assert_eq!(text.matches("iif lo return").count(), 2);
        assert!(!text.contains("IP "));
    }

    #[test]
    fn protocols_may_be_numbers() {
        let key = serde_json::json!({"concat": ["10.96.0.1", 132, 6]});
        assert_eq!(key_text(&key, false).unwrap(), "10.96.0.1 . sctp . 6");
        let key = serde_json::json!({"concat": ["fd00:0::1", "udp", 17]});
        assert_eq!(key_text(&key, false).unwrap(), "fd00::1 . udp . 17");
    }

    #[test]
    fn elements_are_read_as_they_were_written() {
        let Some(scratch) = Scratch::new("pwt-ipvs-rules") else { return };
        let of = |set, family, key: &str, value: Option<&str>| Element {
            set,
            family,
            key: key.to_owned(),
            value: value.map(str::to_owned),
        };
        use Family::{V4, V6};
        let all = BTreeSet::from([
            of(SERVERS, V4, "10.96.0.1 . tcp . 443", None),
            of(SERVERS, V6, "fd00:96::1 . udp . 53", None),
            of(MARKED, V6, "0x50000003", None),
            of(VIPS, V6, "fd00:96::1", None),
            of(VERDICTS[0], V4, "10.96.0.1 . sctp . 9", Some("goto refuse")),
            of(VERDICTS[2], V4, "10.96.0.1 . tcp . 80", Some("drop")),
            of(MARKS[2], V4, "10.96.0.1 . tcp . 443", Some("0x50000003")),
            of(ALLOWED, V4, "10.96.0.1 . tcp . 443 . 192.0.2.0/25", None),
            of(ALLOWED, V4, "10.96.0.1 . tcp . 443 . 198.51.100.7", None),
            of(ALLOWED, V6, "fd00:96::1 . tcp . 443 . 2001:db8::/32", None),
            of(HAIRPIN, V4, "10.244.0.5 . 10.244.0.5", None),
            of(PODS, V4, "10.244.0.0/16", None),
            of(RESERVED, V6, "fd00:96::/112", None),
        ]);
        scratch.run(|| {
            assert!(list().unwrap().is_none());
            write_rules().unwrap();
            let none = BTreeSet::new();
            change(&none, &all).unwrap();
            let listed = list().unwrap().unwrap();
            assert_eq!(listed.elements, all);
            assert!(listed.strange.is_empty(), "{:?}", listed.strange);
            // Once more changes no rule and loses no element.
            write_rules().unwrap();
            let again = list().unwrap().unwrap();
            assert_eq!((&again.elements, &again.rules), (&all, &listed.rules));
            assert_eq!(own_servers().len(), 3);
            // A value changes in one transaction.
            let old = BTreeSet::from([of(VERDICTS[2], V4, "10.96.0.1 . tcp . 80", Some("drop"))]);
            let new = BTreeSet::from([of(VERDICTS[2], V4, "10.96.0.1 . tcp . 80", Some("goto refuse"))]);
            change(&old, &new).unwrap();
            change(&all.difference(&old).cloned().chain(new).collect(), &none).unwrap();
            assert!(list().unwrap().unwrap().elements.is_empty());
            // What somebody else made under our name is replaced.
            assert!(delete().unwrap() && !delete().unwrap());
            run("add table inet podway-ipvs\nadd set inet podway-ipvs vips4 { type inet_service; }\n")
                .unwrap();
            write_rules().unwrap();
            assert!(list().unwrap().unwrap().elements.is_empty());
        });
    }
}
