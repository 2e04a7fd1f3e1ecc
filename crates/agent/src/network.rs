//! The agent's side of its network process: starts it, gives it what it may have, and starts it anew when it ends.

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use palanquin_engine::message::Reason;
use palanquin_engine::progress::SentCounters;
use palanquin_host::vm::{GuestRam, Sharing};
use palanquin_trust::Identity;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use tracing::{error, info, warn};

use crate::chain::chain;
use crate::channel::Channel;
use crate::data_send::COUNTERS_BYTES;
use crate::net::key::{Notary, schemes_of};
use crate::net::port::Port;
use crate::net::process::ARGUMENT;
use crate::net::protocol::{
    Connected, FromControl, FromNetwork, Incoming, Listen, Outgoing, ProtocolError, RamRegion,
    Signed, Start, ToNetwork, Wire,
};
use crate::streams_in::{COUNTER_BYTES, InEvent, InStreams};
use crate::streams_out::{OutEvent, OutStreams};
use crate::tls::{HANDSHAKE_DEADLINE, Material, Peer, Peers, TlsError};

/// Longest time for the network process to give up its privileges.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait of those who need it while it is started anew.
const AGAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Pauses before it is started anew: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));
/// After so long a life the first pause is enough again.
const LONG_LIFE: Duration = Duration::from_secs(60);
/// Longest packet of the network process over the link.
const PACKET_MAX: usize = 64 * 1024;

/// How the network process is to be started.
#[derive(Clone, Debug)]
pub struct Settings {
    /// User that it becomes.
    pub user: u32,
    /// Group that it becomes.
    pub group: u32,
    /// Log as JSON.
    pub log_json: bool,
    /// Whether it must lack nothing.
    pub require: bool,
}

