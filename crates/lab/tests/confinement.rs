//! What talks to other hosts and what runs guests has no privileges, and the network process may die at any moment.
#![forbid(unsafe_code)]

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use palanquin_api::control::{HostInfo, MigrationInfo, Outcome, Phase};
use palanquin_lab::control;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::Host;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;
use rustix::process::{Pid, Signal, kill_process};

const VM: &str = "wren";
const LONG: Duration = Duration::from_secs(90);

fn rig() -> Result<Rig> {
    let rig = Rig::new(&RigSpec::default())?;
    let mut guest = GuestSpec::small(VM).filled(64);
    guest.buffer_mib = 32;
    guest.dirty_mib_s = 100;
    rig.hosts[0].boot(&guest)?.wait_verified(2048, LONG)?;
    Ok(rig)
}

/// A line of `/proc/PID/status`.
fn status(pid: u32, key: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found == key).then(|| value.trim().to_owned())
    });
    line.with_context(|| format!("no {key} of process {pid}"))
}

fn is_nobody(pid: u32) -> Result<()> {
    ensure!(status(pid, "Uid")? == "65534\t65534\t65534\t65534");
    ensure!(status(pid, "NoNewPrivs")? == "1");
    ensure!(status(pid, "Seccomp")? == "2");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        ensure!(status(pid, set)? == "0000000000000000", "{set}");
    }
    Ok(())
}

/// What the descriptors of a process are.
fn descriptors(pid: u32) -> Result<Vec<String>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One may be closed meanwhile.
        if let Ok(link) = fs::read_link(entry?.path()) {
            links.push(link.to_string_lossy().into_owned());
        }
    }
    Ok(links)
}

fn guest_memory(host: &Host) -> Result<usize> {
    let pid = host.network_pid()?.context("no network process")?;
    let links = descriptors(pid)?;
    for link in &links {
        let known = ["socket:", "/memfd:", "/dev/null"];
        // Its log is the agent's.
        let is_log = *link == host.log().display().to_string();
        ensure!(
            is_log || known.iter().any(|kind| link.starts_with(kind)),
            "it has {link} open"
        );
    }
    let memory = links.iter().filter(|link| link.contains("memory-backend"));
    Ok(memory.count())
}

fn kill_network_process(host: &Host) -> Result<u32> {
    let pid = host.network_pid()?.context("no network process")?;
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    kill_process(raw.context("no process ID")?, Signal::KILL)?;
    Ok(pid)
}

fn is_started_anew(host: &Host, died: u32) -> Result<()> {
    wait::until_true("there is another network process", LONG, || {
        Ok(host.network_pid()?.is_some_and(|pid| pid != died))
    })?;
    let log = fs::read_to_string(host.log())?;
    ensure!(log.contains("the network process ended"), "{log}");
    Ok(())
}

#[test]
fn who_talks_to_other_hosts_and_who_runs_guests_has_no_privileges() -> Result<()> {
    let rig = rig()?;
    for host in &rig.hosts {
        let info: HostInfo = control::get(&host.socket(), "/v1/host")?;
        ensure!(info.unconfined.is_empty(), "{:?}", info.unconfined);
        let pid = info.network_pid.context("no network process")?;
        is_nobody(pid)?;
        ensure!(status(pid, "CapBnd")? == "0000000000000000");
        ensure!(status(pid, "Groups")?.is_empty());
        ensure!(guest_memory(host)? == 0, "no VM moves");
    }
    let pids = |host: &Host| -> Result<Vec<u32>> {
        Ok(host.vms()?.into_iter().filter_map(|vm| vm.pid).collect())
    };
    let source = pids(&rig.hosts[0])?;
    let (running, id) = rig.begin_slow_migration(VM, 0, 1)?;
    for host in &rig.hosts {
        wait::until_true("it has the VM's memory while that moves", LONG, || {
            Ok(guest_memory(host)? > 0)
        })
        .with_context(|| rig.logs())?;
    }
    let destination = pids(&rig.hosts[1])?;
    ensure!(source.len() == 1 && destination.len() == 1);
    for pid in source.iter().chain(&destination) {
        is_nobody(*pid)?;
    }
    rig.hosts[0].palanquin(&["migration", "abort", &id.to_string()])?;
    drop(running.finish(LONG)?);
    for host in &rig.hosts {
        wait::until_true("it has no memory of a VM that does not move", LONG, || {
            Ok(guest_memory(host)? == 0)
        })?;
    }
    rig.check_lives_once(VM, 0)?.wait_beats(2, LONG)?;
    rig.move_vm(VM, 0, 1)?;
    Ok(())
}

fn migration(rig: &Rig, host: usize) -> Result<MigrationInfo> {
    let mut migrations = rig.hosts[host].migrations()?.into_iter();
    let running = migrations.find(|info| info.phase != Phase::Done);
    running.context("no migration is under way")
}

#[test]
fn a_network_process_that_dies_during_the_rounds_leaves_the_vm_on_the_source() -> Result<()> {
    let rig = rig()?;
    for dies in [0, 1] {
        let (running, _) = rig.begin_slow_migration(VM, 0, 1)?;
        let died = kill_network_process(&rig.hosts[dies])?;
        running
            .finish(LONG)?
            .expect_status(5)
            .with_context(|| rig.logs())?;
        rig.check_lives_once(VM, 0)?.wait_beats(2, LONG)?;
        is_started_anew(&rig.hosts[dies], died).with_context(|| rig.logs())?;
    }
    rig.move_vm(VM, 0, 1)
        .context("the next migration does not work")?;
    rig.check_lives_once(VM, 1)?.wait_beats(2, LONG)?;
    Ok(())
}

#[test]
fn a_vm_under_post_copy_survives_the_death_of_either_network_process() -> Result<()> {
    let rig = rig()?;
    for (from, to, dies) in [(0, 1, 0), (1, 0, 0)] {
        let name = rig.hosts[to].name().to_owned();
        let words = ["migrate", VM, "--to", &name, "--strategy", "post-copy"];
        let slow = ["--bandwidth", "60mbit", "--compress", "off"];
        let running = rig.hosts[from].palanquin_started(&[&words[..], &slow].concat())?;
        wait::until_true("post-copy has begun", LONG, || {
            let begun =
                |host| migration(&rig, host).is_ok_and(|info| info.phase == Phase::PostCopy);
            Ok(begun(from) && begun(to))
        })
        .with_context(|| rig.logs())?;
        let died = kill_network_process(&rig.hosts[dies])?;
        let told = running.finish(LONG)?.expect_status(0);
        let info = told.with_context(|| rig.logs())?.migration()?;
        if info.outcome != Some(Outcome::Completed) || info.rejoined == 0 {
            bail!("{info:?}: {}", rig.logs());
        }
        is_started_anew(&rig.hosts[dies], died)?;
        let console = rig.check_lives_once(VM, to)?;
        let beat = console.wait_beats(2, LONG)?;
        // All that is rewritten, twice, checked from inside.
        console.wait_verified(beat.verified + 2 * 8192, LONG)?;
    }
    Ok(())
}
