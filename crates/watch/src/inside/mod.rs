//! Notices from inside a guest that it was moved: by its clocks, by what processor and hypervisor it has, by how fast some
//! loops are, and by how far its neighbours are; and that it is being copied, by how long first writes to memory take.
//!
//! As outside, nothing here does I/O: [`Sample`]s go in, [`Finding`]s come out.
//!
//! ```text
//!          ┌ clocks ──────▶ lag    ─┐
//! Sample ──┼ fingerprint ─▶ changed? ─┼─▶ episode ─▶ Finding
//!          ├ speeds ──────▶ shift  ─┤
//!          ├ writes ──────▶ slow?  ─┤
//!          └ neighbours ──▶ shift  ─┘
//! ```

mod copied;
mod lag;
mod sample;
pub mod thresholds;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::finding::{Class, Level};
use crate::shift::Shift;
use crate::taxonomy::{Cell, Method, Place};
use copied::Copying;
use lag::{Lag, Sign};
pub use sample::{
    Clocks, Edge, NEIGHBOURS_MAX, Neighbour, Sample, SampleError, Speeds, TEXT_MAX, VALUES_MAX,
    Writes,
};

/// What is seen within so long belongs together, in seconds ...
const TOGETHER_S: f64 = 120.0;
/// ... or within so many samples: a change takes some eleven to be told.
const TOGETHER_SAMPLES: f64 = 24.0;
/// Values that may have another content without another machine: the kernel chooses its clock source by itself.
const SOFT: [&str; 2] = ["clocksource", "clocksources"];
/// How much of the time that belongs together is kept at each sample if they come faster for a while.
const KEPT: f64 = 0.95;
/// A copy that was seen so long before a stop may have ended with it, in microseconds.
const COPIED_US: u64 = 120_000_000;
/// Samples are at most so far apart, in seconds.
const EVERY_MAX_S: f64 = 3600.0;
/// Most pieces of evidence of an episode.
const EVIDENCE_MAX: usize = 32;

/// One thing that was seen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evidence {
    /// Which cell of the taxonomy.
    #[serde(flatten)]
    pub cell: Cell,
    /// What it is about, such as `hardware-clock` or the name of a neighbour.
    pub of: String,
    /// What was seen.
    pub seen: &'static str,
    /// How much; its unit is `unit`.
    pub value: f64,
    /// `ms`, `times`, `ppm`, or `values` that are others now.
    pub unit: &'static str,
    /// In words.
    pub text: String,
}

/// Something that happened to this guest. It is made when more is known, and once more when it is over; what is found then
/// replaces what was found before of the same episode.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// Number of the episode.
    pub episode: u64,
    /// When it was found: the time of day at the first sample, and then what the clock that is never set has gone on.
    pub time_s: f64,
    /// When the first of it was seen.
    pub onset_s: f64,
    /// When nothing more had been seen for long, if so.
    pub ended_s: Option<f64>,
    /// How sure it is that this guest was moved.
    pub level: Level,
    /// What most probably happened.
    pub class: Class,
    /// For how long the guest stood still, in milliseconds, as far as a clock shows it.
    pub stood_still_ms: Option<f64>,
    /// Why.
    pub evidence: Vec<Evidence>,
}

/// The statistics of the last sample, for calibrating: what is compared with [`thresholds`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Statistics {
    /// Of the hardware clock.
    pub rtc: f64,
    /// Of the processor's counter.
    pub tsc: f64,
    /// The largest of neighbours' clocks.
    pub neighbours: f64,
    /// The largest of the benchmark's.
    pub benchmark: f64,
    /// The largest of neighbours' round trips.
    pub delay: f64,
    /// Of first writes.
    pub writes: f64,
}

struct Episode {
    number: u64,
    onset_s: f64,
    seen_s: f64,
    evidence: Vec<Evidence>,
    signs: Signs,
    /// Pieces of evidence, also those that there was no room for.
    pieces: usize,
    told: Option<(Level, Class, usize)>,
}

