//! Manifests into a running lab, through its API: namespaces first, then custom kinds, then the rest in order.
//!
//! An object that is there already is replaced, as `kubectl replace` does, so that the same folder can be given
//! again after a change. The other way round, [`delete`] takes the objects of manifests out again.

use std::collections::{BTreeMap, BTreeSet};

use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::client::Client;
use crate::manifest::{Object, Problem};

const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
/// Largest object in bytes of JSON, as the API server has it: the most that a real cluster's storage takes.
const OBJECT_LIMIT: usize = 1_572_864;
/// Requests that may go wrong on the way before a server counts as gone.
const BROKEN_LIMIT: usize = 5;
/// What is said about a Node object.
const OWN_NODES: &str = "the lab makes its own nodes; use --nodes and podway lab node";

/// What came of it.
#[derive(Debug, Default)]
pub struct Applied {
    /// Objects created.
    pub created: usize,
    /// Objects that were there and now look as the manifest says.
    pub replaced: usize,
    /// What was done on the manifests' behalf, for people to read.
    pub notes: Vec<String>,
    /// Objects that the server refused.
    pub problems: Vec<Problem>,
}

/// How a kind is addressed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Resource {
    plural: String,
    namespaced: bool,
}

/// Writes the objects.
///
/// # Errors
/// When the server cannot be reached. An object that is refused or breaks the connection is a problem in the result,
/// and the rest goes on.
pub async fn apply(client: &mut Client, objects: &[Object]) -> anyhow::Result<Applied> {
    let mut work =
        Work { client, kinds: BTreeMap::new(), namespaces: BTreeSet::new(), out: Applied::default() };
    let list = work.client.read("/api/v1/namespaces").await?;
    work.namespaces.extend(names(&list));
    let mut seen = BTreeSet::new();
    let mut twice = Vec::new();
    let mut broken = 0;
    for object in in_order(objects) {
        if is_node(object) {
            work.out.notes.push(format!("{} is not used: {OWN_NODES}", object.display_name()));
            continue;
        }
        let name = (object.group(), object.kind(), object.namespace(), object.name());
        if !seen.insert(name) && object.value["metadata"]["name"].is_string() {
            twice.push(object.display_name());
        }
        if let Err(error) = work.write(object).await {
            // It may be this object that the connection broke on. A server that still answers takes the rest.
            broken += 1;
            if broken > BROKEN_LIMIT || work.client.read("/version").await.is_err() {
                return Err(error.context(object.display_name()));
            }
            let (origin, object) = (object.origin.clone(), Some(object.display_name()));
            work.out.problems.push(Problem { origin, object, cause: format!("not sent: {error:#}") });
        }
    }
    if let Some(first) = twice.first() {
        let count = twice.len();
        work.out
            .notes
            .push(format!("{count} objects are in more than one document, the last one counts: {first}, …"));
    }
    Ok(work.out)
}

/// What came of a deletion.
#[derive(Debug, Default)]
pub struct Deleted {
    /// Objects that are deleted, or on their way out: pods end in their own time.
    pub deleted: Vec<String>,
    /// Objects that were not there.
    pub absent: Vec<String>,
    /// What was left alone on purpose, for people to read.
    pub notes: Vec<String>,
    /// Objects that the server refused to delete, and those that have no name to delete them by.
    pub problems: Vec<Problem>,
}

