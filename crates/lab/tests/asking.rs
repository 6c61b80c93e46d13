//! Questions between two network namespaces, one of which lets only some of them in.

use std::process::Command;

use podway_lab::check::{Heard, Question, Way, ask};
use podway_link::Netns;

const A: &str = "pwt-pcl-ask-a";
const B: &str = "pwt-pcl-ask-b";

struct Cleanup;

impl Drop for Cleanup {
    fn drop(&mut self) {
        for name in [A, B] {
            let _ = Netns::delete_named(name);
        }
    }
}

fn run(line: &str) {
    let words: Vec<&str> = line.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().expect(line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_arrives_is_told_from_what_is_dropped() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let _cleanup = Cleanup;
    drop(Cleanup);
    Netns::create_named(A).expect("namespace");
    Netns::create_named(B).expect("namespace");
    run(&format!("ip -n {A} link add veth0 type veth peer name veth0 netns {B}"));
    for (name, address, v6) in [(A, "192.0.2.1/24", "2001:db8::1/64"), (B, "192.0.2.2/24", "2001:db8::2/64")]
    {
        run(&format!("ip -n {name} addr add {address} dev veth0"));
        run(&format!("ip -n {name} addr add {v6} dev veth0 nodad"));
        run(&format!("ip -n {name} link set veth0 up"));
    }
    run(&format!("ip netns exec {B} nft add table inet t"));
    run(&format!("ip netns exec {B} nft add chain inet t c {{ type filter hook input priority 0 ; }}"));
    for rule in ["tcp dport 81 drop", "udp dport 81 drop"] {
        run(&format!("ip netns exec {B} nft add rule inet t c {rule}"));
    }
    let listener = Netns::open_named(B).expect("namespace").run(|| std::net::TcpListener::bind("[::]:80"));
    let _listener = listener.expect("enter").expect("listen");
    let mut questions = Vec::new();
    let mut expected = Vec::new();
    for target in ["192.0.2.2", "2001:db8::2"] {
        for (way, heard) in [
            (Way::Tcp(80), Heard::Arrived),
            (Way::Tcp(82), Heard::Arrived),
            (Way::Tcp(81), Heard::Silence),
            (Way::Udp(82), Heard::Arrived),
            (Way::Udp(81), Heard::Silence),
            (Way::Icmp, Heard::Arrived),
        ] {
            let target = target.parse().expect("address");
            questions.push(Question { netns: A.into(), target, way });
            expected.push(heard);
        }
    }
    // Nobody has this address, and no route leads to the other.
    for target in ["192.0.2.9", "198.51.100.1"] {
        questions.push(Question {
            netns: A.into(),
            target: target.parse().expect("address"),
            way: Way::Tcp(80),
        });
        expected.push(Heard::Failed { cause: String::new() });
    }
    questions.push(Question {
        netns: "pwt-pcl-no-such".into(),
        target: "192.0.2.2".parse().expect("address"),
        way: Way::Icmp,
    });
    expected.push(Heard::Failed { cause: String::new() });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    let heard = runtime.block_on(ask(&questions)).expect("asked");
    for ((question, heard), expected) in questions.iter().zip(&heard).zip(&expected) {
        let same = match (heard, expected) {
            // A neighbour that does not answer is silence until the kernel gives up on it.
            (Heard::Failed { .. } | Heard::Silence, Heard::Failed { .. }) => true,
            (a, b) => a == b,
        };
        assert!(same, "{question:?}: {heard:?}, not {expected:?}");
    }
    let Some(Heard::Failed { cause }) = heard.last() else { panic!("{heard:?}") };
    assert!(cause.starts_with("cannot be entered: "), "{cause}");
}
