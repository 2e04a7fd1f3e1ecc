//! The network process: everything that reads bytes from the network runs in it, without privileges.
//!
//! It is this program, started by itself. It holds its connections, their TLS sessions, and the memory of the VMs that are
//! moving, for as long as they are. It decides nothing: what may run where is decided in the agent, which knows other hosts
//! only as [`crate::channel::Channel`], [`crate::streams_out::OutStreams`] and [`crate::streams_in::InStreams`], and believes
//! the network process no more than it believes them.

#[cfg(feature = "fail-points")]
pub mod attempt;
pub mod confine;
mod door;
pub mod key;
pub mod port;
pub mod process;
pub mod protocol;
mod receiving;
mod sending;
pub mod wire;

pub(crate) use self::sending::{CANCELLED, LOST};
