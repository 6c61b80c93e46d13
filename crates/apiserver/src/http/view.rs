//! Objects as a client asked to see them: in its version, with or without their type, as table rows, as metadata.

use jiff::Timestamp;
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};
use serde_json::{Value, json};
use std::sync::Arc;

use super::media::{Form, IncludeObject};
use super::route::Target;
use crate::autoscaling;
use crate::events;
use crate::json;
use crate::store::{List, WatchEvent};
use crate::table::Table;

/// One object on its way out; nothing is copied but what has another shape in the client's version.
struct View<'a> {
    object: &'a Value,
    /// `apiVersion` and `kind` to write; `None` leaves them out, as in lists.
    type_: Option<(&'a str, &'a str)>,
    new_events: bool,
    older_autoscaler: bool,
}

impl Serialize for View<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let older = self.older_autoscaler.then(|| autoscaling::to_older(self.object));
        let object = older.as_ref().unwrap_or(self.object);
        let Some(fields) = object.as_object() else { return object.serialize(serializer) };
        let mut map = serializer.serialize_map(None)?;
        if let Some((api_version, kind)) = self.type_ {
            map.serialize_entry("kind", kind)?;
            map.serialize_entry("apiVersion", api_version)?;
        }
        for (key, value) in fields {
            if key != "apiVersion" && key != "kind" {
                map.serialize_entry(if self.new_events { events::new_name(key) } else { key }, value)?;
            }
        }
        map.end()
    }
}

/// A sequence made while it is written.
struct Items<I>(I);

impl<I: Iterator<Item = T> + Clone, T: Serialize> Serialize for Items<I> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut seq = serializer.serialize_seq(None)?;
        for item in self.0.clone() {
            seq.serialize_element(&item)?;
        }
        seq.end()
    }
}

struct MetadataView<'a> {
    object: &'a Value,
}

impl Serialize for MetadataView<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(3))?;
        map.serialize_entry("kind", "PartialObjectMetadata")?;
        map.serialize_entry("apiVersion", "meta.k8s.io/v1")?;
        map.serialize_entry("metadata", &self.object["metadata"])?;
        map.end()
    }
}

/// Writes answers for one request.
#[derive(Debug)]
pub(super) struct Presenter {
    api_version: String,
    kind: String,
    list_kind: String,
    /// Items of lists carry their type.
    typed_items: bool,
    new_events: bool,
    older_autoscaler: bool,
    form: Form,
    table: Option<Table>,
    /// Whether a watch has sent the table's columns.
    columns_sent: bool,
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("JSON values with text keys always serialize")
}

impl Presenter {
    pub(super) fn new(target: &Target, form: Form) -> Self {
        Self {
            api_version: target.api_version(),
            kind: target.kind.kind.clone(),
            list_kind: target.kind.list_kind.clone(),
            typed_items: target.kind.custom,
            new_events: target.new_events,
            older_autoscaler: autoscaling::is_older(&target.kind, &target.version),
            table: matches!(form, Form::Table(_)).then(|| Table::of(&target.kind, &target.version)),
            form,
            columns_sent: false,
        }
    }

    /// One event of a watch, as a line.
    pub(super) fn event(&mut self, event: &WatchEvent) -> Vec<u8> {
        let mut line = match event {
            WatchEvent::Added(object) => self.change("ADDED", object),
            WatchEvent::Modified(object) => self.change("MODIFIED", object),
            WatchEvent::Deleted(object) => self.change("DELETED", object),
            WatchEvent::Bookmark { revision, initial_events_end } => {
                encode(&json!({"type": "BOOKMARK", "object": self.bookmark(*revision, *initial_events_end)}))
            }
        };
        line.push(b'\n');
        line
    }

