//! The table of kinds: what a resource is called, where it lives and which subresources it has.
//!
//! Built-in kinds are one row each; custom kinds become the same [`KindInfo`] from their
//! CustomResourceDefinition (see [`crate::crd`]). No I/O, no objects.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// API group and plural of a resource, such as `apps` and `deployments`; the core group is "".
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupResource {
    /// API group, empty for core.
    pub group: String,
    /// Plural, lower-case name.
    pub resource: String,
}

impl GroupResource {
    /// From group (empty for core) and plural.
    pub fn new(group: impl Into<String>, resource: impl Into<String>) -> Self {
        Self { group: group.into(), resource: resource.into() }
    }
}

impl fmt::Display for GroupResource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.group.is_empty() {
            f.write_str(&self.resource)
        } else {
            write!(f, "{}.{}", self.resource, self.group)
        }
    }
}

/// Where one object is: resource, namespace (empty for cluster scope) and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceKey {
    /// The resource that the object belongs to.
    pub resource: GroupResource,
    /// Namespace; empty for cluster-scoped objects.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
}

impl ResourceKey {
    /// From group (empty for core), plural, namespace (empty for cluster scope) and name.
    pub fn new(
        group: impl Into<String>,
        resource: impl Into<String>,
        namespace: impl Into<String>,
        name: impl Into<String>,
    ) -> Self {
        Self { resource: GroupResource::new(group, resource), namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.resource, self.name)
        } else {
            write!(f, "{} {}/{}", self.resource, self.namespace, self.name)
        }
    }
}

/// Where the scale subresource finds its numbers, as field paths (`["spec", "replicas"]`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScalePaths {
    /// Wanted replicas.
    pub spec_replicas: Vec<String>,
    /// Observed replicas.
    pub status_replicas: Vec<String>,
    /// Label selector: an object (`matchLabels`…) or a string; `None` if the kind has none.
    pub selector: Option<Vec<String>>,
}

impl ScalePaths {
    fn built_in() -> Self {
        let path = |parts: [&str; 2]| parts.map(str::to_owned).to_vec();
        Self {
            spec_replicas: path(["spec", "replicas"]),
            status_replicas: path(["status", "replicas"]),
            selector: Some(path(["spec", "selector"])),
        }
    }
}

/// A column of a custom kind's table (`additionalPrinterColumns`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrinterColumn {
    /// Title.
    pub name: String,
    /// OpenAPI type: `string`, `integer`, `number`, `boolean` or `date`.
    pub type_: String,
    /// OpenAPI format, may be empty.
    pub format: String,
    /// Description, may be empty.
    pub description: String,
    /// 0 is shown always, more only in the wide form.
    pub priority: i64,
    /// Simple JSONPath of the value, such as `.status.phase`.
    pub json_path: String,
}

/// Everything the server knows about a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KindInfo {
    /// API group, empty for core.
    pub group: String,
    /// Versions served; objects are stored as the first one, which is also the preferred one.
    pub versions: Vec<String>,
    /// Kind, such as `Pod`.
    pub kind: String,
    /// Kind of the list, such as `PodList`.
    pub list_kind: String,
    /// Plural resource name, such as `pods`.
    pub plural: String,
    /// Singular resource name, such as `pod`.
    pub singular: String,
    /// Short names that kubectl understands, such as `po`.
    pub short_names: Vec<String>,
    /// Categories, such as `all`.
    pub categories: Vec<String>,
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Whether status is written through its own subresource.
    pub status: bool,
    /// Whether a create may bring its status along although there is a status subresource (Node).
    pub status_on_create: bool,
    /// Whether `metadata.generation` counts changes of the desired state.
    pub generation: bool,
    /// The scale subresource, if there is one.
    pub scale: Option<ScalePaths>,
    /// Table columns by version; kinds with columns of their own in code have none here.
    pub columns: BTreeMap<String, Vec<PrinterColumn>>,
    /// Field selectors besides `metadata.name` and `metadata.namespace`.
    pub selectable_fields: Vec<String>,
    /// Whether the kind came from a CustomResourceDefinition.
    pub custom: bool,
}

