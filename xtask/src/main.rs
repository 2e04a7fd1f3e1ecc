//! Development tasks: `cargo xtask --help`.
#![forbid(unsafe_code)]

mod command;
mod cpio;
mod guest;
mod setup;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Development tasks
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs what this Debian machine lacks, and unpacks the guests' kernel
    Setup,
    /// Builds the test guests: kernel, initial RAM disk, boot sector
    Guest,
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Setup => setup::programs(),
        Task::Guest => guest::build(),
    }
}
