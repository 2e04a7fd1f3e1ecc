//! What the network process gives up before it reads its first byte from the network.
//!
//! To be called while it has a single thread: what is given up belongs to threads, and those that begin later inherit it.

use std::collections::BTreeMap;
use std::io;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, Signal, getppid, getuid, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Descriptors that it may have open, as the agent itself: connections, which the agent's limits bound, their ports, and
/// the regions of the VMs that move.
const DESCRIPTORS_MAX: u64 = 65_536;

/// `UFFDIO_WAKE`, `UFFDIO_COPY` and `UFFDIO_ZEROPAGE` of `linux/userfaultfd.h`, and `FIONBIO`.
const IOCTLS: [u64; 4] = [0x8010_aa02, 0xc028_aa03, 0xc020_aa04, 0x5421];
/// `PR_SET_NAME`
const PR_SET_NAME: u64 = 15;
/// `PR_SET_NO_NEW_PRIVS`
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const CLONE_THREAD: u64 = 0x0001_0000;
const PROT_EXEC: u64 = 4;
const AF_UNIX: u64 = 1;

/// Why it is not safe to go on.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The agent ended meanwhile.
    #[error("the agent ended while its network process began")]
    Orphaned,
    /// Something that every kernel can do.
    #[error("{0} failed")]
    Call(&'static str, #[source] io::Error),
    /// The list of system calls is wrong.
    #[error("the list of system calls is not usable: {0}")]
    Filter(String),
}

fn call(what: &'static str) -> impl Fn(rustix::io::Errno) -> ConfineError {
    move |errno| ConfineError::Call(what, errno.into())
}

/// Gives everything up; tells what this system lacks for it. `user` and `group` are taken if it is root's.
///
/// # Errors
///
/// Something failed that fails on no usable system, or the agent with that process ID is gone.
pub fn confine(agent: u32, user: u32, group: u32) -> Result<Vec<String>, ConfineError> {
    let mut lacks = Vec::new();
    drop_identity(user, group, &mut lacks)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(call("PR_SET_DUMPABLE"))?;
    // Changing the user has cleared it.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(call("PR_SET_PDEATHSIG"))?;
    if getppid().is_none_or(|parent| u32::try_from(parent.as_raw_nonzero().get()) != Ok(agent)) {
        return Err(ConfineError::Orphaned);
    }
    let limits = [(Resource::Nofile, DESCRIPTORS_MAX), (Resource::Core, 0)];
    for (resource, limit) in limits {
        let limit = rustix::process::getrlimit(resource)
            .maximum
            .map_or(limit, |maximum| limit.min(maximum));
        let limit = Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        };
        setrlimit(resource, limit).map_err(call("setrlimit"))?;
    }
    set_no_new_privs(true).map_err(call("PR_SET_NO_NEW_PRIVS"))?;
    lacks.extend(restrict_files());
    // Refused before the list is complete, so that what libraries try in passing fails and does not kill.
    for filter in [refused()?, allowed()?] {
        if let Err(error) = seccompiler::apply_filter(&filter) {
            lacks.push(format!("seccomp: {error}"));
            break;
        }
    }
    Ok(lacks)
}

/// Another user, no groups, no capabilities.
fn drop_identity(user: u32, group: u32, lacks: &mut Vec<String>) -> Result<(), ConfineError> {
    if getuid().is_root() {
        for capability in CapabilitySet::all().iter() {
            // Newer than the kernel, or nothing that we had.
            let _ = remove_capability_from_bounding_set(capability);
        }
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        let became = set_thread_groups(&[])
            .and_then(|()| set_thread_res_gid(group, group, group))
            .and_then(|()| set_thread_res_uid(user, user, user));
        if let Err(error) = became {
            lacks.push(format!("user: it cannot be changed ({error})"));
        } else if user.is_root() {
            lacks.push("user: it is root".to_owned());
        }
    } else {
        lacks.push("user: the agent is not root, so it has the agent's".to_owned());
    }
    // Not known to a kernel without them.
    let _ = clear_ambient_capability_set();
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).map_err(call("capset"))
}

