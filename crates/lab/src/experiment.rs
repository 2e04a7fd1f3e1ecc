//! The experiment of the dissertation that this project began with: a file with a known sentence is opened in a guest, the
//! guest is moved there and back while somebody records the wire, and the sentence is looked for in what was recorded.
//! Here it is done over every transport that can be had, and with what each costs.

mod leg;
mod palanquin;
mod path;
mod qemu;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use palanquin_lab::file_server::FileServer;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::results::{Leg, Line, Machine, PathCell, Results};
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::transport::{Transport, tls};
use palanquin_lab::usage::warm_up;
use palanquin_lab::{paths, process};

/// What the file says.
pub(crate) const SENTENCE: &str = "The heron stands in the shallow water at dawn";
/// Name of the VM.
pub(crate) const VM: &str = "letter";
/// Address of the guest.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 10);
/// Interval of the pings by which downtime is counted: 20 Hz.
pub(crate) const PING: Duration = Duration::from_millis(50);
/// Name of our own transport in results.
pub(crate) const PALANQUIN: &str = "palanquin";
/// Packing the archive takes no longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Options of the experiment
#[derive(Args)]
pub(crate) struct Options {
    /// Runs there and back for each transport and MTU
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    runs: u32,
    /// MTU of the path in bytes, 576 to 9000; several with commas
    #[arg(long, value_delimiter = ',', default_values_t = [1500, 576, 1280, 9000],
          value_parser = clap::value_parser!(u32).range(576..=9000))]
    mtu: Vec<u32>,
    /// Only these transports: qemu, qemu-segment, qemu-tls, qemu-ssh, qemu-ipsec, palanquin; several with commas
    #[arg(long, value_delimiter = ',', value_parser = transport_name)]
    transport: Vec<String>,
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(192..=65536))]
    memory_mib: u64,
    /// How much of it holds incompressible bytes, in MiB
    #[arg(long, default_value_t = 64)]
    fill_mib: u64,
    /// How much the guest rewrites each second, in MiB; QEMU before 9.0 loses guests under TCG that write meanwhile
    #[arg(long, default_value_t = 0)]
    dirty_mib_s: u64,
    /// File of the results; a run that was interrupted goes on where it was
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/lab/experiment.jsonl"
    )]
    results: PathBuf,
    /// Forget what the file holds
    #[arg(long)]
    fresh: bool,
}

fn transport_name(name: &str) -> Result<String, String> {
    let mut names = Transport::ALL.iter().map(|transport| transport.name());
    if name == PALANQUIN || names.any(|known| known == name) {
        return Ok(name.to_owned());
    }
    Err(format!(
        "one of qemu, qemu-segment, qemu-tls, qemu-ssh, qemu-ipsec, {PALANQUIN}"
    ))
}

impl Options {
    fn wants(&self, name: &str) -> bool {
        self.transport.is_empty() || self.transport.iter().any(|wanted| wanted == name)
    }

    fn guest(&self) -> GuestSpec {
        let mut guest = GuestSpec::small(VM).filled(self.fill_mib).on_network();
        guest.memory_mib = vec![self.memory_mib];
        guest.dirty_mib_s = self.dirty_mib_s;
        guest.files = Some(FileServer::url());
        guest.open = Some("/files/letter.txt".to_owned());
        guest
    }
}

/// Runs the experiment, or what is left of it.
pub(crate) fn run(options: &Options, command: &str) -> Result<()> {
    if options.fill_mib + 96 > options.memory_mib {
        bail!(
            "a guest of {} MiB cannot hold {} MiB and itself",
            options.memory_mib,
            options.fill_mib
        );
    }
    if options.fresh && options.results.exists() {
        fs::remove_file(&options.results)?;
    }
    let mut results = Results::open(&options.results)?;
    results.begin(command, machine()?)?;
    for &mtu in &options.mtu {
        if left(options, &results, mtu) {
            at(options, &mut results, mtu)?;
        }
    }
    println!("the results are in {}", options.results.display());
    Ok(())
}

/// This machine, and what takes part.
fn machine() -> Result<Machine> {
    let of = |program: &str, word: &str| {
        let mut command = Command::new(program);
        command.arg(word);
        command
    };
    let ours = paths::program("palanquin")?;
    Machine::this(&[
        ("qemu", of("qemu-system-x86_64", "--version")),
        ("ssh", of("ssh", "-V")),
        ("strongswan", of("/usr/lib/ipsec/charon", "--version")),
        ("iperf3", of("iperf3", "--version")),
        ("palanquin", of(&ours.display().to_string(), "--version")),
    ])
}

fn done(results: &Results, transport: &str, mtu: u32, run: u32) -> bool {
    let legs = results.legs().filter(|leg| {
        leg.transport == transport && leg.mtu == mtu && leg.run == run && leg.way == "back"
    });
    let broken = results.legs().filter(|leg| {
        leg.transport == transport && leg.mtu == mtu && leg.run == run && !leg.completed
    });
    legs.count() + broken.count() > 0
}

fn path_done(results: &Results, path: &str, mtu: u32, run: u32) -> bool {
    results
        .paths()
        .any(|cell| cell.path == path && cell.mtu == mtu && cell.run == run)
}

