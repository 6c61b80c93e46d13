//! Attaching the programs to devices, so that they stay when the agent goes.
//!
//! The node's own devices get pinned TCX links where the kernel has them: first in the chain, and swapped
//! without a gap. Pods' links get clsact filters on every kernel: the first TCX program on a device waits for an
//! RCU grace period while it holds the lock of the whole link layer (16 to 50 ms measured), which would be most
//! of what attaching a pod costs; a filter takes well under a millisecond and goes with its device.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use aya::{
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
    util::KernelVersion,
};
use nix::{errno::Errno, net::if_::if_indextoname};
use podway_abi::Hook;

use crate::{Datapath, Error, Result, program};

/// How programs are attached to the node's own devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMethod {
    /// TCX links, pinned (kernel 6.6 and later, commit e420bed02507).
    Tcx,
    /// Filters of a clsact qdisc, which stay by themselves.
    Clsact,
}

/// Priority and handle of our clsact filter: fixed, so that a restart replaces its predecessor's.
const FILTER_PRIORITY: u16 = 1;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x5057);

/// How often and how long to wait for a link that is going: a second in all, where some milliseconds are usual.
const LINGER_ATTEMPTS: u32 = 100;
const LINGER_WAIT: Duration = Duration::from_millis(10);

impl AttachMethod {
    /// The best one that the running kernel has.
    pub fn of_this_kernel() -> Self {
        match KernelVersion::current() {
            Ok(version) if version >= KernelVersion::new(6, 6, 0) => Self::Tcx,
            _ => Self::Clsact,
        }
    }
}

impl Datapath {
    /// Attaches to both directions of the underlay device, or replaces the programs there.
    ///
    /// # Errors
    /// [`Error::Attach`] when the device is gone or the kernel refuses.
    pub fn attach_uplink(&self, ifindex: u32) -> Result<()> {
        // Answers have to be met before the first question comes.
        self.attach(ifindex, Hook::ToUplink)?;
        self.attach(ifindex, Hook::FromUplink).map(drop)
    }

    /// Attaches to both directions of the tunnel device, or replaces the programs there.
    ///
    /// # Errors
    /// As [`Datapath::attach_uplink`].
    pub fn attach_tunnel(&self, ifindex: u32) -> Result<()> {
        self.attach(ifindex, Hook::FromTunnel)?;
        self.attach(ifindex, Hook::ToTunnel).map(drop)
    }

    /// Attaches to both directions of the host side of a pod's veth, or replaces the programs there. They go
    /// with the device. Returns the names of those that were not there, which for a pod that was attached before
    /// means that somebody removed them.
    ///
    /// # Errors
    /// As [`Datapath::attach_uplink`].
    pub fn attach_pod(&self, ifindex: u32) -> Result<Vec<&'static str>> {
        let mut made = Vec::new();
        for hook in [Hook::FromPod, Hook::ToPod] {
            if self.attach(ifindex, hook)? {
                made.push(hook.name());
            }
        }
        Ok(made)
    }

    /// Removes the programs from the underlay device.
    ///
    /// The kernel lets go of a pinned TCX link after an RCU grace period: packets of the milliseconds after this
    /// call may still meet the program.
    ///
    /// # Errors
    /// When it is attached and cannot be detached.
    pub fn detach_uplink(&self, ifindex: u32) -> Result<()> {
        self.detach(ifindex, Hook::FromUplink)?;
        self.detach(ifindex, Hook::ToUplink)
    }

    /// Removes the programs from the tunnel device, and their pins when the device is gone already.
    ///
    /// # Errors
    /// As [`Datapath::detach_uplink`].
    pub fn detach_tunnel(&self, ifindex: u32) -> Result<()> {
        self.detach(ifindex, Hook::FromTunnel)?;
        self.detach(ifindex, Hook::ToTunnel)
    }

    /// Whether everything that must outlive this process is still pinned: the maps that it writes, and the
    /// programs of the node's devices given here. Somebody may have removed pins; what is then written reaches
    /// no program.
    ///
    /// # Errors
    /// When the pinned objects cannot be read for another reason than that they are not there.
    pub fn intact(&self, uplink: u32, tunnel: Option<u32>) -> Result<bool> {
        let mut hooks = vec![(uplink, Hook::FromUplink), (uplink, Hook::ToUplink)];
        hooks.extend(tunnel.into_iter().flat_map(|t| [(t, Hook::FromTunnel), (t, Hook::ToTunnel)]));
        let pinned = hooks
            .iter()
            .filter(|(_, hook)| self.method(*hook) == AttachMethod::Tcx)
            .all(|(ifindex, hook)| self.link_pin(*ifindex, *hook).exists());
        Ok(pinned && self.maps_are_pinned()?)
    }

    /// Whether there was none to replace.
    fn attach(&self, ifindex: u32, hook: Hook) -> Result<bool> {
        let interface = interface_name(ifindex, hook)?;
        let mut ebpf = self.ebpf();
        let program = program(&mut ebpf, hook)?;
        match self.method(hook) {
            AttachMethod::Tcx => attach_tcx(program, &interface, hook, &self.link_pin(ifindex, hook)),
            AttachMethod::Clsact => attach_clsact(program, &interface, hook),
        }
    }

    fn detach(&self, ifindex: u32, hook: Hook) -> Result<()> {
        match self.method(hook) {
            AttachMethod::Tcx => remove_pin(&self.link_pin(ifindex, hook)),
            AttachMethod::Clsact => {
                // The filter goes with its device; without one there is nothing to detach.
                let Ok(interface) = interface_name(ifindex, hook) else { return Ok(()) };
                match tc::qdisc_detach_program(&interface, direction(hook), hook.name()) {
                    Ok(()) => Ok(()),
                    Err(tc::TcError::IoError(e)) if e.kind() == ErrorKind::NotFound => Ok(()),
                    Err(e) => Err(failed("detach", hook, &interface, e)),
                }
            }
        }
    }

    const fn method(&self, hook: Hook) -> AttachMethod {
        match hook {
            Hook::FromPod | Hook::ToPod => AttachMethod::Clsact,
            Hook::FromUplink | Hook::FromTunnel | Hook::ToTunnel | Hook::ToUplink => self.method,
        }
    }

    fn link_pin(&self, ifindex: u32, hook: Hook) -> PathBuf {
        self.pin_dir.join("links").join(format!("{ifindex}-{}", hook.name()))
    }
}

