//! An EndpointSlice: some of the endpoints of a Service (KEP-752).

use std::{net::IpAddr, sync::Arc};

use serde_json::{Map, Value};

use crate::{
    Rejection,
    net::{Family, Protocol, address},
    read::{Object, type_name},
};

/// Label that names the Service of a slice.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// `addressType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressType {
    /// Addresses of one family.
    Ip(Family),
    /// Names, which a proxy has no use for.
    Fqdn,
}

/// One of `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    /// Name; empty when it has none.
    pub name: Arc<str>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Number.
    pub port: u16,
}

/// Where an endpoint should be used from (KEP-2433, KEP-3015).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// `hints.forZones[].name`.
    pub zones: Box<[Arc<str>]>,
    /// `hints.forNodes[].name`.
    pub nodes: Box<[Arc<str>]>,
}

/// One of `endpoints`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `addresses[0]`: the only one, as there is one per endpoint and family.
    pub addr: IpAddr,
    /// `conditions.ready`, absent meaning ready (unless `serving` is false).
    pub ready: bool,
    /// `conditions.serving`, absent meaning what `ready` says.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `zone`.
    pub zone: Option<Arc<str>>,
    /// `hints`, when there are any.
    pub hints: Option<Box<Hints>>,
    /// `targetRef.name` of a Pod.
    pub pod: Option<Box<str>>,
    /// `hostname`: its name under that of its Service.
    pub hostname: Option<Box<str>>,
}

impl Endpoint {
    /// `hints.forZones[].name`; empty when there are none.
    pub fn zone_hints(&self) -> &[Arc<str>] {
        self.hints.as_ref().map_or(&[], |hints| &hints.zones)
    }

    /// `hints.forNodes[].name`; empty when there are none.
    pub fn node_hints(&self) -> &[Arc<str>] {
        self.hints.as_ref().map_or(&[], |hints| &hints.nodes)
    }
}

/// What the service proxy needs of an EndpointSlice object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// The Service it is of ([`SERVICE_NAME_LABEL`]); `None` when it is of none.
    pub service: Option<String>,
    /// `addressType`.
    pub address_type: AddressType,
    /// `endpoints` with a valid address.
    pub endpoints: Vec<Endpoint>,
    /// `ports` with a number (one without means every port, which is for headless Services only).
    pub ports: Vec<EndpointPort>,
    /// Entries of lists that are malformed and left out.
    pub refused: Vec<Rejection>,
}

impl EndpointSlice {
    /// Reads an EndpointSlice object. Without `addressType`, the first endpoint's address says which.
    ///
    /// An endpoint or a port that is malformed is left out and recorded in [`EndpointSlice::refused`].
    ///
    /// # Errors
    /// The first other field that is malformed.
    pub fn parse(value: &Value) -> Result<Self, Rejection> {
        let object = Object::new("EndpointSlice", value);
        let name = object.name()?;
        let namespace = object.namespace()?;
        let service = object.label(SERVICE_NAME_LABEL)?.filter(|s| !s.is_empty()).map(str::to_owned);
        let listed = object.array("/endpoints")?;
        let address_type = address_type(&object, listed)?;
        let mut reader = Reader { object, names: Vec::new(), refused: Vec::new() };
        let endpoints = match address_type {
            AddressType::Ip(family) => reader.endpoints(listed, family),
            AddressType::Fqdn => Vec::new(),
        };
        let ports = reader.ports()?;
        Ok(Self { namespace, name, service, address_type, endpoints, ports, refused: reader.refused })
    }
}

fn address_type(object: &Object<'_>, endpoints: &[Value]) -> Result<AddressType, Rejection> {
    match object.string("/addressType")? {
        Some("IPv4") => Ok(AddressType::Ip(Family::V4)),
        Some("IPv6") => Ok(AddressType::Ip(Family::V6)),
        Some("FQDN") => Ok(AddressType::Fqdn),
        None | Some("") => {
            let first = endpoints.first().and_then(|e| e.pointer("/addresses/0")).and_then(Value::as_str);
            Ok(AddressType::Ip(first.and_then(address).map_or(Family::V4, |ip| Family::of(&ip))))
        }
        Some(other) => Err(object.reject("addressType", &format!("{other:?} is none of IPv4, IPv6, FQDN"))),
    }
}

