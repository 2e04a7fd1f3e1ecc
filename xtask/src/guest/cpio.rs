//! Archives in the format the kernel unpacks as initial RAM disk: cpio "newc"
//! (`Documentation/driver-api/early-userspace/buffer-format.rst` in the kernel's source).
//!
//! Written here rather than by cpio(1) so that the image depends on its content alone, not on
//! who builds it and when, and so that device nodes need no privilege.

use std::io::Write as _;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive in the making.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory; its parents must have been added.
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a file that everybody may read and execute.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, FILE | 0o755, (0, 0), content);
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.entry(path, LINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[]);
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries, // inode number
            mode,
            0, // user
            0, // group
            1, // links
            0, // time of change
            u32::try_from(content.len()).expect("a file of a test guest is small"),
            0, // device of the file system
            0,
            device.0,
            device.1,
            u32::try_from(path.len() + 1).expect("a path is short"),
            0, // checksum, unused in this variant
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            write!(self.bytes, "{field:08X}").expect("memory can be written");
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_trailer_is_last() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/x", b"abcde");
        archive.link("bin/y", "x");
        archive.character_device("console", 5, 1);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<usize> = (0..bytes.len())
            .filter(|at| bytes[*at..].starts_with(b"070701"))
            .collect();
        assert_eq!(starts.len(), 5);
        assert!(starts.iter().all(|at| at % 4 == 0));
        assert!(bytes[starts[4]..].windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn a_header_has_110_bytes_and_the_size_of_the_content() {
        let mut archive = Archive::default();
        archive.file("a", b"12345");
        let text = String::from_utf8(archive.finish()).unwrap();
        assert_eq!(&text[54..62], "00000005");
        assert_eq!(&text[94..102], "00000002");
        assert_eq!(&text[110..112], "a\0");
        assert_eq!(&text[112..117], "12345");
    }
}
