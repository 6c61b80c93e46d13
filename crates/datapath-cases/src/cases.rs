//! The cases.

use podway_abi::{Addr, Hook, Mac, Reason};
use podway_datapath::{TunnelKey, Verdict};

use crate::{
    frames::{self, L4, TTL, arp, ip, later_fragment, neighbour_solicitation},
    world::{
        HOST_1_MAC, HOST_2_MAC, HOST_3_MAC, NODE, OTHER_NODE, OTHER_POD, OUTSIDE, POD_1, POD_1_MAC, POD_2,
        POD_2_MAC, POD_3_MAC, TUNNEL_PORT, VNI, addr,
    },
};

/// Where the packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Link of the first pod.
    Pod1,
    /// Link of the second pod.
    Pod2,
    /// Underlay device.
    Uplink,
    /// Tunnel device.
    Tunnel,
}

/// Which pod a packet is delivered to.
pub type Target = u32;

/// What must happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expect {
    /// What is done with the packet.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// For a delivery: the pod's number.
    pub target: Option<Target>,
    /// For an encapsulation: the other end.
    pub tunnel: Option<Addr>,
    /// Whether a flow is recorded.
    pub tracked: bool,
}

/// A packet at a hook, and what must happen to it.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is shown.
    pub name: String,
    /// Whether the node is in overlay mode (else direct).
    pub overlay: bool,
    /// The hook.
    pub hook: Hook,
    /// Where.
    pub at: At,
    /// The packet from its Ethernet header on.
    pub frame: Vec<u8>,
    /// Outer header, for a packet out of the tunnel.
    pub outer: Option<TunnelKey>,
    /// What must happen.
    pub expect: Expect,
}

pub(crate) const GATEWAY: (Mac, Mac) = (POD_1_MAC, HOST_1_MAC);
pub(crate) const WIRE: (Mac, Mac) = ([0x02, 0, 0, 0, 9, 1], [0x02, 0, 0, 0, 9, 2]);

pub(crate) const fn pass(reason: Reason) -> Expect {
    Expect { verdict: Verdict::Pass, reason, target: None, tunnel: None, tracked: false }
}

pub(crate) const fn drop(reason: Reason) -> Expect {
    Expect { verdict: Verdict::Drop, reason, target: None, tunnel: None, tracked: false }
}

pub(crate) const fn deliver(target: Target) -> Expect {
    Expect {
        verdict: Verdict::ToPod,
        reason: Reason::Delivered,
        target: Some(target),
        tunnel: None,
        tracked: true,
    }
}

const fn tracked(mut expect: Expect) -> Expect {
    expect.tracked = true;
    expect
}

const fn untracked(mut expect: Expect) -> Expect {
    expect.tracked = false;
    expect
}

pub(crate) fn encapsulate(verdict: Verdict, other: &str) -> Expect {
    let tunnel = Some(addr(other));
    Expect {
        verdict,
        reason: Reason::Encapsulated,
        target: None,
        tunnel,
        tracked: verdict == Verdict::ToTunnel,
    }
}

pub(crate) const ROUTED: Expect =
    Expect { verdict: Verdict::ToUplink, reason: Reason::Routed, target: None, tunnel: None, tracked: true };

/// Every case.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for overlay in [true, false] {
        for family in 0..2 {
            let mut of_family = Builder { overlay, family, cases: &mut cases };
            of_family.at_from_pod();
            of_family.spoofed();
            of_family.at_to_pod();
            of_family.at_from_uplink();
            of_family.tunnelled_at_from_uplink();
            if overlay {
                of_family.at_from_tunnel();
                of_family.at_to_tunnel();
            }
        }
        let mut rest = Builder { overlay, family: 0, cases: &mut cases };
        rest.link_control();
        rest.malformed();
    }
    cases
}

struct Builder<'a> {
    overlay: bool,
    /// 0 for IPv4, 1 for IPv6: index into the pairs of the world.
    family: usize,
    cases: &'a mut Vec<Case>,
}

