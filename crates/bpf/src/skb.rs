//! A socket buffer as the decisions see it, and the hook around it.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_TUNINFO_IPV6, bpf_tunnel_key},
    helpers::generated::{bpf_ktime_get_coarse_ns, bpf_skb_get_tunnel_key},
    programs::TcContext,
};
use podway_abi::{Addr, Hook, NodeConfig, node_flags};
use podway_datapath::{Bytes, Env, TunnelKey};

use crate::apply::MARK_DECIDED;

/// The packet's bytes.
pub struct SkbBytes<'a>(pub &'a TcContext);

impl Bytes for SkbBytes<'_> {
    /// From the linear part of the buffer, where headers are as a rule; otherwise with the kernel's helper.
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        let Some(start) = linear(self.0, offset + N * 4) else { return self.load_far(offset) };
        let mut words = [0; N];
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: the word is within the linear part, which the verifier checks again. Needed because the helper
            // costs more than the words.
            *word = unsafe { load_word(start.add(offset + i * 4)) };
        }
        Some(words)
    }

    #[inline(always)]
    fn load_far<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        self.0.load::<[u32; N]>(offset).ok()
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }
}

/// Start of the packet, when its first `len` bytes lie in the linear part of the buffer. Any helper that changes the
/// packet ends its validity.
#[inline(always)]
pub fn linear(ctx: &TcContext, len: usize) -> Option<*mut u8> {
    // SAFETY: the context pointer of a running program is valid. Needed: the fields are the only way to the bytes.
    let (start, end) = unsafe { ((*ctx.skb.skb).data as usize, (*ctx.skb.skb).data_end as usize) };
    if start + len <= end { Some(start as *mut u8) } else { None }
}

/// A word of a packet, which need not be aligned: the compiler would put it together from bytes.
///
/// # Safety
/// The four bytes are in the linear part of the packet.
#[inline(always)]
pub unsafe fn load_word(at: *const u8) -> u32 {
    let word: u64;
    // SAFETY: a load of bytes that the caller vouches for, with no other effect. Kernels whose machines cannot do it
    // refuse the program when it is loaded.
    unsafe {
        core::arch::asm!(
            "{word} = *(u32 *)({at} + 0)",
            word = out(reg) word,
            at = in(reg) at,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    word as u32
}

/// Stores a word of a packet in the same way.
///
/// # Safety
/// As [`load_word`]; and the packet can be written.
#[inline(always)]
pub unsafe fn store_word(at: *mut u8, word: u32) {
    // SAFETY: as in `load_word`.
    unsafe {
        core::arch::asm!(
            "*(u32 *)({at} + 0) = {word}",
            at = in(reg) at,
            word = in(reg) word as u64,
            options(nostack, preserves_flags),
        );
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

    /// To the tick: idle limits are seconds, and a flow's entry is written once per tick instead of per packet.
    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: no preconditions.
        unsafe { bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: as in `ifindex`.
        unsafe { (*self.ctx.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn tunnel_key(&self, config: &NodeConfig) -> Option<TunnelKey> {
        let mut key = TunnelKey { source: Addr::UNSPECIFIED, vni: 0 };
        if read_tunnel_key(self.ctx.skb.skb, is_underlay_v6(config), &mut key) { Some(key) } else { None }
    }

    #[inline(always)]
    fn is_decided(&self) -> bool {
        // SAFETY: as in `ifindex`.
        let skb = unsafe { &*self.ctx.skb.skb };
        // What did not come in on any device is the node's own.
        if matches!(self.hook, Hook::ToUplink) { skb.ingress_ifindex != 0 } else { skb.mark == MARK_DECIDED }
    }
}

/// A subprogram, because the kernel's form of the key is large and the stack is for the programs' other needs.
#[inline(never)]
fn read_tunnel_key(skb: *mut __sk_buff, v6: bool, out: &mut TunnelKey) -> bool {
    // SAFETY: all fields are integers or unions of integers.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    let flags = if v6 { BPF_F_TUNINFO_IPV6 as u64 } else { 0 };
    // SAFETY: `key` is as large as the size given says.
    let result = unsafe { bpf_skb_get_tunnel_key(skb, &mut key, size_of::<bpf_tunnel_key>() as u32, flags) };
    if result != 0 {
        return false;
    }
    // SAFETY: the helper has filled the field of the family that was asked for.
    out.source = unsafe {
        if v6 {
            Addr::from_v6_words(key.__bindgen_anon_1.remote_ipv6)
        } else {
            // The helper speaks host byte order for IPv4 (net/core/filter.c).
            Addr::from_v4_word(key.__bindgen_anon_1.remote_ipv4.to_be())
        }
    };
    out.vni = key.tunnel_id;
    true
}

/// Whether the tunnel's outer header is IPv6.
#[inline(always)]
pub fn is_underlay_v6(config: &NodeConfig) -> bool {
    config.flags & node_flags::UNDERLAY_V6 != 0
}
