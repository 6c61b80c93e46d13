//! Deaths on order, for fault tests.
//!
//! With `PODWAY_CRASH_AT=<step>` in its environment the agent aborts (no destructors, as under `kill -9`) when
//! it reaches that step; without it, a step costs one comparison. The steps:
//!
//! | step | when |
//! |---|---|
//! | `add.begin` | an ADD was read, nothing is done |
//! | `add.leased` | addresses are leased |
//! | `add.link` | the veth pair exists |
//! | `add.programs` | the kernel programs are attached to it |
//! | `add.host` | the host side is configured |
//! | `add.pod` | the pod side is configured |
//! | `add.endpoint` | the pod is in the datapath's tables |
//! | `add.ports` | its host ports are open |
//! | `add.done` | all is done, the answer is not sent |
//! | `del.begin` | a DEL was read, nothing is done |
//! | `del.ports` | its host ports are closed |
//! | `del.endpoint` | the pod is out of the datapath's tables |
//! | `del.marked` | its link is marked as gone |
//! | `del.released` | its addresses rest |
//! | `del.queued` | the deletion of the link is queued, the answer is not sent |
//! | `del.deleted` | the link is deleted |

use std::sync::OnceLock;

/// Name of the variable.
pub const VARIABLE: &str = "PODWAY_CRASH_AT";

/// Every step, in the order of [`point`] calls.
pub const STEPS: [&str; 16] = [
    "add.begin",
    "add.leased",
    "add.link",
    "add.programs",
    "add.host",
    "add.pod",
    "add.endpoint",
    "add.ports",
    "add.done",
    "del.begin",
    "del.ports",
    "del.endpoint",
    "del.marked",
    "del.released",
    "del.queued",
    "del.deleted",
];

/// Aborts the process when it was told to die here.
pub(crate) fn point(step: &'static str) {
    static AT: OnceLock<Option<String>> = OnceLock::new();
    debug_assert!(STEPS.contains(&step), "{step} is not in the list of steps");
    if let Some(at) = AT.get_or_init(|| std::env::var(VARIABLE).ok().filter(|s| !s.is_empty()))
        && at == step
    {
        tracing::error!(step, "dying here, as {VARIABLE} says");
        std::process::abort();
    }
}
