//! A man in the middle of the path between two hosts: he sees the records of TLS (RFC 8446, section 5), has no keys, and
//! strikes once, at one record of one connection.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::host::PORT;
use crate::network::Namespace;
use crate::wait;

/// Bytes of a record's header: type, version, length.
const HEADER: usize = 5;
/// Bytes of an encrypted alert, which says goodbye: level, description, type, and the tag of an AEAD.
const GOODBYE: usize = 2 + 1 + 16;
/// How often a pump looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// Longest time that a record is kept for another one to overtake it.
const OVERTAKE: Duration = Duration::from_secs(1);

/// What he does to a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Act {
    /// Ends the connection before it.
    Cut,
    /// Changes its type.
    FlipType,
    /// Changes its length.
    FlipLength,
    /// Changes the first byte of what is encrypted.
    FlipBody,
    /// Changes the last byte of the tag.
    FlipTag,
    /// Keeps it.
    Drop,
    /// Sends it twice.
    Replay,
    /// Sends the next one first.
    Swap,
    /// Sends half of it and ends the connection.
    Truncate,
    /// Sends a record of his own before it.
    Inject,
    /// Keeps it for five seconds.
    Delay,
}

impl Act {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Cut,
        Self::FlipType,
        Self::FlipLength,
        Self::FlipBody,
        Self::FlipTag,
        Self::Drop,
        Self::Replay,
        Self::Swap,
        Self::Truncate,
        Self::Inject,
        Self::Delay,
    ];
    /// For how long [`Act::Delay`] keeps a record: longer than hosts of the rig believe in a peer that is silent.
    pub const DELAY: Duration = Duration::from_secs(5);
}

/// A connection since he was armed, as its ClientHello shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// A control connection, the first is 0.
    Control(u32),
    /// A data stream.
    Data(u32),
}

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From whoever connected.
    There,
    /// Back.
    Back,
}

/// Which record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum When {
    /// The record of this number, the handshake's included.
    Record(u32),
    /// The first one after [`Middle::now`].
    Told,
    /// The one that says goodbye.
    Goodbye,
}

/// What he is armed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Strike {
    /// Which connection.
    pub link: Link,
    /// Which direction.
    pub way: Way,
    /// Which record.
    pub when: When,
    /// What happens to it.
    pub act: Act,
}

/// What he saw since he was armed.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Whether he struck.
    pub struck: bool,
    /// Records of each connection and direction.
    pub records: BTreeMap<(Link, Way), u32>,
    /// All bytes of whoever connected, while he keeps them.
    pub bytes: BTreeMap<Link, Vec<u8>>,
}

#[derive(Default)]
struct State {
    strike: Option<Strike>,
    keeps: bool,
    controls: u32,
    datas: u32,
    /// Counts how often he was armed: connections of before are not his business any more.
    round: u64,
    seen: Seen,
}

struct Shared {
    state: Mutex<State>,
    told: AtomicBool,
    stop: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The man in the middle; ends with all of his connections when he is dropped.
pub struct Middle {
    shared: Arc<Shared>,
    doors: Vec<JoinHandle<Result<()>>>,
}

impl Middle {
    /// Stands in a namespace. Whoever connects to the first address of a pair is connected with the agent at the second.
    ///
    /// # Errors
    ///
    /// An address is not there.
    pub fn start(namespace: &Namespace, pairs: &[(Ipv4Addr, Ipv4Addr)]) -> Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            told: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut middle = Self {
            shared,
            doors: Vec::new(),
        };
        for &(here, there) in pairs {
            let listener = namespace
                .inside(move || {
                    let listener = TcpListener::bind((here, PORT))?;
                    listener.set_nonblocking(true)?;
                    Ok(listener)
                })
                .with_context(|| format!("cannot stand at {here}"))?;
            let shared = Arc::clone(&middle.shared);
            let door = namespace.spawn(move || door(&shared, &listener, (there, PORT).into()))?;
            middle.doors.push(door);
        }
        Ok(middle)
    }

    /// Begins anew, with a strike or to look on; what has been seen is forgotten.
    pub fn arm(&self, strike: Option<Strike>, keep_bytes: bool) {
        let mut state = self.shared.lock();
        self.shared.told.store(false, Ordering::Relaxed);
        *state = State {
            strike,
            keeps: keep_bytes,
            round: state.round + 1,
            ..State::default()
        };
    }

    /// For [`When::Told`]: the next record it is.
    pub fn now(&self) {
        self.shared.told.store(true, Ordering::Relaxed);
    }

    /// What he has seen since he was armed.
    pub fn seen(&self) -> Seen {
        self.shared.lock().seen.clone()
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for door in self.doors.drain(..) {
            let _ = door.join();
        }
    }
}

/// Accepts and connects, in the namespace; the pumps of a connection may run anywhere.
fn door(shared: &Arc<Shared>, listener: &TcpListener, there: SocketAddr) -> Result<()> {
    let mut pumps: Vec<JoinHandle<()>> = Vec::new();
    while !shared.stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((client, _)) => {
                client.set_nonblocking(false)?;
                // Nobody there is for the client as if he were not there himself.
                if let Ok(server) = TcpStream::connect_timeout(&there, OVERTAKE) {
                    pumps.extend(pumps_of(shared, client, server)?);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let _ = rustix::event::poll(
                    &mut [rustix::event::PollFd::new(
                        listener,
                        rustix::event::PollFlags::IN,
                    )],
                    rustix::event::Timespec::try_from(LOOK).ok().as_ref(),
                );
            }
            Err(error) => return Err(error.into()),
        }
        pumps.retain(|pump| !pump.is_finished());
    }
    for pump in pumps {
        let _ = pump.join();
    }
    Ok(())
}