/// The rest of the path of a field, and what is wrong with it.
type Wrong = (String, String);

fn wrong(field: &str, found: &Value, expected: &str) -> Wrong {
    (field.to_owned(), format!("is {}, not {expected}", type_name(found)))
}

fn object<'a>(field: &str, value: Option<&'a Value>) -> Result<Option<&'a Map<String, Value>>, Wrong> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(other) => Err(wrong(field, other, "an object")),
    }
}

fn list<'a>(field: &str, value: Option<&'a Value>) -> Result<&'a [Value], Wrong> {
    match value {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(wrong(field, other, "a list")),
    }
}

fn boolean(field: &str, value: Option<&Value>) -> Result<Option<bool>, Wrong> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(other) => Err(wrong(field, other, "a boolean")),
    }
}

/// Empty is absent.
fn string<'a>(field: &str, value: Option<&'a Value>) -> Result<Option<&'a str>, Wrong> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(other) => Err(wrong(field, other, "a string")),
    }
}

struct Reader<'a> {
    object: Object<'a>,
    /// Names of nodes and zones seen, to be shared: many endpoints have few of them.
    names: Vec<Arc<str>>,
    refused: Vec<Rejection>,
}

impl<'a> Reader<'a> {
    fn endpoints(&mut self, listed: &'a [Value], family: Family) -> Vec<Endpoint> {
        let mut endpoints = Vec::with_capacity(listed.len());
        for (i, entry) in listed.iter().enumerate() {
            match self.endpoint(entry, family) {
                Ok(endpoint) => endpoints.extend(endpoint),
                Err((field, cause)) => {
                    self.refused.push(self.object.reject(&format!("endpoints[{i}]{field}"), &cause));
                }
            }
        }
        endpoints
    }

    /// `None` for an endpoint without an address: nothing can be sent there. The error is the rest of the field's path,
    /// and the cause; there are very many endpoints, and hardly ever one that is wrong.
    fn endpoint(&mut self, entry: &'a Value, family: Family) -> Result<Option<Endpoint>, Wrong> {
        let Some(entry) = entry.as_object() else { return Err(wrong("", entry, "an object")) };
        let addresses = list(".addresses", entry.get("addresses"))?;
        let Some(first) = addresses.first() else { return Ok(None) };
        let at = ".addresses[0]";
        let text = first.as_str().ok_or_else(|| wrong(at, first, "a string"))?;
        let refuse = |cause: String| (at.to_owned(), cause);
        let addr = address(text).ok_or_else(|| refuse(format!("{text:?} is not an IP address")))?;
        if Family::of(&addr) != family {
            return Err(refuse(format!("{addr} is not {family}, which addressType says")));
        }
        if !may_be_endpoint(&addr) {
            return Err(refuse(format!(
                "{addr} cannot be an endpoint: it would mean the node itself or its link"
            )));
        }
        let [mut ready, mut serving, mut terminating] = [None; 3];
        if let Some(conditions) = object(".conditions", entry.get("conditions"))? {
            ready = boolean(".conditions.ready", conditions.get("ready"))?;
            serving = boolean(".conditions.serving", conditions.get("serving"))?;
            terminating = boolean(".conditions.terminating", conditions.get("terminating"))?;
        }
        let node = string(".nodeName", entry.get("nodeName"))?;
        let zone = string(".zone", entry.get("zone"))?;
        let pod = match object(".targetRef", entry.get("targetRef"))? {
            Some(target) if target.get("kind").and_then(Value::as_str) == Some("Pod") => {
                string(".targetRef.name", target.get("name"))?.map(Box::from)
            }
            _ => None,
        };
        let hostname = string(".hostname", entry.get("hostname"))?.map(Box::from);
        let hints = self.hints(entry.get("hints"))?;
        Ok(Some(Endpoint {
            addr,
            // Unknown is ready, but nobody can be ready without serving.
            ready: ready.unwrap_or(serving != Some(false)),
            serving: serving.unwrap_or(ready != Some(false)),
            terminating: terminating.unwrap_or(false),
            node: node.map(|name| self.shared(name)),
            zone: zone.map(|name| self.shared(name)),
            hints,
            pod,
            hostname,
        }))
    }

