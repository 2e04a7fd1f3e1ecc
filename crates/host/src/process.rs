//! A process that can't be mistaken for another: a pidfd, checked against its start time.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};

use crate::Error;
use crate::wait::readable;

/// A process of this machine.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    start_ticks: u64,
    fd: OwnedFd,
}

impl Process {
    /// The process that has this ID now.
    pub(crate) fn open(pid: u32) -> Result<Self, Error> {
        let gone = || Error::ProcessGone { pid };
        let raw = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(gone)?;
        let fd = pidfd_open(raw, PidfdFlags::empty()).map_err(|_| gone())?;
        // Read after the descriptor was opened: both are of the same process, or the process is gone.
        let start_ticks = start_ticks(pid).ok_or_else(gone)?;
        let process = Self {
            pid,
            start_ticks,
            fd,
        };
        if process.has_ended(Duration::ZERO) {
            Err(gone())
        } else {
            Ok(process)
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Start time in clock ticks since boot.
    pub(crate) fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Waits until it has ended or the time is up; true if it has ended. Reaps it if it is our child.
    pub(crate) fn has_ended(&self, timeout: Duration) -> bool {
        let ended = readable(&self.fd, timeout);
        if ended {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            // Not our child, or reaped already: then there is nothing to reap.
            let _ = waitid(WaitId::PidFd(self.fd.as_fd()), options);
        }
        ended
    }

    /// Can be read once it has ended.
    pub(crate) fn ended(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Ends it by force and waits; false if it is still there after the timeout.
    pub(crate) fn kill(&self, timeout: Duration) -> bool {
        // One that has ended already can't get a signal.
        let _ = pidfd_send_signal(&self.fd, Signal::KILL);
        self.has_ended(timeout)
    }
}

/// Waits until a child has ended, and ends it by force when the time is up; nothing then.
pub(crate) fn wait_child(child: &mut Child, timeout: Duration) -> io::Result<Option<ExitStatus>> {
    // Nobody else reaps it, so its ID is its own until we have waited for it.
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    let ended = pidfd_open(pid, PidfdFlags::empty()).map(|fd| readable(&fd, timeout));
    if matches!(ended, Ok(true)) {
        return child.wait().map(Some);
    }
    child.kill()?;
    child.wait().map(|_| None)
}

/// Field 22 of `/proc/PID/stat`, see proc_pid_stat(5).
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let rest = stat.rsplit_once(')')?.1;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Identity of the running kernel: changes with every boot.
pub(crate) fn boot_id() -> Result<String, Error> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .map_err(Error::io("reading the boot ID"))
}

#[cfg(test)]
#[expect(
    clippy::zombie_processes,
    reason = "`has_ended` reaps them, which is what is tested"
)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ended_is_noticed_and_reaped() {
        let child = std::process::Command::new("true").spawn().unwrap();
        match Process::open(child.id()) {
            Ok(process) => assert!(process.has_ended(Duration::from_secs(5))),
            Err(error) => assert!(error.is_process_gone()),
        }
    }

    #[test]
    fn a_child_is_waited_for_whether_it_has_ended_already_or_never_does() {
        let mut child = std::process::Command::new("false").spawn().unwrap();
        assert!(readable(pidfd(&child), Duration::from_secs(5)));
        let status = wait_child(&mut child, Duration::from_secs(5)).unwrap();
        assert_eq!(status.and_then(|status| status.code()), Some(1));
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let status = wait_child(&mut child, Duration::from_millis(10)).unwrap();
        assert_eq!(status, None);
    }

    fn pidfd(child: &Child) -> OwnedFd {
        let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
        pidfd_open(pid, PidfdFlags::empty()).unwrap()
    }

    #[test]
    fn a_killed_process_is_gone() {
        let child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::open(child.id()).unwrap();
        assert!(!process.has_ended(Duration::ZERO));
        assert!(process.kill(Duration::from_secs(5)));
    }
}
