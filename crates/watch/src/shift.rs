//! Whether a value is another than it was, for good: ranks among earlier values, and a nonparametric likelihood ratio in both
//! directions, as for round trips from outside.

use std::collections::VecDeque;

use crate::feature::change::Change;
use crate::feature::ranks::Ranks;

/// The middle of so many values is what a value is now.
const RECENT: usize = 5;
/// What has been another for so many values is usual now.
const USUAL: u32 = 60;
/// How far a value has been from what was usual counts as its own unrest once it is so many values ago: a change that is told
/// must not excuse itself.
const DELAYED: usize = 15;
/// How much of that is kept at each value.
const KEEP: f64 = 1.0 - 1.0 / 1000.0;
/// It must be that many times as far, by the logarithm, as it has been without having been told.
const FURTHER: f64 = 2.0;

/// A change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shifted {
    /// Sum of the logarithms of the likelihood ratios.
    pub(crate) statistic: f64,
    /// What the value is, over what it was.
    pub(crate) times: f64,
}

/// One value that is read again and again.
#[derive(Default)]
pub(crate) struct Shift {
    ranks: Ranks,
    up: Change,
    down: Change,
    reads: u64,
    recent: VecDeque<f64>,
    /// How far the last values were from what was usual, by the logarithm.
    far: VecDeque<f64>,
    widest: f64,
    unusual: u32,
    is_told: bool,
    statistic: f64,
}

impl Shift {
    /// Takes the next value, which is positive. Says that it has changed as long as that is so and not yet usual, if by that
    /// factor at least and further than it has wandered by itself.
    pub(crate) fn read(&mut self, value: f64, statistic: f64, times: f64) -> Option<Shifted> {
        self.reads += 1;
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(value);
        let score = self.ranks.score(value, self.unusual > 0)?;
        self.up.push(score, self.reads);
        self.down.push(1.0 - score, self.reads);
        let (up, down) = (self.up.statistic(), self.down.statistic());
        self.statistic = up.max(down);
        let is_high = if up > down {
            self.up.is_high()
        } else {
            self.down.is_high()
        };
        let was = self.ranks.median()?;
        let shifted = Shifted {
            statistic: self.statistic,
            times: self.now() / was.max(f64::MIN_POSITIVE),
        };
        let far = shifted.times.ln().abs();
        self.widest *= KEEP;
        if !is_high || self.statistic < statistic {
            self.far.push_back(far);
            if self.far.len() > DELAYED {
                let far = self.far.pop_front().unwrap_or(0.0);
                self.widest = self.widest.max(far);
            }
            if self.statistic >= statistic {
                // It was, and is not any more: the next change begins from nothing.
                self.up.reset();
                self.down.reset();
            }
            (self.unusual, self.is_told) = (0, false);
            return None;
        }
        self.far.clear();
        self.unusual += 1;
        self.is_told |= far >= times.ln().max(FURTHER * self.widest);
        let is_told = self.is_told;
        if self.unusual >= USUAL {
            let widest = if is_told { 0.0 } else { self.widest.max(far) };
            *self = Self {
                widest,
                ..Self::default()
            };
        }
        is_told.then_some(shifted)
    }

    /// The statistic of the last value.
    pub(crate) fn statistic(&self) -> f64 {
        self.statistic
    }

    fn now(&self) -> f64 {
        let mut values: Vec<f64> = self.recent.iter().copied().collect();
        let middle = values.len() / 2;
        let (_, median, _) = values.select_nth_unstable_by(middle, f64::total_cmp);
        *median
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::Chance;

    #[test]
    fn a_value_that_stays_elsewhere_is_told_in_both_directions_and_becomes_usual() {
        for times in [1.5, 0.6] {
            let mut chance = Chance::new(11);
            let mut shift = Shift::default();
            let mut told = Vec::new();
            for at in 0..400 {
                let usual = 10.0 * (0.02 * chance.normal()).exp();
                let value = if at < 200 { usual } else { usual * times };
                if let Some(shifted) = shift.read(value, 30.0, 1.1) {
                    assert!((shifted.times / times - 1.0).abs() < 0.1, "{shifted:?}");
                    told.push(at);
                }
            }
            assert!((201..210).contains(&told[0]), "{told:?}");
            assert!(told.last().is_some_and(|at| *at < 290), "{told:?}");
        }
    }

    #[test]
    fn one_outlier_and_a_slight_change_are_none() {
        let mut chance = Chance::new(5);
        let mut shift = Shift::default();
        for at in 0..400 {
            let mut value = 10.0 * (0.02 * chance.normal()).exp();
            if at % 50 == 49 {
                value *= 20.0;
            }
            if at > 300 {
                value *= 1.04;
            }
            assert_eq!(shift.read(value, 30.0, 1.1), None, "{at}");
        }
    }

    #[test]
    fn what_wanders_by_itself_must_go_further() {
        let found = |wanders: f64| {
            let mut chance = Chance::new(3);
            let mut shift = Shift::default();
            let mut told = 0;
            for at in 0..900 {
                let is_away = at % 100 > 92;
                let mut value = 10.0 * (0.02 * chance.normal()).exp();
                if is_away {
                    value *= wanders;
                }
                if at >= 700 {
                    value *= 1.5;
                }
                told += u32::from(shift.read(value, 60.0, 1.1).is_some());
                assert!(at >= 700 || told == 0, "{at}");
            }
            told > 0
        };
        assert!(found(1.0));
        assert!(!found(1.4));
    }
}
