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

/// An instruction of a filter for packets (see the kernel's documentation of BPF): code, jumps if true and if false, value.
pub(crate) type Instruction = (u16, u8, u8, u32);

/// Lets the kernel drop what a filter does not let through.
pub(crate) fn attach_filter(socket: BorrowedFd<'_>, program: &[Instruction]) -> io::Result<()> {
    let mut program: Vec<libc::sock_filter> = program
        .iter()
        .map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k })
        .collect();
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel reads `filter` and the `len` instructions that it points to, which both live until this returns,
    // verifies them, and keeps a copy.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Binds a socket of packet(7) to an interface and a protocol of Ethernet; the type of the interface (`ARPHRD_*`).
pub(crate) fn bind_link(socket: BorrowedFd<'_>, interface: u32, protocol: u16) -> io::Result<u16> {
    // SAFETY: it is a struct of numbers, for which zeroes are values.
    let mut link: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    link.sll_family = libc::AF_PACKET as u16;
    link.sll_protocol = protocol.to_be();
    link.sll_ifindex = i32::try_from(interface).map_err(io::Error::other)?;
    let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes of `link`, which is that long, and keeps nothing of it.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const link).cast(), length) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel writes at most `length` bytes to `link`, which is that long, and how many they were to `length`.
    // Both are ours alone, and any bytes are values of both.
    let result =
        unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut link).cast(), &raw mut length) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(link.sll_hatype)
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
    // No file can come with what these sockets get, and those of packet(7) refuse MSG_CMSG_CLOEXEC.
    let flags = libc::MSG_DONTWAIT;
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
