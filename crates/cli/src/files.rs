//! Files that commands read, within bounds, and write, all or none.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use palanquin_api::control::ErrorKind;

use crate::failure::Failure;

/// Something that should have worked.
pub(crate) fn failed(what: &str, cause: impl std::fmt::Display) -> Failure {
    Failure::new(ErrorKind::Internal, what.to_owned()).cause(cause)
}

/// Reads a file of at most that many bytes.
pub(crate) fn read(path: &Path, bytes_max: usize) -> Result<Vec<u8>, Failure> {
    let unreadable = || Failure::usage(format!("cannot read {}", path.display()));
    let file = File::open(path).map_err(|error| unreadable().cause(error))?;
    let mut bytes = Vec::new();
    file.take(bytes_max as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable().cause(error))?;
    if bytes.len() > bytes_max {
        return Err(unreadable().cause(format!("it has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// Reads a text of at most that many bytes.
pub(crate) fn read_text(path: &Path, bytes_max: usize) -> Result<String, Failure> {
    String::from_utf8(read(path, bytes_max)?)
        .map_err(|_| Failure::usage(format!("{} is not UTF-8", path.display())))
}

/// Files that one command makes: all of them or, where one fails, none.
#[derive(Default)]
pub(crate) struct NewFiles {
    made: Vec<PathBuf>,
}

impl NewFiles {
    /// Writes a new file; one that is there already is never overwritten.
    pub(crate) fn write(
        &mut self,
        path: &Path,
        contents: impl AsRef<[u8]>,
        mode: u32,
    ) -> Result<(), Failure> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path);
        let mut file = file.map_err(|error| {
            let failure = Failure::usage(format!("cannot make {}", path.display()));
            let failure = failure.cause(&error);
            if error.kind() == std::io::ErrorKind::AlreadyExists {
                failure.hint("nothing is overwritten: choose another directory, or move it away")
            } else {
                failure
            }
        })?;
        self.made.push(path.to_owned());
        file.write_all(contents.as_ref())
            .and_then(|()| file.sync_all())
            .map_err(|error| failed(&format!("cannot write {}", path.display()), error))
    }

    /// All of them are there: they stay.
    pub(crate) fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for path in &self.made {
            let _ = fs::remove_file(path);
        }
    }
}

/// Makes a directory for its owner only.
pub(crate) fn make_dir(path: &Path) -> Result<(), Failure> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| Failure::usage(format!("cannot make {}", path.display())).cause(error))
}
