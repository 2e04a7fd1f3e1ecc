//! `palanquin watch inside` in a real guest: what it says on the guest's console when the guest is moved, and when it is
//! stopped for a while; and whether it says so while its memory is still being copied.
//!
//! `PALANQUIN_INSIDE_MOVES=10` moves it so often by each of Palanquin and QEMU, and prints when it said so.
//! `PALANQUIN_INSIDE_LOOKS=1800` leaves the one that is stopped alone for so many looks before that, and prints the largest statistics.
//! `PALANQUIN_INSIDE_EVERY=5s` has it look as often as it does by default.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use palanquin_api::control::Phase;
use palanquin_lab::file_server::FileServer;
use palanquin_lab::guest::{Console, GuestSpec, mac};
use palanquin_lab::paths::{guest_dir, program};
use palanquin_lab::process;
use palanquin_lab::qemu::Qemu;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::transport::{self, Role, Transport};
use palanquin_lab::wait;
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(180);
/// Samples after which clocks are known well enough.
const KNOWN: usize = 16;
/// Samples within which something is found.
const FOUND: usize = 12;
/// How long the guest is stopped.
const PAUSE: Duration = Duration::from_millis(700);

fn run(command: &mut Command) -> Result<String> {
    let output = process::output(command, LONG)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{command:?}: {output:?}");
    Ok(text)
}

/// Packs the program, what it needs, and how to start it.
fn archive(rig: &Rig) -> Result<PathBuf> {
    let dir = rig.dir().join("files");
    fs::create_dir_all(dir.join("lib"))?;
    let palanquin = program("palanquin")?;
    run(Command::new("strip")
        .arg("-o")
        .arg(dir.join("palanquin"))
        .arg(&palanquin))?;
    // `NAME => /path/NAME (address)`, and the loader without a name.
    for line in run(Command::new("ldd").arg(&palanquin))?.lines() {
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        if let Some(path) = path.map(Path::new) {
            let name = path.file_name().context("no name of a library")?;
            fs::copy(path, dir.join("lib").join(name))?;
        }
    }
    let start = dir.join("start");
    let every = std::env::var("PALANQUIN_INSIDE_EVERY").unwrap_or_else(|_| "1s".to_owned());
    fs::write(
        &start,
        format!(
            "#!/bin/sh\ncd /files\nexec lib/ld-linux-x86-64.so.2 --library-path lib ./palanquin --json watch inside \
             --every {every} --neighbour client=10.77.2.1 --samples\n"
        ),
    )?;
    fs::set_permissions(&start, fs::Permissions::from_mode(0o755))?;
    let archive = rig.dir().join("files.tar");
    let mut tar = Command::new("tar");
    run(tar.arg("-cf").arg(&archive).arg("-C").arg(&dir).arg("."))?;
    Ok(archive)
}

/// The guest, which watches itself.
fn guest() -> GuestSpec {
    let mut guest = GuestSpec::small("traveller").on_network();
    guest.memory_mib = vec![512];
    guest.files = Some(FileServer::url());
    guest
}

/// What it said of that kind. Lines that a migration has cut are none.
fn said(console: &Console, event: &str) -> Vec<Value> {
    let text = console.text();
    let lines = text
        .lines()
        .filter_map(|line| line.find('{').map(|at| &line[at..]));
    lines
        .filter_map(|line| serde_json::from_str::<Value>(line.trim_end()).ok())
        .filter(|value| value["event"] == event)
        .collect()
}

fn wait_start(console: &Console) -> Result<Value> {
    wait::until("the guest says what it looks like", LONG, || {
        Ok(said(console, "start").into_iter().next())
    })
    .with_context(|| console.tail())
}

fn wait_samples(console: &Console, more: usize) -> Result<()> {
    let before = said(console, "sample").len();
    wait::until_true("the guest looks at itself", LONG, || {
        Ok(said(console, "sample").len() >= before + more)
    })
    .with_context(|| console.tail())
}