/// Deletes the objects, last things first: namespaces and definitions of custom kinds go after what is in them.
///
/// # Errors
/// When the server cannot be reached. A refused object is a problem in the result, and the rest goes on.
pub async fn delete(client: &mut Client, objects: &[Object]) -> anyhow::Result<Deleted> {
    let mut work =
        Work { client, kinds: BTreeMap::new(), namespaces: BTreeSet::new(), out: Applied::default() };
    let mut out = Deleted::default();
    let mut seen = BTreeSet::new();
    for object in in_order(objects).into_iter().rev() {
        let name = object.display_name();
        if is_node(object) {
            out.notes.push(format!("{name} is not deleted: {OWN_NODES}"));
            continue;
        }
        if !seen.insert((object.group(), object.kind(), object.namespace(), object.name())) {
            continue;
        }
        let mut problem = |cause: String| {
            let (origin, object) = (object.origin.clone(), Some(name.clone()));
            out.problems.push(Problem { origin, object, cause });
        };
        if !object.value["metadata"]["name"].is_string() {
            problem(
                "metadata.name: missing; what has a generateName has to be deleted by its full name".into(),
            );
            continue;
        }
        // A kind that nobody has defined has no objects.
        let Some(resource) = work.known(object).await? else {
            out.absent.push(name);
            continue;
        };
        let mut path = prefix(object.api_version());
        if resource.namespaced {
            path.push_str(&format!("/namespaces/{}", object.namespace().unwrap_or("default")));
        }
        path.push_str(&format!("/{}/{}", resource.plural, object.name()));
        let answer = work.client.call(Method::DELETE, &path, None).await?;
        match answer.code {
            StatusCode::NOT_FOUND => out.absent.push(name),
            code if code.is_success() => out.deleted.push(name),
            _ => {
                let message = answer.body["message"].as_str().unwrap_or("refused without a message");
                problem(format!("refused by the API server: {message}"));
            }
        }
    }
    Ok(out)
}

/// Namespaces, then definitions of custom kinds, then everything else; each in the order of the files.
fn in_order(objects: &[Object]) -> Vec<&Object> {
    let rank = |o: &&Object| match (o.group(), o.kind()) {
        ("", "Namespace") => 0,
        ("apiextensions.k8s.io", "CustomResourceDefinition") => 1,
        _ => 2,
    };
    let mut sorted: Vec<&Object> = objects.iter().collect();
    sorted.sort_by_key(rank);
    sorted
}

/// Nodes of an exported cluster are not there; a namesake would take the place of the lab's own.
fn is_node(object: &Object) -> bool {
    object.kind() == "Node" && object.group().is_empty()
}

fn names(list: &Value) -> Vec<String> {
    let items = list["items"].as_array().into_iter().flatten();
    items.filter_map(|i| i["metadata"]["name"].as_str().map(str::to_owned)).collect()
}

struct Work<'a> {
    client: &'a mut Client,
    /// By apiVersion and kind.
    kinds: BTreeMap<(String, String), Resource>,
    namespaces: BTreeSet<String>,
    out: Applied,
}

