//! From what the channels saw to one probability and a class.
//!
//! Each channel says one of a few symbols. How probable each is under each class was counted on labelled traces; channels
//! are taken for independent given the class, which they are not quite, so the resulting score is mapped to a probability
//! by a curve that was fitted on other traces.

use crate::calibration::{Table, Weights};
use crate::finding::{Channel, Class, Stage};

/// What each channel saw; nothing if it could not have seen anything.
pub type Symbols = [Option<u8>; Channel::ALL.len()];

/// What it comes to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Weighed {
    pub(crate) class: Class,
    /// Probability of the class among all, each as probable beforehand.
    pub(crate) share: f64,
    pub(crate) score: f64,
    pub(crate) likelihood: f64,
    /// By channel, each by itself.
    pub(crate) ratios: [f64; Channel::ALL.len()],
}

/// Whether a class counts as a migration. While nothing but a growth was seen, one that will be aborted does too.
#[must_use]
pub fn is_migration(class: Class, stage: Stage) -> bool {
    class == Class::Migration || (class == Class::AbortedMigration && stage == Stage::Early)
}

/// Weighs symbols at a stage of an episode.
pub(crate) fn weigh(weights: &Weights, stage: Stage, symbols: &Symbols) -> Weighed {
    let table = weights.table(stage);
    let logs = Class::ALL.map(|class| {
        let row = &table[class.index()];
        let known = row.iter().zip(symbols);
        known
            .filter_map(|(row, symbol)| row.get(usize::from((*symbol)?)))
            .sum::<f64>()
    });
    let score = mean_of(stage, true, |class| logs[class.index()])
        - mean_of(stage, false, |class| logs[class.index()]);
    let mut best = Class::Quiet;
    for class in Class::ALL {
        if logs[class.index()] > logs[best.index()] {
            best = class;
        }
    }
    let total: f64 = logs
        .iter()
        .map(|log| (log - logs[best.index()]).exp())
        .sum();
    let mut ratios = [0.0; Channel::ALL.len()];
    for (channel, ratio) in ratios.iter_mut().enumerate() {
        *ratio = symbols[channel].map_or(0.0, |symbol| ratio_of(table, stage, channel, symbol));
    }
    Weighed {
        class: best,
        share: 1.0 / total,
        score,
        likelihood: weights.probability(stage, score),
        ratios,
    }
}

fn ratio_of(table: &Table, stage: Stage, channel: usize, symbol: u8) -> f64 {
    let log = |class: Class| {
        table[class.index()][channel]
            .get(usize::from(symbol))
            .copied()
            .unwrap_or(0.0)
    };
    mean_of(stage, true, log) - mean_of(stage, false, log)
}

/// Logarithm of the mean probability under the classes that are (or are not) migrations.
fn mean_of(stage: Stage, migrations: bool, log: impl Fn(Class) -> f64) -> f64 {
    let classes = Class::ALL
        .into_iter()
        .filter(|class| is_migration(*class, stage) == migrations);
    // Relative to the largest, or all might be nothing.
    let most = classes.clone().map(&log).fold(f64::NEG_INFINITY, f64::max);
    let (mut count, mut sum) = (0.0, 0.0);
    for class in classes {
        count += 1.0;
        sum += (log(class) - most).exp();
    }
    most + f64::ln(sum / count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::Calibration;

    /// Where only the first channel means anything.
    fn weights() -> Weights {
        let mut weights = Calibration::blank().hearing;
        for class in Class::ALL {
            let p: f64 = if class == Class::Migration { 0.8 } else { 0.1 };
            weights.full[class.index()][0][1] = p.ln();
            weights.full[class.index()][0][0] = (1.0 - p).ln();
        }
        weights
    }

    #[test]
    fn a_ratio_is_that_of_the_probabilities() {
        let mut symbols = Symbols::default();
        symbols[0] = Some(1);
        let weighed = weigh(&weights(), Stage::Full, &symbols);
        assert_eq!(weighed.class, Class::Migration);
        assert!((weighed.score - 8.0_f64.ln()).abs() < 1e-9);
        assert!((weighed.ratios[0] - 8.0_f64.ln()).abs() < 1e-9);
        assert!((weighed.share - 0.8 / (0.8 + 0.9)).abs() < 1e-9);
    }

    #[test]
    fn what_no_channel_could_see_weighs_nothing() {
        let weighed = weigh(&weights(), Stage::Full, &Symbols::default());
        assert!(weighed.score.abs() < 1e-9);
        assert!(weighed.ratios.iter().all(|ratio| ratio.abs() < 1e-9));
    }
}
