//! QEMU's monitor protocol over its UNIX socket, with a deadline on every answer.
//!
//! Every command has an `id` of its own, and only the answer with that `id` counts. QEMU answers whoever is connected
//! when a command is done: a client that connects after another one was killed, or gave up, may be told what became of
//! a command that it never gave.

use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use qapi::Command;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with, sockopt,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::Error;
use crate::wait::any_readable;

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest line that is read: `query-qmp-schema`, which we never ask for, has about 300 KiB.
const LINE_MAX: usize = 8 << 20;

/// A connection to a monitor, made anew when it broke.
pub(crate) struct Monitor {
    path: PathBuf,
    connection: Mutex<Option<Connection>>,
}

#[derive(Serialize)]
struct Execute<'a, C> {
    execute: &'static str,
    arguments: &'a C,
    id: &'a str,
}

impl<'a, C: Command> Execute<'a, C> {
    fn line(arguments: &'a C, id: &'a str) -> io::Result<Vec<u8>> {
        let execute = C::NAME;
        let mut line = serde_json::to_vec(&Self {
            execute,
            arguments,
            id,
        })?;
        line.push(b'\n');
        Ok(line)
    }
}

#[derive(Deserialize)]
struct Reply {
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<ReplyError>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<Timestamp>,
    id: Option<Value>,
}

/// When QEMU says that something happened, by the clock of the host.
#[derive(Clone, Copy, Deserialize)]
struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    /// None where QEMU does not know the time, or nobody lives then.
    fn time(self) -> Option<SystemTime> {
        let seconds = u64::try_from(self.seconds).ok()?;
        let microseconds = u64::try_from(self.microseconds).ok()?;
        let since =
            Duration::from_secs(seconds).checked_add(Duration::from_micros(microseconds))?;
        SystemTime::UNIX_EPOCH.checked_add(since)
    }
}

/// What QEMU has reported by itself since [`Monitor::forget_reports`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Reports {
    /// How far its migration is; only where the capability `events` is set.
    pub(crate) migration: Option<String>,
    /// When the VM stopped.
    pub(crate) stopped: Option<SystemTime>,
}

impl Reports {
    fn note(&mut self, event: &str, data: &Value, timestamp: Option<Timestamp>) {
        match event {
            "MIGRATION" => self.migration = data["status"].as_str().map(str::to_owned),
            "STOP" => self.stopped = timestamp.and_then(Timestamp::time),
            _ => {}
        }
    }
}

#[derive(Deserialize)]
struct ReplyError {
    desc: String,
}

