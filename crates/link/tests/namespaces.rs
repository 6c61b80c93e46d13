//! Namespaces on the running kernel.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::process::Command;

use common::{Namespace, root};
use podway_link::{Netlink, Netns, snmp, sysctl};

#[test]
fn named_namespaces_are_made_listed_and_removed() {
    if !root() {
        return;
    }
    let a = Namespace::new("named-a");
    let b = Namespace::new("named-b");
    assert_ne!(a.netns.id().unwrap(), b.netns.id().unwrap());
    assert_eq!(Netns::open_named(&a.name).unwrap().id().unwrap(), a.netns.id().unwrap());
    assert_eq!(Netns::list_named("pwt-link-named-").unwrap(), [a.name.clone(), b.name.clone()]);
    let loopback = a.netlink().link_by_index(1).unwrap().unwrap();
    assert!(loopback.up && loopback.name == "lo", "{loopback:?}");

    let taken = Netns::create_named(&a.name).unwrap_err();
    assert!(taken.is_exists(), "{taken}");
    assert!(taken.to_string().contains(&a.name), "{taken}");
    Netns::open_named(&a.name).expect("a refused creation leaves the one that is there");

    Netns::delete_named(&a.name).unwrap();
    Netns::delete_named(&a.name).unwrap();
    assert!(Netns::open_named(&a.name).unwrap_err().is_not_found());
    // The open handle keeps it alive.
    assert!(Netlink::open_in(&a.netns).unwrap().link_by_index(1).unwrap().is_some());
    assert_eq!(Netns::list_named("pwt-link-named-").unwrap(), std::slice::from_ref(&b.name));
}

#[test]
fn what_a_crashed_creation_left_is_no_namespace_and_can_be_removed() {
    if !root() {
        return;
    }
    let name = "pwt-link-torn";
    Netns::delete_named(name).unwrap();
    let path = std::path::Path::new("/run/netns").join(name);
    std::fs::create_dir_all("/run/netns").unwrap();
    std::fs::write(&path, "").unwrap();
    let error = Netns::open(&path).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("no namespace"), "{error}");
    Netns::delete_named(name).unwrap();
    assert!(!path.exists());
}

#[test]
fn bad_names_are_refused() {
    for name in ["", ".", "..", "a/b", "a\0b", &"x".repeat(256)] {
        for error in [Netns::create_named(name).unwrap_err(), Netns::delete_named(name).unwrap_err()] {
            assert!(error.to_string().contains("1 to 255 bytes"), "{name:?}: {error}");
        }
    }
}

#[test]
fn code_runs_inside_and_the_caller_stays_outside() {
    if !root() {
        return;
    }
    let namespace = Namespace::new("run");
    let outside = Netns::current().unwrap().id().unwrap();
    let borrowed = String::from("inside");
    let (inside, child) = namespace
        .netns
        .run(|| {
            assert_eq!(borrowed, "inside");
            let link = Command::new("readlink").arg("/proc/self/ns/net").output().unwrap();
            (Netns::current().unwrap().id().unwrap(), String::from_utf8(link.stdout).unwrap())
        })
        .unwrap();
    assert_eq!(inside, namespace.netns.id().unwrap());
    assert_eq!(child.trim(), format!("net:[{}]", inside.1), "a process started inside is inside");
    assert_eq!(Netns::current().unwrap().id().unwrap(), outside);
    let panic =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| namespace.netns.run(|| panic!("inside"))));
    assert!(panic.is_err(), "a panic inside goes on outside");
}

#[test]
fn sysctls_and_counters_are_those_of_the_namespace() {
    if !root() {
        return;
    }
    let (a, b) = (Namespace::new("sysctl-a"), Namespace::new("sysctl-b"));
    let path = "net/ipv4/conf/all/rp_filter";
    for (namespace, value) in [(&a, "1"), (&b, "2")] {
        namespace.netns.run(|| sysctl::write(path, value)).unwrap().unwrap();
    }
    for (namespace, value) in [(&a, "1"), (&b, "2")] {
        assert_eq!(namespace.netns.run(|| sysctl::read(path)).unwrap().unwrap(), value);
    }
    a.netns
        .run(|| {
            let missing = sysctl::write("net/ipv4/no_such", "1").unwrap_err();
            assert!(missing.is_not_found() && missing.to_string().contains("net/ipv4/no_such"), "{missing}");
            assert!(!sysctl::write_if_present("net/ipv4/no_such", "1").unwrap());
            let refused = sysctl::write(path, "many").unwrap_err().to_string();
            assert!(refused.contains(path) && refused.contains("many"), "{refused}");
            for bad in
                ["kernel/hostname", "net/../kernel/hostname", "net//ipv4", "/net/ipv4", "net.ipv4.ip_forward"]
            {
                assert!(
                    sysctl::write(bad, "1").unwrap_err().to_string().contains("net/ipv4/ip_forward"),
                    "{bad}"
                );
            }
            assert_eq!(
                snmp::Counters::read().unwrap().value("Ip.InReceives"),
                0,
                "a new namespace has received nothing"
            );
        })
        .unwrap();
}
