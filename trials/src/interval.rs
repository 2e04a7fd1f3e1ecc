//! How certain shares and rates are that were counted.

/// Quantile of the normal distribution for 95 % on both sides.
const Z: f64 = 1.959_964;

/// Wilson's interval of 95 % for a share; 0 to 1 if nothing was counted.
#[must_use]
pub fn wilson(hits: usize, of: usize) -> (f64, f64) {
    if of == 0 {
        return (0.0, 1.0);
    }
    let (n, p) = (of as f64, hits as f64 / of as f64);
    let scale = 1.0 + Z * Z / n;
    let middle = (p + Z * Z / (2.0 * n)) / scale;
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt() / scale;
    ((middle - half).max(0.0), (middle + half).min(1.0))
}

/// Largest rate that so few events in that time leave possible with 95 %: where the probability of at most so many is
/// 5 %. By halving.
#[must_use]
pub fn rate_at_most(events: usize, time: f64) -> f64 {
    let at_most = |mean: f64| {
        let (mut term, mut sum) = ((-mean).exp(), 0.0);
        for count in 0..=events {
            if count > 0 {
                term *= mean / count as f64;
            }
            sum += term;
        }
        sum
    };
    let (mut low, mut high) = (0.0, 10.0 + 3.0 * events as f64);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if at_most(middle) > 0.05 {
            low = middle;
        } else {
            high = middle;
        }
    }
    high / time
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_intervals_are_met() {
        let (low, high) = wilson(9, 10);
        assert!((low - 0.5958).abs() < 1e-3 && (high - 0.9821).abs() < 1e-3);
        assert_eq!(wilson(0, 0), (0.0, 1.0));
        let (low, high) = wilson(20, 20);
        assert!((low - 0.8389).abs() < 1e-3 && high > 0.9999);
    }

    #[test]
    fn no_event_leaves_a_rate_of_three() {
        assert!((rate_at_most(0, 1.0) - 2.9957).abs() < 1e-3);
        assert!((rate_at_most(1, 2.0) - 4.7439 / 2.0).abs() < 1e-3);
    }
}
