//! The kernel programs: hooks and maps around the decisions of `podway-datapath`, with no logic of their own.
//!
//! Each program is one call of [`podway_datapath::decide`] over the maps, then the decision is applied with
//! the helpers of the kernel. Kernel floor: 6.1.
#![no_std]
#![no_main]
// Atomic addition, see `service_maps`; loads that are not aligned, see `skb`.
#![feature(asm_experimental_arch)]

mod apply;
mod encap;
mod events;
mod maps;
mod reject;
mod rewrite;
mod service_maps;
mod skb;
mod sock;

use aya_ebpf::{macros::classifier, programs::TcContext};
use podway_abi::Hook;

/// Host side of a pod's veth, ingress: what the pod sends.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    apply::run(&ctx, Hook::FromPod)
}

/// Host side of a pod's veth, egress: what the node's stack sends to the pod.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    apply::run(&ctx, Hook::ToPod)
}

/// Underlay device, ingress.
#[classifier]
pub fn from_uplink(ctx: TcContext) -> i32 {
    apply::run(&ctx, Hook::FromUplink)
}

/// Underlay device, egress: what the node sends.
#[classifier]
pub fn to_uplink(ctx: TcContext) -> i32 {
    apply::run(&ctx, Hook::ToUplink)
}

/// Tunnel device, ingress.
#[classifier]
pub fn from_tunnel(ctx: TcContext) -> i32 {
    apply::run(&ctx, Hook::FromTunnel)
}

/// Tunnel device, egress.
#[classifier]
pub fn to_tunnel(ctx: TcContext) -> i32 {
    apply::run(&ctx, Hook::ToTunnel)
}

/// Nothing here can panic, and the build refuses an object in which something can; the language wants a
/// handler all the same.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Some helpers are for GPL-compatible programs only; the sources are Apache-2.0, which the kernel does not
/// know by name, so the object is offered under both.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
