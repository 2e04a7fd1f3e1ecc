//! Whether values have grown, at a time and by an amount that nobody knows before.
//!
//! Nonparametric: a score is compared with a few quantiles only. For each, the statistic is the likelihood ratio of "more
//! than usual exceed it since some step" to "as many as usual", maximised over the step and over how many more. That
//! maximum needs no loop over all steps: seen as a path of counts over steps, only corners of the path's lower convex hull
//! can reach it, and there are few of them (Romano, Eckley and Fearnhead, 2023).

use std::collections::VecDeque;

/// Shares of usual values below each quantile.
const POINTS: [f64; 4] = [0.5, 0.75, 0.9, 0.97];
/// A change that is older is no change any more.
const STEPS_MAX: u64 = 900;
/// Corners kept for each quantile. A hull of integer counts over 900 steps has fewer.
const CORNERS_MAX: usize = 128;
/// Weight of the newest score in what is high at present.
const RECENT: f64 = 0.2;

#[derive(Clone, Copy)]
struct Corner {
    step: u64,
    sum: u64,
    second: u64,
}

#[derive(Default)]
struct Path {
    sum: u64,
    corners: VecDeque<Corner>,
}

/// The scores of one target.
#[derive(Default)]
pub(crate) struct Change {
    steps: u64,
    paths: [Path; POINTS.len()],
    statistic: f64,
    onset: u64,
    recent: f64,
}

impl Change {
    /// Takes the next score, of that second.
    pub(crate) fn push(&mut self, score: f64, second: u64) {
        self.recent += RECENT * (f64::from(u8::from(score > 0.75)) - self.recent);
        let (mut total, mut best, mut onset) = (0.0, 0.0, second);
        for (path, point) in self.paths.iter_mut().zip(POINTS) {
            path.add_corner(Corner {
                step: self.steps,
                sum: path.sum,
                second,
            });
            path.sum += u64::from(score > point);
            let (ratio, at) = path.best(self.steps + 1, 1.0 - point);
            total += ratio;
            if ratio > best {
                (best, onset) = (ratio, at);
            }
        }
        self.steps += 1;
        (self.statistic, self.onset) = (total, onset);
    }

    /// Sum of the logarithms of the likelihood ratios; 0 if nothing speaks for a growth.
    pub(crate) fn statistic(&self) -> f64 {
        self.statistic
    }

    /// Second in which the growth probably began.
    pub(crate) fn onset(&self) -> u64 {
        self.onset
    }

    /// Whether values are high at present: of the last few more than half exceed what a quarter usually does.
    pub(crate) fn is_high(&self) -> bool {
        self.recent > 0.5
    }

    /// Begins anew.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }
}

impl Path {
    fn add_corner(&mut self, new: Corner) {
        let oldest = new.step.saturating_sub(STEPS_MAX);
        while self
            .corners
            .front()
            .is_some_and(|corner| corner.step < oldest)
        {
            self.corners.pop_front();
        }
        while self.corners.len() >= 2 {
            let (a, b) = (
                self.corners[self.corners.len() - 2],
                self.corners[self.corners.len() - 1],
            );
            // Counts never fall, so nothing here is negative.
            if (b.sum - a.sum) * (new.step - b.step) < (new.sum - b.sum) * (b.step - a.step) {
                break;
            }
            self.corners.pop_back();
        }
        if self.corners.len() == CORNERS_MAX {
            self.corners.pop_front();
        }
        self.corners.push_back(new);
    }

    /// Largest ratio, and the second from which on it holds.
    fn best(&self, steps: u64, usual: f64) -> (f64, u64) {
        let mut best = (0.0, 0);
        for corner in &self.corners {
            let ratio = ratio(steps - corner.step, self.sum - corner.sum, usual);
            if ratio > best.0 {
                best = (ratio, corner.second);
            }
        }
        best
    }
}

/// Logarithm of the likelihood ratio for `hits` among `steps`, if more than the share `usual` are hits.
fn ratio(steps: u64, hits: u64, usual: f64) -> f64 {
    let (n, share) = (steps as f64, hits as f64 / steps as f64);
    if share <= usual {
        return 0.0;
    }
    let miss = if hits == steps {
        0.0
    } else {
        (1.0 - share) * ((1.0 - share) / (1.0 - usual)).ln()
    };
    n * (share * (share / usual).ln() + miss)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same by trying every step.
    fn tried(scores: &[f64]) -> f64 {
        let ratios = POINTS.iter().map(|point| {
            (0..scores.len())
                .map(|from| {
                    let hits = scores[from..].iter().filter(|score| *score > point).count();
                    ratio((scores.len() - from) as u64, hits as u64, 1.0 - point)
                })
                .fold(0.0, f64::max)
        });
        ratios.sum()
    }

    proptest! {
        #[test]
        fn the_hull_finds_what_trying_every_step_finds(
            scores in prop::collection::vec(0.0..1.0_f64, 1..300),
            from in 0..300_usize,
        ) {
            let mut change = Change::default();
            let scores: Vec<f64> = (0..).zip(scores).map(|(at, score)| {
                if at >= from { score.sqrt() } else { score }
            }).collect();
            for (at, score) in scores.iter().enumerate() {
                change.push(*score, at as u64);
                let expected = tried(&scores[..=at]);
                prop_assert!((change.statistic() - expected).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn a_growth_is_found_with_its_beginning_and_a_fall_is_none() {
        let mut change = Change::default();
        for second in 0..200 {
            change.push((second as f64 * 0.618_034).fract(), second);
        }
        let usual = change.statistic();
        for second in 200..230 {
            change.push(0.9 + (second as f64 * 0.618_034).fract() / 10.0, second);
        }
        assert!(change.statistic() > usual + 50.0);
        assert!((198..=202).contains(&change.onset()), "{}", change.onset());
        assert!(change.is_high());
        change.reset();
        for second in 0..200 {
            change.push(0.1, second);
        }
        assert!(change.statistic() < 1e-9 && !change.is_high());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut change = Change::default();
        for second in 0..20_000_u64 {
            // Ever rarer, then ever more frequent: as many corners as there can be.
            let phase = second % 2000;
            let hit = (phase * phase / 1000) != ((phase + 1) * (phase + 1) / 1000);
            change.push(if hit { 0.99 } else { 0.01 }, second);
        }
        assert!(
            change
                .paths
                .iter()
                .all(|path| path.corners.len() <= CORNERS_MAX)
        );
    }
}
