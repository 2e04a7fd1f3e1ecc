//! The destination's data streams: one thread each, from the socket to guest memory.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::net::TcpStream;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use palanquin_engine::frame::{Frame, FrameError, HEADER_BYTES, PAYLOAD_MAX};
use palanquin_engine::pages::{Block, PAGE_BYTES, RamLayout};
use palanquin_host::vm::GuestRam;
use rustls::Connection;

use crate::device_state::DeviceStateError;
use crate::digest::Digests;
use crate::received::Received;
use crate::reduction::decode::{DecodeError, Decoder, Target};
use crate::tls::Authenticated;
use crate::waiting::{AsWaiting, Waiting};

/// Bytes taken from the socket at once.
const READ_BYTES: usize = 256 * 1024;

/// Why a stream ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The network.
    #[error("a data stream broke: {0}")]
    Io(#[from] io::Error),
    /// TLS.
    #[error("a data stream was altered or refused: {0}")]
    Tls(#[from] rustls::Error),
    /// A header breaks a rule.
    #[error("a frame breaks the protocol: {0}")]
    Frame(#[from] FrameError),
    /// Pages break a rule, or guest memory cannot be written.
    #[error("pages cannot be taken: {0}")]
    Pages(#[from] DecodeError),
    /// Guest memory.
    #[error("guest memory cannot be written: {0}")]
    Memory(#[from] palanquin_host::Error),
    /// Frames in an order that no source sends.
    #[error("a frame came out of turn: {0}")]
    Order(&'static str),
    /// The device state breaks a rule.
    #[error(transparent)]
    DeviceState(#[from] DeviceStateError),
}

impl ReceiveError {
    /// Whether the path is to blame and not whoever sent: the connection may be made again.
    pub fn is_broken_link(&self) -> bool {
        matches!(self, Self::Io(_) | Self::Tls(_))
    }
}

/// An authenticated stream of bytes.
pub struct Inbound {
    tcp: TcpStream,
    tls: Connection,
    wire: Vec<u8>,
    /// What of `wire` TLS has not taken yet.
    unread: Range<usize>,
}

impl Inbound {
    /// Takes over an authenticated connection; what it has received already stays in it.
    pub fn new(authenticated: Authenticated) -> Self {
        let Authenticated {
            tcp, connection, ..
        } = authenticated;
        Self {
            tcp,
            tls: connection,
            wire: vec![0; READ_BYTES],
            unread: 0..0,
        }
    }

    /// The socket, to close it from another thread.
    ///
    /// # Errors
    ///
    /// No more file descriptors.
    pub fn socket(&self) -> io::Result<TcpStream> {
        self.tcp.try_clone()
    }

    /// Ends the connection in both directions.
    pub fn close(&self) {
        // One that is closed already is as good.
        let _ = self.tcp.shutdown(std::net::Shutdown::Both);
    }

    /// Fills the buffer; false if the other end said goodbye before its first byte.
    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<bool, ReceiveError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.tls.reader().fill_buf() {
                // An orderly end.
                Ok([]) if filled == 0 => return Ok(false),
                Ok([]) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(chunk) => {
                    let count = chunk.len().min(buffer.len() - filled);
                    buffer[filled..filled + count].copy_from_slice(&chunk[..count]);
                    self.tls.reader().consume(count);
                    filled += count;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            self.read_wire()?;
        }
        Ok(true)
    }

    /// Gives TLS some more bytes: no more than it takes before its plaintext has to be read.
    fn read_wire(&mut self) -> Result<(), ReceiveError> {
        if self.unread.is_empty() {
            let count = match self.tcp.read(&mut self.wire) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            self.unread = 0..count;
        }
        // From here rather than from the socket: the library reads 4 KiB at a time.
        let mut rest = &self.wire[self.unread.clone()];
        let taken = self.tls.read_tls(&mut rest)?;
        self.unread.start += taken;
        self.tls.process_new_packets()?;
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.tcp)?;
        }
        Ok(())
    }
}

/// Guest page bytes that arrived.
pub struct GuestBytes {
    count: AtomicU64,
    mirror: File,
}

impl GuestBytes {
    /// None yet, and written to this file when they change: eight bytes, little endian.
    pub fn mirrored(mirror: File) -> Self {
        Self {
            count: AtomicU64::new(0),
            mirror,
        }
    }

    fn add(&self, bytes: u64) {
        let count = self.count.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // Without it the agent sees less of the progress, nothing else.
        let _ = self.mirror.write_all_at(&count.to_le_bytes(), 0);
    }
}

/// Where the device state goes, and whether the piece was saved before the pause.
pub type StateSink = Box<dyn Fn(&[u8], bool) -> io::Result<()> + Send + Sync>;

/// What the threads share.
pub struct Shared {
    /// Guest memory.
    pub ram: Arc<dyn GuestRam>,
    /// Its layout.
    pub layout: RamLayout,
    /// Digests of what arrived.
    pub digests: Digests,
    /// What arrived since the last whole round, until the pause.
    pub received: Received,
    /// Where the device state goes.
    pub device_state: StateSink,
    /// Largest device state.
    pub device_state_max: u64,
    /// Guest page bytes that arrived.
    pub guest_bytes: GuestBytes,
    /// Number of streams of the migration.
    pub streams: usize,
    /// Once pages arrive while the VM runs or is about to: where they go then.
    pub waiting: OnceLock<Waiting>,
    /// Whether pages may refer to what was sent before: not once the VM runs here. Must be cleared before it does.
    pub references: AtomicBool,
}

impl AsWaiting for Shared {
    fn waiting(&self) -> Option<&Waiting> {
        self.waiting.get()
    }
}

/// What a stream tells.
pub enum Report {
    /// The VM is paused, and it has delivered its pages that were written until then.
    Drained {
        /// Whether the VM is to run here before its last pages are here.
        post_copy: bool,
    },
    /// It has delivered its part of the round.
    RoundEnd {
        /// The round.
        round: u32,
        /// Whether it was the last.
        last: bool,
    },
    /// It has delivered all of its pages that follow the last round.
    Pushed,
    /// It ended before its time.
    Failed(ReceiveError),
}

/// Receives until the other end says goodbye behind its last round.
pub fn receive(inbound: &mut Inbound, index: u16, shared: &Shared, report: &dyn Fn(Report)) {
    let is_urgent = usize::from(index) >= shared.streams;
    let mut stream = Stream {
        inbound,
        index,
        shared,
        // Pages that the VM waits for follow the last round, and so does everything after a reconnection.
        last: is_urgent || shared.waiting.get().is_some(),
        drained: false,
        pushed: false,
        buffer: vec![0; PAYLOAD_MAX],
        decoder: Decoder::new(index.into()),
        chunks: 0,
        state_bytes: 0,
        late: false,
    };
    if let Err(error) = stream.run(report) {
        report(Report::Failed(error));
    }
}

struct Stream<'a> {
    inbound: &'a mut Inbound,
    index: u16,
    shared: &'a Shared,
    drained: bool,
    last: bool,
    pushed: bool,
    buffer: Vec<u8>,
    decoder: Decoder,
    chunks: u32,
    state_bytes: u64,
    /// Whether a piece of the device state has arrived that was saved after the pause.
    late: bool,
}

impl Stream<'_> {
    fn run(&mut self, report: &dyn Fn(Report)) -> Result<(), ReceiveError> {
        let mut header = [0; HEADER_BYTES];
        loop {
            if !self.inbound.read_exact(&mut header)? {
                let all = self.pushed || self.shared.waiting.get().is_none();
                return if self.last && all {
                    Ok(())
                } else {
                    Err(ReceiveError::Order("the end before the last round"))
                };
            }
            let frame = Frame::decode(&header, &self.shared.layout)?;
            let len = frame.payload_bytes();
            if len > 0 && !self.inbound.read_exact(&mut self.buffer[..len])? {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            match frame {
                Frame::DeviceState { chunk, early, .. } => {
                    let too_late = early && (self.late || self.drained);
                    if self.index != 0 || self.last || chunk != self.chunks || too_late {
                        return Err(ReceiveError::Order("a piece of device state"));
                    }
                    self.chunks += 1;
                    self.late |= !early;
                    let limit = self.shared.device_state_max;
                    self.state_bytes += len as u64;
                    if self.state_bytes > limit {
                        return Err(DeviceStateError::Size(limit).into());
                    }
                    (self.shared.device_state)(&self.buffer[..len], early)?;
                }
                Frame::Stale(_) | Frame::Drained { .. } if self.last || self.drained => {
                    return Err(ReceiveError::Order(
                        "stale pages, or the end of what was written until the pause",
                    ));
                }
                _ if self.last => match self.shared.waiting.get() {
                    Some(waiting) if !self.pushed => {
                        self.follow(&frame, len, waiting)?;
                        if self.pushed {
                            report(Report::Pushed);
                        }
                    }
                    _ => {
                        return Err(ReceiveError::Order(
                            "pages or a round behind the last round",
                        ));
                    }
                },
                Frame::Stale(block) => self.forget(&block)?,
                Frame::Drained { post_copy } => {
                    self.drained = true;
                    report(Report::Drained { post_copy });
                }
                Frame::RoundEnd { last, .. } if last != self.drained => {
                    return Err(ReceiveError::Order("the end of a round"));
                }
                Frame::RoundEnd { round, last } => {
                    self.last = last;
                    // Before anybody can know, and so before the next round begins.
                    self.shared.received.round_end(round, self.shared.streams);
                    if !last {
                        self.shared.digests.settle();
                    }
                    report(Report::RoundEnd { round, last });
                }
                Frame::Pages(_)
                | Frame::Zero(_)
                | Frame::Compressed { .. }
                | Frame::Delta { .. }
                | Frame::Duplicate(_) => self.pages(&frame, len)?,
            }
        }
    }

    /// What follows the last round: pages that may be waited for.
    fn follow(&mut self, frame: &Frame, len: usize, waiting: &Waiting) -> Result<(), ReceiveError> {
        match frame {
            Frame::RoundEnd { .. } => self.pushed = true,
            Frame::Zero(block) => {
                for run in block.runs() {
                    let first = block.first_page();
                    let pages = first + u64::from(run.start)..first + u64::from(run.end);
                    waiting.place_zero(usize::from(block.region), pages)?;
                }
            }
            _ => {
                let shared = self.shared;
                let target = Target {
                    ram: waiting,
                    layout: &shared.layout,
                    digests: waiting.digests(),
                    streams: shared.streams,
                    references: false,
                };
                let bytes = self.decoder.apply(frame, &self.buffer[..len], &target)?;
                shared.guest_bytes.add(bytes);
            }
        }
        Ok(())
    }

    /// Pages that come anew: until then nothing is here.
    fn forget(&self, block: &Block) -> Result<(), ReceiveError> {
        let region = usize::from(block.region);
        for run in block.runs() {
            let first = block.first_page();
            let pages = first + u64::from(run.start)..first + u64::from(run.end);
            for page in pages.clone() {
                self.shared.digests.set_zero(block.region, page);
            }
            let bytes = pages.start * PAGE_BYTES..pages.end * PAGE_BYTES;
            self.shared.ram.discard(region, bytes)?;
        }
        Ok(())
    }

    fn pages(&mut self, frame: &Frame, len: usize) -> Result<(), ReceiveError> {
        let shared = self.shared;
        let target = Target {
            ram: shared.ram.as_ref(),
            layout: &shared.layout,
            digests: &shared.digests,
            streams: shared.streams,
            references: shared.references.load(Ordering::Relaxed),
        };
        let bytes = self.decoder.apply(frame, &self.buffer[..len], &target)?;
        if let Some(block) = frame.pages() {
            shared.received.mark(block);
        }
        shared.guest_bytes.add(bytes);
        Ok(())
    }
}
