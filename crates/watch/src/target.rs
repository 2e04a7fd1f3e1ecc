//! One target: its readings, second by second, become signals.

use std::collections::VecDeque;

use crate::calibration::Calibration;
use crate::feature::change::Change;
use crate::feature::clock::{Clock, Step};
use crate::feature::loss::{Losses, Run};
use crate::feature::ranks::Ranks;
use crate::observation::{Reading, Role};

/// An answer is late if it took that much longer than usual ...
const LATE_MS: f64 = 30.0;
/// ... and that many times as long.
const LATE_TIMES: f64 = 10.0;
/// Answers to probes that were sent further apart than this, and that came at once, were kept back.
const HELD_APART_US: u64 = 20_000;
/// Error of an NTP offset that is always possible.
const NTP_ERROR_MS: f64 = 0.1;
/// Error of an ICMP timestamp: it counts milliseconds.
const ICMP_ERROR_MS: f64 = 0.6;
/// So many answers in a row by another path make it the usual one.
const PATH_SETTLED: u32 = 3;
/// A clock that was not read for so long is not watched.
const CLOCK_STALE_US: u64 = 200_000_000;
/// Answers that are remembered: as many as come while a clock is read six times.
const ANSWERS_MAX: usize = 512;
/// A probe that was sent so long after a clock was read may have met what that met.
const MEETS_US: u64 = 50_000;
/// An answer is slow if in this share of usual seconds none takes longer ...
const SLOW_SHARE: f64 = 0.9;
/// ... and it took that much longer than usual.
const SLOW_MS: f64 = 4.0;

/// How a target answered while its clock jumped.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Wake {
    /// For at most so long it may have stood still then: between two probes that it answered, none answered in between.
    pub(crate) room_us: u64,
    /// Longest round trip of those sent since its clock was as before.
    pub(crate) slowest_ms: f64,
    /// Whether that is more than usual.
    pub(crate) is_slow: bool,
    /// Nine of ten answers since then were not later than usual by more. As much may a clock seem to be off.
    pub(crate) noise_ms: f64,
}

/// What a second has shown of one target.
#[derive(Clone, Debug, Default)]
pub(crate) struct Signals {
    /// Whether there was any reading at all.
    pub(crate) is_seen: bool,
    /// Statistic of growing round trips.
    pub(crate) rise: f64,
    /// Second since which they have probably grown.
    pub(crate) rise_onset: u64,
    pub(crate) is_high: bool,
    /// A run of lost probes that ended in this second, or goes on, with its surprise.
    pub(crate) run: Option<(Run, f64)>,
    /// How much later than usual the latest answer was, if it was late, and when it was asked for.
    pub(crate) late: Option<(u64, f64)>,
    /// Whether late answers came at once: something has kept them back, and did not lose them.
    pub(crate) held: bool,
    pub(crate) scattered: usize,
    pub(crate) step: Option<Step>,
    /// How it answered when its clock jumped, if that is known.
    pub(crate) wake: Option<Wake>,
    pub(crate) has_clock: bool,
    /// By how many hops the way back has changed.
    pub(crate) path: Option<i16>,
    pub(crate) announcements: u32,
}

/// One target.
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) role: Role,
    pending: Vec<(u64, Reading)>,
    ranks: Ranks,
    change: Change,
    losses: Losses,
    ntp: Clock,
    icmp: Clock,
    /// The answered probe before: when it was sent, and its round trip.
    previous: Option<(u64, f64)>,
    /// Answered probes, the latest last: when each was sent and when its answer came.
    answers: VecDeque<(u64, u64)>,
    usual_hops: Option<u8>,
    other_hops: Option<(u8, u32)>,
    rtts: Vec<f64>,
    pub(crate) signals: Signals,
}

impl Target {
    pub(crate) fn new(name: String, role: Role) -> Self {
        Self {
            name,
            role,
            pending: Vec::new(),
            ranks: Ranks::default(),
            change: Change::default(),
            losses: Losses::default(),
            ntp: Clock::new(NTP_ERROR_MS),
            icmp: Clock::new(ICMP_ERROR_MS),
            previous: None,
            answers: VecDeque::new(),
            usual_hops: None,
            other_hops: None,
            rtts: Vec::new(),
            signals: Signals::default(),
        }
    }

    pub(crate) fn pending(&self) -> usize {
        self.pending.len()
    }

    pub(crate) fn add(&mut self, sent_us: u64, reading: Reading) {
        self.pending.push((sent_us, reading));
    }

    /// When the earliest probe was sent that is not judged yet.
    pub(crate) fn earliest_us(&self) -> Option<u64> {
        self.pending.iter().map(|(sent_us, _)| *sent_us).min()
    }

    /// Throws away what was sent in that time: the watcher itself stalled.
    pub(crate) fn discard(&mut self, from_us: u64, until_us: u64) {
        self.pending
            .retain(|(sent_us, _)| !(from_us..until_us).contains(sent_us));
        self.losses.interrupted();
        // What was not asked for is no silence.
        self.answers.clear();
    }

