//! A control connection, as the agent has it: messages that the network process carries.
//!
//! One thread receives; any thread may send. What the network process says is believed no more than what the host at the
//! other end says.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use palanquin_engine::{Message, MessageError};
use palanquin_trust::{Identity, PublicKey};

use crate::net::port::Port;
use crate::net::protocol::{Connected, FromControl, ProtocolError, Told, Wire};
use crate::tls::Peer;

/// Messages that are received before the session has worked on those before.
pub const BACKLOG_MAX: usize = 16;
/// Longest packet: a message and what is around it.
const PACKET_MAX: usize = palanquin_engine::message::MESSAGE_MAX + 64;

/// Why a channel ended.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other end closed it.
    #[error("the other end closed the connection")]
    Closed,
    /// The network process is gone, or does not take what it is told.
    #[error("the network process does not carry it any more: {0}")]
    Io(#[from] io::Error),
    /// Network or TLS, as the network process says.
    #[error("{}", .0.message)]
    Ended(Told),
    /// Protocol.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The network process says what makes no sense.
    #[error(transparent)]
    Packet(#[from] ProtocolError),
}

/// A control channel.
pub struct Channel {
    /// The other end.
    pub peer: Identity,
    /// The key in its certificate, with which it signs orders; absent where that is of a kind that signs no documents.
    pub peer_key: Option<PublicKey>,
    /// Name of the cipher suite.
    pub cipher: String,
    /// Name of the key agreement.
    pub key_exchange: String,
    /// Its number in the network process.
    pub id: u64,
    exporter: [u8; 32],
    port: Port,
    timeout: Mutex<Option<Duration>>,
}

impl Channel {
    /// A connection that the network process has authenticated, with the host that [`crate::tls::Peers`] finds in its
    /// certificates.
    pub fn new(connected: Connected, port: Port, peer: Peer) -> Self {
        Self {
            peer: peer.identity,
            peer_key: peer.key,
            cipher: connected.cipher,
            key_exchange: connected.key_exchange,
            id: connected.id,
            exporter: connected.exporter,
            port,
            timeout: Mutex::new(None),
        }
    }

    /// Keying material of this connection alone (label `EXPORTER-palanquin-attestation`; RFC 8446, section 7.5), as the
    /// network process says: evidence is bound to it.
    pub fn exporter(&self) -> &[u8; 32] {
        &self.exporter
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// The network process has closed it or took nothing for 10 s; the channel is of no use any more.
    pub fn send(&self, message: &Message) -> Result<(), ChannelError> {
        let encoded = message.encode()?;
        // The network process counts the length itself.
        Ok(self.port.send(encoded.get(4..).unwrap_or_default(), &[])?)
    }

    /// Waits for the next message. Only one thread may receive.
    ///
    /// # Errors
    ///
    /// The channel ended, or what came is no message.
    pub fn receive(&self) -> Result<Message, ChannelError> {
        let timeout = *self.timeout.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(packet) = self.port.receive(timeout, PACKET_MAX)? else {
            return Err(ChannelError::Closed);
        };
        match FromControl::decoded(&packet.body)? {
            FromControl::Message(cbor) => Ok(Message::decode(&cbor)?),
            FromControl::Ended(told) if told.code == "closed" => Err(ChannelError::Closed),
            FromControl::Ended(told) => Err(ChannelError::Ended(told)),
            FromControl::Connected(_) => Err(ProtocolError::OutOfBounds("packet").into()),
        }
    }

    /// From now on it belongs to a migration, and is carried like one: it waits for no purpose any more, and has no
    /// deadline.
    pub fn settle(&self) {
        self.set_receive_timeout(None);
        // One that is lost is reported to whoever receives.
        let _ = self.port.send(&[], &[]);
    }

    /// Closes it: the other end gets what was sent, and a goodbye. A thread that receives is woken.
    pub fn close(&self) {
        self.port.close();
    }

    /// Limits the wait of every [`Channel::receive`] that begins from now on, however many pieces the message comes in.
    pub fn set_receive_timeout(&self, timeout: Option<Duration>) {
        *self.timeout.lock().unwrap_or_else(PoisonError::into_inner) = timeout;
    }
}

/// Both ends of a port for a channel: ours, and what the network process is given.
pub(crate) fn port() -> io::Result<(Port, OwnedFd)> {
    Port::pair()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Instant;

    use super::*;

    /// A channel, and the network process's end of its port.
    pub(crate) fn channel() -> (Channel, Port) {
        let (ours, theirs) = Port::pair().unwrap();
        let connected = Connected {
            id: 1,
            host: "beta".to_owned(),
            cipher: String::new(),
            key_exchange: String::new(),
            certificates: Vec::new(),
            exporter: [7; 32],
        };
        let peer = Peer {
            identity: "spiffe://example.org/host/beta".parse().unwrap(),
            key: None,
        };
        let channel = Channel::new(connected, ours, peer);
        (channel, Port::from_fd(theirs).unwrap())
    }

    #[test]
    fn messages_are_carried_and_the_end_is_told_with_its_reason() {
        let (channel, process) = channel();
        channel.send(&Message::RoundReceived(3)).unwrap();
        assert_eq!(sent(&process), Message::RoundReceived(3));
        arrives(&process, &Message::Ping);
        let told = Told::new("connection-lost", "the connection broke");
        let told = FromControl::Ended(told).encoded();
        process.send(&told, &[]).unwrap();
        assert_eq!(channel.receive().unwrap(), Message::Ping);
        let error = channel.receive().unwrap_err();
        assert_eq!(error.to_string(), "the connection broke");
        drop(process);
        assert!(matches!(channel.receive(), Err(ChannelError::Closed)));
    }

    #[test]
    fn a_network_process_that_says_nonsense_is_an_error_and_no_panic() {
        let (channel, process) = channel();
        process.send(b"nonsense", &[]).unwrap();
        assert!(matches!(channel.receive(), Err(ChannelError::Packet(_))));
        let told = FromControl::Message(b"nonsense".to_vec().into());
        process.send(&told.encoded(), &[]).unwrap();
        assert!(matches!(channel.receive(), Err(ChannelError::Message(_))));
        process.send(&vec![0; PACKET_MAX + 1], &[]).unwrap();
        assert!(matches!(channel.receive(), Err(ChannelError::Io(_))));
    }

    /// What comes of a message from the other host.
    pub(crate) fn arrives(process: &Port, message: &Message) {
        let encoded = message.encode().unwrap();
        let told = FromControl::Message(encoded[4..].to_vec().into());
        process.send(&told.encoded(), &[]).unwrap();
    }

    /// What the other host is sent next.
    pub(crate) fn sent(process: &Port) -> Message {
        let packet = process.receive(Some(Duration::from_secs(10)), PACKET_MAX);
        Message::decode(&packet.unwrap().unwrap().body).unwrap()
    }

    #[test]
    fn a_message_is_not_awaited_beyond_the_deadline() {
        let (channel, process) = channel();
        channel.set_receive_timeout(Some(Duration::from_millis(100)));
        arrives(&process, &Message::Ping);
        assert_eq!(channel.receive().unwrap(), Message::Ping);
        let began = Instant::now();
        let error = channel.receive().unwrap_err();
        assert!(matches!(error, ChannelError::Io(_)), "{error:?}");
        assert!(began.elapsed() >= Duration::from_millis(100));
    }
}
