//! Recorded observations as lines of text: `time_s,target,kind,value`.
//!
//! ```text
//! time_s,target,kind,value
//! 0.0,web,rtt_ms,0.41
//! 0.5,web,lost,
//! 8.0,web,offset_ms,-0.2
//! ```
//!
//! Times are when probes were sent, in seconds since any moment. Kinds are `rtt_ms`, `lost` (value empty or 1),
//! `offset_ms` (NTP; the target's clock less the watcher's), and besides `icmp_offset_ms`, `ntp_held_ms`, `ttl` and
//! `announced`. The line with the columns' names may be missing; empty lines and those that begin with `#` say nothing, but
//! for `# announcements are heard` and `# announcements are not heard`: without the former, or any announcement before, that
//! there are none is taken for nothing.

use thiserror::Error;

use crate::calibration::Calibration;
use crate::observation::{Observation, ObservationError, Reading, Role, TIME_US_MAX};
use crate::watcher::{TargetError, Watcher};

/// Longest line, in bytes, without its end.
pub const LINE_MAX: usize = 1024;
/// The columns.
pub const HEADER: &str = "time_s,target,kind,value";

/// How a trace says that somebody listens for announcements from here on.
const HEARS: &str = "# announcements are heard";
/// How it says that nobody does.
const DEAF: &str = "# announcements are not heard";

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum LineError {
    /// Not four fields.
    #[error("a line has four fields ({HEADER}), this one has {0}")]
    Fields(usize),
    /// A kind that is not known.
    #[error(
        "{0:?} is no kind; kinds are rtt_ms, lost, offset_ms, icmp_offset_ms, ntp_held_ms, ttl and announced"
    )]
    Kind(String),
    /// More than [`LINE_MAX`] bytes.
    #[error("a line has at most {LINE_MAX} bytes")]
    Length,
    /// Something that cannot have been seen, or not then.
    #[error(transparent)]
    Observation(#[from] ObservationError),
    /// A target that can't be watched.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Not UTF-8.
    #[error("a line is text in UTF-8")]
    Text,
    /// A time that is no number of seconds from 0 to ten thousand million.
    #[error("{0:?} is no time in seconds")]
    Time(String),
    /// A value that is none of its kind.
    #[error("{value:?} is no value of {kind}")]
    Value {
        /// The kind.
        kind: &'static str,
        /// What stands there.
        value: String,
    },
}

/// What is wrong with a trace, and where.
#[derive(Clone, Debug, PartialEq, Error)]
#[error("line {line}: {error}")]
pub struct TraceError {
    /// Counted from 1.
    pub line: u64,
    /// What is wrong.
    pub error: LineError,
}

/// A line that says something.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry<'a> {
    /// When the probe was sent, in microseconds.
    pub sent_us: u64,
    /// Name of the target.
    pub target: &'a str,
    /// What was seen.
    pub reading: Reading,
}

/// Reads a line, without its end; nothing if it says nothing.
///
/// # Errors
/// For the first rule that it breaks.
pub fn parse(line: &[u8]) -> Result<Option<Entry<'_>>, LineError> {
    if line.len() > LINE_MAX {
        return Err(LineError::Length);
    }
    let line = std::str::from_utf8(line).map_err(|_| LineError::Text)?;
    let line = line.trim_start_matches('\u{feff}').trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let [time, target, kind, value] = fields[..] else {
        return Err(LineError::Fields(fields.len()));
    };
    if (time, target, kind, value) == ("time_s", "target", "kind", "value") {
        return Ok(None);
    }
    let seconds = time.parse::<f64>().ok().map(|seconds| seconds * 1e6);
    let sent_us = seconds
        .filter(|us| (0.0..=TIME_US_MAX as f64).contains(us))
        .ok_or_else(|| LineError::Time(time.to_owned()))?
        .round() as u64;
    let wrong = |kind| LineError::Value {
        kind,
        value: value.to_owned(),
    };
    let number = |kind| value.parse::<f64>().map_err(|_| wrong(kind));
    let reading = match kind {
        "rtt_ms" => Reading::Rtt {
            ms: number("rtt_ms")?,
        },
        "lost" if matches!(value, "" | "1" | "1.0" | "true") => Reading::Lost,
        "lost" => return Err(wrong("lost")),
        "offset_ms" => Reading::NtpOffset {
            ms: number("offset_ms")?,
        },
        "ntp_held_ms" => Reading::NtpHeld {
            ms: number("ntp_held_ms")?,
        },
        "icmp_offset_ms" => Reading::IcmpOffset {
            ms: number("icmp_offset_ms")?,
        },
        "ttl" => Reading::Ttl {
            hops: value.parse().map_err(|_| wrong("ttl"))?,
        },
        "announced" if matches!(value, "" | "1" | "1.0" | "true") => Reading::Announced,
        "announced" => return Err(wrong("announced")),
        other => return Err(LineError::Kind(other.to_owned())),
    };
    reading.check()?;
    Ok(Some(Entry {
        sent_us,
        target,
        reading,
    }))
}

