//! What programs get that we start: a session of their own, because they outlive us, and nothing to gain.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Lets the program have no descriptor but its standard streams: close_range(2), `CLOSE_RANGE_CLOEXEC`. Those of ours are
/// not inherited anyway; whoever started us may have left others open.
pub fn inherit_nothing(command: &mut Command) -> &mut Command {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: between fork and exec only close_range(2) is called, which is async-signal-safe; nothing is allocated, and
    // descriptors that are used until exec stay open until then.
    unsafe {
        command.pre_exec(|| {
            let (first, last): (libc::c_uint, libc::c_uint) = (3, libc::c_uint::MAX);
            match libc::syscall(libc::SYS_close_range, first, last, CLOSE_RANGE_CLOEXEC) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        })
    }
}

/// Lets no program that is started from now on have a descriptor that is open now, but the standard streams: libraries in C
/// open theirs without that.
#[cfg(feature = "tpm")]
pub(crate) fn keep_descriptors() {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    let (first, last): (libc::c_uint, libc::c_uint) = (3, libc::c_uint::MAX);
    // SAFETY: with this flag close_range(2) closes nothing and touches no memory. What is to be inherited is made so between
    // fork and exec, by those who want it.
    unsafe {
        // A kernel that does not know it is older than those that this runs on.
        libc::syscall(libc::SYS_close_range, first, last, CLOSE_RANGE_CLOEXEC);
    }
}

/// Lets the program, and all that it starts, never gain privileges: prctl(2), `PR_SET_NO_NEW_PRIVS`.
pub(crate) fn renounce(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe; nothing is allocated.
    unsafe {
        command.pre_exec(
            || match libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            },
        )
    }
}

/// Makes the program the leader of a new session, see setsid(2): no signal for our terminal or our process group
/// reaches it.
pub(crate) fn detach(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only setsid(2) is called, which is async-signal-safe; nothing is allocated.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::io::{FdFlags, fcntl_setfd};

    use super::*;

    #[test]
    fn a_descriptor_that_somebody_left_open_is_not_inherited() {
        let (left_open, _) = io::pipe().unwrap();
        fcntl_setfd(&left_open, FdFlags::empty()).unwrap();
        let path = format!("/proc/self/fd/{}", left_open.as_raw_fd());
        let mut looks = Command::new("test");
        looks.args(["-e", &path]);
        assert!(looks.status().unwrap().success());
        assert!(!inherit_nothing(&mut looks).status().unwrap().success());
    }
}
