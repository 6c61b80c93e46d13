//! The server on the wire, against the recorded answers of a real kube-apiserver.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{Server, recorded};
use podway_apiserver::{BearerToken, DeleteOptions, ResourceKey, StoreConfig, WriteOptions};
use serde_json::{Value, json};
use std::io::Write;
use std::net::TcpStream;

const JSON: (&str, &str) = ("Content-Type", "application/json");
const MERGE: (&str, &str) = ("Content-Type", "application/merge-patch+json");
const TABLE: (&str, &str) = ("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json");
const METADATA: (&str, &str) =
    ("Accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json");
const SERVICES: &str = "/api/v1/namespaces/default/services";
const PODS: &str = "/api/v1/namespaces/default/pods";

fn server() -> Server {
    Server::start(StoreConfig::default(), None)
}

fn service(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}})
}

fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [{"name": "c"}]}})
}

/// Body and HTTP status of a recorded refusal.
fn refusal(name: &str) -> Option<(Value, u16)> {
    let text = recorded(&format!("errors/{name}.json"))?;
    let (body, status) = text.trim_end().rsplit_once('\n').unwrap();
    let status: Value = serde_json::from_str(status).unwrap();
    let status = u16::try_from(status["http_status"].as_u64().unwrap()).unwrap();
    Some((serde_json::from_str(body).unwrap(), status))
}

#[test]
fn refusals_are_those_of_a_real_server() {
    let server = server();
    server.post(SERVICES, &service("web"));
    let mut stale = service("web");
    stale["metadata"]["resourceVersion"] = json!("1");
    let future = server.get("/api/v1/pods?resourceVersion=99999999");
    let current = server.store.revision().to_string();
    for (name, found) in [
        ("404-get", server.get(&format!("{SERVICES}/nope"))),
        ("409-exists", server.post(SERVICES, &service("web"))),
        ("409-conflict", server.call("PUT", &format!("{SERVICES}/web"), &[JSON], &stale.to_string())),
        ("504-too-large-resourceversion", future),
    ] {
        let Some((mut body, status)) = refusal(name) else { return };
        if let Some(message) = body["message"].as_str().filter(|message| message.contains("current: 836")) {
            body["message"] = json!(message.replace("current: 836", &format!("current: {current}")));
        }
        assert_eq!(found, (status, body), "{name}");
    }
    let Some((body, _)) = refusal("422-invalid") else { return };
    let (status, found) = server.post(SERVICES, &service("Bad_Name"));
    assert_eq!((status, &found["reason"]), (422, &body["reason"]));
    assert_eq!(found["details"]["causes"][0], body["details"]["causes"][0]);
    let message = found["message"].as_str().unwrap();
    assert!(
        message.starts_with("Service \"Bad_Name\" is invalid: metadata.name: Invalid value"),
        "{message}"
    );
    let Some((body, status)) = refusal("400-bad-continue") else { return };
    let found = server.get("/api/v1/services?limit=2&continue=dead%21");
    assert_eq!(found, (status, body));
}

#[test]
fn only_those_with_the_token_come_in() {
    let token = BearerToken::new("s3cret-1");
    let server = Server::start(StoreConfig::default(), Some(token.clone()));
    let bearer = |text: &str| server.call("GET", "/api/v1/pods", &[("Authorization", text)], "").0;
    assert_eq!(bearer("Bearer s3cret-1"), 200);
    for wrong in ["Bearer s3cret-2", "Bearer", "Bearer ", "Basic s3cret-1", "s3cret-1", "Bearer s3cret-12"] {
        assert_eq!(bearer(wrong), 401, "{wrong}");
    }
    let refused = server.get("/api/v1/pods");
    assert_eq!(refused.0, 401);
    if let Some((body, _)) = refusal("401-bad-token") {
        assert_eq!(refused.1, body);
    }
    assert_eq!(server.get("/no/such/path").0, 401, "strangers learn nothing");
    let prefix = token.path_prefix();
    assert_eq!(server.get(&format!("{prefix}/api/v1/pods")).0, 200);
    assert_eq!(server.get(&format!("{prefix}/api")).1["kind"], "APIVersions");
    for wrong in ["/token/x/api/v1/pods", "/token/api/v1/pods", "/token/", "/token"] {
        assert_eq!(server.get(wrong).0, 401, "{wrong}");
    }
    for public in ["/healthz", "/readyz", "/livez", "/version"] {
        assert_eq!(server.get(public).0, 200, "{public}");
    }
    assert!(!format!("{token:?}").contains("s3cret"));
}

