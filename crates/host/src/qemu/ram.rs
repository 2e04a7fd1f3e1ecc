//! Guest RAM from outside: which shared memory holds which backend, and where QEMU has it mapped.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use qapi::qmp;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use rustix::process::{ForeignRawFd, PidfdGetfdFlags, pidfd_getfd};

use super::qmp::Monitor;
use super::text::{guest_address, large_others};
use crate::Error;
use crate::process::Process;
use crate::sys::{inject, track};
use crate::vm::{GuestRam, PAGE_SIZE, Region, WriteTracker};

/// Most data extents of a region: what is more fragmented is read with its holes closed up to pages anyway.
const EXTENTS_MAX: usize = 4 << 20;

/// Largest RAM block beside the backends: video memory and firmware.
const OTHER_BLOCK_MAX: u64 = 32 << 20;

/// A backend of guest RAM.
#[derive(Debug)]
struct Backend {
    region: Region,
    file: File,
    /// Where it is mapped in QEMU: (address, offset in the file, length).
    mappings: Vec<Mapping>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    address: u64,
    offset: u64,
    len: u64,
    file: FileId,
    shared: bool,
    writable: bool,
}

/// Which file is mapped: inode numbers alone are unique only within a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

/// RAM of a QEMU process.
#[derive(Debug)]
pub(crate) struct QemuRam {
    regions: Vec<Region>,
    backends: Vec<Backend>,
}

impl QemuRam {
    /// Finds the RAM of a QEMU.
    pub(crate) fn find(process: &Process, monitor: &Monitor) -> Result<Self, Error> {
        let memdevs = monitor.execute_value(&qmp::query_memdev {})?;
        let mut sizes = BTreeMap::new();
        for memdev in memdevs.as_array().into_iter().flatten() {
            if let (Some(id), Some(size)) = (memdev["id"].as_str(), memdev["size"].as_u64()) {
                sizes.insert(id.to_owned(), size);
            }
        }
        if sizes.is_empty() {
            return Err(Error::Ram(
                "there is no memory backend; RAM is private to QEMU".to_owned(),
            ));
        }
        let tree = human(monitor, "info mtree -f")?;
        let mappings = mappings(process.pid())?;
        let mut backends = Vec::new();
        for (id, size) in sizes {
            let (gpa, offset) = guest_address(&tree, &id).ok_or_else(|| {
                Error::Ram(format!("backend {id:?} is not mapped into the guest"))
            })?;
            let answer = human(monitor, &format!("gpa2hva {gpa:#x}"))?;
            let host = answer
                .rsplit_once(" is 0x")
                .and_then(|(_, hex)| u64::from_str_radix(hex.trim(), 16).ok())
                .and_then(|host| host.checked_sub(offset))
                .ok_or_else(|| Error::Ram(format!("no address for {id:?}: {}", answer.trim())))?;
            backends.push(Backend::open(process, id, size, host, &mappings)?);
        }
        Ok(Self {
            regions: backends.iter().map(|b| b.region.clone()).collect(),
            backends,
        })
    }

    fn backend(&self, region: usize) -> Result<&Backend, Error> {
        self.backends
            .get(region)
            .ok_or_else(|| Error::Ram(format!("region {region} does not exist")))
    }

    /// RAM blocks that are not followed from outside and too large to travel with the device state.
    pub(crate) fn large_others(&self, monitor: &Monitor) -> Result<Vec<(String, u64)>, Error> {
        let blocks = human(monitor, "info ramblock")?;
        let ids: Vec<&str> = self.regions.iter().map(|r| r.name.as_str()).collect();
        Ok(large_others(&blocks, &ids, OTHER_BLOCK_MAX))
    }

    /// Processes besides QEMU that can write the guest's RAM unseen, because they map it too.
    pub(crate) fn shared_with(&self, pid: u32) -> Result<Vec<u32>, Error> {
        let ours: Vec<FileId> = self
            .backends
            .iter()
            .filter_map(|backend| Some(backend.mappings.first()?.file))
            .collect();
        let mut others = Vec::new();
        let entries = fs::read_dir("/proc").map_err(Error::io("listing processes"))?;
        for entry in entries.flatten() {
            let other = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let Some(other) = other.filter(|other| *other != pid) else {
                continue;
            };
            // One that has ended meanwhile writes nothing.
            let Ok(mappings) = mappings(other) else {
                continue;
            };
            if mappings
                .iter()
                .any(|m| m.shared && m.writable && ours.contains(&m.file))
            {
                others.push(other);
            }
        }
        Ok(others)
    }

