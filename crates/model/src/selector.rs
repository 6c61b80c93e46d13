//! Label selectors (`metav1.LabelSelector`), validated as the API server does.

use std::{collections::BTreeMap, fmt};

use serde_json::Value;

use crate::{
    Rejection,
    read::{Object, type_name},
};

/// `metadata.labels`.
pub type Labels = BTreeMap<String, String>;

/// What a requirement asks of the label.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operator {
    /// Its value is one of these.
    In(Vec<String>),
    /// It is absent, or its value is none of these.
    NotIn(Vec<String>),
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

/// One requirement on one label.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requirement {
    /// The label's key.
    pub key: String,
    /// What is asked of it.
    pub operator: Operator,
}

impl Requirement {
    /// Whether labels meet it.
    pub fn is_met(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            Operator::In(values) => value.is_some_and(|v| values.contains(v)),
            Operator::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        match &self.operator {
            Operator::In(values) if values.len() == 1 => write!(f, "{key}={}", values[0]),
            Operator::In(values) => write!(f, "{key} in ({})", values.join(",")),
            Operator::NotIn(values) if values.len() == 1 => write!(f, "{key}!={}", values[0]),
            Operator::NotIn(values) => write!(f, "{key} notin ({})", values.join(",")),
            Operator::Exists => f.write_str(key),
            Operator::DoesNotExist => write!(f, "!{key}"),
        }
    }
}

/// Requirements that must all be met; none at all selects everything.
///
/// Kept sorted, so that two selectors that say the same in another order are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Selector {
    requirements: Vec<Requirement>,
}

impl Selector {
    /// From requirements.
    pub fn new(mut requirements: Vec<Requirement>) -> Self {
        for requirement in &mut requirements {
            if let Operator::In(values) | Operator::NotIn(values) = &mut requirement.operator {
                values.sort();
                values.dedup();
            }
        }
        requirements.sort();
        requirements.dedup();
        Self { requirements }
    }

    /// Whether it selects what has these labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|r| r.is_met(labels))
    }

    /// Whether it selects everything.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// What it asks for.
    pub fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }

    /// Reads a selector that is at `field` of an object.
    ///
    /// # Errors
    /// What the API server would refuse: unknown operators, `In` without values, `Exists` with some, keys and values
    /// that no label can have.
    pub(crate) fn parse(object: &Object<'_>, field: &str, value: &Value) -> Result<Self, Rejection> {
        let Value::Object(fields) = value else {
            return Err(object.reject(field, &format!("is {}, not a label selector", type_name(value))));
        };
        if let Some(other) = fields.keys().find(|k| !matches!(k.as_str(), "matchLabels" | "matchExpressions"))
        {
            let cause = "is no field of a label selector; there are matchLabels and matchExpressions";
            return Err(object.reject(&format!("{field}.{other}"), cause));
        }
        let mut requirements = Vec::new();
        match fields.get("matchLabels") {
            None | Some(Value::Null) => {}
            Some(Value::Object(labels)) => {
                for (key, value) in labels {
                    let at = format!("{field}.matchLabels[{key}]");
                    check_key(object, &at, key)?;
                    let text = object.text(&at, value)?;
                    check_value(object, &at, text)?;
                    let operator = Operator::In(vec![text.to_owned()]);
                    requirements.push(Requirement { key: key.clone(), operator });
                }
            }
            Some(other) => {
                let at = format!("{field}.matchLabels");
                return Err(object.reject(&at, &format!("is {}, not an object", type_name(other))));
            }
        }
        let at = format!("{field}.matchExpressions");
        for (i, expression) in object.array_value(&at, fields.get("matchExpressions"))?.iter().enumerate() {
            requirements.push(parse_expression(object, &format!("{at}[{i}]"), expression)?);
        }
        Ok(Self::new(requirements))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, requirement) in self.requirements.iter().enumerate() {
            let separator = if i == 0 { "" } else { "," };
            write!(f, "{separator}{requirement}")?;
        }
        Ok(())
    }
}

fn parse_expression(object: &Object<'_>, at: &str, expression: &Value) -> Result<Requirement, Rejection> {
    let at_key = format!("{at}.key");
    let key = match expression.get("key") {
        Some(key) => object.text(&at_key, key)?,
        None => return Err(object.reject(&at_key, "is missing; name the label")),
    };
    check_key(object, &at_key, key)?;
    let at_values = format!("{at}.values");
    let mut values = Vec::new();
    for (i, value) in object.array_value(&at_values, expression.get("values"))?.iter().enumerate() {
        let at = format!("{at_values}[{i}]");
        let text = object.text(&at, value)?;
        check_value(object, &at, text)?;
        values.push(text.to_owned());
    }
    let at_operator = format!("{at}.operator");
    let operator = match expression.get("operator") {
        Some(operator) => object.text(&at_operator, operator)?,
        None => "",
    };
    let operator = match operator {
        "In" | "NotIn" if values.is_empty() => {
            return Err(object.reject(&at_values, &format!("is empty; {operator} needs at least one value")));
        }
        "In" => Operator::In(values),
        "NotIn" => Operator::NotIn(values),
        "Exists" | "DoesNotExist" if !values.is_empty() => {
            return Err(object.reject(&at_values, &format!("may not be given with {operator}")));
        }
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        other => {
            let cause = format!("{other:?} is none of In, NotIn, Exists, DoesNotExist");
            return Err(object.reject(&at_operator, &cause));
        }
    };
    Ok(Requirement { key: key.to_owned(), operator })
}

