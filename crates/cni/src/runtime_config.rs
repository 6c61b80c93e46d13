//! `runtimeConfig`: what the runtime asks for by capability (CNI conventions, "Dynamic Plugin specific fields").
//! The capabilities are `portMappings` and `bandwidth`; every other one is refused by name.
//!
//! Within these two, names are taken in whatever case: containerd writes `HostPort` and `IngressRate`.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{is_nothing, wrong};
use crate::error::{CniError, code};

/// The capabilities that this plugin has.
pub const CAPABILITIES: [&str; 2] = ["portMappings", "bandwidth"];
/// Most port mappings of one attachment.
pub const PORT_MAPPINGS_MAX: usize = 4096;
/// Least rate, in bits a second: what Kubernetes takes at least, too.
pub const RATE_MIN: u64 = 1_000;
/// Largest rate, in bits a second: what Kubernetes takes at most, too.
pub const RATE_MAX: u64 = 1_000_000_000_000_000;
/// Largest burst, in bits: what the kernel counts in 32 bits of bytes.
pub const BURST_MAX: u64 = 8 * u32::MAX as u64;

/// What the runtime asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeConfig {
    /// Ports of the node that lead to the container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
    /// Limits of what the container may send and gets.
    #[serde(default, skip_serializing_if = "Bandwidth::is_unlimited")]
    pub bandwidth: Bandwidth,
}

/// A port of the node that leads to a port of the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Port of the node, not 0.
    pub host_port: u16,
    /// Port of the container, not 0.
    pub container_port: u16,
    /// Protocol.
    pub protocol: Protocol,
    /// Address of the node; unspecified for every one of this family, none for every one of all families.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// Protocol of a port mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Limits as seen by the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Of what it gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Limit>,
    /// Of what it sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Limit>,
}

/// A limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Bits a second.
    pub rate: u64,
    /// Bits that may pass at once after a rest.
    pub burst: u64,
}

impl RuntimeConfig {
    /// Reads `runtimeConfig`.
    ///
    /// # Errors
    /// Code 2 for a capability, or a field of one, that this plugin does not have; 7 for a value that cannot be.
    pub fn parse(value: Option<&Value>) -> Result<Self, CniError> {
        let object = match value {
            None | Some(Value::Null) => return Ok(Self::default()),
            Some(Value::Object(object)) => object,
            Some(other) => return Err(wrong("runtimeConfig", other, "an object")),
        };
        let mut config = Self::default();
        for (key, value) in object {
            match key.as_str() {
                "portMappings" => config.port_mappings = port_mappings(value)?,
                "bandwidth" => config.bandwidth = bandwidth(value)?,
                _ if is_nothing(value) => {}
                _ => return Err(no_capability("runtimeConfig", key, value)),
            }
        }
        Ok(config)
    }

    /// Whether nothing is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Checks `capabilities`, which runtimes keep to themselves as a rule.
pub(crate) fn check_capabilities(value: &Value) -> Result<(), CniError> {
    let Value::Object(object) = value else { return Err(wrong("capabilities", value, "an object")) };
    match object.iter().find(|(key, value)| !is_nothing(value) && !CAPABILITIES.contains(&key.as_str())) {
        Some((key, value)) => Err(no_capability("capabilities", key, value)),
        None => Ok(()),
    }
}

fn no_capability(field: &str, key: &str, value: &Value) -> CniError {
    let msg = format!("field \"{field}.{key}\" with value {value} is not supported");
    CniError::new(code::UNSUPPORTED_FIELD, msg).details(format!(
        "the capabilities of this plugin are {}; declare others at the plugin in the chain that has them",
        CAPABILITIES.join(" and ")
    ))
}

impl PortMapping {
    /// Whether both claim a port of the same address.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let every = |ip: &Option<IpAddr>| ip.is_none_or(|ip| ip.is_unspecified());
        let family = match (self.host_ip, other.host_ip) {
            (Some(a), Some(b)) => a.is_ipv4() == b.is_ipv4(),
            _ => true,
        };
        let address = every(&self.host_ip) || every(&other.host_ip) || self.host_ip == other.host_ip;
        self.host_port == other.host_port && self.protocol == other.protocol && family && address
    }
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            Some(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}/{}", self.host_port, self.protocol),
            Some(IpAddr::V4(ip)) => write!(f, "{ip}:{}/{}", self.host_port, self.protocol),
            None => write!(f, "{}/{}", self.host_port, self.protocol),
        }
    }
}

