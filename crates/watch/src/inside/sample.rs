//! What a guest has read of itself at one time, within bounds.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::thresholds;

/// Most neighbours.
pub const NEIGHBOURS_MAX: usize = 64;
/// Most values of a fingerprint.
pub const VALUES_MAX: usize = 256;
/// Longest name or value, in bytes.
pub const TEXT_MAX: usize = 2048;

/// A moment at which the hardware clock went on to its next second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edge {
    /// What it showed then, in seconds since 1970.
    pub rtc_s: i64,
    /// When, in nanoseconds of `raw_ns`.
    pub at_ns: i64,
    /// Within so many nanoseconds.
    pub error_ns: i64,
}

/// Clocks, read at about the same time, in nanoseconds since whatever each counts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clocks {
    /// Never corrected (`CLOCK_MONOTONIC_RAW`).
    pub raw_ns: i64,
    /// Slewed by adjtime(3), never set (`CLOCK_MONOTONIC`).
    pub monotonic_ns: i64,
    /// The same, and it counts while the guest has suspended itself (`CLOCK_BOOTTIME`).
    pub boottime_ns: i64,
    /// The time of day (`CLOCK_REALTIME`).
    pub realtime_ns: i64,
    /// The processor's counter, in ticks.
    pub tsc: Option<u64>,
    /// All were read within so many nanoseconds.
    pub error_ns: i64,
    /// The hardware clock.
    pub rtc: Option<Edge>,
}

/// How long one turn of each loop of a benchmark took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Speeds {
    /// Arithmetic: what the others are compared with.
    pub alu_ns: Option<f64>,
    /// Memory in the first cache.
    pub first_cache_ns: Option<f64>,
    /// Memory in the second cache.
    pub second_cache_ns: Option<f64>,
    /// Memory in neither.
    pub memory_ns: Option<f64>,
    /// A system call.
    pub syscall_ns: Option<f64>,
    /// CPUID, which a hypervisor answers.
    pub cpuid_ns: Option<f64>,
}

/// How long a write to a page took, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Writes {
    /// The first one in a while.
    pub first_ns: f64,
    /// One right after it.
    pub again_ns: f64,
}

impl Writes {
    /// Whether the first one took so long that another look is wanted soon.
    #[must_use]
    pub fn are_slow(&self) -> bool {
        self.first_ns >= thresholds::FIRST_WRITE_TIMES * self.again_ns
            && self.first_ns - self.again_ns >= thresholds::FIRST_WRITE_NS
    }
}

/// What was seen of a neighbour since the sample before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Neighbour {
    /// Its name.
    pub name: String,
    /// The middle of its round trips, in milliseconds; nothing if none was answered.
    pub rtt_ms: Option<f64>,
    /// Its clock less this guest's, in milliseconds: the middle of what was read.
    pub offset_ms: Option<f64>,
}

/// All that was read at one time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// The clocks.
    pub clocks: Clocks,
    /// By how much later it was read than it should have been, in milliseconds.
    pub late_ms: f64,
    /// Time that the hypervisor gave to others since the sample before, in milliseconds, where it tells.
    pub stolen_ms: Option<f64>,
    /// Processor, firmware and hypervisor, by names and values; nothing if they were not looked at.
    pub fingerprint: Option<BTreeMap<String, String>>,
    /// The benchmark; nothing if it was not run.
    pub speeds: Option<Speeds>,
    /// Writes to pages that had not been written to for some looks; nothing if there were none.
    pub writes: Option<Writes>,
    /// Neighbours.
    pub neighbours: Vec<Neighbour>,
}

/// Why a sample is refused. The detector is then as if it had never come, but for a clock that went back.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum SampleError {
    /// The clock that is never set shows less than before: nothing can be compared with what was. All is learnt anew.
    #[error("the clock that is never set went back by {by_ms} ms")]
    Backwards {
        /// Milliseconds.
        by_ms: f64,
    },
    /// A duration that is none.
    #[error("{what} can't be {value}")]
    Value {
        /// Of what.
        what: &'static str,
        /// What it is said to be.
        value: f64,
    },
    /// Too many or too long names and values.
    #[error(
        "more than {NEIGHBOURS_MAX} neighbours or {VALUES_MAX} values, or one of more than {TEXT_MAX} bytes"
    )]
    Size,
}

impl Sample {
    pub(super) fn check(&self) -> Result<(), SampleError> {
        let speeds = self.speeds.unwrap_or_default();
        let durations = [
            ("lateness", Some(self.late_ms)),
            ("stolen time", self.stolen_ms),
            ("a benchmark", speeds.alu_ns),
            ("a benchmark", speeds.first_cache_ns),
            ("a benchmark", speeds.second_cache_ns),
            ("a benchmark", speeds.memory_ns),
            ("a benchmark", speeds.syscall_ns),
            ("a benchmark", speeds.cpuid_ns),
            ("a first write", self.writes.map(|of| of.first_ns)),
            ("a second write", self.writes.map(|of| of.again_ns)),
        ];
        let rtts = self.neighbours.iter().map(|of| ("a round trip", of.rtt_ms));
        for (what, value) in durations.into_iter().chain(rtts) {
            if let Some(value) = value
                && !(0.0..=1e15).contains(&value)
            {
                return Err(SampleError::Value { what, value });
            }
        }
        for neighbour in &self.neighbours {
            if let Some(value) = neighbour.offset_ms
                && !(-crate::OFFSET_MS_MAX..=crate::OFFSET_MS_MAX).contains(&value)
            {
                let what = "the offset of a clock";
                return Err(SampleError::Value { what, value });
            }
        }
        let empty = BTreeMap::new();
        let values = self.fingerprint.as_ref().unwrap_or(&empty);
        let names = self.neighbours.iter().map(|of| &of.name);
        let texts = values.keys().chain(values.values()).chain(names);
        let is_short = texts.into_iter().all(|text| text.len() <= TEXT_MAX);
        if self.neighbours.len() > NEIGHBOURS_MAX || values.len() > VALUES_MAX || !is_short {
            return Err(SampleError::Size);
        }
        Ok(())
    }
}
