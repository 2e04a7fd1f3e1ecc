//! Makes sessions: two hosts, three guests, a prober outside, and things that happen one after the other.

mod guests;
mod happen;
mod plan;
mod probing;

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use palanquin_lab::process;
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::wait;

use crate::corpus::{FORMAT, Labels, Part, Session, Target};
use guests::Guests;
use happen::Stage;
use plan::Plan;
use probing::{Watched, Watching};

/// Quiet time at the beginning, in which guests are learnt.
const LEARN: Duration = Duration::from_secs(75);
/// Quiet time between two things that happen.
const BETWEEN: Duration = Duration::from_secs(38);
/// Quiet time at the end.
const AFTER: Duration = Duration::from_secs(50);

/// What to record.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// What all follows from; even seeds are for calibration, odd ones are held out.
    pub seed: u64,
    /// How many things happen.
    pub events: usize,
}

/// Time of day in seconds since 1970.
fn unix_s() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs_f64()
}

fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split(' ').next().and_then(|load| load.parse().ok());
    first.unwrap_or(0.0)
}

/// Name of the session of a seed.
#[must_use]
pub fn name(seed: u64) -> String {
    format!("session-{seed:03}")
}

/// Records a session, and writes it to a directory; `tell` hears what happens.
///
/// # Errors
/// If the rig can't be made, or a guest does not boot. What goes wrong with one event spoils that event only.
pub fn record(wish: Wish, dir: &Path, tell: &mut dyn FnMut(&str)) -> Result<()> {
    let plan = Plan::new(wish.seed, wish.events);
    tell(&format!(
        "link {:?} Mbit/s, guests with {} MiB filled",
        plan.link_mbit_s, plan.fill_mib
    ));
    let rig = Rig::new(&RigSpec {
        link_mbit_s: plan.link_mbit_s,
        ..RigSpec::default()
    })?;
    let began_load = load_average();
    let mut guests = Guests::boot(&rig, &plan)?;
    let watched = watched(&rig)?;
    let began_s = unix_s().floor();
    let watching = Watching::start(&rig.client, &watched)?;
    wait::pause(LEARN)?;
    let mut events = Vec::new();
    for (number, action) in (1..).zip(&plan.actions) {
        let mut stage = Stage {
            rig: &rig,
            guests: &mut guests,
            began_s,
        };
        let event = stage.perform(action);
        let event = event.with_context(|| format!("event {number}: {action:?}"))?;
        let spoilt = event.spoilt.as_deref().unwrap_or("");
        tell(&format!(
            "{number} of {}: {} on {}, {:.1} s {spoilt}",
            plan.actions.len(),
            event.what,
            event.target,
            event.until_s - event.from_s
        ));
        events.push(event);
        wait::pause(BETWEEN)?;
        guests.mend(&rig)?;
    }
    wait::pause(AFTER.saturating_sub(BETWEEN))?;
    let collected = watching.finish()?;
    let length_s = unix_s() - began_s;
    for line in &collected.news {
        if !line.contains("Burst") {
            tell(line);
        }
    }
    let qemu = process::run("qemu-system-x86_64", &["--version"])?;
    let relative = |us: u64| us.saturating_sub((began_s * 1e6) as u64);
    let labels = Labels {
        format: FORMAT,
        session: name(wish.seed),
        part: if wish.seed.is_multiple_of(2) {
            Part::Calibration
        } else {
            Part::HeldOut
        },
        seed: wish.seed,
        began_unix_s: began_s,
        length_s: tidy(length_s),
        link_mbit_s: plan.link_mbit_s,
        qemu: qemu.lines().next().unwrap_or_default().to_owned(),
        accelerator: "tcg".to_owned(),
        memory_mib: (guests::MEMORY_MIB, plan.fill_mib),
        dirty_mib_s: plan.dirty_mib_s,
        load_average: (began_load, load_average()),
        targets: watched.into_iter().map(|of| of.target).collect(),
        stalls_s: collected
            .stalls_us
            .iter()
            .map(|(from, until)| (relative(*from) as f64 / 1e6, relative(*until) as f64 / 1e6))
            .collect(),
        events,
    };
    let mut seen = collected.seen;
    for one in &mut seen {
        // A tenth of a millisecond is enough, and makes traces shorter.
        one.sent_us = relative(one.sent_us) / 100 * 100;
    }
    let path = Session { labels, seen }.write(dir)?;
    tell(&format!("wrote {}", path.display()));
    Ok(())
}

/// Seconds to a tenth of a millisecond.
fn tidy(seconds: f64) -> f64 {
    (seconds * 1e4).round() / 1e4
}

fn watched(rig: &Rig) -> Result<Vec<Watched>> {
    let vms = guests::ALL.iter().map(|guest| {
        let address: Ipv4Addr = guest.address.parse()?;
        Ok(Watched {
            target: Target {
                name: guest.name.to_owned(),
                is_host: false,
            },
            address,
            has_ntp: true,
        })
    });
    let hosts = rig.hosts.iter().map(|host| {
        Ok(Watched {
            target: Target {
                name: format!("host-{}", host.name()),
                is_host: true,
            },
            address: host.spec.address.parse()?,
            has_ntp: false,
        })
    });
    vms.chain(hosts).collect()
}
