//! What a source does on its way to the switchover.
#![forbid(unsafe_code)]

#[path = "../common/mod.rs"]
mod common;

mod ahead;
mod judging;
mod play;
