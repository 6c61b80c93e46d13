//! `podway lab node add|remove|stop|start`.

use podway_lab::client::Client;
use podway_lab::nodes;

use super::{pick, runtime};
use crate::OK;
use crate::args::{NodeAdd, NodeName};
use crate::output;

pub(super) fn add(args: &NodeAdd) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    let name = runtime()?
        .block_on(async { nodes::add(&mut Client::of_lab(&lab)?, &lab, args.zone.as_deref()).await })?;
    output::print(&format!("{name} is ready\n"));
    Ok(OK)
}

pub(super) fn remove(args: &NodeName) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    runtime()?.block_on(async { nodes::remove(&mut Client::of_lab(&lab)?, &lab, &args.node).await })?;
    output::print(&format!("{} is gone\n", args.node));
    Ok(OK)
}

pub(super) fn power(args: &NodeName, on: bool) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    runtime()?.block_on(async { nodes::power(&mut Client::of_lab(&lab)?, &lab, &args.node, on).await })?;
    output::print(&format!("{} is {}\n", args.node, if on { "ready" } else { "stopped" }));
    Ok(OK)
}
