//! Somebody who has come onto the path: the source takes his hardware address for the destination's, as after ARP spoofing.
//! He passes bytes on as they are, whatever they are, but for one strike.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::mover::ports;
use super::packets::Packets;
use crate::network::Namespace;
use crate::rig::Rig;
use crate::transport::Transport;
use crate::wait;

/// How often a pump looks whether it is to end.
pub(super) const LOOK: Duration = Duration::from_millis(100);
/// Longest time that a connection may take, and a receiver that takes nothing.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes that are kept for a replay.
pub(super) const KEPT_MAX: usize = 512 << 20;
const PIECE: usize = 64 << 10;

/// What he does to the bytes that the source sends.
#[derive(Clone, Debug)]
pub(super) enum Strike {
    /// Keeps a copy.
    Record,
    /// Wherever he finds the first, he puts the second, which is as long.
    Replace(&'static [u8], &'static [u8]),
    /// Changes one bit of the byte at this place, counted over all connections.
    Flip(u64),
    /// Ends everything after so many bytes of all connections, and lets nobody connect any more.
    Cut(u64),
    /// Once a connection has sent so many bytes, he keeps back the last 64 KiB of what comes.
    HoldBack(u64),
}

/// What a receiver misses at the end under [`Strike::HoldBack`].
pub(super) const HELD: usize = 64 << 10;

/// What he has seen and done.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// How often he struck.
    pub(super) struck: u64,
    /// Bytes that the source sent.
    pub(super) bytes: u64,
    /// Why he passes on nothing any more.
    pub(super) broken: Option<String>,
    /// All bytes of each connection, in the order in which they were made.
    pub(super) recorded: Vec<Vec<u8>>,
}

/// What he and his threads share.
pub(super) struct Shared {
    /// What he does.
    pub(super) strike: Strike,
    seen: Mutex<Seen>,
    /// All connections end, and no other is made.
    dead: AtomicBool,
}

impl Shared {
    pub(super) fn new(strike: Strike) -> Arc<Self> {
        Arc::new(Self {
            strike,
            seen: Mutex::default(),
            dead: AtomicBool::new(false),
        })
    }

    /// Nothing passes any more.
    pub(super) fn die(&self) {
        self.dead.store(true, Ordering::Relaxed);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }
}

/// The man on the path between two hosts; everything is as before when he is dropped.
pub(super) struct Hijack<'a> {
    shared: Arc<Shared>,
    doors: Vec<JoinHandle<Result<()>>>,
    _stolen: Stolen<'a>,
    _own: Namespace,
}

impl<'a> Hijack<'a> {
    /// Stands between the host `from` and the TCP ports of the host `to`.
    pub(super) fn start(
        rig: &'a Rig,
        from: usize,
        to: usize,
        ports: &[u16],
        strike: Strike,
    ) -> Result<Self> {
        let address = rig.hosts[to].spec.address.clone();
        let own = man(rig)?;
        let stolen = steal(&rig.hosts[from].namespace, &own, "eth0", &address)?;
        let shared = Shared::new(strike);
        let there: Ipv4Addr = address.parse()?;
        let mut hijack = Self {
            shared,
            doors: Vec::new(),
            _stolen: stolen,
            _own: own,
        };
        for &port in ports {
            let listener = hijack._own.inside(move || {
                let listener = TcpListener::bind((there, port))?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            })?;
            let shared = Arc::clone(&hijack.shared);
            // From where the address is the true one's.
            let door = rig
                .client
                .spawn(move || door(&shared, &listener, (there, port).into()))?;
            hijack.doors.push(door);
        }
        Ok(hijack)
    }

    /// What he has seen until now.
    pub(super) fn seen(&self) -> Seen {
        self.shared.lock().clone()
    }

    /// Ends all connections; what he kept back is gone.
    pub(super) fn cut(&self) {
        self.shared.die();
    }
}

impl Drop for Hijack<'_> {
    fn drop(&mut self) {
        self.cut();
        for door in self.doors.drain(..) {
            let _ = door.join();
        }
    }
}

