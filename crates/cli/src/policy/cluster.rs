//! A cluster to judge: from manifests, where workloads stand for their pods, or from a lab's API.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use podway_lab::{client::Client, manifest, spec::LabName};
use podway_model::cluster_policy::CLUSTER_POLICY_KINDS;
use podway_model::{ClusterNetworkPolicy, Namespace, NetworkPolicy, NodePeer, Pod, Rejection};
use podway_policy::{Compiler, Update};
use serde_json::{Value, json};

/// First address that is assumed for pods without one; 10.244.0.0/15 holds 131,000.
const FIRST_POD: u32 = u32::from_be_bytes([10, 244, 0, 1]);
/// Assumed for pods on their node's network when no Node is given (RFC 5737, TEST-NET-1).
const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Pods that policies cannot tell apart: those of one workload, or one that stands for itself.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) address: IpAddr,
    /// Of another pod like it; `None` when there is only one.
    pub(super) other: Option<IpAddr>,
    /// Ports that it says it serves.
    pub(super) served: Vec<(podway_model::Protocol, u16)>,
}

/// What there is to judge.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) compiler: Compiler,
    pub(super) groups: Vec<Group>,
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

/// Reads manifests.
///
/// # Errors
/// A path cannot be read.
pub(super) fn from_manifests(paths: &[PathBuf], addresses: &mut Addresses) -> anyhow::Result<Cluster> {
    let loaded = manifest::load(paths)?;
    let mut reader = Reader::new(addresses);
    reader.problems.extend(loaded.problems.iter().map(ToString::to_string));
    reader.notes.extend(loaded.notes);
    for object in loaded.objects {
        reader.object(object.value, &format!("{}: ", object.origin));
    }
    Ok(reader.finish())
}

/// Reads a running lab.
///
/// # Errors
/// There is no such lab, or it does not answer.
pub(super) fn from_lab(lab: &LabName) -> anyhow::Result<Cluster> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut addresses = Addresses::default();
    let mut reader = Reader::new(&mut addresses);
    runtime.block_on(async {
        let mut client = Client::of_lab(lab)?;
        for (kind, path, optional) in [
            ("Namespace", "/api/v1/namespaces", false),
            ("Node", "/api/v1/nodes", false),
            ("Pod", "/api/v1/pods", false),
            ("NetworkPolicy", "/apis/networking.k8s.io/v1/networkpolicies", false),
            ("ClusterNetworkPolicy", "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies", true),
            ("ClusterNetworkPolicy", "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies", true),
            ("AdminNetworkPolicy", "/apis/policy.networking.k8s.io/v1alpha1/adminnetworkpolicies", true),
            (
                "BaselineAdminNetworkPolicy",
                "/apis/policy.networking.k8s.io/v1alpha1/baselineadminnetworkpolicies",
                true,
            ),
        ] {
            let answer = client.call(http::Method::GET, path, None).await?;
            // A kind that nobody has defined has no objects.
            if optional && answer.code == http::StatusCode::NOT_FOUND {
                continue;
            }
            for mut item in answer.ok()?["items"].as_array().cloned().unwrap_or_default() {
                item["kind"] = kind.into();
                reader.object(item, "");
            }
        }
        anyhow::Ok(())
    })?;
    Ok(reader.finish())
}

struct Reader<'a> {
    addresses: &'a mut Addresses,
    updates: Vec<Update>,
    groups: Vec<Group>,
    /// Objects that there were already: the last one counts.
    seen: BTreeSet<(String, String)>,
    has_nodes: bool,
    has_host_pods: bool,
    problems: Vec<String>,
    notes: Vec<String>,
}

impl<'a> Reader<'a> {
    fn new(addresses: &'a mut Addresses) -> Self {
        Self {
            addresses,
            updates: Vec::new(),
            groups: Vec::new(),
            seen: BTreeSet::new(),
            has_nodes: false,
            has_host_pods: false,
            problems: Vec::new(),
            notes: Vec::new(),
        }
    }

    fn object(&mut self, mut value: Value, origin: &str) {
        let kind = value["kind"].as_str().unwrap_or_default().to_owned();
        let namespaced = !matches!(kind.as_str(), "Namespace" | "Node") && !is_cluster_policy(&kind);
        if namespaced && value["metadata"]["namespace"].as_str().unwrap_or_default().is_empty() {
            value["metadata"]["namespace"] = "default".into();
        }
        let result: Result<(), Rejection> = match kind.as_str() {
            "Namespace" => Namespace::parse(&value).map(|n| self.updates.push(Update::Namespace(n))),
            "Node" => NodePeer::parse(&value).map(|n| {
                self.has_nodes = true;
                self.updates.push(Update::Node(n));
            }),
            "NetworkPolicy" => match NetworkPolicy::parse(&value) {
                Ok(policy) => {
                    self.updates.push(Update::NetworkPolicy(policy));
                    Ok(())
                }
                Err(rejection) => {
                    let closed = NetworkPolicy::closed(&value);
                    self.updates.extend(closed.map(Update::NetworkPolicy));
                    Err(rejection)
                }
            },
            kind if is_cluster_policy(kind) => {
                ClusterNetworkPolicy::parse(&value).map(|p| self.updates.push(Update::ClusterPolicy(p)))
            }
            "Pod" => self.pods(&value, None),
            _ => match template(&kind, &value) {
                Some((template, several)) => self.pods(&template, Some(several)),
                None => Ok(()),
            },
        };
        if let Err(rejection) = result {
            self.problems.push(format!("{origin}{rejection}"));
        }
    }

