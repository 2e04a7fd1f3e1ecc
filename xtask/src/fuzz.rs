//! `cargo xtask fuzz`: builds the fuzz targets with instrumentation and runs them.
//!
//! The pinned compiler has no switch for this, but its code generator has: LLVM's pass for coverage is named, and the
//! runtime that uses it comes with `libfuzzer-sys`.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::programs::{self, root};

/// Counters at every edge, and what is compared with what.
const FLAGS: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// Named, so that programs that run while building are built without the flags.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";
/// Of one target, in continuous integration.
const SMOKE_SECONDS: u64 = 10;

/// What is wanted.
#[derive(clap::Args)]
pub(crate) struct Wish {
    /// Seconds for each target
    #[arg(long, default_value_t = SMOKE_SECONDS)]
    seconds: u64,
    /// Write the seeds anew to `fuzz/corpus`, and run nothing
    #[arg(long)]
    make_corpus: bool,
    /// Run only this input
    #[arg(long, value_name = "FILE", requires = "targets")]
    input: Option<PathBuf>,
    /// Start of all chance, so that a run can be repeated as far as its time reached [default: another each time]
    #[arg(long)]
    seed: Option<u32>,
    /// Targets [default: all]
    targets: Vec<String>,
}

/// A short run of every target.
pub(crate) fn smoke() -> Result<()> {
    fuzz(&Wish {
        seconds: SMOKE_SECONDS,
        make_corpus: false,
        input: None,
        // What no change of the code explains must not stop one: new ground is for longer runs.
        seed: Some(1),
        targets: Vec::new(),
    })
}

/// Does what is wanted.
pub(crate) fn fuzz(wish: &Wish) -> Result<()> {
    let began = Instant::now();
    let program = build()?;
    println!("built in {:.0} s", began.elapsed().as_secs_f64());
    let all = programs::text(&mut as_told(&program, "list"))?;
    let all: Vec<&str> = all.lines().collect();
    let targets: Vec<&str> = match &wish.targets[..] {
        [] => all,
        some => some.iter().map(String::as_str).collect(),
    };
    if let Some(input) = &wish.input {
        let input = input.canonicalize().context("no such input")?;
        return programs::visible(as_told(&program, targets[0]).arg(input));
    }
    let seeds = work_dir().join("seeds");
    if seeds.exists() {
        fs::remove_dir_all(&seeds).context("old seeds")?;
    }
    programs::visible(&mut as_told(
        &program,
        &format!("seeds:{}", seeds.display()),
    ))?;
    if wish.make_corpus {
        return adopt(&seeds);
    }
    compare(&seeds)?;
    println!(
        "{:16} {:>12} {:>6} {:>8} {:>8}",
        "target", "executions", "edges", "features", "inputs"
    );
    let (waiting, failed) = (Mutex::new(targets.into_iter()), Mutex::new(Vec::new()));
    // A target has one thread, so each processor takes the next that waits.
    // By a function of its own: the lock is not held while the target runs.
    let next = || held(&waiting).next();
    let processor = || {
        while let Some(target) = next() {
            match run(&program, target, wish) {
                Ok(line) => println!("{line}"),
                Err(error) => {
                    println!("{target:16} FAILED\n{error:#}");
                    held(&failed).push(target);
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(processor);
        }
    });
    let failed = held(&failed);
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("broken promises: {}", failed.join(", "))
    }
}

fn held<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn work_dir() -> PathBuf {
    root().join("target/fuzz")
}

/// Inputs that are kept: generated seeds, and what once broke something.
fn corpus_dir() -> PathBuf {
    root().join("fuzz/corpus")
}

fn build() -> Result<PathBuf> {
    let target_dir = work_dir().join("build");
    programs::visible(
        programs::cargo()
            .env("RUSTFLAGS", FLAGS.join(" "))
            .args(["build", "--release", "--locked", "--quiet"])
            .args(["--manifest-path", "fuzz/Cargo.toml", "--target", PLATFORM])
            .arg("--target-dir")
            .arg(&target_dir),
    )?;
    Ok(target_dir.join(PLATFORM).join("release/palanquin-fuzz"))
}

/// The program, told what to do.
fn as_told(program: &Path, what: &str) -> Command {
    let mut command = programs::program(program);
    command.env("PALANQUIN_FUZZ", what);
    command
}

/// Replaces the seeds that are kept. What broke something stays.
fn adopt(seeds: &Path) -> Result<()> {
    let corpus = corpus_dir();
    for (path, _) in seeds_below(&corpus)? {
        fs::remove_file(corpus.join(path))?;
    }
    let fresh = seeds_below(seeds)?;
    for (path, bytes) in &fresh {
        let to = corpus.join(path);
        fs::create_dir_all(to.parent().unwrap_or(&corpus))?;
        fs::write(to, bytes)?;
    }
    println!("{} seeds in {}", fresh.len(), corpus.display());
    Ok(())
}

