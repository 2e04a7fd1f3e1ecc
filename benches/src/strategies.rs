//! All strategies over dirty rates, on a shaped link.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::usage::{QUIET, median, warm_up};
use serde::{Deserialize, Serialize};

use crate::measure::Sample;
use crate::palanquin::{self, Path, Tried};
use crate::peers::{Case, TRIES};
use crate::plot;
use crate::row::shown;
use crate::workload::VM;

/// All strategies.
pub(crate) const STRATEGIES: [Path; 6] = [
    Path {
        name: "stop-and-copy",
        words: &["--strategy", "stop-and-copy"],
    },
    Path {
        name: "pre-copy",
        words: &["--strategy", "pre-copy"],
    },
    Path {
        name: "improved",
        words: &["--strategy", "improved"],
    },
    Path {
        name: "post-copy",
        words: &["--strategy", "post-copy"],
    },
    Path {
        name: "hybrid",
        words: &["--strategy", "hybrid"],
    },
    Path {
        name: "auto",
        words: &["--strategy", "auto"],
    },
];

/// What to measure
#[derive(Args)]
pub(crate) struct Options {
    /// Runs of each strategy at each rate; the table shows medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// What the guest rewrites each second, in MiB
    #[arg(long, value_delimiter = ',', default_value = "0,50,100,200,400")]
    rates: Vec<u64>,
    /// What each host may send, in Mbit/s
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=40_000))]
    link_mbit_s: u32,
    /// MiB that are rewritten, of the guest's 512
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..=384))]
    buffer_mib: u64,
    /// Seconds after which a migration is given up
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(5..=120))]
    deadline_s: u64,
    /// Measure only strategies whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Where the JSON is written; the plot goes beside it
    #[arg(long, default_value = "target/bench/strategies.json")]
    out: PathBuf,
}

/// One strategy at one rate: medians.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Point {
    /// Strategy.
    pub(crate) strategy: String,
    /// What the guest was to rewrite each second, in MiB.
    pub(crate) dirty_mib_s: u64,
    /// What it did rewrite each second before the migration, in MiB: an emulated guest has its limits.
    pub(crate) dirtied_mib_s: Option<f64>,
    /// Rounds.
    pub(crate) rounds: Option<f64>,
    /// As [`Sample::downtime_ms`].
    pub(crate) downtime_ms: Option<f64>,
    /// As [`Sample::total_ms`].
    pub(crate) total_ms: Option<f64>,
    /// As [`Sample::bytes_on_wire`].
    pub(crate) bytes_on_wire: Option<f64>,
    /// Whether every run completed.
    pub(crate) completed: bool,
    /// Whether the agent does not offer it.
    pub(crate) refused: bool,
    /// Why it did not complete, or was refused.
    pub(crate) reason: Option<String>,
    /// Runs.
    pub(crate) runs: usize,
}

#[derive(Serialize)]
struct Report<'a> {
    link_mbit_s: u32,
    memory_mib: u64,
    buffer_mib: u64,
    deadline_s: u64,
    points: &'a [Point],
    samples: &'a [(u64, Sample)],
}

/// Measures, prints a table, writes JSON and a plot.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.rates.is_empty() {
        bail!("no rates");
    }
    let rig = Rig::new(&RigSpec {
        link_mbit_s: Some(options.link_mbit_s),
        ..RigSpec::default()
    })?;
    println!("warming up free memory");
    warm_up(2048)?;
    let wanted = |path: &&Path| {
        options
            .only
            .as_ref()
            .is_none_or(|only| path.name.contains(only.as_str()))
    };
    let mut samples: Vec<(u64, Sample)> = Vec::new();
    let mut dirtied: Vec<(u64, f64)> = Vec::new();
    let mut refused: Vec<(&str, String)> = Vec::new();
    for run in 1..=options.runs {
        for &rate in &options.rates {
            let case = case(options, rate);
            for path in STRATEGIES.iter().filter(wanted) {
                if refused.iter().any(|(name, _)| *name == path.name) {
                    continue;
                }
                let tried =
                    undisturbed(|| palanquin::measure(&rig, &case, path).context(path.name))?;
                match tried {
                    Tried::Refused(why) => {
                        println!("{:<14} refused: {why}", path.name);
                        refused.push((path.name, why));
                    }
                    Tried::Done(sample) => {
                        dirtied.extend(sample.rewritten_mib_s.map(|rewritten| (rate, rewritten)));
                        tell(run, rate, &sample);
                        samples.push((rate, *sample));
                    }
                }
            }
        }
    }
    let points = points(options, &samples, &dirtied, &refused);
    print!("{}", table(&points, options));
    if let Some(dir) = options.out.parent() {
        fs::create_dir_all(dir)?;
    }
    let report = Report {
        link_mbit_s: options.link_mbit_s,
        memory_mib: 512,
        buffer_mib: options.buffer_mib,
        deadline_s: options.deadline_s,
        points: &points,
        samples: &samples,
    };
    fs::write(&options.out, serde_json::to_string_pretty(&report)?)?;
    let svg = options.out.with_extension("svg");
    fs::write(&svg, plot::svg(&points, options.link_mbit_s))?;
    println!("\nJSON: {}, plot: {}", options.out.display(), svg.display());
    Ok(())
}

