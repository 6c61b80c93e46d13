//! The network configuration that the runtime writes to the plugin's standard input (CNI specification,
//! section 1 and section 3), checked.

use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::environment::{Operation, check_container_id, check_ifname};
use crate::error::{CniError, code};
use crate::result::Dns;
use crate::runtime_config::{RuntimeConfig, check_capabilities};
use crate::version::Version;

/// The agent's socket when the configuration names none.
pub const DEFAULT_SOCKET: &str = "/run/podway/node/agent.sock";
/// Largest configuration taken from standard input, in bytes.
pub const CONFIG_MAX: usize = 512 << 10;
/// Most attachments in a GC.
pub const ATTACHMENTS_MAX: usize = 8192;

/// A container's interface, as the runtime knows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    /// Container id.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// Interface name in the container.
    pub ifname: String,
}

/// The configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct NetConf {
    /// `cniVersion`: how to answer.
    pub version: Version,
    /// `name` of the network.
    pub name: String,
    /// `socket` of the agent.
    pub socket: PathBuf,
    /// `dns`, handed on in the result.
    pub dns: Dns,
    /// `prevResult`: what the plugins before us in the chain made, or for CHECK and DEL what ADD gave.
    pub prev_result: Option<Map<String, Value>>,
    /// `runtimeConfig`: what the runtime asks for by capability; empty for DEL and GC.
    pub runtime: RuntimeConfig,
    /// `cni.dev/valid-attachments`, for GC.
    pub valid_attachments: Option<Vec<Attachment>>,
}

impl NetConf {
    /// Decodes and checks the configuration for an operation.
    ///
    /// # Errors
    /// Code 6 when it is no JSON object; 1 for a version that is not supported or does not have the
    /// operation; 2 for a field that is not supported (with key and value); 7 for a field that is wrong or
    /// missing.
    pub fn parse(input: &[u8], operation: Operation) -> Result<Self, CniError> {
        let object = decode_object(input)?;
        let version = version_of(&object, operation)?;
        // A container must be removable whatever the configuration has become since.
        let mut runtime = RuntimeConfig::default();
        if !matches!(operation, Operation::Del | Operation::Gc) {
            check_fields(&object)?;
            runtime = RuntimeConfig::parse(object.get("runtimeConfig"))?;
        }
        let name = match object.get("name") {
            Some(Value::String(name)) => name,
            Some(other) => return Err(wrong("name", other, "a string")),
            None => return Err(missing("name", operation)),
        };
        check_container_id(name).map_err(|rule| {
            CniError::new(code::INVALID_CONFIG, format!("name {name:?} is not valid: {rule}"))
        })?;
        let socket = match object.get("socket") {
            None => DEFAULT_SOCKET.into(),
            Some(Value::String(path)) if path.starts_with('/') && !path.contains('\0') => path.into(),
            Some(other) => return Err(wrong("socket", other, "the absolute path of the agent's socket")),
        };
        let dns = match object.get("dns") {
            None | Some(Value::Null) => Dns::default(),
            Some(value) => Dns::deserialize(value).map_err(|e| {
                wrong("dns", value, "an object of nameservers, domain, search and options")
                    .details(e.to_string())
            })?,
        };
        let prev_result = match object.get("prevResult") {
            None | Some(Value::Null) => None,
            Some(Value::Object(result)) => Some(result.clone()),
            Some(other) => return Err(wrong("prevResult", other, "the result object of the plugin before")),
        };
        if operation == Operation::Check && prev_result.is_none() {
            return Err(missing("prevResult", operation));
        }
        let valid_attachments = match object.get("cni.dev/valid-attachments") {
            None | Some(Value::Null) => None,
            Some(value) => Some(attachments(value)?),
        };
        // Without the list everything would look unknown, and every container would lose its network.
        if operation == Operation::Gc && valid_attachments.is_none() {
            return Err(missing("cni.dev/valid-attachments", operation));
        }
        Ok(Self { version, name: name.clone(), socket, dns, prev_result, runtime, valid_attachments })
    }

    /// The addresses that the previous result gives to an interface of the container. An address that names
    /// no interface counts for every one.
    pub fn previous_addresses(&self, ifname: &str) -> Result<Vec<IpNet>, CniError> {
        let Some(previous) = &self.prev_result else { return Ok(Vec::new()) };
        let list = |key: &str| match previous.get(key) {
            None | Some(Value::Null) => Ok(&[][..]),
            Some(Value::Array(list)) => Ok(list.as_slice()),
            Some(other) => Err(wrong(&format!("prevResult.{key}"), other, "a list")),
        };
        let interfaces = list("interfaces")?;
        let mut addresses = Vec::new();
        for (position, ip) in list("ips")?.iter().enumerate() {
            let field = format!("prevResult.ips[{position}].address");
            let text = ip.get("address").unwrap_or(&Value::Null);
            let address = text.as_str().and_then(|text| text.parse().ok());
            let address: IpNet = address.ok_or_else(|| wrong(&field, text, "an address like 10.0.0.1/32"))?;
            let interface = ip
                .get("interface")
                .and_then(Value::as_u64)
                .and_then(|index| interfaces.get(usize::try_from(index).ok()?))
                .filter(|interface| {
                    interface.get("sandbox").and_then(Value::as_str).is_some_and(|s| !s.is_empty())
                })
                .and_then(|interface| interface.get("name")?.as_str());
            if interface.is_none_or(|name| name == ifname) {
                addresses.push(address);
            }
        }
        Ok(addresses)
    }
}

