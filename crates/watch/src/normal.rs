//! The normal distribution, as far as scores need it.

/// Probability of less than `x`, to 7.5e-8 (Abramowitz and Stegun, 26.2.17).
pub(crate) fn cdf(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
    let density = (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt();
    let weights = [
        0.319_381_530,
        -0.356_563_782,
        1.781_477_937,
        -1.821_255_978,
        1.330_274_429,
    ];
    let tail = density * weights.iter().rev().fold(0.0, |sum, w| (sum + w) * t);
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// The value below which lies the share `p`, by Acklam's rational approximation (relative error 1.2e-9); shares
/// outside 1e-9 to 1 - 1e-9 are taken for these.
pub(crate) fn quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -39.696_830_286_653_76,
        220.946_098_424_520_5,
        -275.928_510_446_968_7,
        138.357_751_867_269,
        -30.664_798_066_147_16,
        2.506_628_277_459_239,
    ];
    const B: [f64; 6] = [
        -54.476_098_798_224_06,
        161.585_836_858_040_9,
        -155.698_979_859_886_6,
        66.801_311_887_719_72,
        -13.280_681_552_885_72,
        1.0,
    ];
    const C: [f64; 6] = [
        -0.007_784_894_002_430_293,
        -0.322_396_458_041_136_5,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 5] = [
        0.007_784_695_709_041_462,
        0.322_467_129_070_039_8,
        2.445_134_137_142_996,
        3.754_408_661_907_416,
        1.0,
    ];
    const LOW: f64 = 0.024_25;
    let polynomial = |weights: &[f64], x: f64| weights.iter().fold(0.0, |sum, w| sum * x + w);
    let p = if p.is_nan() {
        0.5
    } else {
        p.clamp(1e-9, 1.0 - 1e-9)
    };
    if p < LOW {
        let q = (-2.0 * p.ln()).sqrt();
        polynomial(&C, q) / polynomial(&D, q)
    } else if p > 1.0 - LOW {
        let q = (-2.0 * (1.0 - p).ln()).sqrt();
        -polynomial(&C, q) / polynomial(&D, q)
    } else {
        let q = p - 0.5;
        q * polynomial(&A, q * q) / polynomial(&B, q * q)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_are_met() {
        for (p, x) in [(0.5, 0.0), (0.975, 1.959_964), (0.001, -3.090_232)] {
            assert!((quantile(p) - x).abs() < 1e-5, "{p}");
            assert!((cdf(x) - p).abs() < 1e-6, "{p}");
        }
    }

    #[test]
    fn one_is_the_inverse_of_the_other() {
        for step in 1..1000 {
            let p = f64::from(step) / 1000.0;
            assert!((cdf(quantile(p)) - p).abs() < 1e-6, "{p}");
        }
        assert!(quantile(f64::NAN).abs() < 1e-9 && quantile(0.0).is_finite());
    }
}
