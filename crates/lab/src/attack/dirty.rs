//! The memory that the VM gets at the destination is not empty (T8, L2).
//!
//! QEMU's RAM may be a file that others have open too, as operators do for vhost-user and huge pages. Whoever had it before
//! has filled it; and while it is filled by the migration, he puts back what he likes. Palanquin's containers have RAM that
//! is made for them and has no name: there it is somebody with all rights at the destination who writes into it before the
//! first page comes.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use uuid::Uuid;

use super::memory;
use super::mover::{MOVED, Mover, Sent, corruption, hosts, words};
use super::{ALTERED, Carrier, Found, SENTENCE, VM, prey};
use crate::fail_point::Mode;
use crate::guest::GuestSpec;
use crate::host::SHORT;
use crate::rig::Rig;
use crate::transport::{Role, Transport};
use crate::trust::JudgingRig;
use crate::wait;

const ID: Uuid = Uuid::from_u128(0x7a1c_0000_0000_4000_8000_0000_0000_00a3);
/// What was there before.
const LEFT: &str = "An earlier tenant has left this line in the memory. ";
const PIECE: usize = 1 << 20;
/// Slow enough that what has come can be changed before the guest runs.
const RATE: u64 = 24 << 20;
/// Where he writes into a container that is to be empty.
const PLACE: u64 = 100 << 20;
const POINT: &str = "destination-reserving";

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    match carrier {
        Carrier::Qemu(transport) => on_qemu(transport),
        Carrier::Palanquin => on_palanquin(),
    }
}

/// A file of the guest's size, full of what an earlier tenant left.
fn prepare(path: &Path, mib: u64) -> Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true);
    let file = options.truncate(true).open(path)?;
    let piece: Vec<u8> = LEFT.bytes().cycle().take(PIECE).collect();
    for number in 0..mib {
        file.write_all_at(&piece, number << 20)?;
    }
    Ok(file)
}

/// Somebody who changes the sentence in the file as soon as it is there.
struct Neighbour {
    stop: Arc<AtomicBool>,
    changed: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Neighbour {
    fn start(file: File, mib: u64) -> Self {
        let (stop, changed) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (seen, count) = (Arc::clone(&stop), Arc::clone(&changed));
        let thread = std::thread::spawn(move || {
            let mut piece = vec![0; PIECE];
            while !seen.load(Ordering::Relaxed) {
                for number in 0..mib {
                    file.read_exact_at(&mut piece, number << 20)?;
                    for at in places(&piece) {
                        file.write_all_at(ALTERED.as_bytes(), (number << 20) + at)?;
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
                wait::pause(Duration::from_millis(20))?;
            }
            Ok(())
        });
        Self {
            stop,
            changed,
            thread,
        }
    }

    fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join();
        ended.map_err(|_| anyhow!("the neighbour panicked"))??;
        Ok(self.changed.load(Ordering::Relaxed))
    }
}

/// Where the sentence is.
fn places(bytes: &[u8]) -> Vec<u64> {
    let sentence = SENTENCE.as_bytes();
    bytes
        .windows(sentence.len())
        .enumerate()
        .filter(|(_, window)| *window == sentence)
        .map(|(at, _)| at as u64)
        .collect()
}

fn on_qemu(transport: Transport) -> Result<Found> {
    let rig = hosts(&["a", "b"])?;
    let mut mover = Mover::boot(&rig, transport, 1)?;
    let mib: u64 = prey().memory_mib.iter().sum();
    let path = rig.dir().join("prepared");
    let file = prepare(&path, mib)?;
    let ready = mover.ready_with(&rig, 1, &Role::Sharing(&path))?;
    let rate = json!({"max-bandwidth": RATE});
    mover.qmp.execute("migrate-set-parameters", &rate)?;
    let neighbour = Neighbour::start(file, mib);
    let sent = mover.send(&ready.connect, MOVED)?;
    let changed = neighbour.finish()?;
    let there = ready.receiver.beats_on()?;
    let left = memory::in_process(ready.receiver.qemu.pid(), LEFT)?;
    let altered = memory::in_process(ready.receiver.qemu.pid(), ALTERED)?;
    let said = corruption(&ready.receiver.qemu.console());
    let what = format!(
        "the RAM is a file of {mib} MiB full of an earlier tenant's line: {left} of those are left; the source says {sent}; \
         whoever has the file open changed the sentence {changed} times while it came: {altered} altered copies are in the RAM"
    );
    ensure!(
        matches!(sent, Sent::Completed(_)) || there.is_none(),
        "{what}: it runs there all the same"
    );
    Ok(match there {
        Some(beat) if left + altered > 0 => Found::succeeded(format!(
            "{what}; the guest runs there, at beat {beat}, and says of its memory: {}",
            said.unwrap_or_else(|| "nothing".to_owned())
        )),
        Some(_) => Found::unnoticed(format!(
            "{what}; the guest runs there with its own memory alone"
        )),
        None => Found::detected(format!("{what}; the guest does not run there")),
    })
}

/// Writes into the memory that a QEMU has for its guest.
fn soil(pid: u32, bytes: u64) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let start = maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?);
        (rest.starts_with("rw-s") && end - start == bytes).then_some(start)
    });
    let start = start.context("the container has no such memory")?;
    let memory = OpenOptions::new()
        .write(true)
        .open(format!("/proc/{pid}/mem"))?;
    let page: Vec<u8> = LEFT.bytes().cycle().take(4096).collect();
    memory.write_all_at(&page, start + PLACE)?;
    Ok(())
}

