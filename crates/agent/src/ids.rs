//! Names of things on this node: attachments, their links and hardware addresses, the agent's instance.
//!
//! Every name is a pure function of what it names, so that what a crashed agent left is found again.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One interface of one container, as the CNI runtime names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttachmentId {
    /// CNI_CONTAINERID.
    #[serde(rename = "id")]
    pub container_id: String,
    /// CNI_IFNAME.
    #[serde(rename = "if")]
    pub ifname: String,
}

/// What the alias of a pod's host-side link begins with.
const ALIAS: &str = "podway:";
/// What it begins with from the moment that the pod is detached until the link is deleted.
const ALIAS_GONE: &str = "podway-gone:";

impl AttachmentId {
    /// Names an attachment.
    #[must_use]
    pub fn new(container_id: impl Into<String>, ifname: impl Into<String>) -> Self {
        Self { container_id: container_id.into(), ifname: ifname.into() }
    }

    /// Name of the host-side link: `pw` and 12 hex digits of a hash (IFNAMSIZ leaves 15 characters).
    #[must_use]
    pub fn host_link(&self) -> String {
        format!("pw{:012x}", self.hash(0) & 0xffff_ffff_ffff)
    }

    /// Hardware address of the host side. Chosen by us, so that no udev policy changes it under the pod's
    /// permanent neighbour entry.
    #[must_use]
    pub fn host_mac(&self) -> [u8; 6] {
        self.mac(1)
    }

    /// Hardware address of the pod side.
    #[must_use]
    pub fn pod_mac(&self) -> [u8; 6] {
        self.mac(2)
    }

    /// The link's alias (ifalias, at most 255 bytes): how the kernel remembers what the link is for.
    #[must_use]
    pub fn alias(&self) -> String {
        format!("{ALIAS}{}:{}", self.container_id, self.ifname)
    }

    /// The alias of a link that is detached and waits for its deletion.
    #[must_use]
    pub fn gone_alias(&self) -> String {
        format!("{ALIAS_GONE}{}:{}", self.container_id, self.ifname)
    }

    /// Reads an alias. The flag says whether the link waits for its deletion; `None` is for other people's links.
    #[must_use]
    pub fn from_alias(alias: &str) -> Option<(Self, bool)> {
        let (rest, gone) = match alias.strip_prefix(ALIAS) {
            Some(rest) => (rest, false),
            None => (alias.strip_prefix(ALIAS_GONE)?, true),
        };
        // CNI container ids have no colon; interface names may have one in theory, so split at the first.
        let (container_id, ifname) = rest.split_once(':')?;
        if container_id.is_empty() || ifname.is_empty() {
            return None;
        }
        Some((Self::new(container_id, ifname), gone))
    }

    fn mac(&self, side: u8) -> [u8; 6] {
        let bytes = self.hash(side).to_be_bytes();
        // Locally administered, unicast (IEEE 802, U/L and I/G bits).
        [(bytes[2] & 0xfc) | 0x02, bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]]
    }

    fn hash(&self, seed: u8) -> u64 {
        let mut hash = fnv(FNV_OFFSET, &[seed]);
        hash = fnv(hash, self.container_id.as_bytes());
        hash = fnv(hash, &[0]);
        hash = fnv(hash, self.ifname.as_bytes());
        // FNV's last bytes barely reach the high bits; a final mix spreads them.
        hash ^= hash >> 33;
        hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^ (hash >> 33)
    }
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, 64 bits. The standard library's hasher may change between releases, and these hashes live in link
/// names that outlast an upgrade.
fn fnv(mut hash: u64, bytes: &[u8]) -> u64 {
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash
}

/// One agent's identity on a machine: `node` in production, `<lab>/<node>` in a lab.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instance(String);

/// A string that names no instance.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "instance {given:?}: {cause}; use names of letters, digits, '-', '_' and '.', joined by at most one '/'"
)]
pub struct BadInstance {
    given: String,
    cause: &'static str,
}

impl Instance {
    /// The production instance.
    pub const DEFAULT: &'static str = "node";

    /// Reads an instance name.
    ///
    /// # Errors
    /// The name could leave the directories that it is a part of, or is too long for a socket path.
    pub fn parse(text: &str) -> Result<Self, BadInstance> {
        let bad = |cause| BadInstance { given: text.chars().take(120).collect(), cause };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        // A unix socket path has 107 bytes; "/run/podway/" and "/agent.sock" take 23.
        if text.len() > 80 {
            return Err(bad("it is longer than 80 bytes"));
        }
        let parts: Vec<&str> = text.split('/').collect();
        if parts.len() > 2 {
            return Err(bad("it has more than one '/'"));
        }
        for part in parts {
            if part.is_empty() || part.starts_with('.') {
                return Err(bad("a part is empty or begins with '.'"));
            }
            if !part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
                return Err(bad("it has other characters"));
            }
        }
        Ok(Self(text.to_owned()))
    }

    /// Directory of the agent's socket, journal and lock; on a tmpfs in production.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        PathBuf::from("/run/podway").join(&self.0)
    }

    /// Directory in bpffs where the programs and maps are pinned.
    #[must_use]
    pub fn pin_dir(&self) -> PathBuf {
        PathBuf::from("/sys/fs/bpf/podway").join(&self.0)
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_stable_and_within_the_kernels_limits() {
        let id = AttachmentId::new("8f1c2d", "eth0");
        // These literals are in the kernels of running nodes: a change here orphans their pods.
        assert_eq!(id.host_link(), "pw08f971be48ca");
        assert_eq!(id.host_link().len(), 14);
        for mac in [id.host_mac(), id.pod_mac()] {
            assert_eq!(mac[0] & 0x03, 0x02, "locally administered unicast");
        }
        assert_ne!(id.host_mac(), id.pod_mac());
        assert_ne!(id.host_link(), AttachmentId::new("8f1c2d", "eth1").host_link());
        assert_ne!(AttachmentId::new("a", "bc").host_link(), AttachmentId::new("ab", "c").host_link());
    }

    #[test]
    fn hashes_spread() {
        let names: std::collections::BTreeSet<String> =
            (0..20_000).map(|i| AttachmentId::new(format!("{i:064x}"), "eth0").host_link()).collect();
        assert_eq!(names.len(), 20_000);
    }

    #[test]
    fn aliases_read_back() {
        let id = AttachmentId::new("8f1c2d", "eth0");
        assert_eq!(AttachmentId::from_alias(&id.alias()), Some((id.clone(), false)));
        assert_eq!(AttachmentId::from_alias(&id.gone_alias()), Some((id, true)));
        for foreign in ["", "podway", "podway:", "podway:x", "podway::eth0", "podway:x:", "cali:x:eth0"] {
            assert_eq!(AttachmentId::from_alias(foreign), None, "{foreign:?}");
        }
    }

    #[test]
    fn instances_stay_in_their_directories() {
        for good in ["node", "demo/node-1", "a.b_c-9"] {
            assert!(Instance::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "..", "a/../b", "/etc", "a/", "a/b/c", "a b", "a\0", ".hidden", &"x".repeat(81)] {
            assert!(Instance::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(
            Instance::parse("demo/node-1").unwrap().run_dir(),
            PathBuf::from("/run/podway/demo/node-1")
        );
    }
}
