//! The memory that is rewritten, the memory that stays, and the thread that checks both.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use crate::canary::Canary;
use crate::console;
use crate::page::{Fault, PAGE_SIZE, PAGES_PER_MIB, Page};
use crate::settings::Settings;
use crate::stats::Stats;
use crate::wait;

/// How long the thread rests between two portions of work.
const TICK: Duration = Duration::from_millis(10);
/// Arrears are forgiven beyond this, so that a pause isn't followed by a storm of writes.
const ARREARS: Duration = Duration::from_millis(100);
/// Memory left to the rest of the guest, in bytes.
const RESERVE: u64 = 8 << 20;
/// After so many lines about corrupt pages only every thousandth is printed; all are counted.
const CORRUPT_LINES: u64 = 100;

/// All memory the workload keeps, filled.
pub(crate) struct Memory {
    seed: u64,
    fill_seed: u64,
    buffer: Vec<Page>,
    /// The next page of the buffer to rewrite; those before it have generation `generation + 1`.
    cursor: usize,
    generation: u64,
    fill: Vec<Page>,
    canary: Option<Canary>,
    audited: usize,
    rewrite: Pacer,
    audit: Pacer,
}

impl Memory {
    /// Takes and fills what `settings` ask for, if that is in `available` bytes.
    pub(crate) fn fill(settings: &Settings, available: u64) -> Result<Self, String> {
        // Bounded by the settings: 2^21 MiB at most.
        let wanted = (settings.buffer_mib + settings.fill_mib) << 20;
        if wanted > available.saturating_sub(RESERVE) {
            return Err(format!(
                "{} MiB of buffer and fill don't go into {} MiB of available memory",
                wanted >> 20,
                available >> 20
            ));
        }
        let seed = settings.seed;
        let fill_seed = !settings.seed;
        let mut buffer = pages(settings.buffer_mib)?;
        for (number, page) in (0..).zip(&mut buffer) {
            page.write(seed, number, 0);
        }
        let mut fill = pages(settings.fill_mib)?;
        for (number, page) in (0..).zip(&mut fill) {
            page.fill(fill_seed, number);
        }
        Ok(Self {
            seed,
            fill_seed,
            buffer,
            cursor: 0,
            generation: 0,
            fill,
            canary: settings.canary.as_deref().map(Canary::new),
            audited: 0,
            rewrite: Pacer::new(settings.dirty_mib_s),
            audit: Pacer::new(settings.audit_mib_s),
        })
    }

    /// Rewrites and verifies at the set rates, for ever.
    pub(crate) fn work(mut self, stats: &Stats) -> Infallible {
        let mut next = Instant::now();
        loop {
            next = (next + TICK).max(Instant::now());
            wait::until(next);
            let now = Instant::now();
            for _ in 0..self.rewrite.due(now) {
                self.rewrite_one(stats);
            }
            for _ in 0..self.audit.due(now) {
                self.audit_one(stats);
            }
        }
    }

    /// Verifies the next page of the buffer, then writes its next version.
    fn rewrite_one(&mut self, stats: &Stats) {
        let Some(page) = self.buffer.get_mut(self.cursor) else {
            self.cursor = 0;
            self.generation += 1;
            stats.count_sweep();
            return;
        };
        let number = self.cursor as u64;
        let verdict = page.verify(number, self.generation);
        report(stats, "buffer", number, self.generation, verdict);
        page.write(self.seed, number, self.generation + 1);
        self.cursor += 1;
    }

    /// Verifies the next page of what isn't rewritten. A corrupt page is put right, so that each
    /// corruption counts once.
    fn audit_one(&mut self, stats: &Stats) {
        let (index, fills) = (self.audited, self.fill.len());
        // A buffer that is being rewritten is verified by that.
        let buffers = if self.rewrite.rests() {
            self.buffer.len()
        } else {
            0
        };
        self.audited += 1;
        if let Some(page) = self.fill.get_mut(index) {
            let verdict = page.verify_fill(self.fill_seed, index as u64);
            report(stats, "fill", index as u64, 0, verdict);
            if verdict.is_err() {
                page.fill(self.fill_seed, index as u64);
            }
        } else if index - fills < buffers {
            let (page, number) = (&mut self.buffer[index - fills], (index - fills) as u64);
            let verdict = page.verify(number, 0);
            report(stats, "buffer", number, 0, verdict);
            if verdict.is_err() {
                page.write(self.seed, number, 0);
            }
        } else {
            if self.canary.as_ref().is_some_and(|canary| !canary.verify()) {
                report(stats, "canary", 0, 0, Err(Fault::Content));
            }
            self.audited = 0;
            if fills + buffers > 0 {
                stats.count_audit();
            }
        }
    }
}

