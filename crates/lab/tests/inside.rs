//! `palanquin watch inside` in a real guest: what it says on the guest's console when the guest is moved, and when it is
//! stopped for a while.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_lab::file_server::FileServer;
use palanquin_lab::guest::{Console, GuestSpec, mac};
use palanquin_lab::paths::{guest_dir, program};
use palanquin_lab::process;
use palanquin_lab::qemu::Qemu;
use palanquin_lab::rig::{Rig, RigSpec};
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
    fs::write(
        &start,
        "#!/bin/sh\ncd /files\nexec lib/ld-linux-x86-64.so.2 --library-path lib ./palanquin --json watch inside \
         --every 1s --neighbour client=10.77.2.1 --samples\n",
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
    // Both hosts are this machine: nothing says that it goes on elsewhere, and nothing may.
    ensure!(
        finding["level"] == "warn" && finding["class"] == "pause",
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
    wait_samples(&console, KNOWN)?;
    nothing_yet(&console)?;
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
