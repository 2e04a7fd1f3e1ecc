//! Somebody changes memory on the path (T6).

use anyhow::{Result, ensure};

use super::memory;
use super::mover::{
    MOVED, Mover, Ready, Sent, complains, corruption, hosts, migrate, with_agents, words,
};
use super::path::{Hijack, Man, Seen, Strike};
use super::{ALTERED, Carrier, Found, SENTENCE, prey};
use crate::host;
use crate::rig::Rig;
use crate::transport::Transport;

/// In the middle of the guest's memory, whatever its encoding, and behind every handshake.
const BLIND: u64 = 2 << 20;

fn in_place() -> Strike {
    Strike::Replace(SENTENCE.as_bytes(), ALTERED.as_bytes())
}

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    match carrier {
        Carrier::Qemu(transport) => on_qemu(transport),
        Carrier::Palanquin => on_palanquin(),
    }
}

fn on_qemu(transport: Transport) -> Result<Found> {
    let rig = hosts(&["a", "b"])?;
    let (seen, sent, gone, mut ready) = attempt(&rig, transport, in_place())?;
    let struck = seen.struck;
    if seen.bytes == 0 || struck > 0 {
        return judge(
            &rig,
            struck,
            if struck > 0 {
                "the sentence was changed"
            } else {
                "nothing came by him"
            },
            &sent,
            gone,
            &ready,
        );
    }
    ensure!(
        matches!(sent, Sent::Completed(_)),
        "nothing was changed, and {sent}"
    );
    // It was not to be seen: then any byte.
    ready.receiver.qemu.kill();
    drop(ready);
    let (seen, sent, gone, ready) = attempt(&rig, transport, Strike::Flip(BLIND))?;
    let struck = seen.struck;
    ensure!(struck == 1, "he struck {struck} times: {sent}");
    let what = "the sentence was not to be seen, so one bit was changed";
    judge(&rig, struck, what, &sent, gone, &ready)
}

/// Moves a guest with him on the path: what he has seen, what the source says, and whether the guest goes on there.
fn attempt(rig: &Rig, transport: Transport, strike: Strike) -> Result<(Seen, Sent, bool, Ready)> {
    let mut mover = Mover::boot(rig, transport, 1)?;
    let man = Man::on(rig, transport, strike)?;
    let ready = mover.ready(rig, 1)?;
    let sent = mover.send(&ready.connect, MOVED)?;
    let stays = mover.beats_on()?.is_some();
    Ok((man.seen(transport)?, sent, stays, ready))
}

fn judge(
    rig: &Rig,
    struck: u64,
    what: &str,
    sent: &Sent,
    stays: bool,
    ready: &Ready,
) -> Result<Found> {
    let console = ready.receiver.qemu.console();
    let arrived = ready.receiver.beats_on()?.is_some();
    let what = match struck {
        0 | 1 => format!("{what}; the source says {sent}"),
        _ => format!("{what} in {struck} places; the source says {sent}"),
    };
    if !arrived {
        return Ok(Found::detected(format!(
            "{what}; the receiver: {}; the guest goes on at the source: {stays}",
            complains(&rig.hosts[1])
        )));
    }
    let copies = memory::in_process(ready.receiver.qemu.pid(), ALTERED)?;
    let said = corruption(&console);
    if copies == 0 && said.is_none() {
        return Ok(Found::unnoticed(format!(
            "{what}; the guest arrived, and nothing in it is altered"
        )));
    }
    let said = said.unwrap_or_else(|| "nothing".to_owned());
    Ok(Found::succeeded(format!(
        "{what}; the guest runs at the destination with {copies} copies of what he made of it in its RAM; it says itself: {said}"
    )))
}

fn on_palanquin() -> Result<Found> {
    let rig = with_agents(&prey())?;
    let hijack = Hijack::start(&rig, 0, 1, &[host::PORT], in_place())?;
    let (told, at) = migrate(&rig, 0, &[])?;
    let seen = hijack.seen();
    drop(hijack);
    let clear = format!(
        "the sentence was {} times in {} bytes",
        seen.struck, seen.bytes
    );
    ensure!(seen.bytes > BLIND && at == 1, "{clear}; {told:?}");
    let hijack = Hijack::start(&rig, 1, 0, &[host::PORT], Strike::Flip(BLIND))?;
    let (told, at) = migrate(&rig, 1, &[])?;
    ensure!(hijack.seen().struck == 1, "no bit was changed: {told:?}");
    let console = rig.hosts[at].console(super::VM)?;
    let pid = rig.hosts[at].qemus()?.first().copied().unwrap_or_default();
    let copies = memory::in_process(pid, ALTERED)?;
    let said = corruption(&console);
    let what = format!("{clear}; then one bit was changed: {}", words(&told)?);
    Ok(if copies > 0 || said.is_some() {
        Found::succeeded(format!(
            "{what}; {copies} altered copies; the guest says {said:?}"
        ))
    } else {
        let noticed = told.status != 0 || told.migration()?.rejoined > 0;
        let what = format!(
            "{what}; the guest runs once, at {}, its memory whole",
            rig.hosts[at].name()
        );
        if noticed {
            Found::detected(what)
        } else {
            Found::unnoticed(what)
        }
    })
}
