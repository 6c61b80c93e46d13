//! Domain names in the form of the wire (RFC 1035 section 3.1): labels with a length each, ending with the root's.
//!
//! [`Lower`] is what look-ups use: on the stack, in lower case, with the place of every label. [`Name`] is what is kept.

use std::fmt;

/// Longest name on the wire, with the root's length (RFC 1035 section 2.3.4).
pub const MAX_NAME: usize = 255;
/// Longest label.
pub const MAX_LABEL: usize = 63;
/// Most labels that a name can have, without the root.
const MAX_LABELS: usize = 127;

/// Why a text is no domain name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// Two dots in a row, or a dot in front.
    #[error("{0:?} has an empty label; remove the dot that is too many")]
    EmptyLabel(String),
    /// A label of more than 63 bytes.
    #[error("{0:?} has a label of more than 63 bytes")]
    LongLabel(String),
    /// More than 255 bytes on the wire.
    #[error("{0:?} is longer than the 253 characters that a domain name can have")]
    TooLong(String),
    /// A backslash that is not followed by a character or three digits up to 255.
    #[error("{0:?} has a backslash that escapes nothing")]
    BadEscape(String),
}

/// A name in lower case, kept.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Box<[u8]>);

impl Name {
    /// The root.
    pub fn root() -> Self {
        Self(Box::new([0]))
    }

    /// Reads `redis.default.svc`, with or without the dot at the end; `.` is the root. `\.` and `\DDD` are understood
    /// as in zone files (RFC 1035 section 5.1).
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, BadName> {
        let mut name = Lower::root();
        for label in labels_of(text)? {
            match label.len() {
                0 => return Err(BadName::EmptyLabel(text.to_owned())),
                1..=MAX_LABEL => {}
                _ => return Err(BadName::LongLabel(text.to_owned())),
            }
            if !name.push_label(&label) {
                return Err(BadName::TooLong(text.to_owned()));
            }
        }
        Ok(name.to_name())
    }

    /// As on the wire, with the root's length.
    pub fn wire(&self) -> &[u8] {
        &self.0
    }

    /// The labels without the root's length.
    pub fn labels(&self) -> &[u8] {
        &self.0[..self.0.len() - 1]
    }

    /// For look-ups.
    pub fn lower(&self) -> Lower {
        // Was one when it was made.
        Lower::from_wire(&self.0).unwrap_or_else(Lower::root)
    }
}

/// Labels of a text with its escapes resolved.
fn labels_of(text: &str) -> Result<Vec<Vec<u8>>, BadName> {
    if text.is_empty() || text == "." {
        return Ok(Vec::new());
    }
    let mut labels = vec![Vec::new()];
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let literal = match byte {
            b'.' => {
                labels.push(Vec::new());
                continue;
            }
            b'\\' => match bytes.next() {
                Some(d @ b'0'..=b'9') => {
                    let (Some(e @ b'0'..=b'9'), Some(f @ b'0'..=b'9')) = (bytes.next(), bytes.next()) else {
                        return Err(BadName::BadEscape(text.to_owned()));
                    };
                    let digits = [d, e, f].map(|digit| u16::from(digit - b'0'));
                    u8::try_from(digits[0] * 100 + digits[1] * 10 + digits[2])
                        .map_err(|_| BadName::BadEscape(text.to_owned()))?
                }
                Some(other) => other,
                None => return Err(BadName::BadEscape(text.to_owned())),
            },
            other => other,
        };
        if let Some(last) = labels.last_mut() {
            last.push(literal);
        }
    }
    if labels.last().is_some_and(Vec::is_empty) {
        labels.pop();
    }
    Ok(labels)
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_wire(&self.0, f)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn fmt_wire(wire: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if wire.len() <= 1 {
        return f.write_str(".");
    }
    let mut at = 0;
    while let Some(&len) = wire.get(at) {
        if len == 0 {
            break;
        }
        for &byte in wire.get(at + 1..at + 1 + usize::from(len)).unwrap_or_default() {
            match byte {
                b'.' | b'\\' => write!(f, "\\{}", char::from(byte))?,
                b'!'..=b'~' => write!(f, "{}", char::from(byte))?,
                _ => write!(f, "\\{byte:03}")?,
            }
        }
        f.write_str(".")?;
        at += 1 + usize::from(len);
    }
    Ok(())
}