/// The man on the path, whatever the path carries.
pub(super) enum Man<'a> {
    /// Connections of TCP.
    Connections(Hijack<'a>),
    /// Packets of UDP.
    Packets(Packets<'a>),
}

impl<'a> Man<'a> {
    /// Stands between the first host of a rig and the second, for that transport.
    pub(super) fn on(rig: &'a Rig, transport: Transport, strike: Strike) -> Result<Self> {
        Ok(if transport == Transport::Ipsec {
            Self::Packets(Packets::start(rig, 0, 1, strike)?)
        } else {
            Self::Connections(Hijack::start(rig, 0, 1, &ports(transport), strike)?)
        })
    }

    /// What he has seen until now. On the path of an isolated segment he is not; anywhere else something has come by.
    pub(super) fn seen(&self, transport: Transport) -> Result<Seen> {
        let seen = match self {
            Self::Connections(hijack) => hijack.seen(),
            Self::Packets(packets) => packets.seen(),
        };
        ensure!(
            seen.broken.is_none(),
            "he passed on nothing any more: {:?}",
            seen.broken
        );
        ensure!(
            (seen.bytes == 0) == (transport == Transport::Segment),
            "{} bytes came by",
            seen.bytes
        );
        Ok(seen)
    }

    /// Ends everything; what he kept back is gone.
    pub(super) fn cut(&self) {
        match self {
            Self::Connections(hijack) => hijack.cut(),
            Self::Packets(packets) => packets.cut(),
        }
    }
}

/// A machine of his at the switch.
pub(super) fn man(rig: &Rig) -> Result<Namespace> {
    // Named as the rig's own, so that it is removed with it.
    let client = rig.client.name();
    let name = client.strip_suffix("client").unwrap_or(client);
    let own = Namespace::new(format!("{name}man"))?;
    rig.switch.plug(&own, "port-man")?;
    own.ip(&["address", "add", "10.77.2.9/16", "dev", "eth0"])?;
    Ok(own)
}

/// A host that takes another one for the owner of an address; it forgets that when this is dropped.
pub(super) struct Stolen<'a> {
    victim: &'a Namespace,
    address: String,
}

impl Drop for Stolen<'_> {
    fn drop(&mut self) {
        let words = ["neigh", "del", self.address.as_str(), "dev", "br0"];
        let _ = self.victim.ip(&words);
    }
}

/// Gives the thief an address, and lets the victim find it there, at his device. Nobody else is told.
pub(super) fn steal<'a>(
    victim: &'a Namespace,
    thief: &Namespace,
    device: &str,
    address: &str,
) -> Result<Stolen<'a>> {
    let scopes = ["all".to_owned(), device.to_owned()];
    thief.inside(move || {
        for scope in scopes {
            // He answers for his own address alone, and asks in its name (ip-sysctl, `arp_ignore`, `arp_announce`).
            for (knob, value) in [("arp_ignore", "1"), ("arp_announce", "2")] {
                fs::write(format!("/proc/sys/net/ipv4/conf/{scope}/{knob}"), value)?;
            }
        }
        Ok(())
    })?;
    thief.ip(&["address", "add", &format!("{address}/32"), "dev", "lo"])?;
    mislead(victim, thief, device, address)
}

/// Lets the victim look for an address at the thief's device. Nobody else is told.
pub(super) fn mislead<'a>(
    victim: &'a Namespace,
    thief: &Namespace,
    device: &str,
    address: &str,
) -> Result<Stolen<'a>> {
    let told = thief.ip(&["-j", "link", "show", "dev", device])?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    let mac = told[0]["address"].as_str().context("no hardware address")?;
    victim.ip(&[
        "neigh",
        "replace",
        address,
        "lladdr",
        mac,
        "dev",
        "br0",
        "nud",
        "permanent",
    ])?;
    Ok(Stolen {
        victim,
        address: address.to_owned(),
    })
}

fn door(shared: &Arc<Shared>, listener: &TcpListener, there: SocketAddr) -> Result<()> {
    let mut pumps: Vec<JoinHandle<()>> = Vec::new();
    while !shared.is_dead() {
        match listener.accept() {
            Ok((client, _)) => {
                client.set_nonblocking(false)?;
                // Nobody there is for the client as if he were not there himself.
                if let Ok(server) = TcpStream::connect_timeout(&there, PATIENCE) {
                    pumps.extend(pumps_of(shared, client, server)?);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let mut wanted = [PollFd::new(listener, PollFlags::IN)];
                let _ = poll(&mut wanted, Timespec::try_from(LOOK).ok().as_ref());
            }
            Err(error) => return Err(error.into()),
        }
        pumps.retain(|pump| !pump.is_finished());
    }
    for pump in pumps {
        let _ = pump.join();
    }
    Ok(())
}

fn pumps_of(
    shared: &Arc<Shared>,
    client: TcpStream,
    server: TcpStream,
) -> io::Result<[JoinHandle<()>; 2]> {
    for socket in [&client, &server] {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(LOOK))?;
        socket.set_write_timeout(Some(LOOK))?;
    }
    let connection = {
        let mut seen = shared.lock();
        seen.recorded.push(Vec::new());
        seen.recorded.len() - 1
    };
    let there = Pump {
        shared: Arc::clone(shared),
        from: client.try_clone()?,
        to: server.try_clone()?,
        forth: Some(connection),
        sent: 0,
        kept: Vec::new(),
    };
    let back = Pump {
        shared: Arc::clone(shared),
        from: server,
        to: client,
        forth: None,
        sent: 0,
        kept: Vec::new(),
    };
    Ok([there, back].map(|mut pump| std::thread::spawn(move || pump.run())))
}

