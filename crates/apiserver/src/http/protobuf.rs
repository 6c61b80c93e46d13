//! Kubernetes' protobuf, as far as kubectl insists on it.
//!
//! kubectl sends some bodies as protobuf whatever the server prefers: the options of a delete (`kubectl drain`) and what
//! it makes itself (`kubectl create deployment`). Those messages are read by the field numbers of the
//! [`table`](crate::openapi::table); a kind or a field without a number is refused with advice, never dropped.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::json::timestamp_text;
use crate::openapi::table::{Field, Number, Shape, Table, Type, table};

/// First bytes of every body: the envelope `runtime.Unknown` follows.
const MAGIC: &[u8] = b"k8s\0";
/// Options of deletes, which may come in any group's name.
const DELETE_OPTIONS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";
/// Nesting of messages beyond which a body is refused.
const DEPTH_LIMIT: usize = 64;

fn malformed(what: &str) -> ApiError {
    ApiError::bad_request(format!("the body of the request is not valid protobuf: {what}"))
}

fn unread(what: &str) -> ApiError {
    ApiError::unsupported_media_type(format!(
        "this API server of a lab does not read {what} as protobuf: send application/json (with kubectl: add \
         `--dry-run=client -o yaml` and pipe that into `kubectl apply -f -`)"
    ))
}

/// A body as JSON.
///
/// # Errors
/// 400 for bytes that are not protobuf, 415 for kinds and fields that are not understood in protobuf.
pub(super) fn decode(body: &[u8]) -> Result<Value, ApiError> {
    let mut envelope =
        Reader(body.strip_prefix(MAGIC).ok_or_else(|| malformed("it lacks the prefix \"k8s\\0\""))?);
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    while let Some((number, value)) = envelope.field()? {
        match (number, value) {
            (1, Wire::Bytes(bytes)) => (api_version, kind) = text_pair(bytes)?,
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
    let known = match kind.as_str() {
        "DeleteOptions" => table().named(DELETE_OPTIONS),
        kind => table().kind(group, version, kind),
    };
    let known = known.ok_or_else(|| unread(&format!("{kind:?} of {api_version:?}")))?;
    let mut object = Decoder { table: table() }.message(known, raw, DEPTH_LIMIT)?;
    object["kind"] = json!(kind);
    object["apiVersion"] = json!(api_version);
    Ok(object)
}

/// Two texts: `TypeMeta`, or the key and value of a map of texts.
fn text_pair(bytes: &[u8]) -> Result<(String, String), ApiError> {
    let mut reader = Reader(bytes);
    let (mut first, mut second) = (String::new(), String::new());
    while let Some((number, value)) = reader.field()? {
        match (number, value) {
            (1, Wire::Bytes(bytes)) => first = text(bytes)?,
            (2, Wire::Bytes(bytes)) => second = text(bytes)?,
            _ => {}
        }
    }
    Ok((first, second))
}

fn text(bytes: &[u8]) -> Result<String, ApiError> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| malformed("a text is not UTF-8"))
}

struct Decoder {
    table: &'static Table,
}

impl Decoder {
    fn message(&self, known: &Type, bytes: &[u8], depth: usize) -> Result<Value, ApiError> {
        let mut fields = Map::new();
        self.fields(known, None, bytes, depth, &mut fields)?;
        Ok(Value::Object(fields))
    }

