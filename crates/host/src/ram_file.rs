//! A region of guest RAM as a file: what all can do with it who hold its descriptor.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::OnceLock;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstat, fstatfs, seek};
use rustix::io::Errno;

use crate::Error;
use crate::sys::map::Map;
use crate::vm::Sharing;

/// Most data extents of a region: what is more fragmented is read with its holes closed up to pages anyway.
const EXTENTS_MAX: usize = 4 << 20;
/// File system of huge pages, see statfs(2).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// A region of guest RAM.
#[derive(Debug)]
pub(crate) struct RamFile {
    pub(crate) file: File,
    size_bytes: u64,
    huge: bool,
    /// Where it has huge pages: their file can be read but not written.
    map: OnceLock<Map>,
}

impl RamFile {
    /// Checks that it has this size.
    pub(crate) fn new(file: File, name: &str, size_bytes: u64) -> Result<Self, Error> {
        // Not by the standard library, which asks with a call that also takes paths: a confined process has none of those.
        let len = fstat(&file).map_err(Error::call("fstat"))?.st_size;
        if u64::try_from(len) != Ok(size_bytes) || !size_bytes.is_multiple_of(crate::vm::PAGE_SIZE)
        {
            return Err(Error::Ram(format!(
                "backend {name:?} has {len} bytes, expected {size_bytes}"
            )));
        }
        let file_system = fstatfs(&file).map_err(Error::call("fstatfs"))?.f_type;
        Ok(Self {
            file,
            size_bytes,
            huge: file_system.cast_unsigned() == HUGETLBFS_MAGIC,
            map: OnceLock::new(),
        })
    }

    /// Whether it has huge pages.
    pub(crate) fn is_huge(&self) -> bool {
        self.huge
    }

    /// A descriptor for another process.
    pub(crate) fn share(&self, sharing: Sharing) -> Result<OwnedFd, Error> {
        // Opened anew, so that neither its access nor its position is ours.
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let writes = sharing == Sharing::ReadWrite;
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(writes);
        options.custom_flags(libc::O_CLOEXEC);
        let file = options.open(path).map_err(Error::io("opening guest RAM"))?;
        Ok(file.into())
    }

    fn is_empty_file(&self) -> Result<bool, Error> {
        Ok(fstat(&self.file).map_err(Error::call("fstat"))?.st_blocks == 0)
    }

    /// See [`crate::vm::GuestRam::data_extents`].
    pub(crate) fn data_extents(&self) -> Result<Vec<Range<u64>>, Error> {
        let size = self.size_bytes;
        if self.huge {
            // Holes of huge pages can't be looked for, but reading them does not fill them.
            let empty = self.is_empty_file()?;
            return Ok(std::iter::once(0..size).filter(|_| !empty).collect());
        }
        let mut extents = Vec::new();
        let mut at = 0;
        while at < size {
            let start = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) if start < size => start,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(errno) => return Err(Error::call("lseek(SEEK_DATA)")(errno)),
            };
            let end = seek(&self.file, SeekFrom::Hole(start))
                .map_err(Error::call("lseek(SEEK_HOLE)"))?
                .min(size);
            if extents.len() >= EXTENTS_MAX || end <= start {
                return Err(Error::Ram(
                    "the extents of guest RAM make no sense".to_owned(),
                ));
            }
            extents.push(start..end);
            at = end;
        }
        Ok(extents)
    }

    /// See [`crate::vm::GuestRam::read`].
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.file
            .read_exact_at(buffer, offset)
            .map_err(Error::io("reading guest RAM"))
    }

    /// See [`crate::vm::GuestRam::write`].
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let end = offset.checked_add(bytes.len() as u64);
        // A write behind the end would grow the file.
        if end.is_none_or(|end| end > self.size_bytes) {
            return Err(Error::Ram("a write outside the region".to_owned()));
        }
        if self.huge {
            if self.map.get().is_none() {
                // Another thread may be faster: then this one is not needed.
                let _ = self.map.set(Map::new(&self.file, self.size_bytes)?);
            }
            if let Some(map) = self.map.get() {
                return map.write(offset, bytes);
            }
        }
        self.file
            .write_all_at(bytes, offset)
            .map_err(Error::io("writing guest RAM"))
    }

    /// See [`crate::vm::GuestRam::discard`].
    pub(crate) fn discard(&self, range: &Range<u64>) -> Result<(), Error> {
        let end = range.end.min(self.size_bytes);
        if range.start >= end {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, range.start, end - range.start)
            .map_err(Error::call("fallocate(PUNCH_HOLE)"))?;
        if self.huge {
            return Ok(());
        }
        // A part of a huge page that can't be split just now is zeroed and stays: there it would not be missing.
        match seek(&self.file, SeekFrom::Data(range.start)) {
            Ok(at) if at < end => Err(Error::Ram(format!(
                "memory at {at:#x} was not given back; turn off transparent huge pages of shared memory"
            ))),
            Ok(_) | Err(Errno::NXIO) => Ok(()),
            Err(errno) => Err(Error::call("lseek(SEEK_DATA)")(errno)),
        }
    }
}
