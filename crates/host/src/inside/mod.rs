//! This machine as it looks from inside, for a guest whose owner wants to notice that it was moved: its clocks, what says
//! which processor and hypervisor it has, and how fast some short loops are compared with each other, and how long first writes to
//! pages take.
//!
//! Nothing here judges. What can't be read is named, with why and what to do about it.

mod benchmark;
mod clocks;
mod platform;
mod rtc;
mod writes;

use std::io;
use std::path::Path;

pub use benchmark::{Benchmark, Speeds};
pub use clocks::{Clocks, Edge, read as read_clocks};
pub use platform::{Platform, stolen_ms};
pub use rtc::Rtc;
pub use writes::{Pages, Writes};

/// Longest file that is read here, in bytes.
const FILE_MAX: usize = 64 << 10;

/// Something that this machine does not show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unread {
    /// What.
    pub what: &'static str,
    /// Why.
    pub why: String,
    /// What can be done about it.
    pub hint: &'static str,
}

/// Keeps the calling thread on the first processor that it may use: processors of one machine may differ, and their
/// counters too. One that is taken away later is no problem, the kernel then lifts this.
///
/// # Errors
///
/// If the kernel refuses.
pub fn stay_on_one_processor() -> io::Result<()> {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let all = sched_getaffinity(None)?;
    let Some(first) = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)) else {
        return Ok(());
    };
    let mut one = CpuSet::new();
    one.set(first);
    Ok(sched_setaffinity(None, &one)?)
}

/// The text of a small file, without the space around it.
fn text(path: impl AsRef<Path>) -> io::Result<String> {
    use std::io::Read as _;
    let file = std::fs::File::open(path)?;
    let mut bytes = Vec::new();
    file.take(FILE_MAX as u64).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}
