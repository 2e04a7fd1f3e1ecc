//! A control connection, as the network process has it: messages over TLS.
//!
//! One thread receives; any thread may send. The socket is never read or written while the TLS state is
//! locked, so that neither direction waits for the other.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palanquin_engine::{Message, MessageError};
use palanquin_trust::Identity;
use rustls::Connection;

use crate::tls::Authenticated;

/// Longest time for the other end to take what we send.
const SEND_TIMEOUT: Duration = Duration::from_secs(20);
/// Bytes taken from the socket at once.
const READ_BYTES: usize = 16 * 1024;

/// Why a channel ended.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other end closed it.
    #[error("the other end closed the connection")]
    Closed,
    /// The network.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// TLS.
    #[error("the connection was refused or altered: {0}")]
    Tls(#[from] rustls::Error),
    /// Protocol.
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// A control connection.
pub struct WireChannel {
    /// The other end.
    pub peer: Identity,
    /// Name of the cipher suite.
    pub cipher: String,
    /// Name of the key agreement.
    pub key_exchange: String,
    /// The certificates that the other end has shown, its own first, DER.
    pub certificates: Vec<Vec<u8>>,
    /// Keying material of this connection alone, to which evidence is bound (RFC 8446, section 7.5).
    pub exporter: [u8; 32],
    tcp: TcpStream,
    tls: Mutex<Connection>,
    /// Set while `tls` is locked.
    closed: AtomicBool,
    sending: Mutex<()>,
    received: Mutex<Vec<u8>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WireChannel {
    /// Takes over an authenticated connection.
    ///
    /// # Errors
    ///
    /// The socket is broken already.
    pub fn new(authenticated: Authenticated) -> io::Result<Self> {
        let (cipher, key_exchange) = (authenticated.cipher(), authenticated.key_exchange());
        let certificates = authenticated.certificates();
        let exporter = authenticated
            .attestation_exporter()
            .map_err(io::Error::other)?;
        let Authenticated {
            tcp,
            mut connection,
            peer,
        } = authenticated;
        // The first message may have come with the end of the handshake.
        let mut received = Vec::new();
        match connection.reader().read_to_end(&mut received) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        // Bounded by the length of a message: each is flushed before the next. The library's own bound of 64 KiB is less.
        connection.set_buffer_limit(None);
        tcp.set_nodelay(true)?;
        tcp.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Self {
            peer,
            cipher,
            key_exchange,
            certificates,
            exporter,
            tcp,
            tls: Mutex::new(connection),
            closed: AtomicBool::new(false),
            sending: Mutex::new(()),
            received: Mutex::new(received),
        })
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// The connection broke or the other end took nothing for 20 s; the channel is of no use any more.
    pub fn send(&self, message: &Message) -> Result<(), WireError> {
        let bytes = message.encode()?;
        let _order = lock(&self.sending);
        let mut records = Vec::with_capacity(bytes.len() + 64);
        {
            let mut tls = lock(&self.tls);
            tls.writer().write_all(&bytes)?;
            while tls.wants_write() {
                tls.write_tls(&mut records)?;
            }
        }
        (&self.tcp).write_all(&records)?;
        Ok(())
    }

    /// Waits for the next message. Only one thread may receive.
    ///
    /// # Errors
    ///
    /// The channel ended, or what came is no message.
    pub fn receive(&self) -> Result<Message, WireError> {
        let mut received = lock(&self.received);
        let mut wire = vec![0; READ_BYTES];
        loop {
            if let Some(message) = take_message(&mut received)? {
                return Ok(message);
            }
            self.read(&mut wire, &mut received)?;
        }
    }

    /// A message that has arrived already. Only the thread that receives may call this.
    ///
    /// # Errors
    ///
    /// What came is no message.
    pub fn arrived(&self) -> Result<Option<Message>, WireError> {
        Ok(take_message(&mut lock(&self.received))?)
    }

    /// Reads from the socket once; see [`WireChannel::arrived`]. Only the thread that receives may call this.
    ///
    /// # Errors
    ///
    /// The channel ended.
    pub fn read_once(&self) -> Result<(), WireError> {
        self.read(&mut vec![0; READ_BYTES], &mut lock(&self.received))
    }

    fn read(&self, wire: &mut [u8], received: &mut Vec<u8>) -> Result<(), WireError> {
        let count = match (&self.tcp).read(wire) {
            Ok(0) => return Err(WireError::Closed),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let closed = self.decrypt(&wire[..count], received)?;
        if closed && take_len(received)?.is_none() {
            return Err(WireError::Closed);
        }
        Ok(())
    }

    /// The socket, to wait until it can be read.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }

    /// Feeds bytes of the wire to TLS and appends what they hold; true once the other end has closed.
    fn decrypt(&self, wire: &[u8], received: &mut Vec<u8>) -> Result<bool, WireError> {
        let mut answer = Vec::new();
        let mut closed = false;
        {
            let mut tls = lock(&self.tls);
            if self.closed.load(Ordering::Relaxed) {
                // The library must not be made to complain once it has said goodbye: where it checks itself, it panics.
                return Err(WireError::Closed);
            }
            let mut rest = wire;
            while !rest.is_empty() {
                tls.read_tls(&mut rest)?;
                let state = tls.process_new_packets()?;
                closed |= state.peer_has_closed();
                let mut plain = vec![0; state.plaintext_bytes_to_read()];
                if !plain.is_empty() {
                    tls.reader().read_exact(&mut plain)?;
                    received.extend_from_slice(&plain);
                }
            }
            while tls.wants_write() {
                tls.write_tls(&mut answer)?;
            }
        }
        if !answer.is_empty() {
            let _order = lock(&self.sending);
            (&self.tcp).write_all(&answer)?;
        }
        Ok(closed)
    }

    /// Says goodbye and closes; a thread that receives is woken.
    pub fn close(&self) {
        let mut records = Vec::new();
        let _order = lock(&self.sending);
        {
            let mut tls = lock(&self.tls);
            self.closed.store(true, Ordering::Relaxed);
            tls.send_close_notify();
            while tls.wants_write() && tls.write_tls(&mut records).is_ok() {}
        }
        // The other end may be gone: then there is nobody to say goodbye to.
        let _ = (&self.tcp).write_all(&records);
        let _ = self.tcp.shutdown(Shutdown::Both);
    }
}

fn take_len(received: &[u8]) -> Result<Option<usize>, MessageError> {
    match received.first_chunk::<4>() {
        Some(prefix) => {
            let len = Message::length(*prefix)?;
            Ok((received.len() >= 4 + len).then_some(len))
        }
        None => Ok(None),
    }
}

/// Takes the next message from bytes as they arrived, in whatever pieces that was; nothing while it is not complete.
///
/// # Errors
///
/// What came is no message.
pub fn take_message(received: &mut Vec<u8>) -> Result<Option<Message>, MessageError> {
    let Some(len) = take_len(received)? else {
        return Ok(None);
    };
    let message = Message::decode(&received[4..4 + len])?;
    received.drain(..4 + len);
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use palanquin_engine::message::{PRESENT_MAX, Present};
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

    use super::*;
    use crate::tls::{Material, Tls};

    /// Both ends of a channel between hosts a and b.
    fn pair() -> (WireChannel, WireChannel) {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: String| dir.path().join(name);
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = ca.self_signed(&ca_key).unwrap();
        std::fs::write(file("ca".to_owned()), root.pem()).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let host = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            let uri = format!("spiffe://example.org/host/{name}");
            let uri = SanType::URI(uri.try_into().unwrap());
            params.subject_alt_names.push(uri);
            let certificate = params.signed_by(&key, &issuer).unwrap();
            let (pem, key_pem) = (file(format!("{name}.pem")), file(format!("{name}.key")));
            std::fs::write(&pem, certificate.pem()).unwrap();
            std::fs::write(&key_pem, key.serialize_pem()).unwrap();
            let material = Material::load(&file("ca".to_owned()), &pem, &key_pem, name).unwrap();
            Tls::new(material.roots, material.chain, material.key).unwrap()
        };
        let (a, b) = (host("a"), host("b"));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = thread::spawn(move || {
            let (tcp, _) = listener.accept().unwrap();
            WireChannel::new(b.accept(tcp).unwrap()).unwrap()
        });
        let tcp = TcpStream::connect(address).unwrap();
        let client = WireChannel::new(a.connect(tcp, "b", false).unwrap()).unwrap();
        (client, accepting.join().unwrap())
    }

    #[test]
    fn a_message_of_the_largest_size_arrives() {
        let (client, server) = pair();
        let message = Message::Present(Present {
            region: 0,
            first_page: 0,
            bits: vec![0xFF; PRESENT_MAX],
            last: true,
        });
        let expected = message.clone();
        let receiving = thread::spawn(move || server.receive().unwrap());
        client.send(&message).unwrap();
        assert_eq!(receiving.join().unwrap(), expected);
    }

    #[test]
    fn what_was_altered_on_the_way_and_comes_after_the_goodbye_is_not_looked_at() {
        let (client, _server) = pair();
        client.close();
        let altered = [&[23, 3, 3, 0, 32][..], &[0; 32]].concat();
        let refused = client.decrypt(&altered, &mut Vec::new());
        assert!(matches!(refused, Err(WireError::Closed)), "{refused:?}");
    }

    #[test]
    fn messages_are_taken_one_by_one_whatever_pieces_they_come_in() {
        let mut bytes = Message::Ping.encode().unwrap();
        bytes.extend(Message::RoundReceived(3).encode().unwrap());
        let mut received = Vec::new();
        let mut messages = Vec::new();
        for byte in bytes {
            received.push(byte);
            messages.extend(take_message(&mut received).unwrap());
        }
        assert_eq!(messages, [Message::Ping, Message::RoundReceived(3)]);
        assert!(received.is_empty());
    }

    #[test]
    fn an_oversize_length_is_refused_before_its_message_is_awaited() {
        let mut received = u32::MAX.to_le_bytes().to_vec();
        assert!(take_message(&mut received).is_err());
    }
}
