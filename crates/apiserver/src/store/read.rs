//! Lists: pages, selectors, and the state as it was at an earlier resource version.

use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use base64::{DecodeError, Engine};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use super::options::{List, ListOptions, VersionMatch};
use super::state::{Collection, ObjectName, State};
use crate::error::ApiError;
use crate::kinds::GroupResource;

/// What a continue token says; clients must not look inside.
#[derive(Serialize, Deserialize)]
struct Continue {
    rv: u64,
    namespace: String,
    name: String,
}

impl Continue {
    fn encode(&self) -> String {
        let text = serde_json::to_vec(self).expect("numbers and strings always serialize");
        URL_SAFE_NO_PAD.encode(text)
    }

    fn decode(token: &str) -> Result<Self, ApiError> {
        let bad = |why: String| {
            ApiError::bad_request(format!("invalid continue token: continue key is not valid: {why}"))
        };
        let bytes = URL_SAFE_NO_PAD.decode(token.trim_end_matches('=')).map_err(|error| match error {
            DecodeError::InvalidByte(offset, _) => bad(format!("illegal base64 data at input byte {offset}")),
            other => bad(other.to_string()),
        })?;
        serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))
    }
}

impl State {
    pub(super) fn list(
        &self,
        resource: &GroupResource,
        namespace: Option<&str>,
        options: &ListOptions,
    ) -> Result<List, ApiError> {
        let collection = self.known(resource)?;
        let resumed = options.continue_token.as_deref().map(Continue::decode).transpose()?;
        if let Some(asked) = options.version.filter(|asked| *asked > self.revision()) {
            return Err(ApiError::version_too_large(asked, self.revision()));
        }
        let exact =
            options.version.filter(|asked| *asked > 0 && options.version_match == VersionMatch::Exact);
        let revision = resumed.as_ref().map(|token| token.rv).or(exact).unwrap_or(self.revision());
        let past = collection.rewound_to(revision)?;
        let objects = past.as_ref().unwrap_or(&collection.objects);

        let start = match (&resumed, namespace) {
            (Some(token), _) => Bound::Excluded((token.namespace.clone(), token.name.clone())),
            (None, Some(namespace)) => Bound::Included((namespace.to_owned(), String::new())),
            (None, None) => Bound::Unbounded,
        };
        let selects_all = options.labels.is_empty() && options.fields.is_empty();
        let mut list = List { revision, ..List::default() };
        let mut selected = objects
            .range((start, Bound::Unbounded))
            .take_while(|((inside, _), _)| namespace.is_none_or(|namespace| namespace == inside))
            .filter(|(_, object)| options.labels.matches(object) && options.fields.matches(object));
        let mut last: Option<&ObjectName> = None;
        while options.limit == 0 || list.items.len() < options.limit {
            let Some((name, object)) = selected.next() else { return Ok(list) };
            list.items.push(Arc::clone(object));
            last = Some(name);
        }
        let left = selected.count();
        if let (Some((namespace, name)), true) = (last, left > 0) {
            let token = Continue { rv: revision, namespace: namespace.clone(), name: name.clone() };
            list.continue_token = Some(token.encode());
            list.remaining = selects_all.then_some(left);
        }
        Ok(list)
    }
}

impl Collection {
    /// The objects as they were at an earlier revision; `None` if that is how they are now.
    fn rewound_to(&self, revision: u64) -> Result<Option<BTreeMap<ObjectName, Arc<Value>>>, ApiError> {
        let changes: Vec<_> = self
            .changes_after(revision)
            .map_err(|_| {
                ApiError::expired(
                    "The provided continue parameter is too old to display a consistent list result. You must start a \
                     new list without the continue parameter.",
                )
            })?
            .collect();
        if changes.is_empty() {
            return Ok(None);
        }
        let mut objects = self.objects.clone();
        for change in changes.into_iter().rev() {
            let object = &change.object;
            let name = (crate::json::namespace(object).to_owned(), crate::json::name(object).to_owned());
            match &change.previous {
                Some(previous) => objects.insert(name, Arc::clone(previous)),
                None => objects.remove(&name),
            };
        }
        Ok(Some(objects))
    }
}