/// A name in lower case on the stack, with the place of each label.
#[derive(Clone, Copy)]
pub struct Lower {
    bytes: [u8; MAX_NAME],
    len: u8,
    starts: [u8; MAX_LABELS],
    labels: u8,
}

impl Lower {
    /// The root.
    pub fn root() -> Self {
        Self { bytes: [0; MAX_NAME], len: 1, starts: [0; MAX_LABELS], labels: 0 }
    }

    /// Reads a name that is not compressed from the start of `wire`, whatever follows it. `None` when it is cut off,
    /// too long or has a pointer.
    #[inline]
    pub fn from_wire(wire: &[u8]) -> Option<Self> {
        let mut name = Self::root();
        let mut at = 0usize;
        loop {
            let len = usize::from(*wire.get(at)?);
            if len == 0 {
                break;
            }
            let end = at + 1 + len;
            // The root has to fit as well.
            if len > MAX_LABEL || end >= MAX_NAME {
                return None;
            }
            let label = wire.get(at + 1..end)?;
            name.bytes[at] = len as u8;
            for (to, from) in name.bytes[at + 1..end].iter_mut().zip(label) {
                *to = from.to_ascii_lowercase();
            }
            name.starts[usize::from(name.labels)] = at as u8;
            name.labels += 1;
            at = end;
        }
        name.bytes[at] = 0;
        name.len = at as u8 + 1;
        Some(name)
    }

    /// Adds a label in front of the root. False, and nothing is changed, when there is no room for it.
    pub fn push_label(&mut self, label: &[u8]) -> bool {
        let at = usize::from(self.len) - 1;
        let end = at + 1 + label.len();
        if label.is_empty() || label.len() > MAX_LABEL || end >= MAX_NAME {
            return false;
        }
        self.starts[usize::from(self.labels)] = at as u8;
        self.labels += 1;
        self.bytes[at] = label.len() as u8;
        for (to, from) in self.bytes[at + 1..end].iter_mut().zip(label) {
            *to = from.to_ascii_lowercase();
        }
        self.bytes[end] = 0;
        self.len = end as u8 + 1;
        true
    }

    /// The first `labels` of this name with `suffix` behind; `None` when that is too long.
    pub fn prefix_with(&self, labels: usize, suffix: &Name) -> Option<Self> {
        let head = self.start(labels);
        let mut joined = [0; MAX_NAME];
        let end = head + suffix.wire().len();
        let target = joined.get_mut(..end)?;
        target[..head].copy_from_slice(&self.bytes[..head]);
        target[head..].copy_from_slice(suffix.wire());
        Self::from_wire(target)
    }

    /// As on the wire, with the root's length.
    #[inline]
    pub fn wire(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// How many labels it has, without the root.
    #[inline]
    pub fn count(&self) -> usize {
        usize::from(self.labels)
    }

    /// Where label `i` starts; where the root's length is for what is beyond.
    #[inline]
    pub fn start(&self, i: usize) -> usize {
        if i < self.count() { usize::from(self.starts[i]) } else { usize::from(self.len) - 1 }
    }

    /// Label `i`, without its length.
    #[inline]
    pub fn label(&self, i: usize) -> &[u8] {
        self.bytes[self.start(i)..self.start(i + 1)].get(1..).unwrap_or_default()
    }

    /// Labels `from..to` as on the wire, without a root.
    #[inline]
    pub fn slice(&self, from: usize, to: usize) -> &[u8] {
        &self.bytes[self.start(from)..self.start(to)]
    }

    /// How many labels are in front of `suffix`, when the name ends with it.
    #[inline]
    pub fn strip(&self, suffix: &Name) -> Option<usize> {
        let at = self.wire().len().checked_sub(suffix.wire().len())?;
        if self.wire()[at..] != *suffix.wire() {
            return None;
        }
        // Bytes that look like the suffix may begin inside of a label.
        if at == self.wire().len() - 1 {
            return Some(self.count());
        }
        self.starts[..self.count()].iter().position(|&start| usize::from(start) == at)
    }

    /// To be kept.
    pub fn to_name(&self) -> Name {
        Name(self.wire().into())
    }
}

impl PartialEq for Lower {
    fn eq(&self, other: &Self) -> bool {
        self.wire() == other.wire()
    }
}

impl Eq for Lower {}

impl fmt::Debug for Lower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_wire(self.wire(), f)
    }
}

