//! Clusters that change step by step, with probes after each: judged by the tables and, apart from that, explained.

use std::{collections::BTreeSet, net::IpAddr};

use anyhow::{Context as _, Result, bail};
use podway_model::{Namespace, NodePeer, Pod, Protocol};
use podway_policy::{Compiler, Reachability, Update, explain};
use serde_json::{Value, json};

use super::parse;
use crate::{Tally, data};

struct Cluster {
    compiler: Compiler,
    /// Pods as the case writes them.
    pods: Vec<Value>,
}

/// Runs one file.
pub(super) fn run(case: &Value, tally: &mut Tally) -> Result<()> {
    let id = data::text(case, "id")?;
    let mut cluster = Cluster { compiler: Compiler::for_cluster(), pods: Vec::new() };
    for (name, namespace) in case["namespaces"].as_object().into_iter().flatten() {
        cluster.apply(Update::Namespace(namespace_of(name, &namespace["labels"])?));
    }
    for pod in data::list(case, "pods")? {
        cluster.create_pod(pod)?;
    }
    for policy in data::list(case, "policies")? {
        cluster.policy(policy)?;
    }
    for (i, step) in data::list(case, "steps")?.iter().enumerate() {
        for action in data::list(step, "actions")? {
            cluster.act(action).with_context(|| format!("step {i}: {action}"))?;
        }
        for probe in data::list(step, "probes")? {
            let name = format!("{id} step {i} {}/{}", probe["port"], probe["protocol"]);
            if probe.get("expect").is_some() {
                cluster.probe_one(&name, probe, tally)?;
            } else {
                cluster.probe_matrix(&name, probe, tally)?;
            }
        }
    }
    Ok(())
}

fn namespace_of(name: &str, labels: &Value) -> Result<Namespace> {
    Ok(Namespace::parse(&json!({"metadata": {"name": name, "labels": labels}}))?)
}

fn name_of(pod: &Value) -> String {
    format!("{}/{}", data::text_or_empty(pod, "namespace"), data::text_or_empty(pod, "name"))
}

fn protocol_of(probe: &Value) -> Result<Protocol> {
    Protocol::from_name(data::text(probe, "protocol")?).context("an unknown protocol")
}

impl Cluster {
    fn apply(&mut self, update: Update) {
        self.compiler.apply([update]);
    }

    fn policy(&mut self, policy: &Value) -> Result<()> {
        self.apply(parse(policy)?);
        Ok(())
    }

    fn create_pod(&mut self, pod: &Value) -> Result<()> {
        let mut pod = pod.clone();
        if pod.get("ports").is_none() {
            // "Same ports as other pods."
            pod["ports"] = self.pods.first().map_or(Value::Null, |other| other["ports"].clone());
        }
        self.pods.retain(|known| name_of(known) != name_of(&pod));
        self.pods.push(pod.clone());
        self.set_pod(&pod)
    }

    fn set_pod(&mut self, pod: &Value) -> Result<()> {
        let mut ports = data::list(pod, "ports")?.to_vec();
        for port in &mut ports {
            port["containerPort"] = port["port"].take();
        }
        let ip = data::text(pod, "ip")?;
        if data::flag(pod, "hostNetwork") {
            let node = json!({"metadata": {"name": format!("node-of-{ip}"), "labels": pod["nodeLabels"]},
                "status": {"addresses": [{"type": "InternalIP", "address": ip}]}});
            self.apply(Update::Node(NodePeer::parse(&node)?));
        }
        let parsed = Pod::parse(&json!({
            "metadata": {"namespace": pod["namespace"], "name": pod["name"], "labels": pod["labels"]},
            "spec": {"hostNetwork": data::flag(pod, "hostNetwork"), "containers": [{"ports": ports}]},
            "status": {"podIP": ip}}))?;
        self.apply(Update::Pod(parsed));
        Ok(())
    }

