//! ClusterNetworkPolicy (`policy.networking.k8s.io`, v1alpha2 and v1beta1), and the AdminNetworkPolicy and
//! BaselineAdminNetworkPolicy (v1alpha1) that came before it, read as the same.

use serde_json::Value;

use crate::{
    Rejection,
    net::Protocol,
    policy::{
        Action, Direction, IpBlock, Namespaces, Peer, PortMatch, Rule, audit, cidr, port_number, selector,
    },
    read::{Object, type_name},
    selector::Selector,
};

/// Most rules of one direction, peers and ports of one rule, networks of one peer (the definition's limits).
const MOST: usize = 25;
/// Most rules of one direction in v1alpha1, and peers and ports of a rule there.
const MOST_V1ALPHA1: usize = 100;

/// When a cluster policy is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Before NetworkPolicies.
    Admin,
    /// After them, for pods that none of them isolates.
    Baseline,
}

/// A ClusterNetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterNetworkPolicy {
    /// Kind of the object that it was read from.
    pub kind: &'static str,
    /// `metadata.name`.
    pub name: String,
    /// Whether it is judged and reported only ([`crate::policy::AUDIT_ANNOTATION`]).
    pub audit: bool,
    /// `spec.tier`.
    pub tier: Tier,
    /// `spec.priority`, 0 to 1000; lower is judged first.
    pub priority: u16,
    /// `spec.subject`: the namespaces of the pods that it is for.
    pub namespaces: Selector,
    /// The labels of the pods that it is for.
    pub pods: Selector,
    /// Rules for connections to them, in order.
    pub ingress: Vec<Rule>,
    /// Rules for connections from them, in order.
    pub egress: Vec<Rule>,
}

/// The kinds that [`ClusterNetworkPolicy::parse`] reads.
pub const CLUSTER_POLICY_KINDS: [&str; 3] =
    ["ClusterNetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy"];

/// The object and what its kind calls things.
struct Reader<'a> {
    object: Object<'a>,
    kind: &'static str,
}

impl ClusterNetworkPolicy {
    /// Reads an object of one of the [`CLUSTER_POLICY_KINDS`].
    ///
    /// Peers and protocols that are not understood are no error: a rule to accept then matches less, a rule to deny or
    /// pass denies everything, as the API's documentation asks.
    ///
    /// # Errors
    /// The first field that the kind's definition would refuse.
    pub fn parse(value: &Value) -> Result<Self, Rejection> {
        let named = value.get("kind").and_then(Value::as_str).unwrap_or_default();
        let kind =
            CLUSTER_POLICY_KINDS.into_iter().find(|kind| *kind == named).unwrap_or(CLUSTER_POLICY_KINDS[0]);
        let reader = Reader { object: Object::new(kind, value), kind };
        let object = &reader.object;
        let name = object.name()?;
        let Some(spec) = value.get("spec").filter(|s| s.is_object()) else {
            return Err(object.reject("spec", "is missing"));
        };
        let (namespaces, pods) = reader.subject(spec)?;
        Ok(Self {
            kind,
            name,
            audit: audit(object, value)?,
            tier: reader.tier(spec)?,
            priority: reader.priority(spec)?,
            namespaces,
            pods,
            ingress: reader.rules(spec, Direction::Ingress)?,
            egress: reader.rules(spec, Direction::Egress)?,
        })
    }

