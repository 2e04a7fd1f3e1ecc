//! QEMU's own migration, step by step, so that an attacker comes between; and what is looked at afterwards.

use std::fs;
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use palanquin_api::control::MigrationInfo;
use serde_json::json;

use super::{VM, path::Seen, prey};
use crate::guest::{Console, GuestSpec};
use crate::host::{self, Host, SHORT, Told};
use crate::process;
use crate::qemu::{Qemu, Qmp};
use crate::rig::{Rig, RigSpec};
use crate::transport::{
    BOOT, Between, PORT, Role, Transport, configure, endpoints, ipsec, segment, ssh, start, tls,
};
use crate::wait;

/// A small guest has moved within this time, also on a busy machine.
pub(super) const MOVED: Duration = Duration::from_secs(60);
/// A guest that runs beats within this time, five times a second; one that has just arrived needs a while to find out what
/// time it is.
const ALIVE: Duration = Duration::from_secs(30);
/// QEMU that is not to run a guest any more, or not yet, stays so for this time.
const STAYS: Duration = Duration::from_secs(3);
/// QEMU ends a migration that was cancelled within this time.
const CANCEL: Duration = Duration::from_secs(20);

/// TCP ports that somebody on the path has to stand at.
pub(super) fn ports(transport: Transport) -> Vec<u16> {
    match transport {
        Transport::Ssh => vec![ssh::PORT],
        _ => vec![PORT],
    }
}

/// Where a stranger at the switch finds the receiver of the second host. An address within a tunnel or on a segment is one of that host too,
/// and whoever is told to looks for it there.
pub(super) fn receiver_at(rig: &Rig, transport: Transport) -> Result<SocketAddrV4> {
    let host = &rig.hosts[1];
    let port = ports(transport).first().copied().unwrap_or(PORT);
    let address = &host.spec.address;
    let inside = match transport {
        Transport::Ipsec => ipsec::inside_of(host)?,
        Transport::Segment => segment::FAR.to_owned(),
        _ => return Ok(SocketAddrV4::new(address.parse()?, port)),
    };
    let words = ["route", "replace", &format!("{inside}/32"), "via", address];
    rig.client.ip(&words)?;
    Ok(SocketAddrV4::new(inside.parse()?, port))
}

/// Where an agent listens.
pub(super) fn agent_at(host: &Host) -> Result<SocketAddrV4> {
    Ok(SocketAddrV4::new(host.spec.address.parse()?, host::PORT))
}

/// Hosts with these names, without agents.
pub(super) fn hosts(names: &[&str]) -> Result<Rig> {
    Rig::without_agents(&spec(names))
}

/// Names of the hosts of a rig.
pub(super) fn spec(names: &[&str]) -> RigSpec {
    RigSpec {
        hosts: names.iter().map(|name| (*name).to_owned()).collect(),
        link_mbit_s: None,
    }
}

/// Two hosts with agents, and the guest on the first.
pub(super) fn with_agents(guest: &GuestSpec) -> Result<Rig> {
    let rig = Rig::new(&spec(&["a", "b"]))?;
    rig.hosts[0].boot(guest)?;
    Ok(rig)
}

/// A guest on the first host, which is to be moved.
pub(super) struct Mover {
    /// Where it runs.
    pub(super) qemu: Qemu,
    /// Its control.
    pub(super) qmp: Qmp,
    transport: Transport,
    guest: GuestSpec,
    /// Certificates of both ends, for TLS.
    pub(super) credentials: Option<PathBuf>,
}

/// Who waits for it.
pub(super) struct Receiver {
    /// Where it is to run.
    pub(super) qemu: Qemu,
    /// Where it listens, as QEMU has it.
    pub(super) listens: String,
}

impl Receiver {
    /// Whether a guest runs here: its last beat.
    pub(super) fn beats_on(&self) -> Result<Option<u64>> {
        // Under an attack it may be deaf, and its guest tells all the same.
        beats_on(&self.qemu, self.qemu.qmp().ok().as_mut())
    }
}

/// A receiver, and the way to it.
pub(super) struct Ready {
    /// The receiver.
    pub(super) receiver: Receiver,
    /// Where the source is to connect, as QEMU has it.
    pub(super) connect: String,
    /// What lies between; taken down when it is dropped.
    _between: Between,
}

/// How a migration ended, as the source says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// It says that it has moved.
    Completed(Duration),
    /// It says why not.
    Failed(String),
    /// It did not end, and was cancelled.
    Stuck(Duration),
}

