//! System calls that have no safe wrapper elsewhere: the only `unsafe` code of the project.

use std::io;

use crate::Error;

pub(crate) mod inject;
pub(crate) mod map;
pub(crate) mod mlock;
pub(crate) mod session;
pub(crate) mod socket;
pub(crate) mod track;
pub(crate) mod tsc;
pub(crate) mod uffd;

/// The error of a system call that returned a negative number.
fn check(call: &'static str, result: i64) -> Result<(), Error> {
    if result < 0 {
        return Err(Error::Syscall {
            call,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}
