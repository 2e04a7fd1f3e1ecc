//! One program for all targets: which one it runs is in the environment, see [`entry`].
#![no_main]
#![forbid(unsafe_code)]

mod entry;
mod machines;
mod targets;

use libfuzzer_sys::fuzz_target;
use peak_alloc::PeakAlloc;

/// Counts what is allocated, so that targets can say how much may be.
#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

fuzz_target!(
    init: {
        entry::start();
    },
    |data: &[u8]| entry::run(data)
);
