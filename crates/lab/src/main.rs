//! `palanquin-lab`: the demo, the experiment, the attacks, their report, and the removal of what a killed run left behind.
#![forbid(unsafe_code)]

mod attacks;
mod demo;
mod experiment;
mod report;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use palanquin_lab::{rig, wait};

/// Real hosts in network namespaces of this machine
#[derive(Parser)]
#[command(name = "palanquin-lab")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Move a running Linux guest to another host and back while an observer records the wire
    Demo(demo::Options),
    /// Open a letter in a guest, move it there and back over every transport, and look for the letter on the wire
    Experiment(experiment::Options),
    /// Try every attack on every transport
    Attack(attacks::Options),
    /// Write the report of what the experiment and the attacks have found
    Report(report::Options),
    /// Remove what killed runs left behind
    CleanRig,
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: {problem}");
            for cause in problem.chain().skip(1) {
                eprintln!("  cause: {cause}");
            }
            ExitCode::FAILURE
        }
    }
}

/// How this run is repeated.
fn command() -> String {
    let words: Vec<String> = std::env::args().skip(1).collect();
    format!("cargo xtask lab {}", words.join(" "))
}

fn run(task: Task) -> Result<()> {
    // What is interrupted still takes down what it built.
    wait::catch_signals()?;
    match task {
        Task::Demo(options) => demo::run(&options),
        Task::Report(options) => report::run(&options),
        Task::Experiment(options) => experiment::run(&options, &command()),
        Task::Attack(options) => attacks::run(&options, &command()),
        Task::CleanRig => {
            let removed = rig::clean()?;
            for name in &removed {
                println!("removed {name}");
            }
            if removed.is_empty() {
                println!("nothing was left behind");
            }
            Ok(())
        }
    }
}