impl Protocol {
    /// Its name in lower case, as nft writes it, too.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }

    /// The protocol of a name, in whatever case.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Tcp, Self::Udp, Self::Sctp].into_iter().find(|p| p.name().eq_ignore_ascii_case(name))
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Bandwidth {
    /// Whether there is no limit.
    #[must_use]
    pub fn is_unlimited(&self) -> bool {
        self.ingress.is_none() && self.egress.is_none()
    }
}

fn port_mappings(value: &Value) -> Result<Vec<PortMapping>, CniError> {
    const FIELD: &str = "runtimeConfig.portMappings";
    let list = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list,
        other => return Err(wrong(FIELD, other, "a list")),
    };
    if list.len() > PORT_MAPPINGS_MAX {
        let msg = format!("{FIELD} has {} entries; at most {PORT_MAPPINGS_MAX} are taken", list.len());
        return Err(CniError::new(code::INVALID_CONFIG, msg));
    }
    let mut mappings: Vec<PortMapping> = Vec::with_capacity(list.len());
    for (position, entry) in list.iter().enumerate() {
        let field = format!("{FIELD}[{position}]");
        let mapping = port_mapping(&field, entry)?;
        if let Some(first) = mappings.iter().position(|m| m.overlaps(&mapping)) {
            let msg = format!("{field} claims {mapping}, which {FIELD}[{first}] has claimed already");
            return Err(CniError::new(code::INVALID_CONFIG, msg));
        }
        mappings.push(mapping);
    }
    Ok(mappings)
}

fn port_mapping(field: &str, value: &Value) -> Result<PortMapping, CniError> {
    let Value::Object(object) = value else {
        return Err(wrong(field, value, "an object of hostPort, containerPort, protocol and hostIP"));
    };
    known(field, object, &["hostPort", "containerPort", "protocol", "hostIP"])?;
    let port = |key: &str| {
        let value = field_of(object, key).unwrap_or(&Value::Null);
        let number = value.as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0);
        number.ok_or_else(|| wrong(&format!("{field}.{key}"), value, "a port, 1 to 65535"))
    };
    let protocol = match field_of(object, "protocol") {
        // As in a Pod.
        None | Some(Value::Null) => Protocol::Tcp,
        Some(value) => value
            .as_str()
            .and_then(|name| if name.is_empty() { Some(Protocol::Tcp) } else { Protocol::parse(name) })
            .ok_or_else(|| wrong(&format!("{field}.protocol"), value, "tcp, udp or sctp"))?,
    };
    let host_ip = match field_of(object, "hostIP") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) if text.is_empty() => None,
        Some(value) => {
            let ip = value.as_str().and_then(|text| text.parse::<IpAddr>().ok());
            let ip = ip
                .ok_or_else(|| wrong(&format!("{field}.hostIP"), value, "an address of this node"))?
                .to_canonical();
            if ip.is_multicast() || (ip.is_ipv6() && ip.is_loopback()) {
                let rule = "an address of this node that its kernel can translate: no group, and not ::1";
                return Err(wrong(&format!("{field}.hostIP"), value, rule));
            }
            Some(ip)
        }
    };
    Ok(PortMapping {
        host_port: port("hostPort")?,
        container_port: port("containerPort")?,
        protocol,
        host_ip,
    })
}