/// Moves bytes in one direction.
struct Pump {
    shared: Arc<Shared>,
    from: TcpStream,
    to: TcpStream,
    /// Number of the connection, in the direction of whoever connected.
    forth: Option<usize>,
    /// Bytes that came.
    sent: u64,
    /// What has come and was not passed on yet.
    kept: Vec<u8>,
}

impl Pump {
    fn run(&mut self) {
        let mut piece = vec![0; PIECE];
        let ended = loop {
            if self.shared.is_dead() {
                break false;
            }
            match self.from.read(&mut piece) {
                Ok(0) => break true,
                Ok(count) => {
                    let out = match self.forth {
                        Some(connection) => self.strike(connection, &piece[..count]),
                        None => piece[..count].to_vec(),
                    };
                    if self.send(&out).is_err() {
                        break false;
                    }
                }
                Err(error) if is_timeout(&error) => {}
                Err(_) => break false,
            }
        };
        if ended && !matches!(self.shared.strike, Strike::HoldBack(_)) {
            let rest = std::mem::take(&mut self.kept);
            let _ = self.send(&rest);
            let _ = self.to.shutdown(Shutdown::Write);
            return;
        }
        if ended {
            // The end is what the receiver is not to see.
            while !self.shared.is_dead() && wait::pause(LOOK).is_ok() {}
        }
        for socket in [&self.from, &self.to] {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Passes on, for as long as the receiver needs, which may be paused.
    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.shared.is_dead() {
                return Err(ErrorKind::ConnectionAborted.into());
            }
            match self.to.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What is passed on when these bytes have come.
    fn strike(&mut self, connection: usize, bytes: &[u8]) -> Vec<u8> {
        let mut seen = self.shared.lock();
        let before = seen.bytes;
        seen.bytes += bytes.len() as u64;
        self.sent += bytes.len() as u64;
        let mut out = bytes.to_vec();
        match &self.shared.strike {
            Strike::Record => {
                let all: usize = seen.recorded.iter().map(Vec::len).sum();
                if all + bytes.len() <= KEPT_MAX {
                    seen.recorded[connection].extend_from_slice(bytes);
                }
            }
            Strike::Replace(old, new) => {
                self.kept.append(&mut out);
                seen.struck += replace(&mut self.kept, old, new);
                let open = open_end(&self.kept, old);
                let end = self.kept.split_off(self.kept.len() - open);
                return std::mem::replace(&mut self.kept, end);
            }
            Strike::Flip(at) => {
                let place = at
                    .checked_sub(before)
                    .and_then(|at| usize::try_from(at).ok());
                if let Some(byte) = place.and_then(|place| out.get_mut(place)) {
                    *byte ^= 0x10;
                    seen.struck += 1;
                }
            }
            Strike::Cut(at) => {
                if before + bytes.len() as u64 >= *at {
                    seen.struck += 1;
                    self.shared.die();
                    out.truncate(out.len() / 2);
                }
            }
            Strike::HoldBack(after) => {
                if self.sent < *after {
                    return out;
                }
                self.kept.append(&mut out);
                seen.struck = 1;
                let ready = self.kept.len().saturating_sub(HELD);
                let end = self.kept.split_off(ready);
                return std::mem::replace(&mut self.kept, end);
            }
        }
        out
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// Replaces each place at which a pattern stands; how many there were.
pub(super) fn replace(bytes: &mut [u8], old: &[u8], new: &[u8]) -> u64 {
    let Some(&first) = old.first() else { return 0 };
    let (mut at, mut count) = (0, 0);
    while let Some(next) = bytes[at..].iter().position(|&byte| byte == first) {
        at += next;
        if bytes[at..].starts_with(old) {
            bytes[at..at + old.len()].copy_from_slice(new);
            count += 1;
        }
        at += 1;
    }
    count
}

/// How many bytes at the end may be the beginning of a pattern.
fn open_end(bytes: &[u8], pattern: &[u8]) -> usize {
    let most = bytes.len().min(pattern.len().saturating_sub(1));
    (1..=most)
        .rev()
        .find(|&count| pattern.starts_with(&bytes[bytes.len() - count..]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_across_two_pieces_is_kept_until_it_is_whole() {
        assert_eq!(open_end(b"...the her", b"heron"), 3);
        assert_eq!(open_end(b"...the heron", b"heron"), 0);
        let mut bytes = b"a heron, a heron".to_vec();
        assert_eq!(replace(&mut bytes, b"heron", b"stork"), 2);
        assert_eq!(bytes, b"a stork, a stork");
    }
}
