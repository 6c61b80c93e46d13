//! What an agent remembers of its own Node, so that it can attach pods while the API server is away.
//!
//! One small JSON file in the run directory, replaced by renaming. It is advice, not truth: as soon as the Nodes
//! are known, they decide.

use std::fs;
use std::io;
use std::path::Path;

use tracing::warn;

use crate::nodes::OwnNode;

/// Name of the file in the run directory.
pub const FILE: &str = "node.json";

/// Reads what is remembered of this node. Damage, and the memory of another node, count as nothing.
#[must_use]
pub fn load(run_dir: &Path, node_name: &str) -> Option<OwnNode> {
    let path = run_dir.join(FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            warn!(path = %path.display(), %error, "cannot read what is remembered of this node");
            return None;
        }
    };
    match serde_json::from_slice::<OwnNode>(&text) {
        Ok(own) if own.name == node_name => Some(own),
        Ok(own) => {
            warn!(remembered = own.name, node_name, "what is remembered is of another node: not used");
            None
        }
        Err(error) => {
            warn!(path = %path.display(), %error, "what is remembered of this node is damaged: not used");
            None
        }
    }
}

/// Remembers this node.
///
/// # Errors
/// The file cannot be written (a full disk); the old one is then still there.
pub fn save(run_dir: &Path, own: &OwnNode) -> io::Result<()> {
    let path = run_dir.join(FILE);
    let beside = path.with_extension("json.new");
    let written =
        fs::write(&beside, serde_json::to_vec_pretty(own)?).and_then(|()| fs::rename(&beside, &path));
    if written.is_err() {
        fs::remove_file(&beside).ok();
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_undamaged_memory_of_this_node_counts() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(dir.path(), "n1"), None);
        let own = OwnNode {
            name: "n1".into(),
            uid: "u".into(),
            internal_ips: vec!["172.18.1.1".parse().unwrap()],
            underlay: "172.18.1.1".parse().unwrap(),
            pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
        };
        save(dir.path(), &own).unwrap();
        assert_eq!(load(dir.path(), "n1"), Some(own.clone()));
        assert_eq!(load(dir.path(), "n2"), None);
        let text = fs::read_to_string(dir.path().join(FILE)).unwrap();
        fs::write(dir.path().join(FILE), &text[..text.len() / 2]).unwrap();
        assert_eq!(load(dir.path(), "n1"), None);
        assert!(save(&dir.path().join("absent"), &own).is_err());
    }
}
