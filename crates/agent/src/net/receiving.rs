//! The data streams of a migration that arrives, in the network process.

use std::fs::File;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use palanquin_engine::MigrationId;
use palanquin_engine::ids::StreamSecret;
use palanquin_engine::pages::PageSet;
use palanquin_host::shared::SharedMissing;
use palanquin_host::vm::{SharedFaults, Window};
use tracing::{debug, warn};

use super::port::{BODY_MAX, Port};
use super::process::{Process, shared_ram, spawn};
use super::protocol::{
    Answer, FromReceiving, Incoming, ProtocolError, ToReceiving, WANTED_MAX, Wire, cut,
    encode_pages, layout,
};
use crate::chain::chain;
use crate::data_receive::{GuestBytes, Inbound, Report, Shared, receive};
use crate::data_send::Pulled;
use crate::digest::Digests;
use crate::received::Received;
use crate::stream_proof::{Opening, exporter_context};
use crate::tls::Authenticated;
use crate::waiting::{Asking, ChannelSlot, Waiting};

/// A migration that arrives.
pub(super) struct Receiving {
    pub(super) migration: MigrationId,
    port: Arc<Port>,
    host: String,
    shared: Arc<Shared>,
    /// Digests of what is waited for.
    pulled: Arc<Pulled>,
    control: ChannelSlot,
    expected: Mutex<Option<Expected>>,
    sockets: Mutex<Vec<TcpStream>>,
    receivers: Mutex<Vec<JoinHandle<()>>>,
}

