//! The demo: there and back, with an observer on the wire.

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use palanquin_api::control::MigrationInfo;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::observer::Capture;
use palanquin_lab::paths;
use palanquin_lab::probe::{self, Connection, ConnectionReport, PingReport, Pings};
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;

/// Sentence in the guest's memory, which nobody on the wire may see.
const CANARY: &str = "The heron stands in the shallow water at dawn";
/// Sentence that a client sends in the clear, which shows that the observer sees what there is to see.
const CONTROL: &str = "This sentence was sent without encryption on purpose";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 10);
const VM: &str = "web";

/// Options of the demo
#[derive(Args)]
pub(crate) struct Options {
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(192..=65536))]
    memory_mib: u64,
    /// How much of it holds incompressible bytes, in MiB
    #[arg(long, default_value_t = 128)]
    fill_mib: u64,
    /// How much the guest rewrites each second, in MiB
    #[arg(long, default_value_t = 8)]
    dirty_mib_s: u64,
    /// Speed of the link between the hosts in Mbit/s [default: as fast as this machine can]
    #[arg(long)]
    link_mbit_s: Option<u32>,
}

/// What one migration showed, from inside and from outside.
struct Leg {
    info: MigrationInfo,
    pings: PingReport,
    connection: ConnectionReport,
}

/// Runs the demo.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.fill_mib + 96 > options.memory_mib {
        bail!(
            "a guest of {} MiB cannot hold {} MiB and itself",
            options.memory_mib,
            options.fill_mib
        );
    }
    step("two hosts, a client and an observer, joined by a switch");
    let rig = Rig::new(&RigSpec {
        link_mbit_s: options.link_mbit_s,
        ..RigSpec::default()
    })?;
    step("boot a Linux guest on host a");
    let mut guest = GuestSpec::small(VM).filled(options.fill_mib).on_network();
    guest.memory_mib = vec![options.memory_mib];
    guest.dirty_mib_s = options.dirty_mib_s;
    guest.canary = CANARY.to_owned();
    let console = rig.hosts[0].boot(&guest)?;
    console.wait_verified(4096, Duration::from_secs(60))?;
    let before = probe::status(&rig.client, GUEST).context("the guest does not answer")?;

    step("record the wire");
    let recording = rig.record()?;
    probe::echo(&rig.client, GUEST, CONTROL)?;
    let there = leg(&rig, 0, 1)?;
    let back = leg(&rig, 1, 0)?;
    let capture = recording.finish()?;

    let console = rig.hosts[0].console(VM)?;
    let beat = console.wait_beats(5, Duration::from_secs(30))?;
    let after = probe::status(&rig.client, GUEST).context("the guest does not answer")?;
    if before.boot_id != after.boot_id {
        bail!("the guest has started again meanwhile");
    }
    let canary = capture.count(CANARY)?;
    let control = capture.count(CONTROL)?;
    table(&there, &back);
    wire(&capture, canary, control);
    println!(
        "guest         {} pages verified from inside, {} corrupt; up for {:.0} s, never restarted",
        beat.verified, beat.corrupt, after.uptime_s
    );
    if canary != 0 {
        bail!("the canary was found on the wire");
    }
    if control == 0 {
        bail!("the observer did not even see what was sent in the clear");
    }
    if after.corrupt_pages != 0 || !there.info.verified || !back.info.verified {
        bail!("the guest's memory did not arrive whole");
    }
    Ok(())
}

fn step(what: &str) {
    println!("==> {what}");
}

fn leg(rig: &Rig, from: usize, to: usize) -> Result<Leg> {
    let (source, destination) = (&rig.hosts[from], &rig.hosts[to]);
    step(&format!(
        "migrate {VM} from {} to {}",
        source.name(),
        destination.name()
    ));
    let pings = Pings::start(&rig.client, GUEST)?;
    let connection = Connection::start(&rig.client, GUEST)?;
    // The command itself, so that its progress is seen on a terminal.
    let mut command = Command::new(paths::program("palanquin")?);
    command
        .arg("--socket")
        .arg(source.socket())
        .args(["migrate", VM, "--to", destination.name()])
        .stdin(Stdio::null());
    let status = command.status().context("cannot start palanquin")?;
    if !status.success() {
        bail!("the migration failed ({status}); {}", rig.logs());
    }
    // The client sees the end of the pause a moment later than the agents.
    wait::pause(Duration::from_secs(1))?;
    let connection = connection
        .finish()
        .context("the client's connection did not survive")?;
    let pings = pings.finish()?;
    rig.check_lives_once(VM, to)?;
    let ended = source
        .migrations()?
        .into_iter()
        .max_by_key(|info| info.epoch);
    Ok(Leg {
        info: ended.context("the agent knows of no migration")?,
        pings,
        connection,
    })
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn table(there: &Leg, back: &Leg) {
    let row = |name: &str, cell: &dyn Fn(&Leg) -> String| {
        println!("{name:<34}{:>26}{:>26}", cell(there), cell(back));
    };
    let way = |leg: &Leg| format!("{} to {}", leg.info.from, leg.info.to);
    let known = |text: &Option<String>| text.clone().unwrap_or_else(|| "unknown".to_owned());
    println!();
    row("", &way);
    row("total time", &|leg| {
        format!("{:.0} ms", leg.info.total_time_ms)
    });
    row("downtime, as the agent measured it", &|leg| {
        format!("{:.1} ms", leg.info.downtime_ms)
    });
    row("longest gap, as a ping saw it", &|leg| {
        format!(
            "{:.0} ms, {} lost",
            leg.pings.longest_gap_ms, leg.pings.lost
        )
    });
    row("longest gap, as a TCP client saw it", &|leg| {
        format!("{:.0} ms", leg.connection.longest_gap_ms)
    });
    row("rounds", &|leg| leg.info.rounds.to_string());
    row("guest memory sent", &|leg| mib(leg.info.bytes_guest));
    row("bytes on the wire", &|leg| mib(leg.info.bytes_on_wire));
    row("cipher", &|leg| known(&leg.info.cipher));
    row("key exchange", &|leg| known(&leg.info.key_exchange));
    row("memory root equal", &|leg| yes(leg.info.verified));
    row("memory root", &|leg| {
        let root = known(&leg.info.memory_root);
        root.get(..16).unwrap_or(&root).to_owned()
    });
    println!();
}

fn yes(so: bool) -> String {
    if so { "yes" } else { "NO" }.to_owned()
}

fn wire(capture: &Capture, canary: u64, control: u64) {
    let found = if canary == 0 {
        "no".to_owned()
    } else {
        format!("YES, {canary} times")
    };
    println!("canary found on the wire: {found}");
    println!(
        "observer      {} recorded, {} packets missed; a sentence sent in the clear was found {control} times",
        mib(capture.bytes),
        capture.dropped
    );
}
