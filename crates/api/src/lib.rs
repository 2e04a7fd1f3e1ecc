//! Versioned types of Palanquin's control and observe interfaces, of the agent's configuration
//! and of VM specifications.
//!
//! These types are the contract between `palanquind`, the command line and scripts. Fields may be
//! added, never renamed; the path prefix `/v1` changes when that promise cannot be kept.
#![forbid(unsafe_code)]

pub mod advertisement;
pub mod attestation;
pub mod config;
pub mod control;
pub mod hex;
pub mod size;
pub mod trust;
pub mod vm_spec;

pub use size::{ByteSize, HumanDuration};
