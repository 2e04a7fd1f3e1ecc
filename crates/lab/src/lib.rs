//! The lab: hosts as network namespaces of one machine, each with its own agent, state and certificates, joined by a
//! bridge; guests that verify their own memory; a client and an observer outside of them.
//!
//! A [`rig::Rig`] makes all of it and leaves nothing behind, also when a test panics. What a killed process leaves is
//! removed by [`rig::clean`] and by the next rig that is made.
#![forbid(unsafe_code)]

pub mod attack;
pub mod chart;
pub mod control;
pub mod fail_point;
pub mod file_server;
pub mod guest;
pub mod host;
pub mod matrix;
pub mod middle;
pub mod network;
pub mod observer;
pub mod paths;
pub mod probe;
pub mod process;
pub mod qemu;
pub mod results;
pub mod rig;
pub mod tpm;
pub mod transport;
pub mod trust;
pub mod usage;
pub mod wait;
pub mod witness;
