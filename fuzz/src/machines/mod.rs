//! The state machines, given any sequence of events, against the laws that can be judged from one side.
//!
//! Events are made from the input, byte by byte. Most are what a driver or the other side would do next, so that later
//! states are reached; the others are anything. Of a driver's contract only this is kept: what concerns the VM, and
//! records of the journal, end in the order in which they were asked for.

pub(crate) mod destination;
pub(crate) mod messages;
pub(crate) mod source;

use std::time::Duration;

use arbitrary::{Result, Unstructured};

/// How long until the next event.
pub(crate) fn pause(u: &mut Unstructured<'_>) -> Result<Duration> {
    Ok(Duration::from_millis(match u.int_in_range(0..=9)? {
        0..=3 => 0,
        4 => 1,
        5 => 60,
        6 => 1_100,
        7 => 3_400,
        8 => 10_001,
        _ => 61_000,
    }))
}
