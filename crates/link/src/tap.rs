//! TAP devices: links whose other end is this process. What the kernel sends into one is read here as frames, and what
//! is written here arrives at the link.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;

use crate::{Error, Result};

/// Where TAP devices come from.
const DEVICE: &str = "/dev/net/tun";
/// Largest frame: an IP packet of full length with its Ethernet header and two VLAN tags.
pub const FRAME_MAX: usize = 65_535 + 14 + 8;

/// `struct ifreq` as `TUNSETIFF` uses it (linux/if.h): name and flags, in 40 bytes.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

mod ioctl {
    // `_IOW('T', 202, int)` by name, but the kernel reads a `struct ifreq` and writes the device's name back into it.
    nix::ioctl_readwrite_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<nix::libc::c_int>()),
        super::Request
    );
}

/// A TAP device. It goes when this value goes.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Makes a device in the calling thread's namespace. A `%d` in `name` becomes the lowest free number. Reads and
    /// writes do not wait; frames have their checksums, and none is larger than a packet on the wire.
    ///
    /// # Errors
    /// When the name is taken or no interface name, or the kernel has no TUN/TAP driver.
    pub fn create(name: &str) -> Result<Self> {
        const OPERATION: &str = "create TAP device";
        let wrap = |source: io::Error| Error::io(OPERATION, name, source);
        let mut request = Request { name: [0; libc::IFNAMSIZ], flags: 0, rest: [0; 22] };
        let Some(room) = request.name.get_mut(..name.len()).filter(|_| name.len() < libc::IFNAMSIZ) else {
            return Err(Error::invalid(OPERATION, name, "an interface name has at most 15 bytes"));
        };
        room.copy_from_slice(name.as_bytes());
        // Without IFF_VNET_HDR the kernel takes bundles apart and fills in checksums before we see a frame.
        request.flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags((OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).bits())
            .open(DEVICE)
            .map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => Error::invalid(
                    OPERATION,
                    name,
                    format!("there is no {DEVICE}; load the kernel module tun"),
                ),
                _ => Error::io(OPERATION, DEVICE, e),
            })?;
        // SAFETY: `request` is a live, exclusively borrowed value with the layout and size of `struct ifreq`, which is
        // all that TUNSETIFF reads and writes; the descriptor is open for the whole call. Unsafe, because the standard
        // library has no TAP devices and an ioctl takes a bare pointer.
        #[expect(unsafe_code, reason = "an ioctl takes a bare pointer")]
        unsafe { ioctl::set_interface(file.as_raw_fd(), &raw mut request) }
            .map_err(|e: Errno| wrap(e.into()))?;
        Ok(Self { file, name: crate::socket::string(&request.name) })
    }

    /// Name of the device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes the next frame that the kernel sent into the device. `None` when there is none at the moment.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn receive<'a>(&self, buffer: &'a mut [u8; FRAME_MAX]) -> io::Result<Option<&'a [u8]>> {
        match (&self.file).read(buffer) {
            Ok(length) => Ok(buffer.get(..length)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Makes a frame arrive at the device.
    ///
    /// # Errors
    /// When the device is gone or down, or the kernel has no memory; the frame is lost then.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
