//! Migrations that succeed, on real QEMU.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_lab::guest::{Console, GuestSpec};
use palanquin_lab::host::Host;
use palanquin_lab::paths::guest_dir;
use palanquin_lab::probe::{self, Connection};
use palanquin_lab::process;
use palanquin_lab::qemu::Qemu;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;
use rustix::process::Signal;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 10);
const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_guest_and_its_connection_survive_three_round_trips() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let guest = GuestSpec::small("traveller").filled(32).on_network();
    let console = rig.hosts[0].boot(&guest)?;
    console.wait_verified(2048, LONG)?;
    let before = probe::status(&rig.client, GUEST)?;
    let connection = Connection::start(&rig.client, GUEST)?;
    let mut epoch = 0;
    for _ in 0..3 {
        for (from, to) in [(0, 1), (1, 0)] {
            let info = rig.move_vm("traveller", from, to)?;
            ensure!(info.epoch > epoch, "epoch {} after {epoch}", info.epoch);
            epoch = info.epoch;
            same_root_on_both_sides(&rig, &info)?;
        }
    }
    let report = connection.finish().context("the connection broke")?;
    ensure!(report.lines > 100, "{report:?}");
    // A sweep over all that is rewritten, after the last move.
    let after = probe::status(&rig.client, GUEST)?;
    rig.hosts[0]
        .console("traveller")?
        .wait_verified(after.verified_pages + 4096, LONG)?;
    let after = probe::status(&rig.client, GUEST)?;
    ensure!(after.corrupt_pages == 0, "{after:?}");
    ensure!(
        after.boot_id == before.boot_id,
        "the guest has started again"
    );
    ensure!(after.sweeps > before.sweeps, "{before:?} {after:?}");
    Ok(())
}

fn same_root_on_both_sides(rig: &Rig, info: &palanquin_api::control::MigrationInfo) -> Result<()> {
    ensure!(info.memory_root.is_some(), "no root in {info:?}");
    for host in &rig.hosts {
        let there = host.migration(info.id)?;
        ensure!(
            there.memory_root == info.memory_root,
            "{} has another root",
            host.name()
        );
    }
    Ok(())
}

#[test]
fn a_guest_with_two_memory_backends_arrives_whole() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let mut guest = GuestSpec::small("numa").filled(96);
    guest.memory_mib = vec![128, 128];
    rig.hosts[0].boot(&guest)?;
    let there = rig.move_vm("numa", 0, 1)?;
    ensure!(there.ram_bytes >= 256 << 20, "{there:?}");
    // More than one backend can hold.
    ensure!(there.bytes_guest > 96 << 20, "{there:?}");
    let console = rig.check_lives_once("numa", 1)?;
    let beat = console.wait_beats(5, LONG)?;
    console.wait_verified(beat.verified + 2000, LONG)?;
    rig.move_vm("numa", 1, 0)?;
    Ok(())
}

#[test]
fn a_running_qemu_that_others_started_is_adopted_and_moved() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let mut guest = GuestSpec::small("stray");
    guest.memory_mib = vec![192];
    let qemu = start_by_hand(
        &rig.hosts[0],
        &guest,
        "memory-backend-memfd,id=mem,size=192M,share=on",
    )?;
    qemu.console().wait_for("palanquin-workload ready", LONG)?;
    adopt(&rig.hosts[0], "stray", &qemu)?;
    let there = rig.hosts[0].vm("stray")?.context("it was not adopted")?;
    ensure!(there.adopted && there.pid == Some(qemu.pid()), "{there:?}");
    rig.move_vm("stray", 0, 1)?;
    rig.move_vm("stray", 1, 0)?;
    rig.check_lives_once("stray", 0)?.wait_beats(5, LONG)?;
    Ok(())
}

/// Starts a guest as an administrator would who knows nothing of Palanquin.
fn start_by_hand(host: &Host, guest: &GuestSpec, memory: &str) -> Result<Qemu> {
    let dir = guest_dir()?;
    let size = format!("{}M", guest.memory_mib[0]);
    let arguments = [
        "-accel",
        "tcg",
        "-m",
        &size,
        "-object",
        memory,
        "-machine",
        "q35,memory-backend=mem",
        "-kernel",
        &dir.join("vmlinuz").display().to_string(),
        "-initrd",
        &dir.join("initrd.gz").display().to_string(),
        "-append",
        &guest.command_line(),
    ]
    .map(str::to_owned);
    let command = host.namespace.command("qemu-system-x86_64");
    Qemu::start(command, &host.dir().join("by-hand"), arguments)
}