fn pages(mib: u64) -> Result<Vec<Page>, String> {
    let count = usize::try_from(mib * PAGES_PER_MIB).map_err(|why| why.to_string())?;
    let mut pages = Vec::new();
    pages
        .try_reserve_exact(count)
        .map_err(|why| why.to_string())?;
    pages.resize(count, Page::zeroed());
    Ok(pages)
}

fn report(stats: &Stats, what: &str, number: u64, generation: u64, verdict: Result<(), Fault>) {
    let Err(fault) = verdict else {
        stats.count_verified();
        return;
    };
    let count = stats.count_corrupt();
    if count <= CORRUPT_LINES || count.is_multiple_of(1000) {
        console::line(&format!(
            "CORRUPT {what} page={number} generation={generation} {fault:?} total={count}"
        ));
    }
}

/// Turns elapsed time into pages that are due.
struct Pacer {
    bytes_per_s: u64,
    last: Option<Instant>,
    /// Bytes due, times one second in nanoseconds: no rounding, whatever the rate.
    credit: u128,
}

impl Pacer {
    const UNIT: u128 = PAGE_SIZE as u128 * 1_000_000_000;

    fn new(mib_s: u64) -> Self {
        Self {
            bytes_per_s: mib_s << 20,
            last: None,
            credit: 0,
        }
    }

    /// Whether nothing is ever due.
    fn rests(&self) -> bool {
        self.bytes_per_s == 0
    }

    /// Pages due since the last call.
    fn due(&mut self, now: Instant) -> u64 {
        let elapsed = self
            .last
            .replace(now)
            .map_or(Duration::ZERO, |last| now.saturating_duration_since(last))
            .min(ARREARS);
        self.credit += elapsed.as_nanos() * u128::from(self.bytes_per_s);
        let pages = self.credit / Self::UNIT;
        self.credit %= Self::UNIT;
        u64::try_from(pages).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(dirty_mib_s: u64) -> Memory {
        let settings = Settings {
            dirty_mib_s,
            buffer_mib: 1,
            fill_mib: 1,
            canary: Some("The heron".into()),
            ..Settings::default()
        };
        Memory::fill(&settings, 1 << 30).unwrap()
    }

    #[test]
    fn many_sweeps_and_audits_find_nothing_wrong() {
        for rate in [0, 1] {
            let (mut memory, stats) = (memory(rate), Stats::new(String::new()));
            for _ in 0..2000 {
                if rate > 0 {
                    memory.rewrite_one(&stats);
                }
                memory.audit_one(&stats);
            }
            assert!(stats.json().contains(r#""corrupt_pages":0,"#));
        }
    }

    #[test]
    fn a_stale_page_is_counted_once() {
        let (mut memory, stats) = (memory(1), Stats::new(String::new()));
        let old = memory.buffer[5].clone();
        for _ in 0..=256 {
            memory.rewrite_one(&stats);
        }
        memory.buffer[5] = old;
        for _ in 0..1000 {
            memory.rewrite_one(&stats);
        }
        assert!(stats.json().contains(r#""corrupt_pages":1,"#));
    }

    #[test]
    fn an_altered_fill_page_is_counted_once() {
        let (mut memory, stats) = (memory(1), Stats::new(String::new()));
        memory.fill[200] = Page::zeroed();
        for _ in 0..1000 {
            memory.audit_one(&stats);
        }
        assert!(stats.json().contains(r#""corrupt_pages":1,"#));
    }

    #[test]
    fn the_rate_is_kept_and_a_pause_is_forgiven() {
        let (mut pacer, start) = (Pacer::new(3), Instant::now());
        pacer.due(start);
        let pages: u64 = (1..=1000_u32).map(|i| pacer.due(start + TICK * i)).sum();
        assert_eq!(pages, 10 * 3 * PAGES_PER_MIB);
        let late = start + TICK * 1000 + Duration::from_secs(60);
        assert!(pacer.due(late) <= 77);
        assert!(Pacer::new(0).rests());
    }

    #[test]
    fn more_than_there_is_is_refused() {
        let settings = Settings {
            fill_mib: 100,
            ..Settings::default()
        };
        let error = Memory::fill(&settings, 64 << 20).err().unwrap();
        assert!(error.contains("116 MiB"), "{error}");
    }
}
