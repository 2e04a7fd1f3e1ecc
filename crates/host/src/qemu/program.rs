//! The hypervisor's binary: opened once, measured, and started from what was opened.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use crate::Error;
use crate::measure::Meter;
use crate::process::Process;

/// Beginning of a binary (elf(5)). A script is started by its interpreter, which opens it by its path.
const ELF: &[u8] = b"\x7fELF";

/// A binary that is about to be started.
pub(super) struct Program {
    file: File,
    path: PathBuf,
    /// A name for the descriptor, so that the process is called as the binary is.
    link: Option<PathBuf>,
}

impl Program {
    /// Opens and measures a binary. The directory is where nobody else can write.
    pub(super) fn open(binary: &Path, dir: &Path, meter: &Meter) -> Result<Self, Error> {
        let opening = || Error::io(format!("starting {}", binary.display()));
        let file = File::open(binary).map_err(opening())?;
        let mut magic = [0; 4];
        let is_elf = file.read_at(&mut magic, 0).map_err(opening())? == 4 && magic == ELF;
        if !is_elf {
            let path = binary.to_owned();
            let link = None;
            return Ok(Self { file, path, link });
        }
        meter.file(&file)?;
        // The descriptor is closed when the binary runs, not before it is found.
        let target = format!("/proc/self/fd/{}", file.as_raw_fd());
        let name = binary.file_name().unwrap_or(OsStr::new("qemu"));
        let link = dir.join(name);
        // One that an agent left which died here.
        let _ = fs::remove_file(&link);
        symlink(target, &link).map_err(opening())?;
        Ok(Self {
            file,
            path: link.clone(),
            link: Some(link),
        })
    }

    /// What to start.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether that runs, and is still what it was.
    pub(super) fn check(&self, process: &Process, meter: &Meter) -> Result<(), Error> {
        if self.link.is_none() || meter.is_run_by(&self.file, process)? {
            Ok(())
        } else {
            Err(Error::NotMeasured(self.path.clone()))
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            let _ = fs::remove_file(link);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_opened_is_started_whatever_lies_at_the_path_by_then() {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("program");
        fs::copy("/bin/cat", &binary).unwrap();
        let meter = Meter::default();
        let vm_dir = dir.path().join("vm");
        fs::create_dir(&vm_dir).unwrap();
        let program = Program::open(&binary, &vm_dir, &meter).unwrap();
        let other = dir.path().join("other");
        fs::copy("/bin/true", &other).unwrap();
        fs::rename(&other, &binary).unwrap();
        let start = |path: &Path| {
            let child = Command::new(path).stdin(Stdio::piped()).spawn();
            child.unwrap()
        };
        let mut child = start(program.path());
        let process = Process::open(child.id()).unwrap();
        program.check(&process, &meter).unwrap();
        let comm = fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap();
        assert_eq!(comm, "program\n");
        assert!(process.kill(Duration::from_secs(5)));
        let _ = child.wait();
        // By another program the check is not passed.
        let mut child = start(Path::new("/bin/cat"));
        let process = Process::open(child.id()).unwrap();
        let error = program.check(&process, &meter).unwrap_err();
        assert!(matches!(error, Error::NotMeasured(_)), "{error}");
        process.kill(Duration::from_secs(5));
        let _ = child.wait();
        drop(program);
        assert_eq!(fs::read_dir(&vm_dir).unwrap().count(), 0);
    }

    #[test]
    fn a_script_is_started_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("wrapper");
        fs::write(&script, "#!/bin/sh\nexec cat\n").unwrap();
        let program = Program::open(&script, dir.path(), &Meter::default()).unwrap();
        assert_eq!(program.path(), script);
        let error = Program::open(&dir.path().join("none"), dir.path(), &Meter::default());
        assert!(error.is_err());
    }
}
