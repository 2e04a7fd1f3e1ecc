//! Drives [`palanquin_engine::Destination`]: executes its actions on this machine and tells it how they ended.

mod container;

pub use self::container::{descriptor_of, wire_blocker};

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use palanquin_api::control::{Outcome, Phase};
use palanquin_engine::destination::{
    Destination, DestinationAction, DestinationDone, DestinationEnding, DestinationPhase, Op,
};
use palanquin_engine::ids::StreamSecret;
use palanquin_engine::message::{Offer, PRESENT_MAX, Present, Reason};
use palanquin_engine::order::Order;
use palanquin_engine::pages::{PAGE_BYTES, PageSet, RamLayout};
use palanquin_engine::source::Failure;
use palanquin_engine::{DestinationRecord, Message, Time};
use palanquin_host::vm::{GuestRam, Vm};
use tracing::{debug, info, warn};

use self::container::{ContainerJob, ContainerWorker};
use crate::agent::Agent;
use crate::channel::Channel;
use crate::data_receive::{Inbound, Report, Shared, receive};
use crate::device_state::DeviceState;
use crate::digest::Digests;
use crate::fail_point::{fail_point, fail_point_at, fail_point_record};
use crate::received::Received;
use crate::source_session::chain;
use crate::stream_proof::{Opening, exporter_context};
use crate::tls::Authenticated;
use crate::tracked::{Tracked, api_error, ms};
use crate::waiting::{self, Asking, ChannelSlot};

/// How often the state is told.
const TICK: Duration = Duration::from_millis(200);

/// What happens to a session.
pub enum DestinationEvent {
    /// A message arrived on the connection of this generation.
    Message(u32, Message),
    /// The connection of this generation is lost.
    Lost(u32, Reason),
    /// Somebody opened a data stream.
    Stream(Box<Authenticated>, Opening),
    /// A stream of this generation tells something.
    Data(u32, Report),
    /// The container was started.
    Reserved {
        /// To report with.
        op: Op,
        /// It.
        vm: Arc<dyn Vm>,
        /// Its RAM.
        ram: Arc<dyn GuestRam>,
        /// Whether it can run before all of its pages are here.
        post_copy: bool,
    },
    /// A job of the container has ended.
    Container(Op, Result<DestinationDone, Failure>),
    /// The hypervisor ended.
    ContainerGone,
    /// The source asks on another connection what became of this migration. If the VM runs here and needs pages, the
    /// connection is this session's from now on, and its generation is replied.
    Query(Arc<Channel>, Sender<Option<u32>>),
    /// Somebody wants to abort; the answer says whether that is still possible.
    Abort(Reason, Sender<bool>),
    /// Whoever receives messages wants to know when those before have been worked on.
    Sync(Sender<()>),
}

/// What the streams of a migration are made of.
struct Expected {
    op: Op,
    streams: Vec<Option<Inbound>>,
    urgent: bool,
    secret: StreamSecret,
    layout: RamLayout,
}

/// A destination at work.
pub struct DestinationSession {
    agent: Arc<Agent>,
    engine: Destination,
    channel: ChannelSlot,
    /// Counts the connections and the streams opened with them.
    generation: u32,
    /// Name of the source, as its certificate says.
    peer: String,
    tracked: Arc<Tracked>,
    sender: Sender<DestinationEvent>,
    worker: ContainerWorker,
    digest_seed: u64,
    /// Whether the digests of all pages that arrived are known: not after a restart.
    comparable: bool,
    /// After a restart, what asks for pages until the worker can.
    asking: Option<Asking>,
    /// Streams that have delivered everything.
    pushed: usize,
    ended: Arc<AtomicBool>,
    expected: Option<Expected>,
    vm: Option<Arc<dyn Vm>>,
    ram: Option<Arc<dyn GuestRam>>,
    shared: Option<Arc<Shared>>,
    sockets: Vec<TcpStream>,
    receivers: Vec<JoinHandle<()>>,
    streams: usize,
    /// Whether the container was told to load.
    loading: bool,
    /// What the streams said that have delivered what was written until the pause: whether the VM runs before its last
    /// pages are here.
    drained: Vec<bool>,
    /// Streams that have delivered the round which is being received.
    delivered: usize,
    round: u32,
    began: Time,
}

