//! The agent `palanquind`: one for each host. It owns the state file, the sockets and the connections, and drives
//! the engines.
#![forbid(unsafe_code)]

pub mod agent;
pub mod attest;
pub mod chain;
pub mod challenge;
pub mod channel;
pub mod crowd;
pub mod data_receive;
pub mod data_send;
pub mod destination_session;
pub mod device_state;
pub mod dial;
pub mod digest;
pub mod fail_point;
pub mod farewell;
pub mod gate;
pub mod http;
pub mod identity;
pub mod listener;
pub mod metrics;
pub mod net;
pub mod network;
pub mod operations;
pub mod pace;
pub mod received;
pub mod recovery;
pub mod reduction;
pub mod source_session;
pub mod store;
pub mod stream_proof;
pub mod streams_in;
pub mod streams_out;
pub mod tls;
pub mod tracked;
pub mod verbs;
pub mod waiting;

/// Version of this software, told to peers and operators.
pub const SOFTWARE: &str = env!("CARGO_PKG_VERSION");
