//! userfaultfd(2) of another process: asynchronous write protection, and accesses to missing pages.
//!
//! Constants and layouts: `linux/userfaultfd.h`; behaviour: ioctl_userfaultfd(2).

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;

use super::check;
use crate::Error;

/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC`
pub(crate) const FOLLOW_WRITES: u64 = 1 << 12 | 1 << 13 | 1 << 15;
/// `UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_EXACT_ADDRESS | UFFD_FEATURE_POISON`: only the
/// first is needed. The others change nothing, but nobody else asks for this set, so that the descriptor is known by it.
pub(crate) const MISS_PAGES: u64 = 1 << 5 | 1 << 8 | 1 << 11 | 1 << 14;
/// Set by the kernel in the features of a descriptor that is in use.
pub(crate) const INITIALIZED: u64 = 1 << 31;

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
/// Makes a userfaultfd(2) from `/dev/userfaultfd`; the argument is that system call's.
pub(crate) const USERFAULTFD_IOC_NEW: u64 = 0xaa00;

/// What a range is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Mode {
    /// `UFFDIO_REGISTER_MODE_MISSING`
    Missing = 1,
    /// `UFFDIO_REGISTER_MODE_WP`
    WriteProtect = 2,
}

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
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioZeropage {
    start: u64,
    len: u64,
    mode: u64,
    zeropage: i64,
}

const _: () = assert!(size_of::<UffdioCopy>() == 40 && size_of::<UffdioZeropage>() == 32);

/// One of this process.
#[cfg(test)]
pub(crate) fn own() -> Result<OwnedFd, Error> {
    use std::os::fd::FromRawFd;
    // What everybody may have, see userfaultfd(2).
    const USER_MODE_ONLY: libc::c_int = 1;
    // SAFETY: the call takes one number, and gives a descriptor that nobody else has.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
    check("userfaultfd", made)?;
    let made = i32::try_from(made).unwrap_or(-1);
    // SAFETY: it was given just now.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// Announces what we want of a userfaultfd.
pub(crate) fn enable(uffd: &OwnedFd, features: u64) -> Result<(), Error> {
    let mut arg = UffdioApi {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: the kernel reads and writes a live structure of the layout that this request has.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut arg) };
    check("UFFDIO_API (Linux 6.7 or newer is needed)", result.into())
}

/// Registers a range of the process that the userfaultfd belongs to. May be repeated; one that is registered with
/// another descriptor is refused with `EBUSY`.
pub(crate) fn register(uffd: &OwnedFd, range: &Range<u64>, mode: Mode) -> Result<(), Error> {
    let mut arg = UffdioRegister {
        start: range.start,
        len: range.end.saturating_sub(range.start),
        mode: mode as u64,
        ioctls: 0,
    };
    // SAFETY: as above; the range concerns the other process, whose contents are not changed by it.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) };
    check("UFFDIO_REGISTER", result.into())
}

/// Ends what a range was registered for at once, whoever else still holds the descriptor, and wakes who waits in it.
pub(crate) fn unregister(uffd: &OwnedFd, range: &Range<u64>) -> Result<(), Error> {
    let result = with_range(uffd, UFFDIO_UNREGISTER, range);
    check("UFFDIO_UNREGISTER", result.into())
}

/// Wakes who waits in a range: they look again, and those that still miss a page are reported anew.
pub(crate) fn wake(uffd: &OwnedFd, range: &Range<u64>) -> Result<(), Error> {
    let result = with_range(uffd, UFFDIO_WAKE, range);
    check("UFFDIO_WAKE", result.into())
}

fn with_range(uffd: &OwnedFd, request: libc::c_ulong, range: &Range<u64>) -> libc::c_int {
    let mut arg = UffdioRange {
        start: range.start,
        len: range.end.saturating_sub(range.start),
    };
    // SAFETY: the two requests that are used read a live structure of this layout.
    unsafe { libc::ioctl(uffd.as_raw_fd(), request, &raw mut arg) }
}

/// What a range is filled with.
#[derive(Clone, Copy)]
pub(crate) enum Contents<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// So many zeros.
    Zeros(u64),
}

/// Fills missing pages from `address` on and wakes who waits for them; gives how many bytes it filled, more than 0 and
/// possibly fewer than there are. `EEXIST`: the first page is not missing.
pub(crate) fn fill(uffd: &OwnedFd, address: u64, contents: Contents<'_>) -> Result<u64, Errno> {
    let (result, filled) = match contents {
        Contents::Bytes(bytes) => {
            let mut arg = UffdioCopy {
                dst: address,
                src: bytes.as_ptr() as u64,
                len: bytes.len() as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the kernel reads and writes a live structure of the layout that this request has, and reads
            // `len` bytes of a live slice; the address concerns the other process and holds no data there.
            let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut arg) };
            (result, arg.copy)
        }
        Contents::Zeros(len) => {
            let mut arg = UffdioZeropage {
                start: address,
                len,
                mode: 0,
                zeropage: 0,
            };
            // SAFETY: as above, without a source.
            let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut arg) };
            (result, arg.zeropage)
        }
    };
    // A part that was filled is told beside the error.
    let error = (result < 0).then(|| {
        let errno = std::io::Error::last_os_error().raw_os_error();
        errno.map_or(Errno::IO, Errno::from_raw_os_error)
    });
    match (u64::try_from(filled), error) {
        (Ok(filled), _) if filled > 0 => Ok(filled),
        (_, Some(error)) => Err(error),
        _ => Err(Errno::AGAIN),
    }
}
