//! A note of where the RAM of a VM is that misses pages: QEMU can't be asked while it waits for one.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ram::{Place, QemuRam};
use crate::Error;
use crate::process::{Process, boot_id};

/// Longest note that is read.
const NOTE_MAX: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Note {
    pid: u32,
    start_ticks: u64,
    boot_id: String,
    places: Vec<Place>,
}

fn path(vm_dir: &Path) -> PathBuf {
    vm_dir.join("missing.json")
}

fn is_of(note: &Note, process: &Process) -> bool {
    note.pid == process.pid()
        && note.start_ticks == process.start_ticks()
        && boot_id().is_ok_and(|id| id == note.boot_id)
}

/// Takes the note. It need not outlive a crash of the host, which ends the VM too.
pub(super) fn write(vm_dir: &Path, process: &Process, ram: &QemuRam) -> Result<(), Error> {
    let failed = || Error::io("noting where guest RAM is");
    let note = Note {
        pid: process.pid(),
        start_ticks: process.start_ticks(),
        boot_id: boot_id()?,
        places: ram.places(),
    };
    let bytes = serde_json::to_vec(&note).map_err(|error| failed()(error.into()))?;
    let new = vm_dir.join("missing.json.new");
    fs::write(&new, bytes).map_err(failed())?;
    // As a whole or not at all.
    fs::rename(&new, path(vm_dir)).map_err(failed())
}

/// The RAM of this process as it was noted; none where nothing was, or where it is not there any more.
pub(super) fn read(vm_dir: &Path, process: &Process) -> Option<QemuRam> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path(vm_dir)).ok()?;
    file.take(NOTE_MAX).read_to_end(&mut bytes).ok()?;
    let note: Note = serde_json::from_slice(&bytes).ok()?;
    if !is_of(&note, process) {
        return None;
    }
    QemuRam::find_again(process, note.places).ok()
}

/// Removes the note.
pub(super) fn remove(vm_dir: &Path) -> Result<(), Error> {
    match fs::remove_file(path(vm_dir)) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::io("removing a note")(error))
        }
        _ => Ok(()),
    }
}

/// Whether this is a note.
#[cfg(feature = "fuzzing")]
pub(super) fn is_note(bytes: &[u8]) -> bool {
    serde_json::from_slice::<Note>(bytes).is_ok()
}
