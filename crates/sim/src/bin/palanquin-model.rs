//! `palanquin-model`: explores every state of a handover within bounds.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use palanquin_engine::strategy::Strategy;
use palanquin_sim::model::{Bounds, explore};

/// Explore every state of a handover within bounds
#[derive(Parser)]
struct Arguments {
    /// Only the bounds that the tests use: seconds instead of minutes
    #[arg(long)]
    quick: bool,
    /// Most states of one exploration
    #[arg(long, default_value_t = 12_000_000)]
    states: u32,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    for strategy in [Strategy::PreCopy, Strategy::PostCopy] {
        let mut all = Bounds::tested(strategy).to_vec();
        if !arguments.quick {
            all.extend(Bounds::large(strategy));
        }
        for bounds in all {
            let began = Instant::now();
            match explore(bounds, None, arguments.states) {
                Ok(counts) => println!(
                    "{bounds}\n    {} states, {} steps, {} good ends, {} steps deep, {:.1} s",
                    counts.states,
                    counts.steps,
                    counts.good_ends,
                    counts.depth,
                    began.elapsed().as_secs_f64()
                ),
                Err(violation) => {
                    println!("{bounds}\n{violation}");
                    return ExitCode::FAILURE;
                }
            }
        }
    }
    ExitCode::SUCCESS
}