impl Work<'_> {
    async fn write(&mut self, object: &Object) -> anyhow::Result<()> {
        let problem = |cause: String| Problem {
            origin: object.origin.clone(),
            object: Some(object.display_name()),
            cause,
        };
        let resource = match self.resource(object).await? {
            Ok(resource) => resource,
            Err(cause) => {
                self.out.problems.push(problem(cause));
                return Ok(());
            }
        };
        let mut value = object.value.clone();
        // What an export of another cluster carries along.
        if let Some(meta) = value["metadata"].as_object_mut() {
            for field in
                ["resourceVersion", "uid", "creationTimestamp", "managedFields", "selfLink", "generation"]
            {
                meta.remove(field);
            }
        }
        let size = serde_json::to_vec(&value)?.len();
        if size > OBJECT_LIMIT {
            self.out.problems.push(problem(format!(
                "too large: {size} bytes as JSON, and a cluster stores at most {OBJECT_LIMIT} of an object; split it"
            )));
            return Ok(());
        }
        let mut collection = prefix(object.api_version());
        if resource.namespaced {
            let namespace = object.namespace().unwrap_or("default").to_owned();
            value["metadata"]["namespace"] = namespace.as_str().into();
            self.ensure_namespace(&namespace).await?;
            collection.push_str(&format!("/namespaces/{namespace}"));
        } else if let Some(meta) = value["metadata"].as_object_mut() {
            meta.remove("namespace");
        }
        collection.push_str(&format!("/{}", resource.plural));
        let answer = self.client.call(Method::POST, &collection, Some(&value)).await?;
        let answer = if answer.code == StatusCode::CONFLICT && answer.body["reason"] == "AlreadyExists" {
            let path = format!("{collection}/{}", object.name());
            let answer = self.client.call(Method::PUT, &path, Some(&value)).await?;
            if answer.code.is_success() {
                self.out.replaced += 1;
            }
            answer
        } else {
            if answer.code.is_success() {
                self.out.created += 1;
            }
            answer
        };
        if !answer.code.is_success() {
            let message = answer.body["message"].as_str().unwrap_or("refused without a message");
            self.out.problems.push(problem(format!("refused by the API server: {message}")));
        } else if object.kind() == "Namespace" && object.group().is_empty() {
            self.namespaces.insert(object.name().to_owned());
        }
        Ok(())
    }

    async fn ensure_namespace(&mut self, name: &str) -> anyhow::Result<()> {
        if self.namespaces.contains(name) {
            return Ok(());
        }
        let value = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        let answer = self.client.call(Method::POST, "/api/v1/namespaces", Some(&value)).await?;
        if answer.code.is_success() {
            self.out.notes.push(format!("namespace {name} is in no manifest and was created"));
        }
        // Refused or not: the object's own refusal will name the cause, once per object is enough.
        self.namespaces.insert(name.to_owned());
        Ok(())
    }

    /// The resource of an object's kind. A kind that nobody has defined is defined here.
    async fn resource(&mut self, object: &Object) -> anyhow::Result<Result<Resource, String>> {
        if let Some(found) = self.known(object).await? {
            return Ok(Ok(found));
        }
        // In a group of Kubernetes' own, a kind that is missing is a mistake or an old version.
        if self.is_built_in(object.group()).await? {
            return Ok(Err(format!(
                "no kind {} in {}: misspelt, or a version that Kubernetes no longer has",
                object.kind(),
                object.api_version()
            )));
        }
        let definition = definition(object);
        let namespaced = definition["spec"]["scope"] == "Namespaced";
        let mut answer = self.client.call(Method::POST, DEFINITIONS, Some(&definition)).await?;
        if answer.code == StatusCode::CONFLICT {
            // Defined, but not in this version.
            let path = format!("{DEFINITIONS}/{}.{}", plural(object.kind()), object.group());
            let mut known = self.client.read(&path).await?;
            if let (Some(versions), Some(new)) =
                (known["spec"]["versions"].as_array_mut(), definition["spec"]["versions"].get(0))
            {
                let mut new = new.clone();
                new["storage"] = false.into();
                versions.push(new);
            }
            answer = self.client.call(Method::PUT, &path, Some(&known)).await?;
        }
        if !answer.code.is_success() {
            let message = answer.body["message"].as_str().unwrap_or_default();
            return Ok(Err(format!("custom kind {} cannot be defined: {message}", object.kind())));
        }
        let resource = Resource { plural: plural(object.kind()), namespaced };
        self.out.notes.push(format!(
            "kind {} of {} is in no manifest and was defined as a custom kind without a schema",
            object.kind(),
            object.api_version()
        ));
        self.kinds.insert((object.api_version().to_owned(), object.kind().to_owned()), resource.clone());
        Ok(Ok(resource))
    }

    /// The resource of an object's kind, when the server has one.
    async fn known(&mut self, object: &Object) -> anyhow::Result<Option<Resource>> {
        let key = (object.api_version().to_owned(), object.kind().to_owned());
        if let Some(known) = self.kinds.get(&key) {
            return Ok(Some(known.clone()));
        }
        let found = self.discover(object).await?;
        if let Some(found) = &found {
            self.kinds.insert(key, found.clone());
        }
        Ok(found)
    }

    /// A group that is served although no definition of a custom kind is in it. One without a dot can be nobody
    /// else's than Kubernetes' own.
    async fn is_built_in(&mut self, group: &str) -> anyhow::Result<bool> {
        if !group.contains('.') {
            return Ok(true);
        }
        if !self.client.call(Method::GET, &format!("/apis/{group}"), None).await?.code.is_success() {
            return Ok(false);
        }
        let definitions = self.client.read(DEFINITIONS).await?;
        let mut groups = definitions["items"].as_array().into_iter().flatten().map(|d| &d["spec"]["group"]);
        Ok(!groups.any(|g| g == group))
    }

    async fn discover(&mut self, object: &Object) -> anyhow::Result<Option<Resource>> {
        let answer = self.client.call(Method::GET, &prefix(object.api_version()), None).await?;
        if !answer.code.is_success() {
            return Ok(None);
        }
        let resources = answer.body["resources"].as_array().into_iter().flatten();
        let found = resources.filter(|r| r["kind"] == object.kind()).find_map(|r| {
            let plural = r["name"].as_str().filter(|n| !n.contains('/'))?;
            Some(Resource { plural: plural.to_owned(), namespaced: r["namespaced"].as_bool()? })
        });
        Ok(found)
    }
}

