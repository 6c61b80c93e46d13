//! Reading the data: YAML into JSON values, and fields out of those with errors that say where.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Reads a file of YAML.
///
/// # Errors
/// It cannot be read, or is not YAML.
pub fn yaml(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    // As in YAML 1.2: `y` is a name, not a truth.
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_str_with_options(&text, options)
        .with_context(|| format!("{} is not YAML", path.display()))
}

/// The YAML files of a folder, sorted.
///
/// # Errors
/// The folder cannot be read.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths = listed.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|e| e == "yaml"));
    paths.sort();
    Ok(paths)
}

/// The field's list; empty when it is absent or null.
///
/// # Errors
/// It is something else.
pub fn list<'a>(value: &'a Value, field: &str) -> Result<&'a [Value]> {
    match value.get(field) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(other) => bail!("{field} is not a list: {other}"),
    }
}

/// The field's text.
///
/// # Errors
/// It is absent or no text.
pub fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value.get(field).and_then(Value::as_str).with_context(|| format!("{field} is not a text in {value}"))
}

/// The field's text; empty when it is absent or null.
pub fn text_or_empty<'a>(value: &'a Value, field: &str) -> &'a str {
    value.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// The field's truth; false when it is absent or null.
pub fn flag(value: &Value, field: &str) -> bool {
    value.get(field).and_then(Value::as_bool).unwrap_or(false)
}

/// The field's whole number; 0 when it is absent or null.
pub fn number(value: &Value, field: &str) -> u64 {
    value.get(field).and_then(Value::as_u64).unwrap_or(0)
}

/// The field's texts, each parsed.
///
/// # Errors
/// One is no text or cannot be parsed.
pub fn parsed<T: std::str::FromStr>(value: &Value, field: &str) -> Result<Vec<T>> {
    let parse = |item: &Value| {
        let text = item.as_str().with_context(|| format!("{field} has {item}, which is not a text"))?;
        text.parse().ok().with_context(|| format!("{field} has {text:?}, which cannot be parsed"))
    };
    list(value, field)?.iter().map(parse).collect()
}

/// The field's address.
///
/// # Errors
/// It is absent or no address.
pub fn address(value: &Value, field: &str) -> Result<IpAddr> {
    let text = text(value, field)?;
    text.parse().with_context(|| format!("{field}: {text:?} is no address"))
}
