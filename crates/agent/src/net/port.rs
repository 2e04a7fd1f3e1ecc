//! Packets with descriptors between the agent and its network process: one end of a `SOCK_SEQPACKET` pair, see unix(7).
//!
//! A packet is one byte that says how its body comes (`0`: behind it; `1`: in the memory of the first descriptor, whose
//! length follows in four bytes, little endian), and descriptors. Neither end trusts the other: lengths are checked before
//! memory is taken, nothing waits without end unless told to, and descriptors that nobody expects are closed.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType,
    recvmsg, sendmsg, shutdown, socketpair, sockopt,
};

/// Longest body that comes within its packet, in bytes.
const INLINE_MAX: usize = 60 * 1024;
/// Longest body in bytes: the pages of a round of a VM with 8 TiB, and any device state.
pub const BODY_MAX: usize = 512 << 20;
/// Most descriptors of a packet: the regions of a VM, its streams and some more.
pub const FDS_MAX: usize = 96;
/// Longest time for the other end to take a packet.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(10);

const INLINE: u8 = 0;
const IN_MEMORY: u8 = 1;

/// What came.
#[derive(Debug, Default)]
pub struct Packet {
    /// Its body.
    pub body: Vec<u8>,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
}

/// One end.
#[derive(Debug)]
pub struct Port {
    socket: OwnedFd,
    received: Mutex<Vec<u8>>,
}

