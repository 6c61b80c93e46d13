//! Pods and pod templates.

use serde_json::{Map, Value, json};

use super::{each, set, text, with, with_new};

/// Defaults of a pod: those of its spec, and what only a pod gets, not a template.
pub(super) fn pod(object: &mut Map<String, Value>) {
    with(object, "spec", |spec| {
        self::spec(spec);
        let on_host = spec.get("hostNetwork") == Some(&Value::Bool(true));
        for list in ["initContainers", "containers"] {
            each(spec, list, |container| {
                if on_host {
                    each(container, "ports", |port| {
                        if let Some(number) = port.get("containerPort").cloned() {
                            set(port, "hostPort", || number);
                        }
                    });
                }
                requests_from_limits(container);
            });
        }
        set(spec, "enableServiceLinks", || json!(true));
        set(spec, "serviceAccountName", || json!("default"));
        mirror_service_account(spec);
        let priority = match text(spec, "priorityClassName") {
            Some("system-node-critical") => 2_000_001_000,
            Some("system-cluster-critical") => 2_000_000_000,
            _ => 0,
        };
        set(spec, "priority", || json!(priority));
        set(spec, "preemptionPolicy", || json!("PreemptLowerPriority"));
        tolerate_briefly(spec);
    });
    let class = qos_class(object);
    with_new(object, "status", |status| {
        set(status, "phase", || json!("Pending"));
        set(status, "qosClass", || json!(class));
    });
}

/// Defaults of a pod's spec, in a pod or in a template.
pub(super) fn spec(spec: &mut Map<String, Value>) {
    set(spec, "dnsPolicy", || json!("ClusterFirst"));
    set(spec, "restartPolicy", || json!("Always"));
    set(spec, "terminationGracePeriodSeconds", || json!(30));
    set(spec, "securityContext", || json!({}));
    set(spec, "schedulerName", || json!("default-scheduler"));
    mirror_service_account(spec);
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        each(spec, list, container);
    }
    each(spec, "volumes", volume);
    each(spec, "topologySpreadConstraints", |constraint| {
        set(constraint, "whenUnsatisfiable", || json!("DoNotSchedule"));
        set(constraint, "maxSkew", || json!(1));
    });
}

fn mirror_service_account(spec: &mut Map<String, Value>) {
    let (current, old) = ("serviceAccountName", "serviceAccount");
    for (from, to) in [(current, old), (old, current)] {
        if let Some(name) = spec.get(from).filter(|name| !name.is_null()).cloned() {
            set(spec, to, || name);
        }
    }
}

fn container(container: &mut Map<String, Value>) {
    let policy =
        if image_is_latest(text(container, "image").unwrap_or_default()) { "Always" } else { "IfNotPresent" };
    set(container, "imagePullPolicy", || json!(policy));
    set(container, "resources", || json!({}));
    set(container, "terminationMessagePath", || json!("/dev/termination-log"));
    set(container, "terminationMessagePolicy", || json!("File"));
    each(container, "ports", |port| set(port, "protocol", || json!("TCP")));
    for key in ["livenessProbe", "readinessProbe", "startupProbe"] {
        with(container, key, probe);
    }
    with(container, "lifecycle", |lifecycle| {
        for key in ["postStart", "preStop"] {
            with(lifecycle, key, handler);
        }
    });
    each(container, "env", |env| {
        with(env, "valueFrom", |from| {
            with(from, "fieldRef", |field| set(field, "apiVersion", || json!("v1")));
        });
    });
}

/// No tag and no digest means `latest`.
fn image_is_latest(image: &str) -> bool {
    let last = image.rsplit('/').next().unwrap_or_default();
    let (name, digest) = last.split_once('@').map_or((last, None), |(name, digest)| (name, Some(digest)));
    match name.split_once(':') {
        Some((_, tag)) => tag == "latest",
        None => digest.is_none(),
    }
}

fn probe(probe: &mut Map<String, Value>) {
    set(probe, "timeoutSeconds", || json!(1));
    set(probe, "periodSeconds", || json!(10));
    set(probe, "successThreshold", || json!(1));
    set(probe, "failureThreshold", || json!(3));
    with(probe, "grpc", |grpc| set(grpc, "service", || json!("")));
    handler(probe);
}

fn handler(handler: &mut Map<String, Value>) {
    with(handler, "httpGet", |get| {
        set(get, "path", || json!("/"));
        set(get, "scheme", || json!("HTTP"));
    });
}

fn volume(volume: &mut Map<String, Value>) {
    const FILE_MODE: u32 = 0o644;
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        with(volume, source, |source| set(source, "defaultMode", || json!(FILE_MODE)));
    }
    with(volume, "projected", |projected| {
        each(projected, "sources", |source| {
            with(source, "serviceAccountToken", |token| set(token, "expirationSeconds", || json!(3600)));
            with(source, "downwardAPI", downward);
        });
    });
    with(volume, "downwardAPI", downward);
    with(volume, "hostPath", |path| set(path, "type", || json!("")));
    if volume.keys().all(|key| key == "name") {
        volume.insert("emptyDir".into(), json!({}));
    }
}

fn downward(source: &mut Map<String, Value>) {
    each(source, "items", |item| {
        with(item, "fieldRef", |field| set(field, "apiVersion", || json!("v1")));
    });
}

