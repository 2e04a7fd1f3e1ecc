//! The command line from outside: what it asks the agent, what it prints, what it ends with.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod agent;
#[cfg(feature = "tpm")]
mod attest;
mod certificates;
mod inside;
mod migrate;
mod migration;
#[cfg(feature = "watch-probes")]
mod page;
#[cfg(feature = "watch-probes")]
mod probes;
mod trust;
mod vm;
mod watch;
