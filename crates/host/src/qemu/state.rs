//! The device state: QEMU's own `migrate` through a socket that it is given. With `x-ignore-shared` it holds
//! everything but the shared RAM.
//!
//! A socket with a path would have to be one that QEMU's user may open, and short.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime};

use qapi::qmp;
use serde_json::Value;

use super::qmp::Monitor;
use crate::Error;
use crate::process::Process;
use crate::wait::readable;

/// Longest time for a whole save or load.
const DEADLINE: Duration = Duration::from_secs(30);
/// Between two questions for QEMU's progress where it reports nothing: it tells everything by events, but not to a connection
/// that was made anew meanwhile.
const ASK: Duration = Duration::from_millis(20);

/// How long QEMU gets to cancel a migration by itself.
const KICK: Duration = Duration::from_millis(50);

/// What QEMU calls our socket.
const SOCKET: &str = "palanquin-state";
/// Bytes that are read at once.
const CHUNK: usize = 256 << 10;

/// Sets what QEMU's migrations are like.
fn set_capabilities(
    monitor: &Monitor,
    capabilities: &[(qmp::MigrationCapability, bool)],
) -> Result<(), Error> {
    let capabilities = capabilities
        .iter()
        .copied()
        .map(|(capability, state)| qmp::MigrationCapabilityStatus { capability, state })
        .collect();
    monitor
        .execute_value(&qmp::migrate_set_capabilities { capabilities })
        .map(drop)
}

/// Turns on what a migration without RAM needs. May be repeated.
pub(crate) fn enable(monitor: &Monitor) -> Result<(), Error> {
    use qmp::MigrationCapability::{events, x_ignore_shared};
    set_capabilities(monitor, &[(x_ignore_shared, true), (events, true)])
}

/// Lets a source stop for us between pausing its VM and saving its devices. May be repeated.
pub(crate) fn enable_hold(monitor: &Monitor) -> Result<(), Error> {
    let hold = qmp::MigrationCapability::pause_before_switchover;
    set_capabilities(monitor, &[(hold, true)])
}

