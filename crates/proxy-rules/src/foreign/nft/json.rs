//! The JSON form (libnftables-json(5)).

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::{
    super::{Action, ForeignRules, address_and_port, prefix},
    Element, KUBE_PROXY_TABLE, Rule, Table, services,
};

/// Reads the JSON that `nft -j list ruleset` or `nft -j list table` prints. The line of a problem is the number of the
/// object in the list `nftables`.
#[must_use]
pub fn parse(text: &str) -> ForeignRules {
    let mut rules = ForeignRules::default();
    let whole: Value = match serde_json::from_str(text) {
        Ok(whole) => whole,
        Err(error) => {
            let line = text.lines().nth(error.line().saturating_sub(1)).unwrap_or_default();
            rules.problem(error.line(), line, format!("not JSON: {error}"));
            return rules;
        }
    };
    let Some(objects) = whole.get("nftables").and_then(Value::as_array) else {
        rules.problem(1, text, "no list \"nftables\"");
        return rules;
    };
    let mut tables: Vec<Table> = Vec::new();
    for (number, object) in (1..).zip(objects) {
        if let Err(cause) = take(object, number, &mut tables, &mut rules) {
            rules.problem(number, &object.to_string(), cause);
        }
    }
    services(&tables, &mut rules);
    rules
}

fn take(object: &Value, line: usize, tables: &mut Vec<Table>, out: &mut ForeignRules) -> Result<(), String> {
    let Some((what, body)) = object.as_object().and_then(|o| o.iter().next()) else {
        return Err("not an object".into());
    };
    if !matches!(what.as_str(), "table" | "set" | "map" | "chain" | "rule") {
        return Ok(());
    }
    let family = string(body, "family")?;
    let name = |field| string(body, field).map(str::to_owned);
    if what == "table" {
        if string(body, "name")? == KUBE_PROXY_TABLE {
            tables.push(Table { family: family.to_owned(), ..Table::default() });
        }
        return Ok(());
    }
    if string(body, "table")? != KUBE_PROXY_TABLE {
        return Ok(());
    }
    let table = tables.iter_mut().find(|t| t.family == family).ok_or("its table is not listed before it")?;
    match what.as_str() {
        "chain" => drop(table.chains.entry(name("name")?).or_default()),
        "rule" => {
            let chain = name("chain")?;
            let timeouts = |set: &str| timeout(table, set);
            let rule = rule(body, timeouts)?;
            table.chains.entry(chain).or_default().push(rule);
        }
        _ => {
            let name = name("name")?;
            if let Some(seconds) = body.get("timeout").and_then(Value::as_u64) {
                // Remembered under a name that no set can have.
                let element =
                    Element { line, key: vec![seconds.to_string()], verdict: String::new(), comment: None };
                table.elements.entry(format!("timeout {name}")).or_default().push(element);
            }
            for value in body.get("elem").and_then(Value::as_array).into_iter().flatten() {
                match element(value, line) {
                    Some(element) => table.elements.entry(name.clone()).or_default().push(element),
                    None => out.problem(line, &value.to_string(), "an element that is not understood"),
                }
            }
        }
    }
    Ok(())
}

fn timeout(table: &Table, set: &str) -> Option<u32> {
    table.elements.get(&format!("timeout {set}"))?.first()?.key.first()?.parse().ok()
}

fn string<'a>(body: &'a Value, field: &str) -> Result<&'a str, String> {
    body.get(field).and_then(Value::as_str).ok_or_else(|| format!("{field} is missing, or no text"))
}

/// A key, or a key and a value.
fn element(value: &Value, line: usize) -> Option<Element> {
    let (left, verdict) = match value.as_array().map(Vec::as_slice) {
        Some([left, right]) => (left, verdict(right)?),
        Some(_) => return None,
        None => (value, String::new()),
    };
    let (left, comment) = match left.get("elem") {
        Some(inner) => (inner.get("val")?, inner.get("comment").and_then(Value::as_str).map(str::to_owned)),
        None => (left, None),
    };
    let key = match left.get("concat").and_then(Value::as_array) {
        Some(parts) => parts.iter().map(scalar).collect::<Option<Vec<_>>>()?,
        None => vec![scalar(left)?],
    };
    Some(Element { line, key, verdict, comment })
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => net(value).map(|n| n.to_string()),
    }
}

