//! Policies judged straight from the words of the API's documentation, on the objects as JSON: slow, and on purpose
//! without anything of the compiler in it.

use std::net::IpAddr;

use serde_json::Value;

/// The objects of a cluster.
#[derive(Clone, Debug, Default)]
pub(crate) struct Objects {
    pub(crate) namespaces: Vec<Value>,
    pub(crate) nodes: Vec<Value>,
    pub(crate) pods: Vec<Value>,
    pub(crate) network_policies: Vec<Value>,
    pub(crate) cluster_policies: Vec<Value>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) allow: bool,
    pub(crate) audit: bool,
    /// Rules that may be named as the reason, as `name direction index`; "default" for none.
    pub(crate) because: Vec<String>,
}

#[derive(Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) protocol: &'static str,
    pub(crate) port: u16,
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or("")
}

fn list<'a>(value: &'a Value, field: &str) -> Vec<&'a Value> {
    value.get(field).and_then(Value::as_array).map(|l| l.iter().collect()).unwrap_or_default()
}

fn selects(selector: &Value, labels: &Value) -> bool {
    let has = |key: &str| labels.get(key).and_then(Value::as_str);
    let equal = selector.get("matchLabels").and_then(Value::as_object);
    let equal = equal.is_none_or(|m| m.iter().all(|(k, v)| has(k) == v.as_str()));
    equal
        && list(selector, "matchExpressions").iter().all(|e| {
            let found = has(text(e, "/key"));
            let among = found.is_some_and(|f| list(e, "values").iter().any(|v| v.as_str() == Some(f)));
            match text(e, "/operator") {
                "In" => among,
                "NotIn" => !among,
                "Exists" => found.is_some(),
                "DoesNotExist" => found.is_none(),
                other => panic!("{other}"),
            }
        })
}

fn bits(addr: IpAddr) -> (bool, u128) {
    match addr {
        IpAddr::V4(a) => (false, u128::from(u32::from(a)) << 96),
        IpAddr::V6(a) => (true, u128::from(a)),
    }
}

fn inside(addr: IpAddr, cidr: &str) -> bool {
    let (net, length) = cidr.split_once('/').unwrap();
    let ((v6, addr), (net_v6, net)) = (bits(addr), bits(net.parse().unwrap()));
    let length: u32 = length.parse().unwrap();
    v6 == net_v6 && (length == 0 || addr >> (128 - length) == net >> (128 - length))
}

fn is_host(pod: &Value) -> bool {
    pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true))
}

fn addresses(pod: &Value) -> Vec<IpAddr> {
    let status = pod.get("status").map(|s| list(s, "podIPs")).unwrap_or_default();
    status.iter().map(|ip| text(ip, "/ip").parse().unwrap()).collect()
}

impl Objects {
    pub(crate) fn pod_at(&self, addr: IpAddr) -> Option<&Value> {
        self.pods.iter().find(|p| !is_host(p) && addresses(p).contains(&addr))
    }

    fn node_at(&self, addr: IpAddr) -> Option<&Value> {
        self.nodes.iter().find(|n| {
            let addresses = n.get("status").map(|s| list(s, "addresses")).unwrap_or_default();
            addresses.iter().any(|a| text(a, "/address").parse() == Ok(addr))
        })
    }

    fn labels_of_namespace(&self, name: &str) -> Value {
        let known = self.namespaces.iter().find(|n| text(n, "/metadata/name") == name);
        let mut labels = known.map_or(Value::Null, |n| n["metadata"]["labels"].clone());
        if labels.is_null() {
            labels = serde_json::json!({});
        }
        labels["kubernetes.io/metadata.name"] = name.into();
        labels
    }

    fn is_in(&self, pod: &Value, namespaces: &Value, pods: &Value) -> bool {
        selects(namespaces, &self.labels_of_namespace(text(pod, "/metadata/namespace")))
            && selects(pods, &pod["metadata"]["labels"])
    }

    fn matches_port(&self, asked: Asked, target: IpAddr, name: &str, protocol: Option<&str>) -> bool {
        // A name is that of a port of the target, when the target is a pod on the pod network.
        let Some(pod) = self.pod_at(target) else { return false };
        let containers = list(&pod["spec"], "containers");
        containers.iter().flat_map(|c| list(c, "ports")).any(|p| {
            let own = p.get("protocol").and_then(Value::as_str).unwrap_or("TCP");
            text(p, "/name") == name
                && own == asked.protocol
                && protocol.is_none_or(|wanted| wanted == own)
                && p["containerPort"].as_u64() == Some(asked.port.into())
        })
    }

    fn network_rule(
        &self,
        rule: &Value,
        namespace: &str,
        peers: &str,
        peer: IpAddr,
        target: IpAddr,
        asked: Asked,
    ) -> bool {
        let from = list(rule, peers);
        let by_peer = from.is_empty()
            || from.iter().any(|p| {
                if let Some(block) = p.get("ipBlock") {
                    let except = list(block, "except");
                    return inside(peer, text(block, "/cidr"))
                        && !except.iter().any(|e| inside(peer, e.as_str().unwrap()));
                }
                let Some(pod) = self.pod_at(peer) else { return false };
                let everything = serde_json::json!({});
                let pods = p.get("podSelector").unwrap_or(&everything);
                match p.get("namespaceSelector") {
                    Some(namespaces) => self.is_in(pod, namespaces, pods),
                    None => {
                        text(pod, "/metadata/namespace") == namespace
                            && selects(pods, &pod["metadata"]["labels"])
                    }
                }
            });
        let ports = list(rule, "ports");
        by_peer
            && (ports.is_empty()
                || ports.iter().any(|p| {
                    let protocol = p.get("protocol").and_then(Value::as_str).unwrap_or("TCP");
                    match p.get("port") {
                        Some(Value::String(name)) => self.matches_port(asked, target, name, Some(protocol)),
                        Some(number) => {
                            let first = number.as_u64().unwrap();
                            let last = p.get("endPort").and_then(Value::as_u64).unwrap_or(first);
                            protocol == asked.protocol && (first..=last).contains(&asked.port.into())
                        }
                        None => protocol == asked.protocol,
                    }
                }))
    }