    /// Judges a second, of which everything has arrived. While `frozen`, what is seen is not taken for usual.
    pub(crate) fn second(&mut self, second: u64, frozen: bool, calibration: &Calibration) {
        let end_us = (second + 1) * 1_000_000;
        let mut signals = Signals::default();
        // In the order of sending, whatever order answers came in.
        self.pending.sort_by_key(|(sent_us, _)| *sent_us);
        let count = self
            .pending
            .partition_point(|(sent_us, _)| *sent_us < end_us);
        self.rtts.clear();
        let mut latest = (0, 0.0);
        let mut run = None;
        let later = self.pending.split_off(count);
        for (sent_us, reading) in std::mem::replace(&mut self.pending, later) {
            signals.is_seen = true;
            match reading {
                Reading::Announced => signals.announcements += 1,
                Reading::IcmpOffset { ms } => {
                    // A day has midnight, and these clocks count from it.
                    let step = self.icmp.read(sent_us, ms, calibration.clock.strong);
                    signals.step = stronger(signals.step, step);
                }
                Reading::NtpOffset { ms } => {
                    let step = self.ntp.read(sent_us, ms, calibration.clock.strong);
                    signals.step = stronger(signals.step, step);
                }
                Reading::Lost => {
                    self.losses.probe(sent_us, true);
                }
                // Says how fast it computes, which is another detector's.
                Reading::NtpHeld { .. } => {}
                Reading::Rtt { ms } => {
                    // Judged before it teaches that losses are usual.
                    let surprise = self.losses.run().map(|run| self.losses.surprise(&run));
                    let ended = self.losses.probe(sent_us, false);
                    run = ended.zip(surprise).or(run);
                    self.rtts.push(ms);
                    signals.held |= self.is_held(sent_us, ms);
                    self.previous = Some((sent_us, ms));
                    if self.answers.len() == ANSWERS_MAX {
                        self.answers.pop_front();
                    }
                    self.answers
                        .push_back((sent_us, sent_us + (ms * 1e3) as u64));
                    if ms > latest.1 {
                        latest = (sent_us, ms);
                    }
                }
                Reading::Ttl { hops } => signals.path = self.path(hops).or(signals.path),
            }
        }
        if let Some(going_on) = self.losses.run() {
            run = Some((going_on, self.losses.surprise(&going_on)));
        }
        signals.run = run;
        if !self.rtts.is_empty() {
            if let Some(usual) = self.usual_ms()
                && latest.1 > usual + LATE_MS
                && latest.1 > usual * LATE_TIMES
            {
                signals.late = Some((latest.0, latest.1 - usual));
            }
            let middle = self.rtts.len() / 2;
            let median = *self.rtts.select_nth_unstable_by(middle, f64::total_cmp).1;
            if let Some(score) = self.ranks.score(median, frozen) {
                self.change.push(score, second);
            }
        }
        signals.rise = self.change.statistic();
        signals.rise_onset = self.change.onset();
        signals.is_high = self.change.is_high();
        signals.scattered = self.losses.scattered(end_us);
        if let Some(step) = signals.step
            && step.statistic >= calibration.clock.weak
        {
            signals.wake = self.wake(&step, end_us);
        }
        let stale_us = end_us.saturating_sub(CLOCK_STALE_US);
        signals.has_clock = [&self.ntp, &self.icmp]
            .iter()
            .any(|clock| clock.read_us().is_some_and(|read_us| read_us > stale_us));
        self.signals = signals;
    }

    /// Whether any clock was read since then as often as shows where it is now.
    pub(crate) fn clock_is_settled(&self, since_us: u64) -> bool {
        self.ntp.reads_since(since_us) >= 2 || self.icmp.reads_since(since_us) >= 4
    }

    /// What was unusual is over: the next one begins from nothing.
    pub(crate) fn calm(&mut self) {
        self.change.reset();
    }

    /// What was unusual has become usual.
    pub(crate) fn relearn(&mut self) {
        self.change.reset();
        self.ranks.relearn();
    }

    /// Nothing was seen of anything for long.
    pub(crate) fn interrupted(&mut self) {
        self.change.reset();
        self.losses.interrupted();
        self.ntp.interrupted();
        self.icmp.interrupted();
        self.answers.clear();
        self.signals = Signals::default();
    }

    /// Whether this answer came together with the one to the probe before it, and both were late.
    fn is_held(&self, sent_us: u64, ms: f64) -> bool {
        let Some((before_us, before_ms)) = self.previous else {
            return false;
        };
        let apart_us = sent_us.saturating_sub(before_us);
        let apart_ms = apart_us as f64 / 1e3;
        // The later one has waited for less long, by as much as it was sent later.
        let is_together = (before_ms - ms - apart_ms).abs() < apart_ms / 8.0;
        apart_us >= HELD_APART_US && ms > apart_ms / 4.0 && is_together
    }