    fn hints(&mut self, value: Option<&'a Value>) -> Result<Option<Box<Hints>>, Wrong> {
        let Some(hints) = object(".hints", value)? else { return Ok(None) };
        let mut names = |key: &str| {
            let at = |rest: &str| format!(".hints.{key}{rest}");
            let listed = list(&at(""), hints.get(key))?;
            let mut names: Vec<Arc<str>> = Vec::with_capacity(listed.len());
            for (i, item) in listed.iter().enumerate() {
                let name = item.get("name").unwrap_or(&Value::Null);
                let text =
                    name.as_str().ok_or_else(|| wrong(&at(&format!("[{i}].name")), name, "a string"))?;
                names.push(shared(&mut self.names, text));
            }
            Ok::<Box<[Arc<str>]>, Wrong>(names.into())
        };
        let hints = Hints { zones: names("forZones")?, nodes: names("forNodes")? };
        Ok((hints != Hints::default()).then(|| Box::new(hints)))
    }

    fn ports(&mut self) -> Result<Vec<EndpointPort>, Rejection> {
        let mut ports = Vec::new();
        for (i, entry) in self.object.array("/ports")?.iter().enumerate() {
            match self.port(&format!("ports[{i}]"), entry) {
                Ok(port) => ports.extend(port),
                Err(rejection) => self.refused.push(rejection),
            }
        }
        Ok(ports)
    }

    fn port(&mut self, at: &str, entry: &'a Value) -> Result<Option<EndpointPort>, Rejection> {
        if !entry.is_object() {
            return Err(self.object.reject(at, &format!("is {}, not an object", type_name(entry))));
        }
        let protocol = self.object.protocol(at, entry)?;
        let Some(port) = self.object.port_value(&format!("{at}.port"), entry.get("port"))? else {
            return Ok(None);
        };
        let name = match entry.get("name") {
            None | Some(Value::Null) => "",
            Some(name) => self.object.text(&format!("{at}.name"), name)?,
        };
        Ok(Some(EndpointPort { name: name.into(), protocol, port }))
    }

    fn shared(&mut self, name: &str) -> Arc<str> {
        shared(&mut self.names, name)
    }
}

fn shared(names: &mut Vec<Arc<str>>, name: &str) -> Arc<str> {
    // The last ones are the likeliest, and a slice of a thousand nodes must not cost a million comparisons.
    if let Some(known) = names.iter().rev().take(16).find(|known| &***known == name) {
        return Arc::clone(known);
    }
    let new: Arc<str> = name.into();
    names.push(Arc::clone(&new));
    new
}

