//! The CNI environment variables (CNI specification, section 2, "Parameters"), checked.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{CniError, code};

/// Longest container id taken. Runtimes use 64 hexadecimal digits; together with the interface name it has to
/// fit into an interface alias of 255 bytes.
pub const CONTAINER_ID_MAX: usize = 200;
/// Longest CNI_ARGS taken, in bytes.
pub const ARGS_MAX: usize = 64 << 10;

/// What the runtime wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Attach a container.
    Add,
    /// Detach a container.
    Del,
    /// See whether a container is attached as it was.
    Check,
    /// Detach all that the runtime does not know any more.
    Gc,
    /// Say whether ADD would be served.
    Status,
    /// Name the supported versions.
    Version,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        })
    }
}

/// The variables that the operation has; what it does not have is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// CNI_COMMAND.
    pub operation: Operation,
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// CNI_NETNS; for DEL it may be empty.
    pub netns: String,
    /// CNI_ARGS.
    pub args: Args,
}

/// CNI_ARGS: pairs of key and value that the runtime got from the orchestrator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Args(pub BTreeMap<String, String>);

impl Args {
    /// Reads `KEY=value;KEY2=value2`.
    ///
    /// # Errors
    /// Code 4 for a pair without `=` or without a key, or a key that is there twice.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let invalid =
            |cause: String| Err(CniError::new(code::INVALID_ENVIRONMENT, format!("CNI_ARGS: {cause}")));
        if text.len() > ARGS_MAX {
            return invalid(format!("longer than {ARGS_MAX} bytes"));
        }
        let mut args = BTreeMap::new();
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=').filter(|(key, _)| !key.is_empty()) else {
                return invalid(format!("{pair:?} is not KEY=value"));
            };
            if args.insert(key.to_owned(), value.to_owned()).is_some() {
                return invalid(format!("{key} is there twice"));
            }
        }
        Ok(Self(args))
    }

    /// A value by its key.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Namespace of the pod (K8S_POD_NAMESPACE).
    pub fn pod_namespace(&self) -> Option<&str> {
        self.value("K8S_POD_NAMESPACE")
    }

    /// Name of the pod (K8S_POD_NAME).
    pub fn pod_name(&self) -> Option<&str> {
        self.value("K8S_POD_NAME")
    }

    /// UID of the pod (K8S_POD_UID).
    pub fn pod_uid(&self) -> Option<&str> {
        self.value("K8S_POD_UID")
    }
}

impl Environment {
    /// Reads and checks the variables; `variable` is where they come from.
    ///
    /// # Errors
    /// Code 4, with the name of the variable, its value and the rule.
    pub fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, CniError> {
        let text = |name: &str| match variable(name).unwrap_or_default().into_string() {
            Ok(value) => Ok(value),
            Err(value) => Err(invalid(name, &value.to_string_lossy(), "it is not UTF-8")),
        };
        let command = text("CNI_COMMAND")?;
        let operation = match command.as_str() {
            "ADD" => Operation::Add,
            "DEL" => Operation::Del,
            "CHECK" => Operation::Check,
            "GC" => Operation::Gc,
            "STATUS" => Operation::Status,
            "VERSION" => Operation::Version,
            "" => return Err(missing(&["CNI_COMMAND"], "every operation")),
            _ => {
                let rule = "it must be ADD, DEL, CHECK, GC, STATUS or VERSION";
                return Err(invalid("CNI_COMMAND", &command, rule));
            }
        };
        let mut environment = Self {
            operation,
            container_id: String::new(),
            ifname: String::new(),
            netns: String::new(),
            args: Args::default(),
        };
        if !matches!(operation, Operation::Add | Operation::Del | Operation::Check) {
            return Ok(environment);
        }
        environment.container_id = text("CNI_CONTAINERID")?;
        environment.ifname = text("CNI_IFNAME")?;
        environment.netns = text("CNI_NETNS")?;
        let absent: Vec<&str> = [
            ("CNI_CONTAINERID", environment.container_id.is_empty()),
            ("CNI_IFNAME", environment.ifname.is_empty()),
            // DEL must work when the namespace is gone already.
            ("CNI_NETNS", environment.netns.is_empty() && operation != Operation::Del),
        ]
        .into_iter()
        .filter_map(|(name, absent)| absent.then_some(name))
        .collect();
        if !absent.is_empty() {
            return Err(missing(&absent, &operation.to_string()));
        }
        check_container_id(&environment.container_id)
            .map_err(|rule| invalid("CNI_CONTAINERID", &environment.container_id, &rule))?;
        check_ifname(&environment.ifname).map_err(|rule| invalid("CNI_IFNAME", &environment.ifname, rule))?;
        let netns = &environment.netns;
        if !netns.is_empty() && (!netns.starts_with('/') || netns.contains('\0')) {
            return Err(invalid("CNI_NETNS", netns, "it must be an absolute path"));
        }
        environment.args = Args::parse(&text("CNI_ARGS")?)?;
        Ok(environment)
    }
}

/// The specification's rule for container ids and network names: a letter or digit, then letters, digits,
/// `_`, `.` and `-`.
///
/// # Errors
/// The rule that is broken.
pub fn check_container_id(id: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric();
    let first = id.chars().next().is_some_and(plain);
    if !first || !id.chars().all(|c| plain(c) || matches!(c, '_' | '.' | '-')) {
        return Err(
            "it must begin with a letter or digit and have only letters, digits, '_', '.' and '-'".into()
        );
    }
    if id.len() > CONTAINER_ID_MAX {
        return Err(format!("it must have at most {CONTAINER_ID_MAX} bytes, it has {}", id.len()));
    }
    Ok(())
}

/// The kernel's rule for interface names.
///
/// # Errors
/// The rule that is broken.
pub fn check_ifname(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > 15 {
        return Err("an interface name has 1 to 15 bytes");
    }
    let forbidden = |c: char| matches!(c, '/' | ':' | '\0') || c.is_whitespace();
    if name == "." || name == ".." || name.contains(forbidden) {
        return Err("an interface name may not be '.' or '..' or contain '/', ':' or white space");
    }
    Ok(())
}

fn missing(names: &[&str], operation: &str) -> CniError {
    CniError::new(code::INVALID_ENVIRONMENT, format!("{} not set", names.join(", ")))
        .details(format!("{operation} needs it; container runtimes set it when they call the plugin"))
}

fn invalid(name: &str, value: &str, rule: &str) -> CniError {
    CniError::new(code::INVALID_ENVIRONMENT, format!("{name}={value:?} is not valid: {rule}"))
}
