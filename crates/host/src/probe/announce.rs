//! Announcements, by which a machine says unasked where it is: RARP, which QEMU sends when a VM has arrived (the frames of
//! RFC 903), gratuitous ARP (RFC 5227, section 3) and unsolicited neighbour advertisements (RFC 4861, section 7.2.6), which
//! guests send.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Bytes of ARP and RARP for Ethernet and IPv4.
const ARP_BYTES: usize = 28;
/// Bytes of a header of IPv6.
const IPV6_BYTES: usize = 40;
/// Bytes of a neighbour advertisement without options.
const ADVERTISEMENT_BYTES: usize = 24;
/// What follows a header of IPv6 if it is ICMPv6.
const ICMPV6: u8 = 58;
/// The type of a neighbour advertisement.
const ADVERTISEMENT: u8 = 136;
/// The flag of one that was asked for.
const SOLICITED: u8 = 0x40;

/// A hardware address of Ethernet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

/// Why a text is no hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six pairs of hexadecimal digits with colons between them.
    #[error("a hardware address is written as 52:54:00:12:34:56")]
    Form,
    /// A group's address, or none.
    #[error("this is no hardware address of one machine")]
    Group,
}

impl Mac {
    /// Whether one machine may have it.
    #[must_use]
    pub fn is_own(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let (mut bytes, mut pairs) = ([0; 6], text.split(':'));
        for byte in &mut bytes {
            let pair = pairs.next().ok_or(MacError::Form)?;
            // `from_str_radix` takes a sign.
            if pair.len() != 2 || !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(MacError::Form);
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| MacError::Form)?;
        }
        let mac = Self(bytes);
        match pairs.next() {
            Some(_) => Err(MacError::Form),
            None if !mac.is_own() => Err(MacError::Group),
            None => Ok(mac),
        }
    }
}

/// What a message says of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    /// Its hardware address.
    pub(crate) mac: Mac,
    /// Its address; RARP has none.
    pub(crate) address: Option<IpAddr>,
    /// Whether nobody has asked for it.
    pub(crate) is_announcement: bool,
}

/// Why a message says nothing of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AnnounceError {
    /// Cut.
    #[error("a message of {0} bytes is too short")]
    Length(usize),
    /// Not of Ethernet and IPv4, or no header of IPv6 with ICMPv6 behind it.
    #[error("it is of another family of addresses")]
    Family,
    /// Another operation, or another type of ICMPv6.
    #[error("operation {0} says nothing of a machine")]
    Operation(u16),
    /// It has passed a router, so that anybody may have sent it.
    #[error("it has passed a router")]
    Routed,
    /// Addresses that no machine has.
    #[error("no machine has that address")]
    Address,
}

/// Reads ARP, without the header of Ethernet.
pub(crate) fn arp(message: &[u8]) -> Result<Heard, AnnounceError> {
    let (operation, mac, message) = sender(message)?;
    if !matches!(operation, 1 | 2) {
        return Err(AnnounceError::Operation(operation));
    }
    let (own, other) = (ipv4(&message[14..18]), ipv4(&message[24..28]));
    // Who asks whether an address is free has none yet.
    if own.is_unspecified() || own.is_broadcast() || own.is_multicast() {
        return Err(AnnounceError::Address);
    }
    Ok(Heard {
        mac,
        address: Some(own.into()),
        is_announcement: own == other,
    })
}

/// Reads RARP, without the header of Ethernet: a question for one's own address is what QEMU announces a VM with.
pub(crate) fn rarp(message: &[u8]) -> Result<Heard, AnnounceError> {
    let (operation, mac, message) = sender(message)?;
    if operation != 3 {
        return Err(AnnounceError::Operation(operation));
    }
    Ok(Heard {
        mac,
        address: None,
        is_announcement: message[18..24] == mac.0,
    })
}

