//! Removes what kube-proxy left in the current network namespace: its chains and the jumps to them (both back ends of
//! iptables, both families), its nftables tables, its IPVS virtual servers and their device. Nothing else: chains of
//! the kubelet and of network policies, whose names begin alike, stay.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use podway_link::Netlink;

use super::detect::{KUBE_IPVS_DEVICE, SAVES, Save, ipvs_is_loaded, kube_proxy_tables, processes};
use super::{iptables, nft, tools};
use crate::ipvs::{self, Ipvs, ServerKey};

/// Ports that kube-proxy gives out for node ports unless configured otherwise.
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;
/// Seconds for which iptables waits for its lock.
const LOCK_WAIT: &str = "5";
/// The chain that only the kubelet makes.
const KUBELET_CANARY: &str = "KUBE-KUBELET-CANARY";

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// It would write everything again.
    #[error(
        "kube-proxy runs in this network namespace (process {0}) and would write its rules again; stop it first \
         (kubectl -n kube-system delete daemonset kube-proxy), or use --force"
    )]
    Runs(i32),
    /// Not the superuser.
    #[error("rules can be removed by root only; run it with sudo")]
    NotRoot,
}

/// What was done, or with a dry run what would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CleanupReport {
    /// What was removed, one line each.
    pub removed: Vec<String>,
    /// What looks like kube-proxy's and was left, with the reason.
    pub kept: Vec<String>,
    /// What could not be removed, with the reason.
    pub failed: Vec<String>,
}

/// Removes everything of kube-proxy's. Goes on after a failure and reports all. Translated connections that are open
/// go on: the kernel's connection table is left alone.
///
/// # Errors
/// kube-proxy runs here and `force` is not given, or the caller is not root.
pub fn kube_proxy(dry_run: bool, force: bool) -> Result<CleanupReport, CleanupError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(CleanupError::NotRoot);
    }
    if let (Some(pid), false, false) = (processes("kube-proxy").first(), force, dry_run) {
        return Err(CleanupError::Runs(*pid));
    }
    let mut report = CleanupReport::default();
    for save in &SAVES {
        chains(save, dry_run, &mut report);
    }
    tables(dry_run, &mut report);
    let device = device(&mut report);
    virtual_servers(device.as_ref(), dry_run, &mut report);
    if let Some(device) = device {
        delete_device(&device, dry_run, &mut report);
        ip_sets(dry_run, &mut report);
    }
    Ok(report)
}

fn chains(save: &Save, dry_run: bool, report: &mut CleanupReport) {
    let text = match save.text() {
        Ok(Some(text)) => text,
        Ok(None) => return,
        Err(error) => return report.failed.push(format!("{}: {error}", save.title)),
    };
    let plan = Plan::of(&text);
    for (table, name) in &plan.kept {
        report.kept.push(format!("chain {name} of table {table}, {}: the kubelet's", save.title));
    }
    if plan.tables.is_empty() {
        return;
    }
    // All tables in one call; iptables-restore does each of them as a whole or not at all.
    if !dry_run
        && let Err(error) = tools::run(save.restore, &["--noflush", "--wait", LOCK_WAIT], &plan.commands())
    {
        return report.failed.push(format!("KUBE-* chains of {}: {error}", save.title));
    }
    for (table, Removal { chains, jumps }) in &plan.tables {
        report.removed.push(format!("{}, table {table}: {}", save.title, summary(chains)));
        report.removed.extend(jumps.iter().map(|rule| format!("{}, table {table}: rule {rule}", save.title)));
    }
}

/// What to remove from the tables of one dump.
#[derive(Debug, Default)]
struct Plan {
    tables: BTreeMap<String, Removal>,
    /// Table and chain.
    kept: Vec<(String, String)>,
}

#[derive(Debug, Default)]
struct Removal {
    chains: Vec<String>,
    jumps: Vec<String>,
}

