//! The switch for a pod's readiness: an annotation, so that it is seen by everybody and lives as long as the pod.

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::client::Client;
use crate::exec;

/// Annotation on a pod. `off` takes the pod out of its services as a failing readiness probe would.
pub const ANNOTATION: &str = "lab.podway.dev/ready";
/// What the pod's conditions and events say meanwhile.
pub(crate) const SWITCHED_OFF: &str =
    "readiness is switched off; podway lab ready POD on switches it on again";

/// Whether the pod's readiness is switched off.
pub(crate) fn is_off(pod: &Value) -> bool {
    pod["metadata"]["annotations"][ANNOTATION].as_str() == Some("off")
}

/// Switches the readiness of a pod off, or back to what its containers and probes say.
///
/// # Errors
/// When the pod is not there.
pub async fn switch(client: &mut Client, namespace: &str, pod: &str, on: bool) -> anyhow::Result<()> {
    exec::find(client, namespace, pod, None).await?;
    let value = if on { Value::Null } else { "off".into() };
    let patch = json!({"metadata": {"annotations": {ANNOTATION: value}}});
    client
        .merge(&format!("/api/v1/namespaces/{namespace}/pods/{pod}"), &patch)
        .await
        .with_context(|| format!("pod {namespace}/{pod}"))?;
    Ok(())
}