/// Reads a packet of IPv6 that came from this hardware address, if it is a neighbour advertisement. Its checksum is not
/// looked at: what was damaged on the way, Ethernet drops, and who lies can calculate.
pub(crate) fn advertisement(packet: &[u8], mac: Mac) -> Result<Heard, AnnounceError> {
    let short = || AnnounceError::Length(packet.len());
    let (header, message) = packet.split_at_checked(IPV6_BYTES).ok_or_else(short)?;
    if header[0] >> 4 != 6 || header[6] != ICMPV6 {
        return Err(AnnounceError::Family);
    }
    let message = message.get(..ADVERTISEMENT_BYTES).ok_or_else(short)?;
    if (message[0], message[1]) != (ADVERTISEMENT, 0) {
        return Err(AnnounceError::Operation(message[0].into()));
    }
    if header[7] != 255 {
        return Err(AnnounceError::Routed);
    }
    let address = message[8..24]
        .first_chunk::<16>()
        .map(|bytes| Ipv6Addr::from(*bytes))
        .ok_or_else(short)?;
    if address.is_multicast() || address.is_unspecified() || !mac.is_own() {
        return Err(AnnounceError::Address);
    }
    Ok(Heard {
        mac,
        address: Some(address.into()),
        is_announcement: message[4] & SOLICITED == 0,
    })
}

/// Operation, the sender's hardware address, and all of a message of ARP or RARP.
fn sender(message: &[u8]) -> Result<(u16, Mac, &[u8; ARP_BYTES]), AnnounceError> {
    let short = AnnounceError::Length(message.len());
    let message = message.first_chunk::<ARP_BYTES>().ok_or(short)?;
    // Ethernet, IPv4, and how long their addresses are.
    if message[..6] != [0, 1, 8, 0, 6, 4] {
        return Err(AnnounceError::Family);
    }
    let operation = u16::from_be_bytes([message[6], message[7]]);
    let mac = Mac([
        message[8],
        message[9],
        message[10],
        message[11],
        message[12],
        message[13],
    ]);
    if !mac.is_own() {
        return Err(AnnounceError::Address);
    }
    Ok((operation, mac, message))
}

fn ipv4(bytes: &[u8]) -> Ipv4Addr {
    let bytes: [u8; 4] = bytes.try_into().unwrap_or_default();
    bytes.into()
}

/// A message of ARP or RARP, for tests and as seeds.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn written(operation: u16, from: (Mac, Ipv4Addr), to: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut message = vec![0, 1, 8, 0, 6, 4];
    message.extend(operation.to_be_bytes());
    for (mac, address) in [from, to] {
        message.extend(mac.0);
        message.extend(address.octets());
    }
    message
}

