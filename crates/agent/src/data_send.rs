//! The source's data streams: one thread each, from guest memory to the socket.

use std::io::{self, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use palanquin_engine::frame::{Frame, HEADER_BYTES, PAYLOAD_MAX};
use palanquin_engine::pages::{Block, PAGE_BYTES, PageSet};
use palanquin_engine::progress::SentCounters;
use palanquin_host::vm::GuestRam;
use rustls::Connection;

use crate::digest::{Digests, is_zero};
use crate::pace::Pace;
use crate::tls::Authenticated;

/// Bytes encrypted before they are handed to the socket: stays within the cache.
const PIECE: usize = 256 * 1024;
/// Longest time for the other end to take a piece.
const SEND_TIMEOUT: Duration = Duration::from_secs(20);
const PAGE: usize = PAGE_BYTES as usize;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The network.
    #[error("a data stream broke: {0}")]
    Io(#[from] io::Error),
    /// Guest memory.
    #[error("guest memory cannot be read: {0}")]
    Memory(#[from] palanquin_host::Error),
    /// The migration was given up.
    #[error("cancelled")]
    Cancelled,
}

/// What all streams count together.
#[derive(Debug, Default)]
pub struct Counters {
    pages_raw: AtomicU64,
    pages_zero: AtomicU64,
    wire_bytes: AtomicU64,
}

impl Counters {
    /// As they stand.
    pub fn read(&self) -> SentCounters {
        SentCounters {
            pages_raw: self.pages_raw.load(Ordering::Relaxed),
            pages_zero: self.pages_zero.load(Ordering::Relaxed),
            wire_bytes: self.wire_bytes.load(Ordering::Relaxed),
        }
    }
}

/// Something for a stream to do.
#[derive(Clone)]
pub enum Job {
    /// Send this stream's blocks of the set.
    Pages(Arc<PageSet>),
    /// Mark the end of a round.
    RoundEnd {
        /// The round.
        round: u32,
        /// Whether it was the last.
        last: bool,
    },
    /// Send the device state; for the first stream only.
    DeviceState(Arc<Vec<u8>>),
}

/// What the threads share.
pub struct Shared {
    /// Guest memory.
    pub ram: Arc<dyn GuestRam>,
    /// Digests of what was sent.
    pub digests: Arc<Digests>,
    /// Counters.
    pub counters: Counters,
    /// Rate and end.
    pub pace: Pace,
}

/// The streams of a migration.
pub struct Senders {
    jobs: Vec<Sender<Job>>,
    sockets: Vec<TcpStream>,
    shared: Arc<Shared>,
}

impl Senders {
    /// Starts a thread for each connection. `report` is called by each thread at the end of each job.
    ///
    /// # Errors
    ///
    /// A socket is broken, or no thread can be had.
    pub fn start<F>(
        connections: Vec<Authenticated>,
        shared: &Arc<Shared>,
        report: &F,
    ) -> io::Result<Self>
    where
        F: Fn(Result<(), SendError>) + Clone + Send + 'static,
    {
        let mut senders = Self {
            jobs: Vec::new(),
            sockets: Vec::new(),
            shared: Arc::clone(shared),
        };
        let count = connections.len();
        for (index, connection) in connections.into_iter().enumerate() {
            senders.sockets.push(connection.tcp.try_clone()?);
            connection.tcp.set_write_timeout(Some(SEND_TIMEOUT))?;
            let mut tls = connection.connection;
            // Bounded by `PIECE`: everything is flushed before more is written.
            tls.set_buffer_limit(None);
            let (sender, jobs) = channel();
            senders.jobs.push(sender);
            let mut stream = Stream {
                tcp: connection.tcp,
                tls,
                shared: Arc::clone(shared),
                index,
                count,
                buffer: vec![0; HEADER_BYTES + PAYLOAD_MAX],
            };
            let report = report.clone();
            thread::Builder::new()
                .name(format!("send-{index}"))
                .spawn(move || stream.run(&jobs, &report))?;
        }
        Ok(senders)
    }

    /// Number of streams.
    pub fn count(&self) -> usize {
        self.jobs.len()
    }

    /// Gives every stream the same job.
    pub fn all(&self, job: &Job) {
        for sender in &self.jobs {
            // A thread that ended has reported why.
            let _ = sender.send(job.clone());
        }
    }

    /// Gives the first stream a job.
    pub fn first(&self, job: Job) {
        if let Some(sender) = self.jobs.first() {
            let _ = sender.send(job);
        }
    }

    /// Ends the streams at once.
    pub fn cancel(&self) {
        self.shared.pace.cancel();
        for socket in &self.sockets {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

struct Stream {
    tcp: TcpStream,
    tls: Connection,
    shared: Arc<Shared>,
    index: usize,
    count: usize,
    buffer: Vec<u8>,
}

impl Stream {
    /// Works until there are no more jobs, then says goodbye.
    fn run<F: Fn(Result<(), SendError>)>(&mut self, jobs: &Receiver<Job>, report: &F) {
        while let Ok(job) = jobs.recv() {
            let result = self.work(&job);
            let failed = result.is_err();
            report(result);
            if failed {
                return;
            }
        }
        self.tls.send_close_notify();
        // The other end has everything it needs already.
        let _ = self.flush();
    }

    fn work(&mut self, job: &Job) -> Result<(), SendError> {
        match job {
            Job::Pages(set) => {
                for block in set.blocks() {
                    if self.is_mine(&block) {
                        self.send_block(block)?;
                    }
                }
                Ok(())
            }
            Job::RoundEnd { round, last } => self.write(
                &Frame::RoundEnd {
                    round: *round,
                    last: *last,
                }
                .encode(),
            ),
            Job::DeviceState(state) => {
                for (chunk, piece) in state.chunks(PAYLOAD_MAX).enumerate() {
                    let (Ok(chunk), Ok(len)) = (u32::try_from(chunk), u32::try_from(piece.len()))
                    else {
                        return Err(io::Error::from(io::ErrorKind::FileTooLarge).into());
                    };
                    self.write(&Frame::DeviceState { chunk, len }.encode())?;
                    self.write(piece)?;
                }
                Ok(())
            }
        }
    }

    /// Pages of a block always use the same stream, so that an older version cannot overtake a newer one.
    fn is_mine(&self, block: &Block) -> bool {
        (block.index as usize + usize::from(block.region)) % self.count == self.index
    }

    fn send_block(&mut self, block: Block) -> Result<(), SendError> {
        let shared = Arc::clone(&self.shared);
        let mut raw = Block {
            mask: [0; 4],
            ..block
        };
        let mut zero = raw;
        let mut end = HEADER_BYTES;
        for run in block.runs() {
            let first = block.first_page() + u64::from(run.start);
            let len = (run.end - run.start) as usize * PAGE;
            shared.ram.read(
                usize::from(block.region),
                first * PAGE_BYTES,
                &mut self.buffer[end..end + len],
            )?;
            let mut from = end;
            for in_block in run {
                let page = block.first_page() + u64::from(in_block);
                let (word, bit) = ((in_block / 64) as usize, in_block % 64);
                // The copy is looked at, not the memory: the guest may write it at any time, and then the
                // page comes again.
                if is_zero(&self.buffer[from..from + PAGE]) {
                    shared.digests.set_zero(block.region, page);
                    zero.mask[word] |= 1 << bit;
                } else {
                    shared
                        .digests
                        .set(block.region, page, &self.buffer[from..from + PAGE]);
                    raw.mask[word] |= 1 << bit;
                    if from != end {
                        self.buffer.copy_within(from..from + PAGE, end);
                    }
                    end += PAGE;
                }
                from += PAGE;
            }
        }
        if !raw.is_empty() {
            self.buffer[..HEADER_BYTES].copy_from_slice(&Frame::Pages(raw).encode());
            let buffer = std::mem::take(&mut self.buffer);
            let result = self.write(&buffer[..end]);
            self.buffer = buffer;
            result?;
            shared
                .counters
                .pages_raw
                .fetch_add(u64::from(raw.len()), Ordering::Relaxed);
        }
        if !zero.is_empty() {
            self.write(&Frame::Zero(zero).encode())?;
            shared
                .counters
                .pages_zero
                .fetch_add(u64::from(zero.len()), Ordering::Relaxed);
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SendError> {
        for piece in bytes.chunks(PIECE) {
            if !self.shared.pace.admit(piece.len()) {
                return Err(SendError::Cancelled);
            }
            self.tls.writer().write_all(piece)?;
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SendError> {
        while self.tls.wants_write() {
            let sent = match self.tls.write_tls(&mut self.tcp) {
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) if self.shared.pace.is_cancelled() => return Err(SendError::Cancelled),
                Err(error) => return Err(error.into()),
            };
            self.shared
                .counters
                .wire_bytes
                .fetch_add(sent as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}