/// Moves the guest into a container that he has written into; what became of that.
fn into_soiled(rig: &Rig, guest: &GuestSpec) -> Result<Found> {
    rig.hosts[1].arm(POINT, Mode::Stop)?;
    let running = rig.hosts[0].palanquin_started(&["migrate", VM, "--to", "b"])?;
    rig.hosts[1].wait_reached(POINT, SHORT, || Ok(()))?;
    let pid = rig.hosts[1]
        .qemus()?
        .first()
        .copied()
        .context("no container")?;
    let soiled = soil(pid, guest.memory_mib.iter().sum::<u64>() << 20);
    rig.hosts[1].release(POINT)?;
    soiled?;
    let told = running.finish(SHORT)?;
    let at = rig.find_the_one(VM)?;
    let pid = rig.hosts[at].qemus()?.first().copied().context("no QEMU")?;
    let left = memory::in_process(pid, LEFT)?;
    let what = format!(
        "{}; {left} copies in the guest's RAM, at {}",
        words(&told)?,
        rig.hosts[at].name()
    );
    Ok(if left > 0 {
        Found::succeeded(what)
    } else if told.status == 0 {
        Found::unnoticed(what)
    } else {
        Found::detected(what)
    })
}

fn on_palanquin() -> Result<Found> {
    let guest = prey();
    let plain = {
        let rig = super::mover::with_agents(&guest)?;
        into_soiled(&rig, &guest)?
    };
    let judging = JudgingRig::attesting(true)?;
    let passport = judging.passport(ID, 1, "[attestation]\nmax-age = \"60s\"\n")?;
    judging.rig.hosts[0].boot_with(&guest, &["--passport", &passport])?;
    let shown = into_soiled(&judging.rig, &guest)?;
    let evidence = format!(
        "a page was written into the container before the first came; hosts that show evidence: {}; hosts that show none: {}",
        shown.evidence, plain.evidence
    );
    // The worse of both.
    let worse = if plain.verdict == crate::results::Verdict::Succeeded {
        plain.verdict
    } else {
        shown.verdict
    };
    Ok(Found::new(worse, evidence))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::path::replace;

    #[test]
    fn what_he_changes_is_found_where_it_is() {
        let mut bytes = format!("..{SENTENCE}..{SENTENCE}").into_bytes();
        assert_eq!(places(&bytes), [2, 4 + SENTENCE.len() as u64]);
        assert_eq!(
            replace(&mut bytes, SENTENCE.as_bytes(), ALTERED.as_bytes()),
            2
        );
        assert!(places(&bytes).is_empty());
    }
}
