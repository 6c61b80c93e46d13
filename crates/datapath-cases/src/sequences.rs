//! Packets of one flow around a change: what was found for an established flow must not outlive what it was found in,
//! and must not serve anybody else's packets.

use podway_abi::{Hook, Mac, Reason};
use podway_datapath::{TunnelKey, Verdict};

use crate::{
    cases::{At, Expect, GATEWAY, ROUTED, WIRE, deliver, drop, encapsulate, pass},
    frames::{L4, TTL, ip, later_fragment},
    world::{
        Change, HOST_1_MAC, HOST_2_MAC, OTHER_NODE, OTHER_POD, OUTSIDE, POD_1, POD_1_MAC, POD_2, POD_2_MAC,
        THIRD_NODE, VNI, addr,
    },
};

/// One packet, or one change.
#[derive(Clone, Debug)]
pub enum Step {
    /// A packet at a hook.
    Packet {
        /// The hook.
        hook: Hook,
        /// Where.
        at: At,
        /// From its Ethernet header on.
        frame: Vec<u8>,
        /// Outer header, for a packet out of the tunnel.
        outer: Option<TunnelKey>,
        /// What must happen. Whether a flow is opened is not looked at.
        expect: Expect,
        /// Whether the tables of pods and peers must not be needed for it: the flow's entry says all.
        established: bool,
    },
    /// The world changes.
    Change(Change),
}

/// Steps, from the world as it is at first.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// What is shown.
    pub name: String,
    /// Whether the node is in overlay mode (else direct) at first.
    pub overlay: bool,
    /// What happens.
    pub steps: Vec<Step>,
}

/// Every sequence.
pub fn all() -> Vec<Sequence> {
    let mut all = Vec::new();
    for overlay in [true, false] {
        for family in 0..2 {
            let of_family = Family { overlay, family };
            all.extend(of_family.local());
            all.extend(of_family.remote());
            all.push(of_family.forged());
            all.push(of_family.hops());
            all.push(if overlay { of_family.out_of_the_tunnel() } else { of_family.off_the_wire() });
        }
        all.push(Family { overlay, family: 0 }.fragments());
    }
    all
}

const TCP: L4 = L4::Syn(40_000, 80);

struct Family {
    overlay: bool,
    family: usize,
}

impl Family {
    fn sequence(&self, name: &str, steps: Vec<Step>) -> Sequence {
        let mode = if self.overlay { "overlay" } else { "direct" };
        let family = if self.family == 0 { "IPv4" } else { "IPv6" };
        Sequence { name: format!("{mode}, {family}: {name}"), overlay: self.overlay, steps }
    }

    fn frame(&self, macs: (Mac, Mac), src: [&str; 2], dst: [&str; 2], ttl: u8) -> Vec<u8> {
        ip(macs, src[self.family], dst[self.family], ttl, TCP)
    }

    fn pod_1_sends(&self, dst: [&str; 2], expect: Expect, established: bool) -> Step {
        let frame = self.frame(GATEWAY, POD_1, dst, TTL);
        Step::Packet { hook: Hook::FromPod, at: At::Pod1, frame, outer: None, expect, established }
    }

    fn pod_2_sends(&self, expect: Expect, established: bool) -> Step {
        let frame =
            ip((POD_2_MAC, HOST_2_MAC), POD_2[self.family], POD_1[self.family], TTL, L4::Syn(80, 40_000));
        Step::Packet { hook: Hook::FromPod, at: At::Pod2, frame, outer: None, expect, established }
    }

    /// A flow between pods of the node, established in both directions.
    fn established(&self) -> Vec<Step> {
        vec![
            self.pod_1_sends(POD_2, deliver(2), false),
            self.pod_1_sends(POD_2, deliver(2), true),
            self.pod_2_sends(deliver(1), false),
            self.pod_2_sends(deliver(1), true),
            self.pod_1_sends(POD_2, deliver(2), true),
        ]
    }

    fn to(&self, node: &str) -> Expect {
        if self.overlay { encapsulate(Verdict::ToTunnel, node) } else { ROUTED }
    }

    fn local(&self) -> Vec<Sequence> {
        [
            ("the pod goes", Change::Pod2Goes, pass(Reason::ToStack)),
            ("the pod moves to another node", Change::Pod2Moves, self.to(OTHER_NODE[0])),
            ("another pod gets the address", Change::Pod2IsReplaced, deliver(3)),
            ("the sender is no longer attached", Change::Pod1Goes, drop(Reason::UnknownPod)),
            ("something else changes", Change::OtherRangesMove, deliver(2)),
        ]
        .into_iter()
        .map(|(name, change, then)| {
            let mut steps = self.established();
            steps.push(Step::Change(change));
            steps.push(self.pod_1_sends(POD_2, then, false));
            let routed = then.verdict != Verdict::Drop;
            steps.push(self.pod_1_sends(POD_2, then, routed));
            self.sequence(name, steps)
        })
        .collect()
    }

