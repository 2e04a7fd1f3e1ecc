//! The report: what the experiment and the attacks have found, as one HTML file that needs nothing else, and as Markdown.

mod attacks;
mod comparison;
mod document;
mod html;
mod letter;
mod markdown;
mod strategies;
mod threats;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use palanquin_lab::results::{Line, Results};
use time::OffsetDateTime;

use document::{Block, Document};

/// Options of the report
#[derive(Args)]
pub(crate) struct Options {
    /// Results of the experiment
    #[arg(long, default_value = "target/lab/experiment.jsonl")]
    experiment: PathBuf,
    /// Results of the attacks
    #[arg(long, default_value = "target/lab/attack.jsonl")]
    attack: PathBuf,
    /// What `cargo xtask bench strategies` wrote, if it was run
    #[arg(long, default_value = "target/bench/strategies.json")]
    strategies: PathBuf,
    /// Where report.html and report.md go
    #[arg(long, default_value = "target/lab")]
    out: PathBuf,
    /// Also write the comparison with other systems to this file
    #[arg(long)]
    comparison: Option<PathBuf>,
}

/// Writes the report.
pub(crate) fn run(options: &Options) -> Result<()> {
    let letter = Results::open(&options.experiment)?;
    let attacks = Results::open(&options.attack)?;
    if letter.lines.is_empty() && attacks.lines.is_empty() {
        bail!(
            "there are no results in {} and {}: run `cargo xtask lab experiment` or `cargo xtask lab attack` first",
            options.experiment.display(),
            options.attack.display()
        );
    }
    let mut document =
        Document::new("Moving virtual machines: what is seen, and what can be done to them");
    document.paragraph(
        "Every number and every verdict below was measured on real QEMU guests, by the commands that are named. \
         Nothing in this file is loaded from elsewhere.",
    );
    letter::add(&mut document, &letter);
    strategies::add(&mut document, &options.strategies)?;
    attacks::add(&mut document, &attacks);
    threats::add(&mut document, &attacks);
    made(&mut document, &[&letter, &attacks]);
    fs::create_dir_all(&options.out)?;
    write(&options.out.join("report.html"), &html::render(&document))?;
    write(&options.out.join("report.md"), &markdown::render(&document))?;
    if let Some(path) = &options.comparison {
        let document = comparison::document(&letter, &attacks)?;
        write(path, &markdown::render(&document))?;
    }
    Ok(())
}

fn write(path: &std::path::Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("wrote {}", path.display());
    Ok(())
}

/// How it was made.
fn made(document: &mut Document, all: &[&Results]) {
    document.heading("How this was made");
    for line in all.iter().flat_map(|results| &results.lines) {
        let Line::Run {
            command,
            at_s,
            machine,
        } = line
        else {
            continue;
        };
        document.paragraph(&format!(
            "On {}: {}, {} CPUs, {} MiB of memory, Linux {}. Hosts are network namespaces of this one machine, so both \
             ends, the guest, the client and the observer share its CPUs. To repeat it:",
            day(*at_s),
            machine.cpu,
            machine.cpus,
            machine.memory_mib,
            machine.kernel,
        ));
        document.blocks.push(Block::Code(command.clone()));
        let versions = machine
            .versions
            .iter()
            .map(|(program, version)| format!("{program}: {version}"));
        document.blocks.push(Block::List(versions.collect()));
    }
    document.paragraph(
        "Guests are random only in what follows from the seed of their workload, which is 1 unless a command line says \
         otherwise.",
    );
}

/// A day of the calendar, in UTC.
fn day(at_s: u64) -> String {
    let at = i64::try_from(at_s).ok();
    at.and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok())
        .map_or("an unknown day".to_owned(), |at| at.date().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_is_one_of_the_calendar() {
        assert_eq!(day(0), "1970-01-01");
        assert_eq!(day(951_782_400), "2000-02-29");
        assert_eq!(day(u64::MAX), "an unknown day");
    }
}
