//! `podway lab roll` and `podway lab ready`.

use podway_lab::client::Client;
use podway_lab::{readiness, roll};

use super::{pick, pod_name, runtime};
use crate::args::{Ready, Roll, Switch};
use crate::output::{self, Progress};
use crate::{FAILED, OK};

pub(super) fn roll(args: &Roll) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    runtime()?.block_on(async {
        let mut client = Client::of_lab(&lab)?;
        roll::start(&mut client, &args.namespace, &args.workload).await?;
        if args.no_wait {
            return Ok(OK);
        }
        let mut progress = Progress::new();
        let missing = roll::wait(&mut client, &args.namespace, &args.workload, args.timeout, |missing| {
            progress.update(missing, Vec::new);
        })
        .await?;
        progress.end();
        match missing {
            None => {
                output::print(&format!("{} has new pods\n", args.workload));
                Ok(OK)
            }
            Some(missing) => {
                let seconds = args.timeout.as_secs();
                output::error(&format!("not done after {seconds} s: {missing}; podway lab status says why"));
                Ok(FAILED)
            }
        }
    })
}

pub(super) fn ready(args: &Ready) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    let (namespace, pod) = pod_name(&args.pod);
    runtime()?.block_on(async {
        readiness::switch(&mut Client::of_lab(&lab)?, namespace, pod, args.state == Switch::On).await
    })?;
    Ok(OK)
}
