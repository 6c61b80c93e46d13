//! A Service as far as its load balancer addresses are concerned.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;

/// Annotation: which addresses the Service asks for, separated by commas. `spec.loadBalancerIP` is heeded as well.
pub(crate) const REQUEST: &str = "podway.dev/load-balancer-ips";
/// Annotation: Services with an equal value may have one address together, when no port of theirs is the same.
pub(crate) const SHARED: &str = "podway.dev/shared-address";
/// Annotation that Podway writes: the pool that the addresses are from. Addresses without it are somebody else's.
pub(crate) const POOL: &str = "podway.dev/load-balancer-pool";
/// Annotation that Podway writes: the node that answers for the addresses on the node network.
pub(crate) const ANNOUNCED_BY: &str = "podway.dev/announced-by";
/// `spec.loadBalancerClass` that means Podway; none at all does, too.
pub(crate) const CLASS: &str = "podway.dev/pool";

/// Most addresses that one Service may ask for: one of each family.
const REQUESTS_MAX: usize = 2;

/// Namespace and name.
pub(crate) type ObjectName = (String, String);

/// A Service that has, had or wants an address of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LbService {
    /// Namespace and name.
    pub(crate) name: ObjectName,
    /// `metadata.uid`.
    pub(crate) uid: String,
    /// `metadata.resourceVersion`, as a number when it is one.
    pub(crate) version: Option<u64>,
    /// `metadata.creationTimestamp`; sorts as text.
    pub(crate) created: String,
    /// `metadata.labels`.
    pub(crate) labels: BTreeMap<String, String>,
    /// It is of type LoadBalancer, of our class, and stays.
    pub(crate) wanted: bool,
    /// Whether it wants IPv4 and IPv6.
    pub(crate) families: [bool; 2],
    /// Addresses that it asks for.
    pub(crate) requested: Vec<IpAddr>,
    /// What is wrong with what it asks for.
    pub(crate) bad_request: Option<String>,
    /// Value of [`SHARED`].
    pub(crate) share_key: Option<String>,
    /// Protocol and port of each port.
    pub(crate) ports: Vec<(String, u64)>,
    /// `externalTrafficPolicy: Local`.
    pub(crate) local: bool,
    /// `spec.selector`.
    pub(crate) selector: BTreeMap<String, String>,
    /// `status.loadBalancer.ingress[].ip`.
    pub(crate) ingress: Vec<IpAddr>,
    /// `status.loadBalancer.ingress` is not empty.
    pub(crate) has_ingress: bool,
    /// Value of [`POOL`].
    pub(crate) pool: Option<String>,
    /// Value of [`ANNOUNCED_BY`].
    pub(crate) announced_by: Option<String>,
}

impl LbService {
    /// Reads a Service; `None` for one that neither wants an address nor has one of ours. Fields that are malformed
    /// count as absent: the API server checks them, and the compiler of services tells about them.
    #[must_use]
    pub(crate) fn read(value: &Value) -> Option<Self> {
        let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).filter(|t| !t.is_empty());
        let annotations = value.pointer("/metadata/annotations");
        let annotation = |key: &str| {
            annotations.and_then(|a| a.get(key)).and_then(Value::as_str).filter(|t| !t.is_empty())
        };
        let class = text("/spec/loadBalancerClass");
        let wanted = text("/spec/type") == Some("LoadBalancer")
            && class.is_none_or(|c| c == CLASS)
            && text("/metadata/deletionTimestamp").is_none();
        let pool = annotation(POOL).map(str::to_owned);
        if !wanted && pool.is_none() {
            return None;
        }
        let array =
            |pointer: &str| value.pointer(pointer).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let has_family = |name: &str| array("/spec/ipFamilies").iter().any(|f| f == name);
        let mut families = [has_family("IPv4"), has_family("IPv6")];
        if families == [false, false] {
            let v6 = text("/spec/clusterIP").is_some_and(|ip| ip.contains(':'));
            families = [!v6, v6];
        }
        let (requested, bad_request) = requests(annotation(REQUEST), text("/spec/loadBalancerIP"), families);
        let ingress = array("/status/loadBalancer/ingress");
        Some(Self {
            name: (
                text("/metadata/namespace").unwrap_or_default().to_owned(),
                text("/metadata/name").unwrap_or_default().to_owned(),
            ),
            uid: text("/metadata/uid").unwrap_or_default().to_owned(),
            version: text("/metadata/resourceVersion").and_then(|v| v.parse().ok()),
            created: text("/metadata/creationTimestamp").unwrap_or_default().to_owned(),
            labels: strings(value.pointer("/metadata/labels")),
            wanted,
            families,
            requested,
            bad_request,
            share_key: annotation(SHARED).map(str::to_owned),
            ports: array("/spec/ports")
                .iter()
                .map(|p| {
                    let protocol = p.get("protocol").and_then(Value::as_str).unwrap_or("TCP");
                    (protocol.to_owned(), p.get("port").and_then(Value::as_u64).unwrap_or(0))
                })
                .collect(),
            local: text("/spec/externalTrafficPolicy") == Some("Local"),
            selector: strings(value.pointer("/spec/selector")),
            ingress: ingress.iter().filter_map(|i| i.get("ip")?.as_str()?.parse().ok()).collect(),
            has_ingress: !ingress.is_empty(),
            pool,
            announced_by: annotation(ANNOUNCED_BY).map(str::to_owned),
        })
    }

    /// `namespace/name`.
    #[must_use]
    pub(crate) fn title(&self) -> String {
        format!("{}/{}", self.name.0, self.name.1)
    }

    /// Whether two Services may have one address together; the reason when not.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn may_share_with(&self, other: &Self) -> Result<(), String> {
        let (Some(own), Some(others)) = (&self.share_key, &other.share_key) else {
            return Err(format!("both need an equal annotation {SHARED} to share it"));
        };
        if own != others {
            return Err(format!("their annotations {SHARED} differ ({own:?}, {others:?})"));
        }
        if let Some((protocol, port)) = self.ports.iter().find(|p| other.ports.contains(p)) {
            return Err(format!("both have port {port}/{protocol}"));
        }
        if (self.local || other.local) && self.selector != other.selector {
            return Err(
                "with externalTrafficPolicy: Local, only Services with equal selectors share".to_owned()
            );
        }
        Ok(())
    }
}

