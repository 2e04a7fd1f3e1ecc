//! What of this module the fuzz targets reach.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::announce::{self, Mac};
use super::control;
use super::icmp::{self, Answer, Question};
use super::ntp::{Packet, Timestamp};

/// What the kernel's control messages say: when a message came, in microseconds since 1970, and the hops it had left.
pub fn probe_control(bytes: &[u8]) -> (Option<u64>, Option<u8>) {
    let control = control::read(bytes);
    (control.received_us, control.hops)
}

/// A message of ICMP, behind a header of IPv4 if a raw socket gave it: by how many milliseconds its clock is ahead, if it
/// is a timestamp that says so.
pub fn probe_icmp(bytes: &[u8], is_v6: bool, is_raw: bool) -> Option<f64> {
    let message = if is_raw && !is_v6 {
        icmp::behind_header(bytes).ok()?
    } else {
        bytes
    };
    match icmp::read(message, is_v6).ok()? {
        Answer::Timestamp {
            receive, transmit, ..
        } => icmp::offset_ms(
            receive,
            transmit,
            1_700_000_000_000_000,
            1_700_000_000_500_000,
        ),
        Answer::Echo { .. } => None,
    }
}

/// A packet of NTP: by how many milliseconds its clock is ahead, if it answers the question with that cookie. Written again
/// it must be what it was.
///
/// # Panics
/// If it is not.
pub fn probe_ntp(bytes: &[u8], cookie: u64, sent: u64, received: u64) -> Option<f64> {
    let packet = Packet::decode(bytes).ok()?;
    assert_eq!(packet.encode(), bytes[..bytes.len().min(48)]);
    packet
        .read(cookie, Timestamp(sent), Timestamp(received))
        .ok()
}

/// ARP (0), RARP (1) or a packet of IPv6, without Ethernet's header: whether it is an announcement, if it says anything of a
/// machine.
///
/// # Panics
/// If what it says is of no machine.
pub fn probe_announcement(bytes: &[u8], kind: u8) -> Option<bool> {
    let heard = match kind {
        0 => announce::arp(bytes),
        1 => announce::rarp(bytes),
        _ => announce::advertisement(bytes, Mac([2, 0, 0, 0, 0, 1])),
    };
    let heard = heard.ok()?;
    assert!(heard.mac.is_own());
    assert!(
        heard
            .address
            .is_none_or(|address| !address.is_unspecified() && !address.is_multicast())
    );
    Some(heard.is_announcement)
}

/// Announcements to begin with: gratuitous ARP, RARP, a neighbour advertisement.
pub fn announcement_seeds() -> [Vec<u8>; 3] {
    let mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
    let (here, none) = (Ipv4Addr::new(10, 0, 0, 7), Ipv4Addr::UNSPECIFIED);
    [
        announce::written(1, (mac, here), (mac, here)),
        announce::written(3, (mac, none), (mac, none)),
        announce::written_advertisement(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 7), 0x20),
    ]
}

/// Packets to begin with: control messages, messages of ICMP, and a question of NTP.
pub fn probe_seeds() -> [Vec<u8>; 4] {
    let time = [1_700_000_000_u64.to_ne_bytes(), 5_u64.to_ne_bytes()].concat();
    let hops = 64_i32.to_ne_bytes();
    let control = [
        control::written(libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS, &time),
        control::written(libc::IPPROTO_IP, libc::IP_TTL, &hops),
    ];
    let (id, sequence) = (1, 2);
    let mut buffer = [0; icmp::QUESTION_BYTES_MAX];
    let echo = Question::Echo {
        id,
        sequence,
        cookie: 3,
    };
    let echo = icmp::write(echo, true, &mut buffer).to_vec();
    let timestamp = Question::Timestamp {
        id,
        sequence,
        cookie: 3,
    };
    // The answer to a timestamp, with a right checksum: it is one more than the question's type, in the upper byte.
    let mut timestamp = icmp::write(timestamp, false, &mut buffer).to_vec();
    timestamp[0] += 1;
    let sum = u16::from_be_bytes([timestamp[2], timestamp[3]]) - 0x100;
    timestamp[2..4].copy_from_slice(&sum.to_be_bytes());
    [
        control.concat(),
        echo,
        timestamp,
        Packet::question(7).encode().to_vec(),
    ]
}
