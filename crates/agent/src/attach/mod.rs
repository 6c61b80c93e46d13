//! One pod's attachment: ADD, DEL, CHECK and GC as steps, each of which may be repeated and can be undone.
//!
//! ADD leases addresses, creates the veth pair, attaches the programs to its host side, configures both sides
//! and finally makes the pod known to the datapath. An error undoes what was done. A death at any step leaves a
//! lease, or a lease and a link, both of which carry the attachment's name; the runtime, which got no answer,
//! calls DEL (or GC), and that removes whatever is there under this name.
//!
//! DEL takes the pod out of the datapath, marks the link as gone and ends the lease; then it is answered. The
//! link itself is deleted behind the answer (the kernel takes 10 to 25 ms for it), by [`reaper`], after a
//! restart as well.
//!
//! No step waits for the API server.

pub mod reaper;
mod repair;
mod shape;
mod steps;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use podway_bpf_host::{Datapath, Endpoint};
use podway_cni::protocol::{AddRequest, CheckRequest, DelRequest, GcRequest};
use podway_cni::{AddResult, CniError, RuntimeConfig, code};
use podway_link::{FoundTbf, Netlink, Netns, ROUTE_PROTOCOL, Route, RouteFilter};
use tracing::{debug, info, warn};

use crate::adoption::{FoundLink, Plan};
use crate::clock::now_ms;
use crate::crash;
use crate::host_ports::{self, HostPorts, PortError, Reserved};
use crate::ids::AttachmentId;
use crate::leases::Leases;
use crate::leases::pool::{Lease, Owner, Usage};
use crate::network::{NodeAddresses, pod_link};
use crate::nft::NftError;
use reaper::Reaper;
pub use steps::result;

/// How long an operation waits for another one on the same attachment.
const TURN_TIMEOUT: Duration = Duration::from_secs(30);
/// Netlink sockets kept for reuse.
const SOCKETS: usize = 8;

/// A pod that is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Interface index of the host side.
    pub ifindex: u32,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// What the runtime said about it.
    pub owner: Owner,
}

/// Whether pods can be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Not yet, or not any more; the text says what is waited for and what to do.
    NotReady(String),
    /// Yes.
    Ready,
}

/// What is told to the outside of what attaching meets.
pub trait Observer: Send + Sync {
    /// No address was free.
    fn exhausted(&self, error: &crate::leases::pool::Exhausted);
}

/// The attachments of this node.
pub struct Attacher {
    datapath: Arc<Datapath>,
    leases: Mutex<Leases>,
    ports: Mutex<HostPorts>,
    attached: Mutex<HashMap<AttachmentId, Attached>>,
    /// Attachments that an operation is at work on.
    busy: Mutex<BTreeSet<AttachmentId>>,
    turn: Condvar,
    readiness: RwLock<Readiness>,
    /// MTU for new pods.
    mtu: AtomicU32,
    /// Counts MTU changes, so that an ADD that ran across one notices.
    mtu_changes: AtomicU64,
    /// Where the node's own connections to pods come from.
    node: RwLock<NodeAddresses>,
    sockets: Mutex<Vec<Netlink>>,
    reaper: Reaper,
    observer: Box<dyn Observer>,
}

impl Attacher {
    /// An attacher without attachments that is not ready; see [`Self::adopt`] and [`Self::set_ready`].
    ///
    /// # Errors
    /// The thread that deletes links cannot be started.
    pub fn new(
        datapath: Arc<Datapath>,
        leases: Leases,
        observer: Box<dyn Observer>,
    ) -> std::io::Result<Self> {
        let reaper = Reaper::start()?;
        Ok(Self {
            datapath,
            leases: Mutex::new(leases),
            ports: Mutex::new(HostPorts::default()),
            attached: Mutex::new(HashMap::new()),
            busy: Mutex::new(BTreeSet::new()),
            turn: Condvar::new(),
            readiness: RwLock::new(Readiness::NotReady("the agent is starting".into())),
            mtu: AtomicU32::new(0),
            mtu_changes: AtomicU64::new(0),
            node: RwLock::new(NodeAddresses::default()),
            sockets: Mutex::new(Vec::new()),
            reaper,
            observer,
        })
    }

