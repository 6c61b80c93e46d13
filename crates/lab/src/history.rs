//! What happened in a lab: its events, in the order of time.

use serde::Serialize;
use serde_json::Value;

use crate::client::Client;

/// One event, in either form that the API has (core/v1 and events.k8s.io/v1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Happened {
    /// When it happened last, RFC 3339.
    pub at: String,
    /// `Normal` or `Warning`.
    #[serde(rename = "type")]
    pub type_: String,
    /// Why, in one word.
    pub reason: String,
    /// Kind of the object that it is about.
    pub kind: String,
    /// Namespace of that object; empty for objects that have none.
    pub namespace: String,
    /// Name of that object.
    pub name: String,
    /// How often it happened.
    pub count: u64,
    /// What happened.
    pub message: String,
    /// Who says so.
    pub source: String,
}

impl Happened {
    /// `Pod shop/web-1`, `Node node-1`.
    #[must_use]
    pub fn about(&self) -> String {
        if self.namespace.is_empty() {
            format!("{} {}", self.kind, self.name)
        } else {
            format!("{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// Which events are asked for.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// About objects in this namespace.
    pub namespace: Option<String>,
    /// About objects of this kind and name, in any case of letters.
    pub about: Option<(String, String)>,
    /// Warnings alone.
    pub warnings: bool,
}

impl Wanted {
    fn takes(&self, event: &Happened) -> bool {
        self.namespace.as_ref().is_none_or(|n| *n == event.namespace)
            && self.about.as_ref().is_none_or(|(kind, name)| {
                kind.eq_ignore_ascii_case(&event.kind) && name.eq_ignore_ascii_case(&event.name)
            })
            && (!self.warnings || event.type_ == "Warning")
    }
}

/// Reads the events, oldest first.
///
/// # Errors
/// When the API server cannot be reached.
pub async fn events(client: &mut Client, wanted: &Wanted) -> anyhow::Result<Vec<Happened>> {
    Ok(select(&client.read("/api/v1/events").await?, wanted))
}

fn select(list: &Value, wanted: &Wanted) -> Vec<Happened> {
    let mut out: Vec<Happened> = list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(event)
        .filter(|event| wanted.takes(event))
        .collect();
    // Times of this form sort as text; what has the same second keeps the order of the list.
    out.sort_by(|a, b| a.at.get(..19).cmp(&b.at.get(..19)));
    out
}

fn event(object: &Value) -> Happened {
    let first = |paths: &[&str]| {
        let texts = paths.iter().filter_map(|p| object.pointer(p)?.as_str().filter(|t| !t.is_empty()));
        texts.map(str::to_owned).next().unwrap_or_default()
    };
    let about = |field: &str| first(&[&format!("/involvedObject/{field}"), &format!("/regarding/{field}")]);
    let count =
        ["/series/count", "/count", "/deprecatedCount"].iter().find_map(|p| object.pointer(p)?.as_u64());
    Happened {
        at: first(&[
            "/series/lastObservedTime",
            "/lastTimestamp",
            "/deprecatedLastTimestamp",
            "/eventTime",
            "/metadata/creationTimestamp",
        ]),
        type_: first(&["/type"]),
        reason: first(&["/reason"]),
        kind: about("kind"),
        namespace: about("namespace"),
        name: about("name"),
        count: count.unwrap_or(1),
        message: first(&["/message", "/note"]),
        source: first(&["/reportingComponent", "/reportingController", "/source/component"]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_of_both_forms_come_in_the_order_of_time() {
        let list = json!({"items": [
            {"involvedObject": {"kind": "Pod", "namespace": "shop", "name": "web"}, "reason": "Unhealthy",
             "type": "Warning", "message": "m", "count": 4, "lastTimestamp": "2026-01-01T00:00:02Z",
             "source": {"component": "podway-lab"}},
            {"regarding": {"kind": "Node", "name": "node-1"}, "reason": "Ready", "type": "Normal", "note": "n",
             "eventTime": "2026-01-01T00:00:01.000001Z", "reportingController": "podway"},
        ]});
        let all = select(&list, &Wanted::default());
        assert_eq!(all.iter().map(Happened::about).collect::<Vec<_>>(), ["Node node-1", "Pod shop/web"]);
        assert_eq!((all[0].message.as_str(), all[0].count, all[0].source.as_str()), ("n", 1, "podway"));
        assert_eq!((all[1].message.as_str(), all[1].count, all[1].source.as_str()), ("m", 4, "podway-lab"));
        for (wanted, names) in [
            (Wanted { namespace: Some("shop".into()), ..Wanted::default() }, vec!["web"]),
            (Wanted { about: Some(("node".into(), "node-1".into())), ..Wanted::default() }, vec!["node-1"]),
            (Wanted { warnings: true, ..Wanted::default() }, vec!["web"]),
            (Wanted { about: Some(("pod".into(), "other".into())), ..Wanted::default() }, vec![]),
        ] {
            let found = select(&list, &wanted);
            assert_eq!(found.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), names, "{wanted:?}");
        }
    }
}
