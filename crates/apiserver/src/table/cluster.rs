//! Rows of configuration, storage, access control and other kinds of a whole cluster.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::Cells;
use super::format::{NONE, UNKNOWN, UNSET, age, count, duration, joined, scalar_or, text_or};
use super::pods;
use crate::json::{at, get_array, get_int, get_str, is_terminating};
use crate::kinds::KindInfo;

pub(super) fn printer(kind: &KindInfo) -> Option<(&'static str, Cells)> {
    let printer: (&'static str, Cells) = match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "ConfigMap") => ("#Data|Age", config_map),
        ("", "Event") => (pods::EVENT_COLUMNS, pods::event),
        ("", "PersistentVolume") => (
            "Capacity|Access Modes|Reclaim Policy|Status|Claim|StorageClass|VolumeAttributesClass|Reason|Age|*VolumeMode",
            volume,
        ),
        ("", "PersistentVolumeClaim") => {
            ("Status|Volume|Capacity|Access Modes|StorageClass|VolumeAttributesClass|Age|*VolumeMode", claim)
        }
        ("", "ResourceQuota") => ("Request|Limit|Age", quota),
        ("", "Secret") => ("Type|#Data|Age", secret),
        ("", "ServiceAccount") => ("#Secrets|Age", service_account),
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => {
            ("Role|Age|*Users|*Groups|*ServiceAccounts", role_binding)
        }
        ("storage.k8s.io", "CSIDriver") => (
            "AttachRequired|PodInfoOnMount|StorageCapacity|TokenRequests|RequiresRepublish|Modes|Age",
            csi_driver,
        ),
        ("storage.k8s.io", "CSINode") => ("#Drivers|Age", |node, now| {
            vec![json!(get_array(node, &["spec", "drivers"]).len()), age(node, now)]
        }),
        ("storage.k8s.io", "StorageClass") => {
            ("Provisioner|ReclaimPolicy|VolumeBindingMode|AllowVolumeExpansion|Age", storage_class)
        }
        ("storage.k8s.io", "VolumeAttachment") => ("Attacher|PV|Node|Attached|Age", volume_attachment),
        ("storage.k8s.io", "VolumeAttributesClass") => {
            ("DriverName|Age", |class, now| vec![text_or(class, &["driverName"], ""), age(class, now)])
        }
        (
            "admissionregistration.k8s.io",
            "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration",
        ) => ("#Webhooks|Age", |object, now| {
            vec![json!(get_array(object, &["webhooks"]).len()), age(object, now)]
        }),
        ("admissionregistration.k8s.io", "ValidatingAdmissionPolicy") => {
            ("#Validations|ParamKind|Age", admission_policy)
        }
        ("admissionregistration.k8s.io", "ValidatingAdmissionPolicyBinding") => {
            ("PolicyName|ParamRef|Age", admission_policy_binding)
        }
        ("coordination.k8s.io", "Lease") => ("Holder|Age", |lease, now| {
            vec![text_or(lease, &["spec", "holderIdentity"], ""), age(lease, now)]
        }),
        ("certificates.k8s.io", "CertificateSigningRequest") => {
            ("Age|SignerName|Requestor|RequestedDuration|Condition", signing_request)
        }
        ("scheduling.k8s.io", "PriorityClass") => {
            ("#Value|Global-Default|Age|PreemptionPolicy", priority_class)
        }
        ("node.k8s.io", "RuntimeClass") => {
            ("Handler|Age", |class, now| vec![text_or(class, &["handler"], ""), age(class, now)])
        }
        _ => return None,
    };
    Some(printer)
}

fn len(object: &Value, field: &str) -> usize {
    object.get(field).and_then(Value::as_object).map_or(0, Map::len)
}

fn bool_text(value: Option<&Value>) -> Value {
    match value.and_then(Value::as_bool) {
        Some(value) => json!(value.to_string()),
        None => json!(UNSET),
    }
}

fn config_map(map: &Value, now: Timestamp) -> Vec<Value> {
    vec![json!(len(map, "data") + len(map, "binaryData")), age(map, now)]
}

