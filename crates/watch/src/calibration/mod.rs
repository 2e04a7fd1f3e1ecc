//! What the detector has learnt from traces: thresholds for rates of false alarms, and how probable each kind of evidence
//! is under each class.
//!
//! The table in `table.rs` is written by `cargo xtask trials calibrate`, from synthetic traces and recorded sessions; what
//! that means is in `docs/watch.md`.

#[allow(
    clippy::approx_constant,
    reason = "measured numbers are like others by chance"
)]
mod table;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::finding::{Channel, Class, Stage};

/// Most symbols of a channel.
pub const SYMBOLS_MAX: usize = 6;
/// Points of a curve.
pub const CURVE_POINTS: usize = 10;

/// Logarithm of the probability of each symbol, for each class and channel.
pub type Table = [[[f64; SYMBOLS_MAX]; Channel::ALL.len()]; Class::ALL.len()];
/// Scores and the share of migrations among what has them, both never falling.
pub type Curve = [(f64, f64); CURVE_POINTS];

/// Values that a statistic exceeds that often while nothing happens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// 24 times in a VM-day.
    pub weak: f64,
    /// Once in a VM-day.
    pub clear: f64,
    /// Once in ten VM-days.
    pub strong: f64,
}

/// How what was seen is weighed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weights {
    /// What is probable in [`Stage::Early`].
    pub early: Table,
    /// What is probable in [`Stage::Full`].
    pub full: Table,
    /// From scores in [`Stage::Early`] to probabilities.
    pub early_curve: Curve,
    /// From scores in [`Stage::Full`] to probabilities.
    pub full_curve: Curve,
    /// Least score of an alarm.
    pub alarm_score: f64,
}

/// All that was learnt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Of growing round trips.
    pub rise: Thresholds,
    /// Of runs of lost probes.
    pub silence: Thresholds,
    /// Of jumping clocks.
    pub clock: Thresholds,
    /// Where somebody listens for announcements: that there are none says something.
    pub hearing: Weights,
    /// Where nobody does.
    pub deaf: Weights,
    /// VM-days of quiet traces that thresholds are from.
    pub quiet_vm_days: f64,
}

/// Why a calibration can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CalibrationError {
    /// A curve that falls, or leads beyond 0 and 1.
    #[error("a curve of a calibration falls, or is no probability")]
    Curve,
    /// A number that is none.
    #[error("a calibration holds something that is no finite number")]
    NotFinite,
    /// A table whose entries are no logarithms of probabilities.
    #[error("a table of a calibration holds a probability above one")]
    Table,
    /// Thresholds that fall.
    #[error("thresholds of a calibration fall with the rate of false alarms")]
    Thresholds,
}

impl Calibration {
    /// What was learnt from synthetic traces and recorded sessions.
    #[must_use]
    pub fn built_in() -> Self {
        table::BUILT_IN
    }

    /// One that knows nothing: nothing is ever noticed by it. Where calibrating begins.
    #[must_use]
    pub fn blank() -> Self {
        let never = Thresholds {
            weak: f64::MAX,
            clear: f64::MAX,
            strong: f64::MAX,
        };
        let table = [[[0.0; SYMBOLS_MAX]; Channel::ALL.len()]; Class::ALL.len()];
        let mut curve = [(0.0, 0.5); CURVE_POINTS];
        for (at, point) in curve.iter_mut().enumerate() {
            point.0 = at as f64;
        }
        let weights = Weights {
            early: table,
            full: table,
            early_curve: curve,
            full_curve: curve,
            alarm_score: f64::MAX,
        };
        Self {
            rise: never,
            silence: never,
            clock: never,
            hearing: weights.clone(),
            deaf: weights,
            quiet_vm_days: 0.0,
        }
    }

    /// Refuses one that was not made by calibrating.
    ///
    /// # Errors
    /// For the first rule that it breaks.
    pub fn check(&self) -> Result<(), CalibrationError> {
        for of in [&self.rise, &self.silence, &self.clock] {
            if ![of.weak, of.clear, of.strong]
                .iter()
                .all(|value| value.is_finite())
            {
                return Err(CalibrationError::NotFinite);
            }
            if !(of.weak <= of.clear && of.clear <= of.strong) {
                return Err(CalibrationError::Thresholds);
            }
        }
        if !self.quiet_vm_days.is_finite() {
            return Err(CalibrationError::NotFinite);
        }
        self.hearing.check()?;
        self.deaf.check()
    }

