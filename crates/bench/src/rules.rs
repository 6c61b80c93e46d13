//! iptables rules of the shape that kube-proxy leaves on a node, for any number of services.
//!
//! Written from the structure of kube-proxy's iptables mode: one line per service in `KUBE-SERVICES`, a chain per
//! service that spreads over a chain per endpoint, each endpoint rewriting the destination. Services have two
//! endpoints. None of the addresses is one that a bench uses, so what is measured is passing by, which is what most
//! packets of a node do. The counter of invalid packets (nfacct), which recent versions add where the kernel has it,
//! is left out.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use crate::services::population::{NAMESPACE, Population, name, service_address};
use crate::traffic::PORT;

/// Most services: their addresses are counted in 16 bits.
pub const MAX_SERVICES: u16 = 20_000;
/// Mark of packets whose source is to be rewritten.
const MASQUERADE_MARK: &str = "0x4000/0x4000";
/// Pods' prefix; sources within it keep their address.
const CLUSTER_CIDR: &str = "10.244.0.0/16";

struct Service {
    comment: String,
    address: Ipv4Addr,
    port: u16,
    chain: String,
    /// Address and port, and the chain.
    endpoints: Vec<(Ipv4Addr, u16, String)>,
}

/// Input for `iptables-restore`: the rules of `count` services and of the API server's own.
#[must_use]
pub fn kube_proxy(count: u16) -> String {
    rules(&std::iter::once(api_server()).chain((0..count.min(MAX_SERVICES)).map(service)).collect::<Vec<_>>())
}

/// The same for the services of a population, which can be connected to.
#[must_use]
pub fn kube_proxy_for(population: &Population) -> String {
    let service = |index: u32| Service {
        comment: format!("{NAMESPACE}/{}", name(index)),
        address: service_address(index),
        port: PORT,
        chain: chain("SVC", index, 0),
        endpoints: (0..population.endpoints)
            .map(|e| {
                (
                    population.endpoint_address(index, e, 0),
                    PORT,
                    chain("SEP", index * population.endpoints + e, 1),
                )
            })
            .collect(),
    };
    rules(&std::iter::once(api_server()).chain((0..population.services).map(service)).collect::<Vec<_>>())
}

fn rules(services: &[Service]) -> String {
    let mut text = String::new();
    filter(&mut text);
    nat(&mut text, services);
    text
}

fn api_server() -> Service {
    Service {
        comment: "default/kubernetes:https".into(),
        address: Ipv4Addr::new(10, 96, 0, 1),
        port: 443,
        chain: chain("SVC", u32::MAX, 0),
        endpoints: vec![(Ipv4Addr::new(192, 0, 2, 1), 6443, chain("SEP", u32::MAX, 0))],
    }
}

fn service(index: u16) -> Service {
    let [high, low] = index.to_be_bytes();
    let number = u32::from(index);
    // RFC 2544's prefix for benches stands for pods of other nodes.
    let endpoint =
        |half: u8, nth| (Ipv4Addr::new(198, 18 + half, high, low), 8080, chain("SEP", number, nth));
    Service {
        comment: format!("bench/service-{index}:http"),
        address: Ipv4Addr::new(10, 97 + high / 128, high, low),
        port: 80,
        chain: chain("SVC", number, 0),
        endpoints: vec![endpoint(0, 0), endpoint(1, 1)],
    }
}