/// What an episode has shown so far.
#[derive(Default)]
struct Signs {
    stood_still_ms: Option<f64>,
    counter: bool,
    suspended: bool,
    set: bool,
    soft: bool,
    fingerprint: bool,
    benchmark: bool,
    delay: bool,
    one_delay: bool,
    /// When memory was first and last seen to be copied, the last time that it was.
    copied_us: Option<(u64, u64)>,
    /// When the guest was last known not to have stood still yet.
    stood_after_us: Option<u64>,
    copied_then_stood: bool,
}

impl Signs {
    /// Who copies first and stops then moves, or takes a last copy; a snapshot may stop first and copy then.
    fn compare(&mut self) {
        let (Some((first_us, last_us)), Some(stood_us)) = (self.copied_us, self.stood_after_us)
        else {
            return;
        };
        self.copied_then_stood |=
            (first_us..=last_us.saturating_add(COPIED_US)).contains(&stood_us);
    }

    /// What that comes to. A lag says only that the guest stood still; that it goes on elsewhere takes another sign.
    fn judged(&self) -> (Level, Class) {
        let has_stood = self.stood_still_ms.is_some();
        let elsewhere = u32::from(self.benchmark) + u32::from(self.delay);
        match self {
            // No processor changes under a kernel that runs.
            Self {
                fingerprint: true, ..
            } if has_stood || elsewhere > 0 => (Level::Confirmed, Class::Migration),
            Self {
                fingerprint: true, ..
            } => (Level::Alarm, Class::Migration),
            _ if has_stood && elsewhere == 2 => (Level::Confirmed, Class::Migration),
            _ if has_stood && elsewhere == 1 => (Level::Alarm, Class::Migration),
            // A copy was made of what ran, and then it stood still: whatever it was, a copy of this machine is somewhere.
            Self {
                copied_then_stood: true,
                ..
            } => (Level::Alarm, Class::Migration),
            Self {
                copied_us: Some(_), ..
            } => (Level::Warn, Class::Migration),
            _ if has_stood => (Level::Warn, Class::Pause),
            _ if elsewhere == 2 => (Level::Warn, Class::Migration),
            Self { delay: true, .. } => (Level::Warn, Class::Congestion),
            Self {
                suspended: true, ..
            } => (Level::Note, Class::Pause),
            Self { set: true, .. } | Self { soft: true, .. } => (Level::Note, Class::ClockStep),
            Self { counter: true, .. } => (Level::Note, Class::Pause),
            Self {
                one_delay: true, ..
            } => (Level::Note, Class::Congestion),
            _ => (Level::Note, Class::Load),
        }
    }
}

/// Watches the guest that it runs in.
pub struct Inside {
    /// What is added to the clock that is never set to make it a time of day, in seconds.
    base_s: Option<f64>,
    raw_ns: i64,
    together_s: f64,
    lag: Lag,
    fingerprint: BTreeMap<String, String>,
    speeds: BTreeMap<&'static str, Shift>,
    delays: BTreeMap<String, (Shift, f64)>,
    delayed_until_s: f64,
    slow: BTreeSet<&'static str>,
    copying: Copying,
    episodes: u64,
    episode: Option<Episode>,
    samples: u64,
}

impl Default for Inside {
    fn default() -> Self {
        Self::new()
    }
}

