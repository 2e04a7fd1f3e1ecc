//! What a hypervisor's process runs: its binary, the code that it has mapped, its command line.
//!
//! The binary is read through `/proc/PID/exe`, the libraries through `/proc/PID/map_files`: these are the files that run,
//! whatever lies at their paths by now. Executable pages that the process no longer shares with their file were written
//! to; they must hold what the file holds. Digests of files are remembered, so that only what is new costs time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Mutex, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};
use rustix::fs::{SealFlags, fcntl_get_seals};

use crate::Error;
use crate::process::Process;
use crate::vm::{GuestRam, Handle, PAGE_SIZE, Sharing};

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// Largest file with code, in bytes.
const FILE_MAX: u64 = 1 << 30;
/// Most executable mappings of a process.
const MAPPINGS_MAX: usize = 4096;
/// Longest `/proc/PID/maps` and command line, in bytes.
const TEXT_MAX: u64 = 4 << 20;
/// Most files whose digests are remembered.
const FILES_MAX: usize = 4096;
/// A process that loads a library just now is looked at again.
const ATTEMPTS: usize = 3;
const PAGE: usize = PAGE_SIZE as usize;

/// What was found of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// Its binary.
    pub binary: Digest,
    /// Binary and libraries: over their digests, in ascending order, each once.
    pub code: Digest,
    /// Its command line, as `/proc/PID/cmdline` has it.
    pub command_line: Digest,
    /// Executable memory that has no file, in bytes: what emulation of another CPU translates. Nothing is known of it; a
    /// QEMU with KVM has none.
    pub generated_bytes: u64,
}

/// What was found of the memory of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Empty {
    /// Memory without any data, in bytes: all of it.
    pub bytes: u64,
    /// Whether its size can't be changed any more (memfd seals).
    pub is_sealed: bool,
}

/// Which version of which file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FileKey {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: (i64, i64),
    /// Nobody can set this one back.
    changed_ns: (i64, i64),
}

/// Measures, and remembers digests of files.
#[derive(Debug, Default)]
pub struct Meter {
    files: Mutex<HashMap<FileKey, Digest>>,
}

/// An executable mapping of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    /// As in `map_files`.
    name: String,
}

/// Executable mappings: of files, and how much has none.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mappings {
    files: Vec<Mapping>,
    generated_bytes: u64,
}