    /// Takes over what is attached, removes what is half or dead, and gives every living pod the programs of
    /// this release.
    ///
    /// # Errors
    /// The kernel does not tell what is there. A single pod that cannot be taken over is logged, and stays as
    /// it was.
    pub fn adopt(&self) -> Result<AdoptReport, AttachError> {
        let mut netlink = Netlink::open()?;
        let links = found_links(&mut netlink)?;
        let endpoints = self.datapath.endpoints()?;
        let known: Vec<Lease> = lock(&self.leases).iter().cloned().collect();
        let plan = crate::adoption::plan(links, &endpoints, &known, now_ms());
        for remark in &plan.remarks {
            warn!("{remark}");
        }
        let report =
            AdoptReport { live: plan.live.len(), doomed: plan.doomed.len(), ended: plan.ended.len() };
        self.carry_out(&mut netlink, plan)?;
        Ok(report)
    }

    fn carry_out(&self, netlink: &mut Netlink, plan: Plan) -> Result<(), AttachError> {
        for ifindex in &plan.orphans {
            self.datapath.remove_endpoint(*ifindex)?;
        }
        {
            let mut leases = lock(&self.leases);
            for id in &plan.ended {
                info!(attachment = %id, "nothing is attached any more: its addresses are free after a rest");
                leases.release(id, now_ms());
            }
        }
        let limits = netlink.tbfs()?;
        for (link, mut lease) in plan.live {
            if lease.owner == Owner::default() {
                lease.owner.runtime = in_kernel(&link, &lease.addresses, &limits);
            }
            let incomplete = plan.incomplete.contains(&lease.id);
            if let Err(error) = self.take_over(netlink, &link, &lease, incomplete) {
                warn!(attachment = %lease.id, %error, "cannot take a pod over completely; it stays as it was");
            }
            if let Err(conflict) = lock(&self.leases).adopt(&lease) {
                warn!(%conflict, "the address journal is wrong about a pod");
            }
            let Lease { id, addresses, owner, .. } = lease;
            lock(&self.ports).adopt(&id, holder(&id, &owner), &owner.runtime.port_mappings, &addresses);
            lock(&self.attached).insert(id, Attached { ifindex: link.ifindex, addresses, owner });
        }
        if let Err(error) = lock(&self.ports).restore() {
            warn!(%error, "cannot put the host ports in order; trying again");
        }
        for link in plan.doomed {
            debug!(attachment = %link.id, "removing a link that was left behind");
            self.reaper.reap(link.ifindex, link.id);
        }
        Ok(())
    }

    fn take_over(
        &self,
        netlink: &mut Netlink,
        link: &FoundLink,
        lease: &Lease,
        incomplete: bool,
    ) -> Result<(), AttachError> {
        self.datapath.attach_pod(link.ifindex)?;
        if incomplete {
            steps::host_side(
                netlink,
                link.ifindex,
                &lease.id,
                &lease.addresses,
                self.node(),
                &lease.owner.runtime,
            )?;
            self.datapath.set_endpoint(&endpoint(link.ifindex, &lease.id, &lease.addresses, &lease.owner))?;
        }
        Ok(())
    }

    /// Sets where new addresses come from.
    pub fn set_ranges(&self, cidrs: &[ipnet::IpNet]) {
        lock(&self.leases).set_ranges(cidrs);
    }

    /// Sets which host ports no pod may have.
    pub fn set_reserved_ports(&self, reserved: Vec<Reserved>) {
        lock(&self.ports).set_reserved(reserved);
    }

    /// Sets the cluster's own addresses, whose connections to host ports are masqueraded.
    ///
    /// # Errors
    /// nft is missing or refuses.
    pub fn set_inside(&self, inside: &[IpNet]) -> Result<(), NftError> {
        lock(&self.ports).set_inside(inside)
    }

    /// Puts the host ports right. Returns whether that was necessary.
    ///
    /// # Errors
    /// nft is missing or refuses.
    pub fn audit_ports(&self) -> Result<bool, NftError> {
        lock(&self.ports).audit()
    }

    /// Number of host ports that lead to pods.
    #[must_use]
    pub fn host_ports(&self) -> usize {
        lock(&self.ports).len()
    }

