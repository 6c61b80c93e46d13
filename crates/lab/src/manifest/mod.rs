//! Manifests from files and folders to Kubernetes objects.
//!
//! One bad document never hides the rest: every problem is collected with file, document and object name, and
//! loading goes on. May read the file system, nothing else.

mod yaml;

use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Largest file that is read. Bundles of whole platforms stay below 10 MiB.
const MAX_FILE_BYTES: u64 = 32 << 20;
/// Most files that one load visits, so that a wrong path such as `/` ends early.
const MAX_FILES: usize = 10_000;
/// Most objects of one load.
const MAX_OBJECTS: usize = 50_000;
/// Deepest folder below a given path, and deepest `List` in a `List`.
const MAX_DEPTH: usize = 16;

/// Where an object was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file as the user would name it.
    pub file: PathBuf,
    /// Number of the document in the file, from 1.
    pub document: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, document {}", self.file.display(), self.document)
    }
}

/// A Kubernetes object: `apiVersion`, `kind` and a name are known to be there.
#[derive(Debug, Clone)]
pub struct Object {
    /// The object as JSON.
    pub value: Value,
    /// Where it came from.
    pub origin: Origin,
}

impl Object {
    /// The group of `apiVersion`; empty for the core group.
    #[must_use]
    pub fn group(&self) -> &str {
        self.api_version().split_once('/').map_or("", |(group, _)| group)
    }

    /// The version of `apiVersion`.
    #[must_use]
    pub fn version(&self) -> &str {
        let text = self.api_version();
        text.split_once('/').map_or(text, |(_, version)| version)
    }

    /// `apiVersion`.
    #[must_use]
    pub fn api_version(&self) -> &str {
        self.value["apiVersion"].as_str().unwrap_or_default()
    }

    /// `kind`.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.value["kind"].as_str().unwrap_or_default()
    }

    /// `metadata.name`, else `metadata.generateName`.
    #[must_use]
    pub fn name(&self) -> &str {
        let meta = &self.value["metadata"];
        meta["name"].as_str().or_else(|| meta["generateName"].as_str()).unwrap_or_default()
    }

    /// `metadata.namespace`, when the manifest says one.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        self.value["metadata"]["namespace"].as_str().filter(|s| !s.is_empty())
    }

    /// `Kind namespace/name` as messages print it.
    #[must_use]
    pub fn display_name(&self) -> String {
        match self.namespace() {
            Some(ns) => format!("{} {ns}/{}", self.kind(), self.name()),
            None => format!("{} {}", self.kind(), self.name()),
        }
    }
}

/// A document that could not be used. The rest was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub origin: Origin,
    /// `Kind namespace/name` as far as it could be read.
    pub object: Option<String>,
    /// Field and cause, and what to do.
    pub cause: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.object {
            Some(object) => write!(f, "{}: {object}: {}", self.origin, self.cause),
            None => write!(f, "{}: {}", self.origin, self.cause),
        }
    }
}

/// What a load found.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Usable objects in the order of the files.
    pub objects: Vec<Object>,
    /// Documents that were not usable.
    pub problems: Vec<Problem>,
    /// Documents and files left out on purpose, for people to read.
    pub notes: Vec<String>,
}

/// The load as a whole is impossible.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A given path cannot be read.
    #[error("{}: {cause}; give a manifest file or a folder of manifests", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Cause. Not a `source`, because the text has it already.
        cause: std::io::Error,
    },
    /// More files than one load visits.
    #[error("{}: more than {MAX_FILES} files; give the folder that holds the manifests", path.display())]
    TooManyFiles {
        /// The path given.
        path: PathBuf,
    },
}

/// Reads manifests from files (any name) and folders (`.yaml`, `.yml` and `.json`, recursively, in name order).
///
/// # Errors
/// When a given path cannot be read. Everything inside a readable path is reported in [`Loaded`] instead.
pub fn load(paths: &[PathBuf]) -> Result<Loaded, LoadError> {
    let mut out = Loaded::default();
    for path in paths {
        let meta = std::fs::metadata(path).map_err(|cause| LoadError::Path { path: path.clone(), cause })?;
        if meta.is_dir() {
            let mut files = Vec::new();
            walk(path, path, 0, &mut files, &mut out)?;
            if files.is_empty() {
                out.notes.push(format!("{}: no .yaml, .yml or .json file in it", path.display()));
            }
            for file in files {
                read_file(&file, &mut out);
            }
        } else {
            read_file(path, &mut out);
        }
    }
    Ok(out)
}

