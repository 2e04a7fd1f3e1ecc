//! What a prober reads from the network: answers of ICMP and NTP, what the kernel says of them, and announcements.

use palanquin_host::fuzzing::{
    announcement_seeds, probe_announcement, probe_control, probe_icmp, probe_ntp, probe_seeds,
};

use super::within;
use crate::entry::Target;

/// A byte that says what follows, and what a socket has given.
pub(crate) const PROBE: Target = Target::new("probe", probe, || {
    let [control, echo, timestamp, ntp] = probe_seeds();
    let mut packet = vec![0x45; 20];
    packet.extend(&timestamp);
    let mut server = ntp.clone();
    server[0] = 0x24;
    let seed = |kind: u8, bytes: &[u8]| [&[kind], bytes].concat();
    let [arp, rarp, advertisement] = announcement_seeds();
    vec![
        seed(0, &control),
        seed(1, &timestamp),
        seed(2, &echo),
        seed(3, &packet),
        seed(4, &ntp),
        seed(4, &server),
        seed(4, &server[..47]),
        seed(5, &arp),
        seed(6, &rarp),
        seed(7, &advertisement),
    ]
});

fn probe(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    within(0, || match kind % 8 {
        0 => {
            let _ = probe_control(bytes);
        }
        1 => clock(probe_icmp(bytes, false, false), 43_200_001.0),
        2 => assert_eq!(
            probe_icmp(bytes, true, false),
            None,
            "IPv6 has no timestamps"
        ),
        3 => clock(probe_icmp(bytes, false, true), 43_200_001.0),
        5..=7 => {
            let _ = probe_announcement(bytes, kind % 8 - 5);
        }
        _ => {
            // The answer to whatever it says to answer, at any time.
            let time = |at: usize| {
                let time = bytes.get(at..at + 8).and_then(|time| time.try_into().ok());
                u64::from_be_bytes(time.unwrap_or_default())
            };
            let (cookie, receive, transmit) = (time(24), time(32), time(40));
            clock(probe_ntp(bytes, cookie, receive, transmit), 2.2e12);
            assert_eq!(
                probe_ntp(bytes, !cookie, receive, transmit),
                None,
                "another question"
            );
        }
    });
}

/// A clock that is read is off by a number within bounds.
fn clock(offset_ms: Option<f64>, most: f64) {
    if let Some(offset_ms) = offset_ms {
        assert!(offset_ms.abs() <= most, "{offset_ms}");
    }
}
