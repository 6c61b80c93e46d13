//! Socket hooks: a service's address is replaced by a backend's before there is a packet, and put back where the
//! application is told whom it talks to.
//!
//! These programs run in the context of the calling process and can be preempted: they use their stack and no
//! per-CPU workspace.

use aya_ebpf::{
    EbpfContext,
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use podway_abi::{
    Addr,
    services::{Origin, SocketKey, SocketPeer, client},
};
use podway_datapath::{
    packet::proto,
    service::{self, Choice, Outcome, Query},
};

use crate::{maps::Maps, service_maps};

/// The call goes on.
const PROCEED: i32 = 1;
/// The call fails with the error that was set.
const FAIL: i32 = 0;
/// `ECONNREFUSED` of `asm-generic/errno.h`.
const ECONNREFUSED: i32 = 111;

/// `connect()` of an IPv4 socket.
#[cgroup_sock_addr(connect4)]
pub fn sock_connect4(ctx: SockAddrContext) -> i32 {
    forward::<V4>(&ctx, false)
}

/// `connect()` of an IPv6 socket, to an IPv4 address too.
#[cgroup_sock_addr(connect6)]
pub fn sock_connect6(ctx: SockAddrContext) -> i32 {
    forward::<V6>(&ctx, false)
}

/// A datagram to an IPv4 address given with the call.
#[cgroup_sock_addr(sendmsg4)]
pub fn sock_sendmsg4(ctx: SockAddrContext) -> i32 {
    forward::<V4>(&ctx, true)
}

/// A datagram to an IPv6 address given with the call.
#[cgroup_sock_addr(sendmsg6)]
pub fn sock_sendmsg6(ctx: SockAddrContext) -> i32 {
    forward::<V6>(&ctx, true)
}

/// The sender of a datagram, as an IPv4 socket is told.
#[cgroup_sock_addr(recvmsg4)]
pub fn sock_recvmsg4(ctx: SockAddrContext) -> i32 {
    reverse::<V4>(&ctx)
}

/// The sender of a datagram, as an IPv6 socket is told.
#[cgroup_sock_addr(recvmsg6)]
pub fn sock_recvmsg6(ctx: SockAddrContext) -> i32 {
    reverse::<V6>(&ctx)
}

/// `getpeername()` of an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
pub fn sock_getpeername4(ctx: SockAddrContext) -> i32 {
    reverse::<V4>(&ctx)
}

/// `getpeername()` of an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
pub fn sock_getpeername6(ctx: SockAddrContext) -> i32 {
    reverse::<V6>(&ctx)
}

/// The two families of the hook's context.
trait Family {
    fn addr(ctx: *const bpf_sock_addr) -> Addr;
    fn set_addr(ctx: *mut bpf_sock_addr, addr: &Addr);
}

struct V4;
struct V6;

impl Family for V4 {
    #[inline(always)]
    fn addr(ctx: *const bpf_sock_addr) -> Addr {
        // SAFETY: the context of a running program is valid; the kernel allows 32-bit access to this field.
        Addr::from_v4_word(unsafe { (&raw const (*ctx).user_ip4).read_volatile() })
    }

    #[inline(always)]
    fn set_addr(ctx: *mut bpf_sock_addr, addr: &Addr) {
        // SAFETY: as in `addr`.
        unsafe { (&raw mut (*ctx).user_ip4).write_volatile(addr.v4_word()) }
    }
}

impl Family for V6 {
    #[inline(always)]
    fn addr(ctx: *const bpf_sock_addr) -> Addr {
        // SAFETY: as for IPv4. Volatile, so that the words are not read as wider ones.
        unsafe {
            let words = (&raw const (*ctx).user_ip6).cast::<u32>();
            Addr::from_v6_words([
                words.read_volatile(),
                words.add(1).read_volatile(),
                words.add(2).read_volatile(),
                words.add(3).read_volatile(),
            ])
        }
    }

    #[inline(always)]
    fn set_addr(ctx: *mut bpf_sock_addr, addr: &Addr) {
        let [w0, w1, w2, w3] = addr.words;
        // SAFETY: as in `addr`.
        unsafe {
            let words = (&raw mut (*ctx).user_ip6).cast::<u32>();
            words.write_volatile(w0);
            words.add(1).write_volatile(w1);
            words.add(2).write_volatile(w2);
            words.add(3).write_volatile(w3);
        }
    }
}

#[inline(always)]
fn port(ctx: *const bpf_sock_addr) -> u16 {
    // SAFETY: as for the addresses. The port is in network byte order in the lower half.
    u16::from_be(unsafe { (&raw const (*ctx).user_port).read_volatile() } as u16)
}

#[inline(always)]
fn set_port(ctx: *mut bpf_sock_addr, port: u16) {
    // SAFETY: as for the addresses.
    unsafe { (&raw mut (*ctx).user_port).write_volatile(port.to_be() as u32) }
}

#[inline(always)]
fn socket_key<F: Family>(ctx: &SockAddrContext) -> SocketKey {
    // SAFETY: the helper takes the context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    SocketKey { cookie, addr: F::addr(ctx.sock_addr), port: port(ctx.sock_addr), pad: [0; 6] }
}

/// From a service's address to a backend's.
#[inline(always)]
fn forward<F: Family>(ctx: &SockAddrContext, datagram: bool) -> i32 {
    // SAFETY: the context of a running program is valid.
    let protocol = unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() } as u8;
    if protocol != proto::TCP && protocol != proto::UDP {
        return PROCEED;
    }
    // SAFETY: the helper takes the context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: as above.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let is_node = netns == service_maps::node_netns();
    let mut query = Query {
        client: if datagram { client::socket(cookie) } else { client::namespace(netns) },
        src: Addr::UNSPECIFIED,
        dst: F::addr(ctx.sock_addr),
        src_port: 0,
        dst_port: port(ctx.sock_addr),
        proto: protocol,
        origin: if is_node { Origin::Node } else { Origin::Pod },
        sticky: datagram,
    };
    let mut choice = Choice::NONE;
    let outcome = choose(&mut query, netns, &mut choice);
    match outcome {
        Outcome::Backend => {}
        // Programs find out their own source address by connecting a datagram socket to any port; nothing is sent.
        Outcome::Undefined if protocol == proto::UDP && !datagram => return PROCEED,
        Outcome::Undefined | Outcome::Reject => {
            service_maps::count_connection(choice.service, false);
            // SAFETY: no preconditions.
            unsafe { bpf_set_retval(-ECONNREFUSED) };
            return FAIL;
        }
        // The packet path knows the source address, and drops what is to be dropped in silence.
        Outcome::Untouched
        | Outcome::Unassigned
        | Outcome::Drop
        | Outcome::OutOfRange
        | Outcome::UnknownSource => return PROCEED,
    }
    settle(cookie, datagram, &query, &choice);
    F::set_addr(ctx.sock_addr, &choice.addr);
    set_port(ctx.sock_addr, choice.port);
    PROCEED
}

