//! `/etc/resolv.conf` and `/etc/hosts` of pods, with the content that the kubelet gives them. Pure.
//!
//! <https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/> and
//! <https://kubernetes.io/docs/tasks/network/customize-hosts-file-for-pods/>.

use std::net::IpAddr;

use serde_json::Value;

use crate::spec::CLUSTER_DOMAIN;

/// The C library reads three name servers (resolv.conf(5)); the kubelet cuts the list there.
const MAX_NAMESERVERS: usize = 3;
/// Limits of `dnsConfig.searches` in the API.
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_CHARACTERS: usize = 2048;
/// Longest host name (`HOST_NAME_MAX`, one label of RFC 1035).
const MAX_HOSTNAME: usize = 63;

/// A resolver configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// Name servers in order.
    pub nameservers: Vec<String>,
    /// Search domains in order.
    pub searches: Vec<String>,
    /// Options, with their value if they have one.
    pub options: Vec<(String, Option<String>)>,
}

impl ResolvConf {
    /// The file's text.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        if !self.searches.is_empty() {
            out.push_str(&format!("search {}\n", self.searches.join(" ")));
        }
        for server in &self.nameservers {
            out.push_str(&format!("nameserver {server}\n"));
        }
        if !self.options.is_empty() {
            let options: Vec<String> = self
                .options
                .iter()
                .map(|(name, value)| value.as_ref().map_or_else(|| name.clone(), |v| format!("{name}:{v}")))
                .collect();
            out.push_str(&format!("options {}\n", options.join(" ")));
        }
        out
    }
}

/// A pod's resolver configuration and what had to be left out of it.
///
/// `cluster_dns` are the service addresses of the cluster's DNS, `node` is what the pod's node itself uses.
#[must_use]
pub fn resolv_conf(pod: &Value, cluster_dns: &[IpAddr], node: &ResolvConf) -> (ResolvConf, Vec<String>) {
    let spec = &pod["spec"];
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or("default");
    let host_network = spec["hostNetwork"].as_bool().unwrap_or(false);
    let mut warnings = Vec::new();
    let policy = spec["dnsPolicy"].as_str().unwrap_or("ClusterFirst");
    let mut conf = match policy {
        "None" => ResolvConf::default(),
        "Default" => node.clone(),
        // A pod that shares the node's network uses the node's resolver unless it asks for the cluster's.
        "ClusterFirst" if host_network => node.clone(),
        "ClusterFirst" | "ClusterFirstWithHostNet" => {
            let mut searches = vec![
                format!("{namespace}.svc.{CLUSTER_DOMAIN}"),
                format!("svc.{CLUSTER_DOMAIN}"),
                CLUSTER_DOMAIN.to_owned(),
            ];
            append(&mut searches, node.searches.iter().cloned());
            ResolvConf {
                nameservers: cluster_dns.iter().map(ToString::to_string).collect(),
                searches,
                options: vec![("ndots".into(), Some("5".into()))],
            }
        }
        other => {
            warnings.push(format!("spec.dnsPolicy: {other:?} is unknown, the node's resolver is used"));
            node.clone()
        }
    };
    merge(&mut conf, &spec["dnsConfig"], &mut warnings);
    limit(&mut conf, &mut warnings);
    if policy == "None" && conf.nameservers.is_empty() {
        warnings.push("spec.dnsConfig.nameservers: empty although spec.dnsPolicy is None".into());
    }
    (conf, warnings)
}

fn merge(conf: &mut ResolvConf, config: &Value, warnings: &mut Vec<String>) {
    let mut texts = |field: &str| -> Vec<String> {
        let Some(list) = config[field].as_array() else { return Vec::new() };
        list.iter()
            .filter_map(|v| {
                let text = v.as_str().filter(|s| !s.is_empty() && !s.contains(char::is_whitespace));
                if text.is_none() {
                    warnings.push(format!("spec.dnsConfig.{field}: {v} is left out, it is no single word"));
                }
                text.map(str::to_owned)
            })
            .collect()
    };
    let (nameservers, searches) = (texts("nameservers"), texts("searches"));
    append(&mut conf.nameservers, nameservers);
    append(&mut conf.searches, searches.into_iter().map(|s| trim_dot(&s)));
    for option in config["options"].as_array().into_iter().flatten() {
        let Some(name) =
            option["name"].as_str().filter(|n| !n.is_empty() && !n.contains(char::is_whitespace))
        else {
            warnings.push(format!("spec.dnsConfig.options: {option} is left out, it has no usable name"));
            continue;
        };
        let value = match &option["value"] {
            Value::String(s) if !s.is_empty() => Some(s.clone()),
            Value::Number(n) => Some(n.to_string()),
            _ => None,
        };
        match conf.options.iter_mut().find(|(n, _)| n == name) {
            Some(known) => known.1 = value,
            None => conf.options.push((name.to_owned(), value)),
        }
    }
}

