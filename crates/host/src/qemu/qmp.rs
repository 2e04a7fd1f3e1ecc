//! QEMU's monitor protocol over its UNIX socket, with a deadline on every answer.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use qapi::Command;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Error;

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest line that is read: `query-qmp-schema`, which we never ask for, has about 300 KiB.
const LINE_MAX: u64 = 8 << 20;

/// A connection to a monitor, made anew when it broke.
pub(crate) struct Monitor {
    path: PathBuf,
    connection: Mutex<Option<BufReader<UnixStream>>>,
}

#[derive(Serialize)]
struct Execute<'a, C> {
    execute: &'static str,
    arguments: &'a C,
}

#[derive(Deserialize)]
struct Reply {
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<ReplyError>,
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
        let mut slot = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut connection = match slot.take() {
            Some(connection) => connection,
            None => self.connect().map_err(|error| self.failed(error))?,
        };
        let request = Execute {
            execute: C::NAME,
            arguments: command,
        };
        let reply = exchange(&mut connection, &request).map_err(|error| self.failed(error))?;
        // Only a connection on which nothing is outstanding is used again.
        *slot = Some(connection);
        match (reply.value, reply.error) {
            (Some(value), _) => Ok(value),
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

    fn connect(&self) -> io::Result<BufReader<UnixStream>> {
        let stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let mut connection = BufReader::new(stream);
        read_line(&mut connection)?;
        let capabilities = qapi::qmp::qmp_capabilities { enable: None };
        let request = Execute {
            execute: <qapi::qmp::qmp_capabilities as Command>::NAME,
            arguments: &capabilities,
        };
        exchange(&mut connection, &request)?;
        Ok(connection)
    }
}

fn read_line(connection: &mut BufReader<UnixStream>) -> io::Result<String> {
    let mut line = String::new();
    let count = io::Read::take(connection, LINE_MAX).read_line(&mut line)?;
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line)
}

fn exchange<C: Serialize>(
    connection: &mut BufReader<UnixStream>,
    request: &Execute<'_, C>,
) -> io::Result<Reply> {
    let mut bytes = serde_json::to_vec(request)?;
    bytes.push(b'\n');
    connection.get_mut().write_all(&bytes)?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let reply: Reply = serde_json::from_str(&read_line(connection)?)?;
        // Anything else is an event.
        if reply.value.is_some() || reply.error.is_some() {
            return Ok(reply);
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}
