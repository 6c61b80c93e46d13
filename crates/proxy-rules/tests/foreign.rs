//! Detection and removal of what a real kube-proxy left, in a network namespace of its own: its dumps are loaded
//! beside rules of somebody else, found, removed, and only the other rules are left.
#![expect(clippy::print_stdout, reason = "a test that does not run says why")]

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use podway_link::Netns;
use podway_proxy_rules::foreign::cleanup::{CleanupReport, kube_proxy};
use podway_proxy_rules::foreign::detect::{Proxy, detect_in};

struct Scratch {
    name: String,
    namespace: Netns,
}

impl Scratch {
    fn new(name: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        // What a crash left of earlier runs.
        for old in Netns::list_named(&format!("pwt-{name}-")).expect("namespaces can be listed") {
            let pid: i32 = old.rsplit('-').next().and_then(|p| p.parse().ok()).unwrap_or(0);
            if !PathBuf::from(format!("/proc/{pid}")).exists() {
                let _ = Netns::delete_named(&old);
            }
        }
        let name = format!("pwt-{name}-{}", std::process::id());
        let namespace = Netns::create_named(&name).expect("a network namespace");
        Some(Self { name, namespace })
    }

    fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.namespace.run(f).expect("the namespace can be entered")
    }

    fn tool(&self, command: &[&str], input: &str) -> String {
        self.run(|| tool(command, input))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = Netns::delete_named(&self.name);
    }
}

fn tool(command: &[&str], input: &str) -> String {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}", command[0]));
    let mut stdin = child.stdin.take().expect("a pipe");
    let bytes = input.as_bytes().to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output().expect("it ends");
    let _ = writer.join();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A dump by its file name, or `None` with a message.
fn dump(file: &str) -> Option<String> {
    let cases = std::env::var_os("PODWAY_CASES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/cases"),
        PathBuf::from,
    );
    let path = cases.join("foreign-rules").join(file);
    if !path.exists() {
        println!("skipped: {} is not there; set PODWAY_CASES", path.display());
        return None;
    }
    let path = path.to_str().expect("a path is text");
    Some(if file.ends_with(".gz") { tool(&["gzip", "-dc", path], "") } else { tool(&["cat", path], "") })
}

/// Rules only, without comments and counters.
fn rules(saved: &str) -> Vec<String> {
    let rule = |l: &&str| l.starts_with("-A") || (l.starts_with(':') && l.contains(" - "));
    saved.lines().filter(rule).map(|l| l.split(" [").next().unwrap_or(l).to_owned()).collect()
}

/// What is in a namespace, of everything that a proxy could have made.
fn state(scratch: &Scratch) -> Vec<String> {
    let mut all = Vec::new();
    for save in ["iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save"] {
        all.extend(rules(&scratch.tool(&[save], "")).into_iter().map(|r| format!("{save}: {r}")));
    }
    all.extend(
        scratch
            .tool(&["nft", "list", "tables"], "")
            .lines()
            .filter(|l| l.contains("inet") || l.contains("kube"))
            .map(str::to_owned),
    );
    all
}

/// Rules of somebody else, which look a little alike.
const SOMEBODY: &str = "*filter\n:MINE - [0:0]\n:KUBE-NWPLCY-DEFAULT - [0:0]\n\
     -A INPUT -p tcp -m comment --comment \"to -j KUBE-SERVICES\" -m tcp --dport 2222 -j MINE\n\
     -A FORWARD -j KUBE-NWPLCY-DEFAULT\n-A MINE -j ACCEPT\nCOMMIT\n\
     *nat\n-A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE\nCOMMIT\n";
const SOMEBODY_NFT: &str = "table inet somebody {\n chain input {\n type filter hook input priority 0;\n \
     tcp dport 22 accept comment \"kube-proxy\"\n }\n}\n";

/// This kernel may lack what one rule of the dump counts with; nothing leads through that rule.
fn loadable(dump: &str) -> String {
    dump.lines().filter(|l| !l.contains("-m nfacct")).map(|l| format!("{l}\n")).collect()
}

