//! Kubernetes' protobuf, as far as kubectl insists on it.
//!
//! kubectl sends some bodies as protobuf whatever the server prefers: the options of a delete (`kubectl drain`) and
//! small objects (`kubectl create namespace`). Those messages are decoded by the tables below, after the published
//! `generated.proto` files; everything else is refused with advice.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::error::ApiError;

/// First bytes of every body: the envelope `runtime.Unknown` follows.
const MAGIC: &[u8] = b"k8s\0";

/// Shape of a field's value.
enum Shape {
    Text,
    /// Base64 in JSON.
    Bytes,
    Integer,
    Bool,
    Message(&'static Message),
    /// `map<string, string>`.
    TextMap,
    /// `map<string, bytes>`.
    BytesMap,
}

struct Field {
    number: u64,
    name: &'static str,
    repeated: bool,
    shape: Shape,
}

type Message = [Field];

const fn one(number: u64, name: &'static str, shape: Shape) -> Field {
    Field { number, name, repeated: false, shape }
}

const fn many(number: u64, name: &'static str, shape: Shape) -> Field {
    Field { number, name, repeated: true, shape }
}

const OWNER_REFERENCE: &Message = &[
    one(1, "kind", Shape::Text),
    one(3, "name", Shape::Text),
    one(4, "uid", Shape::Text),
    one(5, "apiVersion", Shape::Text),
    one(6, "controller", Shape::Bool),
    one(7, "blockOwnerDeletion", Shape::Bool),
];
/// Without what a server ignores in what it is sent.
const OBJECT_META: &Message = &[
    one(1, "name", Shape::Text),
    one(2, "generateName", Shape::Text),
    one(3, "namespace", Shape::Text),
    one(6, "resourceVersion", Shape::Text),
    one(11, "labels", Shape::TextMap),
    one(12, "annotations", Shape::TextMap),
    many(13, "ownerReferences", Shape::Message(OWNER_REFERENCE)),
    many(14, "finalizers", Shape::Text),
];
const DELETE_OPTIONS: &Message = &[
    one(1, "gracePeriodSeconds", Shape::Integer),
    one(
        2,
        "preconditions",
        Shape::Message(&[one(1, "uid", Shape::Text), one(2, "resourceVersion", Shape::Text)]),
    ),
    one(3, "orphanDependents", Shape::Bool),
    one(4, "propagationPolicy", Shape::Text),
    many(5, "dryRun", Shape::Text),
];
const NAMESPACE: &Message = &[one(1, "metadata", Shape::Message(OBJECT_META))];
const CONFIG_MAP: &Message = &[
    one(1, "metadata", Shape::Message(OBJECT_META)),
    one(2, "data", Shape::TextMap),
    one(3, "binaryData", Shape::BytesMap),
    one(4, "immutable", Shape::Bool),
];
const SECRET: &Message = &[
    one(1, "metadata", Shape::Message(OBJECT_META)),
    one(2, "data", Shape::BytesMap),
    one(3, "type", Shape::Text),
    one(4, "stringData", Shape::TextMap),
    one(5, "immutable", Shape::Bool),
];
const REFERENCE: &Message = &[one(1, "name", Shape::Text)];
const SERVICE_ACCOUNT: &Message = &[
    one(1, "metadata", Shape::Message(OBJECT_META)),
    many(3, "imagePullSecrets", Shape::Message(REFERENCE)),
    one(4, "automountServiceAccountToken", Shape::Bool),
];
const TYPE_META: &Message = &[one(1, "apiVersion", Shape::Text), one(2, "kind", Shape::Text)];

fn malformed(what: &str) -> ApiError {
    ApiError::bad_request(format!("the body of the request is not valid protobuf: {what}"))
}

/// A body as JSON.
///
/// # Errors
/// 400 for bytes that are not protobuf, 415 for kinds that are not understood in protobuf.
pub(super) fn decode(body: &[u8]) -> Result<Value, ApiError> {
    let mut envelope =
        Reader(body.strip_prefix(MAGIC).ok_or_else(|| malformed("it lacks the prefix \"k8s\\0\""))?);
    let (mut type_, mut raw) = (json!({}), &[][..]);
    while let Some((number, value)) = envelope.field()? {
        match (number, value) {
            (1, Wire::Bytes(bytes)) => type_ = message(TYPE_META, bytes)?,
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let kind = type_["kind"].as_str().unwrap_or_default().to_owned();
    let api_version = type_["apiVersion"].as_str().unwrap_or_default().to_owned();
    let shape = match (api_version.as_str(), kind.as_str()) {
        (_, "DeleteOptions") => DELETE_OPTIONS,
        ("v1", "Namespace") => NAMESPACE,
        ("v1", "ConfigMap") => CONFIG_MAP,
        ("v1", "Secret") => SECRET,
        ("v1", "ServiceAccount") => SERVICE_ACCOUNT,
        _ => {
            return Err(ApiError::unsupported_media_type(format!(
                "this API server of a lab does not read {kind:?} of {api_version:?} as protobuf: send \
                 application/json (with kubectl: add `--dry-run=client -o yaml` and pipe that into `kubectl apply -f -`)"
            )));
        }
    };
    let mut object = message(shape, raw)?;
    object["kind"] = json!(kind);
    object["apiVersion"] = json!(api_version);
    Ok(object)
}

fn message(shape: &Message, bytes: &[u8]) -> Result<Value, ApiError> {
    let mut reader = Reader(bytes);
    let mut fields = Map::new();
    while let Some((number, value)) = reader.field()? {
        let Some(field) = shape.iter().find(|field| field.number == number) else { continue };
        match (&field.shape, value) {
            (Shape::TextMap | Shape::BytesMap, Wire::Bytes(bytes)) => {
                let (key, value) = entry(bytes, matches!(field.shape, Shape::BytesMap))?;
                let map = fields.entry(field.name).or_insert_with(|| json!({}));
                map[key] = value;
            }
            (shape, value) => {
                let value = scalar(shape, &value)?;
                if field.repeated {
                    let list = fields.entry(field.name).or_insert_with(|| json!([]));
                    if let Some(list) = list.as_array_mut() {
                        list.push(value);
                    }
                } else if value != "" {
                    fields.insert(field.name.to_owned(), value);
                }
            }
        }
    }
    Ok(Value::Object(fields))
}

fn scalar(shape: &Shape, value: &Wire<'_>) -> Result<Value, ApiError> {
    match (shape, value) {
        (Shape::Text, Wire::Bytes(bytes)) => {
            std::str::from_utf8(bytes).map(|text| json!(text)).map_err(|_| malformed("a text is not UTF-8"))
        }
        (Shape::Bytes, Wire::Bytes(bytes)) => Ok(json!(STANDARD.encode(bytes))),
        (Shape::Integer, Wire::Number(number)) => Ok(json!(number.cast_signed())),
        (Shape::Bool, Wire::Number(number)) => Ok(json!(*number != 0)),
        (Shape::Message(shape), Wire::Bytes(bytes)) => message(shape, bytes),
        _ => Err(malformed("a field has the wrong wire type")),
    }
}

/// A map's entry: key 1, value 2.
fn entry(bytes: &[u8], encoded: bool) -> Result<(String, Value), ApiError> {
    let mut reader = Reader(bytes);
    let (mut key, mut value) = (String::new(), json!(""));
    while let Some((number, wire)) = reader.field()? {
        match number {
            1 => key = scalar(&Shape::Text, &wire)?.as_str().unwrap_or_default().to_owned(),
            2 => value = scalar(if encoded { &Shape::Bytes } else { &Shape::Text }, &wire)?,
            _ => {}
        }
    }
    Ok((key, value))
}

enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn field(&mut self) -> Result<Option<(u64, Wire<'a>)>, ApiError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            1 => Wire::Bytes(self.take(8)?),
            2 => {
                let len = self.varint()?;
                Wire::Bytes(self.take(usize::try_from(len).unwrap_or(usize::MAX))?)
            }
            5 => Wire::Bytes(self.take(4)?),
            _ => return Err(malformed("unknown wire type")),
        };
        Ok(Some((tag >> 3, value)))
    }

    fn varint(&mut self) -> Result<u64, ApiError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or_else(|| malformed("it ends inside a number"))?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("a number is too long"))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], ApiError> {
        let (taken, rest) =
            self.0.split_at_checked(len).ok_or_else(|| malformed("it ends inside a field"))?;
        self.0 = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        out.extend(bytes);
        out
    }

    fn body(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let type_ = [field(1, api_version.as_bytes()), field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), field(1, &type_), field(2, raw)].concat()
    }

    #[test]
    fn the_messages_that_kubectl_sends_are_read() {
        let options = [vec![8, 5], field(2, &field(1, b"u-1")), field(4, b"Background")].concat();
        assert_eq!(
            decode(&body("policy/v1", "DeleteOptions", &options)).unwrap(),
            json!({"kind": "DeleteOptions", "apiVersion": "policy/v1", "gracePeriodSeconds": 5,
                   "preconditions": {"uid": "u-1"}, "propagationPolicy": "Background"})
        );
        let label = [field(1, b"a"), field(2, b"b")].concat();
        let metadata = [field(1, b"web"), field(2, b""), field(11, &label)].concat();
        let secret = [field(1, &metadata), field(2, &label), field(3, b"Opaque")].concat();
        assert_eq!(
            decode(&body("v1", "Secret", &secret)).unwrap(),
            json!({"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "web", "labels": {"a": "b"}},
                   "data": {"a": "Yg=="}, "type": "Opaque"})
        );
    }

    #[test]
    fn broken_and_unknown_messages_are_refused() {
        assert_eq!(decode(b"{}").unwrap_err().code, 400);
        assert_eq!(decode(&body("apps/v1", "Deployment", b"")).unwrap_err().code, 415);
        let whole = body("v1", "Namespace", &field(1, &field(1, b"a")));
        assert!(decode(&whole).is_ok());
        let without_content = whole.len() - field(2, &field(1, &field(1, b"a"))).len();
        for len in 0..whole.len() {
            // Any cut is refused, but for the one that takes away exactly the content.
            assert_eq!(decode(&whole[..len]).is_ok(), len == without_content, "{len}");
        }
        assert_eq!(decode(&[MAGIC, &[0xff; 12]].concat()).unwrap_err().code, 400);
        assert_eq!(decode(&[MAGIC, &[0x0b]].concat()).unwrap_err().code, 400);
    }
}