fn prefix(api_version: &str) -> String {
    if api_version.contains('/') { format!("/apis/{api_version}") } else { format!("/api/{api_version}") }
}

/// How kubectl guesses it (`meta.UnsafeGuessKindToResource`).
fn plural(kind: &str) -> String {
    let lower = kind.to_lowercase();
    if lower.ends_with('s') || lower.ends_with("ch") || lower.ends_with('x') {
        return format!("{lower}es");
    }
    match lower.strip_suffix('y') {
        Some(stem) if !stem.ends_with(['a', 'e', 'i', 'o', 'u']) => format!("{stem}ies"),
        _ => format!("{lower}s"),
    }
}

fn definition(object: &Object) -> Value {
    let (kind, plural) = (object.kind(), plural(object.kind()));
    // The manifest does not say where the kind lives; these are the names that cluster-wide kinds have.
    let cluster_wide =
        object.namespace().is_none() && (kind.starts_with("Cluster") || kind.ends_with("Class"));
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{}", object.group()),
                     "annotations": {"lab.podway.dev/defined-by": "podway lab up"}},
        "spec": {
            "group": object.group(),
            "scope": if cluster_wide { "Cluster" } else { "Namespaced" },
            "names": {"kind": kind, "listKind": format!("{kind}List"), "plural": plural, "singular": kind.to_lowercase()},
            "versions": [{"name": object.version(), "served": true, "storage": true,
                          "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}],
        },
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use podway_apiserver::{BearerToken, Store, StoreConfig};

    use super::*;
    use crate::manifest::Origin;

    /// A server with an empty store, for as long as the test runs.
    fn server() -> (Client, Arc<Store>) {
        let store = Arc::new(Store::new(StoreConfig::default()));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listen");
        let port = listener.local_addr().expect("address").port();
        let serving = podway_apiserver::serve(listener, store.clone(), Some(BearerToken::new("t")));
        tokio::spawn(serving);
        (Client::of_test(port, "t"), store)
    }

    fn config_map(name: &str, size: usize) -> Object {
        object(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name},
                      "data": {"a": "x".repeat(size)}}))
    }

    #[tokio::test]
    async fn an_oversized_object_costs_itself_alone() {
        let (mut client, _store) = server();
        let objects = [
            config_map("first", 1),
            config_map("huge", 30 << 20),
            config_map("big", 1 << 20),
            config_map("last", 1),
        ];
        let applied = apply(&mut client, &objects).await.expect("the server is there");
        assert_eq!((applied.created, applied.problems.len()), (3, 1));
        let problem = applied.problems[0].to_string();
        assert!(problem.contains("ConfigMap huge: too large: 3145"), "{problem}");
        // Who sends it all the same gets an answer, not a broken connection.
        let path = "/api/v1/namespaces/default/configmaps";
        for _ in 0..2 {
            let answer = client.call(Method::POST, path, Some(&objects[1].value)).await.expect("answer");
            assert_eq!(answer.code, StatusCode::PAYLOAD_TOO_LARGE);
        }
    }

    /// A server that breaks off when somebody writes a ConfigMap called `bad`, and one that has gone.
    #[tokio::test]
    async fn a_broken_connection_costs_one_object_while_the_server_answers() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let port = listener.local_addr().expect("address").port();
        let serving = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).await.expect("read");
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                if request.contains("\"bad\"") {
                    continue;
                }
                let body = json!({"items": [{"metadata": {"name": "default"}}],
                    "resources": [{"kind": "ConfigMap", "name": "configmaps", "namespaced": true}]})
                .to_string();
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                stream.write_all(answer.as_bytes()).await.expect("write");
            }
        });
        let mut client = Client::of_test(port, "t");
        let objects = [config_map("a", 1), config_map("bad", 1), config_map("b", 1)];
        let applied = apply(&mut client, &objects).await.expect("the server is there");
        assert_eq!((applied.created, applied.problems.len()), (2, 1), "{applied:?}");
        assert!(applied.problems[0].to_string().contains("ConfigMap bad: not sent"), "{applied:?}");
        let many: Vec<Object> = (0..=BROKEN_LIMIT).map(|_| config_map("bad", 1)).collect();
        let error = apply(&mut client, &many).await.expect_err("too many");
        assert!(format!("{error:#}").starts_with("ConfigMap bad: "), "{error:#}");
        serving.abort();
        let _ = serving.await;
        apply(&mut client, &objects).await.expect_err("nobody is there");
    }

    #[tokio::test]
    async fn nodes_of_manifests_leave_the_labs_own_alone() {
        let (mut client, store) = server();
        let node = |labels: Value| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1", "labels": labels}});
        store.create(node(json!({"own": "yes"})), podway_apiserver::WriteOptions::default()).expect("node");
        let objects = [object(node(json!({}))), config_map("a", 1)];
        let applied = apply(&mut client, &objects).await.expect("apply");
        assert_eq!((applied.created, applied.replaced, applied.problems.len()), (1, 0, 0));
        assert!(
            applied.notes[0].starts_with("Node node-1 is not used: the lab makes"),
            "{:?}",
            applied.notes
        );
        let deleted = delete(&mut client, &objects).await.expect("delete");
        assert_eq!(deleted.deleted, ["ConfigMap a"]);
        assert!(deleted.notes[0].starts_with("Node node-1 is not deleted"), "{:?}", deleted.notes);
        let known = client.read("/api/v1/nodes/node-1").await.expect("the node is there");
        assert_eq!(known["metadata"]["labels"]["own"], "yes");
    }

    fn object(value: Value) -> Object {
        Object { value, origin: Origin { file: "a.yaml".into(), document: 1 } }
    }

    #[test]
    fn plurals_are_guessed_as_kubectl_does() {
        for (kind, want) in [
            ("Gateway", "gateways"),
            ("NetworkPolicy", "networkpolicies"),
            ("Ingress", "ingresses"),
            ("Prefix", "prefixes"),
            ("Switch", "switches"),
            ("HTTPRoute", "httproutes"),
        ] {
            assert_eq!(plural(kind), want);
        }
    }

    #[test]
    fn namespaces_and_definitions_come_first() {
        let objects: Vec<Object> = ["Service", "Namespace", "CustomResourceDefinition", "Pod"]
            .iter()
            .map(|kind| {
                let version =
                    if *kind == "CustomResourceDefinition" { "apiextensions.k8s.io/v1" } else { "v1" };
                object(json!({"apiVersion": version, "kind": kind, "metadata": {"name": "x"}}))
            })
            .collect();
        let kinds: Vec<&str> = in_order(&objects).into_iter().map(Object::kind).collect();
        assert_eq!(kinds, ["Namespace", "CustomResourceDefinition", "Service", "Pod"]);
    }
}
