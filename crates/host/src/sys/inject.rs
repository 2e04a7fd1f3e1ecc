//! One system call executed inside another process, by ptrace(2).
//!
//! The process's main thread is stopped, its registers are pointed at a `syscall` instruction that its memory
//! holds anyway, stepped over it, and put back. No memory of the process is written. A system call that the stop
//! interrupted is restarted by the kernel, because the registers that say so are put back as they were.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use libc::{c_int, c_long, c_void, pid_t, user_regs_struct};

use crate::Error;

/// Longest wait for the thread to stop.
const DEADLINE: Duration = Duration::from_secs(2);

/// A process under our control; it goes on when this is dropped.
pub(crate) struct Stopped {
    pid: pid_t,
    saved: user_regs_struct,
    syscall_at: u64,
    signals: Vec<c_int>,
}

fn error(what: &str) -> Error {
    Error::Injection(format!("{what}: {}", io::Error::last_os_error()))
}

fn ptrace(request: libc::c_uint, pid: pid_t, data: *mut c_void) -> c_long {
    // SAFETY: every request used here takes either no pointer or one to a live `user_regs_struct` that the caller
    // owns; the kernel checks `pid`.
    unsafe { libc::ptrace(request, pid, std::ptr::null_mut::<c_void>(), data) }
}

/// Waits for the traced thread to stop and gives its wait status.
fn wait_stop(pid: pid_t) -> Result<c_int, Error> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let mut status = 0;
        // SAFETY: `status` is a live integer.
        let found = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL | libc::WNOHANG) };
        if found < 0 {
            return Err(error("waiting for the hypervisor to stop"));
        }
        if found == pid {
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                return Err(Error::ProcessGone {
                    pid: pid.cast_unsigned(),
                });
            }
            return Ok(status);
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout("stopping the hypervisor's main thread"));
        }
        // A stop of a traced thread has no descriptor to wait for; it comes within microseconds.
        let pause = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 50_000,
        };
        let _ = rustix::event::poll(&mut [], Some(&pause));
    }
}

impl Stopped {
    /// Stops the main thread of the process. All calls must come from the thread that made this one.
    pub(crate) fn attach(pid: u32) -> Result<Self, Error> {
        let syscall_at = find_syscall(pid)?;
        let pid = pid_t::try_from(pid).map_err(|_| Error::ProcessGone { pid })?;
        if ptrace(libc::PTRACE_SEIZE, pid, std::ptr::null_mut()) != 0 {
            return Err(error(
                "attaching (CAP_SYS_PTRACE is needed, and nobody else may trace it)",
            ));
        }
        // From here on dropping the guard detaches.
        let mut stopped =
            // SAFETY: all-zero bytes are a valid `user_regs_struct`, which has only integers.
            Self { pid, saved: unsafe { std::mem::zeroed() }, syscall_at, signals: Vec::new() };
        if ptrace(libc::PTRACE_INTERRUPT, pid, std::ptr::null_mut()) != 0 {
            return Err(error("stopping"));
        }
        let status = wait_stop(pid)?;
        stopped.note_signal(status);
        stopped.saved = stopped.registers()?;
        Ok(stopped)
    }

    /// A stop that brings a signal for the process: it gets it later.
    fn note_signal(&mut self, status: c_int) {
        let signal = libc::WSTOPSIG(status);
        let is_event = status >> 16 != 0;
        if !is_event && signal != libc::SIGTRAP {
            self.signals.push(signal);
        }
    }

    fn registers(&self) -> Result<user_regs_struct, Error> {
        let mut registers = MaybeUninit::<user_regs_struct>::zeroed();
        if ptrace(
            libc::PTRACE_GETREGS,
            self.pid,
            registers.as_mut_ptr().cast(),
        ) != 0
        {
            return Err(error("reading registers"));
        }
        // SAFETY: all-zero bytes were valid before, and the kernel has filled them in.
        Ok(unsafe { registers.assume_init() })
    }

    fn set_registers(&self, registers: &user_regs_struct) -> Result<(), Error> {
        let mut copy = *registers;
        if ptrace(libc::PTRACE_SETREGS, self.pid, (&raw mut copy).cast()) != 0 {
            return Err(error("setting registers"));
        }
        Ok(())
    }

    /// Executes a system call with up to two arguments and gives what it returns: negative for an error.
    pub(crate) fn syscall(&mut self, number: i64, first: u64, second: u64) -> Result<i64, Error> {
        let mut registers = self.saved;
        registers.rip = self.syscall_at;
        registers.rax = number.cast_unsigned();
        registers.rdi = first;
        registers.rsi = second;
        // Not within a system call: otherwise the kernel might restart one here.
        registers.orig_rax = u64::MAX;
        self.set_registers(&registers)?;
        let deadline = Instant::now() + DEADLINE;
        loop {
            if ptrace(libc::PTRACE_SINGLESTEP, self.pid, std::ptr::null_mut()) != 0 {
                return Err(error("stepping"));
            }
            let status = wait_stop(self.pid)?;
            self.note_signal(status);
            let now = self.registers()?;
            if now.rip == self.syscall_at + 2 {
                return Ok(now.rax.cast_signed());
            }
            if now.rip != self.syscall_at || Instant::now() >= deadline {
                return Err(Error::Injection(
                    "the hypervisor did not execute it".to_owned(),
                ));
            }
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if self.saved.rip != 0 {
            let _ = self.set_registers(&self.saved);
        }
        ptrace(libc::PTRACE_DETACH, self.pid, std::ptr::null_mut());
        for &signal in &self.signals {
            // SAFETY: plain integers; the process got these signals while it was stopped.
            unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.pid, signal) };
        }
    }
}

/// Address of a `syscall` instruction in the process: in its vDSO, or else in its C library.
fn find_syscall(pid: u32) -> Result<u64, Error> {
    let maps =
        fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|_| Error::ProcessGone { pid })?;
    let memory = fs::File::open(format!("/proc/{pid}/mem"))
        .map_err(Error::io("reading the hypervisor's memory"))?;
    let mut candidates: Vec<(bool, u64, u64)> = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(mode)) = (fields.next(), fields.next()) else {
            continue;
        };
        let is_vdso = line.ends_with("[vdso]");
        if mode.starts_with("r-x") && (is_vdso || line.contains("/libc")) {
            let ends = range.split_once('-').and_then(|(start, end)| {
                Some((
                    u64::from_str_radix(start, 16).ok()?,
                    u64::from_str_radix(end, 16).ok()?,
                ))
            });
            candidates.extend(ends.map(|(start, end)| (!is_vdso, start, end)));
        }
    }
    candidates.sort_unstable();
    for (_, start, end) in candidates {
        let len = usize::try_from(end.saturating_sub(start))
            .unwrap_or(0)
            .min(4 << 20);
        let mut code = vec![0; len];
        if memory.read_exact_at(&mut code, start).is_err() {
            continue;
        }
        if let Some(at) = code.windows(2).position(|bytes| bytes == [0x0f, 0x05]) {
            return Ok(start + at as u64);
        }
    }
    Err(Error::Injection(
        "no system call instruction found in the hypervisor".to_owned(),
    ))
}
