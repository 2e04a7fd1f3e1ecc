//! The data streams of a migration that leaves, in the network process.

use std::fs::File;
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use palanquin_engine::frame::PAYLOAD_MAX;
use palanquin_engine::ids::StreamSecret;
use palanquin_engine::message::Reason;
use palanquin_engine::pages::RamLayout;
use palanquin_engine::source::Op;
use tracing::debug;

use super::port::{BODY_MAX, Port};
use super::process::{Process, shared_ram, spawn, tls_reason};
use super::protocol::{
    FromSending, Outgoing, ProtocolError, ToSending, Told, Whom, Wire, WireJob, check_block,
    decode_blocks, decode_pages, layout,
};
use crate::chain::chain;
use crate::data_send::{Counters, Job, Pulled, SendError, Senders, Shared};
use crate::digest::Digests;
use crate::pace::Pace;
use crate::stream_proof::{Opening, exporter_context};
use crate::tls::Authenticated;

/// A migration that leaves.
pub(super) struct Sending {
    process: Arc<Process>,
    port: Arc<Port>,
    outgoing: Outgoing,
    layout: RamLayout,
    ram: Arc<palanquin_host::shared::SharedRam>,
    digests: Arc<Digests>,
    pulled: Arc<Pulled>,
    counters: Arc<Counters>,
    streams: Mutex<Streams>,
}

#[derive(Default)]
struct Streams {
    /// Counts what was opened and given up, so that what comes too late is known.
    attempt: u64,
    open: Option<(Senders, Arc<Shared>)>,
}

/// How streams are to be opened.
struct ToOpen {
    op: u64,
    attempt: u64,
    urgent: bool,
    secret: StreamSecret,
    references: bool,
    connections: Vec<TcpStream>,
}

