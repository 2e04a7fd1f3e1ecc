//! What it costs that hosts judge, and show each other what they run.

use anyhow::{Context, Result};
use clap::Args;
use palanquin_api::control::MigrationInfo;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::trust::JudgingRig;
use palanquin_lab::usage::{median, wait_quiet, warm_up};
use uuid::Uuid;

use crate::workload::VM;

/// Runs that are not counted: what is measured of a hypervisor's files is remembered from then on.
const WARM_UPS: u32 = 1;

/// What to measure
#[derive(Args)]
pub(crate) struct Options {
    /// Runs of each; the table shows medians
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// MiB of random bytes in the guest
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=384))]
    fill_mib: u64,
}

/// One way of deciding.
enum Way {
    /// Nothing is judged.
    Plain(Rig),
    /// Policies and a passport.
    Judged(JudgingRig),
    /// The same, and both hosts show what they run by a TPM (`swtpm`), as the owner wants.
    Attested(JudgingRig),
}

impl Way {
    fn name(&self) -> &'static str {
        match self {
            Self::Plain(_) => "nothing is judged",
            Self::Judged(_) => "policies and passport",
            Self::Attested(_) => "and evidence by TPMs",
        }
    }

    fn rig(&self) -> &Rig {
        match self {
            Self::Plain(rig) => rig,
            Self::Judged(judging) | Self::Attested(judging) => &judging.rig,
        }
    }

    fn run(&self, fill_mib: u64, number: u32) -> Result<MigrationInfo> {
        let guest = GuestSpec::small(VM).filled(fill_mib);
        let id = Uuid::from_u128(0x7a1c_0000_0000_4000_8000_0000_0000_0000 + u128::from(number));
        let rig = self.rig();
        let passport = match self {
            Self::Plain(_) => None,
            Self::Judged(judging) => Some(judging.passport(id, 1, "")?),
            Self::Attested(judging) => {
                Some(judging.passport(id, 1, "[attestation]\nmax-age = \"60s\"\n")?)
            }
        };
        let words: Vec<&str> = match &passport {
            Some(passport) => vec!["--passport", passport],
            None => Vec::new(),
        };
        rig.hosts[0].boot_with(&guest, &words)?;
        wait_quiet(rig)?;
        warm_up(512)?;
        let info = rig.migrate(VM, 0, 1, &[])?.expect_status(0)?.migration()?;
        rig.hosts[1]
            .palanquin(&["vm", "stop", VM])?
            .expect_status(0)?;
        Ok(info)
    }
}

/// Runs all ways in turns.
pub(crate) fn run(options: &Options) -> Result<()> {
    let ways = [
        Way::Plain(Rig::new(&RigSpec::default())?),
        Way::Judged(JudgingRig::new()?),
        Way::Attested(JudgingRig::attesting(true)?),
    ];
    let mut samples: [Vec<MigrationInfo>; 3] = Default::default();
    for run in 0..options.runs + WARM_UPS {
        for (way, samples) in ways.iter().zip(&mut samples) {
            let info = way.run(options.fill_mib, run).with_context(|| way.name())?;
            println!(
                "run {run}: {:<22} total {:>7.1} ms, downtime {:>5.1} ms{}",
                way.name(),
                info.total_time_ms,
                info.downtime_ms,
                if run < WARM_UPS { ", not counted" } else { "" }
            );
            if run >= WARM_UPS {
                samples.push(info);
            }
        }
    }
    println!("\n| decided by | total ms (spread) | downtime ms (spread) |\n|---|---|---|");
    for (way, samples) in ways.iter().zip(&samples) {
        let column = |value: fn(&MigrationInfo) -> f64| {
            let values = || samples.iter().map(value);
            format!(
                "{:.1} ({:.1} to {:.1})",
                median(values()).unwrap_or(f64::NAN),
                values().fold(f64::INFINITY, f64::min),
                values().fold(0.0, f64::max)
            )
        };
        println!(
            "| {} | {} | {} |",
            way.name(),
            column(|info| info.total_time_ms),
            column(|info| info.downtime_ms)
        );
    }
    Ok(())
}