fn secret(secret: &Value, now: Timestamp) -> Vec<Value> {
    vec![text_or(secret, &["type"], ""), json!(len(secret, "data")), age(secret, now)]
}

fn service_account(account: &Value, now: Timestamp) -> Vec<Value> {
    vec![json!(get_array(account, &["secrets"]).len()), age(account, now)]
}

fn access_modes(modes: &[Value]) -> String {
    let short = |mode: &Value| match mode.as_str() {
        Some("ReadWriteOnce") => "RWO",
        Some("ReadOnlyMany") => "ROX",
        Some("ReadWriteMany") => "RWX",
        Some("ReadWriteOncePod") => "RWOP",
        _ => "",
    };
    modes.iter().map(short).filter(|mode| !mode.is_empty()).collect::<Vec<_>>().join(",")
}

fn storage_class_of(object: &Value) -> Value {
    let annotated = at(object, &["metadata", "annotations"])
        .and_then(|annotations| annotations.get("volume.beta.kubernetes.io/storage-class"))
        .and_then(Value::as_str);
    annotated.map_or_else(|| text_or(object, &["spec", "storageClassName"], ""), |class| json!(class))
}

fn phase(object: &Value) -> Value {
    if is_terminating(object) { json!("Terminating") } else { text_or(object, &["status", "phase"], "") }
}

fn volume(volume: &Value, now: Timestamp) -> Vec<Value> {
    let claim = at(volume, &["spec", "claimRef"]).map_or_else(String::new, |claim| {
        format!("{}/{}", get_str(claim, &["namespace"]), get_str(claim, &["name"]))
    });
    vec![
        text_or(volume, &["spec", "capacity", "storage"], ""),
        json!(access_modes(get_array(volume, &["spec", "accessModes"]))),
        text_or(volume, &["spec", "persistentVolumeReclaimPolicy"], ""),
        phase(volume),
        json!(claim),
        storage_class_of(volume),
        text_or(volume, &["spec", "volumeAttributesClassName"], UNSET),
        text_or(volume, &["status", "reason"], ""),
        age(volume, now),
        text_or(volume, &["spec", "volumeMode"], UNSET),
    ]
}

fn claim(claim: &Value, now: Timestamp) -> Vec<Value> {
    let bound = !get_str(claim, &["spec", "volumeName"]).is_empty();
    let modes = access_modes(get_array(claim, &["status", "accessModes"]));
    vec![
        phase(claim),
        text_or(claim, &["spec", "volumeName"], ""),
        if bound { text_or(claim, &["status", "capacity", "storage"], "") } else { json!("") },
        json!(if bound { modes } else { String::new() }),
        storage_class_of(claim),
        text_or(claim, &["spec", "volumeAttributesClassName"], UNSET),
        age(claim, now),
        text_or(claim, &["spec", "volumeMode"], UNSET),
    ]
}

fn quota(quota: &Value, now: Timestamp) -> Vec<Value> {
    let (mut requests, mut limits) = (Vec::new(), Vec::new());
    if let Some(hard) = at(quota, &["status", "hard"]).and_then(Value::as_object) {
        for (resource, hard) in hard {
            let used = at(quota, &["status", "used"]).and_then(|used| used.get(resource));
            let entry = format!("{resource}: {}/{}", scalar_or(used, "0"), scalar_or(Some(hard), "0"));
            if resource.starts_with("limits.") { &mut limits } else { &mut requests }.push(entry);
        }
    }
    vec![json!(requests.join(", ")), json!(limits.join(", ")), age(quota, now)]
}

fn role_binding(binding: &Value, now: Timestamp) -> Vec<Value> {
    let subjects = |kind: &str| {
        let names = get_array(binding, &["subjects"]).iter().filter(|subject| subject["kind"] == kind).map(
            |subject| match (kind, get_str(subject, &["namespace"])) {
                ("ServiceAccount", namespace) => format!("{namespace}/{}", get_str(subject, &["name"])),
                _ => get_str(subject, &["name"]).to_owned(),
            },
        );
        json!(names.collect::<Vec<_>>().join(", "))
    };
    let role =
        format!("{}/{}", get_str(binding, &["roleRef", "kind"]), get_str(binding, &["roleRef", "name"]));
    vec![json!(role), age(binding, now), subjects("User"), subjects("Group"), subjects("ServiceAccount")]
}

