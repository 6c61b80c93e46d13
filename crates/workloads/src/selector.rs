//! Label selectors (`metav1.LabelSelector`) and node selectors (`v1.NodeSelector`), parsed once and matched often.

use serde_json::Value;

use crate::read::{self, Labels, Malformed};
use crate::world::Object;

/// One requirement on one key.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement<'a> {
    key: &'a str,
    operator: Operator<'a>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Operator<'a> {
    In(Vec<&'a str>),
    NotIn(Vec<&'a str>),
    Exists,
    DoesNotExist,
    Gt(i64),
    Lt(i64),
}

impl Requirement<'_> {
    fn matches(&self, found: Option<&str>) -> bool {
        let number = || found.and_then(|text| text.parse::<i64>().ok());
        match &self.operator {
            Operator::In(values) => found.is_some_and(|value| values.contains(&value)),
            // As in the API: an absent label is not in any set.
            Operator::NotIn(values) => found.is_none_or(|value| !values.contains(&value)),
            Operator::Exists => found.is_some(),
            Operator::DoesNotExist => found.is_none(),
            Operator::Gt(limit) => number().is_some_and(|value| value > *limit),
            Operator::Lt(limit) => number().is_some_and(|value| value < *limit),
        }
    }
}

/// Every requirement must hold; none at all matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Selector<'a> {
    requirements: Vec<Requirement<'a>>,
}

impl<'a> Selector<'a> {
    /// From a plain map, such as a Service's or a ReplicationController's selector.
    pub(crate) fn from_map(labels: Labels<'a>) -> Self {
        let requirement = |(key, value): (&'a String, &'a Value)| {
            let operator = Operator::In(vec![value.as_str()?]);
            Some(Requirement { key, operator })
        };
        Self { requirements: labels.into_iter().flatten().filter_map(requirement).collect() }
    }

    /// From a LabelSelector at `path`; nothing when absent.
    pub(crate) fn parse(object: &'a Value, path: &str) -> Result<Option<Self>, Malformed> {
        let Some(selector) = read::at(object, path) else { return Ok(None) };
        let parse = || {
            let mut parsed = Self::from_map(read::labels(selector, "matchLabels")?);
            for (i, expression) in read::list(selector, "matchExpressions")?.iter().enumerate() {
                let requirement = requirement(expression, false);
                parsed
                    .requirements
                    .push(requirement.map_err(|e| e.within(&format!("matchExpressions[{i}]")))?);
            }
            Ok(parsed)
        };
        read::map(object, path)?;
        parse().map(Some).map_err(|error: Malformed| error.within(path))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    pub(crate) fn matches(&self, labels: Labels<'_>) -> bool {
        self.requirements.iter().all(|requirement| requirement.matches(read::label(labels, requirement.key)))
    }
}

fn requirement(expression: &Value, for_nodes: bool) -> Result<Requirement<'_>, Malformed> {
    let key =
        read::string(expression, "key")?.ok_or_else(|| Malformed::new("key", "required, but absent"))?;
    let mut values = Vec::new();
    for (i, value) in read::list(expression, "values")?.iter().enumerate() {
        let text =
            value.as_str().ok_or_else(|| Malformed::new(format!("values[{i}]"), "expected a string"))?;
        values.push(text);
    }
    let number = || match values[..] {
        [text] => {
            text.parse().map_err(|_| Malformed::new("values[0]", format!("{text:?} is not an integer")))
        }
        _ => Err(Malformed::new("values", "exactly one integer is needed for Gt and Lt")),
    };
    let operator = match read::string(expression, "operator")?.unwrap_or_default() {
        "In" => Operator::In(values),
        "NotIn" => Operator::NotIn(values),
        "Exists" => Operator::Exists,
        "DoesNotExist" => Operator::DoesNotExist,
        "Gt" if for_nodes => Operator::Gt(number()?),
        "Lt" if for_nodes => Operator::Lt(number()?),
        other => {
            let known = if for_nodes {
                "In, NotIn, Exists, DoesNotExist, Gt, Lt"
            } else {
                "In, NotIn, Exists, DoesNotExist"
            };
            return Err(Malformed::new("operator", format!("{other:?} is not one of {known}")));
        }
    };
    Ok(Requirement { key, operator })
}

/// One `nodeSelectorTerm`: all requirements on labels and on fields (only `metadata.name` exists).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NodeTerm<'a> {
    labels: Vec<Requirement<'a>>,
    name: Vec<Requirement<'a>>,
}

impl<'a> NodeTerm<'a> {
    pub(crate) fn parse(term: &'a Value) -> Result<Self, Malformed> {
        let list = |path: &str| {
            let parse = |(i, expression)| {
                requirement(expression, true).map_err(|e: Malformed| e.within(&format!("{path}[{i}]")))
            };
            read::list(term, path)?.iter().enumerate().map(parse).collect::<Result<Vec<_>, _>>()
        };
        if !term.is_object() {
            return Err(Malformed::new("", "expected an object"));
        }
        let name = list("matchFields")?;
        if let Some(other) = name.iter().find(|requirement| requirement.key != "metadata.name") {
            let cause =
                format!("{:?} is not a field that nodes can be selected by; use metadata.name", other.key);
            return Err(Malformed::new("matchFields", cause));
        }
        Ok(Self { labels: list("matchExpressions")?, name })
    }

    pub(crate) fn matches(&self, node: &Object<'_>) -> bool {
        // A term without requirements selects nothing.
        !(self.labels.is_empty() && self.name.is_empty())
            && self.labels.iter().all(|r| r.matches(read::label(node.labels, r.key)))
            && self.name.iter().all(|r| r.matches(Some(node.name)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn label_selectors() {
        let labels = json!({"app": "web", "tier": "front"});
        let labels = labels.as_object();
        for (selector, expected) in [
            (json!({}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "web", "x": "y"}}), false),
            (
                json!({"matchExpressions": [{"key": "tier", "operator": "In", "values": ["back", "front"]}]}),
                true,
            ),
            (json!({"matchExpressions": [{"key": "x", "operator": "NotIn", "values": ["y"]}]}), true),
            (json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}), false),
            (json!({"matchExpressions": [{"key": "app", "operator": "Exists"}]}), true),
            (json!({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}), false),
        ] {
            let object = json!({"selector": selector});
            assert_eq!(
                Selector::parse(&object, "selector").unwrap().unwrap().matches(labels),
                expected,
                "{object}"
            );
        }
        assert_eq!(Selector::parse(&json!({}), "selector"), Ok(None));
        let wrong = json!({"spec": {"selector": {"matchExpressions": [{"key": "a", "operator": "Gt"}]}}});
        let error = Selector::parse(&wrong, "spec.selector").unwrap_err();
        assert_eq!(error.field, "spec.selector.matchExpressions[0].operator");
        assert!(Selector::parse(&json!({"selector": []}), "selector").is_err());
    }
}
