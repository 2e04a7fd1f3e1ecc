//! The device state: QEMU's own `migrate` through a UNIX socket in the VM's directory. With `x-ignore-shared` it
//! holds everything but the shared RAM.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
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
const POLL: Duration = Duration::from_millis(1);

/// Longest wait for QEMU to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
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

fn socket_path(dir: &Path, name: &str) -> Result<PathBuf, Error> {
    let path = dir.join(name);
    if path.as_os_str().len() > 107 {
        return Err(Error::SocketPath(path));
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::Io {
            action: format!("removing {}", path.display()),
            source: error,
        }),
        _ => Ok(path),
    }
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

/// Saves the state of a paused VM.
pub(crate) fn save(
    process: &Process,
    monitor: &Monitor,
    dir: &Path,
    limit_bytes: u64,
) -> Result<Vec<u8>, Error> {
    let path = socket_path(dir, "state-out")?;
    let listener =
        UnixListener::bind(&path).map_err(Error::io("listening for the device state"))?;
    let result = receive(process, monitor, &listener, &path, limit_bytes);
    // Left behind it would only be in the way of the next one, which removes it too.
    let _ = fs::remove_file(&path);
    if result.is_err() {
        // Otherwise QEMU refuses to resume while its migration is under way.
        let _ = monitor.execute_value(&qmp::migrate_cancel {});
    }
    result
}

fn receive(
    process: &Process,
    monitor: &Monitor,
    listener: &UnixListener,
    path: &Path,
    limit_bytes: u64,
) -> Result<Vec<u8>, Error> {
    let deadline = Instant::now() + DEADLINE;
    let uri = Some(format!("unix:{}", path.display()));
    monitor.execute_value(&qmp::migrate {
        channels: None,
        detach: None,
        resume: None,
        uri,
    })?;
    // QEMU connects before it answers, or its migration has failed.
    if !readable(listener, CONNECT_TIMEOUT) {
        wait_completed(process, monitor, Instant::now())?;
        return Err(Error::DeviceState("QEMU did not connect".to_owned()));
    }
    let (stream, _) = listener
        .accept()
        .map_err(Error::io("accepting the device state"))?;
    let state = read_until_end(&stream, limit_bytes, deadline)?;
    wait_completed(process, monitor, deadline)?;
    Ok(state)
}

/// Reads to the end, at most `limit_bytes`.
fn read_until_end(
    stream: &UnixStream,
    limit_bytes: u64,
    deadline: Instant,
) -> Result<Vec<u8>, Error> {
    let mut state = Vec::with_capacity(1 << 20);
    let mut chunk = vec![0; CHUNK];
    loop {
        if !readable(stream, deadline.saturating_duration_since(Instant::now())) {
            return Err(Error::Timeout("saving the device state"));
        }
        let count = (&mut &*stream)
            .read(&mut chunk)
            .map_err(Error::io("reading the device state"))?;
        if count == 0 {
            return Ok(state);
        }
        if (state.len() + count) as u64 > limit_bytes {
            return Err(Error::DeviceStateSize { limit_bytes });
        }
        state.extend_from_slice(&chunk[..count]);
    }
}

/// Loads the state into a waiting container.
pub(crate) fn load(
    process: &Process,
    monitor: &Monitor,
    dir: &Path,
    state: &[u8],
) -> Result<(), Error> {
    let deadline = Instant::now() + DEADLINE;
    let path = socket_path(dir, "state-in")?;
    let uri = Some(format!("unix:{}", path.display()));
    let incoming: Value = serde_json::json!({ "uri": uri });
    let command: qmp::migrate_incoming =
        serde_json::from_value(incoming).map_err(|e| Error::Answer {
            command: "migrate-incoming",
            problem: e.to_string(),
        })?;
    monitor.execute_value(&command)?;
    // QEMU listens before it answers.
    let mut stream = UnixStream::connect(&path).map_err(Error::io("reaching the container"))?;
    stream
        .set_write_timeout(Some(DEADLINE))
        .map_err(Error::io("sending the device state"))?;
    let sent = stream.write_all(state);
    drop(stream);
    let completed = wait_completed(process, monitor, deadline);
    let _ = fs::remove_file(&path);
    // What QEMU says of a state that it refused is worth more than the broken pipe.
    completed?;
    sent.map_err(Error::io("sending the device state"))
}
