//! What is in the cluster before the first manifest: its nodes and the `kubernetes` Service.

use podway_apiserver::{ApiError, Store, WriteOptions};
use podway_workloads::rfc3339;
use serde_json::{Value, json};

use crate::nodes::NETNS_ANNOTATION;
use crate::spec::{API_PORT, LabSpec, NodePlan};

/// Port of the `kubernetes` Service, as in every cluster. It speaks plain HTTP here.
const SERVICE_PORT: u16 = 443;

pub(super) fn seed(store: &Store, spec: &LabSpec) -> Result<(), ApiError> {
    for plan in spec.node_plans() {
        store.create(node(spec, &plan), WriteOptions::default())?;
    }
    // What a real cluster gets with the installation: addresses for load balancers, and the kind that holds them.
    let definition: Value = serde_json::from_str(podway_model::LOAD_BALANCER_POOL_DEFINITION)
        .map_err(|e| ApiError::bad_request(format!("the definition of LoadBalancerPool: {e}")))?;
    store.create(definition, WriteOptions::default())?;
    store.create(
        json!({
            "apiVersion": "podway.dev/v1alpha1", "kind": "LoadBalancerPool",
            "metadata": {"name": "default"},
            "spec": {"cidrs": spec.load_balancer_cidrs()},
        }),
        WriteOptions::default(),
    )?;
    let addresses = spec.api_service_addresses();
    let families: Vec<&str> = addresses.iter().map(|a| if a.is_ipv4() { "IPv4" } else { "IPv6" }).collect();
    store.create(
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "kubernetes", "namespace": "default",
                         "labels": {"component": "apiserver", "provider": "kubernetes"}},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": addresses.first(), "clusterIPs": addresses, "ipFamilies": families,
                "ipFamilyPolicy": if families.len() > 1 { "RequireDualStack" } else { "SingleStack" },
                "ports": [{"name": "https", "port": SERVICE_PORT, "protocol": "TCP", "targetPort": API_PORT}],
                "sessionAffinity": "None",
            },
        }),
        WriteOptions::default(),
    )?;
    let fabric = spec.fabric_addresses();
    let ports = json!([{"name": "https", "port": API_PORT, "protocol": "TCP"}]);
    for (family, suffix, is_v4) in [("IPv4", "", true), ("IPv6", "-ipv6", false)] {
        let own: Vec<_> = fabric.iter().filter(|a| a.is_ipv4() == is_v4).collect();
        if own.is_empty() || !families.contains(&family) {
            continue;
        }
        store.create(
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": format!("kubernetes{suffix}"), "namespace": "default",
                             "labels": {"kubernetes.io/service-name": "kubernetes"}},
                "addressType": family,
                "endpoints": [{"addresses": own, "conditions": {"ready": true}}],
                "ports": ports,
            }),
            WriteOptions::default(),
        )?;
    }
    let subset: Vec<Value> = fabric
        .iter()
        .filter(|a| addresses.first().is_some_and(|first| first.is_ipv4() == a.is_ipv4()))
        .map(|a| json!({"ip": a}))
        .collect();
    store.create(
        json!({
            "apiVersion": "v1", "kind": "Endpoints",
            "metadata": {"name": "kubernetes", "namespace": "default",
                         "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
            "subsets": [{"addresses": subset, "ports": ports}],
        }),
        WriteOptions::default(),
    )?;
    Ok(())
}

/// The Node object of a node that is about to be.
pub(crate) fn node(spec: &LabSpec, plan: &NodePlan) -> Value {
    let mut addresses: Vec<Value> =
        plan.addresses.iter().map(|a| json!({"type": "InternalIP", "address": a})).collect();
    addresses.push(json!({"type": "Hostname", "address": plan.name}));
    // Stand-ins are small, so a lab node takes what a large real one would.
    let capacity = json!({"cpu": "64", "memory": "256Gi", "ephemeral-storage": "1Ti", "pods": "250"});
    let now = rfc3339(jiff::Timestamp::now());
    let machine = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": plan.name,
            "labels": {
                "kubernetes.io/hostname": plan.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": machine,
                "topology.kubernetes.io/zone": plan.zone, "topology.kubernetes.io/region": plan.region,
            },
            "annotations": {NETNS_ANNOTATION: spec.name.node_netns(&plan.name)},
        },
        "spec": {"podCIDR": plan.pod_cidrs.first(), "podCIDRs": plan.pod_cidrs},
        "status": {
            "addresses": addresses,
            "capacity": capacity,
            "allocatable": capacity,
            "nodeInfo": {
                "kernelVersion": kernel.trim(), "operatingSystem": "linux", "architecture": machine,
                "osImage": "podway lab", "containerRuntimeVersion": concat!("podway://", env!("CARGO_PKG_VERSION")),
                "kubeletVersion": concat!("v1.36.0-podway-", env!("CARGO_PKG_VERSION")), "kubeProxyVersion": "",
                "machineID": plan.name, "systemUUID": plan.name, "bootID": plan.name,
            },
            "conditions": [{"type": "Ready", "status": "False", "reason": "AgentNotReady",
                            "message": "the agent has not come up yet", "lastTransitionTime": now,
                            "lastHeartbeatTime": now}],
        },
    })
}

#[cfg(test)]
mod tests {
    use podway_apiserver::{ResourceKey, StoreConfig};

    use super::*;
    use crate::spec::{Family, Mode, ServiceMode, UnderlayFamily};

    #[test]
    fn every_family_makes_a_cluster_that_the_store_takes() {
        for (family, underlay, cluster_ips, slices) in [
            (Family::Ipv4, UnderlayFamily::Ipv4, 1, 1),
            (Family::Ipv6, UnderlayFamily::Ipv6, 1, 1),
            (Family::Ipv6, UnderlayFamily::Ipv4, 1, 1),
            (Family::Dual, UnderlayFamily::Ipv4, 2, 2),
        ] {
            let spec = LabSpec {
                name: "lab".parse().expect("name"),
                nodes: 3,
                zones: 2,
                mode: Mode::Vxlan,
                family,
                underlay_family: underlay,
                underlay_mtu: 1500,
                pod_mtu: None,
                vxlan_port: 8472,
                vxlan_vni: 1,
                service_mode: ServiceMode::Ebpf,
                masquerade_all: false,
                ipvs_scheduler: None,
                load_balancer_pool: Vec::new(),
            };
            let store = Store::new(StoreConfig::default());
            seed(&store, &spec).expect("seed");
            let service =
                store.get(&ResourceKey::new("", "services", "default", "kubernetes")).expect("service");
            assert_eq!(service["spec"]["clusterIPs"].as_array().map(Vec::len), Some(cluster_ips));
            let slice = podway_apiserver::GroupResource::new("discovery.k8s.io", "endpointslices");
            assert_eq!(store.snapshot(&[slice]).objects.len(), slices);
            let pool = ResourceKey::new("podway.dev", "loadbalancerpools", "", "default");
            let pool = store.get(&pool).expect("pool");
            assert_eq!(pool["spec"]["cidrs"].as_array().map(Vec::len), Some(cluster_ips));
            let node = store.get(&ResourceKey::new("", "nodes", "", "node-2")).expect("node");
            assert_eq!(node["metadata"]["labels"]["topology.kubernetes.io/zone"], "zone-2");
            let first = node["status"]["addresses"][0]["address"].as_str().expect("address").to_owned();
            assert_eq!(
                first.contains(':'),
                underlay == UnderlayFamily::Ipv6,
                "the underlay's family is first"
            );
        }
    }
}