/// What was told last of having stood still, within some samples.
fn stood_still(console: &Console) -> Result<Value> {
    let found = || {
        let all = said(console, "finding");
        all.into_iter()
            .rev()
            .find(|finding| finding["stood_still_ms"].is_number())
    };
    for _ in 0..FOUND {
        if let Some(finding) = found() {
            eprintln!("{finding:#}");
            return Ok(finding);
        }
        wait_samples(console, 1)?;
    }
    let samples = said(console, "sample");
    let statistics: Vec<&Value> = samples.iter().map(|of| &of["statistics"]).collect();
    anyhow::bail!("nothing was noticed: {statistics:?}")
}

/// Nothing is found before anything happens, but for notes: the machine is busy.
fn nothing_yet(console: &Console) -> Result<()> {
    let early = said(console, "finding");
    let calm = early.iter().all(|finding| finding["level"] == "note");
    ensure!(calm, "{early:#?}");
    Ok(())
}

/// Leaves a guest alone for as many samples as `PALANQUIN_INSIDE_LOOKS` says, and prints what thresholds are set by.
fn wait_quiet(console: &Console) -> Result<()> {
    let looks = match std::env::var("PALANQUIN_INSIDE_LOOKS") {
        Ok(text) => text.parse()?,
        Err(_) => KNOWN,
    };
    while said(console, "sample").len() < looks {
        wait_samples(console, 1)?;
        nothing_yet(console)?;
    }
    ensure!(copies(console).is_empty(), "{}", console.tail());
    let mut most: BTreeMap<String, f64> = BTreeMap::new();
    let mut larger = |name: &str, value: f64| {
        let most = most.entry(name.to_owned()).or_default();
        *most = value.max(*most);
    };
    for sample in said(console, "sample") {
        for (name, value) in sample["statistics"].as_object().context("no statistics")? {
            larger(name, value.as_f64().unwrap_or_default());
        }
        let writes = &sample["sample"]["writes"];
        let [first, again] =
            ["first_ns", "again_ns"].map(|name| writes[name].as_f64().unwrap_or_default());
        larger("first write later by ns", first - again);
    }
    eprintln!("at least {looks} looks, at most {most:#?}");
    Ok(())
}

/// Bytes of a second that QEMU copies where its migration is to take a while.
const SLOW_BYTES_PER_S: u64 = 16_000_000;
/// Samples after which an earlier copy is forgotten.
const FORGOTTEN: usize = 6;

/// How often a guest is moved.
fn moves() -> Result<usize> {
    match std::env::var("PALANQUIN_INSIDE_MOVES") {
        Ok(text) => Ok(text.parse()?),
        Err(_) => Ok(1),
    }
}

/// When a guest said that it is being copied.
#[derive(Debug)]
struct Warning {
    /// From when it began to be copied, and nothing if it did not say so before it was stopped.
    after: Option<Duration>,
    /// How many times as long first writes took then.
    times: f64,
    /// From then until pages were no longer copied while it ran.
    copied: Duration,
}

/// Waits for the word of a guest, or for the end of the copying. `is_copied` tells that it goes on.
fn wait_warning(
    console: &Console,
    before: usize,
    mut is_copied: impl FnMut() -> Result<bool>,
) -> Result<Warning> {
    let began = Instant::now();
    let (mut after, mut times) = (None, 0.0);
    loop {
        // Asked first: what the guest says afterwards may be of the time after that.
        let goes_on = is_copied()?;
        let told = copies(console);
        if let (true, None, Some(last)) =
            (goes_on, after, told.get(before..).and_then(<[f64]>::last))
        {
            after = Some(began.elapsed());
            times = *last;
        }
        if !goes_on {
            return Ok(Warning {
                after,
                times,
                copied: began.elapsed(),
            });
        }
        ensure!(began.elapsed() < LONG, "it is copied for too long");
        wait::pause(Duration::from_millis(20))?;
    }
}

/// How many times as long first writes took, each time that it said anew that it is being copied.
fn copies(console: &Console) -> Vec<f64> {
    let news = |finding: &Value| {
        let last = finding["evidence"].as_array()?.last()?;
        let is_new = !finding["ended_s"].is_number() && last["of"] == "first-write";
        is_new.then(|| last["value"].as_f64()).flatten()
    };
    said(console, "finding").iter().filter_map(news).collect()
}

