//! Whatever dies at whatever moment: the VM lives exactly once, nothing is left of it elsewhere, and the next
//! migration works.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_api::control::{Outcome, VmState};
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::SHORT;
use palanquin_lab::process;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;

const VM: &str = "cat";
const SOURCE: usize = 0;
const DESTINATION: usize = 1;
const LONG: Duration = Duration::from_secs(90);

/// Where an agent kills itself, and whose that is.
#[derive(Clone, Copy)]
struct Point {
    name: &'static str,
    host: usize,
    /// Where the VM must live afterwards.
    lives_at: usize,
}

fn rig_with_guest() -> Result<Rig> {
    let rig = Rig::new(&RigSpec::default())?;
    rig.hosts[SOURCE].boot(&GuestSpec::small(VM).filled(64))?;
    Ok(rig)
}

/// The agent of one side dies by SIGKILL at exactly this point and is started again a moment later.
fn dies_at(point: Point) -> Result<()> {
    let mut rig = rig_with_guest()?;
    let host = &mut rig.hosts[point.host];
    host.stop_agent()?;
    host.start_agent_with(&[("PALANQUIN_FAIL_POINT", point.name)])?;
    let words = ["migrate", VM, "--to", "b"];
    let running = rig.hosts[SOURCE].palanquin_started(&words)?;
    let dying = &mut rig.hosts[point.host];
    dying.wait_agent_died(LONG)?;
    let log = std::fs::read_to_string(dying.log())?;
    ensure!(
        log.contains(&format!("FAIL POINT {}", point.name)),
        "the agent died of something else, or was built without the feature `fail-points`: {}",
        dying.log_tail()
    );
    dying.start_agent()?;
    let at = rig.find_the_one(VM)?;
    ensure!(
        at == point.lives_at,
        "it lives at {}: {}",
        rig.hosts[at].name(),
        rig.logs()
    );
    // How the command ends depends on which agent it followed; that it ends does not.
    let told = running.finish(LONG)?;
    ensure!((0..=6).contains(&told.status), "{told:?}");
    settled(&rig)?;
    let other = 1 - at;
    rig.move_vm(VM, at, other)
        .context("the next migration does not work")?;
    rig.move_vm(VM, other, at)
        .context("the migration back does not work")?;
    Ok(())
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
fn the_source_agent_dies_during_a_round() -> Result<()> {
    dies_at(Point {
        name: "source-round",
        host: SOURCE,
        lives_at: SOURCE,
    })
}

#[test]
fn the_source_agent_dies_after_ready_before_its_commit_record() -> Result<()> {
    dies_at(Point {
        name: "source-before-commit",
        host: SOURCE,
        lives_at: SOURCE,
    })
}

#[test]
fn the_source_agent_dies_after_its_commit_record_before_it_is_sent() -> Result<()> {
    dies_at(Point {
        name: "source-after-commit-record",
        host: SOURCE,
        // The destination was never told, and discards what it has.
        lives_at: SOURCE,
    })
}

#[test]
fn the_source_agent_dies_after_the_commit_was_sent() -> Result<()> {
    dies_at(Point {
        name: "source-after-commit-sent",
        host: SOURCE,
        lives_at: DESTINATION,
    })
}

#[test]
fn the_destination_agent_dies_during_a_round() -> Result<()> {
    dies_at(Point {
        name: "destination-round",
        host: DESTINATION,
        lives_at: SOURCE,
    })
}

#[test]
fn the_destination_agent_dies_after_ready() -> Result<()> {
    dies_at(Point {
        name: "destination-after-ready",
        host: DESTINATION,
        lives_at: SOURCE,
    })
}

#[test]
fn the_destination_agent_dies_after_its_record_before_it_resumes() -> Result<()> {
    dies_at(Point {
        name: "destination-after-owned-record",
        host: DESTINATION,
        lives_at: DESTINATION,
    })
}

#[test]
fn the_destination_agent_dies_after_it_resumed_before_it_says_so() -> Result<()> {
    dies_at(Point {
        name: "destination-before-running",
        host: DESTINATION,
        lives_at: DESTINATION,
    })
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
