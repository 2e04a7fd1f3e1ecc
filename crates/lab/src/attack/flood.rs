//! Strangers take the receiver's places (T2).

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Resource, getrlimit, setrlimit};

use super::mover::{
    MOVED, Mover, Ready, Sent, agent_at, complains, hosts, migrate, receiver_at, with_agents, words,
};
use super::{Carrier, Found, prey};
use crate::host::SHORT;
use crate::network::Namespace;
use crate::rig::Rig;
use crate::transport::{Role, Transport, ssh};
use crate::wait;

/// Connections that are held.
const MANY: u64 = 2000;
/// Addresses that they come from.
const ADDRESSES: u8 = 20;
/// How much longer a migration has to take.
const FACTOR: f64 = 10.0;
/// A migration that was not under attack took a moment only.
const BRIEF: Duration = Duration::from_secs(2);

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    match carrier {
        Carrier::Qemu(transport) => on_qemu(transport),
        Carrier::Palanquin => on_palanquin(),
    }
}

/// Connections that say nothing, from many addresses of one machine; closed when it is finished or dropped.
struct Flood {
    stop: Arc<AtomicBool>,
    opened: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Flood {
    fn start(from: &Namespace, to: SocketAddrV4) -> Result<Self> {
        let mut limit = getrlimit(Resource::Nofile);
        if limit.current.is_some_and(|now| now < MANY * 2) {
            limit.current = Some(MANY * 2);
            limit.maximum = limit.maximum.map(|most| most.max(MANY * 2));
            setrlimit(Resource::Nofile, limit).context("4000 open files are needed")?;
        }
        for number in 1..=ADDRESSES {
            let address = format!("10.77.3.{number}/16");
            from.ip(&["address", "replace", &address, "dev", "eth0"])?;
        }
        let to = SocketAddr::from(to);
        let stop = Arc::new(AtomicBool::new(false));
        let opened = Arc::new(AtomicU64::new(0));
        let (seen, count) = (Arc::clone(&stop), Arc::clone(&opened));
        let thread = from.spawn(move || {
            let mut held = Vec::new();
            while held.len() < usize::try_from(MANY)? {
                let host = u8::try_from(held.len() % usize::from(ADDRESSES))? + 1;
                held.push(silent((Ipv4Addr::new(10, 77, 3, host), 0).into(), to)?);
                count.fetch_add(1, Ordering::Relaxed);
            }
            while !seen.load(Ordering::Relaxed) {
                wait::pause(Duration::from_millis(50))?;
            }
            Ok(())
        })?;
        let flood = Self {
            stop,
            opened,
            thread: Some(thread),
        };
        wait::until_true("all connections are made", SHORT, || {
            let thread = flood
                .thread
                .as_ref()
                .is_some_and(|thread| !thread.is_finished());
            ensure!(thread, "the flood has ended");
            Ok(flood.opened.load(Ordering::Relaxed) == MANY)
        })?;
        Ok(flood)
    }

    fn finish(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take();
        let ended = thread.map(JoinHandle::join).transpose();
        ended
            .map_err(|_| anyhow!("the flood panicked"))?
            .transpose()?;
        Ok(())
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A connection that is made or waits to be let in: he does not wait.
fn silent(own: SocketAddr, to: SocketAddr) -> Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &own)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// A migration without the flood, or what a migration under it is allowed to take.
fn limit(alone: Duration) -> Duration {
    alone.max(BRIEF).mul_f64(FACTOR)
}

fn on_qemu(transport: Transport) -> Result<Found> {
    let rig = hosts(&["a", "b"])?;
    let alone = {
        let mut mover = Mover::boot(&rig, transport, 1)?;
        let ready = mover.ready(&rig, 1)?;
        match mover.send(&ready.connect, MOVED)? {
            Sent::Completed(after) => after,
            other => anyhow::bail!("the guest has not moved without an attack: {other}"),
        }
    };
    let mut mover = Mover::boot(&rig, transport, 1)?;
    let at = receiver_at(&rig, transport)?;
    let (flood, sent, there);
    if transport == Transport::Ssh {
        // The server is there before anybody connects.
        let dir = rig.hosts[1].dir().join("ssh");
        let _server = ssh::serve(&rig.hosts[1], &dir)?;
        flood = Flood::start(&rig.client, at)?;
        let (near, far) = (dir.join("near.sock"), dir.join("far.sock"));
        let _ = std::fs::remove_file(&near);
        let _ = std::fs::remove_file(&far);
        let listens = format!("unix:{}", far.display());
        let receiver = mover.receiver(&rig.hosts[1], listens, &Role::Incoming)?;
        let address = &rig.hosts[1].spec.address;
        match ssh::connect(&rig.hosts[0], address, (&near, &far), &dir, None) {
            Ok(_client) => {
                sent = mover.send(&format!("unix:{}", near.display()), limit(alone))?;
            }
            Err(error) => sent = Sent::Failed(format!("no tunnel: {error:#}")),
        }
        there = receiver.beats_on()?.is_some();
    } else {
        let Ready {
            receiver, connect, ..
        } = &mover.ready(&rig, 1)?;
        flood = Flood::start(&rig.client, at)?;
        sent = mover.send(connect, limit(alone))?;
        there = receiver.beats_on()?.is_some();
    }
    flood.finish()?;
    let here = mover.beats_on()?.is_some();
    let what = format!(
        "without it {:.1} s; under {MANY} silent connections the source says {sent}; the guest goes on at the source: {here}, \
         at the destination: {there}; the receiver says: {}",
        alone.as_secs_f64(),
        complains(&rig.hosts[1])
    );
    Ok(if there && matches!(sent, Sent::Completed(_)) {
        Found::unnoticed(what)
    } else {
        Found::succeeded(what)
    })
}

fn on_palanquin() -> Result<Found> {
    let rig = with_agents(&prey())?;
    let began = Instant::now();
    let (told, at) = migrate(&rig, 0, &[])?;
    ensure!(at == 1, "the guest has not moved: {told:?}");
    let alone = began.elapsed();
    let (told, at) = migrate(&rig, 1, &[])?;
    ensure!(at == 0, "the guest has not moved back: {told:?}");
    let flood = Flood::start(&rig.client, agent_at(&rig.hosts[1])?)?;
    let began = Instant::now();
    let (told, at) = migrate(&rig, 0, &[])?;
    let under = began.elapsed();
    flood.finish()?;
    let noticed = warned(&rig)?;
    let what = format!(
        "from the order until the guest was seen to run once: {:.1} s without it, {:.1} s under {MANY} silent connections; {}; \
         the agent's log tells of it: {noticed}",
        alone.as_secs_f64(),
        under.as_secs_f64(),
        words(&told)?
    );
    Ok(if at != 1 || under > limit(alone) {
        Found::succeeded(what)
    } else if noticed {
        Found::detected(what)
    } else {
        Found::unnoticed(what)
    })
}

/// Whether the receiver's log tells of connections that it closed.
fn warned(rig: &Rig) -> Result<bool> {
    let log = std::fs::read_to_string(rig.hosts[1].log())?;
    Ok(log.contains("too many connections") || log.contains("no handshake"))
}