impl Plan {
    fn of(text: &str) -> Self {
        let mut plan = Self::default();
        // The kubelet of some releases makes these chains, too, and expects to find them.
        let shared = |name: &str| matches!(name, "KUBE-FIREWALL" | "KUBE-MARK-DROP");
        let kubelet = !iptables::chains(text, |name| name == KUBELET_CANARY).is_empty();
        let mine = |name: &str| iptables::is_kube_proxy_chain(name) && !(kubelet && shared(name));
        if kubelet {
            plan.kept = iptables::chains(text, |name| iptables::is_kube_proxy_chain(name) && shared(name));
        }
        for (table, chain) in iptables::chains(text, mine) {
            plan.tables.entry(table).or_default().chains.push(chain);
        }
        for (table, rule) in iptables::jumps_to(text, mine) {
            plan.tables.entry(table).or_default().jumps.push(rule);
        }
        plan
    }

    /// For `iptables-restore --noflush`.
    fn commands(&self) -> String {
        let mut text = String::new();
        for (table, Removal { chains, jumps }) in &self.tables {
            let _ = writeln!(text, "*{table}");
            for rule in jumps {
                // Without the counters that may stand before it.
                let rule = rule.find("-A ").map_or(rule.as_str(), |at| &rule[at + 3..]);
                let _ = writeln!(text, "-D {rule}");
            }
            // All are emptied before the first is deleted: they refer to each other.
            for chain in chains {
                let _ = writeln!(text, "-F {chain}");
            }
            for chain in chains {
                let _ = writeln!(text, "-X {chain}");
            }
            text.push_str("COMMIT\n");
        }
        text
    }
}

/// `31 chains: KUBE-NODEPORTS, KUBE-SERVICES, 11 × KUBE-SVC-…`.
fn summary(chains: &[String]) -> String {
    let mut parts: BTreeMap<&str, usize> = BTreeMap::new();
    for chain in chains {
        let prefix = iptables::SERVICE_CHAINS.iter().find(|p| chain.starts_with(**p));
        *parts.entry(prefix.copied().unwrap_or(chain)).or_default() += 1;
    }
    let parts: Vec<String> = parts
        .iter()
        .map(
            |(name, count)| {
                if name.ends_with('-') { format!("{count} × {name}…") } else { (*name).to_owned() }
            },
        )
        .collect();
    format!("{} chains: {}", chains.len(), parts.join(", "))
}

fn tables(dry_run: bool, report: &mut CleanupReport) {
    let families = match kube_proxy_tables() {
        Ok(families) => families,
        Err(error) => return report.failed.push(format!("nftables: {error}")),
    };
    for family in families {
        let what = format!("nftables table {family} {}", nft::KUBE_PROXY_TABLE);
        let done = if dry_run {
            Ok(String::new())
        } else {
            tools::run("nft", &["delete", "table", &family, nft::KUBE_PROXY_TABLE], "")
        };
        match done {
            Ok(_) => report.removed.push(what),
            Err(error) => report.failed.push(format!("{what}: {error}")),
        }
    }
}

/// The device on which kube-proxy keeps the addresses of services.
struct Device {
    index: u32,
    addresses: HashSet<IpAddr>,
}

fn device(report: &mut CleanupReport) -> Option<Device> {
    let found = Netlink::open().and_then(|mut netlink| {
        let Some(link) = netlink.link_by_name(KUBE_IPVS_DEVICE)? else { return Ok(None) };
        let addresses = netlink.addresses_of(link.index)?;
        Ok(Some(Device { index: link.index, addresses: addresses.iter().map(|a| a.addr).collect() }))
    });
    found.unwrap_or_else(|error| {
        report.failed.push(format!("device {KUBE_IPVS_DEVICE}: {error}"));
        None
    })
}

fn virtual_servers(device: Option<&Device>, dry_run: bool, report: &mut CleanupReport) {
    if !ipvs_is_loaded() {
        return;
    }
    let listed = Ipvs::open().and_then(|mut ipvs| Ok((ipvs.servers()?, ipvs)));
    let (servers, mut ipvs) = match listed {
        Ok(listed) => listed,
        Err(error) => return report.failed.push(format!("IPVS virtual servers: {error}")),
    };
    let own = ipvs::own_servers();
    let node: BTreeSet<IpAddr> = Netlink::open()
        .and_then(|mut netlink| netlink.addresses())
        .map(|all| all.iter().map(|a| a.addr).collect())
        .unwrap_or_default();
    for server in servers.iter().filter(|s| !own.contains(&s.key)) {
        let what = format!("IPVS virtual server {}", server.key);
        let mine = match (&server.key, device) {
            (ServerKey::Address(addr, port, _), Some(device)) => {
                device.addresses.contains(addr) || (node.contains(addr) && NODE_PORTS.contains(port))
            }
            _ => false,
        };
        if !mine {
            let why = if device.is_some() { "its address is not on" } else { "there is no" };
            report.kept.push(format!("{what}: {why} {KUBE_IPVS_DEVICE}, so that it may be somebody else's"));
            continue;
        }
        match if dry_run { Ok(true) } else { ipvs.delete_server(&server.key) } {
            Ok(_) => report.removed.push(what),
            Err(error) => report.failed.push(format!("{what}: {error}")),
        }
    }
}