/// What the streams are made of.
struct Expected {
    generation: u32,
    streams: Vec<Option<Inbound>>,
    secret: StreamSecret,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Receiving {
    pub(super) fn new(
        port: Port,
        incoming: Incoming,
        counters: File,
        regions: Vec<OwnedFd>,
    ) -> Result<Self, palanquin_host::Error> {
        let ram = Arc::new(shared_ram(&incoming.regions, regions)?);
        let layout = layout(&incoming.regions)
            .ok_or_else(|| palanquin_host::Error::Ram("no layout".to_owned()))?;
        let port = Arc::new(port);
        let state_port = Arc::clone(&port);
        Ok(Self {
            pulled: Arc::new(Pulled::new(&layout, incoming.digest_seed)),
            shared: Arc::new(Shared {
                ram,
                digests: Digests::new(&layout, incoming.digest_seed),
                received: Received::new(&layout),
                layout,
                device_state: Box::new(move |piece, early| {
                    let piece = FromReceiving::DeviceState(piece.to_vec().into(), early);
                    state_port.send(&piece.encoded(), &[])
                }),
                device_state_max: incoming.device_state_max,
                guest_bytes: GuestBytes::mirrored(counters),
                streams: usize::from(incoming.streams),
                waiting: Default::default(),
                references: AtomicBool::new(true),
            }),
            migration: incoming.migration,
            port,
            host: incoming.host,
            control: ChannelSlot::default(),
            expected: Mutex::default(),
            sockets: Mutex::default(),
            receivers: Mutex::default(),
        })
    }

    /// Works until the agent closes the port.
    pub(super) fn run(&self, process: &Process) {
        if let Err(error) = self.work(process) {
            debug!(%error, "a migration that arrives has ended");
        }
        self.close();
        self.port.close();
    }

    fn work(&self, process: &Process) -> Result<(), Box<dyn std::error::Error>> {
        let mut asking = None;
        while let Some(packet) = self.port.receive(None, BODY_MAX)? {
            let (id, answer) = match ToReceiving::decoded(&packet.body)? {
                ToReceiving::Close => {
                    self.close();
                    continue;
                }
                ToReceiving::AskOn(control) => {
                    *lock(&self.control) = process.control(control);
                    continue;
                }
                ToReceiving::Expect {
                    id,
                    generation,
                    count,
                    secret,
                } => {
                    self.end_streams();
                    *lock(&self.expected) = Some(Expected {
                        generation,
                        streams: (0..count).map(|_| None).collect(),
                        secret,
                    });
                    (id, Answer::Done)
                }
                ToReceiving::Wait { id, pid, windows } => {
                    let uffd = packet.fds.into_iter().next();
                    let uffd = uffd.ok_or(ProtocolError::Descriptors(0))?;
                    let answer = match self.wait(uffd, pid, windows) {
                        Ok(begun) => {
                            asking = Some(begun);
                            Answer::Done
                        }
                        Err(error) => {
                            // Whoever waits for pages would wait for ever: with the port the agent loses all of this.
                            let answer = Answer::Failed(cut(&chain(&error)));
                            self.tell(&FromReceiving::Answer(id, answer))?;
                            return Err(error.into());
                        }
                    };
                    (id, answer)
                }
                ToReceiving::Arrived(id) => (id, self.arrived()),
                ToReceiving::Received(id, rounds) => {
                    let pages = self.shared.received.pages(rounds);
                    (id, Answer::Arrived(encode_pages(&pages), Vec::new()))
                }
                ToReceiving::Root(id) => (id, Answer::Root(self.shared.digests.root())),
                ToReceiving::Pulled(id) => {
                    asking = None;
                    let answer = match self.shared.waiting.get() {
                        Some(waiting) => {
                            Answer::Pulled(waiting.digests().root(), waiting.waits_log2_us())
                        }
                        None => Answer::Failed("nothing waits for pages".to_owned()),
                    };
                    (id, answer)
                }
            };
            self.tell(&FromReceiving::Answer(id, answer))?;
        }
        drop(asking);
        Ok(())
    }

    fn tell(&self, what: &FromReceiving) -> io::Result<()> {
        self.port.send(&what.encoded(), &[])
    }

    /// From now on accesses to pages that are not here wait, and the source is asked for them.
    fn wait(
        &self,
        uffd: OwnedFd,
        pid: u32,
        windows: Vec<Vec<(u64, u64, u64)>>,
    ) -> Result<Asking, io::Error> {
        let window = |(address, offset, len)| Window {
            address,
            offset,
            len,
        };
        let windows = windows
            .into_iter()
            .map(|list| list.into_iter().map(window).collect())
            .collect();
        let missing = Arc::new(SharedMissing::new(SharedFaults { uffd, pid, windows }));
        let shared = &self.shared;
        let ram = Arc::clone(&shared.ram);
        let waiting = Waiting::new(missing, ram, &shared.layout, Arc::clone(&self.pulled));
        if shared.waiting.set(waiting).is_err() {
            return Err(io::Error::other("pages are waited for already"));
        }
        shared.references.store(false, Ordering::Relaxed);
        let present = Arc::clone(shared);
        spawn("present", move || {
            if let Some(waiting) = present.waiting.get()
                && let Err(error) = waiting.note_present()
            {
                debug!(%error, "pages that are here are not known");
            }
        });
        Asking::start(Arc::clone(shared) as _, Arc::clone(&self.control))
    }

    fn arrived(&self) -> Answer {
        let mut pages = PageSet::empty(&self.shared.layout);
        let mut wanted = Vec::new();
        if let Some(waiting) = self.shared.waiting.get() {
            waiting.add_arrived(&mut pages);
            let named = waiting.wanted().into_iter().take(WANTED_MAX);
            wanted.extend(named.filter_map(|(region, page)| Some((region.try_into().ok()?, page))));
        }
        Answer::Arrived(encode_pages(&pages), wanted)
    }

    fn close(&self) {
        // First: streams that are just being started are among the sockets then.
        *lock(&self.expected) = None;
        for socket in lock(&self.sockets).drain(..) {
            // One that is closed already is as good.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Closes the streams, and waits until nothing of them is written any more: it would lie over what the next ones
    /// bring. They wait for their sockets, and for the agent to take their reports.
    fn end_streams(&self) {
        self.close();
        let receivers = std::mem::take(&mut *lock(&self.receivers));
        for thread in receivers {
            // One that panicked writes nothing any more either.
            let _ = thread.join();
        }
        self.shared.received.begin();
    }

    /// A stream that claims to belong to this migration.
    pub(super) fn admit(&self, stream: Authenticated, opening: Opening) {
        let peer = stream.peer.clone();
        if let Err(problem) = self.try_admit(stream, opening) {
            warn!(%peer, problem, index = opening.index, "a data stream was refused");
        }
    }

    fn try_admit(&self, stream: Authenticated, opening: Opening) -> Result<(), &'static str> {
        let mut slot = lock(&self.expected);
        let expected = slot.as_mut().ok_or("no streams are expected now")?;
        if stream.peer.name() != self.host {
            return Err("it comes from another host than the migration");
        }
        let place = expected.streams.get_mut(usize::from(opening.index));
        let place = place.ok_or("there is no stream of this index")?;
        if place.is_some() {
            return Err("this stream is open already");
        }
        let context = exporter_context(opening.migration, opening.index);
        let exporter = stream.exporter(&context).map_err(|_| "no exporter")?;
        if !opening.holds(&expected.secret, &exporter) {
            return Err("its proof does not hold");
        }
        *place = Some(Inbound::new(stream));
        if expected.streams.iter().all(Option::is_some)
            && let Some(expected) = slot.take()
        {
            self.start(expected);
        }
        Ok(())
    }

    /// All streams are here.
    fn start(&self, expected: Expected) {
        let generation = expected.generation;
        let _ = self.tell(&FromReceiving::Streams(generation));
        if expected.streams.len() > self.shared.streams {
            // One is for pages that are waited for. The first of them should not wait for this as well.
            let pulled = Arc::clone(&self.pulled);
            spawn("pulled", move || {
                pulled.digests();
            });
        }
        for (index, mut inbound) in (0..).zip(expected.streams.into_iter().flatten()) {
            let (shared, port) = (Arc::clone(&self.shared), Arc::clone(&self.port));
            let socket = inbound.socket();
            let socket = socket.map(|socket| lock(&self.sockets).push(socket));
            let work = move || {
                receive(&mut inbound, index, &shared, &|report| {
                    let told = match report {
                        Report::RoundEnd { round, last } => {
                            FromReceiving::RoundEnd(generation, round, last)
                        }
                        Report::Drained { post_copy } => {
                            FromReceiving::Drained(generation, post_copy)
                        }
                        Report::Pushed => FromReceiving::Pushed(generation),
                        Report::Failed(error) => {
                            let broken = error.is_broken_link();
                            FromReceiving::Failed(generation, broken, cut(&chain(&error)))
                        }
                    };
                    // An agent that has closed the port wants no reports.
                    let _ = port.send(&told.encoded(), &[]);
                });
                // Whatever the reason was: the other end must not go on sending to nobody.
                inbound.close();
            };
            let started = socket.and_then(|()| {
                thread::Builder::new()
                    .name(format!("receive-{index}"))
                    .spawn(work)
                    .map(|thread| lock(&self.receivers).push(thread))
            });
            if let Err(error) = started {
                let why = format!("no thread for a stream: {error}");
                let _ = self.tell(&FromReceiving::Failed(generation, false, why));
            }
        }
    }
}