fn bandwidth(value: &Value) -> Result<Bandwidth, CniError> {
    const FIELD: &str = "runtimeConfig.bandwidth";
    let object = match value {
        Value::Null => return Ok(Bandwidth::default()),
        Value::Object(object) => object,
        other => return Err(wrong(FIELD, other, "an object of rates and bursts")),
    };
    known(FIELD, object, &["ingressRate", "ingressBurst", "egressRate", "egressBurst"])?;
    let number = |key: &str, max: u64, rule: &str| match field_of(object, key) {
        None | Some(Value::Null) => Ok(0),
        Some(value) => value
            .as_u64()
            .filter(|n| *n <= max)
            .ok_or_else(|| wrong(&format!("{FIELD}.{key}"), value, &format!("{rule}, 0 to {max}"))),
    };
    let limit = |direction: &str| {
        let (rate_key, burst_key) = (format!("{direction}Rate"), format!("{direction}Burst"));
        let rate = number(&rate_key, RATE_MAX, "a number of bits a second")?;
        let burst = number(&burst_key, BURST_MAX, "a number of bits")?;
        match (rate, burst) {
            (0, 0) => Ok(None),
            (rate, 0) => Err(half(&rate_key, rate, &burst_key)),
            (0, burst) => Err(half(&burst_key, burst, &rate_key)),
            (rate, _) if rate < RATE_MIN => {
                let rule = format!("0, or at least {RATE_MIN} bits a second");
                Err(wrong(&format!("{FIELD}.{rate_key}"), &rate.into(), &rule))
            }
            (rate, burst) => Ok(Some(Limit { rate, burst })),
        }
    };
    Ok(Bandwidth { ingress: limit("ingress")?, egress: limit("egress")? })
}

fn half(given: &str, value: u64, missing: &str) -> CniError {
    let msg = format!(
        "field runtimeConfig.bandwidth.{given} is {value} and {missing} is 0; a limit needs both, none needs neither"
    );
    CniError::new(code::INVALID_CONFIG, msg)
}

fn field_of<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