    fn change(&mut self, type_: &str, object: &Arc<Value>) -> Vec<u8> {
        #[derive(serde::Serialize)]
        struct Line<'a, T> {
            #[serde(rename = "type")]
            type_: &'a str,
            object: T,
        }
        match self.form {
            Form::Object => encode(&Line { type_, object: self.view(object, true) }),
            Form::Metadata => encode(&Line { type_, object: MetadataView { object } }),
            Form::Table(include) => {
                let revision = json::get_str(object, &["metadata", "resourceVersion"]);
                let metadata = json!({"resourceVersion": revision});
                let table = self.table(std::slice::from_ref(object), &metadata, include, !self.columns_sent);
                self.columns_sent = true;
                encode(&Line { type_, object: table })
            }
        }
    }

    pub(super) fn object(&self, object: &Arc<Value>) -> Vec<u8> {
        match self.form {
            Form::Object => encode(&self.view(object, true)),
            Form::Metadata => encode(&MetadataView { object }),
            Form::Table(include) => {
                let revision = json::get_str(object, &["metadata", "resourceVersion"]);
                let metadata = json!({"resourceVersion": revision});
                encode(&self.table(std::slice::from_ref(object), &metadata, include, true))
            }
        }
    }

    pub(super) fn list(&self, list: &List) -> Vec<u8> {
        #[derive(serde::Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Body<'a, T> {
            kind: &'a str,
            api_version: &'a str,
            metadata: Value,
            items: T,
        }
        let mut metadata = json!({"resourceVersion": list.revision.to_string()});
        if let Some(token) = &list.continue_token {
            metadata["continue"] = json!(token);
        }
        if let Some(remaining) = list.remaining {
            metadata["remainingItemCount"] = json!(remaining);
        }
        match self.form {
            Form::Object => encode(&Body {
                kind: &self.list_kind,
                api_version: &self.api_version,
                metadata,
                items: Items(list.items.iter().map(|object| self.view(object, self.typed_items))),
            }),
            Form::Metadata => encode(&Body {
                kind: "PartialObjectMetadataList",
                api_version: "meta.k8s.io/v1",
                metadata,
                items: Items(list.items.iter().map(|object| MetadataView { object })),
            }),
            Form::Table(include) => encode(&self.table(&list.items, &metadata, include, true)),
        }
    }

    fn view<'a>(&'a self, object: &'a Value, typed: bool) -> View<'a> {
        View {
            object,
            type_: typed.then_some((self.api_version.as_str(), self.kind.as_str())),
            new_events: self.new_events,
            older_autoscaler: self.older_autoscaler,
        }
    }

    fn table(
        &self,
        objects: &[Arc<Value>],
        metadata: &Value,
        include: IncludeObject,
        columns: bool,
    ) -> Value {
        let now = Timestamp::now();
        let Some(table) = &self.table else { return Value::Null };
        let rows = objects.iter().map(|object| {
            let mut row = json!({"cells": table.cells(object, now)});
            match include {
                IncludeObject::None => {}
                IncludeObject::Metadata => {
                    row["object"] = json!({
                        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
                        "metadata": object["metadata"],
                    });
                }
                IncludeObject::Object => {
                    row["object"] = serde_json::to_value(self.view(object, true)).unwrap_or(Value::Null);
                }
            }
            row
        });
        let definitions = if columns { table.columns() } else { Value::Null };
        json!({
            "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
            "columnDefinitions": definitions, "rows": rows.collect::<Vec<_>>(),
        })
    }

    /// An object that is empty but for its type and resource version.
    fn bookmark(&self, revision: u64, initial_events_end: bool) -> Value {
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if initial_events_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        match self.form {
            Form::Table(include) => {
                let mut table = self.table(&[], &metadata, include, false);
                let row = json!({"cells": [], "object": {
                    "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
                }});
                table["rows"] = json!([row]);
                table
            }
            Form::Metadata => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
            }
            Form::Object => {
                let mut object = self.zero();
                object["kind"] = json!(self.kind);
                object["apiVersion"] = json!(self.api_version);
                object["metadata"] = metadata;
                object
            }
        }
    }

    /// What Go's types of the kind serialize when empty: strict clients decode bookmarks as objects of the kind.
    fn zero(&self) -> Value {
        match (self.api_version.as_str(), self.kind.as_str()) {
            ("v1", "Pod") => json!({"spec": {"containers": null}, "status": {}}),
            ("v1", "Namespace") => json!({"spec": {}, "status": {}}),
            ("v1", "Service") | ("networking.k8s.io/v1", "Ingress") => {
                json!({"spec": {}, "status": {"loadBalancer": {}}})
            }
            ("v1", "Node") => json!({"spec": {}, "status": {
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
                "nodeInfo": {
                    "machineID": "", "systemUUID": "", "bootID": "", "kernelVersion": "", "osImage": "",
                    "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "",
                    "operatingSystem": "", "architecture": "",
                },
            }}),
            ("networking.k8s.io/v1", "NetworkPolicy") => json!({"spec": {"podSelector": {}}}),
            ("discovery.k8s.io/v1", "EndpointSlice") => {
                json!({"addressType": "", "endpoints": null, "ports": null})
            }
            _ => json!({}),
        }
    }
}
