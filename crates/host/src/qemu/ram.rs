//! Guest RAM from outside: which shared memory holds which backend, and where QEMU has it mapped.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use qapi::qmp;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstatfs, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::qmp::Monitor;
use super::text::{guest_address, large_others};
use crate::Error;
use crate::process::Process;
use crate::vm::{GuestRam, PAGE_SIZE, Region};

/// Most data extents of a region: what is more fragmented is read with its holes closed up to pages anyway.
const EXTENTS_MAX: usize = 4 << 20;

/// File system of huge pages, see statfs(2).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// Largest RAM block beside the backends: video memory and firmware.
const OTHER_BLOCK_MAX: u64 = 32 << 20;

/// A backend of guest RAM.
#[derive(Debug)]
struct Backend {
    region: Region,
    file: File,
    file_id: FileId,
    /// Where it is mapped in QEMU: (address, offset in the file, length).
    mappings: Vec<Mapping>,
    huge: bool,
}

impl Backend {
    /// Writes through the process's own mapping.
    fn write_mapped(
        &self,
        memory: &File,
        offset: u64,
        bytes: &[u8],
    ) -> Result<std::io::Result<()>, Error> {
        let end = offset + bytes.len() as u64;
        let fits = |m: &&Mapping| m.offset <= offset && end <= m.offset + m.len;
        let mapping = self
            .mappings
            .iter()
            .find(fits)
            .ok_or_else(|| Error::Ram("the region is not mapped in one piece".to_owned()))?;
        Ok(memory.write_all_at(bytes, mapping.address + (offset - mapping.offset)))
    }

    fn is_empty_file(&self) -> Result<bool, Error> {
        let meta = self.file.metadata();
        Ok(meta.map_err(Error::io("looking at guest RAM"))?.blocks() == 0)
    }
}

/// A part of the process that shows a part of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) address: u64,
    /// Where in the file it begins.
    pub(super) offset: u64,
    pub(super) len: u64,
    file: FileId,
    shared: bool,
    writable: bool,
}

impl Mapping {
    /// Addresses.
    pub(super) fn range(&self) -> Range<u64> {
        self.address..self.address + self.len
    }
}

/// Which file is mapped: inode numbers alone are unique only within a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

/// Where a backend is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    name: String,
    size_bytes: u64,
    file: FileId,
}