impl Sending {
    pub(super) fn new(
        process: &Arc<Process>,
        port: Port,
        outgoing: Outgoing,
        counters: File,
        regions: Vec<OwnedFd>,
    ) -> Result<Arc<Self>, palanquin_host::Error> {
        let ram = Arc::new(shared_ram(&outgoing.regions, regions)?);
        let layout = layout(&outgoing.regions)
            .ok_or_else(|| palanquin_host::Error::Ram("no layout".to_owned()))?;
        let seed = outgoing.digest_seed;
        Ok(Arc::new(Self {
            process: Arc::clone(process),
            port: Arc::new(port),
            ram,
            digests: Arc::new(Digests::new(&layout, seed)),
            pulled: Arc::new(Pulled::new(&layout, seed)),
            counters: Arc::new(Counters::mirrored(counters)),
            layout,
            outgoing,
            streams: Mutex::default(),
        }))
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works until the agent closes the port.
    pub(super) fn run(self: &Arc<Self>) {
        if let Err(error) = self.work() {
            debug!(%error, "a migration that leaves has ended");
        }
        self.cancel();
        self.port.close();
    }

    fn tell(&self, what: &FromSending) -> io::Result<()> {
        self.port.send(&what.encoded(), &[])
    }

    fn work(self: &Arc<Self>) -> Result<(), Box<dyn std::error::Error>> {
        while let Some(packet) = self.port.receive(None, BODY_MAX)? {
            match ToSending::decoded(&packet.body)? {
                ToSending::Open {
                    op,
                    urgent,
                    secret,
                    references,
                } => {
                    self.cancel();
                    let open = ToOpen {
                        op,
                        attempt: self.streams().attempt,
                        urgent,
                        secret,
                        references,
                        connections: packet.fds.into_iter().map(TcpStream::from).collect(),
                    };
                    let sending = Arc::clone(self);
                    spawn("open-streams", move || sending.open(open));
                }
                ToSending::Job { op, whom, job } => self.give(Op(op), whom, job)?,
                ToSending::ForbidReferences => {
                    if let Some((_, shared)) = &self.streams().open {
                        shared.references.store(false, Ordering::Relaxed);
                    }
                }
                ToSending::Cancel => self.cancel(),
                ToSending::Finish => drop(self.streams().open.take()),
                ToSending::Root(op, pulled) => {
                    let digests = if pulled {
                        self.pulled.digests()
                    } else {
                        &self.digests
                    };
                    self.tell(&FromSending::Root(op, digests.root()))?;
                }
            }
        }
        Ok(())
    }

    /// Ends the streams; when this returns nothing of them notes digests any more, which would be taken for what the next
    /// ones have sent.
    fn cancel(&self) {
        let mut streams = self.streams();
        streams.attempt += 1;
        if let Some((senders, _)) = streams.open.take() {
            senders.end();
        }
    }

    fn open(self: &Arc<Self>, open: ToOpen) {
        let (op, attempt) = (open.op, open.attempt);
        let told = match self.opened(open) {
            Ok((senders, shared)) => {
                let mut streams = self.streams();
                if streams.attempt == attempt {
                    streams.open = Some((senders, shared));
                } else {
                    drop(streams);
                    senders.end();
                }
                None
            }
            Err(reason) => Some(Told::new(&reason.code, &reason.message)),
        };
        let _ = self.tell(&FromSending::Opened(op, told));
    }

    fn opened(self: &Arc<Self>, open: ToOpen) -> Result<(Senders, Arc<Shared>), Reason> {
        let streams = (0..)
            .zip(open.connections)
            .map(|(index, tcp)| self.open_stream(tcp, index, &open.secret))
            .collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(Shared {
            ram: Arc::clone(&self.ram) as _,
            digests: Arc::clone(&self.digests),
            pulled: Arc::clone(&self.pulled),
            counters: Arc::clone(&self.counters),
            pace: Pace::new(self.outgoing.bandwidth_bytes_per_s),
            compress: serde_json::from_str(&self.outgoing.compress).unwrap_or_default(),
            references: AtomicBool::new(open.references),
        });
        let port = Arc::clone(&self.port);
        let report = move |Op(op): Op, result: Result<(), SendError>| {
            let told = result.err().map(|error| {
                let code = match error {
                    SendError::Cancelled => CANCELLED,
                    SendError::Io(_) => LOST,
                    SendError::Memory(_) => "memory",
                };
                Told::new(code, &chain(&error))
            });
            // An agent that has closed the port wants no reports.
            let _ = port.send(&FromSending::Done(op, told).encoded(), &[]);
        };
        if open.urgent {
            // The first page that is waited for should not wait for this as well.
            let pulled = Arc::clone(&self.pulled);
            spawn("pulled", move || {
                pulled.digests();
            });
        }
        let senders = Senders::start(streams, open.urgent, &shared, &report)
            .map_err(|error| Reason::new("internal", error.to_string()))?;
        Ok((senders, shared))
    }

    fn open_stream(
        &self,
        tcp: TcpStream,
        index: u16,
        secret: &StreamSecret,
    ) -> Result<Authenticated, Reason> {
        let Outgoing {
            migration, host, ..
        } = &self.outgoing;
        let connected = self.process.tls.connect(tcp, host, true);
        let mut stream = connected.map_err(|error| tls_reason(&error))?;
        let exporter = stream
            .exporter(&exporter_context(*migration, index))
            .map_err(|error| Reason::new("connection", error.to_string()))?;
        let opening = Opening::new(secret, *migration, index, &exporter);
        let broke = |error: io::Error| Reason::new("connection", chain(&error));
        stream
            .connection
            .writer()
            .write_all(&opening.encode())
            .map_err(broke)?;
        while stream.connection.wants_write() {
            stream
                .connection
                .write_tls(&mut stream.tcp)
                .map_err(broke)?;
        }
        Ok(stream)
    }

    fn give(&self, op: Op, whom: Whom, job: WireJob) -> Result<(), ProtocolError> {
        let job = match job {
            WireJob::Pages(blocks) => Job::Pages(Arc::new(decode_pages(&blocks, &self.layout)?)),
            WireJob::Stale(blocks) => Job::Stale(Arc::new(decode_pages(&blocks, &self.layout)?)),
            WireJob::Urgent(blocks) => {
                let block = decode_blocks(&blocks)?.next();
                let block = block.ok_or(ProtocolError::OutOfBounds("list of blocks"))?;
                check_block(&block, &self.layout)?;
                Job::Urgent(block)
            }
            WireJob::RoundEnd(round, last) => Job::RoundEnd { round, last },
            WireJob::DeviceState(chunk, piece, early) if piece.len() <= PAYLOAD_MAX => {
                Job::DeviceState {
                    chunk,
                    early,
                    piece: Vec::from(piece).into(),
                }
            }
            WireJob::DeviceState(..) => return Err(ProtocolError::OutOfBounds("device state")),
            WireJob::Drained(post_copy) => Job::Drained { post_copy },
        };
        // Streams that were closed meanwhile have told so.
        if let Some((senders, _)) = &self.streams().open {
            match whom {
                Whom::All => senders.all(op, &job),
                Whom::First => senders.first(op, job),
                Whom::Urgent => senders.urgent(op, job),
            };
        }
        Ok(())
    }
}

/// Code of what was given up.
pub(crate) const CANCELLED: &str = "cancelled";
/// Code of a stream that the path broke.
pub(crate) const LOST: &str = "connection-lost";
