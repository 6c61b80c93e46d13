//! The program that the runtime starts: environment and standard input in, JSON and exit code out.
//!
//! When the agent is not there, ADD, DEL, CHECK and GC end with code 11, "try again". For DEL the
//! specification recommends success whenever nothing can be done, but then the address of a container that was removed
//! while the agent restarts would stay leased until the next GC, which old runtimes never call. A runtime
//! repeats a failed DEL until it works, and the agent is back in seconds.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::config::{CONFIG_MAX, NetConf, decode_object, version_for_errors};
use crate::environment::{Environment, Operation};
use crate::error::{CniError, code};
use crate::protocol::{AddRequest, CallError, CheckRequest, Command, DelRequest, GcRequest, Response, call};
use crate::version::Version;

/// Type of the filesystem that namespace files are on (`linux/magic.h`).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Runs the plugin with the process's environment, standard input and standard output.
pub fn main() -> ExitCode {
    let (output, success) = run(|name| std::env::var_os(name), io::stdin().lock());
    let mut stdout = io::stdout().lock();
    let written = match output {
        Some(json) => serde_json::to_writer(&mut stdout, &json)
            .map_err(io::Error::from)
            .and_then(|()| stdout.write_all(b"\n"))
            .and_then(|()| stdout.flush()),
        None => Ok(()),
    };
    // A runtime that closed the pipe has no result: it must not take the operation for done.
    if success && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the plugin: what to print, and whether the operation succeeded.
pub fn run(variable: impl Fn(&str) -> Option<OsString>, input: impl Read) -> (Option<Value>, bool) {
    let environment = match Environment::read(variable) {
        Ok(environment) => environment,
        // The input is not worth waiting for.
        Err(error) => return (Some(error.to_json(Version::LATEST.as_str())), false),
    };
    let mut config = Vec::new();
    // One byte more than allowed shows that it is too much.
    let read = input.take(CONFIG_MAX as u64 + 1).read_to_end(&mut config);
    let outcome = match read {
        Err(e) => Err(CniError::new(code::IO, "cannot read standard input").details(e.to_string())),
        Ok(_) if environment.operation == Operation::Version => version(&config).map(Some),
        Ok(_) => {
            NetConf::parse(&config, environment.operation).and_then(|config| perform(&environment, &config))
        }
    };
    match outcome {
        Ok(output) => (output, true),
        Err(error) => (Some(error.to_json(version_for_errors(&config).as_str())), false),
    }
}

/// VERSION: asks nothing of the agent, and answers whatever version the caller speaks.
fn version(input: &[u8]) -> Result<Value, CniError> {
    // Callers before 0.4 wrote nothing.
    let asked = if input.is_empty() {
        Version::LATEST.as_str().to_owned()
    } else {
        match decode_object(input)?.get("cniVersion") {
            Some(Value::String(version)) => version.clone(),
            Some(other) => {
                let msg = format!("field cniVersion is {other}; it must be a string");
                return Err(CniError::new(code::INVALID_CONFIG, msg));
            }
            None => Version::LATEST.as_str().to_owned(),
        }
    };
    Ok(json!({ "cniVersion": asked, "supportedVersions": Version::ALL.map(Version::as_str) }))
}

fn perform(environment: &Environment, config: &NetConf) -> Result<Option<Value>, CniError> {
    let Environment { operation, container_id, ifname, netns: netns_path, args } = environment.clone();
    let network = config.name.clone();
    let (command, netns) = match operation {
        Operation::Add => {
            // A previous result that cannot be merged is found before anything is made.
            crate::AddResult::default().to_json(config)?;
            let netns = open_netns(&netns_path, code::INVALID_ENVIRONMENT)?;
            let runtime = config.runtime.clone();
            let add = AddRequest { container_id, ifname, netns_path, args, network, runtime };
            (Command::Add(add), Some(netns))
        }
        Operation::Check => {
            let addresses = config.previous_addresses(&ifname)?;
            let netns = open_netns(&netns_path, code::UNKNOWN_CONTAINER)?;
            let check = CheckRequest { container_id, ifname, netns_path, args, network, addresses };
            (Command::Check(check), Some(netns))
        }
        Operation::Del => {
            (Command::Del(DelRequest { container_id, ifname, netns_path, args, network }), None)
        }
        Operation::Gc => {
            let valid_attachments = config.valid_attachments.clone().unwrap_or_default();
            (Command::Gc(GcRequest { network, valid_attachments }), None)
        }
        Operation::Status => (Command::Status, None),
        Operation::Version => return Ok(None),
    };
    match call(&config.socket, command, netns.as_ref().map(AsFd::as_fd)) {
        Ok(Response::Err(error)) => Err(error),
        Ok(Response::Ok(Some(result))) if operation == Operation::Add => result.to_json(config).map(Some),
        Ok(Response::Ok(None)) if operation == Operation::Add => {
            Err(CniError::new(code::DECODE, "the agent's answer to ADD has no result"))
        }
        Ok(Response::Ok(_)) => Ok(None),
        Err(error) => Err(not_answered(operation, &error)),
    }
}

fn not_answered(operation: Operation, error: &CallError) -> CniError {
    let code = match error {
        CallError::Absent { .. } | CallError::Interrupted(_) if operation == Operation::Status => {
            code::NOT_AVAILABLE
        }
        CallError::Absent { .. } | CallError::Interrupted(_) => code::TRY_AGAIN,
        CallError::Refused { .. } => code::IO,
        CallError::Garbled(_) => code::DECODE,
    };
    let remedy = match error {
        CallError::Absent { .. } => {
            "see whether the podway agent runs on this node; the runtime will try again"
        }
        CallError::Refused { .. } => {
            "the plugin must run as root, and \"socket\" in the network configuration must be the agent's socket"
        }
        CallError::Interrupted(_) => "the agent was restarted or is overloaded; the runtime will try again",
        CallError::Garbled(_) => "plugin and agent are of different releases; reinstall the plugin",
    };
    CniError::new(code, format!("{operation}: {error}")).details(remedy)
}

/// Opens CNI_NETNS and makes sure that it is the namespace of a container.
fn open_netns(path: &str, code: u32) -> Result<OwnedFd, CniError> {
    let wrong = |code, cause: String| CniError::new(code, format!("CNI_NETNS={path:?}: {cause}"));
    // Something else than a namespace in its place (a FIFO) must not stop us.
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(|e| wrong(code, format!("cannot be opened: {e}")))?;
    let kind = rustix::fs::fstatfs(&file).map_err(|e| wrong(code, e.to_string()))?.f_type;
    if kind != NSFS_MAGIC {
        return Err(wrong(code, "is no network namespace; its mount may be gone".into()));
    }
    // Attaching to it would put the pod's default route into the node.
    let same = |a: &File, b: &File| -> io::Result<bool> {
        let (a, b) = (a.metadata()?, b.metadata()?);
        Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
    };
    match File::open("/proc/self/ns/net").and_then(|own| same(&file, &own)) {
        Ok(false) => Ok(file.into()),
        Ok(true) => {
            let cause = "is the node's own network namespace, not that of a container";
            Err(wrong(code::INVALID_ENVIRONMENT, cause.into()))
        }
        Err(e) => Err(CniError::new(code::IO, "cannot look at the plugin's own network namespace")
            .details(e.to_string())),
    }
}
