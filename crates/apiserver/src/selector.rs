//! Label and field selectors as they come in query parameters. Pure.

use serde_json::Value;

use crate::error::ApiError;
use crate::json::{at, get_str};
use crate::kinds::KindInfo;
use crate::validate::{label_key_problem, label_value_problem};

/// A parsed `labelSelector`: all requirements must hold. The default selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<LabelRequirement>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct LabelRequirement {
    key: String,
    test: LabelTest,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum LabelTest {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    Above(i64),
    Below(i64),
}

fn unparsable(text: &str, why: impl std::fmt::Display) -> ApiError {
    ApiError::bad_request(format!("unable to parse label selector {text:?}: {why}"))
}

impl LabelSelector {
    /// Reads the text form: `app=web,tier in (a,b),!canary,weight>3`.
    ///
    /// # Errors
    /// 400 naming the part that cannot be read.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if part.is_empty() {
                if text.trim().is_empty() {
                    continue;
                }
                return Err(unparsable(text, "empty requirement"));
            }
            requirements.push(parse_requirement(text, part)?);
        }
        Ok(Self { requirements })
    }

    /// Whether everything is selected.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// Whether an object's labels satisfy all requirements.
    pub fn matches(&self, object: &Value) -> bool {
        self.requirements.iter().all(|requirement| {
            let value = at(object, &["metadata", "labels"])
                .and_then(|labels| labels.get(&requirement.key))
                .and_then(Value::as_str);
            match (&requirement.test, value) {
                (LabelTest::In(values), Some(value)) => values.iter().any(|v| v == value),
                (LabelTest::NotIn(values), Some(value)) => values.iter().all(|v| v != value),
                (LabelTest::Exists, value) => value.is_some(),
                (LabelTest::Absent, value) => value.is_none(),
                (LabelTest::Above(bound), Some(value)) => value.parse().is_ok_and(|v: i64| v > *bound),
                (LabelTest::Below(bound), Some(value)) => value.parse().is_ok_and(|v: i64| v < *bound),
                (LabelTest::NotIn(_), None) => true,
                (_, None) => false,
            }
        })
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0_u32);
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn parse_requirement(text: &str, part: &str) -> Result<LabelRequirement, ApiError> {
    let requirement = |key: &str, test| {
        let key = key.trim();
        if let Some(problem) = label_key_problem(key) {
            return Err(unparsable(text, format_args!("key {key:?}: {problem}")));
        }
        Ok(LabelRequirement { key: key.to_owned(), test })
    };
    let checked = |value: &str| {
        let value = value.trim();
        match label_value_problem(value) {
            Some(problem) => Err(unparsable(text, format_args!("value {value:?}: {problem}"))),
            None => Ok(value.to_owned()),
        }
    };
    if let Some(open) = part.find('(') {
        let values =
            part[open + 1..].trim_end().strip_suffix(')').ok_or_else(|| unparsable(text, "missing ')'"))?;
        let values = values.split(',').map(checked).collect::<Result<Vec<_>, _>>()?;
        let words: Vec<&str> = part[..open].split_whitespace().collect();
        return match words[..] {
            [key, "in"] => requirement(key, LabelTest::In(values)),
            [key, "notin"] => requirement(key, LabelTest::NotIn(values)),
            _ => Err(unparsable(text, format_args!("{part:?} is neither \"in\" nor \"notin\""))),
        };
    }
    if let Some((key, value)) = part.split_once("!=") {
        return requirement(key, LabelTest::NotIn(vec![checked(value)?]));
    }
    if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return requirement(key, LabelTest::In(vec![checked(value)?]));
    }
    for (sign, test) in [('>', LabelTest::Above as fn(i64) -> LabelTest), ('<', LabelTest::Below)] {
        if let Some((key, value)) = part.split_once(sign) {
            let bound = value
                .trim()
                .parse()
                .map_err(|_| unparsable(text, format_args!("{:?} is not an integer", value.trim())))?;
            return requirement(key, test(bound));
        }
    }
    match part.strip_prefix('!') {
        Some(key) => requirement(key, LabelTest::Absent),
        None => requirement(part, LabelTest::Exists),
    }
}

/// A parsed `fieldSelector`: all terms must hold. The default selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<FieldTerm>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct FieldTerm {
    field: String,
    value: String,
    equal: bool,
}

