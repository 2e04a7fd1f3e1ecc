//! The kill matrix: every step of the protocol, and there a SIGKILL of either agent or of the destination's
//! hypervisor, or a cut of the link. Afterwards the VM lives exactly once, it never ran twice, its memory is whole as
//! it finds from inside, nothing is left elsewhere, and the next migration works: each cell begins where the one
//! before has ended.
//!
//! Continuous integration runs the cells where something is at stake; `cargo xtask matrix` runs all of them.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io::Write;
use std::time::Instant;

use anyhow::{Result, ensure};
use palanquin_lab::matrix::{Chain, Fault, POST_COPY, PRE_COPY, Selection, Step};

#[test]
fn whatever_is_killed_at_whatever_step_of_pre_copy_the_vm_lives_once() -> Result<()> {
    run("pre-copy", PRE_COPY)
}

#[test]
fn whatever_is_killed_at_whatever_step_of_post_copy_the_vm_lives_once() -> Result<()> {
    run("post-copy", POST_COPY)
}

/// The cells of a strategy, with their numbers.
fn cells(steps: &'static [Step]) -> impl Iterator<Item = (usize, &'static Step, Fault)> {
    let all = steps
        .iter()
        .flat_map(|step| Fault::ALL.map(|fault| (step, fault)));
    let all = all.filter(|(step, fault)| !step.ends_of(*fault).is_empty());
    all.enumerate()
        .map(|(number, (step, fault))| (number, step, fault))
}

fn run(strategy: &'static str, steps: &'static [Step]) -> Result<()> {
    let selection = Selection::parse(&std::env::var("PALANQUIN_MATRIX").unwrap_or_default())?;
    let only = std::env::var("PALANQUIN_MATRIX_ONLY").unwrap_or_default();
    // Lines of an earlier run that are not to be found out again.
    let known = match std::env::var_os("PALANQUIN_MATRIX_KNOWN") {
        Some(path) => std::fs::read_to_string(path)?,
        None => String::new(),
    };
    let mut chain: Option<Chain> = None;
    let (mut done, mut failed) = (0, Vec::new());
    for (number, step, fault) in cells(steps) {
        if !selection.has(number, step.is_chosen(fault))
            || !format!("{} x {}", step.point, fault.name()).contains(&only)
        {
            continue;
        }
        let cell = format!(
            "{number}\t{strategy}\t{}\t{}\t{}",
            step.point,
            step.about,
            fault.name()
        );
        let mut lines = known.lines();
        if lines.any(|line| line.starts_with(&cell) && !line.contains("FAILED")) {
            continue;
        }
        let began = Instant::now();
        let mut chained = match chain.take() {
            Some(chain) => chain,
            None => Chain::new(strategy)?,
        };
        done += 1;
        let (name, point) = (fault.name(), step.point);
        match chained.cell(step, fault) {
            Ok(ended) => {
                let (place, after) = (ended.place.name(), ended.after.as_secs_f64());
                let whole = began.elapsed().as_secs_f64();
                println!(
                    "{strategy:9} {point:32} {name:17} {place:11} after {after:4.1} s, cell {whole:4.1} s"
                );
                record(&format!("{cell}\t{place}\t{after:.1}"))?;
                chain = Some(chained);
            }
            Err(error) => {
                println!("{strategy:9} {point:32} {name:17} FAILED: {error:#}");
                record(&format!("{cell}\tFAILED\t0"))?;
                failed.push(format!("{point} x {name}"));
            }
        }
    }
    if let Some(mut chain) = chain {
        chain.round_trip()?;
    }
    ensure!(
        failed.is_empty(),
        "{} of {done} cells failed: {failed:#?}",
        failed.len()
    );
    Ok(())
}

/// Adds a line to the file that `PALANQUIN_MATRIX_OUT` names, for `cargo xtask matrix`.
fn record(line: &str) -> Result<()> {
    if let Some(path) = std::env::var_os("PALANQUIN_MATRIX_OUT") {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        writeln!(file, "{line}")?;
    }
    Ok(())
}
