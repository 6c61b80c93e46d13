//! Reading what upstream servers answer: records with their names written out.

use super::{CLASS_IN, HEADER, Section, flag, rtype, u16_at, u32_at};
use crate::name::{Lower, MAX_NAME};

/// Pointers that are followed in one name; each has to lead further to the front.
const MAX_POINTERS: usize = 64;

/// A message that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// A response.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    packet: &'a [u8],
    /// What it is an answer to.
    pub id: u16,
    /// Its flags.
    pub flags: u16,
    /// What was asked, in lower case.
    pub name: Lower,
    /// Type that was asked for.
    pub qtype: u16,
    /// Where the question ends.
    question_end: usize,
    counts: [u16; 3],
}

/// One record.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Where it belongs.
    pub section: Section,
    /// Owner, as written.
    pub owner: Written,
    /// Type.
    pub rtype: u16,
    /// Class; something else for OPT.
    pub class: u16,
    /// Time to live in seconds; something else for OPT.
    pub ttl: u32,
    /// Where its data are, and how many.
    data: (usize, usize),
}

/// Data of a record with names written out.
pub type RecordData<'s> = &'s [u8];

/// A name written out, its case kept.
#[derive(Clone, Copy)]
pub struct Written {
    bytes: [u8; MAX_NAME],
    len: u8,
}

impl Written {
    /// As on the wire.
    pub fn wire(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// In lower case.
    pub fn lower(&self) -> Lower {
        // It was made of labels.
        Lower::from_wire(self.wire()).unwrap_or_else(Lower::root)
    }
}

impl std::fmt::Debug for Written {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.lower().fmt(f)
    }
}

impl<'a> Message<'a> {
    /// Reads the header and the question of a response.
    ///
    /// # Errors
    /// It is no response to a query with one question.
    pub fn read(packet: &'a [u8]) -> Result<Self, Malformed> {
        let (Some(id), Some(flags)) = (u16_at(packet, 0), u16_at(packet, 2)) else {
            return Err(Malformed("has no header"));
        };
        let counts = [4, 6, 8, 10].map(|at| u16_at(packet, at));
        let [Some(questions), Some(answers), Some(authorities), Some(additional)] = counts else {
            return Err(Malformed("has no header"));
        };
        if flags & flag::QR == 0 {
            return Err(Malformed("is no response"));
        }
        if questions != 1 {
            return Err(Malformed("does not have one question"));
        }
        let name = Lower::from_wire(&packet[HEADER..]).ok_or(Malformed("has no name in its question"))?;
        let at = HEADER + name.wire().len();
        let (Some(qtype), Some(class)) = (u16_at(packet, at), u16_at(packet, at + 2)) else {
            return Err(Malformed("has no type in its question"));
        };
        if class != CLASS_IN {
            return Err(Malformed("is about another class"));
        }
        let counts = [answers, authorities, additional];
        Ok(Self { packet, id, flags, name, qtype, question_end: at + 4, counts })
    }

