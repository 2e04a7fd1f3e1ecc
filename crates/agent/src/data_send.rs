//! The source's data streams: one thread each, from guest memory to the socket.

use std::fs::File;
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use palanquin_api::control::Compress;
use palanquin_engine::frame::Frame;
use palanquin_engine::pages::{Block, PAGE_BYTES, PageSet, RamLayout};
use palanquin_engine::progress::SentCounters;
use palanquin_engine::source::Op;
use palanquin_host::vm::GuestRam;
use rustix::time::{ClockId, clock_gettime};
use rustls::Connection;

use crate::digest::Digests;
use crate::pace::Pace;
use crate::reduction::encode::{Counts, Encoder};
use crate::reduction::stream_of;
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
    /// Where the agent sees them.
    mirror: Option<File>,
    pages_raw: AtomicU64,
    pages_delta: AtomicU64,
    pages_duplicate: AtomicU64,
    pages_compressed: AtomicU64,
    saved_bytes: AtomicU64,
    pages_zero: AtomicU64,
    wire_bytes: AtomicU64,
}

/// Bytes of the counters where the agent sees them.
pub const COUNTERS_BYTES: usize = 56;

/// Counters from where the network process writes them.
pub fn counters_from(bytes: &[u8; COUNTERS_BYTES]) -> SentCounters {
    let mut numbers = [0; COUNTERS_BYTES / 8];
    for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *number = u64::from_le_bytes(*bytes);
    }
    let [
        pages_raw,
        pages_delta,
        pages_duplicate,
        pages_compressed,
        saved_bytes,
        pages_zero,
        wire_bytes,
    ] = numbers;
    SentCounters {
        pages_raw,
        pages_delta,
        pages_duplicate,
        pages_compressed,
        saved_bytes,
        pages_zero,
        wire_bytes,
    }
}

impl Counters {
    /// All zero, and written to this file when they change.
    pub fn mirrored(mirror: File) -> Self {
        Self {
            mirror: Some(mirror),
            ..Self::default()
        }
    }

    /// Shows the agent how they stand.
    fn show(&self) {
        let Some(mirror) = &self.mirror else { return };
        let counters = self.read();
        let numbers = [
            counters.pages_raw,
            counters.pages_delta,
            counters.pages_duplicate,
            counters.pages_compressed,
            counters.saved_bytes,
            counters.pages_zero,
            counters.wire_bytes,
        ];
        let mut bytes = [0; COUNTERS_BYTES];
        for (bytes, number) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
            *bytes = number.to_le_bytes();
        }
        // Without it the agent sees less of the progress, nothing else.
        let _ = mirror.write_all_at(&bytes, 0);
    }

    /// As they stand.
    pub fn read(&self) -> SentCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SentCounters {
            pages_raw: read(&self.pages_raw),
            pages_delta: read(&self.pages_delta),
            pages_duplicate: read(&self.pages_duplicate),
            pages_compressed: read(&self.pages_compressed),
            saved_bytes: read(&self.saved_bytes),
            pages_zero: read(&self.pages_zero),
            wire_bytes: read(&self.wire_bytes),
        }
    }

    fn add(&self, counts: &Counts) {
        let contents = counts.raw + counts.compressed + counts.delta + counts.duplicate;
        for (counter, pages) in [
            (&self.pages_raw, contents),
            (&self.pages_delta, counts.delta),
            (&self.pages_duplicate, counts.duplicate),
            (&self.pages_compressed, counts.compressed),
            (&self.pages_zero, counts.zero),
        ] {
            if pages > 0 {
                counter.fetch_add(pages.into(), Ordering::Relaxed);
            }
        }
        self.saved_bytes
            .fetch_add(counts.saved_bytes, Ordering::Relaxed);
    }
}

/// Something for a stream to do.
#[derive(Clone)]
pub enum Job {
    /// Send this stream's blocks of the set.
    Pages(Arc<PageSet>),
    /// Send these pages, whoever's block it is.
    Urgent(Block),
    /// Mark the end of a round.
    RoundEnd {
        /// The round.
        round: u32,
        /// Whether it was the last.
        last: bool,
    },
    /// Tell that this stream's blocks of the set come anew after the device state.
    Stale(Arc<PageSet>),
    /// Send a piece of the device state, at most [`palanquin_engine::frame::PAYLOAD_MAX`] bytes; for the first stream only.
    DeviceState {
        /// Counts the pieces from 0.
        chunk: u32,
        /// Whether it was saved before the pause.
        early: bool,
        /// It.
        piece: Arc<[u8]>,
    },
    /// Mark that the VM is paused, and that all was sent that was written until then.
    Drained {
        /// Whether the VM is to run at the destination before its last pages are there.
        post_copy: bool,
    },
}

