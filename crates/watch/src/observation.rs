//! What a probe has seen, within bounds: nothing else gets into the detector.

use thiserror::Error;

/// Longest round trip that is taken for one: an hour.
pub const RTT_MS_MAX: f64 = 3_600_000.0;
/// Largest difference of clocks: the 136 years of an NTP era.
pub const OFFSET_MS_MAX: f64 = 4.3e12;
/// Latest time: beyond the year 2280, if times are of Unix.
pub const TIME_US_MAX: u64 = 10_000_000_000_000_000;

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A hypervisor host: evidence about its VMs, no findings of its own.
    Host,
    /// A virtual machine.
    Vm,
}

/// A target of a [`crate::Watcher`], as it numbered it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetId(pub(crate) usize);

/// What one probe has seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reading {
    /// A copy of the target announced itself on the network (RARP or gratuitous ARP).
    Announced,
    /// The target's clock less the watcher's, read from an ICMP timestamp; its resolution is a millisecond.
    IcmpOffset {
        /// Milliseconds; a target that lags is negative.
        ms: f64,
    },
    /// No answer within the prober's time limit.
    Lost,
    /// The target's clock less the watcher's, by NTP.
    NtpOffset {
        /// Milliseconds; a target that lags is negative.
        ms: f64,
    },
    /// For how long the target's NTP server has kept a question, by the target's own clock. Only [`crate::outside`] looks at
    /// it.
    NtpHeld {
        /// Milliseconds.
        ms: f64,
    },
    /// An answer, and how long it took.
    Rtt {
        /// Milliseconds.
        ms: f64,
    },
    /// Hops that were left to the answer.
    Ttl {
        /// As in the IP header.
        hops: u8,
    },
}

/// What one probe has seen, and when it was sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observation {
    /// When the probe was sent (an announcement: when it was seen), in microseconds of the watcher's clock, whose
    /// epoch is the caller's choice and the same for all.
    pub sent_us: u64,
    /// Whom it is about.
    pub target: TargetId,
    /// What was seen.
    pub reading: Reading,
}

/// Why an observation is refused. The detector is then as if it had never come.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
pub enum ObservationError {
    /// An offset that is no number or beyond [`OFFSET_MS_MAX`].
    #[error("a clock can't be {0} ms off")]
    Offset(f64),
    /// A round trip that is no number, negative or beyond [`RTT_MS_MAX`].
    #[error("a round trip can't take {0} ms")]
    Rtt(f64),
    /// Later than [`TIME_US_MAX`].
    #[error("a time of {0} us is beyond all bounds")]
    Time(u64),
    /// Its second is judged already.
    #[error("sent at {sent_us} us, but everything before {closed_us} us is judged already")]
    TooLate {
        /// When it was sent.
        sent_us: u64,
        /// What is not judged yet begins here.
        closed_us: u64,
    },
    /// More than [`crate::PENDING_MAX`] that wait for their second to end.
    #[error(
        "more than {} observations of one target within a few seconds",
        crate::PENDING_MAX
    )]
    TooMany,
    /// No such target.
    #[error("no target has this number")]
    UnknownTarget,
}

impl Reading {
    /// Refuses what cannot be.
    pub(crate) fn check(&self) -> Result<(), ObservationError> {
        match *self {
            Self::Rtt { ms } | Self::NtpHeld { ms } if !(0.0..=RTT_MS_MAX).contains(&ms) => {
                Err(ObservationError::Rtt(ms))
            }
            Self::NtpOffset { ms } | Self::IcmpOffset { ms }
                if !(-OFFSET_MS_MAX..=OFFSET_MS_MAX).contains(&ms) =>
            {
                Err(ObservationError::Offset(ms))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_measure_is_refused() {
        for ms in [f64::NAN, f64::INFINITY, -0.001, RTT_MS_MAX * 1.01] {
            assert!(Reading::Rtt { ms }.check().is_err(), "{ms}");
        }
        for ms in [f64::NAN, f64::NEG_INFINITY, 1e300] {
            assert!(Reading::NtpOffset { ms }.check().is_err(), "{ms}");
            assert!(Reading::IcmpOffset { ms }.check().is_err(), "{ms}");
        }
        assert!(Reading::Rtt { ms: 0.0 }.check().is_ok());
        assert!(Reading::NtpOffset { ms: -1e12 }.check().is_ok());
    }
}