/// What the API refuses as an endpoint, too: addresses that mean something else on every node.
fn may_be_endpoint(addr: &IpAddr) -> bool {
    let link_local = match addr {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(link_local || addr.is_unspecified() || addr.is_loopback() || addr.is_multicast())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn slice(fields: &Value) -> Result<EndpointSlice, Rejection> {
        let mut value = json!({"metadata": {"namespace": "default", "name": "web-1",
            "labels": {"kubernetes.io/service-name": "web"}}});
        value.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        EndpointSlice::parse(&value)
    }

    #[test]
    fn endpoints_are_read() {
        let parsed = slice(&json!({
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080}, {"name": null, "protocol": "UDP", "port": 53}, {"name": "any", "port": null}],
            "endpoints": [
                {"addresses": ["10.244.0.1"], "nodeName": "n1", "zone": "a", "targetRef": {"kind": "Pod", "name": "web-0"},
                 "hints": {"forZones": [{"name": "a"}], "forNodes": [{"name": "n1"}]}},
                {"addresses": ["10.244.00.002"], "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["10.244.0.3"], "conditions": {"ready": false}},
                {"addresses": ["10.244.0.4"], "conditions": {"serving": false}},
                {"addresses": []},
            ],
        }))
        .unwrap();
        assert_eq!(parsed.service.as_deref(), Some("web"));
        assert_eq!(
            parsed.ports.iter().map(|p| (&*p.name, p.port)).collect::<Vec<_>>(),
            [("http", 8080), ("", 53)]
        );
        let states: Vec<_> = parsed.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating)).collect();
        assert_eq!(
            states,
            [(true, true, false), (false, true, true), (false, false, false), (false, false, false)]
        );
        let first = &parsed.endpoints[0];
        assert_eq!(
            (first.zone_hints().len(), first.node_hints().len(), first.pod.as_deref()),
            (1, 1, Some("web-0"))
        );
        assert_eq!(parsed.endpoints[1].addr, IpAddr::from([10, 244, 0, 2]));
    }

    #[test]
    fn what_is_malformed_is_named_and_costs_itself() {
        for (fields, field, cause) in [
            (json!({"addressType": "IPv5"}), "addressType", "none of IPv4"),
            (json!({"endpoints": "all"}), "endpoints", "not a list"),
            (json!({"ports": {}}), "ports", "not a list"),
        ] {
            let rejection = slice(&fields).unwrap_err();
            assert_eq!(rejection.field, field);
            assert!(rejection.cause.contains(cause), "{rejection}");
            assert!(rejection.to_string().starts_with("EndpointSlice default/web-1: "), "{rejection}");
        }
        let parsed = slice(&json!({
            "addressType": "IPv4",
            "ports": [{"port": 80}, {"port": 99_999}, 7, {"port": 1, "protocol": "tcp"}, {"port": 2, "name": 3}],
            "endpoints": [
                {"addresses": ["10.0.0.1"]}, {"addresses": ["nine"]}, {"addresses": ["fd00::1"]}, {"addresses": ["127.0.0.1"]},
                {"addresses": ["169.254.169.254"]}, {"addresses": ["10.0.0.2"], "conditions": {"ready": "yes"}},
                {"addresses": ["10.0.0.3"], "nodeName": 7}, {"addresses": ["10.0.0.4"], "hints": {"forZones": [{}]}}, null,
                {"addresses": "10.0.0.5"},
            ],
        }))
        .unwrap();
        assert_eq!((parsed.endpoints.len(), parsed.ports.len()), (1, 1));
        let fields: Vec<&str> = parsed.refused.iter().map(|r| r.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "endpoints[1].addresses[0]",
                "endpoints[2].addresses[0]",
                "endpoints[3].addresses[0]",
                "endpoints[4].addresses[0]",
                "endpoints[5].conditions.ready",
                "endpoints[6].nodeName",
                "endpoints[7].hints.forZones[0].name",
                "endpoints[8]",
                "endpoints[9].addresses",
                "ports[1].port",
                "ports[2]",
                "ports[3].protocol",
                "ports[4].name",
            ]
        );
    }

    #[test]
    fn without_a_type_the_addresses_say_it() {
        let of = |addr: &str| slice(&json!({"endpoints": [{"addresses": [addr]}]})).unwrap().address_type;
        assert_eq!(of("10.0.0.1"), AddressType::Ip(Family::V4));
        assert_eq!(of("fd00::1"), AddressType::Ip(Family::V6));
        let names =
            slice(&json!({"addressType": "FQDN", "endpoints": [{"addresses": ["example.org"]}]})).unwrap();
        assert_eq!((names.address_type, names.endpoints.len()), (AddressType::Fqdn, 0));
    }
}
