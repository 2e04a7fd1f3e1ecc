//! Somebody ends the stream too early (T6).

use anyhow::{Result, ensure};
use palanquin_api::control::VmState;
use serde_json::json;

use super::mover::{MOVED, Mover, Sent, complains, hosts, is_alive, migrate, with_agents, words};
use super::path::{Hijack, Man, Strike};
use super::{Carrier, Found, VM, prey};
use crate::host;
use crate::results::Verdict;
use crate::rig::Rig;
use crate::transport::Transport;

/// In the middle of the guest's memory.
const MIDDLE: u64 = 2 << 20;
/// Behind every handshake.
const BEGUN: u64 = 256 << 10;

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    match carrier {
        Carrier::Qemu(transport) => on_qemu(transport),
        Carrier::Palanquin => on_palanquin(),
    }
}

fn on_qemu(transport: Transport) -> Result<Found> {
    let rig = hosts(&["a", "b"])?;
    let cut = attempt(&rig, transport, Strike::Cut(MIDDLE))?;
    if cut.verdict == Verdict::Succeeded {
        return Ok(Found::succeeded(format!(
            "cut in the middle: {}",
            cut.evidence
        )));
    }
    let end = attempt(&rig, transport, Strike::HoldBack(BEGUN))?;
    Ok(Found::new(
        end.verdict,
        format!(
            "cut in the middle, it failed: {}; its last 64 KiB kept back: {}",
            cut.evidence, end.evidence
        ),
    ))
}

fn attempt(rig: &Rig, transport: Transport, strike: Strike) -> Result<Found> {
    let mut mover = Mover::boot(rig, transport, 1)?;
    let man = Man::on(rig, transport, strike)?;
    let ready = mover.ready(rig, 1)?;
    let sent = mover.send(&ready.connect, MOVED)?;
    let seen = man.seen(transport)?;
    ensure!(
        seen.struck > 0 || seen.bytes == 0,
        "he did not strike in {} bytes: {sent}",
        seen.bytes
    );
    let came = if seen.bytes == 0 {
        "nothing came by him; "
    } else {
        ""
    };
    // He has seen that nothing more comes.
    man.cut();
    let here = mover.beats_on()?;
    let there = ready.receiver.beats_on()?;
    let state = mover.qmp.execute("query-status", &json!({}))?;
    let receiver = if is_alive(&ready.receiver.qemu) {
        "waits on".to_owned()
    } else {
        format!("has ended ({})", complains(&rig.hosts[1]))
    };
    let what = format!(
        "{came}the source says {sent}, and its VM is `{}`; the receiver {receiver}; the guest beats at the source: {}, at the \
         destination: {}",
        state["status"].as_str().unwrap_or("unknown"),
        here.is_some(),
        there.is_some()
    );
    let moved = matches!(sent, Sent::Completed(_));
    Ok(match (here, there) {
        (Some(_), Some(_)) => Found::succeeded(what),
        (None, None) if moved => Found::succeeded(format!(
            "{what}: it runs nowhere, and the source says that it has moved: it still has it, for whoever lets it go on there by hand"
        )),
        (None, None) => Found::succeeded(format!("{what}: it runs nowhere")),
        _ if moved => Found::unnoticed(what),
        _ => Found::detected(what),
    })
}

fn on_palanquin() -> Result<Found> {
    let rig = with_agents(&prey())?;
    let mut all = Vec::new();
    let mut at = 0;
    let mut noticed = true;
    for (name, strike) in [
        ("cut in the middle", Strike::Cut(MIDDLE)),
        (
            "the last 64 KiB of each connection kept back",
            Strike::HoldBack(BEGUN),
        ),
    ] {
        let hijack = Hijack::start(&rig, at, 1 - at, &[host::PORT], strike)?;
        let before = at;
        let (told, now) = migrate(&rig, at, &["--deadline", "20s"])?;
        let seen = hijack.seen();
        ensure!(
            seen.struck > 0,
            "he did not strike in {} bytes: {told:?}",
            seen.bytes
        );
        at = now;
        // That it beats there and nowhere else was checked; and it is as the operator was told.
        let runs = rig.hosts[at]
            .vm(VM)?
            .is_some_and(|vm| vm.state == VmState::Running);
        ensure!(runs && (told.status == 0) == (at != before), "{told:?}");
        noticed &= told.status != 0;
        all.push(format!(
            "{name}: {}; the guest runs once, at {}",
            words(&told)?,
            rig.hosts[at].name()
        ));
    }
    let what = all.join("; ");
    Ok(if noticed {
        Found::detected(what)
    } else {
        Found::unnoticed(what)
    })
}
