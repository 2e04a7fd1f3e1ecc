//! `palanquin-trials`: records labelled sessions, and reports what the detector makes of them.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use palanquin_lab::wait;
use palanquin_trials::corpus::{self, Part, Session};
use palanquin_trials::judge::recorded;
use palanquin_trials::record::{Wish, name, record};
use palanquin_trials::report::{cross_validated, report};
use palanquin_watch::Calibration;
use palanquin_watch::calibrate::{Effort, Recorded, Synthetic, source};

/// Labelled trials of the detector on real migrations
#[derive(Parser)]
#[command(name = "palanquin-trials")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Record sessions: real migrations and what is confounded with them (needs root). What is there already is kept
    Record(RecordOptions),
    /// Make the built-in calibration anew, from synthetic traces and the sessions that are for it; then build again
    Calibrate(CalibrateOptions),
    /// Say what the detector makes of each session for calibration, calibrated with the others: to tune by
    CrossValidate(CrossOptions),
    /// Say what the detector makes of recorded sessions
    Report(ReportOptions),
    /// List sessions and events
    List {
        /// Directory with sessions
        #[arg(long, default_value = "trials/corpus")]
        dir: PathBuf,
    },
}

#[derive(Args)]
struct RecordOptions {
    /// Number of the first session; even ones are for calibration, odd ones are held out
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// How many sessions
    #[arg(long, default_value_t = 2)]
    sessions: u64,
    /// Distance of their numbers: 2 for sessions of the same part
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
    /// Events of each session
    #[arg(long, default_value_t = 14)]
    events: usize,
    /// Where they are written
    #[arg(long, default_value = "trials/corpus")]
    dir: PathBuf,
}

#[derive(Args)]
struct CalibrateOptions {
    /// Directory with sessions
    #[arg(long, default_value = "trials/corpus")]
    dir: PathBuf,
    /// Synthetic quiet VM-days for each step
    #[arg(long, default_value_t = 60)]
    vm_days: u64,
    /// Synthetic trials of each class for each step
    #[arg(long, default_value_t = 200)]
    trials: u64,
    /// Use no recorded session
    #[arg(long)]
    synthetic: bool,
    /// Write it as JSON there too, for `report --with`
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where the calibration is written
    #[arg(long, default_value = "crates/watch/src/calibration/table.rs")]
    out: PathBuf,
}

#[derive(Args)]
struct CrossOptions {
    /// Directory with sessions
    #[arg(long, default_value = "trials/corpus")]
    dir: PathBuf,
    /// Synthetic quiet VM-days for each step
    #[arg(long, default_value_t = 20)]
    vm_days: u64,
    /// Synthetic trials of each class for each step
    #[arg(long, default_value_t = 100)]
    trials: u64,
    /// As if nobody listened for announcements on the guests' network
    #[arg(long)]
    deaf: bool,
}

#[derive(Args)]
struct ReportOptions {
    /// Directory with sessions
    #[arg(long, default_value = "trials/corpus")]
    dir: PathBuf,
    /// Judge those for calibration instead of those that are held out
    #[arg(long)]
    calibration: bool,
    /// Synthetic quiet VM-days, by which scores have rates of false alarms; 0 for none
    #[arg(long, default_value_t = 200)]
    quiet_days: u64,
    /// As if nobody listened for announcements on the guests' network
    #[arg(long)]
    deaf: bool,
    /// A calibration (JSON) instead of the built-in one
    #[arg(long, value_name = "FILE")]
    with: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Record(options) => {
            // What is interrupted still takes down what it built.
            wait::catch_signals()?;
            record_all(&options)
        }
        Task::Calibrate(options) => make_calibration(&options),
        Task::CrossValidate(options) => cross_validate(&options),
        Task::Report(options) => {
            let sessions = read(&options.dir)?;
            let part = if options.calibration {
                Part::Calibration
            } else {
                Part::HeldOut
            };
            let calibration = match &options.with {
                Some(file) => load(file)?,
                None => Calibration::built_in(),
            };
            let report = report(
                &sessions,
                part,
                &calibration,
                !options.deaf,
                options.quiet_days,
            );
            if options.json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                print!("{}", report.to_markdown());
            }
            Ok(())
        }
        Task::List { dir } => {
            for session in read(&dir)? {
                list(&session);
            }
            Ok(())
        }
    }
}

