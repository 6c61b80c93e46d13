//! The file behind the pool: one line per change, each with its own checksum.
//!
//! ```text
//! complete
//! 4d3f0a91 {"boot":"0e3c…","version":1}
//! 91c0ffee {"op":"lease","id":"8f1c…","if":"eth0","addresses":["10.244.1.7"],"pod":"shop/checkout","at":51234}
//! 77aa0b12 {"op":"free","id":"8f1c…","if":"eth0","addresses":["10.244.1.7"],"at":59234}
//! ```
//!
//! A line is one `write`, not synced: the file has to survive the agent, not the machine, because no link
//! survives the machine either. A torn or damaged line is left out and reported. What cannot be written (disk full)
//! is made up for by writing the whole state anew, beside the file, and renaming it into place.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::{error, info};

use super::pool::{Lease, Owner};
use crate::ids::AttachmentId;

/// First line of a file that holds everything …
const MARK_COMPLETE: &[u8] = b"complete\n";
/// … and of one that lacks what could not be written.
const MARK_BEHIND: &[u8] = b"lacking!\n";
/// Layout of the lines; an unknown one counts as damage.
const VERSION: u32 = 1;
/// A journal that grew beyond this was not written by us.
const SIZE_MAX: u64 = 64 << 20;
/// Lines beyond what the state needs before the file is written anew.
const SLACK: usize = 1024;
/// Pause between two attempts to write after a failure.
const RETRY_EVERY: Duration = Duration::from_secs(5);

/// One change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Record {
    /// Addresses were leased.
    Lease {
        /// To whom.
        #[serde(flatten)]
        id: AttachmentId,
        /// Which.
        addresses: Vec<IpAddr>,
        /// For which pod and network.
        #[serde(flatten)]
        owner: Owner,
        /// When (milliseconds since boot).
        at: u64,
    },
    /// A lease ended.
    Free {
        /// Whose.
        #[serde(flatten)]
        id: AttachmentId,
        /// Which: they rest even when the line that leased them is lost.
        addresses: Vec<IpAddr>,
        /// When.
        at: u64,
    },
    /// Earlier lines were lost.
    Distrust {
        /// When that was noticed last.
        at: u64,
        /// How often.
        losses: u32,
    },
    /// A free address and when it was freed.
    Rest {
        /// Which.
        address: IpAddr,
        /// When.
        at: u64,
    },
}

impl From<&Lease> for Record {
    fn from(lease: &Lease) -> Self {
        Self::Lease {
            id: lease.id.clone(),
            addresses: lease.addresses.clone(),
            owner: lease.owner.clone(),
            at: lease.at,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    boot: String,
    version: u32,
}

/// Why a journal tells less than everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// There is no file.
    Missing,
    /// It is of an earlier boot of the machine: nothing in it is true any more.
    OtherBoot,
    /// It cannot be read at all.
    Unreadable(String),
    /// Something could not be written (a full disk), and then the agent died.
    Behind,
    /// Some lines are torn or damaged; the others were used.
    Lines {
        /// How many.
        bad: usize,
        /// Number of the first (from 1).
        first: usize,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("there is no file"),
            Self::OtherBoot => f.write_str("it is of an earlier boot"),
            Self::Unreadable(why) => f.write_str(why),
            Self::Behind => f.write_str("the agent died while it could not write"),
            Self::Lines { bad, first } => write!(f, "{bad} damaged lines, the first is line {first}"),
        }
    }
}

/// What a journal held.
#[derive(Debug, Default)]
pub struct Found {
    /// The readable changes, in order.
    pub records: Vec<Record>,
    /// Why there may be more.
    pub damage: Option<Damage>,
}

/// The open file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    boot: String,
    file: Option<File>,
    lines: usize,
    /// Lines right after the last compaction.
    needed: usize,
    /// When the last write failed; the file then lacks something.
    failed: Option<Instant>,
}

impl Journal {
    /// Reads the file. Nothing is written until [`Self::compact`] or [`Self::append`].
    #[must_use]
    pub fn open(path: &Path, boot: &str) -> (Self, Found) {
        let found = read(path, boot);
        let journal = Self {
            path: path.to_owned(),
            boot: boot.to_owned(),
            file: None,
            lines: 0,
            needed: 0,
            failed: None,
        };
        (journal, found)
    }

    /// Adds a change. A failure is logged and remembered, and the next [`Self::compact`] makes up for it.
    pub fn append(&mut self, record: &Record) {
        // After a failure the file may end in half a line, which would swallow this one.
        if self.failed.is_some() {
            return;
        }
        let result = self.file.as_mut().ok_or_else(|| io::Error::other("not open")).and_then(|file| {
            let line = line(record)?;
            match file.write(&line)? {
                n if n == line.len() => Ok(()),
                _ => Err(io::ErrorKind::WriteZero.into()),
            }
        });
        match result {
            Ok(()) => self.lines += 1,
            Err(error) => self.fail(&error),
        }
    }

    /// Writes the whole state beside the file and renames it into place.
    pub fn compact(&mut self, records: impl Iterator<Item = Record>) {
        match self.rewrite(records) {
            Ok(lines) => {
                if self.failed.take().is_some() {
                    info!(path = %self.path.display(), "the address journal is complete again");
                }
                self.lines = lines;
                self.needed = lines;
            }
            Err(error) => self.fail(&error),
        }
    }

