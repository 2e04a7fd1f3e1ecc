//! The heuristics of 2013, to compare with: one ping a second, and four marks.
//!
//! What the paper (Fiebig and others, CLOSER 2013) says: during a migration the mean round trip is raised, there are very
//! high outliers mainly at its start, some pings stay unanswered while CPUs are copied and the VM is switched over, and
//! afterwards its clock lags by over 100 ms. It publishes no thresholds but that of the lag. The others here are ours, as
//! plain as the paper's description, and how the marks are joined is ours too: an alarm needs an unanswered ping, and two
//! other marks or the lag.

use std::collections::VecDeque;

use crate::observation::Reading;

/// Answers that say what is usual.
const USUAL: usize = 60;
/// Answers whose mean may be raised.
const WINDOW: usize = 10;
/// So many times the usual mean is raised.
const RAISED: f64 = 1.5;
/// So many times the usual mean is very high.
const VERY_HIGH: f64 = 10.0;
/// A lag, in milliseconds. The paper's.
const LAG_MS: f64 = 100.0;
/// Marks of this time belong together, in seconds.
const TOGETHER_S: u64 = 60;

/// What was marked, and when last.
#[derive(Clone, Copy, Debug, Default)]
struct Marks {
    raised: Option<u64>,
    very_high: Option<u64>,
    unanswered: Option<u64>,
    lag: Option<u64>,
}

/// One target.
#[derive(Default)]
pub struct Baseline {
    second: Option<u64>,
    usual_sum: f64,
    usual_count: usize,
    window: VecDeque<f64>,
    usual_offset_ms: Option<f64>,
    marks: Marks,
    is_alarmed: bool,
}

impl Baseline {
    /// Takes a reading, in the order of sending; says whether it begins an alarm.
    pub fn take(&mut self, sent_us: u64, reading: Reading) -> bool {
        let second = sent_us / 1_000_000;
        match reading {
            Reading::Rtt { .. } | Reading::Lost if self.second == Some(second) => return false,
            Reading::Rtt { ms } => {
                self.second = Some(second);
                self.answer(second, ms);
            }
            Reading::Lost => {
                self.second = Some(second);
                self.marks.unanswered = Some(second);
            }
            Reading::NtpOffset { ms } | Reading::IcmpOffset { ms } => {
                let usual = *self.usual_offset_ms.get_or_insert(ms);
                if ms < usual - LAG_MS {
                    self.marks.lag = Some(second);
                    self.usual_offset_ms = Some(ms);
                }
            }
            Reading::Ttl { .. } | Reading::NtpHeld { .. } | Reading::Announced => return false,
        }
        let is_alarmed = self.judge(second);
        let was_alarmed = std::mem::replace(&mut self.is_alarmed, is_alarmed);
        is_alarmed && !was_alarmed
    }

    /// Share of the four marks that are set: a plain likelihood, as the paper shows one.
    #[must_use]
    pub fn likelihood(&self) -> f64 {
        self.second.map_or(0.0, |second| {
            let marks = self.set(second);
            marks.iter().filter(|is_set| **is_set).count() as f64 / 4.0
        })
    }

    fn answer(&mut self, second: u64, ms: f64) {
        if self.usual_count < USUAL {
            self.usual_sum += ms;
            self.usual_count += 1;
            return;
        }
        let usual = self.usual_sum / self.usual_count as f64;
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(ms);
        let mean = self.window.iter().sum::<f64>() / self.window.len() as f64;
        if self.window.len() == WINDOW && mean > RAISED * usual {
            self.marks.raised = Some(second);
        }
        if ms > VERY_HIGH * usual {
            self.marks.very_high = Some(second);
        }
    }

    fn set(&self, second: u64) -> [bool; 4] {
        let marks = self.marks;
        [marks.raised, marks.very_high, marks.unanswered, marks.lag]
            .map(|mark| mark.is_some_and(|at| second.saturating_sub(at) <= TOGETHER_S))
    }

    fn judge(&self, second: u64) -> bool {
        let [raised, very_high, unanswered, lag] = self.set(second);
        unanswered && (lag || (raised && very_high))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual() -> Baseline {
        let mut baseline = Baseline::default();
        for second in 0..100 {
            assert!(!baseline.take(second * 1_000_000, Reading::Rtt { ms: 1.0 }));
        }
        baseline.take(99_500_000, Reading::NtpOffset { ms: 3.0 });
        baseline
    }

    #[test]
    fn a_raised_mean_with_outliers_and_an_unanswered_ping_is_an_alarm() {
        let mut baseline = usual();
        for second in 100..112 {
            let ms = if second == 101 { 40.0 } else { 2.0 };
            assert!(!baseline.take(second * 1_000_000, Reading::Rtt { ms }));
        }
        assert!(baseline.take(112_000_000, Reading::Lost));
        assert!(!baseline.take(113_000_000, Reading::Lost), "told once");
        assert!((baseline.likelihood() - 0.75).abs() < 1e-9);
    }

    #[test]
    fn an_unanswered_ping_and_a_lag_are_an_alarm_and_each_alone_is_none() {
        let mut baseline = usual();
        assert!(!baseline.take(100_000_000, Reading::NtpOffset { ms: -120.0 }));
        assert!(baseline.take(101_000_000, Reading::Lost));
        let mut baseline = usual();
        assert!(!baseline.take(100_000_000, Reading::Lost));
        assert!(!baseline.take(101_000_000, Reading::NtpOffset { ms: -90.0 }));
        assert!(!baseline.take(200_000_000, Reading::NtpOffset { ms: -300.0 }));
    }

    #[test]
    fn a_copy_without_unanswered_pings_is_none() {
        let mut baseline = usual();
        for second in 100..200 {
            let ms = if second % 7 == 0 { 30.0 } else { 3.0 };
            assert!(!baseline.take(second * 1_000_000, Reading::Rtt { ms }));
        }
    }
}