/// Chains are named by 16 characters of a hash; here by 16 digits that are as different.
fn chain(kind: &str, number: u32, nth: u32) -> String {
    let mixed = (u64::from(number) * 2 + u64::from(nth) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    format!("KUBE-{kind}-{mixed:016X}")
}

fn filter(text: &mut String) {
    *text += "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n";
    for name in [
        "EXTERNAL-SERVICES",
        "FIREWALL",
        "FORWARD",
        "NODEPORTS",
        "PROXY-CANARY",
        "PROXY-FIREWALL",
        "SERVICES",
    ] {
        let _ = writeln!(text, ":KUBE-{name} - [0:0]");
    }
    let new = "-m conntrack --ctstate NEW -m comment --comment";
    for (from, condition, target) in [
        ("INPUT", String::new(), "KUBE-FIREWALL"),
        ("INPUT", format!("{new} \"load balancer firewall\""), "KUBE-PROXY-FIREWALL"),
        ("INPUT", "-m comment --comment \"health check ports\"".into(), "KUBE-NODEPORTS"),
        ("INPUT", format!("{new} \"external services\""), "KUBE-EXTERNAL-SERVICES"),
        ("FORWARD", format!("{new} \"load balancer firewall\""), "KUBE-PROXY-FIREWALL"),
        ("FORWARD", "-m comment --comment \"forwarding\"".into(), "KUBE-FORWARD"),
        ("FORWARD", format!("{new} \"services\""), "KUBE-SERVICES"),
        ("FORWARD", format!("{new} \"external services\""), "KUBE-EXTERNAL-SERVICES"),
        ("OUTPUT", String::new(), "KUBE-FIREWALL"),
        ("OUTPUT", format!("{new} \"load balancer firewall\""), "KUBE-PROXY-FIREWALL"),
        ("OUTPUT", format!("{new} \"services\""), "KUBE-SERVICES"),
        (
            "KUBE-FIREWALL",
            "! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"loopback from elsewhere\" \
             -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT"
                .into(),
            "DROP",
        ),
        ("KUBE-FORWARD", "-m conntrack --ctstate INVALID".into(), "DROP"),
        (
            "KUBE-FORWARD",
            format!("-m comment --comment \"forwarding\" -m mark --mark {MASQUERADE_MARK}"),
            "ACCEPT",
        ),
        (
            "KUBE-FORWARD",
            "-m comment --comment \"known connections\" -m conntrack --ctstate RELATED,ESTABLISHED".into(),
            "ACCEPT",
        ),
    ] {
        let condition = if condition.is_empty() { condition } else { format!("{condition} ") };
        let _ = writeln!(text, "-A {from} {condition}-j {target}");
    }
    *text += "COMMIT\n*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n";
}

fn nat(text: &mut String, services: &[Service]) {
    *text += "*nat\n";
    for name in ["MARK-MASQ", "NODEPORTS", "POSTROUTING", "PROXY-CANARY", "SERVICES"] {
        let _ = writeln!(text, ":KUBE-{name} - [0:0]");
    }
    for service in services {
        let _ = writeln!(text, ":{} - [0:0]", service.chain);
        for (_, _, chain) in &service.endpoints {
            let _ = writeln!(text, ":{chain} - [0:0]");
        }
    }
    *text += "-A PREROUTING -m comment --comment \"services\" -j KUBE-SERVICES\n\
              -A OUTPUT -m comment --comment \"services\" -j KUBE-SERVICES\n\
              -A POSTROUTING -m comment --comment \"postrouting\" -j KUBE-POSTROUTING\n\
              -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
              -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
              -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
              -A KUBE-POSTROUTING -m comment --comment \"source to rewrite\" -j MASQUERADE --random-fully\n";
    for service in services {
        service.write(text);
    }
    *text += "-A KUBE-SERVICES -m comment --comment \"node ports come last\" -m addrtype --dst-type LOCAL \
              -j KUBE-NODEPORTS\nCOMMIT\n";
}

impl Service {
    fn write(&self, text: &mut String) {
        let Self { comment, address, port, chain, endpoints } = self;
        let to = format!("-d {address}/32 -p tcp -m comment --comment \"{comment}\" -m tcp --dport {port}");
        let _ = writeln!(text, "-A KUBE-SERVICES {to} -j {chain}");
        let _ = writeln!(text, "-A {chain} ! -s {CLUSTER_CIDR} {to} -j KUBE-MARK-MASQ");
        for (index, (address, port, endpoint)) in endpoints.iter().enumerate() {
            // The last endpoint takes what the others left.
            let chance = match endpoints.len() - index {
                1 => String::new(),
                left => {
                    let share = 1.0 / u32::try_from(left).map_or(f64::INFINITY, f64::from);
                    format!("-m statistic --mode random --probability {share:.11} ")
                }
            };
            let _ = writeln!(
                text,
                "-A {chain} -m comment --comment \"{comment} to {address}:{port}\" {chance}-j {endpoint}"
            );
            let _ = writeln!(
                text,
                "-A {endpoint} -s {address}/32 -m comment --comment \"{comment}\" -j KUBE-MARK-MASQ"
            );
            let _ = writeln!(
                text,
                "-A {endpoint} -p tcp -m comment --comment \"{comment}\" -m tcp -j DNAT --to-destination {address}:{port}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::PathBuf;

    use super::*;

    /// A rule without what differs from cluster to cluster: addresses, ports, comments, hashes.
    fn shape(rule: &str) -> String {
        // Every other piece is inside quotes.
        let bare: String = rule.split('"').step_by(2).collect::<Vec<_>>().join("#");
        let word = |w: &str| {
            let stem = ["KUBE-SVC-", "KUBE-SEP-"].into_iter().find(|s| w.starts_with(s));
            match stem {
                Some(stem) => stem.to_owned(),
                None if w.starts_with(|c: char| c.is_ascii_digit())
                    && w.contains('.')
                    && w != "127.0.0.0/8" =>
                {
                    "#".into()
                }
                None => w.to_owned(),
            }
        };
        let words: Vec<String> = bare.split(' ').map(word).collect();
        let mut shape = words.join(" ");
        if let Some((before, after)) = shape.split_once("--dport ") {
            let rest = after.split_once(' ').map_or("", |(_, rest)| rest);
            shape = format!("{before}--dport # {rest}");
        }
        shape
    }

    fn shapes(text: &str) -> BTreeMap<String, usize> {
        let mut out = BTreeMap::new();
        for rule in text.lines().filter(|l| l.starts_with("-A")) {
            *out.entry(shape(
                &rule.replace(" -m nfacct --nfacct-name  ct_state_invalid_dropped_pkts", ""),
            ))
            .or_default() += 1;
        }
        out
    }

    #[test]
    fn the_shape_is_that_of_a_real_kube_proxy() {
        let cases = std::env::var_os("PODWAY_CASES").map_or_else(
            || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/cases"),
            PathBuf::from,
        );
        let Ok(real) =
            std::fs::read_to_string(cases.join("foreign-rules/kube-proxy-1.36-legacy-10-services.txt"))
        else {
            println!("skipped: no recorded rules; set PODWAY_CASES");
            return;
        };
        assert_eq!(shapes(&kube_proxy(10)), shapes(&real));
    }

    #[test]
    fn every_chain_is_declared_once_and_addresses_are_distinct() {
        let text = kube_proxy(1000);
        let nat = text.split("*nat").nth(1).expect("nat table");
        let declared: Vec<&str> =
            nat.lines().filter_map(|l| l.strip_prefix(':')).filter_map(|l| l.split(' ').next()).collect();
        assert_eq!(declared.len(), 5 + 1001 + 2001);
        assert_eq!(declared.iter().collect::<BTreeSet<_>>().len(), declared.len());
        // x_tables names have at most 28 characters.
        assert!(declared.iter().all(|name| name.len() <= 28));
        let services: BTreeSet<&str> = nat
            .lines()
            .filter(|l| l.starts_with("-A KUBE-SERVICES -d"))
            .filter_map(|l| l.split(' ').nth(3))
            .collect();
        assert_eq!(services.len(), 1001);
    }
}
