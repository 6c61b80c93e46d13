//! Access reviews (`kubectl auth can-i`): this server knows no rights, so the answer is always yes.

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::json;

use super::{ResponseBody, body, json_response};
use crate::error::ApiError;

pub(super) async fn answer(request: Request<Incoming>) -> Result<Response<ResponseBody>, ApiError> {
    if *request.method() != Method::POST {
        return Err(ApiError::method_not_allowed());
    }
    let (parts, incoming) = request.into_parts();
    let mut review = body::object(&parts.headers, &body::read(incoming).await?)?;
    let status = match review["kind"].as_str().unwrap_or_default() {
        "SelfSubjectAccessReview" => json!({
            "allowed": true,
            "reason": "this API server of a lab has no RBAC: whoever has its token may do everything",
        }),
        "SelfSubjectRulesReview" => json!({
            "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
            "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}], "incomplete": false,
        }),
        other => {
            return Err(ApiError::bad_request(format!(
                "the kind in the data ({other}) is neither SelfSubjectAccessReview nor SelfSubjectRulesReview"
            )));
        }
    };
    review["status"] = status;
    Ok(json_response(StatusCode::CREATED, &review))
}
