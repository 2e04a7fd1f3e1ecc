//! userfaultfd(2) with asynchronous write protection, and `PAGEMAP_SCAN` (Linux 6.7).
//!
//! Constants and layouts: `linux/userfaultfd.h` and `linux/fs.h`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::Error;

/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC`
const FEATURES: u64 = 1 << 12 | 1 << 13 | 1 << 15;
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_REGISTER_MODE_WP: u64 = 2;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_WRITTEN: u64 = 2;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 2;
/// Most ranges that one scan gives; it goes on where they end.
const RANGES: usize = 4096;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<PmScanArg>() == 96);

/// Announces what we want of a userfaultfd.
pub(crate) fn enable(uffd: &OwnedFd) -> Result<(), Error> {
    let mut arg = UffdioApi {
        api: UFFD_API,
        features: FEATURES,
        ioctls: 0,
    };
    // SAFETY: the kernel reads and writes a live structure of the layout that this request has.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut arg) };
    check("UFFDIO_API (Linux 6.7 or newer is needed)", result.into())
}

/// Write-protects a range of the process that the userfaultfd belongs to, asynchronously.
pub(crate) fn register(uffd: &OwnedFd, range: &Range<u64>) -> Result<(), Error> {
    let mut arg = UffdioRegister {
        start: range.start,
        len: range.end.saturating_sub(range.start),
        mode: UFFDIO_REGISTER_MODE_WP,
        ioctls: 0,
    };
    // SAFETY: as above; the range concerns the other process, whose contents are not changed by it.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) };
    check("UFFDIO_REGISTER", result.into())
}

/// Ends the protection of a range at once, whoever else still holds the descriptor.
pub(crate) fn unregister(uffd: &OwnedFd, range: &Range<u64>) -> Result<(), Error> {
    let mut arg = UffdioRange {
        start: range.start,
        len: range.end.saturating_sub(range.start),
    };
    // SAFETY: the kernel reads a live structure of the layout that this request has.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut arg) };
    check("UFFDIO_UNREGISTER", result.into())
}

/// What a scan does with the pages that it finds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// Protects them again, so that the next scan finds those that are written from now on.
    Protect,
    /// Leaves them, so that the next scan finds them too.
    Leave,
}

/// Calls `sink` for every range written since the last scan that protected.
pub(crate) fn scan(
    pagemap: &File,
    range: &Range<u64>,
    found: Found,
    sink: &mut dyn FnMut(Range<u64>),
) -> Result<(), Error> {
    let flags = match found {
        Found::Protect => PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        Found::Leave => PM_SCAN_CHECK_WPASYNC,
    };
    let mut ranges = vec![PageRegion::default(); RANGES];
    let mut start = range.start;
    while start < range.end {
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags,
            start,
            end: range.end,
            walk_end: 0,
            vec: ranges.as_mut_ptr() as u64,
            vec_len: ranges.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: PAGE_IS_WRITTEN,
            category_anyof_mask: 0,
            return_mask: PAGE_IS_WRITTEN,
        };
        // SAFETY: the kernel reads and writes a live structure of the layout that this request has, and writes at
        // most `vec_len` entries to the vector, which outlives the call.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        check("PAGEMAP_SCAN (Linux 6.7 or newer is needed)", count.into())?;
        let count = usize::try_from(count).unwrap_or(0).min(ranges.len());
        for found in &ranges[..count] {
            sink(found.start..found.end);
        }
        if arg.walk_end <= start {
            return Err(Error::Syscall {
                call: "PAGEMAP_SCAN",
                source: io::Error::other("the scan does not advance"),
            });
        }
        start = arg.walk_end;
    }
    Ok(())
}

fn check(call: &'static str, result: i64) -> Result<(), Error> {
    if result < 0 {
        return Err(Error::Syscall {
            call,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}
