//! One YAML document to one JSON value, with the reading that `kubectl` gives it.
//!
//! `kubectl` reads YAML 1.1 (`yes`, `on` and `y` are booleans, `0644` is 420) and then prints JSON through Go,
//! where every key becomes a string (`80:` is `"80"`, `on:` is `"true"`) and a whole float loses its point
//! (`1.0` is `1`). Manifests that depend on either, by accident or not, must mean the same here.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Whole numbers above this lose digits as a float, so they stay floats.
const LARGEST_EXACT_FLOAT: f64 = 9_007_199_254_740_992.0;

/// Reads one document. The error text names line and column where the parser knows them.
pub(super) fn parse(text: &str) -> Result<Value, String> {
    let options = serde_saphyr::options! {
        legacy_octal_numbers: true,
        with_snippet: false,
    };
    serde_saphyr::with_deserializer_from_str_with_options(text, options, |de| Tree.deserialize(de))
        .map_err(|e| e.to_string())
}

struct Tree;

impl<'de> DeserializeSeed<'de> for Tree {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, de: D) -> Result<Value, D::Error> {
        de.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_some<D: Deserializer<'de>>(self, de: D) -> Result<Value, D::Error> {
        de.deserialize_any(self)
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_f64<E: serde::de::Error>(self, v: f64) -> Result<Value, E> {
        number(v).map(Value::Number).ok_or_else(|| E::custom(format!("{v} has no JSON form")))
    }
    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }
    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }
    fn visit_bytes<E: serde::de::Error>(self, v: &[u8]) -> Result<Value, E> {
        std::str::from_utf8(v)
            .map(|s| Value::String(s.to_owned()))
            .map_err(|_| E::custom("!!binary value is not UTF-8 text"))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        while let Some(v) = seq.next_element_seed(Tree)? {
            out.push(v);
        }
        Ok(Value::Array(out))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some(key) = map.next_key_seed(Tree)? {
            let key = key_text(key).map_err(A::Error::custom)?;
            let value = map.next_value_seed(Tree)?;
            if out.insert(key.clone(), value).is_some() {
                return Err(A::Error::custom(format!("key {key:?} is set twice in one mapping")));
            }
        }
        Ok(Value::Object(out))
    }
}

fn number(v: f64) -> Option<Number> {
    if v.fract() == 0.0 && v.abs() <= LARGEST_EXACT_FLOAT {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "whole and within the exact range, checked above"
        )]
        return Some(Number::from(v as i64));
    }
    Number::from_f64(v)
}

/// JSON has string keys only; other scalars take the text that Go's encoder gives them.
fn key_text(key: Value) -> Result<String, &'static str> {
    match key {
        Value::String(s) => Ok(s),
        Value::Bool(b) => Ok(b.to_string()),
        Value::Number(n) => Ok(n.to_string()),
        Value::Null => Err("a mapping key is null; quote it if the text null is meant"),
        Value::Array(_) | Value::Object(_) => {
            Err("a mapping key is a list or mapping; JSON allows text only")
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Left: what a manifest says; right: what kubectl 1.32 makes of it (`kubectl annotate --local -o json`).
    #[test]
    fn scalars_read_as_kubectl_reads_them() {
        for (text, want) in [
            ("a: yes", json!({"a": true})),
            ("a: OFF", json!({"a": false})),
            ("a: y", json!({"a": true})),
            ("a: n", json!({"a": false})),
            ("a: \"yes\"", json!({"a": "yes"})),
            ("on: 2", json!({"true": 2})),
            ("\"on\": 2", json!({"on": 2})),
            ("80: x", json!({"80": "x"})),
            ("1.5: x", json!({"1.5": "x"})),
            ("a: 0644", json!({"a": 420})),
            ("a: 0o644", json!({"a": 420})),
            ("a: 0x1F", json!({"a": 31})),
            ("a: 0b11", json!({"a": 3})),
            ("a: -010", json!({"a": -8})),
            ("a: 08", json!({"a": 8})),
            ("a: 1_000", json!({"a": 1000})),
            ("a: 1:30", json!({"a": "1:30"})),
            ("a: 2001-01-01", json!({"a": "2001-01-01"})),
            ("a: 1.0", json!({"a": 1})),
            ("a: 1e3", json!({"a": 1000})),
            ("a: 1.50", json!({"a": 1.5})),
            ("a: ~", json!({"a": null})),
            ("a:", json!({"a": null})),
            ("a: !!str 5", json!({"a": "5"})),
            ("a: !!binary aGVsbG8=", json!({"a": "hello"})),
            ("a: |\n  hi\n", json!({"a": "hi\n"})),
            ("b: &x {c: 1}\na: {<<: *x, d: 2}", json!({"b": {"c": 1}, "a": {"c": 1, "d": 2}})),
            ("- 1\n- [a, {b: c}]", json!([1, ["a", {"b": "c"}]])),
        ] {
            assert_eq!(parse(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn bad_documents_say_where() {
        for (text, part) in [
            ("a: [1", "line"),
            ("a: 1\na: 2", "a"),
            ("~: 1", "null"),
            ("{a: b}: 1", "mapping key"),
            ("yes: 1\ntrue: 2", "true"),
            ("a: *nope", "unknown anchor"),
        ] {
            let err = parse(text).expect_err(text);
            assert!(err.contains(part), "{text}: {err}");
        }
    }

    #[test]
    fn nested_aliases_do_not_explode() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..12 {
            let list = vec![format!("*a{}", i - 1); 10].join(", ");
            text.push_str(&format!("a{i}: &a{i} [{list}]\n"));
        }
        let err = parse(&text).expect_err("an alias bomb is refused");
        assert!(!err.is_empty());
    }
}
