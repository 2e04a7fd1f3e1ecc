//! Whether a target's clock has jumped.
//!
//! A line is fitted to what the offset was (clocks drift), outliers counting little. The last few offsets are then
//! compared with it: the statistic is the likelihood ratio of "moved by some amount since one of them" to "not moved", with
//! errors that have the tails of Student's distribution with three degrees of freedom.

use std::collections::VecDeque;

/// Offsets that a line is fitted to.
const BEFORE_MAX: usize = 32;
/// Fewest of them.
const BEFORE_MIN: usize = 8;
/// Offsets that may be after the jump.
const AFTER_MAX: usize = 6;
/// That many are no chance.
const AGREED: usize = 3;
/// That many show where the clock is now: what was before is forgotten.
const SETTLED: usize = 4;
/// Fastest drift that is believed, as a share: guests slew by at most 83,333 ppm, but not for long.
const DRIFT_MAX: f64 = 0.001;
/// Degrees of freedom of the errors.
const FREEDOM: f64 = 3.0;

/// A jump of a clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Step {
    /// Sending time of the first probe that saw it.
    pub(crate) seen_us: u64,
    /// Sending time of the last probe that did not.
    pub(crate) after_us: u64,
    /// By how much; a clock that now lags is negative.
    pub(crate) ms: f64,
    /// Logarithm of the likelihood ratio.
    pub(crate) statistic: f64,
    /// Readings that saw it.
    pub(crate) count: usize,
}

impl Step {
    /// Whether enough readings agree on it: one or two may have been held up on their way, and be off by half of that.
    pub(crate) fn is_settled(&self) -> bool {
        self.count >= AGREED
    }
}

/// The clock of one target, read in one way.
pub(crate) struct Clock {
    points: VecDeque<(u64, f64)>,
    /// Least error that is believed, in milliseconds.
    error_min_ms: f64,
}

impl Clock {
    /// A clock that can be read no better than that.
    pub(crate) fn new(error_min_ms: f64) -> Self {
        Self {
            points: VecDeque::with_capacity(BEFORE_MAX + AFTER_MAX),
            error_min_ms,
        }
    }

    /// Takes the next offset, in the order in which they were read. A statistic of at least `certain` that several
    /// offsets agree on ends what was before.
    pub(crate) fn read(&mut self, sent_us: u64, offset_ms: f64, certain: f64) -> Option<Step> {
        if self.points.len() == BEFORE_MAX + AFTER_MAX {
            self.points.pop_front();
        }
        self.points.push_back((sent_us, offset_ms));
        let (step, after) = self.best()?;
        if step.statistic >= certain && after >= SETTLED {
            self.points.drain(..self.points.len() - after);
        }
        Some(step)
    }

    /// When it was last read.
    pub(crate) fn read_us(&self) -> Option<u64> {
        self.points.back().map(|(sent_us, _)| *sent_us)
    }

    /// Offsets read since then, as far as remembered.
    pub(crate) fn reads_since(&self, since_us: u64) -> usize {
        self.points
            .iter()
            .filter(|(sent_us, _)| *sent_us > since_us)
            .count()
    }

    /// Nothing was seen for long: clocks may have drifted anywhere.
    pub(crate) fn interrupted(&mut self) {
        self.points.clear();
    }

    fn best(&self) -> Option<(Step, usize)> {
        let count = self.points.len();
        if count < BEFORE_MIN + 1 {
            return None;
        }
        let after_most = AFTER_MAX.min(count - BEFORE_MIN);
        let before = count - after_most;
        let line = Line::fit(self.points.iter().take(before), self.error_min_ms);
        let residuals: Vec<f64> = self
            .points
            .iter()
            .skip(before)
            .map(|point| line.residual(*point))
            .collect();
        // Minus the logarithm of Student's density, but for a constant.
        let surprise =
            |x: f64| (FREEDOM + 1.0) / 2.0 * (1.0 + (x / line.scale).powi(2) / FREEDOM).ln();
        (1..=after_most)
            .map(|after| {
                let last = &residuals[after_most - after..];
                let ms = median(last);
                let statistic = last.iter().map(|x| surprise(*x) - surprise(x - ms)).sum();
                let at = count - after;
                let step = Step {
                    seen_us: self.points[at].0,
                    after_us: self.points[at - 1].0,
                    ms,
                    statistic,
                    count: after,
                };
                (step, after)
            })
            .max_by(|a, b| a.0.statistic.total_cmp(&b.0.statistic))
    }
}

/// What the offset was, and how far from it offsets were.
struct Line {
    origin_us: u64,
    level: f64,
    /// Milliseconds per second.
    slope: f64,
    scale: f64,
}

