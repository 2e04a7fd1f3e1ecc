//! This machine, as Palanquin uses it: QEMU, guest memory, write tracking.
//!
//! The only crate with `unsafe` code; each block says why it is sound. It depends on nothing of ours.

pub mod vm;