fn net(value: &Value) -> Option<IpNet> {
    if let Some(text) = value.as_str() {
        return prefix(text);
    }
    let body = value.get("prefix")?;
    let address: IpAddr = body.get("addr")?.as_str()?.parse().ok()?;
    IpNet::new(address, u8::try_from(body.get("len")?.as_u64()?).ok()?).ok()
}

fn verdict(value: &Value) -> Option<String> {
    let (word, body) = value.as_object()?.iter().next()?;
    Some(match body.get("target").and_then(Value::as_str) {
        Some(target) => format!("{word} {target}"),
        None => word.clone(),
    })
}

fn rule(body: &Value, timeout: impl Fn(&str) -> Option<u32>) -> Result<Rule, String> {
    let mut rule = Rule::default();
    let statements = body.get("expr").and_then(Value::as_array).ok_or("expr is missing, or no list")?;
    for statement in statements {
        let Some((what, body)) = statement.as_object().and_then(|o| o.iter().next()) else {
            return Err("a statement that is no object".into());
        };
        match what.as_str() {
            "match" => condition(body, &mut rule)?,
            "jump" | "goto" => match string(body, "target")? {
                "mark-for-masquerade" => rule.marks = true,
                target => rule.targets.push(target.to_owned()),
            },
            "vmap" => {
                if let Some(elements) = body.pointer("/data/set").and_then(Value::as_array) {
                    let targets = elements.iter().filter_map(|e| verdict(e.get(1)?));
                    rule.targets.extend(targets.filter_map(|v| Some(v.split_once(' ')?.1.to_owned())));
                }
            }
            "dnat" => rule.dnat = destinations(body)?,
            "reject" => rule.refuses = Some(Action::Reject),
            "drop" => rule.refuses = Some(Action::Drop),
            "masquerade" => rule.masquerades = true,
            "mangle" => rule.marks |= body.pointer("/key/meta/key").and_then(Value::as_str) == Some("mark"),
            "set" => {
                if let Some(name) = body.get("set").and_then(Value::as_str) {
                    rule.sets.push(name.trim_start_matches('@').to_owned());
                }
            }
            _ => {}
        }
    }
    rule.timeout_s = rule.sets.iter().find_map(|set| timeout(set));
    rule.marks &= !rule.masquerades;
    Ok(rule)
}

fn condition(body: &Value, rule: &mut Rule) -> Result<(), String> {
    let (Some(left), Some(right)) = (body.get("left"), body.get("right")) else {
        return Err("a condition without two sides".into());
    };
    let not = body.get("op").and_then(Value::as_str) == Some("!=");
    if let Some(set) = right.as_str().and_then(|r| r.strip_prefix('@')) {
        rule.sets.push(set.to_owned());
        return Ok(());
    }
    if left.pointer("/payload/field").and_then(Value::as_str) == Some("saddr") {
        let nets = match right.get("set").and_then(Value::as_array) {
            Some(set) => set.iter().map(net).collect::<Option<Vec<_>>>(),
            None => net(right).map(|n| vec![n]),
        };
        rule.source = Some((nets.ok_or("a source that is no prefix")?, not));
    }
    let of_source = left
        .pointer("/fib/flags")
        .and_then(Value::as_array)
        .is_some_and(|f| f.iter().any(|flag| flag.as_str() == Some("saddr")));
    if of_source && right.as_str() == Some("local") {
        rule.source_local = true;
    }
    Ok(())
}

fn destinations(body: &Value) -> Result<Vec<(IpAddr, u16)>, String> {
    const NO: &str = "dnat: not an address and port";
    let Some(address) = body.get("addr") else { return Err(NO.into()) };
    let port = |value: &Value| value.as_u64().and_then(|p| u16::try_from(p).ok());
    if let Some(text) = address.as_str() {
        let (address, of_text) = address_and_port(text).ok_or(NO)?;
        return Ok(vec![(address, body.get("port").and_then(port).unwrap_or(of_text))]);
    }
    let elements = address.pointer("/map/data/set").and_then(Value::as_array).ok_or(NO)?;
    let one = |element: &Value| {
        let parts = element.get(1)?.get("concat")?.as_array()?;
        Some((parts.first()?.as_str()?.parse().ok()?, port(parts.get(1)?)?))
    };
    elements.iter().map(|e| one(e).ok_or_else(|| NO.to_owned())).collect()
}
