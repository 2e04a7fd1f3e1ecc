//! Notices that a virtual machine is being moved, or was, from outside: by its round trips, its losses, its clock.
//!
//! Nothing here does I/O or reads a clock: what probes saw goes in with the time at which they were sent, findings come
//! out. A prober and a file are the same to it.
//!
//! ```text
//! Observation ─▶ Watcher ── per target and second ─▶ ranks, whitening ─▶ has it grown?  ─┐
//!                                                    losses ─▶ how surprising a run?   ─┼─▶ episode ─▶ symbols ─▶ fusion ─▶ Finding
//!                                                    offsets ─▶ has its clock jumped?  ─┘                  calibration ─┘      │
//!                                                                             records of the control plane ─▶ Ledger ─▶ Joined ◀┘
//! ```
//!
//! - [`Watcher`]: observations in, findings out;
//! - [`Calibration`]: what thresholds and probabilities are, and [`calibrate`]: where they come from;
//! - [`Ledger`]: which findings are explained by migrations that somebody ordered;
//! - [`trace`]: recorded observations as lines of text;
//! - [`inside`]: the same from inside a guest, by its clocks, its looks, its speed and its neighbours;
//! - [`taxonomy`]: the eight ways to notice a migration, and what finds each;
//! - [`baseline`]: the heuristics of 2013, to compare with;
//! - [`synthetic`]: traces that nobody measured, for calibrating and tests.
#![forbid(unsafe_code)]

mod episode;
mod feature;
mod finding;
mod fusion;
mod join;
mod normal;
mod observation;
mod shift;
mod target;
mod watcher;

pub mod baseline;
pub mod calibrate;
pub mod calibration;
pub mod inside;
pub mod outside;
pub mod synthetic;
pub mod taxonomy;
pub mod trace;

pub use calibration::{Calibration, CalibrationError, Weights};
pub use finding::{Channel, Class, Evidence, Finding, Level, Stage};
pub use fusion::{Symbols, is_migration};
pub use join::{
    CONFIRM_WAIT_S, Joined, Ledger, RECORDS_MAX, Record, RecordError, SLACK_S, Unconfirmed,
    Verdict, WINDOW_S_MAX,
};
pub use observation::{
    OFFSET_MS_MAX, Observation, ObservationError, RTT_MS_MAX, Reading, Role, TIME_US_MAX, TargetId,
};
pub use watcher::{
    FINDINGS_MAX, LATENESS_US, NAME_MAX, PENDING_MAX, Status, TARGETS_MAX, TargetError, Watcher,
};
