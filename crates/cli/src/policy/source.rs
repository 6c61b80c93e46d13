//! Where objects come from: files, a lab, or a cluster.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use podway_kube::{Client, Kind, objects};
use podway_lab::{manifest, spec::LabName, state::StateDir};
use serde_json::Value;

use super::cluster::is_cluster_policy;

/// A running cluster.
#[derive(Debug, Clone, Args)]
pub(crate) struct Live {
    /// The objects of this running lab, instead of manifests
    #[arg(long, value_name = "NAME")]
    pub(super) lab: Option<LabName>,
    /// The objects of the cluster that this kubeconfig leads to, instead of manifests
    #[arg(long, value_name = "FILE", conflicts_with = "lab")]
    pub(super) kubeconfig: Option<PathBuf>,
    /// The same, of this context; without --kubeconfig in $KUBECONFIG or ~/.kube/config
    #[arg(long, value_name = "NAME", conflicts_with = "lab")]
    pub(super) context: Option<String>,
}

impl Live {
    pub(super) fn is_given(&self) -> bool {
        self.lab.is_some() || self.kubeconfig.is_some() || self.context.is_some()
    }
}

/// Objects, each with where it was written: empty or `file, document 3: `.
#[derive(Debug, Clone, Default)]
pub(super) struct Objects {
    pub(super) objects: Vec<(Value, String)>,
    pub(super) problems: Vec<String>,
    pub(super) notes: Vec<String>,
    /// They are a cluster's: workloads have their pods, and pods without an address get one later.
    pub(super) is_live: bool,
}

/// Kinds that say who may talk to whom; the second is whether a cluster may lack the kind.
const KINDS: [(Kind, bool); 8] = [
    (Kind { group: "", version: "v1", kind: "Namespace", plural: "namespaces" }, false),
    (Kind::NODE, false),
    (Kind { group: "", version: "v1", kind: "Pod", plural: "pods" }, false),
    (
        Kind { group: "networking.k8s.io", version: "v1", kind: "NetworkPolicy", plural: "networkpolicies" },
        false,
    ),
    (cluster_kind("v1beta1", "ClusterNetworkPolicy", "clusternetworkpolicies"), true),
    (cluster_kind("v1alpha2", "ClusterNetworkPolicy", "clusternetworkpolicies"), true),
    (cluster_kind("v1alpha1", "AdminNetworkPolicy", "adminnetworkpolicies"), true),
    (cluster_kind("v1alpha1", "BaselineAdminNetworkPolicy", "baselineadminnetworkpolicies"), true),
];

const fn cluster_kind(version: &'static str, kind: &'static str, plural: &'static str) -> Kind {
    Kind { group: "policy.networking.k8s.io", version, kind, plural }
}

/// Reads manifests.
///
/// # Errors
/// A path cannot be read.
pub(super) fn manifests(paths: &[PathBuf]) -> anyhow::Result<Objects> {
    let loaded = manifest::load(paths)?;
    let object = |object: manifest::Object| (object.value, format!("{}: ", object.origin));
    Ok(Objects {
        objects: loaded.objects.into_iter().map(object).collect(),
        problems: loaded.problems.iter().map(ToString::to_string).collect(),
        notes: loaded.notes,
        is_live: false,
    })
}

/// Reads a running cluster.
///
/// # Errors
/// There is no such lab or context, or the API server does not answer or refuses.
pub(super) fn live(from: &Live) -> anyhow::Result<Objects> {
    if let Some(lab) = &from.lab {
        // Says what to do when there is no such lab, or nobody runs it.
        podway_lab::client::Client::of_lab(lab)?;
    }
    let path =
        from.lab.as_ref().map(|lab| StateDir::of(lab).kubeconfig()).or_else(|| from.kubeconfig.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = Client::in_context(path.as_deref(), from.context.as_deref()).await?;
        let mut found = Objects { is_live: true, ..Objects::default() };
        // An object of a kind with two versions is in the lists of both.
        let mut seen: BTreeMap<(&str, String), ()> = BTreeMap::new();
        for (kind, optional) in KINDS {
            let list = match objects::list_pages(&client, kind).await {
                Ok(list) => list,
                // A kind that nobody has defined has no objects.
                Err(error) if optional && error.code() == Some(404) => continue,
                Err(error) => {
                    return Err(error).with_context(|| format!("API server {}", client.server()));
                }
            };
            for mut object in list {
                object["kind"] = kind.kind.into();
                if !is_cluster_policy(kind.kind) || seen.insert((kind.kind, name(&object)), ()).is_none() {
                    found.objects.push((object, String::new()));
                }
            }
        }
        Ok(found)
    })
}

impl Objects {
    /// With policies and namespaces of manifests in place of those of the same name; says what else there was.
    pub(super) fn with(&self, manifests: Objects) -> Objects {
        let mut changed = self.clone();
        changed.problems.extend(manifests.problems);
        changed.notes.extend(manifests.notes);
        let mut others = 0;
        for (mut object, origin) in manifests.objects {
            let kind = object["kind"].as_str().unwrap_or_default().to_owned();
            if kind == "NetworkPolicy" && object["metadata"]["namespace"].as_str().is_none_or(str::is_empty) {
                object["metadata"]["namespace"] = "default".into();
            } else if kind != "NetworkPolicy" && kind != "Namespace" && !is_cluster_policy(&kind) {
                others += 1;
                continue;
            }
            changed.objects.retain(|(old, _)| old["kind"] != object["kind"] || name(old) != name(&object));
            changed.objects.push((object, origin));
        }
        if others > 0 {
            changed.notes.push(format!(
                "{others} objects of the manifests are neither policies nor namespaces; the cluster's stay as they are"
            ));
        }
        changed
    }
}

fn name(object: &Value) -> String {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    format!("{}/{}", text("namespace"), text("name"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn changed_policies_take_the_place_of_those_that_are_there() {
        let object = |kind: &str, namespace: &str, name: &str, spec: u8| {
            (
                json!({"kind": kind, "metadata": {"namespace": namespace, "name": name}, "spec": spec}),
                String::new(),
            )
        };
        let old = Objects {
            objects: vec![object("NetworkPolicy", "default", "a", 1), object("Pod", "default", "a", 1)],
            is_live: true,
            ..Objects::default()
        };
        let manifests = Objects {
            objects: vec![
                object("NetworkPolicy", "", "a", 2),
                object("NetworkPolicy", "x", "a", 3),
                object("Deployment", "", "a", 4),
            ],
            ..Objects::default()
        };
        let new = old.with(manifests);
        let specs: Vec<u64> = new.objects.iter().filter_map(|(o, _)| o["spec"].as_u64()).collect();
        assert_eq!(specs, [1, 2, 3]);
        assert!(new.is_live && new.notes[0].starts_with("1 objects"), "{:?}", new.notes);
    }
}
