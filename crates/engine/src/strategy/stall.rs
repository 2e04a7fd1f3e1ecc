//! Whether rounds still help.

/// Boundaries that are compared.
const WINDOW: usize = 3;
/// What counts as less: a smaller step is noise.
const STEP: f64 = 0.95;
/// What counts as being at the minimum.
const NEAR: f64 = 1.1;

/// What was left at the boundaries so far.
///
/// A migration has stalled when the last rounds left no less behind than the least that was left before them. Looking at
/// boundaries only, and at the least of several, keeps one burst of writes from deciding.
#[derive(Clone, Debug, Default, Hash)]
pub(super) struct Stall {
    left: Vec<u64>,
}

impl Stall {
    pub(super) fn round(&mut self, left_bytes: u64) {
        self.left.push(left_bytes);
    }

    /// Begins anew, because something was changed.
    pub(super) fn forget(&mut self) {
        let last = self.left.pop();
        self.left.clear();
        self.left.extend(last);
    }

    pub(super) fn stalled(&self) -> bool {
        let Some(split) = self.left.len().checked_sub(WINDOW).filter(|&n| n > 0) else {
            return false;
        };
        let (before, recent) = self.left.split_at(split);
        let least = |values: &[u64]| values.iter().min().copied().unwrap_or(0) as f64;
        least(recent) >= least(before) * STEP
    }

    /// Whether now is as good a moment as any of the last ones.
    pub(super) fn at_minimum(&self) -> bool {
        let recent = self.left.iter().rev().take(2 * WINDOW);
        match (self.left.last(), recent.min()) {
            (Some(&last), Some(&least)) => last as f64 <= least as f64 * NEAR,
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(left: &[u64]) -> Stall {
        let mut stall = Stall::default();
        left.iter().for_each(|&left| stall.round(left));
        stall
    }

    #[test]
    fn rounds_that_shrink_have_not_stalled() {
        assert!(!after(&[1000]).stalled());
        assert!(!after(&[1000, 800, 600, 400, 300]).stalled());
    }

    #[test]
    fn rounds_that_stay_the_same_have_stalled() {
        assert!(after(&[1000, 300, 310, 290, 305]).stalled());
    }

    #[test]
    fn one_burst_does_not_decide() {
        assert!(!after(&[1000, 500, 900, 300, 250]).stalled());
    }

    #[test]
    fn a_change_begins_anew() {
        let mut stall = after(&[300, 300, 300, 300]);
        assert!(stall.stalled());
        stall.forget();
        assert!(!stall.stalled());
        stall.round(200);
        assert!(stall.at_minimum());
        stall.round(290);
        assert!(!stall.at_minimum());
    }
}
