//! Pages of a QEMU process that are not here yet.
//!
//! Its userfaultfd(2) stays open in the process itself: with the last copy of the descriptor the kernel would let every
//! access that waits go on, to a page of zeros. So an agent that dies leaves the accesses waiting. The next one knows
//! the descriptor by its features, takes a copy of it and wakes everybody: who still misses a page is reported anew,
//! which the kernel does not do by itself for an access that was read from the descriptor once.

use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use qapi::qmp;
use rustix::io::Errno;
use rustix::process::{ForeignRawFd, PidfdGetfdFlags, pidfd_getfd};

use super::qmp::Monitor;
use super::ram::QemuRam;
use super::record;
use crate::Error;
use crate::process::Process;
use crate::sys::inject::{self, Stopped};
use crate::sys::uffd::{self, Contents, Mode};
use crate::vm::{GuestRam, MissingPages, PAGE_SIZE, SharedFaults, Window};
use crate::wait::any_readable;

/// Size of a `struct uffd_msg`.
const MESSAGE_LEN: usize = 32;
/// Most messages that are read at once.
const MESSAGES: usize = 64;
/// `UFFD_EVENT_PAGEFAULT`
const EVENT_PAGEFAULT: u8 = 0x12;
/// Longest time that a page is tried to be placed while the kernel is busy with the process's memory.
const PLACE_TIMEOUT: Duration = Duration::from_secs(5);
/// The device that makes a userfaultfd for who may open it, see userfaultfd(2).
const DEVICE: &str = "/dev/userfaultfd";
/// What QEMU calls the device when it is given it.
const DEVICE_NAME: &str = "palanquin-userfaultfd";

/// Pages of a QEMU process that are not here yet.
pub(super) struct QemuMissing {
    process: Arc<Process>,
    ram: Arc<QemuRam>,
    vm_dir: PathBuf,
    placer: Placer,
    is_finished: Mutex<bool>,
}

impl QemuMissing {
    /// Lets accesses to missing pages wait, or goes on where an agent before us ended.
    pub(super) fn start(
        process: &Arc<Process>,
        monitor: &Monitor,
        ram: &Arc<QemuRam>,
        vm_dir: &Path,
    ) -> Result<Self, Error> {
        if let Some(name) = ram.huge_regions().next() {
            return Err(Error::HugePages(name.to_owned()));
        }
        let uffd = if let Some(uffd) = take_left(process, ram)? {
            for (_, mapping) in ram.mappings() {
                uffd::wake(&uffd, &mapping.range())?;
            }
            uffd
        } else {
            // Before anything waits.
            record::write(vm_dir, process, ram)?;
            make(process, monitor, Keep::Open, |uffd| {
                uffd::enable(uffd, uffd::MISS_PAGES)?;
                register_all(uffd, ram).inspect_err(|_| unregister_all(uffd, ram))
            })?
        };
        let mut windows = vec![Vec::new(); ram.regions().len()];
        for (region, mapping) in ram.mappings() {
            windows[region].push(mapping.window());
        }
        Ok(Self {
            process: Arc::clone(process),
            ram: Arc::clone(ram),
            vm_dir: vm_dir.to_owned(),
            placer: Placer {
                uffd,
                pid: process.pid(),
                process: Some(Arc::clone(process)),
                windows,
            },
            is_finished: Mutex::new(false),
        })
    }

    /// Does now what takes longest of [`QemuMissing::start`], which finds it then. Nothing waits before that.
    pub(super) fn prepare(
        process: &Process,
        monitor: &Monitor,
        ram: &QemuRam,
        vm_dir: &Path,
    ) -> Result<(), Error> {
        if !left(process)?.is_empty() {
            return Ok(());
        }
        record::write(vm_dir, process, ram)?;
        make(process, monitor, Keep::Open, |uffd| {
            uffd::enable(uffd, uffd::MISS_PAGES)
        })
        .map(drop)
    }

    /// Takes that back.
    pub(super) fn unprepare(process: &Process, vm_dir: &Path) -> Result<(), Error> {
        close_left(process)?;
        record::remove(vm_dir)
    }

