//! What the detectors for a guest's inside, and for looks and speed from outside, make of recordings in which nothing
//! happened: the largest statistics and factors, which thresholds must exceed, and what would be found. Files are what
//! `palanquin watch inside --json --samples` printed, or with the ending `.csv` what `palanquin watch record` wrote.
//!
//! `cargo run --release -p palanquin-watch --example inside_quiet -- FILE...`
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;

use palanquin_watch::inside::{Finding, Inside, Sample, Statistics};
use palanquin_watch::outside::Outside;
use palanquin_watch::{Reading, trace};
use serde_json::Value;

/// Values that a new one is compared with, those just before it that are not, and new ones.
const WINDOWS: [usize; 3] = [300, 15, 5];
/// The share of values that lie below each column, but for the last: the largest.
const SHARES: [f64; 4] = [0.5, 0.9, 0.99, 0.999];

fn main() {
    for path in std::env::args().skip(1) {
        let text = match fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => {
                eprintln!("{path}: {error}");
                continue;
            }
        };
        if path.ends_with(".csv") {
            outside(&path, &text);
            continue;
        }
        let samples: Vec<Sample> = text
            .lines()
            .filter_map(|line| line.find('{').map(|at| &line[at..]))
            .filter_map(|line| serde_json::from_str::<Value>(line.trim_end()).ok())
            .filter(|value| value["event"] == "sample")
            .filter_map(|mut value| serde_json::from_value(value["sample"].take()).ok())
            .collect();
        report(&path, &samples);
    }
}

fn report(path: &str, samples: &[Sample]) {
    let mut inside = Inside::new();
    let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut episodes: BTreeMap<u64, Finding> = BTreeMap::new();
    for sample in samples {
        match inside.take(sample) {
            Ok(findings) => episodes.extend(findings.into_iter().map(|of| (of.episode, of))),
            Err(error) => println!("{error}"),
        }
        let Statistics {
            rtc,
            tsc,
            neighbours,
            benchmark,
            delay,
            writes,
        } = inside.statistics();
        for (name, value) in [
            ("hardware clock", rtc),
            ("processor's counter", tsc),
            ("neighbours' clocks", neighbours),
            ("benchmark", benchmark),
            ("delay", delay),
            ("first write", writes),
        ] {
            values.entry(name).or_default().push(value);
        }
    }
    let span = |of: &Sample| of.clocks.raw_ns as f64 / 1e9;
    let long_s = samples.first().zip(samples.last());
    let long_s = long_s.map_or(0.0, |(first, last)| span(last) - span(first));
    println!("{path}: {} samples in {long_s:.0} s", samples.len());
    for (name, values) in values {
        row(name, values);
    }
    for (name, values) in ratios(samples) {
        row(&format!("{name}, factor"), factors(&values));
    }
    for finding in episodes.values() {
        let texts: Vec<&str> = finding.evidence.iter().map(|of| &of.text[..]).collect();
        println!(
            "  found: {:?} {:?}: {texts:?}",
            finding.level, finding.class
        );
    }
}

/// What benchmark and neighbours are judged by.
fn ratios(samples: &[Sample]) -> BTreeMap<String, Vec<f64>> {
    let mut all: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for sample in samples {
        let speeds = sample.speeds.unwrap_or_default();
        for (name, ns) in [
            ("first cache", speeds.first_cache_ns),
            ("second cache", speeds.second_cache_ns),
            ("memory", speeds.memory_ns),
            ("system call", speeds.syscall_ns),
            ("cpuid", speeds.cpuid_ns),
        ] {
            if let Some((ns, alu_ns)) = ns.zip(speeds.alu_ns) {
                all.entry(name.to_owned()).or_default().push(ns / alu_ns);
            }
        }
        for neighbour in &sample.neighbours {
            let name = format!("neighbour {}", neighbour.name);
            all.entry(name).or_default().extend(neighbour.rtt_ms);
        }
    }
    all
}

/// By how many times the middle of the last few values was another than that of those before, at each value.
fn factors(values: &[f64]) -> Vec<f64> {
    let [window, guard, recent] = WINDOWS;
    let middle = |values: &[f64]| {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    (window / 10 + guard..=values.len())
        .map(|end| {
            let before = end.saturating_sub(window + guard)..end - guard;
            let times = middle(&values[end - recent..end]) / middle(&values[before]);
            times.max(1.0 / times)
        })
        .collect()
}

fn row(name: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    print!("  {name:<22}");
    let at = |share: f64| values.get(((values.len().max(1) - 1) as f64 * share) as usize);
    for share in SHARES {
        print!(" {share:>6}: {:>7.2}", at(share).unwrap_or(&f64::NAN));
    }
    println!("  largest: {:.2}", at(1.0).unwrap_or(&f64::NAN));
}

fn outside(path: &str, text: &str) {
    let mut outside = Outside::default();
    let (mut statistics, mut held, mut signs) = (Vec::new(), Vec::new(), Vec::new());
    for line in text.lines() {
        let Ok(Some(entry)) = trace::parse(line.as_bytes()) else {
            continue;
        };
        signs.extend(outside.read(entry.reading).map(|sign| sign.text));
        if let Reading::NtpHeld { ms } = entry.reading {
            statistics.push(outside.service.statistic());
            held.push(ms);
        }
    }
    println!("{path}: {} answers", held.len());
    row("service", statistics);
    row("service, factor", factors(&held));
    println!("  found: {signs:?}");
}