    /// How it answered when its clock jumped, as far as known at `end_us`.
    fn wake(&self, step: &Step, end_us: u64) -> Option<Wake> {
        let until_us = step.seen_us + MEETS_US;
        let mut wake = Wake::default();
        let mut count = 0;
        // Behind the last one there may be silence, too.
        let open = [(end_us, end_us)];
        let behind = self.answers.iter().copied().skip(1).chain(open);
        for (before, (sent_us, came_us)) in self.answers.iter().zip(behind) {
            if came_us <= step.after_us || before.0 > until_us {
                continue;
            }
            count += 1;
            wake.room_us = wake.room_us.max(came_us.saturating_sub(before.0));
            if sent_us > step.after_us && sent_us <= until_us {
                let ms = came_us.saturating_sub(sent_us) as f64 / 1e3;
                wake.slowest_ms = wake.slowest_ms.max(ms);
            }
        }
        if count == 0 {
            return None;
        }
        let median = self.ranks.median()?;
        let high = self.ranks.quantile(SLOW_SHARE)?;
        wake.is_slow = wake.slowest_ms > high.max(median + SLOW_MS);
        let since = self.answers.iter().filter(|of| of.0 > until_us);
        let mut since: Vec<f64> = since
            .map(|(sent_us, came_us)| came_us.saturating_sub(*sent_us) as f64 / 1e3 - median)
            .collect();
        if !since.is_empty() {
            let at = since.len() * 9 / 10;
            wake.noise_ms = *since.select_nth_unstable_by(at, f64::total_cmp).1;
        }
        Some(wake)
    }

    fn usual_ms(&self) -> Option<f64> {
        // The middle is looked for only where it can matter.
        let most = self.rtts.iter().copied().fold(0.0, f64::max);
        if most > LATE_MS {
            self.ranks.median()
        } else {
            None
        }
    }

    fn path(&mut self, hops: u8) -> Option<i16> {
        let usual = *self.usual_hops.get_or_insert(hops);
        if hops == usual {
            self.other_hops = None;
            return None;
        }
        let (other, count) = self.other_hops.unwrap_or((hops, 0));
        let count = if other == hops { count + 1 } else { 1 };
        self.other_hops = Some((hops, count));
        if count < PATH_SETTLED {
            return None;
        }
        (self.usual_hops, self.other_hops) = (Some(hops), None);
        Some(i16::from(hops) - i16::from(usual))
    }
}

fn stronger(a: Option<Step>, b: Option<Step>) -> Option<Step> {
    match (a, b) {
        (Some(a), Some(b)) if a.statistic >= b.statistic => Some(a),
        (a, b) => b.or(a),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_are_judged_in_the_order_in_which_they_were_sent() {
        let calibration = Calibration::blank();
        let mut target = Target::new("a".to_owned(), Role::Vm);
        target.add(900_000, Reading::Rtt { ms: 1.0 });
        target.add(1_500_000, Reading::Lost);
        target.add(400_000, Reading::Lost);
        target.add(100_000, Reading::Rtt { ms: 1.0 });
        target.second(0, false, &calibration);
        let (run, _) = target.signals.run.unwrap();
        assert_eq!((run.count, run.longest_us()), (1, 800_000));
        assert_eq!(target.pending(), 1);
        target.second(1, false, &calibration);
        assert_eq!(target.signals.run.unwrap().0.first_us, 1_500_000);
    }

    #[test]
    fn a_vm_can_have_stood_still_only_where_it_did_not_answer() {
        let mut target = Target::new("a".to_owned(), Role::Vm);
        for at in 0..100_u64 {
            target.add(at * 500_000, Reading::Rtt { ms: 1.0 });
        }
        target.add(50_000_000, Reading::Rtt { ms: 40.0 });
        target.add(50_500_000, Reading::Rtt { ms: 2.0 });
        for second in 0..51 {
            target.second(second, false, &Calibration::blank());
        }
        let step = Step {
            seen_us: 50_200_000,
            after_us: 49_200_000,
            ms: -300.0,
            statistic: 30.0,
            count: 3,
        };
        let wake = target.wake(&step, 51_000_000).unwrap();
        assert_eq!((wake.room_us, wake.is_slow), (540_000, true));
        assert!((wake.slowest_ms - 40.0).abs() < 1e-9 && wake.noise_ms < 1.5);
        // Of what was stalled nothing is known.
        target.discard(0, 60_000_000);
        assert_eq!(target.wake(&step, 51_000_000), None);
    }

    #[test]
    fn another_path_is_told_once_it_stays() {
        let mut target = Target::new("a".to_owned(), Role::Vm);
        let told: Vec<_> = [64, 64, 60, 64, 62, 62, 62, 62]
            .into_iter()
            .map(|hops| target.path(hops))
            .collect();
        assert_eq!(told.iter().flatten().collect::<Vec<_>>(), [&-2]);
        assert_eq!(told[6], Some(-2));
    }
}
