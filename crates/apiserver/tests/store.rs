//! The store through its Rust interface: what writes do, what follows from deletions, what lists and watches see.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use podway_apiserver::{
    ApiError, DeleteOptions, DeleteOutcome, GroupResource, LabelSelector, ListOptions, Patch, Precondition,
    Propagation, ResourceKey, Store, StoreConfig, Subresource, WatchEvent, WatchOptions, WriteOptions,
};
use serde_json::{Value, json};
use std::sync::Arc;

fn store() -> Arc<Store> {
    Arc::new(Store::new(StoreConfig::default()))
}

fn create(store: &Store, object: Value) -> Arc<Value> {
    store.create(object, WriteOptions::default()).unwrap()
}

fn config_map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": "v"}})
}

fn pod(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}], "terminationGracePeriodSeconds": 7}
    })
}

fn owned(mut object: Value, owner: &Value) -> Value {
    object["metadata"]["ownerReferences"] = json!([{
        "apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true
    }]);
    object
}

fn key(resource: &str, name: &str) -> ResourceKey {
    ResourceKey::new("", resource, "default", name)
}

fn core(resource: &str) -> GroupResource {
    GroupResource::new("", resource)
}

fn names(store: &Store, resource: &str) -> Vec<String> {
    let list = store.list(&core(resource), None, &ListOptions::default()).unwrap();
    list.items.iter().map(|object| object["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_created_object_has_its_metadata() {
    let store = store();
    let created = create(&store, pod("a", "n1"));
    let metadata = &created["metadata"];
    assert_eq!((&metadata["namespace"], &metadata["generation"]), (&json!("default"), &json!(1)));
    assert_eq!(metadata["uid"].as_str().unwrap().len(), 36);
    assert!(metadata["creationTimestamp"].as_str().unwrap().ends_with('Z'));
    assert_eq!(metadata["resourceVersion"], store.revision().to_string());
    assert_eq!(created["status"], json!({"phase": "Pending"}));
    let generated =
        create(&store, json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "x-"}}));
    let name = generated["metadata"]["name"].as_str().unwrap();
    assert!(name.starts_with("x-") && name.len() == 7, "{name}");
    let secret =
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"a": "b"}});
    let secret = create(&store, secret);
    assert_eq!((&secret["data"], secret.get("stringData")), (&json!({"a": "Yg=="}), None));
}

#[test]
fn bad_objects_are_refused_with_the_cause() {
    let store = store();
    create(&store, config_map("there"));
    let mut exported = config_map("b");
    exported["metadata"]["resourceVersion"] = json!("7");
    let mut big = config_map("big");
    big["data"]["k"] = json!("x".repeat(2_000_000));
    for (object, code, text) in [
        (json!([]), 400, "apiVersion"),
        (json!({"kind": "Pod", "metadata": {"name": "a"}}), 400, "no apiVersion or no kind"),
        (json!({"apiVersion": "v9", "kind": "Pod"}), 404, "no kind Pod of v9"),
        (json!({"apiVersion": "v1", "kind": "Pod", "metadata": {}}), 422, "name or generateName is required"),
        (json!({"apiVersion": "v1", "kind": "Pod", "metadata": "x"}), 422, "metadata: Invalid value"),
        (pod("Upper", ""), 422, "metadata.name: Invalid value: \"Upper\""),
        (config_map("there"), 409, "configmaps \"there\" already exists"),
        (exported, 400, "resourceVersion should not be set"),
        (big, 413, "limit is"),
        (
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "nope"}}),
            404,
            "namespaces \"nope\" not found",
        ),
        (
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}, "stringData": {"x": 1}}),
            422,
            "stringData.x",
        ),
    ] {
        let error = store.create(object, WriteOptions::default()).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(text), "{error}");
    }
}

#[test]
fn a_full_store_says_so() {
    let store = Store::new(StoreConfig { max_objects: 5, ..StoreConfig::default() });
    create(&store, config_map("fifth"));
    let error = store.create(config_map("sixth"), WriteOptions::default()).unwrap_err();
    assert_eq!((error.code, error.reason), (503, "ServiceUnavailable"));
    store.delete(&key("configmaps", "fifth"), &DeleteOptions::default()).unwrap();
    create(&store, config_map("sixth"));
}

