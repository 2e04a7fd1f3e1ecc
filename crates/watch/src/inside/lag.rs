//! Whether clocks have jumped against each other.
//!
//! When a guest is paused or moved its own clocks stand still together, all of them: nothing shows between them. What goes
//! on is the hardware clock, which follows its host's time of day, and the clocks of neighbours. Between the guest's own
//! clocks only what the guest does itself shows (setting the time of day, suspending), and whether the processor's counter
//! came along with the clock that the kernel uses.

use std::collections::BTreeMap;

use super::sample::{Clocks, Neighbour, Sample};
use super::thresholds;
use crate::feature::clock::{Clock, Step};

/// The time of day is known to be set from here on, in milliseconds.
const SET_MIN_MS: f64 = 1.0;
/// Fastest that a clock may be slewed, as a share: adjtimex(2) allows a tenth by the tick and 500 ppm by the frequency.
const SLEW_MAX: f64 = 0.1005;
/// Least error of the hardware clock that is believed, in milliseconds.
const RTC_ERROR_MS: f64 = 0.5;
/// Least error of the processor's counter that is believed, in milliseconds.
const TSC_ERROR_MS: f64 = 0.02;
/// Least error of a neighbour's clock that is believed, in milliseconds: these are read in whole ones.
const NEIGHBOUR_ERROR_MS: f64 = 0.5;
/// Readings of the counter from which its frequency is known.
const TSC_KNOWN: u32 = 8;
/// A sample that is later by this was held up, in milliseconds.
const HELD_MIN_MS: f64 = 1000.0;

/// What clocks show.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Sign {
    /// The hardware clock is ahead by so much more than it was: the guest stood still, or its host's clock was set.
    /// It was last seen not to be so at `after_us`.
    Ahead {
        ms: f64,
        statistic: f64,
        after_us: u64,
    },
    /// It is behind: its host's clock was set, or another one's is different.
    Behind { ms: f64, statistic: f64 },
    /// The guest has set its hardware clock by the time of day.
    RtcSet { ms: f64 },
    /// The processor's counter has jumped against the kernel's clock, or has another frequency.
    Counter { ms: f64, statistic: f64 },
    /// So many neighbours agree, out of those whose clocks are read, that they are ahead by so much more.
    Neighbours {
        ms: f64,
        agree: u32,
        of: u32,
        after_us: u64,
    },
    /// The time of day was set.
    DaySet { ms: f64 },
    /// The guest has suspended itself.
    Suspended { ms: f64 },
    /// A clock was slewed faster than adjtimex(2) can: the value is its rate in parts per million.
    Impossible { ppm: f64 },
    /// The program was held up, while the guest's own clocks went on.
    Held { ms: f64 },
}

/// The statistics of the last sample: hardware clock, counter, and the largest of the neighbours.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Statistics {
    pub(crate) rtc: f64,
    pub(crate) tsc: f64,
    pub(crate) neighbours: f64,
}

/// A jump of a neighbour's clock.
struct Jump {
    /// When it was told.
    at_us: u64,
    ms: f64,
    /// When it was last seen not to have happened.
    after_us: u64,
}

/// A clock, and which of its jumps was told.
struct Compared {
    clock: Clock,
    told_us: u64,
    read_us: u64,
    step: Option<Step>,
}

impl Compared {
    fn new(error_min_ms: f64) -> Self {
        Self {
            clock: Clock::new(error_min_ms),
            told_us: 0,
            read_us: 0,
            step: None,
        }
    }

    /// Takes an offset; gives a jump once.
    fn read(&mut self, at_us: u64, ms: f64, threshold: f64, least_ms: f64) -> Option<Step> {
        if at_us <= self.read_us {
            return None;
        }
        self.read_us = at_us;
        self.step = self.clock.read(at_us, ms, threshold);
        let step = self.step?;
        // A jump that was told may be found again a little earlier or later, until it is forgotten.
        let is_new = step.after_us >= self.told_us;
        if step.statistic < threshold || step.ms.abs() < least_ms || !is_new {
            return None;
        }
        self.told_us = at_us;
        Some(step)
    }

