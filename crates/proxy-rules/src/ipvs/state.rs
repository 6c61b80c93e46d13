//! What the kernel holds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::netlink::{Real, Server, ServerKey, ServerSpec};
use super::plan::Element;
use super::rules::TABLE;
use crate::AUDIT_LINES;

/// Elements, virtual servers and addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) elements: BTreeSet<Element>,
    pub(super) servers: BTreeMap<ServerKey, Written>,
    /// Of our device.
    pub(super) addresses: BTreeSet<IpAddr>,
}

/// A virtual server with the weights of its real servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) spec: ServerSpec,
    pub(super) reals: BTreeMap<(IpAddr, u16), u32>,
}

impl State {
    /// Takes a server as the kernel has it. Real servers that are not reached by translation are of somebody else;
    /// they are listed, and go with the others that should not be there.
    pub(super) fn add_server(&mut self, server: Server, reals: &[Real]) {
        let reals = reals
            .iter()
            // A weight that is never ours makes it be written anew.
            .map(|r| ((r.addr, r.port), if r.translated { r.weight } else { u32::MAX }))
            .collect();
        self.servers.insert(server.key, Written { spec: server.spec, reals });
    }

    /// Takes a server that was just made.
    pub(super) fn new_server(&mut self, key: ServerKey, spec: ServerSpec) -> &mut Written {
        self.servers.entry(key).insert_entry(Written { spec, reals: BTreeMap::new() }).into_mut()
    }
}

/// What is not there that was written, and what is there that was not.
pub(super) fn compare(written: &State, found: &State) -> (Vec<String>, Vec<String>) {
    let element = |e: &Element| {
        let value = e.value.as_ref().map_or_else(String::new, |v| format!(" : {v}"));
        format!("{}{value} in the set {} of the nftables table inet {TABLE}", e.key, e.set)
    };
    let mut missing: Vec<String> = written.elements.difference(&found.elements).map(element).collect();
    let mut foreign: Vec<String> = found.elements.difference(&written.elements).map(element).collect();
    missing.extend(written.addresses.difference(&found.addresses).map(|a| format!("address {a}")));
    foreign.extend(found.addresses.difference(&written.addresses).map(|a| format!("address {a}")));
    for (key, server) in &written.servers {
        let Some(now) = found.servers.get(key) else {
            missing.push(format!("virtual server {key}"));
            continue;
        };
        if now.spec != server.spec {
            foreign.push(format!("scheduler or persistence of virtual server {key}"));
        }
        let real = |(addr, port): &(IpAddr, u16)| {
            format!("real server {} of virtual server {key}", std::net::SocketAddr::new(*addr, *port))
        };
        for (end, weight) in &server.reals {
            match now.reals.get(end) {
                None => missing.push(real(end)),
                Some(found) if found != weight => foreign.push(format!("weight of {}", real(end))),
                Some(_) => {}
            }
        }
        foreign.extend(now.reals.keys().filter(|end| !server.reals.contains_key(end)).map(real));
    }
    foreign.extend(
        found
            .servers
            .keys()
            .filter(|key| !written.servers.contains_key(key))
            .map(|k| format!("virtual server {k}")),
    );
    (missing, foreign)
}

/// As many lines as an audit reports; the last says how many more there were.
pub(super) fn lines(all: impl Iterator<Item = String>) -> Vec<String> {
    let mut lines: Vec<String> = all.collect();
    if lines.len() > AUDIT_LINES {
        let more = lines.len() - (AUDIT_LINES - 1);
        lines.truncate(AUDIT_LINES - 1);
        lines.push(format!("and {more} more"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_lines_than_an_audit_has() {
        let all = |n: usize| lines((0..n).map(|i| i.to_string()));
        assert_eq!(all(AUDIT_LINES).len(), AUDIT_LINES);
        let many = all(AUDIT_LINES + 5);
        assert_eq!((many.len(), many.last().unwrap().as_str()), (AUDIT_LINES, "and 6 more"));
    }
}
