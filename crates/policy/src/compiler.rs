//! The incremental compiler: objects in, what changes in the tables out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use podway_model::{
    ClusterNetworkPolicy, Labels, Namespace, NetworkPolicy, NodePeer, Pod,
    policy::{Direction, Namespaces},
};

use crate::{
    atoms::{AtomId, Atoms},
    classes::Classes,
    ids::Slab,
    index::Index,
    prefixes::PrefixMap,
    rules::Policy,
    sets::Sets,
    table::{Change, PolicyRef, PolicyTable, RuleId, SetId},
    world::{NamespaceState, Owner, PodState, World, own_addresses},
};

/// One object that has changed.
#[derive(Clone, Debug)]
pub enum Update {
    /// A pod as it is now.
    Pod(Pod),
    /// A pod that is gone: namespace, name.
    RemovePod(String, String),
    /// A namespace as it is now.
    Namespace(Namespace),
    /// A namespace that is gone. What is in it stays until it is removed itself.
    RemoveNamespace(String),
    /// A node as it is now.
    Node(NodePeer),
    /// A node that is gone.
    RemoveNode(String),
    /// A NetworkPolicy as it is now.
    NetworkPolicy(NetworkPolicy),
    /// A NetworkPolicy that is gone: namespace, name.
    RemoveNetworkPolicy(String, String),
    /// A cluster policy as it is now.
    ClusterPolicy(ClusterNetworkPolicy),
    /// A cluster policy that is gone: kind, name.
    RemoveClusterPolicy(&'static str, String),
}

/// How much there is of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Pods known.
    pub pods: usize,
    /// Policies known.
    pub policies: usize,
    /// Questions that rules in use ask of peers.
    pub selectors: usize,
    /// Classes of peers.
    pub classes: usize,
    /// Sets of policies.
    pub sets: usize,
    /// Rules with a number.
    pub rules: usize,
    /// Verdict entries.
    pub entries: usize,
    /// Single addresses with a class.
    pub addresses: usize,
    /// Prefixes with a class.
    pub prefixes: usize,
}

/// What has changed and is not in the tables yet.
#[derive(Debug, Default)]
pub(crate) struct Dirty {
    pub(crate) addresses: BTreeSet<IpAddr>,
    pub(crate) pods: BTreeSet<u32>,
    /// Addresses that were endpoints and have to be looked at.
    pub(crate) endpoints: BTreeSet<IpAddr>,
    /// Sets whose last endpoint may have gone with its pod.
    pub(crate) sets: BTreeSet<SetId>,
    /// How many policies have come or gone, by the namespace whose pods they may select; `None` is any namespace. With
    /// more than [`FEW`] all those pods are looked at, else the ones that were selected are in `pods`.
    policies: HashMap<Option<String>, usize>,
}

/// Policies of one namespace whose pods are worth being looked for one policy at a time.
const FEW: usize = 8;

/// Objects compiled to one [`PolicyTable`]. The order of objects does not matter: whatever it was, the tables say the
/// same, up to the numbers in them.
#[derive(Debug, Default)]
pub struct Compiler {
    node: Option<String>,
    pub(crate) world: World,
    pub(crate) policies: Slab<Policy>,
    pub(crate) cluster: BTreeMap<PolicyRef, u32>,
    /// The same, by the pods that they select, or by the namespaces when they select all pods of those.
    pub(crate) cluster_selecting: [Index; 2],
    pub(crate) atoms: Atoms,
    pub(crate) classes: Classes,
    pub(crate) sets: Sets,
    /// Which blocks hold each prefix.
    pub(crate) blocks: PrefixMap<Vec<AtomId>>,
    pub(crate) rules: Slab<()>,
    pub(crate) rule_ids: HashMap<(PolicyRef, Direction, usize), (RuleId, usize)>,
    pub(crate) table: PolicyTable,
    pub(crate) dirty: Dirty,
}

