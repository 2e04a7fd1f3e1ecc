//! `palanquin-sim`: plays many seeds and says what happened.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use palanquin_sim::{Outcome, Report, simulate};

/// Simulate migrations with faults in virtual time
#[derive(Parser)]
struct Arguments {
    /// Number of seeds
    #[arg(long, default_value_t = 5000)]
    seeds: u64,
    /// First seed
    #[arg(long, default_value_t = 0)]
    start: u64,
    /// Threads
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    jobs: usize,
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
    let end = arguments.start.saturating_add(arguments.seeds);
    let tally = match play(arguments.start, end, arguments.jobs) {
        Ok(tally) => tally,
        Err((seed, law)) => {
            println!("{law}\nreplay with: cargo xtask sim --seed {seed}");
            return ExitCode::FAILURE;
        }
    };
    let rate = arguments.seeds as f64 / began.elapsed().as_secs_f64();
    let [completed, turned_back, taken_back, killed, lied] = tally.outcomes;
    println!(
        "{} seeds at {rate:.0} a second: {completed} completed, {turned_back} turned back, {taken_back} taken back \
         after the commit, {killed} killed by the simulation, {lied} with a host that lies; {} in doubt on the way, {} \
         refused by a gate, connected again {} times, {} agents crashed, somebody on the path noticed {} times",
        arguments.seeds, tally.doubted, tally.refused, tally.rejoined, tally.crashes, tally.noticed
    );
    ExitCode::SUCCESS
}

/// What happened in many seeds.
#[derive(Default)]
struct Tally {
    outcomes: [u64; 5],
    doubted: u64,
    crashes: u64,
    noticed: u64,
    refused: u64,
    rejoined: u64,
}

impl Tally {
    fn add(&mut self, report: &Report) {
        for (count, outcome) in self.outcomes.iter_mut().zip(OUTCOMES) {
            *count += u64::from(report.outcome == outcome);
        }
        self.doubted += u64::from(report.doubted);
        self.crashes += u64::from(report.crashes);
        self.noticed += u64::from(report.noticed);
        self.refused += u64::from(report.refused);
        self.rejoined += u64::from(report.rejoined);
    }

    fn merge(&mut self, other: &Self) {
        for (count, more) in self.outcomes.iter_mut().zip(other.outcomes) {
            *count += more;
        }
        self.doubted += other.doubted;
        self.crashes += other.crashes;
        self.noticed += other.noticed;
        self.refused += other.refused;
        self.rejoined += other.rejoined;
    }
}

const OUTCOMES: [Outcome; 5] = [
    Outcome::Completed,
    Outcome::TurnedBack,
    Outcome::TakenBack,
    Outcome::VmKilled,
    Outcome::Lied,
];

/// Seeds that a thread takes at once.
const PORTION: u64 = 256;

/// Plays the seeds on several threads. The error is the first seed that breaks a law, whichever thread finds it.
fn play(start: u64, end: u64, jobs: usize) -> Result<Tally, (u64, String)> {
    let next = AtomicU64::new(start);
    let first_broken = AtomicU64::new(u64::MAX);
    let work = || {
        let (mut tally, mut broken) = (Tally::default(), None);
        loop {
            let from = next.fetch_add(PORTION, Ordering::Relaxed);
            if from >= end || from > first_broken.load(Ordering::Relaxed) {
                return (tally, broken);
            }
            for seed in from..end.min(from + PORTION) {
                match simulate(seed, None, false) {
                    Ok(report) => tally.add(&report),
                    Err(law) => {
                        first_broken.fetch_min(seed, Ordering::Relaxed);
                        let earlier = broken.as_ref().is_some_and(|(known, _)| *known < seed);
                        if !earlier {
                            broken = Some((seed, law));
                        }
                        break;
                    }
                }
            }
        }
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut tally = Tally::default();
    let mut broken: Option<(u64, String)> = None;
    for (part, law) in results.into_iter().flatten() {
        tally.merge(&part);
        if let Some((seed, law)) = law
            && broken.as_ref().is_none_or(|(known, _)| seed < *known)
        {
            broken = Some((seed, law));
        }
    }
    broken.map_or(Ok(tally), Err)
}
