//! How long accesses to missing pages waited, for people.

use palanquin_api::control::FaultWait;

/// What a histogram of waits says; absent where nothing waited.
pub(super) fn fault_wait(log2_us: &[u64]) -> Option<FaultWait> {
    let count: u64 = log2_us.iter().sum();
    // Upper bound of the entry that the share of all waits falls into.
    let below = |share: f64| {
        let mut left = (count as f64 * share).ceil().max(1.0) as u64;
        let entry = log2_us.iter().position(|&waits| {
            left = left.saturating_sub(waits);
            left == 0
        });
        1_u64 << entry.unwrap_or(0).min(63)
    };
    (count > 0).then(|| FaultWait {
        count,
        p50_below_us: below(0.5),
        p99_below_us: below(0.99),
        max_below_us: below(1.0),
        log2_us: log2_us.to_vec(),
    })
}