fn walk(
    root: &Path,
    dir: &Path,
    depth: usize,
    files: &mut Vec<PathBuf>,
    out: &mut Loaded,
) -> Result<(), LoadError> {
    if depth > MAX_DEPTH {
        out.notes.push(format!("{}: skipped, more than {MAX_DEPTH} folders deep", dir.display()));
        return Ok(());
    }
    let mut entries: Vec<_> = std::fs::read_dir(dir)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|cause| LoadError::Path { path: dir.to_owned(), cause })?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // A link to a folder could lead round in a circle; a link to a file cannot.
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(root, &path, depth + 1, files, out)?;
        } else if has_manifest_name(&path) && path.is_file() {
            if files.len() >= MAX_FILES {
                return Err(LoadError::TooManyFiles { path: root.to_owned() });
            }
            files.push(path);
        }
    }
    Ok(())
}

fn has_manifest_name(path: &Path) -> bool {
    path.extension().and_then(|e| e.to_str()).is_some_and(|e| matches!(e, "yaml" | "yml" | "json"))
}

fn read_file(path: &Path, out: &mut Loaded) {
    let origin = |document| Origin { file: path.to_owned(), document };
    let problem = |cause| Problem { origin: origin(1), object: None, cause };
    let text = match std::fs::metadata(path).and_then(|meta| {
        if meta.len() > MAX_FILE_BYTES {
            return Err(std::io::Error::other(format!(
                "{} MiB is more than the {} MiB that a manifest file may have",
                meta.len() >> 20,
                MAX_FILE_BYTES >> 20
            )));
        }
        std::fs::read(path)
    }) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => {
                let at = e.utf8_error().valid_up_to();
                return out.problems.push(problem(format!("not UTF-8 text: bad byte at offset {at}")));
            }
        },
        Err(e) => return out.problems.push(problem(e.to_string())),
    };
    if path.file_name().is_some_and(|n| {
        let n = n.to_string_lossy();
        n == "kustomization.yaml" || n == "kustomization.yml"
    }) {
        out.notes.push(format!(
            "{}: skipped, it configures kustomize; render it first (kubectl kustomize) to use what it changes",
            path.display()
        ));
        return;
    }
    if path.extension().is_some_and(|e| e == "json") {
        read_json(&text, &origin, out);
        return;
    }
    for (index, document) in documents(&text).into_iter().enumerate() {
        let origin = origin(index + 1);
        match yaml::parse(document.text) {
            Ok(Value::Null) => {}
            Ok(value) => accept(value, &origin, 0, out),
            Err(mut cause) => {
                if document.first_line > 1 {
                    cause =
                        format!("{cause} (lines are counted from line {} of the file)", document.first_line);
                }
                if document.text.contains("{{") {
                    cause.push_str("; it looks like a template: render it first (helm template)");
                }
                out.problems.push(Problem { origin, object: guess_name(document.text), cause });
            }
        }
    }
}

fn read_json(text: &str, origin: &impl Fn(usize) -> Origin, out: &mut Loaded) {
    let stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    for (index, value) in stream.enumerate() {
        match value {
            Ok(value) => accept(value, &origin(index + 1), 0, out),
            Err(e) => {
                // After a syntax error the start of the next value is unknown.
                let cause = format!("not JSON: {e}; anything after it in this file was not read");
                out.problems.push(Problem { origin: origin(index + 1), object: None, cause });
                return;
            }
        }
    }
}

struct Document<'a> {
    first_line: usize,
    text: &'a str,
}

/// Splits at `---` lines before parsing, so that a syntax error costs one document only.
fn documents(text: &str) -> Vec<Document<'_>> {
    let mut out = Vec::new();
    let (mut start, mut first_line, mut at) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let separator = line.strip_prefix("---").is_some_and(|rest| {
            rest.trim().is_empty() || rest.trim_start_matches([' ', '\t']).starts_with('#')
        });
        if separator {
            out.push(Document { first_line, text: &text[start..at] });
            (start, first_line) = (at + line.len(), index + 2);
        }
        at += line.len();
    }
    out.push(Document { first_line, text: &text[start..] });
    out.retain(|d| {
        d.text.lines().any(|l| {
            let l = l.trim();
            !l.is_empty() && !l.starts_with('#') && !l.starts_with("%YAML")
        })
    });
    out
}