const fn direction(hook: Hook) -> TcAttachType {
    match hook {
        Hook::FromPod | Hook::FromUplink | Hook::FromTunnel => TcAttachType::Ingress,
        Hook::ToPod | Hook::ToTunnel | Hook::ToUplink => TcAttachType::Egress,
    }
}

/// Swaps the program into the pinned link, or makes and pins a new link.
///
/// A pin may outlive its device; the kernel then refuses the swap and the pin is made anew.
fn attach_tcx(program: &mut SchedClassifier, interface: &str, hook: Hook, pin: &Path) -> Result<bool> {
    let adopted = PinnedLink::from_pin(pin)
        .ok()
        .and_then(|old| SchedClassifierLink::try_from(FdLink::from(old)).ok())
        .and_then(|link| program.attach_to_link(link).ok());
    if let Some(id) = adopted {
        // The pin keeps the link; our own descriptor is not needed.
        program.take_link(id).map_err(|e| failed("attach", hook, interface, e))?;
        return Ok(false);
    }
    remove_pin(pin)?;
    // First in the chain: no other program may see or divert a pod's packet before it was judged.
    let mut attempts = 0;
    let id = loop {
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        match program.attach_with_options(interface, direction(hook), options) {
            Ok(id) => break id,
            // A link whose pin was just removed still holds the same program there, until a grace period is over.
            Err(ProgramError::SyscallError(e))
                if e.io_error.kind() == ErrorKind::AlreadyExists && attempts < LINGER_ATTEMPTS =>
            {
                attempts += 1;
                thread::sleep(LINGER_WAIT);
            }
            Err(e) => return Err(failed("attach", hook, interface, e)),
        }
    };
    let link = program.take_link(id).map_err(|e| failed("attach", hook, interface, e))?;
    let link = FdLink::try_from(link).map_err(|e| failed("attach", hook, interface, e))?;
    link.pin(pin).map_err(|e| failed("attach", hook, interface, e))?;
    Ok(true)
}

fn attach_clsact(program: &mut SchedClassifier, interface: &str, hook: Hook) -> Result<bool> {
    // An existing qdisc comes back as one of several errors; where there is none, attaching fails below and
    // says so.
    let _ = tc::qdisc_add_clsact(interface);
    let options = NlOptions { priority: FILTER_PRIORITY, handle: FILTER_HANDLE, classid: None };
    let made = program.attach_with_options(interface, direction(hook), TcAttachOptions::Netlink(options));
    let is_new = made.is_ok();
    let id = match made {
        Ok(id) => id,
        // A predecessor's filter is there: the program is swapped within it.
        Err(error) => {
            SchedClassifierLink::attached(interface, direction(hook), FILTER_PRIORITY, FILTER_HANDLE, None)
                .ok()
                .and_then(|old| program.attach_to_link(old).ok())
                .ok_or_else(|| failed("attach", hook, interface, error))?
        }
    };
    let link = program.take_link(id).map_err(|e| failed("attach", hook, interface, e))?;
    // Dropping the link would detach the filter, which is to stay.
    std::mem::forget(link);
    Ok(is_new)
}

/// Removes the filters of every hook from a device; those that are not there are no error.
pub(crate) fn remove_filters(ifindex: u32) {
    for hook in Hook::ALL {
        if let Ok(interface) = interface_name(ifindex, hook) {
            let _ = tc::qdisc_detach_program(&interface, direction(hook), hook.name());
        }
    }
}

fn remove_pin(pin: &Path) -> Result<()> {
    match fs::remove_file(pin) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("remove", pin, e)),
    }
}

fn interface_name(ifindex: u32, hook: Hook) -> Result<String> {
    // An index without a device may also come back as an empty name.
    match if_indextoname(ifindex) {
        Ok(name) if !name.is_empty() => Ok(name.to_string_lossy().into_owned()),
        Ok(_) => Err(failed("attach", hook, &ifindex.to_string(), std::io::Error::from(Errno::ENODEV))),
        Err(e) => Err(failed("attach", hook, &ifindex.to_string(), std::io::Error::from(e))),
    }
}

fn failed(
    operation: &'static str,
    hook: Hook,
    interface: &str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> Error {
    Error::Attach { operation, hook: hook.name(), interface: interface.to_owned(), source: Box::new(source) }
}
