//! What a migration costs, measured the same way whoever does it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use palanquin_lab::host::Host;
use palanquin_lab::process;
use palanquin_lab::wait;
use serde::Serialize;

/// One migration.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    /// Which way it was done.
    pub(crate) path: &'static str,
    /// From the request to the answer that it is done, in milliseconds, by the bench's clock.
    pub(crate) total_ms: f64,
    /// As the migrating program itself reports it.
    pub(crate) reported_total_ms: f64,
    /// As the migrating program itself reports it.
    pub(crate) reported_downtime_ms: f64,
    /// From the source's event STOP to the destination's event RESUME; only QEMU's own migration shows both.
    pub(crate) event_downtime_ms: Option<f64>,
    /// Longest time in which a client's pings were not answered, one each 5 ms.
    pub(crate) ping_gap_ms: f64,
    /// CPU time of all processes that take part, both ends, the guest's own included.
    pub(crate) cpu_s: f64,
    /// What the source's network device sent.
    pub(crate) wire_bytes: u64,
    /// Largest anonymous memory of either agent, in KiB; mapped guest RAM is not anonymous.
    pub(crate) agent_rss_anon_kib: Option<u64>,
    /// User-mode CPU time of everybody else during the migration, as a share of all CPUs' time, 0 to 1.
    pub(crate) foreign_share: f64,
}

/// Others may use at most this share of the machine; with more, it is they who are measured.
pub(crate) const QUIET: f64 = 0.10;

/// Waits until the rest of the machine is quiet.
///
/// # Errors
///
/// If it is not within 10 min.
pub(crate) fn wait_quiet(own: &[u32]) -> Result<()> {
    wait::until_true(
        "this machine is quiet enough to measure",
        Duration::from_secs(600),
        || {
            let load = Load::start(own);
            wait::pause(Duration::from_secs(2))?;
            Ok(load.finish(Duration::ZERO) < QUIET)
        },
    )
}

/// CPU time of everybody else.
pub(crate) struct Load {
    began: Instant,
    machine: Duration,
    own: Vec<(u32, Duration, Duration)>,
}

impl Load {
    /// Begins to count.
    fn start(own: &[u32]) -> Self {
        let used = |pid: &u32| {
            let now = process::user_time(*pid).unwrap_or_default();
            (*pid, now, now)
        };
        Self {
            began: Instant::now(),
            machine: process::machine_user_time().unwrap_or_default(),
            own: own.iter().map(used).collect(),
        }
    }

    /// Looks again; a process that ends later keeps what was seen last.
    fn look(&mut self) {
        for (pid, _, last) in &mut self.own {
            *last = process::user_time(*pid).unwrap_or(*last);
        }
    }

    /// Share of the machine that others used; `more` is what else was ours.
    fn finish(mut self, more: Duration) -> f64 {
        self.look();
        let ours: Duration = self
            .own
            .iter()
            .map(|(_, first, last)| last.saturating_sub(*first))
            .sum();
        let all = process::machine_user_time()
            .unwrap_or_default()
            .saturating_sub(self.machine);
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let others = all.saturating_sub(ours + more).as_secs_f64();
        others / (self.began.elapsed().as_secs_f64() * cpus as f64)
    }
}

/// What a watch saw.
pub(crate) struct Watched {
    /// CPU time in seconds.
    pub(crate) cpu_s: f64,
    /// Largest anonymous memory of an agent in KiB.
    pub(crate) rss_anon_kib: u64,
    /// As [`Sample::foreign_share`].
    pub(crate) foreign_share: f64,
}

#[derive(Default)]
struct Seen {
    load: Option<Load>,
    /// CPU time at the beginning and last, by process.
    cpu: BTreeMap<u32, (Duration, Duration)>,
    rss_anon_kib: u64,
}

/// Watches processes while a migration runs.
pub(crate) struct Watch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Watch {
    /// Begins. CPU time is counted from now for `processes` and `agents`; memory is watched of `agents`.
    pub(crate) fn start(processes: Vec<u32>, agents: Vec<u32>) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (watched, watched_agents) = (processes.clone(), agents.clone());
        let (shared, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let look = move || {
            let mut seen = shared.lock().unwrap_or_else(PoisonError::into_inner);
            for pid in processes.iter().chain(&agents) {
                if let Some(now) = process::cpu_time(*pid) {
                    seen.cpu.entry(*pid).or_insert((now, now)).1 = now;
                }
            }
            if let Some(load) = &mut seen.load {
                load.look();
            }
            let anonymous = agents
                .iter()
                .filter_map(|pid| process::status_value(*pid, "RssAnon"));
            seen.rss_anon_kib = anonymous.max().unwrap_or(0).max(seen.rss_anon_kib);
        };
        {
            let all: Vec<u32> = watched.iter().chain(&watched_agents).copied().collect();
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.load = Some(Load::start(&all));
        }
        look();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) && wait::pause(Duration::from_millis(10)).is_ok()
            {
                look();
            }
            look();
        });
        Self { seen, stop, thread }
    }

    /// Ends. `late` are processes of ours that did not exist when the watch began: all that they used counts.
    pub(crate) fn finish(self, late: &[u32]) -> Watched {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let late_user: Duration = late.iter().filter_map(|pid| process::user_time(*pid)).sum();
        let late_cpu: Duration = late.iter().filter_map(|pid| process::cpu_time(*pid)).sum();
        let used = seen
            .cpu
            .values()
            .map(|(first, last)| last.saturating_sub(*first));
        Watched {
            cpu_s: (used.sum::<Duration>() + late_cpu).as_secs_f64(),
            rss_anon_kib: seen.rss_anon_kib,
            foreign_share: seen.load.take().map_or(1.0, |load| load.finish(late_user)),
        }
    }
}

/// Bytes that a host's uplink has sent so far.
pub(crate) fn sent_bytes(host: &Host) -> Result<u64> {
    let text = host
        .namespace
        .ip(&["-s", "-j", "link", "show", "dev", "eth0"])?;
    let links: serde_json::Value = serde_json::from_str(&text)?;
    links[0]["stats64"]["tx"]["bytes"]
        .as_u64()
        .context("no counter of eth0")
}

/// The middle value; of an even number the lower one of the two.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
        .get((values.len().max(1) - 1) / 2)
        .copied()
        .unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_a_value_that_was_measured() {
        assert!((median([3.0, 1.0, 2.0].into_iter()) - 2.0).abs() < f64::EPSILON);
        assert!((median([4.0, 1.0, 2.0, 3.0].into_iter()) - 2.0).abs() < f64::EPSILON);
        assert!(median(std::iter::empty()).is_nan());
    }
}
