//! Round trips as ranks among earlier ones, whitened.
//!
//! Round-trip times have tails that no mean and no standard deviation survive, and neighbours resemble each other; both
//! make the false alarms of a textbook chart many hundred times as frequent as its tables say. Ranks know no tails, and
//! what a neighbour already told is taken away (autoregression of first order).

use std::collections::VecDeque;

use crate::normal;

/// Values that a new one is compared with.
const WINDOW: usize = 300;
/// Fewest of them that are worth a comparison.
const WINDOW_MIN: usize = 30;
/// A value is compared with only after that many others: the beginning of a slow rise must not excuse its rest.
const GUARD: usize = 15;
/// How much of what is known about neighbours is kept at each step.
const KEEP: f64 = 1.0 - 1.0 / 600.0;
/// Beyond this a neighbour would tell everything.
const CORRELATION_MAX: f64 = 0.9;

/// Earlier values of one target.
#[derive(Default)]
pub(crate) struct Ranks {
    window: VecDeque<f64>,
    guard: VecDeque<f64>,
    previous: Option<f64>,
    products: f64,
    squares: f64,
}

impl Ranks {
    /// How extreme a value is: if it is as earlier ones were, evenly distributed between 0 and 1 and independent of the
    /// one before. Nothing while too little is known. Unless `frozen`, later values are compared with this one.
    pub(crate) fn score(&mut self, value: f64, frozen: bool) -> Option<f64> {
        let score = self.rank(value).map(|rank| {
            let z = normal::quantile(rank);
            let phi = self.correlation();
            let white = match self.previous {
                Some(previous) => (z - phi * previous) / (1.0 - phi * phi).sqrt(),
                None => z,
            };
            if let (Some(previous), false) = (self.previous, frozen) {
                self.products = self.products * KEEP + z * previous;
                self.squares = self.squares * KEEP + z * z;
            }
            self.previous = Some(z);
            normal::cdf(white)
        });
        if frozen {
            // What came just before belongs to what is suspicious.
            self.guard.clear();
        } else {
            self.guard.push_back(value);
            let is_known = self.window.len() >= WINDOW_MIN;
            while self.guard.len() > if is_known { GUARD } else { 0 } {
                let Some(value) = self.guard.pop_front() else {
                    break;
                };
                if self.window.len() == WINDOW {
                    self.window.pop_front();
                }
                self.window.push_back(value);
            }
        }
        score
    }

    /// The middle of the earlier values.
    pub(crate) fn median(&self) -> Option<f64> {
        self.quantile(0.5)
    }

    /// The earlier value that this share of them lies below.
    pub(crate) fn quantile(&self, share: f64) -> Option<f64> {
        if self.window.len() < WINDOW_MIN {
            return None;
        }
        let mut values: Vec<f64> = self.window.iter().copied().collect();
        let at = ((values.len() as f64 * share) as usize).min(values.len() - 1);
        let (_, value, _) = values.select_nth_unstable_by(at, f64::total_cmp);
        Some(*value)
    }

    /// Forgets everything: what was usual is not any more.
    pub(crate) fn relearn(&mut self) {
        *self = Self::default();
    }

    fn rank(&self, value: f64) -> Option<f64> {
        if self.window.len() < WINDOW_MIN {
            return None;
        }
        let (mut below, mut equal) = (0_u32, 0_u32);
        for earlier in &self.window {
            if *earlier < value {
                below += 1;
            } else if *earlier <= value {
                equal += 1;
            }
        }
        let rank = f64::from(below) + f64::from(equal) / 2.0 + 0.5;
        Some(rank / (self.window.len() as f64 + 1.0))
    }

    fn correlation(&self) -> f64 {
        // As if 60 pairs had shown none.
        (self.products / (self.squares + 60.0)).clamp(0.0, CORRELATION_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::Chance;

    #[test]
    fn scores_of_heavy_tailed_neighbours_are_even_and_independent() {
        let mut chance = Chance::new(7);
        let (mut ranks, mut state) = (Ranks::default(), 0.0_f64);
        let mut scores = Vec::new();
        for _ in 0..20_000 {
            state = 0.6 * state + 0.8 * chance.normal();
            // The third power makes tails.
            scores.extend(ranks.score((state * state * state).abs(), false));
        }
        let count = scores.len() as f64;
        for p in [0.1, 0.5, 0.9, 0.97] {
            let share = scores.iter().filter(|score| **score < p).count() as f64 / count;
            assert!((share - p).abs() < 0.02, "{share} below {p}");
        }
        let mean = scores.iter().sum::<f64>() / count;
        let products = scores.windows(2).map(|w| (w[0] - mean) * (w[1] - mean));
        let correlation = products.sum::<f64>() / count * 12.0;
        assert!(correlation.abs() < 0.06, "{correlation}");
    }

    #[test]
    fn what_is_suspicious_is_not_learnt() {
        let mut ranks = Ranks::default();
        for step in 0..400 {
            ranks.score(f64::from(step % 10), false);
        }
        let before = ranks.median();
        for _ in 0..1000 {
            assert!(ranks.score(100.0, true).is_some_and(|score| score > 0.5));
        }
        assert_eq!(ranks.median(), before);
    }

    #[test]
    fn nothing_is_said_before_enough_is_known() {
        let mut ranks = Ranks::default();
        assert!((0..WINDOW_MIN).all(|_| ranks.score(1.0, false).is_none()));
        assert!((ranks.score(1.0, false).unwrap() - 0.5).abs() < 1e-6);
    }
}
