//! NetworkPolicy (`networking.k8s.io/v1`), refused where the API server refuses.

use serde_json::Value;

use crate::{
    Rejection,
    policy::{
        Action, Direction, IpBlock, Namespaces, Peer, PortMatch, Rule, audit, check_port_name, cidr,
        port_number, selector,
    },
    read::{Object, type_name},
    selector::Selector,
};

/// A NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// Whether it is judged and reported only ([`crate::policy::AUDIT_ANNOTATION`]).
    pub audit: bool,
    /// `spec.podSelector`: pods of its namespace that it isolates.
    pub pods: Selector,
    /// Rules for connections to them; `None` when it does not isolate that direction.
    pub ingress: Option<Vec<Rule>>,
    /// Rules for connections from them; `None` when it does not isolate that direction.
    pub egress: Option<Vec<Rule>>,
}

impl NetworkPolicy {
    /// Reads a NetworkPolicy object.
    ///
    /// # Errors
    /// The first field that the API server would refuse.
    pub fn parse(value: &Value) -> Result<Self, Rejection> {
        let object = Object::new("NetworkPolicy", value);
        let (name, namespace) = (object.name()?, object.namespace()?);
        let spec = match value.get("spec") {
            Some(spec) if spec.is_object() => spec,
            None | Some(Value::Null) => return Err(object.reject("spec", "is missing")),
            Some(other) => {
                return Err(object.reject("spec", &format!("is {}, not an object", type_name(other))));
            }
        };
        let pods = selector(&object, "spec", spec, "podSelector")?;
        let rules = |direction: Direction| {
            let at = format!("spec.{direction}");
            let list = object.array_value(&at, spec.get(direction.field()))?;
            let rule = |(i, rule)| rule_of(&object, &namespace, direction, &format!("{at}[{i}]"), rule);
            list.iter().enumerate().map(rule).collect::<Result<Vec<_>, _>>()
        };
        let (ingress, egress) = (rules(Direction::Ingress)?, rules(Direction::Egress)?);
        let (isolates_ingress, isolates_egress) = types(&object, spec, !egress.is_empty())?;
        Ok(Self {
            audit: audit(&object, value)?,
            pods,
            ingress: isolates_ingress.then_some(ingress),
            egress: isolates_egress.then_some(egress),
            namespace,
            name,
        })
    }

    /// What is safe to make of an object that [`NetworkPolicy::parse`] refuses: the same pods are isolated in the same
    /// directions, and nothing is allowed. `None` when it does not say which pods.
    pub fn closed(value: &Value) -> Option<Self> {
        let object = Object::new("NetworkPolicy", value);
        let spec = value.get("spec")?;
        let has_egress = spec.get("egress").is_some_and(|e| e.as_array().is_none_or(|e| !e.is_empty()));
        let (ingress, egress) = types(&object, spec, has_egress).unwrap_or((true, true));
        Some(Self {
            name: object.name().ok()?,
            namespace: object.namespace().ok()?,
            audit: audit(&object, value).unwrap_or(false),
            pods: selector(&object, "spec", spec, "podSelector").ok()?,
            ingress: ingress.then(Vec::new),
            egress: egress.then(Vec::new),
        })
    }

