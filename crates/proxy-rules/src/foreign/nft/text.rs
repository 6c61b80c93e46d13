//! The text form. nft prints one statement per line, except for the elements of sets and maps, which are wrapped.

use super::{
    super::{Action, ForeignRules, prefix},
    Element, KUBE_PROXY_TABLE, Rule, Table, services,
};

/// A word of the text and its line.
type Word<'a> = (usize, &'a str);

/// Reads the text that `nft list ruleset` or `nft list table` prints.
#[must_use]
pub fn parse(text: &str) -> ForeignRules {
    let mut rules = ForeignRules::default();
    let tables = tables(text, &mut rules);
    services(&tables, &mut rules);
    rules
}

/// Where in the text a line is.
enum Place {
    Outside,
    /// In a table of somebody else, this many braces deep.
    Other(usize),
    Table,
    Chain(String),
    /// In a set or map of this name.
    Set(String),
    /// In what follows `elements =`.
    Elements(String),
}

fn tables(text: &str, out: &mut ForeignRules) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    let mut place = Place::Outside;
    let mut pending: Vec<Word<'_>> = Vec::new();
    // Timeouts of sets, for affinity.
    let mut last = 0;
    for (number, raw) in (1..).zip(text.lines()) {
        last = number;
        let line = raw.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let words = match words(line) {
            Ok(words) => words,
            Err(cause) => {
                out.problem(number, raw, cause);
                continue;
            }
        };
        place = match place {
            Place::Outside => match words.as_slice() {
                ["table", family, name, "{"] if *name == KUBE_PROXY_TABLE => {
                    tables.push(Table { family: (*family).to_owned(), ..Table::default() });
                    Place::Table
                }
                ["table", .., "{"] => Place::Other(1),
                ["table", .., "{", "}"] => Place::Outside,
                _ => {
                    out.problem(number, raw, "not a table");
                    Place::Outside
                }
            },
            Place::Other(depth) => {
                let opened = words.iter().filter(|w| **w == "{").count();
                let closed = words.iter().filter(|w| **w == "}").count();
                match (depth + opened).saturating_sub(closed) {
                    0 => Place::Outside,
                    depth => Place::Other(depth),
                }
            }
            Place::Table => match words.as_slice() {
                ["}"] => Place::Outside,
                ["chain", name, "{"] => Place::Chain((*name).to_owned()),
                ["set" | "map", name, "{"] => Place::Set((*name).to_owned()),
                ["comment" | "flags", ..] => Place::Table,
                ["flowtable" | "counter" | "quota" | "limit" | "ct" | "secmark" | "synproxy", .., "{"] => {
                    Place::Set(String::new())
                }
                _ => {
                    out.problem(number, raw, "neither chain, set nor map");
                    Place::Table
                }
            },
            Place::Chain(name) => match words.as_slice() {
                ["}"] => {
                    table(&mut tables).chains.entry(name).or_default();
                    Place::Table
                }
                ["type", ..] | ["comment", ..] => Place::Chain(name),
                words => {
                    match rule(words) {
                        Ok(rule) => table(&mut tables).chains.entry(name.clone()).or_default().push(rule),
                        Err(cause) => out.problem(number, raw, cause),
                    }
                    Place::Chain(name)
                }
            },
            Place::Set(name) => match words.as_slice() {
                ["}"] => Place::Table,
                ["elements", "=", "{", rest @ ..] => {
                    pending.clear();
                    read_elements(name, rest, number, &mut pending, &mut tables, out)
                }
                ["timeout", time, ..] => {
                    // Remembered under a name that no set can have.
                    if let Some(seconds) = seconds(time) {
                        table(&mut tables).elements.entry(format!("timeout {name}")).or_default().push(
                            Element {
                                line: number,
                                key: vec![seconds.to_string()],
                                verdict: String::new(),
                                comment: None,
                            },
                        );
                    }
                    Place::Set(name)
                }
                _ => Place::Set(name),
            },
            Place::Elements(name) => read_elements(name, &words, number, &mut pending, &mut tables, out),
        };
    }
    if !matches!(place, Place::Outside) {
        out.problem(last, text.lines().last().unwrap_or_default(), "the text ends in the middle of a table");
    }
    for table in &mut tables {
        affinity(table);
    }
    tables
}

