//! `podway cleanup --of`: what other programs left.

use podway_proxy_rules::foreign::cleanup::{self, CleanupReport};

use crate::args::{Cleanup, Whose};
use crate::output;
use crate::{FAILED, OK};

/// Removes what the named program left in the current network namespace.
pub(crate) fn run(args: &Cleanup, whose: Whose) -> anyhow::Result<u8> {
    let CleanupReport { removed, kept, failed } = match whose {
        Whose::KubeProxy => cleanup::kube_proxy(args.dry_run, args.force)?,
    };
    if removed.is_empty() && failed.is_empty() {
        output::print("nothing of kube-proxy was there\n");
    }
    let done = if args.dry_run { "would remove" } else { "removed" };
    for line in removed {
        output::print(&format!("{done} {line}\n"));
    }
    for line in kept {
        output::print(&format!("left {line}\n"));
    }
    for line in &failed {
        output::error(&format!("still there: {line}"));
    }
    Ok(if failed.is_empty() { OK } else { FAILED })
}
