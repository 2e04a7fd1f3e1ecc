//! `palanquin`: what an operator types.
#![forbid(unsafe_code)]

mod advertisement;
mod approval;
mod arguments;
mod attest;
mod ca;
mod check;
mod client;
mod commands;
mod failure;
mod files;
mod migrate;
mod output;
mod passport;
mod policy;
mod render;
mod watch;

use std::process::ExitCode;

use clap::Parser;
use palanquin_api::control::ErrorKind;

use crate::arguments::Cli;
use crate::failure::Failure;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let json = cli.json;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(ErrorKind::Internal, "no runtime").cause(error));
    match runtime.and_then(|runtime| runtime.block_on(commands::run(cli))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(json),
    }
}

/// What clap has to say: help and version too are "errors" to it.
fn refuse(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // A reader that went away is no reason to panic.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    // The arguments could not be parsed, so this is looked for by hand.
    let is_json = std::env::args_os().any(|argument| argument == "--json");
    if is_json {
        let text = error.render().to_string();
        let message = text.trim().trim_start_matches("error: ");
        return Failure::usage(message).tell(true);
    }
    let _ = error.print();
    ExitCode::from(ErrorKind::Usage.exit_status())
}