    fn rewrite(&mut self, records: impl Iterator<Item = Record>) -> io::Result<usize> {
        let beside = self.path.with_extension("new");
        let mut text = MARK_COMPLETE.to_vec();
        text.extend_from_slice(&line(&Header { boot: self.boot.clone(), version: VERSION })?);
        let mut lines = 1;
        for record in records {
            text.extend_from_slice(&line(&record)?);
            lines += 1;
        }
        // 0600: the file tells which pods run here.
        let options = || {
            let mut options = OpenOptions::new();
            options.mode(0o600);
            options
        };
        let written = options()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&beside)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&beside, &self.path));
        if let Err(error) = written {
            fs::remove_file(&beside).ok();
            return Err(error);
        }
        self.file = Some(options().append(true).open(&self.path)?);
        Ok(lines)
    }

    fn fail(&mut self, error: &io::Error) {
        if self.failed.is_none() {
            error!(path = %self.path.display(), %error,
                "the address journal cannot be written; attaching goes on, and a restart of the agent rebuilds \
                 from the kernel what is missing here");
            // Should the agent die before it can write again, the next one has to see that something is
            // missing. Writing over what is there needs no space.
            if let Ok(file) = OpenOptions::new().write(true).open(&self.path) {
                file.write_all_at(MARK_BEHIND, 0).ok();
            }
        }
        self.failed = Some(Instant::now());
    }

    /// Whether the file has grown enough to be written anew.
    #[must_use]
    pub fn wants_compaction(&self) -> bool {
        self.failed.is_none() && self.lines > 2 * self.needed + SLACK
    }

    /// Whether the file lacks something.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.failed.is_some()
    }

    /// Whether it lacks something and enough time has passed to try again.
    #[must_use]
    pub fn may_retry(&self) -> bool {
        self.failed.is_some_and(|at| at.elapsed() >= RETRY_EVERY)
    }
}

fn line(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let json = serde_json::to_string(value)?;
    Ok(format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())).into_bytes())
}

fn parse<T: serde::de::DeserializeOwned>(line: &[u8]) -> Option<T> {
    let (sum, json) = line.split_at_checked(9)?;
    let sum = u32::from_str_radix(std::str::from_utf8(sum).ok()?.strip_suffix(' ')?, 16).ok()?;
    if crc32fast::hash(json) != sum {
        return None;
    }
    serde_json::from_slice(json).ok()
}

fn read(path: &Path, boot: &str) -> Found {
    let unreadable = |why: String| Found { records: Vec::new(), damage: Some(Damage::Unreadable(why)) };
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Found { records: Vec::new(), damage: Some(Damage::Missing) };
        }
        Err(e) => return unreadable(format!("cannot open it: {e}")),
    };
    match file.metadata() {
        Ok(metadata) if !metadata.is_file() => return unreadable("it is no regular file".into()),
        Ok(metadata) if metadata.len() > SIZE_MAX => {
            return unreadable(format!("it has {} bytes, more than this agent ever writes", metadata.len()));
        }
        Ok(_) => {}
        Err(e) => return unreadable(format!("cannot look at it: {e}")),
    }
    let mut text = Vec::new();
    if let Err(e) = file.read_to_end(&mut text) {
        return unreadable(format!("cannot read it: {e}"));
    }
    decode(&text, boot)
}

fn decode(text: &[u8], boot: &str) -> Found {
    let mut lines = text.split_inclusive(|b| *b == b'\n').enumerate();
    let mark = lines.next().map_or(&[][..], |(_, mark)| mark);
    let header = lines.next().and_then(|(_, l)| parse::<Header>(l.strip_suffix(b"\n")?));
    match header {
        Some(header) if header.version != VERSION => {
            let why = format!("it has layout {}, this agent knows {VERSION}", header.version);
            return Found { records: Vec::new(), damage: Some(Damage::Unreadable(why)) };
        }
        Some(header) if header.boot != boot => {
            return Found { records: Vec::new(), damage: Some(Damage::OtherBoot) };
        }
        Some(_) => {}
        None => {
            let why = "its header line is damaged".to_owned();
            return Found { records: Vec::new(), damage: Some(Damage::Unreadable(why)) };
        }
    }
    let mut found = Found::default();
    let mut bad: Vec<usize> = Vec::new();
    for (index, line) in lines {
        // A line without its end is torn even when its sum happens to be right.
        match line.strip_suffix(b"\n").and_then(parse::<Record>) {
            Some(record) => found.records.push(record),
            None => bad.push(index + 1),
        }
    }
    if mark == MARK_BEHIND {
        found.damage = Some(Damage::Behind);
    } else if mark != MARK_COMPLETE {
        found.damage = Some(Damage::Lines { bad: bad.len() + 1, first: 1 });
    } else if let Some(first) = bad.first() {
        found.damage = Some(Damage::Lines { bad: bad.len(), first: *first });
    }
    found
}

#[cfg(test)]
impl Journal {
    /// From now on every write fails as on a full disk, until the file is written anew.
    pub(crate) fn break_for_test(&mut self) {
        if self.failed.is_none() {
            self.file = Some(OpenOptions::new().write(true).open("/dev/full").expect("/dev/full"));
        }
    }
}
