//! Two agents in virtual time: the real engines, fake VMs, and a wire and a machine that fail in every way.
//!
//! Everything follows from one seed. After every event the laws are checked: at most one copy of the VM runs, both
//! journals never claim it, and what is left of it can be recovered. Once the faults stop, every migration must end, with
//! exactly one copy left, unless the simulation itself killed the VM's hypervisor. In a fifth of the seeds one host
//! lies: then the other has to keep the laws that it can keep alone.
//!
//! [`model`] does not draw chances but explores all there are, within bounds.
#![forbid(unsafe_code)]

pub mod model;
pub mod mutation;
pub mod random;
mod world;

pub use mutation::Mutation;
pub use world::{Outcome, Report, simulate};