/// Remembers what the socket asked for, and the client's backend. A subprogram, so that its frame is not below the
/// choice's.
#[inline(never)]
fn settle(cookie: u64, datagram: bool, query: &Query, choice: &Choice) {
    let key = SocketKey { cookie, addr: choice.addr, port: choice.port, pad: [0; 6] };
    let peer = SocketPeer {
        addr: query.dst,
        backend: choice.backend,
        incarnation: choice.incarnation,
        port: query.dst_port,
        pad: [0; 2],
    };
    // Of the datagrams of one exchange the first is remembered and counted.
    let known = datagram && service_maps::socket_peer(&key).is_some_and(|had| same_peer(&had, &peer));
    if !known {
        service_maps::remember_socket(&key, &peer);
        service_maps::count_connection(choice.service, true);
    }
    service_maps::remember(query, choice);
}

#[inline(always)]
fn choose(query: &mut Query, netns: u64, choice: &mut Choice) -> Outcome {
    let mut frontend = podway_abi::services::Frontend::default();
    let outcome = service::find(&Maps, query, &mut frontend);
    if !matches!(outcome, Outcome::Backend) {
        return outcome;
    }
    if query.sticky && frontend.affinity_s != 0 {
        // With session affinity all sockets of a pod are one client.
        query.client = client::namespace(netns);
        query.sticky = false;
    }
    service::choose_at(&Maps, query, &frontend, choice)
}

#[inline(always)]
fn same_peer(a: &SocketPeer, b: &SocketPeer) -> bool {
    let [a0, a1, a2, a3] = a.addr.words;
    let [b0, b1, b2, b3] = b.addr.words;
    ((a0 ^ b0)
        | (a1 ^ b1)
        | (a2 ^ b2)
        | (a3 ^ b3)
        | (a.backend ^ b.backend)
        | (a.incarnation ^ b.incarnation))
        == 0
        && a.port == b.port
}

/// From a backend's address to the one that the application asked for.
#[inline(always)]
fn reverse<F: Family>(ctx: &SockAddrContext) -> i32 {
    let key = socket_key::<F>(ctx);
    if let Some(peer) = service_maps::socket_peer(&key) {
        F::set_addr(ctx.sock_addr, &peer.addr);
        set_port(ctx.sock_addr, peer.port);
    }
    PROCEED
}