    /// The rules of a direction.
    pub fn rules(&self, direction: Direction) -> &[Rule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

impl Reader<'_> {
    fn is_v1alpha1(&self) -> bool {
        self.kind != "ClusterNetworkPolicy"
    }

    fn most(&self) -> usize {
        if self.is_v1alpha1() { MOST_V1ALPHA1 } else { MOST }
    }

    fn tier(&self, spec: &Value) -> Result<Tier, Rejection> {
        match self.kind {
            "AdminNetworkPolicy" => return Ok(Tier::Admin),
            "BaselineAdminNetworkPolicy" => return Ok(Tier::Baseline),
            _ => {}
        }
        match spec.get("tier").and_then(Value::as_str) {
            Some("Admin") => Ok(Tier::Admin),
            Some("Baseline") => Ok(Tier::Baseline),
            Some(other) => {
                Err(self.object.reject("spec.tier", &format!("{other:?} is neither Admin nor Baseline")))
            }
            None => Err(self.object.reject("spec.tier", "is missing; it is Admin or Baseline")),
        }
    }

    fn priority(&self, spec: &Value) -> Result<u16, Rejection> {
        if self.kind == "BaselineAdminNetworkPolicy" {
            return Ok(0);
        }
        let Some(value) = spec.get("priority").filter(|v| !v.is_null()) else {
            return Err(self.object.reject("spec.priority", "is missing; it is a number from 0 to 1000"));
        };
        match value.as_u64().map(u16::try_from) {
            Some(Ok(priority @ 0..=1000)) => Ok(priority),
            _ => Err(self.object.reject("spec.priority", &format!("{value} is not a number from 0 to 1000"))),
        }
    }

    /// Exactly one of the fields of `value`, with its name.
    fn one<'v>(&self, at: &str, value: &'v Value) -> Result<Option<(&'v str, &'v Value)>, Rejection> {
        let Some(fields) = value.as_object() else {
            return Err(self.object.reject(at, &format!("is {}, not an object", type_name(value))));
        };
        let mut given = fields.iter().filter(|(_, v)| !v.is_null());
        let first = given.next().map(|(k, v)| (k.as_str(), v));
        if given.next().is_some() {
            return Err(self.object.reject(at, "has more than one field; exactly one is possible"));
        }
        Ok(first)
    }

    fn subject(&self, spec: &Value) -> Result<(Selector, Selector), Rejection> {
        let at = "spec.subject";
        let Some(subject) = spec.get("subject") else {
            return Err(self.object.reject(at, "is missing; it is namespaces or pods"));
        };
        match self.one(at, subject)? {
            Some(("namespaces", value)) => {
                Ok((Selector::parse(&self.object, &format!("{at}.namespaces"), value)?, Selector::default()))
            }
            Some(("pods", value)) => self.pods(&format!("{at}.pods"), value),
            Some((other, _)) => {
                Err(self.object.reject(&format!("{at}.{other}"), "is unknown; there are namespaces and pods"))
            }
            None => Err(self.object.reject(at, "is empty; it is namespaces or pods")),
        }
    }

    fn pods(&self, at: &str, value: &Value) -> Result<(Selector, Selector), Rejection> {
        if !value.is_object() {
            return Err(self.object.reject(at, &format!("is {}, not an object", type_name(value))));
        }
        let namespaces = selector(&self.object, at, value, "namespaceSelector")?;
        Ok((namespaces, selector(&self.object, at, value, "podSelector")?))
    }