impl Compiler {
    /// An empty cluster, as a node sees it: the endpoints are the pods of that node. Only what policies for them ask
    /// makes classes.
    pub fn for_node(node: &str) -> Self {
        let mut compiler = Self { node: Some(node.to_owned()), ..Self::default() };
        // Number 0 means no rule.
        compiler.rules.insert(());
        compiler
    }

    /// An empty cluster, seen whole: every pod is an endpoint.
    pub fn for_cluster() -> Self {
        Self { node: None, ..Self::for_node("") }
    }

    /// Takes changed objects, all at once; returns what changes in the tables, in the order in which it has to be made
    /// (see [`crate::table`]).
    pub fn apply(&mut self, updates: impl IntoIterator<Item = Update>) -> Vec<Change> {
        for update in updates {
            self.store(update);
        }
        self.commit()
    }

    /// The tables as they are now.
    pub fn table(&self) -> &PolicyTable {
        &self.table
    }

    /// How much there is.
    pub fn size(&self) -> Size {
        Size {
            pods: self.world.pods.len(),
            policies: self.cluster.len()
                + self.world.namespaces.values().map(|n| n.policies.len()).sum::<usize>(),
            selectors: self.atoms.len(),
            classes: self.classes.len(),
            sets: self.sets.len(),
            rules: self.table.rules.len(),
            entries: self.table.entries(),
            addresses: self.table.addresses.len(),
            prefixes: self.table.prefixes.len(),
        }
    }