    fn statistic(&self) -> f64 {
        self.step.map_or(0.0, |step| step.statistic)
    }
}

/// The processor's counter.
struct Counter {
    first: Option<(i64, u64)>,
    reads: u32,
    ticks_per_ns: f64,
    compared: Compared,
}

impl Counter {
    fn new() -> Self {
        Self {
            first: None,
            reads: 0,
            ticks_per_ns: 0.0,
            compared: Compared::new(TSC_ERROR_MS),
        }
    }

    fn read(&mut self, clocks: &Clocks, at_us: u64) -> Option<Step> {
        let tsc = clocks.tsc?;
        let (raw_ns, first) = *self.first.get_or_insert((clocks.raw_ns, tsc));
        let ns = clocks.raw_ns.saturating_sub(raw_ns) as f64;
        // It may also have gone back.
        let ticks = tsc.wrapping_sub(first).cast_signed() as f64;
        self.reads = self.reads.saturating_add(1);
        if self.reads <= TSC_KNOWN {
            self.ticks_per_ns = if ns > 0.0 { ticks / ns } else { 0.0 };
            return None;
        }
        if self.ticks_per_ns <= 0.0 || !self.ticks_per_ns.is_finite() {
            *self = Self::new();
            return None;
        }
        let ms = (ticks / self.ticks_per_ns - ns) / 1e6;
        let least_ms = thresholds::COUNTER_MS + clocks.error_ns as f64 / 1e6;
        let compared = &mut self.compared;
        compared.read(at_us, ms, thresholds::COUNTER, least_ms)
    }
}

/// All clocks of a guest.
pub(crate) struct Lag {
    last: Option<Clocks>,
    rtc: Compared,
    counter: Counter,
    neighbours: BTreeMap<String, Compared>,
    /// Jumps of neighbours' clocks that may still be joined by others: when, who, by how much.
    jumped: Vec<Jump>,
    neighbours_told_us: u64,
}

impl Lag {
    pub(crate) fn new() -> Self {
        Self {
            last: None,
            rtc: Compared::new(RTC_ERROR_MS),
            counter: Counter::new(),
            neighbours: BTreeMap::new(),
            jumped: Vec::new(),
            neighbours_told_us: 0,
        }
    }

    /// Takes a sample; `at_us` is its time by the clock that is never set.
    pub(crate) fn read(&mut self, sample: &Sample, at_us: u64) -> Vec<Sign> {
        let clocks = &sample.clocks;
        let mut signs = Vec::new();
        if let Some(last) = self.last {
            own(&last, clocks, &mut signs);
        }
        if sample.late_ms >= HELD_MIN_MS {
            signs.push(Sign::Held { ms: sample.late_ms });
        }
        signs.extend(self.hardware(clocks));
        if let Some(step) = self.counter.read(clocks, at_us) {
            let Step { ms, statistic, .. } = step;
            signs.push(Sign::Counter { ms, statistic });
        }
        signs.extend(self.neighbours(&sample.neighbours, at_us));
        self.last = Some(*clocks);
        signs
    }

    pub(crate) fn statistics(&self) -> Statistics {
        let neighbours = self.neighbours.values().map(Compared::statistic);
        Statistics {
            rtc: self.rtc.statistic(),
            tsc: self.counter.compared.statistic(),
            neighbours: neighbours.fold(0.0, f64::max),
        }
    }

    fn hardware(&mut self, clocks: &Clocks) -> Option<Sign> {
        let edge = clocks.rtc?;
        let at_us = u64::try_from(edge.at_ns / 1000).ok()?;
        let offset_ms = edge.rtc_s as f64 * 1e3 - edge.at_ns as f64 / 1e6;
        let least_ms = thresholds::RTC_MS.max(3.0 * edge.error_ns as f64 / 1e6);
        let step = self.rtc.read(at_us, offset_ms, thresholds::RTC, least_ms)?;
        let Step {
            ms,
            statistic,
            after_us,
            ..
        } = step;
        // What the time of day was when the hardware clock showed that.
        let behind_ns = clocks.raw_ns.saturating_sub(edge.at_ns);
        let day_ms = clocks.realtime_ns.saturating_sub(behind_ns) as f64 / 1e6;
        let apart_ms = edge.rtc_s as f64 * 1e3 - day_ms;
        let was_apart_ms = apart_ms - ms;
        // The time of day has not jumped, and the two agree now that did not before.
        let agrees = apart_ms.abs() < 0.2 * ms.abs() && was_apart_ms.abs() > 0.8 * ms.abs();
        Some(match ms {
            _ if agrees => Sign::RtcSet { ms },
            _ if ms > 0.0 => Sign::Ahead {
                ms,
                statistic,
                after_us,
            },
            _ => Sign::Behind { ms, statistic },
        })
    }

