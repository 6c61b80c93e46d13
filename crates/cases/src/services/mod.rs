//! Service proxying: packets, endpoint selection, hints, stale flows.

pub mod cluster;
pub mod conntrack;
pub mod hints;
pub mod naive;
pub mod packets;
pub mod procedures;
pub mod random;
pub mod tables;
pub mod target;
pub mod topology;

use std::path::Path;

use anyhow::Result;

use crate::Tally;
use target::{Engine, Target};

/// Runs everything in the folder.
///
/// # Errors
/// Data that cannot be read.
pub fn run(folder: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut targets: Vec<Box<dyn Target>> = vec![Box::new(Engine)];
    for scenario in packets::read(&folder.join("packets"))? {
        for target in &mut targets {
            tally.add(packets::run(&scenario, target.as_mut()));
        }
    }
    tally.add(topology::run(&folder.join("topology.yaml"))?);
    tally.add(conntrack::run(&folder.join("conntrack-cleanup.yaml"))?);
    tally.add(hints::run(&folder.join("hints"))?);
    tally.add(tables::run(&folder.join("tables"))?);
    tally.add(procedures::run(&folder.join("procedures.yaml"))?);
    Ok(tally)
}
