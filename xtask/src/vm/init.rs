//! The script that is the machine's first process. It speaks a line protocol on the second serial port (see
//! [`super::protocol`]); the first one is the kernel's.

use super::{
    image::{PROGRAMS, file_name},
    protocol::MARK,
};
use crate::tests::Program;

/// Longest run of one test program, in seconds.
const PROGRAM_LIMIT: u32 = 900;

/// What the report says about a kernel: name, and a command that succeeds where it is there.
const PROBES: &[(&str, &str)] = &[
    ("BTF", "[ -e /sys/kernel/btf/vmlinux ]"),
    ("TCX", "grep -q tcx_prog_attach /sys/kernel/btf/vmlinux"),
    ("netkit", "ip link add probe type netkit && ip link delete probe"),
    ("IPVS", "[ -e /proc/net/ip_vs ]"),
    ("SCTP", "grep -q '^SCTP ' /proc/net/protocols"),
    ("WireGuard", "ip link add probe type wireguard && ip link delete probe"),
    ("netem", "tc qdisc add dev lo root netem delay 1ms && tc qdisc delete dev lo root"),
    ("dummy", "ip link add probe type dummy && ip link delete probe"),
    ("geneve", "ip link add probe type geneve external && ip link delete probe"),
    ("ipip", "ip link add probe type ipip local 127.0.0.2 remote 127.0.0.1 && ip link delete probe"),
    (
        "ipvlan",
        "ip link add probe type dummy && ip link add probe1 link probe type ipvlan; r=$?; ip link delete probe; [ $r = 0 ]",
    ),
    ("vrf", "ip link add probe type vrf table 100 && ip link delete probe"),
    ("nftables", "nft add table inet probe && nft delete table inet probe"),
];

/// The whole script.
pub(super) fn script(modules: &[&str], programs: &[Program]) -> String {
    let mut script = format!(
        r#"#!/bin/sh
export PATH=/usr/sbin:/sbin:/bin HOME=/root RUST_BACKTRACE=0 PROPTEST_FAILURE_PERSISTENCE=off
# The shell would take its own before those of PATH.
ip() {{ /usr/sbin/ip "$@"; }}
tc() {{ /usr/sbin/tc "$@"; }}
nft() {{ /usr/sbin/nft "$@"; }}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec >/dev/ttyS1 2>&1 </dev/null
stty raw -echo </dev/ttyS1
hostname podway-vm
ulimit -n 16384
ip link set lo up
# Some modules put a device of their own into every namespace, where tests count devices.
echo 2 >/proc/sys/net/core/fb_tunnels_only_for_init_net
say() {{ read -r up rest </proc/uptime; echo; echo "{MARK} $up $*"; }}
probe() {{ if out=$(eval "$2" 2>&1); then say probe yes "$1"; else say probe no "$1" $out; fi; }}
run() {{
    say begin "$1"
    shift
    timeout -s KILL {PROGRAM_LIMIT} "$@"
    say end $?
}}
say boot "$(uname -r)"
"#
    );
    for module in modules {
        script += &format!("insmod /modules/{module}.ko || say problem module {module} cannot be loaded\n");
    }
    for (name, command) in PROBES {
        script += &format!("probe '{name}' \"{}\"\n", command.replace('$', "\\$"));
    }
    for program in programs {
        let arguments = if program.is_test { " --show-output" } else { "" };
        script += &format!("run '{}' /{PROGRAMS}/{}{arguments}\n", program.label(), file_name(program));
    }
    script + "say done\npoweroff -f\n"
}

#[cfg(test)]
mod tests {
    use std::{io::Write, path::PathBuf, process::Stdio};

    use super::*;

    #[test]
    fn the_script_is_one_that_a_shell_takes() {
        let program = |name: &str, is_test| Program {
            name: name.to_owned(),
            executable: PathBuf::from("/nonexistent"),
            manifest: PathBuf::from("/w/crates/link/Cargo.toml"),
            is_test,
        };
        let script = script(&["veth", "vxlan"], &[program("netlink", true), program("budget", false)]);
        let mut shell = std::process::Command::new("sh").arg("-n").stdin(Stdio::piped()).spawn().unwrap();
        shell.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        assert!(shell.wait().unwrap().success());
        assert!(script.contains("run 'link: netlink' /tests/link-netlink --show-output\n"));
        assert!(script.contains("run 'link: budget' /tests/link-budget\n"));
        assert!(script.find("/modules/veth.ko") < script.find("/modules/vxlan.ko"));
    }
}