/// `metadata.labels`; a label that is no string is refused.
pub(crate) fn labels(object: &Object<'_>, value: &Value) -> Result<Labels, Rejection> {
    let fields = match value.pointer("/metadata/labels") {
        None | Some(Value::Null) => return Ok(Labels::new()),
        Some(Value::Object(fields)) => fields,
        Some(other) => {
            return Err(object.reject("metadata.labels", &format!("is {}, not an object", type_name(other))));
        }
    };
    let label = |(key, value): (&String, &Value)| {
        let text = object.text(&format!("metadata.labels[{key}]"), value)?;
        Ok((key.clone(), text.to_owned()))
    };
    fields.iter().map(label).collect()
}

/// A qualified name: an optional DNS prefix and `/`, then at most 63 letters, digits, `-`, `_` and `.`, the ends being
/// letters or digits.
fn check_key(object: &Object<'_>, field: &str, key: &str) -> Result<(), Rejection> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let dns = |prefix: &str| {
        prefix.len() <= 253
            && prefix.split('.').all(|part| {
                let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
                !part.is_empty() && part.bytes().all(inner) && !part.starts_with('-') && !part.ends_with('-')
            })
    };
    if is_name(name) && !name.is_empty() && prefix.is_none_or(dns) {
        return Ok(());
    }
    Err(object.reject(field, &format!("{key:?} cannot be the key of a label")))
}

fn check_value(object: &Object<'_>, field: &str, value: &str) -> Result<(), Rejection> {
    if is_name(value) {
        return Ok(());
    }
    let cause = format!(
        "{value:?} cannot be the value of a label (at most 63 letters, digits, '-', '_' and '.', the ends letters or \
         digits)"
    );
    Err(object.reject(field, &cause))
}

fn is_name(text: &str) -> bool {
    let end = |b: Option<u8>| b.is_none_or(|b| b.is_ascii_alphanumeric());
    text.len() <= 63
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && end(text.bytes().next())
        && end(text.bytes().last())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(selector: &Value) -> Result<Selector, Rejection> {
        let holder = json!({"metadata": {"name": "p", "namespace": "n"}});
        Selector::parse(&Object::new("NetworkPolicy", &holder), "spec.podSelector", selector)
    }

    #[test]
    fn requirements_are_judged_as_the_api_says() {
        let labels: Labels =
            [("app", "web"), ("tier", "front")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        for (selector, text, expected) in [
            (json!({}), "", true),
            (json!({"matchLabels": null, "matchExpressions": null}), "", true),
            (json!({"matchLabels": {"app": "web"}}), "app=web", true),
            (json!({"matchLabels": {"tier": "front", "app": "db"}}), "app=db,tier=front", false),
            (
                json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web", "db"]}]}),
                "app in (db,web)",
                true,
            ),
            (json!({"matchExpressions": [{"key": "x", "operator": "NotIn", "values": ["y"]}]}), "x!=y", true),
            (json!({"matchExpressions": [{"key": "x", "operator": "Exists"}]}), "x", false),
            (json!({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}), "!app", false),
        ] {
            let parsed = parse(&selector).unwrap();
            assert_eq!(
                (parsed.matches(&labels), parsed.to_string().as_str()),
                (expected, text),
                "{selector}"
            );
        }
    }

    #[test]
    fn what_the_api_refuses_is_refused_by_field() {
        for (selector, field) in [
            (json!([]), ""),
            (json!({"app": "web"}), ".app"),
            (json!({"matchLabels": {"app": 5}}), ".matchLabels[app]"),
            (json!({"matchLabels": {"": "x"}}), ".matchLabels[]"),
            (json!({"matchLabels": {"A/b": "x"}}), ".matchLabels[A/b]"),
            (json!({"matchLabels": {"app": "-x"}}), ".matchLabels[app]"),
            (json!({"matchExpressions": [{"operator": "Exists"}]}), ".matchExpressions[0].key"),
            (
                json!({"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}),
                ".matchExpressions[0].operator",
            ),
            (json!({"matchExpressions": [{"key": "a", "operator": "In"}]}), ".matchExpressions[0].values"),
            (
                json!({"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["1"]}]}),
                ".matchExpressions[0].values",
            ),
        ] {
            let rejection = parse(&selector).unwrap_err();
            assert_eq!(rejection.field, format!("spec.podSelector{field}"), "{selector}");
            assert!(rejection.to_string().starts_with("NetworkPolicy n/p: "), "{rejection}");
        }
    }
}