#[test]
fn updates_check_the_version_and_keep_what_is_not_theirs() {
    let store = store();
    let first = create(&store, pod("a", "n1"));
    let mut change = Value::clone(&first);
    change["spec"]["nodeName"] = json!("n2");
    change["status"]["phase"] = json!("Running");
    change["metadata"]["creationTimestamp"] = json!("1999-01-01T00:00:00Z");
    let key = key("pods", "a");
    let second = store.update(&key, change.clone(), Subresource::Main, WriteOptions::default()).unwrap();
    assert_eq!(second["status"]["phase"], "Pending");
    assert_eq!(second["metadata"]["creationTimestamp"], first["metadata"]["creationTimestamp"]);
    assert_eq!(second["metadata"]["generation"], 2);

    let conflict = store.update(&key, change, Subresource::Main, WriteOptions::default()).unwrap_err();
    assert!(conflict.is_conflict(), "{conflict}");

    let mut status = Value::clone(&second);
    status["spec"]["nodeName"] = json!("n3");
    status["status"]["phase"] = json!("Running");
    let third = store.update_status(status).unwrap();
    assert_eq!((&third["status"]["phase"], &third["spec"]["nodeName"]), (&json!("Running"), &json!("n2")));
    assert_eq!(third["metadata"]["generation"], 2);

    let mut same = Value::clone(&third);
    same["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    let revision = store.revision();
    let fourth = store.update(&key, same, Subresource::Main, WriteOptions::default()).unwrap();
    assert!(Arc::ptr_eq(&fourth, &third), "what changes nothing writes nothing");
    assert_eq!(store.revision(), revision);

    for (part, value) in [("name", "b"), ("namespace", "kube-system"), ("uid", "other")] {
        let mut wrong = Value::clone(&fourth);
        wrong["metadata"][part] = json!(value);
        let error = store.update(&key, wrong, Subresource::Main, WriteOptions::default()).unwrap_err();
        assert_eq!(error.code, if part == "uid" { 409 } else { 400 }, "{error}");
    }
    let gone = ResourceKey::new("", "pods", "default", "none");
    assert!(
        store
            .update(&gone, pod("none", ""), Subresource::Main, WriteOptions::default())
            .unwrap_err()
            .is_not_found()
    );
}

#[test]
fn dry_runs_write_nothing() {
    let store = store();
    let dry = WriteOptions { dry_run: true };
    create(&store, config_map("a"));
    let revision = store.revision();
    assert!(store.create(config_map("b"), dry).unwrap()["metadata"]["uid"].is_string());
    let patch = Patch::Merge(json!({"data": {"k": "w"}}));
    let patched = store.patch(&key("configmaps", "a"), &patch, Subresource::Main, dry).unwrap();
    assert_eq!(patched["data"]["k"], "w");
    let options = DeleteOptions { dry_run: true, ..DeleteOptions::default() };
    store.delete(&key("configmaps", "a"), &options).unwrap();
    assert_eq!(store.revision(), revision);
    assert_eq!(store.get(&key("configmaps", "a")).unwrap()["data"]["k"], "v");
}

#[test]
fn put_modify_and_apply_need_no_version() {
    let store = store();
    let first = store.put(config_map("a")).unwrap();
    let mut exported = Value::clone(&first);
    exported["metadata"]["resourceVersion"] = json!("999999");
    exported["data"]["k"] = json!("w");
    assert_eq!(store.put(exported).unwrap()["data"]["k"], "w");
    let key = key("configmaps", "a");
    let changed = store.modify(&key, Subresource::Main, |object| {
        object["data"]["k"] = json!("x");
        Ok(())
    });
    assert_eq!(changed.unwrap()["data"]["k"], "x");
    let refused = store.modify(&key, Subresource::Main, |_| Err(ApiError::bad_request("no")));
    assert_eq!(refused.unwrap_err().message, "no");
    let apply = |name: &str| {
        let patch = Patch::Apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"l": "1"}}));
        let key = ResourceKey::new("", "configmaps", "default", name);
        store.patch(&key, &patch, Subresource::Main, WriteOptions::default()).unwrap()
    };
    assert_eq!(apply("a")["data"], json!({"k": "x", "l": "1"}));
    assert_eq!(apply("new")["data"], json!({"l": "1"}));
}

