//! Runs of lost probes, judged against the losses that the path has anyway.
//!
//! Usual losses come in bursts: the model is Gilbert's, a chain of two states fitted to the path, in which a burst begins
//! with probability `p` and goes on with probability `q`. How surprising a run is follows from both.

use std::collections::VecDeque;

/// How much of what is known is kept at each probe.
const KEEP: f64 = 1.0 - 1.0 / 7200.0;
/// As if that many probes had been answered, and half a burst begun.
const ANSWERED: f64 = 250.0;
/// A burst teaches at most that many losses: an outage is no habit.
const TAUGHT_MAX: u32 = 3;
/// Runs within this time make losses "scattered".
const SCATTER_US: u64 = 30_000_000;
/// Ends of runs that are remembered.
const ENDS_MAX: usize = 16;

/// A run of lost probes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Run {
    /// Sending time of the first that was lost.
    pub(crate) first_us: u64,
    /// Sending time of the last that was lost.
    pub(crate) last_us: u64,
    /// Sending time of the last answered probe before, or of the first lost one if there was none.
    pub(crate) after_us: u64,
    /// Sending time of the first answered probe behind it, if there is one yet.
    pub(crate) until_us: Option<u64>,
    pub(crate) count: u32,
}

impl Run {
    /// At most that long nobody answered.
    pub(crate) fn longest_us(&self) -> u64 {
        self.until_us
            .unwrap_or(self.last_us)
            .saturating_sub(self.after_us)
    }

    /// At least that long nobody answered.
    pub(crate) fn shortest_us(&self) -> u64 {
        self.last_us.saturating_sub(self.first_us)
    }
}

/// The probes of one target.
#[derive(Default)]
pub(crate) struct Losses {
    stayed_good: f64,
    began: f64,
    stayed_bad: f64,
    ended: f64,
    run: Option<Run>,
    answered_us: Option<u64>,
    begins: VecDeque<u64>,
}

impl Losses {
    /// Takes the next probe, in the order in which they were sent; gives the run that it ends.
    pub(crate) fn probe(&mut self, sent_us: u64, is_lost: bool) -> Option<Run> {
        if is_lost {
            let after_us = self.answered_us.unwrap_or(sent_us);
            if self.run.is_none() {
                if self.begins.len() == ENDS_MAX {
                    self.begins.pop_front();
                }
                self.begins.push_back(sent_us);
            }
            let run = self.run.get_or_insert(Run {
                first_us: sent_us,
                last_us: sent_us,
                after_us,
                until_us: None,
                count: 0,
            });
            run.last_us = sent_us;
            run.count = run.count.saturating_add(1);
            return None;
        }
        self.answered_us = Some(sent_us);
        for count in [
            &mut self.stayed_good,
            &mut self.began,
            &mut self.stayed_bad,
            &mut self.ended,
        ] {
            *count *= KEEP;
        }
        let Some(mut run) = self.run.take() else {
            self.stayed_good += 1.0;
            return None;
        };
        run.until_us = Some(sent_us);
        self.began += 1.0;
        self.stayed_bad += f64::from((run.count - 1).min(TAUGHT_MAX));
        self.ended += 1.0;
        Some(run)
    }

    /// The run that goes on.
    pub(crate) fn run(&self) -> Option<Run> {
        self.run
    }

    /// Negative logarithm of the probability that a run so long begins at a probe, if losses are as usual.
    pub(crate) fn surprise(&self, run: &Run) -> f64 {
        let begin = (self.began + 0.5) / (self.began + self.stayed_good + ANSWERED);
        let stay = (self.stayed_bad + 0.6) / (self.stayed_bad + self.ended + 2.0);
        -begin.ln() - f64::from(run.count.saturating_sub(1)) * stay.min(0.95).ln()
    }

    /// Runs that began within the last half minute before `now_us`.
    pub(crate) fn scattered(&self, now_us: u64) -> usize {
        let since = now_us.saturating_sub(SCATTER_US);
        self.begins.iter().filter(|begin| **begin >= since).count()
    }

    /// What was unfinished is of no use: nothing was seen for long.
    pub(crate) fn interrupted(&mut self) {
        self.run = None;
        self.answered_us = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(losses: &mut Losses, from: u64, pattern: impl Iterator<Item = bool>) -> Vec<Run> {
        (from..)
            .zip(pattern)
            .filter_map(|(at, lost)| losses.probe(at * 500_000, lost))
            .collect()
    }

    #[test]
    fn a_run_has_bounds_and_a_length() {
        let mut losses = Losses::default();
        let pattern = [false, false, true, true, true, false];
        let runs = feed(&mut losses, 0, pattern.into_iter());
        assert_eq!(runs.len(), 1);
        assert_eq!(
            (runs[0].longest_us(), runs[0].shortest_us()),
            (2_000_000, 1_000_000)
        );
        assert_eq!(runs[0].count, 3);
    }

    #[test]
    fn one_loss_surprises_on_a_good_path_and_not_on_a_lossy_one() {
        let mut good = Losses::default();
        feed(&mut good, 0, std::iter::repeat_n(false, 20_000));
        let mut lossy = Losses::default();
        feed(&mut lossy, 0, (0..20_000).map(|at| at % 20 == 7));
        let run = |losses: &mut Losses, length| {
            feed(losses, 20_000, std::iter::repeat_n(true, length));
            let run = losses.run().unwrap();
            losses.surprise(&run)
        };
        let (of_good, of_lossy) = (run(&mut good, 1), run(&mut lossy, 1));
        assert!(of_good > 9.0 && of_lossy < 4.0, "{of_good} {of_lossy}");
        assert!(run(&mut lossy, 4) > of_lossy + 4.0);
    }

    #[test]
    fn losses_in_many_places_are_scattered() {
        let mut losses = Losses::default();
        feed(&mut losses, 0, (0..40).map(|at| at % 10 == 9));
        assert_eq!(losses.scattered(20_000_000), 4);
        assert_eq!(losses.scattered(100_000_000), 0);
    }
}
