//! What dies besides one agent at one step, which is in `kills.rs`: the VM lives exactly once, nothing is left of it
//! elsewhere, and the next migration works.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_api::control::{Outcome, VmState};
use palanquin_lab::fail_point::Mode;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::SHORT;
use palanquin_lab::process;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;

const VM: &str = "cat";
const SOURCE: usize = 0;
const DESTINATION: usize = 1;
const LONG: Duration = Duration::from_secs(90);

fn rig_with_guest() -> Result<Rig> {
    let rig = Rig::new(&RigSpec::default())?;
    rig.hosts[SOURCE].boot(&GuestSpec::small(VM).filled(64))?;
    Ok(rig)
}

/// Every migration that an agent knows of has ended, and no directory of a VM is left where none lives.
fn settled(rig: &Rig) -> Result<()> {
    wait::until_true("all migrations have ended", SHORT, || {
        for host in &rig.hosts {
            if host.migrations()?.iter().any(|info| info.outcome.is_none()) {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .with_context(|| rig.logs())?;
    for host in &rig.hosts {
        let vms = host.vms()?.len();
        let left = || -> Result<usize> {
            let entries = std::fs::read_dir(host.dir().join("s/vms"));
            Ok(entries.map_or(0, |entries| entries.flatten().count()))
        };
        let what = format!("{} keeps files of {vms} VMs", host.name());
        wait::until_true(&what, SHORT, || Ok(left()? == vms)).with_context(|| rig.logs())?;
    }
    Ok(())
}

#[test]
fn both_agents_are_killed_during_the_rounds() -> Result<()> {
    let mut rig = rig_with_guest()?;
    let (running, _) = rig.begin_slow_migration(VM, SOURCE, DESTINATION)?;
    for host in &mut rig.hosts {
        host.kill_agent();
    }
    // Nobody tracks its memory any more, and it runs on.
    let told = running.finish(LONG)?;
    ensure!(told.status != 0, "{told:?}");
    for host in &mut rig.hosts {
        host.start_agent()?;
    }
    rig.check_lives_once(VM, SOURCE)?;
    settled(&rig)?;
    rig.move_vm(VM, SOURCE, DESTINATION)?;
    Ok(())
}

#[test]
fn the_guest_runs_on_while_its_agent_is_dead() -> Result<()> {
    let mut rig = rig_with_guest()?;
    let console = rig.hosts[SOURCE].console(VM)?;
    let (running, _) = rig.begin_slow_migration(VM, SOURCE, DESTINATION)?;
    rig.hosts[SOURCE].kill_agent();
    console.wait_beats(5, LONG)?;
    let qemus = rig.hosts[SOURCE].qemus()?;
    ensure!(qemus.len() == 1, "{qemus:?}");
    rig.hosts[SOURCE].start_agent()?;
    drop(running.finish(LONG)?);
    rig.check_lives_once(VM, SOURCE)?;
    Ok(())
}

#[test]
fn a_killed_hypervisor_on_the_source_ends_the_migration_and_leaves_nothing() -> Result<()> {
    let rig = rig_with_guest()?;
    let (running, id) = rig.begin_slow_migration(VM, SOURCE, DESTINATION)?;
    for pid in rig.hosts[SOURCE].qemus()? {
        process::kill(pid);
    }
    let told = running.finish(LONG)?;
    ensure!(told.status != 0, "{told:?}");
    let info = rig.hosts[SOURCE].migration(id)?;
    ensure!(info.outcome == Some(Outcome::VmEnded), "{info:?}");
    let destination = &rig.hosts[DESTINATION];
    wait::until_true("the destination is clean", SHORT, || {
        Ok(destination.vm(VM)?.is_none() && destination.qemus()?.is_empty())
    })
    .with_context(|| rig.logs())?;
    // The agent does not pretend that it runs, and it can be started and moved again.
    let there = rig.hosts[SOURCE].vm(VM)?;
    ensure!(
        there.is_none_or(|vm| vm.state == VmState::Stopped),
        "{}",
        rig.logs()
    );
    rig.hosts[SOURCE].palanquin(&["vm", "stop", VM])?;
    rig.hosts[SOURCE].boot(&GuestSpec::small(VM))?;
    rig.move_vm(VM, SOURCE, DESTINATION)?;
    Ok(())
}

#[test]
fn a_killed_hypervisor_on_the_destination_leaves_the_vm_on_the_source() -> Result<()> {
    let rig = rig_with_guest()?;
    let (running, id) = rig.begin_slow_migration(VM, SOURCE, DESTINATION)?;
    for pid in rig.hosts[DESTINATION].qemus()? {
        process::kill(pid);
    }
    let told = running.finish(LONG)?.expect_status(5)?;
    let info = rig.hosts[SOURCE].migration(id)?;
    ensure!(
        info.outcome == Some(Outcome::RunningOnSource),
        "{told:?} {info:?}"
    );
    rig.check_lives_once(VM, SOURCE)?;
    settled(&rig)?;
    rig.move_vm(VM, SOURCE, DESTINATION)?;
    Ok(())
}

#[test]
fn a_doubt_about_a_destination_that_lost_everything_ends_by_the_operators_word() -> Result<()> {
    const COMMITTED: &str = "source-recorded-Committed";
    let mut rig = rig_with_guest()?;
    rig.hosts[SOURCE].arm(COMMITTED, Mode::Stop)?;
    let running = rig.hosts[SOURCE].palanquin_started(&["migrate", VM, "--to", "b"])?;
    rig.hosts[SOURCE].wait_reached(COMMITTED, LONG, || Ok(()))?;
    let id = rig.hosts[SOURCE].migrations()?.first().map(|info| info.id);
    let id = id.context("no migration")?;
    let destination = &mut rig.hosts[DESTINATION];
    destination.kill_agent();
    for pid in destination.qemus()? {
        process::kill(pid);
        ensure!(process::wait_for_end(pid, SHORT), "QEMU {pid} lives on");
    }
    std::fs::remove_dir_all(destination.dir().join("s"))?;
    destination.start_agent()?;
    rig.hosts[SOURCE].release(COMMITTED)?;
    wait::until_true("the destination has no record", LONG, || {
        let info = rig.hosts[SOURCE].migration(id)?;
        let reason = info.reason.unwrap_or_default();
        Ok(info.outcome == Some(Outcome::InDoubt) && reason.contains("no record"))
    })
    .with_context(|| rig.logs())?;
    // Nothing but a person who has looked can know that it does not run there.
    let vm = rig.hosts[SOURCE].vm(VM)?.context("it is not there")?;
    ensure!(vm.state == VmState::Held, "{vm:?}");
    let (id, word) = (id.to_string(), "destination-lost-it");
    let words = ["migration", "resolve", &id, "--assert", word];
    let told = rig.hosts[SOURCE].palanquin(&words)?.expect_status(5);
    told.with_context(|| rig.logs())?;
    drop(running.finish(LONG)?);
    rig.check_lives_once(VM, SOURCE)?;
    settled(&rig)?;
    rig.move_vm(VM, SOURCE, DESTINATION)?;
    Ok(())
}