    /// The proof that [`QemuMissing::start`] will work: to do it for a moment.
    pub(super) fn probe(
        process: &Process,
        monitor: &Monitor,
        ram: &Arc<QemuRam>,
    ) -> Result<(), Error> {
        let uffd = make(process, monitor, Keep::Closed, |uffd| {
            uffd::enable(uffd, uffd::MISS_PAGES)
        })?;
        let registered = register_all(&uffd, ram);
        unregister_all(&uffd, ram);
        registered
    }
}

/// Sees accesses to missing pages, and places those.
#[derive(Debug)]
pub(crate) struct Placer {
    uffd: OwnedFd,
    pid: u32,
    /// Where we may look at it.
    process: Option<Arc<Process>>,
    /// Of each region.
    windows: Vec<Vec<Window>>,
}

impl Placer {
    /// For a process that knows the hypervisor only from what it was given.
    pub(crate) fn shared(faults: SharedFaults) -> Self {
        let SharedFaults { uffd, pid, windows } = faults;
        Self {
            uffd,
            pid,
            process: None,
            windows,
        }
    }

    /// Waits; true if the hypervisor is known to have ended.
    fn has_ended(&self, timeout: Duration) -> bool {
        if let Some(process) = &self.process {
            return process.has_ended(timeout);
        }
        // Nobody wakes this poll: a pause.
        let _: [bool; 0] = any_readable([], timeout);
        false
    }

    fn gone(&self) -> Error {
        Error::ProcessGone { pid: self.pid }
    }

    /// Region and page of an address in the process.
    fn page(&self, address: u64) -> Result<(usize, u64), Error> {
        let windows = self.windows.iter().enumerate();
        let mut all = windows.flat_map(|(region, list)| list.iter().map(move |w| (region, w)));
        let within = |w: &Window| address.checked_sub(w.address).filter(|at| *at < w.len);
        let found = all.find_map(|(region, w)| Some((region, (within(w)? + w.offset) / PAGE_SIZE)));
        found.ok_or_else(|| Error::Ram(format!("an access to {address:#x}, which is no guest RAM")))
    }

