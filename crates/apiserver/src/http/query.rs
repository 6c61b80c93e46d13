//! Query parameters.

use std::collections::HashMap;
use std::time::Duration;

use super::route::Target;
use crate::error::{ApiError, Cause};
use crate::events;
use crate::selector::{FieldSelector, LabelSelector};
use crate::store::{DeleteOptions, ListOptions, Propagation, VersionMatch, WatchOptions, WriteOptions};

/// The parameters of one request; of a repeated one the first counts.
#[derive(Debug)]
pub(super) struct Query(HashMap<String, String>);

impl Query {
    pub(super) fn parse(text: Option<&str>) -> Self {
        let mut parameters = HashMap::new();
        for (key, value) in form_urlencoded::parse(text.unwrap_or_default().as_bytes()) {
            parameters.entry(key.into_owned()).or_insert_with(|| value.into_owned());
        }
        Self(parameters)
    }

    /// A parameter's text; an empty one is absent.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str).filter(|text| !text.is_empty())
    }

    /// A parameter that switches something; present without a value means yes, as in Kubernetes.
    pub(super) fn flag(&self, key: &str) -> bool {
        self.0
            .get(key)
            .is_some_and(|text| !matches!(text.as_str(), "false" | "0" | "f" | "F" | "False" | "FALSE"))
    }

    fn number(&self, key: &str) -> Result<Option<u64>, ApiError> {
        let parse = |text: &str| {
            text.parse()
                .map_err(|_| ApiError::bad_request(format!("invalid {key}: {text:?} is not a whole number")))
        };
        self.text(key).map(parse).transpose()
    }

    fn labels(&self) -> Result<LabelSelector, ApiError> {
        LabelSelector::parse(self.text("labelSelector").unwrap_or_default())
    }

    fn fields(&self, target: &Target) -> Result<FieldSelector, ApiError> {
        let text = self.text("fieldSelector").unwrap_or_default();
        if target.new_events {
            FieldSelector::parse(&events::selector_to_core(text), &target.kind)
        } else {
            FieldSelector::parse(text, &target.kind)
        }
    }

    pub(super) fn list(&self, target: &Target) -> Result<ListOptions, ApiError> {
        let version = self.number("resourceVersion")?;
        let version_match = match self.text("resourceVersionMatch") {
            None | Some("NotOlderThan") => VersionMatch::NotOlderThan,
            Some("Exact") if version.is_some_and(|version| version > 0) => VersionMatch::Exact,
            Some("Exact") => {
                return Err(self.forbidden(
                    target,
                    "resourceVersionMatch",
                    "exact needs a resourceVersion above 0",
                ));
            }
            Some(other) => {
                return Err(self.forbidden(
                    target,
                    "resourceVersionMatch",
                    &format!("{other:?} is neither \"NotOlderThan\" nor \"Exact\""),
                ));
            }
        };
        Ok(ListOptions {
            labels: self.labels()?,
            fields: self.fields(target)?,
            limit: self.number("limit")?.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(0),
            continue_token: self.text("continue").map(str::to_owned),
            version,
            version_match,
        })
    }

    pub(super) fn watch(&self, target: &Target) -> Result<WatchOptions, ApiError> {
        let send_initial_events = self.flag("sendInitialEvents");
        let version_match = self.text("resourceVersionMatch");
        if self.text("sendInitialEvents").is_some() && version_match != Some("NotOlderThan") {
            return Err(self.forbidden(
                target,
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        if self.text("sendInitialEvents").is_none() && version_match.is_some() {
            return Err(self.forbidden(
                target,
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
        if send_initial_events && !self.flag("allowWatchBookmarks") {
            return Err(self.forbidden(
                target,
                "allowWatchBookmarks",
                "sendInitialEvents requires setting allowWatchBookmarks",
            ));
        }
        // The name in the path of an old-style watch of one object.
        let mut fields = self.fields(target)?;
        if let Some(name) = &target.name {
            fields = FieldSelector::parse(&format!("metadata.name={name}"), &target.kind)?;
        }
        Ok(WatchOptions {
            labels: self.labels()?,
            fields,
            from: self.number("resourceVersion")?,
            send_initial_events,
        })
    }

    /// How long a watch may last.
    pub(super) fn timeout(&self) -> Result<Option<Duration>, ApiError> {
        Ok(self.number("timeoutSeconds")?.filter(|seconds| *seconds > 0).map(Duration::from_secs))
    }

    pub(super) fn write(&self) -> Result<WriteOptions, ApiError> {
        Ok(WriteOptions { dry_run: self.dry_run()? })
    }

    fn dry_run(&self) -> Result<bool, ApiError> {
        match self.text("dryRun") {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => {
                Err(ApiError::bad_request(format!("invalid dryRun {other:?}: only \"All\" is supported")))
            }
        }
    }

    pub(super) fn delete(&self) -> Result<DeleteOptions, ApiError> {
        Ok(DeleteOptions {
            grace_period_seconds: self.number("gracePeriodSeconds")?,
            propagation: propagation(self.text("propagationPolicy"))?,
            dry_run: self.dry_run()?,
            ..DeleteOptions::default()
        })
    }

    fn forbidden(&self, target: &Target, field: &str, why: &str) -> ApiError {
        let kind =
            crate::kinds::KindInfo::new("meta.k8s.io", "v1", "ListOptions", &target.kind.plural, false);
        ApiError::invalid(&kind, "", vec![Cause::forbidden(field, why)])
    }
}

pub(super) fn propagation(text: Option<&str>) -> Result<Propagation, ApiError> {
    match text {
        None | Some("Background") => Ok(Propagation::Background),
        Some("Foreground") => Ok(Propagation::Foreground),
        Some("Orphan") => Ok(Propagation::Orphan),
        Some(other) => Err(ApiError::bad_request(format!(
            "invalid propagationPolicy {other:?}: it must be \"Background\", \"Foreground\" or \"Orphan\""
        ))),
    }
}
