//! The checks that every object passes, whatever its kind: names, labels, metadata types. Pure.
//!
//! Specs are not validated here: the controllers and agents that read them must survive any content anyway.

use serde_json::{Value, json};

use crate::error::Cause;
use crate::kinds::KindInfo;

const LABEL_RULE: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and \
must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
'[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN_RULE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' \
or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_VALUE_RULE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', \
'_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex \
used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const QUALIFIED_NAME_RULE: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start \
and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";

/// Largest total size of one object's annotations, in bytes, as in Kubernetes.
const ANNOTATIONS_LIMIT: usize = 256 * 1024;

fn is_dns_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    matches!((text.bytes().next(), text.bytes().last()), (Some(first), Some(last)) if inner(first) && inner(last))
        && text.bytes().all(|b| inner(b) || b == b'-')
}

fn is_dns_subdomain(text: &str) -> bool {
    text.split('.').all(is_dns_label)
}

fn is_name_part(text: &str) -> bool {
    let ends = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    ends(text.bytes().next())
        && ends(text.bytes().last())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// What is wrong with a label or annotation key, if anything.
pub(crate) fn label_key_problem(key: &str) -> Option<String> {
    let (prefix, part) = key.split_once('/').map_or((None, key), |(prefix, part)| (Some(prefix), part));
    match prefix {
        Some("") => return Some("prefix part must be non-empty".to_owned()),
        Some(prefix) if prefix.len() > 253 || !is_dns_subdomain(prefix) => {
            return Some(format!("prefix part {SUBDOMAIN_RULE}"));
        }
        _ => {}
    }
    if part.is_empty() {
        Some("name part must be non-empty".to_owned())
    } else if part.len() > 63 {
        Some("name part must be no more than 63 bytes".to_owned())
    } else if !is_name_part(part) {
        Some(QUALIFIED_NAME_RULE.to_owned())
    } else {
        None
    }
}

/// What is wrong with a label value, if anything.
pub(crate) fn label_value_problem(value: &str) -> Option<String> {
    if value.len() > 63 {
        Some("must be no more than 63 bytes".to_owned())
    } else if !value.is_empty() && !is_name_part(value) {
        Some(LABEL_VALUE_RULE.to_owned())
    } else {
        None
    }
}

/// How a kind's names are written.
enum NameRule {
    Label,
    Subdomain,
    /// Anything that fits into one segment of a URL path.
    PathSegment,
}

fn name_rule(kind: &KindInfo) -> NameRule {
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Namespace" | "Service") => NameRule::Label,
        ("rbac.authorization.k8s.io", _) => NameRule::PathSegment,
        // IPv6 addresses are names of IPAddress objects.
        ("networking.k8s.io", "IPAddress") => NameRule::PathSegment,
        _ => NameRule::Subdomain,
    }
}

/// What is wrong with an object's name for its kind, if anything.
pub(crate) fn name_problem(kind: &KindInfo, name: &str) -> Option<String> {
    match name_rule(kind) {
        NameRule::Label if name.len() > 63 => Some("must be no more than 63 bytes".to_owned()),
        NameRule::Label if !is_dns_label(name) => Some(LABEL_RULE.to_owned()),
        NameRule::Subdomain if name.len() > 253 => Some("must be no more than 253 bytes".to_owned()),
        NameRule::Subdomain if !is_dns_subdomain(name) => Some(SUBDOMAIN_RULE.to_owned()),
        NameRule::PathSegment if matches!(name, "." | "..") => Some(format!("may not be '{name}'")),
        NameRule::PathSegment if name.contains(['/', '%']) => Some("may not contain '/' or '%'".to_owned()),
        _ => None,
    }
}

/// Everything that is wrong with an object's metadata.
pub(crate) fn metadata_causes(kind: &KindInfo, object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let metadata = &object["metadata"];
    match metadata.get("name").and_then(Value::as_str) {
        None | Some("") => causes.push(Cause::required("metadata.name", "name or generateName is required")),
        Some(name) => {
            if let Some(problem) = name_problem(kind, name) {
                causes.push(Cause::invalid("metadata.name", &json!(name), problem));
            }
        }
    }
    labels_causes(&metadata["labels"], "metadata.labels", &mut causes);
    annotations_causes(&metadata["annotations"], &mut causes);
    list_causes(&metadata["finalizers"], "metadata.finalizers", &mut causes, |field, value, causes| {
        if !value.is_string() {
            causes.push(Cause::invalid(field, value, "must be a string"));
        }
    });
    list_causes(
        &metadata["ownerReferences"],
        "metadata.ownerReferences",
        &mut causes,
        |field, owner, causes| {
            for key in ["apiVersion", "kind", "name", "uid"] {
                if owner[key].as_str().unwrap_or_default().is_empty() {
                    causes.push(Cause::required(format!("{field}.{key}"), "must not be empty"));
                }
            }
        },
    );
    causes
}