/// Refuses fields that would otherwise be ignored in silence.
fn known(field: &str, object: &Map<String, Value>, names: &[&str]) -> Result<(), CniError> {
    let is_known = |key: &str| names.iter().any(|name| name.eq_ignore_ascii_case(key));
    match object.iter().find(|(key, value)| !is_known(key) && !is_nothing(value)) {
        Some((key, value)) => Err(CniError::new(
            code::UNSUPPORTED_FIELD,
            format!("field \"{field}.{key}\" with value {value} is not supported"),
        )
        .details(format!("known fields are {}", names.join(", ")))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_runtimes_send_is_read() {
        let config = json!({
            "portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
                {"hostPort": 8080, "containerPort": 53, "protocol": "UDP", "hostIP": ""},
                {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
                {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "10.0.0.1"},
                {"HostPort": 53, "ContainerPort": 53, "Protocol": "udp", "HostIP": "::"},
            ],
            "bandwidth": {"IngressRate": 1_000_000, "IngressBurst": u32::MAX, "EgressRate": 0, "EgressBurst": 0},
            "ips": [],
        });
        let config = RuntimeConfig::parse(Some(&config)).unwrap();
        let shown: Vec<String> = config.port_mappings.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["8080/tcp", "8080/udp", "127.0.0.1:53/udp", "10.0.0.1:53/udp", "[::]:53/udp"]);
        let ingress = Some(Limit { rate: 1_000_000, burst: u64::from(u32::MAX) });
        assert_eq!(config.bandwidth, Bandwidth { ingress, egress: None });
        let again: RuntimeConfig = serde_json::from_value(json!(config)).unwrap();
        assert_eq!(again, config);
        for nothing in [json!(null), json!({}), json!({"portMappings": null, "bandwidth": null})] {
            assert!(RuntimeConfig::parse(Some(&nothing)).unwrap().is_empty());
        }
        assert!(check_capabilities(&json!({"portMappings": true, "bandwidth": true, "mac": false})).is_ok());
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let ports = |ports: Value| json!({"portMappings": ports});
        let rates = |rates: Value| json!({"bandwidth": rates});
        let good = json!({"hostPort": 1, "containerPort": 1});
        for (value, code, part) in [
            (json!([]), 7, "runtimeConfig is []"),
            (json!({"mac": "02:00:00:00:00:01"}), 2, "runtimeConfig.mac"),
            (ports(json!({})), 7, "portMappings is {}; it must be a list"),
            (ports(json!([7])), 7, "portMappings[0] is 7"),
            (ports(json!([{"containerPort": 80}])), 7, "[0].hostPort is null; it must be a port"),
            (ports(json!([{"hostPort": 0, "containerPort": 80}])), 7, "[0].hostPort is 0"),
            (ports(json!([{"hostPort": 80, "containerPort": 0}])), 7, "[0].containerPort is 0"),
            (ports(json!([good, {"hostPort": 65536, "containerPort": 80}])), 7, "[1].hostPort is 65536"),
            (ports(json!([{"hostPort": "80", "containerPort": 80}])), 7, "[0].hostPort is \"80\""),
            (ports(json!([{"hostPort": 80, "containerPort": 80, "protocol": "icmp"}])), 7, "[0].protocol"),
            (ports(json!([{"hostPort": 80, "containerPort": 80, "hostIP": "here"}])), 7, "[0].hostIP"),
            (ports(json!([{"hostPort": 80, "containerPort": 80, "hostIP": "::1"}])), 7, "not ::1"),
            (ports(json!([{"hostPort": 80, "containerPort": 80, "hostIP": "224.0.0.1"}])), 7, "no group"),
            (ports(json!([{"hostPort": 80, "containerPort": 80, "range": 2}])), 2, "portMappings[0].range"),
            (
                ports(json!([good, {"hostPort": 1, "containerPort": 2, "hostIP": "10.0.0.1"}])),
                7,
                "[1] claims 10.0.0.1:1/tcp, which runtimeConfig.portMappings[0]",
            ),
            (rates(json!([])), 7, "bandwidth is []"),
            (rates(json!({"ingressRate": 1_000_000})), 7, "ingressRate is 1000000 and ingressBurst is 0"),
            (rates(json!({"egressBurst": 1_000_000})), 7, "egressBurst is 1000000 and egressRate is 0"),
            (rates(json!({"egressRate": 999, "egressBurst": 999})), 7, "at least 1000 bits"),
            (rates(json!({"egressRate": -1, "egressBurst": 9})), 7, "egressRate is -1"),
            (rates(json!({"egressRate": 1.5, "egressBurst": 9})), 7, "egressRate is 1.5"),
            (rates(json!({"egressRate": u64::MAX, "egressBurst": 9})), 7, "0 to 1000000000000000"),
            (
                rates(json!({"egressRate": 5000, "egressBurst": 8 * (1_u64 << 32)})),
                7,
                "egressBurst is 34359738368",
            ),
            (rates(json!({"rate": 5})), 2, "bandwidth.rate"),
        ] {
            let error = RuntimeConfig::parse(Some(&value)).unwrap_err();
            assert_eq!(error.code, code, "{value}: {error}");
            assert!(error.to_string().contains(part), "{value}: {error}");
        }
        let many: Vec<Value> = vec![good; PORT_MAPPINGS_MAX + 1];
        let error = RuntimeConfig::parse(Some(&ports(json!(many)))).unwrap_err();
        assert!(error.msg.contains("4097 entries"), "{error}");
        assert_eq!(check_capabilities(&json!({"ips": true})).unwrap_err().code, 2);
        assert_eq!(check_capabilities(&json!(true)).unwrap_err().code, 7);
    }

    #[test]
    fn overlaps_are_those_of_the_node() {
        let mapping = |ip: &str, port, protocol| PortMapping {
            host_port: port,
            container_port: 1,
            protocol,
            host_ip: (!ip.is_empty()).then(|| ip.parse().unwrap()),
        };
        let tcp = |ip| mapping(ip, 80, Protocol::Tcp);
        for (a, b, overlap) in [
            (tcp(""), tcp(""), true),
            (tcp(""), tcp("10.0.0.1"), true),
            (tcp("0.0.0.0"), tcp("10.0.0.1"), true),
            (tcp("::"), tcp(""), true),
            (tcp("0.0.0.0"), tcp("::"), false),
            (tcp("10.0.0.1"), tcp("10.0.0.1"), true),
            (tcp("10.0.0.1"), tcp("10.0.0.2"), false),
            (tcp("10.0.0.1"), tcp("fd00::1"), false),
            (tcp(""), mapping("", 80, Protocol::Udp), false),
            (tcp(""), mapping("", 81, Protocol::Tcp), false),
        ] {
            assert_eq!((a.overlaps(&b), b.overlaps(&a)), (overlap, overlap), "{a} {b}");
        }
    }
}