fn adopt(host: &Host, name: &str, qemu: &Qemu) -> Result<()> {
    let (pid, qmp) = (
        qemu.pid().to_string(),
        qemu.qmp_path().display().to_string(),
    );
    host.palanquin(&["vm", "adopt", name, "--pid", &pid, "--qmp", &qmp])?
        .expect_status(0)?;
    Ok(())
}

/// On KVM where that opens: Linux may not boot on it, a boot sector does.
#[test]
fn a_boot_sector_that_never_rests_arrives_untorn() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let spec = rig.dir().join("sweeper.toml");
    let image = guest_dir()?.join("dirty_loop.img");
    let text = format!(
        "name = \"sweeper\"\nmemory = \"128MiB\"\n[[disk]]\npath = {image:?}\ninterface = \"ide\"\nephemeral = true\n"
    );
    fs::write(&spec, text)?;
    let words = ["vm", "run", &spec.display().to_string()].map(str::to_owned);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    rig.hosts[0].palanquin(&words)?.expect_status(0)?;
    wait_sweeps(&rig.hosts[0].console("sweeper")?, 3)?;
    for (from, to) in [(0, 1), (1, 0)] {
        // It rewrites all it has without a pause, so no round makes the rest smaller: the pause may be long.
        let told = rig.migrate("sweeper", from, to, &["--max-downtime", "2s"])?;
        let info = told
            .expect_status(0)
            .with_context(|| rig.logs())?
            .migration()?;
        ensure!(info.verified, "{info:?}");
        same_root_on_both_sides(&rig, &info)?;
        let host = &rig.hosts[to];
        let console = host.console("sweeper")?;
        wait_sweeps(&console, 3)?;
        sweep_is_untorn(host)?;
        ensure!(
            rig.hosts[from].qemus()?.is_empty(),
            "a process is left behind"
        );
    }
    Ok(())
}

fn wait_sweeps(console: &Console, more: usize) -> Result<()> {
    let sweeps = || console.text().matches('B').count();
    let before = sweeps();
    wait::until_true("the boot sector sweeps", LONG, || {
        Ok(sweeps() >= before + more)
    })
    .with_context(|| console.tail())
}

/// The sweep adds one to a byte of each page in order: at any moment there is one value up to some page, and the
/// value before from there on. A page lost or old breaks that for good.
fn sweep_is_untorn(host: &Host) -> Result<()> {
    let pid = *host.qemus()?.first().context("no QEMU")?;
    let memory = guest_memory(pid)?;
    process::signal(pid, Signal::STOP);
    // Stopping is not waited for by kill(2): the state says when every thread stands still.
    let stopped = wait::until_true("QEMU stands still", LONG, || {
        Ok(fs::read_dir(format!("/proc/{pid}/task"))?
            .flatten()
            .all(|task| {
                let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(')')
                    .next()
                    .is_some_and(|rest| rest.starts_with(" T"))
            }))
    });
    let read = stopped.and_then(|()| {
        let mut values = Vec::new();
        for page in (0x10_0000_u64..0x400_0000).step_by(4096) {
            let mut byte = [0];
            memory.read_exact_at(&mut byte, page)?;
            values.push(byte[0]);
        }
        Ok(values)
    });
    process::signal(pid, Signal::CONT);
    let values = read?;
    let steps: Vec<(usize, u8, u8)> = values
        .windows(2)
        .enumerate()
        .filter(|(_, pair)| pair[0] != pair[1])
        .map(|(page, pair)| (page, pair[0], pair[1]))
        .collect();
    let one_step = match steps[..] {
        [] => true,
        [(_, before, after)] => before == after.wrapping_add(1),
        _ => false,
    };
    ensure!(one_step, "the sweep is torn at {steps:?}");
    Ok(())
}

fn guest_memory(pid: u32) -> Result<File> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let link = fs::read_link(entry.path())?;
        if link.to_string_lossy().contains("memory-backend-memfd") {
            return Ok(File::open(entry.path())?);
        }
    }
    anyhow::bail!("no guest memory in process {pid}")
}
