//! A session of its own for a program that must outlive us.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

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