impl Monitor {
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            connection: Mutex::new(None),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Qmp {
            path: self.path.clone(),
            source,
        }
    }

    /// Executes a command and gives its answer as the library's type.
    pub(crate) fn execute<C: Command>(&self, command: &C) -> Result<C::Ok, Error> {
        let value = self.execute_value(command)?;
        serde_json::from_value(value).map_err(|error| Error::Answer {
            command: C::NAME,
            problem: error.to_string(),
        })
    }

    /// Executes a command and gives its answer as it is, where newer versions of QEMU add what the library's
    /// type doesn't know.
    pub(crate) fn execute_value<C: Command>(&self, command: &C) -> Result<Value, Error> {
        self.execute_within(command, TIMEOUT)
    }

    /// The same with another deadline for all of it.
    pub(crate) fn execute_within<C: Command>(
        &self,
        command: &C,
        patience: Duration,
    ) -> Result<Value, Error> {
        self.execute_with(command, None, None, patience)
            .map(|(value, _)| value)
    }

    /// Executes a command; tells whether the last that QEMU has reported until it was done is this event. If not it may
    /// have happened all the same.
    pub(crate) fn execute_for<C: Command>(&self, command: &C, event: &str) -> Result<bool, Error> {
        let (_, last) = self.execute_with(command, None, None, TIMEOUT)?;
        Ok(last.as_deref() == Some(event))
    }

    /// The same for an event that says that nothing can go wrong any more: the answer is not waited for then. By the clock
    /// of the host; where it was set back meanwhile the answer is.
    pub(crate) fn execute_until<C: Command>(
        &self,
        command: &C,
        event: &str,
    ) -> Result<bool, Error> {
        let (_, last) = self.execute_with(command, None, Some(event), TIMEOUT)?;
        Ok(last.as_deref() == Some(event))
    }

    /// Gives QEMU a copy of a descriptor, to be used as `fd:NAME`. One of that name which it has already is closed.
    pub(crate) fn give(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let command = qapi::qmp::getfd {
            fdname: name.to_owned(),
        };
        self.execute_with(&command, Some(fd), None, TIMEOUT)
            .map(drop)
    }

    fn slot(&self) -> MutexGuard<'_, Option<Connection>> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on only what is reported later counts.
    pub(crate) fn forget_reports(&self) {
        if let Some(connection) = &mut *self.slot() {
            connection.reports = Reports::default();
        }
    }

    /// What was reported so far on this connection, without waiting for anything.
    pub(crate) fn reports(&self) -> Reports {
        let slot = self.slot();
        slot.as_ref()
            .map_or_else(Reports::default, |connection| connection.reports.clone())
    }

    /// Waits until QEMU reports something, or `other` can be read, or `patience` is over; says whether QEMU did and whether
    /// `other` can be.
    pub(crate) fn wait_report(
        &self,
        other: BorrowedFd<'_>,
        patience: Duration,
    ) -> Result<[bool; 2], Error> {
        let mut slot = self.slot();
        let Some(connection) = &mut *slot else {
            // The next command makes a new one. Reports are not to be expected before.
            return Ok([false, any_readable([other], patience)[0]]);
        };
        let [reports, readable] = if connection.reader.buffer().is_empty() {
            any_readable([connection.reader.get_ref().as_fd(), other], patience)
        } else {
            [true, any_readable([other], Duration::ZERO)[0]]
        };
        if reports && let Err(error) = connection.report(Instant::now() + TIMEOUT) {
            *slot = None;
            return Err(self.failed(error));
        }
        Ok([reports, readable])
    }

    fn execute_with<C: Command>(
        &self,
        command: &C,
        fd: Option<BorrowedFd<'_>>,
        until: Option<&str>,
        patience: Duration,
    ) -> Result<(Value, Option<String>), Error> {
        let mut slot = self.slot();
        let deadline = Instant::now() + patience;
        let id = Uuid::new_v4().to_string();
        let request = Execute::line(command, &id).map_err(|error| self.failed(error))?;
        // One that broke since it was last used is made anew. Should QEMU have taken the command after all: every command
        // that this crate uses may be repeated, or is refused the second time.
        let used = slot.take().map(|mut connection| {
            let reply = connection.exchange(&request, &id, fd, until, deadline)?;
            Ok::<_, io::Error>((connection, reply))
        });
        let is_broken = |error: &io::Error| {
            use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
            matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
        };
        let done = match used {
            Some(Err(error)) if !is_broken(&error) => Err(error),
            Some(Ok(done)) => Ok(done),
            _ => Connection::open(&self.path, deadline).and_then(|mut connection| {
                let reply = connection.exchange(&request, &id, fd, until, deadline)?;
                Ok((connection, reply))
            }),
        };
        let (connection, reply) = done.map_err(|error| self.failed(error))?;
        // Only a connection on which nothing is outstanding is used again, but for answers that nobody waits for: they are
        // passed over.
        *slot = Some(connection);
        match (reply.value, reply.error) {
            (Some(value), _) => Ok((value, reply.event)),
            (None, None) if until.is_some() => Ok((Value::Null, reply.event)),
            (None, Some(error)) => Err(Error::Refused {
                command: C::NAME,
                description: error.desc,
            }),
            (None, None) => Err(Error::Answer {
                command: C::NAME,
                problem: "neither result nor error".into(),
            }),
        }
    }
}

struct Connection {
    reader: BufReader<UnixStream>,
    reports: Reports,
}

impl Connection {
    fn new(stream: UnixStream) -> Self {
        Self {
            reader: BufReader::new(stream),
            reports: Reports::default(),
        }
    }

