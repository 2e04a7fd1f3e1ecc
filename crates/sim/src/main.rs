//! `palanquin-sim`: plays many seeds and says what happened.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use palanquin_sim::{Outcome, simulate};

/// Simulate migrations with faults in virtual time
#[derive(Parser)]
struct Arguments {
    /// Number of seeds
    #[arg(long, default_value_t = 5000)]
    seeds: u64,
    /// First seed
    #[arg(long, default_value_t = 0)]
    start: u64,
    /// Play one seed and print every event
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(seed) = arguments.seed {
        return match simulate(seed, None, true) {
            Ok(report) => {
                println!(
                    "{}\nseed {seed}: {:?}",
                    report.trace.join("\n"),
                    report.outcome
                );
                ExitCode::SUCCESS
            }
            Err(law) => {
                println!("{law}");
                ExitCode::FAILURE
            }
        };
    }
    let began = Instant::now();
    let outcomes = [
        Outcome::Completed,
        Outcome::TurnedBack,
        Outcome::TakenBack,
        Outcome::VmKilled,
    ];
    let mut counts = [0_u64; 4];
    let (mut doubted, mut crashes) = (0_u64, 0_u64);
    for seed in arguments.start..arguments.start.saturating_add(arguments.seeds) {
        match simulate(seed, None, false) {
            Ok(report) => {
                for (count, outcome) in counts.iter_mut().zip(outcomes) {
                    *count += u64::from(report.outcome == outcome);
                }
                doubted += u64::from(report.doubted);
                crashes += u64::from(report.crashes);
            }
            Err(law) => {
                println!("{law}\nreplay with: palanquin-sim --seed {seed}");
                return ExitCode::FAILURE;
            }
        }
    }
    let rate = arguments.seeds as f64 / began.elapsed().as_secs_f64();
    let [completed, turned_back, taken_back, killed] = counts;
    println!(
        "{} seeds at {rate:.0} a second: {completed} completed, {turned_back} turned back, {taken_back} taken back \
         after the commit, {killed} killed by the simulation; {doubted} in doubt on the way, {crashes} agents crashed",
        arguments.seeds
    );
    ExitCode::SUCCESS
}