impl FieldSelector {
    /// Reads the text form, `spec.nodeName=a,status.phase!=Running`, for one kind.
    ///
    /// # Errors
    /// 400 for text that cannot be read and for fields that the kind does not select by.
    pub fn parse(text: &str, kind: &KindInfo) -> Result<Self, ApiError> {
        let mut terms = Vec::new();
        for part in split_terms(text).into_iter().filter(|part| !part.is_empty()) {
            let (field, value, equal) = if let Some((field, value)) = part.split_once("!=") {
                (field, value, false)
            } else if let Some((field, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (field, value, true)
            } else {
                return Err(ApiError::bad_request(format!(
                    "invalid field selector: {part:?} has no \"=\", \"==\" or \"!=\""
                )));
            };
            let field = field.trim();
            if !matches!(field, "metadata.name" | "metadata.namespace")
                && !kind.selectable_fields.iter().any(|known| known == field)
            {
                return Err(ApiError::bad_request(format!(
                    "\"{field}\" is not a known field selector of {}: only \"metadata.name\", \"metadata.namespace\"{}",
                    kind.plural,
                    kind.selectable_fields.iter().map(|known| format!(", \"{known}\"")).collect::<String>()
                )));
            }
            terms.push(FieldTerm { field: field.to_owned(), value: unescape(value), equal });
        }
        Ok(Self { terms })
    }

    /// Whether everything is selected.
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// The one name that can match, if the selector fixes it.
    pub fn name(&self) -> Option<&str> {
        self.terms
            .iter()
            .find(|term| term.equal && term.field == "metadata.name")
            .map(|term| term.value.as_str())
    }

    /// Whether an object satisfies all terms.
    pub fn matches(&self, object: &Value) -> bool {
        self.terms.iter().all(|term| field_equals(object, &term.field, &term.value) == term.equal)
    }
}

/// Splits at commas that no backslash protects.
fn split_terms(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut escaped) = (Vec::new(), 0, false);
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b',' => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn unescape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        out.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    out
}

/// A number or boolean as it is written in a selector.
fn scalar_text(value: &Value) -> String {
    value.to_string()
}

fn field_equals(object: &Value, field: &str, wanted: &str) -> bool {
    // Two names that do not mirror their place in the object.
    match field {
        "source" => {
            let component = get_str(object, &["source", "component"]);
            let component =
                if component.is_empty() { get_str(object, &["reportingComponent"]) } else { component };
            return component == wanted;
        }
        "status.successful" => {
            let count = at(object, &["status", "succeeded"]).and_then(Value::as_i64).unwrap_or(0);
            return wanted.parse() == Ok(count);
        }
        _ => {}
    }
    let found = field.split('.').try_fold(object, |value, key| value.get(key));
    match found {
        None | Some(Value::Null) => match field {
            "spec.unschedulable" | "spec.hostNetwork" => wanted == "false",
            "status.replicas" => wanted == "0",
            _ => wanted.is_empty(),
        },
        Some(Value::String(text)) => text == wanted,
        Some(other) => scalar_text(other) == wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn label_selectors_select() {
        let object =
            json!({"metadata": {"labels": {"app": "web", "weight": "5", "example.com/tier": "front"}}});
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web", true),
            ("app = web , weight=5", true),
            ("app!=web", false),
            ("missing!=x", true),
            ("app in (api, web)", true),
            ("app in (api)", false),
            ("app notin (api)", true),
            ("missing notin (a,b)", true),
            ("app", true),
            ("!app", false),
            ("!missing", true),
            ("example.com/tier=front,app in (web,x),weight>4", true),
            ("weight<5", false),
            ("weight>4,weight<6", true),
            ("app=", false),
        ] {
            let selector = LabelSelector::parse(text).unwrap();
            assert_eq!(selector.matches(&object), expected, "{text}");
        }
    }

    #[test]
    fn unreadable_label_selectors_are_refused() {
        for text in ["app in (a", "app foo (a)", "a=b,", "a b", "-x=1", "a=b c", "x>y", "(a)", "a=-b"] {
            let error = LabelSelector::parse(text).unwrap_err();
            assert_eq!(error.code, 400, "{text}");
            assert!(error.message.contains("unable to parse label selector"), "{text}: {error}");
        }
    }

    #[test]
    fn field_selectors_select() {
        let mut kind = KindInfo::new("", "v1", "Pod", "pods", true);
        kind.selectable_fields =
            ["spec.nodeName", "status.phase", "spec.hostNetwork"].map(str::to_owned).to_vec();
        let pod = json!({
            "metadata": {"name": "a", "namespace": "x"}, "spec": {"nodeName": "n1"}, "status": {"phase": "Running"}
        });
        for (text, expected) in [
            ("", true),
            ("metadata.name=a", true),
            ("metadata.name=b", false),
            ("metadata.namespace==x,spec.nodeName=n1", true),
            ("status.phase!=Running", false),
            ("spec.hostNetwork=false", true),
            ("spec.nodeName=", false),
        ] {
            assert_eq!(FieldSelector::parse(text, &kind).unwrap().matches(&pod), expected, "{text}");
        }
        assert_eq!(FieldSelector::parse("metadata.name=a", &kind).unwrap().name(), Some("a"));
        let error = FieldSelector::parse("spec.color=red", &kind).unwrap_err();
        assert!(error.message.starts_with("\"spec.color\" is not a known field selector of pods"), "{error}");
        assert_eq!(FieldSelector::parse("metadata.name", &kind).unwrap_err().code, 400);
    }
}
