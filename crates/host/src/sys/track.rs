//! `PAGEMAP_SCAN` (Linux 6.7): which pages were written. Constants and layouts: `linux/fs.h`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::check;
use crate::Error;

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_WRITTEN: u64 = 2;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 2;
/// Most ranges that one scan gives; it goes on where they end.
const RANGES: usize = 4096;

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