fn labels_causes(labels: &Value, field: &str, causes: &mut Vec<Cause>) {
    let Some(labels) = optional_object(labels, field, causes) else { return };
    for (key, value) in labels {
        if let Some(problem) = label_key_problem(key) {
            causes.push(Cause::invalid(field, &json!(key), problem));
        }
        match value.as_str() {
            None => causes.push(Cause::invalid(format!("{field}.{key}"), value, "must be a string")),
            Some(text) => {
                if let Some(problem) = label_value_problem(text) {
                    causes.push(Cause::invalid(field, value, problem));
                }
            }
        }
    }
}

fn annotations_causes(annotations: &Value, causes: &mut Vec<Cause>) {
    let field = "metadata.annotations";
    let Some(annotations) = optional_object(annotations, field, causes) else { return };
    let mut size = 0;
    for (key, value) in annotations {
        if let Some(problem) = label_key_problem(&key.to_lowercase()) {
            causes.push(Cause::invalid(field, &json!(key), problem));
        }
        match value.as_str() {
            None => causes.push(Cause::invalid(format!("{field}.{key}"), value, "must be a string")),
            Some(text) => size += key.len() + text.len(),
        }
    }
    if size > ANNOTATIONS_LIMIT {
        causes.push(Cause {
            reason: "FieldValueTooLong",
            message: format!("Too long: may not be more than {ANNOTATIONS_LIMIT} bytes"),
            field: field.to_owned(),
        });
    }
}

fn optional_object<'a>(
    value: &'a Value,
    field: &str,
    causes: &mut Vec<Cause>,
) -> Option<&'a serde_json::Map<String, Value>> {
    if !value.is_object() && !value.is_null() {
        causes.push(Cause::invalid(field, value, "must be an object"));
    }
    value.as_object()
}

fn list_causes(
    list: &Value,
    field: &str,
    causes: &mut Vec<Cause>,
    check: impl Fn(String, &Value, &mut Vec<Cause>),
) {
    match list {
        Value::Null => {}
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                check(format!("{field}[{index}]"), item, causes);
            }
        }
        other => causes.push(Cause::invalid(field, other, "must be a list")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule_of_their_kind() {
        let service = KindInfo::new("", "v1", "Service", "services", true);
        let pod = KindInfo::new("", "v1", "Pod", "pods", true);
        let role = KindInfo::new("rbac.authorization.k8s.io", "v1", "Role", "roles", true);
        for (kind, name, good) in [
            (&service, "web", true),
            (&service, "0web", true),
            (&service, "web.a", false),
            (&service, "Bad_Name", false),
            (&service, &"a".repeat(64), false),
            (&pod, "web.a-1", true),
            (&pod, "-web", false),
            (&pod, "web.", false),
            (&pod, &"a".repeat(254), false),
            (&role, "system:Node", true),
            (&role, "a/b", false),
            (&role, "..", false),
        ] {
            assert_eq!(name_problem(kind, name).is_none(), good, "{} {name}", kind.kind);
        }
    }

    #[test]
    fn metadata_problems_name_their_fields() {
        let pod = KindInfo::new("", "v1", "Pod", "pods", true);
        let object = json!({"metadata": {
            "name": "A", "labels": {"a b": "x", "ok": "not ok", "n": 1}, "annotations": {"/x": "1"},
            "finalizers": [1], "ownerReferences": [{"kind": "ReplicaSet", "name": "a", "uid": "u"}]
        }});
        let fields: Vec<String> =
            metadata_causes(&pod, &object).into_iter().map(|cause| cause.field).collect();
        let expected = [
            "metadata.name",
            "metadata.labels",
            "metadata.labels.n",
            "metadata.labels",
            "metadata.annotations",
            "metadata.finalizers[0]",
            "metadata.ownerReferences[0].apiVersion",
        ];
        assert_eq!(fields, expected);
        assert!(metadata_causes(&pod, &json!({"metadata": {"name": "a", "labels": null}})).is_empty());
        assert_eq!(metadata_causes(&pod, &json!({"metadata": {"name": "a", "labels": []}})).len(), 1);
    }
}