    fn neighbours(&mut self, all: &[Neighbour], at_us: u64) -> Option<Sign> {
        // Those that are not asked any more count no more.
        self.neighbours
            .retain(|name, _| all.iter().any(|of| of.name == *name));
        let mut is_news = false;
        for neighbour in all {
            let Some(ms) = neighbour.offset_ms else {
                continue;
            };
            let compared = self
                .neighbours
                .entry(neighbour.name.clone())
                .or_insert_with(|| Compared::new(NEIGHBOUR_ERROR_MS));
            let least_ms = thresholds::NEIGHBOUR_MS;
            if let Some(step) = compared.read(at_us, ms, thresholds::NEIGHBOUR, least_ms) {
                let Step { ms, after_us, .. } = step;
                self.jumped.push(Jump {
                    at_us,
                    ms,
                    after_us,
                });
                is_news = true;
            }
        }
        let since_us = at_us.saturating_sub(thresholds::TOGETHER_US);
        self.jumped.retain(|jump| jump.at_us >= since_us);
        if !is_news || self.neighbours_told_us > since_us {
            return None;
        }
        // All see a guest that stood still alike; one whose own clock was set is alone.
        let of = self.neighbours.len();
        let (agree, ms) = self
            .jumped
            .iter()
            .map(|Jump { ms, .. }| {
                let is_like = |other: f64| (other - ms).abs() <= 5.0 + 0.2 * ms.abs();
                let like = self.jumped.iter().filter(|other| is_like(other.ms));
                (like.count(), *ms)
            })
            .max_by_key(|(agree, _)| *agree)?;
        if ms <= 0.0 || 2 * agree <= of {
            return None;
        }
        self.neighbours_told_us = at_us;
        let (agree, of) = (u32::try_from(agree).ok()?, u32::try_from(of).ok()?);
        let after_us = self.jumped.iter().map(|jump| jump.after_us).min();
        Some(Sign::Neighbours {
            ms,
            agree,
            of,
            after_us: after_us.unwrap_or(0),
        })
    }
}

/// What the guest's own clocks show between them.
fn own(last: &Clocks, now: &Clocks, signs: &mut Vec<Sign>) {
    let went = |of: fn(&Clocks) -> i64| of(now).saturating_sub(of(last)) as f64 / 1e6;
    let raw_ms = went(|clocks| clocks.raw_ns);
    let monotonic_ms = went(|clocks| clocks.monotonic_ns);
    let slack_ms = last.error_ns.saturating_add(now.error_ns).max(0) as f64 / 1e6;
    let day_ms = went(|clocks| clocks.realtime_ns) - monotonic_ms;
    // While the guest sleeps its time of day goes on, without having been set.
    let asleep_ms = went(|clocks| clocks.boottime_ns) - monotonic_ms;
    if asleep_ms > SET_MIN_MS + slack_ms {
        signs.push(Sign::Suspended { ms: asleep_ms });
    }
    let set_ms = day_ms - asleep_ms;
    if set_ms.abs() > SET_MIN_MS + 2.0 * slack_ms {
        signs.push(Sign::DaySet { ms: set_ms });
    }
    let slewed_ms = (monotonic_ms - raw_ms).abs();
    if raw_ms > 0.0 && slewed_ms > SLEW_MAX * raw_ms + SET_MIN_MS + slack_ms {
        let ppm = (monotonic_ms - raw_ms) / raw_ms * 1e6;
        signs.push(Sign::Impossible { ppm });
    }
}