/// Gives rules that look into or update a set the set's timeout.
fn affinity(table: &mut Table) {
    let timeouts: Vec<(String, u32)> = table
        .elements
        .iter()
        .filter_map(|(name, e)| {
            Some((name.strip_prefix("timeout ")?.to_owned(), e.first()?.key.first()?.parse().ok()?))
        })
        .collect();
    for rule in table.chains.values_mut().flatten() {
        let found = timeouts.iter().find(|(name, _)| rule.sets.contains(name));
        rule.timeout_s = rule.timeout_s.or(found.map(|(_, seconds)| *seconds));
    }
}

fn table(tables: &mut [Table]) -> &mut Table {
    tables.last_mut().expect("a table was opened before anything inside of it is read")
}

/// Takes one line of elements; they end with a closing brace.
fn read_elements<'a>(
    name: String,
    words: &[&'a str],
    line: usize,
    pending: &mut Vec<Word<'a>>,
    tables: &mut [Table],
    out: &mut ForeignRules,
) -> Place {
    for word in words {
        match *word {
            "," | "}" => {
                if !pending.is_empty() {
                    match element(pending) {
                        Ok(element) => table(tables).elements.entry(name.clone()).or_default().push(element),
                        Err(cause) => {
                            let text = pending.iter().map(|w| w.1).collect::<Vec<_>>().join(" ");
                            out.problem(pending[0].0, &text, cause);
                        }
                    }
                    pending.clear();
                }
                if *word == "}" {
                    return Place::Set(name);
                }
            }
            word => pending.push((line, word)),
        }
    }
    Place::Elements(name)
}

/// `a . b . c [comment "…"] [timeout …] [: verdict]`.
fn element(words: &[Word<'_>]) -> Result<Element, &'static str> {
    let line = words.first().map_or(0, |w| w.0);
    let words: Vec<&str> = words.iter().map(|w| w.1).collect();
    let (left, verdict) = match words.iter().position(|w| *w == ":") {
        Some(at) => (&words[..at], words[at + 1..].join(" ")),
        None => (words.as_slice(), String::new()),
    };
    let mut key = Vec::new();
    let mut comment = None;
    let mut rest = left.iter();
    let mut next = true;
    while let Some(word) = rest.next() {
        match *word {
            "." if !next => next = true,
            "comment" => comment = rest.next().map(|c| unquoted(c)),
            "timeout" | "expires" | "counter" | "packets" | "bytes" => drop(rest.next()),
            word if next => {
                key.push(word.to_owned());
                next = false;
            }
            _ => return Err("an element that is not understood"),
        }
    }
    if key.is_empty() || next {
        return Err("an element without a key");
    }
    Ok(Element { line, key, verdict, comment })
}

/// Splits a line into words. Braces and commas are words of their own; a quoted text is one, with its quotes.
fn words(line: &str) -> Result<Vec<&str>, &'static str> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '"' => rest[1..].find('"').ok_or("a quote is not closed")? + 2,
            '{' | '}' | ',' | ';' => 1,
            // Statements of one line end at white space, a comma or a brace; addresses hold colons.
            _ => rest.find([' ', '\t', ',', '{', '}', ';', '"']).unwrap_or(rest.len()),
        };
        words.push(&rest[..length]);
        rest = rest[length..].trim_start();
    }
    Ok(words)
}

fn unquoted(word: &str) -> String {
    word.trim_matches('"').to_owned()
}

