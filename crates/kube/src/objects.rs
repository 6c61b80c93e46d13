//! Single objects: read, create, replace, patch. As raw JSON, with a time limit on every answer.
//!
//! Who writes decides what a conflict means, so nothing here is tried again.

use std::time::Duration;

use kube::api::{Patch, PatchParams};
use serde_json::Value;

use crate::client::Client;
use crate::error::Error;
use crate::raw::Kind;

/// How long an answer may take.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Objects of one page of [`list_pages`].
const PAGE_SIZE: u32 = 500;
/// Who wrote a field (`managedFields`).
const FIELD_MANAGER: &str = "podway";

/// The part of an object that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Everything but the status.
    Main,
    /// The status subresource.
    Status,
}

/// Reads an object; `None` when it is not there. The namespace of a cluster-scoped kind is empty.
///
/// # Errors
/// The server cannot be reached, refuses, or says nothing in time.
pub async fn read(client: &Client, kind: Kind, namespace: &str, name: &str) -> Result<Option<Value>, Error> {
    let request = request("GET", &path(kind, namespace, Some(name), Part::Main), None);
    match send(client, request, || format!("read {} {namespace}/{name}", kind.plural)).await {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.code() == Some(404) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads all objects of a kind, in all namespaces, at once: for kinds of which there are few.
///
/// # Errors
/// The same, and 404 ([`Error::code`]) when the server does not know the kind.
pub async fn list(client: &Client, kind: Kind) -> Result<Vec<Value>, Error> {
    let request = request("GET", &path(kind, "", None, Part::Main), None);
    let mut list = send(client, request, || format!("list {}", kind.plural)).await?;
    Ok(list.get_mut("items").and_then(Value::as_array_mut).map(std::mem::take).unwrap_or_default())
}

/// Reads all objects of a kind, in all namespaces, page by page.
///
/// # Errors
/// The same as of [`list`], and 410 when the pages take so long that the server has forgotten the list.
pub async fn list_pages(client: &Client, kind: Kind) -> Result<Vec<Value>, Error> {
    let path = path(kind, "", None, Part::Main);
    let mut objects = Vec::new();
    let mut token = String::new();
    loop {
        let mut page = format!("{path}?limit={PAGE_SIZE}");
        if !token.is_empty() {
            page.push_str("&continue=");
            page.push_str(&token);
        }
        let what = || format!("list {}", kind.plural);
        let mut list = send(client, request("GET", &page, None), what).await?;
        if let Some(items) = list.get_mut("items").and_then(Value::as_array_mut) {
            objects.append(items);
        }
        match list.pointer("/metadata/continue").and_then(Value::as_str) {
            // Servers make tokens of base64's characters, some of which mean something in an address.
            Some(next) if !next.is_empty() => {
                token = next.replace('%', "%25").replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
            }
            _ => return Ok(objects),
        }
    }
}

/// Creates an object.
///
/// # Errors
/// The same, and 409 ([`Error::code`]) when it is there already.
pub async fn create(client: &Client, kind: Kind, namespace: &str, object: &Value) -> Result<Value, Error> {
    let request = request("POST", &path(kind, namespace, None, Part::Main), Some(object));
    send(client, request, || format!("create a {} in {namespace}", kind.kind)).await
}

/// Replaces an object. With `metadata.resourceVersion` in it, only the version that was read.
///
/// # Errors
/// The same, and 409 when somebody else has written it since.
pub async fn replace(
    client: &Client,
    kind: Kind,
    namespace: &str,
    name: &str,
    object: &Value,
) -> Result<Value, Error> {
    let request = request("PUT", &path(kind, namespace, Some(name), Part::Main), Some(object));
    send(client, request, || format!("replace {} {namespace}/{name}", kind.plural)).await
}

/// Changes an object by a JSON merge patch (RFC 7386).
///
/// # Errors
/// The same, and 404 when it is not there.
pub async fn merge(
    client: &Client,
    kind: Kind,
    (namespace, name): (&str, &str),
    part: Part,
    patch: &Value,
) -> Result<Value, Error> {
    let what = || format!("change {} {namespace}/{name}", kind.plural);
    let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let request = kube::core::Request::new(path(kind, namespace, None, Part::Main));
    let mut request = request
        .patch(name, &parameters, &Patch::Merge(patch))
        .map_err(|e| Error::Request { what: what(), source: Box::new(kube::Error::BuildRequest(e)) })?;
    if part == Part::Status {
        let uri = request.uri().to_string().replacen('?', "/status?", 1);
        *request.uri_mut() = uri.parse().map_err(|_| Error::Path(uri))?;
    }
    send(client, request, what).await
}

fn path(kind: Kind, namespace: &str, name: Option<&str>, part: Part) -> String {
    let mut path = if kind.group.is_empty() {
        format!("/api/{}", kind.version)
    } else {
        format!("/apis/{}/{}", kind.group, kind.version)
    };
    if !namespace.is_empty() {
        path.push_str("/namespaces/");
        path.push_str(namespace);
    }
    path.push('/');
    path.push_str(kind.plural);
    if let Some(name) = name {
        path.push('/');
        path.push_str(name);
    }
    if part == Part::Status {
        path.push_str("/status");
    }
    path
}

fn request(method: &str, path: &str, body: Option<&Value>) -> http::Request<Vec<u8>> {
    let body = body.map_or_else(Vec::new, |b| b.to_string().into_bytes());
    let mut request = http::Request::new(body);
    *request.method_mut() = method.parse().unwrap_or_default();
    // Names come from the API server, which lets no others than valid ones in; anything else asks for "/".
    *request.uri_mut() = path.parse().unwrap_or_default();
    request
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    request
}

async fn send(
    client: &Client,
    request: http::Request<Vec<u8>>,
    what: impl Fn() -> String,
) -> Result<Value, Error> {
    match tokio::time::timeout(ANSWER_TIMEOUT, client.inner().request::<Value>(request)).await {
        Err(_) => Err(Error::Silent { seconds: ANSWER_TIMEOUT.as_secs() }),
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(Error::Request { what: what(), source: Box::new(source) }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testserver::{Reply, Server};

    #[tokio::test]
    async fn a_long_list_comes_in_pages() {
        let mut server = Server::start(|request| match request.path.as_str() {
            "/api/v1/nodes?limit=500" => Reply::json(
                200,
                &json!({"metadata": {"continue": "a+/b="}, "items": [{"metadata": {"name": "a"}}]}),
            ),
            _ => Reply::json(200, &json!({"metadata": {}, "items": [{"metadata": {"name": "b"}}]})),
        })
        .await;
        let client = server.client().await;
        let names: Vec<Value> = list_pages(&client, Kind::NODE).await.unwrap();
        assert_eq!(
            names.iter().map(|n| n["metadata"]["name"].as_str().unwrap()).collect::<Vec<_>>(),
            ["a", "b"]
        );
        server.next().await;
        assert_eq!(server.next().await.path, "/api/v1/nodes?limit=500&continue=a%2B%2Fb%3D");
    }

    #[tokio::test]
    async fn each_verb_asks_for_the_right_thing() {
        let mut server = Server::start(|request| match request.method.as_str() {
            "GET" if request.path.ends_with("/none") => Reply::status(404, "NotFound"),
            "PUT" => Reply::status(409, "Conflict"),
            _ => Reply::json(200, &json!({"metadata": {"name": "a"}})),
        })
        .await;
        let client = server.client().await;
        let found = read(&client, Kind::LEASE, "kube-system", "a").await.unwrap();
        assert_eq!(found.unwrap()["metadata"]["name"], "a");
        let asked = server.next().await;
        assert_eq!(asked.path, "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/a");
        assert_eq!(read(&client, Kind::NODE, "", "none").await.unwrap(), None);
        assert_eq!(server.next().await.path, "/api/v1/nodes/none");

        create(&client, Kind::LEASE, "x", &json!({"spec": {}})).await.unwrap();
        let asked = server.next().await;
        assert_eq!((asked.method.as_str(), asked.body.as_str()), ("POST", r#"{"spec":{}}"#));
        let refused = replace(&client, Kind::LEASE, "x", "a", &json!({})).await.unwrap_err();
        assert_eq!(refused.code(), Some(409), "{refused}");
        server.next().await;

        for (part, path) in [
            (Part::Main, "/api/v1/namespaces/x/services/a?&fieldManager=podway"),
            (Part::Status, "/api/v1/namespaces/x/services/a/status?&fieldManager=podway"),
        ] {
            merge(&client, Kind::SERVICE, ("x", "a"), part, &json!({"status": 1})).await.unwrap();
            let asked = server.next().await;
            assert_eq!((asked.method.as_str(), asked.path.as_str()), ("PATCH", path));
            assert_eq!(asked.body, r#"{"status":1}"#);
        }
    }
}