impl std::fmt::Display for Sent {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Completed(after) => {
                write!(formatter, "`completed` after {:.1} s", after.as_secs_f64())
            }
            Self::Failed(why) => write!(formatter, "`failed`: {why}"),
            Self::Stuck(after) => {
                write!(formatter, "no end within {:.0} s", after.as_secs_f64())
            }
        }
    }
}

impl Mover {
    /// Boots the guest on the first host; it is to be moved to that one.
    pub(super) fn boot(rig: &Rig, transport: Transport, to: usize) -> Result<Self> {
        let credentials = if transport == Transport::Tls {
            let dir = rig.dir().join(format!("tls-{to}"));
            tls::make(&dir, rig.hosts[to].spec.address.parse()?)?;
            Some(dir)
        } else {
            None
        };
        let guest = prey();
        let qemu = start(
            &rig.hosts[0],
            &guest,
            credentials.as_deref(),
            &Role::Outgoing,
        )?;
        let console = qemu.console();
        console.wait_for("palanquin-workload ready", BOOT)?;
        console.wait_beats(2, SHORT)?;
        let mut qmp = qemu.qmp()?;
        configure(&mut qmp, transport, 1)?;
        Ok(Self {
            qemu,
            qmp,
            transport,
            guest,
            credentials,
        })
    }

    /// A receiver at a host, and the way there.
    pub(super) fn ready(&self, rig: &Rig, to: usize) -> Result<Ready> {
        self.ready_with(rig, to, &Role::Incoming)
    }

    /// The same with a role.
    pub(super) fn ready_with(&self, rig: &Rig, to: usize, role: &Role<'_>) -> Result<Ready> {
        let ends = endpoints(self.transport, &rig.hosts[0], &rig.hosts[to])?;
        Ok(Ready {
            receiver: self.receiver(&rig.hosts[to], ends.listen, role)?,
            connect: ends.connect,
            _between: ends.between,
        })
    }

    /// A receiver alone.
    pub(super) fn receiver(
        &self,
        host: &Host,
        listens: String,
        role: &Role<'_>,
    ) -> Result<Receiver> {
        let credentials = self.credentials.as_deref();
        let qemu = start(host, &self.guest, credentials, role)?;
        let mut qmp = qemu.qmp()?;
        configure(&mut qmp, self.transport, 1)?;
        qmp.execute("migrate-incoming", &json!({"uri": listens}))?;
        Ok(Receiver { qemu, listens })
    }

    /// A receiver of plaintext, whatever the guest's own transport is.
    pub(super) fn open_receiver(&self, host: &Host) -> Result<Receiver> {
        let qemu = start(host, &self.guest, None, &Role::Incoming)?;
        let mut qmp = qemu.qmp()?;
        configure(&mut qmp, Transport::Plain, 1)?;
        let listens = format!("tcp:0.0.0.0:{PORT}");
        qmp.execute("migrate-incoming", &json!({"uri": listens}))?;
        Ok(Receiver { qemu, listens })
    }

    /// Whether the guest goes on here: its last beat.
    pub(super) fn beats_on(&mut self) -> Result<Option<u64>> {
        beats_on(&self.qemu, Some(&mut self.qmp))
    }

    /// Moves the guest, and cancels that at the limit.
    pub(super) fn send(&mut self, uri: &str, limit: Duration) -> Result<Sent> {
        send(&mut self.qmp, uri, limit)
    }
}

/// Orders a migration and waits for what the source says at its end.
pub(super) fn send(from: &mut Qmp, uri: &str, limit: Duration) -> Result<Sent> {
    let began = Instant::now();
    if let Err(error) = from.execute("migrate", &json!({"uri": uri})) {
        return Ok(Sent::Failed(format!("{error:#}")));
    }
    let mut cancelled = false;
    wait::until("QEMU's migration ends", limit + CANCEL * 2, || {
        let report = from.execute("query-migrate", &json!({}));
        let report = report.context("asking the source how far it is")?;
        let why = report["error-desc"]
            .as_str()
            .unwrap_or("no reason is given");
        let end = match report["status"].as_str().unwrap_or_default() {
            "completed" => Some(Sent::Completed(began.elapsed())),
            "failed" => Some(Sent::Failed(why.to_owned())),
            "cancelled" if cancelled => Some(Sent::Stuck(limit)),
            "cancelled" => Some(Sent::Failed(why.to_owned())),
            _ => None,
        };
        if end.is_none() && began.elapsed() >= limit && !cancelled {
            let cancel = from.execute("migrate_cancel", &json!({}));
            cancel.context("cancelling at the source")?;
            cancelled = true;
        }
        // Whoever waits for the other side's handshake can't even be cancelled.
        let given_up = began.elapsed() >= limit + CANCEL;
        Ok(end.or_else(|| given_up.then_some(Sent::Stuck(limit))))
    })
}

