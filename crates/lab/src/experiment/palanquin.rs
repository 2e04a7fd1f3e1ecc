//! There and back by Palanquin.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::results::Leg;
use palanquin_lab::rig::Rig;

use super::leg::{Case, Moved, observe};
use super::{PALANQUIN, VM};

/// The guest beats within this time.
const SETTLE: Duration = Duration::from_secs(60);

/// Boots the guest with the first host's agent, moves it there and back, and stops it.
pub(crate) fn round(
    rig: &Rig,
    guest: &GuestSpec,
    keep: &mut dyn FnMut(Leg) -> Result<()>,
) -> Result<()> {
    rig.hosts[0].boot(guest)?.wait_beats(3, SETTLE)?;
    let moved = [("there", 0, 1), ("back", 1, 0)]
        .into_iter()
        .try_for_each(|(way, from, to)| keep(leg(rig, way, from, to)?));
    let stopped = rig.stop_vm(VM);
    moved?;
    stopped
}

fn leg(rig: &Rig, way: &str, from: usize, to: usize) -> Result<Leg> {
    let case = Case {
        rig,
        source: &rig.hosts[from],
        segment: None,
        but: Vec::new(),
        transport: PALANQUIN,
        way,
    };
    let work = || {
        let began = Instant::now();
        let told = rig.migrate(VM, from, to, &[])?;
        let total = began.elapsed();
        let info = told.expect_status(0)?.migration()?;
        if !info.verified {
            bail!("the roots of its memory were not compared: {info:?}");
        }
        Ok(Moved {
            total,
            downtime_ms: Some(info.downtime_ms),
            reason: None,
        })
    };
    observe(&case, work, |_| rig.check_lives_once(VM, to).map(drop))
}
