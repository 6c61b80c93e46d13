use std::fs;

use super::*;

fn load_text(name: &str, text: &str) -> Loaded {
    let dir = tempfile::tempdir().expect("temporary folder");
    let file = dir.path().join(name);
    fs::write(&file, text).expect("write");
    load(&[file]).expect("load")
}

fn names(loaded: &Loaded) -> Vec<String> {
    loaded.objects.iter().map(Object::display_name).collect()
}

#[test]
fn documents_lists_and_json_become_objects() {
    for (file, text, want) in [
        (
            "a.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: x}\n---\n# only a comment\n---\n\
             apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: b\n",
            vec!["Service x/a", "Deployment b"],
        ),
        (
            "a.yaml",
            "--- # with a comment\napiVersion: v1\nkind: Pod\nmetadata: {generateName: p-}\n---\n",
            vec!["Pod p-"],
        ),
        (
            "a.yaml",
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n\
             - apiVersion: v1\n  kind: List\n  items: [{apiVersion: v1, kind: Pod, metadata: {name: b}}]\n",
            vec!["Pod a", "Pod b"],
        ),
        ("a.yaml", "apiVersion: v1\nkind: ServiceList\nitems: [{metadata: {name: s}}]\n", vec!["Service s"]),
        (
            "a.json",
            r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}
               {"apiVersion":"v1","kind":"Pod","metadata":{"name":"b"}}"#,
            vec!["Pod a", "Pod b"],
        ),
        ("a.yaml", "\u{feff}apiVersion: v1\r\nkind: Pod\r\nmetadata: {name: a}\r\n---\r\n", vec!["Pod a"]),
        // A kind that ends with List but has no items is an ordinary kind.
        (
            "a.yaml",
            "apiVersion: example.org/v1\nkind: BlockList\nmetadata: {name: a}\nspec: {}\n",
            vec!["BlockList a"],
        ),
    ] {
        let loaded = load_text(file, text);
        assert_eq!(names(&loaded), want, "{text}");
        assert_eq!(loaded.problems, [], "{text}");
    }
}

#[test]
fn a_bad_document_is_named_and_the_rest_is_loaded() {
    for (bad, object, part) in [
        ("kind: Pod\nmetadata:\n  name: broken\n  labels: [", Some("Pod broken"), "line"),
        ("apiVersion: v1\nmetadata: {name: a}", None, "kind"),
        ("kind: Pod\nmetadata: {name: a}", Some("Pod"), "apiVersion"),
        ("apiVersion: v1\nkind: Pod", Some("Pod"), "metadata"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {}", Some("Pod"), "metadata.name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: 5}", Some("Pod"), "number 5"),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, annotations: {x: yes}}",
            Some("Pod a"),
            "metadata.annotations[x]: must be text but YAML reads the boolean true",
        ),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: [b]}", Some("Pod a"), "metadata.labels"),
        ("a: {{ .Values.x }}\nb: [", None, "template"),
    ] {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: before}}\n---\n{bad}\n---\n\
             apiVersion: v1\nkind: Service\nmetadata: {{name: after}}\n"
        );
        let loaded = load_text("m.yaml", &text);
        assert_eq!(names(&loaded), ["Service before", "Service after"], "{bad}");
        let [problem] = &loaded.problems[..] else { panic!("{bad}: {:?}", loaded.problems) };
        assert_eq!(problem.origin.document, 2, "{bad}");
        assert_eq!(problem.object.as_deref(), object, "{bad}");
        assert!(problem.to_string().contains(part), "{bad}: {problem}");
    }
}

#[test]
fn what_is_not_for_the_cluster_is_left_out_with_a_note() {
    for (file, text, part) in [
        ("values.yaml", "replicas: 3\n", "not a Kubernetes object"),
        ("list.yaml", "- a\n- b\n", "not a Kubernetes object"),
        ("kustomization.yaml", "resources: [a.yaml]\n", "kustomize"),
        ("k.yaml", "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n", "kustomize"),
    ] {
        let loaded = load_text(file, text);
        assert!(loaded.objects.is_empty() && loaded.problems.is_empty(), "{file}: {loaded:?}");
        assert!(loaded.notes[0].contains(part), "{file}: {:?}", loaded.notes);
    }
}

#[test]
fn folders_are_walked_in_name_order_without_other_files() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let pod = |n: &str| format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {n}}}\n");
    fs::create_dir_all(dir.path().join("b/deeper")).expect("mkdir");
    fs::create_dir_all(dir.path().join(".git")).expect("mkdir");
    for (file, text) in [
        ("c.yml", pod("third")),
        ("a.yaml", pod("first")),
        ("b/deeper/x.yaml", pod("second")),
        ("README.md", "not: [yaml".into()),
        (".git/x.yaml", pod("hidden")),
        ("z.bin.yaml", "x".into()),
    ] {
        fs::write(dir.path().join(file), text).expect("write");
    }
    fs::write(dir.path().join("latin1.yaml"), b"kind: \xe4").expect("write");
    std::os::unix::fs::symlink(dir.path(), dir.path().join("circle")).expect("symlink");
    let loaded = load(&[dir.path().to_owned()]).expect("load");
    assert_eq!(names(&loaded), ["Pod first", "Pod second", "Pod third"]);
    assert_eq!(loaded.problems.len(), 1);
    assert!(loaded.problems[0].cause.contains("UTF-8"), "{:?}", loaded.problems);
}

#[test]
fn a_path_that_is_not_there_is_an_error() {
    let err = load(&["/nonexistent/manifest.yaml".into()]).expect_err("no such file");
    assert!(err.to_string().contains("/nonexistent/manifest.yaml"), "{err}");
}

#[test]
fn real_projects_load_without_a_problem() {
    let dir = std::env::var_os("PODWAY_MANIFESTS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/manifests"),
        PathBuf::from,
    );
    if !dir.is_dir() {
        eprintln!("skipped: no manifests at {} (set PODWAY_MANIFESTS)", dir.display());
        return;
    }
    let loaded = load(&[dir]).expect("load");
    assert_eq!(loaded.problems, []);
    assert!(loaded.objects.len() > 200, "{} objects", loaded.objects.len());
}
