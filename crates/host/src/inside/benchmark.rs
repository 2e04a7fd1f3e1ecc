//! How fast some short loops are: a fingerprint of the hardware and of what is between it and this program.
//!
//! Of each loop the fastest of a few runs counts, because whatever disturbs makes it slower. The numbers themselves change
//! with the processor's frequency; their ratios hardly do.

use std::hint::black_box;
use std::time::{Duration, Instant};

/// Runs of each loop.
const RUNS: u32 = 7;
/// All loops together end after this, even if the machine is very slow.
const DEADLINE: Duration = Duration::from_millis(200);
/// Bytes of memory that each chase goes through: in the first cache, in the second, and in neither.
const CHASES: [usize; 3] = [16 << 10, 256 << 10, 8 << 20];
/// Bytes between two steps of a chase: a cache line.
const LINE: usize = 64;
/// Multiplications of a run.
const SUMS: u32 = 10_000;
/// Steps of a run through memory.
const STEPS: u32 = 2_000;
/// System calls of a run.
const CALLS: u32 = 100;
/// Executions of CPUID of a run; a hypervisor sees each of them.
const TRAPS: u32 = 10;

/// Nanoseconds of one turn of each loop; nothing of those that there was no time for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Speeds {
    /// A multiplication and an exclusive or, each waiting for the one before.
    pub alu_ns: Option<f64>,
    /// An access to memory in the first cache.
    pub first_cache_ns: Option<f64>,
    /// One in the second.
    pub second_cache_ns: Option<f64>,
    /// One in 8 MiB.
    pub memory_ns: Option<f64>,
    /// A system call that does nothing.
    pub syscall_ns: Option<f64>,
    /// CPUID, which a hypervisor has to answer itself.
    pub cpuid_ns: Option<f64>,
}

/// A walk through memory. It goes on where it was: what was just walked through is in a cache.
#[derive(Debug)]
struct Chase {
    memory: Vec<u32>,
    at: u32,
}

impl Chase {
    fn run(&mut self) {
        for _ in 0..STEPS {
            self.at = self.memory.get(self.at as usize).copied().unwrap_or(0);
        }
        black_box(self.at);
    }
}

/// The loops, with the memory they go through (8.3 MiB).
#[derive(Debug)]
pub struct Benchmark {
    chases: [Chase; 3],
}

impl Default for Benchmark {
    fn default() -> Self {
        Self::new()
    }
}

impl Benchmark {
    /// Takes the memory.
    #[must_use]
    pub fn new() -> Self {
        Self {
            chases: CHASES.map(|bytes| Chase {
                memory: circle(bytes / LINE),
                at: 0,
            }),
        }
    }

    /// Runs all loops: some milliseconds, at most 200 and the run that is under way then.
    #[must_use]
    pub fn run(&mut self) -> Speeds {
        let deadline = Instant::now() + DEADLINE;
        let [first, second, memory] = &mut self.chases;
        Speeds {
            alu_ns: fastest(deadline, SUMS, || sums(SUMS)),
            first_cache_ns: fastest(deadline, STEPS, || first.run()),
            second_cache_ns: fastest(deadline, STEPS, || second.run()),
            memory_ns: fastest(deadline, STEPS, || memory.run()),
            syscall_ns: fastest(deadline, CALLS, calls),
            cpuid_ns: if cfg!(target_arch = "x86_64") {
                fastest(deadline, TRAPS, traps)
            } else {
                None
            },
        }
    }
}

/// A walk through all lines in an order that no prefetcher guesses and that is always the same (Sattolo's algorithm): at
/// each line's beginning stands the index of the next one's.
fn circle(lines: usize) -> Vec<u32> {
    let words = LINE / size_of::<u32>();
    let mut order: Vec<u32> = (0..).take(lines).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for at in (1..lines).rev() {
        // Xorshift: good enough for an order.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(at, (state % at as u64) as usize);
    }
    let mut memory = vec![0; lines * words];
    for (at, next) in order.into_iter().enumerate() {
        memory[at * words] = next * words as u32;
    }
    memory
}

fn fastest(deadline: Instant, turns: u32, mut run: impl FnMut()) -> Option<f64> {
    let mut best: Option<Duration> = None;
    for _ in 0..RUNS {
        let began = Instant::now();
        if began >= deadline {
            break;
        }
        run();
        let took = began.elapsed();
        best = Some(best.map_or(took, |best| best.min(took)));
    }
    let ns = best?.as_nanos() as f64 / f64::from(turns);
    // A clock too coarse to show anything, or one that stood still.
    (ns > 0.0).then_some(ns)
}

fn sums(count: u32) {
    let mut value = black_box(1_u64);
    for _ in 0..count {
        value = black_box(value.wrapping_mul(0x5851_f42d_4c95_7f2d) ^ 0x1405_7b7e);
    }
    black_box(value);
}

fn calls() {
    for _ in 0..CALLS {
        black_box(rustix::process::getppid());
    }
}

fn traps() {
    #[cfg(target_arch = "x86_64")]
    for _ in 0..TRAPS {
        black_box(core::arch::x86_64::__cpuid_count(0, 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_comes_by_every_line_once() {
        let memory = circle(256);
        let (mut at, mut steps) = (0, 0);
        loop {
            at = memory[at] as usize;
            steps += 1;
            if at == 0 {
                break;
            }
            assert!(steps < 256, "a circle within");
        }
        assert_eq!(steps, 256);
    }

    #[test]
    fn every_loop_is_measured_within_its_time() {
        let mut benchmark = Benchmark::new();
        let began = Instant::now();
        let speeds = benchmark.run();
        assert!(began.elapsed() < Duration::from_secs(10));
        assert!(speeds.alu_ns.is_some_and(|ns| ns > 0.0), "{speeds:?}");
    }
}