impl Builder<'_> {
    fn add(&mut self, name: &str, hook: Hook, at: At, frame: Vec<u8>, expect: Expect) {
        self.add_outer(name, hook, at, frame, None, expect);
    }

    fn add_outer(
        &mut self,
        name: &str,
        hook: Hook,
        at: At,
        frame: Vec<u8>,
        outer: Option<TunnelKey>,
        expect: Expect,
    ) {
        let mode = if self.overlay { "overlay" } else { "direct" };
        let family = if self.family == 0 { "IPv4" } else { "IPv6" };
        let name = format!("{mode}, {family}, {}: {name}", hook.name());
        self.cases.push(Case { name, overlay: self.overlay, hook, at, frame, outer, expect });
    }

    fn ip(&self, macs: (Mac, Mac), src: [&str; 2], dst: [&str; 2], l4: L4) -> Vec<u8> {
        ip(macs, src[self.family], dst[self.family], TTL, l4)
    }

    fn at_from_pod(&mut self) {
        let udp = L4::Udp(40_000, 53);
        for (name, l4) in [("UDP", udp), ("TCP", L4::Syn(40_000, 80)), ("echo", L4::Echo(7))] {
            let frame = self.ip(GATEWAY, POD_1, POD_2, l4);
            self.add(&format!("{name} to a pod on this node"), Hook::FromPod, At::Pod1, frame, deliver(2));
        }
        let remote = if self.overlay { encapsulate(Verdict::ToTunnel, OTHER_NODE[0]) } else { ROUTED };
        let frame = self.ip(GATEWAY, POD_1, OTHER_POD, udp);
        self.add("to a pod on another node", Hook::FromPod, At::Pod1, frame, remote);
        let frame = self.ip(GATEWAY, POD_1, OTHER_NODE, udp);
        let node = if self.overlay { remote } else { tracked(pass(Reason::ToStack)) };
        self.add("to another node", Hook::FromPod, At::Pod1, frame, node);
        let frame = self.ip(GATEWAY, POD_1, NODE, udp);
        self.add("to its own node", Hook::FromPod, At::Pod1, frame, tracked(pass(Reason::ToStack)));
        let frame = self.ip(GATEWAY, POD_1, OUTSIDE, udp);
        self.add("to beyond the cluster", Hook::FromPod, At::Pod1, frame, tracked(pass(Reason::ToStack)));
        let nobody = ["10.244.1.99", "fd00:10:244:1::99"];
        let frame = self.ip(GATEWAY, POD_1, nobody, udp);
        self.add("to an address of this node's range without a pod", Hook::FromPod, At::Pod1, frame, {
            tracked(pass(Reason::ToStack))
        });
        let frame = self.ip(GATEWAY, POD_1, POD_2, L4::Unknown);
        self.add("a transport without ports", Hook::FromPod, At::Pod1, frame, untracked(deliver(2)));
        let frame = ip(GATEWAY, POD_1[self.family], POD_2[self.family], 1, udp);
        self.add("at the end of its hops", Hook::FromPod, At::Pod1, frame, pass(Reason::HopLimit));
    }

    fn spoofed(&mut self) {
        let udp = L4::Udp(40_000, 53);
        for (name, src) in
            [("its neighbour", POD_2), ("its node", NODE), ("another pod", OTHER_POD), ("anyone", OUTSIDE)]
        {
            let frame = self.ip(GATEWAY, src, POD_2, udp);
            self.add(&format!("as {name}"), Hook::FromPod, At::Pod1, frame, drop(Reason::SpoofedAddress));
        }
        let frame = self.ip((POD_2_MAC, HOST_1_MAC), POD_1, POD_2, udp);
        self.add("from its neighbour's MAC", Hook::FromPod, At::Pod1, frame, drop(Reason::SpoofedMac));
        let unspecified = ["0.0.0.0", "::"];
        let frame = self.ip(GATEWAY, unspecified, POD_2, udp);
        self.add(
            "from the unspecified address",
            Hook::FromPod,
            At::Pod1,
            frame,
            drop(Reason::SpoofedAddress),
        );
    }

    fn at_to_pod(&mut self) {
        let frame = self.ip((HOST_1_MAC, POD_1_MAC), NODE, POD_1, L4::Syn(40_000, 80));
        self.add("from the node's stack", Hook::ToPod, At::Pod1, frame, tracked(pass(Reason::Delivered)));
    }

    fn at_from_uplink(&mut self) {
        let udp = L4::Udp(40_000, 53);
        let frame = self.ip(WIRE, OTHER_NODE, POD_1, udp);
        self.add("another node to a pod", Hook::FromUplink, At::Uplink, frame, deliver(1));
        let frame = self.ip(WIRE, OTHER_NODE, NODE, udp);
        self.add("another node to this node", Hook::FromUplink, At::Uplink, frame, pass(Reason::ToStack));
        let frame = self.ip(WIRE, OUTSIDE, POD_1, udp);
        self.add(
            "from beyond the cluster to a pod",
            Hook::FromUplink,
            At::Uplink,
            frame,
            pass(Reason::ToStack),
        );
        let frame = self.ip(WIRE, OTHER_POD, POD_1, udp);
        let remote_pod = if self.overlay { drop(Reason::UntunneledPodSource) } else { deliver(1) };
        self.add("another node's pod to a pod", Hook::FromUplink, At::Uplink, frame, remote_pod);
        for (name, src) in [("this node", NODE), ("a pod of this node", POD_2)] {
            let frame = self.ip(WIRE, src, POD_1, udp);
            self.add(
                &format!("claiming to be {name}"),
                Hook::FromUplink,
                At::Uplink,
                frame,
                drop(Reason::OwnSource),
            );
        }
    }

    /// What looks like tunnel traffic is left to the tunnel device if it can only go there.
    fn tunnelled_at_from_uplink(&mut self) {
        let vxlan = L4::Udp(50_000, TUNNEL_PORT);
        // The world's tunnels are over IPv4.
        let own_end = self.overlay && self.family == 0;
        let forged = if own_end { pass(Reason::ToStack) } else { drop(Reason::OwnSource) };
        for (name, src, dst, expect) in [
            ("from another node", OTHER_NODE, NODE, pass(Reason::ToStack)),
            ("from beyond the cluster", OUTSIDE, NODE, pass(Reason::ToStack)),
            ("claiming to be this node", NODE, NODE, forged),
            ("claiming to be this node, to a pod", NODE, POD_1, drop(Reason::OwnSource)),
            ("to a pod", OTHER_NODE, POD_1, deliver(1)),
        ] {
            let frame = self.ip(WIRE, src, dst, vxlan);
            self.add(&format!("tunnel port, {name}"), Hook::FromUplink, At::Uplink, frame, expect);
        }
    }

    fn at_from_tunnel(&mut self) {
        let udp = L4::Udp(40_000, 53);
        let key = |source: &str, vni| Some(TunnelKey { source: addr(source), vni });
        let other = key(OTHER_NODE[0], VNI);
        let mut add =
            |name: &str, src: [&str; 2], dst: [&str; 2], outer: Option<TunnelKey>, expect: Expect| {
                let frame = self.ip(WIRE, src, dst, udp);
                self.add_outer(name, Hook::FromTunnel, At::Tunnel, frame, outer, expect);
            };
        add("a pod to a pod", OTHER_POD, POD_1, other, deliver(1));
        add("a node to a pod", OTHER_NODE, POD_2, other, deliver(2));
        add("a pod to this node", OTHER_POD, NODE, other, pass(Reason::ToStack));
        add("without a tunnel", OTHER_POD, POD_1, None, drop(Reason::NoTunnelKey));
        let stranger = key(OUTSIDE[0], VNI);
        add("from a stranger", OTHER_POD, POD_1, stranger, drop(Reason::UnknownTunnelPeer));
        let foreign = key(OTHER_NODE[0], VNI + 1);
        add("of another virtual network", OTHER_POD, POD_1, foreign, drop(Reason::WrongTunnelId));
        add("claiming to be beyond the cluster", OUTSIDE, POD_1, other, drop(Reason::TunnelSourceMismatch));
        add("claiming to be a pod of this node", POD_2, POD_1, other, drop(Reason::OwnSource));
        add("for somebody else", OTHER_POD, OUTSIDE, other, drop(Reason::NotForThisNode));
        add("back to the other node", OTHER_POD, OTHER_NODE, other, drop(Reason::NotForThisNode));
        if self.family == 0 {
            let frame = arp(WIRE, [10, 244, 2, 2], [10, 244, 1, 2]);
            let expect = drop(Reason::NotForThisNode);
            self.add_outer("ARP for a pod", Hook::FromTunnel, At::Tunnel, frame, other, expect);
        }
    }

    fn at_to_tunnel(&mut self) {
        let udp = L4::Udp(40_000, 53);
        let set = encapsulate(Verdict::SetTunnel, OTHER_NODE[0]);
        let frame = self.ip(WIRE, NODE, OTHER_POD, udp);
        self.add("this node to another node's pod", Hook::ToTunnel, At::Tunnel, frame, set);
        let frame = self.ip(WIRE, NODE, OUTSIDE, udp);
        self.add("to beyond the cluster", Hook::ToTunnel, At::Tunnel, frame, drop(Reason::NoPeer));
        let frame = self.ip(WIRE, NODE, POD_1, udp);
        self.add("to a pod of this node", Hook::ToTunnel, At::Tunnel, frame, drop(Reason::NoPeer));
        let all_nodes = ["224.0.0.1", "ff02::1"];
        let frame = self.ip(WIRE, NODE, all_nodes, udp);
        self.add("to all neighbours", Hook::ToTunnel, At::Tunnel, frame, pass(Reason::LinkControl));
    }

    fn link_control(&mut self) {
        let gateway = [169, 254, 1, 1];
        let request = |sender| arp(GATEWAY, sender, gateway);
        let control = pass(Reason::LinkControl);
        self.add("ARP for the gateway", Hook::FromPod, At::Pod1, request([10, 244, 1, 2]), control);
        self.add("ARP probe", Hook::FromPod, At::Pod1, request([0, 0, 0, 0]), control);
        let expect = drop(Reason::SpoofedAddress);
        self.add("ARP as its neighbour", Hook::FromPod, At::Pod1, request([10, 244, 1, 3]), expect);
        self.family = 1;
        for (name, src) in [("DAD", "::"), ("link-local", "fe80::2"), ("own", POD_1[1])] {
            let frame = neighbour_solicitation(GATEWAY, src, "ff02::1:ff00:1");
            self.add(
                &format!("neighbour solicitation, {name} source"),
                Hook::FromPod,
                At::Pod1,
                frame,
                control,
            );
        }
        let frame = neighbour_solicitation(GATEWAY, POD_2[1], "ff02::1:ff00:1");
        self.add("neighbour solicitation as its neighbour", Hook::FromPod, At::Pod1, frame, expect);
        let frame = ip(GATEWAY, "fe80::2", POD_2[1], TTL, L4::Udp(1, 2));
        self.add("link-local source beyond the link", Hook::FromPod, At::Pod1, frame, expect);
        self.family = 0;
        let frame = ip((HOST_2_MAC, POD_1_MAC), "169.254.1.1", "224.0.0.1", TTL, L4::Udp(1, 2));
        self.add("multicast of the node", Hook::ToPod, At::Pod1, frame, control);
    }

    fn malformed(&mut self) {
        let whole = ip(GATEWAY, POD_1[0], POD_2[0], TTL, L4::Syn(40_000, 80));
        for (name, len) in [("cut in the IPv4 header", 14 + 12), ("cut in the TCP header", 14 + 20 + 6)] {
            let frame = whole[..len].to_vec();
            self.add(name, Hook::FromPod, At::Pod1, frame, drop(Reason::Malformed));
        }
        let mut frame = whole.clone();
        frame[14] = 0x44;
        self.add("IPv4 header length below 20", Hook::FromPod, At::Pod1, frame, drop(Reason::Malformed));
        for (name, total) in
            [("total length beyond the packet", 200u16), ("total length below the header", 19)]
        {
            let mut frame = whole.clone();
            frame[14 + 2..14 + 4].copy_from_slice(&total.to_be_bytes());
            frames::write_ipv4_checksum(&mut frame);
            self.add(name, Hook::FromPod, At::Pod1, frame, drop(Reason::Malformed));
        }
        let mut frame = whole;
        frame[12..14].copy_from_slice(&[0x88, 0x47]);
        self.add("MPLS", Hook::FromPod, At::Pod1, frame, drop(Reason::UnsupportedProtocol));
        let frame = later_fragment(GATEWAY, POD_1[0], POD_2[0]);
        self.add("a later fragment", Hook::FromPod, At::Pod1, frame, untracked(deliver(2)));
        self.family = 1;
        let frame = ip(GATEWAY, POD_1[1], "::ffff:10.244.1.3", TTL, L4::Udp(1, 2));
        self.add("a v4-mapped destination", Hook::FromPod, At::Pod1, frame, drop(Reason::MappedAddress));
        let mut frame = ip(GATEWAY, POD_1[1], POD_2[1], TTL, L4::Udp(1, 2));
        frame[14 + 4..14 + 6].copy_from_slice(&200u16.to_be_bytes());
        self.add("payload length beyond the packet", Hook::FromPod, At::Pod1, frame, drop(Reason::Malformed));
        let mut frame = ip(GATEWAY, POD_1[1], POD_2[1], TTL, L4::Udp(1, 2));
        frame[14 + 4..14 + 6].copy_from_slice(&1u16.to_be_bytes());
        frame[14 + 6] = 0;
        frame.truncate(14 + 40 + 1);
        self.add("cut in an extension header", Hook::FromPod, At::Pod1, frame, drop(Reason::Malformed));
        let frame = extension_chain(2);
        self.add("extension headers", Hook::FromPod, At::Pod1, frame, deliver(2));
        let frame = extension_chain(9);
        self.add("too many extension headers", Hook::FromPod, At::Pod1, frame, drop(Reason::Malformed));
        self.family = 0;
    }
}