impl Line {
    /// Least squares, weighted anew twice so that outliers count little.
    fn fit<'a>(points: impl Iterator<Item = &'a (u64, f64)> + Clone, error_min_ms: f64) -> Self {
        let origin_us = points.clone().last().map_or(0, |point| point.0);
        let count = points.clone().count();
        let mut values: Vec<f64> = points.clone().map(|point| point.1).collect();
        let level = median(&values);
        for value in &mut values {
            *value = (*value - level).abs();
        }
        let mut line = Self {
            origin_us,
            level,
            slope: 0.0,
            scale: (median(&values) * 1.48).max(error_min_ms),
        };
        for _ in 0..3 {
            let (mut w, mut wx, mut wy, mut wxx, mut wxy) = (0.0, 0.0, 0.0, 0.0, 0.0);
            for point in points.clone() {
                let x = line.seconds(point.0);
                // Relative to the level, or large offsets would leave no digits for small errors.
                let y = point.1 - level;
                let distance = line.residual(*point).abs() / line.scale;
                let weight = if distance > 2.0 { 2.0 / distance } else { 1.0 };
                w += weight;
                wx += weight * x;
                wy += weight * y;
                wxx += weight * x * x;
                wxy += weight * x * y;
            }
            let spread = wxx - wx * wx / w;
            let slope = if spread > 1e-9 {
                (wxy - wx * wy / w) / spread
            } else {
                0.0
            };
            // The limit is a share; x is in seconds and y in milliseconds.
            line.slope = slope.clamp(-DRIFT_MAX * 1e3, DRIFT_MAX * 1e3);
            line.level = level + (wy - line.slope * wx) / w;
            let residuals: Vec<f64> = points
                .clone()
                .map(|point| line.residual(*point).abs())
                .collect();
            let scale = median(&residuals) * 1.48;
            // A line through few points looks better than it is.
            let few = 1.0 + 4.0 / count as f64;
            line.scale = (scale * few).max(error_min_ms);
        }
        line
    }

    fn residual(&self, point: (u64, f64)) -> f64 {
        point.1 - self.level - self.slope * self.seconds(point.0)
    }

    fn seconds(&self, at_us: u64) -> f64 {
        (at_us as f64 - self.origin_us as f64) / 1e6
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    if values.is_empty() {
        return 0.0;
    }
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::Chance;

    const CERTAIN: f64 = 15.0;

    fn read(clock: &mut Clock, offsets: impl Iterator<Item = f64>) -> Vec<Option<Step>> {
        (1..)
            .zip(offsets)
            .map(|(at, ms)| clock.read(at * 8_000_000, ms, CERTAIN))
            .collect()
    }

    #[test]
    fn a_jump_is_found_with_its_sign_and_time_on_a_drifting_clock() {
        for jump in [-40.0, 5.0] {
            let mut chance = Chance::new(3);
            let mut clock = Clock::new(0.05);
            let offsets = (0..60).map(|at| {
                let drift = 0.4 * f64::from(at);
                drift + 0.2 * chance.normal() + if at >= 50 { jump } else { 0.0 }
            });
            let steps = read(&mut clock, offsets.collect::<Vec<_>>().into_iter());
            let before = steps[..50].iter().flatten().map(|step| step.statistic);
            assert!(before.fold(0.0, f64::max) < CERTAIN);
            let step = steps[52].unwrap();
            assert!(step.statistic > CERTAIN, "{step:?}");
            assert!((step.ms - jump).abs() < 1.0, "{step:?}");
            assert_eq!((step.after_us, step.seen_us), (400_000_000, 408_000_000));
            // And then it is where it is.
            assert!(steps[59].is_none_or(|step| step.statistic < CERTAIN));
        }
    }

    #[test]
    fn one_wild_offset_is_less_certain_than_two_that_agree() {
        let mut clock = Clock::new(0.05);
        let usual = (0..20).map(|at| f64::from(at % 3) / 10.0);
        let steps = read(&mut clock, usual.chain([-30.0, -30.0]));
        let (one, two) = (steps[20].unwrap(), steps[21].unwrap());
        assert!(two.statistic > one.statistic * 1.5, "{one:?} {two:?}");
    }

    #[test]
    fn absurd_clocks_are_measured_like_others() {
        let mut clock = Clock::new(0.5);
        let steps = read(
            &mut clock,
            (0..40).map(|at| if at < 20 { 1e12 } else { -1e12 }),
        );
        let step = steps[22].unwrap();
        assert!(step.statistic.is_finite() && (step.ms + 2e12).abs() < 1e6);
    }
}
