//! Logs of a lab: of its supervisor, of its nodes' agents, and of its pods' containers.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::client::Client;
use crate::exec;
use crate::spec::LabName;
use crate::state::StateDir;

/// Between two looks at a log that is followed.
const LOOK: Duration = Duration::from_millis(200);
/// Read at once.
const BLOCK: u16 = 32 << 10;

/// The log of the lab itself.
///
/// # Errors
/// When there is no such lab.
pub fn of_lab(lab: &LabName) -> anyhow::Result<PathBuf> {
    let state = StateDir::of(lab);
    if state.lab()?.is_none() {
        bail!("there is no lab {lab}; podway lab list shows those that are");
    }
    Ok(state.supervisor_log())
}

/// The log of a node's agent. It can be read after the lab has died, too.
///
/// # Errors
/// When the lab or the node is not there.
pub fn of_node(lab: &LabName, node: &str) -> anyhow::Result<PathBuf> {
    exec::check_node(lab, node)?;
    Ok(lab.node_dir(node).join("agent.log"))
}

/// The output of a container (the first one, when none is named).
///
/// # Errors
/// When pod or container is not there.
pub async fn of_pod(
    client: &mut Client,
    lab: &LabName,
    namespace: &str,
    pod: &str,
    container: Option<&str>,
) -> anyhow::Result<PathBuf> {
    let (_, container) = exec::find(client, namespace, pod, container).await?;
    let name = container["name"].as_str().unwrap_or_default();
    let path = lab.pod_dir(namespace, pod).join(format!("{name}.log"));
    if !path.exists() {
        bail!(
            "container {name} of pod {namespace}/{pod} has no log: it has not started, or its pod has ended and its \
             files are gone; podway lab events says what happened"
        );
    }
    Ok(path)
}

/// Copies a log: the last `tail` lines, or all of it. With `follow` it goes on until the reader has gone.
///
/// # Errors
/// When the log cannot be read.
pub fn copy(path: &Path, tail: Option<usize>, follow: bool, out: &mut impl Write) -> anyhow::Result<()> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let read = |e: io::Error| anyhow::Error::new(e).context(format!("read {}", path.display()));
    let start = match tail {
        Some(lines) => tail_start(&mut file, lines).map_err(read)?,
        None => 0,
    };
    file.seek(SeekFrom::Start(start)).map_err(read)?;
    let mut at = start;
    let mut block = vec![0; BLOCK.into()];
    loop {
        let n = file.read(&mut block).map_err(read)?;
        if n > 0 {
            at += n as u64;
            if out.write_all(&block[..n]).and_then(|()| out.flush()).is_err() {
                // `| head` has seen enough.
                return Ok(());
            }
            continue;
        }
        if !follow {
            return Ok(());
        }
        std::thread::sleep(LOOK);
        // A log that has grown too long is started anew.
        if file.metadata().map_err(read)?.len() < at {
            at = file.seek(SeekFrom::Start(0)).map_err(read)?;
        }
    }
}

/// Offset at which the last `lines` lines begin.
fn tail_start(file: &mut File, lines: usize) -> io::Result<u64> {
    let length = file.seek(SeekFrom::End(0))?;
    let mut left = lines;
    let mut at = length;
    let mut block = vec![0; BLOCK.into()];
    while at > 0 {
        let size = at.min(BLOCK.into());
        at -= size;
        // At most BLOCK, which fits.
        let part = &mut block[..usize::try_from(size).unwrap_or(0)];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(part)?;
        for (index, byte) in part.iter().enumerate().rev() {
            let place = at + index as u64 + 1;
            // The line feed that ends the last line begins no line.
            if *byte == b'\n' && place < length {
                if left <= 1 {
                    return Ok(if lines == 0 { length } else { place });
                }
                left -= 1;
            }
        }
    }
    Ok(if lines == 0 { length } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_found() {
        let long = "x".repeat(usize::from(BLOCK) + 7);
        for (content, lines, want) in [
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 2, "b\nc"),
            ("a\nb\n", 9, "a\nb\n"),
            ("a\nb\n", 0, ""),
            ("", 3, ""),
            ("\n\n", 1, "\n"),
            (&format!("a\n{long}\nb\n"), 2, &format!("{long}\nb\n")),
        ] {
            let file = tempfile::NamedTempFile::new().expect("file");
            std::fs::write(file.path(), content).expect("write");
            let mut out = Vec::new();
            copy(file.path(), Some(lines), false, &mut out).expect("copy");
            assert_eq!(String::from_utf8_lossy(&out), want, "{lines} of {content:.20}");
            out.clear();
            copy(file.path(), None, false, &mut out).expect("copy");
            assert_eq!(String::from_utf8_lossy(&out), content);
        }
    }
}
