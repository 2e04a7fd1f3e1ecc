//! What the workload has seen so far.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Counters shared by all threads; they only grow.
pub(crate) struct Stats {
    started: Instant,
    boot_id: String,
    beats: AtomicU64,
    sweeps: AtomicU64,
    audits: AtomicU64,
    verified_pages: AtomicU64,
    corrupt_pages: AtomicU64,
}

impl Stats {
    pub(crate) fn new(boot_id: String) -> Self {
        Self {
            started: Instant::now(),
            boot_id,
            beats: AtomicU64::new(0),
            sweeps: AtomicU64::new(0),
            audits: AtomicU64::new(0),
            verified_pages: AtomicU64::new(0),
            corrupt_pages: AtomicU64::new(0),
        }
    }

    /// The whole buffer was verified and rewritten.
    pub(crate) fn count_sweep(&self) {
        self.sweeps.fetch_add(1, Ordering::Relaxed);
    }

    /// All memory that isn't rewritten was verified.
    pub(crate) fn count_audit(&self) {
        self.audits.fetch_add(1, Ordering::Relaxed);
    }

    /// A page held what it should.
    pub(crate) fn count_verified(&self) {
        self.verified_pages.fetch_add(1, Ordering::Relaxed);
    }

    /// A page held something else; returns how many have by now.
    pub(crate) fn count_corrupt(&self) -> u64 {
        self.corrupt_pages.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Counts a beat and returns its line.
    pub(crate) fn beat(&self) -> String {
        let beat = self.beats.fetch_add(1, Ordering::Relaxed) + 1;
        format!(
            "beat {beat} sweeps {} verified {} corrupt {} audits {}",
            self.sweeps.load(Ordering::Relaxed),
            self.verified_pages.load(Ordering::Relaxed),
            self.corrupt_pages.load(Ordering::Relaxed),
            self.audits.load(Ordering::Relaxed),
        )
    }

    /// All of it as a JSON object.
    pub(crate) fn json(&self) -> String {
        format!(
            concat!(
                r#"{{"uptime_s":{:.3},"sweeps":{},"audits":{},"verified_pages":{},"#,
                r#""corrupt_pages":{},"boot_id":"{}","beats":{}}}"#
            ),
            self.started.elapsed().as_secs_f64(),
            self.sweeps.load(Ordering::Relaxed),
            self.audits.load(Ordering::Relaxed),
            self.verified_pages.load(Ordering::Relaxed),
            self.corrupt_pages.load(Ordering::Relaxed),
            self.boot_id,
            self.beats.load(Ordering::Relaxed),
        )
    }
}

/// Bytes the kernel could still give to a program, from `/proc/meminfo` (proc(5)).
pub(crate) fn memory_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_names_every_counter() {
        let stats = Stats::new("00ff".into());
        stats.count_verified();
        stats.count_sweep();
        stats.count_audit();
        assert_eq!(stats.count_corrupt(), 1);
        assert_eq!(
            stats.beat(),
            "beat 1 sweeps 1 verified 1 corrupt 1 audits 1"
        );
        assert!(stats.json().contains(r#""boot_id":"00ff","beats":1}"#));
    }
}