/// No files, no TCP ports, no signals to and no abstract sockets of others; tells what is lacking.
fn restrict_files() -> Option<String> {
    let restrict = || {
        Ruleset::default()
            .handle_access(AccessFs::from_all(ABI::V6))?
            .handle_access(AccessNet::from_all(ABI::V6))?
            .scope(Scope::from_all(ABI::V6))?
            .create()?
            .restrict_self()
    };
    match restrict() {
        Ok(status) => match status.ruleset {
            RulesetStatus::FullyEnforced => None,
            RulesetStatus::PartiallyEnforced => {
                Some("landlock: this kernel knows only a part of it".to_owned())
            }
            RulesetStatus::NotEnforced => Some("landlock: this kernel does not have it".to_owned()),
        },
        Err(error) => Some(format!("landlock: {error}")),
    }
}

/// What fails as on a kernel that does not have it: libraries try these and know what to do without.
const REFUSED: [i64; 12] = [
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_readlink,
    libc::SYS_access,
    libc::SYS_getcwd,
    // Its flags lie in memory, where no filter sees them; without it clone(2) is used.
    libc::SYS_clone3,
    libc::SYS_sched_getaffinity,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_pkey_alloc,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn wrong(error: &seccompiler::BackendError) -> ConfineError {
    ConfineError::Filter(error.to_string())
}

fn filter(
    rules: Rules,
    other: SeccompAction,
    named: SeccompAction,
) -> Result<BpfProgram, ConfineError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| wrong(&error))?;
    let filter = SeccompFilter::new(rules, other, named, arch).map_err(|error| wrong(&error))?;
    filter.try_into().map_err(|error| wrong(&error))
}

fn condition(
    argument: u8,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, ConfineError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
        .map_err(|error| wrong(&error))
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, ConfineError> {
    SeccompRule::new(vec![condition(argument, operator, value)?]).map_err(|error| wrong(&error))
}

/// Lets [`REFUSED`] fail, and prctl(2) but for the names of threads.
fn refused() -> Result<BpfProgram, ConfineError> {
    let mut rules: Rules = REFUSED.map(|call| (call, Vec::new())).into();
    // The other list is set after this one, which needs the second.
    let other =
        [PR_SET_NAME, PR_SET_NO_NEW_PRIVS].map(|option| condition(0, SeccompCmpOp::Ne, option));
    let other = other.into_iter().collect::<Result<_, _>>()?;
    let other = SeccompRule::new(other).map_err(|error| wrong(&error))?;
    rules.insert(libc::SYS_prctl, vec![other]);
    let refuse = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    filter(rules, SeccompAction::Allow, refuse)
}

/// What it may do; anything else ends it.
fn allowed() -> Result<BpfProgram, ConfineError> {
    let calls = [
        // Sockets and descriptors that it was given.
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_pread64,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_pwrite64,
        libc::SYS_lseek,
        libc::SYS_fallocate,
        libc::SYS_fstat,
        libc::SYS_fstatfs,
        libc::SYS_fcntl,
        libc::SYS_close,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_accept4,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_shutdown,
        libc::SYS_getsockname,
        libc::SYS_getpeername,
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_memfd_create,
        libc::SYS_ftruncate,
        // Memory.
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        // Threads and time.
        libc::SYS_futex,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_sched_yield,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_tgkill,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_restart_syscall,
        libc::SYS_getrandom,
    ];
    // Those are refused by the other filter, which is asked too.
    let calls = calls.into_iter().chain(REFUSED);
    let mut rules: Rules = calls.map(|call| (call, Vec::new())).collect();
    let no_code = rule(2, SeccompCmpOp::MaskedEq(PROT_EXEC), 0)?;
    rules.insert(libc::SYS_mmap, vec![no_code.clone()]);
    rules.insert(libc::SYS_mprotect, vec![no_code]);
    let thread = rule(0, SeccompCmpOp::MaskedEq(CLONE_THREAD), CLONE_THREAD)?;
    rules.insert(libc::SYS_clone, vec![thread]);
    rules.insert(libc::SYS_prctl, Vec::new());
    rules.insert(
        libc::SYS_socketpair,
        vec![rule(0, SeccompCmpOp::Eq, AF_UNIX)?],
    );
    let requests = IOCTLS.map(|request| rule(1, SeccompCmpOp::Eq, request));
    rules.insert(
        libc::SYS_ioctl,
        requests.into_iter().collect::<Result<_, _>>()?,
    );
    filter(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_of_system_calls_can_be_compiled() {
        assert!(!allowed().unwrap().is_empty());
        assert!(!refused().unwrap().is_empty());
    }
}