#[test]
fn discovery_says_what_a_real_server_says() {
    let server = server();
    let Some(text) = recorded("discovery/apis-aggregated.json") else { return };
    let aggregated: Value = serde_json::from_str(&text).unwrap();
    let core: Value = serde_json::from_str(&recorded("discovery/api-v1.json").unwrap()).unwrap();
    let mut real: Vec<(String, Value)> = Vec::new();
    for resource in core["resources"].as_array().unwrap() {
        real.push(("v1".to_owned(), resource.clone()));
    }
    for group in aggregated["items"].as_array().unwrap() {
        for version in group["versions"].as_array().unwrap() {
            let group_version = format!(
                "{}/{}",
                group["metadata"]["name"].as_str().unwrap(),
                version["version"].as_str().unwrap()
            );
            for resource in version["resources"].as_array().unwrap() {
                let mut entry = json!({
                    "name": resource["resource"], "singularName": resource["singularResource"],
                    "namespaced": resource["scope"] == "Namespaced", "kind": resource["responseKind"]["kind"],
                    "verbs": resource["verbs"],
                });
                for list in ["shortNames", "categories"] {
                    if let Some(names) = resource.get(list) {
                        entry[list] = names.clone();
                    }
                }
                real.push((group_version.clone(), entry));
            }
        }
    }
    let groups = server.get("/apis").1;
    let mut paths = vec![("v1".to_owned(), "/api/v1".to_owned())];
    for group in groups["groups"].as_array().unwrap() {
        for version in group["versions"].as_array().unwrap() {
            let version = version["groupVersion"].as_str().unwrap();
            paths.push((version.to_owned(), format!("/apis/{version}")));
        }
        let name = group["name"].as_str().unwrap();
        assert_eq!(server.get(&format!("/apis/{name}")).1["preferredVersion"], group["preferredVersion"]);
    }
    let mut compared = 0;
    for (group_version, path) in paths {
        let list = server.get(&path).1;
        assert_eq!(list["groupVersion"], group_version);
        for resource in list["resources"].as_array().unwrap() {
            let name = resource["name"].as_str().unwrap();
            if name.contains('/') && group_version != "v1" {
                continue;
            }
            let (_, expected) = real
                .iter()
                .find(|(version, entry)| *version == group_version && entry["name"] == name)
                .unwrap_or_else(|| panic!("{group_version} {name} is not in a real server"));
            let mut expected = expected.clone();
            expected.as_object_mut().unwrap().remove("storageVersionHash");
            assert_eq!(*resource, expected, "{group_version} {name}");
            compared += 1;
        }
    }
    assert!(compared > 50, "{compared}");
    assert_eq!(server.get("/apis/nope/v1").0, 404);
    assert_eq!(server.get("/apis/apps/v2").0, 404);
    assert_eq!(server.get("/metrics").1["reason"], "NotFound");
    assert_eq!(server.get("/").1["paths"][0], "/api");
}

#[test]
fn lists_have_the_recorded_shape() {
    let server = server();
    let Some(text) = recorded("lists/services.page1.json") else { return };
    let page: Value = serde_json::from_str(&text).unwrap();
    for index in 0..5 {
        server.post(SERVICES, &service(&format!("s-{index}")));
    }
    let keys = |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    let (_, found) = server.get("/api/v1/services?limit=2");
    assert_eq!(keys(&found), keys(&page));
    assert_eq!(keys(&found["metadata"]), keys(&page["metadata"]));
    assert_eq!((&found["kind"], &found["apiVersion"]), (&page["kind"], &page["apiVersion"]));
    assert_eq!(found["metadata"]["remainingItemCount"], 3);
    let item = &found["items"][0];
    assert_eq!((item.get("kind"), item.get("apiVersion")), (None, None), "items of lists carry no type");
    assert_eq!(item["metadata"]["name"], "s-0");
    let token = found["metadata"]["continue"].as_str().unwrap();
    let (_, rest) = server.get(&format!("/api/v1/services?limit=500&continue={token}"));
    assert_eq!(rest["items"].as_array().unwrap().len(), 3);
    assert_eq!(keys(&rest["metadata"]), ["resourceVersion"]);

    let recorded_list: Value =
        serde_json::from_str(&recorded("lists/pods.metadata-only.json").unwrap()).unwrap();
    let (_, found) = server.call("GET", SERVICES, &[METADATA], "");
    assert_eq!(keys(&found), keys(&recorded_list));
    assert_eq!(keys(&found["items"][0]), keys(&recorded_list["items"][0]));
    assert_eq!(found["kind"], recorded_list["kind"]);
}