/// Whether the seeds that are kept are those that are made now: a codec that changed makes others.
fn compare(seeds: &Path) -> Result<()> {
    let (kept, fresh) = (seeds_below(&corpus_dir())?, seeds_below(seeds)?);
    if kept != fresh {
        let odd = fresh
            .iter()
            .find(|seed| !kept.contains(seed))
            .or(kept.iter().find(|seed| !fresh.contains(seed)));
        let odd = odd.map(|(path, _)| path.display().to_string());
        bail!(
            "fuzz/corpus is not what is made now (for example {}): `cargo xtask fuzz --make-corpus`",
            odd.unwrap_or_default()
        );
    }
    Ok(())
}

/// Generated seeds, by their path.
fn seeds_below(dir: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut seeds = Vec::new();
    if !dir.exists() {
        return Ok(seeds);
    }
    for target in fs::read_dir(dir)?
        .flatten()
        .filter(|entry| entry.path().is_dir())
    {
        for seed in fs::read_dir(target.path())?.flatten() {
            if seed.file_name().to_string_lossy().starts_with("seed-") {
                let path = Path::new(&target.file_name()).join(seed.file_name());
                seeds.push((path, fs::read(seed.path())?));
            }
        }
    }
    seeds.sort();
    Ok(seeds)
}

/// Runs one target; a line with what it did.
fn run(program: &Path, target: &str, wish: &Wish) -> Result<String> {
    let work = work_dir();
    let (found, kept) = (work.join("corpus").join(target), corpus_dir().join(target));
    let log = work.join("log").join(target);
    let artifacts = work.join("artifacts");
    for dir in [&found, &kept, &artifacts, &work.join("log")] {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let output = File::create(&log).with_context(|| log.display().to_string())?;
    let mut command = as_told(program, target);
    command
        .arg(format!("-max_total_time={}", wish.seconds))
        // 0 is libFuzzer's word for chance.
        .arg(format!("-seed={}", wish.seed.unwrap_or(0)))
        .args(["-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1"])
        .arg(format!(
            "-artifact_prefix={}/{target}-",
            artifacts.display()
        ));
    let words = work.join("seeds").join(format!("{target}.dict"));
    if words.exists() {
        command.arg(format!("-dict={}", words.display()));
    }
    // New inputs go to the first directory.
    let status = command
        .args([&found, &kept])
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| program.display().to_string())?;
    let said = fs::read(&log).with_context(|| log.display().to_string())?;
    let said = String::from_utf8_lossy(&said);
    if status.success() {
        let stats =
            Stats::read(&said).with_context(|| format!("no statistics in {}", log.display()))?;
        return Ok(stats.line(target));
    }
    let mut why = String::new();
    let lines = said
        .lines()
        .skip_while(|line| !line.contains("panicked at") && !line.contains("ERROR:"));
    for line in lines.take(6) {
        let _ = writeln!(why, "  {line}");
    }
    bail!(
        "{why}  all of it: {}\n  the input is in {}; `cargo xtask fuzz {target} --input FILE` runs it again",
        log.display(),
        artifacts.display()
    )
}

/// What a run of libFuzzer says of itself at its end.
#[derive(Debug, PartialEq, Eq)]
struct Stats {
    executions: u64,
    edges: u64,
    features: u64,
    inputs: u64,
}

impl Stats {
    fn read(said: &str) -> Option<Self> {
        let executions = said
            .lines()
            .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?;
        let last = said.lines().rev().find(|line| line.contains(" cov: "))?;
        let number = |name: &str| -> Option<u64> {
            let word = last.split_once(name)?.1.split_ascii_whitespace().next()?;
            word.split('/').next()?.parse().ok()
        };
        Some(Self {
            executions: executions.trim().parse().ok()?,
            edges: number(" cov: ")?,
            features: number(" ft: ")?,
            inputs: number(" corp: ")?,
        })
    }

    fn line(&self, target: &str) -> String {
        let Self {
            executions,
            edges,
            features,
            inputs,
        } = self;
        format!("{target:16} {executions:>12} {edges:>6} {features:>8} {inputs:>8}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_says_of_itself_is_read() {
        let said = "#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 27Mb\n\
                    #564891\tDONE   cov: 1650 ft: 3410 corp: 1329/153Kb lim: 5013 exec/s: 9 rss: 32Mb\n\
                    stat::number_of_executed_units: 564891\n";
        let stats = Stats {
            executions: 564_891,
            edges: 1650,
            features: 3410,
            inputs: 1329,
        };
        assert_eq!(Stats::read(said), Some(stats));
        assert_eq!(Stats::read("killed"), None);
    }

    #[test]
    fn only_generated_seeds_are_compared() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("message");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("seed-000"), b"a").unwrap();
        fs::write(target.join("found-overflow"), b"b").unwrap();
        let seeds = seeds_below(dir.path()).unwrap();
        assert_eq!(seeds, [(PathBuf::from("message/seed-000"), b"a".to_vec())]);
        assert_eq!(seeds_below(&dir.path().join("nowhere")).unwrap(), []);
    }
}
