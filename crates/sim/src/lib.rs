//! Two agents in virtual time: the real engines, fake VMs, and a wire and a machine that fail in every way.
//!
//! Everything follows from one seed. After every event the law of one owner is checked: at most one copy of the VM
//! runs. Once the faults stop, every migration must end, with exactly one copy left, unless the simulation itself
//! killed the VM's hypervisor.
#![forbid(unsafe_code)]

pub mod model;
pub mod mutation;
pub mod random;
mod world;

pub use mutation::Mutation;
pub use world::{Outcome, Report, simulate};
