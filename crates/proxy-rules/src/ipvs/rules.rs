use std::collections::HashSet;
use super::ServerKey;
use podway_services::table::{Family, Protocol};
use serde_json::Value;
use crate::foreign::tools;

pub(crate) const TABLE: &str = "podway-ipvs";

/// The virtual servers that are recorded as ours.
pub(crate) fn own_servers() -> HashSet<ServerKey> {
    let listed = tools::run("nft", &["-j", "list", "table", "inet", TABLE], "").unwrap_or_default();
    let Ok(listed) = serde_json::from_str::<Value>(&listed) else { return HashSet::new() };
    let mut own = HashSet::new();
    for object in listed["nftables"].as_array().into_iter().flatten() {
        for (name, family) in [("4", Family::V4), ("6", Family::V6)] {
            let body = object.get("set").or_else(|| object.get("map"));
            let Some(body) = body else { continue };
            let elements = body["elem"].as_array().into_iter().flatten();
            if body["name"] == format!("servers{name}") {
                own.extend(elements.filter_map(address_key));
            } else if body["name"] == format!("marks{name}") {
                let mark = |e: &Value| Some(ServerKey::Mark(u32::try_from(e.get(1)?.as_u64()?).ok()?, family));
                own.extend(elements.filter_map(mark));
            }
        }
    }
    own
}

fn address_key(element: &Value) -> Option<ServerKey> {
    let [address, protocol, port] = element.get("concat")?.as_array()?.as_slice() else { return None };
    let protocol = match protocol.as_str()? {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return None,
    };
    Some(ServerKey::Address(address.as_str()?.parse().ok()?, u16::try_from(port.as_u64()?).ok()?, protocol))
}