    /// `several` says of a workload whether it has more than one pod.
    fn pods(&mut self, value: &Value, several: Option<bool>) -> Result<(), Rejection> {
        let mut pod = Pod::parse(value)?;
        let name = format!("{}/{}", pod.namespace, pod.name);
        let kind = if several.is_some() { "workload" } else { "pod" };
        if pod.finished || !self.seen.insert((kind.to_owned(), name.clone())) {
            return Ok(());
        }
        if pod.addresses.is_empty() {
            if pod.host_network {
                self.has_host_pods = true;
                pod.addresses.push(NODE.into());
            } else if several.is_none() && value.get("status").is_some_and(|s| s.get("phase").is_some()) {
                self.notes.push(format!("pod {name} has no address yet and is left out"));
                return Ok(());
            } else {
                pod.addresses.push(self.addresses.of(&name).into());
            }
        }
        let address = pod.addresses[0];
        let mut other = None;
        if several == Some(true) && !pod.host_network {
            let mut twin = pod.clone();
            twin.name.push_str("-2");
            twin.addresses = vec![self.addresses.of(&format!("{name} 2")).into()];
            other = Some(twin.addresses[0]);
            self.updates.push(Update::Pod(twin));
        }
        self.groups.push(Group { name, address, other, served: pod.served.clone() });
        self.updates.push(Update::Pod(pod));
        Ok(())
    }

    fn finish(mut self) -> Cluster {
        if self.has_host_pods && !self.has_nodes {
            let node = NodePeer { name: "node".into(), addresses: vec![NODE.into()], ..NodePeer::default() };
            self.updates.push(Update::Node(node));
        }
        self.groups.sort_by(|a, b| a.name.cmp(&b.name));
        let mut compiler = Compiler::for_cluster();
        compiler.apply(self.updates);
        if !self.addresses.0.is_empty() && compiler.size().prefixes > 0 {
            let note = "policies have ranges of addresses, and pods without an address were given one of 10.244.0.0/15";
            self.notes.push(note.into());
        }
        self.notes.extend(compiler.findings().iter().map(ToString::to_string));
        Cluster { compiler, groups: self.groups, problems: self.problems, notes: self.notes }
    }
}

fn is_cluster_policy(kind: &str) -> bool {
    CLUSTER_POLICY_KINDS.contains(&kind)
}

/// The pod that a workload makes, and whether it makes more than one.
fn template(kind: &str, value: &Value) -> Option<(Value, bool)> {
    let spec = &value["spec"];
    let replicas = spec["replicas"].as_u64().unwrap_or(1);
    let (template, count) = match kind {
        "Deployment" | "ReplicaSet" | "ReplicationController" | "StatefulSet" => {
            (&spec["template"], replicas)
        }
        // One on each node.
        "DaemonSet" => (&spec["template"], 2),
        "Job" => (&spec["template"], spec["parallelism"].as_u64().unwrap_or(1)),
        "CronJob" => (&spec["jobTemplate"]["spec"]["template"], 1),
        _ => return None,
    };
    if count == 0 {
        return None;
    }
    let metadata = json!({
        "namespace": value["metadata"]["namespace"],
        "name": value["metadata"]["name"],
        "labels": template["metadata"]["labels"],
    });
    Some((json!({"metadata": metadata, "spec": template["spec"]}), count > 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_stand_for_their_pods() {
        let labels = json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": []}});
        for (kind, spec, expected) in [
            ("Deployment", json!({"replicas": 3, "template": labels}), Some(true)),
            ("Deployment", json!({"template": labels}), Some(false)),
            ("Deployment", json!({"replicas": 0, "template": labels}), None),
            ("DaemonSet", json!({"template": labels}), Some(true)),
            ("CronJob", json!({"jobTemplate": {"spec": {"template": labels}}}), Some(false)),
            ("Service", json!({}), None),
        ] {
            let value = json!({"metadata": {"name": "w", "namespace": "x"}, "spec": spec});
            let made = template(kind, &value);
            assert_eq!(made.as_ref().map(|(_, several)| *several), expected, "{kind} {spec}");
            if let Some((pod, _)) = made {
                assert_eq!(Pod::parse(&pod).unwrap().labels["app"], "web");
            }
        }
    }

    #[test]
    fn a_refused_policy_is_named_and_isolates() {
        let mut addresses = Addresses::default();
        let mut reader = Reader::new(&mut addresses);
        let pod = |name: &str| json!({"kind": "Pod", "metadata": {"name": name}, "spec": {"containers": []}});
        reader.object(pod("a"), "f: ");
        reader.object(pod("b"), "f: ");
        let policy = json!({"kind": "NetworkPolicy", "metadata": {"name": "p"},
            "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 0}]}]}});
        reader.object(policy, "f: ");
        let cluster = reader.finish();
        assert_eq!(cluster.problems.len(), 1);
        assert!(
            cluster.problems[0].starts_with("f: NetworkPolicy default/p: spec.ingress[0].ports[0].port: ")
        );
        let [a, b] = &cluster.groups[..] else { panic!("{:?}", cluster.groups) };
        assert!(!cluster.compiler.table().judge(a.address, b.address, 6, 80).allow());
    }
}
