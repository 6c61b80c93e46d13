//! Types of the table as schemas, in the dialects of OpenAPI v2 and v3. Pure.

use serde_json::{Map, Value, json};

use super::table::{Field, Merge, Shape, Table, Type};

/// Which OpenAPI a schema is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    V2,
    V3,
}

const TIME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Time";
const MICRO_TIME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime";
const QUANTITY: &str = "io.k8s.apimachinery.pkg.api.resource.Quantity";
const INT_OR_STRING: &str = "io.k8s.apimachinery.pkg.util.intstr.IntOrString";

impl Dialect {
    fn reference(self, full_name: &str) -> String {
        match self {
            Self::V2 => format!("#/definitions/{full_name}"),
            Self::V3 => format!("#/components/schemas/{full_name}"),
        }
    }

    fn refer(self, full_name: &str) -> Value {
        json!({"$ref": self.reference(full_name)})
    }

    /// A reference to a named schema, with the attributes given.
    pub(super) fn reference_with(self, full_name: &str, extra: Map<String, Value>) -> Value {
        let mut out = match self {
            // Nothing beside a reference counts in v3.
            Self::V3 if !extra.is_empty() => json!({"allOf": [self.refer(full_name)]}),
            _ => self.refer(full_name),
        };
        if let Some(fields) = out.as_object_mut() {
            fields.extend(extra);
        }
        out
    }

    /// The schemas that are not objects.
    pub(super) fn scalars(self) -> [(&'static str, Value); 4] {
        let (quantity, int_or_string) = match self {
            Self::V2 => (json!({"type": "string"}), json!({"type": "string", "format": "int-or-string"})),
            Self::V3 => (
                json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
                json!({"oneOf": [{"type": "integer"}, {"type": "string"}], "format": "int-or-string"}),
            ),
        };
        [
            (TIME, json!({"type": "string", "format": "date-time"})),
            (MICRO_TIME, json!({"type": "string", "format": "date-time"})),
            (QUANTITY, described(quantity, "An amount such as 500m, 2 or 1Gi.")),
            (INT_OR_STRING, described(int_or_string, "A number or a text, such as 80, http or 25%.")),
        ]
    }
}

fn described(mut schema: Value, description: &str) -> Value {
    schema["description"] = json!(description);
    schema
}

/// An object of which nothing is known.
pub(super) fn open() -> Value {
    json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// `x-kubernetes-group-version-kind` of a definition.
pub(super) fn group_version_kind(group: &str, version: &str, kind: &str) -> Value {
    json!({"group": group, "version": version, "kind": kind})
}

/// All types of the table, by full name.
pub(super) fn definitions(table: &Table, dialect: Dialect) -> Map<String, Value> {
    let scalars = dialect.scalars().into_iter().map(|(name, schema)| (name.to_owned(), schema));
    let types =
        table.types().iter().map(|known| (known.full_name.clone(), definition(table, known, dialect)));
    scalars.chain(types).collect()
}

fn definition(table: &Table, known: &Type, dialect: Dialect) -> Value {
    let properties: Map<String, Value> =
        known.fields.iter().map(|field| (field.name.to_owned(), property(table, field, dialect))).collect();
    let mut out = json!({"type": "object", "properties": properties});
    let required: Vec<&str> =
        known.fields.iter().filter(|field| field.required).map(|field| field.name).collect();
    if !required.is_empty() {
        out["required"] = json!(required);
    }
    if !known.description.is_empty() {
        out["description"] = json!(known.description);
    }
    if let Some((group, version)) = known.group_version {
        out["x-kubernetes-group-version-kind"] = json!([group_version_kind(group, version, known.kind)]);
    }
    out
}

fn property(table: &Table, field: &Field, dialect: Dialect) -> Value {
    let mut extra = Map::new();
    if !field.description.is_empty() {
        extra.insert("description".to_owned(), json!(field.description));
    }
    let Merge { strategy, key } = field.merge;
    for (name, value) in [("strategy", strategy), ("merge-key", key)] {
        if let Some(value) = value {
            extra.insert(format!("x-kubernetes-patch-{name}"), json!(value));
        }
    }
    shape(table, &field.shape, dialect, extra)
}

fn shape(table: &Table, shape_: &Shape, dialect: Dialect, extra: Map<String, Value>) -> Value {
    let reference = match shape_ {
        Shape::Time => Some(TIME),
        Shape::MicroTime => Some(MICRO_TIME),
        Shape::Quantity => Some(QUANTITY),
        Shape::IntOrString => Some(INT_OR_STRING),
        Shape::Type(index) => Some(table.at(*index).full_name.as_str()),
        _ => None,
    };
    if let Some(full_name) = reference {
        return dialect.reference_with(full_name, extra);
    }
    let inner = |item: &Shape| shape(table, item, dialect, Map::new());
    let mut out = match shape_ {
        Shape::Int32 => json!({"type": "integer", "format": "int32"}),
        Shape::Int64 => json!({"type": "integer", "format": "int64"}),
        Shape::Bool => json!({"type": "boolean"}),
        Shape::Bytes => json!({"type": "string", "format": "byte"}),
        Shape::Open => open(),
        Shape::List(item) => json!({"type": "array", "items": inner(item)}),
        Shape::Map(value) => json!({"type": "object", "additionalProperties": inner(value)}),
        _ => json!({"type": "string"}),
    };
    if let Some(fields) = out.as_object_mut() {
        fields.extend(extra);
    }
    out
}