    fn open(path: &Path, deadline: Instant) -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // A monitor that another client uses does not accept; then connecting waits, for as long as sending may.
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(left(deadline)?))?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        let mut connection = Self::new(UnixStream::from(socket));
        connection.line(deadline).map_err(|error| {
            if error.kind() == io::ErrorKind::TimedOut {
                io::Error::new(error.kind(), "no greeting: another client may be connected")
            } else {
                error
            }
        })?;
        let capabilities = qapi::qmp::qmp_capabilities { enable: None };
        let id = Uuid::new_v4().to_string();
        let request = Execute::line(&capabilities, &id)?;
        connection.exchange(&request, &id, None, None, deadline)?;
        Ok(connection)
    }

    /// Sends a command, with a descriptor if there is one, and gives its answer with the last event before it. Answers
    /// to others are passed over. Where an event is waited for, too, it ends with the first of both; one from before the
    /// command, that nobody has read yet, is not it.
    fn exchange(
        &mut self,
        request: &[u8],
        id: &str,
        fd: Option<BorrowedFd<'_>>,
        until: Option<&str>,
        deadline: Instant,
    ) -> io::Result<Reply> {
        let began = SystemTime::now();
        let stream = self.reader.get_mut();
        stream.set_write_timeout(Some(left(deadline)?))?;
        let sent = match fd {
            Some(fd) => send_with(stream, request, fd)?,
            None => 0,
        };
        stream.write_all(&request[sent..])?;
        let mut last_event = None;
        loop {
            let mut reply: Reply = serde_json::from_slice(&self.line(deadline)?)?;
            if reply.value.is_some() || reply.error.is_some() {
                if reply.id.as_ref().and_then(Value::as_str) == Some(id) {
                    reply.event = last_event;
                    return Ok(reply);
                }
                tracing::debug!(id = ?reply.id, "QEMU answers a command that is not ours");
                continue;
            }
            if let Some(event) = self.noted(&reply) {
                let happened = reply.timestamp.and_then(Timestamp::time);
                if until == Some(event.as_str()) && happened.is_some_and(|at| at >= began) {
                    return Ok(reply);
                }
                last_event = Some(event);
            }
        }
    }

    /// Keeps what is of interest later; gives the event's name.
    fn noted(&mut self, reply: &Reply) -> Option<String> {
        let event = reply.event.as_deref()?;
        tracing::debug!(event, data = %reply.data, "QEMU reports");
        self.reports.note(event, &reply.data, reply.timestamp);
        Some(event.to_owned())
    }

    /// Takes one line that is no answer.
    fn report(&mut self, deadline: Instant) -> io::Result<()> {
        let reply: Reply = serde_json::from_slice(&self.line(deadline)?)?;
        self.noted(&reply);
        Ok(())
    }

    fn line(&mut self, deadline: Instant) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        loop {
            if self.reader.buffer().is_empty() {
                self.reader
                    .get_ref()
                    .set_read_timeout(Some(left(deadline)?))?;
            }
            let chunk = match self.reader.fill_buf() {
                Ok([]) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(chunk) => chunk,
                // How Linux reports a receive timeout.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let end = chunk.iter().position(|&byte| byte == b'\n');
            let count = end.map_or(chunk.len(), |end| end + 1);
            if line.len() + count > LINE_MAX {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a line without end",
                ));
            }
            line.extend_from_slice(&chunk[..count]);
            self.reader.consume(count);
            if end.is_some() {
                return Ok(line);
            }
        }
    }
}

/// Sends the beginning of a request together with a descriptor, see unix(7); gives how many bytes that was.
fn send_with(stream: &UnixStream, request: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let data = [IoSlice::new(request)];
    let sent = sendmsg(stream.as_fd(), &data, &mut control, SendFlags::NOSIGNAL)?;
    Ok(sent)
}

/// Time left, or that there is none.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        // Zero would mean for ever, also after rounding to microseconds.
        Ok(left.max(Duration::from_millis(1)))
    }
}

