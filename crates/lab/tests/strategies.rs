//! Every algorithm, on real QEMU.
#![forbid(unsafe_code)]

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_api::control::{MigrationInfo, Outcome, Phase};
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::Running;
use palanquin_lab::probe;
use palanquin_lab::process;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;

const VM: &str = "trav";
const LONG: Duration = Duration::from_secs(60);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 10);

fn rig(spec: &GuestSpec) -> Result<Rig> {
    let rig = Rig::new(&RigSpec::default())?;
    let console = rig.hosts[0].boot(spec)?;
    console.wait_verified(2048, LONG)?;
    Ok(rig)
}

/// A guest that rewrites 32 MiB as fast as it can.
fn busy() -> GuestSpec {
    let mut guest = GuestSpec::small(VM).filled(64);
    guest.buffer_mib = 32;
    guest.dirty_mib_s = 400;
    guest
}

fn moved(rig: &Rig, from: usize, to: usize, words: &[&str]) -> Result<MigrationInfo> {
    let told = rig.migrate(VM, from, to, words)?;
    let info = told
        .expect_status(0)
        .with_context(|| rig.logs())?
        .migration()?;
    eprintln!(
        "{words:?}: {} rounds, {:.0} ms, {:.1} ms down, {} MiB, {} skipped, {} resent, {} demanded, {:?} {:?} {:?}",
        info.rounds,
        info.total_time_ms,
        info.downtime_ms,
        info.bytes_guest >> 20,
        info.pages_skipped,
        info.pages_resent,
        info.pages_demanded,
        info.downtime,
        info.fault_wait,
        info.decisions
    );
    ensure!(info.verified, "{info:?}");
    // A sweep over all that is rewritten, checked from inside.
    let console = rig.check_lives_once(VM, to)?;
    let beat = console.wait_beats(2, LONG)?;
    console.wait_verified(beat.verified + 4096, LONG)?;
    Ok(info)
}

#[test]
fn stop_and_copy_has_no_round_but_the_last() -> Result<()> {
    let rig = rig(&GuestSpec::small(VM).filled(64))?;
    let info = moved(&rig, 0, 1, &["--strategy", "stop-and-copy"])?;
    ensure!(info.rounds == 1 && info.pages_resent == 0, "{info:?}");
    Ok(())
}

#[test]
fn post_copy_runs_the_vm_before_its_pages_are_there_and_they_all_arrive() -> Result<()> {
    let rig = rig(&busy().on_network())?;
    for (from, to) in [(0, 1), (1, 0), (0, 1)] {
        let info = moved(&rig, from, to, &["--strategy", "post-copy"])?;
        ensure!(
            info.pages_demanded > 0 && info.fault_wait.is_some(),
            "{info:?}"
        );
        let ahead = |why: &str| why.contains("devices look into");
        ensure!(info.decisions.iter().any(|d| ahead(&d.why)), "{info:?}");
    }
    Ok(())
}

#[test]
fn hybrid_sends_what_is_written_all_the_time_only_once_the_vm_runs_there() -> Result<()> {
    let rig = rig(&busy())?;
    let slow = ["--bandwidth", "400mbit", "--max-downtime", "50ms"];
    let words = [&["--strategy", "hybrid"], &slow[..]].concat();
    let info = moved(&rig, 0, 1, &words)?;
    ensure!(
        info.fault_wait.is_some(),
        "it did not come to post-copy: {info:?}"
    );
    ensure!(info.rounds >= 2, "{info:?}");
    // Slower than the guest writes even where the machine is busy with other things.
    let slower = ["--bandwidth", "120mbit", "--compress", "off"];
    let words = ["--allow", "post-copy", "--max-downtime", "50ms"];
    let info = moved(&rig, 1, 0, &[&words[..], &slower[..]].concat())?;
    ensure!(
        info.fault_wait.is_some(),
        "it did not come to post-copy: {info:?}"
    );
    let allowed = |why: &str| why.contains("post-copy was allowed");
    ensure!(info.decisions.iter().any(|d| allowed(&d.why)), "{info:?}");
    Ok(())
}

#[test]
fn improved_pre_copy_ends_within_five_rounds() -> Result<()> {
    let rig = rig(&busy())?;
    let words = ["--strategy", "improved", "--bandwidth", "400mbit"];
    // As long as the pages that are written all the time take.
    let patient = [&words[..], &["--max-downtime", "3s", "--compress", "off"]].concat();
    let info = moved(&rig, 0, 1, &patient)?;
    ensure!(info.rounds <= 5, "{info:?}");
    // In less it cannot be done, and the VM stays where it is.
    let told = rig.migrate(
        VM,
        1,
        0,
        &[&words[..], &["--max-downtime", "20ms"]].concat(),
    )?;
    let told = told.expect_status(5)?;
    ensure!(told.stderr.contains("rounds"), "{told:?}");
    rig.check_lives_once(VM, 1)?.wait_beats(2, LONG)?;
    Ok(())
}

#[test]
fn auto_throttles_where_allowed_and_the_vm_is_free_again_afterwards() -> Result<()> {
    let rig = rig(&busy())?;
    let words = [
        "--allow",
        "throttle",
        "--bandwidth",
        "400mbit",
        "--compress",
        "off",
    ];
    let told = rig.migrate(
        VM,
        0,
        1,
        &[&words[..], &["--max-downtime", "100ms"]].concat(),
    )?;
    let info = told
        .expect_status(0)
        .with_context(|| rig.logs())?
        .migration()?;
    let throttled = |why: &str| why.contains("of its CPU time");
    ensure!(info.decisions.iter().any(|d| throttled(&d.why)), "{info:?}");
    rig.check_lives_once(VM, 1)?.wait_beats(2, LONG)?;
    Ok(())
}