#[test]
fn a_running_pod_is_given_its_grace_period() {
    let store = store();
    create(&store, pod("a", "n1"));
    create(&store, pod("unscheduled", ""));
    let key_a = key("pods", "a");
    let terminating = match store.delete(&key_a, &DeleteOptions::default()).unwrap() {
        DeleteOutcome::Terminating(pod) => pod,
        removed => panic!("{removed:?}"),
    };
    assert_eq!(terminating["metadata"]["deletionGracePeriodSeconds"], 7);
    assert_eq!(terminating["metadata"]["generation"], 2);
    // Once more changes nothing; a shorter period counts, a longer does not.
    for (asked, left) in [(None, 7), (Some(60), 7), (Some(3), 3)] {
        let options = DeleteOptions { grace_period_seconds: asked, ..DeleteOptions::default() };
        let DeleteOutcome::Terminating(pod) = store.delete(&key_a, &options).unwrap() else {
            panic!("removed")
        };
        assert_eq!(pod["metadata"]["deletionGracePeriodSeconds"], left);
    }
    assert!(matches!(store.delete(&key_a, &DeleteOptions::now()).unwrap(), DeleteOutcome::Removed(_)));
    assert!(store.get(&key_a).unwrap_err().is_not_found());
    let unscheduled = store.delete(&key("pods", "unscheduled"), &DeleteOptions::default()).unwrap();
    assert!(matches!(unscheduled, DeleteOutcome::Removed(_)));

    let done = create(&store, pod("done", "n1"));
    let mut status = Value::clone(&done);
    status["status"]["phase"] = json!("Succeeded");
    store.update_status(status).unwrap();
    assert!(matches!(
        store.delete(&key("pods", "done"), &DeleteOptions::default()).unwrap(),
        DeleteOutcome::Removed(_)
    ));
}

#[test]
fn finalizers_hold_an_object_until_they_are_removed() {
    let store = store();
    let mut object = config_map("a");
    object["metadata"]["finalizers"] = json!(["example.com/hold"]);
    create(&store, object);
    let key = key("configmaps", "a");
    assert!(matches!(store.delete(&key, &DeleteOptions::now()).unwrap(), DeleteOutcome::Terminating(_)));
    let still_there = Patch::Merge(json!({"data": {"k": "w"}}));
    store.patch(&key, &still_there, Subresource::Main, WriteOptions::default()).unwrap();
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    store.patch(&key, &release, Subresource::Main, WriteOptions::default()).unwrap();
    assert!(store.get(&key).unwrap_err().is_not_found());
}

#[test]
fn preconditions_must_hold() {
    let store = store();
    let object = create(&store, config_map("a"));
    let key = key("configmaps", "a");
    let with = |uid: &str, version: &str| DeleteOptions {
        precondition: Precondition { uid: Some(uid.to_owned()), resource_version: Some(version.to_owned()) },
        ..DeleteOptions::default()
    };
    let uid = object["metadata"]["uid"].as_str().unwrap();
    let version = object["metadata"]["resourceVersion"].as_str().unwrap();
    assert!(store.delete(&key, &with("x", version)).unwrap_err().is_conflict());
    assert!(store.delete(&key, &with(uid, "1")).unwrap_err().is_conflict());
    store.delete(&key, &with(uid, version)).unwrap();
}

#[test]
fn dependents_follow_their_owner() {
    for (propagation, left) in [
        (Propagation::Background, vec!["kube-root"]),
        (Propagation::Foreground, vec!["kube-root"]),
        (Propagation::Orphan, vec!["child", "kube-root"]),
    ] {
        let store = store();
        create(&store, config_map("kube-root"));
        let owner = create(&store, config_map("owner"));
        let child = create(&store, owned(config_map("child"), &owner));
        create(&store, owned(pod("grandchild", ""), &child));
        let options = DeleteOptions { propagation, ..DeleteOptions::default() };
        let outcome = store.delete(&key("configmaps", "owner"), &options).unwrap();
        assert!(matches!(outcome, DeleteOutcome::Removed(_)), "{propagation:?}");
        assert_eq!(names(&store, "configmaps"), left, "{propagation:?}");
        let orphaned = propagation == Propagation::Orphan;
        assert_eq!(names(&store, "pods").len(), usize::from(orphaned), "{propagation:?}");
        if orphaned {
            let child = store.get(&key("configmaps", "child")).unwrap();
            assert_eq!(child["metadata"].get("ownerReferences"), None);
        }
    }
}

