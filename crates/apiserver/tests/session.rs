//! A recorded session: kubectl commands and what they print, run with every kubectl that is found.
//!
//! `session/kubectl-*.txt` holds lines of three kinds. `$ …` is a kubectl command, run in that folder; the lines that
//! follow are what it prints, then `[exit N]` if it fails. `% status RESOURCE NAMESPACE NAME JSON` writes a status as a
//! kubelet or controller would, `% end RESOURCE NAMESPACE NAME` ends a pod as a kubelet would. `#` is a comment.
//!
//! Ages, times, uids and resource versions are replaced by words, and runs of spaces by one, before lines are compared.
//! Binaries: those that PODWAY_KUBECTL lists (paths with `:` between), otherwise the one on PATH. Clients before 1.24
//! are compared with the 1.20 record, others with the 1.32 one. With PODWAY_RECORD set, the record is written anew.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::kubectl::{self, Kubectl};
use podway_apiserver::{DeleteOptions, GroupResource, ResourceKey};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::Path;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/session");
/// The first minor version whose words are those of the newer record.
const NEWER: u32 = 24;

/// One step and what it printed when it was recorded.
struct Step {
    /// Comments and empty lines before it.
    before: String,
    line: String,
    expected: String,
}

fn steps(record: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut before = String::new();
    for line in record.lines() {
        if line.starts_with(['$', '%']) {
            let before = std::mem::take(&mut before);
            steps.push(Step { before, line: line.to_owned(), expected: String::new() });
        } else if line.starts_with('#') || line.is_empty() || !before.is_empty() {
            before.push_str(line);
            before.push('\n');
        } else if let Some(step) = steps.last_mut() {
            step.expected.push_str(line);
            step.expected.push('\n');
        }
    }
    steps
}

/// Words of a command; quotes hold words together.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for letter in line.chars() {
        match letter {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            letter => words.last_mut().unwrap().push(letter),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// A word that is not the same in every run, by what it is.
fn unsteady(word: &str) -> Option<&'static str> {
    let bare = word.trim_matches(['"', ',', '(', ')']);
    let is_uid = bare.len() == 36 && bare.chars().all(|c| c == '-' || c.is_ascii_hexdigit());
    let is_time = bare.len() >= 20
        && bare.ends_with('Z')
        && bare.as_bytes().get(10) == Some(&b'T')
        && bare.starts_with(|c: char| c.is_ascii_digit());
    let is_age = bare.starts_with(|c: char| c.is_ascii_digit())
        && bare.ends_with(['s', 'm'])
        && bare.trim_end_matches(['s', 'm']).chars().all(|c| c.is_ascii_digit() || c == 'm');
    match (is_uid, is_time, is_age) {
        (true, _, _) => Some("UID"),
        (_, true, _) => Some("TIME"),
        (_, _, true) => Some("AGE"),
        _ => None,
    }
}

fn normalized(text: &str, address: &str) -> String {
    let mut out = String::new();
    for line in text.replace(address, "SERVER").lines() {
        let content = line.trim_start();
        let indent = &line[..line.len() - content.len()];
        let mut words: Vec<&str> = content.split_whitespace().collect();
        // "Mon, 23 Nov 2026 04:37:43 +0000", and the names of diff's temporary files and their times.
        if let Some(day) = words.iter().position(|word| word.len() == 4 && word.ends_with(','))
            && words.get(day + 5).is_some_and(|zone| zone.starts_with(['+', '-']))
        {
            words.splice(day..day + 6, ["TIME"]);
        }
        if words.first().is_some_and(|word| ["---", "+++", "diff"].contains(word)) {
            words.truncate(1);
        }
        // "2026-11-23 04:42:13 +0000 UTC".
        if let Some(date) = words.iter().position(|word| word.len() == 10 && word.matches('-').count() == 2)
            && words.get(date + 3) == Some(&"UTC")
        {
            words.splice(date..date + 4, ["TIME"]);
        }
        if ["resourceVersion:", "Resource"].contains(words.first().unwrap_or(&"")) && words.len() > 1 {
            words.truncate(1);
        }
        let words: Vec<&str> = words.into_iter().map(|word| unsteady(word).unwrap_or(word)).collect();
        // Lines without words separate the record's parts.
        if !words.is_empty() {
            // A printed line must not look like a step or a comment.
            let mark = if words[0].starts_with(['$', '%', '#']) { "\\" } else { "" };
            writeln!(out, "{indent}{mark}{}", words.join(" ")).unwrap();
        }
    }
    out
}

struct Session(Kubectl);

impl Session {
    fn run(&self, line: &str) -> String {
        match line.split_at(1) {
            ("$", command) => self.kubectl(command),
            (_, action) => {
                self.act(action);
                String::new()
            }
        }
    }

    fn kubectl(&self, command: &str) -> String {
        let output = self.0.command().args(words(command)).current_dir(FOLDER).output().unwrap();
        let address = self.0.server.address.to_string();
        let mut text = normalized(&String::from_utf8_lossy(&output.stdout), &address);
        text.push_str(&normalized(&String::from_utf8_lossy(&output.stderr), &address));
        if !output.status.success() {
            writeln!(text, "[exit {}]", output.status.code().unwrap_or(-1)).unwrap();
        }
        text
    }

    /// What a kubelet or a controller would do.
    fn act(&self, action: &str) {
        let words: Vec<&str> = action.trim().splitn(5, ' ').collect();
        let (plural, group) = words[1].split_once('.').unwrap_or((words[1], ""));
        let namespace = if words[2] == "-" { "" } else { words[2] };
        let key = ResourceKey::new(group, plural, namespace, words[3]);
        match words[0] {
            "status" => {
                let kind = self.0.server.store.kind(&GroupResource::new(group, plural)).unwrap();
                let status: Value = serde_json::from_str(words[4]).unwrap();
                let object = json!({"apiVersion": kind.api_version(kind.storage_version()), "kind": kind.kind,
                    "metadata": {"name": key.name, "namespace": key.namespace}, "status": status});
                self.0.server.store.update_status(object).unwrap();
            }
            "end" => drop(self.0.server.store.delete(&key, &DeleteOptions::now()).unwrap()),
            other => panic!("unknown action {other:?}"),
        }
    }
}

#[test]
fn a_session_prints_what_was_recorded() {
    for (binary, minor) in kubectl::found() {
        let name = if minor < NEWER { "kubectl-1.20.txt" } else { "kubectl-1.32.txt" };
        let path = Path::new(FOLDER).join(name);
        let steps = steps(&std::fs::read_to_string(&path).unwrap());
        assert!(steps.iter().filter(|step| step.line.starts_with('$')).count() >= 30);
        let session = Session(Kubectl::of(&binary));
        let (mut record, mut wrong) = (String::new(), String::new());
        for Step { before, line, expected } in steps {
            let printed = session.run(&line);
            if printed != expected {
                writeln!(wrong, "{line}\n--- expected\n{expected}--- printed\n{printed}").unwrap();
            }
            write!(record, "{before}{line}\n{printed}").unwrap();
        }
        if std::env::var_os("PODWAY_RECORD").is_some() {
            std::fs::write(&path, record).unwrap();
        } else {
            assert!(wrong.is_empty(), "{} (minor version {minor}):\n{wrong}", binary.display());
        }
    }
}
