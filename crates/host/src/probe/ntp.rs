//! NTP, as much of it as a question and its answer need (RFC 5905): 48 bytes.
//!
//! A server that has not set its clock by anything is as good to us as another: a VM that has just been moved is one.

use std::fmt;

/// A packet without extensions.
pub(crate) const PACKET_BYTES: usize = 48;
/// Milliseconds of the unit in which times are counted.
const MS_OF_FRACTION: f64 = 1000.0 / 4_294_967_296.0;
/// A server may keep a question for at most that long, in milliseconds.
const HELD_MS_MAX: f64 = 10_000.0;
/// So much more than the round trip a server may say to have kept the question, in milliseconds: its clock may be slewed.
const DELAY_SLACK_MS: f64 = 1.0;

/// A time: seconds since 1900 and their fraction, modulo 136 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Timestamp(pub(crate) u64);

impl Timestamp {
    /// From microseconds since 1970.
    #[must_use]
    pub(crate) fn from_unix_us(us: u64) -> Self {
        const SECONDS_1900_TO_1970: u64 = 2_208_988_800;
        let seconds = (us / 1_000_000).wrapping_add(SECONDS_1900_TO_1970);
        let fraction = ((us % 1_000_000) << 32) / 1_000_000;
        Self((seconds << 32) | fraction)
    }

    /// How much later this is, in milliseconds: less than 68 years, whatever era each is of.
    #[must_use]
    pub(crate) fn since_ms(self, earlier: Self) -> f64 {
        self.0.wrapping_sub(earlier.0).cast_signed() as f64 * MS_OF_FRACTION
    }
}

/// A packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Packet {
    /// Leap indicator: 3 says that the clock is not synchronised.
    pub(crate) leap: u8,
    /// Version.
    pub(crate) version: u8,
    /// 3 is a client's question, 4 a server's answer.
    pub(crate) mode: u8,
    /// 0 says that the server refuses, 16 that its clock is not synchronised.
    pub(crate) stratum: u8,
    /// Logarithm of the polling interval in seconds.
    pub(crate) poll: i8,
    /// Logarithm of the clock's precision in seconds.
    pub(crate) precision: i8,
    /// In seconds times 65536.
    pub(crate) root_delay: u32,
    /// In seconds times 65536.
    pub(crate) root_dispersion: u32,
    /// What the server's clock follows; with stratum 0 why it refuses, in four letters.
    pub(crate) reference_id: [u8; 4],
    /// When the server's clock was set last.
    pub(crate) reference: Timestamp,
    /// What the question had as `transmit`.
    pub(crate) origin: Timestamp,
    /// When the question came.
    pub(crate) receive: Timestamp,
    /// When this was sent.
    pub(crate) transmit: Timestamp,
}

/// Why an answer says nothing about a clock.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub(crate) enum NtpError {
    /// Shorter than a packet.
    #[error("an NTP packet has {PACKET_BYTES} bytes, this one has {0}")]
    Length(usize),
    /// Not 1 to 4.
    #[error("NTP version {0} is not known")]
    Version(u8),
    /// Not an answer of a server.
    #[error("mode {0} is no server's")]
    Mode(u8),
    /// The answer to another question, or to none.
    #[error("it answers another question")]
    Origin,
    /// The server refuses.
    #[error("the server refuses with {0}")]
    Kiss(Kiss),
    /// A stratum that there is not.
    #[error("there is no stratum {0}")]
    Stratum(u8),
    /// Without one of the times that matter.
    #[error("it has no time")]
    NoTime,
    /// The server says to have kept the question for longer than we waited, for a negative time or for too long.
    #[error(
        "it says to have kept the question for {held_ms:.3} ms of the {waited_ms:.3} ms that we waited"
    )]
    Held {
        /// How long it says to have kept it.
        held_ms: f64,
        /// How long the answer took.
        waited_ms: f64,
    },
}

/// Four letters that say why a server refuses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kiss(pub(crate) [u8; 4]);

impl Kiss {
    /// Whether it wants never to be asked again, rather than less often.
    #[must_use]
    pub(crate) fn is_final(self) -> bool {
        matches!(&self.0, b"DENY" | b"RSTR")
    }
}

impl fmt::Display for Kiss {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.escape_ascii().fmt(to)
    }
}

impl fmt::Debug for Kiss {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, to)
    }
}

