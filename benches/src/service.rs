//! What a client of the guest notices: its requests per second before and during a migration.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use palanquin_lab::network::Namespace;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::usage::{Inhabitants, QUIET, Watch, median, sent_bytes, wait_quiet, warm_up};
use palanquin_lab::wait;
use serde::{Deserialize, Serialize};

use crate::palanquin;
use crate::peers::{Case, GUEST, TRIES};
use crate::workload::{VM, Workload};

/// How long the client works before the migration begins.
const BEFORE: Duration = Duration::from_secs(4);
/// A guest under emulation answers within this time.
const PATIENCE: Duration = Duration::from_secs(20);
/// Incompressible memory of the guest in MiB: at 50 MB/s a migration takes some 6 s.
const FILL_MIB: u64 = 256;
/// The limits that are tried.
const BANDWIDTHS: [Option<(&str, f64)>; 2] = [Some(("400mbit", 50e6)), None];

/// What the client saw; medians.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Service {
    /// What `--bandwidth` was set to.
    pub(crate) bandwidth: Option<String>,
    /// The same in bytes per second.
    pub(crate) bandwidth_bytes_per_s: Option<f64>,
    /// Bytes that the source's uplink sent per second of the migration, its traffic for the client included.
    pub(crate) wire_bytes_per_s: f64,
    /// Requests per second before.
    pub(crate) before_per_s: f64,
    /// Requests per second from the request for the migration to its end.
    pub(crate) during_per_s: f64,
    /// Longest time for one answer during the migration, in milliseconds.
    pub(crate) longest_ms: f64,
    /// Total time of the migration in milliseconds.
    pub(crate) total_ms: f64,
    /// Runs.
    pub(crate) runs: usize,
}

impl Service {
    /// During over before.
    pub(crate) fn ratio(&self) -> f64 {
        self.during_per_s / self.before_per_s
    }
}

/// Measures all limits, alternating.
pub(crate) fn measure(runs: u32) -> Result<Vec<Service>> {
    let rig = Rig::new(&RigSpec::default())?;
    let mut guest = Workload::Idle.guest("");
    guest.memory_mib = vec![512];
    guest.fill_mib = FILL_MIB;
    let case = Case {
        workload: "service",
        guest,
        deadline: Duration::from_secs(120),
        files: false,
    };
    let mut seen: Vec<Vec<Service>> = vec![Vec::new(); BANDWIDTHS.len()];
    for run in 1..=runs {
        for (bandwidth, seen) in BANDWIDTHS.into_iter().zip(&mut seen) {
            let service = undisturbed(&rig, &case, bandwidth)?;
            println!("run {run}: service: {}", line(&service));
            seen.push(service);
        }
    }
    Ok(seen.iter().filter_map(|seen| middle(seen)).collect())
}

fn undisturbed(rig: &Rig, case: &Case, bandwidth: Option<(&str, f64)>) -> Result<Service> {
    for _ in 0..TRIES {
        let (service, foreign) = palanquin::with_vm(rig, case, || once(rig, case, bandwidth))?;
        if foreign < QUIET {
            return Ok(service);
        }
        println!(
            "service: discarded: others used {:.0} % of this machine",
            foreign * 100.0
        );
    }
    bail!("others kept this machine busy during {TRIES} tries: numbers would say nothing");
}