#[test]
fn what_does_not_converge_stays_on_the_source_and_says_why() -> Result<()> {
    let rig = rig(&busy())?;
    let words = [
        "--bandwidth",
        "200mbit",
        "--compress",
        "off",
        "--max-downtime",
        "20ms",
    ];
    let told = rig.migrate(VM, 0, 1, &[&words[..], &["--deadline", "12s"]].concat())?;
    let told = told.expect_status(5)?;
    ensure!(told.stderr.contains("time allowed"), "{told:?}");
    rig.check_lives_once(VM, 0)?.wait_beats(2, LONG)?;
    Ok(())
}

/// Begins a post-copy migration that takes a while, and waits until the VM runs at the destination.
fn begin_post_copy(rig: &Rig) -> Result<Running> {
    let words = [
        "migrate",
        VM,
        "--to",
        "b",
        "--strategy",
        "post-copy",
        "--bandwidth",
        "60mbit",
    ];
    let words = [&words[..], &["--compress", "off"]].concat();
    let running = rig.hosts[0].palanquin_started(&words)?;
    wait::until_true("post-copy has begun", LONG, || {
        Ok(post_copy(rig, 0)?.is_some() && post_copy(rig, 1)?.is_some())
    })
    .with_context(|| rig.logs())?;
    Ok(running)
}

/// The migration that is at this stage, as that host sees it.
fn post_copy(rig: &Rig, host: usize) -> Result<Option<MigrationInfo>> {
    let mut migrations = rig.hosts[host].migrations()?.into_iter();
    Ok(migrations.find(|info| info.phase == Phase::PostCopy))
}

/// The VM lives at the destination only, and its memory is whole.
fn arrived_whole(rig: &Rig) -> Result<()> {
    let console = rig.check_lives_once(VM, 1)?;
    let beat = console.wait_beats(2, LONG)?;
    console.wait_verified(beat.verified + 2 * 8192, LONG)?;
    let status = probe::status(&rig.client, GUEST)?;
    ensure!(status.corrupt_pages == 0, "{status:?}");
    Ok(())
}

#[test]
fn a_vm_under_post_copy_survives_the_loss_of_its_link() -> Result<()> {
    let rig = rig(&busy().on_network())?;
    let running = begin_post_copy(&rig)?;
    for times in 1..=2 {
        rig.hosts[1]
            .namespace
            .ip(&["link", "set", "eth0", "down"])?;
        wait::until_true("the source notices", LONG, || {
            Ok(post_copy(&rig, 0)?.is_some_and(|info| info.reason.is_some()))
        })
        .with_context(|| rig.logs())?;
        // Never resumed there.
        ensure!(
            !rig.hosts[0].runs(VM)?,
            "it runs on the source: {}",
            rig.logs()
        );
        rig.hosts[1].namespace.ip(&["link", "set", "eth0", "up"])?;
        wait::until_true("both are connected again", LONG, || {
            Ok(post_copy(&rig, 0)?.is_some_and(|info| info.rejoined == times))
        })
        .with_context(|| rig.logs())?;
    }
    let info = running
        .finish(LONG)?
        .expect_status(0)
        .with_context(|| rig.logs())?
        .migration()?;
    ensure!(info.verified && info.rejoined == 2, "{info:?}");
    arrived_whole(&rig)
}

#[test]
fn a_vm_under_post_copy_survives_the_death_of_either_agent() -> Result<()> {
    for dies in [0, 1] {
        let mut rig = rig(&busy().on_network())?;
        let running = begin_post_copy(&rig)?;
        rig.hosts[dies].kill_agent();
        // What waits for a page goes on waiting; it never sees zeros.
        wait::pause(Duration::from_millis(500))?;
        rig.hosts[dies].start_agent()?;
        drop(running.finish(LONG)?);
        arrived_whole(&rig).with_context(|| rig.logs())?;
        rig.move_vm(VM, 1, 0)
            .context("the next migration does not work")?;
    }
    Ok(())
}

#[test]
fn a_vm_whose_missing_pages_are_lost_is_ended_by_its_operator() -> Result<()> {
    let rig = rig(&busy())?;
    let running = begin_post_copy(&rig)?;
    let qemus = rig.hosts[0].qemus()?;
    ensure!(qemus.len() == 1, "{qemus:?}");
    process::kill(qemus[0]);
    let told = running.finish(LONG)?;
    ensure!(told.status != 0, "{told:?}");
    let info = told.migration()?;
    ensure!(info.outcome == Some(Outcome::VmEnded), "{info:?}");
    let reason = info.reason.unwrap_or_default();
    ensure!(
        reason.contains("before all pages had been fetched"),
        "{reason}"
    );
    let told = rig.hosts[1]
        .palanquin(&["migration", "ls"])?
        .expect_status(0)?;
    ensure!(told.stdout.contains("post-copy"), "{told:?}");
    rig.hosts[1]
        .palanquin(&["vm", "stop", VM])?
        .expect_status(0)?;
    for host in &rig.hosts {
        ensure!(
            host.vms()?.is_empty() && host.qemus()?.is_empty(),
            "{}",
            rig.logs()
        );
    }
    Ok(())
}
