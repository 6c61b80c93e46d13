//! A cpio archive in the format that the kernel unpacks as its first root (`newc`, see
//! Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! It is not compressed: an emulated processor takes longer to inflate it than to copy it.

use std::collections::BTreeSet;

use anyhow::{Context, Result};

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive in memory. Paths are relative to the root, without a leading slash.
#[derive(Clone, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// Adds a directory, and those above it. One that is there stays as it is.
    pub(super) fn directory(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/');
        let ends = path.match_indices('/').map(|(i, _)| i).chain([path.len()]);
        for end in ends {
            if end > 0 && self.directories.insert(path[..end].to_owned()) {
                self.entry(&path[..end], DIRECTORY | 0o755, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    /// Adds a file with these permissions, and the directories above it.
    pub(super) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.above(path)?;
        self.entry(path, REGULAR | mode, (0, 0), content)
    }

    /// Adds a symbolic link, and the directories above it.
    pub(super) fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.above(path)?;
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device, and the directories above it.
    pub(super) fn character_device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.above(path)?;
        self.entry(path, CHARACTER | 0o600, (major, minor), &[])
    }

    /// The archive's bytes.
    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }

    fn above(&mut self, path: &str) -> Result<()> {
        match path.rsplit_once('/') {
            Some((above, _)) => self.directory(above),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len())
            .with_context(|| format!("{path} is too long for a cpio archive (4 GiB)"))?;
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // Inode, mode, owner, group, links, time, size, device of the archive, device of the entry, length of
        // the name with its end, checksum (not used in this format).
        let name_size = u32::try_from(path.len() + 1).context("a path is too long for a cpio archive")?;
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (name, mode, content) of every entry, read as the kernel reads it.
    fn entries(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut all = Vec::new();
        let mut rest = 0;
        while rest < bytes.len() {
            assert_eq!(&bytes[rest..rest + 6], b"070701");
            let field = |i: usize| {
                let at = rest + 6 + i * 8;
                u32::from_str_radix(std::str::from_utf8(&bytes[at..at + 8]).unwrap(), 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = &bytes[rest + 110..rest + 110 + name_size - 1];
            let content = (rest + 110 + name_size).next_multiple_of(4);
            all.push((
                String::from_utf8(name.to_vec()).unwrap(),
                mode,
                bytes[content..content + size].to_vec(),
            ));
            rest = (content + size).next_multiple_of(4);
        }
        all
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_once() {
        let mut archive = Archive::default();
        archive.file("usr/bin/tool", 0o755, b"12345").unwrap();
        archive.symlink("usr/bin/other", "tool").unwrap();
        archive.directory("usr/lib").unwrap();
        archive.character_device("dev/console", 5, 1).unwrap();
        archive.file("init", 0o755, b"").unwrap();
        let entries = entries(&archive.finish().unwrap());
        let names: Vec<_> = entries.iter().map(|(name, mode, _)| (name.as_str(), *mode)).collect();
        let wanted = [
            ("usr", 0o040_755),
            ("usr/bin", 0o040_755),
            ("usr/bin/tool", 0o100_755),
            ("usr/bin/other", 0o120_777),
            ("usr/lib", 0o040_755),
            ("dev", 0o040_755),
            ("dev/console", 0o020_600),
            ("init", 0o100_755),
            ("TRAILER!!!", 0),
        ];
        assert_eq!(names, wanted);
        assert_eq!(entries[2].2, b"12345");
        assert_eq!(entries[3].2, b"tool");
    }
}