    fn limited<'v>(&self, at: &str, value: &'v Value, field: &str) -> Result<&'v [Value], Rejection> {
        let field_at = format!("{at}.{field}");
        let list = match value.get(field) {
            None | Some(Value::Null) => &[],
            Some(Value::Array(list)) => list.as_slice(),
            Some(other) => {
                return Err(self.object.reject(&field_at, &format!("is {}, not a list", type_name(other))));
            }
        };
        if list.len() > self.most() {
            let cause = format!("has {} entries; {} are possible", list.len(), self.most());
            return Err(self.object.reject(&field_at, &cause));
        }
        Ok(list)
    }

    fn rules(&self, spec: &Value, direction: Direction) -> Result<Vec<Rule>, Rejection> {
        let list = self.limited("spec", spec, direction.field())?;
        let rule = |(i, rule)| self.rule(direction, &format!("spec.{direction}[{i}]"), rule);
        list.iter().enumerate().map(rule).collect()
    }

    fn rule(&self, direction: Direction, at: &str, rule: &Value) -> Result<Rule, Rejection> {
        let object = &self.object;
        let name = rule.get("name").map(|n| object.text(&format!("{at}.name"), n)).transpose()?;
        if name.is_some_and(|n| n.chars().count() > 100) {
            return Err(object.reject(&format!("{at}.name"), "is longer than 100 characters"));
        }
        let (accept, at_action) =
            (if self.is_v1alpha1() { "Allow" } else { "Accept" }, format!("{at}.action"));
        let action = match rule.get("action").and_then(Value::as_str) {
            Some(text) if text == accept => Action::Accept,
            Some("Deny") => Action::Deny,
            Some("Pass") if self.kind != "BaselineAdminNetworkPolicy" => Action::Pass,
            Some(other) => {
                return Err(object.reject(&at_action, &format!("{other:?} is none of {accept}, Deny, Pass")));
            }
            None => {
                return Err(object.reject(&at_action, &format!("is missing; it is {accept}, Deny or Pass")));
            }
        };
        let mut not_understood = Vec::new();
        let field = direction.peers_field();
        let list = self.limited(at, rule, field)?;
        if list.is_empty() {
            return Err(object.reject(&format!("{at}.{field}"), "is empty; at least one peer is needed"));
        }
        let mut peers = Vec::new();
        for (i, peer) in list.iter().enumerate() {
            self.peer(direction, &format!("{at}.{field}[{i}]"), peer, &mut peers, &mut not_understood)?;
        }
        let ports_field = if self.is_v1alpha1() { "ports" } else { "protocols" };
        let mut ports = Vec::new();
        let list = self.limited(at, rule, ports_field)?;
        for (i, port) in list.iter().enumerate() {
            let at = format!("{at}.{ports_field}[{i}]");
            let parsed =
                if self.is_v1alpha1() { self.port_v1alpha1(&at, port)? } else { self.protocol(&at, port)? };
            match parsed {
                Some(port) => ports.push(port),
                None => not_understood.push(at),
            }
        }
        let has_ports = !list.is_empty();
        let rule = Rule {
            name: name.unwrap_or_default().to_owned(),
            action,
            peers: Some(peers),
            ports: has_ports.then_some(ports),
            not_understood,
        };
        Ok(fail_closed(rule))
    }

    fn peer(
        &self,
        direction: Direction,
        at: &str,
        peer: &Value,
        peers: &mut Vec<Peer>,
        not_understood: &mut Vec<String>,
    ) -> Result<(), Rejection> {
        let object = &self.object;
        match self.one(at, peer)? {
            Some(("namespaces", value)) => peers.push(Peer::Pods {
                namespaces: Namespaces::Selected(Selector::parse(
                    object,
                    &format!("{at}.namespaces"),
                    value,
                )?),
                pods: Selector::default(),
            }),
            Some(("pods", value)) => {
                let (namespaces, pods) = self.pods(&format!("{at}.pods"), value)?;
                peers.push(Peer::Pods { namespaces: Namespaces::Selected(namespaces), pods });
            }
            Some(("nodes", value)) if direction == Direction::Egress => {
                peers.push(Peer::Nodes(Selector::parse(object, &format!("{at}.nodes"), value)?));
            }
            Some(("networks", _)) if direction == Direction::Egress => {
                for (i, entry) in self.limited(at, peer, "networks")?.iter().enumerate() {
                    let net = cidr(object, &format!("{at}.networks[{i}]"), Some(entry))?;
                    peers.push(Peer::Block(IpBlock { cidr: net, except: Vec::new() }));
                }
            }
            Some((other, _)) => not_understood.push(format!("{at}.{other}")),
            None => not_understood.push(at.to_owned()),
        }
        Ok(())
    }

    fn protocol(&self, at: &str, value: &Value) -> Result<Option<PortMatch>, Rejection> {
        let (protocol, value, at) = match self.one(at, value)? {
            Some(("tcp", value)) => (Protocol::Tcp, value, format!("{at}.tcp")),
            Some(("udp", value)) => (Protocol::Udp, value, format!("{at}.udp")),
            Some(("sctp", value)) => (Protocol::Sctp, value, format!("{at}.sctp")),
            Some(("destinationNamedPort", value)) => {
                let name = self.object.text(&format!("{at}.destinationNamedPort"), value)?;
                return Ok(Some(PortMatch::Named { name: name.to_owned(), protocol: None }));
            }
            _ => return Ok(None),
        };
        let Some((field, port)) = self.one(&at, value)? else {
            return Err(self.object.reject(&at, "is empty; give a destinationPort"));
        };
        if field != "destinationPort" {
            return Ok(None);
        }
        let at = format!("{at}.destinationPort");
        match self.one(&at, port)? {
            Some(("number", number)) => {
                let number = port_number(&self.object, &format!("{at}.number"), Some(number))?;
                Ok(Some(PortMatch::Range(protocol, number, number)))
            }
            Some(("range", range)) => self.range(&format!("{at}.range"), range, protocol).map(Some),
            Some(_) => Ok(None),
            None => Err(self.object.reject(&at, "is empty; it is number or range")),
        }
    }

    fn range(&self, at: &str, range: &Value, protocol: Protocol) -> Result<PortMatch, Rejection> {
        let number = |field: &str| port_number(&self.object, &format!("{at}.{field}"), range.get(field));
        let (start, end) = (number("start")?, number("end")?);
        if start >= end {
            return Err(self
                .object
                .reject(&format!("{at}.end"), &format!("{end} is not above start, {start}")));
        }
        Ok(PortMatch::Range(protocol, start, end))
    }

    fn port_v1alpha1(&self, at: &str, value: &Value) -> Result<Option<PortMatch>, Rejection> {
        Ok(match self.one(at, value)? {
            Some(("portNumber", port)) => {
                let at = format!("{at}.portNumber");
                let protocol = self.object.protocol(&at, port)?;
                let number = port_number(&self.object, &format!("{at}.port"), port.get("port"))?;
                Some(PortMatch::Range(protocol, number, number))
            }
            Some(("portRange", range)) => {
                let at = format!("{at}.portRange");
                let protocol = self.object.protocol(&at, range)?;
                Some(self.range(&at, range, protocol)?)
            }
            Some(("namedPort", name)) => {
                let name = self.object.text(&format!("{at}.namedPort"), name)?;
                Some(PortMatch::Named { name: name.to_owned(), protocol: None })
            }
            _ => None,
        })
    }
}

