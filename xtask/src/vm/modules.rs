//! The kernel modules that the tests and the probes need, in the order in which they can be loaded.
//!
//! The packages hold no list of dependencies (it is made when they are installed); each module names what it
//! needs in its own `.modinfo` section.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};

/// What is loaded, where the kernel has it as a module. Everything is loaded at the start: there is nothing in
/// the machine that would load on demand.
const WANTED: &[&str] = &[
    // Asked for by name through the kernel's crypto layer, which no list of dependencies shows.
    "crc32c_generic",
    "af_packet",
    "veth",
    "vxlan",
    "bridge",
    "br_netfilter",
    "tun",
    "macvlan",
    "ipvlan",
    "vrf",
    "dummy",
    "ifb",
    "geneve",
    "ipip",
    "cls_bpf",
    "act_bpf",
    "sch_ingress",
    "sch_fq",
    "sch_fq_codel",
    "sch_htb",
    "sch_tbf",
    "sch_netem",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_tables",
    "nft_chain_nat",
    "nft_ct",
    "nft_fib_inet",
    "nft_hash",
    "nft_limit",
    "nft_log",
    "nft_masq",
    "nft_nat",
    "nft_numgen",
    "nft_redir",
    "nft_reject_inet",
    "nft_reject_ipv4",
    "nft_reject_ipv6",
    "nft_fib_ipv4",
    "nft_fib_ipv6",
    "nft_socket",
    "nft_tproxy",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    // The back end of iptables that is its own, and what both back ends match and do.
    "iptable_filter",
    "iptable_mangle",
    "iptable_nat",
    "ip6table_filter",
    "ip6table_mangle",
    "ip6table_nat",
    "ipt_REJECT",
    "ip6t_REJECT",
    "nft_compat",
    "xt_addrtype",
    "xt_comment",
    "xt_conntrack",
    "xt_mark",
    "xt_MASQUERADE",
    "xt_multiport",
    "xt_nat",
    "xt_recent",
    "xt_set",
    "xt_statistic",
    "xt_tcpudp",
    "xt_sctp",
    "ip_vs",
    "ip_vs_rr",
    "ip_vs_wrr",
    "ip_vs_lc",
    "ip_vs_wlc",
    "ip_vs_lblc",
    "ip_vs_lblcr",
    "ip_vs_dh",
    "ip_vs_sh",
    "ip_vs_mh",
    "ip_vs_sed",
    "ip_vs_nq",
    "sctp",
    "wireguard",
];

/// A module ready to be loaded.
pub(super) struct Module {
    /// Its name, with underscores.
    pub(super) name: String,
    /// The ELF object, not compressed.
    pub(super) object: Vec<u8>,
}

/// The wanted modules that the kernel has, each after those that it needs.
pub(super) fn collect(directory: &Path) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(&directory.join("kernel"), &mut files)?;
    let mut modules = Vec::new();
    let mut seen = BTreeSet::new();
    for name in WANTED {
        // Built in, or not there: the probes tell which.
        if files.contains_key(*name) {
            add(name, &files, &mut seen, &mut modules)?;
        }
    }
    if modules.is_empty() {
        bail!("{} holds none of the modules that the tests need", directory.display());
    }
    Ok(modules)
}

fn add(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    seen: &mut BTreeSet<String>,
    modules: &mut Vec<Module>,
) -> Result<()> {
    if !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let file = files.get(name).with_context(|| format!("the kernel's package lacks the module {name}"))?;
    let object = read(file)?;
    for needed in needs(&object).with_context(|| format!("cannot read {}", file.display()))? {
        add(&needed, files, seen, modules)?;
    }
    modules.push(Module { name: name.to_owned(), object });
    Ok(())
}

/// Names of the modules that must be there first.
fn needs(object: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(object).context("not an ELF file")?;
    let info = file.section_by_name(".modinfo").context("no .modinfo section")?;
    Ok(listed(info.data()?))
}

/// The `depends=` lines among the NUL-terminated strings of a `.modinfo` section.
fn listed(info: &[u8]) -> Vec<String> {
    info.split(|b| *b == 0)
        .filter_map(|line| std::str::from_utf8(line).ok()?.strip_prefix("depends="))
        .flat_map(|names| names.split(','))
        .filter(|name| !name.is_empty())
        .map(module_name)
        .collect()
}

/// Files spell a module's name with either sign.
fn module_name(name: &str) -> String {
    name.replace('-', "_")
}

fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else if let Some((name, _)) = entry.file_name().to_str().and_then(|n| n.split_once(".ko")) {
            files.insert(module_name(name), entry.path());
        }
    }
    Ok(())
}

/// Reads a module, decompressed by what its name says.
fn read(file: &Path) -> Result<Vec<u8>> {
    let tool = match file.extension().and_then(|e| e.to_str()) {
        Some("ko") => return fs::read(file).with_context(|| format!("cannot read {}", file.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("{}: compressed in an unknown way", file.display()),
    };
    let output = Command::new(tool)
        .args(["--decompress", "--stdout", "--quiet"])
        .arg(file)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {tool}; install it and try again"))?;
    if !output.status.success() {
        bail!("{tool} cannot decompress {}", file.display());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_is_read_from_its_information() {
        let info = b"license=GPL\0depends=nf-conntrack,libcrc32c\0retpoline=Y\0name=ip_vs\0";
        assert_eq!(listed(info), ["nf_conntrack", "libcrc32c"]);
        assert!(listed(b"license=GPL\0depends=\0name=dummy\0").is_empty());
    }
}
