//! `podway services`: how a node serves Services, as its agent tells it.

use std::fmt::Write as _;

use anyhow::{Context as _, bail};
use podway_agent::Instance;
use podway_agent::services::query;
use podway_lab::spec::LabName;
use podway_lab::state;
use serde_json::Value;

use crate::args::{OutputFormat, Services};
use crate::output::{self, table};
use crate::{FAILED, OK};

/// Places at which a Service answers that the list shows; the rest is counted.
const PLACES: usize = 2;
/// What is wrong that the list shows; the JSON output has all.
const FINDINGS: usize = 20;

pub(crate) fn run(args: &Services) -> anyhow::Result<u8> {
    let instance = instance(args)?;
    let service = args.service.as_ref().map(|(namespace, name)| (namespace.as_str(), name.as_str()));
    let answer = query::ask(&instance.run_dir(), service).map_err(anyhow::Error::msg).with_context(|| {
        format!("services of instance {instance} (another one: --instance, or --lab and --node)")
    })?;
    match args.format.output {
        OutputFormat::Json => output::json(&answer)?,
        OutputFormat::Text if service.is_some() => output::print(&one(&answer)),
        OutputFormat::Text => output::print(&list(&answer)),
    }
    Ok(if answer["inForce"] == true { OK } else { FAILED })
}