impl fmt::Display for Lower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt_wire(self.wire(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (text, wire, shown) in [
            (".", &b"\0"[..], "."),
            ("", b"\0", "."),
            ("Redis.Default", b"\x05redis\x07default\0", "redis.default."),
            ("a.", b"\x01a\0", "a."),
            ("a\\.b.c", b"\x03a.b\x01c\0", "a\\.b.c."),
            ("a\\032b", b"\x03a b\0", "a\\032b."),
        ] {
            let name = Name::parse(text).unwrap();
            assert_eq!(name.wire(), wire, "{text}");
            assert_eq!(name.to_string(), shown);
            assert_eq!(Name::parse(&name.to_string()).unwrap(), name);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = format!("{}.example", "a".repeat(64));
        let longest = ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61)].join(".");
        assert!(Name::parse(&longest).is_ok());
        assert!(matches!(Name::parse(&format!("{longest}d")), Err(BadName::TooLong(_))));
        assert!(matches!(Name::parse(&long), Err(BadName::LongLabel(_))));
        assert!(matches!(Name::parse("a..b"), Err(BadName::EmptyLabel(_))));
        assert!(matches!(Name::parse(".a"), Err(BadName::EmptyLabel(_))));
        for text in ["a\\", "a\\1", "a\\999"] {
            assert!(matches!(Name::parse(text), Err(BadName::BadEscape(_))), "{text}");
        }
    }

    #[test]
    fn wire_that_is_cut_off_or_points_is_refused() {
        for wire in [&b""[..], b"\x03ab", b"\x03abc", b"\xc0\x0c", b"\x40aaaa", b"\x80\0"] {
            assert!(Lower::from_wire(wire).is_none(), "{wire:?}");
        }
        let mut many = Vec::new();
        for _ in 0..127 {
            many.extend(b"\x01a");
        }
        many.push(0);
        assert_eq!(Lower::from_wire(&many).unwrap().count(), 127);
        let mut more = many.clone();
        more.splice(0..0, *b"\x01a");
        assert!(Lower::from_wire(&more).is_none());
    }

    #[test]
    fn suffixes_are_found_at_labels_only() {
        let name = Lower::from_wire(b"\x05redis\x07Default\x03svc\0").unwrap();
        assert_eq!(name.strip(&Name::parse("svc").unwrap()), Some(2));
        assert_eq!(name.strip(&Name::parse("default.svc").unwrap()), Some(1));
        assert_eq!(name.strip(&Name::root()), Some(3));
        assert_eq!(name.strip(&Name::parse("redis.default.svc").unwrap()), Some(0));
        assert_eq!(name.strip(&Name::parse("x.redis.default.svc").unwrap()), None);
        // A label whose end looks like a whole one.
        let odd = Lower::from_wire(b"\x05a\x03svc\0").unwrap();
        assert_eq!(odd.strip(&Name::parse("svc").unwrap()), None);
        assert_eq!(name.label(1), b"default");
        assert_eq!(name.slice(0, 2), b"\x05redis\x07default");
        let joined = name.prefix_with(1, &Name::parse("example.org").unwrap()).unwrap();
        assert_eq!(joined.to_string(), "redis.example.org.");
    }
}