impl FileKey {
    fn of(file: &File) -> Result<Self, Error> {
        let meta = file
            .metadata()
            .map_err(Error::io("looking at a file with code"))?;
        if !meta.is_file() || meta.size() > FILE_MAX {
            return Err(Error::Measure(format!(
                "a file with code has {} bytes or is no plain file",
                meta.size()
            )));
        }
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified_ns: (meta.mtime(), meta.mtime_nsec()),
            changed_ns: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

fn read_bounded(path: &str) -> Result<Vec<u8>, Error> {
    let reading = || Error::io(format!("reading {path}"));
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(reading())?;
    file.take(TEXT_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(reading())?;
    if bytes.len() as u64 > TEXT_MAX {
        return Err(Error::Measure(format!("{path} is too long")));
    }
    Ok(bytes)
}

/// Digest over several digests.
fn over(digests: &BTreeSet<Digest>) -> Digest {
    let mut context = Context::new(&SHA256);
    for digest in digests {
        context.update(digest);
    }
    finish(context)
}

fn finish(context: Context) -> Digest {
    let mut digest = [0; 32];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

impl Meter {
    /// Digest of a file. Costs nothing if this version of it was measured before.
    pub fn file(&self, file: &File) -> Result<Digest, Error> {
        let key = FileKey::of(file)?;
        let lock = || self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(digest) = lock().get(&key) {
            return Ok(*digest);
        }
        let mut context = Context::new(&SHA256);
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            match file.read_at(&mut buffer, at) {
                Ok(0) => break,
                Ok(len) => {
                    context.update(&buffer[..len]);
                    at += len as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("reading a file with code")(error)),
            }
        }
        let digest = finish(context);
        // What was written to meanwhile is not remembered, and measured again next time.
        if at != key.size || FileKey::of(file)? != key {
            return Err(Error::Measure(
                "a file with code is being written to".to_owned(),
            ));
        }
        let mut files = lock();
        if files.len() >= FILES_MAX {
            files.clear();
        }
        files.insert(key, digest);
        Ok(digest)
    }

    /// Measures the process of a VM or container.
    pub fn vm(&self, handle: &Handle) -> Result<Measurement, Error> {
        let process = Process::open(handle.pid)?;
        if process.start_ticks() != handle.start_ticks {
            return Err(Error::ProcessGone { pid: handle.pid });
        }
        self.process(&process)
    }

    pub(crate) fn process(&self, process: &Process) -> Result<Measurement, Error> {
        let mut attempt = 1;
        let measured = loop {
            match self.look(process.pid()) {
                Err(Error::Io { source, .. })
                    if source.kind() == ErrorKind::NotFound && attempt < ATTEMPTS =>
                {
                    attempt += 1;
                }
                result => break result,
            }
        };
        // What was read by its number is its own only if it is still there.
        if process.has_ended(std::time::Duration::ZERO) {
            return Err(Error::ProcessGone { pid: process.pid() });
        }
        measured
    }

    fn look(&self, pid: u32) -> Result<Measurement, Error> {
        let binary = File::open(format!("/proc/{pid}/exe"))
            .map_err(Error::io("opening the hypervisor's binary"))?;
        let binary = self.file(&binary)?;
        let maps = read_bounded(&format!("/proc/{pid}/maps"))?;
        let mappings = parse(&String::from_utf8_lossy(&maps))?;
        let open = |name: &str| {
            File::open(format!("/proc/{pid}/{name}")).map_err(Error::io(format!("opening {name}")))
        };
        let (memory, pagemap) = (open("mem")?, open("pagemap")?);
        let mut digests = BTreeSet::from([binary]);
        for mapping in &mappings.files {
            let file = open(&format!("map_files/{}", mapping.name))?;
            digests.insert(self.file(&file)?);
            compare(mapping, &file, &memory, &pagemap)?;
        }
        let command_line = read_bounded(&format!("/proc/{pid}/cmdline"))?;
        let mut context = Context::new(&SHA256);
        context.update(&command_line);
        Ok(Measurement {
            binary,
            code: over(&digests),
            command_line: finish(context),
            generated_bytes: mappings.generated_bytes,
        })
    }

    /// Whether a file is the one that a process runs, and its digest.
    pub(crate) fn is_run_by(&self, file: &File, process: &Process) -> Result<bool, Error> {
        let runs = File::open(format!("/proc/{}/exe", process.pid()))
            .map_err(Error::io("opening the hypervisor's binary"))?;
        Ok(FileKey::of(&runs)? == FileKey::of(file)? && self.file(&runs)? == self.file(file)?)
    }
}

/// Executable pages that the process has for itself must hold what the file holds.
fn compare(mapping: &Mapping, file: &File, memory: &File, pagemap: &File) -> Result<(), Error> {
    let pages = usize::try_from((mapping.end - mapping.start) / PAGE_SIZE).unwrap_or(usize::MAX);
    let mut entries = vec![0; pages.min((FILE_MAX / PAGE_SIZE) as usize) * 8];
    pagemap
        .read_exact_at(&mut entries, mapping.start / PAGE_SIZE * 8)
        .map_err(Error::io("reading which pages were written to"))?;
    for (index, entry) in (0_u64..).zip(entries.chunks_exact(8)) {
        let entry = entry.try_into().map_or(0, u64::from_le_bytes);
        // Present or swapped out, and not a page of the file (Documentation/admin-guide/mm/pagemap.rst).
        if entry >> 62 == 0 || entry >> 61 & 1 == 1 {
            continue;
        }
        let address = mapping.start + index * PAGE_SIZE;
        let (mut has, mut should) = ([0; PAGE], [0; PAGE]);
        memory
            .read_exact_at(&mut has, address)
            .map_err(Error::io("reading code of the hypervisor"))?;
        let mut len = 0;
        while len < PAGE {
            let at = mapping.offset + index * PAGE_SIZE + len as u64;
            match file.read_at(&mut should[len..], at) {
                // Behind the end of a file a page has zeros.
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("reading a file with code")(error)),
            }
        }
        if has != should {
            let path = fs::read_link(format!(
                "/proc/self/fd/{}",
                std::os::fd::AsRawFd::as_raw_fd(file)
            ));
            return Err(Error::CodeAltered {
                address,
                path: path.unwrap_or_default(),
            });
        }
    }
    Ok(())
}

/// Reads `/proc/PID/maps`, see proc_pid_maps(5).
fn parse(maps: &str) -> Result<Mappings, Error> {
    let mut found = Mappings::default();
    for line in maps.lines() {
        let odd = || Error::Measure(format!("a line of its memory map: {:.100}", line));
        let mut fields = line.split_ascii_whitespace();
        let (Some(name), Some(rights), Some(offset), Some(_), Some(inode)) = (
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
        ) else {
            return Err(odd());
        };
        // Code of the kernel's, which it can't write to.
        if !rights.contains('x') || matches!(fields.next(), Some("[vdso]" | "[vsyscall]")) {
            continue;
        }
        let hex = |text: &str| u64::from_str_radix(text, 16).map_err(|_| odd());
        let (start, end) = name.split_once('-').ok_or_else(odd)?;
        let (start, end, offset) = (hex(start)?, hex(end)?, hex(offset)?);
        if start >= end || !(start | end | offset).is_multiple_of(PAGE_SIZE) {
            return Err(odd());
        }
        if inode == "0" {
            found.generated_bytes = found.generated_bytes.saturating_add(end - start);
            continue;
        }
        if found.files.len() >= MAPPINGS_MAX {
            return Err(Error::Measure(
                "it has too many executable mappings".to_owned(),
            ));
        }
        found.files.push(Mapping {
            start,
            end,
            offset,
            name: name.to_owned(),
        });
    }
    Ok(found)
}

/// Proves that the RAM of a container holds no data (`SEEK_DATA` finds none), and looks whether its size is fixed.
pub fn empty(ram: &dyn GuestRam) -> Result<Empty, Error> {
    let mut all = Empty {
        bytes: 0,
        is_sealed: true,
    };
    for (index, region) in ram.regions().iter().enumerate() {
        if !ram.data_extents(index)?.is_empty() {
            return Err(Error::NotEmpty(region.name.clone()));
        }
        all.bytes = all.bytes.saturating_add(region.size_bytes);
    }
    for file in ram.share(Sharing::Read)? {
        // A file of huge pages may have no seals.
        let seals = fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        all.is_sealed &= seals.contains(SealFlags::GROW | SealFlags::SHRINK);
    }
    Ok(all)
}

/// What differs between two measurements, as words for an operator.
pub fn differences(before: &Measurement, now: &Measurement) -> Vec<&'static str> {
    let parts: BTreeMap<&'static str, bool> = [
        ("the hypervisor's binary", before.binary != now.binary),
        (
            "a library of the hypervisor",
            before.code != now.code && before.binary == now.binary,
        ),
        ("its command line", before.command_line != now.command_line),
    ]
    .into();
    parts
        .into_iter()
        .filter(|(_, differs)| *differs)
        .map(|(what, _)| what)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A program that waits until its input ends.
    struct Cat(Child);