fn summary(name: &str, warnings: &[Warning]) -> Result<()> {
    let warned = warnings.iter().filter(|of| of.after.is_some()).count();
    let told = warnings.iter().filter(|of| of.after.is_some());
    let least = told.map(|of| of.times).fold(f64::MAX, f64::min);
    eprintln!(
        "{name}: warned of {warned} of {}, by first writes that took at least {least:.1} times as long: {warnings:.1?}",
        warnings.len()
    );
    let long = warnings
        .iter()
        .all(|warning| warning.copied > Duration::from_secs(10));
    ensure!(long, "a migration was too short to tell anything");
    // The least that is asked of a detector of such migrations is 70 %.
    ensure!(10 * warned >= 7 * warnings.len(), "{warnings:?}");
    Ok(())
}

fn seen(finding: &Value, of: &str) -> bool {
    let evidence = finding["evidence"].as_array();
    evidence.is_some_and(|all| all.iter().any(|one| one["of"] == of))
}

#[test]
fn a_guest_notices_its_own_migration_by_the_hardware_clock() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let server = FileServer::start(&rig.client, &archive(&rig)?)?;
    let console = rig.hosts[0].boot(&guest())?;
    let start = wait_start(&console)?;
    eprintln!("{start:#}");
    ensure!(
        start["fingerprint"]["hypervisor"] == "TCGTCGTCGTCG",
        "{start:#}"
    );
    ensure!(start["clocks"]["rtc"].is_object(), "{start:#}");
    wait_samples(&console, KNOWN)?;
    nothing_yet(&console)?;
    let info = rig.move_vm("traveller", 0, 1)?;
    let downtime_ms = info.downtime_ms;
    let console = rig.hosts[1].console("traveller")?;
    let finding = stood_still(&console)?;
    let stood_ms = finding["stood_still_ms"].as_f64().unwrap_or_default();
    eprintln!("stood still for {stood_ms:.1} ms, downtime {downtime_ms} ms");
    // Under TCG all of the guest's clocks but this one stand still from the stop to the start.
    ensure!(
        (stood_ms - downtime_ms).abs() < 30.0 + 0.3 * downtime_ms,
        "{finding:#}"
    );
    // Both hosts are this machine: nothing says that it goes on elsewhere, and nothing may. That it was copied shows if it
    // took long enough.
    let (level, class) = if seen(&finding, "first-write") {
        ("alarm", "migration")
    } else {
        ("warn", "pause")
    };
    ensure!(
        finding["level"] == level && finding["class"] == class,
        "{finding:#}"
    );
    server.finish(&rig.client)?;
    Ok(())
}

#[test]
fn a_guest_notices_that_it_was_stopped_and_for_how_long() -> Result<()> {
    let rig = Rig::without_agents(&RigSpec::default())?;
    let server = FileServer::start(&rig.client, &archive(&rig)?)?;
    let (host, guest, dir) = (&rig.hosts[0], guest(), guest_dir()?);
    let (address, tap) = guest.network.clone().context("no network")?;
    let shown = |file: &str| dir.join(file).display().to_string();
    let arguments = [
        "-accel".to_owned(),
        "tcg".to_owned(),
        "-m".to_owned(),
        format!("{}M", guest.memory_mib[0]),
        "-machine".to_owned(),
        "q35".to_owned(),
        "-kernel".to_owned(),
        shown("vmlinuz"),
        "-initrd".to_owned(),
        shown("initrd.gz"),
        "-append".to_owned(),
        guest.command_line(),
        "-netdev".to_owned(),
        format!("tap,id=net,ifname={tap},script=no,downscript=no"),
        "-device".to_owned(),
        format!("virtio-net-pci,netdev=net,mac={}", mac(&address)),
    ];
    let command = host.namespace.command("qemu-system-x86_64");
    let qemu = Qemu::start(command, &host.dir().join("by-hand"), arguments)?;
    let console = qemu.console();
    wait_start(&console)?;
    wait_quiet(&console)?;
    let mut qmp = qemu.qmp()?;
    qmp.execute("stop", &json!({}))?;
    let stopped = qmp.wait_event("STOP")?;
    wait::pause(PAUSE)?;
    qmp.execute("cont", &json!({}))?;
    let went_on = qmp.wait_event("RESUME")?;
    let pause_ms = went_on.saturating_sub(stopped).as_secs_f64() * 1e3;
    let finding = stood_still(&console)?;
    let stood_ms = finding["stood_still_ms"].as_f64().unwrap_or_default();
    eprintln!("stood still for {stood_ms:.1} ms, stopped for {pause_ms:.1} ms");
    ensure!((stood_ms - pause_ms).abs() < 30.0, "{finding:#}");
    ensure!(
        finding["level"] == "warn" && finding["class"] == "pause",
        "{finding:#}"
    );
    ensure!(seen(&finding, "hardware-clock"), "{finding:#}");
    server.finish(&rig.client)?;
    Ok(())
}

