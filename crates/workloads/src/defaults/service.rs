//! Services and their endpoints.

use serde_json::{Map, Value, json};

use super::{each, set, text, with, with_new};

const AFFINITY_TIMEOUT_SECONDS: u32 = 10_800;

pub(super) fn service(object: &mut Map<String, Value>) {
    with(object, "spec", |spec| {
        set(spec, "type", || json!("ClusterIP"));
        set(spec, "sessionAffinity", || json!("None"));
        if text(spec, "sessionAffinity") == Some("ClientIP") {
            with_new(spec, "sessionAffinityConfig", |config| {
                with_new(config, "clientIP", |client| {
                    set(client, "timeoutSeconds", || json!(AFFINITY_TIMEOUT_SECONDS));
                });
            });
        }
        each(spec, "ports", |port| {
            set(port, "protocol", || json!("TCP"));
            // 0 and "" are how clients of old spell an absent target port.
            if port.get("targetPort").is_some_and(|target| target == &json!(0) || target == &json!("")) {
                port.remove("targetPort");
            }
            if let Some(number) = port.get("port").cloned() {
                set(port, "targetPort", || number);
            }
        });
        let type_ = text(spec, "type").unwrap_or_default().to_owned();
        let has_external_ips =
            spec.get("externalIPs").and_then(Value::as_array).is_some_and(|ips| !ips.is_empty());
        let exposed = matches!(type_.as_str(), "NodePort" | "LoadBalancer");
        if exposed || type_ == "ClusterIP" && has_external_ips {
            set(spec, "externalTrafficPolicy", || json!("Cluster"));
        }
        if exposed || type_ == "ClusterIP" {
            set(spec, "internalTrafficPolicy", || json!("Cluster"));
        }
        if type_ == "LoadBalancer" {
            set(spec, "allocateLoadBalancerNodePorts", || json!(true));
        }
    });
    with_new(object, "status", |status| set(status, "loadBalancer", || json!({})));
}

pub(super) fn endpoints(object: &mut Map<String, Value>) {
    each(object, "subsets", |subset| each(subset, "ports", |port| set(port, "protocol", || json!("TCP"))));
}

pub(super) fn endpoint_slice(object: &mut Map<String, Value>) {
    each(object, "ports", |port| {
        set(port, "name", || json!(""));
        set(port, "protocol", || json!("TCP"));
    });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::defaults::apply;

    #[test]
    fn ports_types_and_policies() {
        let cases = [
            (
                json!({"ports": [{"port": 80}]}),
                json!({"type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                    "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}]}),
            ),
            (
                json!({"type": "LoadBalancer", "ports": [{"port": 53, "protocol": "UDP", "targetPort": "dns"}]}),
                json!({"type": "LoadBalancer", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                    "externalTrafficPolicy": "Cluster", "allocateLoadBalancerNodePorts": true,
                    "ports": [{"port": 53, "protocol": "UDP", "targetPort": "dns"}]}),
            ),
            (
                json!({"type": "ExternalName", "externalName": "db.example"}),
                json!({"type": "ExternalName", "externalName": "db.example", "sessionAffinity": "None"}),
            ),
            (
                json!({"sessionAffinity": "ClientIP", "externalIPs": ["192.0.2.1"]}),
                json!({"type": "ClusterIP", "sessionAffinity": "ClientIP", "externalIPs": ["192.0.2.1"],
                    "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
                    "externalTrafficPolicy": "Cluster", "internalTrafficPolicy": "Cluster"}),
            ),
        ];
        for (spec, expected) in cases {
            let mut object = json!({"spec": spec});
            apply("Service", &mut object);
            assert_eq!(object["spec"], expected);
            assert_eq!(object["status"], json!({"loadBalancer": {}}));
        }
    }
}
