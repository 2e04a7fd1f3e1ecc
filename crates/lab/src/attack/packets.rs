//! Somebody who has come onto the path and sees packets, not connections: what he does to IKE and ESP in UDP, as
//! [`super::path::Hijack`] does it to TCP.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Protocol, RawProtocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv,
    sendto, socket_with, sockopt,
};

use super::path::{HELD, KEPT_MAX, LOOK, Seen, Shared, Stolen, Strike, man, mislead, replace};
use crate::host::Host;
use crate::network::Namespace;
use crate::rig::Rig;
use crate::wait;

/// IPv4 among the types of Ethernet (`ETH_P_IP`), as it stands in a packet.
const IPV4: u32 = 0x0800_u16.to_be() as u32;
/// `IPPROTO_RAW`: what is sent brings its own header.
const RAW: u32 = 255;
const UDP: u8 = 17;
/// Bytes of a header of UDP.
const UDP_HEADER: usize = 8;
/// Packets that wait for him, in bytes.
const WAITING: usize = 64 << 20;
const PACKET_MAX: usize = 64 << 10;
/// Packets that are sent again at once, and the time until the next.
const AT_ONCE: usize = 32;
const BREATH: Duration = Duration::from_millis(2);

/// The man on the path of packets; everything is as before when he is dropped.
pub(super) struct Packets<'a> {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
    _stolen: Stolen<'a>,
    own: Namespace,
    there: Ipv4Addr,
}

impl<'a> Packets<'a> {
    /// Stands between the host `from` and the address of the host `to`. What comes back does not come by.
    pub(super) fn start(rig: &'a Rig, from: usize, to: usize, strike: Strike) -> Result<Self> {
        let address = rig.hosts[to].spec.address.clone();
        let there: Ipv4Addr = address.parse()?;
        let own = man(rig)?;
        let (seen, sends) = own.inside(move || {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "0")?;
            for scope in ["all", "eth0"] {
                let path = format!("/proc/sys/net/ipv4/conf/{scope}/send_redirects");
                std::fs::write(path, "0")?;
            }
            Ok((watcher()?, sender()?))
        })?;
        // He does not take the address itself, so that the kernel answers nothing, and it must pass nothing on.
        let stolen = mislead(&rig.hosts[from].namespace, &own, "eth0", &address)?;
        let shared = Shared::new(strike);
        let mut relay = Relay {
            shared: Arc::clone(&shared),
            there,
            sends,
            is_holding: false,
            kept: VecDeque::new(),
            kept_bytes: 0,
        };
        let thread = own.spawn(move || {
            relay
                .run(&seen)
                .inspect_err(|error| relay.shared.lock().broken = Some(format!("{error:#}")))
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
            _stolen: stolen,
            own,
            there,
        })
    }

    /// What he has seen until now; each packet is recorded as a connection, with its headers.
    pub(super) fn seen(&self) -> Seen {
        self.shared.lock().clone()
    }

    /// Lets nothing pass any more; what he kept back is gone.
    pub(super) fn cut(&self) {
        self.shared.die();
    }

    /// Sends packets again, as they were. Gives how many of them came to a program at that host: those that the kernel drops
    /// before prove nothing.
    pub(super) fn send_again(&self, to: &Host, packets: Vec<Vec<u8>>) -> Result<u64> {
        let before = received(to)?;
        let address = SocketAddrV4::new(self.there, 0);
        self.own.inside(move || {
            let sends = sender()?;
            for (number, packet) in packets.into_iter().enumerate() {
                if number % AT_ONCE == AT_ONCE - 1 {
                    // Not faster than they are read there.
                    wait::pause(BREATH)?;
                }
                loop {
                    match sendto(&sends, &packet, SendFlags::empty(), &address) {
                        Err(Errno::AGAIN | Errno::NOBUFS) => wait_for(&sends, PollFlags::OUT),
                        Err(error) => return Err(error).context("sending a packet again"),
                        Ok(_) => break,
                    }
                }
            }
            Ok(())
        })?;
        Ok(received(to)?.saturating_sub(before))
    }
}

/// Datagrams of UDP that programs at a host have read.
fn received(host: &Host) -> Result<u64> {
    host.namespace.inside(|| {
        // Two lines, of names and of values; the second value is `InDatagrams`.
        let text = std::fs::read_to_string("/proc/thread-self/net/snmp")?;
        let values = text.lines().filter(|line| line.starts_with("Udp:")).nth(1);
        let count = values.and_then(|line| line.split_whitespace().nth(1));
        Ok(count.context("no counters of UDP")?.parse()?)
    })
}

impl Drop for Packets<'_> {
    fn drop(&mut self) {
        self.cut();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sees the packets that come to this namespace, whoever they are for.
fn watcher() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = RawProtocol::new(IPV4).map(Protocol::from_raw);
    let socket = socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, protocol)?;
    sockopt::set_socket_recv_buffer_size_force(&socket, WAITING)?;
    Ok(socket)
}

/// Sends packets in anybody's name.
fn sender() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = RawProtocol::new(RAW).map(Protocol::from_raw);
    Ok(socket_with(
        AddressFamily::INET,
        SocketType::RAW,
        flags,
        protocol,
    )?)
}

fn wait_for(socket: &OwnedFd, what: PollFlags) {
    let mut wanted = [PollFd::new(socket, what)];
    let _ = poll(&mut wanted, Timespec::try_from(LOOK).ok().as_ref());
}

