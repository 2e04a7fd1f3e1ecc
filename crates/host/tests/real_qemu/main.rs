//! The backend on a real QEMU with a boot sector that rewrites 63 MiB for ever.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bench;
mod life;
mod measure;
mod migration;
mod missing;
mod numa;
mod throttling;
mod tracking;
