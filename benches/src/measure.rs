//! What a migration costs, measured the same way whoever does it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

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
}

#[derive(Default)]
struct Seen {
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
        let (shared, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let look = move || {
            let mut seen = shared.lock().unwrap_or_else(PoisonError::into_inner);
            for pid in processes.iter().chain(&agents) {
                if let Some(now) = process::cpu_time(*pid) {
                    seen.cpu.entry(*pid).or_insert((now, now)).1 = now;
                }
            }
            let anonymous = agents
                .iter()
                .filter_map(|pid| process::status_value(*pid, "RssAnon"));
            seen.rss_anon_kib = anonymous.max().unwrap_or(0).max(seen.rss_anon_kib);
        };
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

    /// Ends; gives the CPU time in seconds and the agents' peak of anonymous memory in KiB.
    pub(crate) fn finish(self) -> (f64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let used = seen
            .cpu
            .values()
            .map(|(first, last)| last.saturating_sub(*first));
        (used.sum::<Duration>().as_secs_f64(), seen.rss_anon_kib)
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
