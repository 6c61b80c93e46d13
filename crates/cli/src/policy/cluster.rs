//! A cluster to judge, made of objects: pods that policies cannot tell apart are one group.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use podway_model::cluster_policy::CLUSTER_POLICY_KINDS;
use podway_model::{ClusterNetworkPolicy, Namespace, NetworkPolicy, NodePeer, Pod, Protocol, Rejection};
use podway_policy::{Compiler, Place, Reachability, Update};
use podway_workloads::expand::{MAX_ORDINALS, Workload, expand};
use serde_json::Value;

use super::source::Objects;

/// First address that is assumed for pods without one; 10.244.0.0/15 holds 131,000.
const FIRST_POD: u32 = u32::from_be_bytes([10, 244, 0, 1]);
/// Assumed for pods on their node's network when no Node is given (RFC 5737, TEST-NET-1).
const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Pods of one workload that policies cannot tell apart, or one pod that stands for itself.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) addresses: Vec<IpAddr>,
    /// Those of another pod like it; `None` when there is only one.
    pub(super) other: Option<Vec<IpAddr>>,
    /// Ports that it says it serves.
    pub(super) served: Vec<(Protocol, u16)>,
}

/// What there is to judge.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) compiler: Compiler,
    pub(super) groups: Vec<Group>,
    /// Pods of a running cluster, namespace/name, by namespace/name of their workload.
    pub(super) workloads: BTreeMap<String, Vec<String>>,
    /// What was refused or cannot be read; nothing of it counts, but pods that a refused NetworkPolicy selects are
    /// isolated.
    pub(super) problems: Vec<String>,
    pub(super) notes: Vec<String>,
}

/// Addresses that are assumed, the same for the same pod in all clusters of one run.
#[derive(Debug, Default)]
pub(super) struct Addresses(BTreeMap<String, Ipv4Addr>);

impl Addresses {
    fn of(&mut self, pod: &str) -> Ipv4Addr {
        let next = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        *self.0.entry(pod.to_owned()).or_insert_with(|| Ipv4Addr::from(FIRST_POD.saturating_add(next)))
    }
}

impl Group {
    /// The addresses by which two groups are judged, of one family; `None` when a single pod would be asked about
    /// itself, or when they have no family in common.
    pub(super) fn to(&self, target: &Group) -> Option<(IpAddr, IpAddr)> {
        let targets = if self.name == target.name { target.other.as_ref()? } else { &target.addresses };
        self.addresses.iter().find_map(|source| {
            let target = targets.iter().find(|target| target.is_ipv4() == source.is_ipv4())?;
            Some((*source, *target))
        })
    }
}

pub(super) fn is_cluster_policy(kind: &str) -> bool {
    CLUSTER_POLICY_KINDS.contains(&kind)
}

/// One pod on its way into a group.
struct Member {
    name: String,
    kind: String,
    addresses: Vec<IpAddr>,
    served: Vec<(Protocol, u16)>,
}

struct Reader<'a> {
    addresses: &'a mut Addresses,
    is_live: bool,
    rows: Rows,
    updates: Vec<Update>,
    /// By namespace/name of the workload, or of the pod that stands for itself.
    members: BTreeMap<String, Vec<Member>>,
    owned: BTreeMap<String, Vec<String>>,
    /// Pods that there were already.
    seen: BTreeSet<String>,
    has_nodes: bool,
    has_host_pods: bool,
    problems: Vec<String>,
    notes: Vec<String>,
}

/// What a row of a matrix is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// A workload, as far as policies do not tell its pods apart.
    Workloads,
    /// A pod that runs; of manifests, where none does, the same as [`Rows::Workloads`].
    Pods,
}