    fn act(&mut self, action: &Value) -> Result<()> {
        let (what, with) = action.as_object().and_then(|o| o.iter().next()).context("an empty action")?;
        let text = |field: &str| data::text(with, field).map(str::to_owned);
        match what.as_str() {
            "createPolicy" | "updatePolicy" => self.policy(with)?,
            "deletePolicy" => self.apply(Update::RemoveNetworkPolicy(text("namespace")?, text("name")?)),
            "createNamespace" | "setNamespaceLabels" => {
                let namespace = namespace_of(data::text(with, "name")?, &with["labels"])?;
                self.apply(Update::Namespace(namespace));
            }
            "deleteNamespace" => {
                let name = text("name")?;
                self.pods.retain(|pod| pod["namespace"] != name.as_str());
                self.apply(Update::RemoveNamespace(name));
            }
            "createPod" => self.create_pod(with)?,
            "setPodLabels" => {
                let name = name_of(with);
                let pod = self.pods.iter_mut().find(|pod| name_of(pod) == name).context("no such pod")?;
                pod["labels"] = with["labels"].clone();
                let pod = pod.clone();
                self.set_pod(&pod)?;
            }
            "deletePod" => {
                self.pods.retain(|pod| name_of(pod) != name_of(with));
                self.apply(Update::RemovePod(text("namespace")?, text("name")?));
            }
            other => bail!("unknown action {other}"),
        }
        Ok(())
    }

    /// The three answers, which have to be one.
    fn allows(&self, source: IpAddr, target: IpAddr, protocol: Protocol, port: u16) -> Result<bool> {
        let judged = self.compiler.table().judge(source, target, protocol.number(), port).allow();
        let explained = explain(&self.compiler, source, target, protocol.number(), port).allow;
        let mut reach = Reachability::new(&self.compiler);
        let pieces = reach.between(source, target);
        let piece =
            pieces.iter().find(|p| p.protocol == Some(protocol) && (p.first..=p.last).contains(&port));
        let reached = piece.is_some_and(podway_policy::Piece::allow);
        if judged != explained || judged != reached {
            bail!("{source} to {target}: tables {judged}, explanation {explained}, static answer {reached}");
        }
        Ok(judged)
    }

    fn probe_one(&self, name: &str, probe: &Value, tally: &mut Tally) -> Result<()> {
        let address = |field: &str| {
            let name = data::text(probe, field)?;
            let pod = self.pods.iter().find(|pod| name_of(pod) == name).context("no such pod")?;
            data::address(pod, "ip")
        };
        let port = u16::try_from(data::number(probe, "port"))?;
        let allowed = self.allows(address("from")?, address("to")?, protocol_of(probe)?, port)?;
        let name = format!("{name} {} -> {}", probe["from"], probe["to"]);
        tally.check(&name, &data::text(probe, "expect")?, &if allowed { "allowed" } else { "denied" });
        Ok(())
    }

    fn probe_matrix(&self, name: &str, probe: &Value, tally: &mut Tally) -> Result<()> {
        let (protocol, port) = (protocol_of(probe)?, u16::try_from(data::number(probe, "port"))?);
        let expected: BTreeSet<String> = data::parsed(probe, "expected_denied")?.into_iter().collect();
        let mut pairs = 0;
        for source in &self.pods {
            for target in &self.pods {
                if name_of(source) == name_of(target) {
                    continue;
                }
                pairs += 1;
                let pair = format!("{} -> {}", name_of(source), name_of(target));
                let allowed =
                    self.allows(data::address(source, "ip")?, data::address(target, "ip")?, protocol, port)?;
                tally.check(&format!("{name} {pair}"), &!expected.contains(&pair), &allowed);
            }
        }
        let counts = (data::number(probe, "pairs"), data::number(probe, "denied"));
        tally.check(&format!("{name}: count"), &counts, &(pairs, expected.len() as u64));
        Ok(())
    }
}