impl Inside {
    /// One that knows nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            base_s: None,
            raw_ns: i64::MIN,
            together_s: TOGETHER_S,
            lag: Lag::new(),
            fingerprint: BTreeMap::new(),
            speeds: BTreeMap::new(),
            delays: BTreeMap::new(),
            delayed_until_s: f64::MIN,
            slow: BTreeSet::new(),
            copying: Copying::default(),
            episodes: 0,
            episode: None,
            samples: 0,
        }
    }

    /// Takes the next sample; gives what is new.
    ///
    /// # Errors
    /// If it can't be true. If the clock that is never set went back all is learnt anew, otherwise nothing has changed.
    pub fn take(&mut self, sample: &Sample) -> Result<Vec<Finding>, SampleError> {
        sample.check()?;
        let raw_ns = sample.clocks.raw_ns;
        if raw_ns < self.raw_ns {
            let by_ms = self.raw_ns.saturating_sub(raw_ns) as f64 / 1e6;
            let (episodes, samples) = (self.episodes, self.samples);
            *self = Self {
                episodes,
                samples,
                ..Self::new()
            };
            return Err(SampleError::Backwards { by_ms });
        }
        if self.samples > 0 {
            let every_s = raw_ns.saturating_sub(self.raw_ns) as f64 / 1e9;
            let now_s = TOGETHER_SAMPLES * every_s.min(EVERY_MAX_S);
            self.together_s = now_s.max(KEPT * self.together_s).max(TOGETHER_S);
        }
        self.raw_ns = raw_ns;
        self.samples += 1;
        let raw_s = raw_ns as f64 / 1e9;
        let base_s = *self
            .base_s
            .get_or_insert(sample.clocks.realtime_ns as f64 / 1e9 - raw_s);
        let now_s = base_s + raw_s;
        let mut findings = Vec::new();
        if let Some(episode) = &self.episode
            && now_s > episode.seen_s + self.together_s
        {
            findings.extend(self.end(now_s));
        }
        let at_us = u64::try_from(raw_ns / 1000).unwrap_or(0);
        for sign in self.lag.read(sample, at_us) {
            self.clock(sign, now_s);
        }
        if let Some(fingerprint) = &sample.fingerprint {
            self.looks(fingerprint, now_s);
        }
        if let Some(speeds) = &sample.speeds {
            self.runs(speeds, now_s);
        }
        if let Some(writes) = &sample.writes {
            self.writes(writes, at_us, now_s);
        }
        self.distances(&sample.neighbours, now_s);
        findings.extend(self.tell(now_s));
        Ok(findings)
    }

    /// Ends what goes on: nothing more will come.
    pub fn finish(&mut self) -> Option<Finding> {
        let now_s = self.base_s? + self.raw_ns as f64 / 1e9;
        self.end(now_s)
    }

    /// Samples so far.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// The statistics of the last sample.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let clocks = self.lag.statistics();
        let speeds = self.speeds.values().map(Shift::statistic);
        let delays = self.delays.values().map(|(shift, _)| shift.statistic());
        Statistics {
            rtc: clocks.rtc,
            tsc: clocks.tsc,
            neighbours: clocks.neighbours,
            benchmark: speeds.fold(0.0, f64::max),
            delay: delays.fold(0.0, f64::max),
            writes: self.copying.statistic(),
        }
    }

    fn clock(&mut self, sign: Sign, now_s: f64) {
        let lag = |of: &str, seen, value, unit, text| Evidence {
            cell: Cell::new(Place::Internal, Method::TimeLag),
            of: of.to_owned(),
            seen,
            value,
            unit,
            text,
        };
        let evidence = match sign {
            Sign::Ahead { ms, .. } => lag(
                "hardware-clock",
                "stood-still",
                ms,
                "ms",
                format!("the hardware clock went on for {ms:.0} ms while this machine stood still"),
            ),
            Sign::Behind { ms, .. } => lag(
                "hardware-clock",
                "set-back",
                ms,
                "ms",
                format!(
                    "the hardware clock is behind by {:.0} ms: its host's clock was set, or is another one",
                    -ms
                ),
            ),
            Sign::RtcSet { ms } => lag(
                "hardware-clock",
                "set",
                ms,
                "ms",
                format!("the hardware clock was set by the time of day, by {ms:.0} ms"),
            ),
            Sign::Counter { ms, .. } => lag(
                "processor-counter",
                "jumped",
                ms,
                "ms",
                format!(
                    "the processor's counter has jumped by {ms:.1} ms against the kernel's clock"
                ),
            ),
            Sign::Neighbours { ms, of: 1, .. } => lag(
                "neighbours",
                "ahead",
                ms,
                "ms",
                format!(
                    "the clock of the only neighbour is ahead by {ms:.0} ms more: it was set, or this machine stood still"
                ),
            ),
            Sign::Neighbours { ms, agree, of, .. } => lag(
                "neighbours",
                "stood-still",
                ms,
                "ms",
                format!(
                    "the clocks of {agree} of {of} neighbours went on for {ms:.0} ms while this machine stood still"
                ),
            ),
            Sign::DaySet { ms } => lag(
                "time-of-day",
                "set",
                ms,
                "ms",
                format!("the time of day was set by {ms:.0} ms"),
            ),
            Sign::Suspended { ms } => lag(
                "boot-time",
                "suspended",
                ms,
                "ms",
                format!("this machine had suspended itself for {ms:.0} ms"),
            ),
            Sign::Impossible { ppm } => lag(
                "monotonic",
                "impossible",
                ppm,
                "ppm",
                format!("a clock went {ppm:.0} ppm off, which no correction may do"),
            ),
            Sign::Held { ms } => lag(
                "program",
                "held-up",
                ms,
                "ms",
                format!("this program was held up for {ms:.0} ms while the clocks went on"),
            ),
        };
        let signs = self.add(evidence, now_s);
        match sign {
            Sign::Ahead { ms, after_us, .. } => {
                signs.stood_still_ms = Some(ms);
                signs.stood_after_us = Some(after_us);
                signs.compare();
            }
            // The hardware clock is read more exactly.
            Sign::Neighbours {
                ms, of, after_us, ..
            } if of >= 2 => {
                signs.stood_still_ms.get_or_insert(ms);
                signs.stood_after_us.get_or_insert(after_us);
                signs.compare();
            }
            Sign::Counter { .. } => signs.counter = true,
            Sign::Suspended { .. } => signs.suspended = true,
            // That is what is left if there is nothing else.
            Sign::Held { .. } => {}
            Sign::Behind { .. }
            | Sign::RtcSet { .. }
            | Sign::DaySet { .. }
            | Sign::Neighbours { .. }
            | Sign::Impossible { .. } => signs.set = true,
        }
    }

    fn looks(&mut self, now: &BTreeMap<String, String>, now_s: f64) {
        let before = std::mem::replace(&mut self.fingerprint, now.clone());
        if before.is_empty() {
            return;
        }
        let changes = changed(&before, now);
        for is_soft in [false, true] {
            let of: Vec<&str> = changes
                .iter()
                .filter(|name| SOFT.contains(&name.as_str()) == is_soft)
                .map(String::as_str)
                .collect();
            let Some(first) = of.first() else { continue };
            let shown = |values: &BTreeMap<String, String>| {
                let value = values.get(*first).map_or("nothing", String::as_str);
                value.chars().take(80).collect::<String>()
            };
            let (was, is) = (shown(&before), shown(now));
            let evidence = Evidence {
                cell: Cell::new(Place::Internal, Method::HypervisorFingerprint),
                of: of.join(","),
                seen: if is_soft { "clock-source" } else { "changed" },
                value: of.len() as f64,
                unit: "values",
                text: format!("{first} was {was:?} and is {is:?}"),
            };
            let signs = self.add(evidence, now_s);
            if is_soft {
                signs.soft = true;
            } else {
                signs.fingerprint = true;
            }
        }
    }

    fn runs(&mut self, speeds: &Speeds, now_s: f64) {
        let Some(alu_ns) = speeds.alu_ns.filter(|ns| *ns > 0.0) else {
            return;
        };
        let ratios = [
            ("first-cache", speeds.first_cache_ns),
            ("second-cache", speeds.second_cache_ns),
            ("memory", speeds.memory_ns),
            ("system-call", speeds.syscall_ns),
            ("cpuid", speeds.cpuid_ns),
        ];
        for (name, ns) in ratios {
            let Some(ns) = ns.filter(|ns| *ns > 0.0) else {
                continue;
            };
            let shift = self.speeds.entry(name).or_default();
            let least = thresholds::BENCHMARK_TIMES;
            let Some(shifted) = shift.read(ns / alu_ns, thresholds::BENCHMARK, least) else {
                self.slow.remove(name);
                continue;
            };
            if !self.slow.insert(name) {
                continue;
            }
            let times = shifted.times;
            let evidence = Evidence {
                cell: Cell::new(Place::Internal, Method::HardwareBenchmark),
                of: name.to_owned(),
                seen: "changed",
                value: times,
                unit: "times",
                text: format!(
                    "{name} takes {times:.2} times as long as it did, compared with arithmetic"
                ),
            };
            self.add(evidence, now_s).benchmark = true;
        }
    }

    /// Whether somebody takes note of what is written.
    fn writes(&mut self, writes: &Writes, at_us: u64, now_s: f64) {
        let Some(copied) = self.copying.read(writes, at_us) else {
            return;
        };
        if let (false, Some(episode)) = (copied.is_new, &mut self.episode)
            && let Some((_, last_us)) = &mut episode.signs.copied_us
        {
            // It goes on.
            *last_us = at_us;
            episode.seen_s = now_s;
            episode.signs.compare();
            return;
        }
        let times = copied.times;
        let evidence = Evidence {
            cell: Cell::new(Place::Internal, Method::HardwareBenchmark),
            of: "first-write".to_owned(),
            seen: "noted",
            value: times,
            unit: "times",
            text: format!(
                "the first write to a page takes {times:.1} times as long as the next: somebody takes note of what is written, as one does who copies memory, or the host swaps"
            ),
        };
        let signs = self.add(evidence, now_s);
        // An earlier one was compared with what had happened until now.
        signs.copied_us = Some((copied.since_us, at_us));
        signs.compare();
    }

    /// Whether most neighbours are nearer or further now: one alone may have been moved itself.
    fn distances(&mut self, neighbours: &[Neighbour], now_s: f64) {
        self.delays
            .retain(|name, _| neighbours.iter().any(|of| of.name == *name));
        let mut changes = Vec::new();
        for neighbour in neighbours {
            let Some(ms) = neighbour.rtt_ms.filter(|ms| *ms > 0.0) else {
                continue;
            };
            let (shift, _) = self.delays.entry(neighbour.name.clone()).or_default();
            let least = thresholds::DELAY_TIMES;
            if let Some(shifted) = shift.read(ms, thresholds::DELAY, least) {
                changes.push(shifted.times);
            }
        }
        let of = self.delays.len();
        if 2 * changes.len() <= of || changes.is_empty() {
            return;
        }
        let is_news = now_s > self.delayed_until_s;
        self.delayed_until_s = now_s + self.together_s;
        if !is_news {
            return;
        }
        changes.sort_by(f64::total_cmp);
        let (times, count) = (changes[changes.len() / 2], changes.len());
        let evidence = Evidence {
            cell: Cell::new(Place::Internal, Method::Delay),
            of: "neighbours".to_owned(),
            seen: if times > 1.0 { "further" } else { "nearer" },
            value: times,
            unit: "times",
            text: format!(
                "{count} of {of} neighbours answer after {times:.2} times as long as they did"
            ),
        };
        let signs = self.add(evidence, now_s);
        // One alone may be about that one.
        if of >= 2 {
            signs.delay = true;
        } else {
            signs.one_delay = true;
        }
    }

    fn add(&mut self, evidence: Evidence, now_s: f64) -> &mut Signs {
        let number = self.episodes + 1;
        let episode = self.episode.get_or_insert_with(|| Episode {
            number,
            onset_s: now_s,
            seen_s: now_s,
            evidence: Vec::new(),
            pieces: 0,
            signs: Signs::default(),
            told: None,
        });
        self.episodes = episode.number;
        episode.seen_s = now_s;
        if episode.evidence.len() == EVIDENCE_MAX {
            // What it began with, and what is new, say most.
            episode.evidence.remove(EVIDENCE_MAX / 2);
        }
        episode.evidence.push(evidence);
        episode.pieces += 1;
        &mut episode.signs
    }

    fn tell(&mut self, now_s: f64) -> Option<Finding> {
        let episode = self.episode.as_mut()?;
        let (level, class) = episode.signs.judged();
        let known = (level, class, episode.pieces);
        if episode.told == Some(known) {
            return None;
        }
        episode.told = Some(known);
        Some(finding(episode, now_s, None))
    }

    fn end(&mut self, now_s: f64) -> Option<Finding> {
        let episode = self.episode.take()?;
        Some(finding(&episode, now_s, Some(episode.seen_s)))
    }
}

fn finding(episode: &Episode, now_s: f64, ended_s: Option<f64>) -> Finding {
    let (level, class) = episode.signs.judged();
    Finding {
        episode: episode.number,
        time_s: now_s,
        onset_s: episode.onset_s,
        ended_s,
        level,
        class,
        stood_still_ms: episode.signs.stood_still_ms,
        evidence: episode.evidence.clone(),
    }
}

/// Names of values that are others now, or not there any more, or new.
fn changed(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    let names: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    names
        .into_iter()
        .filter(|name| before.get(*name) != now.get(*name))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests;
