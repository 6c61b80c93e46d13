//! The table of known types: fields, their JSON types, list merge keys and protobuf numbers, from `tables/*.txt`.
//!
//! A table is lines:
//!
//! ```text
//! package io.k8s.api.apps.v1 apps/v1      prefix of the names that follow, and the API version of the kinds
//! kind Deployment | What it is.           a type with apiVersion, kind and metadata
//! DeploymentStrategy                      any other type
//!   type:1 | What the field is.           a field and its number
//!   a:1; b!:2 i32?                        several fields; `!` is required
//! ```
//!
//! A field's type is `string` (if none is given), `i32`, `i64`, `bool`, `bytes`, `time`, `utime` (microseconds), `qty`
//! (Quantity), `ios` (IntOrString), `open` (an object of any fields), a type of the table, `[T]` or `{T}` (a map from
//! text). `?` after a scalar says that an absent value and zero are different. `@key` after the type is the key that
//! items of the list are merged by, `@@` makes the list a set, and `+retain`, `+replace` are further patch strategies.
//! The number `1/2` is field 2 of an embedded message 1. Without a number, the field is not read from protobuf.
//!
//! A type lists all its fields, or clients would refuse right objects; what is not listed is `open`.

use std::collections::HashMap;
use std::sync::LazyLock;

const TABLES: [&str; 5] = [
    include_str!("tables/meta.txt"),
    include_str!("tables/pods.txt"),
    include_str!("tables/core.txt"),
    include_str!("tables/workloads.txt"),
    include_str!("tables/rest.txt"),
];

static TABLE: LazyLock<Table> =
    LazyLock::new(|| Table::parse(&TABLES).expect("the tables are part of the program, and tests read them"));

/// What a field's value is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Shape {
    Text,
    Int32,
    Int64,
    Bool,
    /// Base64 in JSON.
    Bytes,
    Time,
    MicroTime,
    Quantity,
    IntOrString,
    /// An object whose fields are not known.
    Open,
    List(Box<Shape>),
    Map(Box<Shape>),
    /// A type, by its place in the table.
    Type(usize),
}

/// How a strategic merge patch treats a field.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Merge {
    /// `x-kubernetes-patch-strategy`.
    pub(crate) strategy: Option<&'static str>,
    /// `x-kubernetes-patch-merge-key`.
    pub(crate) key: Option<&'static str>,
}

/// Field number, and that of the message in which it is embedded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Number {
    pub(crate) outer: Option<u64>,
    pub(crate) own: u64,
}

/// A field of a type.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) required: bool,
    /// An absent value differs from zero.
    pub(crate) optional: bool,
    pub(crate) number: Option<Number>,
    pub(crate) shape: Shape,
    pub(crate) merge: Merge,
    pub(crate) description: &'static str,
}

/// A type of the API.
#[derive(Debug)]
pub(crate) struct Type {
    /// Such as `io.k8s.api.core.v1.Pod`.
    pub(crate) full_name: String,
    pub(crate) kind: &'static str,
    /// Group (empty for core) and version if this is a kind.
    pub(crate) group_version: Option<(&'static str, &'static str)>,
    pub(crate) description: &'static str,
    pub(crate) fields: Vec<Field>,
}

/// All known types.
#[derive(Debug)]
pub(crate) struct Table {
    types: Vec<Type>,
}

/// The table of this program.
pub(crate) fn table() -> &'static Table {
    &TABLE
}

/// Places of types by simple name, and by package and simple name.
#[derive(Default)]
struct Names {
    simple: HashMap<&'static str, Vec<usize>>,
    full: HashMap<String, usize>,
}

