//! Tables: what `kubectl get` prints, one row per object. Pure; the clock is an argument.
//!
//! Columns and cells are those of a real API server. A kind without columns of its own shows its name and when it was
//! created; custom kinds show `additionalPrinterColumns`.

mod cluster;
mod format;
mod json_path;
mod network;
mod pods;
mod workloads;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::json;
use crate::kinds::{KindInfo, PrinterColumn};
pub(crate) use format::label_selector_text;
use json_path::JsonPath;

/// A built-in kind's printer: the cells behind the name.
type Cells = fn(&Value, Timestamp) -> Vec<Value>;

/// How one kind is printed.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<PrinterColumn>,
    /// Whether the name comes first; events have it at the end of the wide form.
    name_first: bool,
    printer: Printer,
}

#[derive(Debug)]
enum Printer {
    BuiltIn(Cells),
    /// Path and type of each column behind the name.
    Custom(Vec<(JsonPath, String)>),
    CreatedAt,
    Age,
}

/// Titles of a built-in kind's columns behind the name, parted by `|`: `*` marks those of the wide form, `#` integers.
fn built_in(kind: &KindInfo) -> Option<(&'static str, Cells)> {
    if kind.custom {
        return None;
    }
    pods::printer(kind)
        .or_else(|| workloads::printer(kind))
        .or_else(|| network::printer(kind))
        .or_else(|| cluster::printer(kind))
}

fn column(title: &str, type_: &str, priority: i64) -> PrinterColumn {
    PrinterColumn {
        name: title.to_owned(),
        type_: type_.to_owned(),
        format: if title == "Name" { "name".to_owned() } else { String::new() },
        description: String::new(),
        priority,
        json_path: String::new(),
    }
}

impl Table {
    /// The table of a kind in one of its versions.
    pub(crate) fn of(kind: &KindInfo, version: &str) -> Self {
        let name_first = !kind.is("", "Event");
        let mut columns = if name_first { vec![column("Name", "string", 0)] } else { Vec::new() };
        if let Some((titles, cells)) = built_in(kind) {
            for title in titles.split('|') {
                let (title, priority) = title.strip_prefix('*').map_or((title, 0), |title| (title, 1));
                let (title, type_) =
                    title.strip_prefix('#').map_or((title, "string"), |title| (title, "integer"));
                columns.push(column(title, type_, priority));
            }
            return Self { columns, name_first, printer: Printer::BuiltIn(cells) };
        }
        if let Some(custom) = kind.columns.get(version) {
            columns.extend(custom.iter().cloned());
            let paths =
                custom.iter().map(|column| (JsonPath::parse(&column.json_path), column.type_.clone()));
            return Self { columns, name_first, printer: Printer::Custom(paths.collect()) };
        }
        let (title, type_, printer) = if kind.custom {
            ("Age", "date", Printer::Age)
        } else {
            ("Created At", "date", Printer::CreatedAt)
        };
        columns.push(column(title, type_, 0));
        Self { columns, name_first, printer }
    }

    /// `columnDefinitions`.
    pub(crate) fn columns(&self) -> Value {
        let columns = self.columns.iter().map(|column| {
            json!({
                "name": column.name, "type": column.type_, "format": column.format,
                "description": column.description, "priority": column.priority,
            })
        });
        columns.collect()
    }

    /// An object's row.
    pub(crate) fn cells(&self, object: &Value, now: Timestamp) -> Vec<Value> {
        let mut cells = if self.name_first { vec![json!(json::name(object))] } else { Vec::new() };
        match &self.printer {
            Printer::BuiltIn(printer) => cells.extend(printer(object, now)),
            Printer::Custom(paths) => {
                cells.extend(paths.iter().map(|(path, type_)| custom_cell(&path.find(object), type_, now)));
            }
            Printer::CreatedAt => {
                cells.push(object["metadata"].get("creationTimestamp").cloned().unwrap_or(Value::Null));
            }
            Printer::Age => cells.push(format::age(object, now)),
        }
        cells
    }
}

fn custom_cell(found: &[&Value], type_: &str, now: Timestamp) -> Value {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match (type_, found) {
        (_, []) => Value::Null,
        ("date", [value, ..]) => json!(format::since(value.as_str().unwrap_or_default(), now)),
        ("string", [value]) if !value.is_string() => json!(text(value)),
        (_, [value]) => (*value).clone(),
        (_, many) => json!(many.iter().map(|value| text(value)).collect::<Vec<_>>().join(",")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(kind: &KindInfo, object: &Value) -> Vec<(String, Value)> {
        let table = Table::of(kind, kind.storage_version());
        let now = "2026-01-02T00:00:00Z".parse().unwrap();
        let cells = table.cells(object, now);
        assert_eq!(cells.len(), table.columns.len(), "{}", kind.kind);
        table.columns.into_iter().map(|column| column.name).zip(cells).collect()
    }

    #[test]
    fn every_kind_prints_an_empty_object_in_as_many_cells_as_columns() {
        for kind in crate::kinds::built_in() {
            for object in [
                json!({}),
                json!({"metadata": 1, "spec": "x", "status": [], "data": 3}),
                json!({"spec": {"ports": [1, {}], "containers": [null], "template": 4}, "subsets": [{}]}),
            ] {
                assert!(table(&kind, &object).len() >= 2, "{}", kind.kind);
            }
        }
    }

    #[test]
    fn custom_columns_follow_their_paths() {
        let mut kind = KindInfo::new("example.com", "v1", "Widget", "widgets", true);
        kind.custom = true;
        let object = json!({
            "metadata": {"name": "w", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"size": 3, "hosts": ["a", "b"]},
            "status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Other", "status": "False"}]}
        });
        assert_eq!(
            table(&kind, &object),
            [("Name".to_owned(), json!("w")), ("Age".to_owned(), json!("24h"))]
        );

        let column = |name: &str, type_: &str, path: &str| PrinterColumn {
            json_path: path.to_owned(),
            type_: type_.to_owned(),
            ..column(name, type_, 0)
        };
        kind.columns.insert(
            "v1".to_owned(),
            vec![
                column("Size", "integer", ".spec.size"),
                column("Ready", "string", ".status.conditions[?(@.type==\"Ready\")].status"),
                column("Hosts", "string", ".spec.hosts[*]"),
                column("First", "string", ".spec.hosts[0]"),
                column("Missing", "string", ".spec.nope"),
                column("Age", "date", ".metadata.creationTimestamp"),
            ],
        );
        let cells: Vec<Value> = table(&kind, &object).into_iter().map(|(_, cell)| cell).collect();
        let expected =
            [json!("w"), json!(3), json!("True"), json!("a,b"), json!("a"), Value::Null, json!("24h")];
        assert_eq!(cells, expected);
    }
}
