//! A recorded migration is sent again (T4, T9).

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::mover::{
    MOVED, Mover, Sent, agent_at, complaint, hosts, is_alive, log_line, migrate, receiver_at,
    total, with_agents,
};
use super::path::{Hijack, Man, Strike};
use super::{Carrier, Found, VM, prey};
use crate::guest::Console;
use crate::host::{self, SHORT};
use crate::rig::Rig;
use crate::transport::{Role, Transport};
use crate::wait;

/// A receiver that says nothing to what it is sent is given up after this time.
const ANSWER: Duration = Duration::from_secs(12);
/// Most that is read of an answer.
const ANSWER_MAX: u64 = 1 << 20;

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    match carrier {
        Carrier::Qemu(transport) => on_qemu(transport),
        Carrier::Palanquin => on_palanquin(),
    }
}

/// Sends bytes to a receiver from a machine that is none; how much it answers.
pub(super) fn send(rig: &Rig, to: SocketAddrV4, bytes: Vec<u8>) -> Result<usize> {
    rig.client.inside(move || {
        let mut stream = TcpStream::connect(to).context("nobody listens")?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        // It may hang up in the middle.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.take(ANSWER_MAX).read_to_end(&mut answer);
        Ok(answer.len())
    })
}

fn on_qemu(transport: Transport) -> Result<Found> {
    let rig = hosts(&["a", "b"])?;
    let mut mover = Mover::boot(&rig, transport, 1)?;
    let man = Man::on(&rig, transport, Strike::Record)?;
    let ready = mover.ready(&rig, 1)?;
    let sent = mover.send(&ready.connect, MOVED)?;
    // What stands between stays, as it does for the next migration.
    ensure!(
        matches!(sent, Sent::Completed(_)) && ready.receiver.beats_on()?.is_some(),
        "the guest has not moved: {sent}"
    );
    // Only now has he seen the end of it.
    let recorded = man.seen(transport)?;
    // The place is needed for another receiver: the first one's console moves away with it.
    let dir = rig.hosts[1].dir();
    fs::rename(dir.join("incoming"), dir.join("first"))?;
    let first = Console::new(dir.join("first/console.log"));
    if let Some(socket) = ready.receiver.listens.strip_prefix("unix:") {
        let _ = fs::remove_file(socket);
    }
    let second = mover.receiver(
        &rig.hosts[1],
        ready.receiver.listens.clone(),
        &Role::Incoming,
    )?;
    let bytes = total(&recorded);
    let mut answered = 0;
    let mut how = String::new();
    if let Man::Packets(packets) = &man {
        let count = recorded.recorded.len();
        let came = packets.send_again(&rig.hosts[1], recorded.recorded)?;
        ensure!(
            2 * came > count as u64,
            "only {came} of {count} packets came"
        );
        how = format!(" in {count} packets, of which {came} came to IKE's daemon");
    } else {
        let receiver = receiver_at(&rig, transport)?;
        for connection in recorded.recorded {
            answered += send(&rig, receiver, connection)?;
        }
    }
    let old = second.beats_on()?;
    let new = first.wait_beats(2, SHORT)?.number;
    let what =
        format!("{bytes} bytes of a migration were sent again to a receiver that waits{how}");
    Ok(if let Some(old) = old {
        Found::succeeded(format!(
            "{what}: the guest runs there from its old state, beat {old}, while the one that had moved goes on, at beat {new}"
        ))
    } else {
        let waits = is_alive(&second.qemu);
        let said = complaint(&rig.hosts[1]);
        let what = format!(
            "{what}: {answered} bytes of answer, no guest runs; it says: {}; it waits on: {waits}; the guest that had moved \
             goes on, at beat {new}",
            said.as_deref().unwrap_or("nothing")
        );
        if said.is_none() {
            Found::unnoticed(what)
        } else {
            Found::detected(what)
        }
    })
}

fn on_palanquin() -> Result<Found> {
    let rig = with_agents(&prey())?;
    let hijack = Hijack::start(&rig, 0, 1, &[host::PORT], Strike::Record)?;
    let (told, at) = migrate(&rig, 0, &[])?;
    ensure!(at == 1, "the guest has not moved: {told:?}");
    let recorded = hijack.seen();
    drop(hijack);
    // Back home, so that the destination would have room for it.
    let (told, at) = migrate(&rig, 1, &[])?;
    ensure!(at == 0, "the guest has not moved back: {told:?}");
    let before = rig.hosts[1].migrations()?.len();
    let bytes = total(&recorded);
    let count = recorded.recorded.len();
    let mut answered = 0;
    let receiver = agent_at(&rig.hosts[1])?;
    for connection in recorded.recorded {
        answered += send(&rig, receiver, connection)?;
    }
    let said = wait::until("the log tells", ANSWER, || {
        Ok(log_line(
            &rig.hosts[1],
            &["connection refused", "no handshake"],
        ))
    })
    .unwrap_or_else(|_| "nothing".to_owned());
    let after = rig.hosts[1].migrations()?.len();
    rig.check_lives_once(VM, 0)?;
    let what = format!(
        "{bytes} bytes of {count} connections were sent again: {answered} bytes of answer, {} new migrations; the guest runs \
         once, where it was; the agent's log: {said}",
        after - before
    );
    Ok(if after > before {
        Found::succeeded(what)
    } else if said == "nothing" {
        Found::unnoticed(what)
    } else {
        Found::detected(what)
    })
}
