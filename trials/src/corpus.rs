//! Recorded sessions: `NAME.json` says what happened when, `NAME.csv.zst` what the prober saw meanwhile.
//!
//! The columns are those of [`palanquin_watch::trace`], so that `zstd -d` makes of it what `palanquin watch replay` reads.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use palanquin_watch::{Class, Reading, Role, trace};
use serde::{Deserialize, Serialize};

/// Version of the labels.
pub const FORMAT: u32 = 1;
/// Most bytes of a trace.
const TRACE_MAX: u64 = 256 << 20;
/// Most bytes of labels.
const LABELS_MAX: u64 = 4 << 20;
const LEVEL: i32 = 19;

/// What a session may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// To calibrate with.
    Calibration,
    /// To judge by, and nothing else.
    HeldOut,
}

/// A target that was watched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Its name in the trace.
    pub name: String,
    /// Whether it is a hypervisor host.
    pub is_host: bool,
}

impl Target {
    /// As the detector calls it.
    #[must_use]
    pub fn role(&self) -> Role {
        if self.is_host { Role::Host } else { Role::Vm }
    }
}

/// Something that was done, and when; times are of the trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Whom it was done to.
    pub target: String,
    /// What it was.
    pub class: Class,
    /// What exactly was done, in a few words.
    pub what: String,
    /// Beginning, in seconds.
    pub from_s: f64,
    /// End, in seconds.
    pub until_s: f64,
    /// When the VM stood still, in seconds, if it did and is known to.
    pub blackout_s: Option<(f64, f64)>,
    /// Whose migration it was, `palanquin` or `qemu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
    /// How the memory was moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<String>,
    /// Hosts from which and to which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub way: Option<(String, String)>,
    /// Why it does not count: it did not go as it should.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoilt: Option<String>,
}

/// What a session was made of, and what happened in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Labels {
    /// [`FORMAT`].
    pub format: u32,
    /// Name of the session.
    pub session: String,
    /// What it may be used for.
    pub part: Part,
    /// What its plan follows from.
    pub seed: u64,
    /// Time of day when it began, in seconds since 1970.
    pub began_unix_s: f64,
    /// Length, in seconds.
    pub length_s: f64,
    /// What each host may send, in Mbit/s; none for as much as it can.
    pub link_mbit_s: Option<u32>,
    /// Version of QEMU.
    pub qemu: String,
    /// How QEMU executes guests.
    pub accelerator: String,
    /// MiB of each guest, and MiB of it that are filled.
    pub memory_mib: (u64, u64),
    /// MiB that each guest rewrites in a second.
    pub dirty_mib_s: u64,
    /// Share of the machine that others used meanwhile is not known; load averages at beginning and end are.
    pub load_average: (f64, f64),
    /// Who was watched.
    pub targets: Vec<Target>,
    /// Times in which the prober itself was late, in seconds.
    pub stalls_s: Vec<(f64, f64)>,
    /// What happened, the earliest first.
    pub events: Vec<Event>,
}

/// One reading.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// When the probe was sent, in microseconds of the trace.
    pub sent_us: u64,
    /// Number of the target in the labels.
    pub target: usize,
    /// What it saw.
    pub reading: Reading,
}

/// A recorded session.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// What happened.
    pub labels: Labels,
    /// What was seen, the earliest first.
    pub seen: Vec<Seen>,
}

