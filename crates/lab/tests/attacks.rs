//! Attacks that win where nothing defends, and do not against Palanquin: a few of those of `palanquin-lab attack`.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use palanquin_lab::attack::{self, ATTACKS, PALANQUIN, WAYS};
use palanquin_lab::results::Verdict;

/// How often an attack on QEMU's own migration is tried until it wins.
const TRIES: u32 = 4;

/// Whoever wins where nothing defends knows how to attack.
fn wins_only_where_nothing_defends(name: &str, against_palanquin: Verdict) -> Result<()> {
    ends_in(
        name,
        &[("qemu", Verdict::Succeeded), (PALANQUIN, against_palanquin)],
    )
}

/// What an attack comes to on some transports.
fn ends_in(name: &str, expected: &[(&str, Verdict)]) -> Result<()> {
    let attack = ATTACKS.iter().find(|attack| attack.name == name);
    let attack = attack.context("no such attack")?;
    for &(transport, verdict) in expected {
        let way = WAYS.iter().find(|way| way.name == transport);
        let way = way.context("no such transport")?;
        // QEMU's own migration loses an emulated guest now and then, and with it what the attacker wanted.
        let tries = if transport == PALANQUIN { 1 } else { TRIES };
        for left in (0..tries).rev() {
            let played = attack::play(attack, way);
            println!("{played:?}");
            match played {
                Ok(cell) if cell.verdict == verdict && !cell.evidence.is_empty() => break,
                Ok(cell) => ensure!(left > 0, "{cell:?}"),
                Err(error) if left == 0 => return Err(error),
                Err(_) => {}
            }
        }
    }
    Ok(())
}

#[test]
fn who_reads_along_finds_the_sentence_in_the_clear_alone() -> Result<()> {
    wins_only_where_nothing_defends("capture", Verdict::FailedUnnoticed)
}

#[test]
fn who_changes_memory_on_the_path_is_found_out() -> Result<()> {
    wins_only_where_nothing_defends("alter", Verdict::FailedDetected)
}

#[test]
fn a_migration_that_is_sent_again_starts_nothing() -> Result<()> {
    wins_only_where_nothing_defends("replay", Verdict::FailedDetected)
}

#[test]
fn nothing_of_the_vm_stays_in_the_memory_of_what_moved_it() -> Result<()> {
    wins_only_where_nothing_defends("remanence", Verdict::FailedUnnoticed)
}

#[test]
fn memory_that_holds_something_already_is_refused() -> Result<()> {
    wins_only_where_nothing_defends("dirty-destination", Verdict::FailedDetected)
}

#[test]
fn packets_of_a_tunnel_that_are_sent_again_start_nothing() -> Result<()> {
    ends_in("replay", &[("qemu-ipsec", Verdict::FailedUnnoticed)])
}