/// Puts objects together. Of objects of one kind and name the last one counts.
pub(super) fn read(objects: Objects, addresses: &mut Addresses, rows: Rows) -> Cluster {
    let mut reader = Reader {
        addresses,
        is_live: objects.is_live,
        rows,
        updates: Vec::new(),
        members: BTreeMap::new(),
        owned: BTreeMap::new(),
        seen: BTreeSet::new(),
        has_nodes: false,
        has_host_pods: false,
        problems: objects.problems,
        notes: objects.notes,
    };
    let mut origins = BTreeMap::new();
    let mut workloads = Vec::new();
    for (mut value, origin) in objects.objects {
        let kind = value["kind"].as_str().unwrap_or_default().to_owned();
        let namespaced = !matches!(kind.as_str(), "Namespace" | "Node") && !is_cluster_policy(&kind);
        if namespaced && value["metadata"]["namespace"].as_str().unwrap_or_default().is_empty() {
            value["metadata"]["namespace"] = "default".into();
        }
        let is_known = matches!(kind.as_str(), "Namespace" | "Node" | "Pod" | "NetworkPolicy");
        if is_known || is_cluster_policy(&kind) {
            reader.object(&kind, &value, &origin);
        } else if !reader.is_live {
            let text = |field: &str| value["metadata"][field].as_str().unwrap_or_default().to_owned();
            origins.insert(Workload { namespace: text("namespace"), name: text("name"), kind }, origin);
            workloads.push(value);
        }
    }
    reader.workloads(&workloads, &origins);
    reader.finish()
}

impl Reader<'_> {
    fn object(&mut self, kind: &str, value: &Value, origin: &str) {
        let result: Result<(), Rejection> = match kind {
            "Namespace" => Namespace::parse(value).map(|n| self.updates.push(Update::Namespace(n))),
            "Node" => NodePeer::parse(value).map(|n| {
                self.has_nodes = true;
                self.updates.push(Update::Node(n));
            }),
            "NetworkPolicy" => match NetworkPolicy::parse(value) {
                Ok(policy) => {
                    self.updates.push(Update::NetworkPolicy(policy));
                    Ok(())
                }
                Err(rejection) => {
                    let closed = NetworkPolicy::closed(value);
                    self.updates.extend(closed.map(Update::NetworkPolicy));
                    Err(rejection)
                }
            },
            "Pod" => self.pod(value, None),
            _ => ClusterNetworkPolicy::parse(value).map(|p| self.updates.push(Update::ClusterPolicy(p))),
        };
        if let Err(rejection) = result {
            self.problems.push(format!("{origin}{rejection}"));
        }
    }

    fn workloads(&mut self, values: &[Value], origins: &BTreeMap<Workload, String>) {
        let expansion = expand(values);
        let origin = |workload: &Workload| origins.get(workload).map(String::as_str).unwrap_or_default();
        let mut refused: BTreeSet<Workload> = BTreeSet::new();
        for (workload, cause) in &expansion.refused {
            let Workload { namespace, name, kind } = workload;
            self.problems.push(format!("{}{kind} {namespace}/{name}: {cause}", origin(workload)));
        }
        for (workload, pod) in &expansion.pods {
            // All pods of a workload have the same mistakes.
            if let Err(Rejection { field, cause, .. }) = self.pod(pod, Some(workload))
                && refused.insert(workload.clone())
            {
                let Workload { namespace, name, kind } = workload;
                let of = if kind == "CronJob" { "spec.jobTemplate.spec.template" } else { "spec.template" };
                let origin = origin(workload);
                self.problems.push(format!("{origin}{kind} {namespace}/{name}: {of}.{field}: {cause}"));
            }
        }
        for Workload { namespace, name, .. } in &expansion.cut {
            let note =
                format!("StatefulSet {namespace}/{name}: of its pods the first {MAX_ORDINALS} are looked at");
            self.notes.push(note);
        }
    }

    fn pod(&mut self, value: &Value, of: Option<&Workload>) -> Result<(), Rejection> {
        let mut pod = Pod::parse(value)?;
        let name = format!("{}/{}", pod.namespace, pod.name);
        if pod.finished || !self.seen.insert(name.clone()) {
            return Ok(());
        }
        if pod.addresses.is_empty() {
            if pod.host_network {
                self.has_host_pods = true;
                pod.addresses.push(NODE.into());
            } else if self.is_live {
                self.notes.push(format!("pod {name} has no address yet and is left out"));
                return Ok(());
            } else {
                pod.addresses.push(self.addresses.of(&name).into());
            }
        }
        let owner = owner(value).filter(|_| self.is_live);
        if let Some((_, owner)) = owner {
            self.owned.entry(format!("{}/{owner}", pod.namespace)).or_default().push(name.clone());
        }
        let (group, kind) = match (of, owner) {
            (Some(w), _) => (format!("{}/{}", w.namespace, w.name), w.kind.clone()),
            (None, Some((kind, owner))) if self.rows == Rows::Workloads => {
                (format!("{}/{owner}", pod.namespace), kind.to_owned())
            }
            _ => (name.clone(), "Pod".to_owned()),
        };
        let (addresses, served) = (pod.addresses.clone(), pod.served.clone());
        self.members.entry(group).or_default().push(Member { name, kind, addresses, served });
        self.updates.push(Update::Pod(pod));
        Ok(())
    }

    fn finish(mut self) -> Cluster {
        if self.has_host_pods && !self.has_nodes {
            let node = NodePeer { name: "node".into(), addresses: vec![NODE.into()], ..NodePeer::default() };
            self.updates.push(Update::Node(node));
        }
        let mut compiler = Compiler::for_cluster();
        compiler.apply(self.updates);
        let mut groups = groups(&compiler, self.members);
        groups.sort_by(|a, b| a.name.cmp(&b.name));
        if !self.addresses.0.is_empty() && compiler.size().prefixes > 0 {
            let note = "policies have ranges of addresses, and pods without an address were given one of 10.244.0.0/15";
            self.notes.push(note.into());
        }
        self.notes.extend(compiler.findings().iter().map(ToString::to_string));
        Cluster { compiler, groups, workloads: self.owned, problems: self.problems, notes: self.notes }
    }
}

