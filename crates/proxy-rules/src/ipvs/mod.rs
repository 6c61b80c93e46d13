//! The IPVS writer.

mod netlink;
mod rules;

pub(crate) use netlink::{Ipvs, ServerKey};
pub(crate) use rules::own_servers;