/// What a client makes of a monitor that has sent these bytes and hung up.
#[cfg(feature = "fuzzing")]
pub(super) fn answer(said: UnixStream, deadline: Instant) -> io::Result<Option<Value>> {
    let mut connection = Connection::new(said);
    connection
        .exchange(b"", "1", None, None, deadline)
        .map(|reply| reply.value)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const GREETING: &[&str] = &["{\"QMP\":{}}\n", "{\"return\":{},\"id\":ID}\n"];

    /// A monitor that serves one client after the other: what it says first, then what it says to each line. `ID` in it
    /// stands for the `id` of that line.
    fn serve(clients: Vec<Vec<&'static str>>) -> (tempfile::TempDir, Monitor) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for says in clients {
                let (stream, _) = listener.accept().unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let mut id = Value::Null;
                for (nth, what) in says.iter().enumerate() {
                    if nth > 0 {
                        let Some(Ok(line)) = lines.next() else { break };
                        id = serde_json::from_str::<Value>(&line).unwrap()["id"].clone();
                    }
                    let what = what.replace("ID", &id.to_string());
                    (&stream).write_all(what.as_bytes()).unwrap();
                }
            }
        });
        (dir, Monitor::new(&path))
    }

    #[test]
    fn events_are_passed_over_and_a_broken_connection_is_made_anew() {
        let answer = "{\"event\":\"STOP\"}\n{\"return\":{\"a\":1},\"id\":ID}\n";
        let client = [GREETING, &[answer]].concat();
        let (_dir, monitor) = serve(vec![client.clone(), client]);
        for _ in 0..2 {
            let value = monitor.execute_value(&qapi::qmp::query_status {}).unwrap();
            assert_eq!(value["a"], 1);
        }
    }

    #[test]
    fn an_answer_to_a_command_of_another_client_is_not_taken_for_ours() {
        let late = "{\"return\":{\"a\":1},\"id\":\"another\"}\n{\"return\":{},\"id\":ID}\n";
        let refused = "{\"error\":{\"desc\":\"no\"},\"id\":7}\n{\"return\":{\"a\":3},\"id\":ID}\n";
        for client in [
            ["{\"QMP\":{}}\n", late, refused],
            [GREETING[0], GREETING[1], refused],
        ] {
            let client = client.to_vec();
            let (_dir, monitor) = serve(vec![client]);
            let value = monitor.execute_value(&qapi::qmp::query_status {}).unwrap();
            assert_eq!(value["a"], 3);
        }
    }

    #[test]
    fn the_last_event_before_an_answer_is_told_and_none_that_came_earlier() {
        let paused = "{\"event\":\"RESUME\"}\n{\"event\":\"STOP\"}\n{\"return\":{},\"id\":ID}\n";
        let again = "{\"return\":{},\"id\":ID}\n{\"event\":\"STOP\"}\n";
        let (_dir, monitor) = serve(vec![[GREETING, &[paused, again]].concat()]);
        assert!(monitor.execute_for(&qapi::qmp::stop {}, "STOP").unwrap());
        assert!(!monitor.execute_for(&qapi::qmp::stop {}, "STOP").unwrap());
    }

    #[test]
    fn an_event_that_says_enough_is_not_followed_by_a_wait_for_the_answer() {
        let resumed =
            "{\"timestamp\":{\"seconds\":99999999999,\"microseconds\":0},\"event\":\"RESUME\"}\n";
        let late =
            "{\"return\":{\"a\":1},\"id\":\"the first\"}\n{\"return\":{\"a\":2},\"id\":ID}\n";
        let (_dir, monitor) = serve(vec![[GREETING, &[resumed, late]].concat()]);
        assert!(
            monitor
                .execute_until(&qapi::qmp::cont {}, "RESUME")
                .unwrap()
        );
        let value = monitor.execute_value(&qapi::qmp::query_status {}).unwrap();
        assert_eq!(value["a"], 2);
    }

    #[test]
    fn an_event_from_before_the_command_says_nothing_about_it() {
        let old = "{\"timestamp\":{\"seconds\":7,\"microseconds\":5},\"event\":\"RESUME\"}\n{\"event\":\"RESUME\"}\n";
        let refused = [old, "{\"error\":{\"desc\":\"no\"},\"id\":ID}\n"].concat();
        let (_dir, monitor) = serve(vec![[GREETING, &[refused.leak()]].concat()]);
        let told = monitor.execute_until(&qapi::qmp::cont {}, "RESUME");
        assert!(matches!(told, Err(Error::Refused { .. })), "{told:?}");
    }

    #[test]
    fn what_is_reported_before_an_answer_and_later_is_kept_until_it_is_forgotten() {
        let stop = "{\"timestamp\":{\"seconds\":7,\"microseconds\":5},\"event\":\"STOP\"}\n{\"return\":{},\"id\":ID}\n\
                    {\"event\":\"MIGRATION\",\"data\":{\"status\":\"device\"},\"timestamp\":{\"seconds\":-1,\"microseconds\":-1}}\n";
        let (_dir, monitor) = serve(vec![[GREETING, &[stop]].concat()]);
        let (quiet, _open) = UnixStream::pair().unwrap();
        let wait = |patience| monitor.wait_report(quiet.as_fd(), patience);
        assert_eq!(
            wait(Duration::ZERO).unwrap(),
            [false, false],
            "not connected"
        );
        monitor.execute_value(&qapi::qmp::stop {}).unwrap();
        let stopped = SystemTime::UNIX_EPOCH + Duration::from_micros(7_000_005);
        assert_eq!(monitor.reports().stopped, Some(stopped));
        assert_eq!(wait(Duration::from_secs(20)).unwrap(), [true, false]);
        assert_eq!(monitor.reports().migration.as_deref(), Some("device"));
        monitor.forget_reports();
        assert_eq!(monitor.reports().migration, None);
        assert_eq!(monitor.reports().stopped, None);
    }

    #[test]
    fn a_clock_that_cannot_be_gives_no_time() {
        let at = |seconds, microseconds| Timestamp {
            seconds,
            microseconds,
        };
        assert_eq!(at(-1, 0).time(), None);
        assert_eq!(at(0, -1).time(), None);
        assert_eq!(at(i64::MAX, i64::MAX).time(), None);
        assert!(at(0, 0).time().is_some());
    }

    #[test]
    fn a_monitor_that_says_nothing_is_given_up_in_time() {
        let (dir, _) = serve(vec![]);
        let silent = dir.path().join("silent");
        let _listener = UnixListener::bind(&silent).unwrap();
        let monitor = Monitor::new(&silent);
        let began = Instant::now();
        let error = monitor
            .execute_within(&qapi::qmp::quit {}, Duration::from_millis(100))
            .unwrap_err();
        assert!(matches!(error, Error::Qmp { .. }), "{error}");
        assert!(began.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        for odd in ["nonsense\n", "", "{\"QMP\":{}}\nnull\n"] {
            let (_dir, monitor) = serve(vec![vec![odd]]);
            assert!(
                monitor
                    .execute_within(&qapi::qmp::quit {}, Duration::from_millis(300))
                    .is_err()
            );
        }
    }
}
