//! A mapping of shared memory, for files that can be written no other way (those of huge pages).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use super::check;
use crate::Error;

/// A shared, writable mapping of a whole file.
#[derive(Debug)]
pub(crate) struct Map {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is not bound to a thread, and is only written to, by copies that need no exclusive access:
// whoever else shares the memory reads or writes it at any time anyway.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// Maps the first `len` bytes.
    pub(crate) fn new(file: &File, len: u64) -> Result<Self, Error> {
        let failed = |source| Error::Syscall {
            call: "mmap",
            source,
        };
        let len = usize::try_from(len).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        // SAFETY: a new mapping at an address that the kernel chooses touches no other memory of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let start =
            NonNull::new(start.cast()).ok_or_else(|| failed(io::ErrorKind::Other.into()))?;
        Ok(Self { start, len })
    }

    /// Copies the bytes to `offset`. Pages that can't be had are an error and no signal.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let fits = start
            .checked_add(bytes.len())
            .is_some_and(|end| end <= self.len);
        if !fits {
            return Err(Error::Ram("a write outside the region".to_owned()));
        }
        let within = start % 4096;
        // SAFETY: `start` lies within the mapping, as checked above.
        let (from, page) = unsafe {
            let from = self.start.as_ptr().add(start);
            (from, from.sub(within))
        };
        // SAFETY: populating pages of our own mapping changes no contents.
        let result =
            unsafe { libc::madvise(page.cast(), bytes.len() + within, libc::MADV_POPULATE_WRITE) };
        check("madvise(MADV_POPULATE_WRITE)", result.into())?;
        // SAFETY: the destination lies within the mapping, which lives as long as `self`, and does not overlap a slice
        // of ours: nothing else of this process points into it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), from, bytes.len()) };
        Ok(())
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `new` and nobody points into it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_is_written_is_in_the_file_and_nothing_goes_beyond_its_end() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let map = Map::new(&file, 8192).unwrap();
        map.write(5000, b"seen").unwrap();
        let mut read = [0; 4];
        file.read_exact_at(&mut read, 5000).unwrap();
        assert_eq!(&read, b"seen");
        assert!(map.write(8190, b"seen").is_err());
        assert!(map.write(u64::MAX, b"seen").is_err());
    }
}
