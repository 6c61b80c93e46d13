//! TAP devices on the running kernel.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use common::{Namespace, root};
use podway_link::tap::{FRAME_MAX, Tap};
use podway_link::{AddressFlags, Netns, sysctl};

fn create(netns: &Netns, name: &str) -> podway_link::Result<Tap> {
    netns.run(|| Tap::create(name))?
}

#[test]
fn frames_go_out_and_come_in() {
    if !root() {
        return;
    }
    let namespace = Namespace::new("tap");
    let tap = create(&namespace.netns, "tap-%d").unwrap();
    assert_eq!(tap.name(), "tap-0");
    assert_eq!(create(&namespace.netns, "tap-%d").unwrap().name(), "tap-1");
    let mut netlink = namespace.netlink();
    let link = netlink.link_by_name("tap-0").unwrap().unwrap();
    assert!(netlink.link_by_name("tap-1").unwrap().is_none(), "it goes with its value");
    namespace.netns.run(|| sysctl::write("net/ipv6/conf/tap-0/disable_ipv6", "1")).unwrap().unwrap();
    netlink.set_up(link.index).unwrap();
    netlink.add_address(link.index, "192.0.2.1/24".parse().unwrap(), AddressFlags::default()).unwrap();
    let mut buffer = Box::new([0; FRAME_MAX]);
    assert_eq!(tap.receive(&mut buffer).unwrap(), None);

    // The kernel asks for the neighbour (RFC 826), and sends the datagram once we have answered.
    let socket = namespace.netns.run(|| UdpSocket::bind("192.0.2.1:0")).unwrap().unwrap();
    socket.send_to(b"hello", "192.0.2.2:9").unwrap();
    let mut next = |what: &str| {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(frame) = tap.receive(&mut buffer).unwrap() {
                return frame.to_vec();
            }
            assert!(Instant::now() < end, "no {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let mut arp = next("ARP request");
    assert_eq!(arp[12..14], [0x08, 0x06]);
    let (asker, asked, mac) = (arp[22..32].to_vec(), [192, 0, 2, 2], [2, 0, 0, 0, 0, 9]);
    arp[..6].copy_from_slice(&asker[..6]);
    arp[6..12].copy_from_slice(&mac);
    arp[21] = 2;
    arp[22..28].copy_from_slice(&mac);
    arp[28..32].copy_from_slice(&asked);
    arp[32..42].copy_from_slice(&asker);
    tap.send(&arp).unwrap();
    let datagram = next("datagram");
    assert_eq!((&datagram[..6], &datagram[42..47]), (&mac[..], &b"hello"[..]));
    assert_ne!(datagram[40..42], [0, 0], "checksums are filled in");

    netlink.delete_link(link.index).unwrap();
    assert!(tap.send(&arp).is_err() && tap.receive(&mut buffer).is_err());
}

#[test]
fn bad_names_are_refused() {
    if !root() {
        return;
    }
    let namespace = Namespace::new("tap-bad");
    for (name, cause) in
        [("sixteen-letters-", "at most 15"), ("lo", "create TAP device lo"), ("a/b", "Invalid")]
    {
        let error = create(&namespace.netns, name).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(cause), "{error}");
    }
}
