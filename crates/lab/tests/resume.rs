//! A migration whose link breaks before its VM is paused goes on once the link is back, and does not begin anew.
#![forbid(unsafe_code)]

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_api::control::{MigrationInfo, Phase};
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::Running;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;

const VM: &str = "ferry";
const LONG: Duration = Duration::from_secs(90);
const MIB: u64 = 1 << 20;
/// Slowly, and as it is: then bytes say how much was sent.
const SLOWLY: [&str; 4] = ["--bandwidth", "160mbit", "--compress", "off"];

/// A guest that rewrites 16 MiB faster than they can be sent.
fn rig() -> Result<Rig> {
    let rig = Rig::new(&RigSpec::default())?;
    let mut guest = GuestSpec::small(VM).filled(96);
    guest.buffer_mib = 16;
    guest.dirty_mib_s = 100;
    let console = rig.hosts[0].boot(&guest)?;
    console.wait_verified(2048, LONG)?;
    Ok(rig)
}

fn link(rig: &Rig, state: &str) -> Result<()> {
    let words = ["link", "set", "eth0", state];
    rig.hosts[1].namespace.ip(&words).map(drop)
}

/// What a host says of the migration that is under way there.
fn under_way(rig: &Rig, host: usize) -> Result<Option<MigrationInfo>> {
    let all = rig.hosts[host].migrations()?;
    Ok(all.into_iter().find(|info| info.phase != Phase::Done))
}

fn begin(rig: &Rig, from: usize, more: &[&str]) -> Result<Running> {
    let to = rig.hosts[1 - from].name();
    let words = [&["migrate", VM, "--to", to], &SLOWLY[..], more].concat();
    rig.hosts[from].palanquin_started(&words)
}

/// Waits until the source says something that holds, and gives it.
fn source_says(
    rig: &Rig,
    from: usize,
    what: &str,
    holds: impl Fn(&MigrationInfo) -> bool,
) -> Result<MigrationInfo> {
    wait::until(what, LONG, || {
        Ok(under_way(rig, from)?.filter(|info| holds(info)))
    })
    .with_context(|| rig.logs())
}

/// Cuts the link until both agents have noticed. The VM runs on meanwhile.
fn cut(rig: &Rig, from: usize) -> Result<()> {
    link(rig, "down")?;
    for host in 0..2 {
        wait::until_true("the agent notices", LONG, || {
            let info = under_way(rig, host)?.context("it gave the migration up")?;
            ensure!(info.phase == Phase::PreCopy, "{info:?}");
            Ok(info.reason.is_some())
        })
        .with_context(|| rig.logs())?;
    }
    ensure!(rig.hosts[from].runs(VM)?, "it was paused: {}", rig.logs());
    Ok(())
}

fn connected_again(rig: &Rig, from: usize, times: u32) -> Result<()> {
    link(rig, "up")?;
    let again = |info: &MigrationInfo| info.rejoined == times && info.reason.is_none();
    source_says(rig, from, "both are connected again", again).map(drop)
}

fn lives_whole(rig: &Rig, at: usize) -> Result<()> {
    let console = rig.check_lives_once(VM, at)?;
    console
        .wait_all_verified(LONG)
        .with_context(|| rig.logs())
        .map(drop)
}

/// Nothing of a VM is left at a host, and it is busy with none.
fn wait_clean(rig: &Rig, host: usize) -> Result<()> {
    wait::until_true("nothing is left", LONG, || {
        let vms = rig.hosts[host].dir().join("s/vms");
        let left = fs::read_dir(vms).map_or(0, |entries| entries.flatten().count());
        Ok(left == 0 && rig.hosts[host].qemus()?.is_empty() && under_way(rig, host)?.is_none())
    })
    .with_context(|| rig.logs())
}