#[test]
fn a_foreground_deletion_waits_for_what_blocks_it() {
    let store = store();
    let owner = create(&store, config_map("owner"));
    create(&store, owned(pod("slow", "n1"), &owner));
    let options = DeleteOptions { propagation: Propagation::Foreground, ..DeleteOptions::default() };
    let outcome = store.delete(&key("configmaps", "owner"), &options).unwrap();
    assert!(matches!(outcome, DeleteOutcome::Terminating(_)));
    assert!(store.get(&key("pods", "slow")).unwrap()["metadata"]["deletionTimestamp"].is_string());
    store.delete(&key("pods", "slow"), &DeleteOptions::now()).unwrap();
    assert!(store.get(&key("configmaps", "owner")).unwrap_err().is_not_found());
}

#[test]
fn garbage_is_collected_and_shared_dependents_stay() {
    let store = store();
    let (one, two) = (create(&store, config_map("one")), create(&store, config_map("two")));
    let mut shared = owned(config_map("shared"), &one);
    let second = owned(config_map("x"), &two)["metadata"]["ownerReferences"][0].clone();
    shared["metadata"]["ownerReferences"].as_array_mut().unwrap().push(second);
    create(&store, shared);
    store.delete(&key("configmaps", "one"), &DeleteOptions::default()).unwrap();
    let left = store.get(&key("configmaps", "shared")).unwrap();
    assert_eq!(left["metadata"]["ownerReferences"].as_array().unwrap().len(), 1);
    // A controller that is late creates a child of an owner that is gone.
    create(&store, owned(config_map("late"), &one));
    assert_eq!(names(&store, "configmaps"), ["shared", "two"]);
    store.delete(&key("configmaps", "two"), &DeleteOptions::default()).unwrap();
    assert!(names(&store, "configmaps").is_empty());
}

#[test]
fn long_chains_and_cycles_of_owners_end() {
    let store = store();
    let mut owner = create(&store, config_map("c-0"));
    for index in 1..20_000 {
        owner = create(&store, owned(config_map(&format!("c-{index}")), &owner));
    }
    store.delete(&key("configmaps", "c-0"), &DeleteOptions::default()).unwrap();
    assert!(names(&store, "configmaps").is_empty());

    let a = create(&store, config_map("a"));
    let b = create(&store, owned(config_map("b"), &a));
    store.put(owned(config_map("a"), &b)).unwrap();
    let foreground = DeleteOptions { propagation: Propagation::Foreground, ..DeleteOptions::default() };
    // Each waits for the other, as in Kubernetes; taking the finalizer away ends it.
    store.delete(&key("configmaps", "a"), &foreground).unwrap();
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    store.patch(&key("configmaps", "a"), &release, Subresource::Main, WriteOptions::default()).unwrap();
    assert!(names(&store, "configmaps").is_empty());
}

#[test]
fn a_namespace_goes_when_it_is_empty() {
    let store = store();
    create(&store, json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}));
    let mut running = pod("a", "n1");
    running["metadata"]["namespace"] = json!("shop");
    create(&store, running.clone());
    let mut other = config_map("c");
    other["metadata"]["namespace"] = json!("shop");
    create(&store, other.clone());
    let namespace = ResourceKey::new("", "namespaces", "", "shop");
    let DeleteOutcome::Terminating(last) = store.delete(&namespace, &DeleteOptions::default()).unwrap()
    else {
        panic!("its pod still runs")
    };
    assert_eq!(last["status"]["phase"], "Terminating");
    assert!(names(&store, "configmaps").is_empty());
    let error = store.create(other, WriteOptions::default()).unwrap_err();
    assert_eq!((error.code, error.reason), (403, "Forbidden"));
    store.delete(&ResourceKey::new("", "pods", "shop", "a"), &DeleteOptions::now()).unwrap();
    assert!(store.get(&namespace).unwrap_err().is_not_found());
    let default = ResourceKey::new("", "namespaces", "", "default");
    assert_eq!(store.delete(&default, &DeleteOptions::default()).unwrap_err().code, 403);
}

