//! The part of JSONPath that `additionalPrinterColumns` use: `.a.b`, `['a.b']`, `[0]`, `[*]` and
//! `[?(@.type=="Ready")]`.

use serde_json::Value;

/// A parsed path. One that cannot be parsed finds nothing.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct JsonPath(Option<Vec<Step>>);

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Key(String),
    Index(i64),
    All,
    Where { path: Vec<String>, equals: Option<String> },
}

impl JsonPath {
    pub(super) fn parse(text: &str) -> Self {
        Self(steps(text))
    }

    /// All values that the path leads to; null counts as absent.
    pub(super) fn find<'a>(&self, root: &'a Value) -> Vec<&'a Value> {
        let Some(steps) = &self.0 else { return Vec::new() };
        let mut here = vec![root];
        for step in steps {
            here = here.into_iter().flat_map(|value| step.follow(value)).collect();
        }
        here.retain(|value| !value.is_null());
        here
    }
}

impl Step {
    fn follow<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        match self {
            Self::Key(key) => value.get(key).into_iter().collect(),
            Self::Index(index) => {
                let Some(items) = value.as_array() else { return Vec::new() };
                let len = i64::try_from(items.len()).unwrap_or(i64::MAX);
                let index = if *index < 0 { len.saturating_add(*index) } else { *index };
                usize::try_from(index).ok().and_then(|index| items.get(index)).into_iter().collect()
            }
            Self::All => match value {
                Value::Array(items) => items.iter().collect(),
                Value::Object(fields) => fields.values().collect(),
                _ => Vec::new(),
            },
            Self::Where { path, equals } => {
                let Some(items) = value.as_array() else { return Vec::new() };
                let holds = |item: &&Value| {
                    let found = path.iter().try_fold(*item, |value, key| value.get(key));
                    match (found, equals) {
                        (None, _) => false,
                        (Some(_), None) => true,
                        (Some(found), Some(wanted)) => super::format::scalar_or(Some(found), "") == *wanted,
                    }
                };
                items.iter().filter(holds).collect()
            }
        }
    }
}

fn steps(text: &str) -> Option<Vec<Step>> {
    let mut rest = text.trim();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner.strip_suffix('}')?;
    }
    rest = rest.strip_prefix('$').unwrap_or(rest);
    let mut steps = Vec::new();
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('[') {
            let (step, after) = bracket(after)?;
            steps.push(step);
            rest = after;
        } else {
            let after = rest.strip_prefix('.').unwrap_or(rest);
            let (key, after) = bare_key(after)?;
            if key == "*" {
                steps.push(Step::All);
            } else if !key.is_empty() {
                steps.push(Step::Key(key));
            }
            rest = after;
        }
    }
    Some(steps)
}

/// A key up to the next `.` or `[`; a backslash takes the next character as it is.
fn bare_key(text: &str) -> Option<(String, &str)> {
    let mut key = String::new();
    let mut chars = text.char_indices();
    while let Some((index, c)) = chars.next() {
        match c {
            '.' | '[' => return Some((key, &text[index..])),
            '\\' => key.push(chars.next()?.1),
            c => key.push(c),
        }
    }
    Some((key, ""))
}

fn bracket(text: &str) -> Option<(Step, &str)> {
    if let Some(filter) = text.strip_prefix("?(") {
        let end = filter.find(")]")?;
        return Some((condition(&filter[..end])?, &filter[end + 2..]));
    }
    for quote in ['\'', '"'] {
        if let Some(quoted) = text.strip_prefix(quote) {
            let end =
                quoted.find(&[quote, ']'] as &[char]).filter(|end| quoted[*end..].starts_with(quote))?;
            let after = quoted[end + 1..].strip_prefix(']')?;
            return Some((Step::Key(quoted[..end].replace('\\', "")), after));
        }
    }
    let (inside, after) = text.split_once(']')?;
    let step = if inside.trim() == "*" { Step::All } else { Step::Index(inside.trim().parse().ok()?) };
    Some((step, after))
}

fn condition(text: &str) -> Option<Step> {
    let (path, equals) = match text.split_once("==") {
        Some((path, value)) => {
            let value = value.trim();
            let unquoted = value.strip_prefix(['"', '\'']).and_then(|value| value.strip_suffix(['"', '\'']));
            (path, Some(unquoted.unwrap_or(value).to_owned()))
        }
        None => (text, None),
    };
    let path = path.trim().strip_prefix('@')?;
    Some(Step::Where {
        path: path.split('.').filter(|key| !key.is_empty()).map(str::to_owned).collect(),
        equals,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_find_their_values() {
        let value = json!({
            "a": {"b.c": 1, "list": [{"type": "x", "v": 1}, {"type": "y", "v": 2, "on": true}]}, "n": null
        });
        for (path, expected) in [
            (".a.list[0].v", vec![json!(1)]),
            ("{.a.list[-1].v}", vec![json!(2)]),
            ("$.a.list[*].v", vec![json!(1), json!(2)]),
            (".a['b.c']", vec![json!(1)]),
            (".a.b\\.c", vec![json!(1)]),
            (".a.list[?(@.type==\"y\")].v", vec![json!(2)]),
            (".a.list[?(@.type=='y')].v", vec![json!(2)]),
            (".a.list[?(@.on==true)].v", vec![json!(2)]),
            (".a.list[?(@.on)].v", vec![json!(2)]),
            (".a.list[9]", vec![]),
            (".n", vec![]),
            (".a[", vec![]),
            (".a['x", vec![]),
            (".a[?(x==1)]", vec![]),
        ] {
            let found: Vec<Value> = JsonPath::parse(path).find(&value).into_iter().cloned().collect();
            assert_eq!(found, expected, "{path}");
        }
    }
}
