//! mlock(2).

use std::io;

/// Keeps memory from being swapped out (mlock(2)); it lasts until the memory is given back.
pub(crate) fn lock(bytes: &[u8]) -> io::Result<()> {
    // SAFETY: the call changes no contents, and concerns pages of a live slice, and what else is in the first and last.
    let result = unsafe { libc::mlock(bytes.as_ptr().cast(), bytes.len()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