/// The agent that is meant.
fn instance(args: &Services) -> anyhow::Result<Instance> {
    if let Some(instance) = &args.instance {
        return Ok(instance.clone());
    }
    let lab = match (&args.lab, &args.node) {
        (Some(lab), _) => Some(lab.clone()),
        (None, node) => {
            let labs = state::list()?;
            match labs.as_slice() {
                [one] => Some(one.clone()),
                [] if node.is_none() => None,
                [] => bail!("there is no lab on this machine; make one with podway lab up"),
                _ if node.is_none()
                    && Instance::parse(Instance::DEFAULT).is_ok_and(|i| i.run_dir().exists()) =>
                {
                    None
                }
                several => {
                    let names: Vec<&str> = several.iter().map(LabName::as_str).collect();
                    bail!("there are several labs ({}); name one with --lab", names.join(", "))
                }
            }
        }
    };
    let text = match lab {
        None => Instance::DEFAULT.to_owned(),
        Some(lab) => format!("{lab}/{}", args.node.as_deref().unwrap_or("node-1")),
    };
    Instance::parse(&text).map_err(Into::into)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn head(answer: &Value) -> String {
    let mut out = format!("node {}, served by {}", text(&answer["node"]), text(&answer["mode"]));
    match (answer["inForce"] == true, answer["problem"].as_str()) {
        (true, _) => {}
        (false, Some(why)) => {
            let _ = write!(out, "; NOT in force: {why}");
        }
        (false, None) => out.push_str("; not in force yet: the agent waits for the API server"),
    }
    out.push('\n');
    out
}

fn list(answer: &Value) -> String {
    let mut out = head(answer);
    let mut rows = vec![
        ["SERVICE", "ANSWERS AT", "ENDPOINTS", "HERE", "CONNECTIONS", "REFUSED"].map(str::to_owned).to_vec(),
    ];
    for service in array(&answer["services"]) {
        let name = format!("{}/{}", text(&service["namespace"]), text(&service["name"]));
        let places: Vec<&str> = array(&service["frontends"]).iter().map(text).collect();
        if let Some(why) = service["notHandled"].as_str() {
            rows.push(vec![name, format!("- ({why})")]);
            continue;
        }
        let shown = places.iter().take(PLACES).copied().collect::<Vec<_>>().join(" ");
        let more = places.len().saturating_sub(PLACES);
        let counters = &service["counters"];
        rows.push(vec![
            name,
            if more == 0 { shown } else { format!("{shown} and {more} more") },
            service["endpoints"].to_string(),
            service["localEndpoints"].to_string(),
            counters["connections"].to_string(),
            counters["refused"].to_string(),
        ]);
    }
    out.push_str(&table(&rows));
    problems(&mut out, array(&answer["findings"]), array(&answer["refused"]));
    let full = array(&answer["tables"]).iter().filter(|t| {
        let (entries, max) = (t["entries"].as_u64().unwrap_or(0), t["maxEntries"].as_u64().unwrap_or(0));
        // Worth a word from four fifths on.
        max > 0 && entries * 5 >= max * 4
    });
    for table in full {
        let _ = writeln!(
            out,
            "table {}: {} of {} entries",
            text(&table["name"]),
            table["entries"],
            table["maxEntries"]
        );
    }
    out
}

fn problems(out: &mut String, findings: &[Value], refused: &[Value]) {
    for finding in findings.iter().take(FINDINGS) {
        let _ = writeln!(
            out,
            "{} {}/{}: {}: {}",
            text(&finding["kind"]),
            text(&finding["namespace"]),
            text(&finding["name"]),
            text(&finding["field"]),
            text(&finding["cause"])
        );
    }
    if findings.len() > FINDINGS {
        let _ = writeln!(out, "and {} more findings; -o json lists all", findings.len() - FINDINGS);
    }
    for refusal in refused {
        let whose = refusal["service"].as_str().map_or(String::new(), |s| format!("{s}: "));
        let _ = writeln!(out, "not in the kernel: {whose}{}", text(&refusal["cause"]));
    }
}

fn one(answer: &Value) -> String {
    let mut out = head(answer);
    let service = &answer["service"];
    let _ = writeln!(out, "Service {}/{}", text(&service["namespace"]), text(&service["name"]));
    if let Some(why) = service["notHandled"].as_str() {
        let _ = writeln!(out, "  not served here: {why}");
    }
    for port in array(&service["ports"]) {
        let name = match text(&port["name"]) {
            "" => String::new(),
            name => format!(" {name}"),
        };
        let _ = writeln!(
            out,
            "\nport{name} {}/{} ({})",
            port["port"],
            text(&port["protocol"]),
            text(&port["family"])
        );
        for frontend in array(&port["frontends"]) {
            show_frontend(&mut out, frontend);
        }
        show_endpoints(&mut out, array(&port["endpoints"]));
        let counters = &port["counters"];
        let _ = writeln!(
            out,
            "  {} connections, {} refused; {} packets ({} bytes) translated one by one",
            counters["connections"], counters["refused"], counters["packets"], counters["bytes"]
        );
    }
    for slice in array(&service["unusedSlices"]) {
        let _ = writeln!(
            out,
            "EndpointSlice {} with {} endpoints is not used: {}",
            text(&slice["name"]),
            slice["endpoints"],
            text(&slice["why"])
        );
    }
    let refused: Vec<Value> =
        array(&service["refused"]).iter().map(|cause| serde_json::json!({"cause": cause})).collect();
    problems(&mut out, array(&service["findings"]), &refused);
    out
}

fn show_frontend(out: &mut String, frontend: &Value) {
    let _ = write!(out, "  {} {}", text(&frontend["kind"]), text(&frontend["address"]));
    if let Some(seconds) = frontend["affinitySeconds"].as_u64() {
        let _ = write!(out, ", clients keep their endpoint for {seconds} s");
    }
    if let Some(ranges) = frontend["sourceRanges"].as_array() {
        let ranges: Vec<&str> = ranges.iter().map(text).collect();
        let _ = write!(out, ", only for {}", ranges.join(" "));
    }
    out.push('\n');
    if let Some(holder) = frontend["heldBy"].as_str() {
        let _ = writeln!(out, "    {holder} has this address and port: it came first");
        return;
    }
    let routes = &frontend["routes"];
    let of = |name: &str| text(&routes[name]);
    if of("fromPods") == of("fromNode") && of("fromNode") == of("fromOutside") {
        let _ = writeln!(out, "    from everywhere: {}", of("fromPods"));
        return;
    }
    for (name, title) in
        [("fromPods", "from pods"), ("fromNode", "from this node"), ("fromOutside", "from outside")]
    {
        let _ = writeln!(out, "    {title}: {}", of(name));
    }
}

fn show_endpoints(out: &mut String, endpoints: &[Value]) {
    if endpoints.is_empty() {
        out.push_str("  no endpoints\n");
        return;
    }
    let mut rows = vec![
        ["  ENDPOINT", "POD", "NODE", "ZONE", "CLUSTER-WIDE", "ON THIS NODE"].map(str::to_owned).to_vec(),
    ];
    for endpoint in endpoints {
        let or_dash = |key: &str| endpoint[key].as_str().unwrap_or("-").to_owned();
        rows.push(vec![
            format!("  {}", text(&endpoint["address"])),
            or_dash("pod"),
            or_dash("node"),
            or_dash("zone"),
            or_dash("cluster"),
            or_dash("nodeLocal"),
        ]);
    }
    out.push_str(&table(&rows));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_list_tells_what_is_wrong() {
        let answer = json!({"node": "n1", "mode": "ebpf", "inForce": true, "problem": null,
            "services": [
                {"namespace": "x", "name": "a", "notHandled": null, "frontends": ["1", "2", "3"], "endpoints": 4,
                 "localEndpoints": 1, "counters": {"connections": 7, "refused": 0}},
                {"namespace": "x", "name": "b", "notHandled": "headless", "frontends": []}],
            "findings": [{"kind": "Service", "namespace": "x", "name": "a", "field": "spec.ports", "cause": "odd"}],
            "refused": [{"service": "x/a", "cause": "full"}],
            "tables": [{"name": "frontends", "entries": 90, "maxEntries": 100}]});
        let text = list(&answer);
        for part in [
            "node n1, served by ebpf\n",
            "1 2 and 1 more",
            "- (headless)",
            "Service x/a: spec.ports: odd",
            "not in the kernel: x/a: full",
            "table frontends: 90 of 100 entries",
        ] {
            assert!(text.contains(part), "{part} in:\n{text}");
        }
    }

    #[test]
    fn one_service_tells_why_each_endpoint_is_used_or_not() {
        let route = "any endpoint, source kept";
        let answer = json!({"node": "n1", "mode": "ebpf", "inForce": false, "problem": "no map",
            "service": {"namespace": "x", "name": "a", "notHandled": null, "findings": [], "refused": ["full"],
                "unusedSlices": [{"name": "s", "endpoints": 2, "why": "names"}],
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "family": "IPv4",
                    "counters": {"connections": 1, "refused": 2, "packets": 3, "bytes": 4},
                    "frontends": [
                        {"address": "10.0.0.1:80/TCP", "kind": "ClusterIP", "affinitySeconds": 60, "sourceRanges": null,
                         "heldBy": null, "routes": {"fromPods": route, "fromNode": route, "fromOutside": route}},
                        {"address": "192.0.2.1:80/TCP", "kind": "ExternalIP", "affinitySeconds": null,
                         "sourceRanges": ["192.0.2.0/24"], "heldBy": "Service x/b", "routes": {}}],
                    "endpoints": [{"address": "10.1.0.1:8080", "pod": "p", "node": null, "zone": null,
                        "cluster": "not used: not ready", "nodeLocal": "not used: on another node"}]}]}});
        let text = one(&answer);
        for part in [
            "NOT in force: no map",
            "port http 80/TCP (IPv4)",
            "ClusterIP 10.0.0.1:80/TCP, clients keep their endpoint for 60 s",
            "from everywhere: any endpoint, source kept",
            "Service x/b has this address and port",
            "only for 192.0.2.0/24",
            "10.1.0.1:8080   p     -",
            "not used: not ready",
            "EndpointSlice s with 2 endpoints is not used: names",
            "not in the kernel: full",
        ] {
            assert!(text.contains(part), "{part} in:\n{text}");
        }
    }
}
