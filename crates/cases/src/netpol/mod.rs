//! Network policies: who reaches whom, and which policies an API server refuses.

mod steps;

use std::path::Path;

use anyhow::{Context as _, Result};
use podway_model::{ClusterNetworkPolicy, NetworkPolicy, Rejection};
use serde_json::{Value, json};

use crate::{Tally, data};

/// Folders with steps and probes.
const STEPPED: [&str; 3] = ["k8s-e2e-full-9pod", "cyclonus", "cnp-conformance"];

/// Runs everything in the folder.
///
/// # Errors
/// Data that cannot be read.
pub fn run(folder: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    for part in STEPPED {
        for path in data::files(&folder.join(part))? {
            let case = data::yaml(&path)?;
            steps::run(&case, &mut tally).with_context(|| path.display().to_string())?;
        }
    }
    recipes(&folder.join("recipes"), &mut tally)?;
    validation(&data::yaml(&folder.join("api-validation.yaml"))?, &mut tally)?;
    Ok(tally)
}

/// Recipes come without expectations: each has to be understood.
fn recipes(folder: &Path, tally: &mut Tally) -> Result<()> {
    for path in data::files(folder)? {
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("{} is not YAML", path.display()))?;
        for mut document in documents.into_iter().filter(|d| d["kind"] == "NetworkPolicy") {
            if document["metadata"]["namespace"].is_null() {
                document["metadata"]["namespace"] = "default".into();
            }
            let case = format!("recipes: {}", data::text_or_empty(&document["metadata"], "name"));
            tally.check(&case, &Ok(()), &parse(&document).map(|_| ()));
        }
    }
    Ok(())
}

fn validation(cases: &Value, tally: &mut Tally) -> Result<()> {
    for (i, case) in data::list(cases, "cases")?.iter().enumerate() {
        let direction = data::text(case, "direction")?;
        let policy = json!({"kind": "NetworkPolicy", "metadata": {"name": "case", "namespace": "default"},
            "spec": {"podSelector": {}, direction: [{"ports": [case["port_spec"]]}]}});
        let accepted = parse(&policy).is_ok();
        tally.check(&format!("api-validation {i}"), &(data::text(case, "expect")? == "accept"), &accepted);
    }
    Ok(())
}

/// A policy of either kind, as an update of the compiler.
fn parse(policy: &Value) -> Result<podway_policy::Update, Rejection> {
    if policy["kind"] == "NetworkPolicy" {
        return NetworkPolicy::parse(policy).map(podway_policy::Update::NetworkPolicy);
    }
    ClusterNetworkPolicy::parse(policy).map(podway_policy::Update::ClusterPolicy)
}