    /// Reads a message, or one that is embedded in it (`outer`), into the fields of one JSON object.
    fn fields(
        &self,
        known: &Type,
        outer: Option<u64>,
        bytes: &[u8],
        depth: usize,
        out: &mut Map<String, Value>,
    ) -> Result<(), ApiError> {
        let depth = depth.checked_sub(1).ok_or_else(|| malformed("it is nested too deeply"))?;
        let mut reader = Reader(bytes);
        while let Some((number, value)) = reader.field()? {
            let wanted = Some(Number { outer, own: number });
            if let Some(field) = known.fields.iter().find(|field| field.number == wanted) {
                self.field(field, &value, depth, out)?;
                continue;
            }
            let embeds = |field: &Field| field.number.is_some_and(|found| found.outer == Some(number));
            match value {
                Wire::Bytes(bytes) if outer.is_none() && known.fields.iter().any(embeds) => {
                    self.fields(known, Some(number), bytes, depth, out)?;
                }
                // Nothing in it: nothing is lost.
                Wire::Bytes([]) | Wire::Number(0) => {}
                _ => return Err(unread(&format!("field {number} of {}", known.full_name))),
            }
        }
        Ok(())
    }

    fn field(
        &self,
        field: &Field,
        wire: &Wire<'_>,
        depth: usize,
        out: &mut Map<String, Value>,
    ) -> Result<(), ApiError> {
        match (&field.shape, wire) {
            (Shape::Map(shape), Wire::Bytes(bytes)) => {
                let (key, value) = self.entry(shape, bytes, depth)?;
                out.entry(field.name).or_insert_with(|| json!({}))[key] = value;
            }
            (Shape::List(shape), wire) => {
                let value = self.value(shape, wire, depth)?;
                if let Some(list) = out.entry(field.name).or_insert_with(|| json!([])).as_array_mut() {
                    list.push(value);
                }
            }
            (shape, wire) => {
                let value = self.value(shape, wire, depth)?;
                // Plain fields are always on the wire; their zero means that they are absent.
                let zero = value == "" || value == 0 || value == false;
                if !value.is_null() && (!zero || field.optional) {
                    out.insert(field.name.to_owned(), value);
                }
            }
        }
        Ok(())
    }

    /// A map's entry: key 1, value 2.
    fn entry(&self, shape: &Shape, bytes: &[u8], depth: usize) -> Result<(String, Value), ApiError> {
        let mut reader = Reader(bytes);
        let mut key = String::new();
        let mut value = if *shape == Shape::Bytes || *shape == Shape::Text { json!("") } else { Value::Null };
        while let Some((number, wire)) = reader.field()? {
            match (number, wire) {
                (1, Wire::Bytes(bytes)) => key = text(bytes)?,
                (2, wire) => value = self.value(shape, &wire, depth)?,
                _ => {}
            }
        }
        Ok((key, value))
    }

    fn value(&self, shape: &Shape, wire: &Wire<'_>, depth: usize) -> Result<Value, ApiError> {
        Ok(match (shape, wire) {
            (Shape::Text, Wire::Bytes(bytes)) => json!(text(bytes)?),
            (Shape::Bytes, Wire::Bytes(bytes)) => json!(STANDARD.encode(bytes)),
            (Shape::Int32 | Shape::Int64, Wire::Number(number)) => json!(number.cast_signed()),
            (Shape::Bool, Wire::Number(number)) => json!(*number != 0),
            (Shape::Type(index), Wire::Bytes(bytes)) => self.message(self.table.at(*index), bytes, depth)?,
            // A message of one text.
            (Shape::Quantity, Wire::Bytes(bytes)) => json!(text_pair(bytes)?.0),
            (Shape::IntOrString, Wire::Bytes(bytes)) => int_or_string(bytes)?,
            (Shape::Time | Shape::MicroTime, Wire::Bytes(bytes)) => time(bytes, *shape == Shape::MicroTime)?,
            (Shape::Open, Wire::Bytes([])) => json!({}),
            (Shape::Open, _) => return Err(unread("a field whose contents are not known here")),
            _ => return Err(malformed("a field has the wrong wire type")),
        })
    }
}

/// `IntOrString`: which of the two 1, number 2, text 3.
fn int_or_string(bytes: &[u8]) -> Result<Value, ApiError> {
    let mut reader = Reader(bytes);
    let (mut is_text, mut number, mut words) = (false, 0, String::new());
    while let Some(field) = reader.field()? {
        match field {
            (1, Wire::Number(which)) => is_text = which == 1,
            (2, Wire::Number(value)) => number = value.cast_signed(),
            (3, Wire::Bytes(bytes)) => words = text(bytes)?,
            _ => {}
        }
    }
    Ok(if is_text { json!(words) } else { json!(number) })
}

