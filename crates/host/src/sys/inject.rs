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
/// Longest wait for a system call of ours that does not come back: as long as it runs, the registers can't be put
/// back, and a process that is let go with ours would crash.
const STUCK_DEADLINE: Duration = Duration::from_secs(120);

/// A process under our control; it goes on when this is dropped.
pub(crate) struct Stopped {
    pid: pid_t,
    saved: user_regs_struct,
    syscall_at: u64,
    signals: Vec<c_int>,
    ended: bool,
}

/// Stops the main thread of the process, lets `work` execute system calls in it, and lets it go on.
///
/// A tracer is a thread, and the kernel releases what it traced when it ends. So a thread of its own does it: even a
/// process that could not be stopped in time is free afterwards.
pub(crate) fn within<T: Send>(
    pid: u32,
    work: impl FnOnce(&mut Stopped) -> Result<T, Error> + Send,
) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let tracer = std::thread::Builder::new().name("inject".to_owned());
        let running = tracer
            .spawn_scoped(scope, || work(&mut Stopped::attach(pid)?))
            .map_err(Error::io("starting a thread"))?;
        running
            .join()
            .unwrap_or_else(|_| Err(Error::Injection("the tracing thread panicked".to_owned())))
    })
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
fn wait_stop(pid: pid_t, patience: Duration) -> Result<c_int, Error> {
    let deadline = Instant::now() + patience;
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
    fn attach(pid: u32) -> Result<Self, Error> {
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
            Self { pid, saved: unsafe { std::mem::zeroed() }, syscall_at, signals: Vec::new(), ended: false };
        if ptrace(libc::PTRACE_INTERRUPT, pid, std::ptr::null_mut()) != 0 {
            return Err(error("stopping"));
        }
        stopped.wait(DEADLINE)?;
        stopped.saved = stopped.registers()?;
        Ok(stopped)
    }

    /// Waits for a stop. One that brings a signal for the process: it gets it later.
    fn wait(&mut self, patience: Duration) -> Result<(), Error> {
        let status = wait_stop(self.pid, patience).inspect_err(|error| {
            self.ended = error.is_process_gone();
        })?;
        let signal = libc::WSTOPSIG(status);
        let is_event = status >> 16 != 0;
        if !is_event && signal != libc::SIGTRAP {
            self.signals.push(signal);
        }
        Ok(())
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

    /// Executes a system call with up to three arguments and gives what it returns: negative for an error.
    pub(crate) fn syscall(&mut self, number: i64, arguments: [u64; 3]) -> Result<i64, Error> {
        let mut registers = self.saved;
        registers.rip = self.syscall_at;
        registers.rax = number.cast_unsigned();
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        // Not within a system call: otherwise the kernel might restart one here.
        registers.orig_rax = u64::MAX;
        self.set_registers(&registers)?;
        let deadline = Instant::now() + DEADLINE;
        loop {
            if ptrace(libc::PTRACE_SINGLESTEP, self.pid, std::ptr::null_mut()) != 0 {
                return Err(error("stepping"));
            }
            match self.wait(DEADLINE) {
                Err(Error::Timeout(_)) => {
                    // It runs within the kernel, which is short of something. The stop comes when it returns.
                    let _ = ptrace(libc::PTRACE_INTERRUPT, self.pid, std::ptr::null_mut());
                    self.wait(STUCK_DEADLINE)?;
                }
                other => other?,
            }
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
        if self.ended {
            return;
        }
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
