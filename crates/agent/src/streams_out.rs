//! The data streams of a migration that leaves, as the agent has them: the network process reads the pages and sends them.

use std::fs::File;
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use palanquin_engine::ids::{Root, Sha256, StreamSecret};
use palanquin_engine::message::Reason;
use palanquin_engine::pages::{Block, PageSet};
use palanquin_engine::progress::SentCounters;
use palanquin_engine::source::Op;

use tracing::debug;

use crate::data_send::{COUNTERS_BYTES, counters_from};
use crate::digest::Sha256Of;
use crate::net::port::Port;
use crate::net::protocol::{
    FromSending, ToSending, Told, Whom, Wire, WireJob, encode_blocks, encode_pages,
};
use crate::network::Flood;

/// Longest packet of the network process.
const PACKET_MAX: usize = 16 * 1024;
/// Longest piece of device state: goes within its packet.
const PIECE_MAX: usize = 56 * 1024;
/// Longest wait for a root.
const ROOT_TIMEOUT: Duration = Duration::from_secs(20);

/// What becomes of the streams.
pub enum OutEvent {
    /// They stand, or why not.
    Opened(Op, Result<(), Reason>),
    /// One has ended its part of a job; an error with a code.
    Done(Op, Result<(), Told>),
    /// The network process is gone, and what it knew of this migration.
    Lost,
}