    fn remote(&self) -> Vec<Sequence> {
        let other_mode = Self { overlay: !self.overlay, family: self.family };
        [
            ("the remote pod's range moves", Change::OtherRangesMove, self.to(THIRD_NODE[0])),
            ("the mode changes", Change::ModeChanges, other_mode.to(OTHER_NODE[0])),
        ]
        .into_iter()
        .map(|(name, change, then)| {
            let before = self.to(OTHER_NODE[0]);
            let steps = vec![
                self.pod_1_sends(OTHER_POD, before, false),
                self.pod_1_sends(OTHER_POD, before, true),
                Step::Change(change),
                self.pod_1_sends(OTHER_POD, then, false),
                self.pod_1_sends(OTHER_POD, then, true),
            ];
            self.sequence(name, steps)
        })
        .collect()
    }

    /// Packets that have the ends of an established flow, and are somebody else's.
    fn forged(&self) -> Sequence {
        let mut steps = self.established();
        for (at, macs, reason) in [
            (At::Pod1, (POD_2_MAC, HOST_1_MAC), Reason::SpoofedMac),
            (At::Pod2, (POD_1_MAC, HOST_1_MAC), Reason::SpoofedMac),
            (At::Pod2, (POD_2_MAC, HOST_2_MAC), Reason::SpoofedAddress),
        ] {
            let mut frame = self.frame(macs, POD_1, POD_2, TTL);
            // A reset, which would end the flow if it were believed.
            let tcp = 14 + if self.family == 0 { 20 } else { 40 };
            frame[tcp + 13] = 0x04;
            let expect = drop(reason);
            steps.push(Step::Packet {
                hook: Hook::FromPod,
                at,
                frame,
                outer: None,
                expect,
                established: false,
            });
        }
        steps.push(self.pod_1_sends(POD_2, deliver(2), true));
        self.sequence("somebody else sends as an end of the flow", steps)
    }

    fn hops(&self) -> Sequence {
        let mut steps = self.established();
        let frame = self.frame(GATEWAY, POD_1, POD_2, 1);
        let expect = pass(Reason::HopLimit);
        steps.push(Step::Packet {
            hook: Hook::FromPod,
            at: At::Pod1,
            frame,
            outer: None,
            expect,
            established: true,
        });
        self.sequence("the end of its hops", steps)
    }

    fn fragments(&self) -> Sequence {
        let later = |expect| Step::Packet {
            hook: Hook::FromPod,
            at: At::Pod1,
            frame: later_fragment(GATEWAY, POD_1[0], POD_2[0]),
            outer: None,
            expect,
            established: false,
        };
        let mut steps = self.established();
        steps.extend([later(deliver(2)), Step::Change(Change::Pod2Goes), later(pass(Reason::ToStack))]);
        self.sequence("later fragments", steps)
    }

    fn out_of_the_tunnel(&self) -> Sequence {
        let packet = |node: &str, vni, expect, established| Step::Packet {
            hook: Hook::FromTunnel,
            at: At::Tunnel,
            frame: self.frame(WIRE, OTHER_POD, POD_1, TTL),
            outer: Some(TunnelKey { source: addr(node), vni }),
            expect,
            established,
        };
        let mismatch = drop(Reason::TunnelSourceMismatch);
        let steps = vec![
            packet(OTHER_NODE[0], VNI, deliver(1), false),
            packet(OTHER_NODE[0], VNI, deliver(1), true),
            packet(THIRD_NODE[0], VNI, mismatch, false),
            packet(OUTSIDE[0], VNI, drop(Reason::UnknownTunnelPeer), false),
            packet(OTHER_NODE[0], VNI + 1, drop(Reason::WrongTunnelId), true),
            packet(OTHER_NODE[0], VNI, deliver(1), true),
            Step::Change(Change::OtherRangesMove),
            packet(OTHER_NODE[0], VNI, mismatch, false),
            packet(THIRD_NODE[0], VNI, deliver(1), false),
            packet(THIRD_NODE[0], VNI, deliver(1), true),
            packet(OTHER_NODE[0], VNI, mismatch, false),
            Step::Change(Change::Pod1Goes),
            packet(THIRD_NODE[0], VNI, mismatch, false),
            packet(OTHER_NODE[0], VNI, pass(Reason::ToStack), false),
        ];
        self.sequence("out of the tunnel", steps)
    }

    fn off_the_wire(&self) -> Sequence {
        let packet = |expect, established| Step::Packet {
            hook: Hook::FromUplink,
            at: At::Uplink,
            frame: self.frame(WIRE, OTHER_POD, POD_2, TTL),
            outer: None,
            expect,
            established,
        };
        let steps = vec![
            packet(deliver(2), false),
            packet(deliver(2), true),
            Step::Change(Change::Pod2IsReplaced),
            packet(deliver(3), false),
            packet(deliver(3), true),
            Step::Change(Change::Pod2Goes),
            packet(pass(Reason::ToStack), false),
        ];
        self.sequence("off the wire", steps)
    }
}
