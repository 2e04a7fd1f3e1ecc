//! How the built-in calibration does on synthetic trials that it was not made from, beside the heuristics of 2013:
//! `cargo run -p palanquin-watch --example synthetic_trials [TRIALS [VM_DAYS [deaf]]]`. Says nothing about real migrations.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use palanquin_watch::baseline::Baseline;
use palanquin_watch::calibrate::{Watched, quiet_day, watch};
use palanquin_watch::synthetic::{Endpoint, Trial};
use palanquin_watch::{Calibration, Class, Level};

/// Calibrating uses others.
const SEED: u64 = 700_000;

fn main() {
    let hears = std::env::args().nth(3).is_none_or(|text| text != "deaf");
    let mut arguments = std::env::args().skip(1).map_while(|text| text.parse().ok());
    let trials = arguments.next().unwrap_or(100_u64);
    let days = arguments.next().unwrap_or(20_u64);
    let calibration = Calibration::built_in();
    println!(
        "| happens | trials | warned before its end | alarms | delay of the alarm, median | 2013: alarms | named |"
    );
    println!("|---|---|---|---|---|---|---|");
    for class in Class::ALL {
        let watched: Vec<Watched> = (0..trials)
            .map(|at| watch(Trial::new(class, SEED + at), &calibration, hears))
            .collect();
        let old = (0..trials)
            .filter(|at| old_alarm(Trial::new(class, SEED + at)))
            .count();
        println!(
            "| {} | {trials} | {} | {old} | {} |",
            class.name(),
            figures(&watched),
            names(&watched)
        );
    }
    let (mut warnings, mut alarms, mut old) = (0, 0, 0);
    for day in 0..days {
        quiet_day(SEED + day, &calibration, hears, |_, watcher, _| {
            while let Some(finding) = watcher.poll() {
                if finding.ended_s.is_none() {
                    warnings += u64::from(finding.level == Level::Warn);
                    alarms += u64::from(
                        finding.level == Level::Alarm || finding.level == Level::Confirmed,
                    );
                }
            }
        });
        let (mut baseline, mut endpoint) = (Baseline::default(), Endpoint::new(SEED + day));
        for second in 0..86_400 {
            endpoint.quiet(second, |at, reading| {
                old += u64::from(baseline.take(at, reading));
            });
        }
    }
    println!("\nquiet: {days} VM-days, {warnings} warnings, {alarms} alarms; 2013: {old} alarms");
}

fn figures(watched: &[Watched]) -> String {
    let warned = watched
        .iter()
        .filter(|one| {
            let end_s = match one.trial.blackout_us {
                Some((from_us, _)) => from_us as f64 / 1e6,
                None => one.trial.until_s as f64,
            };
            let mut warnings = one
                .findings
                .iter()
                .filter(|finding| finding.level == Level::Warn);
            warnings.any(|finding| finding.time_s <= end_s)
        })
        .count();
    let mut delays: Vec<f64> = watched
        .iter()
        .filter_map(|one| {
            let alarm = one
                .findings
                .iter()
                .find(|finding| finding.level >= Level::Alarm)?;
            let end_us = one
                .trial
                .blackout_us
                .map_or(one.trial.until_s * 1_000_000, |(_, end)| end);
            Some(alarm.time_s - end_us as f64 / 1e6)
        })
        .collect();
    delays.sort_by(f64::total_cmp);
    let median = delays
        .get(delays.len() / 2)
        .map_or("-".to_owned(), |s| format!("{s:.1} s"));
    format!("{warned} | {} | {median}", delays.len())
}

/// What was told last, by how often.
fn names(watched: &[Watched]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for one in watched {
        let name = one.class().map_or("nothing", Class::name);
        *counts.entry(name).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let words: Vec<_> = counts
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    words.join(", ")
}

fn old_alarm(mut trial: Trial) -> bool {
    let mut baseline = Baseline::default();
    let (from_s, mut is_alarmed) = (trial.from_s, false);
    trial.run(
        |target, at, reading| {
            let begins = target == 0 && baseline.take(at, reading);
            is_alarmed |= begins && at >= from_s * 1_000_000;
        },
        |_, _| false,
    );
    is_alarmed
}
