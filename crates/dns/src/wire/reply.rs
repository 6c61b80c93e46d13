//! Writing responses into a buffer that the caller has. What does not fit is left out, and the response says so.

use super::{CLASS_IN, Edns, HEADER, QNAME, Query, Rcode, Refused, flag, rtype};

/// Places of names that later ones can point to.
const REMEMBERED: usize = 16;
/// Length of an OPT record without options.
const OPT_LEN: usize = 11;

/// Parts of a message behind its question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// What was asked for.
    Answer,
    /// Why there is nothing, or who knows.
    Authority,
    /// What will be asked for next.
    Additional,
}

/// A response on its way into a buffer.
pub struct Reply<'b> {
    buffer: &'b mut [u8],
    len: usize,
    /// Where it has to end, with room for OPT.
    limit: usize,
    counts: [u16; 3],
    flags: u16,
    rcode: Rcode,
    edns: Option<Edns>,
    truncated: bool,
    /// Where names of records have been written.
    names: [u16; REMEMBERED],
    remembered: usize,
}

impl<'b> Reply<'b> {
    /// Starts a response to a query: header and question as sent. `limit` is the longest that may be sent.
    #[inline]
    pub fn new(query: &Query<'_>, buffer: &'b mut [u8], limit: usize) -> Self {
        let flags = query.flags & (flag::RD | flag::CD) | flag::QR;
        Self::start(query.id, flags, query.question(), query.edns, buffer, limit)
    }

    fn start(
        id: u16,
        flags: u16,
        question: &[u8],
        edns: Option<Edns>,
        buffer: &'b mut [u8],
        limit: usize,
    ) -> Self {
        let len = HEADER + question.len();
        let reserve = if edns.is_some() { OPT_LEN } else { 0 };
        let limit = limit.min(buffer.len()).saturating_sub(reserve);
        let mut reply = Self {
            buffer,
            len,
            limit,
            counts: [0; 3],
            flags,
            rcode: Rcode::NoError,
            edns,
            truncated: false,
            names: [0; REMEMBERED],
            remembered: 0,
        };
        if let Some(head) = reply.buffer.get_mut(..len) {
            head[..2].copy_from_slice(&id.to_be_bytes());
            head[2..HEADER].fill(0);
            head[5] = u8::from(!question.is_empty());
            head[HEADER..].copy_from_slice(question);
        } else {
            reply.len = 0;
            reply.limit = 0;
        }
        reply
    }

    /// A whole response to what is no query that can be answered: the header, and the question where it could be
    /// read. Its length, 0 when nobody gets one.
    pub fn refuse(refused: &Refused<'_>, buffer: &mut [u8]) -> usize {
        let Refused::Answered { rcode, packet, question_end, edns } = *refused else { return 0 };
        let (Some(id), Some(flags)) = (super::u16_at(packet, 0), super::u16_at(packet, 2)) else { return 0 };
        let kept = flag::RD | flag::CD | (0xf << 11);
        let question = question_end.and_then(|end| packet.get(HEADER..end)).unwrap_or_default();
        let limit = super::PLAIN_UDP;
        let mut reply = Reply::start(id, flags & kept | flag::QR, question, edns, buffer, limit);
        reply.rcode(rcode);
        reply.finish()
    }

    /// Sets what became of the query.
    pub fn rcode(&mut self, rcode: Rcode) {
        self.rcode = rcode;
    }

    /// Says that the answerer is an authority.
    pub fn authoritative(&mut self) {
        self.flags |= flag::AA;
    }

    /// Says that the answerer would ask others.
    pub fn recursion_available(&mut self) {
        self.flags |= flag::RA;
    }

    /// Says that the data were validated by whom we asked.
    pub fn authentic_data(&mut self) {
        self.flags |= flag::AD;
    }

    /// Says that the response is cut off.
    pub fn truncate(&mut self) {
        self.truncated = true;
    }

    /// Whether something was left out that the client has to know about.
    pub fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// How many records a section has so far.
    pub fn count(&self, section: Section) -> u16 {
        self.counts[section as usize]
    }

