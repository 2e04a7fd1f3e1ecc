//! Hears what machines announce on a network that this one is part of: sockets of packet(7).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType};

use super::ProbeError;
use super::announce::{self, Heard, Mac};
use super::control;
use super::socket::Buffers;
use crate::sys::socket::{Instruction, attach_filter, bind_link, receive, set_number, set_option};

/// Longest name of an interface, in bytes: `IFNAMSIZ` less its end.
const NAME_MAX: usize = 15;
/// What of an interface's type is Ethernet: `ARPHRD_ETHER`.
const ETHERNET: u16 = 1;
/// Messages that may wait for us, in bytes.
const RECEIVE_BYTES: usize = 256 << 10;

/// Lets through what may be a neighbour advertisement: otherwise all of IPv6 would wake us. Offsets are from the packet's
/// header: byte 6 says that ICMPv6 follows, byte 40 is its type.
const ADVERTISEMENTS: [Instruction; 6] = [
    // Load byte 6; unless it is 58 go to the last; load byte 40; unless it is 136 go to the last; take it; drop it.
    (0x30, 0, 0, 6),
    (0x15, 0, 3, 58),
    (0x30, 0, 0, 40),
    (0x15, 0, 1, 136),
    (0x06, 0, 0, 0xffff),
    (0x06, 0, 0, 0),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Arp,
    Rarp,
    Ipv6,
}

/// Sockets that hear announcements on one interface.
pub(crate) struct Ear {
    sockets: Vec<(Protocol, OwnedFd)>,
}

/// What was heard, and when.
pub(crate) struct Noise {
    pub(crate) heard: Heard,
    /// By the kernel's clock of the time of day, in microseconds since 1970.
    pub(crate) received_us: Option<u64>,
}

/// Whether an interface may have this name.
pub(crate) fn is_interface(name: &str) -> bool {
    let is_odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    !name.is_empty() && name.len() <= NAME_MAX && !name.contains(is_odd) && !name.starts_with('.')
}

impl Ear {
    /// Listens on an interface, for IPv6 only if anybody has such an address.
    pub(crate) fn open(interface: &str, has_v6: bool) -> Result<Self, ProbeError> {
        let mut sockets = Vec::new();
        let protocols = [Protocol::Arp, Protocol::Rarp, Protocol::Ipv6];
        let wanted = protocols
            .into_iter()
            .filter(|protocol| has_v6 || *protocol != Protocol::Ipv6);
        for protocol in wanted {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            // Without a protocol it gets nothing until it is bound to the interface.
            let fd = net::socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, None);
            let fd = fd.map_err(|errno| match errno {
                Errno::PERM | Errno::ACCESS => ProbeError::Right(
                    "hearing announcements (RARP, gratuitous ARP) needs the capability CAP_NET_RAW, which this process has not",
                ),
                other => ProbeError::interface(interface)(other.into()),
            })?;
            let kind = prepare(fd.as_fd(), interface, protocol)
                .map_err(ProbeError::interface(interface))?;
            if kind != ETHERNET {
                return Err(ProbeError::NotEthernet(interface.to_owned()));
            }
            sockets.push((protocol, fd));
        }
        Ok(Self { sockets })
    }

    /// What becomes readable when something was heard.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.iter().map(|(_, fd)| fd.as_fd())
    }

    /// What was heard next, without waiting; what says nothing of a machine is passed over, but at most `most` messages.
    ///
    /// # Errors
    /// If the interface was taken down or away.
    pub(crate) fn next(
        &self,
        buffers: &mut Buffers,
        most: &mut usize,
    ) -> io::Result<Option<Noise>> {
        for (protocol, fd) in &self.sockets {
            while *most > 0 {
                let Buffers {
                    message,
                    name,
                    control,
                } = buffers;
                let Some(arrived) = receive(fd.as_fd(), message, name, control)? else {
                    break;
                };
                *most -= 1;
                let (message, name) = (&message[..arrived.bytes], &name[..arrived.name]);
                let heard = match protocol {
                    Protocol::Arp => announce::arp(message).ok(),
                    Protocol::Rarp => announce::rarp(message).ok(),
                    Protocol::Ipv6 => {
                        sender(name).and_then(|mac| announce::advertisement(message, mac).ok())
                    }
                };
                if let Some(heard) = heard {
                    let received_us = control::read(&control[..arrived.control]).received_us;
                    return Ok(Some(Noise { heard, received_us }));
                }
            }
        }
        Ok(None)
    }
}

/// Makes a socket hear; the type of the interface.
fn prepare(fd: BorrowedFd<'_>, interface: &str, protocol: Protocol) -> io::Result<u16> {
    let index = name_to_index(fd, interface)?;
    set_number(fd, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1)?;
    net::sockopt::set_socket_recv_buffer_size(fd, RECEIVE_BYTES)?;
    let number = match protocol {
        Protocol::Arp => libc::ETH_P_ARP,
        Protocol::Rarp => libc::ETH_P_RARP,
        Protocol::Ipv6 => libc::ETH_P_IPV6,
    };
    if protocol == Protocol::Ipv6 {
        attach_filter(fd, &ADVERTISEMENTS)?;
        // An interface without IPv6 would not take what is sent to all nodes. This is a `struct packet_mreq`.
        let mut group = index.to_ne_bytes().to_vec();
        group.extend((libc::PACKET_MR_MULTICAST as u16).to_ne_bytes());
        group.extend(6_u16.to_ne_bytes());
        group.extend([0x33, 0x33, 0, 0, 0, 1, 0, 0]);
        set_option(fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &group)?;
    }
    let kind = bind_link(fd, index, number as u16)?;
    // An interface that is down is bound to all the same, and says so only here.
    net::sockopt::socket_error(fd)??;
    Ok(kind)
}

/// The hardware address in a `struct sockaddr_ll` of Ethernet.
fn sender(name: &[u8]) -> Option<Mac> {
    let kind = u16::from_ne_bytes(*name.get(8..)?.first_chunk()?);
    let length = *name.get(11)?;
    let mac = Mac(*name.get(12..)?.first_chunk()?);
    (kind == ETHERNET && length == 6).then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_interfaces_are_told_from_others() {
        for name in ["eth0", "br-lan", "enp0s31f6.100", "x"] {
            assert!(is_interface(name), "{name}");
        }
        for name in [
            "",
            "a b",
            "../eth0",
            "eth0:1",
            "sixteen-letters-",
            ".",
            "\n",
        ] {
            assert!(!is_interface(name), "{name}");
        }
    }

    #[test]
    fn a_sender_is_read_from_its_address_if_it_is_of_ethernet() {
        let mut name = [0; 20];
        name[8..10].copy_from_slice(&ETHERNET.to_ne_bytes());
        name[11] = 6;
        name[12..18].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        assert_eq!(sender(&name), Some(Mac([2, 0, 0, 0, 0, 1])));
        for cut in 0..18 {
            assert_eq!(sender(&name[..cut]), None);
        }
        name[11] = 20;
        assert_eq!(sender(&name), None);
    }
}
