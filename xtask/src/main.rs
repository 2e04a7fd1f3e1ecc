//! Development tasks: `cargo xtask --help`.

#![forbid(unsafe_code)]

mod guest;
mod run;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Development tasks of Palanquin.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Builds what test guests boot, into target/guest.
    Guest,
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Guest => guest::build(),
    }
}
