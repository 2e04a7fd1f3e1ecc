//! A guest that writes.

use palanquin_engine::pages::PAGE_BYTES;
use palanquin_engine::{PageSet, RamLayout, Time};

/// Pages of the VM: 512 MiB.
pub(crate) const PAGES: u64 = 512 << 8;
/// Pages that a write at random touches: 64 KiB, an object of a program.
const OBJECT_PAGES: u64 = 16;

/// Chance from a seed: SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end.max(1)
    }
}

/// Which pages of its working set it writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Pattern {
    /// One after the other, over and over.
    Cyclic,
    /// Any.
    Uniform,
    /// Nine of ten writes go to a tenth of the pages.
    Hot,
}

/// What a guest does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    pub(crate) pattern: Pattern,
    pub(crate) working_set_mib: u64,
    /// Writes, counted as bytes of the pages that they touch.
    pub(crate) dirty_bytes_per_s: f64,
    /// It works this long, then rests as long; never rests where 0.
    pub(crate) burst_ms: u64,
    pub(crate) seed: u64,
}

/// It runs, and its writes are noted as the kernel does.
#[derive(Debug)]
pub(crate) struct Guest {
    load: Workload,
    random: Random,
    layout: RamLayout,
    dirty: PageSet,
    now: Time,
    position: u64,
    carry: f64,
    /// Of its CPU time; 0 while it is paused.
    pub(crate) share: f64,
}

impl Guest {
    pub(crate) fn new(load: Workload) -> Self {
        let layout = RamLayout::new(vec![PAGES]).expect("a layout");
        let mut random = Random(load.seed);
        Self {
            position: random.below(load.working_set_mib << 8),
            random,
            load,
            dirty: PageSet::empty(&layout),
            layout,
            now: Time::default(),
            carry: 0.0,
            share: 1.0,
        }
    }

    fn working_until(&self, now: Time) -> f64 {
        let (micros, burst) = (now.as_micros(), self.load.burst_ms * 1000);
        let Some(periods) = micros.checked_div(2 * burst) else {
            return micros as f64 / 1e6;
        };
        (periods * burst + (micros % (2 * burst)).min(burst)) as f64 / 1e6
    }

    /// Runs until then.
    pub(crate) fn run(&mut self, until: Time) {
        let seconds = self.working_until(until) - self.working_until(self.now);
        self.now = until;
        self.carry += seconds * self.share * self.load.dirty_bytes_per_s / PAGE_BYTES as f64;
        let pages = self.load.working_set_mib << 8;
        // The working set lies in the middle.
        let first = (PAGES - pages) / 2;
        match self.load.pattern {
            Pattern::Cyclic => {
                let count = self.carry as u64;
                self.carry -= count as f64;
                let end = self.position + count.min(pages);
                self.dirty
                    .insert(0, first + self.position..first + end.min(pages));
                self.dirty
                    .insert(0, first..first + end.saturating_sub(pages));
                self.position = (self.position + count) % pages;
            }
            Pattern::Uniform | Pattern::Hot => {
                let objects = pages / OBJECT_PAGES;
                while self.carry >= OBJECT_PAGES as f64 {
                    self.carry -= OBJECT_PAGES as f64;
                    let hot = self.load.pattern == Pattern::Hot && self.random.below(10) < 9;
                    // The hot ones lie scattered.
                    let object = if hot {
                        self.random.below(objects / 10) * 10
                    } else {
                        self.random.below(objects)
                    };
                    let page = first + object * OBJECT_PAGES;
                    self.dirty.insert(0, page..page + OBJECT_PAGES);
                }
            }
        }
    }

    /// Pages written since the last time.
    pub(crate) fn collect(&mut self) -> PageSet {
        std::mem::replace(&mut self.dirty, PageSet::empty(&self.layout))
    }

    pub(crate) fn peek(&self) -> PageSet {
        self.dirty.clone()
    }
}