/// Brings a recorded object into the store as it was, but for what every server sets itself.
fn restore(server: &Server, kind: &str, mut object: Value) {
    object["kind"] = json!(kind);
    object["apiVersion"] = json!("v1");
    let metadata = object["metadata"].as_object_mut().unwrap();
    let terminating = metadata.contains_key("deletionTimestamp");
    for foreign in ["resourceVersion", "uid", "ownerReferences"] {
        metadata.remove(foreign);
    }
    let status = object.clone();
    let key = server.store.key_of(&object).unwrap();
    if server.store.get(&key).is_err() {
        server.store.create(object, WriteOptions::default()).unwrap();
    }
    server.store.update_status(status).unwrap();
    if terminating {
        server.store.delete(&key, &DeleteOptions::default()).unwrap();
    }
}

#[test]
fn tables_print_recorded_objects_as_a_real_server_did() {
    for (resource, kind) in [("pods", "Pod"), ("services", "Service")] {
        let server = server();
        let Some(text) = recorded(&format!("lists/{resource}.json")) else { return };
        let list: Value = serde_json::from_str(&text).unwrap();
        for object in list["items"].as_array().unwrap() {
            restore(&server, kind, object.clone());
        }
        let table: Value =
            serde_json::from_str(&recorded(&format!("lists/{resource}.table.json")).unwrap()).unwrap();
        let (status, found) = server.call("GET", &format!("/api/v1/{resource}"), &[TABLE], "");
        assert_eq!(
            (status, &found["kind"], &found["apiVersion"]),
            (200, &table["kind"], &table["apiVersion"])
        );
        let columns = |table: &Value| -> Vec<Value> {
            let definitions = table["columnDefinitions"].as_array().unwrap();
            let bare = definitions
                .iter()
                .map(|column| json!([column["name"], column["type"], column["format"], column["priority"]]));
            bare.collect()
        };
        assert_eq!(columns(&found), columns(&table));
        let age = columns(&table).iter().position(|column| column[0] == "Age").unwrap();
        let rows = |table: &Value| -> Vec<Value> {
            let rows = table["rows"].as_array().unwrap().iter().map(|row| {
                let mut cells = row["cells"].clone();
                cells[age] = json!("age");
                cells
            });
            rows.collect()
        };
        assert_eq!(rows(&found), rows(&table), "{resource}");
        assert_eq!(found["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    }
}

#[test]
fn bookmarks_have_the_recorded_shape() {
    let server = server();
    for (file, path) in [
        ("pods", "/api/v1/pods"),
        ("services", "/api/v1/services"),
        ("namespaces", "/api/v1/namespaces"),
        ("nodes", "/api/v1/nodes"),
        ("endpointslices", "/apis/discovery.k8s.io/v1/endpointslices"),
        ("ingresses", "/apis/networking.k8s.io/v1/ingresses"),
        ("networkpolicies", "/apis/networking.k8s.io/v1/networkpolicies"),
    ] {
        let Some(text) = recorded(&format!("watch/{file}.jsonl")) else { return };
        let mut expected: Value = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .find(|event: &Value| {
                event["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"] == "true"
            })
            .unwrap();
        expected["object"]["metadata"]["resourceVersion"] = json!(server.store.revision().to_string());
        let query =
            "watch=true&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
        let found = server
            .watch(&format!("{path}?{query}&resourceVersion=0&timeoutSeconds=5"), &[])
            .find(|event| event["type"] == "BOOKMARK");
        assert_eq!(found, Some(expected), "{file}");
    }
}

#[test]
fn a_watch_streams_changes_and_ends_in_time() {
    let server = server();
    server.post(PODS, &pod("first"));
    let (_, list) = server.get(PODS);
    let version = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let path = format!("{PODS}?watch=1&resourceVersion={version}&timeoutSeconds=2");
    let mut events = server.watch(&path, &[]);
    server.post(PODS, &pod("second"));
    let patch = json!({"metadata": {"labels": {"a": "b"}}}).to_string();
    assert_eq!(server.call("PATCH", &format!("{PODS}/first"), &[MERGE], &patch).0, 200);
    server.call("DELETE", &format!("{PODS}/second"), &[], "");
    for (type_, name) in [("ADDED", "second"), ("MODIFIED", "first"), ("DELETED", "second")] {
        let event = events.next().unwrap();
        assert_eq!((&event["type"], &event["object"]["metadata"]["name"]), (&json!(type_), &json!(name)));
        assert_eq!((&event["object"]["kind"], &event["object"]["apiVersion"]), (&json!("Pod"), &json!("v1")));
    }
    assert_eq!(events.next(), None, "the stream ends after timeoutSeconds");

    let mut tables = server.watch(&format!("{PODS}?watch=1&timeoutSeconds=2"), &[TABLE]);
    let first = tables.next().unwrap();
    assert_eq!(first["object"]["columnDefinitions"].as_array().unwrap().len(), 9);
    server.post(PODS, &pod("third"));
    let second = tables.next().unwrap();
    assert_eq!(
        (&second["object"]["columnDefinitions"], &second["object"]["rows"][0]["cells"][0]),
        (&Value::Null, &json!("third"))
    );
}

#[test]
fn an_expired_watch_says_410_in_the_stream() {
    let server = Server::start(StoreConfig { watch_window: 10, ..StoreConfig::default() }, None);
    for index in 0..12 {
        server.post(PODS, &pod(&format!("p-{index}")));
    }
    let mut events = server.watch(&format!("{PODS}?watch=1&resourceVersion=1"), &[]);
    let event = events.next().unwrap();
    assert_eq!((&event["type"], &event["object"]["code"]), (&json!("ERROR"), &json!(410)));
    assert_eq!(event["object"]["reason"], "Expired");
    assert_eq!(events.next(), None);
    for (query, field) in [
        ("sendInitialEvents=true", "resourceVersionMatch"),
        ("resourceVersionMatch=NotOlderThan", "resourceVersionMatch"),
        ("sendInitialEvents=true&resourceVersionMatch=NotOlderThan", "allowWatchBookmarks"),
    ] {
        let (status, body) = server.get(&format!("{PODS}?watch=1&{query}"));
        assert_eq!((status, &body["details"]["causes"][0]["field"]), (422, &json!(field)), "{query}");
    }
}

#[test]
fn a_client_that_stops_reading_holds_up_nobody() {
    let server = Server::start(StoreConfig { watch_window: 100, ..StoreConfig::default() }, None);
    let mut stuck = TcpStream::connect(server.address).unwrap();
    write!(stuck, "GET {PODS}?watch=1 HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    let padding = "x".repeat(100_000);
    let started = std::time::Instant::now();
    for index in 0..300 {
        let mut object = pod(&format!("p-{index}"));
        object["metadata"]["annotations"] = json!({"padding": padding});
        server.store.create(object, WriteOptions::default()).unwrap();
    }
    assert!(started.elapsed() < std::time::Duration::from_secs(5));
    // When it reads again it is told that it missed something.
    stuck.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let mut text: Vec<u8> = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    let mut searched = 0;
    while !text[searched..].windows(9).any(|window| window == b"\"Expired\"") {
        searched = text.len().saturating_sub(8);
        let read = std::io::Read::read(&mut stuck, &mut buffer).unwrap();
        assert!(read > 0, "the stream ended without a word");
        text.extend(&buffer[..read]);
    }
    assert!(text.len() < 25_000_000);
}

#[test]
fn verbs_and_subresources() {
    let server = server();
    let (status, created) = server.post(PODS, &pod("a"));
    assert_eq!((status, &created["kind"]), (201, &json!("Pod")));
    let status_path = format!("{PODS}/a/status");
    let phase = json!({"status": {"phase": "Running"}, "spec": {"nodeName": "x"}}).to_string();
    let (_, patched) = server.call("PATCH", &status_path, &[MERGE], &phase);
    assert_eq!((&patched["status"]["phase"], patched["spec"].get("nodeName")), (&json!("Running"), None));
    assert_eq!(server.get(&status_path).1["status"]["phase"], "Running");

    let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "d"}}}});
    let deployments = "/apis/apps/v1/namespaces/default/deployments";
    server.post(deployments, &deployment);
    let (_, scale) = server.get(&format!("{deployments}/d/scale"));
    assert_eq!((&scale["kind"], &scale["spec"]["replicas"]), (&json!("Scale"), &json!(2)));
    assert_eq!(scale["status"]["selector"], "app=d");
    let mut wanted = scale.clone();
    wanted["spec"]["replicas"] = json!(5);
    let (status, _) = server.call("PUT", &format!("{deployments}/d/scale"), &[JSON], &wanted.to_string());
    assert_eq!(status, 200);
    let (status, _) = server.call("PUT", &format!("{deployments}/d/scale"), &[JSON], &wanted.to_string());
    assert_eq!(status, 409, "the Scale's version is stale now");
    let negative = json!({"spec": {"replicas": -1}}).to_string();
    assert_eq!(server.call("PATCH", &format!("{deployments}/d/scale"), &[MERGE], &negative).0, 422);
    assert_eq!(server.get(&format!("{deployments}/d")).1["spec"]["replicas"], 5);

    for (method, path, body, code) in [
        ("GET", "/api/v1/namespaces/default/nopes".to_owned(), "", 404),
        ("GET", format!("{PODS}/a/nope"), "", 404),
        ("GET", "/apis/apps/v1/namespaces/default/deployments/d/status/x".to_owned(), "", 404),
        ("GET", "/api/v1/pods/a".to_owned(), "", 404),
        ("GET", "/api/v1/namespaces/default/nodes".to_owned(), "", 404),
        ("GET", format!("{PODS}/a/log"), "", 501),
        ("POST", format!("{PODS}/a/exec?command=ls"), "", 501),
        ("POST", "/api/v1/pods".to_owned(), "{}", 405),
        ("POST", format!("{PODS}/a"), "{}", 405),
        ("DELETE", "/api/v1/namespaces".to_owned(), "", 405),
        ("DELETE", "/version".to_owned(), "", 405),
        ("POST", PODS.to_owned(), "{", 400),
        ("POST", PODS.to_owned(), "[]", 400),
        ("POST", PODS.to_owned(), r#"{"kind": "Service"}"#, 400),
        ("POST", PODS.to_owned(), r#"{"apiVersion": "v2"}"#, 400),
        ("PUT", format!("{PODS}/a"), r#"{"metadata": {"name": "b"}}"#, 400),
        ("DELETE", format!("{PODS}/a"), r#"{"propagationPolicy": "Sideways"}"#, 400),
        ("DELETE", format!("{PODS}/a"), r#"{"gracePeriodSeconds": -1}"#, 400),
        ("GET", format!("{PODS}?labelSelector=a%20b"), "", 400),
        ("GET", format!("{PODS}?fieldSelector=spec.color%3Dred"), "", 400),
        ("GET", format!("{PODS}?limit=few"), "", 400),
        ("GET", "/api/v1/%ff".to_owned(), "", 400),
        ("POST", format!("{PODS}?dryRun=Some"), "{}", 400),
    ] {
        let (status, answer) = server.call(method, &path, &[JSON], body);
        assert_eq!(status, code, "{method} {path}: {answer}");
        assert_eq!((&answer["kind"], &answer["code"]), (&json!("Status"), &json!(code)), "{method} {path}");
    }
    for (content_type, code) in [("text/yaml", 415), ("application/vnd.kubernetes.protobuf", 400)] {
        assert_eq!(server.call("POST", PODS, &[("Content-Type", content_type)], "{}").0, code);
    }
    assert_eq!(server.call("PATCH", &format!("{PODS}/a"), &[JSON], "{}").0, 415);
    assert_eq!(server.call("GET", PODS, &[("Accept", "application/yaml")], "").0, 406);
    let huge = " ".repeat(3 * 1024 * 1024 + 1);
    assert_eq!(server.call("POST", PODS, &[JSON], &huge).0, 413);

    let (status, deleted) = server.call("DELETE", &format!("{deployments}/d"), &[], "");
    assert_eq!(
        (status, &deleted["status"], &deleted["details"]["group"]),
        (200, &json!("Success"), &json!("apps"))
    );
    let (_, deleted) = server.call("DELETE", &format!("{PODS}/a"), &[], "");
    assert_eq!((&deleted["kind"], &deleted["metadata"]["name"]), (&json!("Pod"), &json!("a")));
}

#[test]
fn events_are_one_kind_in_two_groups() {
    let server = server();
    let path = "/apis/events.k8s.io/v1/namespaces/default/events";
    let event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"},
        "regarding": {"kind": "Node", "name": "n1"}, "note": "small path", "reason": "PathMTUNarrow", "type": "Warning",
        "reportingController": "podway", "eventTime": "2026-01-01T00:00:00.000000Z"});
    let (status, created) = server.post(path, &event);
    assert_eq!(
        (status, &created["apiVersion"], &created["note"]),
        (201, &event["apiVersion"], &event["note"])
    );
    let (_, core) =
        server.get("/api/v1/events?fieldSelector=involvedObject.kind%3DNode,involvedObject.name%3Dn1");
    assert_eq!((&core["items"][0]["message"], &core["items"][0]["source"]), (&event["note"], &Value::Null));
    let patch = json!({"note": "smaller path", "series": {"count": 2}}).to_string();
    let (status, patched) = server.call("PATCH", &format!("{path}/e"), &[MERGE], &patch);
    assert_eq!((status, &patched["note"]), (200, &json!("smaller path")));
    let (_, listed) = server.get(&format!("{path}?fieldSelector=regarding.name%3Dn1"));
    assert_eq!(
        (&listed["apiVersion"], &listed["items"][0]["note"]),
        (&event["apiVersion"], &json!("smaller path"))
    );
    let (_, table) = server.call("GET", "/api/v1/events", &[TABLE], "");
    let cells = &table["rows"][0]["cells"];
    assert_eq!(
        (&cells[1], &cells[3], &cells[6], &cells[8]),
        (&json!("Warning"), &json!("node/n1"), &json!("smaller path"), &json!(2))
    );
}

#[test]
fn custom_kinds_are_served_in_all_their_versions() {
    let server = server();
    let version = |name: &str, storage: bool| {
        json!({"name": name, "served": true, "storage": storage, "subresources": {"status": {}},
            "additionalPrinterColumns": [{"name": "Size", "type": "integer", "jsonPath": ".spec.size"}]})
    };
    let definition = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Cluster", "names": {"plural": "widgets", "kind": "Widget"},
            "versions": [version("v1beta1", false), version("v1", true)]}});
    let (status, created) =
        server.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &definition);
    assert_eq!((status, &created["status"]["storedVersions"]), (201, &json!(["v1"])));
    let widget = json!({"apiVersion": "example.com/v1beta1", "kind": "Widget", "metadata": {"name": "w"},
        "spec": {"size": 3}});
    let (status, created) = server.post("/apis/example.com/v1beta1/widgets", &widget);
    assert_eq!((status, &created["apiVersion"]), (201, &widget["apiVersion"]));
    let (_, list) = server.get("/apis/example.com/v1/widgets");
    assert_eq!(
        (&list["kind"], &list["items"][0]["apiVersion"]),
        (&json!("WidgetList"), &json!("example.com/v1"))
    );
    let (_, table) = server.call("GET", "/apis/example.com/v1/widgets", &[TABLE], "");
    assert_eq!(table["rows"][0]["cells"], json!(["w", 3]));
    let strategic = ("Content-Type", "application/strategic-merge-patch+json");
    assert_eq!(server.call("PATCH", "/apis/example.com/v1/widgets/w", &[strategic], "{}").0, 415);
    let key =
        ResourceKey::new("apiextensions.k8s.io", "customresourcedefinitions", "", "widgets.example.com");
    server.store.delete(&key, &DeleteOptions::default()).unwrap();
    assert_eq!(server.get("/apis/example.com/v1/widgets").0, 404);
    assert_eq!(server.get("/apis/example.com").0, 404);
}

