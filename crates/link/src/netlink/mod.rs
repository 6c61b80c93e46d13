//! [`Netlink`]: the operations on links, their queues, addresses, routes and neighbours over one request socket.
//!
//! Requests are built from the types of `netlink-packet-route`. Answers are decoded here, only the
//! attributes that are used: a link of a kind or a kernel that the library does not know cannot spoil a list.

mod addresses;
mod held;
mod links;
mod namespaces;
mod neighbours;
mod queues;
mod routes;

use std::os::fd::{AsFd, BorrowedFd};

pub use addresses::{Address, AddressFlags};
pub use links::{Link, VethSpec, VxlanSpec};
pub use neighbours::Neighbour;
pub use queues::{FoundTbf, Tbf};
pub use routes::{Route, RouteFilter, RouteTo};

pub(crate) use addresses::decode_address;
pub(crate) use links::decode_link;
pub(crate) use routes::decode_routes;

use crate::socket::RequestSocket;
use crate::{Netns, Result};

/// One rtnetlink socket. It belongs to the network namespace it was opened in, whatever thread uses it.
#[derive(Debug)]
pub struct Netlink {
    socket: RequestSocket,
}

impl Netlink {
    /// Opens a socket in the namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket.
    pub fn open() -> Result<Self> {
        Ok(Self { socket: RequestSocket::open()? })
    }

    /// Opens a socket in another namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the kernel gives no netlink socket.
    pub fn open_in(namespace: &Netns) -> Result<Self> {
        namespace.run(Self::open)?
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