impl DestinationSession {
    /// With an engine that has been greeted already.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub fn new(
        agent: &Arc<Agent>,
        engine: Destination,
        offer: &Offer,
        channel: &Arc<Channel>,
        tracked: &Arc<Tracked>,
        sender: Sender<DestinationEvent>,
    ) -> std::io::Result<Self> {
        let worker = ContainerWorker::start(agent, &offer.order, None, sender.clone())?;
        Ok(Self {
            agent: Arc::clone(agent),
            engine,
            channel: Arc::new(Mutex::new(Some(Arc::clone(channel)))),
            generation: 0,
            peer: channel.peer.name.clone(),
            tracked: Arc::clone(tracked),
            sender,
            worker,
            digest_seed: offer.digest_seed,
            comparable: true,
            asking: None,
            pushed: 0,
            ended: Arc::new(AtomicBool::new(false)),
            expected: None,
            vm: None,
            ram: None,
            shared: None,
            sockets: Vec::new(),
            receivers: Vec::new(),
            streams: 0,
            loading: false,
            drained: Vec::new(),
            delivered: 0,
            round: 0,
            began: agent.now(),
        })
    }

    /// Goes on after a restart with a VM that needs pages which are still on the source. Accesses to pages that are not
    /// here wait when this returns.
    ///
    /// # Errors
    ///
    /// No thread can be had, or the hypervisor does not answer.
    pub fn recovered(
        agent: &Arc<Agent>,
        engine: Destination,
        order: &Order,
        vm: &Arc<dyn Vm>,
        layout: &RamLayout,
        tracked: &Arc<Tracked>,
        sender: Sender<DestinationEvent>,
    ) -> Result<Self, Reason> {
        let internal = |error: &dyn std::error::Error| Reason::new("internal", chain(error));
        let channel = ChannelSlot::default();
        let ram = vm.ram().map_err(|error| internal(&error))?;
        let shared = Arc::new(Shared {
            ram: Arc::clone(&ram),
            digests: Digests::new(layout, 0),
            received: Received::new(layout),
            layout: layout.clone(),
            device_state: DeviceState::new(agent.config.limits.device_state.bytes()),
            guest_bytes: Default::default(),
            streams: 0,
            waiting: Default::default(),
            references: AtomicBool::new(false),
        });
        let asking = container::wait_for_pages(vm, &shared, &channel);
        let asking = asking.map_err(|failure| failure.reason)?;
        let worker = ContainerWorker::start(agent, order, Some(Arc::clone(vm)), sender.clone());
        let session = Self {
            agent: Arc::clone(agent),
            engine,
            channel,
            generation: 0,
            peer: order.source.clone(),
            tracked: Arc::clone(tracked),
            sender,
            worker: worker.map_err(|error| internal(&error))?,
            digest_seed: 0,
            comparable: false,
            asking: Some(asking),
            pushed: 0,
            ended: Arc::new(AtomicBool::new(false)),
            expected: None,
            vm: Some(Arc::clone(vm)),
            ram: Some(ram),
            shared: Some(shared),
            sockets: Vec::new(),
            receivers: Vec::new(),
            streams: 0,
            loading: false,
            drained: Vec::new(),
            delivered: 0,
            round: 0,
            began: agent.now(),
        };
        session.watch(vm);
        Ok(session)
    }

    /// Works until the migration has ended.
    pub fn run(mut self, events: &Receiver<DestinationEvent>) {
        let ending = loop {
            if let Some(ending) = self.execute_all() {
                break ending;
            }
            self.publish();
            let now = self.agent.now();
            let until = self
                .engine
                .poll_timeout()
                .map_or(TICK, |at| (at - now).min(TICK));
            match events.recv_timeout(until) {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let reason = Reason::new("internal", "the session lost its events");
                    self.engine.handle_connection_lost(now, reason);
                }
            }
            let now = self.agent.now();
            if self.engine.poll_timeout().is_some_and(|at| now >= at) {
                self.engine.handle_timeout(now);
            }
        };
        self.ended.store(true, Ordering::Relaxed);
        self.close_streams();
        self.close_channel();
        self.asking = None;
        self.finish(&ending);
    }

    fn channel(&self) -> Option<Arc<Channel>> {
        self.slot().clone()
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<Channel>>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close_channel(&self) {
        if let Some(channel) = self.slot().take() {
            channel.close();
        }
    }

    fn handle(&mut self, event: DestinationEvent) {
        let now = self.agent.now();
        match event {
            DestinationEvent::Message(generation, message) if generation == self.generation => {
                debug!(message = message.name(), "received");
                fail_point_at("destination-received", message.name());
                self.engine.handle_message(now, message);
            }
            DestinationEvent::Lost(generation, reason) if generation == self.generation => {
                debug!(%reason, "connection lost");
                self.engine.handle_connection_lost(now, reason);
            }
            DestinationEvent::Message(..) | DestinationEvent::Lost(..) => {}
            DestinationEvent::Stream(authenticated, opening) => {
                let peer = authenticated.peer.clone();
                if let Err(problem) = self.admit(*authenticated, opening) {
                    warn!(%peer, problem, index = opening.index, "a data stream was refused");
                }
            }
            DestinationEvent::Data(generation, _) if generation != self.generation => {}
            DestinationEvent::Data(_, Report::Drained { post_copy }) => {
                self.stream_drained(now, post_copy);
            }
            DestinationEvent::Data(_, Report::RoundEnd { round, last }) => {
                self.round_end(now, round, last);
            }
            DestinationEvent::Data(_, Report::Pushed) => {
                debug!("a stream has delivered all");
                self.pushed += 1;
                // With the one for pages that the VM waits for.
                if self.pushed == self.streams + 1 {
                    self.engine.handle_pushed(now);
                }
            }
            DestinationEvent::Data(_, Report::Failed(error)) => {
                let reason = Reason::new("data-stream", chain(&error));
                if self.engine.is_post_copy() && !self.engine.may_discard() {
                    // The VM runs on what it has; the source dials again.
                    warn!(%reason, "a data stream broke");
                    self.engine.handle_connection_lost(now, reason);
                } else if error.is_broken_link() && self.engine.may_discard() {
                    self.engine.handle_connection_lost(now, reason);
                } else {
                    self.engine.handle_abort(now, reason);
                }
            }
            DestinationEvent::Reserved {
                op,
                vm,
                ram,
                post_copy,
            } => {
                self.watch(&vm);
                self.vm = Some(vm);
                self.ram = Some(ram);
                let done = DestinationDone::Reserved { post_copy };
                self.engine.handle_done(now, op, Ok(done));
            }
            DestinationEvent::Container(op, result) => {
                if let Err(Failure { reason, .. }) = &result {
                    // What comes of it is the engine's; that it happened may matter more when it is tried again.
                    warn!(%reason, "a step with the container failed");
                }
                debug!(?op, ok = result.is_ok(), "a step with the container ended");
                self.engine.handle_done(now, op, result);
            }
            DestinationEvent::ContainerGone => self.engine.handle_container_gone(now),
            DestinationEvent::Query(channel, reply) => {
                let generation = self.queried(now, channel);
                let _ = reply.send(generation);
            }
            DestinationEvent::Abort(reason, reply) => {
                // Who asked may have gone away.
                let _ = reply.send(self.engine.handle_abort(now, reason));
            }
            DestinationEvent::Sync(done) => drop(done.send(())),
        }
    }

    fn execute_all(&mut self) -> Option<DestinationEnding> {
        while let Some(action) = self.engine.poll_action() {
            if let DestinationAction::Finish(ending) = action {
                return Some(ending);
            }
            self.execute(action);
        }
        None
    }

    fn execute(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Send(message) => self.send(&message),
            DestinationAction::ConsultLedger(order) => {
                let now = self.agent.now();
                match self.agent.ledger(&order, &self.peer) {
                    Ok(ledger) => self.engine.handle_ledger(now, &ledger),
                    Err(error) => {
                        let reason = Reason::new("journal", chain(&error));
                        self.engine.handle_connection_lost(now, reason);
                    }
                }
            }
            DestinationAction::Journal(op, record) => self.journal(op, &record),
            DestinationAction::Reserve(op, offer) => {
                self.worker.give(ContainerJob::Reserve(op, Box::new(offer)));
            }
            DestinationAction::ExpectStreams {
                op,
                streams,
                urgent,
                secret,
                layout,
            } => {
                self.tracked.update(|info| info.streams = streams);
                self.streams = usize::from(streams);
                self.pushed = 0;
                let count = streams + u16::from(urgent);
                self.expected = Some(Expected {
                    op,
                    streams: (0..count).map(|_| None).collect(),
                    urgent,
                    secret,
                    layout,
                });
            }
            DestinationAction::TellReceived => {
                if let (Some(shared), Some(channel)) = (&self.shared, self.channel()) {
                    tell(&channel, &shared.layout, &shared.received.pages());
                }
            }
            DestinationAction::TellPresent => {
                if let Err(error) = self.tell_present() {
                    let now = self.agent.now();
                    let reason = Reason::new("memory", chain(&error));
                    self.engine.handle_connection_lost(now, reason);
                }
            }
            DestinationAction::EndPulling(op) => match &self.shared {
                Some(shared) => {
                    self.asking = None;
                    let shared = Arc::clone(shared);
                    self.worker
                        .give(ContainerJob::EndPulling(op, shared, self.comparable));
                }
                None => self.report(op, Err(missing("streams"))),
            },
            DestinationAction::Disconnect => {
                if let Some(reason) = self.engine.reason() {
                    warn!(%reason, "the connection is lost; waiting for the source");
                }
                self.close_channel();
                self.close_streams();
                if self.engine.is_waiting_for_source() {
                    self.next_generation();
                }
            }
            DestinationAction::LoadDeviceState { op, post_copy } => match &self.shared {
                Some(shared) => {
                    self.loading = true;
                    let channel = post_copy.then(|| Arc::clone(&self.channel));
                    let shared = Arc::clone(shared);
                    self.worker.give(ContainerJob::Load(op, shared, channel));
                }
                None => self.report(op, Err(missing("streams"))),
            },
            DestinationAction::SealDeviceState(seal) => {
                if let Some(shared) = &self.shared {
                    shared.device_state.seal(seal);
                }
            }
            DestinationAction::ComputeRoot(op) => {
                let root = self.shared.as_ref().map(|shared| shared.digests.root());
                let result = root
                    .map(DestinationDone::Root)
                    .ok_or_else(|| missing("digests"));
                self.report(op, result);
            }
            DestinationAction::Activate(op) => {
                self.worker.give(ContainerJob::Activate(op));
            }
            DestinationAction::Terminate(op) => {
                self.close_streams();
                if let Some(shared) = &self.shared {
                    shared.device_state.cancel();
                }
                if let Some(vm) = self.vm.as_ref().filter(|_| self.loading) {
                    // It may wait for a page that will never come.
                    vm.kill();
                }
                self.worker.give(ContainerJob::Terminate(op));
            }
            // Taken out by the caller.
            DestinationAction::Finish(_) => {}
        }
    }

    fn journal(&mut self, op: Op, record: &DestinationRecord) {
        debug!(?record, "journal");
        let Some(order) = self.engine.order() else {
            return self.report(op, Err(missing("order")));
        };
        let result = self.agent.store.record_destination(order, record);
        fail_point_record("destination-recorded", record);
        let result = result
            .map(|()| DestinationDone::Done)
            .map_err(|error| Failure {
                reason: Reason::new("journal", chain(&error)),
                vm_gone: false,
            });
        self.report(op, result);
    }

    fn report(&mut self, op: Op, result: Result<DestinationDone, Failure>) {
        let now = self.agent.now();
        self.engine.handle_done(now, op, result);
    }

    fn send(&self, message: &Message) {
        debug!(message = message.name(), "send");
        fail_point_at("destination-sends", message.name());
        // A channel that broke is reported by the thread that receives from it.
        if let Some(channel) = self.channel()
            && let Err(error) = channel.send(message)
        {
            debug!(%error, "send failed");
            channel.close();
        }
        fail_point_at("destination-sent", message.name());
    }

    /// The source asks what became of this migration; where the VM needs it, it has its connection back.
    fn queried(&mut self, now: Time, channel: Arc<Channel>) -> Option<u32> {
        let mut secret = StreamSecret([0; 32]);
        aws_lc_rs::rand::fill(&mut secret.0).ok()?;
        if !self.engine.handle_query(now, secret) {
            return None;
        }
        info!("the source is back");
        self.close_streams();
        self.close_channel();
        *self.slot() = Some(channel);
        self.next_generation();
        Some(self.generation)
    }

    /// What the connection and the streams of before still tell does not count, nor what they said of a round that is
    /// not whole.
    fn next_generation(&mut self) {
        self.generation += 1;
        self.delivered = 0;
        self.drained.clear();
    }

    /// Tells which pages are here, and asks again for those that the VM waits for.
    fn tell_present(&self) -> Result<(), palanquin_host::Error> {
        let (Some(ram), Some(shared), Some(channel)) = (&self.ram, &self.shared, self.channel())
        else {
            return Ok(());
        };
        let layout = &shared.layout;
        let mut pages = PageSet::empty(layout);
        for region in 0..layout.regions() {
            for extent in ram.data_extents(region)? {
                pages.insert(region, extent.start / PAGE_BYTES..extent.end / PAGE_BYTES);
            }
        }
        if let Some(waiting) = shared.waiting.get() {
            // Also what arrived and was given back by the guest since: it must not come again.
            waiting.add_arrived(&mut pages);
        }
        if !tell(&channel, layout, &pages) {
            return Ok(());
        }
        if let Some(waiting) = shared.waiting.get() {
            for (region, page) in waiting.wanted() {
                waiting::ask(&self.channel, region, page);
            }
        }
        Ok(())
    }

    fn watch(&self, vm: &Arc<dyn Vm>) {
        let (vm, ended, sender) = (Arc::clone(vm), Arc::clone(&self.ended), self.sender.clone());
        let watch = move || {
            while !ended.load(Ordering::Relaxed) {
                if vm.wait_ended(Duration::from_millis(500)) {
                    let _ = sender.send(DestinationEvent::ContainerGone);
                    return;
                }
            }
        };
        if let Err(error) = thread::Builder::new()
            .name("vm-watch".to_owned())
            .spawn(watch)
        {
            warn!(%error, "the container is not watched");
        }
    }

    /// Checks that a stream belongs to this migration, and starts all once the last is here.
    fn admit(&mut self, stream: Authenticated, opening: Opening) -> Result<(), &'static str> {
        let order = self.engine.order().ok_or("there is no order yet")?;
        let expected = self
            .expected
            .as_mut()
            .ok_or("no streams are expected now")?;
        if stream.peer.name != order.source {
            return Err("it comes from another host than the migration");
        }
        let slot = expected.streams.get_mut(usize::from(opening.index));
        let slot = slot.ok_or("there is no stream of this index")?;
        if slot.is_some() {
            return Err("this stream is open already");
        }
        let context = exporter_context(opening.migration, opening.index);
        let exporter = stream.exporter(&context).map_err(|_| "no exporter")?;
        if !opening.holds(&expected.secret, &exporter) {
            return Err("its proof does not hold");
        }
        *slot = Some(Inbound::new(stream));
        if expected.streams.iter().all(Option::is_some) {
            let result = self.start_streams();
            if let Some((op, result)) = result {
                self.report(op, result);
            }
        }
        Ok(())
    }

    fn start_streams(&mut self) -> Option<(Op, Result<DestinationDone, Failure>)> {
        let Expected {
            op,
            streams,
            urgent,
            layout,
            ..
        } = self.expected.take()?;
        let Some(ram) = self.ram.clone() else {
            return Some((op, Err(missing("container"))));
        };
        let generation = self.generation;
        // After a reconnection the pages go where they went before.
        let shared = self.shared.take().unwrap_or_else(|| {
            Arc::new(Shared {
                ram,
                digests: Digests::new(&layout, self.digest_seed),
                received: Received::new(&layout),
                layout,
                device_state: DeviceState::new(self.agent.config.limits.device_state.bytes()),
                guest_bytes: Default::default(),
                streams: streams.len() - usize::from(urgent),
                waiting: Default::default(),
                references: AtomicBool::new(true),
            })
        });
        self.shared = Some(Arc::clone(&shared));
        for (index, mut inbound) in (0..).zip(streams.into_iter().flatten()) {
            let (shared, sender) = (Arc::clone(&shared), self.sender.clone());
            let socket = inbound.socket().map(|socket| self.sockets.push(socket));
            let work = move || {
                receive(&mut inbound, index, &shared, &|report| {
                    // A session that has ended wants no reports.
                    let _ = sender.send(DestinationEvent::Data(generation, report));
                });
                // Whatever the reason was: the other end must not go on sending to nobody.
                inbound.close();
            };
            if let Err(error) = socket.and_then(|()| {
                thread::Builder::new()
                    .name(format!("receive-{index}"))
                    .spawn(work)
                    .map(|thread| self.receivers.push(thread))
            }) {
                let reason = Reason::new("internal", format!("no thread for a stream: {error}"));
                return Some((
                    op,
                    Err(Failure {
                        reason,
                        vm_gone: false,
                    }),
                ));
            }
        }
        Some((op, Ok(DestinationDone::Done)))
    }

    /// One more stream has delivered what was written until the pause.
    fn stream_drained(&mut self, now: Time, post_copy: bool) {
        self.drained.push(post_copy);
        if self.drained.len() < self.streams {
            return;
        }
        if self.drained.iter().any(|other| *other != post_copy) {
            let reason = Reason::new("peer-misbehaved", "streams contradict each other");
            self.engine.handle_abort(now, reason);
            return;
        }
        self.engine.handle_drained(now, post_copy);
    }

    fn round_end(&mut self, now: Time, round: u32, last: bool) {
        if round != self.round + 1 {
            let reason = Reason::new("peer-misbehaved", "a round ended out of turn");
            self.engine.handle_abort(now, reason);
            return;
        }
        self.delivered += 1;
        if self.delivered == self.streams {
            self.delivered = 0;
            self.round = round;
            if let Some(shared) = &self.shared {
                // The source sends nothing of the next before it knows.
                shared.received.forget();
            }
            fail_point(if last {
                "destination-last-round"
            } else {
                "destination-round"
            });
            self.engine.handle_round(now, round, last);
        }
    }

    fn close_streams(&mut self) {
        for socket in self.sockets.drain(..) {
            // One that is closed already is as good.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.expected = None;
        let receivers = std::mem::take(&mut self.receivers);
        if self.engine.is_waiting_for_source() {
            // What they wrote late would lie over what the next ones bring. They wait for nothing but their sockets.
            for thread in receivers {
                // One that panicked writes nothing any more either.
                let _ = thread.join();
            }
        }
    }

    fn publish(&self) {
        let phase = match self.engine.phase() {
            DestinationPhase::Preparing => Phase::Preparing,
            DestinationPhase::Reserving => Phase::Reserving,
            DestinationPhase::Receiving => Phase::PreCopy,
            DestinationPhase::Switchover => Phase::Switchover,
            DestinationPhase::PostCopy => Phase::PostCopy,
            DestinationPhase::Committing => Phase::Committing,
            DestinationPhase::Finishing | DestinationPhase::Ended => Phase::Erasing,
        };
        let now = self.agent.now();
        let guest = self
            .shared
            .as_ref()
            .map_or(0, |s| s.guest_bytes.load(Ordering::Relaxed));
        self.tracked.update(|info| {
            info.phase = phase;
            info.rounds = self.engine.rounds();
            info.total_time_ms = ms(now - self.began);
            info.bytes_guest = guest;
            info.reason = self.engine.reason().map(|reason| reason.message.clone());
            info.memory_root = self.engine.root().map(|root| root.to_string());
        });
    }

    fn finish(self, ending: &DestinationEnding) {
        self.publish();
        let (outcome, reason) = match ending {
            DestinationEnding::Owned => (Outcome::Completed, None),
            DestinationEnding::OwnedButEnded(reason) => (Outcome::VmEnded, Some(reason)),
            DestinationEnding::Discarded(reason) | DestinationEnding::Refused(reason) => {
                (Outcome::RunningOnSource, Some(reason))
            }
        };
        match reason {
            None => info!("the VM runs here"),
            Some(reason) => warn!(%reason, ?outcome, "ended"),
        }
        if let Some(order) = self.engine.order() {
            self.agent
                .destination_ended(order, ending, self.vm.as_ref());
        }
        self.tracked.forget_session();
        self.tracked.update(|info| {
            info.phase = Phase::Done;
            info.outcome = Some(outcome);
            info.verified = outcome == Outcome::Completed;
            if outcome == Outcome::Completed {
                info.percent = 100.0;
            }
            info.error = reason.map(|reason| api_error(reason, &[], outcome));
            info.reason = reason.map(|reason| reason.message.clone());
        });
        match (ending, self.engine.order()) {
            // It left no record, so it leaves nothing here either.
            (DestinationEnding::Refused(_), Some(order)) => self.agent.untrack(order.migration),
            (DestinationEnding::Refused(_), None) => {}
            _ => self.agent.keep_info(&self.tracked.info()),
        }
    }
}

/// Tells the source of pages that are here; false if the channel broke.
fn tell(channel: &Channel, layout: &RamLayout, pages: &PageSet) -> bool {
    let step = PRESENT_MAX as u64 * 8;
    for region in 0..layout.regions() {
        for first_page in (0..layout.pages(region)).step_by(PRESENT_MAX * 8) {
            let is_last =
                region + 1 == layout.regions() && first_page + step >= layout.pages(region);
            let present = Present {
                region: u16::try_from(region).unwrap_or(u16::MAX),
                first_page,
                bits: pages.bits(region, first_page, PRESENT_MAX),
                last: is_last,
            };
            if let Err(error) = channel.send(&Message::Present(present)) {
                debug!(%error, "send failed");
                channel.close();
                return false;
            }
        }
    }
    true
}

fn missing(what: &str) -> Failure {
    Failure {
        reason: Reason::new("internal", format!("no {what} at this point")),
        vm_gone: false,
    }
}
