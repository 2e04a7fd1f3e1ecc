//! The device state: QEMU's own `migrate` through a socket that it is given. With `x-ignore-shared` it holds
//! everything but the shared RAM.
//!
//! A socket with a path would have to be one that QEMU's user may open, and short.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::Value;

use super::qmp::Monitor;
use crate::Error;
use crate::process::Process;
use crate::wait::readable;

/// Longest time for a whole save or load.
const DEADLINE: Duration = Duration::from_secs(30);
/// Between two looks at QEMU's progress: it tells completion by an event only when asked at start.
/// The VM stands still meanwhile, so it is asked often; an answer takes about as long.
const POLL: Duration = Duration::from_micros(200);

/// What QEMU calls our socket.
const SOCKET: &str = "palanquin-state";
/// Bytes that are read at once.
const CHUNK: usize = 256 << 10;

/// Turns on what a migration without RAM needs. May be repeated.
pub(crate) fn enable(monitor: &Monitor) -> Result<(), Error> {
    let capability = qmp::MigrationCapabilityStatus {
        capability: qmp::MigrationCapability::x_ignore_shared,
        state: true,
    };
    monitor
        .execute_value(&qmp::migrate_set_capabilities {
            capabilities: vec![capability],
        })
        .map(drop)
}

/// Lets QEMU send as fast as it can.
pub(crate) fn unlimit(monitor: &Monitor) -> Result<(), Error> {
    let parameters: qmp::MigrateSetParameters = serde_json::from_value(
        serde_json::json!({ "max-bandwidth": 1_u64 << 40 }),
    )
    .map_err(|error| Error::Answer {
        command: "migrate-set-parameters",
        problem: error.to_string(),
    })?;
    monitor
        .execute_value(&qmp::migrate_set_parameters(parameters))
        .map(drop)
}

/// A connection of which QEMU has the other end.
pub(crate) fn connection(monitor: &Monitor) -> Result<UnixStream, Error> {
    let (ours, theirs) = UnixStream::pair().map_err(Error::io("making a pair of sockets"))?;
    monitor.give(SOCKET, theirs.as_fd())?;
    Ok(ours)
}

/// What QEMU is to read from or write to.
fn uri() -> String {
    format!("fd:{SOCKET}")
}

/// Waits for a moment, or until the process has ended: then that is the error.
fn breathe(process: &Process) -> Result<(), Error> {
    if process.has_ended(POLL) {
        return Err(Error::ProcessGone { pid: process.pid() });
    }
    Ok(())
}

fn wait_completed(process: &Process, monitor: &Monitor, deadline: Instant) -> Result<(), Error> {
    loop {
        let status = monitor.execute_value(&qmp::query_migrate {})?;
        match status["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                let why = status["error-desc"]
                    .as_str()
                    .unwrap_or("QEMU names no reason");
                return Err(Error::DeviceState(why.to_owned()));
            }
            _ if Instant::now() >= deadline => {
                return Err(Error::Timeout("moving the device state"));
            }
            _ => breathe(process)?,
        }
    }
}

/// Whether QEMU adds a description of the state to it, as text for people who debug it. It takes a millisecond of the pause
/// to make, and nobody here reads it. Source and container need not agree: one that expects it reads zero instead and says so
/// in its log.
pub(crate) fn describe(monitor: &Monitor, wanted: bool) {
    let set = qmp::qom_set {
        path: "/machine".to_owned(),
        property: "suppress-vmdesc".to_owned(),
        value: Value::Bool(!wanted),
    };
    if let Err(error) = monitor.execute_value(&set) {
        tracing::debug!(%error, wanted, "the description of the device state stays as it is");
    }
}

/// Saves the state of a paused VM to a connection of which it has the other end.
pub(crate) fn save(
    process: &Process,
    monitor: &Monitor,
    stream: UnixStream,
    limit_bytes: u64,
    to: &mut dyn Write,
) -> Result<(), Error> {
    let result = receive(process, monitor, stream, limit_bytes, to);
    if result.is_err() {
        // Otherwise QEMU refuses to resume while its migration is under way.
        let _ = monitor.execute_value(&qmp::migrate_cancel {});
    }
    result
}

fn receive(
    process: &Process,
    monitor: &Monitor,
    stream: UnixStream,
    limit_bytes: u64,
    to: &mut dyn Write,
) -> Result<(), Error> {
    let deadline = Instant::now() + DEADLINE;
    monitor.execute_value(&qmp::migrate {
        channels: None,
        detach: None,
        resume: None,
        uri: Some(uri()),
    })?;
    pass_on(&stream, limit_bytes, deadline, to)?;
    wait_completed(process, monitor, deadline)
}

/// Passes on what comes to the end, at most `limit_bytes`.
fn pass_on(
    stream: &UnixStream,
    limit_bytes: u64,
    deadline: Instant,
    to: &mut dyn Write,
) -> Result<(), Error> {
    let mut passed = 0;
    let mut chunk = vec![0; CHUNK];
    loop {
        if !readable(stream, deadline.saturating_duration_since(Instant::now())) {
            return Err(Error::Timeout("saving the device state"));
        }
        let count = (&mut &*stream)
            .read(&mut chunk)
            .map_err(Error::io("reading the device state"))?;
        if count == 0 {
            return Ok(());
        }
        passed += count as u64;
        if passed > limit_bytes {
            return Err(Error::DeviceStateSize { limit_bytes });
        }
        to.write_all(&chunk[..count])
            .map_err(Error::io("passing the device state on"))?;
    }
}

/// Lets a container wait for its state on a connection; gives our end of it. It is in no hurry, and takes two answers of
/// QEMU that need not be waited for later.
pub(crate) fn await_state(monitor: &Monitor) -> Result<UnixStream, Error> {
    let incoming: Value = serde_json::json!({ "uri": uri() });
    let command: qmp::migrate_incoming =
        serde_json::from_value(incoming).map_err(|e| Error::Answer {
            command: "migrate-incoming",
            problem: e.to_string(),
        })?;
    let stream = connection(monitor)?;
    monitor.execute_value(&command)?;
    Ok(stream)
}

/// Loads the state into a container that waits for it, as it comes.
pub(crate) fn load(
    process: &Process,
    monitor: &Monitor,
    mut stream: UnixStream,
    from: &mut dyn Read,
) -> Result<(), Error> {
    let deadline = Instant::now() + DEADLINE;
    stream
        .set_write_timeout(Some(DEADLINE))
        .map_err(Error::io("sending the device state"))?;
    let mut sent = Ok(());
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = from.read(&mut chunk).map_err(Error::DeviceStateGiven)?;
        if count == 0 {
            break;
        }
        // Also when QEMU has had enough the rest is read: only at its end it is known to be what was saved.
        if sent.is_ok() {
            sent = stream.write_all(&chunk[..count]);
        }
    }
    drop(stream);
    // What QEMU says counts: one that refused the state has closed the socket, and so has one that needs no more of it.
    wait_completed(process, monitor, deadline).map_err(|error| match (error, sent) {
        (Error::Timeout(_), Err(sent)) => Error::io("sending the device state")(sent),
        (error, _) => error,
    })
}