    /// See [`MissingPages::wait_faults`].
    pub(crate) fn wait_faults(
        &self,
        timeout: Duration,
        sink: &mut dyn FnMut(usize, u64),
    ) -> Result<(), Error> {
        let deadline = Instant::now() + timeout;
        let mut buffer = [0; MESSAGE_LEN * MESSAGES];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let process = self.process.as_ref().map(|process| process.fd().as_fd());
            let uffd = self.uffd.as_fd();
            match any_readable([uffd, process.unwrap_or(uffd)], left) {
                [_, true] if process.is_some() => return Err(self.gone()),
                [false, _] => return Ok(()),
                [true, _] => {}
            }
            let count = match rustix::io::read(&self.uffd, &mut buffer) {
                Ok(count) => count,
                // Another thread was faster, or the access was given up.
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => continue,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(errno) => return Err(Error::call("read(userfaultfd)")(errno)),
            };
            let mut named = false;
            for address in buffer[..count].chunks_exact(MESSAGE_LEN).filter_map(parse) {
                let (region, page) = self.page(address)?;
                sink(region, page);
                named = true;
            }
            if named {
                return Ok(());
            }
        }
    }

    /// See [`MissingPages::place`].
    pub(crate) fn place(&self, region: usize, page: u64, bytes: &[u8]) -> Result<u64, Error> {
        self.place_all(
            region,
            page.saturating_mul(PAGE_SIZE),
            Contents::Bytes(bytes),
        )
    }

    /// See [`MissingPages::place_zero`].
    pub(crate) fn place_zero(&self, region: usize, pages: Range<u64>) -> Result<u64, Error> {
        let len = pages.end.saturating_sub(pages.start);
        self.place_all(
            region,
            pages.start.saturating_mul(PAGE_SIZE),
            Contents::Zeros(len.saturating_mul(PAGE_SIZE)),
        )
    }

    fn place_all(&self, region: usize, offset: u64, contents: Contents<'_>) -> Result<u64, Error> {
        let len = match contents {
            Contents::Bytes(bytes) => bytes.len() as u64,
            Contents::Zeros(len) => len,
        };
        let (Some(windows), Some(end)) = (self.windows.get(region), offset.checked_add(len)) else {
            return Err(Error::Ram("a page outside the regions".to_owned()));
        };
        if !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Ram("no whole pages".to_owned()));
        }
        let (mut at, mut placed) = (offset, 0);
        while at < end {
            let here = windows
                .iter()
                .find(|m| m.offset <= at && at - m.offset < m.len)
                .ok_or_else(|| Error::Ram(format!("{at:#x} of region {region} is not mapped")))?;
            let piece = end.min(here.offset + here.len) - at;
            let contents = match contents {
                Contents::Bytes(bytes) => {
                    let from = (at - offset) as usize;
                    Contents::Bytes(&bytes[from..from + piece as usize])
                }
                Contents::Zeros(_) => Contents::Zeros(piece),
            };
            placed += self.place_piece(here.address + (at - here.offset), contents, piece)?;
            for other in windows.iter().filter(|m| !std::ptr::eq(*m, here)) {
                let from = other.offset.max(at);
                let to = (other.offset + other.len).min(at + piece);
                if from < to {
                    let address = |offset| other.address + (offset - other.offset);
                    uffd::wake(&self.uffd, &(address(from)..address(to)))?;
                }
            }
            at += piece;
        }
        Ok(placed / PAGE_SIZE)
    }

    /// Places what lies within one mapping; gives how many bytes were missing.
    fn place_piece(&self, address: u64, contents: Contents<'_>, len: u64) -> Result<u64, Error> {
        let deadline = Instant::now() + PLACE_TIMEOUT;
        let (mut done, mut placed) = (0, 0);
        while done < len {
            let rest = match contents {
                Contents::Bytes(bytes) => Contents::Bytes(&bytes[done as usize..]),
                Contents::Zeros(_) => Contents::Zeros(len - done),
            };
            let start = address + done;
            match uffd::fill(&self.uffd, start, rest) {
                Ok(filled) => {
                    done += filled;
                    placed += filled;
                }
                Err(Errno::EXIST) => {
                    // Written past us, perhaps after somebody began to wait.
                    uffd::wake(&self.uffd, &(start..start + PAGE_SIZE))?;
                    done += PAGE_SIZE;
                }
                Err(Errno::AGAIN) if Instant::now() < deadline => {
                    if self.has_ended(Duration::from_millis(1)) {
                        return Err(self.gone());
                    }
                }
                Err(Errno::AGAIN) => return Err(Error::Timeout("placing a page")),
                Err(Errno::SRCH) => return Err(self.gone()),
                Err(errno) => return Err(Error::call("UFFDIO_COPY")(errno)),
            }
        }
        Ok(placed)
    }
}

impl MissingPages for QemuMissing {
    fn wait_faults(
        &self,
        timeout: Duration,
        sink: &mut dyn FnMut(usize, u64),
    ) -> Result<(), Error> {
        self.placer.wait_faults(timeout, sink)
    }

    fn place(&self, region: usize, page: u64, bytes: &[u8]) -> Result<u64, Error> {
        self.placer.place(region, page, bytes)
    }

    fn place_zero(&self, region: usize, pages: Range<u64>) -> Result<u64, Error> {
        self.placer.place_zero(region, pages)
    }

    fn share(&self) -> Result<SharedFaults, Error> {
        let uffd = self.placer.uffd.try_clone();
        let shared = SharedFaults {
            uffd: uffd.map_err(Error::io("copying a userfaultfd"))?,
            pid: self.process.pid(),
            windows: self.placer.windows.clone(),
        };
        for (_, mapping) in self.ram.mappings() {
            uffd::wake(&self.placer.uffd, &mapping.range())?;
        }
        Ok(shared)
    }