fn check_removed(scratch: &Scratch, before: &[String], what: &str) -> CleanupReport {
    let full = state(scratch);
    assert!(full.len() > before.len(), "{what}: nothing was loaded");
    let no_bpffs: [PathBuf; 0] = [];
    let detection = scratch.run(|| detect_in(&no_bpffs));
    assert_eq!(detection.unknown, Vec::<String>::new(), "{what}");
    let [finding] = detection.findings.as_slice() else { panic!("{what}: {:?}", detection.findings) };
    assert_eq!((finding.proxy, finding.runs), (Proxy::KubeProxy, false));
    let warning = finding.to_string();
    for part in ["found kube-proxy: ", "endpoints of the past", "podway cleanup --of kube-proxy"] {
        assert!(warning.contains(part), "{what}: {part} in {warning}");
    }

    let dry = scratch.run(|| kube_proxy(true, false)).expect("a dry run");
    assert_eq!(state(scratch), full, "{what}: a dry run changes nothing");
    let report = scratch.run(|| kube_proxy(false, false)).expect("cleanup");
    assert_eq!(report.failed, Vec::<String>::new(), "{what}");
    assert_eq!(dry.removed, report.removed, "{what}: a dry run says what would be removed");
    assert_eq!(state(scratch), before, "{what}: {:#?}", report.removed);
    assert!(scratch.run(|| detect_in(&no_bpffs)).findings.is_empty(), "{what}");
    let again = scratch.run(|| kube_proxy(false, false)).expect("cleanup");
    assert_eq!(again, CleanupReport::default(), "{what}: nothing is left to remove");
    report
}

#[test]
fn what_iptables_modes_left_is_found_and_removed_and_nothing_else() {
    for backend in ["legacy", "nft"] {
        for size in ["10-services.txt", "1000-services.txt.gz"] {
            let kind = if backend == "nft" { "iptnft" } else { backend };
            let Some(text) = dump(&format!("kube-proxy-1.36-{kind}-{size}")) else { return };
            let Some(scratch) = Scratch::new("foreign") else { return };
            let restore = format!("iptables-{backend}-restore");
            let restore6 = format!("ip6tables-{backend}-restore");
            scratch.tool(&[&restore], SOMEBODY);
            scratch.tool(&[&restore6], &SOMEBODY.replace("192.0.2.0/24", "2001:db8::/64"));
            scratch.tool(&["nft", "-f", "-"], SOMEBODY_NFT);
            let before = state(&scratch);
            scratch.tool(&[&restore, "--noflush"], &loadable(&text));
            // The other family has the same chains without services; and canaries.
            scratch.tool(
                &[&restore6, "--noflush"],
                "*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n*nat\n:KUBE-SERVICES - [0:0]\n\
                 -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\nCOMMIT\n",
            );
            let report = check_removed(&scratch, &before, &format!("{backend} {size}"));
            let services = if size.starts_with("10-") { 11 } else { 1001 };
            let line =
                report.removed.iter().find(|l| l.contains("KUBE-SVC-")).expect("a line about services");
            assert!(line.contains(&format!("{services} × KUBE-SVC-…")), "{line}");
        }
    }
}

#[test]
fn what_the_nftables_mode_left_is_found_and_removed_and_nothing_else() {
    for size in ["10-services.txt", "1000-services.txt.gz"] {
        let Some(text) = dump(&format!("kube-proxy-1.36-nftables-{size}")) else { return };
        let Some(scratch) = Scratch::new("foreign-nft") else { return };
        scratch.tool(&["iptables-nft-restore"], SOMEBODY);
        scratch.tool(&["nft", "-f", "-"], SOMEBODY_NFT);
        let before = state(&scratch);
        scratch.tool(&["nft", "-f", "-"], &text);
        scratch.tool(&["nft", "-f", "-"], "table ip6 kube-proxy { }\ntable inet kube-proxy { }\n");
        let report = check_removed(&scratch, &before, size);
        let families = ["inet", "ip", "ip6"].map(|f| format!("nftables table {f} kube-proxy"));
        let mut removed = report.removed;
        removed.sort();
        assert_eq!(removed, families);
    }
}

