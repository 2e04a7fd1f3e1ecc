//! Following the writes of a QEMU process to its RAM.

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::process::{ForeignRawFd, PidfdGetfdFlags, pidfd_getfd};

use super::ram::QemuRam;
use crate::Error;
use crate::process::Process;
use crate::sys::{inject, track, uffd};
use crate::vm::{GuestRam, PAGE_SIZE, WriteTracker};

/// Follows the writes of a QEMU process to its RAM.
pub(crate) struct QemuTracker {
    ram: Arc<QemuRam>,
    pagemap: File,
    is_first: bool,
    /// The kernel ends the tracking when the last copy is closed, at the latest when this agent ends.
    uffd: OwnedFd,
}

impl Drop for QemuTracker {
    fn drop(&mut self) {
        // A process that is being forked just now holds a copy for a moment; the next tracking need not wait.
        for (_, mapping) in self.ram.mappings() {
            let _ = uffd::unregister(&self.uffd, &mapping.range());
        }
    }
}

impl QemuTracker {
    /// Starts to follow.
    pub(crate) fn start(process: &Process, ram: Arc<QemuRam>) -> Result<Self, Error> {
        let uffd = take_userfaultfd(process)?;
        uffd::enable(&uffd, uffd::FOLLOW_WRITES)?;
        for (_, mapping) in ram.mappings() {
            uffd::register(&uffd, &mapping.range(), uffd::Mode::WriteProtect)?;
        }
        let pagemap = File::open(format!("/proc/{}/pagemap", process.pid()))
            .map_err(Error::io("opening QEMU's page map"))?;
        Ok(Self {
            ram,
            pagemap,
            is_first: true,
            uffd,
        })
    }
}

impl QemuTracker {
    fn scan(
        &self,
        found: track::Found,
        sink: &mut dyn FnMut(usize, Range<u64>),
    ) -> Result<(), Error> {
        for (region, mapping) in self.ram.mappings() {
            track::scan(&self.pagemap, &mapping.range(), found, &mut |found| {
                let page = |address: u64| (address - mapping.address + mapping.offset) / PAGE_SIZE;
                sink(region, page(found.start)..page(found.end));
            })?;
        }
        Ok(())
    }

    fn every_page(&self, sink: &mut dyn FnMut(usize, Range<u64>)) {
        for (index, region) in self.ram.regions().iter().enumerate() {
            sink(index, 0..region.size_bytes / PAGE_SIZE);
        }
    }
}

impl WriteTracker for QemuTracker {
    fn collect(&mut self, sink: &mut dyn FnMut(usize, Range<u64>)) -> Result<(), Error> {
        if !self.is_first {
            return self.scan(track::Found::Protect, sink);
        }
        // What it finds is not what is named: the kernel leaves out huge pages that nobody has touched.
        self.scan(track::Found::Protect, &mut |_, _| {})?;
        self.is_first = false;
        self.every_page(sink);
        Ok(())
    }

    fn peek(&mut self, sink: &mut dyn FnMut(usize, Range<u64>)) -> Result<(), Error> {
        if self.is_first {
            self.every_page(sink);
            return Ok(());
        }
        self.scan(track::Found::Leave, sink)
    }
}

/// A userfaultfd(2) made inside the process; the descriptor becomes ours alone, so that the kernel ends the tracking
/// when we end.
fn take_userfaultfd(process: &Process) -> Result<OwnedFd, Error> {
    inject::within(process.pid(), |stopped| {
        let remote = make_userfaultfd(stopped)?;
        let ours = pidfd_getfd(
            process.fd(),
            remote as ForeignRawFd,
            PidfdGetfdFlags::empty(),
        );
        stopped.syscall(libc::SYS_close, [remote.cast_unsigned().into(), 0, 0])?;
        ours.map_err(Error::call("pidfd_getfd"))
    })
}

fn make_userfaultfd(stopped: &mut inject::Stopped) -> Result<i32, Error> {
    const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    const USER_MODE_ONLY: u64 = 1;
    let mut result = stopped.syscall(libc::SYS_userfaultfd, [FLAGS, 0, 0])?;
    if result == -i64::from(libc::EPERM) {
        // What a QEMU without CAP_SYS_PTRACE may have. Asynchronous protection raises no faults that anybody has to
        // serve, so that the kernel's own writes are followed with it as well.
        result = stopped.syscall(libc::SYS_userfaultfd, [FLAGS | USER_MODE_ONLY, 0, 0])?;
    }
    if let Some(remote) = i32::try_from(result).ok().filter(|fd| *fd >= 0) {
        return Ok(remote);
    }
    let errno = i32::try_from(-result).unwrap_or(libc::EIO);
    let hint = match errno {
        libc::EPERM => "; QEMU's sandbox forbids it, or vm.unprivileged_userfaultfd=1 is needed",
        libc::ENOSYS => "; the kernel is built without CONFIG_USERFAULTFD",
        _ => "",
    };
    let errno = std::io::Error::from_raw_os_error(errno);
    Err(Error::Injection(format!("userfaultfd: {errno}{hint}")))
}