    impl Cat {
        fn new() -> Self {
            let child = Command::new("cat")
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn();
            let cat = Self(child.unwrap());
            // Its libraries are loaded before it reads.
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while !fs::read_to_string(format!("/proc/{}/maps", cat.0.id()))
                .unwrap()
                .contains("libc")
            {
                assert!(std::time::Instant::now() < deadline);
                std::thread::yield_now();
            }
            cat
        }

        fn process(&self) -> Process {
            Process::open(self.0.id()).unwrap()
        }
    }

    impl Drop for Cat {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn sha256(path: &str) -> Digest {
        let mut context = Context::new(&SHA256);
        context.update(&fs::read(path).unwrap());
        finish(context)
    }

    #[test]
    fn a_process_is_measured_as_its_files_are() {
        let cat = Cat::new();
        let meter = Meter::default();
        let measured = meter.process(&cat.process()).unwrap();
        assert_eq!(measured.binary, sha256("/bin/cat"));
        assert_eq!(measured.generated_bytes, 0);
        let mut context = Context::new(&SHA256);
        context.update(b"cat\0");
        assert_eq!(measured.command_line, finish(context));
        assert_eq!(meter.process(&cat.process()).unwrap(), measured);
        let other = Cat::new();
        assert_eq!(meter.process(&other.process()).unwrap(), measured);
        // Another program with the same libraries is another code.
        assert_ne!(measured.code, measured.binary);
    }

