//! Reads what `ipvsadm -Sn` (`ipvsadm-save -n`) prints.
//!
//! A line is a command for `ipvsadm -R`: `-A` adds a virtual server, `-a` a real server to one. IPVS does not know
//! which object a virtual server was made from.

use std::collections::HashMap;
use std::net::IpAddr;

use podway_services::table::{Family, Protocol};

use super::{
    Action, Endpoint, ForeignKind, ForeignRules, ForeignService, Masquerade, add_endpoint, address_and_port,
};

/// Default of a virtual server's persistence, in seconds (`ip_vs.h`).
const DEFAULT_PERSISTENCE: u32 = 300;

/// What a virtual server answers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Server {
    Address(Protocol, IpAddr, u16),
    Mark(u32, Family),
}

/// Reads a dump.
#[must_use]
pub fn parse(text: &str) -> ForeignRules {
    let mut rules = ForeignRules::default();
    let mut at: HashMap<Server, usize> = HashMap::new();
    for (number, raw) in (1..).zip(text.lines()) {
        let line = raw.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Err(cause) = take(line, &mut rules, &mut at) {
            rules.problem(number, raw, cause);
        }
    }
    rules
}

fn take(line: &str, rules: &mut ForeignRules, at: &mut HashMap<Server, usize>) -> Result<(), String> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let server = server(&words)?;
    let value = |names: &[&str]| -> Result<Option<&str>, String> {
        match words.iter().position(|w| names.contains(w)) {
            Some(i) => {
                let value = words.get(i + 1).filter(|v| !v.starts_with('-') || v.len() == 1);
                value.map(|v| Some(*v)).ok_or_else(|| format!("{}: its value is missing", words[i]))
            }
            None => Ok(None),
        }
    };
    match words.first() {
        Some(&"-A") => {
            let affinity_s = if words.iter().any(|w| matches!(*w, "-p" | "--persistent")) {
                let next = words.iter().position(|w| matches!(*w, "-p" | "--persistent")).map(|i| i + 1);
                match next.and_then(|i| words.get(i)).filter(|v| !v.starts_with('-')) {
                    Some(text) => {
                        Some(text.parse().map_err(|_| format!("-p {text}: not a number of seconds"))?)
                    }
                    None => Some(DEFAULT_PERSISTENCE),
                }
            } else {
                None
            };
            if at.contains_key(&server) {
                return Err("this virtual server was added before".into());
            }
            let (address, port, protocol, family) = match server {
                Server::Address(protocol, address, port) => {
                    (Some(address), port, protocol, Family::of(&address))
                }
                Server::Mark(_, family) => (None, 0, Protocol::Tcp, family),
            };
            at.insert(server, rules.services.len());
            rules.services.push(ForeignService {
                object: None,
                address,
                family,
                port,
                protocol,
                kind: ForeignKind::Unknown,
                // Without a real server that takes connections the kernel refuses.
                action: Action::Reject,
                endpoints: Vec::new(),
                masquerade: Masquerade::No,
                affinity_s,
                source_ranges: Vec::new(),
                local_only: false,
            });
        }
        Some(&"-a") => {
            let index = *at.get(&server).ok_or("a real server of a virtual server that is not there")?;
            let text = value(&["-r", "--real-server"])?.ok_or("-r is missing")?;
            let (address, port) =
                address_and_port(text).ok_or_else(|| format!("-r {text}: not an address and port"))?;
            let weight = match value(&["-w", "--weight"])? {
                Some(text) => text.parse().map_err(|_| format!("-w {text}: not a weight"))?,
                None => 1,
            };
            let service = &mut rules.services[index];
            if weight > 0 {
                service.action = Action::Forward;
            }
            // The packet's own port stays, unless it is translated.
            let translated = words.iter().any(|w| matches!(*w, "-m" | "--masquerading"));
            let port = if translated { port } else { 0 };
            add_endpoint(&mut service.endpoints, Endpoint { address, port, weight: Some(weight) });
        }
        Some(other) => return Err(format!("{other}: neither -A nor -a")),
        None => return Err("nothing".into()),
    }
    Ok(())
}

fn server(words: &[&str]) -> Result<Server, String> {
    for (word, value) in words.iter().zip(words.iter().skip(1)) {
        let protocol = match *word {
            "-t" | "--tcp-service" => Protocol::Tcp,
            "-u" | "--udp-service" => Protocol::Udp,
            "--sctp-service" => Protocol::Sctp,
            "-f" | "--fwmark-service" => {
                let mark = value.parse().map_err(|_| format!("{word} {value}: not a mark"))?;
                let v6 = words.iter().any(|w| matches!(*w, "-6" | "--ipv6"));
                return Ok(Server::Mark(mark, if v6 { Family::V6 } else { Family::V4 }));
            }
            _ => continue,
        };
        let (address, port) =
            address_and_port(value).ok_or_else(|| format!("{word} {value}: not an address and port"))?;
        return Ok(Server::Address(protocol, address, port));
    }
    Err("no virtual server (-t, -u, --sctp-service or -f)".into())
}

#[cfg(test)]
#[path = "ipvs_tests.rs"]
mod tests;