/// Something for a stream to do.
pub enum Job<'a> {
    /// Send this stream's blocks of the set.
    Pages(&'a PageSet),
    /// Mark the end of a round.
    RoundEnd {
        /// The round.
        round: u32,
        /// Whether it was the last.
        last: bool,
    },
    /// Tell that this stream's blocks of the set come anew after the device state.
    Stale(&'a PageSet),
    /// Mark that the VM is paused, and that all was sent that was written until then.
    Drained {
        /// Whether the VM is to run at the destination before its last pages are there.
        post_copy: bool,
    },
}

/// The streams of a migration that leaves. Dropping it ends them, unless they were told to finish.
pub struct OutStreams {
    port: Arc<Port>,
    counters: File,
    /// Counted before, and seen since: what is shown never goes back.
    seen: Mutex<(SentCounters, SentCounters)>,
    roots: Mutex<Receiver<(u64, Root)>>,
    streams: AtomicUsize,
    urgent: AtomicBool,
}

impl OutStreams {
    /// At this port; events are reported from a thread of its own. `before` is what was counted already.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub fn new(
        port: Port,
        counters: File,
        before: SentCounters,
        report: impl Fn(OutEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let port = Arc::new(port);
        let (roots, receiver) = sync_channel(4);
        let from = Arc::clone(&port);
        let work = move || {
            let mut flood = Flood::default();
            // Whatever the reason: there is nobody to tell it to but who uses the streams.
            while let Ok(Some(packet)) = from.receive(None, PACKET_MAX) {
                let event = match FromSending::decoded(&packet.body) {
                    Ok(FromSending::Opened(op, told)) => {
                        let reason = told.map(|told| Reason::new(&told.code, told.message));
                        OutEvent::Opened(Op(op), reason.map_or(Ok(()), Err))
                    }
                    Ok(FromSending::Done(op, told)) => {
                        OutEvent::Done(Op(op), told.map_or(Ok(()), Err))
                    }
                    Ok(FromSending::Root(op, root)) => {
                        // More than were asked for are dropped.
                        let _ = roots.try_send((op, root));
                        continue;
                    }
                    Err(_) => break,
                };
                if flood.is_one() {
                    break;
                }
                report(event);
            }
            from.close();
            report(OutEvent::Lost);
        };
        std::thread::Builder::new()
            .name("streams-out".to_owned())
            .spawn(work)?;
        Ok(Self {
            port,
            counters,
            seen: Mutex::new((before, SentCounters::default())),
            roots: Mutex::new(receiver),
            streams: AtomicUsize::new(0),
            urgent: AtomicBool::new(false),
        })
    }

    /// Opens streams over these connections, in place of any that were open; where asked for, the last is for pages that
    /// the VM waits for. [`OutEvent::Opened`] tells how it went.
    ///
    /// # Errors
    ///
    /// The network process does not take it.
    pub fn open(
        &self,
        Op(op): Op,
        connections: &[TcpStream],
        urgent: bool,
        secret: StreamSecret,
        references: bool,
    ) -> io::Result<()> {
        let ordinary = connections.len() - usize::from(urgent && !connections.is_empty());
        self.streams.store(ordinary, Ordering::Relaxed);
        self.urgent.store(urgent, Ordering::Relaxed);
        let open = ToSending::Open {
            op,
            urgent,
            secret,
            references,
        };
        let fds: Vec<_> = connections.iter().map(AsFd::as_fd).collect();
        self.port.send(&open.encoded(), &fds)
    }

    fn tell(&self, what: &ToSending) -> bool {
        // One that is lost is reported by the thread that receives.
        self.port.send(&what.encoded(), &[]).is_ok()
    }

    fn job(&self, Op(op): Op, whom: Whom, job: WireJob, reports: usize) -> usize {
        if reports > 0 && self.tell(&ToSending::Job { op, whom, job }) {
            reports
        } else {
            0
        }
    }

    /// Gives every stream the same job, but not the one for pages that the VM waits for; gives how many reports come.
    pub fn all(&self, op: Op, job: &Job<'_>) -> usize {
        let job = match job {
            Job::Pages(pages) => WireJob::Pages(encode_pages(pages)),
            Job::Stale(pages) => WireJob::Stale(encode_pages(pages)),
            Job::RoundEnd { round, last } => WireJob::RoundEnd(*round, *last),
            Job::Drained { post_copy } => WireJob::Drained(*post_copy),
        };
        self.job(op, Whom::All, job, self.streams.load(Ordering::Relaxed))
    }

    /// What is written to it goes to the first stream as the device state. Reports of the pieces have this operation.
    pub fn device_state(&self, op: Op) -> DeviceStateOut {
        DeviceStateOut {
            port: Arc::clone(&self.port),
            op,
            chunk: 0,
            early: true,
            bytes: 0,
            early_bytes: 0,
            sha256: Sha256Of::default(),
        }
    }

    fn urgent_reports(&self) -> usize {
        usize::from(self.urgent.load(Ordering::Relaxed))
    }

    /// Sends a page that the VM waits for, on the stream for those.
    pub fn urgent(&self, op: Op, block: Block) -> usize {
        let block = encode_blocks(std::iter::once(block));
        let job = WireJob::Urgent(block);
        self.job(op, Whom::Urgent, job, self.urgent_reports())
    }

    /// Marks the end of a round on the stream for pages that the VM waits for.
    pub fn urgent_round_end(&self, op: Op, round: u32, last: bool) -> usize {
        let job = WireJob::RoundEnd(round, last);
        self.job(op, Whom::Urgent, job, self.urgent_reports())
    }

    /// From now on pages must not refer to what was sent before.
    pub fn forbid_references(&self) {
        self.tell(&ToSending::ForbidReferences);
    }

    /// Ends the streams at once.
    pub fn cancel(&self) {
        self.tell(&ToSending::Cancel);
    }

    /// Lets the streams end when they have done what they were given.
    pub fn finish(&self) {
        self.tell(&ToSending::Finish);
    }

    /// The root over the digests of the pages sent until the end of the last round, or after it. None if the network process is
    /// gone or too slow.
    pub fn root(&self, Op(op): Op, after: bool) -> Option<Root> {
        let roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.tell(&ToSending::Root(op, after)) {
            return None;
        }
        loop {
            match roots.recv_timeout(ROOT_TIMEOUT) {
                Ok((answered, root)) if answered == op => return Some(root),
                // An answer that came too late.
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }

    /// What was sent so far.
    pub fn counters(&self) -> SentCounters {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, since) = &mut *seen;
        let mut bytes = [0; COUNTERS_BYTES];
        if self.counters.read_exact_at(&mut bytes, 0).is_ok() {
            *since = combine(*since, counters_from(&bytes), u64::max);
        }
        combine(*before, *since, u64::saturating_add)
    }
}

/// The device state on its way to the first stream.
pub struct DeviceStateOut {
    port: Arc<Port>,
    op: Op,
    chunk: u32,
    early: bool,
    bytes: u64,
    early_bytes: u64,
    sha256: Sha256Of,
}

impl DeviceStateOut {
    /// What is written from now on was saved after the pause.
    pub fn paused(&mut self) {
        self.early = false;
        self.early_bytes = self.bytes;
    }

    /// Length and digest of what was written.
    pub fn finish(self) -> (u64, Sha256) {
        let (bytes, early_bytes) = (self.bytes, self.early_bytes);
        debug!(bytes, early_bytes, "the device state is saved");
        (self.bytes, self.sha256.finish())
    }
}

impl Write for DeviceStateOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(PIECE_MAX)];
        self.sha256.update(piece);
        let Op(op) = self.op;
        let job = ToSending::Job {
            op,
            whom: Whom::First,
            job: WireJob::DeviceState(self.chunk, piece.to_vec().into(), self.early),
        };
        self.port.send(&job.encoded(), &[])?;
        self.chunk = self
            .chunk
            .checked_add(1)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        self.bytes += piece.len() as u64;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for OutStreams {
    fn drop(&mut self) {
        self.port.close();
    }
}

fn combine(a: SentCounters, b: SentCounters, with: impl Fn(u64, u64) -> u64) -> SentCounters {
    SentCounters {
        pages_raw: with(a.pages_raw, b.pages_raw),
        pages_delta: with(a.pages_delta, b.pages_delta),
        pages_duplicate: with(a.pages_duplicate, b.pages_duplicate),
        pages_compressed: with(a.pages_compressed, b.pages_compressed),
        saved_bytes: with(a.saved_bytes, b.saved_bytes),
        pages_zero: with(a.pages_zero, b.pages_zero),
        wire_bytes: with(a.wire_bytes, b.wire_bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn streams() -> (OutStreams, Port, Receiver<OutEvent>) {
        let (ours, theirs) = Port::pair().unwrap();
        let (sender, events) = channel();
        let before = SentCounters {
            pages_raw: 5,
            ..Default::default()
        };
        let counters = crate::network::counters(COUNTERS_BYTES).unwrap();
        let report = move |event| {
            let _ = sender.send(event);
        };
        let streams = OutStreams::new(ours, counters, before, report).unwrap();
        (streams, Port::from_fd(theirs).unwrap(), events)
    }

    #[test]
    fn counters_go_on_from_what_was_counted_before_and_never_go_back() {
        let (streams, _process, _events) = streams();
        let mirror = streams.counters.try_clone().unwrap();
        mirror.write_all_at(&7_u64.to_le_bytes(), 0).unwrap();
        assert_eq!(streams.counters().pages_raw, 12);
        mirror.write_all_at(&1_u64.to_le_bytes(), 0).unwrap();
        assert_eq!(streams.counters().pages_raw, 12);
        mirror.write_all_at(&[0xff; 8], 0).unwrap();
        assert_eq!(streams.counters().pages_raw, u64::MAX);
        mirror.set_len(0).unwrap();
        assert_eq!(streams.counters().pages_raw, u64::MAX);
    }

    #[test]
    fn a_network_process_that_ends_or_floods_is_lost() {
        let (streams, process, events) = streams();
        let done = FromSending::Done(1, None).encoded();
        let flood = std::thread::spawn(move || while process.send(&done, &[]).is_ok() {});
        let told = events.iter().take_while(|e| !matches!(e, OutEvent::Lost));
        let began = std::time::Instant::now();
        let count = told.count() as f64;
        assert!(count <= Flood::BURST + Flood::RATE * began.elapsed().as_secs_f64() + 1.0);
        flood.join().unwrap();
        assert_eq!(streams.root(Op(1), false), None);
    }

    #[test]
    fn jobs_without_streams_have_no_reports() {
        let (streams, _process, _events) = streams();
        let job = Job::RoundEnd {
            round: 1,
            last: false,
        };
        assert_eq!(streams.all(Op(1), &job), 0);
        assert_eq!(streams.urgent_round_end(Op(1), 1, true), 0);
    }
}
