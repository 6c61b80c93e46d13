//! `/openapi/v2` and `/openapi/v3`: the published schema in the form that the client reads.

use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};

use super::route::Route;
use super::{ResponseBody, discovery, json_response, respond_with};
use crate::error::ApiError;
use crate::kinds::GroupResource;
use crate::openapi::{CustomSchemas, Source};
use crate::store::Store;

/// Media type of OpenAPI v2 in protobuf; clients ask for it with an `@` that is no token of a media type.
const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

pub(super) fn answer(
    store: &Store,
    route: &Route,
    headers: &HeaderMap,
) -> Result<Response<ResponseBody>, ApiError> {
    let definitions = GroupResource::new("apiextensions.k8s.io", "customresourcedefinitions");
    let definitions = store.snapshot(&[definitions]).objects;
    let custom = CustomSchemas::of(definitions.iter().map(AsRef::as_ref));
    let kinds = discovery::all_kinds(store);
    let source = Source { kinds: &kinds, custom: &custom };
    let accepted = accepted(headers);
    match route {
        Route::OpenApiV2 if accepted == Some(Form::Protobuf) => Ok(respond_with(
            StatusCode::OK,
            V2_PROTOBUF,
            Full::new(source.v2_protobuf().into()).boxed_unsync(),
        )),
        _ if accepted != Some(Form::Json) => Err(ApiError::not_acceptable(
            "only the following media types are accepted: application/json, and for /openapi/v2 \
             application/com.github.proto-openapi.spec.v2@v1.0+protobuf",
        )),
        Route::OpenApiV2 => Ok(json_response(StatusCode::OK, &source.v2())),
        Route::OpenApiV3Index => Ok(json_response(StatusCode::OK, &source.v3_index())),
        Route::OpenApiV3 { group, version } => {
            let document = source.v3(group, version).ok_or_else(ApiError::no_such_resource)?;
            Ok(json_response(StatusCode::OK, &document))
        }
        _ => Err(ApiError::no_such_resource()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Json,
    Protobuf,
}

/// The first form in `Accept` that is spoken here.
fn accepted(headers: &HeaderMap) -> Option<Form> {
    let mut ranges = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|range| range.split(';').next().unwrap_or_default().trim())
        .peekable();
    if ranges.peek().is_none() {
        return Some(Form::Json);
    }
    ranges.find_map(|range| match range {
        "application/json" | "application/*" | "*/*" => Some(Form::Json),
        other if other.replace('@', ".") == V2_PROTOBUF => Some(Form::Protobuf),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_form_that_is_spoken_here_is_taken() {
        for (accept, expected) in [
            (None, Some(Form::Json)),
            (Some("*/*"), Some(Form::Json)),
            (Some("application/com.github.proto-openapi.spec.v2@v1.0+protobuf"), Some(Form::Protobuf)),
            (Some("text/html, application/json;q=0.5"), Some(Form::Json)),
            (Some("application/com.github.proto-openapi.spec.v3@v1.0+protobuf"), None),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(header::ACCEPT, accept.parse().unwrap());
            }
            assert_eq!(accepted(&headers), expected, "{accept:?}");
        }
    }
}
