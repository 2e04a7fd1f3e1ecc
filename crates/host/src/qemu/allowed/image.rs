//! Which other files a disk image of format qcow2 names. QEMU opens them without being asked, and whoever wrote to the
//! image chose them: a guest with a raw disk can write a header of this format there.
//!
//! Layout: `docs/interop/qcow2.txt` of QEMU.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Longest name of a backing file that QEMU accepts.
const NAME_MAX: u32 = 1023;
/// Incompatible feature: the contents are in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
/// Header extension: format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSIONS_MAX: usize = 32;
/// Length of a version 2 header; version 3 tells its own.
const HEADER_LEN: u64 = 72;
/// Largest cluster; header, extensions and the name of the backing file are within the first.
const CLUSTER_MAX: u64 = 2 << 20;

/// A file behind an image.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Backing {
    /// As QEMU would open it.
    pub(super) path: PathBuf,
    /// `raw` or `qcow2`.
    pub(super) format: String,
}

/// The file behind a qcow2 image, or why the image can't be accepted.
pub(super) fn backing(image: &Path) -> Result<Option<Backing>, String> {
    let file = File::open(image).map_err(|error| format!("the image cannot be read ({error})"))?;
    let header = Header(&file);
    if header.bytes(0)? != MAGIC {
        return Err("the image is not of format qcow2".to_owned());
    }
    let version = header.number(4)?;
    let extensions_at = match version {
        2 => HEADER_LEN,
        3 => {
            if header.long(72)? & EXTERNAL_DATA != 0 {
                return Err("the image has its contents in another file".to_owned());
            }
            u64::from(header.number(100)?)
        }
        _ => return Err(format!("version {version} of qcow2 is not known")),
    };
    let name_at = header.long(8)?;
    if name_at == 0 {
        return Ok(None);
    }
    let length = header.number(16)?;
    let fits = name_at
        .checked_add(length.into())
        .is_some_and(|end| end <= CLUSTER_MAX);
    if length == 0 || length > NAME_MAX || !fits {
        return Err("the image's header makes no sense".to_owned());
    }
    let mut name = vec![0; length as usize];
    header.read(&mut name, name_at)?;
    let name = String::from_utf8(name).map_err(|_| "the backing file has no proper name")?;
    // A colon makes a protocol or `json:` of it, a NUL ends what QEMU reads.
    if name.contains([':', '\0']) {
        return Err(format!("{name:?} behind the image is not a plain file"));
    }
    let format = header.backing_format(extensions_at, name_at)?;
    let format = format.ok_or("the image does not tell the format of the file behind it")?;
    if format != "raw" && format != "qcow2" {
        return Err(format!(
            "format {format:?} behind the image is not accepted"
        ));
    }
    // Relative to where the image lies; an absolute name replaces that.
    let directory = image.parent().unwrap_or(Path::new("/"));
    Ok(Some(Backing {
        path: directory.join(name),
        format,
    }))
}

struct Header<'a>(&'a File);

impl Header<'_> {
    fn read(&self, buffer: &mut [u8], at: u64) -> Result<(), String> {
        self.0
            .read_exact_at(buffer, at)
            .map_err(|error| format!("the image's header cannot be read ({error})"))
    }

    fn bytes<const N: usize>(&self, at: u64) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.read(&mut bytes, at)?;
        Ok(bytes)
    }

    fn number(&self, at: u64) -> Result<u32, String> {
        Ok(u32::from_be_bytes(self.bytes(at)?))
    }

    fn long(&self, at: u64) -> Result<u64, String> {
        Ok(u64::from_be_bytes(self.bytes(at)?))
    }

    /// The extension that names the format of the backing file, if there is one before `end`.
    fn backing_format(&self, start: u64, end: u64) -> Result<Option<String>, String> {
        let mut at = start;
        let mut found = None;
        for _ in 0..EXTENSIONS_MAX {
            if at >= end {
                return Ok(found);
            }
            let (kind, length) = (self.number(at)?, self.number(at + 4)?);
            if kind == 0 {
                return Ok(found);
            }
            let data_at = at + 8;
            if u64::from(length) > end.saturating_sub(data_at) {
                return Err("an extension of the image's header makes no sense".to_owned());
            }
            if kind == BACKING_FORMAT {
                // QEMU reads at most 15 bytes; a second one would replace the first.
                if found.is_some() || length > 15 {
                    return Err("the format behind the image can be read in two ways".to_owned());
                }
                let mut name = vec![0; length as usize];
                self.read(&mut name, data_at)?;
                let name = String::from_utf8(name).map_err(|_| "a format has no proper name")?;
                found = Some(name);
            }
            at = data_at + u64::from(length).next_multiple_of(8);
        }
        Err("the image's header has too many extensions".to_owned())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::qemu::allowed) const FORMAT: u32 = BACKING_FORMAT;

    /// A header of version 3 with a backing file, and these extensions.
    pub(in crate::qemu::allowed) fn header(name: &str, extensions: &[(u32, &str)]) -> Vec<u8> {
        let mut bytes = vec![0; 104];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 3;
        bytes[23] = 16;
        bytes[103] = 104;
        for (kind, text) in extensions {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            bytes.extend(text.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
        if !name.is_empty() {
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
            bytes.extend(name.as_bytes());
        }
        bytes.resize(4096, 0);
        bytes
    }

    fn judged(bytes: &[u8]) -> Result<Option<Backing>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, bytes).unwrap();
        let found = backing(&path)?;
        Ok(found.map(|found| Backing {
            path: found
                .path
                .strip_prefix(dir.path())
                .map_or_else(|_| found.path.clone(), Path::to_owned),
            ..found
        }))
    }

    #[test]
    fn the_file_behind_an_image_is_found() {
        assert_eq!(judged(&header("", &[])), Ok(None));
        for (name, format) in [("base.img", "raw"), ("/etc/shadow", "qcow2")] {
            let bytes = header(name, &[(7, "x"), (FORMAT, format)]);
            let expected = Backing {
                path: name.into(),
                format: format.to_owned(),
            };
            assert_eq!(judged(&bytes), Ok(Some(expected)));
        }
    }

    #[test]
    fn an_image_that_can_be_read_in_two_ways_is_refused() {
        let raw = (FORMAT, "raw");
        let mut external = header("", &[]);
        external[79] = 4;
        let mut other_version = header("", &[]);
        other_version[7] = 1;
        let mut endless = header("a", &[raw]);
        endless[16..20].fill(0xff);
        for bytes in [
            vec![],
            vec![0; 4096],
            external,
            other_version,
            endless,
            header("a", &[]),
            header("a", &[raw, raw]),
            header("a", &[(FORMAT, "vvfat")]),
            header("nbd://h/x", &[raw]),
            header("json:{}", &[raw]),
            header("a", &[(1, "x"); 40]),
        ] {
            assert!(judged(&bytes).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read_without_panic(
            noise in prop::collection::vec(any::<u8>(), 0..200),
            at in 8_usize..104,
            bytes in prop::collection::vec(any::<u8>(), 1..16),
        ) {
            let _ = judged(&[&MAGIC[..], &[0, 0, 0, 3], &noise].concat());
            let mut almost = header("base", &[(FORMAT, "raw")]);
            almost[at..at + bytes.len()].copy_from_slice(&bytes);
            let _ = judged(&almost);
        }
    }
}
