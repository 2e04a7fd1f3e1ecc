//! Labelled trials: real guests are moved, paused and disturbed in the lab, while the prober watches them from outside.
//!
//! - [`record`] makes a [`corpus::Session`]: what the prober saw, and what happened when, as QEMU and the agents say;
//! - [`judge`] gives a session to the detector and to the heuristics of 2013, and says what became of each event;
//! - [`report`] counts that over sessions that the detector was not calibrated with.
#![forbid(unsafe_code)]

pub mod corpus;
pub mod interval;
pub mod judge;
pub mod record;
pub mod report;