    /// Sets the MTU of new pods.
    pub fn set_mtu(&self, mtu: u32) {
        if self.mtu.swap(mtu, Ordering::SeqCst) != mtu {
            self.mtu_changes.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Sets the node's own addresses, and gives the routes to the pods the new ones for a source. Returns how many
    /// were changed. Routes that are missing are left to [`Self::repair`], but when the addresses changed: the
    /// kernel deletes an IPv4 route along with the address that is its source.
    ///
    /// # Errors
    /// The kernel does not tell which routes there are. A single one that cannot be made is logged.
    pub fn follow_node(&self, node: NodeAddresses) -> Result<usize, AttachError> {
        let before = std::mem::replace(&mut *self.node.write().unwrap_or_else(PoisonError::into_inner), node);
        if before == node {
            return Ok(0);
        }
        let starting = before == NodeAddresses::default();
        let attached = self.alive();
        let mut netlink = self.socket()?;
        let filter = RouteFilter { protocol: Some(ROUTE_PROTOCOL), ..RouteFilter::default() };
        let present: HashMap<(u32, IpNet), Option<IpAddr>> =
            netlink.routes(filter)?.into_iter().map(|r| ((r.dev, r.dst), r.src)).collect();
        let mut written = 0;
        for (id, Attached { ifindex, addresses, .. }) in attached {
            let wrong: Vec<Route> = addresses
                .iter()
                .map(|address| steps::host_route(ifindex, *address, node))
                .filter(|r| present.get(&(ifindex, r.dst)).map_or(!starting, |src| *src != r.src))
                .collect();
            if wrong.is_empty() {
                continue;
            }
            let Ok(_turn) = self.turn(&id) else { continue };
            if lock(&self.attached).get(&id).is_none_or(|a| a.ifindex != ifindex) {
                continue;
            }
            for route in wrong {
                match netlink.replace_route(&route) {
                    Ok(()) => written += 1,
                    // The namespace of the pod went away, and the link with it.
                    Err(e) if e.is_not_found() => {}
                    Err(error) => warn!(attachment = %id, %error, "cannot route to a pod"),
                }
            }
        }
        self.give_back(netlink);
        Ok(written)
    }

    /// The attachments that have a link.
    fn alive(&self) -> Vec<(AttachmentId, Attached)> {
        let attached = lock(&self.attached);
        attached.iter().filter(|(_, a)| a.ifindex != 0).map(|(id, a)| (id.clone(), a.clone())).collect()
    }

    fn node(&self) -> NodeAddresses {
        *self.node.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says whether pods can be attached.
    pub fn set_ready(&self, readiness: Readiness) {
        *self.readiness.write().unwrap_or_else(PoisonError::into_inner) = readiness;
    }

    /// Whether pods can be attached.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        self.readiness.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Number of attached pods.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.attached).len()
    }

    /// Shows each attached pod.
    pub fn each_attached(&self, mut each: impl FnMut(&Attached)) {
        for attached in lock(&self.attached).values() {
            each(attached);
        }
    }

    /// Whether nothing is attached.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How full the podCIDRs are, and whether the journal lacks something.
    #[must_use]
    pub fn lease_usage(&self) -> (Vec<Usage>, bool) {
        let leases = lock(&self.leases);
        (leases.usage(now_ms()), leases.journal_is_behind())
    }

    /// Links that wait for their deletion.
    #[must_use]
    pub fn reaping(&self) -> usize {
        self.reaper.waiting()
    }

    /// Puts right what happened behind our back: pods whose namespace is gone leave the datapath (their lease
    /// stays until the runtime's DEL or GC), and the journal catches up after a full disk.
    ///
    /// # Errors
    /// The kernel does not tell which links there are.
    pub fn audit(&self) -> Result<usize, AttachError> {
        lock(&self.leases).retry_journal();
        let present: BTreeSet<u32> = Netlink::open()?.links()?.into_iter().map(|l| l.index).collect();
        let lost: Vec<(AttachmentId, u32)> = lock(&self.attached)
            .iter()
            .filter(|(_, a)| a.ifindex != 0 && !present.contains(&a.ifindex))
            .map(|(id, a)| (id.clone(), a.ifindex))
            .collect();
        let mut removed = 0;
        for (id, ifindex) in lost {
            let Ok(_turn) = self.turn(&id) else { continue };
            let still = lock(&self.attached).get(&id).is_some_and(|a| a.ifindex == ifindex);
            if !still {
                continue;
            }
            debug!(attachment = %id, "its link is gone");
            self.datapath.remove_endpoint(ifindex)?;
            if let Some(attached) = lock(&self.attached).get_mut(&id) {
                attached.ifindex = 0;
            }
            removed += 1;
        }
        Ok(removed)
    }

    /// Waits until the deletions that were asked for so far are done, at most for `timeout`.
    pub fn drain(&self, timeout: Duration) {
        self.reaper.drain(timeout);
    }

    /// ADD.
    ///
    /// # Errors
    /// Code 11 when it may work later; 5 when the kernel refused something; nothing of the attachment is left then.
    /// Code 4 (CNI specification: the message names the variables at fault) when the container has this interface
    /// in another namespace; that attachment goes on.
    pub fn add(&self, request: &AddRequest, netns: OwnedFd) -> Result<AddResult, CniError> {
        let id = AttachmentId::new(&request.container_id, &request.ifname);
        if let Readiness::NotReady(why) = self.readiness() {
            return Err(CniError::try_again("the node's pod network is not ready").details(why));
        }
        let _turn = self.turn(&id)?;
        crash::point("add.begin");
        let owner = Owner {
            pod: pod_name(request.args.pod_namespace(), request.args.pod_name()),
            network: Some(request.network.clone()),
            runtime: request.runtime.clone(),
        };
        let netns = Netns::from_fd(netns);
        // The runtime must not ADD twice. When it does for the same namespace, the first attachment is replaced;
        // for another one, a living pod would lose its network.
        if lock(&self.attached).contains_key(&id) {
            self.refuse_second(&id, &netns)?;
            self.detach(&id)?;
        }
        lock(&self.ports)
            .claim(&id, holder(&id, &owner), &owner.runtime.port_mappings)
            .map_err(|error| cannot_open(&error))?;
        let lease = lock(&self.leases).allocate(&id, &owner, now_ms());
        let lease = lease.map_err(|exhausted| {
            self.undo(&id);
            self.observer.exhausted(&exhausted);
            CniError::try_again("no pod address is free on this node").details(exhausted.to_string())
        })?;
        crash::point("add.leased");
        let changes = self.mtu_changes.load(Ordering::SeqCst);
        let mtu = self.mtu.load(Ordering::SeqCst);
        let done = self.build(&id, &lease, mtu, &netns).map_err(|e| cannot_attach(&e));
        let done = done.and_then(|ifindex| {
            lock(&self.ports).open(&id, &lease.addresses).map_err(|e| cannot_open(&e))?;
            Ok(ifindex)
        });
        let ifindex = match done {
            Ok(ifindex) => ifindex,
            Err(error) => {
                self.undo(&id);
                return Err(error);
            }
        };
        crash::point("add.ports");
        let attached = Attached { ifindex, addresses: lease.addresses.clone(), owner };
        lock(&self.attached).insert(id.clone(), attached);
        // The MTU changed while this link was being made, and may have been missed.
        if self.mtu_changes.load(Ordering::SeqCst) != changes {
            self.correct_mtu(ifindex, &netns);
        }
        crash::point("add.done");
        Ok(result(&id, &lease.addresses, self.mtu.load(Ordering::SeqCst), &request.netns_path))
    }

    /// Refuses an ADD for a namespace other than the one in which the attachment lives.
    fn refuse_second(&self, id: &AttachmentId, netns: &Netns) -> Result<(), CniError> {
        let fail = |error: AttachError| cannot_attach(&error);
        let mut netlink = self.socket().map_err(fail)?;
        let link = steps::find_link(&mut netlink, id).map_err(fail)?;
        let nsid = netlink.nsid(netns).map_err(|e| fail(e.into()))?;
        self.give_back(netlink);
        // A link whose other side is gone does not exist.
        match link {
            Some(link) if link.peer_netnsid.is_none() || link.peer_netnsid != nsid => Err(CniError::new(
                code::INVALID_ENVIRONMENT,
                format!(
                    "CNI_CONTAINERID {} has interface CNI_IFNAME {} in a network namespace other than that of \
                     CNI_NETNS",
                    id.container_id, id.ifname
                ),
            )
            .details("the first attachment is alive and goes on; DEL it first, or use another CNI_CONTAINERID")),
            _ => Ok(()),
        }
    }

    fn build(&self, id: &AttachmentId, lease: &Lease, mtu: u32, netns: &Netns) -> Result<u32, AttachError> {
        let mut netlink = self.socket()?;
        let link = steps::create_link(&mut netlink, &self.datapath, id, mtu, netns)?;
        crash::point("add.link");
        self.datapath.attach_pod(link.index)?;
        crash::point("add.programs");
        let runtime = &lease.owner.runtime;
        steps::host_side(&mut netlink, link.index, id, &lease.addresses, self.node(), runtime)?;
        crash::point("add.host");
        steps::pod_side(id, &link, &lease.addresses, mtu, netns, runtime)?;
        steps::wait_operational(&mut netlink, link.index)?;
        crash::point("add.pod");
        self.datapath.set_endpoint(&endpoint(link.index, id, &lease.addresses, &lease.owner))?;
        crash::point("add.endpoint");
        self.give_back(netlink);
        Ok(link.index)
    }

    /// Removes what a failed ADD left. Problems on the way are logged; the runtime's DEL tries again.
    fn undo(&self, id: &AttachmentId) {
        if let Err(error) = self.detach(id) {
            warn!(attachment = %id, %error, "cannot undo a failed ADD completely");
        }
    }

    fn correct_mtu(&self, ifindex: u32, netns: &Netns) {
        let mtu = self.mtu.load(Ordering::SeqCst);
        let corrected = self.socket().and_then(|mut netlink| {
            if let Some(link) = netlink.link_by_index(ifindex)? {
                crate::network::set_pod_mtu(&mut netlink, &link, netns, mtu)?;
            }
            self.give_back(netlink);
            Ok(())
        });
        if let Err(error) = corrected {
            warn!(ifindex, mtu, %error, "cannot set the MTU of a new pod");
        }
    }

    /// DEL.
    ///
    /// # Errors
    /// Code 5 when the kernel refused something: the runtime tries again, nothing is lost track of.
    pub fn del(&self, request: &DelRequest) -> Result<(), CniError> {
        let id = AttachmentId::new(&request.container_id, &request.ifname);
        let _turn = self.turn(&id)?;
        crash::point("del.begin");
        self.detach(&id)
    }

    /// Removes whatever is there under this name. The caller has the turn.
    fn detach(&self, id: &AttachmentId) -> Result<(), CniError> {
        let fail = |error: AttachError| {
            CniError::new(code::IO, format!("cannot detach {id}")).details(error.to_string())
        };
        let known = lock(&self.attached).get(id).map(|a| a.ifindex).filter(|i| *i != 0);
        // Before anything else can have the address.
        lock(&self.ports).close(id).map_err(|e| fail(e.into()))?;
        crash::point("del.ports");
        let mut netlink = self.socket().map_err(fail)?;
        let link = steps::find_link(&mut netlink, id).map_err(fail)?;
        let ifindexes: BTreeSet<u32> = known.into_iter().chain(link.as_ref().map(|l| l.index)).collect();
        for ifindex in &ifindexes {
            self.datapath.remove_endpoint(*ifindex).map_err(|e| fail(e.into()))?;
        }
        crash::point("del.endpoint");
        if let Some(link) = &link {
            steps::mark_gone(&mut netlink, link.index, id).map_err(fail)?;
        }
        crash::point("del.marked");
        lock(&self.attached).remove(id);
        lock(&self.leases).release(id, now_ms());
        crash::point("del.released");
        for ifindex in ifindexes {
            self.reaper.reap(ifindex, id.clone());
        }
        self.give_back(netlink);
        crash::point("del.queued");
        Ok(())
    }

    /// CHECK.
    ///
    /// # Errors
    /// Code 3 when nothing is attached under this name, otherwise 5 with what is different.
    pub fn check(&self, request: &CheckRequest, netns: OwnedFd) -> Result<(), CniError> {
        let id = AttachmentId::new(&request.container_id, &request.ifname);
        let _turn = self.turn(&id)?;
        let Some(attached) = lock(&self.attached).get(&id).cloned() else {
            return Err(CniError::new(code::UNKNOWN_CONTAINER, format!("{id} is not attached")));
        };
        let different = |what: String| CniError::new(code::IO, format!("{id}: {what}"));
        let expected: BTreeSet<IpAddr> = request.addresses.iter().map(IpNet::addr).collect();
        let leased: BTreeSet<IpAddr> = attached.addresses.iter().copied().collect();
        if !expected.is_empty() && !expected.is_superset(&leased) {
            return Err(different(format!("the runtime remembers {expected:?}, leased is {leased:?}")));
        }
        let mut netlink = self.socket().map_err(|e| different(e.to_string()))?;
        let netns = Netns::from_fd(netns);
        let wrong =
            steps::verify(&mut netlink, &id, &attached, &netns).map_err(|e| different(e.to_string()))?;
        self.give_back(netlink);
        if let Some(what) = wrong {
            return Err(different(what));
        }
        let endpoints = self.datapath.endpoints().map_err(|e| different(e.to_string()))?;
        let addresses = in_map_order(&attached.addresses);
        if !endpoints.contains(&endpoint(attached.ifindex, &id, &addresses, &attached.owner)) {
            return Err(different("the datapath does not know it; delete the pod to attach it anew".into()));
        }
        Ok(())
    }

    /// GC: detaches everything of the network that the runtime does not list.
    ///
    /// # Errors
    /// The first failure, after trying all.
    pub fn gc(&self, request: &GcRequest) -> Result<(), CniError> {
        let valid: BTreeSet<AttachmentId> =
            request.valid_attachments.iter().map(|a| AttachmentId::new(&a.container_id, &a.ifname)).collect();
        // Of what was rebuilt from the kernel alone the network is not known; a node has one as a rule.
        let of_network = |owner: &Owner| owner.network.as_ref().is_none_or(|n| *n == request.network);
        let mut all: BTreeMap<AttachmentId, bool> = BTreeMap::new();
        for (id, attached) in lock(&self.attached).iter() {
            all.insert(id.clone(), of_network(&attached.owner));
        }
        for lease in lock(&self.leases).iter() {
            all.insert(lease.id.clone(), of_network(&lease.owner));
        }
        let links = Netlink::open().and_then(|mut n| n.links()).map_err(|e| cannot_attach(&e.into()))?;
        for (id, gone) in links.iter().filter_map(pod_link) {
            all.entry(id).or_insert(!gone);
        }
        let mut first = Ok(());
        for (id, ours) in all {
            if !ours || valid.contains(&id) {
                continue;
            }
            info!(attachment = %id, "the runtime does not know this attachment any more");
            let done = self.turn(&id).and_then(|_turn| self.detach(&id));
            first = first.and(done);
        }
        first
    }

    /// STATUS.
    ///
    /// # Errors
    /// Code 50 while pods cannot be attached.
    pub fn status(&self) -> Result<(), CniError> {
        match self.readiness() {
            Readiness::Ready => Ok(()),
            Readiness::NotReady(why) => {
                Err(CniError::new(code::NOT_AVAILABLE, "the node's pod network is not ready").details(why))
            }
        }
    }

    /// Waits until no other operation is at work on the attachment.
    fn turn(&self, id: &AttachmentId) -> Result<Turn<'_>, CniError> {
        let deadline = Instant::now() + TURN_TIMEOUT;
        let mut busy = lock(&self.busy);
        while busy.contains(id) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let msg = format!("another operation on {id} is still at work");
                return Err(CniError::try_again(msg));
            }
            busy = self.turn.wait_timeout(busy, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        busy.insert(id.clone());
        Ok(Turn { attacher: self, id: id.clone() })
    }

    fn socket(&self) -> Result<Netlink, AttachError> {
        match lock(&self.sockets).pop() {
            Some(socket) => Ok(socket),
            None => Ok(Netlink::open()?),
        }
    }

    /// Keeps a socket for the next operation. One that met an error is dropped instead: an answer may still be
    /// on its way to it.
    fn give_back(&self, socket: Netlink) {
        let mut sockets = lock(&self.sockets);
        if sockets.len() < SOCKETS {
            sockets.push(socket);
        }
    }
}

impl std::fmt::Debug for Attacher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attacher").field("attached", &self.len()).finish_non_exhaustive()
    }
}