#[test]
fn events_are_few_and_old_ones_go() {
    let store = Store::new(StoreConfig { max_events: 3, ..StoreConfig::default() });
    for index in 0..10 {
        create(
            &store,
            json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": format!("e-{index}")},
            "involvedObject": {"kind": "Pod", "name": "a"}}),
        );
    }
    assert_eq!(names(&store, "events"), ["e-7", "e-8", "e-9"]);
    let new = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "n"},
        "regarding": {"kind": "Pod", "name": "a"}, "note": "hello", "reportingController": "c"});
    let stored = create(&store, new);
    assert_eq!((&stored["message"], &stored["involvedObject"]["name"]), (&json!("hello"), &json!("a")));
    assert_eq!(stored["apiVersion"], "v1");
}

#[test]
fn pages_show_one_state() {
    let store = Store::new(StoreConfig { watch_window: 8, ..StoreConfig::default() });
    for name in ["a", "b", "c", "d", "e"] {
        create(&store, config_map(name));
    }
    let page = |token: Option<String>| {
        let options = ListOptions { limit: 2, continue_token: token, ..ListOptions::default() };
        store.list(&core("configmaps"), Some("default"), &options)
    };
    let shown = |list: &podway_apiserver::List| -> Vec<String> {
        list.items
            .iter()
            .map(|o| format!("{}={}", o["metadata"]["name"].as_str().unwrap(), o["data"]["k"]))
            .collect()
    };
    let first = page(None).unwrap();
    assert_eq!((shown(&first), first.remaining), (vec!["a=\"v\"".to_owned(), "b=\"v\"".to_owned()], Some(3)));
    // Meanwhile the world changes.
    store.delete(&key("configmaps", "c"), &DeleteOptions::default()).unwrap();
    create(&store, config_map("cc"));
    let patch = Patch::Merge(json!({"data": {"k": "new"}}));
    store.patch(&key("configmaps", "d"), &patch, Subresource::Main, WriteOptions::default()).unwrap();
    let second = page(first.continue_token.clone()).unwrap();
    assert_eq!(
        (shown(&second), second.revision),
        (vec!["c=\"v\"".to_owned(), "d=\"v\"".to_owned()], first.revision)
    );
    let third = page(second.continue_token).unwrap();
    assert_eq!((shown(&third), third.continue_token), (vec!["e=\"v\"".to_owned()], None));
    // Past the window the old state is forgotten.
    for index in 0..10 {
        create(&store, config_map(&format!("z-{index}")));
    }
    assert!(page(first.continue_token).unwrap_err().is_expired());
    assert_eq!(page(Some("@".to_owned())).unwrap_err().code, 400);
    let future = ListOptions { version: Some(9999), ..ListOptions::default() };
    assert_eq!(store.list(&core("pods"), None, &future).unwrap_err().code, 504);
}

fn text(event: &WatchEvent) -> String {
    let name = |object: &Value| object["metadata"]["name"].as_str().unwrap().to_owned();
    match event {
        WatchEvent::Added(object) => format!("+{}", name(object)),
        WatchEvent::Modified(object) => format!("~{}", name(object)),
        WatchEvent::Deleted(object) => format!("-{}", name(object)),
        WatchEvent::Bookmark { initial_events_end, .. } => format!("bookmark {initial_events_end}"),
    }
}

fn ready(watcher: &mut podway_apiserver::Watcher) -> Vec<String> {
    watcher.ready().unwrap().unwrap().iter().map(text).collect()
}

#[test]
fn watches_see_changes_through_their_selectors() {
    let store = store();
    create(&store, pod("a", "n1"));
    create(&store, pod("b", "n1"));
    let options = WatchOptions {
        labels: LabelSelector::parse("app=a").unwrap(),
        send_initial_events: true,
        ..WatchOptions::default()
    };
    let mut watcher = store.watch(&core("pods"), Some("default"), options).unwrap();
    assert_eq!(watcher.position(), None);
    assert_eq!(ready(&mut watcher), ["+a"]);
    assert_eq!(ready(&mut watcher), ["bookmark true"]);
    let label = |name: &str, value: Value| {
        let patch = Patch::Merge(json!({"metadata": {"labels": {"app": value}}}));
        store.patch(&key("pods", name), &patch, Subresource::Main, WriteOptions::default()).unwrap()
    };
    label("b", json!("a"));
    let left = label("a", json!("gone"));
    create(&store, pod("c", "n1"));
    label("a", json!("still-gone"));
    let events = watcher.ready().unwrap().unwrap();
    assert_eq!(events.iter().map(text).collect::<Vec<_>>(), ["+b", "-a"]);
    let WatchEvent::Deleted(last) = &events[1] else { panic!("{events:?}") };
    assert_eq!(last["metadata"]["labels"]["app"], "a", "the state that the watcher knew");
    assert_eq!(last["metadata"]["resourceVersion"], left["metadata"]["resourceVersion"]);
    assert_eq!(watcher.position(), Some(store.revision()));
    store.delete(&key("pods", "b"), &DeleteOptions::now()).unwrap();
    assert_eq!(ready(&mut watcher), ["-b"]);
}