    #[test]
    fn code_that_was_altered_in_memory_is_noticed() {
        let cat = Cat::new();
        let meter = Meter::default();
        let process = cat.process();
        meter.process(&process).unwrap();
        let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid())).unwrap();
        let mapping = parse(&maps).unwrap().files.remove(0);
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{}/mem", process.pid()))
            .unwrap();
        let mut byte = [0];
        memory
            .read_exact_at(&mut byte, mapping.start + 100)
            .unwrap();
        // Written to without a change: the page is the process's own, and the same.
        memory.write_all_at(&byte, mapping.start + 100).unwrap();
        meter.process(&process).unwrap();
        memory
            .write_all_at(&[byte[0] ^ 1], mapping.start + 100)
            .unwrap();
        let error = meter.process(&process).unwrap_err();
        let Error::CodeAltered { address, path } = error else {
            panic!("{error}");
        };
        assert_eq!(address, mapping.start);
        assert!(path.is_absolute());
        memory.write_all_at(&byte, mapping.start + 100).unwrap();
        meter.process(&process).unwrap();
    }

    #[test]
    fn a_file_is_measured_anew_once_it_has_changed_and_only_then() {
        let mut file = tempfile::tempfile().unwrap();
        let meter = Meter::default();
        file.write_all(b"one").unwrap();
        let one = meter.file(&file).unwrap();
        assert_eq!(meter.file(&file).unwrap(), one);
        assert_eq!(meter.files.lock().unwrap().len(), 1);
        file.write_all(b"two").unwrap();
        assert_ne!(meter.file(&file).unwrap(), one);
        assert_eq!(meter.files.lock().unwrap().len(), 2);
    }

    #[test]
    fn maps_are_read_as_the_kernel_writes_them() {
        let maps = "55d0-55d1000 r--p 00000000 fe:00 12 /usr/bin/x y\n\
            55000000-55002000 r-xp 00001000 fe:00 12   /usr/bin/x y\n\
            7f0000000000-7f0000001000 rwxp 00000000 00:00 0 \n\
            7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0   [vdso]\n";
        let found = parse(maps).unwrap();
        assert_eq!(found.generated_bytes, 0x1000);
        let [mapping] = &found.files[..] else {
            panic!("{found:?}");
        };
        assert_eq!((mapping.start, mapping.end), (0x5500_0000, 0x5500_2000));
        assert_eq!(
            (mapping.offset, mapping.name.as_str()),
            (0x1000, "55000000-55002000")
        );
        for odd in [
            "x",
            "1-2 r-xp 0 0 1",
            "2000-1000 r-xp 0 0 1",
            "g-1000 r-xp 0 0 1",
        ] {
            assert!(parse(odd).is_err(), "{odd}");
        }
    }
}
