//! `podway lab events` and `podway lab logs`.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use podway_lab::client::Client;
use podway_lab::history::{self, Happened, Wanted};
use podway_lab::{exec, logs};

use super::{pick, pod_name, runtime};
use crate::OK;
use crate::args::{Events, Logs, OutputFormat};
use crate::output::{self, table};

/// Between two looks at events that are followed.
const LOOK: Duration = Duration::from_millis(300);

pub(super) fn events(args: Events) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    let wanted = Wanted { namespace: args.namespace, about: args.about, warnings: args.warnings };
    runtime()?.block_on(async {
        let mut client = Client::of_lab(&lab)?;
        let mut seen = history::events(&mut client, &wanted).await?;
        if args.format.output == OutputFormat::Json {
            output::json(&seen)?;
            return Ok(OK);
        }
        let header =
            ["LAST SEEN", "TYPE", "REASON", "OBJECT", "COUNT", "MESSAGE"].map(str::to_owned).to_vec();
        output::print(&table(&[vec![header], seen.iter().map(row).collect()].concat()));
        if !args.follow {
            return Ok(OK);
        }
        loop {
            tokio::time::sleep(LOOK).await;
            let now = history::events(&mut client, &wanted).await?;
            for event in news(&seen, &now) {
                output::print(&table(&[row(event)]));
            }
            seen = now;
        }
    })
}

fn row(event: &Happened) -> Vec<String> {
    vec![
        event.at.clone(),
        event.type_.clone(),
        event.reason.clone(),
        event.about(),
        event.count.to_string(),
        event.message.clone(),
    ]
}

/// What is new, or happened again.
fn news<'a>(before: &[Happened], now: &'a [Happened]) -> Vec<&'a Happened> {
    let key = |e: &Happened| (e.about(), e.reason.clone(), e.message.clone(), e.source.clone());
    let known: HashMap<_, u64> = before.iter().map(|e| (key(e), e.count)).collect();
    now.iter().filter(|e| known.get(&key(e)).is_none_or(|count| *count < e.count)).collect()
}

pub(super) fn logs(args: &Logs) -> anyhow::Result<u8> {
    let lab = pick(&args.which)?;
    let path = match &args.target {
        None => logs::of_lab(&lab)?,
        Some(node) if exec::is_node(&lab, node) => logs::of_node(&lab, node)?,
        Some(pod) => {
            let (namespace, pod) = pod_name(pod);
            runtime()?.block_on(async {
                let mut client = Client::of_lab(&lab)?;
                logs::of_pod(&mut client, &lab, namespace, pod, args.container.as_deref()).await
            })?
        }
    };
    logs::copy(&path, args.tail, args.follow, &mut io::stdout().lock())?;
    Ok(OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_happened_since_is_news() {
        let event = |name: &str, count| Happened {
            at: String::new(),
            type_: "Normal".into(),
            reason: "R".into(),
            kind: "Pod".into(),
            namespace: "n".into(),
            name: name.into(),
            count,
            message: "m".into(),
            source: "s".into(),
        };
        let before = [event("a", 1), event("b", 2)];
        let now = [event("a", 1), event("b", 3), event("c", 1)];
        assert_eq!(news(&before, &now), [&now[1], &now[2]]);
    }
}