impl Session {
    /// Reads a session by the path of its labels.
    ///
    /// # Errors
    /// If it can't be read, or holds what can't be.
    pub fn read(labels: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let mut text = String::new();
            File::open(labels)?
                .take(LABELS_MAX)
                .read_to_string(&mut text)?;
            let known: Labels = serde_json::from_str(&text)?;
            if known.format != FORMAT {
                bail!("format {} and not {FORMAT}", known.format);
            }
            let packed = File::open(trace_of(labels))?;
            let mut bytes = Vec::new();
            let length = zstd::Decoder::new(packed)?
                .take(TRACE_MAX)
                .read_to_end(&mut bytes)?;
            if length as u64 == TRACE_MAX {
                bail!("a trace has less than {TRACE_MAX} bytes");
            }
            let seen = parse(&known, &bytes)?;
            Ok(Self {
                labels: known,
                seen,
            })
        };
        read().with_context(|| labels.display().to_string())
    }

    /// Writes both files.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn write(&self, dir: &Path) -> Result<PathBuf> {
        fs::create_dir_all(dir)?;
        let path = dir.join(format!("{}.json", self.labels.session));
        let mut text = format!("{}\n", trace::HEADER);
        for seen in &self.seen {
            let entry = trace::Entry {
                sent_us: seen.sent_us,
                target: &self.labels.targets[seen.target].name,
                reading: seen.reading,
            };
            text += &trace::line(&entry);
            text.push('\n');
        }
        // The labels last: without them there is no session.
        fs::write(trace_of(&path), zstd::encode_all(text.as_bytes(), LEVEL)?)?;
        fs::write(&path, serde_json::to_string_pretty(&self.labels)? + "\n")?;
        Ok(path)
    }

    /// Number of a target.
    #[must_use]
    pub fn target(&self, name: &str) -> Option<usize> {
        self.labels.targets.iter().position(|of| of.name == name)
    }
}

/// All sessions in a directory, by name.
///
/// # Errors
/// If one can't be read.
pub fn read_all(dir: &Path) -> Result<Vec<Session>> {
    let entries = fs::read_dir(dir).with_context(|| format!("no sessions in {}", dir.display()))?;
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "json"))
        .collect();
    paths.sort();
    paths.iter().map(|path| Session::read(path)).collect()
}

fn trace_of(labels: &Path) -> PathBuf {
    labels.with_extension("csv.zst")
}

fn parse(labels: &Labels, bytes: &[u8]) -> Result<Vec<Seen>> {
    let mut all = Vec::new();
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let entry = trace::parse(line).with_context(|| format!("line {number}"))?;
        let Some(entry) = entry else {
            continue;
        };
        let target = labels.targets.iter().position(|of| of.name == entry.target);
        all.push(Seen {
            sent_us: entry.sent_us,
            target: target
                .with_context(|| format!("line {number}: {} is no target", entry.target))?,
            reading: entry.reading,
        });
    }
    Ok(all)
}

/// As much of a reading as is worth keeping: microseconds.
#[must_use]
pub fn rounded(reading: Reading) -> Reading {
    let round = |ms: f64| (ms * 1000.0).round() / 1000.0;
    match reading {
        Reading::Rtt { ms } => Reading::Rtt { ms: round(ms) },
        Reading::IcmpOffset { ms } => Reading::IcmpOffset { ms: round(ms) },
        Reading::NtpOffset { ms } => Reading::NtpOffset { ms: round(ms) },
        Reading::NtpHeld { ms } => Reading::NtpHeld { ms: round(ms) },
        other => other,
    }
}

/// A session of nothing, for tests.
#[cfg(test)]
pub(crate) fn sample() -> Labels {
    let target = |name: &str, is_host| Target {
        name: name.to_owned(),
        is_host,
    };
    Labels {
        format: FORMAT,
        session: "s".to_owned(),
        part: Part::HeldOut,
        seed: 1,
        began_unix_s: 1e9,
        length_s: 100.0,
        link_mbit_s: None,
        qemu: "7.2".to_owned(),
        accelerator: "tcg".to_owned(),
        memory_mib: (192, 0),
        dirty_mib_s: 0,
        load_average: (0.0, 0.0),
        targets: vec![target("vm", false), target("a", true)],
        stalls_s: Vec::new(),
        events: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let dir = std::env::temp_dir().join(format!("palanquin-corpus-{}", std::process::id()));
        let seen = |sent_us, target, reading| Seen {
            sent_us,
            target,
            reading: rounded(reading),
        };
        let session = Session {
            labels: sample(),
            seen: vec![
                seen(1_000, 0, Reading::Rtt { ms: 0.123_456 }),
                seen(2_000, 1, Reading::Lost),
                seen(3_000, 0, Reading::NtpOffset { ms: -7.25 }),
            ],
        };
        let path = session.write(&dir).unwrap();
        assert_eq!(Session::read(&path).unwrap(), session);
        assert_eq!(read_all(&dir).unwrap().len(), 1);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_trace_of_others_is_refused() {
        assert!(parse(&sample(), b"1.0,else,lost,1").is_err());
        assert!(parse(&sample(), b"1.0,vm,rtt_ms,-1").is_err());
    }
}
