//! Development tasks: `cargo xtask`.
#![forbid(unsafe_code)]

mod fuzz;
mod guest;
mod matrix;
mod programs;
mod setup;
mod steps;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use programs::{root, run};

/// Development tasks of Palanquin
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Move a Linux guest there and back between two hosts on this machine, and show what happened
    Demo {
        /// Passed on to the demo
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Everything that must pass: format, lints, rules, licences, tests, simulation, end to end
    Test,
    /// Install what this machine lacks
    Setup,
    /// Build the guest's kernel, RAM disk and payloads
    Guest,
    /// Check the rules that no compiler checks
    Tidy,
    /// Simulate many migrations with faults
    Sim {
        /// Number of seeds
        #[arg(long, default_value_t = 5000)]
        seeds: u64,
        /// Play only this one, and print every event
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Explore every state of a handover within bounds
    Model {
        /// Passed on to the explorer
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Measure side by side
    Bench {
        /// What to measure, `peers`, `strategies` or `trust`, and its options
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        what: Vec<String>,
    },
    /// Try what an attacker would, measure every transport, and write the report
    Lab {
        /// `experiment`, `attack` or `report`, and its options
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        what: Vec<String>,
    },
    /// Watch real migrations from outside and say what the detector makes of them, see `docs/watch.md`
    Trials {
        /// `record`, `calibrate`, `report` or `list`, and its options
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        what: Vec<String>,
    },
    /// Kill and cut at every step of the protocol, and write docs/kill-matrix.md
    Matrix {
        /// Pairs of hosts at work at the same time, for each strategy
        #[arg(long, default_value_t = 2)]
        chains: usize,
        /// Only what the last run did not come to, or what failed in it
        #[arg(long)]
        missing: bool,
        /// Only write the table from what the last run has found
        #[arg(long)]
        table: bool,
    },
    /// Give hostile input to every parser and to the state machines, see `docs/fuzzing.md`
    Fuzz(fuzz::Wish),
    /// Remove what a killed run left behind
    CleanRig,
}

fn main() -> ExitCode {
    match perform(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<()> {
    match task {
        Task::Demo { rest } => {
            setup::require_root(
                "the demo makes network namespaces and follows other processes' memory",
            )?;
            setup::install()?;
            guest::build()?;
            run(
                "cargo",
                &[
                    "build",
                    "--release",
                    "-p",
                    "palanquin-agent",
                    "-p",
                    "palanquin-cli",
                    "-p",
                    "palanquin-lab",
                ],
            )?;
            let lab = root().join("target/release/palanquin-lab");
            programs::visible(programs::program(lab).arg("demo").args(rest))
        }
        Task::Test => steps::test(),
        Task::Setup => setup::install(),
        Task::Guest => {
            setup::install()?;
            guest::build()
        }
        Task::Tidy => tidy::check(),
        Task::Sim { seeds, seed } => {
            let what = match seed {
                Some(seed) => format!("--seed={seed}"),
                None => format!("--seeds={seeds}"),
            };
            run(
                "cargo",
                &["run", "--release", "-p", "palanquin-sim", "--", &what],
            )
        }
        Task::Model { rest } => {
            run("cargo", &["build", "--release", "-p", "palanquin-sim"])?;
            let model = root().join("target/release/palanquin-model");
            programs::visible(programs::program(model).args(rest))
        }
        Task::Bench { what } => {
            setup::require_root("the benches make network namespaces")?;
            setup::install_for_benches()?;
            guest::build()?;
            run(
                "cargo",
                &[
                    "build",
                    "--release",
                    "-p",
                    "palanquin-agent",
                    "-p",
                    "palanquin-cli",
                    "-p",
                    "palanquin-benches",
                ],
            )?;
            let bench = root().join("target/release/palanquin-bench");
            programs::visible(programs::program(bench).args(what))
        }
        Task::Lab { what } => lab(&what),
        Task::Trials { what } => {
            let mut packages = vec!["build", "--release", "-p", "palanquin-trials"];
            if what.first().is_some_and(|what| what == "record") {
                setup::require_root("recording makes network namespaces")?;
                setup::install()?;
                guest::build()?;
                packages.extend(["-p", "palanquin-agent", "-p", "palanquin-cli"]);
            }
            run("cargo", &packages)?;
            let trials = root().join("target/release/palanquin-trials");
            programs::visible(programs::program(trials).args(what))
        }
        Task::Matrix { table: true, .. } => matrix::write(),
        Task::Matrix {
            chains, missing, ..
        } => matrix::run(chains.clamp(1, 16), missing),
        Task::Fuzz(wish) => fuzz::fuzz(&wish),
        Task::CleanRig => run(
            "cargo",
            &[
                "run",
                "-p",
                "palanquin-lab",
                "--bin",
                "palanquin-lab",
                "--",
                "clean-rig",
            ],
        ),
    }
}

/// Runs the lab, with what it needs.
fn lab(what: &[String]) -> Result<()> {
    let task = what.first().map_or("", String::as_str);
    // An attacker who comes at the right moment needs points at which an agent stops; what is measured has none.
    let attack = task == "attack";
    let dir = if attack { "debug" } else { "release" };
    let mut words = vec!["build", "-p", "palanquin-lab"];
    if !attack {
        words.push("--release");
    }
    if attack || task == "experiment" {
        setup::require_root("the lab makes network namespaces")?;
        setup::install_for_lab()?;
        guest::build()?;
        words.extend(["-p", "palanquin-agent", "-p", "palanquin-cli"]);
    }
    if attack {
        words.extend(["--features", "palanquin-agent/fail-points"]);
    }
    run("cargo", &words)?;
    let lab = root().join("target").join(dir).join("palanquin-lab");
    programs::visible(programs::program(lab).args(what))
}
