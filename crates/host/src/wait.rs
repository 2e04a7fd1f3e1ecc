//! Waiting for a descriptor, with a deadline.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Waits until the descriptor can be read or the time is up; true if it can be read. A signal does not shorten it.
pub(crate) fn readable(fd: impl AsFd, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut fds, Some(&left)) {
            Ok(count) => return count > 0,
            Err(Errno::INTR) => {}
            Err(_) => return false,
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
    }
}
