//! A server that plays an agent, and the command that speaks to it.
//!
//! This covers how the command line is wired: what it asks, prints and ends with. Real agents are covered by the lab.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Nothing here takes this long.
pub(crate) const LONG: Duration = Duration::from_secs(30);
/// Identity of the migration that the tests speak of.
pub(crate) const ID: &str = "11111111-2222-4333-8444-555555555555";

/// What the agent does with a request.
pub(crate) enum Reply {
    /// Answers.
    Json(u16, Value),
    /// Answers, but not before that request has been seen, or [`Agent::note`]d.
    After(&'static str, Value),
    /// Answers something else.
    Text(u16, String),
    /// Goes on waiting.
    Silence,
    /// Closes the connection.
    HangUp,
}

/// `200` with this body.
pub(crate) fn ok(body: Value) -> Reply {
    Reply::Json(200, body)
}

/// The replies to one kind of request, in order; the last is repeated.
struct Script {
    request: String,
    replies: VecDeque<Reply>,
}

#[derive(Default)]
struct Shared {
    scripts: Vec<Script>,
    seen: Vec<(String, Value)>,
    /// Connections that are kept waiting.
    silent: Vec<UnixStream>,
}

/// An agent in this process.
pub(crate) struct Agent {
    dir: tempfile::TempDir,
    shared: Arc<(Mutex<Shared>, Condvar)>,
}

impl Agent {
    /// One that answers these requests (`METHOD path`, without the query).
    pub(crate) fn new(scripts: Vec<(&str, Vec<Reply>)>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("control.sock")).unwrap();
        let scripts = scripts
            .into_iter()
            .map(|(request, replies)| Script {
                request: request.to_owned(),
                replies: replies.into(),
            })
            .collect();
        let state = Shared {
            scripts,
            ..Shared::default()
        };
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let served = Arc::clone(&shared);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = Arc::clone(&served);
                std::thread::spawn(move || serve(stream, &served));
            }
        });
        Self { dir, shared }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    /// Starts the command with this agent's socket.
    pub(crate) fn start(&self, words: &[&str]) -> Running {
        let mut command = palanquin();
        command.arg("--socket").arg(self.socket()).args(words);
        Running::new(command)
    }

    /// Runs the command to its end.
    pub(crate) fn run(&self, words: &[&str]) -> Told {
        self.start(words).finish()
    }

    /// Waits until so many requests of this kind came; gives the body of the last.
    pub(crate) fn wait_for(&self, request: &str, times: usize) -> Value {
        let deadline = Instant::now() + LONG;
        let (lock, changed) = &*self.shared;
        let mut state = lock.lock().unwrap();
        loop {
            let mut matching = state.seen.iter().filter(|(seen, _)| seen == request);
            if let Some((_, body)) = matching.nth(times - 1) {
                return body.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no {request} among {:?}", state.seen);
            state = changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Counts as a request that was seen.
    pub(crate) fn note(&self, request: &str) {
        let mut state = self.shared.0.lock().unwrap();
        state.seen.push((request.to_owned(), Value::Null));
        self.shared.1.notify_all();
    }

    /// How many requests of this kind came.
    pub(crate) fn count(&self, request: &str) -> usize {
        let state = self.shared.0.lock().unwrap();
        state
            .seen
            .iter()
            .filter(|(seen, _)| seen == request)
            .count()
    }
}

fn serve(mut stream: UnixStream, shared: &(Mutex<Shared>, Condvar)) {
    let Some((request, body)) = read_request(&mut stream) else {
        return;
    };
    let (lock, changed) = shared;
    let mut state = lock.lock().unwrap();
    state.seen.push((request.clone(), body));
    changed.notify_all();
    let script = state.scripts.iter_mut().find(|s| s.request == request);
    let reply = match script {
        None => Reply::Json(
            404,
            json!({"kind": "not-found", "message": format!("no script for {request}")}),
        ),
        Some(script) if script.replies.len() > 1 => script.replies.pop_front().unwrap(),
        Some(script) => match script.replies.front().unwrap() {
            Reply::Json(status, body) => Reply::Json(*status, body.clone()),
            Reply::After(request, body) => Reply::After(request, body.clone()),
            Reply::Text(status, body) => Reply::Text(*status, body.clone()),
            Reply::Silence => Reply::Silence,
            Reply::HangUp => Reply::HangUp,
        },
    };
    match reply {
        Reply::Json(status, body) => answer(&mut stream, status, &body.to_string()),
        Reply::After(request, body) => {
            let waited = changed.wait_timeout_while(state, LONG, |state| {
                !state.seen.iter().any(|(seen, _)| seen == request)
            });
            drop(waited.unwrap());
            answer(&mut stream, 200, &body.to_string());
        }
        Reply::Text(status, body) => answer(&mut stream, status, &body),
        Reply::Silence => state.silent.push(stream),
        Reply::HangUp => {}
    }
}

fn answer(stream: &mut UnixStream, status: u16, body: &str) {
    let length = body.len();
    let head = format!("HTTP/1.1 {status} Whatever\r\ncontent-length: {length}\r\n\r\n");
    // Whoever asked may be gone.
    let _ = stream.write_all((head + body).as_bytes());
}

fn read_request(stream: &mut UnixStream) -> Option<(String, Value)> {
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
        if let Some(end) = end {
            let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "))
                .map_or(0, |length| length.parse().unwrap());
            if bytes.len() >= end + 4 + length {
                let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
                let mut words = head.split_ascii_whitespace();
                let (method, path) = (words.next()?, words.next()?);
                let path = path.split('?').next()?;
                let body = serde_json::from_slice(&bytes[end + 4..]).unwrap_or(Value::Null);
                return Some((format!("{method} {path}"), body));
            }
        }
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return None,
            Ok(count) => bytes.extend(&buffer[..count]),
        }
    }
}

/// The command, without what the environment may bring along.
pub(crate) fn palanquin() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palanquin"));
    command
        .env_remove("PALANQUIN_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs the command without an agent.
pub(crate) fn run(words: &[&str]) -> Told {
    let mut command = palanquin();
    command.args(words);
    Running::new(command).finish()
}

/// A command under way.
pub(crate) struct Running {
    child: Child,
}

impl Running {
    pub(crate) fn new(mut command: Command) -> Self {
        let child = command.spawn().unwrap();
        Self { child }
    }

    /// Types Ctrl-C.
    pub(crate) fn interrupt(&self) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::INT).unwrap();
    }

    /// Waits for the end.
    pub(crate) fn finish(self) -> Told {
        let pid = Pid::from_child(&self.child);
        let (sender, ended) = channel();
        std::thread::spawn(move || sender.send(self.child.wait_with_output()));
        match ended.recv_timeout(LONG) {
            Ok(output) => Told::new(&output.unwrap()),
            Err(_) => {
                let _ = kill_process(pid, Signal::KILL);
                panic!("the command does not end");
            }
        }
    }
}

/// What a command ended with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Told {
    fn new(output: &Output) -> Self {
        Self {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout.clone()).unwrap(),
            stderr: String::from_utf8(output.stderr.clone()).unwrap(),
        }
    }

    /// Everything in one text, to compare with.
    pub(crate) fn all(&self) -> String {
        let status = self
            .status
            .map_or("a signal".to_owned(), |code| code.to_string());
        format!(
            "{}--- stderr\n{}--- exit status {status}\n",
            self.stdout, self.stderr
        )
    }
}