/// RAM of a QEMU process.
#[derive(Debug)]
pub(crate) struct QemuRam {
    regions: Vec<Region>,
    backends: Vec<Backend>,
    /// `/proc/PID/mem`, where a backend has huge pages: their file can be read but not written.
    memory: Option<File>,
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
        let mut places = Vec::new();
        for (name, size_bytes) in sizes {
            let (gpa, offset) = guest_address(&tree, &name).ok_or_else(|| {
                Error::Ram(format!("backend {name:?} is not mapped into the guest"))
            })?;
            let answer = human(monitor, &format!("gpa2hva {gpa:#x}"))?;
            let host = answer
                .rsplit_once(" is 0x")
                .and_then(|(_, hex)| u64::from_str_radix(hex.trim(), 16).ok())
                .and_then(|host| host.checked_sub(offset))
                .ok_or_else(|| Error::Ram(format!("no address for {name:?}: {}", answer.trim())))?;
            let here = mappings.iter().find(|m| m.range().contains(&host));
            let file = here
                .filter(|m| m.shared && m.file.inode != 0)
                .map(|m| m.file)
                .ok_or_else(|| Error::Ram(format!("backend {name:?} is private to QEMU")))?;
            places.push(Place {
                name,
                size_bytes,
                file,
            });
        }
        Self::open(process, places, &mappings)
    }

    /// Finds it where it was before, without asking QEMU.
    pub(super) fn find_again(process: &Process, places: Vec<Place>) -> Result<Self, Error> {
        Self::open(process, places, &mappings(process.pid())?)
    }

    fn open(process: &Process, places: Vec<Place>, mappings: &[Mapping]) -> Result<Self, Error> {
        let backends: Vec<Backend> = places
            .into_iter()
            .map(|place| Backend::open(process, place, mappings))
            .collect::<Result<_, _>>()?;
        let memory = if backends.iter().any(|backend| backend.huge) {
            let path = format!("/proc/{}/mem", process.pid());
            let file = OpenOptions::new().write(true).open(path);
            Some(file.map_err(Error::io("opening QEMU's memory"))?)
        } else {
            None
        };
        Ok(Self {
            regions: backends.iter().map(|b| b.region.clone()).collect(),
            backends,
            memory,
        })
    }

    /// Where it is, for [`QemuRam::find_again`].
    pub(super) fn places(&self) -> Vec<Place> {
        let place = |backend: &Backend| Place {
            name: backend.region.name.clone(),
            size_bytes: backend.region.size_bytes,
            file: backend.file_id,
        };
        self.backends.iter().map(place).collect()
    }

    /// Names of the regions that have huge pages.
    pub(super) fn huge_regions(&self) -> impl Iterator<Item = &str> {
        let huge = self.backends.iter().filter(|backend| backend.huge);
        huge.map(|backend| backend.region.name.as_str())
    }

    /// All that the process has mapped of the regions, with the region's index.
    pub(super) fn mappings(&self) -> impl Iterator<Item = (usize, &Mapping)> {
        let backends = self.backends.iter().enumerate();
        backends.flat_map(|(region, backend)| backend.mappings.iter().map(move |m| (region, m)))
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
            .map(|backend| backend.file_id)
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
    fn open(process: &Process, place: Place, mappings: &[Mapping]) -> Result<Self, Error> {
        let Place {
            name,
            size_bytes,
            file: file_id,
        } = place;
        let mappings: Vec<Mapping> = mappings
            .iter()
            .filter(|m| m.shared && m.file == file_id)
            .cloned()
            .collect();
        if mappings.is_empty() {
            return Err(Error::Ram(format!("backend {name:?} is not mapped")));
        }
        let file = open_by_id(process.pid(), file_id)?
            .ok_or_else(|| Error::Ram(format!("no descriptor for backend {name:?}")))?;
        let len = file
            .metadata()
            .map_err(Error::io("looking at guest RAM"))?
            .len();
        if len != size_bytes || !size_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Ram(format!(
                "backend {name:?} has {len} bytes, expected {size_bytes}"
            )));
        }
        let file_system = fstatfs(&file).map_err(Error::call("fstatfs"))?.f_type;
        Ok(Self {
            region: Region { name, size_bytes },
            file,
            file_id,
            mappings,
            huge: file_system.cast_unsigned() == HUGETLBFS_MAGIC,
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

/// Addresses of the mappings in `/proc/PID/maps`.
#[cfg(feature = "fuzzing")]
pub(super) fn mapped(maps: &str) -> Vec<Range<u64>> {
    let mappings = maps.lines().filter_map(parse_mapping);
    mappings.map(|mapping| mapping.range()).collect()
}

impl GuestRam for QemuRam {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn data_extents(&self, region: usize) -> Result<Vec<Range<u64>>, Error> {
        let backend = self.backend(region)?;
        let size = backend.region.size_bytes;
        if backend.huge {
            // Holes of huge pages can't be looked for, but reading them does not fill them.
            let empty = backend.is_empty_file()?;
            return Ok(std::iter::once(0..size).filter(|_| !empty).collect());
        }
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
        let written = match &self.memory {
            Some(memory) if backend.huge => backend.write_mapped(memory, offset, bytes)?,
            _ => backend.file.write_all_at(bytes, offset),
        };
        written.map_err(Error::io("writing guest RAM"))
    }

    fn discard(&self, region: usize, range: Range<u64>) -> Result<(), Error> {
        let backend = self.backend(region)?;
        let end = range.end.min(backend.region.size_bytes);
        if range.start >= end {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&backend.file, flags, range.start, end - range.start)
            .map_err(Error::call("fallocate(PUNCH_HOLE)"))?;
        if backend.huge {
            return Ok(());
        }
        // A part of a huge page that can't be split just now is zeroed and stays: there it would not be missing.
        match seek(&backend.file, SeekFrom::Data(range.start)) {
            Ok(at) if at < end => Err(Error::Ram(format!(
                "memory at {at:#x} was not given back; turn off transparent huge pages of shared memory"
            ))),
            Ok(_) | Err(Errno::NXIO) => Ok(()),
            Err(errno) => Err(Error::call("lseek(SEEK_DATA)")(errno)),
        }
    }
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
