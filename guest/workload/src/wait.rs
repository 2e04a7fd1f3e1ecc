//! Waiting for a moment.

use std::thread;
use std::time::Instant;

/// Returns at `deadline`, never before.
pub(crate) fn until(deadline: Instant) {
    while let Some(left) = deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
    {
        thread::park_timeout(left);
    }
}