/// `Time`: seconds 1, nanoseconds 2; without both it is no time at all.
fn time(bytes: &[u8], micros: bool) -> Result<Value, ApiError> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    let mut reader = Reader(bytes);
    let (mut seconds, mut nanos) = (0, 0);
    while let Some(field) = reader.field()? {
        match field {
            (1, Wire::Number(value)) => seconds = value.cast_signed(),
            (2, Wire::Number(value)) => nanos = i32::try_from(value).unwrap_or(0),
            _ => {}
        }
    }
    let at = Timestamp::new(seconds, nanos).map_err(|_| malformed("a time is out of range"))?;
    Ok(json!(if micros { at.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string() } else { timestamp_text(at) }))
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
    fn nested_messages_keep_what_is_set_and_nothing_else() {
        let int_or_string = |bytes: &[u8]| field(4, bytes);
        let ports = [
            field(
                1,
                &[field(1, b"http"), vec![24, 80], int_or_string(&[8, 0, 16, 0x90, 0x3f]), vec![40, 0]]
                    .concat(),
            ),
            field(1, &[vec![24, 81], int_or_string(&[vec![8, 1], field(3, b"web")].concat())].concat()),
        ];
        let service = field(2, &[ports.concat(), field(3, b""), vec![104, 0]].concat());
        let metadata = field(1, &[field(1, b"web"), field(8, b"")].concat());
        assert_eq!(
            decode(&body("v1", "Service", &[metadata.clone(), service].concat())).unwrap(),
            json!({"kind": "Service", "apiVersion": "v1", "metadata": {"name": "web"}, "spec": {"ports": [
                {"name": "http", "port": 80, "targetPort": 8080}, {"port": 81, "targetPort": "web"}]}})
        );
        // replicas: 0 is not the same as none; a probe's handler and a key's reference are embedded messages.
        let probe = field(11, &[field(1, &field(3, &field(1, &[8, 0, 16, 80]))), vec![16, 5]].concat());
        let reference = field(3, &field(3, &[field(1, &field(1, b"settings")), field(2, b"k")].concat()));
        let env = field(7, &[field(1, b"A"), reference].concat());
        let limit = field(8, &field(1, &[field(1, b"cpu"), field(2, &field(1, b"500m"))].concat()));
        let container = field(2, &[field(1, b"c"), env, limit, probe].concat());
        let template = field(3, &field(2, &container));
        let spec = field(2, &[vec![8, 0], template].concat());
        let time = field(1, &field(8, &[8, 60]));
        assert_eq!(
            decode(&body("apps/v1", "Deployment", &[time, spec].concat())).unwrap(),
            json!({"kind": "Deployment", "apiVersion": "apps/v1",
                "metadata": {"creationTimestamp": "1970-01-01T00:01:00Z"},
                "spec": {"replicas": 0, "template": {"spec": {"containers": [{"name": "c",
                    "env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "k"}}}],
                    "resources": {"limits": {"cpu": "500m"}},
                    "readinessProbe": {"tcpSocket": {"port": 80}, "initialDelaySeconds": 5}}]}}}})
        );
    }

    #[test]
    fn broken_and_unknown_messages_are_refused() {
        assert_eq!(decode(b"{}").unwrap_err().code, 400);
        assert_eq!(decode(&body("example.com/v1", "Widget", b"")).unwrap_err().code, 415);
        // A volume source whose fields are not in the table: refused instead of dropped.
        let volume = field(1, &[field(1, b"data"), field(2, &field(7, &field(1, b"server")))].concat());
        assert_eq!(decode(&body("v1", "Pod", &field(2, &volume))).unwrap_err().code, 415);
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
