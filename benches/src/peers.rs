//! Palanquin and QEMU's own migration, alternating, on the same guest.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use palanquin_lab::file_server::FileServer;
use palanquin_lab::guest::{Console, GuestSpec};
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::transport::tls;
use palanquin_lab::usage::{QUIET, warm_up};
use serde::{Deserialize, Serialize};

use crate::bars;
use crate::files::{self, Contents};
use crate::floor::{self, FLOOR, HANDOVER};
use crate::measure::Sample;
use crate::palanquin::{self, HOT_PATHS, PATHS, Tried};
use crate::qemu::{self, WAYS};
use crate::row::{self, Row};
use crate::service::{self, Service};
use crate::workload::{FILES_MIB, Workload};

/// Address of the guest.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 10);
/// Tries for one undisturbed sample.
pub(crate) const TRIES: u32 = 6;
/// Free memory written to before anything is measured, in MiB: two guests and what they need.
const WARM_MIB: u64 = 4096;

/// What to measure
#[derive(Args)]
pub(crate) struct Options {
    /// Runs of each path; the table shows medians
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Measure only this; rows of the others stay in the file [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    workload: Vec<Workload>,
    /// Measure only paths whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// Do not measure what a client of the guest notices
    #[arg(long)]
    no_service: bool,
    /// Measure only what a client of the guest notices
    #[arg(long, conflicts_with_all = ["workload", "no_service"])]
    only_service: bool,
    /// Seconds after which a migration of `hot` is given up
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(5..=120))]
    hot_deadline_s: u64,
    /// Where the rows are written; samples and conditions go beside it
    #[arg(long, default_value = "target/bench/peers.json")]
    out: PathBuf,
}

/// A guest and how long it may take to move.
pub(crate) struct Case {
    /// Name in the tables.
    pub(crate) workload: &'static str,
    /// The guest.
    pub(crate) guest: GuestSpec,
    /// After this a migration is given up.
    pub(crate) deadline: Duration,
    /// Whether the guest unpacks files before it is ready.
    pub(crate) files: bool,
}

impl Case {
    /// MiB of guest RAM.
    pub(crate) fn memory_mib(&self) -> u64 {
        self.guest.memory_mib.iter().sum()
    }

    /// Waits until the guest does what it shall: all files are there, and what is rewritten has been once. Says how many
    /// MiB it rewrites each second.
    pub(crate) fn wait_settled(&self, console: &Console) -> Result<f64> {
        if self.files && !console.text().contains("init: files unpacked") {
            bail!("the guest has no files: {}", console.tail());
        }
        const PATIENCE: Duration = Duration::from_secs(120);
        if self.guest.dirty_mib_s > 0 {
            console.wait_verified(self.guest.buffer_mib * 256, PATIENCE)?;
        }
        let first = console.wait_beats(1, PATIENCE)?;
        let began = Instant::now();
        let last = console.wait_beats(10, PATIENCE)?;
        // What is verified without being rewritten does not count.
        let pages = match self.guest.dirty_mib_s {
            0 => 0,
            _ => last.verified - first.verified,
        };
        Ok(pages as f64 / 256.0 / began.elapsed().as_secs_f64())
    }
}

/// What is beside the rows.
#[derive(Default, Serialize, Deserialize)]
struct Beside {
    kernel: String,
    qemu: String,
    cpus: usize,
    service: Vec<Service>,
    /// All samples, by workload.
    samples: std::collections::BTreeMap<String, serde_json::Value>,
    /// What the guest of `linux` holds.
    files: serde_json::Value,
}