/// Passes packets on.
struct Relay {
    shared: Arc<Shared>,
    there: Ipv4Addr,
    sends: OwnedFd,
    /// Whether he keeps the last ones back.
    is_holding: bool,
    /// What he has not passed on yet.
    kept: VecDeque<Vec<u8>>,
    kept_bytes: usize,
}

impl Relay {
    fn run(&mut self, seen: &OwnedFd) -> Result<()> {
        let mut buffer = vec![0; PACKET_MAX];
        while !self.shared.is_dead() {
            match recv(seen, &mut buffer[..], RecvFlags::empty()) {
                Ok((count, _)) => {
                    let packet = &buffer[..count];
                    if packet.get(16..20) == Some(&self.there.octets()[..]) {
                        self.take(packet.to_vec())?;
                    }
                }
                Err(Errno::AGAIN | Errno::INTR) => wait_for(seen, PollFlags::IN),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn take(&mut self, mut packet: Vec<u8>) -> Result<()> {
        match strike(&self.shared, &mut packet) {
            Fate::Lost => return Ok(()),
            Fate::Held => self.is_holding = true,
            Fate::Passes => {}
        }
        self.kept_bytes += packet.len();
        self.kept.push_back(packet);
        let stays = if self.is_holding { HELD } else { 0 };
        while self.kept_bytes > stays {
            let Some(packet) = self.kept.pop_front() else {
                break;
            };
            self.kept_bytes -= packet.len();
            let to = SocketAddrV4::new(self.there, 0);
            match sendto(&self.sends, &packet, SendFlags::empty(), &to) {
                // A network loses packets too.
                Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(())
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Passes,
    /// It waits until there are so many after it.
    Held,
    Lost,
}

/// Strikes at one packet.
fn strike(shared: &Shared, packet: &mut [u8]) -> Fate {
    if shared.is_dead() {
        return Fate::Lost;
    }
    let Some(data) = data_of(packet) else {
        return Fate::Passes;
    };
    let mut fate = Fate::Passes;
    // A checksum that says nothing (RFC 768): of what was sent here on one machine it was never computed, so that what is
    // sent again would be dropped for it; and of what was altered it would tell.
    packet[data - 2..data].fill(0);
    let count = (packet.len() - data) as u64;
    let mut seen = shared.lock();
    let before = seen.bytes;
    seen.bytes += count;
    match &shared.strike {
        Strike::Record => {
            if before + count <= KEPT_MAX as u64 {
                seen.recorded.push(packet.to_vec());
            }
        }
        Strike::Replace(old, new) => {
            seen.struck += replace(&mut packet[data..], old, new);
        }
        Strike::Flip(at) => {
            if (before..before + count).contains(at) {
                // Behind the header of ESP.
                let middle = data + (packet.len() - data) / 2;
                packet[middle] ^= 0x10;
                seen.struck += 1;
            }
        }
        Strike::Cut(at) => {
            if before + count >= *at {
                seen.struck += 1;
                shared.die();
                return Fate::Lost;
            }
        }
        Strike::HoldBack(after) => {
            if before >= *after {
                seen.struck = 1;
                fate = Fate::Held;
            }
        }
    }
    fate
}

/// Where in a packet of IPv4 the data of UDP begin; nothing if it is another one, or a later fragment.
fn data_of(packet: &[u8]) -> Option<usize> {
    let head = usize::from(packet.first()? & 0xF) * 4;
    let fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x1FFF;
    let is_udp = packet.first()? >> 4 == 4 && packet.get(9) == Some(&UDP) && fragment == 0;
    let data = head + UDP_HEADER;
    (is_udp && head >= 20 && packet.len() > data).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(data: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, UDP, 0, 0];
        packet.extend([10, 77, 0, 1, 10, 77, 0, 2]);
        packet.extend([0x11, 0x94, 0x11, 0x94, 0, 0, 0xAB, 0xCD]);
        packet.extend(data);
        packet
    }

    #[test]
    fn one_bit_of_one_packet_is_changed_and_its_checksum_says_nothing() {
        let shared = Shared::new(Strike::Flip(10));
        for (number, is_changed) in [(0, false), (1, true), (2, false)] {
            let mut sent = packet(&[7; 8]);
            assert_eq!(strike(&shared, &mut sent), Fate::Passes);
            assert_eq!(sent[26..28], [0, 0], "packet {number}");
            assert_eq!(sent[28..] != [7; 8], is_changed, "packet {number}");
        }
        assert_eq!(shared.lock().struck, 1);
    }

    #[test]
    fn what_is_recorded_is_not_dropped_for_its_checksum_when_it_is_sent_again() {
        let shared = Shared::new(Strike::Record);
        assert_eq!(strike(&shared, &mut packet(&[7; 8])), Fate::Passes);
        assert_eq!(shared.lock().recorded[0][26..28], [0, 0]);
    }

    #[test]
    fn nothing_passes_after_a_cut() {
        let shared = Shared::new(Strike::Cut(20));
        let passed = (0..5).filter(|_| strike(&shared, &mut packet(&[7; 8])) == Fate::Passes);
        assert_eq!(passed.count(), 2);
    }

    #[test]
    fn what_is_no_udp_is_left_alone() {
        for bytes in [&[][..], &[0x45], &packet(&[])[..], &[0xFF; 64]] {
            assert_eq!(data_of(bytes), None, "{bytes:?}");
        }
        let mut other = packet(&[1; 8]);
        other[9] = 6;
        assert_eq!(data_of(&other), None);
        let mut later = packet(&[1; 8]);
        later[7] = 1;
        assert_eq!(data_of(&later), None);
    }
}
