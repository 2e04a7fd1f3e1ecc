//! Whether a guest ever ran twice, as its own heartbeat proves.
//!
//! Every beat has a number, and the number is in the guest's memory. A guest that ran on two hosts at once, or that was
//! resumed from an older state than it had reached elsewhere, says a number twice. What is shorter than a beat, 200 ms,
//! is not seen.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::guest;
use crate::wait;

/// How often is looked for consoles that are new.
const LOOK: Duration = Duration::from_millis(20);

/// Keeps every console of one guest, on all hosts, also after its file was removed.
#[derive(Debug)]
pub struct Witness {
    stop: Arc<AtomicBool>,
    consoles: Arc<Mutex<Vec<(PathBuf, File)>>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Witness {
    /// Begins; the directories are those of the hosts.
    ///
    /// # Errors
    ///
    /// If no thread can be had.
    pub fn start(hosts: Vec<PathBuf>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let consoles = Arc::default();
        let (stopped, kept) = (Arc::clone(&stop), Arc::clone(&consoles));
        let thread = thread::Builder::new()
            .name("witness".to_owned())
            .spawn(move || {
                let mut known = HashSet::new();
                while !stopped.load(Ordering::Relaxed) {
                    for host in &hosts {
                        look(host, &mut known, &kept);
                    }
                    wait::pause(LOOK)?;
                }
                Ok(())
            })
            .context("no thread for the witness")?;
        Ok(Self {
            stop,
            consoles,
            thread: Some(thread),
        })
    }

    /// How many beats there were so far.
    ///
    /// # Errors
    ///
    /// If one came twice, or one console's do not grow: the guest ran twice, or went back in time.
    pub fn check(&self) -> Result<usize> {
        let running = self.thread.as_ref().is_some_and(|t| !t.is_finished());
        ensure!(running, "the witness looks no more");
        let mut seen: HashMap<u64, PathBuf> = HashMap::new();
        let consoles = self.consoles.lock();
        for (path, file) in &*consoles.unwrap_or_else(PoisonError::into_inner) {
            let mut last = 0;
            for beat in guest::beats(&whole(file)?) {
                ensure!(
                    beat.number > last,
                    "beat {} after {last} in {}",
                    beat.number,
                    path.display()
                );
                last = beat.number;
                if let Some(other) = seen.insert(beat.number, path.clone()) {
                    return Err(anyhow!(
                        "the guest ran twice: beat {} in {} and in {}",
                        beat.number,
                        other.display(),
                        path.display()
                    ));
                }
            }
        }
        Ok(seen.len())
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // An interrupted wait ends it too.
            let _ = thread.join();
        }
    }
}

fn look(host: &Path, known: &mut HashSet<(u64, u64)>, kept: &Mutex<Vec<(PathBuf, File)>>) {
    let Ok(vms) = fs::read_dir(host.join("s/vms")) else {
        return;
    };
    for vm in vms.flatten() {
        let path = vm.path().join("console.log");
        let Ok(file) = File::open(&path) else {
            continue;
        };
        let Ok(metadata) = file.metadata() else {
            continue;
        };
        // A file that is kept open keeps its number, also when it is removed.
        if known.insert((metadata.dev(), metadata.ino())) {
            kept.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push((path, file));
        }
    }
}

fn whole(file: &File) -> Result<String> {
    let length = file.metadata()?.len();
    let mut bytes = vec![0; usize::try_from(length)?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: u64) -> String {
        format!("beat {number} sweeps 0 verified 0 corrupt 0 audits 0\n")
    }

    fn two_hosts() -> (tempfile::TempDir, [PathBuf; 2]) {
        let dir = tempfile::tempdir().unwrap();
        let hosts = ["0", "1"].map(|host| dir.path().join(host));
        for host in &hosts {
            fs::create_dir_all(host.join("s/vms/x")).unwrap();
        }
        (dir, hosts)
    }

    fn witness_of(hosts: &[PathBuf; 2], beats: usize) -> Result<usize> {
        let witness = Witness::start(hosts.to_vec())?;
        wait::until("all beats are seen", Duration::from_secs(10), || {
            let seen = witness.check()?;
            Ok((seen == beats).then_some(seen))
        })
    }

    #[test]
    fn a_guest_that_moves_beats_once_on_either_host() {
        let (_dir, [a, b]) = two_hosts();
        // The fourth was on its way when the guest moved.
        fs::write(
            a.join("s/vms/x/console.log"),
            line(1) + &line(2) + &line(3) + "beat 4 swe",
        )
        .unwrap();
        fs::write(b.join("s/vms/x/console.log"), format!("eps 0\n{}", line(5))).unwrap();
        assert_eq!(witness_of(&[a, b], 4).unwrap(), 4);
    }

    #[test]
    fn a_guest_that_runs_twice_is_found_out() {
        let (_dir, [a, b]) = two_hosts();
        fs::write(a.join("s/vms/x/console.log"), line(1) + &line(2)).unwrap();
        fs::write(b.join("s/vms/x/console.log"), line(2) + &line(3)).unwrap();
        let error = witness_of(&[a, b], 4).unwrap_err();
        assert!(format!("{error:#}").contains("ran twice"), "{error:#}");
    }
}
