//! Palanquin and QEMU's own migration, alternating, on the same guest.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::probe::Pings;
use palanquin_lab::rig::{Rig, RigSpec};
use serde::Serialize;

use crate::certificates;
use crate::measure::{QUIET, Sample, Watch, median, sent_bytes, wait_quiet};
use crate::qemu::{self, WAYS};

/// Address of the guest.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 10);
const PALANQUIN: &str = "Palanquin, 2 streams";
const VM: &str = "bench";
/// Tries for one undisturbed sample.
const TRIES: u32 = 6;

/// What to measure
#[derive(Args)]
pub(crate) struct Options {
    /// Runs of each path; the table shows medians
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Guest memory in MiB
    #[arg(long, default_value_t = 1536, value_parser = clap::value_parser!(u64).range(192..))]
    memory_mib: u64,
    /// Incompressible bytes in it, in MiB
    #[arg(long, default_value_t = 1024)]
    fill_mib: u64,
    /// How much the guest rewrites each second, in MiB
    #[arg(long, default_value_t = 0)]
    dirty_mib_s: u64,
    /// Where the samples are written
    #[arg(long, default_value = "target/bench/peers.json")]
    out: PathBuf,
    /// Measure only paths whose name contains this
    #[arg(long)]
    only: Option<String>,
}

/// What was measured and under which conditions.
#[derive(Serialize)]
struct Report<'a> {
    kernel: String,
    cpus: usize,
    memory_mib: u64,
    fill_mib: u64,
    dirty_mib_s: u64,
    runs: u32,
    samples: &'a [Sample],
}

/// Measures, prints a table and writes the samples.
pub(crate) fn run(options: &Options) -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let tls = rig.dir().join("qemu-tls");
    certificates::make(&tls, rig.hosts[1].spec.address.parse()?)?;
    let mut guest = GuestSpec::small(VM).filled(options.fill_mib).on_network();
    guest.memory_mib = vec![options.memory_mib];
    guest.dirty_mib_s = options.dirty_mib_s;
    let wanted = |name: &str| {
        options
            .only
            .as_ref()
            .is_none_or(|only| name.contains(only.as_str()))
    };
    let mut samples = Vec::new();
    for run in 1..=options.runs {
        for way in WAYS.into_iter().filter(|way| wanted(way.name)) {
            samples.push(undisturbed(run, || {
                qemu::measure(&rig, &guest, way, &tls).context(way.name)
            })?);
        }
        if wanted(PALANQUIN) {
            samples.push(undisturbed(run, || {
                palanquin(&rig, &guest).context(PALANQUIN)
            })?);
        }
    }
    table(&samples);
    let report = Report {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        cpus: std::thread::available_parallelism()?.get(),
        memory_mib: options.memory_mib,
        fill_mib: options.fill_mib,
        dirty_mib_s: options.dirty_mib_s,
        runs: options.runs,
        samples: &samples,
    };
    if let Some(dir) = options.out.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&options.out, serde_json::to_string_pretty(&report)?)?;
    println!("samples: {}", options.out.display());
    Ok(())
}

/// Measures until nobody else used the machine meanwhile. What decides is only what others did, never what was
/// measured, and it is the same for all paths.
fn undisturbed(run: u32, mut measure: impl FnMut() -> Result<Sample>) -> Result<Sample> {
    for _ in 0..TRIES {
        let sample = measure()?;
        if sample.foreign_share < QUIET {
            tell(run, &sample);
            return Ok(sample);
        }
        println!(
            "run {run}: {:<26} discarded: others used {:.0} % of this machine",
            sample.path,
            sample.foreign_share * 100.0
        );
    }
    bail!("others kept this machine busy during {TRIES} tries: numbers would say nothing");
}

/// Boots a guest with the agent of the first host and moves it to the second. The start of the container is part of
/// it; QEMU's own migration finds its destination started.
fn palanquin(rig: &Rig, guest: &GuestSpec) -> Result<Sample> {
    let (source, destination) = (&rig.hosts[0], &rig.hosts[1]);
    source.boot(guest)?;
    let agents: Vec<u32> = rig
        .hosts
        .iter()
        .filter_map(|host| host.agent_pid())
        .collect();
    let pings = Pings::start(&rig.client, GUEST)?;
    let hypervisor = source.qemus()?;
    wait_quiet(&hypervisor)?;
    let watch = Watch::start(hypervisor, agents);
    let sent = sent_bytes(source)?;
    let began = Instant::now();
    let told = rig
        .migrate(VM, 0, 1, &[])?
        .expect_status(0)
        .with_context(|| rig.logs())?;
    let total = began.elapsed();
    let watched = watch.finish(&destination.qemus()?);
    let wire_bytes = sent_bytes(source)? - sent;
    let info = told.migration()?;
    rig.check_lives_once(VM, 1)?;
    let ping = pings.finish()?;
    destination
        .palanquin(&["vm", "stop", VM])?
        .expect_status(0)?;
    Ok(Sample {
        path: PALANQUIN,
        total_ms: total.as_secs_f64() * 1e3,
        reported_total_ms: info.total_time_ms,
        reported_downtime_ms: info.downtime_ms,
        event_downtime_ms: None,
        ping_gap_ms: ping.longest_gap_ms,
        cpu_s: watched.cpu_s,
        wire_bytes,
        agent_rss_anon_kib: Some(watched.rss_anon_kib),
        foreign_share: watched.foreign_share,
    })
}

fn tell(run: u32, sample: &Sample) {
    println!(
        "run {run}: {:<26} total {:>6.0} ms, downtime {:>5.1} ms, ping gap {:>4.0} ms",
        sample.path, sample.total_ms, sample.reported_downtime_ms, sample.ping_gap_ms
    );
}

fn table(samples: &[Sample]) {
    let mut paths: Vec<&str> = samples.iter().map(|sample| sample.path).collect();
    paths.dedup();
    paths.sort_unstable();
    paths.dedup();
    println!("\nmedians; total and ping gap are measured from outside, the same way for all");
    println!(
        "| path | total | reported total | reported downtime | STOP to RESUME | ping gap | CPU | wire | agent RssAnon |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for path in paths {
        let of = |value: &dyn Fn(&Sample) -> Option<f64>| {
            median(
                samples
                    .iter()
                    .filter(|sample| sample.path == path)
                    .filter_map(value),
            )
        };
        let shown = |value: f64, unit: &str, digits: usize| {
            if value.is_nan() {
                "-".to_owned()
            } else {
                format!("{value:.digits$} {unit}")
            }
        };
        println!(
            "| {path} | {} | {} | {} | {} | {} | {} | {} | {} |",
            shown(of(&|s| Some(s.total_ms)), "ms", 0),
            shown(of(&|s| Some(s.reported_total_ms)), "ms", 0),
            shown(of(&|s| Some(s.reported_downtime_ms)), "ms", 1),
            shown(of(&|s| s.event_downtime_ms), "ms", 1),
            shown(of(&|s| Some(s.ping_gap_ms)), "ms", 0),
            shown(of(&|s| Some(s.cpu_s)), "s", 2),
            shown(
                of(&|s| Some(s.wire_bytes as f64 / f64::from(1 << 20))),
                "MiB",
                0
            ),
            shown(
                of(&|s| s.agent_rss_anon_kib.map(|kib| kib as f64 / 1024.0)),
                "MiB",
                1
            ),
        );
    }
}
