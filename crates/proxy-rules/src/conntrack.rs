//! Stale UDP flows.
//!
//! A UDP flow that connection tracking knows keeps its translation as long as datagrams come, also when the backend is
//! gone, or when the flow began before its service had backends. Such flows are deleted after each change that makes
//! them stale, so that the next datagram is looked at anew. TCP and SCTP find out by themselves.

use std::{io, net::IpAddr};

use nix::{errno::Errno, libc};
use podway_services::{
    ServiceTable, TrackedFlow, is_stale,
    table::{Backend, Family, NodeView, Protocol, ServiceId, TableChange},
};

use crate::netlink::{Messages, NLM_F_DUMP, NLM_F_REQUEST, NfSocket, find, put_attr, put_nested};

const CT_GET: u16 = ((libc::NFNL_SUBSYS_CTNETLINK as u16) << 8) | 1;
const CT_DELETE: u16 = ((libc::NFNL_SUBSYS_CTNETLINK as u16) << 8) | 2;
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
const FILTER_ORIG_FLAGS: u16 = 1;
/// Compare the protocol of the tuple.
const FILTER_PROTOCOL: u32 = 1 << 3;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;

/// The families in which flows may have become stale, when these services changed.
pub fn families_of(table: &ServiceTable, services: impl IntoIterator<Item = ServiceId>) -> Vec<Family> {
    let mut families: Vec<Family> = services
        .into_iter()
        .filter_map(|id| table.services.get(&id).filter(|meta| meta.protocol == Protocol::Udp))
        .map(|meta| meta.family)
        .collect();
    families.sort_unstable();
    families.dedup();
    families
}

/// Services of which changes, that are not in the table yet, may make flows stale: a set loses a backend or gets its
/// first, or there is a frontend where flows may go to already.
pub fn risky(table: &ServiceTable, changes: &[TableChange]) -> Vec<ServiceId> {
    let mut services = Vec::new();
    for change in changes {
        match change {
            TableChange::Set(id, set) => {
                let old = table.set(id.service, id.kind);
                let new = set.as_deref().unwrap_or_default();
                let stays = |b: &Backend| {
                    new.binary_search_by_key(&(b.addr, b.port), |other| (other.addr, other.port)).is_ok()
                };
                if old.is_empty() || !old.iter().all(stays) {
                    services.push(id.service);
                }
            }
            // New, or its routes may lead to another set from now on.
            TableChange::Frontend(key, frontend)
                if table.frontends.get(key).is_none_or(|old| old.routes != frontend.routes) =>
            {
                services.push(frontend.service);
            }
            _ => {}
        }
    }
    services
}

/// Deletes stale flows (see [`is_stale`]) of these families in the network namespace of the calling thread, and says
/// how many there were.
///
/// # Errors
/// Connection tracking cannot be read or refuses.
pub fn clean(table: &ServiceTable, view: &NodeView, families: &[Family]) -> io::Result<usize> {
    if families.is_empty() {
        return Ok(0);
    }
    let mut socket = NfSocket::open()?;
    let mut deleted = 0;
    for family in families {
        let number = match family {
            Family::V4 => libc::AF_INET as u8,
            Family::V6 => libc::AF_INET6 as u8,
        };
        let mut request = Vec::new();
        put_nested(&mut request, TUPLE_ORIG, |tuple| {
            put_nested(tuple, TUPLE_PROTO, |proto| put_attr(proto, PROTO_NUM, &[Protocol::Udp.number()]));
        });
        // The flags are in host order, unlike other numbers of nfnetlink.
        put_nested(&mut request, FILTER, |f| put_attr(f, FILTER_ORIG_FLAGS, &FILTER_PROTOCOL.to_ne_bytes()));
        let mut stale = Messages::default();
        let mut count = 0u32;
        let mut take = |_: u8, body: &[u8]| {
            if flow_of(body).is_some_and(|flow| is_stale(table, view, &flow)) {
                count += 1;
                stale.begin(CT_DELETE, NLM_F_REQUEST, count, number, 0);
                for kind in [TUPLE_ORIG, ID, ZONE] {
                    if let Some(value) = find(body, kind) {
                        // As it came, nested or not.
                        if kind == TUPLE_ORIG {
                            stale.nested(kind, |tuple| tuple.extend_from_slice(value));
                        } else {
                            stale.attr(kind, value);
                        }
                    }
                }
            }
        };
        socket.dump(CT_GET, NLM_F_DUMP, number, &request, &mut take)?;
        if count > 0 {
            let failures = socket.send(&stale.bytes)?;
            if let Some(failure) = failures.iter().find(|f| f.errno != Errno::ENOENT) {
                return Err(failure.clone().into());
            }
            deleted += count as usize - failures.len();
        }
    }
    Ok(deleted)
}

fn flow_of(body: &[u8]) -> Option<TrackedFlow> {
    let (orig, reply) = (find(body, TUPLE_ORIG)?, find(body, TUPLE_REPLY)?);
    let proto = find(orig, TUPLE_PROTO)?;
    if find(proto, PROTO_NUM)? != [Protocol::Udp.number()] {
        return None;
    }
    let address = |tuple, destination: bool| -> Option<IpAddr> {
        let ip = find(tuple, TUPLE_IP)?;
        let offset = u16::from(destination);
        if let Some(v4) = find(ip, 1 + offset) {
            return Some(IpAddr::from(*v4.first_chunk::<4>()?));
        }
        Some(IpAddr::from(*find(ip, 3 + offset)?.first_chunk::<16>()?))
    };
    let port = |tuple, kind| -> Option<u16> {
        Some(u16::from_be_bytes(*find(find(tuple, TUPLE_PROTO)?, kind)?.first_chunk()?))
    };
    Some(TrackedFlow {
        protocol: Protocol::Udp,
        dst: address(orig, true)?,
        dst_port: port(orig, PROTO_DST_PORT)?,
        reply_src: address(reply, false)?,
        reply_port: port(reply, PROTO_SRC_PORT)?,
    })
}
