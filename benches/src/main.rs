//! `palanquin-bench`: measurements side by side, in one run on one machine.
#![forbid(unsafe_code)]

mod certificates;
mod measure;
mod peers;
mod qemu;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use palanquin_lab::wait;

/// Measurements side by side
#[derive(Parser)]
#[command(name = "palanquin-bench")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Palanquin against QEMU's own migration, in the clear and with TLS
    Peers(peers::Options),
}

fn main() -> ExitCode {
    let run = || -> Result<()> {
        wait::catch_signals()?;
        match Arguments::parse().what {
            What::Peers(options) => peers::run(&options),
        }
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: {problem:#}");
            ExitCode::FAILURE
        }
    }
}