    /// Room that is left.
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.len)
    }

    /// Appends whole records that have been written before. Sections have to come in order.
    #[inline]
    pub fn raw(&mut self, section: Section, count: u16, records: &[u8]) -> bool {
        if self.room() < records.len() {
            self.left_out(section);
            return false;
        }
        self.buffer[self.len..self.len + records.len()].copy_from_slice(records);
        self.len += records.len();
        self.counts[section as usize] += count;
        true
    }

    /// Appends a record whose owner is named by a pointer to `owner` (a place in this message).
    #[inline]
    pub fn pointed(
        &mut self,
        section: Section,
        owner: u16,
        rtype: u16,
        ttl: u32,
        rdata: &[&[u8]],
    ) -> Option<usize> {
        let rdlen: usize = rdata.iter().map(|part| part.len()).sum();
        let Ok(short) = u16::try_from(rdlen) else { return None };
        // A pointer has 14 bits.
        if self.room() < 12 + rdlen || owner >= 0x4000 {
            self.left_out(section);
            return None;
        }
        let at = self.len;
        let head = &mut self.buffer[at..at + 12];
        head[..2].copy_from_slice(&(0xc000 | owner).to_be_bytes());
        head[2..4].copy_from_slice(&rtype.to_be_bytes());
        head[4..6].copy_from_slice(&CLASS_IN.to_be_bytes());
        head[6..10].copy_from_slice(&ttl.to_be_bytes());
        head[10..12].copy_from_slice(&short.to_be_bytes());
        let mut to = at + 12;
        for part in rdata {
            self.buffer[to..to + part.len()].copy_from_slice(part);
            to += part.len();
        }
        self.len = to;
        self.counts[section as usize] += 1;
        Some(at + 12)
    }

    /// Appends a record whose owner is written out, or points to where the same name is already. Neither the owner
    /// nor names in `rdata` may be compressed.
    pub fn record(
        &mut self,
        section: Section,
        owner: &[u8],
        rtype: u16,
        class: u16,
        ttl: u32,
        rdata: &[u8],
    ) -> bool {
        let Ok(rdlen) = u16::try_from(rdata.len()) else { return false };
        let known = self.find(owner);
        let owner_len = if known.is_some() { 2 } else { owner.len() };
        if self.room() < owner_len + 10 + rdata.len() {
            self.left_out(section);
            return false;
        }
        let at = self.len;
        match known {
            Some(place) => self.buffer[at..at + 2].copy_from_slice(&(0xc000 | place).to_be_bytes()),
            None => {
                self.buffer[at..at + owner_len].copy_from_slice(owner);
                self.remember(at);
            }
        }
        let head = &mut self.buffer[at + owner_len..at + owner_len + 10];
        head[..2].copy_from_slice(&rtype.to_be_bytes());
        head[2..4].copy_from_slice(&class.to_be_bytes());
        head[4..8].copy_from_slice(&ttl.to_be_bytes());
        head[8..10].copy_from_slice(&rdlen.to_be_bytes());
        let data = at + owner_len + 10;
        self.buffer[data..data + rdata.len()].copy_from_slice(rdata);
        self.len = data + rdata.len();
        self.counts[section as usize] += 1;
        // What a CNAME names owns the next record.
        if rtype == rtype::CNAME {
            self.remember(data);
        }
        true
    }

    /// Remembers a name at this place, to be pointed to.
    pub fn remember(&mut self, at: usize) {
        if let Ok(at) = u16::try_from(at)
            && at < 0x4000
            && self.remembered < REMEMBERED
        {
            self.names[self.remembered] = at;
            self.remembered += 1;
        }
    }

    /// Appends OPT, writes the header, and says how long the response is.
    #[inline]
    pub fn finish(mut self) -> usize {
        if self.len < HEADER {
            return 0;
        }
        let rcode = self.rcode.number();
        if self.truncated {
            self.flags |= flag::TC;
        }
        let mut additional = self.counts[2];
        if let Some(edns) = self.edns {
            let at = self.len;
            if let Some(record) = self.buffer.get_mut(at..at + OPT_LEN) {
                record.fill(0);
                record[1..3].copy_from_slice(&rtype::OPT.to_be_bytes());
                record[3..5].copy_from_slice(&(super::MAX_UDP as u16).to_be_bytes());
                record[5] = (rcode >> 4) as u8;
                record[7] = if edns.dnssec { 0x80 } else { 0 };
                self.len += OPT_LEN;
                additional += 1;
            }
        }
        self.buffer[2..4].copy_from_slice(&(self.flags | rcode & 0xf).to_be_bytes());
        for (at, count) in [(6, self.counts[0]), (8, self.counts[1]), (10, additional)] {
            self.buffer[at..at + 2].copy_from_slice(&count.to_be_bytes());
        }
        self.len
    }

    fn find(&self, owner: &[u8]) -> Option<u16> {
        let question = std::iter::once(QNAME);
        let mut places = question.chain(self.names[..self.remembered].iter().copied());
        places.find(|&place| {
            let there = self.buffer.get(usize::from(place)..usize::from(place) + owner.len());
            there.is_some_and(|there| there.eq_ignore_ascii_case(owner)) && owner.len() > 2
        })
    }

    /// Additional records are a courtesy (RFC 2181 section 9); without the others the client has to come by TCP.
    fn left_out(&mut self, section: Section) {
        self.truncated |= section != Section::Additional;
    }
}