fn csi_driver(driver: &Value, now: Timestamp) -> Vec<Value> {
    let setting = |field, otherwise: bool| {
        json!(at(driver, &["spec", field]).and_then(Value::as_bool).unwrap_or(otherwise))
    };
    let tokens = get_array(driver, &["spec", "tokenRequests"]);
    let modes: Vec<&str> =
        get_array(driver, &["spec", "volumeLifecycleModes"]).iter().filter_map(Value::as_str).collect();
    vec![
        setting("attachRequired", true),
        setting("podInfoOnMount", false),
        setting("storageCapacity", false),
        if tokens.is_empty() { json!(UNSET) } else { joined(tokens, "audience") },
        setting("requiresRepublish", false),
        json!(if modes.is_empty() { NONE.to_owned() } else { modes.join(",") }),
        age(driver, now),
    ]
}

fn storage_class(class: &Value, now: Timestamp) -> Vec<Value> {
    vec![
        text_or(class, &["provisioner"], ""),
        text_or(class, &["reclaimPolicy"], "Delete"),
        text_or(class, &["volumeBindingMode"], "Immediate"),
        json!(at(class, &["allowVolumeExpansion"]).and_then(Value::as_bool).unwrap_or(false)),
        age(class, now),
    ]
}

fn volume_attachment(attachment: &Value, now: Timestamp) -> Vec<Value> {
    vec![
        text_or(attachment, &["spec", "attacher"], ""),
        text_or(attachment, &["spec", "source", "persistentVolumeName"], ""),
        text_or(attachment, &["spec", "nodeName"], ""),
        bool_text(at(attachment, &["status", "attached"])),
        age(attachment, now),
    ]
}

fn admission_policy(policy: &Value, now: Timestamp) -> Vec<Value> {
    let parameters = at(policy, &["spec", "paramKind"]).map_or_else(
        || UNSET.to_owned(),
        |kind| format!("{}/{}", get_str(kind, &["apiVersion"]), get_str(kind, &["kind"])),
    );
    vec![json!(get_array(policy, &["spec", "validations"]).len()), json!(parameters), age(policy, now)]
}

fn admission_policy_binding(binding: &Value, now: Timestamp) -> Vec<Value> {
    let parameters = at(binding, &["spec", "paramRef"]).map_or_else(
        || UNSET.to_owned(),
        |reference| match (get_str(reference, &["namespace"]), get_str(reference, &["name"])) {
            ("", name) => format!("*/{name}"),
            (namespace, name) => format!("{namespace}/{name}"),
        },
    );
    vec![text_or(binding, &["spec", "policyName"], ""), json!(parameters), age(binding, now)]
}

fn signing_request(request: &Value, now: Timestamp) -> Vec<Value> {
    let lasts = get_int(request, &["spec", "expirationSeconds"]).map_or_else(|| NONE.to_owned(), duration);
    let types: Vec<&str> =
        get_array(request, &["status", "conditions"]).iter().map(|c| get_str(c, &["type"])).collect();
    let mut state = if types.contains(&"Denied") {
        "Denied".to_owned()
    } else if types.contains(&"Approved") {
        "Approved".to_owned()
    } else {
        "Pending".to_owned()
    };
    if types.contains(&"Failed") {
        state.push_str(",Failed");
    }
    if !get_str(request, &["status", "certificate"]).is_empty() {
        state.push_str(",Issued");
    }
    vec![
        age(request, now),
        text_or(request, &["spec", "signerName"], NONE),
        text_or(request, &["spec", "username"], UNKNOWN),
        json!(lasts),
        json!(state),
    ]
}

fn priority_class(class: &Value, now: Timestamp) -> Vec<Value> {
    vec![
        count(class, &["value"]),
        json!(at(class, &["globalDefault"]).and_then(Value::as_bool).unwrap_or(false)),
        age(class, now),
        text_or(class, &["preemptionPolicy"], "PreemptLowerPriority"),
    ]
}