    fn cluster_rule(&self, rule: &Value, peers: &str, peer: IpAddr, target: IpAddr, asked: Asked) -> bool {
        let by_peer = list(rule, peers).iter().any(|p| {
            let everything = serde_json::json!({});
            if let Some(networks) = p.get("networks").and_then(Value::as_array) {
                return networks.iter().any(|n| inside(peer, n.as_str().unwrap()));
            }
            if let Some(nodes) = p.get("nodes") {
                return self.node_at(peer).is_some_and(|n| selects(nodes, &n["metadata"]["labels"]));
            }
            let Some(pod) = self.pod_at(peer) else { return false };
            if let Some(namespaces) = p.get("namespaces") {
                return self.is_in(pod, namespaces, &everything);
            }
            self.is_in(pod, &p["pods"]["namespaceSelector"], &p["pods"]["podSelector"])
        });
        let protocols = list(rule, "protocols");
        by_peer
            && (protocols.is_empty()
                || protocols.iter().any(|p| {
                    if let Some(name) = p.get("destinationNamedPort").and_then(Value::as_str) {
                        return self.matches_port(asked, target, name, None);
                    }
                    let (name, inner) = p.as_object().unwrap().iter().next().unwrap();
                    let port = &inner["destinationPort"];
                    let number = |path: &str| port.pointer(path).and_then(Value::as_u64);
                    let range = number("/number")
                        .map(|n| n..=n)
                        .or_else(|| Some(number("/range/start")?..=number("/range/end")?));
                    name.to_uppercase() == asked.protocol && range.unwrap().contains(&asked.port.into())
                }))
    }

    /// What one end says; `None` when it is no pod that policies can be for.
    pub(crate) fn side(&self, direction: &str, endpoint: IpAddr, peer: IpAddr, asked: Asked) -> Option<Said> {
        let pod = self.pod_at(endpoint)?;
        let namespace = text(pod, "/metadata/namespace");
        let (peers, target) = if direction == "ingress" { ("from", endpoint) } else { ("to", peer) };
        let audits = |p: &Value| p["metadata"]["annotations"]["podway.dev/audit"] == "true";
        let mut mark: Option<Vec<String>> = None;
        let said = |allow: bool, mark: &Option<Vec<String>>, because: Vec<String>| {
            let audit = allow && mark.is_some();
            Some(Said { allow, audit, because: mark.clone().filter(|_| audit).unwrap_or(because) })
        };
        for tier in ["Admin", "Network", "Baseline"] {
            if tier == "Network" {
                let selecting: Vec<&Value> = self
                    .network_policies
                    .iter()
                    .filter(|p| {
                        let types = list(&p["spec"], "policyTypes");
                        let isolates = if types.is_empty() {
                            direction == "ingress" || !list(&p["spec"], "egress").is_empty()
                        } else {
                            types.iter().any(|t| t.as_str().unwrap().to_lowercase() == direction)
                        };
                        text(p, "/metadata/namespace") == namespace
                            && isolates
                            && selects(&p["spec"]["podSelector"], &pod["metadata"]["labels"])
                    })
                    .collect();
                let mut allowing = Vec::new();
                for policy in &selecting {
                    for (i, rule) in list(&policy["spec"], direction).iter().enumerate() {
                        if self.network_rule(rule, namespace, peers, peer, target, asked) {
                            allowing.push(format!("{} {direction} {i}", text(policy, "/metadata/name")));
                        }
                    }
                }
                if !allowing.is_empty() {
                    return said(true, &mark, allowing);
                }
                if selecting.iter().any(|p| !audits(p)) {
                    return said(false, &mark, vec!["default".into()]);
                }
                if !selecting.is_empty() {
                    mark.get_or_insert(vec!["default".into()]);
                }
                continue;
            }
            let mut policies: Vec<&Value> =
                self.cluster_policies.iter().filter(|p| p["spec"]["tier"] == tier).collect();
            policies.sort_by_key(|p| (p["spec"]["priority"].as_u64(), text(p, "/metadata/name").to_owned()));
            'tier: for policy in policies {
                let subject = &policy["spec"]["subject"];
                let everything = serde_json::json!({});
                let is_subject = match subject.get("namespaces") {
                    Some(namespaces) => self.is_in(pod, namespaces, &everything),
                    None => self.is_in(
                        pod,
                        &subject["pods"]["namespaceSelector"],
                        &subject["pods"]["podSelector"],
                    ),
                };
                if !is_subject {
                    continue;
                }
                for (i, rule) in list(&policy["spec"], direction).iter().enumerate() {
                    if !self.cluster_rule(rule, peers, peer, target, asked) {
                        continue;
                    }
                    let because = vec![format!("{} {direction} {i}", text(policy, "/metadata/name"))];
                    match text(rule, "/action") {
                        "Accept" => return said(true, &mark, because),
                        "Deny" if audits(policy) => {
                            mark.get_or_insert(because);
                        }
                        "Deny" => return said(false, &mark, because),
                        _ => break 'tier,
                    }
                }
            }
        }
        said(true, &mark, vec!["default".into()])
    }
}