#[test]
fn the_schema_is_served_in_the_forms_that_clients_ask_for() {
    let server = Server::start(StoreConfig::default(), None);
    let (status, v2) = server.get("/openapi/v2");
    assert_eq!(status, 200);
    let pod = &v2["definitions"]["io.k8s.api.core.v1.Pod"];
    assert_eq!(
        pod["x-kubernetes-group-version-kind"],
        json!([{"group": "", "version": "v1", "kind": "Pod"}])
    );
    for (path, accept, expected) in [
        ("/openapi/v2", "text/html", 406),
        ("/openapi/v3", "application/json", 200),
        ("/openapi/v3/apis/apps/v1", "application/json", 200),
        ("/openapi/v3/apis/apps/v1", "application/com.github.proto-openapi.spec.v3@v1.0+protobuf", 406),
        ("/openapi/v3/apis/apps/v9", "application/json", 404),
    ] {
        let (status, body) = server.call("GET", path, &[("Accept", accept)], "");
        assert_eq!(status, expected, "{path} as {accept}: {body}");
    }
    assert_eq!(server.post("/openapi/v2", &json!({})).0, 405);
    let (_, index) = server.get("/openapi/v3");
    assert_eq!(index["paths"]["apis/apps/v1"]["serverRelativeURL"], "/openapi/v3/apis/apps/v1");
    // A custom kind appears with its definition.
    let definition = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "widgets", "kind": "Widget"}, "versions": [{"name": "v1", "served": true,
                "storage": true, "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                    "spec": {"type": "object"}}}}}]}});
    assert_eq!(server.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &definition).0, 201);
    let (_, document) = server.get("/openapi/v3/apis/example.com/v1");
    let widget = &document["components"]["schemas"]["com.example.v1.Widget"];
    assert_eq!(widget["properties"]["spec"], json!({"type": "object"}));
}

