//! Source address translation for what leaves the cluster: one nftables table of our own.
//!
//! The whole table is replaced in one transaction, and only when it has to be. Replacing it does not touch
//! connections that are translated already. Other tables are never read or written.

use std::fmt::Write as _;

use ipnet::IpNet;

use crate::nft::{self, NftError};

/// The table's name; `inet` holds both families.
pub const TABLE: &str = "podway";

/// What is to be translated.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// Whose packets: the podCIDRs of this node.
    pub from: Vec<IpNet>,
    /// To where they keep their source: the cluster and what the configuration excludes.
    pub not_to: Vec<IpNet>,
    /// UDP port of the tunnel between nodes. Its packets are nobody's to translate, but address translation would make
    /// the kernel follow them as connections: an entry for each flow between pods, in a table that is meant for others.
    pub tunnel_port: Option<u16>,
}

impl Rules {
    /// The transaction that makes the table hold these rules and nothing else.
    #[must_use]
    pub fn transaction(&self) -> String {
        let mut text = nft::deletion(TABLE);
        let _ = writeln!(text, "table inet {TABLE} {{");
        for (family, v6) in [("4", false), ("6", true)] {
            nft::prefix_set(&mut text, &format!("pods{family}"), &self.from, v6);
            nft::prefix_set(&mut text, &format!("inside{family}"), &self.not_to, v6);
        }
        text.push_str(
            "\tchain postrouting {\n\
             \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
             \t\tip saddr @pods4 ip daddr != @inside4 ip daddr != { 169.254.0.0/16, 224.0.0.0/4, 255.255.255.255 } \
             masquerade fully-random\n\
             \t\tip6 saddr @pods6 ip6 daddr != @inside6 ip6 daddr != { fe80::/10, ff00::/8 } masquerade fully-random\n\
             \t}\n",
        );
        if let Some(port) = self.tunnel_port {
            for hook in ["prerouting", "output"] {
                let _ = write!(
                    text,
                    "\tchain tunnel_{hook} {{\n\
                     \t\ttype filter hook {hook} priority raw; policy accept;\n\
                     \t\tudp dport {port} notrack\n\
                     \t}}\n"
                );
            }
        }
        text.push_str("}\n");
        text
    }
}

/// The driver. Works in the network namespace of the thread that calls it.
#[derive(Debug, Default)]
pub struct Masquerade {
    applied: Option<Rules>,
    /// How nft shows what was applied.
    shown: Option<String>,
}

impl Masquerade {
    /// Makes the table hold the rules; does nothing when it was given the same before. Returns whether anything
    /// was written.
    ///
    /// # Errors
    /// nft is missing or refuses. The table is then as it was.
    pub fn apply(&mut self, rules: &Rules) -> Result<bool, NftError> {
        if self.applied.as_ref() == Some(rules) {
            return Ok(false);
        }
        nft::transaction(&rules.transaction())?;
        self.applied = Some(rules.clone());
        self.shown = list()?;
        Ok(true)
    }

    /// Looks whether somebody changed or flushed the table (firewall managers do), and puts it right. Returns
    /// whether that was necessary.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn audit(&mut self) -> Result<bool, NftError> {
        let Some(rules) = self.applied.clone() else { return Ok(false) };
        if list()? == self.shown {
            return Ok(false);
        }
        self.applied = None;
        self.apply(&rules)
    }
}

/// Deletes the table. Returns whether there was one.
///
/// # Errors
/// nft is missing or refuses.
pub fn remove() -> Result<bool, NftError> {
    nft::remove(TABLE)
}

fn list() -> Result<Option<String>, NftError> {
    nft::list("--stateless", TABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn the_transaction_replaces_the_table() {
        let rules = Rules {
            from: nets(&["10.244.1.0/24", "fd00:10:244:1::/64"]),
            not_to: nets(&["10.244.1.0/24", "10.244.0.0/24", "172.18.1.1/32", "10.244.1.7/32", "fd00::/16"]),
            tunnel_port: Some(8472),
        };
        let text = rules.transaction();
        assert!(
            text.starts_with("add table inet podway\ndelete table inet podway\ntable inet podway {\n"),
            "{text}"
        );
        assert!(text.contains(
            "\tset pods4 {\n\t\ttype ipv4_addr\n\t\tflags interval\n\t\telements = { 10.244.1.0/24 }"
        ));
        // Merged, overlaps gone, sorted.
        assert!(text.contains("elements = { 10.244.0.0/23, 172.18.1.1/32 }"), "{text}");
        assert!(
            text.contains(
                "set inside6 {\n\t\ttype ipv6_addr\n\t\tflags interval\n\t\telements = { fd00::/16 }"
            )
        );
    }

    #[test]
    fn no_connections_are_followed_on_the_port_of_the_tunnel() {
        let with = Rules { tunnel_port: Some(4789), ..Rules::default() }.transaction();
        assert_eq!(with.matches("udp dport 4789 notrack").count(), 2, "{with}");
        assert!(
            with.contains("hook prerouting priority raw") && with.contains("hook output priority raw"),
            "{with}"
        );
        assert_eq!(with.matches('{').count(), with.matches('}').count(), "{with}");
        assert!(!Rules::default().transaction().contains("notrack"));
    }

    #[test]
    fn empty_sets_are_written_without_elements() {
        let text = Rules::default().transaction();
        assert!(!text.contains("elements"), "{text}");
    }
}