    /// The rules of a direction; `None` when it does not isolate it.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// `spec.policyTypes`, or what its absence means.
fn types(object: &Object<'_>, spec: &Value, has_egress: bool) -> Result<(bool, bool), Rejection> {
    let list = object.array_value("spec.policyTypes", spec.get("policyTypes"))?;
    if list.is_empty() {
        return Ok((true, has_egress));
    }
    if list.len() > 2 {
        return Err(object.reject("spec.policyTypes", "has more than two entries"));
    }
    let (mut ingress, mut egress) = (false, false);
    for (i, entry) in list.iter().enumerate() {
        let field = format!("spec.policyTypes[{i}]");
        match object.text(&field, entry)? {
            "Ingress" => ingress = true,
            "Egress" => egress = true,
            other => {
                return Err(object.reject(&field, &format!("{other:?} is neither Ingress nor Egress")));
            }
        }
    }
    Ok((ingress, egress))
}

fn rule_of(
    object: &Object<'_>,
    namespace: &str,
    direction: Direction,
    at: &str,
    rule: &Value,
) -> Result<Rule, Rejection> {
    if !rule.is_object() && !rule.is_null() {
        return Err(object.reject(at, &format!("is {}, not an object", type_name(rule))));
    }
    let field = direction.peers_field();
    let other = match direction {
        Direction::Ingress => "to",
        Direction::Egress => "from",
    };
    // An API server would drop the unknown field and the rule would match everybody.
    if rule.get(other).is_some() {
        let cause = format!("is no field of a rule for {direction}; {field} is");
        return Err(object.reject(&format!("{at}.{other}"), &cause));
    }
    let peers_at = format!("{at}.{field}");
    let peers = object.array_value(&peers_at, rule.get(field))?;
    let peer = |(i, peer)| peer_of(object, namespace, &format!("{peers_at}[{i}]"), peer);
    let peers = peers.iter().enumerate().map(peer).collect::<Result<Vec<_>, _>>()?;
    let ports_at = format!("{at}.ports");
    let ports = object.array_value(&ports_at, rule.get("ports"))?;
    let port = |(i, port)| port_of(object, &format!("{ports_at}[{i}]"), port);
    let ports = ports.iter().enumerate().map(port).collect::<Result<Vec<_>, _>>()?;
    Ok(Rule {
        name: String::new(),
        action: Action::Accept,
        peers: (!peers.is_empty()).then_some(peers),
        ports: (!ports.is_empty()).then_some(ports),
        not_understood: Vec::new(),
    })
}

fn peer_of(object: &Object<'_>, namespace: &str, at: &str, peer: &Value) -> Result<Peer, Rejection> {
    let given = |name: &str| peer.get(name).is_some_and(|v| !v.is_null());
    let (pods, namespaces, block) = (given("podSelector"), given("namespaceSelector"), given("ipBlock"));
    if block {
        if pods || namespaces {
            return Err(object.reject(at, "has ipBlock and another peer; make them two entries of the list"));
        }
        return ip_block(object, &format!("{at}.ipBlock"), &peer["ipBlock"]).map(Peer::Block);
    }
    if !pods && !namespaces {
        return Err(object.reject(at, "has none of podSelector, namespaceSelector, ipBlock"));
    }
    Ok(Peer::Pods {
        namespaces: if namespaces {
            Namespaces::Selected(selector(object, at, peer, "namespaceSelector")?)
        } else {
            Namespaces::Named(namespace.to_owned())
        },
        pods: selector(object, at, peer, "podSelector")?,
    })
}

fn ip_block(object: &Object<'_>, at: &str, block: &Value) -> Result<IpBlock, Rejection> {
    let range = cidr(object, &format!("{at}.cidr"), block.get("cidr"))?;
    let mut except = Vec::new();
    let except_at = format!("{at}.except");
    for (i, entry) in object.array_value(&except_at, block.get("except"))?.iter().enumerate() {
        let field = format!("{except_at}[{i}]");
        let net = cidr(object, &field, Some(entry))?;
        if !range.contains(&net) || net == range {
            let cause = format!("{net} is not inside of {range}, or is all of it");
            return Err(object.reject(&field, &cause));
        }
        except.push(net);
    }
    except.sort();
    except.dedup();
    Ok(IpBlock { cidr: range, except })
}

fn port_of(object: &Object<'_>, at: &str, port: &Value) -> Result<PortMatch, Rejection> {
    let protocol = object.protocol(at, port)?;
    let (field, end_field) = (format!("{at}.port"), format!("{at}.endPort"));
    let end = port.get("endPort").filter(|e| !e.is_null());
    match port.get("port").filter(|p| !p.is_null()) {
        None if end.is_some() => Err(object.reject(&end_field, "may not be given without port")),
        None => Ok(PortMatch::Range(protocol, 0, u16::MAX)),
        Some(Value::String(name)) => {
            check_port_name(object, &field, name)?;
            if end.is_some() {
                return Err(object.reject(&end_field, "may not be given with a named port"));
            }
            Ok(PortMatch::Named { name: name.clone(), protocol: Some(protocol) })
        }
        Some(number) => {
            let first = port_number(object, &field, Some(number))?;
            let last = end.map_or(Ok(first), |end| port_number(object, &end_field, Some(end)))?;
            if last < first {
                return Err(object.reject(&end_field, &format!("{last} is below port, which is {first}")));
            }
            Ok(PortMatch::Range(protocol, first, last))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::Protocol;

    #[expect(clippy::needless_pass_by_value, reason = "callers write the value in place")]
    fn policy(spec: Value) -> Result<NetworkPolicy, Rejection> {
        NetworkPolicy::parse(&json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec}))
    }

    #[test]
    fn absent_and_empty_mean_what_the_api_says() {
        for (spec, ingress, egress) in [
            (json!({}), Some(0), None),
            (json!({"egress": []}), Some(0), None),
            (json!({"egress": [{}]}), Some(0), Some(1)),
            (json!({"ingress": [{}], "policyTypes": ["Egress"]}), None, Some(0)),
        ] {
            let parsed = policy(spec.clone()).unwrap();
            let counts = |rules: &Option<Vec<Rule>>| rules.as_ref().map(Vec::len);
            assert_eq!((counts(&parsed.ingress), counts(&parsed.egress)), (ingress, egress), "{spec}");
        }
        let any = policy(json!({"ingress": [{"from": [], "ports": []}]})).unwrap();
        let rule = &any.ingress.as_ref().unwrap()[0];
        assert!(rule.peers.is_none() && rule.ports.is_none());
    }

    #[test]
    fn peers_and_ports() {
        let parsed = policy(json!({"egress": [{
            "to": [{"podSelector": {}}, {"namespaceSelector": {}}, {"ipBlock": {"cidr": "10.1.2.3/8", "except": ["10.2.0.0/16"]}}],
            "ports": [{}, {"port": "web", "protocol": "UDP"}, {"port": 5, "endPort": 9, "protocol": "SCTP"}]}]}))
        .unwrap();
        let rule = &parsed.egress.unwrap()[0];
        let everything = Selector::default;
        assert_eq!(
            rule.peers.as_deref().unwrap(),
            [
                Peer::Pods { namespaces: Namespaces::Named("n".into()), pods: everything() },
                Peer::Pods { namespaces: Namespaces::Selected(everything()), pods: everything() },
                Peer::Block(IpBlock {
                    cidr: "10.0.0.0/8".parse().unwrap(),
                    except: vec!["10.2.0.0/16".parse().unwrap()]
                }),
            ]
        );
        assert_eq!(
            rule.ports.as_deref().unwrap(),
            [
                PortMatch::Range(Protocol::Tcp, 0, 65535),
                PortMatch::Named { name: "web".into(), protocol: Some(Protocol::Udp) },
                PortMatch::Range(Protocol::Sctp, 5, 9),
            ]
        );
    }

    #[test]
    fn what_the_api_refuses_is_refused_by_field() {
        let egress = |rule: Value| json!({"egress": [rule]});
        let block = |block: Value| egress(json!({"to": [{"ipBlock": block}]}));
        let port = |port: Value| egress(json!({"ports": [port]}));
        for (spec, field) in [
            (json!({"policyTypes": ["In"]}), "spec.policyTypes[0]"),
            (json!({"podSelector": 3}), "spec.podSelector"),
            (egress(json!({"from": []})), "spec.egress[0].from"),
            (egress(json!({"to": [{}]})), "spec.egress[0].to[0]"),
            (
                egress(json!({"to": [{"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}]})),
                "spec.egress[0].to[0]",
            ),
            (block(json!({})), "spec.egress[0].to[0].ipBlock.cidr"),
            (block(json!({"cidr": "10.0.0.0"})), "spec.egress[0].to[0].ipBlock.cidr"),
            (block(json!({"cidr": "::ffff:10.0.0.0/104"})), "spec.egress[0].to[0].ipBlock.cidr"),
            (
                block(json!({"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]})),
                "spec.egress[0].to[0].ipBlock.except[0]",
            ),
            (
                block(json!({"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]})),
                "spec.egress[0].to[0].ipBlock.except[0]",
            ),
            (port(json!({"endPort": 5})), "spec.egress[0].ports[0].endPort"),
            (port(json!({"port": "a", "endPort": 5})), "spec.egress[0].ports[0].endPort"),
            (port(json!({"port": 6, "endPort": 5})), "spec.egress[0].ports[0].endPort"),
            (port(json!({"port": 0})), "spec.egress[0].ports[0].port"),
            (port(json!({"port": "A"})), "spec.egress[0].ports[0].port"),
            (port(json!({"protocol": "ICMP"})), "spec.egress[0].ports[0].protocol"),
        ] {
            let rejection = policy(spec.clone()).unwrap_err();
            assert_eq!(rejection.field, field, "{spec}: {rejection}");
            let value = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec});
            let closed = NetworkPolicy::closed(&value);
            assert_eq!(closed.is_none(), field == "spec.podSelector");
            assert!(closed.is_none_or(|c| c.ingress.is_none_or(|r| r.is_empty())));
        }
    }
}
