//! The laws hold over many seeds, and every known way of breaking them is noticed.
#![forbid(unsafe_code)]

use palanquin_sim::mutation::ALL;
use palanquin_sim::{Outcome, simulate};

#[test]
fn one_owner_over_three_thousand_seeds() {
    let mut outcomes = Vec::new();
    let (mut doubted, mut noticed, mut rejoined, mut refused) = (0, 0, 0, 0);
    for seed in 0..3000 {
        match simulate(seed, None, false) {
            Ok(report) => {
                outcomes.push(report.outcome);
                doubted += u32::from(report.doubted);
                noticed += report.noticed;
                rejoined += report.rejoined;
                refused += u32::from(report.refused);
            }
            Err(law) => panic!("{law}\nreplay with: cargo run -p palanquin-sim -- --seed {seed}"),
        }
    }
    for outcome in [
        Outcome::Completed,
        Outcome::TurnedBack,
        Outcome::TakenBack,
        Outcome::VmKilled,
        Outcome::Lied,
    ] {
        assert!(outcomes.contains(&outcome), "{outcome:?} was never reached");
    }
    assert!(doubted > 0, "no seed was ever in doubt");
    assert!(noticed > 0, "nobody on the path was ever noticed");
    assert!(rejoined > 0, "no connection was ever made again");
    assert!(refused > 0, "no gate ever refused");
}

#[test]
fn the_same_seed_gives_the_same_events() {
    let trace = |seed| simulate(seed, None, true).map(|report| report.trace);
    assert_eq!(trace(7), trace(7));
}

#[test]
fn every_mutation_is_noticed() {
    let missed: Vec<_> = ALL
        .into_iter()
        .filter(|&mutation| (0..100_000).all(|seed| simulate(seed, Some(mutation), false).is_ok()))
        .collect();
    assert_eq!(missed, [], "not noticed in 100 000 seeds");
}