/// What the threads share.
pub struct Shared {
    /// Guest memory.
    pub ram: Arc<dyn GuestRam>,
    /// Digests of what was sent until the end of the last round.
    pub digests: Arc<Digests>,
    /// Digests of what was sent after it.
    pub pulled: Arc<Pulled>,
    /// Counters.
    pub counters: Arc<Counters>,
    /// Rate and end.
    pub pace: Pace,
    /// How pages are made shorter.
    pub compress: Compress,
    /// Whether pages may refer to what was sent before. Must be cleared before the first job whose pages arrive while
    /// the VM runs at the destination; there is no way back.
    pub references: AtomicBool,
}

/// Digests that exist only where they are needed.
pub struct Pulled {
    layout: RamLayout,
    seed: u64,
    digests: OnceLock<Digests>,
}

impl Pulled {
    /// None yet.
    pub fn new(layout: &RamLayout, seed: u64) -> Self {
        Self {
            layout: layout.clone(),
            seed,
            digests: OnceLock::new(),
        }
    }

    /// The digests.
    pub fn digests(&self) -> &Digests {
        self.digests
            .get_or_init(|| Digests::new(&self.layout, self.seed))
    }
}

/// The streams of a migration.
pub struct Senders {
    jobs: Vec<Sender<(Op, Job)>>,
    /// For pages that the VM waits for.
    urgent: Option<Sender<(Op, Job)>>,
    sockets: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl Senders {
    /// Starts a thread for each connection; where asked for, the last is for pages that the VM waits for: it sends
    /// any block, and does not keep to the rate. `report` is called by each thread at the end of each job.
    ///
    /// # Errors
    ///
    /// A socket is broken, or no thread can be had.
    pub fn start<F>(
        connections: Vec<Authenticated>,
        urgent: bool,
        shared: &Arc<Shared>,
        report: &F,
    ) -> io::Result<Self>
    where
        F: Fn(Op, Result<(), SendError>) + Clone + Send + 'static,
    {
        let mut senders = Self {
            jobs: Vec::new(),
            urgent: None,
            sockets: Vec::new(),
            threads: Vec::new(),
            shared: Arc::clone(shared),
        };
        let count = connections.len() - usize::from(urgent && !connections.is_empty());
        for (index, connection) in connections.into_iter().enumerate() {
            senders.sockets.push(connection.tcp.try_clone()?);
            connection.tcp.set_write_timeout(Some(SEND_TIMEOUT))?;
            // Little that is sent would lie in a buffer for long minutes before a dead path is noticed.
            let millis = u32::try_from(SEND_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
            rustix::net::sockopt::set_tcp_user_timeout(&connection.tcp, millis)?;
            let mut tls = connection.connection;
            // Bounded by `PIECE`: everything is flushed before more is written.
            tls.set_buffer_limit(None);
            let (sender, jobs) = channel();
            let is_urgent = index >= count;
            let compress = if is_urgent {
                // Who waits for a page is helped by microseconds.
                Compress::Off
            } else {
                shared.compress
            };
            if is_urgent {
                senders.urgent = Some(sender);
            } else {
                senders.jobs.push(sender);
            }
            let mut stream = Stream {
                link: Link {
                    tcp: connection.tcp,
                    tls,
                    shared: Arc::clone(shared),
                    keeps_rate: !is_urgent,
                },
                index,
                count,
                encoder: Encoder::new(compress, count.max(1)),
                // After a reconnection there are no rounds any more.
                follows: is_urgent || !shared.references.load(Ordering::Relaxed),
            };
            let report = report.clone();
            let thread = thread::Builder::new()
                .name(format!("send-{index}"))
                .spawn(move || stream.run(&jobs, &report))?;
            senders.threads.push(thread);
        }
        Ok(senders)
    }

    /// Gives every stream the same job, but not the one for pages that the VM waits for; gives how many reports come.
    pub fn all(&self, op: Op, job: &Job) -> usize {
        for sender in &self.jobs {
            // A thread that ended has reported why.
            let _ = sender.send((op, job.clone()));
        }
        self.jobs.len()
    }

    /// Gives the first stream a job.
    pub fn first(&self, op: Op, job: Job) -> usize {
        let first = self.jobs.first();
        first.map_or(0, |sender| {
            let _ = sender.send((op, job));
            1
        })
    }

    /// Gives the stream for pages that the VM waits for a job.
    pub fn urgent(&self, op: Op, job: Job) -> usize {
        self.urgent.as_ref().map_or(0, |sender| {
            let _ = sender.send((op, job));
            1
        })
    }

    /// Ends the streams at once, and waits until none of them reads memory or notes digests any more: at most a block
    /// each.
    pub fn end(mut self) {
        self.cancel();
        let threads = std::mem::take(&mut self.threads);
        // They end when nobody has work for them.
        drop(self);
        for thread in threads {
            // One that panicked notes nothing any more either.
            let _ = thread.join();
        }
    }

    fn cancel(&self) {
        self.shared.pace.cancel();
        for socket in &self.sockets {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

struct Stream {
    link: Link,
    index: usize,
    count: usize,
    encoder: Encoder,
    /// Whether what is sent follows the last round.
    follows: bool,
}

/// An encrypted connection that keeps to the rate.
struct Link {
    tcp: TcpStream,
    tls: Connection,
    shared: Arc<Shared>,
    keeps_rate: bool,
}

impl Stream {
    /// Works until there are no more jobs, then says goodbye.
    fn run<F: Fn(Op, Result<(), SendError>)>(&mut self, jobs: &Receiver<(Op, Job)>, report: &F) {
        while let Ok((op, job)) = jobs.recv() {
            let result = self.work(&job);
            self.link.shared.counters.show();
            let failed = result.is_err();
            report(op, result);
            if failed {
                return;
            }
        }
        self.link.tls.send_close_notify();
        // The other end has everything it needs already.
        let _ = self.link.flush();
    }

    fn work(&mut self, job: &Job) -> Result<(), SendError> {
        match job {
            Job::Pages(set) => {
                if !self.link.shared.references.load(Ordering::Relaxed) {
                    self.encoder.forbid_references();
                }
                for block in set.blocks() {
                    if self.is_mine(&block) {
                        self.send_block(block)?;
                    }
                }
                Ok(())
            }
            Job::Urgent(block) => self.send_block(*block),
            Job::Stale(set) => {
                for block in set.blocks() {
                    if !self.is_mine(&block) {
                        continue;
                    }
                    for page in block.runs().flatten() {
                        let page = block.first_page() + u64::from(page);
                        self.link.shared.digests.set_zero(block.region, page);
                    }
                    self.link.write(&[&Frame::Stale(block).encode()])?;
                }
                Ok(())
            }
            Job::RoundEnd { round, last } => {
                self.encoder.end_round();
                if !*last {
                    self.link.shared.digests.settle();
                }
                self.follows |= last;
                let frame = Frame::RoundEnd {
                    round: *round,
                    last: *last,
                };
                self.link.write(&[&frame.encode()])
            }
            Job::Drained { post_copy } => {
                let frame = Frame::Drained {
                    post_copy: *post_copy,
                };
                self.link.write(&[&frame.encode()])
            }
            Job::DeviceState {
                chunk,
                early,
                piece,
            } => {
                let Ok(len) = u32::try_from(piece.len()) else {
                    return Err(io::Error::from(io::ErrorKind::FileTooLarge).into());
                };
                let frame = Frame::DeviceState {
                    chunk: *chunk,
                    early: *early,
                    len,
                };
                self.link.write(&[&frame.encode(), piece])
            }
        }
    }

    fn is_mine(&self, block: &Block) -> bool {
        self.index >= self.count || stream_of(block.region, block.index, self.count) == self.index
    }

    fn send_block(&mut self, block: Block) -> Result<(), SendError> {
        let began = Instant::now();
        let mut room = self.encoder.room(&block);
        for run in block.runs() {
            let first = block.first_page() + u64::from(run.start);
            let (pages, rest) = room.split_at_mut(run.len() * PAGE);
            let region = usize::from(block.region);
            self.link
                .shared
                .ram
                .read(region, first * PAGE_BYTES, pages)?;
            room = rest;
        }
        let shared = Arc::clone(&self.link.shared);
        let digests = if self.follows {
            shared.pulled.digests()
        } else {
            &*shared.digests
        };
        let encoded = self.encoder.encode(block, digests);
        let (counts, mut sent) = (encoded.counts, encoded.sent);
        let encoding = encoded.encoding;
        let ready = Instant::now();
        let before = encoded.adaptive.then(thread_cpu_time);
        self.link.write(&encoded.bytes)?;
        self.link.shared.counters.add(&counts);
        self.link.shared.counters.show();
        if let Some(before) = before {
            // What is not spent on a CPU is spent waiting: for the link, the rate, or a CPU.
            let sending = ready.elapsed();
            sent.send = (thread_cpu_time().saturating_sub(before)).min(sending);
            sent.blocked = sending - sent.send;
            sent.prepare = (ready - began).saturating_sub(encoding);
            self.encoder.sent(&sent);
        }
        Ok(())
    }
}

/// CPU time of this thread: clock_gettime(2), `CLOCK_THREAD_CPUTIME_ID`.
fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

impl Link {
    /// Sends bytes, given in parts.
    fn write(&mut self, parts: &[&[u8]]) -> Result<(), SendError> {
        // Short parts share a record and a system call with what follows.
        let mut pending = 0;
        for piece in parts.iter().flat_map(|part| part.chunks(PIECE)) {
            let admitted = if self.keeps_rate {
                self.shared.pace.admit(piece.len())
            } else {
                !self.shared.pace.is_cancelled()
            };
            if !admitted {
                return Err(SendError::Cancelled);
            }
            self.tls.writer().write_all(piece)?;
            pending += piece.len();
            if pending >= PIECE {
                self.flush()?;
                pending = 0;
            }
        }
        self.flush()
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