/// Whether the process has not ended.
pub(super) fn is_alive(qemu: &Qemu) -> bool {
    !process::wait_for_end(qemu.pid(), Duration::ZERO)
}

/// Whether the guest runs: QEMU says so, and it beats on. Gives its last beat.
pub(super) fn beats_on(qemu: &Qemu, mut qmp: Option<&mut Qmp>) -> Result<Option<u64>> {
    let console = qemu.console();
    let before = console.beats().len();
    let began = Instant::now();
    let mut idle = Instant::now();
    while began.elapsed() < ALIVE && idle.elapsed() < STAYS && is_alive(qemu) {
        let beats = console.beats();
        if beats.len() >= before + 3 {
            return Ok(beats.last().map(|beat| beat.number));
        }
        if let Some(qmp) = qmp.as_mut() {
            match qmp.execute("query-status", &json!({})) {
                Ok(status) if status["status"] == "running" => idle = Instant::now(),
                Ok(_) => {}
                Err(_) if !is_alive(qemu) => break,
                Err(error) => return Err(error).context("asking whether the guest runs"),
            }
        }
        wait::pause(Duration::from_millis(50))?;
    }
    Ok(None)
}

/// What the receiving side has said last: QEMU that waits at a host, or the server of ssh before it.
pub(super) fn complaint(host: &Host) -> Option<String> {
    let read = |file: &str| fs::read_to_string(host.dir().join(file)).unwrap_or_default();
    let (qemu, server) = (read("incoming/qemu.log"), read("ssh/sshd.log"));
    let last = qemu.lines().rfind(|line| line.starts_with("qemu"));
    let last = last.or_else(|| {
        let usual = ["Server listening", "Accepted publickey"];
        server
            .lines()
            .rfind(|line| !usual.iter().any(|usual| line.contains(usual)))
    });
    last.map(|line| line.trim().to_owned())
}

/// The same for evidence.
pub(super) fn complains(host: &Host) -> String {
    complaint(host).unwrap_or_else(|| "nothing".to_owned())
}

/// The last line of an agent's log with one of these words, without its time.
pub(super) fn log_line(host: &Host, words: &[&str]) -> Option<String> {
    let log = fs::read_to_string(host.log()).unwrap_or_default();
    let line = log
        .lines()
        .rfind(|line| words.iter().any(|word| line.contains(word)))?;
    let text = line.split_once(" WARN ").map_or(line, |(_, text)| text);
    Some(text.to_owned())
}

/// What the guest says of its own memory.
pub(super) fn corruption(console: &Console) -> Option<String> {
    let text = console.text();
    text.lines()
        .find(|line| line.contains("CORRUPT"))
        .map(|line| line.trim().to_owned())
}

/// What `palanquin migrate` ended with, in a sentence.
pub(super) fn words(told: &Told) -> Result<String> {
    if told.status == 0 {
        let info = told.migration()?;
        return Ok(format!("it completed, {}", compared(&info)));
    }
    let error = told.error()?;
    let codes: Vec<String> = error
        .blockers
        .iter()
        .map(|blocker| format!("{}: {}", blocker.code, blocker.message))
        .collect();
    let mut all = vec![error.message];
    all.extend(error.causes);
    let mut text = format!("exit status {}, \"{}\"", told.status, all.join(": "));
    if !codes.is_empty() {
        text += &format!(" ({})", codes.join("; "));
    }
    Ok(text)
}

fn compared(info: &MigrationInfo) -> String {
    let roots = if info.verified {
        "roots over the memory equal"
    } else {
        "roots over the memory NOT compared"
    };
    format!("{roots}, connected again {} times", info.rejoined)
}

/// Moves the VM of a rig with agents; what it ended with, and where the VM lives then, once.
pub(super) fn migrate(rig: &Rig, from: usize, more: &[&str]) -> Result<(Told, usize)> {
    let told = rig.migrate(VM, from, 1 - from, more)?;
    let at = rig
        .find_the_one(VM)
        .with_context(|| format!("after {told:?}"))?;
    Ok((told, at))
}

/// Bytes that were recorded.
pub(super) fn total(seen: &Seen) -> usize {
    seen.recorded.iter().map(Vec::len).sum()
}