#[test]
fn what_the_kubelet_may_own_is_left_and_said() {
    let Some(scratch) = Scratch::new("foreign-kubelet") else { return };
    scratch.tool(
        &["iptables-nft-restore"],
        "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n\
         *filter\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\nCOMMIT\n",
    );
    let before = state(&scratch);
    // A kubelet alone is no proxy.
    assert!(scratch.run(|| detect_in(&[])).findings.is_empty());
    scratch.tool(
        &["iptables-nft-restore", "--noflush"],
        "*filter\n:KUBE-SERVICES - [0:0]\n-A INPUT -j KUBE-SERVICES\n-A KUBE-SERVICES -j KUBE-FIREWALL\nCOMMIT\n",
    );
    let report = scratch.run(|| kube_proxy(false, false)).expect("cleanup");
    assert_eq!((report.removed.len(), report.failed.len()), (2, 0), "{report:?}");
    assert_eq!(report.kept, ["chain KUBE-FIREWALL of table filter, iptables (nft, IPv4): the kubelet's"]);
    assert_eq!(state(&scratch), before);
}

#[test]
fn a_running_kube_proxy_is_refused_and_said() {
    let Some(scratch) = Scratch::new("foreign-runs") else { return };
    // Any program of that name, in that namespace.
    let directory = std::env::temp_dir().join(format!("pwt-foreign-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let program = directory.join("kube-proxy");
    std::fs::copy("/bin/sleep", &program).expect("a copy of sleep");
    let mut process = scratch.run(|| Command::new(&program).arg("60").spawn().expect("it starts"));
    scratch.tool(&["nft", "-f", "-"], "table ip kube-proxy { }\n");
    let waited = std::time::Instant::now();
    let error = loop {
        // The name is that of the program only after exec.
        match scratch.run(|| kube_proxy(false, false)) {
            Err(error) => break Some(error),
            Ok(_) if waited.elapsed().as_secs() > 5 => break None,
            Ok(_) => {
                scratch.tool(&["nft", "-f", "-"], "table ip kube-proxy { }\n");
            }
        }
    };
    let detection = scratch.run(|| detect_in(&[]));
    let forced = scratch.run(|| kube_proxy(false, true));
    let _ = process.kill();
    let _ = process.wait();
    std::fs::remove_dir_all(&directory).expect("the directory goes");
    let error = error.expect("it is refused").to_string();
    assert!(error.contains(&format!("process {}", process.id())) && error.contains("--force"), "{error}");
    let [finding] = detection.findings.as_slice() else { panic!("{:?}", detection.findings) };
    assert!(finding.runs && finding.to_string().contains("delete daemonset kube-proxy"), "{finding}");
    assert_eq!(forced.expect("forced").removed, ["nftables table ip kube-proxy"]);
}

#[test]
fn other_proxies_are_found() {
    let Some(scratch) = Scratch::new("foreign-others") else { return };
    let directory = std::env::temp_dir().join(format!("pwt-foreign-bpffs-{}", std::process::id()));
    let globals = directory.join("tc/globals");
    std::fs::create_dir_all(&globals).expect("a directory");
    std::fs::write(globals.join("cilium_lb4_services_v2"), "").expect("a file");
    scratch.tool(&["iptables-legacy-restore"], "*nat\n:KUBE-ROUTER-SERVICES - [0:0]\nCOMMIT\n");
    let detection = scratch.run(|| detect_in(std::slice::from_ref(&directory)));
    std::fs::remove_dir_all(&directory).expect("the directory goes");
    let proxies: Vec<Proxy> = detection.findings.iter().map(|f| f.proxy).collect();
    assert_eq!(proxies, [Proxy::KubeRouter, Proxy::Cilium]);
    assert!(detection.findings[1].to_string().contains("kubeProxyReplacement=false"));
    assert!(detection.findings[0].to_string().contains("--run-service-proxy=false"));
    // None of that is kube-proxy's.
    let report = scratch.run(|| kube_proxy(false, false)).expect("cleanup");
    assert_eq!(report, CleanupReport::default());
}