/// A UDP packet behind a number of empty destination options headers.
fn extension_chain(headers: usize) -> Vec<u8> {
    let plain = ip(GATEWAY, POD_1[1], POD_2[1], TTL, L4::Udp(1, 2));
    let mut frame = plain[..14 + 40].to_vec();
    frame[14 + 6] = 60;
    for i in 0..headers {
        let next = if i + 1 == headers { 17 } else { 60 };
        // One PadN option of 4 bytes fills the header to 8 (RFC 8200 section 4.2).
        frame.extend([next, 0, 1, 4, 0, 0, 0, 0]);
    }
    frame.extend(&plain[14 + 40..]);
    let payload = u16::try_from(frame.len() - 54).expect("a short frame");
    frame[14 + 4..14 + 6].copy_from_slice(&payload.to_be_bytes());
    frame
}

/// What a delivery changes in a frame: link-layer addresses, one hop, the checksum.
///
/// # Panics
/// When the target is none of the world's pods.
pub fn delivered(frame: &[u8], target: Target) -> Vec<u8> {
    let (pod, host) = match target {
        1 => (POD_1_MAC, HOST_1_MAC),
        2 => (POD_2_MAC, HOST_2_MAC),
        3 => (POD_3_MAC, HOST_3_MAC),
        other => panic!("the world has no pod {other}"),
    };
    let mut out = frame.to_vec();
    out[0..6].copy_from_slice(&pod);
    out[6..12].copy_from_slice(&host);
    if out[12..14] == [8, 0] {
        out[14 + 8] -= 1;
        frames::write_ipv4_checksum(&mut out);
    } else {
        out[14 + 7] -= 1;
    }
    out
}
