//! Why a packet went where it went: one code for every end of the decision, passes included.

/// Where in the packet's path a program runs.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// Host side of a pod's veth, ingress: what the pod sends.
    FromPod = 0,
    /// Host side of a pod's veth, egress: what the host's stack sends to the pod.
    ToPod = 1,
    /// The node's underlay device, ingress.
    FromUplink = 2,
    /// The tunnel device, ingress: decapsulated packets from other nodes.
    FromTunnel = 3,
    /// The tunnel device, egress: what the host's stack and `FromPod` send to other nodes.
    ToTunnel = 4,
    /// The node's underlay device, egress: what the node's own stack sends.
    ToUplink = 5,
}

impl Hook {
    /// Every hook, in the order of its number.
    pub const ALL: [Hook; 6] =
        [Hook::FromPod, Hook::ToPod, Hook::FromUplink, Hook::FromTunnel, Hook::ToTunnel, Hook::ToUplink];

    /// The name used in metrics and program pins.
    pub const fn name(self) -> &'static str {
        match self {
            Hook::FromPod => "from_pod",
            Hook::ToPod => "to_pod",
            Hook::FromUplink => "from_uplink",
            Hook::FromTunnel => "from_tunnel",
            Hook::ToTunnel => "to_tunnel",
            Hook::ToUplink => "to_uplink",
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $name:literal, $dropped:literal;)*) => {
        /// The end of a decision. Codes are part of the kernel interface; a code is never reused.
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        pub enum Reason { $($(#[$doc])* $variant = $code,)* }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// The name used in metrics and output.
            pub const fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name,)* }
            }

            /// Whether the packet was dropped.
            pub const fn is_drop(self) -> bool {
                match self { $(Reason::$variant => $dropped,)* }
            }
        }
    };
}

reasons! {
    /// Delivered into a pod on this node without the host's stack.
    Delivered = 0, "delivered", false;
    /// Encapsulated towards another node.
    Encapsulated = 1, "encapsulated", false;
    /// Sent on the underlay device to the next hop of the node's route (direct mode).
    Routed = 2, "routed", false;
    /// Given to the node's own stack: it is for the node, or leaves the cluster through it.
    ToStack = 3, "to_stack", false;
    /// Neighbour discovery, ARP or multicast listener traffic that the node's stack answers.
    LinkControl = 4, "link_control", false;
    /// The packet's lifetime ends here: the node's stack answers with an ICMP error.
    HopLimit = 5, "hop_limit", false;

    /// A header is cut short or contradicts itself.
    Malformed = 32, "malformed", true;
    /// A v4-mapped address inside an IPv6 header (RFC 4942 section 2.2).
    MappedAddress = 33, "mapped_address", true;
    /// A pod sent from an IP address that is not its own.
    SpoofedAddress = 34, "spoofed_address", true;
    /// A pod sent from a link-layer address that is not its own.
    SpoofedMac = 35, "spoofed_mac", true;
    /// A packet on a pod's link that the datapath has no entry for: the pod is not attached.
    UnknownPod = 36, "unknown_pod", true;
    /// The agent has not configured the datapath yet.
    NotConfigured = 37, "not_configured", true;
    /// A packet on the tunnel device that did not come out of a tunnel.
    NoTunnelKey = 38, "no_tunnel_key", true;
    /// Tunnel traffic from an address that is no node of the cluster.
    UnknownTunnelPeer = 39, "unknown_tunnel_peer", true;
    /// Tunnel traffic whose inner source does not belong to the node that sent it.
    TunnelSourceMismatch = 40, "tunnel_source_mismatch", true;
    /// A packet from the network that claims an address of this node or of one of its pods.
    OwnSource = 41, "own_source", true;
    /// A pod address as source on the underlay device, though pods send through the tunnel.
    UntunneledPodSource = 42, "untunneled_pod_source", true;
    /// No node of the cluster has the destination.
    NoPeer = 43, "no_peer", true;
    /// Arrived through the tunnel for an address that is not on this node.
    NotForThisNode = 44, "not_for_this_node", true;
    /// An EtherType that the pod network does not carry.
    UnsupportedProtocol = 45, "unsupported_protocol", true;
    /// Tunnel traffic of another virtual network: its identifier is not this cluster's.
    WrongTunnelId = 47, "wrong_tunnel_id", true;
    /// An 802.1Q tag: pods have no VLANs.
    Tagged = 48, "tagged", true;
    /// Nobody serves there, or the address of a service has no such port: the sender is told.
    Rejected = 49, "service_rejected", true;
    /// Only endpoints on this node count, and there is none.
    NoLocalEndpoint = 50, "no_local_endpoint", true;
    /// The sender is outside of the service's source ranges.
    OutOfSourceRange = 51, "out_of_source_range", true;
    /// The node has no address, or no port, that could replace the source.
    NoMasqueradePort = 52, "no_masquerade_port", true;
    /// SCTP to another port than the one that was asked for: its checksum would have to be summed anew.
    SctpPort = 53, "sctp_port", true;
    /// An address in a range of cluster IPs that no service has.
    NoService = 54, "no_service", true;
    /// A rewrite of the packet failed in the kernel.
    RewriteFailed = 46, "rewrite_failed", true;
}

/// Number of counter slots per hook: the highest code plus one, rounded up to a power of two.
pub const REASON_SLOTS: u32 = 64;

/// Index into the counter table for a hook and a reason.
#[inline(always)]
pub const fn counter_index(hook: Hook, reason: Reason) -> u32 {
    hook as u32 * REASON_SLOTS + reason as u32
}

const _: () = {
    let mut i = 0;
    while i < Reason::ALL.len() {
        assert!((Reason::ALL[i] as u32) < REASON_SLOTS);
        i += 1;
    }
};