/// Why there is no network process.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// It does not start, or the link to it broke.
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
    /// It ended.
    #[error("the network process ended")]
    Ended,
    /// It says what makes no sense.
    #[error("the network process says what makes no sense")]
    Protocol(#[from] ProtocolError),
    /// It is not confined as the configuration demands.
    #[error("`privileges.require` is set, and this host lacks: {0}")]
    Lacking(String),
    /// The authorities of this host are of no use.
    #[error("other hosts cannot be told apart")]
    Tls(#[from] TlsError),
}

/// Called with each control connection that another host has opened. Must not wait.
pub type Arrivals = Box<dyn Fn(Channel) + Send + Sync>;

struct Current {
    link: Arc<Port>,
    pid: u32,
}

struct Listening {
    listener: TcpListener,
    request: Vec<u8>,
    arrivals: Arc<Arrivals>,
}

impl Listening {
    fn tell(&self, link: &Port) {
        // If it does not take it, it is gone, which is noticed next, and the one that follows gets it.
        let _ = link.send(&self.request, &[self.listener.as_fd()]);
    }
}

/// The network process.
pub struct Network {
    settings: Settings,
    start: Vec<u8>,
    notary: Mutex<Notary>,
    identity: Identity,
    peers: Peers,
    current: Mutex<Option<Current>>,
    changed: Condvar,
    /// What is listened at, and who is told of connections.
    listening: Mutex<Option<Listening>>,
    lacks: Mutex<Vec<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory for counters that the network process writes.
///
/// # Errors
///
/// No more descriptors or memory.
pub fn counters(bytes: usize) -> io::Result<File> {
    let memory = memfd_create("palanquin-counters", MemfdFlags::CLOEXEC)?;
    ftruncate(&memory, bytes as u64)?;
    Ok(memory.into())
}

impl Network {
    /// Starts it and waits until it has given up its privileges.
    ///
    /// # Errors
    ///
    /// It does not start, or is not confined as it must be.
    pub fn start(settings: Settings, material: Material) -> Result<Arc<Self>, NetworkError> {
        let peers = Peers::new(&material)?;
        let der = |list: Vec<rustls::pki_types::CertificateDer<'static>>| {
            let list = list.into_iter();
            list.map(|der| der.as_ref().to_vec().into()).collect()
        };
        let start = ToNetwork::Start(Start {
            roots: der(material.roots),
            chain: der(material.chain),
            schemes: schemes_of(material.key.as_ref()),
        });
        let network = Arc::new(Self {
            settings,
            start: start.encoded(),
            notary: Mutex::new(Notary::new(material.key)),
            identity: material.identity,
            peers,
            current: Mutex::default(),
            changed: Condvar::new(),
            listening: Mutex::default(),
            lacks: Mutex::default(),
        });
        let (sender, first) = channel();
        let supervised = Arc::clone(&network);
        // The kernel ends the process with the thread that started it: this one stays.
        thread::Builder::new()
            .name("network".to_owned())
            .spawn(move || supervised.supervise(&sender))
            .map_err(|error| NetworkError::Io("no thread for the network process", error))?;
        match first.recv() {
            Ok(None) => Ok(network),
            Ok(Some(error)) => Err(error),
            Err(_) => Err(NetworkError::Ended),
        }
    }

    fn supervise(&self, first: &Sender<Option<NetworkError>>) {
        let mut is_first = true;
        let mut pause = PAUSES.0;
        loop {
            let began = Instant::now();
            match self.begin() {
                Ok((child, link)) => {
                    // Who waits for the first one only.
                    let _ = first.send(None);
                    self.live(child, &link);
                }
                Err(error) if is_first => {
                    let _ = first.send(Some(error));
                    return;
                }
                Err(error) => {
                    error!(error = chain(&error), "the network process does not start");
                }
            }
            is_first = false;
            if began.elapsed() >= LONG_LIFE {
                pause = PAUSES.0;
            }
            let until = rustix::event::Timespec {
                tv_sec: pause.as_secs().cast_signed(),
                tv_nsec: pause.subsec_nanos().into(),
            };
            let _ = rustix::event::poll(&mut [], Some(&until));
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Starts a process and waits until it is confined.
    fn begin(&self) -> Result<(Kept, Arc<Port>), NetworkError> {
        let failed = |what| move |error| NetworkError::Io(what, error);
        let (link, theirs) = Port::pair().map_err(failed("no link to the network process"))?;
        let Settings {
            user,
            group,
            log_json,
            require,
        } = self.settings;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("palanquind")
            .args([ARGUMENT, &std::process::id().to_string()])
            .args([user, group].map(|number| number.to_string()))
            .args(log_json.then_some("--log-json"))
            .env_clear()
            .envs(std::env::vars_os().filter(|(name, _)| name == "PALANQUIN_LOG"))
            // What is freed by libraries in C is overwritten (mallopt(3), `M_PERTURB`), as our own allocator does it: pages
            // of guests pass through buffers, and none of them is to stay.
            .env("MALLOC_PERTURB_", "165")
            .current_dir("/")
            // Signals of a terminal are for the agent.
            .process_group(0)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null());
        let child = palanquin_host::inherit_nothing(&mut command)
            .spawn()
            .map_err(failed("the network process does not start"))?;
        // The command holds a copy of the other end.
        drop(command);
        let child = Kept(child);
        let packet = link
            .receive(Some(START_TIMEOUT), PACKET_MAX)
            .map_err(failed("the network process does not start"))?
            .ok_or(NetworkError::Ended)?;
        let FromNetwork::Ready(lacks) = FromNetwork::decoded(&packet.body)? else {
            return Err(ProtocolError::OutOfBounds("first packet").into());
        };
        if require && !lacks.is_empty() {
            return Err(NetworkError::Lacking(lacks.join("; ")));
        }
        for lack in &lacks {
            warn!(
                lack,
                "the network process has privileges that it should not have"
            );
        }
        link.send(&self.start, &[])
            .map_err(failed("the link to the network process broke"))?;
        info!(pid = child.0.id(), user, group, "network process");
        *lock(&self.lacks) = lacks;
        Ok((child, Arc::new(link)))
    }

    /// Serves a process until it ends.
    fn live(&self, mut child: Kept, link: &Arc<Port>) {
        // Before others may use it, so that none is left out.
        let listening = lock(&self.listening);
        *lock(&self.current) = Some(Current {
            link: Arc::clone(link),
            pid: child.0.id(),
        });
        if let Some(listening) = &*listening {
            listening.tell(link);
        }
        drop(listening);
        self.changed.notify_all();
        let why = match self.serve(link) {
            Ok(()) => String::new(),
            Err(error) => chain(&error),
        };
        *lock(&self.current) = None;
        link.close();
        let status = child.end();
        error!(
            pid = child.0.id(),
            status, why, "the network process ended; its connections are lost"
        );
    }

    fn serve(&self, link: &Port) -> Result<(), NetworkError> {
        let broke = |error| NetworkError::Io("the link to the network process broke", error);
        while let Some(packet) = link.receive(None, PACKET_MAX).map_err(broke)? {
            match FromNetwork::decoded(&packet.body)? {
                FromNetwork::Ready(_) => return Err(ProtocolError::OutOfBounds("packet").into()),
                FromNetwork::Arrived(connected) => {
                    let count = packet.fds.len();
                    let fd = packet.fds.into_iter().next();
                    let fd = fd.ok_or(ProtocolError::Descriptors(count))?;
                    let port = Port::from_fd(fd).map_err(broke)?;
                    let channel = self.channel(connected, port);
                    let listening = lock(&self.listening);
                    let arrivals = listening.as_ref().map(|at| Arc::clone(&at.arrivals));
                    drop(listening);
                    match (channel, arrivals) {
                        (Ok(channel), Some(arrivals)) => arrivals(channel),
                        (Ok(_), None) => {}
                        (Err(error), _) => warn!(%error, "a connection was refused"),
                    }
                }
                FromNetwork::Sign(sign) => {
                    let signature = lock(&self.notary).sign(sign.scheme, &sign.message);
                    if signature.is_none() {
                        warn!("the network process was refused a signature");
                    }
                    let signed = ToNetwork::Signed(Signed {
                        id: sign.id,
                        signature: signature.map(Into::into),
                    });
                    link.send(&signed.encoded(), &[]).map_err(broke)?;
                }
            }
        }
        Ok(())
    }

    /// A connection with the host that its certificates name, whatever the network process says.
    fn channel(&self, connected: Connected, port: Port) -> Result<Channel, TlsError> {
        let certificates: Vec<&[u8]> = connected.certificates.iter().map(|der| &der[..]).collect();
        let peer = self.peers.identify(&certificates)?;
        if peer.identity.name() != connected.host {
            return Err(TlsError::OtherHost {
                found: peer.identity.name().to_owned(),
                expected: connected.host,
            });
        }
        Ok(Channel::new(connected, port, peer))
    }

    /// Process ID of the one that runs.
    pub fn pid(&self) -> Option<u32> {
        lock(&self.current).as_ref().map(|current| current.pid)
    }

    /// What this host lacks for it to be confined.
    pub fn lacks(&self) -> Vec<String> {
        lock(&self.lacks).clone()
    }

    /// This host.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Who has these certificates, its own first, as far as they were not shown over a connection.
    ///
    /// # Errors
    ///
    /// No authority of ours vouches for it now, or it is no host of our trust domain.
    pub fn identify(&self, certificates: &[&[u8]]) -> Result<Peer, TlsError> {
        self.peers.identify(certificates)
    }

    fn link(&self) -> io::Result<Arc<Port>> {
        let deadline = Instant::now() + AGAIN_TIMEOUT;
        let mut current = lock(&self.current);
        loop {
            if let Some(current) = &*current {
                return Ok(Arc::clone(&current.link));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::other(
                    "the network process is being started anew",
                ));
            }
            current = self
                .changed
                .wait_timeout(current, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(current, _)| current);
        }
    }

    /// Lets it accept connections at this socket, from now on and whenever it is started anew.
    pub fn listen(&self, listener: TcpListener, limits: Listen, arrivals: Arrivals) {
        let mut listening = lock(&self.listening);
        let current = lock(&self.current).as_ref().map(|c| Arc::clone(&c.link));
        let at = Listening {
            listener,
            request: ToNetwork::Listen(limits).encoded(),
            arrivals: Arc::new(arrivals),
        };
        if let Some(link) = current {
            at.tell(&link);
        }
        *listening = Some(at);
    }

    /// Authenticates a connection to the host of that name.
    ///
    /// # Errors
    ///
    /// No handshake in time, another host, or no network process.
    pub fn connect(&self, tcp: TcpStream, host: &str) -> Result<Channel, Reason> {
        let broke = |error: io::Error| Reason::new("connection", chain(&error));
        let (port, theirs) = crate::channel::port().map_err(broke)?;
        let request = ToNetwork::Connect(host.to_owned()).encoded();
        self.link()
            .and_then(|link| link.send(&request, &[tcp.as_fd(), theirs.as_fd()]))
            .map_err(broke)?;
        drop((tcp, theirs));
        let deadline = HANDSHAKE_DEADLINE + Duration::from_secs(2);
        let packet = port.receive(Some(deadline), PACKET_MAX).map_err(broke)?;
        let packet = packet.ok_or_else(|| {
            Reason::new(
                "connection",
                "the network process ended during the handshake",
            )
        })?;
        let odd = |error: &dyn std::error::Error| Reason::new("connection", chain(error));
        match FromControl::decoded(&packet.body).map_err(|error| odd(&error))? {
            FromControl::Connected(connected) if connected.host == host => {
                let channel = self.channel(connected, port);
                channel.map_err(|error| Reason::new("identity-refused", chain(&error)))
            }
            FromControl::Ended(told) => Err(Reason::new(&told.code, told.message)),
            _ => Err(odd(&ProtocolError::OutOfBounds("packet"))),
        }
    }

    fn hand_over(
        &self,
        request: &ToNetwork,
        ram: &dyn GuestRam,
        sharing: Sharing,
        bytes: usize,
    ) -> Result<(Port, File), Reason> {
        let broke = |error: io::Error| Reason::new("connection", chain(&error));
        let regions = ram.share(sharing);
        let regions = regions.map_err(|error| Reason::new("memory", chain(&error)))?;
        let counters = counters(bytes).map_err(broke)?;
        let (port, theirs) = Port::pair().map_err(broke)?;
        let mut fds: Vec<BorrowedFd<'_>> = vec![theirs.as_fd(), counters.as_fd()];
        fds.extend(regions.iter().map(AsFd::as_fd));
        self.link()
            .and_then(|link| link.send(&request.encoded(), &fds))
            .map_err(broke)?;
        Ok((port, counters))
    }

    /// Gives it a migration that leaves, and guest RAM to read.
    ///
    /// # Errors
    ///
    /// No network process, or memory that can't be shared.
    pub fn outgoing(
        &self,
        outgoing: Outgoing,
        ram: &dyn GuestRam,
        before: SentCounters,
        report: impl Fn(OutEvent) + Send + 'static,
    ) -> Result<OutStreams, Reason> {
        let outgoing = Outgoing {
            regions: regions(ram),
            ..outgoing
        };
        let request = ToNetwork::Send(outgoing);
        let (port, counters) = self.hand_over(&request, ram, Sharing::Read, COUNTERS_BYTES)?;
        OutStreams::new(port, counters, before, report)
            .map_err(|error| Reason::new("internal", chain(&error)))
    }

    /// Gives it a migration that arrives, and guest RAM to write.
    ///
    /// # Errors
    ///
    /// No network process, or memory that can't be shared.
    pub fn incoming(
        &self,
        incoming: Incoming,
        ram: &dyn GuestRam,
        report: impl Fn(InEvent) + Send + 'static,
    ) -> Result<InStreams, Reason> {
        let device_state_max = incoming.device_state_max;
        let incoming = Incoming {
            regions: regions(ram),
            ..incoming
        };
        let request = ToNetwork::Receive(incoming);
        let (port, counter) = self.hand_over(&request, ram, Sharing::ReadWrite, COUNTER_BYTES)?;
        let sizes = ram.regions().iter().map(|region| region.size_bytes);
        let ram_bytes = sizes.fold(0, u64::saturating_add);
        InStreams::new(port, counter, ram_bytes, device_state_max, report)
            .map_err(|error| Reason::new("internal", chain(&error)))
    }
}

fn regions(ram: &dyn GuestRam) -> Vec<RamRegion> {
    let regions = ram.regions().iter().map(|region| RamRegion {
        name: region.name.clone(),
        size_bytes: region.size_bytes,
    });
    regions.collect()
}

/// A process that ends with us.
struct Kept(Child);

impl Kept {
    fn end(&mut self) -> String {
        // One that has ended already can't be killed.
        let _ = self.0.kill();
        self.0
            .wait()
            .map_or_else(|error| error.to_string(), |status| status.to_string())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.end();
    }
}

/// Notices a network process that reports more than any migration has to report.
#[derive(Debug)]
pub(crate) struct Flood {
    left: f64,
    refilled: Instant,
}

impl Default for Flood {
    fn default() -> Self {
        Self {
            left: Self::BURST,
            refilled: Instant::now(),
        }
    }
}

impl Flood {
    /// Reports at once.
    pub(crate) const BURST: f64 = 50_000.0;
    /// Reports in each second: more than the pages that a VM can wait for.
    pub(crate) const RATE: f64 = 20_000.0;

    /// Counts a report; true if there are too many.
    pub(crate) fn is_one(&mut self) -> bool {
        let now = Instant::now();
        let refill = now.duration_since(self.refilled).as_secs_f64() * Self::RATE;
        self.left = (self.left + refill).min(Self::BURST);
        self.refilled = now;
        self.left -= 1.0;
        self.left < 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_told_from_a_busy_migration() {
        let mut flood = Flood::default();
        assert!((0..40_000).all(|_| !flood.is_one()));
        assert!((0..10_000_000).any(|_| flood.is_one()));
    }
}
