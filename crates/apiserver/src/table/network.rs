//! Rows of Services, endpoints, Ingresses and policies.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::Cells;
use super::format::{
    NONE, UNSET, age, first_few, labels_text, load_balancer_addresses, selector_cell, text_or,
};
use crate::json::{at, get_array, get_int, get_str};
use crate::kinds::KindInfo;

/// Addresses, hosts or ports shown before the rest is counted.
const MOST: usize = 3;

pub(super) fn printer(kind: &KindInfo) -> Option<(&'static str, Cells)> {
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Service") => Some(("Type|Cluster-IP|External-IP|Port(s)|Age|*Selector", service as Cells)),
        ("", "Endpoints") => Some(("Endpoints|Age", endpoints)),
        ("discovery.k8s.io", "EndpointSlice") => Some(("AddressType|Ports|Endpoints|Age", endpoint_slice)),
        ("networking.k8s.io", "Ingress") => Some(("Class|Hosts|Address|Ports|Age", ingress)),
        ("networking.k8s.io", "IngressClass") => Some(("Controller|Parameters|Age", ingress_class)),
        ("networking.k8s.io", "NetworkPolicy") => Some(("Pod-Selector|Age", network_policy)),
        ("networking.k8s.io", "IPAddress") => Some(("ParentRef|Age", ip_address)),
        ("networking.k8s.io", "ServiceCIDR") => Some(("CIDRs|Age", service_cidr)),
        _ => None,
    }
}

fn strings(values: &[Value]) -> Vec<String> {
    values.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn service(service: &Value, now: Timestamp) -> Vec<Value> {
    let type_ = match get_str(service, &["spec", "type"]) {
        "" => "ClusterIP",
        type_ => type_,
    };
    let cluster_ip = get_array(service, &["spec", "clusterIPs"]).first().and_then(Value::as_str);
    let cluster_ip = cluster_ip.unwrap_or_else(|| get_str(service, &["spec", "clusterIP"]));
    let mut external = strings(get_array(service, &["spec", "externalIPs"]));
    let external = match type_ {
        "ExternalName" => get_str(service, &["spec", "externalName"]).to_owned(),
        "LoadBalancer" => {
            let mut addresses = load_balancer_addresses(service);
            addresses.append(&mut external);
            if addresses.is_empty() { "<pending>".to_owned() } else { addresses.join(",") }
        }
        _ if external.is_empty() => NONE.to_owned(),
        _ => external.join(","),
    };
    let ports: Vec<String> = get_array(service, &["spec", "ports"])
        .iter()
        .map(|port| {
            let number = get_int(port, &["port"]).unwrap_or(0);
            let protocol = match get_str(port, &["protocol"]) {
                "" => "TCP",
                protocol => protocol,
            };
            match get_int(port, &["nodePort"]) {
                Some(node_port) if node_port > 0 => format!("{number}:{node_port}/{protocol}"),
                _ => format!("{number}/{protocol}"),
            }
        })
        .collect();
    vec![
        json!(type_),
        json!(if cluster_ip.is_empty() { NONE } else { cluster_ip }),
        json!(external),
        json!(if ports.is_empty() { NONE.to_owned() } else { ports.join(",") }),
        age(service, now),
        json!(labels_text(at(service, &["spec", "selector"]))),
    ]
}

fn endpoints(endpoints: &Value, now: Timestamp) -> Vec<Value> {
    let mut all = Vec::new();
    for subset in get_array(endpoints, &["subsets"]) {
        let addresses = get_array(subset, &["addresses"]).iter().map(|address| get_str(address, &["ip"]));
        let ports = get_array(subset, &["ports"]);
        for address in addresses {
            if ports.is_empty() {
                all.push(address.to_owned());
            }
            for port in ports.iter().filter_map(|port| get_int(port, &["port"])) {
                let bracketed = address.contains(':');
                all.push(if bracketed { format!("[{address}]:{port}") } else { format!("{address}:{port}") });
            }
        }
    }
    vec![json!(first_few(&all, MOST, NONE)), age(endpoints, now)]
}

fn endpoint_slice(slice: &Value, now: Timestamp) -> Vec<Value> {
    let ports: Vec<String> = get_array(slice, &["ports"])
        .iter()
        .map(|port| get_int(port, &["port"]).map_or_else(|| "*".to_owned(), |port| port.to_string()))
        .collect();
    let addresses: Vec<String> = get_array(slice, &["endpoints"])
        .iter()
        .flat_map(|endpoint| strings(get_array(endpoint, &["addresses"])))
        .collect();
    vec![
        text_or(slice, &["addressType"], ""),
        json!(first_few(&ports, MOST, UNSET)),
        json!(first_few(&addresses, MOST, UNSET)),
        age(slice, now),
    ]
}

fn ingress(ingress: &Value, now: Timestamp) -> Vec<Value> {
    let hosts: Vec<String> = get_array(ingress, &["spec", "rules"])
        .iter()
        .map(|rule| get_str(rule, &["host"]))
        .filter(|host| !host.is_empty())
        .map(str::to_owned)
        .collect();
    let has_tls = !get_array(ingress, &["spec", "tls"]).is_empty();
    vec![
        text_or(ingress, &["spec", "ingressClassName"], NONE),
        json!(first_few(&hosts, MOST, "*")),
        json!(load_balancer_addresses(ingress).join(",")),
        json!(if has_tls { "80, 443" } else { "80" }),
        age(ingress, now),
    ]
}

fn ingress_class(class: &Value, now: Timestamp) -> Vec<Value> {
    let parameters = at(class, &["spec", "parameters"]).map_or_else(
        || NONE.to_owned(),
        |parameters| {
            let group = get_str(parameters, &["apiGroup"]);
            let dot = if group.is_empty() { "" } else { "." };
            let (kind, name) = (get_str(parameters, &["kind"]), get_str(parameters, &["name"]));
            format!("{kind}{dot}{group}/{name}")
        },
    );
    vec![text_or(class, &["spec", "controller"], ""), json!(parameters), age(class, now)]
}

fn network_policy(policy: &Value, now: Timestamp) -> Vec<Value> {
    vec![selector_cell(at(policy, &["spec", "podSelector"])), age(policy, now)]
}

fn ip_address(address: &Value, now: Timestamp) -> Vec<Value> {
    let parent = |field| get_str(address, &["spec", "parentRef", field]);
    let parts = [parent("group"), parent("resource"), parent("namespace"), parent("name")];
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    vec![json!(if parts.is_empty() { NONE.to_owned() } else { parts.join("/") }), age(address, now)]
}

fn service_cidr(cidr: &Value, now: Timestamp) -> Vec<Value> {
    vec![json!(strings(get_array(cidr, &["spec", "cidrs"])).join(",")), age(cidr, now)]
}