/// "For Accept rules, fail closed means to match no traffic; for Deny and Pass rules, to deny all."
fn fail_closed(rule: Rule) -> Rule {
    if rule.not_understood.is_empty() {
        return rule;
    }
    match rule.action {
        Action::Accept => Rule { peers: Some(Vec::new()), ..rule },
        Action::Deny | Action::Pass => Rule { action: Action::Deny, peers: None, ports: None, ..rule },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[expect(clippy::needless_pass_by_value, reason = "callers write the value in place")]
    fn parse(kind: &str, spec: Value) -> Result<ClusterNetworkPolicy, Rejection> {
        ClusterNetworkPolicy::parse(&json!({"kind": kind, "metadata": {"name": "p"}, "spec": spec}))
    }

    #[expect(clippy::needless_pass_by_value, reason = "callers write the value in place")]
    fn egress(rule: Value) -> Result<ClusterNetworkPolicy, Rejection> {
        parse(
            "ClusterNetworkPolicy",
            json!({"tier": "Admin", "priority": 5, "subject": {"namespaces": {}}, "egress": [rule]}),
        )
    }

    #[test]
    fn both_spellings_come_to_the_same() {
        let new = egress(json!({"action": "Accept", "to": [{"networks": ["10.0.0.0/8"]}],
            "protocols": [{"tcp": {"destinationPort": {"number": 80}}}, {"destinationNamedPort": "web"},
                {"udp": {"destinationPort": {"range": {"start": 5, "end": 9}}}}]}))
        .unwrap();
        let old = parse(
            "AdminNetworkPolicy",
            json!({"priority": 5, "subject": {"namespaces": {}}, "egress": [{"action": "Allow",
                "to": [{"networks": ["10.0.0.0/8"]}],
                "ports": [{"portNumber": {"protocol": "TCP", "port": 80}}, {"namedPort": "web"},
                    {"portRange": {"protocol": "UDP", "start": 5, "end": 9}}]}]}),
        )
        .unwrap();
        assert_eq!(old, ClusterNetworkPolicy { kind: "AdminNetworkPolicy", ..new });
        let baseline = json!({"subject": {"pods": {"podSelector": {}, "namespaceSelector": {}}}});
        assert_eq!(parse("BaselineAdminNetworkPolicy", baseline).unwrap().tier, Tier::Baseline);
    }

    #[test]
    fn what_is_not_understood_fails_closed() {
        for peer in [json!({}), json!({"domainNames": ["example.com"]}), json!({"future": {}})] {
            let all = json!({"namespaces": {}});
            let accept = egress(json!({"action": "Accept", "to": [all, peer]})).unwrap();
            assert_eq!(accept.egress[0].peers, Some(Vec::new()), "{peer}");
            for action in ["Deny", "Pass"] {
                let rule = &egress(json!({"action": action, "to": [peer],
                    "protocols": [{"tcp": {"destinationPort": {"number": 1}}}]}))
                .unwrap()
                .egress[0];
                assert_eq!((rule.action, &rule.peers, &rule.ports), (Action::Deny, &None, &None));
                assert_eq!(rule.not_understood.len(), 1);
            }
        }
        let odd =
            egress(json!({"action": "Deny", "to": [{"nodes": {}}], "protocols": [{"icmp": {}}]})).unwrap();
        assert_eq!(
            odd.egress[0].not_understood,
            ["spec.egress[0].protocols[0].icmp".trim_end_matches(".icmp")]
        );
    }

    #[test]
    fn what_the_definition_refuses_is_refused_by_field() {
        let ok = json!({"namespaces": {}});
        let many = vec![ok.clone(); 26];
        for (rule, field) in [
            (json!({"to": [ok]}), "action"),
            (json!({"action": "Allow", "to": [ok]}), "action"),
            (json!({"action": "Deny", "to": []}), "to"),
            (json!({"action": "Deny", "to": many}), "to"),
            (json!({"action": "Deny", "to": [{"namespaces": {}, "nodes": {}}]}), "to[0]"),
            (json!({"action": "Deny", "to": [{"networks": ["10.0.0.0/33"]}]}), "to[0].networks[0]"),
            (
                json!({"action": "Deny", "to": [ok], "protocols": [{"tcp": {"destinationPort": {"range": {"start": 5, "end": 5}}}}]}),
                "protocols[0].tcp.destinationPort.range.end",
            ),
            (
                json!({"action": "Deny", "to": [ok], "protocols": [{"tcp": {"destinationPort": {"number": 0}}}]}),
                "protocols[0].tcp.destinationPort.number",
            ),
        ] {
            let rejection = egress(rule.clone()).unwrap_err();
            assert_eq!(rejection.field, format!("spec.egress[0].{field}"), "{rule}");
        }
        for (spec, field) in [
            (json!({"priority": 1, "subject": ok}), "spec.tier"),
            (json!({"tier": "Admin", "subject": ok}), "spec.priority"),
            (json!({"tier": "Admin", "priority": 1001, "subject": ok}), "spec.priority"),
            (json!({"tier": "Admin", "priority": 1}), "spec.subject"),
            (json!({"tier": "Admin", "priority": 1, "subject": {}}), "spec.subject"),
        ] {
            assert_eq!(parse("ClusterNetworkPolicy", spec).unwrap_err().field, field);
        }
    }
}
