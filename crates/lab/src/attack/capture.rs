//! Somebody reads along on the path (T5, S2, S3).

use anyhow::{Result, ensure};

use super::mover::{MOVED, Mover, Sent, hosts, migrate, with_agents};
use super::{Carrier, Found, SENTENCE, prey};
use crate::observer::Capture;
use crate::transport::Transport;

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    let (rig, capture);
    match carrier {
        Carrier::Qemu(transport) => {
            rig = hosts(&["a", "b"])?;
            let mut mover = Mover::boot(&rig, transport, 1)?;
            let recording = rig.record()?;
            let ready = mover.ready(&rig, 1)?;
            let sent = mover.send(&ready.connect, MOVED)?;
            capture = recording.finish()?;
            if transport != Transport::Segment {
                proves(&capture)?;
            }
            ensure!(
                matches!(sent, Sent::Completed(_)) && ready.receiver.beats_on()?.is_some(),
                "the guest has not moved: {sent}"
            );
        }
        Carrier::Palanquin => {
            rig = with_agents(&prey())?;
            let recording = rig.record()?;
            let (told, at) = migrate(&rig, 0, &[])?;
            capture = recording.finish()?;
            proves(&capture)?;
            ensure!(at == 1, "the guest has not moved: {told:?}");
        }
    }
    let found = capture.count(SENTENCE)?;
    let all = format!(
        "in {:.1} MiB of packets, {} missed, after the guest had moved",
        capture.bytes as f64 / f64::from(1 << 20),
        capture.dropped
    );
    Ok(if found > 0 {
        Found::succeeded(format!("the sentence is {found} times {all}"))
    } else {
        Found::unnoticed(format!("the sentence is nowhere {all}"))
    })
}

/// A capture without the memory of a guest proves nothing.
fn proves(capture: &Capture) -> Result<()> {
    ensure!(
        capture.bytes > 1 << 20,
        "too little was recorded: {capture:?}"
    );
    Ok(())
}