/// The right to work on one attachment; given back when dropped.
struct Turn<'a> {
    attacher: &'a Attacher,
    id: AttachmentId,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.attacher.busy).remove(&self.id);
        self.attacher.turn.notify_all();
    }
}

/// What [`Attacher::adopt`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdoptReport {
    /// Pods that are attached.
    pub live: usize,
    /// Links that were left behind.
    pub doomed: usize,
    /// Leases that ended.
    pub ended: usize,
}

/// Why the kernel's side of an attachment failed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Links, addresses, routes.
    #[error(transparent)]
    Link(#[from] podway_link::Error),
    /// Programs and tables.
    #[error(transparent)]
    Datapath(#[from] podway_bpf_host::Error),
    /// Something is there that is not ours.
    #[error("{0}")]
    InTheWay(String),
    /// A bandwidth limit.
    #[error("the bandwidth cannot be limited: {0}")]
    Bandwidth(podway_link::Error),
    /// Host ports.
    #[error("host ports: {0}")]
    Ports(#[from] NftError),
}

fn cannot_attach(error: &AttachError) -> CniError {
    let gone = matches!(error, AttachError::Link(e) if e.is_not_found());
    let hint = if gone { " (the container may be gone already)" } else { "" };
    CniError::new(code::IO, "cannot attach the pod").details(format!("{error}{hint}"))
}

/// A port that another pod has may be free soon: pods are replaced by such with the same ports.
fn cannot_open(error: &PortError) -> CniError {
    let code = match error {
        PortError::Taken { .. } => code::TRY_AGAIN,
        PortError::Reserved { .. } | PortError::NoFamily(_) => code::INVALID_CONFIG,
        PortError::Nft(_) => code::IO,
    };
    CniError::new(code, error.to_string()).details(match error {
        PortError::Taken { .. } => "delete the other pod, or use another hostPort or another node",
        PortError::Reserved { .. } => "use another hostPort, or give the agent another port",
        PortError::NoFamily(_) => "use a hostIP of the pods' family, or give the node a podCIDR of this one",
        PortError::Nft(_) => "see the message",
    })
}

/// Who has an attachment, for people.
fn holder(id: &AttachmentId, owner: &Owner) -> String {
    match &owner.pod {
        Some(pod) => format!("pod {pod}"),
        None => format!("container {id}"),
    }
}

/// What the kernel tells of the host ports and limits of a pod that nothing else remembers. A limit of what the pod sends is
/// in the pod's own namespace, and stays as it is.
fn in_kernel(link: &FoundLink, addresses: &[IpAddr], limits: &[FoundTbf]) -> RuntimeConfig {
    let mut found = RuntimeConfig::default();
    found.bandwidth.ingress = limits.iter().find(|l| l.index == link.ifindex).map(shape::limit);
    for address in addresses {
        match host_ports::found(*address) {
            Ok(mappings) => found.port_mappings.extend(mappings),
            Err(NftError::Missing(_)) => {}
            Err(error) => warn!(attachment = %link.id, %error, "cannot see which host ports a pod has"),
        }
    }
    found
}

fn endpoint(ifindex: u32, id: &AttachmentId, addresses: &[IpAddr], owner: &Owner) -> Endpoint {
    Endpoint {
        // Unique on the node for as long as the link lives, and the same after a restart.
        id: ifindex,
        ifindex,
        pod_mac: id.pod_mac(),
        host_mac: id.host_mac(),
        addresses: addresses.to_vec(),
        queued: owner.runtime.bandwidth.ingress.is_some(),
    }
}

/// The order in which the datapath lists a pod's addresses: IPv4 first.
fn in_map_order(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let mut sorted = addresses.to_vec();
    sorted.sort_unstable();
    sorted
}

fn pod_name(namespace: Option<&str>, name: Option<&str>) -> Option<String> {
    Some(format!("{}/{}", namespace?, name?))
}

/// All host-side links of ours, with the destinations of the host routes through them.
fn found_links(netlink: &mut Netlink) -> Result<Vec<FoundLink>, AttachError> {
    let filter = RouteFilter { protocol: Some(ROUTE_PROTOCOL), ..RouteFilter::default() };
    let mut routes: HashMap<u32, Vec<IpAddr>> = HashMap::new();
    for route in netlink.routes(filter)? {
        if route.dst.prefix_len() == route.dst.max_prefix_len() {
            routes.entry(route.dev).or_default().push(route.dst.addr());
        }
    }
    let links = netlink.links()?;
    Ok(links
        .iter()
        .filter_map(|link| {
            let (id, gone) = pod_link(link)?;
            Some(FoundLink {
                ifindex: link.index,
                id,
                gone,
                peer_index: link.peer_index,
                routes: routes.remove(&link.index).unwrap_or_default(),
            })
        })
        .collect())
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks protect is consistent after every statement; a panic elsewhere must not stop the node.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