    fn finish(&self) -> Result<(), Error> {
        let mut is_finished = self
            .is_finished
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *is_finished {
            return Ok(());
        }
        for (_, mapping) in self.ram.mappings() {
            uffd::unregister(&self.placer.uffd, &mapping.range()).map_err(|error| {
                if self.process.has_ended(Duration::ZERO) {
                    self.placer.gone()
                } else {
                    error
                }
            })?;
        }
        *is_finished = true;
        record::remove(&self.vm_dir)?;
        // One that stays open holds nobody up any more, and is used again the next time.
        if let Err(error) = close_left(&self.process) {
            tracing::warn!(%error, "a descriptor stays open in QEMU");
        }
        Ok(())
    }
}

/// Address of a fault, from a `struct uffd_msg`.
fn parse(message: &[u8]) -> Option<u64> {
    if *message.first()? != EVENT_PAGEFAULT {
        return None;
    }
    let address = message.get(16..24)?.try_into().ok()?;
    Some(u64::from_ne_bytes(address))
}

fn register_all(uffd: &OwnedFd, ram: &QemuRam) -> Result<(), Error> {
    ram.mappings()
        .try_for_each(|(_, mapping)| uffd::register(uffd, &mapping.range(), Mode::Missing))
}

fn unregister_all(uffd: &OwnedFd, ram: &QemuRam) {
    for (_, mapping) in ram.mappings() {
        let _ = uffd::unregister(uffd, &mapping.range());
    }
}

/// Descriptors of the process that we or an agent before us made.
fn left(process: &Process) -> Result<Vec<i32>, Error> {
    let pid = process.pid();
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .map_err(Error::io("listing QEMU's descriptors"))?
        .flatten();
    let is_ours = |fd: &i32| {
        let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
        link == Path::new("anon_inode:[userfaultfd]")
            && fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))
                .is_ok_and(|info| features(&info) == Some(uffd::MISS_PAGES | uffd::INITIALIZED))
    };
    Ok(entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(is_ours)
        .collect())
}

/// Features of a userfaultfd, from `/proc/PID/fdinfo/FD`: `API:\taa:FEATURES:KNOWN`.
fn features(info: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix("API:"))?;
    u64::from_str_radix(line.trim().split(':').nth(1)?, 16).ok()
}

/// Whether these are the features of a userfaultfd of ours.
#[cfg(feature = "fuzzing")]
pub(super) fn is_ours(info: &str) -> bool {
    features(info) == Some(uffd::MISS_PAGES | uffd::INITIALIZED)
}

/// Address of a fault.
#[cfg(feature = "fuzzing")]
pub(super) fn fault_address(message: &[u8]) -> Option<u64> {
    parse(message)
}

/// A copy of the descriptor that an agent before us left open in the process.
fn take_left(process: &Process, ram: &QemuRam) -> Result<Option<OwnedFd>, Error> {
    for fd in left(process)? {
        let Ok(uffd) = copy(process, fd) else {
            continue;
        };
        match register_all(&uffd, ram) {
            Ok(()) => return Ok(Some(uffd)),
            // Memory that one descriptor has is refused to any other: so this is not the one.
            Err(error) => tracing::debug!(%error, fd, "a userfaultfd of another memory"),
        }
    }
    Ok(None)
}

fn close_left(process: &Process) -> Result<(), Error> {
    let fds = left(process)?;
    if fds.is_empty() {
        return Ok(());
    }
    inject::within(process.pid(), |stopped| {
        fds.iter().try_for_each(|&fd| close(stopped, fd))
    })
}

fn copy(process: &Process, remote: i32) -> Result<OwnedFd, Error> {
    pidfd_getfd(
        process.fd(),
        remote as ForeignRawFd,
        PidfdGetfdFlags::empty(),
    )
    .map_err(Error::call("pidfd_getfd"))
}

fn close(stopped: &mut Stopped, remote: i32) -> Result<(), Error> {
    let result = stopped.syscall(libc::SYS_close, [remote.cast_unsigned().into(), 0, 0])?;
    if result < 0 {
        return Err(Error::Injection("close".to_owned()));
    }
    Ok(())
}

/// What becomes of the descriptor in QEMU.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Open,
    Closed,
}

