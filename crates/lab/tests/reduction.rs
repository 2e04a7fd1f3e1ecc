//! Wire reduction, on real QEMU.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_api::control::MigrationInfo;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::rig::{Rig, RigSpec};

const LONG: Duration = Duration::from_secs(60);

fn moved(rig: &Rig, from: usize, to: usize, compress: &str) -> Result<MigrationInfo> {
    // Slow enough for several rounds.
    let words = ["--compress", compress, "--bandwidth", "200mbit"];
    let told = rig.migrate(
        "hot",
        from,
        to,
        &[&words[..], &["--max-downtime", "100ms"]].concat(),
    )?;
    let info = told
        .expect_status(0)
        .with_context(|| rig.logs())?
        .migration()?;
    ensure!(info.verified, "{info:?}");
    eprintln!(
        "{compress}: {} rounds, {:.0} ms, {} of {} bytes on the wire; {} pages, {} compressed, {} deltas, {} duplicates",
        info.rounds,
        info.total_time_ms,
        info.bytes_on_wire,
        info.bytes_guest,
        info.pages_sent,
        info.pages_compressed,
        info.pages_delta,
        info.pages_duplicate
    );
    let console = rig.check_lives_once("hot", to)?;
    // A sweep over all that is rewritten.
    let beat = console.wait_beats(2, LONG)?;
    console.wait_verified(beat.verified + 2048, LONG)?;
    Ok(info)
}

#[test]
fn a_hot_guest_arrives_whole_with_every_kind_of_reduction() -> Result<()> {
    let rig = Rig::new(&RigSpec::default())?;
    let mut guest = GuestSpec::small("hot").filled(16);
    guest.buffer_mib = 8;
    guest.dirty_mib_s = 8;
    let console = rig.hosts[0].boot(&guest)?;
    console.wait_verified(2048, LONG)?;
    let zstd = moved(&rig, 0, 1, "zstd")?;
    ensure!(zstd.rounds > 2, "{zstd:?}");
    ensure!(zstd.pages_delta > 0, "{zstd:?}");
    ensure!(zstd.pages_compressed > 0, "{zstd:?}");
    ensure!(zstd.bytes_on_wire < zstd.bytes_guest, "{zstd:?}");
    let lz4 = moved(&rig, 1, 0, "lz4")?;
    ensure!(lz4.pages_compressed > 0 && lz4.bytes_saved > 0, "{lz4:?}");
    let auto = moved(&rig, 0, 1, "auto")?;
    ensure!(auto.pages_compressed > 0, "{auto:?}");
    let off = moved(&rig, 1, 0, "off")?;
    let none = [off.pages_compressed, off.pages_delta, off.pages_duplicate];
    ensure!(none == [0; 3] && off.bytes_saved == 0, "{off:?}");
    ensure!(zstd.bytes_on_wire < off.bytes_on_wire, "{zstd:?} {off:?}");
    Ok(())
}

/// Prints how long moves take with and without reduction; for quiet machines and release builds.
#[test]
#[ignore = "a measurement"]
fn times_with_and_without_reduction() -> Result<()> {
    for (link, fill_mib) in [(None, 512), (Some(1000), 64)] {
        let rig = Rig::new(&RigSpec {
            link_mbit_s: link,
            ..RigSpec::default()
        })?;
        let mut guest = GuestSpec::small("idle").filled(fill_mib);
        guest.memory_mib = vec![fill_mib + 192];
        guest.dirty_mib_s = 0;
        let console = rig.hosts[0].boot(&guest)?;
        console.wait_beats(2, LONG)?;
        let modes = ["off", "auto"].into_iter().cycle().take(8);
        for (compress, (from, to)) in modes.zip([(0, 1), (1, 0)].into_iter().cycle()) {
            let told = rig.migrate("idle", from, to, &["--compress", compress])?;
            let info = told.expect_status(0)?.migration()?;
            eprintln!(
                "link {link:?}, {fill_mib} MiB of noise, {compress}: {:.0} ms, downtime {:.1} ms, {} of {} bytes",
                info.total_time_ms, info.downtime_ms, info.bytes_on_wire, info.bytes_guest
            );
        }
    }
    Ok(())
}
