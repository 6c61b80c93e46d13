//! The documents against those of a real API server, where a record of them is here.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use super::*;
use crate::kinds;

/// An unpacked record, or `None` with a message if there are no records here.
fn recorded(name: &str) -> Option<Vec<u8>> {
    let base = std::env::var_os("PODWAY_CASES").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/cases")),
        PathBuf::from,
    );
    let path = base.join("kube-api/openapi").join(name);
    let unpacked = Command::new("gzip").arg("-dc").arg(&path).output();
    let found = unpacked.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    if found.is_none() {
        println!("skipped: {} is not here (set PODWAY_CASES), or there is no gzip", path.display());
    }
    found
}

fn built_in(custom: &CustomSchemas) -> Value {
    Source { kinds: &kinds::built_in(), custom }.v2()
}

/// Whether a schema of ours agrees with a recorded one.
fn agrees(ours: &Value, theirs: &Value, all: &Value) -> bool {
    if ours["x-kubernetes-preserve-unknown-fields"] == true {
        let name = theirs["$ref"].as_str().map(|text| text.trim_start_matches("#/definitions/"));
        let target = name.map_or(theirs, |name| &all[name]);
        return target["type"] == "object";
    }
    ["type", "format", "$ref", "x-kubernetes-patch-strategy", "x-kubernetes-patch-merge-key"]
        .iter()
        .all(|key| ours[*key] == theirs[*key])
        && ["items", "additionalProperties"].iter().all(|key| {
            ours[*key].is_null() == theirs[*key].is_null()
                && (ours[*key].is_null() || agrees(&ours[*key], &theirs[*key], all))
        })
}

#[test]
fn every_type_is_as_a_real_server_has_it() {
    let Some(text) = recorded("openapi-v2.json.gz") else { return };
    let theirs: Value = serde_json::from_slice(&text).unwrap();
    let theirs = &theirs["definitions"];
    let all = built_in(&CustomSchemas::default());
    let mut wrong = Vec::new();
    for known in table::table().types() {
        let ours = &all["definitions"][&known.full_name];
        let real = &theirs[&known.full_name];
        let names = |schema: &Value, key: &str| -> BTreeSet<String> {
            match &schema[key] {
                Value::Object(fields) => fields.keys().cloned().collect(),
                Value::Array(items) => items.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
                _ => BTreeSet::new(),
            }
        };
        for key in ["properties", "required"] {
            if names(ours, key) != names(real, key) {
                let difference: Vec<_> =
                    names(ours, key).symmetric_difference(&names(real, key)).cloned().collect();
                wrong.push(format!("{}: {key} differ in {difference:?}", known.full_name));
            }
        }
        for (name, property) in ours["properties"].as_object().unwrap() {
            if !agrees(property, &real["properties"][name], theirs) {
                wrong.push(format!("{}.{name}: {property}", known.full_name));
            }
        }
        let gvk = |schema: &Value| schema["x-kubernetes-group-version-kind"][0].clone();
        if known.group_version.is_some() && gvk(ours) != gvk(real) {
            wrong.push(format!("{}: {}", known.full_name, gvk(ours)));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn schemas_have_the_bytes_of_a_real_server() {
    let (Some(text), Some(bytes)) = (recorded("openapi-v2.json.gz"), recorded("openapi-v2.pb.gz")) else {
        return;
    };
    let theirs: Value = serde_json::from_slice(&text).unwrap();
    let mut compared = 0;
    for (name, schema) in theirs["definitions"].as_object().unwrap() {
        // What gnostic writes otherwise, or this server not at all.
        let text = schema.to_string();
        if ["\"x-", "\"default\"", "\"enum\"", "multipleOf"].iter().any(|other| text.contains(other)) {
            continue;
        }
        // The order of JSON's keys is not that of the record.
        let one_property = schema["properties"].as_object().is_none_or(|properties| properties.len() < 2);
        let expected = gnostic::schema_bytes(schema.as_object().unwrap());
        let found = bytes.windows(expected.len()).any(|window| window == expected);
        if found {
            compared += 1;
        }
        assert!(found || !one_property, "{name}: {expected:02x?}");
        if compared >= 60 {
            break;
        }
    }
    assert!(compared >= 20, "only {compared} schemas could be compared");
}

#[test]
fn the_protobuf_document_has_all_parts() {
    let custom = CustomSchemas::default();
    let kinds = kinds::built_in();
    let bytes = Source { kinds: &kinds, custom: &custom }.v2_protobuf();
    assert!(bytes.starts_with(b"\x0a\x032.0\x12"));
    for text in ["/api/v1/namespaces/{namespace}/pods/{name}", "io.k8s.api.apps.v1.Deployment", "dryRun"] {
        assert!(bytes.windows(text.len()).any(|window| window == text.as_bytes()), "{text}");
    }
}

#[test]
fn a_v3_document_refers_to_nothing_that_it_lacks() {
    let custom = CustomSchemas::default();
    let kinds = kinds::built_in();
    let source = Source { kinds: &kinds, custom: &custom };
    let index = source.v3_index();
    for path in index["paths"].as_object().unwrap().keys() {
        let mut parts = path.rsplitn(2, '/');
        let version = parts.next().unwrap();
        let group = parts.next().unwrap().trim_start_matches("api").trim_start_matches("s/");
        let document = source.v3(group, version).unwrap();
        let schemas = document["components"]["schemas"].as_object().unwrap();
        let mut names = Vec::new();
        references(&document, &mut names);
        assert!(names.iter().all(|name| schemas.contains_key(name)), "{path}: {names:?}");
        assert!(
            schemas.values().any(|schema| schema["x-kubernetes-group-version-kind"].is_array()),
            "{path}"
        );
    }
    assert!(source.v3("nobody.example.com", "v1").is_none());
}

#[test]
fn custom_kinds_are_published_as_defined() {
    let definition = json!({"spec": {"group": "example.com", "names": {"kind": "Widget"}, "versions": [
        {"name": "v1", "schema": {"openAPIV3Schema": {"type": "object", "properties": {
            "spec": {"type": "object", "properties": {"size": {"type": "integer", "minimum": 1}}}}}}}]}});
    let custom = CustomSchemas::of([&definition].into_iter());
    let mut kind = KindInfo::new("example.com", "v1", "Widget", "widgets", true);
    kind.custom = true;
    let mut unknown = KindInfo::new("example.com", "v1", "Gadget", "gadgets", true);
    unknown.custom = true;
    let kinds = [Arc::new(kind), Arc::new(unknown)];
    let source = Source { kinds: &kinds, custom: &custom };
    let size = "/properties/spec/properties/size";
    let v3 = source.v3("example.com", "v1").unwrap();
    let widget = &v3["components"]["schemas"]["com.example.v1.Widget"];
    assert_eq!(widget.pointer(size), Some(&json!({"type": "integer", "minimum": 1})));
    let v2 = source.v2();
    let widget = &v2["definitions"]["com.example.v1.Widget"];
    assert_eq!(widget.pointer(size), Some(&json!({"type": "integer"})));
    assert!(widget["properties"]["metadata"]["$ref"].as_str().unwrap().ends_with("ObjectMeta"));
    assert!(v2["definitions"]["com.example.v1.Gadget"].get("properties").is_none());
}