/// Measures, prints tables and bars, and writes rows and samples.
pub(crate) fn run(options: &Options) -> Result<()> {
    let beside_path = options.out.with_extension("samples.json");
    if let Some(dir) = options.out.parent() {
        fs::create_dir_all(dir)?;
    }
    // Rows of workloads that are not measured now stay: a ratio is only made within one workload.
    let mut rows: Vec<Row> = read(&options.out).unwrap_or_default();
    let mut beside: Beside = read(&beside_path).unwrap_or_default();
    beside.kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_owned();
    beside.qemu = palanquin_lab::process::run("qemu-system-x86_64", &["--version"])?
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned();
    beside.cpus = std::thread::available_parallelism()?.get();
    let workloads = match &options.workload[..] {
        _ if options.only_service => &[],
        [] => &Workload::ALL[..],
        some => some,
    };
    println!("warming up {WARM_MIB} MiB of free memory");
    warm_up(WARM_MIB)?;
    let archive = Archive::new(workloads)?;
    if let Some(contents) = &archive.contents {
        beside.files = serde_json::to_value(contents)?;
    }
    for workload in workloads {
        let (new, samples) = measure(*workload, options, &archive)?;
        rows.retain(|row| row.workload != workload.name());
        rows.extend(new);
        beside
            .samples
            .insert(workload.name().to_owned(), serde_json::to_value(samples)?);
        write(&options.out, &rows)?;
        write(&beside_path, &beside)?;
    }
    if !options.no_service {
        beside.service = service::measure(options.runs)?;
        write(&beside_path, &beside)?;
    }
    show(&rows, &beside.service);
    println!(
        "\nrows: {}; samples and conditions: {}",
        options.out.display(),
        beside_path.display()
    );
    Ok(())
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    // What an older version wrote is not understood and is made anew.
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    fs::write(path, serde_json::to_string_pretty(value)?)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The files for the guests' page caches, packed only if a workload needs them, and removed at the end.
struct Archive {
    path: PathBuf,
    contents: Option<Contents>,
    _dir: tempfile::TempDir,
}

impl Archive {
    fn new(workloads: &[Workload]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("files.tar");
        let contents = if workloads.iter().any(|workload| workload.has_files()) {
            println!("packing {FILES_MIB} MiB of this machine's files");
            let contents = files::pack(&path, FILES_MIB)?;
            println!(
                "{} files, {} MiB, gzip -1 leaves {:.0} %",
                contents.files,
                contents.bytes >> 20,
                contents.gzip_ratio * 100.0
            );
            Some(contents)
        } else {
            None
        };
        Ok(Self {
            path,
            contents,
            _dir: dir,
        })
    }
}

/// One workload, all paths.
fn measure(
    workload: Workload,
    options: &Options,
    archive: &Archive,
) -> Result<(Vec<Row>, Vec<Sample>)> {
    let link_mbit_s = workload.link_mbit_s();
    let rig = Rig::new(&RigSpec {
        link_mbit_s,
        ..RigSpec::default()
    })?;
    let tls = rig.dir().join("qemu-tls");
    tls::make(&tls, rig.hosts[1].spec.address.parse()?)?;
    let server = if workload.has_files() {
        Some(FileServer::start(&rig.client, &archive.path)?)
    } else {
        None
    };
    let case = Case {
        workload: workload.name(),
        guest: workload.guest(&FileServer::url()),
        deadline: workload.deadline(Duration::from_secs(options.hot_deadline_s)),
        files: workload.has_files(),
    };
    let link = link_mbit_s.map_or("no limit".to_owned(), |rate| format!("{rate} Mbit/s"));
    let conditions = format!(
        "{} MiB of RAM, link: {link}, given up after {} s",
        case.memory_mib(),
        case.deadline.as_secs()
    );
    println!("\n{}: {conditions}", workload.name());
    let measured = paths(workload, options, &rig, &case, &tls, &conditions);
    if let Some(server) = server {
        server.finish(&rig.client)?;
    }
    measured
}

fn paths(
    workload: Workload,
    options: &Options,
    rig: &Rig,
    case: &Case,
    tls: &Path,
    conditions: &str,
) -> Result<(Vec<Row>, Vec<Sample>)> {
    let wanted = |name: &str| {
        options
            .only
            .as_ref()
            .is_none_or(|only| name.contains(only.as_str()))
    };
    let mut ours = PATHS.to_vec();
    if workload == Workload::Hot {
        ours.extend(HOT_PATHS);
    }
    let mut samples: Vec<Sample> = Vec::new();
    let mut refused: Vec<(&str, String)> = Vec::new();
    for run in 1..=options.runs {
        for way in WAYS.into_iter().filter(|way| wanted(way.name)) {
            let tried = undisturbed(run, || {
                let sample = qemu::measure(rig, case, way, tls).context(way.name)?;
                Ok(Tried::Done(Box::new(sample)))
            })?;
            samples.extend(tried.ok());
        }
        for path in ours.iter().filter(|path| wanted(path.name)) {
            if refused.iter().any(|(name, _)| *name == path.name) {
                continue;
            }
            match undisturbed(run, || {
                palanquin::measure(rig, case, path).context(path.name)
            })? {
                Ok(sample) => samples.push(sample),
                Err(why) => {
                    println!("run {run}: {:<32} refused: {why}", path.name);
                    refused.push((path.name, why));
                }
            }
        }
        for (name, floor) in floor::ALL.into_iter().filter(|(name, _)| wanted(name)) {
            let tried = undisturbed(run, || {
                let sample = floor(rig, case).context(name)?;
                Ok(Tried::Done(Box::new(sample)))
            })?;
            samples.extend(tried.ok());
        }
    }
    let mut rows = Vec::new();
    let names = WAYS.iter().map(|way| way.name);
    for name in names
        .chain(ours.iter().map(|path| path.name))
        .chain([FLOOR, HANDOVER])
    {
        let of_path: Vec<&Sample> = samples
            .iter()
            .filter(|sample| sample.path == name)
            .collect();
        rows.extend(Row::new(&of_path, conditions));
        let why = refused.iter().find(|(refused, _)| *refused == name);
        rows.extend(why.map(|(_, why)| Row::refused(name, case.workload, why.clone(), conditions)));
    }
    Ok((rows, samples))
}

/// Measures until nobody else used the machine meanwhile; what the agent does not offer is an inner error. What decides
/// is only what others did, never what was measured, and it is the same for all paths.
fn undisturbed(
    run: u32,
    mut measure: impl FnMut() -> Result<Tried>,
) -> Result<Result<Sample, String>> {
    for _ in 0..TRIES {
        let sample = match measure()? {
            Tried::Done(sample) => *sample,
            Tried::Refused(why) => return Ok(Err(why)),
        };
        if sample.foreign_share < QUIET {
            println!(
                "run {run}: {:<32} total {:>6.0} ms, downtime {:>6} ms, ping gap {:>4.0} ms, {:>5} MiB{}",
                sample.path,
                sample.total_ms,
                row::shown(sample.downtime_ms, 1),
                sample.ping_gap_ms,
                sample.bytes_on_wire >> 20,
                sample
                    .reason
                    .as_ref()
                    .map_or(String::new(), |why| format!("; NOT completed: {why}")),
            );
            return Ok(Ok(sample));
        }
        println!(
            "run {run}: {:<32} discarded: others used {:.0} % of this machine",
            sample.path,
            sample.foreign_share * 100.0
        );
    }
    bail!("others kept this machine busy during {TRIES} tries: numbers would say nothing");
}

/// All tables.
fn show(rows: &[Row], service: &[Service]) {
    for workload in Workload::ALL {
        let of: Vec<&Row> = rows
            .iter()
            .filter(|row| row.workload == workload.name())
            .collect();
        if let Some(first) = of.first() {
            println!(
                "\n{} ({}), medians of {} runs\n",
                workload.name(),
                first.conditions,
                first.runs
            );
            print!("{}", row::table(&of));
        }
    }
    if !service.is_empty() {
        println!("\nservice: one client, requests one after the other\n");
        print!("{}", service::table(service));
    }
    println!("\nbars\n");
    print!("{}", bars::table(&bars::all(rows, service)));
}