/// `.` alone is the root and stays.
fn trim_dot(domain: &str) -> String {
    match domain.strip_suffix('.') {
        Some("") | None => domain.to_owned(),
        Some(rest) => rest.to_owned(),
    }
}

fn append(list: &mut Vec<String>, more: impl IntoIterator<Item = String>) {
    for item in more {
        if !list.contains(&item) {
            list.push(item);
        }
    }
}

fn limit(conf: &mut ResolvConf, warnings: &mut Vec<String>) {
    if conf.nameservers.len() > MAX_NAMESERVERS {
        let rest = conf.nameservers.split_off(MAX_NAMESERVERS).join(" ");
        warnings.push(format!("nameservers: more than {MAX_NAMESERVERS}, left out: {rest}"));
    }
    let mut characters = 0;
    let fit = conf
        .searches
        .iter()
        .take(MAX_SEARCHES)
        .take_while(|s| {
            characters += s.len() + 1;
            characters <= MAX_SEARCH_CHARACTERS
        })
        .count();
    if fit < conf.searches.len() {
        let rest = conf.searches.split_off(fit).join(" ");
        warnings.push(format!("search domains: too many or too long, left out: {rest}"));
    }
}

/// Reads a resolv.conf(5) file.
#[must_use]
pub fn parse_resolv_conf(text: &str) -> ResolvConf {
    let mut conf = ResolvConf::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => conf.nameservers.extend(words.next()),
            // The last of these lines counts.
            Some("search" | "domain") => conf.searches = words.collect(),
            Some("options") => conf.options.extend(words.map(|w| match w.split_once(':') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (w, None),
            })),
            _ => {}
        }
    }
    conf
}

/// The host name that a pod's processes see.
#[must_use]
pub fn hostname(pod: &Value, node: &str) -> String {
    let spec = &pod["spec"];
    if spec["hostNetwork"].as_bool() == Some(true) {
        return node.to_owned();
    }
    let name = spec["hostname"]
        .as_str()
        .filter(|s| !s.is_empty())
        .or_else(|| pod["metadata"]["name"].as_str())
        .unwrap_or_default();
    let short = truncate(name);
    match fqdn(pod, short) {
        // Longer names do not fit into the kernel's field.
        Some(long) if spec["setHostnameAsFQDN"].as_bool() == Some(true) && long.len() <= 64 => long,
        _ => short.to_owned(),
    }
}

fn truncate(name: &str) -> &str {
    let cut =
        name.char_indices().map(|(i, c)| i + c.len_utf8()).take_while(|end| *end <= MAX_HOSTNAME).last();
    name[..cut.unwrap_or(0)].trim_end_matches(['-', '.'])
}

fn fqdn(pod: &Value, hostname: &str) -> Option<String> {
    let subdomain = pod["spec"]["subdomain"].as_str().filter(|s| !s.is_empty())?;
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or("default");
    Some(format!("{hostname}.{subdomain}.{namespace}.svc.{CLUSTER_DOMAIN}"))
}

