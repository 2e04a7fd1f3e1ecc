//! A stranger sends the receiver what is no migration (T7).

use anyhow::{Context, Result, ensure};

use super::mover::{
    MOVED, Mover, Sent, agent_at, complaint, hosts, is_alive, migrate, receiver_at, total,
    with_agents, words,
};
use super::path::{Hijack, Strike};
use super::replay;
use super::{Carrier, Found, prey};
use crate::host::{self, Host};
use crate::process;
use crate::transport::Transport;
use crate::wait;

/// Altered copies of each recorded connection.
const COPIES: u64 = 8;
/// Bytes of a connection that is sent again.
const PREFIX: usize = 256 << 10;

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    match carrier {
        Carrier::Qemu(transport) => on_qemu(transport),
        Carrier::Palanquin => on_palanquin(),
    }
}

/// Numbers that look random, and are the same in each run (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn bytes(&mut self, head: &[u8], count: usize) -> Vec<u8> {
        let mut bytes = head.to_vec();
        while bytes.len() < count {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes
    }
}

/// What a stranger sends: nothing that makes sense, with and without the beginning of what is expected.
fn nonsense() -> Vec<Vec<u8>> {
    let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
    let heads: [&[u8]; 5] = [
        b"",
        // Magic and version of QEMU's stream, and a section of 4 GiB.
        b"QEVM\x00\x00\x00\x03\x01\x00\x00\x00\x01\x03ram\xff\xff\xff\xff",
        // A record of TLS with a ClientHello that is longer than it.
        b"\x16\x03\x01\x40\x00\x01\xff\xff\xff",
        b"SSH-2.0-stranger\r\n\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
    ];
    heads
        .into_iter()
        .map(|head| numbers.bytes(head, PREFIX))
        .collect()
}

fn on_qemu(transport: Transport) -> Result<Found> {
    let rig = hosts(&["a", "b"])?;
    let mut mover = Mover::boot(&rig, transport, 1)?;
    let ready = mover.ready(&rig, 1)?;
    let receiver = receiver_at(&rig, transport)?;
    let mut sent = 0;
    for bytes in nonsense() {
        if !is_alive(&ready.receiver.qemu) {
            break;
        }
        // It listens no more when it has taken a stranger for the source.
        if replay::send(&rig, receiver, bytes).is_err() {
            break;
        }
        sent += 1;
        // What it makes of that it does a moment later.
        wait::pause(std::time::Duration::from_millis(300))?;
    }
    let alive = is_alive(&ready.receiver.qemu);
    let told = complaint(&rig.hosts[1]);
    let said = told.as_deref().unwrap_or("nothing");
    let moved = mover.send(&ready.connect, MOVED)?;
    let there = ready.receiver.beats_on()?.is_some();
    let here = mover.beats_on()?.is_some();
    let what = format!(
        "{sent} streams of nonsense; the receiver says: {said}; it lives on: {alive}; then the source says {moved}; the guest \
         goes on at the source: {here}, at the destination: {there}"
    );
    Ok(
        if !alive || !there || !matches!(moved, Sent::Completed(_)) {
            Found::succeeded(what)
        } else if told.is_none() {
            Found::unnoticed(what)
        } else {
            Found::detected(what)
        },
    )
}

fn pids(host: &Host) -> Result<(u32, u32)> {
    Ok((
        host.agent_pid().context("no agent")?,
        host.network_pid()?.context("no network process")?,
    ))
}

fn on_palanquin() -> Result<Found> {
    let rig = with_agents(&prey())?;
    let hijack = Hijack::start(&rig, 0, 1, &[host::PORT], Strike::Record)?;
    let (told, at) = migrate(&rig, 0, &[])?;
    ensure!(at == 1, "the guest has not moved: {told:?}");
    let seen = hijack.seen();
    drop(hijack);
    ensure!(total(&seen) > PREFIX, "too little was recorded");
    let (told, at) = migrate(&rig, 1, &[])?;
    ensure!(at == 0, "the guest has not moved back: {told:?}");
    let victim = &rig.hosts[1];
    let before = (pids(victim)?, victim.migrations()?.len());
    let mut all = nonsense();
    let mut numbers = Numbers(0x1234_5678_9ABC_DEF1);
    for recorded in &seen.recorded {
        for copy in 0..COPIES {
            let mut bytes = recorded[..recorded.len().min(PREFIX)].to_vec();
            // Within the handshake, which is all that a stranger gets to.
            let reach = bytes.len().clamp(1, 2048) as u64;
            for _ in 0..=copy {
                let place = usize::try_from(numbers.next() % reach)?;
                if let Some(byte) = bytes.get_mut(place) {
                    *byte ^= u8::try_from(numbers.next() % 255)? + 1;
                }
            }
            all.push(bytes);
        }
    }
    let count = all.len();
    let receiver = agent_at(victim)?;
    for bytes in all {
        replay::send(&rig, receiver, bytes)?;
    }
    let log = std::fs::read_to_string(victim.log())?;
    let after = (pids(victim)?, victim.migrations()?.len());
    let lives = process::start_ticks(after.0.0).is_some() && !log.contains("panicked");
    let said = log
        .lines()
        .filter(|line| line.contains("connection refused") || line.contains("no handshake"))
        .count();
    let (told, at) = migrate(&rig, 0, &[])?;
    let what = format!(
        "{count} streams, of nonsense and of altered copies of a recorded session; both processes of the agent are the same as \
         before: {}, {} new migrations, {said} lines in its log; then a migration: {}",
        after.0 == before.0,
        after.1 - before.1,
        words(&told)?
    );
    Ok(if !lives || after != before || at != 1 {
        Found::succeeded(what)
    } else if said > 0 {
        Found::detected(what)
    } else {
        Found::unnoticed(what)
    })
}
