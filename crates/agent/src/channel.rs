//! The control channel: messages over one authenticated connection.
//!
//! One thread receives; any thread may send. The socket is never read or written while the TLS state is
//! locked, so that neither direction waits for the other.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palanquin_engine::{Message, MessageError};
use rustls::Connection;

use crate::identity::Identity;
use crate::tls::Authenticated;

/// Longest time for the other end to take what we send.
const SEND_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a channel ended.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
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

/// A control channel.
pub struct Channel {
    /// The other end.
    pub peer: Identity,
    /// Name of the cipher suite.
    pub cipher: String,
    /// Name of the key agreement.
    pub key_exchange: String,
    tcp: TcpStream,
    tls: Mutex<Connection>,
    sending: Mutex<()>,
    received: Mutex<Vec<u8>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Channel {
    /// Takes over an authenticated connection.
    ///
    /// # Errors
    ///
    /// The socket is broken already.
    pub fn new(authenticated: Authenticated) -> io::Result<Self> {
        let (cipher, key_exchange) = (authenticated.cipher(), authenticated.key_exchange());
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
        tcp.set_nodelay(true)?;
        tcp.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Self {
            peer,
            cipher,
            key_exchange,
            tcp,
            tls: Mutex::new(connection),
            sending: Mutex::new(()),
            received: Mutex::new(received),
        })
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// The connection broke or the other end took nothing for 20 s; the channel is of no use any more.
    pub fn send(&self, message: &Message) -> Result<(), ChannelError> {
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
    pub fn receive(&self) -> Result<Message, ChannelError> {
        let mut received = lock(&self.received);
        let mut wire = vec![0; 16 * 1024];
        loop {
            if let Some(message) = take_message(&mut received)? {
                return Ok(message);
            }
            let count = match (&self.tcp).read(&mut wire) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            let closed = self.decrypt(&wire[..count], &mut received)?;
            if closed && take_len(&received)?.is_none() {
                return Err(ChannelError::Closed);
            }
        }
    }

    /// Feeds bytes of the wire to TLS and appends what they hold; true once the other end has closed.
    fn decrypt(&self, wire: &[u8], received: &mut Vec<u8>) -> Result<bool, ChannelError> {
        let mut answer = Vec::new();
        let mut closed = false;
        {
            let mut tls = lock(&self.tls);
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
            tls.send_close_notify();
            while tls.wants_write() && tls.write_tls(&mut records).is_ok() {}
        }
        // The other end may be gone: then there is nobody to say goodbye to.
        let _ = (&self.tcp).write_all(&records);
        let _ = self.tcp.shutdown(Shutdown::Both);
    }

    /// Limits the wait of [`Channel::receive`] for a single read.
    ///
    /// # Errors
    ///
    /// The socket is broken.
    pub fn set_receive_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.tcp.set_read_timeout(timeout)
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
    use super::*;

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
