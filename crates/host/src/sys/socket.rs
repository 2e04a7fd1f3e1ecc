//! Options of sockets, and messages with what the kernel says about them: recvmsg(2), setsockopt(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Room for any address, `struct sockaddr_storage`.
pub(crate) const NAME_BYTES: usize = 128;

/// How much of a message has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrived {
    /// Bytes of the message.
    pub(crate) bytes: usize,
    /// Bytes of the sender's address.
    pub(crate) name: usize,
    /// Bytes of control messages.
    pub(crate) control: usize,
    /// Whether the message was longer than its buffer.
    pub(crate) is_cut: bool,
}

/// Sets an option to these bytes.
pub(crate) fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes of `value`, which lives that long, and keeps nothing of it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets an option that is a number.
pub(crate) fn set_number(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set_option(socket, level, name, &value.to_ne_bytes())
}

/// Takes the next message without waiting; nothing if there is none.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    name: &mut [u8; NAME_BYTES],
    control: &mut [u8],
) -> io::Result<Option<Arrived>> {
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: it is a struct of numbers and pointers, for which zeroes are values.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = NAME_BYTES as libc::socklen_t;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = control.len() as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: every pointer in `header` is to a buffer of the length beside it, borrowed for us alone until this returns.
    // The kernel copies bytes to them, so their alignment does not matter.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let Ok(length) = usize::try_from(result) else {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        };
    };
    Ok(Some(Arrived {
        bytes: length.min(bytes.len()),
        name: (header.msg_namelen as usize).min(NAME_BYTES),
        control: (header.msg_controllen as usize).min(control.len()),
        is_cut: header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
    }))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_message_comes_with_its_sender_and_a_long_one_is_called_cut() {
        let (a, b) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        set_number(b.as_fd(), libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1).unwrap();
        let (mut bytes, mut name, mut control) = ([0; 4], [0; NAME_BYTES], [0; 128]);
        let nothing = receive(b.as_fd(), &mut bytes, &mut name, &mut control).unwrap();
        assert_eq!(nothing, None);
        for (text, is_cut) in [("abc", false), ("abcdef", true)] {
            a.send_to(text.as_bytes(), b.local_addr().unwrap()).unwrap();
            let arrived = receive(b.as_fd(), &mut bytes, &mut name, &mut control)
                .unwrap()
                .unwrap();
            assert_eq!((arrived.name, arrived.is_cut), (16, is_cut));
            assert_eq!(&bytes[..3], b"abc");
            assert!(arrived.control > 0);
        }
        assert!(set_number(b.as_fd(), libc::SOL_SOCKET, -1, 1).is_err());
    }
}