fn transports(options: &Options) -> Vec<Option<Transport>> {
    let others = Transport::ALL.into_iter().map(Some);
    others
        .chain([None])
        .filter(|transport| options.wants(name(*transport)))
        .collect()
}

fn name(transport: Option<Transport>) -> &'static str {
    transport.map_or(PALANQUIN, Transport::name)
}

fn left(options: &Options, results: &Results, mtu: u32) -> bool {
    (1..=options.runs).any(|run| {
        let transports = transports(options);
        transports
            .iter()
            .any(|transport| !done(results, name(*transport), mtu, run))
            || path::PATHS.iter().any(|path| {
                options.wants(path.transport()) && !path_done(results, path.name(), mtu, run)
            })
    })
}

/// All runs with one MTU. Transports take turns, so that what changes on the machine meets all of them.
fn at(options: &Options, results: &mut Results, mtu: u32) -> Result<()> {
    println!("==> MTU {mtu}: two hosts, a client and an observer, joined by a switch");
    let rig = Rig::new(&RigSpec::default())?;
    rig.set_mtu(mtu)?;
    let archive = letter(rig.dir())?;
    let server = FileServer::start(&rig.client, &archive)?;
    let credentials = [0, 1].map(|index| rig.dir().join(format!("tls-{index}")));
    for (host, dir) in rig.hosts.iter().zip(&credentials) {
        tls::make(dir, host.spec.address.parse()?)?;
    }
    for run in 1..=options.runs {
        for path in path::PATHS {
            if options.wants(path.transport()) && !path_done(results, path.name(), mtu, run) {
                let cell = path::measure(&rig, path, mtu, run);
                show_path(&cell);
                results.add(Line::Path(cell))?;
            }
        }
        for transport in transports(options) {
            if done(results, name(transport), mtu, run) {
                continue;
            }
            warm_up(options.memory_mib)?;
            let mut keep = |mut leg: Leg| {
                (leg.mtu, leg.run) = (mtu, run);
                show(&leg);
                // A run that was interrupted on its way back begins again with the way there.
                let again = results.legs().any(|before| {
                    (&before.transport, before.mtu, before.run, &before.way)
                        == (&leg.transport, mtu, run, &leg.way)
                });
                if again {
                    return Ok(());
                }
                results.add(Line::Leg(leg))
            };
            let guest = options.guest();
            match transport {
                Some(transport) => qemu::round(&rig, &guest, transport, &credentials, &mut keep),
                None => palanquin::round(&rig, &guest, &mut keep),
            }
            .with_context(|| format!("{}, MTU {mtu}, run {run}", name(transport)))?;
        }
    }
    server.finish(&rig.client)
}

/// The archive with the file: as a text editor saves it, and as Windows' own does.
fn letter(dir: &Path) -> Result<PathBuf> {
    let source = dir.join("letter");
    fs::create_dir_all(&source)?;
    fs::write(source.join("letter.txt"), format!("{SENTENCE}\n"))?;
    let wide = "\u{feff}"
        .encode_utf16()
        .chain(SENTENCE.encode_utf16())
        .flat_map(u16::to_le_bytes);
    fs::write(source.join("letter-utf16.txt"), wide.collect::<Vec<u8>>())?;
    let archive = dir.join("letter.tar");
    let mut tar = Command::new("tar");
    tar.arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(&source)
        .args(["letter.txt", "letter-utf16.txt"]);
    let packed = process::output(&mut tar, PATIENCE)?;
    if !packed.status.success() {
        bail!("tar: {}", String::from_utf8_lossy(&packed.stderr));
    }
    Ok(archive)
}

fn show(leg: &Leg) {
    let found = leg.ascii_found + leg.utf16_found;
    let sentence = match leg.segment_found {
        Some(inside) => format!("found {found} times, {inside} within the segment"),
        None if found == 0 => "not found".to_owned(),
        None => format!("FOUND {found} times"),
    };
    let downtime = leg
        .downtime_ms
        .map_or("-".to_owned(), |ms| format!("{ms:.0}"));
    let ended = leg
        .reason
        .as_ref()
        .map_or(String::new(), |why| format!("; NOT completed: {why}"));
    println!(
        "run {} {:<13}{:<6}sentence {sentence}; total {:.0} ms, downtime {downtime} ms, {} pings lost, {:.1} MiB in {} packets, \
         CPU {:.0} %, peak {:.0} %{ended}",
        leg.run,
        leg.transport,
        leg.way,
        leg.total_ms,
        leg.lost_pings,
        leg.bytes as f64 / f64::from(1 << 20),
        leg.packets,
        leg.cpu_percent,
        leg.peak_cpu_percent,
    );
}

fn show_path(cell: &PathCell) {
    let shown = |value: Option<f64>, digits: usize| {
        value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
    };
    println!(
        "run {} path {:<8} ping {} ms, {} Mbit/s{}",
        cell.run,
        cell.path,
        shown(cell.rtt_ms, 3),
        shown(cell.mbit_s, 0),
        cell.reason
            .as_ref()
            .map_or(String::new(), |why| format!(" ({why})"))
    );
}
