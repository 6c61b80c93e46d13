//! A rolling restart, as `kubectl rollout restart` does it: the pod template gets a new annotation, and the
//! workload's controller replaces the pods by its own rules.

use std::time::{Duration, Instant};

use anyhow::bail;
use jiff::Timestamp;
use podway_workloads::rfc3339;
use serde_json::{Value, json};

use crate::client::Client;

/// Between two looks at a roll.
const LOOK: Duration = Duration::from_millis(100);

/// A workload that can be rolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    kind: Kind,
    name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Deployment,
    StatefulSet,
    DaemonSet,
}

impl Kind {
    fn plural(self) -> &'static str {
        match self {
            Self::Deployment => "deployments",
            Self::StatefulSet => "statefulsets",
            Self::DaemonSet => "daemonsets",
        }
    }
}

impl std::str::FromStr for Workload {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "{text:?} is not KIND/NAME with a Deployment, StatefulSet or DaemonSet, such as deploy/web"
            )
        };
        let (kind, name) = text.split_once('/').ok_or_else(bad)?;
        let kind = match kind.to_ascii_lowercase().as_str() {
            "deploy" | "deployment" | "deployments" => Kind::Deployment,
            "sts" | "statefulset" | "statefulsets" => Kind::StatefulSet,
            "ds" | "daemonset" | "daemonsets" => Kind::DaemonSet,
            _ => return Err(bad()),
        };
        let is_name =
            name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
        if name.is_empty() || !is_name {
            return Err(bad());
        }
        Ok(Self { kind, name: name.to_owned() })
    }
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {}", self.kind, self.name)
    }
}

impl Workload {
    fn path(&self, namespace: &str) -> String {
        format!("/apis/apps/v1/namespaces/{namespace}/{}/{}", self.kind.plural(), self.name)
    }
}

/// Starts the roll.
///
/// # Errors
/// When the workload is not there, or replaces its pods only when they are deleted.
pub async fn start(client: &mut Client, namespace: &str, workload: &Workload) -> anyhow::Result<()> {
    let path = workload.path(namespace);
    let object = client.read(&path).await?;
    if object["spec"]["updateStrategy"]["type"] == "OnDelete" {
        bail!("{workload} replaces a pod only when that pod is deleted (spec.updateStrategy.type: OnDelete)");
    }
    let at = rfc3339(Timestamp::now());
    let annotations = json!({"kubectl.kubernetes.io/restartedAt": at});
    client.merge(&path, &json!({"spec": {"template": {"metadata": {"annotations": annotations}}}})).await?;
    Ok(())
}

/// Waits until every pod is a new one and ready, and no old one is left. Returns what is missing when time is up.
///
/// # Errors
/// When the API server cannot be reached.
pub async fn wait(
    client: &mut Client,
    namespace: &str,
    workload: &Workload,
    limit: Duration,
    mut watch: impl FnMut(&str),
) -> anyhow::Result<Option<String>> {
    let end = Instant::now() + limit;
    loop {
        let Some(missing) = missing(workload.kind, &client.read(&workload.path(namespace)).await?) else {
            return Ok(None);
        };
        watch(&missing);
        if Instant::now() >= end {
            return Ok(Some(missing));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// As `kubectl rollout status` judges it.
fn missing(kind: Kind, object: &Value) -> Option<String> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let number = |v: &Value| v.as_u64().unwrap_or(0);
    if number(&status["observedGeneration"]) < number(&object["metadata"]["generation"]) {
        return Some("not seen by its controller yet".into());
    }
    let (want, updated, ready, all) = match kind {
        Kind::DaemonSet => {
            let want = number(&status["desiredNumberScheduled"]);
            (want, number(&status["updatedNumberScheduled"]), number(&status["numberAvailable"]), want)
        }
        Kind::StatefulSet => {
            let want = spec["replicas"].as_u64().unwrap_or(1);
            (want, number(&status["updatedReplicas"]), number(&status["readyReplicas"]), want)
        }
        Kind::Deployment => {
            let want = spec["replicas"].as_u64().unwrap_or(1);
            let (updated, all) = (number(&status["updatedReplicas"]), number(&status["replicas"]));
            (want, updated, number(&status["availableReplicas"]), all)
        }
    };
    if updated < want {
        return Some(format!("{updated} of {want} pods are new"));
    }
    if all > updated {
        return Some(format!("{} old pods are still there", all - updated));
    }
    (ready < want).then(|| format!("{ready} of {want} new pods are ready"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_named_as_kubectl_names_them() {
        for (text, want) in [
            ("deploy/web", Some("Deployment web")),
            ("Deployment/web", Some("Deployment web")),
            ("sts/db-0.x", Some("StatefulSet db-0.x")),
            ("ds/agent", Some("DaemonSet agent")),
            ("pod/web", None),
            ("web", None),
            ("deploy/", None),
            ("deploy/../x", None),
        ] {
            assert_eq!(text.parse::<Workload>().ok().map(|w| w.to_string()).as_deref(), want, "{text}");
        }
    }

    #[test]
    fn a_roll_is_over_when_only_new_pods_are_there_and_ready() {
        for (kind, object, want) in [
            (
                Kind::Deployment,
                json!({"metadata": {"generation": 2}, "status": {"observedGeneration": 1}}),
                Some("not seen"),
            ),
            (
                Kind::Deployment,
                json!({"spec": {"replicas": 3}, "status": {"updatedReplicas": 1}}),
                Some("1 of 3 pods are new"),
            ),
            (
                Kind::Deployment,
                json!({"spec": {"replicas": 2}, "status": {"updatedReplicas": 2, "replicas": 3, "availableReplicas": 3}}),
                Some("1 old pods"),
            ),
            (
                Kind::Deployment,
                json!({"spec": {"replicas": 2}, "status": {"updatedReplicas": 2, "replicas": 2, "availableReplicas": 1}}),
                Some("1 of 2 new pods"),
            ),
            (
                Kind::Deployment,
                json!({"spec": {"replicas": 2}, "status": {"updatedReplicas": 2, "replicas": 2, "availableReplicas": 2}}),
                None,
            ),
            (
                Kind::StatefulSet,
                json!({"spec": {"replicas": 2}, "status": {"updatedReplicas": 1, "readyReplicas": 2}}),
                Some("1 of 2 pods are new"),
            ),
            (
                Kind::DaemonSet,
                json!({"status": {"desiredNumberScheduled": 3, "updatedNumberScheduled": 3, "numberAvailable": 3}}),
                None,
            ),
        ] {
            let got = missing(kind, &object);
            assert_eq!(got.is_some(), want.is_some(), "{object}: {got:?}");
            assert!(got.unwrap_or_default().contains(want.unwrap_or_default()), "{object}");
        }
    }
}