#[test]
fn a_watch_resumes_without_loss_or_repetition() {
    let store = store();
    for index in 0..600 {
        create(&store, config_map(&format!("c-{index:03}")));
    }
    let middle = store.get(&key("configmaps", "c-299")).unwrap();
    let from = middle["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    let mut watcher = store
        .watch(&core("configmaps"), None, WatchOptions { from: Some(from), ..WatchOptions::default() })
        .unwrap();
    let mut seen = Vec::new();
    loop {
        let batch = ready(&mut watcher);
        if batch.is_empty() {
            break;
        }
        assert!(batch.len() <= 256);
        seen.extend(batch);
    }
    assert_eq!(seen, (300..600).map(|index| format!("+c-{index}")).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_slow_watcher_expires_and_writers_do_not_wait() {
    let store = Arc::new(Store::new(StoreConfig { watch_window: 50, ..StoreConfig::default() }));
    let start = store.revision();
    let from_now = WatchOptions { from: Some(start), ..WatchOptions::default() };
    let mut slow = store.watch(&core("configmaps"), None, from_now.clone()).unwrap();
    for index in 0..51 {
        create(&store, config_map(&format!("c-{index}")));
    }
    assert!(slow.next().await.unwrap().unwrap_err().is_expired());
    assert!(store.watch(&core("configmaps"), None, from_now.clone()).unwrap_err().is_expired());
    // Other resources have their own window.
    assert!(store.watch(&core("pods"), None, from_now).is_ok());
    let future = WatchOptions { from: Some(9999), ..WatchOptions::default() };
    assert_eq!(store.watch(&core("pods"), None, future).unwrap_err().code, 504);
}

#[tokio::test]
async fn a_waiting_watcher_wakes_up_and_ends_with_its_kind() {
    let store = store();
    create(&store, widgets());
    let resource = GroupResource::new("example.com", "widgets");
    let mut watcher = store.watch(&resource, None, WatchOptions::default()).unwrap();
    let mut changes = store.changes();
    let writer = Arc::clone(&store);
    let task = tokio::spawn(async move {
        tokio::task::yield_now().await;
        create(&writer, json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "w"}}));
    });
    assert_eq!(watcher.next().await.unwrap().unwrap().iter().map(text).collect::<Vec<_>>(), ["+w"]);
    task.await.unwrap();
    changes.changed().await.unwrap();
    assert_eq!(*changes.borrow_and_update(), store.revision());

    let definition =
        ResourceKey::new("apiextensions.k8s.io", "customresourcedefinitions", "", "widgets.example.com");
    store.delete(&definition, &DeleteOptions::default()).unwrap();
    assert!(watcher.next().await.is_none());
    assert!(store.kind(&resource).is_none());
    let error = store.create(
        json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "w"}}),
        WriteOptions::default(),
    );
    assert!(error.unwrap_err().is_not_found());
}

fn widgets() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "widgets", "kind": "Widget"},
            "versions": [{"name": "v1", "served": true, "storage": true}]}
    })
}

#[test]
fn definitions_cannot_take_built_in_kinds() {
    let store = store();
    let mut wrong = widgets();
    wrong["metadata"]["name"] = json!("deployments.apps");
    wrong["spec"]["group"] = json!("apps");
    wrong["spec"]["names"] = json!({"plural": "deployments", "kind": "Deployment"});
    assert_eq!(store.create(wrong, WriteOptions::default()).unwrap_err().code, 422);
    let kind = store.kind(&core("pods")).unwrap();
    assert_eq!(store.register_kind(podway_apiserver::KindInfo::clone(&kind)).unwrap_err().code, 422);
}

