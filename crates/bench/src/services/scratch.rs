//! Where services are measured: a client, a node that forwards, a server that has every endpoint's address.
//!
//! ```text
//!   client 10.244.0.2 ── 10.244.0.1 node 10.244.1.1 ── 10.244.1.2 server (which has every endpoint's address)
//! ```
//!
//! All mechanisms get the same place, so what differs is the mechanism alone.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use podway_lab::cgroup::Cgroup;
use podway_link::{Netns, sysctl};

use super::connector::{self, Answer, Task};
use super::population::ENDPOINT_CIDRS;
use crate::namespaces::Group;
use crate::network::own_part;
use crate::place::{Running, start};
use crate::stop::Stop;
use crate::traffic::{Kind, LISTENING, Outcome};

/// Longest time for `ip`.
const TOOL_TIMEOUT: Duration = Duration::from_secs(30);
/// Core of the client and of the server.
const CORES: (usize, usize) = (0, 1);
/// The node's address that its pods see.
pub const NODE_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(10, 244, 0, 1);

/// One such place. Everything of it goes with this value.
#[derive(Debug)]
pub struct Scratch {
    client: Running,
    server: Running,
    client_netns: Netns,
    /// The node's namespace: where mechanisms put their rules.
    pub node: Netns,
    cgroup: Option<Cgroup>,
    _group: Group,
}

impl Scratch {
    /// Makes the place. With `cgroup`, the client lives in a control group of its own, for socket programs.
    ///
    /// # Errors
    /// When a part cannot be made.
    pub fn up(name: &str, cgroup: Option<Cgroup>, stop: &Stop) -> anyhow::Result<Self> {
        let group = Group::new(name)?;
        let node = group.create("node")?;
        let client = group.create("client")?;
        let server = group.create("server")?;
        node.run(|| -> podway_link::Result<()> {
            sysctl::write("net/ipv4/ip_forward", "1")?;
            sysctl::write("net/ipv4/conf/all/rp_filter", "0")?;
            sysctl::write("net/ipv4/conf/default/rp_filter", "0")
        })??;
        let [endpoints, spare] = ENDPOINT_CIDRS;
        let batch = format!(
            "link add client type veth peer name eth0 netns {}\nlink add server type veth peer name eth0 netns {}\n\
             addr add {NODE_ADDRESS}/24 dev client\naddr add 10.244.1.1/24 dev server\n\
             link set client up\nlink set server up\nroute add {endpoints} via 10.244.1.2\n\
             route add {spare} via 10.244.1.2\n",
            group.name("client"),
            group.name("server"),
        );
        ip(&node, &batch, stop)?;
        ip(
            &client,
            "addr add 10.244.0.2/24 dev eth0\nlink set eth0 up\nroute add default via 10.244.0.1\n",
            stop,
        )?;
        let batch = format!(
            "addr add 10.244.1.2/24 dev eth0\nlink set eth0 up\nroute add default via 10.244.1.1\n\
             route add local {endpoints} dev lo\nroute add local {spare} dev lo\n"
        );
        ip(&server, &batch, stop)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut serving = start(&server, Some(CORES.1 % cores), own_part(&["serve"]))?;
        expect(&mut serving, LISTENING).context("start the bench's server")?;
        if let Some(cgroup) = &cgroup {
            cgroup.create().context("make the client's control group")?;
        }
        let mut connecting =
            start(&client, Some(CORES.0), in_group(own_part(&["connect"]), cgroup.as_ref()))?;
        expect(&mut connecting, connector::READY).context("start the bench's client")?;
        Ok(Self { client: connecting, server: serving, client_netns: client, node, cgroup, _group: group })
    }

    /// Where the client lives, if it has a group of its own.
    #[must_use]
    pub fn cgroup(&self) -> Option<std::path::PathBuf> {
        self.cgroup.as_ref().map(|group| group.path().to_owned())
    }

    /// Opens connections.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn connect(&mut self, task: &Task) -> anyhow::Result<Answer> {
        let line =
            self.client.ask(&serde_json::to_string(task)?).context("connections of the bench's client")?;
        serde_json::from_str(&line).context("understand the client")
    }

    /// Requests and responses over one connection that is there already: what a packet costs after the first.
    ///
    /// # Errors
    /// When the client fails.
    pub fn requests(&self, address: std::net::Ipv4Addr, time: Duration, stop: &Stop) -> anyhow::Result<f64> {
        let milliseconds = time.as_millis().to_string();
        let command =
            own_part(&["measure", "requests", &address.to_string(), "--milliseconds", &milliseconds]);
        let client = start(&self.client_netns, Some(CORES.0), in_group(command, self.cgroup.as_ref()))?;
        let finished = client.finish(&[], time + Duration::from_secs(10), stop)?;
        if !finished.status.success() {
            bail!("requests to {address}: the client ended with {}", finished.status);
        }
        match serde_json::from_slice(&finished.stdout).context("understand the client")? {
            Outcome::Requests { p50_us, .. } => Ok(p50_us),
            Outcome::Stream { .. } => bail!("the client measured {:?}", Kind::Stream),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.client.end();
        self.server.end();
        if let Some(cgroup) = &self.cgroup {
            // The next run uses it again if it stays.
            let _ = cgroup.remove();
        }
    }
}

/// Tells a part of the bench to move itself into a group before anything else.
fn in_group(mut command: Command, cgroup: Option<&Cgroup>) -> Command {
    if let Some(cgroup) = cgroup {
        command.arg("--cgroup").arg(cgroup.path());
    }
    command
}

fn expect(process: &mut Running, word: &str) -> anyhow::Result<()> {
    let said = process.line()?;
    if said != word {
        bail!("it said {said:?} instead of {word:?}");
    }
    Ok(())
}

fn ip(netns: &Netns, batch: &str, stop: &Stop) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]);
    let finished = start(netns, None, command)?.finish(batch.as_bytes(), TOOL_TIMEOUT, stop)?;
    if !finished.status.success() {
        bail!("ip -batch: {}", finished.status);
    }
    Ok(())
}
