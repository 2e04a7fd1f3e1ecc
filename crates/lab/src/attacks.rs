//! `palanquin-lab attack`: every attack on every transport, as a matrix, gone on with after an interrupt.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use palanquin_lab::attack::{self, ATTACKS, Attack, PALANQUIN, WAYS, Way};
use palanquin_lab::paths;
use palanquin_lab::results::{AttackCell, Line, Machine, Results, Verdict};
use palanquin_lab::wait;

/// Options of the attacks
#[derive(Args)]
pub(crate) struct Options {
    /// This attack alone; more than once for several
    #[arg(long, value_name = "ATTACK", value_parser = attack_named)]
    only: Vec<Attack>,
    /// This transport alone; more than once for several
    #[arg(long, value_name = "TRANSPORT", value_parser = way_named)]
    transport: Vec<Way>,
    /// Say which attacks there are and what they have to reach, and do nothing
    #[arg(long)]
    list: bool,
    /// Begin anew: forget what the file of results holds
    #[arg(long)]
    fresh: bool,
    /// File of results, which a later run goes on with [default: target/lab/attack.jsonl]
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
}

fn attack_named(name: &str) -> Result<Attack, String> {
    let found = ATTACKS.iter().find(|attack| attack.name == name);
    let names = ATTACKS.map(|attack| attack.name).join(", ");
    found.copied().ok_or_else(|| format!("attacks are {names}"))
}

fn way_named(name: &str) -> Result<Way, String> {
    let found = WAYS.iter().find(|way| way.name == name);
    let names = WAYS.map(|way| way.name).join(", ");
    found
        .copied()
        .ok_or_else(|| format!("transports are {names}"))
}

fn list() {
    for attack in &ATTACKS {
        println!("{:<18}{}", attack.name, attack.about);
        println!("{:<18}succeeds if {}", "", attack.wins);
    }
    println!();
    for way in &WAYS {
        println!("{:<18}{}", way.name, way.about);
    }
}

/// Tries what is not in the file yet.
pub(crate) fn run(options: &Options, command: &str) -> Result<()> {
    if options.list {
        list();
        return Ok(());
    }
    let file = match &options.results {
        Some(file) => file.clone(),
        None => default_file()?,
    };
    if options.fresh {
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                bail!("cannot remove {}: {error}", file.display())
            }
            _ => {}
        }
    }
    let mut results = Results::open(&file)?;
    results.begin(command, machine()?)?;
    let chosen = cells(options);
    let mut failed = Vec::new();
    for (number, (attack, way)) in chosen.iter().enumerate() {
        let name = format!(
            "[{}/{}] {} on {}",
            number + 1,
            chosen.len(),
            attack.name,
            way.name
        );
        let known: Vec<AttackCell> = results.attacks().cloned().collect();
        if let Some(cell) = attack::cell_of(&known, attack, way) {
            println!("{name}: {}, known already", attack::word(cell.verdict));
            continue;
        }
        println!("{name}");
        // Guests of QEMU's own migration do not always survive without an attack, and machines are busy at times.
        let again = |error: anyhow::Error| {
            if wait::is_interrupted() {
                return Err(error);
            }
            println!("    not carried out: {error:#}; once more");
            attack::play(attack, way)
        };
        match attack::play(attack, way).or_else(again) {
            Ok(cell) => {
                println!(
                    "    {} in {:.0} s: {}",
                    attack::word(cell.verdict),
                    cell.seconds,
                    cell.evidence
                );
                results.add(Line::Attack(cell))?;
            }
            Err(error) if wait::is_interrupted() => {
                return Err(error.context(format!(
                    "{} holds what was found until now: the same command without --fresh goes on",
                    file.display()
                )));
            }
            Err(error) => {
                println!("    NOT CARRIED OUT: {error:#}");
                failed.push(name);
            }
        }
    }
    let known: Vec<AttackCell> = results.attacks().cloned().collect();
    summary(&known, &file);
    let defects: Vec<&str> = known
        .iter()
        .filter(|cell| cell.transport == PALANQUIN && cell.verdict == Verdict::Succeeded)
        .filter(|cell| chosen.iter().any(|(attack, _)| attack.name == cell.attack))
        .map(|cell| cell.attack.as_str())
        .collect();
    if !failed.is_empty() {
        bail!("not carried out: {}", failed.join(", "));
    }
    if !defects.is_empty() {
        bail!("succeeded against Palanquin: {}", defects.join(", "));
    }
    Ok(())
}

/// What was chosen, an attack after the other.
fn cells(options: &Options) -> Vec<(&'static Attack, &'static Way)> {
    let attack_is = |attack: &Attack| {
        options.only.is_empty() || options.only.iter().any(|only| only.name == attack.name)
    };
    let way_is = |way: &Way| {
        options.transport.is_empty() || options.transport.iter().any(|only| only.name == way.name)
    };
    ATTACKS
        .iter()
        .filter(|attack| attack_is(attack))
        .flat_map(|attack| WAYS.iter().map(move |way| (attack, way)))
        .filter(|(_, way)| way_is(way))
        .collect()
}

fn summary(cells: &[AttackCell], file: &std::path::Path) {
    println!("\n{}\n", attack::matrix(cells));
    let nowhere = attack::won_nowhere(cells);
    if nowhere.is_empty() {
        println!("every attack that was tried has won somewhere");
    } else {
        println!("won nowhere, and so proves nothing: {}", nowhere.join(", "));
    }
    println!("results: {}", file.display());
}

/// In the target directory, beside the guests' own.
fn default_file() -> Result<PathBuf> {
    let here = std::env::current_exe().context("no path of this program")?;
    let target = here.ancestors().nth(2).context("no target directory")?;
    Ok(target.join("lab/attack.jsonl"))
}

fn machine() -> Result<Machine> {
    let asking = |program: &str, word: &str| {
        let mut command = Command::new(program);
        command.arg(word);
        command
    };
    let palanquin = paths::program("palanquin")?.display().to_string();
    Machine::this(&[
        ("palanquin", asking(&palanquin, "--version")),
        ("qemu", asking("qemu-system-x86_64", "--version")),
        ("ssh", asking("ssh", "-V")),
        ("tcpdump", asking("tcpdump", "--version")),
    ])
}
