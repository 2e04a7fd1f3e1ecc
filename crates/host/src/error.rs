//! What can go wrong on this machine.

use std::io;
use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hypervisor process is not there any more.
    #[error("the hypervisor process {pid} has ended")]
    ProcessGone {
        /// Its process ID.
        pid: u32,
    },
    /// Something of `/proc` or the file system.
    #[error("{action}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A system call.
    #[error("{call} failed")]
    Syscall {
        /// Which.
        call: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU answered a command with an error.
    #[error("QEMU refused `{command}`: {description}")]
    Refused {
        /// The QMP command.
        command: &'static str,
        /// QEMU's words.
        description: String,
    },
    /// The QMP connection.
    #[error("the QMP connection at {path} failed")]
    Qmp {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU's answer has another form than expected.
    #[error("QEMU's answer to `{command}` is not understood: {problem}")]
    Answer {
        /// The QMP command.
        command: &'static str,
        /// What is missing or odd.
        problem: String,
    },
    /// A wait was too long.
    #[error("{0} took too long")]
    Timeout(&'static str),
    /// QEMU did not start.
    #[error("QEMU did not start: {log}")]
    Start {
        /// End of its log.
        log: String,
    },
    /// RAM of the VM cannot be tracked from outside.
    #[error("guest RAM is not shared memory that can be followed from outside: {0}")]
    Ram(String),
    /// One system call inside the hypervisor did not work.
    #[error("the system call inside the hypervisor failed: {0}")]
    Injection(String),
    /// The kernel would fail where it should wait for a page on the hypervisor's behalf.
    #[error("accesses of the kernel to missing pages would fail instead of wait: {0}")]
    FaultPrivilege(String),
    /// Pages of this region can't be placed one by one.
    #[error("region {0:?} has huge pages, which cannot arrive one by one")]
    HugePages(String),
    /// The processor time of virtual CPUs can't be limited here.
    #[error("the virtual CPUs cannot be held back: {0}")]
    Throttle(String),
    /// No share of processor time.
    #[error("a share of {0} is not between 0.01 and 1")]
    ThrottleShare(f64),
    /// The migration of the device state ended badly.
    #[error("QEMU could not move the device state: {0}")]
    DeviceState(String),
    /// Whoever gives the device state takes it back: it is not to be used.
    #[error("the device state was not loaded: {0}")]
    DeviceStateGiven(#[source] io::Error),
    /// The device state is larger than allowed.
    #[error("the device state is larger than the {limit_bytes} bytes allowed")]
    DeviceStateSize {
        /// The limit.
        limit_bytes: u64,
    },
    /// A container holds something before anything was sent: the name of the region.
    #[error("region {0:?} of the container is not empty")]
    NotEmpty(String),
    /// What a hypervisor runs can't be found out.
    #[error("what the hypervisor runs cannot be measured: {0}")]
    Measure(String),
    /// Code of a running hypervisor is not what its file holds.
    #[error(
        "code of the hypervisor was altered in memory, at {address:#x}, which should be as in {path}"
    )]
    CodeAltered {
        /// Where.
        address: u64,
        /// File that it was loaded from.
        path: PathBuf,
    },
    /// Another program runs than was to be started.
    #[error("the hypervisor that was started is not the one that was measured: {0}")]
    NotMeasured(PathBuf),
    /// A path that is too long for a UNIX socket.
    #[error("{0} is too long for a socket: at most 107 bytes; choose a shorter state directory")]
    SocketPath(PathBuf),
}

impl Error {
    /// An I/O error with what was tried.
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }

    /// A failed system call.
    pub(crate) fn call(call: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Syscall {
            call,
            source: errno.into(),
        }
    }

    /// Whether something did not answer in time.
    pub(crate) fn is_timeout(&self) -> bool {
        match self {
            Self::Timeout(_) => true,
            Self::Qmp { source, .. } => source.kind() == io::ErrorKind::TimedOut,
            _ => false,
        }
    }

    /// Whether the hypervisor's process has ended.
    pub fn is_process_gone(&self) -> bool {
        matches!(self, Self::ProcessGone { .. })
    }
}