impl KindInfo {
    /// A kind with one version, without subresources, short names and columns of its own.
    pub fn new(group: &str, version: &str, kind: &str, plural: &str, namespaced: bool) -> Self {
        Self {
            group: group.to_owned(),
            versions: vec![version.to_owned()],
            kind: kind.to_owned(),
            list_kind: format!("{kind}List"),
            plural: plural.to_owned(),
            singular: kind.to_lowercase(),
            short_names: Vec::new(),
            categories: Vec::new(),
            namespaced,
            status: false,
            status_on_create: false,
            generation: false,
            scale: None,
            columns: BTreeMap::new(),
            selectable_fields: Vec::new(),
            custom: false,
        }
    }

    /// Group and plural.
    pub fn group_resource(&self) -> GroupResource {
        GroupResource::new(&*self.group, &*self.plural)
    }

    /// The version that objects are stored as.
    pub fn storage_version(&self) -> &str {
        self.versions.first().map_or("v1", String::as_str)
    }

    /// `apiVersion` of objects in the version named.
    pub fn api_version(&self, version: &str) -> String {
        if self.group.is_empty() { version.to_owned() } else { format!("{}/{version}", self.group) }
    }

    /// Whether this is the built-in kind of that group and name.
    pub fn is(&self, group: &str, kind: &str) -> bool {
        !self.custom && self.group == group && self.kind == kind
    }
}

/// Flags of a row: N namespaced, S status subresource, s the status may come with a create,
/// G generation, X scale subresource, A category `all`.
type Row = (&'static str, &'static str, &'static str, &'static str, &'static str, &'static str);

// group, versions with the stored one first, plural, kind, short names, flags
const BUILT_IN: &[Row] = &[
    ("", "v1", "configmaps", "ConfigMap", "cm", "N"),
    ("", "v1", "endpoints", "Endpoints", "ep", "N"),
    ("", "v1", "events", "Event", "ev", "N"),
    ("", "v1", "limitranges", "LimitRange", "limits", "N"),
    ("", "v1", "namespaces", "Namespace", "ns", "S"),
    ("", "v1", "nodes", "Node", "no", "Ss"),
    ("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", "pvc", "NS"),
    ("", "v1", "persistentvolumes", "PersistentVolume", "pv", "S"),
    ("", "v1", "pods", "Pod", "po", "NSGA"),
    ("", "v1", "podtemplates", "PodTemplate", "", "NG"),
    ("", "v1", "replicationcontrollers", "ReplicationController", "rc", "NSGXA"),
    ("", "v1", "resourcequotas", "ResourceQuota", "quota", "NS"),
    ("", "v1", "secrets", "Secret", "", "N"),
    ("", "v1", "serviceaccounts", "ServiceAccount", "sa", "N"),
    ("", "v1", "services", "Service", "svc", "NSA"),
    ("apps", "v1", "controllerrevisions", "ControllerRevision", "", "N"),
    ("apps", "v1", "daemonsets", "DaemonSet", "ds", "NSGA"),
    ("apps", "v1", "deployments", "Deployment", "deploy", "NSGXA"),
    ("apps", "v1", "replicasets", "ReplicaSet", "rs", "NSGXA"),
    ("apps", "v1", "statefulsets", "StatefulSet", "sts", "NSGXA"),
    ("autoscaling", "v2 v1", "horizontalpodautoscalers", "HorizontalPodAutoscaler", "hpa", "NSA"),
    ("batch", "v1", "cronjobs", "CronJob", "cj", "NSGA"),
    ("batch", "v1", "jobs", "Job", "", "NSGA"),
    ("networking.k8s.io", "v1", "ingressclasses", "IngressClass", "", "G"),
    ("networking.k8s.io", "v1", "ingresses", "Ingress", "ing", "NSG"),
    ("networking.k8s.io", "v1", "ipaddresses", "IPAddress", "ip", ""),
    ("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", "netpol", "NG"),
    ("networking.k8s.io", "v1", "servicecidrs", "ServiceCIDR", "", "S"),
    ("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice", "", "NG"),
    ("rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", "", ""),
    ("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", "", ""),
    ("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding", "", "N"),
    ("rbac.authorization.k8s.io", "v1", "roles", "Role", "", "N"),
    ("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", "pdb", "NSG"),
    ("storage.k8s.io", "v1", "csidrivers", "CSIDriver", "", ""),
    ("storage.k8s.io", "v1", "csinodes", "CSINode", "", ""),
    ("storage.k8s.io", "v1", "csistoragecapacities", "CSIStorageCapacity", "", "N"),
    ("storage.k8s.io", "v1", "storageclasses", "StorageClass", "sc", ""),
    ("storage.k8s.io", "v1", "volumeattachments", "VolumeAttachment", "", "S"),
    ("storage.k8s.io", "v1", "volumeattributesclasses", "VolumeAttributesClass", "vac", ""),
    ("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", "crd crds", "SG"),
    (
        "admissionregistration.k8s.io",
        "v1",
        "mutatingwebhookconfigurations",
        "MutatingWebhookConfiguration",
        "",
        "G",
    ),
    (
        "admissionregistration.k8s.io",
        "v1",
        "validatingadmissionpolicies",
        "ValidatingAdmissionPolicy",
        "",
        "SG",
    ),
    (
        "admissionregistration.k8s.io",
        "v1",
        "validatingadmissionpolicybindings",
        "ValidatingAdmissionPolicyBinding",
        "",
        "G",
    ),
    (
        "admissionregistration.k8s.io",
        "v1",
        "validatingwebhookconfigurations",
        "ValidatingWebhookConfiguration",
        "",
        "G",
    ),
    ("coordination.k8s.io", "v1", "leases", "Lease", "", "N"),
    ("certificates.k8s.io", "v1", "certificatesigningrequests", "CertificateSigningRequest", "csr", "S"),
    ("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", "pc", "G"),
    ("node.k8s.io", "v1", "runtimeclasses", "RuntimeClass", "", ""),
];

