//! This machine, as Palanquin uses it: QEMU, guest memory, write tracking.
//!
//! The only crate with `unsafe` code, all of it in `sys`; each block says why it is sound. It depends on nothing
//! of ours.
#![expect(
    clippy::missing_errors_doc,
    reason = "the traits' methods fail with `Error`, which says how"
)]

mod error;
pub mod facts;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod inside;
pub mod measure;
mod numa;
pub mod probe;
mod process;
pub mod qemu;
mod ram_file;
pub mod shared;
mod sys;
mod throttle;
pub mod tpm;
pub mod users;
pub mod vm;
mod wait;

pub use error::Error;
pub use sys::session::inherit_nothing;