/// Makes a userfaultfd(2) inside the process that lets the kernel wait too; `prepare` gets our copy of it. Should it
/// fail, nothing stays in the process.
fn make(
    process: &Process,
    monitor: &Monitor,
    keep: Keep,
    prepare: impl Fn(&OwnedFd) -> Result<(), Error> + Send + Sync,
) -> Result<OwnedFd, Error> {
    const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let make_with = |number, arguments| {
        inject::within(process.pid(), |stopped| {
            let result = stopped.syscall(number, arguments)?;
            let Some(remote) = i32::try_from(result).ok().filter(|fd| *fd >= 0) else {
                let errno = i32::try_from(-result).unwrap_or(libc::EIO);
                return Ok(Err(std::io::Error::from_raw_os_error(errno)));
            };
            let ready = copy(process, remote).and_then(|ours| prepare(&ours).map(|()| ours));
            if ready.is_err() || keep == Keep::Closed {
                close(stopped, remote)?;
            }
            ready.map(Ok)
        })
    };
    let error = match make_with(libc::SYS_userfaultfd, [FLAGS, 0, 0])? {
        Ok(uffd) => return Ok(uffd),
        Err(error) => error,
    };
    if error.raw_os_error() != Some(libc::EPERM) {
        return Err(Error::Injection(format!("userfaultfd: {error}")));
    }
    // Without privileges the system call makes only one of UFFD_USER_MODE_ONLY, with which a read(2) into a missing page,
    // KVM and vhost fail. But we may open the device, and QEMU may use what it is given.
    let forbidden = |error: &dyn std::fmt::Display| Error::FaultPrivilege(error.to_string());
    let device = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(|error| forbidden(&format_args!("{DEVICE}: {error}")))?;
    monitor.give(DEVICE_NAME, device.as_fd())?;
    let made = given_device(process, &device).and_then(|remote| {
        let remote = u64::from(remote.cast_unsigned());
        make_with(libc::SYS_ioctl, [remote, uffd::USERFAULTFD_IOC_NEW, FLAGS])
    });
    let taken_back = monitor.execute_value(&qmp::closefd {
        fdname: DEVICE_NAME.to_owned(),
    });
    if let Err(error) = taken_back {
        tracing::warn!(%error, "a descriptor stays open in QEMU");
    }
    made?.map_err(|error| forbidden(&error))
}

/// Number that the device has in the process.
fn given_device(process: &Process, device: &fs::File) -> Result<i32, Error> {
    let failed = || Error::io("finding a descriptor in QEMU");
    let wanted = device.metadata().map_err(failed())?.rdev();
    let entries = fs::read_dir(format!("/proc/{}/fd", process.pid())).map_err(failed())?;
    let is_it = |entry: &fs::DirEntry| {
        fs::metadata(entry.path())
            .is_ok_and(|meta| meta.file_type().is_char_device() && meta.rdev() == wanted)
    };
    let mut found = entries.flatten().filter(is_it);
    found
        .find_map(|entry| entry.file_name().to_str()?.parse().ok())
        .ok_or_else(|| Error::FaultPrivilege("QEMU did not take the device".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_other_than_faults_and_short_ones_are_passed_over() {
        let mut message = [0; MESSAGE_LEN];
        message[16..24].copy_from_slice(&0x7f00_1234_5678_u64.to_ne_bytes());
        assert_eq!(parse(&message), None);
        message[0] = EVENT_PAGEFAULT;
        assert_eq!(parse(&message), Some(0x7f00_1234_5678));
        assert_eq!(parse(&message[..23]), None);
        assert_eq!(parse(&[]), None);
    }

    #[test]
    fn a_descriptor_is_known_by_its_features() {
        let info = "pos:\t0\nflags:\t02004000\npending:\t0\ntotal:\t0\nAPI:\taa:80004920:80000000000001ff\n";
        assert_eq!(features(info), Some(uffd::MISS_PAGES | uffd::INITIALIZED));
        for odd in ["", "API:", "API:\taa", "API:\taa:x:1"] {
            assert_eq!(features(odd), None, "{odd}");
        }
    }
}