fn delete_device(device: &Device, dry_run: bool, report: &mut CleanupReport) {
    let what = format!("device {KUBE_IPVS_DEVICE} with {} addresses", device.addresses.len());
    let done = if dry_run {
        Ok(true)
    } else {
        Netlink::open().and_then(|mut netlink| netlink.delete_link(device.index))
    };
    match done {
        Ok(_) => report.removed.push(what),
        Err(error) => report.failed.push(format!("{what}: {error}")),
    }
}

/// The sets that kube-proxy's IPVS mode matches with. They can go only after the rules that use them.
fn ip_sets(dry_run: bool, report: &mut CleanupReport) {
    let listed = match tools::run("ipset", &["list", "-name"], "") {
        Ok(listed) => listed,
        Err(error) if error.is_missing() => {
            let line = "IP sets named KUBE-*, if there are any: ipset is not installed to look; they do nothing without the rules";
            return report.kept.push(line.to_owned());
        }
        Err(error) => return report.failed.push(format!("IP sets: {error}")),
    };
    for name in listed.lines().filter(|name| iptables::is_kube_proxy_set(name)) {
        match if dry_run { Ok(String::new()) } else { tools::run("ipset", &["destroy", name], "") } {
            Ok(_) => report.removed.push(format!("IP set {name}")),
            Err(error) => report.failed.push(format!("IP set {name}: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUMP: &str = "*filter\n:INPUT ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n:KUBE-SERVICES - [0:0]\n\
         :KUBE-ROUTER-INPUT - [0:0]\n:KUBE-NWPLCY-ABC - [0:0]\n:MINE - [0:0]\n\
         [1:2] -A INPUT -m comment --comment \"a b\" -j KUBE-SERVICES\n-A INPUT -j KUBE-FIREWALL\n\
         -A INPUT -j KUBE-ROUTER-INPUT\n-A INPUT -j MINE\n-A KUBE-SERVICES -j KUBE-FIREWALL\nCOMMIT\n";

    #[test]
    fn only_kube_proxys_own_is_removed() {
        let plan = Plan::of(DUMP);
        assert_eq!(
            plan.commands(),
            "*filter\n-D INPUT -m comment --comment \"a b\" -j KUBE-SERVICES\n-D INPUT -j KUBE-FIREWALL\n\
             -F KUBE-FIREWALL\n-F KUBE-SERVICES\n-X KUBE-FIREWALL\n-X KUBE-SERVICES\nCOMMIT\n"
        );
        assert!(plan.kept.is_empty());
    }

    #[test]
    fn what_the_kubelet_may_own_stays_with_it() {
        let dump = DUMP.replace(":MINE", ":KUBE-KUBELET-CANARY - [0:0]\n:MINE");
        let plan = Plan::of(&dump);
        assert_eq!(
            plan.commands(),
            "*filter\n-D INPUT -m comment --comment \"a b\" -j KUBE-SERVICES\n-F KUBE-SERVICES\n\
             -X KUBE-SERVICES\nCOMMIT\n"
        );
        assert_eq!(plan.kept, [("filter".to_owned(), "KUBE-FIREWALL".to_owned())]);
    }

    #[test]
    fn chains_are_summed_up() {
        let chains = ["KUBE-SVC-A", "KUBE-SERVICES", "KUBE-SVC-B", "KUBE-SEP-C"].map(str::to_owned);
        assert_eq!(summary(&chains), "4 chains: 1 × KUBE-SEP-…, KUBE-SERVICES, 2 × KUBE-SVC-…");
    }
}