/// Takes back what would surprise whoever lets QEMU migrate by itself later: its migration would wait for us, or leave the
/// RAM behind.
pub(crate) fn disable(monitor: &Monitor) {
    use qmp::MigrationCapability::{pause_before_switchover, x_ignore_shared};
    let off = [(x_ignore_shared, false), (pause_before_switchover, false)];
    if let Err(error) = set_capabilities(monitor, &off) {
        tracing::debug!(%error, "the capabilities of QEMU's migration stay as they are");
    }
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

/// What QEMU's migration is, asked for.
fn ask(monitor: &Monitor) -> Result<Value, Error> {
    monitor.execute_value(&qmp::query_migrate {})
}

/// Why it ended badly.
fn why(monitor: &Monitor) -> Error {
    let status = ask(monitor).unwrap_or_default();
    let why = status["error-desc"].as_str();
    Error::DeviceState(why.unwrap_or("QEMU names no reason").to_owned())
}

/// Waits until QEMU's migration has got there.
fn wait_completed(process: &Process, monitor: &Monitor, deadline: Instant) -> Result<(), Error> {
    let mut status = monitor.reports().migration;
    loop {
        match status.as_deref() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => return Err(why(monitor)),
            _ if Instant::now() >= deadline => {
                return Err(Error::Timeout("moving the device state"));
            }
            _ => {}
        }
        status = match monitor.wait_report(process.ended(), ASK)? {
            [_, true] => return Err(Error::ProcessGone { pid: process.pid() }),
            [true, _] => monitor.reports().migration,
            [false, false] => ask(monitor)?["status"].as_str().map(str::to_owned),
        };
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

/// A state that is being saved, to a connection of which QEMU has the other end.
pub(crate) struct Saving {
    stream: UnixStream,
    limit_bytes: u64,
    passed_bytes: u64,
    chunk: Vec<u8>,
}

impl Saving {
    /// Nothing is saved yet; at most `limit_bytes` will be taken.
    pub(crate) fn new(stream: UnixStream, limit_bytes: u64) -> Self {
        Self {
            stream,
            limit_bytes,
            passed_bytes: 0,
            chunk: vec![0; CHUNK],
        }
    }

    /// Begins to save a VM that may run. QEMU sends what it need not stop it for (the small memory that is not shared, as
    /// of firmware, which is most of the state), then stops it and waits. Passes on what was sent until then; gives for how
    /// long the VM has been stopped. On an error QEMU lets it run again by itself, if it ran.
    pub(crate) fn begin(
        &mut self,
        process: &Process,
        monitor: &Monitor,
        to: &mut dyn Write,
    ) -> Result<Duration, Error> {
        let began = Instant::now();
        monitor.forget_reports();
        let stopped = self
            .migrate(monitor)
            .and_then(|()| self.hold(process, monitor, began + DEADLINE, to));
        let stopped = cancelled_on_error(monitor, stopped)?;
        // By QEMU's word, but never before it was asked to. Where it gave none, or the clock was set: too long rather than too
        // short.
        let since = stopped.and_then(|stopped| stopped.elapsed().ok());
        let asked = began.elapsed();
        Ok(since.map_or(asked, |since| since.min(asked)))
    }

    fn migrate(&self, monitor: &Monitor) -> Result<(), Error> {
        let command = qmp::migrate {
            channels: None,
            detach: None,
            resume: None,
            uri: Some(uri()),
        };
        monitor.execute_value(&command).map(drop)
    }

    fn hold(
        &mut self,
        process: &Process,
        monitor: &Monitor,
        deadline: Instant,
        to: &mut dyn Write,
    ) -> Result<Option<SystemTime>, Error> {
        loop {
            let reports = monitor.reports();
            match reports.migration.as_deref() {
                // Not at once when it has stopped: what the guest has asked of disks may still arrive, and the state of
                // devices that is loaded has to fit what memory says of their queues.
                Some("pre-switchover") => return Ok(reports.stopped),
                Some("failed" | "cancelled") => return Err(why(monitor)),
                Some("completed") => {
                    return Err(Error::DeviceState("QEMU did not wait".to_owned()));
                }
                _ if Instant::now() >= deadline => {
                    return Err(Error::Timeout("pausing the VM"));
                }
                _ => {}
            }
            let [reported, readable] = monitor.wait_report(self.stream.as_fd(), ASK)?;
            if readable && self.pass_on(to)? == 0 {
                return Err(why(monitor));
            }
            if !reported && !readable {
                if process.has_ended(Duration::ZERO) {
                    return Err(Error::ProcessGone { pid: process.pid() });
                }
                if ask(monitor)?["status"] == "pre-switchover" {
                    return Ok(None);
                }
            }
        }
    }

    /// Saves the state of a VM that is paused, or the rest of it where that was begun. On an error QEMU lets the VM run
    /// again by itself where it was [`Self::begin`] that stopped it.
    pub(crate) fn end(
        mut self,
        process: &Process,
        monitor: &Monitor,
        begun: bool,
        to: &mut dyn Write,
    ) -> Result<(), Error> {
        let deadline = Instant::now() + DEADLINE;
        let asked = if begun {
            let state = qmp::MigrationStatus::pre_switchover;
            monitor
                .execute_value(&qmp::migrate_continue { state })
                .map(drop)
        } else {
            monitor.forget_reports();
            self.migrate(monitor)
        };
        let saved = asked
            .and_then(|()| self.pass_on_rest(deadline, to))
            .and_then(|()| wait_completed(process, monitor, deadline));
        cancelled_on_error(monitor, saved)
    }

    fn pass_on_rest(&mut self, deadline: Instant, to: &mut dyn Write) -> Result<(), Error> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !readable(&self.stream, left) {
                return Err(Error::Timeout("saving the device state"));
            }
            if self.pass_on(to)? == 0 {
                return Ok(());
            }
        }
    }

    /// Passes on what can be read; says how much that was, 0 at the end.
    fn pass_on(&mut self, to: &mut dyn Write) -> Result<usize, Error> {
        let count = (&self.stream)
            .read(&mut self.chunk)
            .map_err(Error::io("reading the device state"))?;
        self.passed_bytes += count as u64;
        if self.passed_bytes > self.limit_bytes {
            let limit_bytes = self.limit_bytes;
            return Err(Error::DeviceStateSize { limit_bytes });
        }
        to.write_all(&self.chunk[..count])
            .map_err(Error::io("passing the device state on"))?;
        Ok(count)
    }
}

/// Otherwise QEMU refuses to resume while its migration is under way.
fn cancelled_on_error<T>(monitor: &Monitor, result: Result<T, Error>) -> Result<T, Error> {
    if result.is_err() {
        let _ = monitor.execute_value(&qmp::migrate_cancel {});
    }
    result
}

/// Ends what is under way of saving, whoever has begun it, and waits until QEMU has. The VM runs then if it did before,
/// or is paused.
pub(crate) fn give_up(
    process: &Process,
    monitor: &Monitor,
    patience: Duration,
) -> Result<(), Error> {
    const UNDER_WAY: [&str; 4] = ["setup", "active", "pre-switchover", "device"];
    let deadline = Instant::now() + patience;
    let mut kick = Instant::now() + KICK;
    loop {
        let migration = ask(monitor)?["status"].clone();
        // Whether it has failed or not: a VM that ran is resumed a moment later.
        let state = monitor.execute_value(&qmp::query_status {})?["status"].clone();
        let is_under_way = UNDER_WAY.iter().any(|status| migration == **status);
        if is_under_way {
            monitor.execute_value(&qmp::migrate_cancel {})?;
        } else if migration != "cancelling" && state != "finish-migrate" {
            return Ok(());
        }
        if migration == "cancelling" && Instant::now() >= kick {
            // One that is cancelled just before it waits for us waits all the same, and for ever (QEMU 7.2,
            // `migration_maybe_pause`): it looked whether it is cancelled before, and nobody will tell it to go on but we.
            // Should it not wait, it forgets that before the next time.
            let state = qmp::MigrationStatus::cancelling;
            let kicked = monitor.execute_value(&qmp::migrate_continue { state });
            tracing::debug!(?kicked, "QEMU is told to go on with cancelling");
            kick = Instant::now() + KICK;
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout("giving up saving"));
        }
        if process.has_ended(Duration::from_millis(1)) {
            return Err(Error::ProcessGone { pid: process.pid() });
        }
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
    monitor.forget_reports();
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
