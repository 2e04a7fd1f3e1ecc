//! Child processes: run to the end with a deadline, or kept and ended by pid.

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Runs a short command and gives what it wrote to standard output.
///
/// # Errors
///
/// It does not start, or fails; with what it wrote to standard error.
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let words: Vec<_> = arguments
            .iter()
            .map(|word| word.as_ref().to_string_lossy())
            .collect();
        bail!(
            "{program} {} failed ({}): {}",
            words.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn pidfd(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// Waits until a process, a child or not, has ended; whether it has.
pub fn wait_for_end(pid: u32, limit: Duration) -> bool {
    let Some(fd) = pidfd(pid) else { return true };
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // A duration of a wait always fits.
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Ends a process by SIGKILL; one that is gone is no problem.
pub fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

/// Sends a signal to a process; one that is gone is no problem.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(fd) = pidfd(pid) {
        let _ = pidfd_send_signal(&fd, signal);
    }
}

/// A child that is killed when it is dropped.
#[derive(Debug)]
pub struct Kept {
    child: Child,
}

impl Kept {
    /// Keeps a child.
    pub fn new(child: Child) -> Self {
        Self { child }
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    ///
    /// The kernel refuses to tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// It has not ended within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        if !wait_for_end(self.pid(), limit) {
            bail!("process {} has not ended within {limit:?}", self.pid());
        }
        Ok(self.child.wait()?)
    }

    /// Sends it a signal.
    pub fn signal(&self, with: Signal) {
        signal(self.pid(), with);
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a command to its end and gives all it wrote; kills it at the deadline.
///
/// # Errors
///
/// It does not start or does not end in time.
pub fn output(command: &mut Command, limit: Duration) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let mut kept = Kept::new(child);
    let status = kept
        .wait(limit)
        .with_context(|| format!("running {:?}", format!("{command:?}")))?;
    let join = |thread: Option<std::thread::JoinHandle<Vec<u8>>>| {
        thread
            .and_then(|thread| thread.join().ok())
            .unwrap_or_default()
    };
    Ok(Output {
        status,
        stdout: join(stdout),
        stderr: join(stderr),
    })
}

fn collect(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

/// Start time of a process in clock ticks since boot (proc(5), `stat` field 22); with the pid it names a process
/// for ever.
pub fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, so count from the last parenthesis: field 3 comes next.
    let rest = stat.get(stat.rfind(')')? + 2..)?;
    rest.split(' ').nth(19)?.parse().ok()
}

/// A number of `/proc/PID/status`, in KiB for memory; none if there is no such process or line.
pub fn status_value(pid: u32, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// CPU time that a process has used, user and system (proc(5), fields 14 and 15; 100 ticks a second).
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = stat.get(stat.rfind(')')? + 2..)?;
    let mut fields = rest.split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * 10))
}

/// CPU time that a process has used in user mode (proc(5), field 14).
pub fn user_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = stat.get(stat.rfind(')')? + 2..)?;
    let user: u64 = rest.split(' ').nth(11)?.parse().ok()?;
    Some(Duration::from_millis(user * 10))
}

/// CPU time that all processes of this machine have used in user mode, over all CPUs (proc(5), `/proc/stat`).
pub fn machine_user_time() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let mut fields = stat.lines().next()?.split_ascii_whitespace().skip(1);
    let user: u64 = fields.next()?.parse().ok()?;
    let nice: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + nice) * 10))
}

/// Whether a program can be found.
pub fn is_installed(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|dir| dir.join(program).is_file())
        || Path::new("/usr/sbin").join(program).is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_fails_says_what_it_wrote() {
        assert_eq!(run("echo", &["a", "b"]).unwrap(), "a b\n");
        let error = run("sh", &["-c", "echo no >&2; exit 3"])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exit status: 3") && error.ends_with("no"),
            "{error}"
        );
    }

    #[test]
    fn a_command_without_an_end_is_killed_at_its_deadline() {
        let mut endless = Command::new("sleep");
        let started = Instant::now();
        assert!(output(endless.arg("60"), Duration::from_millis(100)).is_err());
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn this_process_can_be_told_from_others() {
        let pid = std::process::id();
        assert!(start_ticks(pid).is_some());
        assert!(cpu_time(pid).is_some());
        assert!(status_value(pid, "VmRSS").unwrap() > 100);
        assert!(!wait_for_end(pid, Duration::ZERO));
    }
}
