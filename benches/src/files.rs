//! Real files for a guest's page cache: programs, libraries, texts and data of this machine's own Debian, as one tar
//! archive.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use palanquin_lab::process;
use serde::Serialize;

/// Where the files come from, each with its part of the whole in percent: about what the page cache of a server that
/// runs dynamically linked programs holds.
const SOURCES: [(&str, u64); 4] = [
    ("/usr/lib/x86_64-linux-gnu", 45),
    ("/usr/bin", 25),
    ("/usr/share", 20),
    ("/usr/include", 10),
];
/// Larger files are passed over, so that no single one is most of the memory.
const LARGEST: u64 = 32 << 20;
/// Packing takes no longer.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the archive holds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Contents {
    /// Files in it.
    pub(crate) files: usize,
    /// Bytes of the archive.
    pub(crate) bytes: u64,
    /// Bytes of the archive packed by `gzip -1`, over those unpacked.
    pub(crate) gzip_ratio: f64,
    /// From where, and how many MiB.
    pub(crate) sources: Vec<(String, u64)>,
}

/// Makes the archive, and says what is in it.
pub(crate) fn pack(archive: &Path, mib: u64) -> Result<Contents> {
    let (mut chosen, mut sources) = (Vec::new(), Vec::new());
    for (dir, percent) in SOURCES {
        let budget = (mib << 20) * percent / 100;
        let mut used = 0;
        choose(Path::new(dir), budget, &mut used, &mut chosen)?;
        sources.push((dir.to_owned(), used >> 20));
    }
    let total: u64 = sources.iter().map(|(_, mib)| mib).sum();
    if total < mib / 2 {
        bail!(
            "this machine has only {total} MiB of the {mib} MiB of files that the guest is to hold"
        );
    }
    let mut list = Vec::new();
    for path in &chosen {
        list.extend_from_slice(path.as_os_str().as_encoded_bytes());
        list.push(0);
    }
    let names = archive.with_extension("list");
    fs::write(&names, list)?;
    let mut tar = Command::new("tar");
    tar.args([
        "--null",
        "--no-recursion",
        "--hard-dereference",
        "--files-from",
    ])
    .arg(&names)
    .args(["--absolute-names", "--transform", "s,^/,,", "-cf"])
    .arg(archive);
    let packed = process::output(&mut tar, PATIENCE)?;
    if !packed.status.success() {
        bail!("tar: {}", String::from_utf8_lossy(&packed.stderr));
    }
    let bytes = fs::metadata(archive)?.len();
    Ok(Contents {
        files: chosen.len(),
        bytes,
        gzip_ratio: gzipped(archive)? as f64 / bytes as f64,
        sources,
    })
}

/// Chooses regular files below `dir` in the order of their names until the budget is used up.
fn choose(dir: &Path, budget: u64, used: &mut u64, chosen: &mut Vec<PathBuf>) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    let mut entries: Vec<_> = entries.collect::<io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type()?;
        if kind.is_dir() {
            choose(&entry.path(), budget, used, chosen)?;
        } else if kind.is_file() {
            let size = entry.metadata()?.len();
            // A file takes whole pages, and so does a small one.
            let size = size.next_multiple_of(4096);
            if size <= LARGEST && *used + size <= budget {
                *used += size;
                chosen.push(entry.path());
            }
        }
    }
    Ok(())
}

fn gzipped(archive: &Path) -> Result<u64> {
    let mut gzip = Command::new("gzip")
        .args(["-1", "-c"])
        .stdin(File::open(archive)?)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start gzip")?;
    let mut output = gzip.stdout.take().context("gzip has no output")?;
    let bytes = io::copy(&mut output, &mut io::sink())?;
    gzip.wait()?;
    Ok(bytes)
}
