//! What is left at the source (T8, L1).
//!
//! Pages that were given back to the kernel are not looked at: on one machine the memory of the destination, which has the
//! sentence rightly, is not to be told from them. The kernel zeroes them before it gives them to anybody.

use anyhow::{Result, ensure};

use super::memory;
use super::mover::{MOVED, Mover, Sent, hosts, migrate, with_agents};
use super::{Carrier, Found, SENTENCE, prey};

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    let (rig, mut kept);
    let there = match carrier {
        Carrier::Qemu(transport) => {
            rig = hosts(&["a", "b"])?;
            let mut mover = Mover::boot(&rig, transport, 1)?;
            let ready = mover.ready(&rig, 1)?;
            let sent = mover.send(&ready.connect, MOVED)?;
            ensure!(
                matches!(sent, Sent::Completed(_)) && ready.receiver.beats_on()?.is_some(),
                "the guest has not moved: {sent}"
            );
            let there = memory::in_process(ready.receiver.qemu.pid(), SENTENCE)?;
            kept = Some((mover, ready));
            there
        }
        Carrier::Palanquin => {
            rig = with_agents(&prey())?;
            let (told, at) = migrate(&rig, 0, &[])?;
            ensure!(at == 1, "the guest has not moved: {told:?}");
            kept = None;
            let pid = rig.hosts[1].qemus()?.first().copied().unwrap_or_default();
            memory::in_process(pid, SENTENCE)?
        }
    };
    // Who does not find it where it is has not looked well.
    ensure!(
        there > 100,
        "the sentence is {there} times at the destination"
    );
    let search = memory::in_host(&rig.hosts[0], SENTENCE)?;
    let what = format!(
        "{} processes and {} files of the source were searched after the guest had moved; it is {there} times at the \
         destination",
        search.processes, search.files
    );
    if search.count() == 0 {
        return Ok(Found::unnoticed(format!("the sentence is nowhere: {what}")));
    }
    let places: Vec<String> = search
        .found
        .iter()
        .map(|(place, count)| format!("{count} times in {place}"))
        .collect();
    let mut what = format!("the sentence is {}: {what}", places.join(", "));
    if let Some((mover, _)) = kept.as_mut() {
        let alone = search
            .found
            .iter()
            .all(|(place, _)| place.contains(&mover.qemu.pid().to_string()));
        what += &format!(
            "; QEMU keeps it, paused, until somebody ends it; it is nowhere else: {alone}"
        );
    }
    Ok(Found::succeeded(what))
}
