//! Request bodies: read within a limit, parsed as JSON.

use std::error::Error;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body;
use serde_json::Value;

use super::protobuf;
use crate::error::ApiError;

/// Largest request body in bytes, as a real API server has it.
const BODY_LIMIT: usize = 3 * 1024 * 1024;
/// Most that is read of a body beyond the limit, in bytes, to be thrown away.
const DRAIN_LIMIT: u64 = 64 * 1024 * 1024;
/// Longest time for that.
const DRAIN_TIME: Duration = Duration::from_secs(5);

pub(super) async fn read<B>(mut body: B) -> Result<Bytes, ApiError>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    match Limited::new(&mut body, BODY_LIMIT).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            drain(&mut body).await;
            Err(ApiError::too_large(BODY_LIMIT))
        }
        Err(error) => Err(ApiError::bad_request(format!("the request body ended early: {error}"))),
    }
}

/// Reads on after a refusal: a client that is still writing would see its connection break instead of the answer.
async fn drain<B: Body<Data = Bytes> + Unpin>(body: &mut B) {
    let mut left = DRAIN_LIMIT;
    if body.size_hint().lower() > left {
        return;
    }
    let rest = async {
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            match u64::try_from(length).ok().and_then(|length| left.checked_sub(length)) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    };
    // Whether all of it came makes no difference for the answer.
    let _ = tokio::time::timeout(DRAIN_TIME, rest).await;
}

/// The media type without its parameters.
pub(super) fn content_type(headers: &HeaderMap) -> &str {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim()
}

pub(super) fn parse(bytes: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::bad_request(format!("the body of the request is not JSON: {error}")))
}

/// A body that holds one object, as JSON or as what is understood of Kubernetes' protobuf.
pub(super) fn object(headers: &HeaderMap, bytes: &[u8]) -> Result<Value, ApiError> {
    match content_type(headers) {
        "" | "application/json" => parse(bytes),
        "application/vnd.kubernetes.protobuf" => protobuf::decode(bytes),
        other => Err(ApiError::unsupported_media_type(format!(
            "the body of the request was in an unknown format ({other:?}) - accepted media types include: \
             application/json"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use hyper::body::Frame;

    use super::*;

    const CHUNK: usize = 1024 * 1024;

    /// So many chunks of a mebibyte, without saying so beforehand.
    struct Chunks(usize);

    impl Body for Chunks {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            let Some(left) = self.0.checked_sub(1) else { return Poll::Ready(None) };
            self.0 = left;
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b' '; CHUNK])))))
        }
    }

    #[tokio::test]
    async fn what_is_too_large_is_read_to_its_end_within_bounds() {
        assert_eq!(read(Chunks(3)).await.map(|b| b.len()).ok(), Some(3 * CHUNK));
        // How many are left of how many.
        for (chunks, left) in [(4, 0), (30, 0), (100, 31)] {
            let mut body = Chunks(chunks);
            let refused = read(&mut body).await.expect_err("too large");
            assert_eq!(refused.to_status()["code"], 413);
            assert_eq!(body.0, left, "of {chunks}");
        }
    }
}