/// Field selectors that the built-in kinds know besides name and namespace.
const SELECTABLE: &[(&str, &str, &[&str])] = &[
    (
        "",
        "pods",
        &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
    ),
    (
        "",
        "events",
        &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
    ),
    ("", "namespaces", &["status.phase"]),
    ("", "nodes", &["spec.unschedulable"]),
    ("", "replicationcontrollers", &["status.replicas"]),
    ("", "secrets", &["type"]),
    ("", "services", &["spec.clusterIP", "spec.type"]),
    ("apps", "replicasets", &["status.replicas"]),
    ("batch", "jobs", &["status.successful"]),
    ("certificates.k8s.io", "certificatesigningrequests", &["spec.signerName"]),
];

/// The kinds that every Kubernetes 1.36 API server has and that this one serves, in discovery order.
pub(crate) fn built_in() -> Vec<Arc<KindInfo>> {
    BUILT_IN
        .iter()
        .map(|&(group, versions, plural, kind, short, flags)| {
            let has = |flag| flags.contains(flag);
            let selectable = SELECTABLE.iter().find(|(g, p, _)| (*g, *p) == (group, plural));
            Arc::new(KindInfo {
                versions: versions.split(' ').map(str::to_owned).collect(),
                short_names: short.split_whitespace().map(str::to_owned).collect(),
                categories: match (has('A'), group) {
                    (true, _) => vec!["all".to_owned()],
                    (false, "apiextensions.k8s.io" | "admissionregistration.k8s.io") => {
                        vec!["api-extensions".to_owned()]
                    }
                    _ => Vec::new(),
                },
                status: has('S'),
                status_on_create: has('s'),
                generation: has('G'),
                scale: has('X').then(ScalePaths::built_in),
                selectable_fields: selectable
                    .map(|(_, _, fields)| fields.iter().map(|&field| field.to_owned()).collect())
                    .unwrap_or_default(),
                ..KindInfo::new(group, versions, kind, plural, has('N'))
            })
        })
        .collect()
}

/// Built-in kinds whose groups a CustomResourceDefinition may not take over.
pub(crate) fn is_built_in_group(group: &str) -> bool {
    group == crate::events::GROUP || BUILT_IN.iter().any(|row| row.0 == group)
}