impl Packet {
    /// A question. It says nothing of our clock: `cookie` stands for the time, and the answer repeats it.
    #[must_use]
    pub(crate) fn question(cookie: u64) -> Self {
        Self {
            version: 4,
            mode: 3,
            transmit: Timestamp(cookie),
            ..Self::default()
        }
    }

    /// As it is sent.
    #[must_use]
    pub(crate) fn encode(&self) -> [u8; PACKET_BYTES] {
        let mut bytes = [0; PACKET_BYTES];
        bytes[0] = (self.leap << 6) | ((self.version & 7) << 3) | (self.mode & 7);
        bytes[1] = self.stratum;
        bytes[2..3].copy_from_slice(&self.poll.to_be_bytes());
        bytes[3..4].copy_from_slice(&self.precision.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.root_delay.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.root_dispersion.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.reference_id);
        let times = [self.reference, self.origin, self.receive, self.transmit];
        for (to, time) in bytes[16..].chunks_exact_mut(8).zip(times) {
            to.copy_from_slice(&time.0.to_be_bytes());
        }
        bytes
    }

    /// Reads a packet; what follows it (extensions, a message's authentication) is passed over.
    ///
    /// # Errors
    /// If it is too short.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, NtpError> {
        let Some(packet) = bytes.first_chunk::<PACKET_BYTES>() else {
            return Err(NtpError::Length(bytes.len()));
        };
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&packet[at..at + 4]);
            word
        };
        let time = |at: usize| {
            let mut time = [0; 8];
            time.copy_from_slice(&packet[at..at + 8]);
            Timestamp(u64::from_be_bytes(time))
        };
        Ok(Self {
            leap: packet[0] >> 6,
            version: (packet[0] >> 3) & 7,
            mode: packet[0] & 7,
            stratum: packet[1],
            poll: packet[2].cast_signed(),
            precision: packet[3].cast_signed(),
            root_delay: u32::from_be_bytes(word(4)),
            root_dispersion: u32::from_be_bytes(word(8)),
            reference_id: word(12),
            reference: time(16),
            origin: time(24),
            receive: time(32),
            transmit: time(40),
        })
    }

    /// For how long the server has kept the question, by its own clock, in milliseconds.
    #[must_use]
    pub(crate) fn held_ms(&self) -> f64 {
        self.transmit.since_ms(self.receive)
    }

    /// By how many milliseconds the server's clock is ahead of ours, by the answer to the question with that cookie, sent and
    /// received at these times of ours. Whether the server says that its clock is set by anything does not matter.
    ///
    /// # Errors
    /// If it is no answer to it, or what it says can't be.
    pub(crate) fn read(
        &self,
        cookie: u64,
        sent: Timestamp,
        received: Timestamp,
    ) -> Result<f64, NtpError> {
        if !(1..=4).contains(&self.version) {
            return Err(NtpError::Version(self.version));
        }
        if self.mode != 4 {
            return Err(NtpError::Mode(self.mode));
        }
        if self.origin.0 != cookie {
            return Err(NtpError::Origin);
        }
        // Stratum 0 without a reason is what some send that know of no server yet.
        if self.stratum == 0 && self.reference_id != [0; 4] {
            return Err(NtpError::Kiss(Kiss(self.reference_id)));
        }
        if self.stratum > 16 {
            return Err(NtpError::Stratum(self.stratum));
        }
        if self.receive.0 == 0 || self.transmit.0 == 0 {
            return Err(NtpError::NoTime);
        }
        let held_ms = self.held_ms();
        let waited_ms = received.since_ms(sent);
        if !(0.0..=HELD_MS_MAX).contains(&held_ms) || held_ms > waited_ms + DELAY_SLACK_MS {
            return Err(NtpError::Held { held_ms, waited_ms });
        }
        let (there, back) = (
            self.receive.since_ms(sent),
            self.transmit.since_ms(received),
        );
        Ok(f64::midpoint(there, back))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOON_US: u64 = 1_767_225_600_000_000;

    fn at(us: u64) -> Timestamp {
        Timestamp::from_unix_us(us)
    }

    fn answer(cookie: u64, receive_us: u64, transmit_us: u64) -> Packet {
        Packet {
            version: 4,
            mode: 4,
            stratum: 2,
            origin: Timestamp(cookie),
            receive: at(receive_us),
            transmit: at(transmit_us),
            ..Packet::default()
        }
    }

    #[test]
    fn a_lag_is_read_from_the_four_times() {
        // It lags by 100 ms, each way takes 3 ms, and it keeps the question for 1 ms.
        let answer = answer(7, NOON_US + 3_000 - 100_000, NOON_US + 4_000 - 100_000);
        let offset_ms = answer.read(7, at(NOON_US), at(NOON_US + 7_000)).unwrap();
        assert!((offset_ms + 100.0).abs() < 1e-3, "{offset_ms}");
    }

    #[test]
    fn a_server_that_nothing_synchronises_is_read_too() {
        for (leap, stratum) in [(3, 2), (0, 16), (3, 0)] {
            let packet = Packet {
                leap,
                stratum,
                ..answer(7, NOON_US, NOON_US)
            };
            assert_eq!(packet.read(7, at(NOON_US), at(NOON_US)), Ok(0.0));
        }
    }

    #[test]
    fn what_is_no_answer_to_this_question_is_refused_by_its_rule() {
        let good = answer(7, NOON_US, NOON_US);
        let refused = |packet: Packet| packet.read(7, at(NOON_US), at(NOON_US + 1000)).unwrap_err();
        assert_eq!(refused(Packet { version: 0, ..good }), NtpError::Version(0));
        assert_eq!(refused(Packet { mode: 3, ..good }), NtpError::Mode(3));
        let other = Timestamp(8);
        assert_eq!(
            refused(Packet {
                origin: other,
                ..good
            }),
            NtpError::Origin
        );
        assert_eq!(
            refused(Packet {
                stratum: 17,
                ..good
            }),
            NtpError::Stratum(17)
        );
        let none = Timestamp(0);
        assert_eq!(
            refused(Packet {
                receive: none,
                ..good
            }),
            NtpError::NoTime
        );
        let kiss = Packet {
            stratum: 0,
            reference_id: *b"RATE",
            ..good
        };
        assert_eq!(refused(kiss).to_string(), "the server refuses with RATE");
        let odd = Kiss([0x1b, b'[', 0xff, b'J']);
        assert_eq!(odd.to_string(), "\\x1b[\\xffJ");
        assert_eq!(Packet::decode(&[0; 47]), Err(NtpError::Length(47)));
    }

    #[test]
    fn a_server_that_says_to_have_kept_the_question_too_long_or_negatively_lies() {
        for (receive_us, transmit_us) in [
            (NOON_US + 5_000, NOON_US),
            (NOON_US, NOON_US + 5_000),
            (NOON_US, NOON_US + 3_600_000_000),
        ] {
            let lie = answer(7, receive_us, transmit_us);
            let error = lie.read(7, at(NOON_US), at(NOON_US + 1_000)).unwrap_err();
            assert!(matches!(error, NtpError::Held { .. }), "{error}");
        }
    }

    #[test]
    fn a_clock_in_another_era_is_as_far_off_as_it_says() {
        let (before, after) = (Timestamp(u64::MAX), Timestamp(0));
        assert!(after.since_ms(before).abs() < 1e-6);
        let packet = Packet {
            receive: Timestamp(1),
            transmit: Timestamp(1),
            ..answer(7, 0, 0)
        };
        let offset_ms = packet.read(7, at(NOON_US), at(NOON_US)).unwrap();
        assert!(offset_ms.abs() < 68.1 * 366.0 * 86_400e3);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(bytes in any::<[u8; PACKET_BYTES]>()) {
            let packet = Packet::decode(&bytes).unwrap();
            prop_assert_eq!(packet.encode(), bytes);
        }

        #[test]
        fn any_answer_is_read_within_bounds_or_refused(
            bytes in any::<[u8; PACKET_BYTES]>(),
            cookie in any::<u64>(),
            sent in any::<u64>(),
            received in any::<u64>(),
        ) {
            let mut packet = Packet::decode(&bytes).unwrap();
            (packet.mode, packet.version, packet.origin) = (4, 4, Timestamp(cookie));
            if let Ok(offset_ms) = packet.read(cookie, Timestamp(sent), Timestamp(received)) {
                prop_assert!(offset_ms.abs() <= 2.2e12);
            }
        }

        #[test]
        fn an_offset_is_measured_as_it_is(offset_ms in -1e9..1e9_f64, way_us in 0..400_000_u64) {
            let receive = (NOON_US + way_us).saturating_add_signed((offset_ms * 1e3) as i64);
            let sent = at(NOON_US);
            let read = answer(1, receive, receive).read(1, sent, at(NOON_US + 2 * way_us)).unwrap();
            prop_assert!((read - offset_ms).abs() < 0.01);
        }
    }
}