#[test]
fn a_guest_notices_that_palanquin_copies_it_before_it_is_stopped() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let server = FileServer::start(&rig.client, &archive(&rig)?)?;
    let console = rig.hosts[0].boot(&guest())?;
    wait_start(&console)?;
    wait_samples(&console, KNOWN)?;
    nothing_yet(&console)?;
    ensure!(copies(&console).is_empty(), "{}", console.tail());
    let mut warnings = Vec::new();
    for number in 0..moves()? {
        let from = number % 2;
        let console = rig.hosts[from].console("traveller")?;
        let before = copies(&console).len();
        let (running, id) = rig.begin_slow_migration("traveller", from, 1 - from)?;
        warnings.push(wait_warning(&console, before, || {
            Ok(rig.hosts[from].migration(id)?.phase == Phase::PreCopy)
        })?);
        running.finish(LONG)?.expect_status(0)?;
        let console = rig.check_lives_once("traveller", 1 - from)?;
        if number == 0 {
            let finding = stood_still(&console)?;
            // Copied, and then it stood still.
            ensure!(
                finding["level"] == "alarm" && finding["class"] == "migration",
                "{finding:#}"
            );
            ensure!(seen(&finding, "first-write"), "{finding:#}");
        }
        wait_samples(&console, FORGOTTEN)?;
    }
    summary("Palanquin", &warnings)?;
    server.finish(&rig.client)?;
    Ok(())
}

#[test]
fn a_guest_notices_that_qemu_copies_it_before_it_is_stopped() -> Result<()> {
    let rig = Rig::without_agents(&RigSpec::default())?;
    let server = FileServer::start(&rig.client, &archive(&rig)?)?;
    let mut warnings = Vec::new();
    // One guest for each: not every one outlives QEMU's own migration.
    for _ in 0..moves()? {
        let mut from = transport::start(&rig.hosts[0], &guest(), None, &Role::Outgoing)?;
        let mut to = transport::start(&rig.hosts[1], &guest(), None, &Role::Incoming)?;
        let console = from.console();
        wait_start(&console)?;
        wait_samples(&console, KNOWN)?;
        nothing_yet(&console)?;
        ensure!(copies(&console).is_empty(), "{}", console.tail());
        let (mut source, mut destination) = (from.qmp()?, to.qmp()?);
        let ends = transport::endpoints(Transport::Plain, &rig.hosts[0], &rig.hosts[1])?;
        for qmp in [&mut source, &mut destination] {
            transport::configure(qmp, Transport::Plain, 1)?;
        }
        let slow = json!({"max-bandwidth": SLOW_BYTES_PER_S});
        source.execute("migrate-set-parameters", &slow)?;
        destination.execute("migrate-incoming", &json!({"uri": ends.listen}))?;
        source.execute("migrate", &json!({"uri": ends.connect}))?;
        warnings.push(wait_warning(&console, 0, || {
            let status = source.execute("query-status", &json!({}))?;
            Ok(status["status"] == "running")
        })?);
        destination.wait_event("RESUME")?;
        from.kill();
        to.kill();
    }
    summary("QEMU", &warnings)?;
    server.finish(&rig.client)?;
    Ok(())
}