fn requests(
    annotation: Option<&str>,
    field: Option<&str>,
    families: [bool; 2],
) -> (Vec<IpAddr>, Option<String>) {
    // The annotation can say more than the field, which is deprecated.
    let (place, list) = match (annotation, field) {
        (Some(list), _) => (format!("annotation {REQUEST}"), list),
        (None, Some(one)) => ("spec.loadBalancerIP".to_owned(), one),
        (None, None) => return (Vec::new(), None),
    };
    let mut found: Vec<IpAddr> = Vec::new();
    for part in list.split(',').map(str::trim) {
        let Ok(address) = part.parse::<IpAddr>() else {
            return (Vec::new(), Some(format!("{place}: {part:?} is no IP address")));
        };
        if found.iter().any(|f| f.is_ipv4() == address.is_ipv4()) || found.len() == REQUESTS_MAX {
            let cause =
                format!("{place}: {address} is the second address of its family; one of each is possible");
            return (Vec::new(), Some(cause));
        }
        if !families[usize::from(address.is_ipv6())] {
            let cause = format!("{place}: {address} is of a family that is not in spec.ipFamilies");
            return (Vec::new(), Some(cause));
        }
        found.push(address);
    }
    (found, None)
}

pub(super) fn strings(map: Option<&Value>) -> BTreeMap<String, String> {
    let pairs = map.and_then(Value::as_object).into_iter().flatten();
    pairs.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(spec: &Value, annotations: &Value) -> Value {
        json!({"metadata": {"namespace": "x", "name": "a", "uid": "u", "resourceVersion": "12",
                            "annotations": annotations},
               "spec": spec,
               "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"hostname": "h"}]}}})
    }

    #[test]
    fn only_what_is_ours_is_read() {
        let none = json!({});
        for (spec, annotations, wanted) in [
            (json!({"type": "ClusterIP"}), none.clone(), None),
            (json!({"type": "ClusterIP"}), json!({POOL: "p"}), Some(false)),
            (json!({"type": "LoadBalancer"}), none.clone(), Some(true)),
            (json!({"type": "LoadBalancer", "loadBalancerClass": CLASS}), none.clone(), Some(true)),
            (json!({"type": "LoadBalancer", "loadBalancerClass": "other"}), none.clone(), None),
            (json!({"type": "LoadBalancer", "loadBalancerClass": "other"}), json!({POOL: "p"}), Some(false)),
        ] {
            let read = LbService::read(&service(&spec, &annotations));
            assert_eq!(read.map(|s| s.wanted), wanted, "{spec}");
        }
        let mut going = service(&json!({"type": "LoadBalancer"}), &json!({POOL: "p"}));
        going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert!(!LbService::read(&going).unwrap().wanted);
    }

    #[test]
    fn requests_are_read_and_refused_by_name() {
        let read = |spec: Value, annotations: Value| {
            let service = LbService::read(&service(&spec, &annotations)).unwrap();
            (service.requested, service.bad_request.unwrap_or_default())
        };
        let dual = |extra: &str| json!({"type": "LoadBalancer", "ipFamilies": ["IPv4", "IPv6"], "loadBalancerIP": extra});
        let v4: IpAddr = "192.0.2.9".parse().unwrap();
        let v6: IpAddr = "2001:db8::9".parse().unwrap();
        assert_eq!(read(dual("192.0.2.9"), json!({})).0, [v4]);
        assert_eq!(read(dual("192.0.2.1"), json!({REQUEST: "2001:db8::9, 192.0.2.9"})).0, [v6, v4]);
        for (request, part) in [
            ("192.0.2.9,192.0.2.8", "second address of its family"),
            ("192.0.2.300", "no IP address"),
            ("", ""),
        ] {
            let (found, why) = read(dual(""), json!({REQUEST: request}));
            assert!(found.is_empty() && why.contains(part), "{request}: {why}");
        }
        let single = json!({"type": "LoadBalancer", "ipFamilies": ["IPv4"]});
        assert!(read(single, json!({REQUEST: "2001:db8::9"})).1.contains("spec.ipFamilies"));
    }
}
