//! An OpenAPI v2 document as protobuf, in the messages of gnostic's `OpenAPIv2.proto`. Only what this server publishes
//! is written: schemas without bounds, operations with query and path parameters, vendor extensions. Pure.

use serde_json::{Map, Value};

/// Writes fields of a message, in the order of the calls.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn bytes(&mut self, number: u64, bytes: &[u8]) {
        self.varint(number << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    /// A text; an empty or missing one is left out.
    fn text(&mut self, number: u64, value: Option<&Value>) {
        if let Some(text) = value.and_then(Value::as_str).filter(|text| !text.is_empty()) {
            self.bytes(number, text.as_bytes());
        }
    }

    fn texts(&mut self, number: u64, value: Option<&Value>) {
        for text in value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            self.bytes(number, text.as_bytes());
        }
    }

    fn flag(&mut self, number: u64, value: Option<&Value>) {
        if value == Some(&Value::Bool(true)) {
            self.varint(number << 3);
            self.varint(1);
        }
    }

    fn message(&mut self, number: u64, write: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        write(&mut inner);
        self.bytes(number, &inner.0);
    }

    /// An entry of what JSON has as a map: name and value.
    fn named(&mut self, number: u64, name: &str, write: impl FnOnce(&mut Self)) {
        self.message(number, |entry| {
            entry.bytes(1, name.as_bytes());
            entry.message(2, write);
        });
    }

    /// Vendor extensions: YAML texts, and JSON is YAML.
    fn extensions(&mut self, number: u64, fields: &Map<String, Value>) {
        for (name, value) in fields.iter().filter(|(name, _)| name.starts_with("x-")) {
            self.named(number, name, |any| any.bytes(2, format!("{value}\n").as_bytes()));
        }
    }
}

fn object(value: Option<&Value>) -> impl Iterator<Item = (&String, &Map<String, Value>)> {
    let entries = value.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(name, value)| Some((name, value.as_object()?)))
}

pub(super) fn document(document: &Value) -> Vec<u8> {
    let mut out = Writer::default();
    out.text(1, document.get("swagger"));
    out.message(2, |info| {
        info.text(1, document["info"].get("title"));
        info.text(2, document["info"].get("version"));
    });
    out.message(8, |paths| {
        for (name, item) in object(document.get("paths")) {
            paths.named(2, name, |message| path_item(message, item));
        }
    });
    out.message(9, |definitions| {
        for (name, fields) in object(document.get("definitions")) {
            definitions.named(1, name, |message| schema(message, fields));
        }
    });
    out.0
}

fn path_item(out: &mut Writer, item: &Map<String, Value>) {
    for (number, method) in [(2, "get"), (3, "put"), (4, "post"), (5, "delete"), (8, "patch")] {
        if let Some(fields) = item.get(method).and_then(Value::as_object) {
            out.message(number, |message| operation(message, fields));
        }
    }
    parameters(out, 9, item.get("parameters"));
}

fn operation(out: &mut Writer, fields: &Map<String, Value>) {
    parameters(out, 8, fields.get("parameters"));
    out.message(9, |responses| {
        for (code, response) in object(fields.get("responses")) {
            responses.named(1, code, |value| {
                value.message(1, |message| message.text(1, response.get("description")));
            });
        }
    });
    out.extensions(13, fields);
}

fn parameters(out: &mut Writer, number: u64, list: Option<&Value>) {
    for parameter in list.and_then(Value::as_array).into_iter().flatten() {
        let in_path = parameter["in"] == "path";
        // ParametersItem, Parameter, NonBodyParameter, and one of its kinds.
        let write = |message: &mut Writer| {
            message.flag(1, parameter.get("required"));
            message.text(2, parameter.get("in"));
            message.text(3, parameter.get("description"));
            message.text(4, parameter.get("name"));
            message.text(if in_path { 5 } else { 6 }, parameter.get("type"));
        };
        out.message(number, |item| {
            item.message(1, |any| any.message(2, |kind| kind.message(if in_path { 4 } else { 3 }, write)));
        });
    }
}

fn schema(out: &mut Writer, fields: &Map<String, Value>) {
    out.text(1, fields.get("$ref"));
    out.text(2, fields.get("format"));
    out.text(4, fields.get("description"));
    out.texts(19, fields.get("required"));
    if let Some(nested) = fields.get("additionalProperties").and_then(Value::as_object) {
        out.message(21, |item| item.message(1, |message| schema(message, nested)));
    }
    if let Some(type_) = fields.get("type").and_then(Value::as_str) {
        out.message(22, |item| item.bytes(1, type_.as_bytes()));
    }
    if let Some(nested) = fields.get("items").and_then(Value::as_object) {
        out.message(23, |item| item.message(1, |message| schema(message, nested)));
    }
    if fields.get("properties").is_some_and(Value::is_object) {
        out.message(25, |properties| {
            for (name, nested) in object(fields.get("properties")) {
                properties.named(1, name, |message| schema(message, nested));
            }
        });
    }
    out.extensions(31, fields);
}

#[cfg(test)]
pub(super) fn schema_bytes(fields: &Map<String, Value>) -> Vec<u8> {
    let mut out = Writer::default();
    schema(&mut out, fields);
    out.0
}