#[test]
fn defaults_come_from_the_outside() {
    let defaulter = |kind: &podway_apiserver::KindInfo, object: &mut Value| {
        if kind.is("", "Service") && object["spec"].get("type").is_none() {
            object["spec"]["type"] = json!("ClusterIP");
        }
    };
    let store = Store::new(StoreConfig { defaulter: Some(Arc::new(defaulter)), ..StoreConfig::default() });
    let service =
        create(&store, json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {}}));
    assert_eq!(service["spec"]["type"], "ClusterIP");
}

#[test]
fn snapshots_and_collections() {
    let store = store();
    for name in ["a", "b", "c"] {
        create(&store, pod(name, ""));
        create(&store, config_map(name));
    }
    let snapshot = store.snapshot(&[core("pods"), core("configmaps"), core("nothing")]);
    assert_eq!((snapshot.objects.len(), snapshot.revision), (6, store.revision()));
    let selected =
        ListOptions { labels: LabelSelector::parse("app in (a,b)").unwrap(), ..ListOptions::default() };
    let deleted = store
        .delete_collection(&core("pods"), Some("default"), &selected, &DeleteOptions::default())
        .unwrap();
    assert_eq!(deleted.items.len(), 2);
    assert_eq!(names(&store, "pods"), ["c"]);
}

#[test]
fn a_watcher_beside_many_writers_sees_the_world_as_it_is() {
    let store = store();
    let mut watcher = store.watch(&core("configmaps"), None, WatchOptions::default()).unwrap();
    let mut world = std::collections::BTreeMap::new();
    let mut last = 0;
    let mut follow = |watcher: &mut podway_apiserver::Watcher| {
        for event in watcher.ready().unwrap().unwrap() {
            let (object, gone) = match &event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => (object, false),
                WatchEvent::Deleted(object) => (object, true),
                WatchEvent::Bookmark { .. } => continue,
            };
            let name = object["metadata"]["name"].as_str().unwrap().to_owned();
            let version: u64 = object["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
            assert!(version > last, "versions rise: {version} after {last}");
            last = version;
            let known = if gone { world.remove(&name) } else { world.insert(name, Arc::clone(object)) };
            assert_eq!(known.is_none(), matches!(event, WatchEvent::Added(_)), "{}", text(&event));
        }
        world.clone()
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let store = &store;
                scope.spawn(move || {
                    for round in 0..400 {
                        let name = format!("c-{}", (round * 7 + writer) % 20);
                        let key = key("configmaps", &name);
                        let mut object = config_map(&name);
                        object["data"]["k"] = json!(format!("{writer}-{round}"));
                        if round % 3 == 0 {
                            let _ = store.delete(&key, &DeleteOptions::now());
                        } else {
                            store.put(object).unwrap();
                        }
                    }
                })
            })
            .collect();
        while writers.iter().any(|writer| !writer.is_finished()) {
            follow(&mut watcher);
        }
    });
    while watcher.position() != Some(store.revision()) {
        follow(&mut watcher);
    }
    let seen = follow(&mut watcher);
    let list = store.list(&core("configmaps"), None, &ListOptions::default()).unwrap();
    assert_eq!(seen.values().collect::<Vec<_>>(), list.items.iter().collect::<Vec<_>>());
    assert!(last > 800);
}

#[test]
fn remembered_changes_take_a_bounded_amount_of_memory() {
    let watched_since = |config: StoreConfig| {
        let store = Arc::new(Store::new(config));
        create(&store, config_map("small"));
        let early = store.revision();
        for round in 0..200 {
            let mut object = pod("p", "n1");
            object["metadata"]["annotations"] = json!({"note": format!("{round}{}", "x".repeat(10_000))});
            store.put(object).unwrap();
        }
        let from = |resource: &str, revision| {
            let options = WatchOptions { from: Some(revision), ..WatchOptions::default() };
            store.watch(&core(resource), None, options).map(|_| ()).map_err(|error| error.code)
        };
        // The large objects are forgotten first; what takes little stays, and the newest change always does.
        (from("pods", early), from("pods", store.revision() - 1), from("configmaps", early - 1))
    };
    assert_eq!(watched_since(StoreConfig::default()), (Ok(()), Ok(()), Ok(())));
    let small = StoreConfig { watch_window_bytes: 500_000, ..StoreConfig::default() };
    assert_eq!(watched_since(small), (Err(410), Ok(()), Ok(())));
    let tiny = StoreConfig { watch_window_bytes: 1, ..StoreConfig::default() };
    assert_eq!(watched_since(tiny), (Err(410), Ok(()), Ok(())));
}