fn read(dir: &Path) -> Result<Vec<Session>> {
    let sessions = corpus::read_all(dir)?;
    if sessions.is_empty() {
        bail!("no session in {}: record some", dir.display());
    }
    Ok(sessions)
}

fn list(session: &Session) {
    let labels = &session.labels;
    println!(
        "{} ({:?}): {:.0} s, {} readings, link {:?} Mbit/s, {} stalls",
        labels.session,
        labels.part,
        labels.length_s,
        session.seen.len(),
        labels.link_mbit_s,
        labels.stalls_s.len()
    );
    for event in &labels.events {
        let blackout = event.blackout_s.map_or("-".to_owned(), |(from, until)| {
            format!("{:.0} ms at {from:.2} s", (until - from) * 1e3)
        });
        println!(
            "  {:7.1} to {:7.1} s {} {:17} blackout {blackout}: {} {}",
            event.from_s,
            event.until_s,
            event.target,
            event.class.name(),
            event.what,
            event.spoilt.as_deref().unwrap_or_default()
        );
    }
}

fn load(file: &Path) -> Result<Calibration> {
    let load = || -> Result<Calibration> {
        let calibration: Calibration = serde_json::from_str(&std::fs::read_to_string(file)?)?;
        calibration.check()?;
        Ok(calibration)
    };
    load().with_context(|| file.display().to_string())
}

/// What it follows from.
const CALIBRATION_SEED: u64 = 2026;

fn make_calibration(options: &CalibrateOptions) -> Result<()> {
    let mut sessions = Vec::new();
    if !options.synthetic {
        let all = read(&options.dir)?;
        let own = all.iter().filter(|of| of.labels.part == Part::Calibration);
        sessions.extend(own.map(recorded));
    }
    let effort = Effort {
        vm_days: options.vm_days,
        trials: options.trials,
        seed: CALIBRATION_SEED,
    };
    let began = Instant::now();
    let tell = |what: &str| eprintln!("{:4} s {what}", began.elapsed().as_secs());
    let made = Synthetic::new(effort, tell).calibrate(&sessions, tell);
    if let Some(file) = &options.json {
        std::fs::write(file, serde_json::to_string_pretty(&made)?)?;
    }
    let text = source(&made, &effort, sessions.len());
    std::fs::write(&options.out, text)
        .with_context(|| format!("can't write {}", options.out.display()))?;
    println!("wrote {}", options.out.display());
    Ok(())
}

fn cross_validate(options: &CrossOptions) -> Result<()> {
    let sessions = read(&options.dir)?;
    let effort = Effort {
        vm_days: options.vm_days,
        trials: options.trials,
        seed: CALIBRATION_SEED,
    };
    let began = Instant::now();
    let tell = |what: &str| eprintln!("{:4} s {what}", began.elapsed().as_secs());
    let synthetic = Synthetic::new(effort, tell);
    let own = |of: &&Session| of.labels.part == Part::Calibration;
    let report = cross_validated(&sessions, !options.deaf, |left_out| {
        let others = sessions.iter().filter(own).filter(|of| *of != left_out);
        let others: Vec<Recorded> = others.map(recorded).collect();
        synthetic.calibrate(&others, tell)
    });
    print!("{}", report.to_markdown());
    Ok(())
}

fn record_all(options: &RecordOptions) -> Result<()> {
    let began = Instant::now();
    let mut failed = Vec::new();
    for at in 0..options.sessions {
        let seed = options.first + at * options.every;
        let name = name(seed);
        if options.dir.join(format!("{name}.json")).exists() {
            println!("{name}: is there");
            continue;
        }
        let wish = Wish {
            seed,
            events: options.events,
        };
        let mut tell = |what: &str| {
            println!("{:5} s {name}: {what}", began.elapsed().as_secs());
        };
        let recorded = record(wish, &options.dir, &mut tell);
        if wait::is_interrupted() {
            return recorded.context("interrupted");
        }
        if let Err(why) = recorded {
            // A session that fails is not worth those behind it.
            eprintln!("{name}: {why:#}");
            failed.push(name);
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("not recorded: {}", failed.join(", "))
    }
}