    /// Makes every region empty, and proves it: true if no region holds data.
    pub(crate) fn prove_zero(&self) -> Result<bool, Error> {
        for (index, region) in self.regions.iter().enumerate() {
            if !self.data_extents(index)?.is_empty() {
                self.discard(index, 0..region.size_bytes)?;
            }
        }
        for index in 0..self.regions.len() {
            if !self.data_extents(index)?.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Backend {
    fn open(
        process: &Process,
        id: String,
        size: u64,
        host: u64,
        mappings: &[Mapping],
    ) -> Result<Self, Error> {
        let here = mappings
            .iter()
            .find(|m| (m.address..m.address + m.len).contains(&host));
        let Some(file_id) = here
            .filter(|m| m.shared && m.file.inode != 0)
            .map(|m| m.file)
        else {
            return Err(Error::Ram(format!("backend {id:?} is private to QEMU")));
        };
        let file = open_by_id(process.pid(), file_id)?
            .ok_or_else(|| Error::Ram(format!("no descriptor for backend {id:?}")))?;
        let len = file
            .metadata()
            .map_err(Error::io("looking at guest RAM"))?
            .len();
        if len != size || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Ram(format!(
                "backend {id:?} has {len} bytes, expected {size}"
            )));
        }
        let mappings: Vec<Mapping> = mappings
            .iter()
            .filter(|m| m.file == file_id)
            .cloned()
            .collect();
        Ok(Self {
            region: Region {
                name: id,
                size_bytes: size,
            },
            file,
            mappings,
        })
    }
}

/// Opens this file through the process's descriptors.
fn open_by_id(pid: u32, id: FileId) -> Result<Option<File>, Error> {
    let dir = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&dir).map_err(Error::io("listing QEMU's descriptors"))?;
    for entry in entries.flatten() {
        let is_it = fs::metadata(entry.path())
            .is_ok_and(|meta| (meta.ino(), meta.dev()) == (id.inode, id.device))
            && fs::read_link(entry.path()).is_ok_and(|link| {
                let link = link.to_string_lossy().into_owned();
                link.starts_with("/memfd:") || link.starts_with("/dev/")
            });
        if is_it {
            let file = OpenOptions::new().read(true).write(true).open(entry.path());
            return file.map(Some).map_err(Error::io("opening guest RAM"));
        }
    }
    Ok(None)
}

fn human(monitor: &Monitor, line: &str) -> Result<String, Error> {
    let command = qmp::human_monitor_command {
        command_line: line.to_owned(),
        cpu_index: None,
    };
    monitor.execute(&command)
}

/// File mappings of a process, see proc_pid_maps(5).
fn mappings(pid: u32) -> Result<Vec<Mapping>, Error> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|error| {
        if error.kind() == ErrorKind::NotFound {
            Error::ProcessGone { pid }
        } else {
            Error::Io {
                action: "reading QEMU's mappings".to_owned(),
                source: error,
            }
        }
    })?;
    Ok(text.lines().filter_map(parse_mapping).collect())
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    let mode = fields.next()?;
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let major = u32::from_str_radix(major, 16).ok()?;
    let minor = u32::from_str_radix(minor, 16).ok()?;
    let inode = fields.next()?.parse().ok()?;
    Some(Mapping {
        address: start,
        offset,
        len: end.checked_sub(start)?,
        file: FileId {
            device: rustix::fs::makedev(major, minor),
            inode,
        },
        shared: mode.ends_with('s'),
        writable: mode.contains('w'),
    })
}