    /// What is weighed with, by whether announcements can be heard.
    pub(crate) fn weights(&self, hears: bool) -> &Weights {
        if hears { &self.hearing } else { &self.deaf }
    }

    /// Least score of an alarm, where announcements can be heard or not.
    #[must_use]
    pub fn alarm_score(&self, hears: bool) -> f64 {
        self.weights(hears).alarm_score
    }

    /// Sets the least score of an alarm: fewer false ones for fewer true ones.
    pub fn set_alarm_score(&mut self, hears: bool, score: f64) {
        self.weights_mut(hears).alarm_score = score;
    }

    pub(crate) fn weights_mut(&mut self, hears: bool) -> &mut Weights {
        if hears {
            &mut self.hearing
        } else {
            &mut self.deaf
        }
    }
}

impl Weights {
    fn check(&self) -> Result<(), CalibrationError> {
        for value in [&self.early, &self.full]
            .into_iter()
            .flatten()
            .flatten()
            .flatten()
        {
            if !value.is_finite() {
                return Err(CalibrationError::NotFinite);
            }
            if *value > 0.0 {
                return Err(CalibrationError::Table);
            }
        }
        for curve in [&self.early_curve, &self.full_curve] {
            let is_good =
                |point: &(f64, f64)| point.0.is_finite() && (0.0..=1.0).contains(&point.1);
            let rises = |w: &[(f64, f64)]| w[0].0 <= w[1].0 && w[0].1 <= w[1].1;
            if !curve.iter().all(is_good) || !curve.windows(2).all(rises) {
                return Err(CalibrationError::Curve);
            }
        }
        if !self.alarm_score.is_finite() {
            return Err(CalibrationError::NotFinite);
        }
        Ok(())
    }

    pub(crate) fn table(&self, stage: Stage) -> &Table {
        match stage {
            Stage::Early => &self.early,
            Stage::Full => &self.full,
        }
    }

    /// The probability that belongs to a score.
    pub(crate) fn probability(&self, stage: Stage, score: f64) -> f64 {
        let curve = match stage {
            Stage::Early => &self.early_curve,
            Stage::Full => &self.full_curve,
        };
        let above = curve.partition_point(|point| point.0 <= score);
        if above == 0 {
            return curve[0].1;
        }
        let Some(right) = curve.get(above) else {
            return curve[CURVE_POINTS - 1].1;
        };
        let left = curve[above - 1];
        let share = (score - left.0) / (right.0 - left.0);
        left.1 + share * (right.1 - left.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_in_is_good() {
        assert_eq!(Calibration::built_in().check(), Ok(()));
        assert_eq!(Calibration::blank().check(), Ok(()));
    }

    #[test]
    fn what_is_no_calibration_is_refused() {
        let broken = |change: fn(&mut Calibration)| {
            let mut calibration = Calibration::built_in();
            change(&mut calibration);
            calibration.check().unwrap_err()
        };
        assert_eq!(
            broken(|c| c.rise.clear = f64::NAN),
            CalibrationError::NotFinite
        );
        assert_eq!(
            broken(|c| c.rise.clear = c.rise.strong + 1.0),
            CalibrationError::Thresholds
        );
        assert_eq!(
            broken(|c| c.deaf.full[1][2][3] = 0.5),
            CalibrationError::Table
        );
        assert_eq!(
            broken(|c| c.hearing.early_curve[3].1 = 1.5),
            CalibrationError::Curve
        );
        assert_eq!(
            broken(|c| c.deaf.full_curve[9].0 = -1e9),
            CalibrationError::Curve
        );
        assert_eq!(
            broken(|c| c.hearing.alarm_score = f64::INFINITY),
            CalibrationError::NotFinite
        );
    }

    #[test]
    fn probabilities_follow_the_curve_and_never_leave_it() {
        let mut weights = Calibration::blank().deaf;
        for (at, point) in weights.full_curve.iter_mut().enumerate() {
            *point = (at as f64, at as f64 / 10.0);
        }
        let at = |score| weights.probability(Stage::Full, score);
        assert!((at(2.5) - 0.25).abs() < 1e-9);
        assert!((at(-1e300) - 0.0).abs() < 1e-9 && (at(1e300) - 0.9).abs() < 1e-9);
        assert!(at(f64::NAN).is_finite());
    }
}