fn rule(words: &[&str]) -> Result<Rule, String> {
    let mut rule = Rule::default();
    let mut at = 0;
    let word = |at: usize| words.get(at).copied().unwrap_or_default();
    while at < words.len() {
        match word(at) {
            "comment" => at += 1,
            "saddr" if matches!(word(at.wrapping_sub(1)), "ip" | "ip6") => {
                let not = word(at + 1) == "!=";
                let from = at + 1 + usize::from(not);
                match word(from) {
                    "." => {}
                    "{" => {
                        let end = closing(words, from).ok_or("a brace is not closed")?;
                        let mut nets = Vec::new();
                        for text in words[from + 1..end].iter().filter(|w| **w != ",") {
                            nets.push(prefix(text).ok_or_else(|| format!("{text}: not a prefix"))?);
                        }
                        rule.source = Some((nets, not));
                        at = end;
                    }
                    set if set.starts_with('@') => {
                        rule.sets.push(set[1..].to_owned());
                        at = from;
                    }
                    // In `update @set { ip saddr }`.
                    "}" | "timeout" => {}
                    text => {
                        let net = prefix(text).ok_or_else(|| format!("saddr {text}: not a prefix"))?;
                        rule.source = Some((vec![net], not));
                        at = from;
                    }
                }
            }
            "fib" if word(at + 1) == "saddr" && word(at + 2) == "type" && word(at + 3) == "local" => {
                rule.source_local = true;
                at += 3;
            }
            "jump" | "goto" => {
                let target = word(at + 1);
                if target.is_empty() {
                    return Err(format!("{} without a chain", word(at)));
                }
                if target == "mark-for-masquerade" {
                    rule.marks = true;
                } else {
                    rule.targets.push(target.to_owned());
                }
                at += 1;
            }
            "dnat" if word(at.wrapping_sub(1)) != "status" => {
                let end = words.iter().position(|w| *w == "comment").unwrap_or(words.len());
                rule.dnat = destinations(&words[at + 1..end])?;
                at = end - 1;
            }
            "reject" => rule.refuses = Some(Action::Reject),
            "drop" => rule.refuses = Some(Action::Drop),
            "masquerade" => rule.masquerades = true,
            "mark" if word(at + 1) == "set" => rule.marks = true,
            "timeout" => rule.timeout_s = rule.timeout_s.or(seconds(word(at + 1))),
            set if set.starts_with('@') => rule.sets.push(set[1..].to_owned()),
            _ => {}
        }
        at += 1;
    }
    // What the masquerading chain does with the mark is no mark of a service.
    rule.marks &= !rule.masquerades;
    Ok(rule)
}

fn closing(words: &[&str], open: usize) -> Option<usize> {
    words.iter().skip(open).position(|w| *w == "}").map(|n| open + n)
}

/// What follows `dnat`: `[ip] to ADDRESS[:PORT]`, or `[ip] to EXPRESSION map { KEY : ADDRESS . PORT, … }`.
fn destinations(words: &[&str]) -> Result<Vec<(std::net::IpAddr, u16)>, String> {
    let end = |text: &[&str]| -> Result<(std::net::IpAddr, u16), String> {
        let ends = match text {
            [address] => super::super::address_and_port(address),
            [address, ".", port] => address.parse().ok().zip(port.parse().ok()),
            _ => None,
        };
        ends.ok_or_else(|| format!("dnat to {}: not an address and port", text.join(" ")))
    };
    let to = words.iter().position(|w| *w == "to").ok_or("dnat without an address")?;
    let Some(open) = words.iter().position(|w| *w == "{") else {
        let flags = |w: &&&str| !matches!(**w, "random" | "fully-random" | "persistent");
        let address: Vec<&str> = words[to + 1..].iter().filter(flags).copied().collect();
        return Ok(vec![end(&address)?]);
    };
    let close = closing(words, open).ok_or("a brace is not closed")?;
    let mut all = Vec::new();
    for element in words[open + 1..close].split(|w| *w == ",") {
        let value = element.iter().position(|w| *w == ":").ok_or("an element of the map has no value")?;
        all.push(end(&element[value + 1..])?);
    }
    Ok(all)
}

/// Reads a time as nft prints it: `3h`, `1d2h3m4s`, `10800s`.
fn seconds(text: &str) -> Option<u32> {
    let mut total: u32 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u32 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let factor = match &rest[..unit] {
            "d" => 86_400,
            "h" => 3_600,
            "m" => 60,
            "s" => 1,
            "ms" => 0,
            _ => return None,
        };
        total = total.checked_add(number.checked_mul(factor)?)?;
        rest = &rest[unit..];
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_nft_prints_them() {
        let cases = [
            ("3h", Some(10_800)),
            ("1d2h3m4s", Some(93_784)),
            ("10800s", Some(10_800)),
            ("10s500ms", Some(10)),
        ];
        for (text, wanted) in cases {
            assert_eq!(seconds(text), wanted, "{text}");
        }
        for text in ["", "3", "h", "3x", "99999999999s", "99999d99999d"] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }

    #[test]
    fn words_are_split_at_braces_commas_and_quotes() {
        assert_eq!(words("a { b, \"c d\" }").unwrap(), ["a", "{", "b", ",", "\"c d\"", "}"]);
        assert!(words("comment \"open").is_err());
    }
}
