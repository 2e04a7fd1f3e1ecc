//! Waiting for a descriptor, with a deadline.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Waits until the descriptor can be read or the time is up; true if it can be read. A signal does not shorten it.
pub(crate) fn readable(fd: impl AsFd, timeout: Duration) -> bool {
    let [is_readable] = any_readable([fd.as_fd()], timeout);
    is_readable
}

/// The same for the first of several; says which.
pub(crate) fn any_readable<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    timeout: Duration,
) -> [bool; N] {
    let deadline = Instant::now() + timeout;
    let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut polled, Some(&left)) {
            // Also what can't be waited for, so that reading it tells why.
            Ok(_) => return polled.map(|fd| !fd.revents().is_empty()),
            Err(Errno::INTR) => {}
            Err(_) => return [false; N],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_can_be_read_is_noticed_and_what_cannot_is_given_up() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        assert!(!readable(&reader, Duration::from_millis(5)));
        writer.write_all(b"x").unwrap();
        assert!(readable(&reader, Duration::from_secs(5)));
        let (other, _open) = std::io::pipe().unwrap();
        assert_eq!(
            any_readable([other.as_fd(), reader.as_fd()], Duration::from_secs(5)),
            [false, true]
        );
    }
}