impl GuestRam for QemuRam {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn data_extents(&self, region: usize) -> Result<Vec<Range<u64>>, Error> {
        let backend = self.backend(region)?;
        let size = backend.region.size_bytes;
        let mut extents = Vec::new();
        let mut at = 0;
        while at < size {
            let start = match seek(&backend.file, SeekFrom::Data(at)) {
                Ok(start) if start < size => start,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(errno) => return Err(Error::call("lseek(SEEK_DATA)")(errno)),
            };
            let end = seek(&backend.file, SeekFrom::Hole(start))
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

    fn read(&self, region: usize, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let file = &self.backend(region)?.file;
        file.read_exact_at(buffer, offset)
            .map_err(Error::io("reading guest RAM"))
    }

    fn write(&self, region: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let backend = self.backend(region)?;
        let end = offset.checked_add(bytes.len() as u64);
        // A write behind the end would grow the file.
        if end.is_none_or(|end| end > backend.region.size_bytes) {
            return Err(Error::Ram("a write outside the region".to_owned()));
        }
        backend
            .file
            .write_all_at(bytes, offset)
            .map_err(Error::io("writing guest RAM"))
    }

    fn discard(&self, region: usize, range: Range<u64>) -> Result<(), Error> {
        let backend = self.backend(region)?;
        let end = range.end.min(backend.region.size_bytes);
        if range.start >= end {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&backend.file, flags, range.start, end - range.start)
            .map_err(Error::call("fallocate(PUNCH_HOLE)"))
    }
}

/// Follows the writes of a QEMU process to its RAM.
pub(crate) struct QemuTracker {
    ram: Arc<QemuRam>,
    pagemap: File,
    /// The kernel ends the tracking when the last copy is closed, at the latest when this agent ends.
    uffd: OwnedFd,
}

impl Drop for QemuTracker {
    fn drop(&mut self) {
        // A process that is being forked just now holds a copy for a moment; the next tracking need not wait.
        for mapping in self
            .ram
            .backends
            .iter()
            .flat_map(|backend| &backend.mappings)
        {
            let _ = track::unregister(
                &self.uffd,
                &(mapping.address..mapping.address + mapping.len),
            );
        }
    }
}

impl QemuTracker {
    /// Starts to follow.
    pub(crate) fn start(process: &Process, ram: Arc<QemuRam>) -> Result<Self, Error> {
        let uffd = take_userfaultfd(process)?;
        track::enable(&uffd)?;
        for mapping in ram.backends.iter().flat_map(|backend| &backend.mappings) {
            track::register(&uffd, &(mapping.address..mapping.address + mapping.len))?;
        }
        let pagemap = File::open(format!("/proc/{}/pagemap", process.pid()))
            .map_err(Error::io("opening QEMU's page map"))?;
        Ok(Self { ram, pagemap, uffd })
    }
}

impl WriteTracker for QemuTracker {
    fn collect(&mut self, sink: &mut dyn FnMut(usize, Range<u64>)) -> Result<(), Error> {
        for (region, backend) in self.ram.backends.iter().enumerate() {
            for mapping in &backend.mappings {
                let range = mapping.address..mapping.address + mapping.len;
                track::scan(&self.pagemap, &range, &mut |found| {
                    let page =
                        |address: u64| (address - mapping.address + mapping.offset) / PAGE_SIZE;
                    sink(region, page(found.start)..page(found.end));
                })?;
            }
        }
        Ok(())
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
        stopped.syscall(libc::SYS_close, u64::from(remote.cast_unsigned()), 0)?;
        ours.map_err(Error::call("pidfd_getfd"))
    })
}

fn make_userfaultfd(stopped: &mut inject::Stopped) -> Result<i32, Error> {
    const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    const USER_MODE_ONLY: u64 = 1;
    let mut result = stopped.syscall(libc::SYS_userfaultfd, FLAGS, 0)?;
    if result == -i64::from(libc::EPERM) {
        // What a QEMU without CAP_SYS_PTRACE may have. Asynchronous protection raises no faults that anybody has to
        // serve, so that the kernel's own writes are followed with it as well.
        result = stopped.syscall(libc::SYS_userfaultfd, FLAGS | USER_MODE_ONLY, 0)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_from_proc() {
        let line = "7ff5c7fff000-7ff5cbfff000 rw-s 00001000 00:01 1026  /memfd:memory-backend-memfd (deleted)";
        let mapping = parse_mapping(line).unwrap();
        assert_eq!(mapping.len, 64 << 20);
        assert_eq!(
            (mapping.offset, mapping.file.inode, mapping.shared),
            (0x1000, 1026, true)
        );
        assert_eq!(mapping.file.device, rustix::fs::makedev(0, 1));
        for odd in ["", "x-y", "1-0 rw-s 0 0 1", "1-0 rw-s 0 0:1 1", "00-"] {
            assert_eq!(parse_mapping(odd), None, "{odd}");
        }
    }
}