    /// All pods, in no order.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.world.pods.iter().map(|(_, state)| &state.pod)
    }

    /// A pod by name.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<&Pod> {
        self.world.pods.get(self.world.pod_id(namespace, name)?).map(|state| &state.pod)
    }

    /// The pod that has an address of its own.
    pub fn pod_at(&self, addr: IpAddr) -> Option<&Pod> {
        match self.world.owner(addr)? {
            Owner::Pod(id) => self.world.pods.get(*id).map(|state| &state.pod),
            Owner::Node(_) => None,
        }
    }

    /// The labels of a namespace.
    pub fn namespace_labels(&self, name: &str) -> Option<&Labels> {
        self.world.namespaces.get(name).map(|n| &n.labels)
    }

    /// Whether policies for a pod are judged here.
    pub(crate) fn is_endpoint(&self, pod: &Pod) -> bool {
        !own_addresses(pod).is_empty() && self.node.as_ref().is_none_or(|node| *node == pod.node)
    }

    /// Pods that a policy selects.
    pub(crate) fn subjects<'a>(&'a self, policy: &'a Policy) -> impl Iterator<Item = &'a Pod> {
        let named = match &policy.namespaces {
            Namespaces::Named(name) => Some(self.world.namespaces.get(name)),
            Namespaces::Selected(_) => None,
        };
        let chosen = move |state: &&NamespaceState| match &policy.namespaces {
            Namespaces::Named(_) => true,
            Namespaces::Selected(selector) => selector.matches(&state.labels),
        };
        let all = named.is_none().then(|| self.world.namespaces.values());
        let namespaces = named.flatten().into_iter().chain(all.into_iter().flatten()).filter(chosen);
        let ids = namespaces.flat_map(|state| state.pods.values());
        let pods = ids.filter_map(|id| self.world.pods.get(*id)).map(|state| &state.pod);
        pods.filter(|pod| !pod.host_network && policy.pods.matches(&pod.labels))
    }

    fn store(&mut self, update: Update) {
        match update {
            Update::Pod(pod) => self.store_pod(pod),
            Update::RemovePod(namespace, name) => {
                self.remove_pod(&namespace, &name);
                self.world.tidy(&namespace);
            }
            Update::Namespace(namespace) => {
                let state = self.world.namespace(&namespace.name);
                state.is_known = true;
                self.relabel_namespace(&namespace.name, namespace.labels);
            }
            Update::RemoveNamespace(name) => {
                if let Some(state) = self.world.namespaces.get_mut(&name) {
                    state.is_known = false;
                    self.relabel_namespace(&name, Namespace::new(&name, Labels::new()).labels);
                    self.world.tidy(&name);
                }
            }
            Update::Node(node) => self.store_node(node),
            Update::RemoveNode(name) => self.remove_node(&name),
            Update::NetworkPolicy(policy) => self.store_policy(Policy::network(policy)),
            Update::RemoveNetworkPolicy(namespace, name) => {
                let id = self.world.namespaces.get_mut(&namespace).and_then(|n| n.policies.remove(&name));
                self.forget_policy(id);
                self.world.tidy(&namespace);
            }
            Update::ClusterPolicy(policy) => self.store_policy(Policy::cluster(policy)),
            Update::RemoveClusterPolicy(kind, name) => {
                let reference = PolicyRef { kind, namespace: "".into(), name: name.into() };
                let id = self.cluster.remove(&reference);
                self.forget_policy(id);
            }
        }
    }

    /// The state of a namespace, which is made when it is not there: objects come in any order.
    fn namespace(&mut self, name: &str) -> &mut NamespaceState {
        if !self.world.namespaces.contains_key(name) {
            let selected = self.atoms.of_namespace_labels(&self.world.namespace(name).labels);
            self.world.namespace(name).selected = selected;
        }
        self.world.namespace(name)
    }

    fn store_pod(&mut self, pod: Pod) {
        if let Some(id) = self.world.pod_id(&pod.namespace, &pod.name) {
            if self.world.pods[id].pod == pod {
                return;
            }
            self.touch_pod(id);
            let old = std::mem::replace(&mut self.world.pods[id].pod, pod);
            for addr in own_addresses(&old) {
                self.world.release(*addr, &Owner::Pod(id));
            }
            self.claim_pod(id);
            return;
        }
        let (namespace, name) = (pod.namespace.clone(), pod.name.clone());
        let id = self.world.pods.insert(PodState { pod, set: SetId::NONE });
        self.namespace(&namespace).pods.insert(name, id);
        self.claim_pod(id);
    }

    fn claim_pod(&mut self, id: u32) {
        let addrs = own_addresses(&self.world.pods[id].pod).to_vec();
        for addr in addrs {
            self.world.claim(addr, Owner::Pod(id));
        }
        self.touch_pod(id);
    }

    /// Everything about the pod has to be looked at again.
    fn touch_pod(&mut self, id: u32) {
        let addrs = own_addresses(&self.world.pods[id].pod);
        self.dirty.addresses.extend(addrs);
        self.dirty.endpoints.extend(addrs);
        self.dirty.pods.insert(id);
    }

    fn remove_pod(&mut self, namespace: &str, name: &str) {
        let Some(id) = self.world.namespaces.get_mut(namespace).and_then(|n| n.pods.remove(name)) else {
            return;
        };
        self.touch_pod(id);
        self.dirty.pods.remove(&id);
        let Some(state) = self.world.pods.remove(id) else { return };
        for addr in own_addresses(&state.pod) {
            self.world.release(*addr, &Owner::Pod(id));
        }
        if let Some(set) = self.sets.get_mut(state.set) {
            set.users -= 1;
            self.dirty.sets.insert(state.set);
        }
    }

    fn relabel_namespace(&mut self, name: &str, labels: Labels) {
        let selected = self.atoms.of_namespace_labels(&labels);
        let state = self.world.namespace(name);
        state.selected = selected;
        if state.labels == labels {
            return;
        }
        state.labels = labels;
        let pods: Vec<u32> = state.pods.values().copied().collect();
        pods.into_iter().for_each(|id| self.touch_pod(id));
    }

    fn store_node(&mut self, node: NodePeer) {
        if self.world.nodes.get(&node.name) == Some(&node) {
            return;
        }
        self.remove_node(&node.name);
        for addr in &node.addresses {
            self.world.claim(*addr, Owner::Node(node.name.clone()));
            self.dirty.addresses.insert(*addr);
        }
        self.world.nodes.insert(node.name.clone(), node);
    }

    fn remove_node(&mut self, name: &str) {
        let Some(node) = self.world.nodes.remove(name) else { return };
        for addr in node.addresses {
            self.world.release(addr, &Owner::Node(name.to_owned()));
            self.dirty.addresses.insert(addr);
        }
    }

    fn store_policy(&mut self, policy: Policy) {
        let reference = policy.reference.clone();
        let known = match &policy.namespaces {
            Namespaces::Named(namespace) if !reference.namespace.is_empty() => {
                self.world.namespaces.get(namespace).and_then(|n| n.policies.get(&*reference.name)).copied()
            }
            _ => self.cluster.get(&reference).copied(),
        };
        if known.and_then(|id| self.policies.get(id)).is_some_and(|old| old.is_same(&policy)) {
            return;
        }
        self.forget_policy(known);
        let id = self.policies.insert(policy);
        if reference.namespace.is_empty() {
            self.cluster.insert(reference, id);
        } else {
            self.namespace(&reference.namespace).policies.insert(reference.name.to_string(), id);
        }
        self.index_policy(id, true);
        self.touch_subjects(id);
    }

    /// Enters a policy into the indexes of those that may select a pod, or takes it out.
    fn index_policy(&mut self, id: u32, is_current: bool) {
        let Some(policy) = self.policies.get(id) else { return };
        let change = if is_current { Index::insert } else { Index::remove };
        match &policy.namespaces {
            Namespaces::Named(name) => {
                if let Some(state) = self.world.namespaces.get_mut(name) {
                    change(&mut state.selecting, &policy.pods, id);
                }
            }
            Namespaces::Selected(_) if Index::has_key(&policy.pods) => {
                change(&mut self.cluster_selecting[0], &policy.pods, id);
            }
            Namespaces::Selected(namespaces) => change(&mut self.cluster_selecting[1], namespaces, id),
        }
    }

    /// The endpoints that a policy selects have to be looked at again.
    fn touch_subjects(&mut self, id: u32) {
        let Some(policy) = self.policies.get(id) else { return };
        let namespace = match &policy.namespaces {
            Namespaces::Named(name) => Some(name.clone()),
            Namespaces::Selected(_) => None,
        };
        let count = self.dirty.policies.entry(namespace).or_default();
        *count += 1;
        if *count > FEW {
            return;
        }
        let subjects = self.subjects(policy).filter(|pod| self.is_endpoint(pod));
        let ids: Vec<u32> = subjects.filter_map(|pod| self.world.pod_id(&pod.namespace, &pod.name)).collect();
        self.dirty.pods.extend(ids);
    }

    /// The endpoints of namespaces in which many policies have come or gone.
    pub(crate) fn touch_namespaces(&mut self) {
        let many = std::mem::take(&mut self.dirty.policies).into_iter().filter(|(_, count)| *count > FEW);
        for (namespace, _) in many {
            let states: Vec<&NamespaceState> = match &namespace {
                Some(name) => self.world.namespaces.get(name).into_iter().collect(),
                None => self.world.namespaces.values().collect(),
            };
            let ids = states.into_iter().flat_map(|state| state.pods.values()).copied();
            let of_endpoint = |id: &u32| self.world.pods.get(*id).is_some_and(|s| self.is_endpoint(&s.pod));
            let ids: Vec<u32> = ids.filter(of_endpoint).collect();
            self.dirty.pods.extend(ids);
        }
    }

    /// A policy that is no longer, or no longer like this. Sets that have it stay until their endpoints have left.
    fn forget_policy(&mut self, id: Option<u32>) {
        let Some(id) = id else { return };
        self.touch_subjects(id);
        self.index_policy(id, false);
        if self.policies.get(id).is_some_and(|policy| policy.sets == 0) {
            self.policies.remove(id);
        }
    }

    /// Whether the object that a policy was read from is still like this.
    pub(crate) fn is_current(&self, id: u32) -> bool {
        let Some(policy) = self.policies.get(id) else { return false };
        let PolicyRef { namespace, name, .. } = &policy.reference;
        if namespace.is_empty() {
            return self.cluster.get(&policy.reference) == Some(&id);
        }
        self.world.namespaces.get(&**namespace).and_then(|n| n.policies.get(&**name)) == Some(&id)
    }
}
