//! Guest RAM from outside: which shared memory holds which backend, and where QEMU has it mapped.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use qapi::qmp;
use serde::{Deserialize, Serialize};

use super::qmp::Monitor;
use super::text::{guest_address, large_others};
use crate::Error;
use crate::process::Process;
use crate::ram_file::RamFile;
use crate::vm::{GuestRam, PAGE_SIZE, Region, Sharing, Window};

/// Largest RAM block beside the backends: video memory and firmware.
const OTHER_BLOCK_MAX: u64 = 32 << 20;

/// A backend of guest RAM.
#[derive(Debug)]
struct Backend {
    region: Region,
    file: RamFile,
    file_id: FileId,
    /// Where it is mapped in QEMU: (address, offset in the file, length).
    mappings: Vec<Mapping>,
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
    /// Without what it is a part of.
    pub(super) fn window(&self) -> Window {
        Window {
            address: self.address,
            offset: self.offset,
            len: self.len,
        }
    }

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
            let host = host_address(monitor, gpa)?
                .and_then(|host| host.checked_sub(offset))
                .ok_or_else(|| Error::Ram(format!("backend {name:?} has no address in QEMU")))?;
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
        Ok(Self {
            regions: backends.iter().map(|b| b.region.clone()).collect(),
            backends,
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
        let huge = self
            .backends
            .iter()
            .filter(|backend| backend.file.is_huge());
        huge.map(|backend| backend.region.name.as_str())
    }

    /// All that the process has mapped of the regions, with the region's index.
    pub(super) fn mappings(&self) -> impl Iterator<Item = (usize, &Mapping)> {
        let backends = self.backends.iter().enumerate();
        backends.flat_map(|(region, backend)| backend.mappings.iter().map(move |m| (region, m)))
    }

    /// Region and page of what the process has mapped at this address.
    pub(super) fn page_at(&self, address: u64) -> Option<(usize, u64)> {
        self.mappings()
            .find(|(_, mapping)| mapping.range().contains(&address))
            .map(|(region, mapping)| {
                let offset = address - mapping.address + mapping.offset;
                (region, offset / PAGE_SIZE)
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
            .map(|backend| backend.file_id)
            .collect();
        let mut others = Vec::new();
        let entries = fs::read_dir("/proc").map_err(Error::io("listing processes"))?;
        for entry in entries.flatten() {
            let other = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            // What we write we know of.
            let unknown = |other: &u32| *other != pid && *other != std::process::id();
            let Some(other) = other.filter(unknown) else {
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
        Ok(Self {
            file: RamFile::new(file, &name, size_bytes)?,
            region: Region { name, size_bytes },
            file_id,
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

/// Where QEMU has guest-physical memory mapped, if it is memory.
pub(super) fn host_address(monitor: &Monitor, gpa: u64) -> Result<Option<u64>, Error> {
    let answer = human(monitor, &format!("gpa2hva {gpa:#x}"))?;
    let hex = answer.rsplit_once(" is 0x").map(|(_, hex)| hex.trim());
    Ok(hex.and_then(|hex| u64::from_str_radix(hex, 16).ok()))
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
        self.backend(region)?.file.data_extents()
    }

    fn read(&self, region: usize, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.backend(region)?.file.read(offset, buffer)
    }

    fn write(&self, region: usize, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.backend(region)?.file.write(offset, bytes)
    }

    fn discard(&self, region: usize, range: Range<u64>) -> Result<(), Error> {
        self.backend(region)?.file.discard(&range)
    }

    fn share(&self, sharing: Sharing) -> Result<Vec<OwnedFd>, Error> {
        let backends = self.backends.iter();
        backends
            .map(|backend| backend.file.share(sharing))
            .collect()
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