/// A pod's `/etc/hosts`.
///
/// `nodes` are the node's own entries, which a pod in the node's network sees instead of its own.
#[must_use]
pub fn hosts(pod: &Value, addresses: &[IpAddr], node: &str, nodes: &[(IpAddr, String)]) -> String {
    let host_network = pod["spec"]["hostNetwork"].as_bool() == Some(true);
    let mut out = String::from(if host_network {
        "# Kubernetes-managed hosts file (host network).\n"
    } else {
        "# Kubernetes-managed hosts file.\n"
    });
    out.push_str(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    if host_network {
        for (address, name) in nodes {
            out.push_str(&format!("{address}\t{name}\n"));
        }
    } else {
        let own = hostname(pod, node);
        // With setHostnameAsFQDN the host name is the long one already.
        let short = own.split('.').next().unwrap_or_default();
        for address in addresses {
            match fqdn(pod, short) {
                Some(long) => out.push_str(&format!("{address}\t{long}\t{short}\n")),
                None => out.push_str(&format!("{address}\t{own}\n")),
            }
        }
    }
    let aliases: Vec<String> = pod["spec"]["hostAliases"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|alias| {
            let address: IpAddr = alias["ip"].as_str()?.parse().ok()?;
            let names: Vec<&str> = alias["hostnames"].as_array()?.iter().filter_map(Value::as_str).collect();
            (!names.is_empty()).then(|| format!("{address}\t{}\n", names.join("\t")))
        })
        .collect();
    if !aliases.is_empty() {
        out.push_str("\n# Entries added by HostAliases.\n");
        out.extend(aliases);
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node() -> ResolvConf {
        parse_resolv_conf("# upstream\nnameserver 172.18.0.1\nsearch example.org\noptions timeout:2 rotate\n")
    }

    fn dns() -> Vec<IpAddr> {
        vec!["10.96.0.10".parse().expect("address")]
    }

    #[expect(clippy::needless_pass_by_value, reason = "tables read better")]
    fn pod(spec: Value) -> Value {
        json!({"metadata": {"name": "web-0", "namespace": "shop"}, "spec": spec})
    }

    #[test]
    fn policies_and_configs_make_the_kubelets_file() {
        const CLUSTER: &str = "search shop.svc.cluster.local svc.cluster.local cluster.local example.org\n\
                               nameserver 10.96.0.10\noptions ndots:5\n";
        const NODE: &str = "search example.org\nnameserver 172.18.0.1\noptions timeout:2 rotate\n";
        for (spec, want) in [
            (json!({}), CLUSTER),
            (json!({"dnsPolicy": "ClusterFirst"}), CLUSTER),
            (json!({"dnsPolicy": "ClusterFirst", "hostNetwork": true}), NODE),
            (json!({"dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": true}), CLUSTER),
            (json!({"dnsPolicy": "Default"}), NODE),
            (
                json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.1"], "searches": ["a.test."],
                       "options": [{"name": "ndots", "value": "1"}, {"name": "use-vc"}]}}),
                "search a.test\nnameserver 192.0.2.1\noptions ndots:1 use-vc\n",
            ),
            (
                json!({"dnsConfig": {"nameservers": ["10.96.0.10", "192.0.2.1"], "searches": ["cluster.local", "b.test"],
                       "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}}),
                "search shop.svc.cluster.local svc.cluster.local cluster.local example.org b.test\n\
                 nameserver 10.96.0.10\nnameserver 192.0.2.1\noptions ndots:2 edns0\n",
            ),
        ] {
            let (conf, warnings) = resolv_conf(&pod(spec.clone()), &dns(), &node());
            assert_eq!(conf.render(), want, "{spec}");
            assert_eq!(warnings, Vec::<String>::new(), "{spec}");
        }
    }

    #[test]
    fn what_does_not_fit_is_cut_and_told() {
        let many: Vec<String> = (0..40).map(|i| format!("d{i}.test")).collect();
        for (spec, part) in [
            (json!({"dnsConfig": {"nameservers": ["1.1.1.1", "2.2.2.2", "3.3.3.3"]}}), "left out: 3.3.3.3"),
            (json!({"dnsConfig": {"searches": many}}), "left out: d28.test"),
            (json!({"dnsConfig": {"searches": ["a b"]}}), "no single word"),
            (json!({"dnsConfig": {"options": [{"value": "1"}]}}), "no usable name"),
            (json!({"dnsPolicy": "Magic"}), "Magic"),
            (json!({"dnsPolicy": "None"}), "nameservers"),
            (json!({"dnsConfig": {"nameservers": [5]}}), "5"),
        ] {
            let (conf, warnings) = resolv_conf(&pod(spec.clone()), &dns(), &node());
            assert!(conf.nameservers.len() <= 3 && conf.searches.len() <= 32, "{spec}");
            assert!(warnings.iter().any(|w| w.contains(part)), "{spec}: {warnings:?}");
        }
    }

    #[test]
    fn host_names_follow_the_pod_spec() {
        for (spec, want) in [
            (json!({}), "web-0"),
            (json!({"hostname": "db"}), "db"),
            (json!({"hostname": "db", "subdomain": "pg"}), "db"),
            (
                json!({"hostname": "db", "subdomain": "pg", "setHostnameAsFQDN": true}),
                "db.pg.shop.svc.cluster.local",
            ),
            (json!({"hostNetwork": true, "hostname": "db"}), "node-1"),
        ] {
            assert_eq!(hostname(&pod(spec.clone()), "node-1"), want, "{spec}");
        }
        let long = json!({"metadata": {"name": "a".repeat(62) + "-b"}, "spec": {}});
        assert_eq!(hostname(&long, "node-1"), "a".repeat(62));
    }

    #[test]
    fn hosts_has_the_pod_its_aliases_or_the_node() {
        let addresses = ["10.244.1.2", "fd00::2"].map(|a| a.parse().expect("address"));
        let nodes = [("172.18.1.1".parse().expect("address"), "node-1".to_owned())];
        for (spec, have, have_not) in [
            (json!({}), "\n10.244.1.2\tweb-0\nfd00::2\tweb-0\n", "node-1"),
            (json!({"subdomain": "pg"}), "\n10.244.1.2\tweb-0.pg.shop.svc.cluster.local\tweb-0\n", "node-1"),
            (json!({"hostNetwork": true}), "\n172.18.1.1\tnode-1\n", "10.244.1.2"),
            (
                json!({"hostAliases": [{"ip": "192.0.2.7", "hostnames": ["a.test", "b.test"]}, {"ip": "bad", "hostnames": ["x"]}]}),
                "# Entries added by HostAliases.\n192.0.2.7\ta.test\tb.test\n",
                "bad",
            ),
        ] {
            let text = hosts(&pod(spec.clone()), &addresses, "node-1", &nodes);
            assert!(text.contains(have) && !text.contains(have_not), "{spec}: {text}");
            assert!(text.contains("127.0.0.1\tlocalhost\n"), "{text}");
        }
    }
}
