//! The body of a watch: lines of JSON, made only when the connection can take them.

use bytes::Bytes;
use futures_util::stream;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde_json::json;
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::Instant;

use super::view::Presenter;
use super::{ResponseBody, respond_with};
use crate::error::ApiError;
use crate::store::{WatchEvent, Watcher};

/// Time between bookmarks of a quiet watch.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
/// How long a watch lasts if the client does not say; clients resume where they were.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(45 * 60);
/// Longest watch.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

struct Feed {
    watcher: Watcher,
    presenter: Presenter,
    bookmarks: bool,
    next_bookmark: Instant,
    end: Instant,
    over: bool,
}

impl Feed {
    async fn next(&mut self) -> Option<Bytes> {
        if self.over {
            return None;
        }
        loop {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(self.end) => return None,
                events = self.watcher.next() => return match events? {
                    Ok(events) => Some(self.lines(&events)),
                    Err(error) => {
                        self.over = true;
                        Some(error_line(&error))
                    }
                },
                () = tokio::time::sleep_until(self.next_bookmark), if self.bookmarks => {
                    self.next_bookmark = Instant::now() + BOOKMARK_INTERVAL;
                    if let Some(revision) = self.watcher.position() {
                        let bookmark = WatchEvent::Bookmark { revision, initial_events_end: false };
                        return Some(self.presenter.event(&bookmark).into());
                    }
                }
            }
        }
    }

    fn lines(&mut self, events: &[WatchEvent]) -> Bytes {
        let mut out = Vec::new();
        for event in events {
            if matches!(event, WatchEvent::Bookmark { .. }) && !self.bookmarks {
                continue;
            }
            out.extend(self.presenter.event(event));
        }
        out.into()
    }
}

fn error_line(error: &ApiError) -> Bytes {
    let mut line = json!({"type": "ERROR", "object": error.to_status()}).to_string();
    line.push('\n');
    line.into()
}

pub(super) fn response(
    watcher: Watcher,
    presenter: Presenter,
    bookmarks: bool,
    timeout: Option<Duration>,
) -> Response<ResponseBody> {
    let now = Instant::now();
    let feed = Feed {
        watcher,
        presenter,
        bookmarks,
        next_bookmark: now + BOOKMARK_INTERVAL,
        end: now + timeout.unwrap_or(DEFAULT_TIMEOUT).min(MAX_TIMEOUT),
        over: false,
    };
    let lines = stream::unfold(feed, |mut feed| async move {
        let bytes = feed.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(bytes)), feed))
    });
    respond_with(StatusCode::OK, "application/json", StreamBody::new(lines).boxed_unsync())
}

/// A watch that fails before it starts: its first and last event says why.
pub(super) fn failed(error: &ApiError) -> Response<ResponseBody> {
    let line = http_body_util::Full::new(error_line(error));
    respond_with(StatusCode::OK, "application/json", line.boxed_unsync())
}
