//! CustomResourceDefinitions: from definition to [`KindInfo`]. Schemas are not read. Pure.

use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::BTreeMap;

use crate::error::Cause;
use crate::json::{at, child, get_array, get_str, timestamp_text};
use crate::kinds::{KindInfo, PrinterColumn, ScalePaths, is_built_in_group};

/// Longest path of the scale subresource, in fields; a longer one means that there is no such subresource.
const SCALE_PATH_LIMIT: usize = 32;

/// Reads a definition.
///
/// # Errors
/// What is missing or wrong, field by field.
pub(crate) fn kind_of_definition(definition: &Value) -> Result<KindInfo, Vec<Cause>> {
    let mut causes = Vec::new();
    let mut required = |path: &[&str]| {
        let text = get_str(definition, path).to_owned();
        if text.is_empty() {
            causes.push(Cause::required(path.join("."), "must not be empty"));
        }
        text
    };
    let group = required(&["spec", "group"]);
    let plural = required(&["spec", "names", "plural"]);
    let kind = required(&["spec", "names", "kind"]);
    let scope = required(&["spec", "scope"]);
    if !matches!(scope.as_str(), "Namespaced" | "Cluster" | "") {
        causes.push(Cause::invalid("spec.scope", &json!(scope), "must be Namespaced or Cluster"));
    }
    if is_built_in_group(&group) && !group.is_empty() {
        causes.push(Cause::invalid("spec.group", &json!(group), "belongs to Kubernetes itself"));
    }
    let name = get_str(definition, &["metadata", "name"]);
    if !plural.is_empty() && !group.is_empty() && name != format!("{plural}.{group}") {
        causes.push(Cause::invalid(
            "metadata.name",
            &json!(name),
            "must be spec.names.plural+\".\"+spec.group",
        ));
    }
    let mut served: Vec<&Value> = get_array(definition, &["spec", "versions"])
        .iter()
        .filter(|version| version["served"] == true && !get_str(version, &["name"]).is_empty())
        .collect();
    // The stored version first, then the newest.
    served.sort_by_key(|version| {
        (version["storage"] != true, std::cmp::Reverse(version_rank(get_str(version, &["name"]))))
    });
    let Some(stored) = served.first() else {
        causes.push(Cause::required("spec.versions", "at least one version must be served"));
        return Err(causes);
    };
    if !causes.is_empty() {
        return Err(causes);
    }
    let texts = |key| -> Vec<String> {
        let list = get_array(definition, &["spec", "names", key]);
        list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let or = |key, default: String| match get_str(definition, &["spec", "names", key]) {
        "" => default,
        text => text.to_owned(),
    };
    let columns: BTreeMap<_, _> = served
        .iter()
        .map(|version| (get_str(version, &["name"]).to_owned(), printer_columns(version)))
        .filter(|(_, columns)| !columns.is_empty())
        .collect();
    Ok(KindInfo {
        versions: served.iter().map(|version| get_str(version, &["name"]).to_owned()).collect(),
        list_kind: or("listKind", format!("{kind}List")),
        singular: or("singular", kind.to_lowercase()),
        short_names: texts("shortNames"),
        categories: texts("categories"),
        status: at(stored, &["subresources", "status"]).is_some(),
        generation: true,
        scale: at(stored, &["subresources", "scale"]).and_then(scale_paths),
        columns,
        selectable_fields: get_array(stored, &["selectableFields"])
            .iter()
            .map(|field| get_str(field, &["jsonPath"]).trim_start_matches('.').to_owned())
            .collect(),
        custom: true,
        ..KindInfo::new(&group, "", &kind, &plural, scope == "Namespaced")
    })
}

/// Order among versions: `v2` before `v1` before `v1beta2` before `v1alpha1` before anything else.
fn version_rank(version: &str) -> (u8, u32, u32) {
    let Some(rest) = version.strip_prefix('v') else { return (0, 0, 0) };
    for (marker, level) in [("beta", 2), ("alpha", 1)] {
        if let Some((major, minor)) = rest.split_once(marker) {
            return match (major.parse(), minor.parse()) {
                (Ok(major), Ok(minor)) => (level, major, minor),
                _ => (0, 0, 0),
            };
        }
    }
    rest.parse().map_or((0, 0, 0), |major| (3, major, 0))
}

fn printer_columns(version: &Value) -> Vec<PrinterColumn> {
    let columns = get_array(version, &["additionalPrinterColumns"]).iter().map(|column| PrinterColumn {
        name: get_str(column, &["name"]).to_owned(),
        type_: get_str(column, &["type"]).to_owned(),
        format: get_str(column, &["format"]).to_owned(),
        description: get_str(column, &["description"]).to_owned(),
        priority: at(column, &["priority"]).and_then(Value::as_i64).unwrap_or(0),
        json_path: get_str(column, &["jsonPath"]).to_owned(),
    });
    columns.collect()
}

fn scale_paths(scale: &Value) -> Option<ScalePaths> {
    let path = |key| -> Option<Vec<String>> {
        let text = get_str(scale, &[key]).strip_prefix('.')?;
        let path: Vec<String> = text.split('.').map(str::to_owned).collect();
        (path.len() <= SCALE_PATH_LIMIT).then_some(path)
    };
    Some(ScalePaths {
        spec_replicas: path("specReplicasPath")?,
        status_replicas: path("statusReplicasPath")?,
        selector: path("labelSelectorPath"),
    })
}

/// Writes the status that says that a definition is served.
pub(crate) fn establish(kind: &KindInfo, definition: &mut Value, now: Timestamp) {
    let condition = |type_, reason, message| {
        json!({"type": type_, "status": "True", "lastTransitionTime": timestamp_text(now), "reason": reason,
               "message": message})
    };
    let already = get_array(definition, &["status", "conditions"]).iter().any(|c| c["type"] == "Established");
    let conditions = json!([
        condition("NamesAccepted", "NoConflicts", "no conflicts found"),
        condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
    ]);
    let mut names = json!({
        "plural": kind.plural, "singular": kind.singular, "kind": kind.kind, "listKind": kind.list_kind,
    });
    if !kind.short_names.is_empty() {
        names["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        names["categories"] = json!(kind.categories);
    }
    let stored = json!([kind.storage_version()]);
    let status = child(definition, "status");
    status.insert("acceptedNames".to_owned(), names);
    status.insert("storedVersions".to_owned(), stored);
    if !already {
        status.insert("conditions".to_owned(), conditions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition() -> Value {
        json!({
            "metadata": {"name": "widgets.example.com"},
            "spec": {
                "group": "example.com", "scope": "Namespaced",
                "names": {"plural": "widgets", "kind": "Widget", "shortNames": ["wd"], "categories": ["all"]},
                "versions": [
                    {"name": "v1alpha1", "served": true, "storage": false},
                    {"name": "v1beta1", "served": false, "storage": false},
                    {"name": "v2", "served": true, "storage": false},
                    {"name": "v1", "served": true, "storage": true,
                     "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.replicas",
                        "statusReplicasPath": ".status.replicas", "labelSelectorPath": ".status.selector"}},
                     "additionalPrinterColumns": [{"name": "Size", "type": "integer", "jsonPath": ".spec.size"}],
                     "selectableFields": [{"jsonPath": ".spec.color"}]}
                ]
            }
        })
    }

    #[test]
    fn a_definition_becomes_a_kind() {
        let kind = kind_of_definition(&definition()).unwrap();
        assert_eq!(kind.versions, ["v1", "v2", "v1alpha1"]);
        assert_eq!((kind.singular.as_str(), kind.list_kind.as_str()), ("widget", "WidgetList"));
        assert_eq!((kind.short_names, kind.categories), (vec!["wd".to_owned()], vec!["all".to_owned()]));
        assert!(kind.custom && kind.namespaced && kind.status && kind.generation);
        assert_eq!(kind.scale.unwrap().selector.unwrap(), ["status", "selector"]);
        assert_eq!(kind.columns["v1"][0].json_path, ".spec.size");
        assert_eq!(kind.selectable_fields, ["spec.color"]);
    }

    #[test]
    fn wrong_definitions_name_their_fields() {
        for (pointer, value, field) in [
            ("/spec/group", json!(""), "spec.group"),
            ("/spec/group", json!("apps"), "spec.group"),
            ("/spec/scope", json!("Galaxy"), "spec.scope"),
            ("/spec/names/kind", json!(null), "spec.names.kind"),
            ("/spec/versions", json!([]), "spec.versions"),
            ("/metadata/name", json!("x.example.com"), "metadata.name"),
        ] {
            let mut wrong = definition();
            *wrong.pointer_mut(pointer).unwrap() = value;
            let causes = kind_of_definition(&wrong).unwrap_err();
            assert_eq!(causes[0].field, field, "{pointer}");
        }
    }

    #[test]
    fn an_established_definition_is_left_alone() {
        let mut object = definition();
        let kind = kind_of_definition(&object).unwrap();
        establish(&kind, &mut object, Timestamp::UNIX_EPOCH);
        assert_eq!(object["status"]["conditions"][1]["type"], "Established");
        let before = object.clone();
        establish(&kind, &mut object, Timestamp::now());
        assert_eq!(object, before);
    }
}