#[test]
fn a_link_that_breaks_in_the_first_round_and_in_a_later_one_costs_what_was_in_flight() -> Result<()>
{
    let rig = rig()?;
    for (from, strategy) in [(0, "pre-copy"), (1, "auto")] {
        let words = ["--strategy", strategy, "--max-downtime", "4s"];
        let running = begin(&rig, from, &words)?;
        let half = |info: &MigrationInfo| info.rounds == 1 && info.bytes_guest > 72 * MIB;
        let info = source_says(&rig, from, "half of the first round is sent", half)?;
        let data = info.bytes_guest + info.bytes_remaining;
        ensure!(
            data > 100 * MIB && info.bytes_remaining > 8 * MIB,
            "not the middle of it: {info:?}"
        );
        cut(&rig, from)?;
        connected_again(&rig, from, 1)?;
        let info = source_says(&rig, from, "a later round", |info| info.rounds > 1)?;
        // What the second round has is rewritten; and what the sockets held was lost. Anew it would have been half.
        let sent = info.bytes_guest + info.bytes_remaining;
        eprintln!(
            "{strategy}: data {} MiB, with the second round {} MiB",
            data / MIB,
            sent / MIB
        );
        ensure!(
            sent < data + 60 * MIB,
            "{} MiB for {} MiB: {info:?}",
            sent / MIB,
            data / MIB
        );
        cut(&rig, from)?;
        connected_again(&rig, from, 2)?;
        let info = running
            .finish(LONG)?
            .expect_status(0)
            .with_context(|| rig.logs())?
            .migration()?;
        eprintln!(
            "{strategy}: {} rounds, {} MiB of pages, {} MiB on the wire, {} pages resent, rejoined {}: {:?}",
            info.rounds,
            info.bytes_guest / MIB,
            info.bytes_on_wire / MIB,
            info.pages_resent,
            info.rejoined,
            info.decisions
        );
        ensure!(info.verified && info.rejoined == 2, "{info:?}");
        ensure!(
            info.bytes_on_wire < data * 2,
            "{} MiB on the wire for {} MiB",
            info.bytes_on_wire / MIB,
            data / MIB
        );
        lives_whole(&rig, 1 - from)?;
    }
    Ok(())
}

#[test]
fn a_link_that_stays_cut_leaves_the_vm_where_it_is_and_nothing_elsewhere() -> Result<()> {
    let rig = rig()?;
    let running = begin(&rig, 0, &[])?;
    let begun = |info: &MigrationInfo| info.bytes_guest > 8 * MIB;
    source_says(&rig, 0, "pages are sent", begun)?;
    cut(&rig, 0)?;
    let error = running
        .finish(LONG)?
        .expect_status(5)
        .with_context(|| rig.logs())?
        .error()?;
    let said = format!("{} {}", error.message, error.causes.join(" "));
    ensure!(
        said.contains("could not be made again in time"),
        "{error:?}"
    );
    // By itself: nobody can tell it.
    wait_clean(&rig, 1)?;
    link(&rig, "up")?;
    lives_whole(&rig, 0)?;
    rig.move_vm(VM, 0, 1)?;
    lives_whole(&rig, 1)
}

#[test]
fn an_abort_while_the_link_is_cut_ends_at_once_and_is_told_when_it_is_back() -> Result<()> {
    let rig = rig()?;
    let running = begin(&rig, 0, &[])?;
    let begun = |info: &MigrationInfo| info.bytes_guest > 8 * MIB;
    let id = source_says(&rig, 0, "pages are sent", begun)?.id;
    cut(&rig, 0)?;
    let words = ["migration", "abort", &id.to_string()];
    rig.hosts[0].palanquin(&words)?.expect_status(0)?;
    running.finish(LONG)?.expect_status(5)?;
    ensure!(rig.hosts[0].runs(VM)?, "it does not run: {}", rig.logs());
    link(&rig, "up")?;
    wait_clean(&rig, 1)?;
    lives_whole(&rig, 0)?;
    let told = rig.hosts[1].migration(id)?;
    let reason = told.reason.clone().unwrap_or_default();
    ensure!(reason.contains("operator"), "it was not told: {told:?}");
    rig.move_vm(VM, 0, 1).map(drop)
}