/// An end that can't be used, or a packet that breaks a rule.
fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Port {
    /// Both ends; the second is for the other process.
    ///
    /// # Errors
    ///
    /// No more descriptors.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self::new(ours), theirs))
    }

    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            received: Mutex::new(Vec::new()),
        }
    }

    /// An end that the other process gave, or anything that it claims to be one.
    ///
    /// # Errors
    ///
    /// It is none.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let is_port = sockopt::socket_domain(&fd)? == AddressFamily::UNIX
            && sockopt::socket_type(&fd)? == SocketType::SEQPACKET;
        if is_port {
            Ok(Self::new(fd))
        } else {
            Err(invalid("a descriptor is no end of a pair"))
        }
    }

    /// Sends a packet.
    ///
    /// # Errors
    ///
    /// The other end is closed or took nothing for [`SEND_TIMEOUT`]; or the packet is too large.
    pub fn send(&self, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if body.len() <= INLINE_MAX {
            return self.send_parts(&[IoSlice::new(&[INLINE]), IoSlice::new(body)], fds);
        }
        let len = u32::try_from(body.len()).ok();
        let len = len.filter(|_| body.len() <= BODY_MAX);
        let len = len.ok_or_else(|| invalid("a packet is too large"))?;
        let memory = File::from(memfd_create("palanquin-packet", MemfdFlags::CLOEXEC)?);
        memory.write_all_at(body, 0)?;
        let mut all = vec![memory.as_fd()];
        all.extend_from_slice(fds);
        let len = len.to_le_bytes();
        self.send_parts(&[IoSlice::new(&[IN_MEMORY]), IoSlice::new(&len)], &all)
    }

    fn send_parts(&self, parts: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if fds.len() > FDS_MAX {
            return Err(invalid("a packet has too many descriptors"));
        }
        let deadline = Instant::now() + SEND_TIMEOUT;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        loop {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(invalid("a packet has too many descriptors"));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.socket, parts, &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                // `ETOOMANYREFS` passes when descriptors on their way have arrived.
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::TOOMANYREFS) => {
                    if !self.wait(PollFlags::OUT, Some(deadline))? {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits until the deadline; true if it is ready.
    fn wait(&self, what: PollFlags, deadline: Option<Instant>) -> io::Result<bool> {
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let left = left.map(|left| Timespec {
                tv_sec: left.as_secs().cast_signed(),
                tv_nsec: left.subsec_nanos().into(),
            });
            let mut fds = [PollFd::new(&self.socket, what)];
            match poll(&mut fds, left.as_ref()) {
                Ok(count) => return Ok(count > 0),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits for the next packet, for ever without a timeout; none once the other end is closed. `body_max` bounds its
    /// body. One thread at a time.
    ///
    /// # Errors
    ///
    /// The time is up ([`io::ErrorKind::TimedOut`]), or what came is no packet.
    pub fn receive(
        &self,
        timeout: Option<Duration>,
        body_max: usize,
    ) -> io::Result<Option<Packet>> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut buffer = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        if deadline.is_some() && !self.wait(PollFlags::IN, deadline)? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if buffer.is_empty() {
            *buffer = vec![0; INLINE_MAX + 1];
        }
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            // Without a deadline it waits in this very call: what is on its way to a VM that pauses costs one.
            let mut flags = RecvFlags::CMSG_CLOEXEC;
            if deadline.is_some() {
                flags |= RecvFlags::DONTWAIT;
            }
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let received = match recvmsg(&self.socket, &mut parts, &mut control, flags) {
                Ok(received) => received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    if self.wait(PollFlags::IN, deadline)? {
                        continue;
                    }
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(Errno::CONNRESET | Errno::PIPE) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            };
            let mut fds = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if received.bytes == 0 {
                return Ok(None);
            }
            let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
            if received.flags.intersects(cut) {
                return Err(invalid("a packet is too large"));
            }
            let packet = unpack(&buffer[..received.bytes], fds, body_max);
            if deadline.is_some() {
                // Who sets one waits for a stranger: there may be many, and most say little.
                *buffer = Vec::new();
            }
            return packet.map(Some);
        }
    }

    /// The socket, to wait until it can be read.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Closes both directions: the other end still gets what was sent.
    pub fn close(&self) {
        // One that is closed already is as good.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

fn unpack(bytes: &[u8], mut fds: Vec<OwnedFd>, body_max: usize) -> io::Result<Packet> {
    match bytes {
        [INLINE, body @ ..] if body.len() <= body_max => Ok(Packet {
            body: body.to_vec(),
            fds,
        }),
        [IN_MEMORY, len @ ..] if !fds.is_empty() => {
            let len = <[u8; 4]>::try_from(len).map_err(|_| invalid("a packet has no length"))?;
            let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
            if len > body_max.min(BODY_MAX) {
                return Err(invalid("a packet is too large"));
            }
            let memory = File::from(fds.remove(0));
            let mut body = vec![0; len];
            // By position: what is no memory (a socket, a pipe) fails instead of waiting.
            memory.read_exact_at(&mut body, 0)?;
            Ok(Packet { body, fds })
        }
        _ => Err(invalid("no packet, or one that is too large")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Port, Port) {
        let (ours, theirs) = Port::pair().unwrap();
        (ours, Port::from_fd(theirs).unwrap())
    }

    #[test]
    fn packets_arrive_whole_with_their_descriptors_whatever_their_size() {
        let (ours, theirs) = pair();
        for len in [0, 1, INLINE_MAX, INLINE_MAX + 1, 3 << 20] {
            let body: Vec<u8> = (0..len).map(|at| at as u8).collect();
            let (file, _) = Port::pair().unwrap();
            ours.send(&body, &[file.socket.as_fd(), file.socket.as_fd()])
                .unwrap();
            let packet = theirs.receive(None, BODY_MAX).unwrap().unwrap();
            assert_eq!(packet.body, body);
            assert_eq!(packet.fds.len(), 2);
        }
    }

    #[test]
    fn a_body_beyond_its_bound_is_refused_before_it_is_read() {
        let (ours, theirs) = pair();
        ours.send(&[1; 100_000], &[]).unwrap();
        assert!(theirs.receive(None, 99_999).is_err());
        ours.send(&[1; 100], &[]).unwrap();
        assert!(theirs.receive(None, 99).is_err());
        // A length without its memory, and a length that is a lie.
        for (bytes, fds) in [
            (&[IN_MEMORY, 1, 0, 0, 0][..], Vec::new()),
            (&[IN_MEMORY, 1, 0, 0, 0], vec![ours.socket.as_fd()]),
            (&[IN_MEMORY, 1], vec![ours.socket.as_fd()]),
            (&[7], Vec::new()),
        ] {
            ours.send_parts(&[IoSlice::new(bytes)], &fds).unwrap();
            assert!(theirs.receive(None, BODY_MAX).is_err());
        }
    }

    #[test]
    fn a_closed_end_is_told_after_what_it_sent_and_a_silent_one_is_given_up() {
        let (ours, theirs) = pair();
        let began = Instant::now();
        let error = theirs
            .receive(Some(Duration::from_millis(20)), 1)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= Duration::from_millis(20));
        ours.send(b"last", &[]).unwrap();
        ours.close();
        let packet = theirs.receive(None, BODY_MAX).unwrap().unwrap();
        assert_eq!(packet.body, b"last");
        assert!(theirs.receive(None, BODY_MAX).unwrap().is_none());
        assert!(theirs.send(b"x", &[]).is_err());
    }

    #[test]
    fn a_descriptor_that_is_no_end_is_not_taken_for_one() {
        let (pipe, _writer) = io::pipe().unwrap();
        assert!(Port::from_fd(pipe.into()).is_err());
        let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Port::from_fd(stream.into()).is_err());
    }
}