/// Kind and name of the workload that a running pod is of: its controller, or the Deployment of its ReplicaSet.
fn owner(pod: &Value) -> Option<(&str, &str)> {
    let owners = pod["metadata"]["ownerReferences"].as_array()?;
    let owner = owners.iter().find(|owner| owner["controller"] == true)?;
    let (kind, name) = (owner["kind"].as_str().unwrap_or_default(), owner["name"].as_str()?);
    let hash = pod["metadata"]["labels"]["pod-template-hash"].as_str();
    let deployment = hash.and_then(|hash| name.strip_suffix(hash)?.strip_suffix('-'));
    Some(deployment.map_or((kind, name), |name| ("Deployment", name)))
}

/// Members of one workload together, as far as policies do not tell them apart.
fn groups(compiler: &Compiler, members: BTreeMap<String, Vec<Member>>) -> Vec<Group> {
    let reach = Reachability::new(compiler);
    let mut groups = Vec::new();
    for (name, members) in members {
        let kinds: BTreeSet<String> = members.iter().map(|m| m.kind.clone()).collect();
        let mut alike: Vec<(Vec<Place>, String, Vec<Member>)> = Vec::new();
        for member in members {
            let places: Vec<Place> = member.addresses.iter().map(|addr| reach.place(*addr)).collect();
            let same = |(others, kind, _): &&mut (Vec<Place>, String, Vec<Member>)| {
                *kind == member.kind
                    && others.len() == places.len()
                    && others.iter().zip(&places).all(|(a, b)| a.is_like(b))
            };
            match alike.iter_mut().find(same) {
                Some((.., list)) => list.push(member),
                None => alike.push((places, member.kind.clone(), vec![member])),
            }
        }
        for kind in &kinds {
            let parts: Vec<_> = alike.iter().filter(|(_, of, _)| of == kind).collect();
            for (.., list) in &parts {
                let name = match (&parts[..], kinds.len(), list.len()) {
                    ([_], 1, _) => name.clone(),
                    ([_], ..) => format!("{name} ({kind})"),
                    (_, _, 1) => list[0].name.clone(),
                    (_, _, n) => format!("{} and {} more", list[0].name, n - 1),
                };
                let other = list.get(1).filter(|other| other.addresses != list[0].addresses);
                groups.push(Group {
                    name,
                    addresses: list[0].addresses.clone(),
                    other: other.map(|other| other.addresses.clone()),
                    served: list[0].served.clone(),
                });
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cluster(values: Vec<Value>) -> Cluster {
        let objects = values.into_iter().map(|value| (value, "f: ".to_owned())).collect();
        read(Objects { objects, ..Objects::default() }, &mut Addresses::default(), Rows::Workloads)
    }

    fn names(cluster: &Cluster) -> Vec<&str> {
        cluster.groups.iter().map(|g| g.name.as_str()).collect()
    }

    fn workload(kind: &str, replicas: u64) -> Value {
        json!({"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": "web"}, "spec": {"replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}}, "template": {"metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "ports": [{"containerPort": 80}]}]}}}})
    }

    #[test]
    fn pods_that_policies_tell_apart_are_groups_of_their_own() {
        let policy = json!({"kind": "NetworkPolicy", "metadata": {"name": "p"}, "spec": {
            "podSelector": {"matchLabels": {"statefulset.kubernetes.io/pod-name": "web-0"}}}});
        let sets = || vec![workload("StatefulSet", 3), workload("Deployment", 1)];
        let plain = cluster(sets());
        assert_eq!(names(&plain), ["default/web (Deployment)", "default/web (StatefulSet)"]);
        assert!(plain.groups[0].other.is_none() && plain.groups[1].other.is_some());
        let mut policed = sets();
        policed.push(policy);
        let policed = cluster(policed);
        assert_eq!(
            names(&policed),
            ["default/web (Deployment)", "default/web-0", "default/web-1 and 1 more"]
        );
        let [_, first, rest] = &policed.groups[..] else { panic!("{:?}", policed.groups) };
        let judge = |(a, b): (IpAddr, IpAddr)| policed.compiler.table().judge(a, b, 6, 80).allow();
        assert!(!judge(rest.to(first).unwrap()) && judge(first.to(rest).unwrap()));
        assert!(first.to(first).is_none());
    }

    #[test]
    fn running_pods_are_found_by_their_workload() {
        for (labels, owners, expected) in [
            (
                json!({"pod-template-hash": "5f"}),
                json!([{"controller": true, "kind": "ReplicaSet", "name": "web-5f"}]),
                Some(("Deployment", "web")),
            ),
            (
                json!({}),
                json!([{"controller": true, "kind": "StatefulSet", "name": "db"}]),
                Some(("StatefulSet", "db")),
            ),
            (json!({}), json!([{"controller": false, "name": "db"}]), None),
            (json!({}), json!(null), None),
        ] {
            let pod = json!({"metadata": {"labels": labels, "ownerReferences": owners}});
            assert_eq!(owner(&pod), expected, "{pod}");
        }
    }

    #[test]
    fn running_pods_are_rows_by_workload_or_one_by_one() {
        let pod = |name: &str, last: u8| {
            let owner = json!([{"controller": true, "kind": "ReplicaSet", "name": "web-5f"}]);
            let value = json!({"kind": "Pod", "metadata": {"name": name, "ownerReferences": owner,
                "labels": {"pod-template-hash": "5f"}}, "status": {"podIP": format!("10.0.0.{last}")}});
            (value, String::new())
        };
        for (rows, expected) in [
            (Rows::Workloads, vec!["default/web"]),
            (Rows::Pods, vec!["default/web-5f-a", "default/web-5f-b"]),
        ] {
            let objects = vec![pod("web-5f-a", 1), pod("web-5f-b", 2)];
            let objects = Objects { objects, is_live: true, ..Objects::default() };
            let cluster = read(objects, &mut Addresses::default(), rows);
            assert_eq!(names(&cluster), expected);
            assert_eq!(cluster.workloads["default/web"], ["default/web-5f-a", "default/web-5f-b"]);
        }
    }

    #[test]
    fn a_malformed_workload_is_named_once() {
        let mut bad = workload("Deployment", 3);
        bad["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = 70_000.into();
        let cluster = cluster(vec![bad]);
        let [problem] = &cluster.problems[..] else { panic!("{:?}", cluster.problems) };
        let start = "f: Deployment default/web: spec.template.spec.containers[0].ports[0].containerPort: ";
        assert!(problem.starts_with(start), "{problem}");
    }

    #[test]
    fn a_refused_policy_is_named_and_isolates() {
        let pod = |name: &str| json!({"kind": "Pod", "metadata": {"name": name}, "spec": {"containers": []}});
        let policy = json!({"kind": "NetworkPolicy", "metadata": {"name": "p"},
            "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 0}]}]}});
        let cluster = cluster(vec![pod("a"), pod("b"), policy]);
        assert_eq!(cluster.problems.len(), 1);
        assert!(
            cluster.problems[0].starts_with("f: NetworkPolicy default/p: spec.ingress[0].ports[0].port: ")
        );
        let [a, b] = &cluster.groups[..] else { panic!("{:?}", cluster.groups) };
        let (source, target) = a.to(b).unwrap();
        assert!(!cluster.compiler.table().judge(source, target, 6, 80).allow());
    }
}