/// Kind and name from the text of a document that does not parse.
fn guess_name(text: &str) -> Option<String> {
    let value = |key: &str, indented: bool| {
        text.lines()
            .filter(|l| l.starts_with([' ', '\t']) == indented)
            .find_map(|l| l.trim().strip_prefix(key)?.trim().strip_prefix(':'))
            .map(|v| v.trim().trim_matches(['"', '\'']).to_owned())
            .filter(|v| !v.is_empty() && v.len() < 254)
    };
    match (value("kind", false), value("name", true)) {
        (Some(kind), Some(name)) => Some(format!("{kind} {name}")),
        (Some(kind), None) => Some(kind),
        _ => None,
    }
}

fn accept(value: Value, origin: &Origin, depth: usize, out: &mut Loaded) {
    let mut problem = |object: Option<String>, cause: String| {
        out.problems.push(Problem { origin: origin.clone(), object, cause });
    };
    let Value::Object(map) = &value else {
        out.notes.push(format!("{origin}: skipped, not a Kubernetes object"));
        return;
    };
    let (api_version, kind) = match (map.get("apiVersion"), map.get("kind")) {
        (None, None) => {
            out.notes.push(format!("{origin}: skipped, not a Kubernetes object (no apiVersion, no kind)"));
            return;
        }
        (Some(Value::String(a)), Some(Value::String(k))) if !a.is_empty() && !k.is_empty() => {
            (a.clone(), k.clone())
        }
        (Some(Value::String(_)), _) => {
            return problem(None, "kind: missing or not text; every object needs one".into());
        }
        (_, Some(kind)) => {
            let kind = kind.as_str().map(str::to_owned);
            return problem(kind, "apiVersion: missing or not text; every object needs one".into());
        }
        (Some(_), None) => return problem(None, "apiVersion and kind: missing or not text".into()),
    };
    if api_version.starts_with("kustomize.config.k8s.io/") {
        out.notes.push(format!(
            "{origin}: skipped {kind}, it configures kustomize; render it first (kubectl kustomize)"
        ));
        return;
    }
    if let (Some(item_kind), Some(Value::Array(items))) = (kind.strip_suffix("List"), map.get("items")) {
        if depth >= MAX_DEPTH {
            return problem(Some(kind.clone()), format!("items: lists nested more than {MAX_DEPTH} deep"));
        }
        for item in items {
            let mut item = item.clone();
            // The items of a typed list (ServiceList) may leave out what the list says.
            if let (Value::Object(m), false) = (&mut item, item_kind.is_empty()) {
                m.entry("apiVersion").or_insert_with(|| api_version.clone().into());
                m.entry("kind").or_insert_with(|| item_kind.into());
            }
            accept(item, origin, depth + 1, out);
        }
        return;
    }
    let object = Object { value, origin: origin.clone() };
    match check_metadata(&object.value["metadata"]) {
        Ok(()) if out.objects.len() >= MAX_OBJECTS => {
            let cause = format!("left out: more than {MAX_OBJECTS} objects in one load");
            out.problems.push(Problem { origin: origin.clone(), object: Some(object.display_name()), cause });
        }
        Ok(()) => out.objects.push(object),
        Err(cause) => {
            let name = object.display_name();
            problem(Some(name.trim_end().to_owned()), cause);
        }
    }
}

fn check_metadata(metadata: &Value) -> Result<(), String> {
    let Value::Object(meta) = metadata else {
        return Err("metadata: missing or not a mapping".into());
    };
    for field in ["name", "generateName", "namespace"] {
        match meta.get(field) {
            None | Some(Value::Null | Value::String(_)) => {}
            Some(other) => return Err(not_text(&format!("metadata.{field}"), other)),
        }
    }
    let named = |f| meta.get(f).and_then(Value::as_str).is_some_and(|s| !s.is_empty());
    if !named("name") && !named("generateName") {
        return Err("metadata.name: missing; every object needs a name or a generateName".into());
    }
    for field in ["labels", "annotations"] {
        match meta.get(field) {
            None | Some(Value::Null) => {}
            Some(Value::Object(entries)) => {
                if let Some((key, value)) = entries.iter().find(|(_, v)| !v.is_string()) {
                    return Err(not_text(&format!("metadata.{field}[{key}]"), value));
                }
            }
            Some(_) => return Err(format!("metadata.{field}: not a mapping of text to text")),
        }
    }
    Ok(())
}

fn not_text(field: &str, value: &Value) -> String {
    let found = match value {
        Value::Bool(b) => format!("the boolean {b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::Null => "null".into(),
        _ => "a list or mapping".into(),
    };
    format!("{field}: must be text but YAML reads {found}; put the value in quotes")
}

#[cfg(test)]
mod tests;