/// Writes what [`parse`] reads.
#[must_use]
pub fn line(entry: &Entry<'_>) -> String {
    let (kind, value) = match entry.reading {
        Reading::Announced => ("announced", "1".to_owned()),
        Reading::IcmpOffset { ms } => ("icmp_offset_ms", ms.to_string()),
        Reading::Lost => ("lost", "1".to_owned()),
        Reading::NtpHeld { ms } => ("ntp_held_ms", ms.to_string()),
        Reading::NtpOffset { ms } => ("offset_ms", ms.to_string()),
        Reading::Rtt { ms } => ("rtt_ms", ms.to_string()),
        Reading::Ttl { hops } => ("ttl", hops.to_string()),
    };
    let (s, us) = (entry.sent_us / 1_000_000, entry.sent_us % 1_000_000);
    format!("{s}.{us:06},{},{kind},{value}", entry.target)
}

/// The line that says whether somebody listens for announcements from here on.
#[must_use]
pub fn ear(hears: bool) -> &'static str {
    if hears { HEARS } else { DEAF }
}

/// Gives the lines of a trace to a watcher. Targets are VMs, but for those named as hosts.
pub struct Replay {
    /// The detector.
    pub watcher: Watcher,
    /// Observations that it got.
    pub observations: u64,
    /// Sending time of the latest, in microseconds.
    pub last_us: u64,
    hosts: Vec<String>,
    lines: u64,
}

impl Replay {
    /// A replay of nothing yet.
    #[must_use]
    pub fn new(calibration: Calibration, hosts: Vec<String>) -> Self {
        Self {
            watcher: Watcher::new(calibration),
            observations: 0,
            last_us: 0,
            hosts,
            lines: 0,
        }
    }

    /// Takes the next line, without its end.
    ///
    /// # Errors
    /// If it can't be read, or says something that can't be; nothing of it was taken then.
    pub fn line(&mut self, line: &[u8]) -> Result<(), TraceError> {
        self.lines += 1;
        self.take(line).map_err(|error| TraceError {
            line: self.lines,
            error,
        })
    }

