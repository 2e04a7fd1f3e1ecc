//! QEMU without any agent: for adoption, and to measure QEMU's own migration.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::guest::Console;
use crate::process::Kept;
use crate::wait;

/// QEMU answers within this time, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A QEMU process that is killed when it is dropped.
#[derive(Debug)]
pub struct Qemu {
    process: Kept,
    dir: PathBuf,
}

impl Qemu {
    /// Starts QEMU with a QMP socket and a console in `dir`. `command` is how to run a program, for example inside a
    /// namespace; it has no arguments yet.
    ///
    /// # Errors
    ///
    /// If it cannot be started or does not answer.
    pub fn start(
        mut command: Command,
        dir: &Path,
        arguments: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let _ = fs::remove_file(dir.join("qmp"));
        // What another guest said here must not pass for this one's.
        let _ = fs::remove_file(dir.join("console.log"));
        command.args(arguments.into_iter().map(Into::into));
        command.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial"]);
        command.arg(format!("file:{}", dir.join("console.log").display()));
        command.arg("-qmp");
        command.arg(format!(
            "unix:{},server=on,wait=off",
            dir.join("qmp").display()
        ));
        let log = dir.join("qemu.log");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        let mut qemu = Self {
            process: Kept::new(command.spawn().context("cannot start QEMU")?),
            dir: dir.to_owned(),
        };
        wait::until_true("QEMU opens its socket", PATIENCE, || {
            if qemu.process.ended()?.is_some() {
                bail!("it ended: {}", fs::read_to_string(&log)?);
            }
            // The file is there a moment before anybody listens.
            Ok(UnixStream::connect(qemu.qmp_path()).is_ok())
        })?;
        Ok(qemu)
    }

    /// Process ID.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Path of the QMP socket.
    pub fn qmp_path(&self) -> PathBuf {
        self.dir.join("qmp")
    }

    /// The guest's console.
    pub fn console(&self) -> Console {
        Console::new(self.dir.join("console.log"))
    }

    /// Connects to the QMP socket.
    ///
    /// # Errors
    ///
    /// If QEMU does not answer.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp_path())
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

/// A QMP connection.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// The events that came.
    events: VecDeque<Event>,
}

/// An event of QEMU.
#[derive(Clone, Debug)]
struct Event {
    name: String,
    /// QEMU's own timestamp: time of day when it was raised, with microseconds.
    at: Duration,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    ///
    /// If nobody answers.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("no QEMU answers at {}", path.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut qmp = Self {
            stream,
            reader,
            events: VecDeque::new(),
        };
        qmp.read()?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self
            .reader
            .read_line(&mut line)
            .context("QEMU does not answer")?
            == 0
        {
            bail!("QEMU closed its socket");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU said {line}"))
    }

    /// Executes a command and gives its result.
    ///
    /// # Errors
    ///
    /// If QEMU refuses or does not answer.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream, "{request}")?;
        loop {
            let mut message = self.read()?;
            if message.get("return").is_some() {
                return Ok(message["return"].take());
            }
            if let Some(error) = message.get("error") {
                bail!("{command}: {}", error["desc"]);
            }
            self.note(&message);
        }
    }

    fn note(&mut self, message: &Value) {
        let Some(name) = message["event"].as_str() else {
            return;
        };
        let part = |key: &str| message["timestamp"][key].as_u64().unwrap_or_default();
        self.events.push_back(Event {
            name: name.to_owned(),
            at: Duration::from_secs(part("seconds")) + Duration::from_micros(part("microseconds")),
        });
    }

    /// Takes an event that came already, with all before it: the time of day when QEMU raised it.
    pub fn take_event(&mut self, name: &str) -> Option<Duration> {
        while let Some(event) = self.events.pop_front() {
            if event.name == name {
                return Some(event.at);
            }
        }
        None
    }

    /// Waits for an event and says at which time of day QEMU raised it; events before it are forgotten.
    ///
    /// # Errors
    ///
    /// If it does not come.
    pub fn wait_event(&mut self, name: &str) -> Result<Duration> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.take_event(name) {
                return Ok(at);
            }
            if Instant::now() >= deadline {
                bail!("no event {name} within {PATIENCE:?}");
            }
            let message = self.read().with_context(|| format!("waiting for {name}"))?;
            self.note(&message);
        }
    }
}
