//! How long the first write to a page takes, and one right after it.
//!
//! Whoever copies the memory of a running machine must know what was written since. For that a hypervisor protects pages, or
//! keeps what maps them away, and takes note at the first write to each: that one takes longer than the next. So it is for
//! every pre-copy that we know of: QEMU's dirty log in KVM without page-modification logging and in TCG, and Linux's
//! `UFFDIO_WRITEPROTECT` and `PAGEMAP_SCAN`, by which Palanquin and background snapshots work. Where the processor itself
//! notes what was written (Intel's PML) there is little to be seen, and where the host maps huge pages as one there are too
//! few first writes.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::Unread;
use crate::sys::mlock;

/// Bytes between two writes. Hosts note what was written by pages of this size at least.
const PAGE: usize = 4096;
/// Bytes by which each write lies further within its page than the one before, so that they do not share a set of a cache.
const LINE: usize = 64;
/// Pages of a run. The middle of all runs counts: this program may be held up in some.
const RUN: usize = 64;
/// Runs of a look.
const RUNS: usize = 8;
/// Looks until the same pages are written to again: after somebody has begun to take note, so many looks tell of it.
const PARTS: usize = 4;

/// Nanoseconds of a write to one page.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Writes {
    /// The first one in a while. The page was read just before.
    pub first_ns: f64,
    /// One right after it.
    pub again_ns: f64,
}

/// Pages to write to (8 MiB), with contents that no other page has: a host that merges equal pages must not merge these.
#[derive(Debug)]
pub struct Pages {
    memory: Vec<u8>,
    part: usize,
    kept: Result<(), Unread>,
}

impl Default for Pages {
    fn default() -> Self {
        Self::new()
    }
}

impl Pages {
    /// Takes the memory, writes to all of it, and asks that none of it is swapped out, which would look as if it were copied.
    #[must_use]
    pub fn new() -> Self {
        let mut state = u64::from(std::process::id()) << 32
            | u64::from(
                std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .map_or(1, |since| since.subsec_nanos() | 1),
            );
        let mut memory = vec![0; PARTS * RUNS * RUN * PAGE];
        for word in memory.chunks_exact_mut(size_of::<u64>()) {
            // Xorshift: good enough to be unlike others.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let kept = mlock::lock(&memory).map_err(|error| Unread {
            what: "memory that stays",
            why: format!("mlock: {error}"),
            hint: "what is swapped out may be taken for what is copied; allow 9 MiB (`ulimit -l`)",
        });
        Self {
            memory,
            part: 0,
            kept,
        }
    }

    /// Why the memory may be swapped out, if so.
    #[must_use]
    pub fn unread(&self) -> Option<&Unread> {
        self.kept.as_ref().err()
    }

    /// Writes to the next quarter of the pages; nothing if the clock is too coarse. It takes less than a millisecond on a
    /// processor, and a few where one is emulated.
    #[must_use]
    pub fn write(&mut self) -> Option<Writes> {
        let bytes = RUNS * RUN * PAGE;
        let part = self.memory.chunks_exact_mut(bytes).nth(self.part)?;
        self.part = (self.part + 1) % PARTS;
        let (mut first, mut again) = (Vec::new(), Vec::new());
        for run in part.chunks_exact_mut(RUN * PAGE) {
            black_box(sum(run));
            first.push(timed(run));
            again.push(timed(run));
        }
        let ns = |times: &mut Vec<Duration>| {
            times.sort_unstable();
            let middle = times.get(times.len() / 2).copied().unwrap_or_default();
            middle.as_nanos() as f64 / RUN as f64
        };
        let writes = Writes {
            first_ns: ns(&mut first),
            again_ns: ns(&mut again),
        };
        (writes.first_ns > 0.0 && writes.again_ns > 0.0).then_some(writes)
    }
}

/// The bytes of a run that are written to.
fn each(run: &mut [u8]) -> impl Iterator<Item = &mut u8> {
    let pages = run.chunks_exact_mut(PAGE).enumerate();
    pages.filter_map(|(number, page)| page.get_mut(number * LINE % PAGE))
}

fn sum(run: &mut [u8]) -> u8 {
    each(run).fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn timed(run: &mut [u8]) -> Duration {
    let began = Instant::now();
    for byte in each(run) {
        *byte = black_box(byte.wrapping_add(1));
    }
    black_box(run);
    began.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{track, uffd};

    #[test]
    fn every_page_is_written_to_twice_in_as_many_looks_as_there_are_parts() {
        let mut pages = Pages::new();
        let before = pages.memory.clone();
        for _ in 0..PARTS {
            let writes = pages.write().unwrap();
            assert!(writes.first_ns > 0.0 && writes.again_ns > 0.0, "{writes:?}");
        }
        let both = before
            .chunks_exact(PAGE)
            .zip(pages.memory.chunks_exact(PAGE));
        for (number, (was, is)) in both.enumerate() {
            let at = number % RUN * LINE % PAGE;
            assert_eq!(is[at], was[at].wrapping_add(2), "page {number}");
        }
    }

    /// How many times as long a first write takes.
    fn times(pages: &mut Pages) -> f64 {
        let writes = pages.write().unwrap();
        writes.first_ns / writes.again_ns
    }

    #[test]
    fn first_writes_take_longer_while_the_kernel_takes_note_of_them() {
        let mut pages = Pages::new();
        for _ in 0..PARTS {
            let _ = times(&mut pages);
        }
        let begin = pages.memory.as_ptr() as u64 / PAGE as u64 * PAGE as u64;
        let range = begin..begin + (pages.memory.len() as u64).next_multiple_of(PAGE as u64);
        let fd = uffd::own().unwrap();
        uffd::enable(&fd, uffd::FOLLOW_WRITES).unwrap();
        uffd::register(&fd, &range, uffd::Mode::WriteProtect).unwrap();
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        track::scan(&pagemap, &range, track::Found::Protect, &mut |_| {}).unwrap();
        let noted: Vec<f64> = (0..PARTS).map(|_| times(&mut pages)).collect();
        let after: Vec<f64> = (0..PARTS).map(|_| times(&mut pages)).collect();
        println!("{noted:.0?} times as long, and afterwards {after:.1?}");
        // All parts tell of it, each once.
        assert!(noted.iter().all(|times| *times > 3.0), "{noted:?}");
        assert!(after.iter().any(|times| *times < 3.0), "{after:?}");
    }

    #[test]
    fn no_two_pages_are_alike() {
        let pages = Pages::new();
        let mut all: Vec<&[u8]> = pages.memory.chunks_exact(PAGE).collect();
        all.sort_unstable();
        assert!(all.windows(2).all(|two| two[0] != two[1]));
    }
}