fn case(options: &Options, rate: u64) -> Case {
    let mut guest = GuestSpec::small(VM).on_network();
    guest.memory_mib = vec![512];
    guest.buffer_mib = options.buffer_mib;
    guest.dirty_mib_s = rate;
    Case {
        workload: "strategies",
        guest,
        deadline: Duration::from_secs(options.deadline_s),
        files: false,
    }
}

fn undisturbed(mut measure: impl FnMut() -> Result<Tried>) -> Result<Tried> {
    for _ in 0..TRIES {
        match measure()? {
            Tried::Done(sample) if sample.foreign_share >= QUIET => {
                let percent = sample.foreign_share * 100.0;
                println!(
                    "{:<14} discarded: others used {percent:.0} % of this machine",
                    sample.path
                );
            }
            tried => return Ok(tried),
        }
    }
    bail!("others kept this machine busy during {TRIES} tries: numbers would say nothing");
}

fn tell(run: u32, rate: u64, sample: &Sample) {
    println!(
        "run {run}: {rate:>4} MiB/s {:<14} total {:>6.0} ms, downtime {:>6} ms, {:>5} MiB, rounds {}{}",
        sample.path,
        sample.total_ms,
        shown(sample.downtime_ms, 1),
        sample.bytes_on_wire >> 20,
        sample.rounds.unwrap_or(0),
        sample
            .reason
            .as_ref()
            .map_or(String::new(), |why| format!("; NOT completed: {why}")),
    );
}

fn points(
    options: &Options,
    samples: &[(u64, Sample)],
    dirtied: &[(u64, f64)],
    refused: &[(&str, String)],
) -> Vec<Point> {
    let mut points = Vec::new();
    for path in STRATEGIES {
        for &rate in &options.rates {
            let why = refused.iter().find(|(name, _)| *name == path.name);
            let all: Vec<&Sample> = samples
                .iter()
                .filter(|(of, sample)| *of == rate && sample.path == path.name)
                .map(|(_, sample)| sample)
                .collect();
            if all.is_empty() && why.is_none() {
                continue;
            }
            let some_completed = all.iter().any(|sample| sample.completed);
            let of = |value: fn(&Sample) -> Option<f64>| {
                let counted = all
                    .iter()
                    .filter(|sample| sample.completed == some_completed);
                median(counted.filter_map(|sample| value(sample)))
            };
            let reason = all.iter().find_map(|sample| sample.reason.clone());
            points.push(Point {
                strategy: path.name.to_owned(),
                dirty_mib_s: rate,
                dirtied_mib_s: median(
                    dirtied
                        .iter()
                        .filter(|(of, _)| *of == rate)
                        .map(|(_, rewritten)| *rewritten),
                ),
                rounds: of(|sample| sample.rounds.map(|rounds| rounds as f64)),
                downtime_ms: of(|sample| sample.downtime_ms),
                total_ms: of(|sample| Some(sample.total_ms)),
                bytes_on_wire: of(|sample| Some(sample.bytes_on_wire as f64)),
                completed: !all.is_empty() && all.iter().all(|sample| sample.completed),
                refused: why.is_some(),
                reason: why.map(|(_, why)| why.clone()).or(reason),
                runs: all.len(),
            });
        }
    }
    points
}

fn table(points: &[Point], options: &Options) -> String {
    let mut text = format!(
        "\n512 MiB guest that rewrites {} MiB over and over, link {} Mbit/s, given up after {} s, medians of {} runs\n\n\
         | strategy | rate MiB/s (seen) | rounds | downtime ms | total ms | data MiB | end |\n|---|---|---|---|---|---|---|\n",
        options.buffer_mib, options.link_mbit_s, options.deadline_s, options.runs
    );
    for point in points {
        let end = match (&point.reason, point.refused, point.completed) {
            (Some(why), true, _) => format!("refused: {why}"),
            (Some(why), _, false) => format!("NOT completed: {why}"),
            _ => "completed".to_owned(),
        };
        text += &format!(
            "| {} | {} ({}) | {} | {} | {} | {} | {end} |\n",
            point.strategy,
            point.dirty_mib_s,
            shown(point.dirtied_mib_s, 0),
            shown(point.rounds, 0),
            shown(point.downtime_ms, 1),
            shown(point.total_ms, 0),
            shown(
                point.bytes_on_wire.map(|bytes| bytes / f64::from(1 << 20)),
                0
            ),
        );
    }
    text
}