/// A neighbour advertisement in its packet, for tests and as seeds.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn written_advertisement(address: Ipv6Addr, flags: u8) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 24, ICMPV6, 255];
    packet.extend(address.octets());
    packet.extend(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets());
    packet.extend([ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0]);
    packet.extend(address.octets());
    packet
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VM: Mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
    const OTHER: Mac = Mac([0x52, 0x54, 0, 9, 9, 9]);
    const HERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);
    const THERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 8);
    const NONE: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

    fn heard(mac: Mac, address: impl Into<IpAddr>, is_announcement: bool) -> Heard {
        Heard {
            mac,
            address: Some(address.into()),
            is_announcement,
        }
    }

    #[test]
    fn what_nobody_asked_for_is_an_announcement_and_the_rest_says_who_has_which_address() {
        for operation in [1, 2] {
            let gratuitous = written(operation, (VM, HERE), (VM, HERE));
            assert_eq!(arp(&gratuitous), Ok(heard(VM, HERE, true)));
            let usual = written(operation, (VM, HERE), (OTHER, THERE));
            assert_eq!(arp(&usual), Ok(heard(VM, HERE, false)));
        }
        // Ethernet fills up short frames.
        let mut qemu = written(3, (VM, NONE), (VM, NONE));
        qemu.resize(46, 0);
        let announced = Heard {
            mac: VM,
            address: None,
            is_announcement: true,
        };
        assert_eq!(rarp(&qemu), Ok(announced));
        let of_another = written(3, (VM, NONE), (OTHER, NONE));
        assert!(!rarp(&of_another).unwrap().is_announcement);
        let six: Ipv6Addr = "fe80::7".parse().unwrap();
        for (flags, is_announcement) in [(0x20, true), (0xa0, true), (0x60, false)] {
            let packet = written_advertisement(six, flags);
            assert_eq!(
                advertisement(&packet, VM),
                Ok(heard(VM, six, is_announcement))
            );
        }
    }

    #[test]
    fn what_says_nothing_of_a_machine_is_refused_by_its_rule() {
        let good = written(1, (VM, HERE), (VM, HERE));
        assert_eq!(arp(&good[..27]), Err(AnnounceError::Length(27)));
        assert_eq!(rarp(&good), Err(AnnounceError::Operation(1)));
        let reply = written(4, (VM, NONE), (VM, NONE));
        assert_eq!(rarp(&reply), Err(AnnounceError::Operation(4)));
        assert_eq!(arp(&reply), Err(AnnounceError::Operation(4)));
        let mut infiniband = good.clone();
        infiniband[1] = 32;
        assert_eq!(arp(&infiniband), Err(AnnounceError::Family));
        for (mac, address) in [
            (Mac([0xff; 6]), HERE),
            (Mac([0; 6]), HERE),
            (VM, NONE),
            (VM, Ipv4Addr::BROADCAST),
        ] {
            let odd = written(1, (mac, address), (mac, address));
            assert_eq!(arp(&odd), Err(AnnounceError::Address));
        }
        let six: Ipv6Addr = "2001:db8::7".parse().unwrap();
        let good = written_advertisement(six, 0x20);
        assert_eq!(
            advertisement(&good[..63], VM),
            Err(AnnounceError::Length(63))
        );
        let change = |at: usize, to: u8| {
            let mut packet = good.clone();
            packet[at] = to;
            advertisement(&packet, VM).unwrap_err()
        };
        assert_eq!(change(0, 0x45), AnnounceError::Family);
        assert_eq!(change(6, 17), AnnounceError::Family);
        assert_eq!(change(7, 254), AnnounceError::Routed);
        assert_eq!(change(40, 135), AnnounceError::Operation(135));
        assert_eq!(change(48, 0xff), AnnounceError::Address);
    }

    #[test]
    fn hardware_addresses_are_read_as_they_are_written() {
        assert_eq!("52:54:00:01:02:03".parse(), Ok(VM));
        assert_eq!(VM.to_string(), "52:54:00:01:02:03");
        for text in [
            "",
            "52:54:00:01:02",
            "52:54:00:01:02:03:04",
            "52:54:00:01:02:+3",
            "52:54:00:01:02:0g",
            "525400010203",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(MacError::Form), "{text}");
        }
        for text in ["ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert_eq!(text.parse::<Mac>(), Err(MacError::Group), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            for heard in [arp(&bytes), rarp(&bytes), advertisement(&bytes, VM)].into_iter().flatten() {
                prop_assert!(heard.mac.is_own());
                prop_assert!(heard.address.is_none_or(|address| !address.is_unspecified()));
            }
        }

        #[test]
        fn whatever_a_header_is_followed_by_is_read_or_refused(
            operation: u16, rest in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut bytes = vec![0, 1, 8, 0, 6, 4];
            bytes.extend(operation.to_be_bytes());
            bytes.extend(&rest);
            let is_long = bytes.len() >= ARP_BYTES;
            prop_assert!(is_long || arp(&bytes).is_err());
            prop_assert!(is_long || rarp(&bytes).is_err());
            let mut packet = written_advertisement(Ipv6Addr::LOCALHOST, 0);
            packet.truncate(IPV6_BYTES);
            packet.extend([ADVERTISEMENT, 0, 0, 0]);
            packet.extend(&rest);
            prop_assert!(rest.len() >= 20 || advertisement(&packet, VM).is_err());
        }

        #[test]
        fn a_hardware_address_is_the_same_when_read_again(bytes: [u8; 6]) {
            let mac = Mac(bytes);
            prop_assert_eq!(mac.to_string().parse::<Mac>().ok(), mac.is_own().then_some(mac));
        }
    }
}