    /// The question, its case as sent back.
    pub fn question(&self) -> &'a [u8] {
        &self.packet[HEADER..self.question_end]
    }

    /// The code in the header.
    pub fn rcode(&self) -> u8 {
        (self.flags & 0xf) as u8
    }

    /// Whether it is cut off.
    pub fn truncated(&self) -> bool {
        self.flags & flag::TC != 0
    }

    /// Whether whom we asked validated the data.
    pub fn authentic(&self) -> bool {
        self.flags & flag::AD != 0
    }

    /// The records in order. Ends after the first that is malformed.
    pub fn records(&self) -> impl Iterator<Item = Result<Record, Malformed>> + use<'a> {
        let (packet, counts) = (self.packet, self.counts);
        let sections = [Section::Answer, Section::Authority, Section::Additional].into_iter().zip(counts);
        let mut sections =
            sections.flat_map(|(section, count)| std::iter::repeat_n(section, usize::from(count)));
        let mut at = Some(self.question_end);
        std::iter::from_fn(move || {
            let start = at?;
            let section = sections.next()?;
            match read_record(packet, start, section) {
                Ok((record, next)) => {
                    at = Some(next);
                    Some(Ok(record))
                }
                Err(error) => {
                    at = None;
                    Some(Err(error))
                }
            }
        })
    }

    /// Data of a record with its names written out, in `scratch`.
    ///
    /// # Errors
    /// They are not what the type demands.
    pub fn data<'s>(&self, record: &Record, scratch: &'s mut [u8; 1024]) -> Result<&'s [u8], Malformed>
    where
        'a: 's,
    {
        let (at, len) = record.data;
        let whole = &self.packet[at..at + len];
        // Names may be compressed in the types of RFC 1035 only (RFC 3597 section 4); some do it in SRV and DNAME.
        let (fixed, names) = match record.rtype {
            rtype::NS | rtype::CNAME | rtype::PTR | rtype::DNAME => (0, 1),
            rtype::MX => (2, 1),
            rtype::SRV => (6, 1),
            rtype::SOA => (0, 2),
            rtype::A if len != 4 => return Err(Malformed("has an address of another length")),
            rtype::AAAA if len != 16 => return Err(Malformed("has an address of another length")),
            _ => return Ok(whole),
        };
        let end = at + len;
        let mut to = 0;
        let mut put = |bytes: &[u8]| -> Result<(), Malformed> {
            let room =
                scratch.get_mut(to..to + bytes.len()).ok_or(Malformed("has data that are too long"))?;
            room.copy_from_slice(bytes);
            to += bytes.len();
            Ok(())
        };
        put(whole.get(..fixed).ok_or(Malformed("has data that are cut off"))?)?;
        let mut from = at + fixed;
        for _ in 0..names {
            let (name, next) = read_name(self.packet, from).ok_or(Malformed("has a malformed name"))?;
            if next > end {
                return Err(Malformed("has data that are cut off"));
            }
            put(name.wire())?;
            from = next;
        }
        let tail = if record.rtype == rtype::SOA { 20 } else { 0 };
        if end - from != tail {
            return Err(Malformed("has data of another length than their type"));
        }
        put(&self.packet[from..end])?;
        Ok(&scratch[..to])
    }
}

fn read_record(packet: &[u8], at: usize, section: Section) -> Result<(Record, usize), Malformed> {
    let (owner, at) = read_name(packet, at).ok_or(Malformed("has a malformed name"))?;
    let short = |offset| u16_at(packet, at + offset).ok_or(Malformed("is cut off"));
    let (rtype, class, len) = (short(0)?, short(2)?, usize::from(short(8)?));
    let ttl = u32_at(packet, at + 4).ok_or(Malformed("is cut off"))?;
    let start = at + 10;
    if start + len > packet.len() {
        return Err(Malformed("is cut off"));
    }
    Ok((Record { section, owner, rtype, class, ttl, data: (start, len) }, start + len))
}

/// A name with its pointers resolved, and where reading goes on.
fn read_name(packet: &[u8], start: usize) -> Option<(Written, usize)> {
    let mut name = Written { bytes: [0; MAX_NAME], len: 0 };
    let mut len = 0usize;
    let (mut at, mut next, mut lowest) = (start, None, start);
    let mut pointers = 0;
    loop {
        let first = *packet.get(at)?;
        match first >> 6 {
            0b00 => {
                let end = at + 1 + usize::from(first);
                let label = packet.get(at..end)?;
                let room = name.bytes.get_mut(len..len + label.len())?;
                room.copy_from_slice(label);
                len += label.len();
                at = end;
                if first == 0 {
                    break;
                }
            }
            0b11 => {
                let target = usize::from(u16_at(packet, at)? & 0x3fff);
                next = next.or(Some(at + 2));
                pointers += 1;
                // Only to the front: so it ends, whatever the packet.
                if target >= lowest || pointers > MAX_POINTERS {
                    return None;
                }
                (at, lowest) = (target, target);
            }
            _ => return None,
        }
    }
    name.len = u8::try_from(len).ok()?;
    Some((name, next.unwrap_or(at)))
}

/// Where the name ends that starts here.
pub(super) fn skip_name(packet: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let first = *packet.get(at)?;
        match first >> 6 {
            0b00 if first == 0 => return Some(at + 1),
            0b00 => at += 1 + usize::from(first),
            0b11 => return packet.get(at + 1).map(|_| at + 2),
            _ => return None,
        }
    }
}
