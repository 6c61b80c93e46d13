//! Building the tests and running them, as two steps: the first as the owner of the tree, the second as root,
//! because the tests make namespaces and load programs, and the tree must not fill with root's files.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::root;

fn list_path() -> PathBuf {
    root().join("target/test-programs.json")
}

/// A program that cargo built for tests.
pub(crate) struct Program {
    /// Of the cargo target.
    pub(crate) name: String,
    pub(crate) executable: PathBuf,
    pub(crate) manifest: PathBuf,
    /// Has the test harness; an example has not.
    pub(crate) is_test: bool,
}

impl Program {
    /// Crate's directory and target: `link: netlink`.
    pub(crate) fn label(&self) -> String {
        let directory = self.manifest.parent().and_then(Path::file_name).unwrap_or_default();
        format!("{}: {}", directory.to_string_lossy(), self.name)
    }
}

/// Builds what `cargo test` builds with these arguments, ordered by crate and name.
pub(crate) fn programs(arguments: &[&str]) -> Result<Vec<Program>> {
    let output = Command::new("cargo")
        .arg("test")
        .args(arguments)
        .args(["--locked", "--no-run", "--message-format=json-render-diagnostics"])
        .current_dir(root())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the tests do not build");
    }
    let mut programs = Vec::new();
    for line in output.stdout.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let message: Value =
            serde_json::from_slice(line).context("cargo printed something other than JSON")?;
        let Some(executable) = message.get("executable").and_then(Value::as_str) else { continue };
        let manifest = message.get("manifest_path").and_then(Value::as_str).unwrap_or_default();
        let name = message.pointer("/target/name").and_then(Value::as_str).unwrap_or_default();
        programs.push(Program {
            name: name.to_owned(),
            executable: executable.into(),
            manifest: manifest.into(),
            is_test: message.pointer("/profile/test") == Some(&Value::Bool(true)),
        });
    }
    programs.sort_by(|a, b| (&a.manifest, &a.name).cmp(&(&b.manifest, &b.name)));
    Ok(programs)
}

/// Builds every test program and writes the list of them.
pub(crate) fn build() -> Result<()> {
    let programs: Vec<Value> = programs(&["--workspace"])?
        .iter()
        .filter(|p| p.is_test)
        .map(|p| json!({"name": p.name, "executable": p.executable, "manifest": p.manifest}))
        .collect();
    fs::write(list_path(), serde_json::to_vec_pretty(&programs)?)?;
    println!("{} test programs built", programs.len());
    Ok(())
}

fn cases_path() -> PathBuf {
    root().join("target/case-programs.json")
}

/// Builds the test programs that send other projects' packets through the kernel, and writes the list of them.
pub(crate) fn build_cases() -> Result<()> {
    let arguments = ["--package", "podway-proxy-rules", "--package", "podway-bpf-host", "--test", "cases"];
    let programs: Vec<PathBuf> =
        programs(&arguments)?.into_iter().filter(|p| p.is_test).map(|p| p.executable).collect();
    fs::write(cases_path(), serde_json::to_vec_pretty(&programs)?)?;
    Ok(())
}

/// Runs them: one line of passed and failed cases for each way into the kernel.
pub(crate) fn run_cases() -> Result<()> {
    let list = fs::read(cases_path()).context("no list of programs; run `cargo xtask cases-build` first")?;
    let programs: Vec<PathBuf> = serde_json::from_slice(&list)?;
    let mut failed = false;
    for program in &programs {
        let status = Command::new(program)
            .args(["--quiet", "--nocapture", "packets_of_other_projects"])
            .current_dir(root())
            .status()
            .with_context(|| format!("cannot run {}", program.display()))?;
        failed |= !status.success();
    }
    if failed {
        bail!("cases failed in the kernel");
    }
    Ok(())
}

/// Runs the test programs whose name or crate contains one of the filters; all of them without a filter.
pub(crate) fn run(filters: &[&str]) -> Result<()> {
    let list =
        fs::read(list_path()).context("no list of test programs; run `cargo xtask test-build` first")?;
    let programs: Vec<Value> = serde_json::from_slice(&list)?;
    let field = |program: &Value, name: &str| program[name].as_str().unwrap_or_default().to_owned();
    let mut failed = Vec::new();
    let mut run = 0;
    for program in &programs {
        let (name, executable, manifest) =
            (field(program, "name"), field(program, "executable"), field(program, "manifest"));
        let label = format!("{}: {name}", manifest.rsplit('/').nth(1).unwrap_or_default());
        if !filters.is_empty() && !filters.iter().any(|f| label.contains(f)) {
            continue;
        }
        run += 1;
        println!("── {label}");
        let started = Instant::now();
        let directory = PathBuf::from(&manifest).parent().map_or_else(root, PathBuf::from);
        let status = Command::new(&executable)
            .current_dir(&directory)
            .env("CARGO_MANIFEST_DIR", &directory)
            .env("PODWAY_BIN", root().join("target/release/podway"))
            // A failing property test would otherwise write into the tree.
            .env("PROPTEST_FAILURE_PERSISTENCE", "off")
            .env("RUST_BACKTRACE", env::var("RUST_BACKTRACE").unwrap_or_else(|_| "1".to_owned()))
            .status()
            .with_context(|| format!("cannot run {executable}"))?;
        println!("   {:.1} s", started.elapsed().as_secs_f64());
        if !status.success() {
            failed.push(label);
        }
    }
    if !failed.is_empty() {
        bail!("{} of {run} test programs failed: {}", failed.len(), failed.join(", "));
    }
    if run == 0 {
        bail!("no test program matches");
    }
    println!("all {run} test programs passed");
    Ok(())
}
