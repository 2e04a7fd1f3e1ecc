//! Connections to other hosts.

use std::net::TcpStream;
use std::time::Duration;

use palanquin_engine::message::Reason;

use crate::agent::Agent;
use crate::channel::Channel;

/// Longest time for a TCP connection to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens a connection to a host of the configuration; nothing is read from it in this process.
///
/// # Errors
///
/// It is not known, or can't be reached.
pub fn reach(agent: &Agent, host: &str) -> Result<TcpStream, Reason> {
    let Some(address) = agent.address_of(host) else {
        return Err(Reason::new(
            "unreachable",
            format!("host {host:?} is not in the configuration"),
        ));
    };
    let tcp = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).map_err(|error| {
        Reason::new(
            "unreachable",
            format!("host {host:?} cannot be reached at {address}: {error}"),
        )
    })?;
    let prepared = tcp.set_nodelay(true);
    prepared.map_err(|error| Reason::new("connection", error.to_string()))?;
    Ok(tcp)
}

/// Opens an authenticated control connection to a host of the configuration.
///
/// # Errors
///
/// It is not known, can't be reached, or identities don't fit.
pub fn dial(agent: &Agent, host: &str) -> Result<Channel, Reason> {
    agent.network.connect(reach(agent, host)?, host)
}