#[test]
fn what_is_not_done_here_says_so_in_a_status() {
    let server = Server::start(StoreConfig::default(), None);
    let pod = "/api/v1/namespaces/default/pods/p";
    for (method, path, code, words) in [
        ("POST", format!("{pod}/eviction"), 501, "does not evict"),
        ("POST", format!("{pod}/binding"), 501, "spec.nodeName"),
        ("GET", format!("{pod}/log"), 501, "podway lab logs"),
        ("POST", format!("{pod}/exec"), 501, "podway lab exec"),
        ("GET", format!("{pod}/proxy/x"), 501, "connects to no pod"),
        ("PATCH", format!("{pod}/ephemeralcontainers"), 501, "create it anew"),
        ("POST", "/api/v1/namespaces/default/serviceaccounts/a/token".to_owned(), 501, "makes no tokens"),
        ("GET", format!("{pod}/nothing"), 404, "could not find"),
        ("GET", "/apis/apps/v1/namespaces/default/deployments/d/log".to_owned(), 404, "could not find"),
        ("GET", "/apis/metrics.k8s.io/v1beta1/nodes".to_owned(), 404, "could not find"),
    ] {
        let (status, body) = server.call(method, &path, &[("Content-Type", "application/json")], "{}");
        assert_eq!(
            (status, &body["kind"], &body["code"]),
            (code, &json!("Status"), &json!(code)),
            "{path}: {body}"
        );
        assert!(body["message"].as_str().unwrap().contains(words), "{path}: {body}");
    }
}

