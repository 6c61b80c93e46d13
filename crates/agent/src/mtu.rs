//! Which MTU the pods have, and whether it fits: pure.

use crate::config::NetworkMode;

/// Smallest MTU of a link that carries IPv6 (RFC 8200 section 5). The kernel switches IPv6 off below it.
pub const IPV6_MIN: u32 = 1280;
/// Smallest MTU that the pods get at all (RFC 791: what every host must take).
pub const MIN: u32 = 576;

/// The MTU decision of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodMtu {
    /// What the pods and the tunnel device get.
    pub mtu: u32,
    /// What fits.
    pub derived: u32,
    /// Size that packets between nodes may have at most: what the paths are proven for.
    pub on_the_wire: u32,
    /// Why this will hurt.
    pub warning: Option<Warning>,
}

/// Why an MTU will hurt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// Reason of the event.
    pub reason: &'static str,
    /// Text of the event.
    pub message: String,
}

/// Decides the pods' MTU from that of the device that carries the underlay.
///
/// # Errors
/// The underlay is too narrow for pods at all; the text says what it would have to be.
pub fn decide(
    uplink: &str,
    uplink_mtu: u32,
    mode: NetworkMode,
    underlay_v6: bool,
    pods_v6: bool,
    explicit: Option<u32>,
) -> Result<PodMtu, String> {
    let overhead = mode.overhead(underlay_v6);
    let derived = uplink_mtu.saturating_sub(overhead).min(65_535);
    if explicit.is_none() && derived < MIN {
        return Err(format!(
            "MTU {uplink_mtu} of {uplink} leaves {derived} bytes for pods, less than the {MIN} that any host must \
             take; raise it to {} or more",
            MIN + overhead
        ));
    }
    let mtu = explicit.unwrap_or(derived);
    let too_large = mtu > derived;
    let message = if too_large {
        Some(Warning {
            reason: "PodMTUTooLarge",
            message: format!(
                "pod MTU {mtu} is set by hand, but {uplink} has MTU {uplink_mtu} and carries pod packets of at most \
                 {derived} bytes ({overhead} bytes of encapsulation): larger ones are fragmented or lost; remove \
                 --pod-mtu, or raise the MTU of {uplink} to {}",
                mtu + overhead
            ),
        })
    } else if pods_v6 && mtu < IPV6_MIN {
        Some(Warning {
            reason: "PodMTUTooSmall",
            message: format!(
                "pod MTU {mtu} is less than the {IPV6_MIN} bytes that IPv6 needs, so pods have no IPv6; raise the MTU \
                 of {uplink} to {} or more",
                IPV6_MIN + overhead
            ),
        })
    } else {
        None
    };
    Ok(PodMtu { mtu, derived, on_the_wire: uplink_mtu.min(mtu + overhead), warning: message })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VXLAN: NetworkMode = NetworkMode::Vxlan { port: 8472, vni: 1 };

    #[test]
    fn decisions() {
        // Uplink MTU, mode, IPv6 underlay, IPv6 pods, explicit → pod MTU, proven size, reason.
        let cases = [
            (1500, VXLAN, false, true, None, 1450, 1500, None),
            (9000, VXLAN, false, true, None, 8950, 9000, None),
            (1500, VXLAN, true, true, None, 1430, 1500, None),
            (1500, NetworkMode::Direct, false, true, None, 1500, 1500, None),
            (1500, VXLAN, false, false, Some(1400), 1400, 1450, None),
            (1500, VXLAN, false, false, Some(1500), 1500, 1500, Some("PodMTUTooLarge")),
            (1500, NetworkMode::Direct, false, false, Some(9000), 9000, 1500, Some("PodMTUTooLarge")),
            (1320, VXLAN, false, true, None, 1270, 1320, Some("PodMTUTooSmall")),
            (1320, VXLAN, false, false, None, 1270, 1320, None),
        ];
        for (uplink, mode, v6, pods_v6, explicit, mtu, wire, reason) in cases {
            let got = decide("eth0", uplink, mode, v6, pods_v6, explicit).unwrap();
            assert_eq!((got.mtu, got.on_the_wire), (mtu, wire), "{uplink} {mode:?} {explicit:?}");
            assert_eq!(got.warning.map(|w| w.reason), reason, "{uplink} {mode:?} {explicit:?}");
        }
        let narrow = decide("eth0", 600, VXLAN, false, false, None).unwrap_err();
        assert!(narrow.contains("raise it to 626"), "{narrow}");
    }
}
