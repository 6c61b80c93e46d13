//! A socket buffer as the decisions see it, and the hook around it.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_TUNINFO_IPV6, bpf_tunnel_key},
    helpers::{bpf_ktime_get_ns, generated::bpf_skb_get_tunnel_key},
    programs::TcContext,
};
use podway_abi::{Addr, Hook, NodeConfig, node_flags};
use podway_datapath::{Bytes, Env, Tables, TunnelKey};

use crate::{apply::MARK_DECIDED, maps::Maps};

/// The packet's bytes, read with the kernel's helper: right for paged buffers too.
pub struct SkbBytes<'a>(pub &'a TcContext);

impl Bytes for SkbBytes<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        self.0.load::<[u32; N]>(offset).ok()
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }
}

/// The hook that runs.
pub struct SkbEnv<'a> {
    /// The packet.
    pub ctx: &'a TcContext,
    /// The hook.
    pub hook: Hook,
}

impl Env for SkbEnv<'_> {
    #[inline(always)]
    fn hook(&self) -> Hook {
        self.hook
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context pointer of a running program is valid. Needed: aya has no accessor.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: no preconditions.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: as in `ifindex`.
        unsafe { (*self.ctx.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn tunnel_key(&self) -> Option<TunnelKey> {
        let v6 = is_underlay_v6(&Maps.config()?);
        // SAFETY: all fields are integers or unions of integers.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        let flags = if v6 { BPF_F_TUNINFO_IPV6 as u64 } else { 0 };
        // SAFETY: `key` is as large as the size given says.
        let result = unsafe {
            bpf_skb_get_tunnel_key(self.ctx.as_ptr().cast(), &mut key, size_of::<bpf_tunnel_key>() as u32, flags)
        };
        if result != 0 {
            return None;
        }
        // SAFETY: the helper has filled the field of the family that was asked for.
        let source = unsafe {
            if v6 {
                Addr::from_v6_words(key.__bindgen_anon_1.remote_ipv6)
            } else {
                // The helper speaks host byte order for IPv4 (net/core/filter.c).
                Addr::from_v4_word(key.__bindgen_anon_1.remote_ipv4.to_be())
            }
        };
        Some(TunnelKey { source, vni: key.tunnel_id })
    }

    #[inline(always)]
    fn is_decided(&self) -> bool {
        // SAFETY: as in `ifindex`.
        unsafe { (*self.ctx.skb.skb).mark == MARK_DECIDED }
    }
}

/// Whether the tunnel's outer header is IPv6.
#[inline(always)]
pub fn is_underlay_v6(config: &NodeConfig) -> bool {
    config.flags & node_flags::UNDERLAY_V6 != 0
}