/// The version that an error should be told in: what the configuration asks for when it can be read and is
/// supported, else the newest.
pub fn version_for_errors(input: &[u8]) -> Version {
    decode_object(input)
        .ok()
        .and_then(|object| Version::parse(object.get("cniVersion")?.as_str()?).ok())
        .unwrap_or(Version::LATEST)
}

pub(crate) fn decode_object(input: &[u8]) -> Result<Map<String, Value>, CniError> {
    let fail = |cause: String| {
        CniError::new(code::DECODE, format!("the network configuration on standard input is {cause}"))
    };
    if input.len() > CONFIG_MAX {
        return Err(fail(format!("larger than {CONFIG_MAX} bytes")));
    }
    if input.iter().all(u8::is_ascii_whitespace) {
        return Err(fail("empty".into()));
    }
    match serde_json::from_slice(input) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(fail("no JSON object".into())),
        Err(e) => Err(fail("no JSON".into()).details(e.to_string())),
    }
}

fn version_of(object: &Map<String, Value>, operation: Operation) -> Result<Version, CniError> {
    let version = match object.get("cniVersion") {
        Some(Value::String(text)) => Version::parse(text)?,
        Some(other) => return Err(wrong("cniVersion", other, "a string")),
        // The first versions of the specification had no such field.
        None => {
            return Err(Version::parse("0.1.0").err().map_or_else(
                || missing("cniVersion", operation),
                |e| CniError {
                    msg: "cniVersion is missing, which means 0.1.0; it is not supported".into(),
                    ..e
                },
            ));
        }
    };
    let since = match operation {
        Operation::Add | Operation::Del | Operation::Version => Version::V0_3_1,
        Operation::Check => Version::V0_4_0,
        Operation::Gc | Operation::Status => Version::V1_1_0,
    };
    if version < since {
        let msg = format!("cniVersion {version} has no {operation}; it came with {since}");
        return Err(CniError::new(code::INCOMPATIBLE_VERSION, msg));
    }
    Ok(version)
}

/// Refuses what would otherwise be ignored in silence.
fn check_fields(object: &Map<String, Value>) -> Result<(), CniError> {
    let unsupported = |key: &str, value: &Value, remedy: &str| {
        Err(CniError::new(
            code::UNSUPPORTED_FIELD,
            format!("field {key:?} with value {value} is not supported"),
        )
        .details(remedy))
    };
    for (key, value) in object {
        match key.as_str() {
            "cniVersion" | "name" | "type" | "socket" | "dns" | "prevResult" | "args" | "runtimeConfig" => {}
            // Keys of a domain belong to whoever owns it; the specification's own are in cni.dev.
            key if key.contains('/') => {}
            "ipam" if is_nothing(value) => {}
            "ipam" => {
                return unsupported(key, value, "the agent leases the addresses itself; remove the field");
            }
            "ipMasq" if is_nothing(value) => {}
            "ipMasq" => {
                return unsupported(key, value, "masquerading is a setting of the agent; remove the field");
            }
            "capabilities" if is_nothing(value) => {}
            "capabilities" => check_capabilities(value)?,
            _ => {
                return unsupported(
                    key,
                    value,
                    "known fields are cniVersion, name, type, socket, dns, args, capabilities and runtimeConfig",
                );
            }
        }
    }
    Ok(())
}

/// True for a value that asks for nothing: null, false, or an object with only such values.
pub(crate) fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(object) => object.values().all(is_nothing),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

fn attachments(value: &Value) -> Result<Vec<Attachment>, CniError> {
    const KEY: &str = "cni.dev/valid-attachments";
    let Value::Array(list) = value else { return Err(wrong(KEY, value, "a list")) };
    if list.len() > ATTACHMENTS_MAX {
        let msg = format!("{KEY} has {} entries; at most {ATTACHMENTS_MAX} are taken", list.len());
        return Err(CniError::new(code::INVALID_CONFIG, msg));
    }
    let one = |(position, entry): (usize, &Value)| {
        let attachment = Attachment::deserialize(entry).ok();
        attachment
            .filter(|a| check_container_id(&a.container_id).is_ok() && check_ifname(&a.ifname).is_ok())
            .ok_or_else(|| {
                wrong(&format!("{KEY}[{position}]"), entry, "an object with containerID and ifname")
            })
    };
    list.iter().enumerate().map(one).collect()
}

pub(crate) fn wrong(field: &str, value: &Value, rule: &str) -> CniError {
    let mut text = value.to_string();
    if text.len() > 200 {
        let end = (0..=200).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    CniError::new(code::INVALID_CONFIG, format!("field {field} is {text}; it must be {rule}"))
}

fn missing(field: &str, operation: Operation) -> CniError {
    CniError::new(code::INVALID_CONFIG, format!("field {field} is missing; {operation} needs it"))
}
