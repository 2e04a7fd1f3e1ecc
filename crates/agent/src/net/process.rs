//! What the network process does: it accepts and authenticates connections, and carries what comes over them.

use std::collections::HashMap;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use palanquin_engine::message::{MESSAGE_MAX, Reason};
use palanquin_engine::{Message, MigrationId};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tracing::{debug, warn};

use super::confine::{ConfineError, confine};
use super::door::Door;
use super::key::{RemoteKey, Signatures};
use super::port::{BODY_MAX, Packet, Port};
use super::protocol::{
    Connected, FromControl, FromNetwork, ProtocolError, Start, ToNetwork, Told, Wire,
};
use super::receiving::Receiving;
use super::sending::Sending;
use super::wire::{WireChannel, WireError};
use crate::chain::chain;
use crate::crowd::Place;
use crate::stream_proof::Opening;
use crate::tls::{Authenticated, Tls, TlsError, is_refusal};

/// Argument by which this program knows that it is the network process.
pub const ARGUMENT: &str = "network-process";
/// Longest time for the agent to say what its network process needs to know.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the network process ends.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It was not started by the agent.
    #[error("the arguments of a network process are its agent, user and group")]
    Arguments,
    /// Its privileges.
    #[error("privileges cannot be given up")]
    Confine(#[from] ConfineError),
    /// The link.
    #[error("the link to the agent broke")]
    Link(#[from] io::Error),
    /// What the agent says.
    #[error("the agent says what makes no sense")]
    Protocol(#[from] ProtocolError),
    /// Certificates.
    #[error("the identity of this host is not usable")]
    Tls(#[from] TlsError),
}

/// The network process.
pub(super) struct Process {
    link: Arc<Port>,
    pub(super) tls: Tls,
    signatures: Arc<Signatures>,
    next_control: AtomicU64,
    controls: Mutex<HashMap<u64, Arc<WireChannel>>>,
    arriving: Mutex<HashMap<MigrationId, Arc<Receiving>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Works until the agent ends. The arguments are the agent's process ID and the user and group to become; standard input
/// is the link.
///
/// # Errors
///
/// Why it ended.
pub fn run(arguments: &[String]) -> Result<(), ProcessError> {
    let numbers: Option<Vec<u32>> = arguments.iter().map(|text| text.parse().ok()).collect();
    let Some([agent, user, group]) = numbers.as_deref() else {
        return Err(ProcessError::Arguments);
    };
    // Told from the agent in a list of processes; without it it only looks odd there.
    let _ = rustix::thread::set_name(c"palanquin-net");
    // The first random bytes of a process take tens of milliseconds of CPU: better now than during a migration.
    let _ = aws_lc_rs::rand::fill(&mut [0; 1]);
    // Finds the clock that needs no system call, for which it looks where nothing can be looked at later.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let link = Arc::new(Port::from_fd(io::stdin().as_fd().try_clone_to_owned()?)?);
    let lacks = confine(*agent, *user, *group)?;
    link.send(&FromNetwork::Ready(lacks).encoded(), &[])?;
    let Some(packet) = link.receive(Some(START_TIMEOUT), BODY_MAX)? else {
        return Ok(());
    };
    let ToNetwork::Start(start) = ToNetwork::decoded(&packet.body)? else {
        return Err(ProtocolError::OutOfBounds("first packet").into());
    };
    let process = Process::new(link, start)?;
    while let Some(packet) = process.link.receive(None, BODY_MAX)? {
        process.told(packet)?;
    }
    Ok(())
}

impl Process {
    fn new(link: Arc<Port>, start: Start) -> Result<Arc<Self>, TlsError> {
        let Start {
            roots,
            chain,
            schemes,
        } = start;
        let der = |list: Vec<minicbor::bytes::ByteVec>| {
            let list = list.into_iter();
            list.map(|bytes| Vec::from(bytes).into()).collect()
        };
        let signatures = Arc::new(Signatures::new(Arc::clone(&link)));
        let key = RemoteKey::new(&schemes, &signatures);
        Ok(Arc::new(Self {
            tls: Tls::new(der(roots), der(chain), Arc::new(key))?,
            link,
            signatures,
            next_control: AtomicU64::new(1),
            controls: Mutex::default(),
            arriving: Mutex::default(),
        }))
    }

    /// The agent says something. Must not wait for anything.
    fn told(self: &Arc<Self>, packet: Packet) -> Result<(), ProcessError> {
        let Packet { body, fds } = packet;
        let count = fds.len();
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or(ProtocolError::Descriptors(count));
        match ToNetwork::decoded(&body)? {
            ToNetwork::Start(_) => return Err(ProtocolError::OutOfBounds("packet").into()),
            ToNetwork::Listen(limits) => Door::open(self, limits, next()?.into())?,
            ToNetwork::Signed(signed) => {
                self.signatures
                    .answered(signed.id, signed.signature.map(Vec::from));
            }
            ToNetwork::Connect(host) => {
                let tcp = TcpStream::from(next()?);
                let port = Port::from_fd(next()?)?;
                let process = Arc::clone(self);
                spawn("control", move || process.connect(tcp, &host, port));
            }
            ToNetwork::Send(outgoing) => {
                let port = Port::from_fd(next()?)?;
                let counters = next()?.into();
                let (process, regions) = (Arc::clone(self), fds.collect());
                spawn("sending", move || {
                    match Sending::new(&process, port, outgoing, counters, regions) {
                        Ok(sending) => sending.run(),
                        Err(error) => warn!(%error, "a migration cannot leave"),
                    }
                });
            }
            ToNetwork::Receive(incoming) => {
                let port = Port::from_fd(next()?)?;
                let counters = next()?.into();
                let (process, regions) = (Arc::clone(self), fds.collect());
                spawn("receiving", move || {
                    match Receiving::new(port, incoming, counters, regions) {
                        Ok(receiving) => process.receive(Arc::new(receiving)),
                        Err(error) => warn!(%error, "a migration cannot arrive"),
                    }
                });
            }
        }
        Ok(())
    }

    /// Serves a migration that arrives until the agent closes its port.
    fn receive(&self, receiving: Arc<Receiving>) {
        let migration = receiving.migration;
        lock(&self.arriving).insert(migration, Arc::clone(&receiving));
        // Streams are expected, and the agent told so, only from here on.
        receiving.run(self);
        let mut arriving = lock(&self.arriving);
        // Another one of this migration may have begun.
        let here = arriving.get(&migration);
        if here.is_some_and(|here| Arc::ptr_eq(here, &receiving)) {
            arriving.remove(&migration);
        }
    }

    /// A control connection by its number.
    pub(super) fn control(&self, id: u64) -> Option<Arc<WireChannel>> {
        lock(&self.controls).get(&id).cloned()
    }

    /// Hands a data stream to the migration that it names.
    pub(super) fn route_stream(&self, stream: Authenticated, opening: Opening) {
        let receiving = lock(&self.arriving).get(&opening.migration).cloned();
        match receiving {
            Some(receiving) => receiving.admit(stream, opening),
            None => {
                let (peer, migration) = (&stream.peer, opening.migration);
                warn!(%peer, %migration, "a data stream for no migration was refused");
            }
        }
    }

    /// Gives the agent a control connection, and carries it until it ends. It keeps its place until the agent says that it
    /// belongs to a migration.
    pub(super) fn arrived(&self, authenticated: Authenticated, place: Waiting) -> io::Result<()> {
        let wire = Arc::new(WireChannel::new(authenticated)?);
        let (port, theirs) = Port::pair()?;
        let (id, connected) = self.connected(&wire);
        let told = FromNetwork::Arrived(connected).encoded();
        if let Err(error) = self.link.send(&told, &[theirs.as_fd()]) {
            lock(&self.controls).remove(&id);
            return Err(error);
        }
        drop(theirs);
        self.carry(id, &wire, port, Some(place));
        Ok(())
    }

    fn connect(&self, tcp: TcpStream, host: &str, port: Port) {
        let connected = self
            .tls
            .connect(tcp, host, false)
            .map_err(|error| tls_reason(&error))
            .and_then(|connection| {
                let wire = WireChannel::new(connection);
                wire.map_err(|error| Reason::new("connection", error.to_string()))
            });
        match connected {
            Ok(wire) => {
                let wire = Arc::new(wire);
                let (id, connected) = self.connected(&wire);
                // If the agent does not want it any more, carrying it ends at once.
                let _ = port.send(&FromControl::Connected(connected).encoded(), &[]);
                self.carry(id, &wire, port, None);
            }
            Err(reason) => {
                let told = Told::new(&reason.code, &reason.message);
                let _ = port.send(&FromControl::Ended(told).encoded(), &[]);
            }
        }
    }

    fn connected(&self, wire: &Arc<WireChannel>) -> (u64, Connected) {
        let id = self.next_control.fetch_add(1, Ordering::Relaxed);
        lock(&self.controls).insert(id, Arc::clone(wire));
        let connected = Connected {
            id,
            host: wire.peer.name().to_owned(),
            cipher: wire.cipher.clone(),
            key_exchange: wire.key_exchange.clone(),
            certificates: wire.certificates.iter().cloned().map(Into::into).collect(),
            exporter: wire.exporter,
        };
        (id, connected)
    }

    /// Carries messages in both directions until either end closes.
    fn carry(&self, id: u64, wire: &Arc<WireChannel>, port: Port, waiting: Option<Waiting>) {
        let port = Arc::new(port);
        let settled = waiting.map_or(Ok(()), |place| carry_waiting(wire, &port, place));
        let told = match settled {
            Ok(()) => carry_settled(wire, &port),
            Err(told) => told,
        };
        let _ = port.send(&FromControl::Ended(told).encoded(), &[]);
        port.close();
        wire.close();
        lock(&self.controls).remove(&id);
    }
}

/// A place among the connections that belong to no migration.
type Waiting = Place<String, TcpStream>;

/// Carries messages while a connection belongs to no migration: on this one thread and without buffers while nothing
/// comes, because there may be many. Returns when it belongs to one.
fn carry_waiting(wire: &WireChannel, port: &Port, place: Waiting) -> Result<(), Told> {
    loop {
        while let Some(message) = wire.arrived().map_err(|error| wire_reason(&error))? {
            give_agent(port, &message)?;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(port.socket(), PollFlags::IN),
            PollFd::from_borrowed_fd(wire.socket(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(Told::new("connection-lost", &errno.to_string())),
            Ok(_) => {}
        }
        let [from_agent, from_peer] = fds.map(|fd| !fd.revents().is_empty());
        if from_agent {
            match port.receive(Some(Duration::ZERO), MESSAGE_MAX) {
                Ok(Some(packet)) if packet.body.is_empty() => {
                    drop(place);
                    return Ok(());
                }
                Ok(Some(packet)) => give_peer(wire, &packet)?,
                Ok(None) | Err(_) => return Err(Told::new("closed", "the agent has closed it")),
            }
        }
        if from_peer {
            wire.read_once().map_err(|error| wire_reason(&error))?;
        }
    }
}

/// Carries messages of a migration: a thread for each direction, so that neither waits for the other. Gives why it ended.
fn carry_settled(wire: &Arc<WireChannel>, port: &Arc<Port>) -> Told {
    let (out, from) = (Arc::clone(wire), Arc::clone(port));
    spawn("control-out", move || {
        while let Ok(Some(packet)) = from.receive(None, MESSAGE_MAX) {
            // It may have been told that it belongs to a migration when it did already.
            if !packet.body.is_empty() && give_peer(&out, &packet).is_err() {
                break;
            }
        }
        out.close();
    });
    loop {
        let given = match wire.receive() {
            Ok(message) => give_agent(port, &message),
            Err(error) => Err(wire_reason(&error)),
        };
        if let Err(told) = given {
            return told;
        }
    }
}

fn give_agent(port: &Port, message: &Message) -> Result<(), Told> {
    let lost = |what| Told::new("connection-lost", what);
    let Ok(encoded) = message.encode() else {
        return Err(lost("a message cannot be encoded"));
    };
    let packet = FromControl::Message(encoded[4..].to_vec().into());
    port.send(&packet.encoded(), &[])
        .map_err(|_| lost("the agent does not take it"))
}

fn give_peer(wire: &WireChannel, packet: &Packet) -> Result<(), Told> {
    let Ok(message) = Message::decode(&packet.body) else {
        return Err(Told::new("connection-lost", "the agent says no message"));
    };
    wire.send(&message).map_err(|error| {
        debug!(%error, "send failed");
        wire_reason(&error)
    })
}

/// A thread; without one what it would have served ends.
pub(super) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    if let Err(error) = thread::Builder::new().name(name.to_owned()).spawn(work) {
        warn!(%error, name, "no thread for a connection");
    }
}

/// What a failed handshake means for a migration.
pub(super) fn tls_reason(error: &TlsError) -> Reason {
    let code = if error.is_refusal() {
        "identity-refused"
    } else {
        "connection"
    };
    Reason::new(code, chain(error))
}

fn wire_reason(error: &WireError) -> Told {
    // The other end's verdict on our certificate arrives with its first answer (RFC 8446, section 4.4.2.4).
    let code = match error {
        WireError::Tls(error) if is_refusal(error) => "identity-refused",
        WireError::Closed => "closed",
        _ => "connection-lost",
    };
    Told::new(code, &chain(error))
}

/// The regions' descriptors as memory.
pub(super) fn shared_ram(
    regions: &[super::protocol::RamRegion],
    files: Vec<OwnedFd>,
) -> Result<palanquin_host::shared::SharedRam, palanquin_host::Error> {
    let regions = regions.iter().map(|region| palanquin_host::vm::Region {
        name: region.name.clone(),
        size_bytes: region.size_bytes,
    });
    palanquin_host::shared::SharedRam::new(regions.collect(), files)
}