impl Table {
    fn parse(texts: &[&'static str]) -> Result<Self, String> {
        let mut names = Names::default();
        let mut count = 0;
        // Names first: a field may be of a type that comes later.
        walk(texts, |package, _, line| {
            if let Some(header) = line.header() {
                if names.full.insert(format!("{package}.{}", header.name), count).is_some() {
                    return Err("the type is there twice".to_owned());
                }
                names.simple.entry(header.name).or_default().push(count);
                count += 1;
            }
            Ok(())
        })?;
        let mut types: Vec<Type> = Vec::with_capacity(count);
        walk(texts, |package, group_version, line| {
            if let Some(header) = line.header() {
                let fields = if header.is_kind { common_fields(&names)? } else { Vec::new() };
                types.push(Type {
                    full_name: format!("{package}.{}", header.name),
                    kind: header.name,
                    group_version: header.is_kind.then_some(group_version),
                    description: header.description,
                    fields,
                });
                return Ok(());
            }
            let owner = types.last_mut().ok_or("a field without a type")?;
            for field in line.fields(package, &names)? {
                // A kind may say more of its metadata.
                owner.fields.retain(|known| known.name != field.name);
                owner.fields.push(field);
            }
            Ok(())
        })?;
        Ok(Self { types })
    }

    pub(crate) fn types(&self) -> &[Type] {
        &self.types
    }

    pub(crate) fn at(&self, index: usize) -> &Type {
        &self.types[index]
    }

    /// The type of a kind.
    pub(crate) fn kind(&self, group: &str, version: &str, kind: &str) -> Option<&Type> {
        self.types.iter().find(|known| known.group_version == Some((group, version)) && known.kind == kind)
    }

    /// A type by its full name.
    pub(crate) fn named(&self, full_name: &str) -> Option<&Type> {
        self.types.iter().find(|known| known.full_name == full_name)
    }
}

impl Names {
    /// A type of the same package, or the only one of that name.
    fn find(&self, package: &str, name: &str) -> Result<usize, String> {
        if let Some(index) = self.full.get(&format!("{package}.{name}")) {
            return Ok(*index);
        }
        match self.simple.get(name).map(Vec::as_slice) {
            Some([index]) => Ok(*index),
            Some(_) => Err(format!("{name:?} is the name of several types")),
            None => Err(format!("no type {name:?}")),
        }
    }
}

fn common_fields(names: &Names) -> Result<Vec<Field>, String> {
    let text = "apiVersion | Group and version of the kind.\nkind | Name of the kind.\nmetadata:1 ObjectMeta | Name, \
                labels and the like.";
    let mut fields = Vec::new();
    for line in text.lines() {
        fields.extend(Line { text: line, indented: true }.fields("", names)?);
    }
    Ok(fields)
}

/// Calls `visit` with package, group and version for every line that has something.
fn walk(
    texts: &[&'static str],
    mut visit: impl FnMut(&'static str, (&'static str, &'static str), Line) -> Result<(), String>,
) -> Result<(), String> {
    for text in texts {
        let (mut package, mut group_version) = ("", ("", ""));
        for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
            if let Some(rest) = line.strip_prefix("package ") {
                let (name, version) = rest.split_once(' ').ok_or_else(|| format!("{line:?}: no version"))?;
                package = name;
                group_version = version.split_once('/').unwrap_or(("", version));
                continue;
            }
            let parsed = Line { text: line.trim(), indented: line.starts_with(' ') };
            visit(package, group_version, parsed).map_err(|why| format!("{line:?}: {why}"))?;
        }
    }
    Ok(())
}

struct Line {
    text: &'static str,
    indented: bool,
}

struct Header {
    name: &'static str,
    is_kind: bool,
    description: &'static str,
}

impl Line {
    fn parts(&self) -> (&'static str, &'static str) {
        let (left, description) = self.text.split_once('|').unwrap_or((self.text, ""));
        (left.trim(), description.trim())
    }

    fn header(&self) -> Option<Header> {
        let (left, description) = self.parts();
        (!self.indented).then(|| match left.strip_prefix("kind ") {
            Some(name) => Header { name, is_kind: true, description },
            None => Header { name: left, is_kind: false, description },
        })
    }

    fn fields(&self, package: &str, names: &Names) -> Result<Vec<Field>, String> {
        let (left, description) = self.parts();
        left.split(';').map(|text| field(text, description, package, names)).collect()
    }
}

fn field(
    text: &'static str,
    description: &'static str,
    package: &str,
    names: &Names,
) -> Result<Field, String> {
    let mut words = text.split_whitespace();
    let first = words.next().ok_or("a field without a name")?;
    let (name, number) = match first.split_once(':') {
        Some((name, number)) => (name, Some(parse_number(number)?)),
        None => (first, None),
    };
    let (mut shape, mut optional, mut merge) = (Shape::Text, false, Merge::default());
    for word in words {
        if let Some(rule) = word.strip_prefix(['@', '+']) {
            merge = match (rule, rule.strip_suffix("+retain")) {
                ("@", _) => Merge { strategy: Some("merge"), key: None },
                ("retain", _) => Merge { strategy: Some("retainKeys"), key: None },
                ("replace", _) => Merge { strategy: Some("replace"), key: None },
                (_, Some(key)) => Merge { strategy: Some("merge,retainKeys"), key: Some(key) },
                (key, None) => Merge { strategy: Some("merge"), key: Some(key) },
            };
            continue;
        }
        let plain = word.strip_suffix('?');
        optional = plain.is_some();
        shape = parse_shape(plain.unwrap_or(word), package, names)?;
    }
    Ok(Field {
        name: name.trim_end_matches('!'),
        required: name.ends_with('!'),
        optional,
        number,
        shape,
        merge,
        description,
    })
}

fn parse_number(text: &str) -> Result<Number, String> {
    let parse = |text: &str| text.parse().map_err(|_| format!("{text:?} is not a field number"));
    Ok(match text.split_once('/') {
        Some((outer, own)) => Number { outer: Some(parse(outer)?), own: parse(own)? },
        None => Number { outer: None, own: parse(text)? },
    })
}

fn parse_shape(text: &str, package: &str, names: &Names) -> Result<Shape, String> {
    let inside = |open, close| text.strip_prefix(open).and_then(|rest: &str| rest.strip_suffix(close));
    if let Some(item) = inside('[', ']') {
        return Ok(Shape::List(Box::new(parse_shape(item, package, names)?)));
    }
    if let Some(value) = inside('{', '}') {
        return Ok(Shape::Map(Box::new(parse_shape(value, package, names)?)));
    }
    Ok(match text {
        "string" => Shape::Text,
        "i32" => Shape::Int32,
        "i64" => Shape::Int64,
        "bool" => Shape::Bool,
        "bytes" => Shape::Bytes,
        "time" => Shape::Time,
        "utime" => Shape::MicroTime,
        "qty" => Shape::Quantity,
        "ios" => Shape::IntOrString,
        "open" => Shape::Open,
        name => Shape::Type(names.find(package, name)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_read() {
        let table = Table::parse(&TABLES).unwrap();
        let pod = table.kind("", "v1", "Pod").unwrap();
        assert_eq!(pod.full_name, "io.k8s.api.core.v1.Pod");
        assert_eq!(
            pod.fields.iter().map(|field| field.name).collect::<Vec<_>>(),
            ["apiVersion", "kind", "metadata", "spec", "status"]
        );
        let spec = table.named("io.k8s.api.core.v1.PodSpec").unwrap();
        let field = |name| spec.fields.iter().find(|field| field.name == name).unwrap();
        assert!(field("containers").required && !field("volumes").required);
        assert_eq!(field("volumes").merge, Merge { strategy: Some("merge,retainKeys"), key: Some("name") });
        assert_eq!((field("priority").shape.clone(), field("priority").optional), (Shape::Int32, true));
        for known in table.types() {
            for (index, field) in known.fields.iter().enumerate() {
                let twice = |other: &Field| {
                    other.name == field.name || (other.number.is_some() && other.number == field.number)
                };
                assert!(
                    !known.fields[index + 1..].iter().any(twice),
                    "{}.{} is there twice",
                    known.full_name,
                    field.name
                );
            }
        }
    }

    #[test]
    fn wrong_tables_are_refused_with_their_line() {
        for (text, expected) in [
            ("  a:1", "a field without a type"),
            ("package p v1\nA\nA", "twice"),
            ("package p v1\nA\n  b:1 Nothing", "no type \"Nothing\""),
            ("package p v1\nA\n  b:x", "not a field number"),
            ("package p v1\nA\npackage q v1\nA\npackage r v1\nB\n  a A", "several types"),
            ("package p", "no version"),
        ] {
            let error = Table::parse(&[text]).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }
}
