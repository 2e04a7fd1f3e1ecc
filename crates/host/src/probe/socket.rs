//! Sockets for probes, and which rights they need.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, Protocol, SendFlags, SocketFlags, SocketType, ipproto};

use super::control::{self, CONTROL_BYTES, Control};
use super::{ProbeError, icmp};
use crate::sys::socket::{NAME_BYTES, receive, set_number, set_option};

/// Longest answer that is read; what is longer is no answer.
const ANSWER_BYTES_MAX: usize = 512;
/// Answers that may wait for us, in bytes.
const RECEIVE_BYTES: usize = 1 << 20;

/// What is asked through a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Echo,
    Timestamp,
    Ntp,
}

/// A socket for one family of addresses and one kind of questions, to all targets.
pub(crate) struct Socket {
    fd: OwnedFd,
    pub(crate) is_v6: bool,
    /// It sees answers to others as well, and with IPv4 the packet's header.
    pub(crate) is_raw: bool,
    pub(crate) of: Use,
}

/// Something that has come.
pub(crate) struct Incoming<'a> {
    pub(crate) from: IpAddr,
    /// Without the packet's header.
    pub(crate) message: &'a [u8],
    pub(crate) control: Control,
}

/// Where answers are read to.
pub(crate) struct Buffers {
    pub(super) message: [u8; ANSWER_BYTES_MAX],
    pub(super) name: [u8; NAME_BYTES],
    pub(super) control: [u8; CONTROL_BYTES],
}

impl Buffers {
    pub(crate) fn new() -> Self {
        Self {
            message: [0; ANSWER_BYTES_MAX],
            name: [0; NAME_BYTES],
            control: [0; CONTROL_BYTES],
        }
    }
}

impl Socket {
    /// Opens one that needs the least rights.
    pub(crate) fn open(of: Use, is_v6: bool) -> Result<Self, ProbeError> {
        let (fd, is_raw) = match of {
            Use::Ntp => (socket(is_v6, SocketType::DGRAM, ipproto::UDP), false),
            Use::Timestamp => (socket(is_v6, SocketType::RAW, ipproto::ICMP), true),
            Use::Echo => {
                let icmp = if is_v6 {
                    ipproto::ICMPV6
                } else {
                    ipproto::ICMP
                };
                match socket(is_v6, SocketType::DGRAM, icmp) {
                    // Which groups may is a setting; a raw socket is a right.
                    Err(Errno::ACCESS | Errno::PERM | Errno::PROTONOSUPPORT) => {
                        (socket(is_v6, SocketType::RAW, icmp), true)
                    }
                    other => (other, false),
                }
            }
        };
        let fd = fd.map_err(|errno| match errno {
            Errno::PERM | Errno::ACCESS => right(of),
            other => ProbeError::socket(of, is_v6)(other.into()),
        })?;
        let socket = Self {
            fd,
            is_v6,
            is_raw,
            of,
        };
        socket.prepare().map_err(ProbeError::socket(of, is_v6))?;
        Ok(socket)
    }

    fn prepare(&self) -> io::Result<()> {
        let fd = self.fd.as_fd();
        set_number(fd, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1)?;
        if self.is_v6 {
            set_number(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1)?;
        } else {
            set_number(fd, libc::IPPROTO_IP, libc::IP_RECVTTL, 1)?;
        }
        net::sockopt::set_socket_recv_buffer_size(fd, RECEIVE_BYTES)?;
        // Otherwise it would be woken by every message of ICMP that this machine gets; the filters are in raw(7), icmp6(7).
        const ICMP_FILTER: libc::c_int = 1;
        match (self.is_raw, self.is_v6, self.of) {
            (true, false, of) => {
                let kind = if of == Use::Echo { 0 } else { 14 };
                let dropped: u32 = !(1 << kind);
                set_option(fd, libc::SOL_RAW, ICMP_FILTER, &dropped.to_ne_bytes())
            }
            (true, true, _) => {
                let mut dropped = [!0_u32; 8];
                dropped[129 / 32] &= !(1 << (129 % 32));
                let bytes: Vec<u8> = dropped.iter().flat_map(|word| word.to_ne_bytes()).collect();
                set_option(fd, libc::IPPROTO_ICMPV6, ICMP_FILTER, &bytes)
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Sends without waiting.
    pub(crate) fn send(&self, message: &[u8], to: IpAddr, port: u16) -> io::Result<()> {
        let to = SocketAddr::new(to, port);
        net::sendto(&self.fd, message, SendFlags::DONTWAIT, &to)?;
        Ok(())
    }

    /// The next message, without waiting; nothing if there is none. What is no message to us is passed over.
    pub(crate) fn next<'a>(&self, buffers: &'a mut Buffers) -> io::Result<Option<Incoming<'a>>> {
        let Buffers {
            message,
            name,
            control,
        } = buffers;
        loop {
            let Some(arrived) = receive(self.fd.as_fd(), message, name, control)? else {
                return Ok(None);
            };
            let (Some(from), false) = (address(&name[..arrived.name]), arrived.is_cut) else {
                continue;
            };
            let mut start = 0;
            if self.is_raw && !self.is_v6 {
                match icmp::behind_header(&message[..arrived.bytes]) {
                    Ok(rest) => start = arrived.bytes - rest.len(),
                    Err(_) => continue,
                }
            }
            return Ok(Some(Incoming {
                from,
                message: &message[start..arrived.bytes],
                control: control::read(&control[..arrived.control]),
            }));
        }
    }
}

fn socket(is_v6: bool, kind: SocketType, protocol: Protocol) -> Result<OwnedFd, Errno> {
    let family = if is_v6 {
        AddressFamily::INET6
    } else {
        AddressFamily::INET
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    net::socket_with(family, kind, flags, Some(protocol))
}

/// What is missing, with what the kernel's setting is now.
fn right(of: Use) -> ProbeError {
    if of != Use::Echo {
        return ProbeError::Right(
            "ICMP timestamps need the capability CAP_NET_RAW, which this process has not",
        );
    }
    let setting = "/proc/sys/net/ipv4/ping_group_range";
    let range = fs::read_to_string(setting).unwrap_or_default();
    // It is a group range or nothing of use; no text of others is shown.
    let mut words = range.split_ascii_whitespace().map(str::parse::<u32>);
    let (first, last) = match (words.next(), words.next()) {
        (Some(Ok(first)), Some(Ok(last))) => (first, last),
        _ => (1, 0),
    };
    ProbeError::EchoRight { first, last }
}

/// Reads a `struct sockaddr_in` or `sockaddr_in6`.
fn address(name: &[u8]) -> Option<IpAddr> {
    let family = u16::from_ne_bytes(*name.first_chunk()?);
    match i32::from(family) {
        libc::AF_INET => Some(Ipv4Addr::from(*name.get(4..)?.first_chunk::<4>()?).into()),
        libc::AF_INET6 => Some(Ipv6Addr::from(*name.get(8..)?.first_chunk::<16>()?).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_senders_are_read() {
        let mut four = [0; 16];
        four[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        four[4..8].copy_from_slice(&[127, 0, 0, 1]);
        assert_eq!(address(&four), Some(Ipv4Addr::LOCALHOST.into()));
        let mut six = [0; 28];
        six[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
        six[23] = 1;
        assert_eq!(address(&six), Some(Ipv6Addr::LOCALHOST.into()));
        for cut in 0..24 {
            assert_eq!(address(&six[..cut]), None);
        }
        assert_eq!(address(&[9; 28]), None);
    }
}