    fn take(&mut self, line: &[u8]) -> Result<(), LineError> {
        let Some(entry) = parse(line)? else {
            match line.trim_ascii() {
                line if line == HEARS.as_bytes() => self.watcher.listen(true),
                line if line == DEAF.as_bytes() => self.watcher.listen(false),
                _ => {}
            }
            return Ok(());
        };
        let target = match self.watcher.target(entry.target) {
            Some(target) => target,
            None => {
                let is_host = self.hosts.iter().any(|host| host == entry.target);
                let role = if is_host { Role::Host } else { Role::Vm };
                self.watcher.add(entry.target, role)?
            }
        };
        self.watcher.observe(Observation {
            sent_us: entry.sent_us,
            target,
            reading: entry.reading,
        })?;
        self.observations += 1;
        self.last_us = self.last_us.max(entry.sent_us);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(line: &str) -> LineError {
        parse(line.as_bytes()).unwrap_err()
    }

    #[test]
    fn lines_are_read_and_those_that_say_nothing_are_passed_over() {
        let entry = parse(b"1.5, web ,rtt_ms,0.25\r").unwrap().unwrap();
        assert_eq!((entry.sent_us, entry.target), (1_500_000, "web"));
        assert_eq!(entry.reading, Reading::Rtt { ms: 0.25 });
        for lost in ["2,web,lost,", "2,web,lost,1"] {
            assert_eq!(
                parse(lost.as_bytes()).unwrap().unwrap().reading,
                Reading::Lost
            );
        }
        for nothing in ["", "  ", "# x", HEADER, "\u{feff}time_s,target,kind,value"] {
            assert_eq!(parse(nothing.as_bytes()), Ok(None), "{nothing}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_line_is_said() {
        assert_eq!(refused("1,web,rtt_ms"), LineError::Fields(3));
        assert_eq!(refused("1,web,rtt_ms,1,2"), LineError::Fields(5));
        assert_eq!(refused("1,web,rtt,1"), LineError::Kind("rtt".to_owned()));
        for time in ["", "x", "-1", "nan", "inf", "1e11"] {
            let line = format!("{time},web,rtt_ms,1");
            assert_eq!(refused(&line), LineError::Time(time.to_owned()));
        }
        for (kind, value) in [
            ("rtt_ms", "x"),
            ("lost", "2"),
            ("ttl", "256"),
            ("offset_ms", ""),
        ] {
            let error = refused(&format!("1,web,{kind},{value}"));
            assert!(matches!(error, LineError::Value { .. }), "{error}");
        }
        for (kind, value) in [("rtt_ms", "NaN"), ("rtt_ms", "-1"), ("offset_ms", "inf")] {
            let error = refused(&format!("1,web,{kind},{value}"));
            assert!(matches!(error, LineError::Observation(_)), "{error}");
        }
        assert_eq!(refused(&"1".repeat(LINE_MAX + 1)), LineError::Length);
        assert_eq!(parse(b"\xff"), Err(LineError::Text));
    }

    #[test]
    fn errors_have_the_number_of_their_line() {
        let mut replay = Replay::new(Calibration::built_in(), Vec::new());
        for good in [HEADER, "", "100,web,rtt_ms,1"] {
            replay.line(good.as_bytes()).unwrap();
        }
        let error = replay.line(b"3,web,rtt_ms,1").unwrap_err();
        assert_eq!(error.line, 4);
        assert!(
            error.to_string().starts_with("line 4: sent at 3000000 us"),
            "{error}"
        );
        assert!(replay.line(b"100,\x07,lost,").is_err());
        assert_eq!(replay.observations, 1);
    }

    #[test]
    fn a_trace_says_whether_anybody_listened_for_announcements() {
        let mut replay = Replay::new(Calibration::built_in(), Vec::new());
        let mut hears = |line: &str| {
            replay.line(line.as_bytes()).unwrap();
            replay.watcher.hears()
        };
        assert!(!hears("100,web,rtt_ms,1") && !hears("# announcements"));
        assert!(hears(ear(true)) && hears("101,web,rtt_ms,1"));
        assert!(!hears(ear(false)));
        assert!(hears("102,web,announced,1"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            sent_us in 0..=TIME_US_MAX / 1000,
            ms in 0.0..1e6_f64,
            kind in 0..7_u8,
        ) {
            let reading = match kind {
                0 => Reading::Announced,
                1 => Reading::IcmpOffset { ms: -ms },
                2 => Reading::Lost,
                3 => Reading::NtpOffset { ms },
                5 => Reading::NtpHeld { ms },
                4 => Reading::Rtt { ms },
                _ => Reading::Ttl { hops: (ms / 1e4) as u8 },
            };
            let entry = Entry { sent_us, target: "a b", reading };
            let line = line(&entry);
            prop_assert_eq!(parse(line.as_bytes()).unwrap(), Some(entry));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut replay = Replay::new(Calibration::built_in(), Vec::new());
            let _ = replay.line(&bytes);
            replay.watcher.finish();
        }
    }
}