fn pumps_of(
    shared: &Arc<Shared>,
    client: TcpStream,
    server: TcpStream,
) -> io::Result<[JoinHandle<()>; 2]> {
    for socket in [&client, &server] {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(LOOK))?;
        socket.set_write_timeout(Some(Act::DELAY))?;
    }
    let named = Arc::new(Mutex::new(None));
    let there = Pump {
        shared: Arc::clone(shared),
        from: client.try_clone()?,
        to: server.try_clone()?,
        way: Way::There,
        named: Arc::clone(&named),
        buffer: Vec::new(),
    };
    let back = Pump {
        shared: Arc::clone(shared),
        from: server,
        to: client,
        way: Way::Back,
        named,
        buffer: Vec::new(),
    };
    Ok([there, back].map(|mut pump| thread::spawn(move || pump.run())))
}

/// Moves records in one direction.
struct Pump {
    shared: Arc<Shared>,
    from: TcpStream,
    to: TcpStream,
    way: Way,
    /// What the connection is, and since which arming; none until its ClientHello has come.
    named: Arc<Mutex<Option<(Link, u64)>>>,
    /// What has come and is no whole record yet.
    buffer: Vec<u8>,
}

impl Pump {
    fn run(&mut self) {
        // The end of one side is the end of the other, and what broke on the way is not his sorrow.
        while let Ok(Some(record)) = self.next(None) {
            if !matches!(self.pass(record), Ok(true)) {
                return self.cut();
            }
        }
        let rest = std::mem::take(&mut self.buffer);
        let _ = self.to.write_all(&rest);
        let _ = self.to.shutdown(Shutdown::Write);
    }

    fn cut(&self) {
        for socket in [&self.from, &self.to] {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// The next whole record; none at the end, or when it does not come in time.
    fn next(&mut self, limit: Option<Duration>) -> io::Result<Option<Vec<u8>>> {
        let mut waited = Duration::ZERO;
        let mut piece = [0; 16 * 1024];
        loop {
            if let Some(header) = self.buffer.first_chunk::<HEADER>() {
                let whole = HEADER + usize::from(u16::from_be_bytes([header[3], header[4]]));
                if self.buffer.len() >= whole {
                    let rest = self.buffer.split_off(whole);
                    return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
                }
            }
            match self.from.read(&mut piece) {
                Ok(0) => return Ok(None),
                Ok(count) => self.buffer.extend_from_slice(&piece[..count]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    waited += LOOK;
                    if self.shared.stop.load(Ordering::Relaxed)
                        || limit.is_some_and(|limit| waited >= limit)
                    {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Passes a record on, in his way; false when the connection is to end.
    fn pass(&mut self, mut record: Vec<u8>) -> io::Result<bool> {
        let Some(act) = self.look(&record) else {
            self.to.write_all(&record)?;
            return Ok(true);
        };
        let last = record.len() - 1;
        match act {
            Act::Cut => return Ok(false),
            Act::FlipType => record[0] ^= 0x02,
            Act::FlipLength => record[4] ^= 0x01,
            Act::FlipBody => record[HEADER.min(last)] ^= 0x01,
            Act::FlipTag => record[last] ^= 0x80,
            Act::Drop => return Ok(true),
            Act::Replay => self.to.write_all(&record)?,
            Act::Swap => {
                if let Some(next) = self.next(Some(OVERTAKE))? {
                    self.to.write_all(&next)?;
                }
            }
            Act::Truncate => {
                self.to.write_all(&record[..record.len().div_ceil(2)])?;
                return Ok(false);
            }
            Act::Inject => {
                let mut own = vec![23, 3, 3, 0, 64];
                own.extend([0xA5; 64]);
                self.to.write_all(&own)?;
            }
            Act::Delay => {
                let mut waited = Duration::ZERO;
                while waited < Act::DELAY && !self.shared.stop.load(Ordering::Relaxed) {
                    if wait::pause(LOOK).is_err() {
                        return Ok(false);
                    }
                    waited += LOOK;
                }
            }
        }
        self.to.write_all(&record)?;
        Ok(true)
    }

    /// Counts a record; what is to be done to it, if anything.
    fn look(&self, record: &[u8]) -> Option<Act> {
        let mut state = self.shared.lock();
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        let (link, round) = *named.get_or_insert_with(|| {
            let is_data = record.windows(14).any(|name| name == b"palanquin-data");
            let count = if is_data {
                &mut state.datas
            } else {
                &mut state.controls
            };
            let index = *count;
            *count += 1;
            let link = if is_data {
                Link::Data(index)
            } else {
                Link::Control(index)
            };
            (link, state.round)
        });
        if round != state.round {
            return None;
        }
        if state.keeps && self.way == Way::There {
            let bytes = state.seen.bytes.entry(link).or_default();
            bytes.extend_from_slice(record);
        }
        let count = state.seen.records.entry((link, self.way)).or_insert(0);
        let number = *count;
        *count += 1;
        let strike = state.strike?;
        let is_it = match strike.when {
            When::Record(wanted) => wanted == number,
            When::Told => self.shared.told.load(Ordering::Relaxed),
            When::Goodbye => number > 2 && record.len() == HEADER + GOODBYE,
        };
        if state.seen.struck || (strike.link, strike.way) != (link, self.way) || !is_it {
            return None;
        }
        state.seen.struck = true;
        Some(strike.act)
    }
}
