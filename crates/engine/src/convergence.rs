//! When to stop copying and switch over.
//!
//! Pre-copy (Clark et al., NSDI 2005) ends when what is left can be moved within the pause that was asked for.
//! The prediction counts the pages written during the last round against the smoothed rate at which pages
//! were moved, and adds what a switchover costs even without pages.

use std::hash::{Hash, Hasher};
use std::time::Duration;

use crate::pages::PAGE_BYTES;
use crate::strategy::Allowed;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Longest pause aimed at. Default 300 ms.
    pub max_downtime: Duration,
    /// Longest time for the whole migration; then it is aborted. Default 10 min.
    pub deadline: Duration,
    /// Most rounds; then it is aborted. Default 200.
    pub max_rounds: u32,
    /// What may be done to the VM when it does not converge. Default nothing.
    pub allowed: Allowed,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_downtime: Duration::from_millis(300),
            deadline: Duration::from_secs(600),
            max_rounds: 200,
            allowed: Allowed::default(),
        }
    }
}

/// Pause that a switchover takes without any page: stopping, saving, loading, committing and resuming.
/// Measured 20 to 30 ms for a VM with a dozen devices.
const OVERHEAD: Duration = Duration::from_millis(30);
/// Pages that move in less than this are not worth another round.
const NEGLIGIBLE: Duration = Duration::from_millis(3);
/// Rounds that must have been counted before "not converging" is concluded from the dirty rate.
const WEIGHT_FULL_BYTES: f64 = 32.0 * 1024.0 * 1024.0;

/// Smoothed rates and the prediction made from them.
#[derive(Clone, Debug, Default)]
pub struct Predictor {
    rate_bytes_per_s: Option<f64>,
    dirty_bytes_per_s: f64,
}

impl Hash for Predictor {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.rate_bytes_per_s.map(f64::to_bits).hash(state);
        self.dirty_bytes_per_s.to_bits().hash(state);
    }
}

impl Predictor {
    /// Counts a round: `bytes` of guest pages moved in `elapsed`, `dirtied` pages written meanwhile.
    /// Short rounds weigh little, because buffers make them look faster than the path is.
    pub fn round(&mut self, bytes: u64, elapsed: Duration, dirtied_pages: u64) {
        let seconds = elapsed.as_secs_f64().max(1e-6);
        self.dirty_bytes_per_s = (dirtied_pages * PAGE_BYTES) as f64 / seconds;
        if bytes == 0 {
            return;
        }
        let sample = bytes as f64 / seconds;
        let weight = (bytes as f64 / WEIGHT_FULL_BYTES).min(1.0) * 0.7;
        self.rate_bytes_per_s = Some(match self.rate_bytes_per_s {
            None => sample,
            Some(rate) => rate + weight * (sample - rate),
        });
    }

    /// Smoothed rate at which guest pages move; 0 before the first round.
    pub fn rate_bytes_per_s(&self) -> u64 {
        self.rate_bytes_per_s.unwrap_or(0.0) as u64
    }

    /// Rate at which the guest wrote pages in the last round.
    pub fn dirty_rate_bytes_per_s(&self) -> u64 {
        self.dirty_bytes_per_s as u64
    }

    /// Time to move that many bytes; `None` before the first round.
    pub fn time_for(&self, bytes: u64) -> Option<Duration> {
        let rate = self.rate_bytes_per_s?;
        Duration::try_from_secs_f64(bytes as f64 / rate.max(1.0)).ok()
    }

    /// Pause that a switchover now would take.
    pub fn predicted_downtime(&self, remaining_bytes: u64) -> Option<Duration> {
        Some(self.time_for(remaining_bytes)? + OVERHEAD)
    }

    /// Whether what is left fits into the pause that was asked for. A pause shorter than the overhead cannot be had:
    /// then the least is what is aimed at.
    pub fn fits(&self, limits: &Limits, remaining_bytes: u64) -> bool {
        // Nothing takes no time, also where no round could be measured because the connection broke in each.
        remaining_bytes == 0
            || self
                .time_for(remaining_bytes)
                .is_some_and(|time| time <= NEGLIGIBLE || time + OVERHEAD <= limits.max_downtime)
    }

    /// Bytes that move within the pause that was asked for; 0 before the first round.
    pub fn pause_bytes(&self, limits: &Limits) -> u64 {
        let pages = limits.max_downtime.saturating_sub(OVERHEAD);
        (self.rate_bytes_per_s.unwrap_or(0.0) * pages.max(NEGLIGIBLE).as_secs_f64()) as u64
    }

    /// Bytes that will probably still move when `remaining_bytes` of this round are left: the rounds that
    /// follow shrink by the ratio of dirty rate to rate.
    pub fn future_bytes(&self, remaining_bytes: u64) -> u64 {
        let rate = self.rate_bytes_per_s.unwrap_or(0.0);
        if rate <= 0.0 {
            return 0;
        }
        let ratio = (self.dirty_bytes_per_s / rate).clamp(0.0, 0.9);
        (remaining_bytes as f64 * ratio / (1.0 - ratio)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_left_fits_when_it_moves_within_the_pause() {
        let mut predictor = Predictor::default();
        let limits = Limits::default();
        assert!(!predictor.fits(&limits, 4096));
        assert!(predictor.fits(&limits, 0));
        predictor.round(1 << 30, SECOND, 100);
        assert!(predictor.fits(&limits, 100 * 4096));
        assert!(!predictor.fits(&limits, 1 << 29));
    }

    #[test]
    fn a_downtime_below_the_overhead_asks_for_the_least_there_is() {
        let mut predictor = Predictor::default();
        predictor.round(1 << 30, SECOND, 10);
        let limits = Limits {
            max_downtime: Duration::from_millis(1),
            ..Limits::default()
        };
        assert!(!predictor.fits(&limits, 100 << 20));
        assert!(predictor.fits(&limits, 1 << 20));
    }

    #[test]
    fn a_short_fast_round_hardly_moves_the_rate() {
        let mut predictor = Predictor::default();
        predictor.round(1 << 30, SECOND, 0);
        let before = predictor.rate_bytes_per_s();
        predictor.round(4096, Duration::from_micros(1), 0);
        let after = predictor.rate_bytes_per_s();
        assert!(after < before + before / 50, "{before} {after}");
    }
}