/// A limit without a request is the request.
fn requests_from_limits(container: &mut Map<String, Value>) {
    with(container, "resources", |resources| {
        let Some(limits) = resources.get("limits").and_then(Value::as_object).cloned() else { return };
        with_new(resources, "requests", |requests| {
            for (name, limit) in limits {
                set(requests, &name, || limit);
            }
        });
    });
}

/// The DefaultTolerationSeconds admission plugin: five minutes on a node that has gone away.
fn tolerate_briefly(spec: &mut Map<String, Value>) {
    set(spec, "tolerations", || json!([]));
    let Some(Value::Array(tolerations)) = spec.get_mut("tolerations") else { return };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = tolerations.iter().filter_map(Value::as_object).any(|t| {
            let for_key = text(t, "key").is_none_or(|k| k.is_empty() || k == key);
            let for_effect = text(t, "effect").is_none_or(|e| e.is_empty() || e == "NoExecute");
            for_key && for_effect
        });
        if !tolerated {
            tolerations.push(json!({
                "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300
            }));
        }
    }
}

/// Quality of service by cpu and memory: Guaranteed when every container's requests equal its limits, BestEffort when
/// there are none at all.
fn qos_class(pod: &Map<String, Value>) -> &'static str {
    let spec = pod.get("spec");
    let lists = ["containers", "initContainers"];
    let containers = lists
        .iter()
        .filter_map(|list| spec.and_then(|s| s.get(list))?.as_array())
        .flatten()
        .collect::<Vec<_>>();
    let amount = |container: &Value, kind: &str, name: &str| {
        let amount = container.get("resources")?.get(kind)?.get(name)?;
        (!matches!(amount.as_str(), Some("" | "0")) && amount.as_i64() != Some(0)).then(|| amount.to_string())
    };
    let mut any = false;
    let mut guaranteed = !containers.is_empty();
    for container in containers {
        for name in ["cpu", "memory"] {
            let (request, limit) = (amount(container, "requests", name), amount(container, "limits", name));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::defaults::apply;

    #[test]
    fn pull_policy_follows_the_tag() {
        for (image, latest) in [
            ("nginx", true),
            ("nginx:latest", true),
            ("nginx:1.27", false),
            ("registry:5000/a/nginx", true),
            ("registry:5000/a/nginx:1", false),
            ("nginx@sha256:00", false),
            ("nginx:latest@sha256:00", true),
        ] {
            assert_eq!(image_is_latest(image), latest, "{image}");
        }
    }

    #[test]
    fn a_pod_gets_what_the_api_server_and_admission_add() {
        let mut pod = json!({"metadata": {"name": "web-0"}, "spec": {"containers": [
            {"name": "c", "image": "x", "ports": [{"name": "http", "containerPort": 8080}]}]}});
        apply("Pod", &mut pod);
        let once = pod.clone();
        apply("Pod", &mut pod);
        assert_eq!(pod, once);
        let tolerations: Vec<_> = ["not-ready", "unreachable"]
            .map(|key| {
                json!({"key": format!("node.kubernetes.io/{key}"),
                "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})
            })
            .into();
        assert_eq!(
            pod["spec"],
            json!({
                "containers": [{"name": "c", "image": "x", "imagePullPolicy": "Always", "resources": {},
                    "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                    "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}],
                "restartPolicy": "Always", "terminationGracePeriodSeconds": 30, "dnsPolicy": "ClusterFirst",
                "serviceAccountName": "default", "serviceAccount": "default", "securityContext": {},
                "schedulerName": "default-scheduler", "tolerations": tolerations, "priority": 0,
                "enableServiceLinks": true, "preemptionPolicy": "PreemptLowerPriority"
            })
        );
        assert_eq!(pod["status"], json!({"phase": "Pending", "qosClass": "BestEffort"}));
    }

    #[test]
    fn host_network_ports_and_tolerations() {
        let mut pod = json!({"spec": {"hostNetwork": true, "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "c", "ports": [{"containerPort": 9100}],
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}]}});
        apply("Pod", &mut pod);
        assert_eq!(pod["spec"]["containers"][0]["ports"][0]["hostPort"], 9100);
        assert_eq!(pod["spec"]["tolerations"], json!([{"operator": "Exists"}]));
        assert_eq!(pod["status"]["qosClass"], "Guaranteed");
    }

    #[test]
    fn probes_volumes_and_env() {
        let mut pod = json!({"spec": {"serviceAccount": "old", "volumes": [{"name": "tmp"},
                {"name": "c", "configMap": {"name": "x"}}],
            "containers": [{"name": "c", "image": "a:1", "readinessProbe": {"httpGet": {"port": 80}},
                "env": [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]}]}});
        apply("Pod", &mut pod);
        let spec = &pod["spec"];
        assert_eq!(spec["serviceAccountName"], "old");
        assert_eq!(spec["volumes"][0]["emptyDir"], json!({}));
        assert_eq!(spec["volumes"][1]["configMap"]["defaultMode"], 420);
        assert_eq!(
            spec["containers"][0]["readinessProbe"],
            json!({"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1,
                "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3})
        );
        assert_eq!(spec["containers"][0]["env"][0]["valueFrom"]["fieldRef"]["apiVersion"], "v1");
    }
}
