//! Pieces of cells: ages, selectors, lists.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::json::{at, get_array, get_str, parse_time};

pub(super) const NONE: &str = "<none>";
pub(super) const UNSET: &str = "<unset>";
pub(super) const UNKNOWN: &str = "<unknown>";

/// Time since an object was created.
pub(super) fn age(object: &Value, now: Timestamp) -> Value {
    json!(since(get_str(object, &["metadata", "creationTimestamp"]), now))
}

/// Time since an instant in RFC 3339.
pub(super) fn since(text: &str, now: Timestamp) -> String {
    parse_time(text).map_or_else(|| UNKNOWN.to_owned(), |then| duration(now.duration_since(then).as_secs()))
}

/// Seconds in the two largest units that matter, as Kubernetes prints durations.
pub(super) fn duration(seconds: i64) -> String {
    let two = |large: i64, large_unit: char, small: i64, small_unit: char| match small {
        0 => format!("{large}{large_unit}"),
        _ => format!("{large}{large_unit}{small}{small_unit}"),
    };
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        ..=-2 => "<invalid>".to_owned(),
        -1 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        _ if minutes < 10 => two(minutes, 'm', seconds % 60, 's'),
        _ if hours < 3 => format!("{minutes}m"),
        _ if hours < 8 => two(hours, 'h', minutes % 60, 'm'),
        _ if hours < 48 => format!("{hours}h"),
        _ if days < 8 => two(days, 'd', hours % 24, 'h'),
        _ if days < 2 * 365 => format!("{days}d"),
        _ if days < 8 * 365 => two(days / 365, 'y', days % 365, 'd'),
        _ => format!("{}y", days / 365),
    }
}

/// A whole number at a path, 0 where there is none.
pub(super) fn count(object: &Value, path: &[&str]) -> Value {
    json!(at(object, path).and_then(Value::as_i64).unwrap_or(0))
}

/// Text at a path, or a placeholder.
pub(super) fn text_or(object: &Value, path: &[&str], otherwise: &str) -> Value {
    match get_str(object, path) {
        "" => json!(otherwise),
        text => json!(text),
    }
}

/// A scalar of any type as text, or a placeholder.
pub(super) fn scalar_or(value: Option<&Value>, otherwise: &str) -> String {
    match value {
        None | Some(Value::Null) => otherwise.to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// A map of labels in its text form, sorted.
pub(super) fn labels_text(labels: Option<&Value>) -> String {
    match labels.and_then(Value::as_object).map(pairs) {
        Some(pairs) if !pairs.is_empty() => pairs.join(","),
        _ => NONE.to_owned(),
    }
}

fn pairs(labels: &Map<String, Value>) -> Vec<String> {
    let mut pairs: Vec<String> =
        labels.iter().map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect();
    pairs.sort();
    pairs
}

/// A label selector (`matchLabels`, `matchExpressions`) or a plain map of labels in its text form; "" selects all.
pub(crate) fn label_selector_text(selector: &Value) -> String {
    let Some(fields) = selector.as_object() else { return String::new() };
    if !fields.is_empty() && !fields.contains_key("matchLabels") && !fields.contains_key("matchExpressions") {
        return pairs(fields).join(",");
    }
    let mut terms = selector["matchLabels"].as_object().map(pairs).unwrap_or_default();
    for expression in get_array(selector, &["matchExpressions"]) {
        let key = get_str(expression, &["key"]);
        let mut values: Vec<&str> =
            get_array(expression, &["values"]).iter().filter_map(Value::as_str).collect();
        values.sort_unstable();
        let values = values.join(",");
        terms.push(match get_str(expression, &["operator"]) {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    terms.join(",")
}

/// As [`label_selector_text`], with a placeholder for the selector of everything.
pub(super) fn selector_cell(selector: Option<&Value>) -> Value {
    match selector.map(label_selector_text) {
        Some(text) if !text.is_empty() => json!(text),
        _ => json!(NONE),
    }
}

/// The first items of a list, and how many more there are.
pub(super) fn first_few(items: &[String], most: usize, otherwise: &str) -> String {
    let shown = items.iter().take(most).cloned().collect::<Vec<_>>().join(",");
    match items.len() {
        0 => otherwise.to_owned(),
        len if len > most => format!("{shown} + {} more...", len - most),
        _ => shown,
    }
}

/// Text fields of a list's items, joined.
pub(super) fn joined(items: &[Value], field: &str) -> Value {
    json!(items.iter().map(|item| get_str(item, &[field])).collect::<Vec<_>>().join(","))
}

/// Addresses of a load balancer's status.
pub(super) fn load_balancer_addresses(object: &Value) -> Vec<String> {
    get_array(object, &["status", "loadBalancer", "ingress"])
        .iter()
        .filter_map(|entry| match (get_str(entry, &["ip"]), get_str(entry, &["hostname"])) {
            ("", "") => None,
            ("", name) => Some(name.to_owned()),
            (ip, _) => Some(ip.to_owned()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_at_most_two_units() {
        for (seconds, text) in [
            (-5, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (599, "9m59s"),
            (600, "10m"),
            (3 * 3600 - 1, "179m"),
            (3 * 3600, "3h"),
            (3 * 3600 + 60, "3h1m"),
            (8 * 3600 + 60, "8h"),
            (47 * 3600, "47h"),
            (48 * 3600, "2d"),
            (49 * 3600, "2d1h"),
            (8 * 86_400 + 3600, "8d"),
            (729 * 86_400, "729d"),
            (731 * 86_400, "2y1d"),
            (8 * 365 * 86_400 + 86_400, "8y"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn selectors_read_as_kubectl_prints_them() {
        for (selector, text) in [
            (json!({}), ""),
            (json!({"app": "web", "a": "b"}), "a=b,app=web"),
            (json!({"matchLabels": {"app": "web"}}), "app=web"),
            (
                json!({"matchLabels": {"app": "web"}, "matchExpressions": [
                    {"key": "tier", "operator": "In", "values": ["b", "a"]}, {"key": "x", "operator": "Exists"},
                    {"key": "y", "operator": "DoesNotExist"}, {"key": "z", "operator": "NotIn", "values": ["q"]}]}),
                "app=web,tier in (a,b),x,!y,z notin (q)",
            ),
        ] {
            assert_eq!(label_selector_text(&selector), text);
        }
    }
}
