//! What packets are sent to: the decisions themselves, or a mechanism that a writer has programmed.

use std::net::IpAddr;

use podway_model::{EndpointSlice, Service};
use podway_services::{Compiler, Flow, Verdict, decide, table::NodeView};

/// A cluster as one node sees it, and packets to send there.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Where it is from.
    pub id: String,
    /// The node.
    pub view: NodeView,
    /// Every Service.
    pub services: Vec<Service>,
    /// Every EndpointSlice.
    pub slices: Vec<EndpointSlice>,
    /// What is sent, and what should become of it.
    pub packets: Vec<Packet>,
}

impl Scenario {
    /// All objects compiled.
    pub fn compile(&self) -> Compiler {
        let mut compiler = Compiler::new(self.view.clone());
        compiler.load(&self.services, &self.slices);
        compiler
    }
}

/// A packet, and what should become of it.
#[derive(Clone, Debug)]
pub struct Packet {
    /// What it shows.
    pub name: String,
    /// The packet.
    pub flow: Flow,
    /// What should become of it.
    pub expected: Observed,
    /// It is for the port of a health check, which the node answers itself.
    pub health_check: bool,
}

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Where it may have gone, sorted.
    pub destinations: Vec<(IpAddr, u16)>,
    /// Whether its source is the node's address afterwards.
    pub masquerade: bool,
    /// Whether it goes on.
    pub verdict: Verdict,
    /// No service has anything to do with it.
    pub untouched: bool,
}

/// Something that packets can be sent to.
pub trait Target {
    /// What it is called in results.
    fn name(&self) -> &str;

    /// Sends each packet of a scenario; the answer is in their order.
    ///
    /// # Errors
    /// What it cannot express, by name; the scenario is then counted as not applicable to it.
    fn run(&mut self, scenario: &Scenario) -> Result<Vec<Observed>, String>;
}

/// The decisions themselves.
#[derive(Clone, Copy, Debug)]
pub struct Engine;

impl Target for Engine {
    fn name(&self) -> &str {
        "engine"
    }

    fn run(&mut self, scenario: &Scenario) -> Result<Vec<Observed>, String> {
        let compiler = scenario.compile();
        let observe = |packet: &Packet| {
            let decision = decide(compiler.table(), compiler.view(), &packet.flow);
            Observed {
                masquerade: decision.masquerade || decision.hairpin,
                destinations: decision.destinations,
                verdict: decision.verdict,
                untouched: decision.untouched,
            }
        };
        Ok(scenario.packets.iter().map(observe).collect())
    }
}