#[test]
fn everybody_may_do_everything() {
    let server = Server::start(StoreConfig::default(), None);
    let base = "/apis/authorization.k8s.io/v1";
    let spec = json!({"resourceAttributes": {"verb": "get", "resource": "pods"}});
    let review = json!({"kind": "SelfSubjectAccessReview", "spec": spec});
    let (status, body) = server.post(&format!("{base}/selfsubjectaccessreviews"), &review);
    assert_eq!((status, &body["status"]["allowed"], &body["spec"]), (201, &json!(true), &spec));
    let (_, body) = server.post(
        &format!("{base}/selfsubjectrulesreviews"),
        &json!({"kind": "SelfSubjectRulesReview", "spec": {}}),
    );
    assert_eq!(body["status"]["resourceRules"][0]["verbs"], json!(["*"]));
    assert_eq!(server.post(&format!("{base}/selfsubjectaccessreviews"), &json!(["x"])).0, 400);
    assert_eq!(server.get(&format!("{base}/selfsubjectaccessreviews")).0, 405);
}

#[test]
fn autoscalers_are_served_in_both_versions() {
    let server = Server::start(StoreConfig::default(), None);
    let [v1, v2] =
        ["v1", "v2"].map(|v| format!("/apis/autoscaling/{v}/namespaces/default/horizontalpodautoscalers"));
    let (_, group) = server.get("/apis/autoscaling");
    assert_eq!(group["preferredVersion"]["version"], "v2");
    assert_eq!(group["versions"].as_array().unwrap().len(), 2);
    let target = json!({"kind": "Deployment", "name": "web", "apiVersion": "apps/v1"});
    let memory = json!({"type": "Resource", "resource": {"name": "memory",
        "target": {"type": "AverageValue", "averageValue": "1Gi"}}});
    let behavior = json!({"scaleDown": {"selectPolicy": "Disabled"}});
    let (status, made) = server.post(
        &v2,
        &json!({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "web"},
        "spec": {"scaleTargetRef": target, "maxReplicas": 3, "metrics": [memory], "behavior": behavior}}),
    );
    assert_eq!(status, 201, "{made}");
    let mut watch = server.watch(&format!("{v1}?watch=true&resourceVersion=0"), &[]);
    assert_eq!(watch.next().unwrap()["object"]["spec"], json!({"scaleTargetRef": target, "maxReplicas": 3}));

    // What is written in the older version shows in the newer one, which keeps what only it can say.
    let spec = |percent: i64| json!({"spec": {"targetCPUUtilizationPercentage": percent}});
    let applied = json!({"apiVersion": "autoscaling/v1", "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "web"}, "spec": {"targetCPUUtilizationPercentage": 40}});
    for (type_, body, percent) in [
        ("application/merge-patch+json", spec(10), 10),
        ("application/strategic-merge-patch+json", spec(20), 20),
        (
            "application/json-patch+json",
            json!([{"op": "replace", "path": "/spec/targetCPUUtilizationPercentage", "value": 30}]),
            30,
        ),
        ("application/apply-patch+yaml", applied, 40),
    ] {
        let path = format!("{v1}/web?fieldManager=test");
        let (status, patched) = server.call("PATCH", &path, &[("Content-Type", type_)], &body.to_string());
        assert_eq!((status, &patched["apiVersion"]), (200, &json!("autoscaling/v1")), "{type_}: {patched}");
        assert_eq!(patched["spec"]["targetCPUUtilizationPercentage"], percent, "{type_}: {patched}");
        let seen = watch.next().unwrap();
        assert_eq!((&seen["type"], &seen["object"]), (&json!("MODIFIED"), &patched), "{type_}");
        let (_, newer) = server.get(&format!("{v2}/web"));
        let metrics = &newer["spec"]["metrics"];
        assert_eq!(metrics[0]["resource"]["target"]["averageUtilization"], percent, "{type_}: {newer}");
        assert_eq!((&metrics[1], &newer["spec"]["behavior"]), (&memory, &behavior), "{type_}: {newer}");
        assert!(newer["spec"].get("targetCPUUtilizationPercentage").is_none(), "{type_}: {newer}");
    }
    let (_, list) = server.get(&v1);
    assert_eq!(list["apiVersion"], "autoscaling/v1");
    assert_eq!(list["items"][0]["spec"]["targetCPUUtilizationPercentage"], 40);
    let mut old = server.get(&format!("{v1}/web")).1;
    old["spec"].as_object_mut().unwrap().remove("targetCPUUtilizationPercentage");
    let (status, put) =
        server.call("PUT", &format!("{v1}/web"), &[("Content-Type", "application/json")], &old.to_string());
    assert_eq!(status, 200, "{put}");
    assert_eq!(server.get(&format!("{v2}/web")).1["spec"]["metrics"], json!([memory]));
    let patch = [("Content-Type", "application/merge-patch+json")];
    let (status, _) = server.call("PATCH", &format!("{v1}/nobody"), &patch, &spec(1).to_string());
    assert_eq!(status, 404);
    let stale = json!({"metadata": {"resourceVersion": "1"}, "spec": {"maxReplicas": 9}});
    let (status, refused) = server.call("PATCH", &format!("{v1}/web"), &patch, &stale.to_string());
    assert_eq!(status, 409, "{refused}");
}