fn once(rig: &Rig, case: &Case, bandwidth: Option<(&str, f64)>) -> Result<(Service, f64)> {
    wait_quiet(rig)?;
    warm_up(case.memory_mib())?;
    let client = Client::start(&rig.client)?;
    wait::pause(BEFORE)?;
    let mut words = Vec::new();
    if let Some((limit, _)) = bandwidth {
        words.extend(["--bandwidth", limit]);
    }
    let watch = Watch::start(Inhabitants::of(rig, Vec::new())?)?;
    let sent = sent_bytes(&rig.hosts[0])?;
    let began = Instant::now();
    let told = rig.migrate(VM, 0, 1, &words)?;
    let ended = Instant::now();
    let sent = sent_bytes(&rig.hosts[0])? - sent;
    // The client is the bench's own, and works before as well.
    let foreign = watch.finish().foreign_share;
    let answers = client.finish()?;
    told.expect_status(0).with_context(|| rig.logs())?;
    let first = answers.first().context("the guest did not answer")?.at;
    let within = |from: Instant, to: Instant| {
        let count = answers
            .iter()
            .filter(|answer| (from..to).contains(&answer.at));
        count.count() as f64 / (to - from).as_secs_f64()
    };
    let longest = answers
        .iter()
        .filter(|answer| answer.at >= began && answer.at - answer.took <= ended)
        .map(|answer| answer.took)
        .max();
    let total = (ended - began).as_secs_f64();
    let service = Service {
        bandwidth: bandwidth.map(|(limit, _)| limit.to_owned()),
        bandwidth_bytes_per_s: bandwidth.map(|(_, rate)| rate),
        wire_bytes_per_s: sent as f64 / total,
        before_per_s: within(first, began),
        during_per_s: within(began, ended),
        longest_ms: longest.unwrap_or_default().as_secs_f64() * 1e3,
        total_ms: total * 1e3,
        runs: 1,
    };
    Ok((service, foreign))
}

/// Medians of several runs.
fn middle(seen: &[Service]) -> Option<Service> {
    let of = |value: fn(&Service) -> f64| median(seen.iter().map(value)).unwrap_or_default();
    Some(Service {
        wire_bytes_per_s: of(|service| service.wire_bytes_per_s),
        before_per_s: of(|service| service.before_per_s),
        during_per_s: of(|service| service.during_per_s),
        longest_ms: of(|service| service.longest_ms),
        total_ms: of(|service| service.total_ms),
        runs: seen.len(),
        ..seen.first()?.clone()
    })
}

fn line(service: &Service) -> String {
    format!(
        "--bandwidth {}: {:.0}/s before, {:.0}/s during ({:.0} %), slowest answer {:.0} ms",
        service.bandwidth.as_deref().unwrap_or("none"),
        service.before_per_s,
        service.during_per_s,
        service.ratio() * 100.0,
        service.longest_ms
    )
}

/// All of it as Markdown.
pub(crate) fn table(all: &[Service]) -> String {
    let mut text = "| --bandwidth | requests/s before | during | ratio | slowest answer ms | total ms | wire MB/s |\n\
                    |---|---|---|---|---|---|---|\n"
        .to_owned();
    for service in all {
        text += &format!(
            "| {} | {:.0} | {:.0} | {:.2} | {:.0} | {:.0} | {:.1} |\n",
            service.bandwidth.as_deref().unwrap_or("none"),
            service.before_per_s,
            service.during_per_s,
            service.ratio(),
            service.longest_ms,
            service.total_ms,
            service.wire_bytes_per_s / 1e6,
        );
    }
    text
}

/// An answer of the guest.
#[derive(Clone, Copy, Debug)]
struct Answer {
    at: Instant,
    took: Duration,
}

/// A client that asks for `/status` again as soon as it was answered, each time on a new connection.
struct Client {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Answer>>>,
}

impl Client {
    fn start(namespace: &Namespace) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = namespace.spawn(move || {
            let mut answers = Vec::new();
            while !seen.load(Ordering::Relaxed) {
                let began = Instant::now();
                ask()?;
                answers.push(Answer {
                    at: Instant::now(),
                    took: began.elapsed(),
                });
            }
            Ok(answers)
        })?;
        Ok(Self { stop, thread })
    }

    fn finish(self) -> Result<Vec<Answer>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the client panicked"))?
    }
}

fn ask() -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((GUEST, 80)), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    stream.write_all(b"GET /status HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if !answer.starts_with(b"HTTP/1.1 200 ") {
        bail!("the guest answered {:?}", String::from_utf8_lossy(&answer));
    }
    Ok(())
}
