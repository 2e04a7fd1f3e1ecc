//! Drives [`palanquin_engine::Destination`]: executes its actions on this machine and tells it how they ended.

mod container;
mod showing;

pub use self::container::{descriptor_of, wire_blocker};

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use palanquin_api::control::{Outcome, Phase};
use palanquin_engine::destination::{
    Destination, DestinationAction, DestinationDone, DestinationEnding, DestinationPhase, Op,
};
use palanquin_engine::ids::StreamSecret;
use palanquin_engine::message::{Demand, Offer, PRESENT_MAX, Present, Reason};
use palanquin_engine::order::Ledger;
use palanquin_engine::order::Order;
use palanquin_engine::pages::{PAGE_BYTES, PageSet, RamLayout};
use palanquin_engine::source::Failure;
use palanquin_engine::{DestinationRecord, Message, Time};
use palanquin_host::measure::Empty;
use palanquin_host::vm::{GuestRam, MissingPages, Vm};
use tracing::{debug, info, warn};

use self::container::{ContainerJob, ContainerWorker, ReleaseSlot};
use crate::agent::Agent;
use crate::chain::chain;
use crate::channel::Channel;
use crate::fail_point::{fail_point, fail_point_at, fail_point_record};
use crate::gate::{InClearance, told_state};
use crate::net::protocol::Incoming;
use crate::streams_in::{InEvent, InStreams, Pending, StreamsError};
use crate::tracked::{Tracked, api_error, ms};

/// How often the state is told.
const TICK: Duration = Duration::from_millis(200);

/// What happens to a session.
pub enum DestinationEvent {
    /// A message arrived on the connection of this generation.
    Message(u32, Message),
    /// The connection of this generation is lost.
    Lost(u32, Reason),
    /// What becomes of the streams that were handed over at this number.
    Streams(u32, InEvent),
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
        /// Its RAM had no data; absent where that does not matter, or could not be seen.
        empty: Option<Empty>,
    },
    /// What is known about the order, and what the gates say.
    Consulted(Box<Ledger>, Option<Box<InClearance>>),
    /// Evidence was made while the VM is being paused, and what was permitted judged anew.
    Attested {
        /// To report with.
        op: Op,
        /// What it rests on.
        clearance: Option<Box<InClearance>>,
        /// The evidence, or what refuses.
        result: Result<Vec<u8>, Reason>,
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

/// The control connection to the source, which may be another after a while.
pub type ChannelSlot = Arc<Mutex<Option<Arc<Channel>>>>;

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
    /// Accesses to pages that are not here, which wait.
    missing: Arc<OnceLock<Arc<dyn MissingPages>>>,
    /// Streams that have delivered everything.
    pushed: usize,
    ended: Arc<AtomicBool>,
    /// What waits for the streams.
    expected: Option<Op>,
    vm: Option<Arc<dyn Vm>>,
    ram: Option<Arc<dyn GuestRam>>,
    layout: Option<RamLayout>,
    /// The streams' side in the network process, with what it knows of the pages that have arrived.
    streams_in: Option<Arc<InStreams>>,
    /// Counts how often they were handed over.
    handed_over: u32,
    guest_bytes: u64,
    streams: usize,
    /// Whether the container was told to load.
    loading: bool,
    /// Set when it may load what was not saved early.
    release: ReleaseSlot,
    /// What the streams said that have delivered what was written until the pause: whether the VM runs before its last
    /// pages are here.
    drained: Vec<bool>,
    /// Streams that have delivered the round which is being received.
    delivered: usize,
    round: u32,
    began: Time,
    /// That the VM may come; absent where nothing is judged, and after a restart.
    clearance: Option<Box<InClearance>>,
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
            peer: channel.peer.name().to_owned(),
            tracked: Arc::clone(tracked),
            sender,
            worker,
            digest_seed: offer.digest_seed,
            comparable: true,
            missing: Arc::default(),
            pushed: 0,
            ended: Arc::new(AtomicBool::new(false)),
            expected: None,
            vm: None,
            ram: None,
            layout: None,
            streams_in: None,
            handed_over: 0,
            guest_bytes: 0,
            streams: 0,
            loading: false,
            release: ReleaseSlot::default(),
            drained: Vec::new(),
            delivered: 0,
            round: 0,
            began: agent.now(),
            clearance: None,
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
        // From here on accesses wait; the network process looks after them as soon as there is one.
        let missing = Arc::new(OnceLock::new());
        let found = container::wait_for_pages(vm, &missing);
        found.map_err(|failure| failure.reason)?;
        let worker = ContainerWorker::start(agent, order, Some(Arc::clone(vm)), sender.clone());
        let mut session = Self {
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
            missing,
            pushed: 0,
            ended: Arc::new(AtomicBool::new(false)),
            expected: None,
            vm: Some(Arc::clone(vm)),
            ram: Some(ram),
            layout: Some(layout.clone()),
            streams_in: None,
            handed_over: 0,
            guest_bytes: 0,
            streams: 0,
            loading: false,
            release: ReleaseSlot::default(),
            drained: Vec::new(),
            delivered: 0,
            round: 0,
            began: agent.now(),
            clearance: None,
        };
        session.watch(vm);
        if let Err(reason) = session.make_streams() {
            warn!(%reason, "accesses to missing pages are looked after when the source is back");
        }
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
            DestinationEvent::Streams(number, _) if number != self.handed_over => {}
            DestinationEvent::Streams(_, event) => self.streams_told(now, event),
            DestinationEvent::Reserved {
                op,
                vm,
                ram,
                post_copy,
                empty,
            } => {
                self.watch(&vm);
                self.vm = Some(vm);
                self.ram = Some(ram);
                self.show_container(op, post_copy, empty);
            }
            DestinationEvent::Consulted(ledger, clearance) => self.consulted(&ledger, clearance),
            DestinationEvent::Attested {
                op,
                clearance,
                result,
            } => self.attested(op, clearance, result),
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
            DestinationAction::ConsultLedger(offer) => self.consult(&offer),
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
                self.layout = Some(layout);
                let count = streams + u16::from(urgent);
                self.expected = Some(op);
                if let Err(reason) = self.expect_streams(count, secret) {
                    self.expected = None;
                    let failure = Failure {
                        reason,
                        vm_gone: false,
                    };
                    self.report(op, Err(failure));
                }
            }
            DestinationAction::Attest { op, challenge } => self.attest(op, challenge),
            DestinationAction::TellReceived => {
                if let Err(error) = self.tell_received() {
                    let now = self.agent.now();
                    let reason = Reason::new("data-stream", chain(&error));
                    self.engine.handle_connection_lost(now, reason);
                }
            }
            DestinationAction::TellPresent => {
                if let Err(error) = self.tell_present() {
                    let now = self.agent.now();
                    let reason = Reason::new("memory", chain(&error));
                    self.engine.handle_connection_lost(now, reason);
                }
            }
            DestinationAction::EndPulling(op) => {
                let (streams, missing) = (self.streams_in.clone(), Arc::clone(&self.missing));
                let comparable = self.comparable;
                self.worker
                    .give(ContainerJob::EndPulling(op, missing, streams, comparable));
            }
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
            DestinationAction::LoadDeviceState(op) => match &self.streams_in {
                Some(streams) => {
                    self.loading = true;
                    let (streams, release) = (Arc::clone(streams), Arc::clone(&self.release));
                    self.worker.give(ContainerJob::Load(op, streams, release));
                }
                None => self.report(op, Err(missing("streams"))),
            },
            DestinationAction::ReleaseDeviceState { post_copy } => {
                if let Some(streams) = &self.streams_in {
                    if let Some(channel) = self.channel().filter(|_| post_copy) {
                        streams.ask_on(&channel);
                    }
                    let missing = post_copy.then(|| Arc::clone(&self.missing));
                    // Once only: the engine releases it once.
                    let _ = self.release.set(missing);
                    streams.device_state().release();
                }
            }
            DestinationAction::SealDeviceState(seal) => {
                if let Some(streams) = &self.streams_in {
                    streams.device_state().seal(seal);
                }
            }
            DestinationAction::ComputeRoot(op) => {
                let root = self.streams_in.as_ref().map(|streams| streams.root());
                let result = match root {
                    Some(Ok(root)) => Ok(DestinationDone::Root(root)),
                    Some(Err(error)) => Err(streams_failure(&error)),
                    None => Err(missing("digests")),
                };
                self.report(op, result);
            }
            DestinationAction::Activate(op) => {
                self.worker.give(ContainerJob::Activate(op));
            }
            DestinationAction::Terminate(op) => {
                self.close_streams();
                if let Some(streams) = &self.streams_in {
                    streams.device_state().cancel();
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

    /// Tells which pages of the round have arrived that the lost connection has cut.
    fn tell_received(&self) -> Result<(), StreamsError> {
        if let (Some(streams), Some(layout), Some(channel)) =
            (&self.streams_in, &self.layout, self.channel())
        {
            let pages = streams.received(layout, self.engine.rounds())?;
            tell(&channel, layout, &pages);
        }
        Ok(())
    }

    /// Tells which pages are here, and asks again for those that the VM waits for.
    fn tell_present(&self) -> Result<(), StreamsError> {
        let (Some(ram), Some(layout), Some(channel)) = (&self.ram, &self.layout, self.channel())
        else {
            return Ok(());
        };
        let mut pages = PageSet::empty(layout);
        for region in 0..layout.regions() {
            for extent in ram.data_extents(region)? {
                pages.insert(region, extent.start / PAGE_BYTES..extent.end / PAGE_BYTES);
            }
        }
        let mut wanted = Vec::new();
        if let Some(streams) = &self.streams_in {
            // Also what arrived and was given back by the guest since: it must not come again.
            wanted = streams.arrived(layout, &mut pages)?;
        }
        if !tell(&channel, layout, &pages) {
            return Ok(());
        }
        for (region, page) in wanted {
            if let Err(error) = channel.send(&Message::Demand(Demand { region, page })) {
                debug!(%error, "a page could not be asked for");
            }
        }
        if let Some(streams) = &self.streams_in {
            streams.ask_on(&channel);
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

    /// What writes pages; what it knows of them lasts as long as it does.
    fn make_streams(&mut self) -> Result<Arc<InStreams>, Reason> {
        if let Some(streams) = &self.streams_in {
            return Ok(Arc::clone(streams));
        }
        let internal = |what: &str| Reason::new("internal", what);
        let ram = self.ram.clone().ok_or_else(|| internal("no container"))?;
        let order = self.engine.order().ok_or_else(|| internal("no order"))?;
        let incoming = Incoming {
            migration: order.migration,
            host: order.source.clone(),
            regions: Vec::new(),
            digest_seed: self.digest_seed,
            streams: u16::try_from(self.streams).unwrap_or(u16::MAX),
            device_state_max: self.agent.config.limits.device_state.bytes(),
        };
        self.handed_over += 1;
        let (number, sender) = (self.handed_over, self.sender.clone());
        let report = move |event| {
            // A session that has ended wants no reports.
            let _ = sender.send(DestinationEvent::Streams(number, event));
        };
        let network = &self.agent.network;
        let streams = Arc::new(network.incoming(incoming, ram.as_ref(), report)?);
        if let Some(missing) = self.missing.get() {
            let waits = streams.wait(missing.as_ref()).and_then(Pending::done);
            waits.map_err(|error| Reason::new("connection", chain(&error)))?;
        }
        self.streams_in = Some(Arc::clone(&streams));
        Ok(streams)
    }

    fn expect_streams(&mut self, count: u16, secret: StreamSecret) -> Result<(), Reason> {
        let expected = self.make_streams()?;
        let expected = expected.expect(self.generation, count, secret);
        expected.map_err(|error| Reason::new("connection", chain(&error)))
    }

    fn streams_told(&mut self, now: Time, event: InEvent) {
        match event {
            InEvent::Open(generation) if generation == self.generation => {
                if let Some(op) = self.expected.take() {
                    self.report(op, Ok(DestinationDone::Done));
                }
            }
            InEvent::RoundEnd {
                generation,
                round,
                last,
            } if generation == self.generation => self.round_end(now, round, last),
            InEvent::EarlyState => self.engine.handle_early_state(now),
            InEvent::Drained {
                generation,
                post_copy,
            } if generation == self.generation => self.stream_drained(now, post_copy),
            InEvent::Pushed(generation) if generation == self.generation => {
                debug!("a stream has delivered all");
                self.pushed += 1;
                // With the one for pages that the VM waits for.
                if self.pushed == self.streams + 1 {
                    self.engine.handle_pushed(now);
                }
            }
            InEvent::Failed {
                generation,
                broken_link,
                why,
            } if generation == self.generation => {
                self.streams_failed(now, Reason::new("data-stream", why), broken_link);
            }
            InEvent::Lost => {
                warn!("the streams of this migration are lost with the network process");
                self.streams_in = None;
                // What has arrived is in the VM's memory; its digests are gone.
                self.comparable = false;
                let reason = Reason::new("data-stream", "the network process ended");
                // Nor can what arrives from now on be verified before the VM runs here.
                self.streams_failed(now, reason, false);
            }
            // Of streams that were closed meanwhile.
            _ => {}
        }
    }

    fn streams_failed(&mut self, now: Time, reason: Reason, broken_link: bool) {
        if self.engine.is_post_copy() && !self.engine.may_discard() {
            // The VM runs on what it has; the source dials again.
            warn!(%reason, "a data stream broke");
            self.engine.handle_connection_lost(now, reason);
        } else if broken_link && self.engine.may_discard() {
            self.engine.handle_connection_lost(now, reason);
        } else {
            self.engine.handle_abort(now, reason);
        }
    }

    /// One more stream has delivered what was written until the pause.
    fn stream_drained(&mut self, now: Time, post_copy: bool) {
        self.drained.push(post_copy);
        if self.drained.len() < self.streams {
            return;
        }
        if self.drained.len() > self.streams || self.drained.iter().any(|o| *o != post_copy) {
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
            fail_point(if last {
                "destination-last-round"
            } else {
                "destination-round"
            });
            self.engine.handle_round(now, round, last);
        }
    }

    fn close_streams(&mut self) {
        if let Some(streams) = &self.streams_in {
            streams.close();
        }
        self.expected = None;
    }

    fn publish(&mut self) {
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
        if let Some(streams) = &self.streams_in {
            self.guest_bytes = self.guest_bytes.max(streams.guest_bytes());
        }
        let guest = self.guest_bytes;
        self.tracked.update(|info| {
            info.phase = phase;
            info.rounds = self.engine.rounds();
            info.total_time_ms = ms(now - self.began);
            info.bytes_guest = guest;
            info.reason = self.engine.reason().map(|reason| reason.message.clone());
            info.memory_root = self.engine.root().map(|root| root.to_string());
        });
    }

    fn finish(mut self, ending: &DestinationEnding) {
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
            Some(reason) => {
                warn!(%reason, ?outcome, "ended");
                // What this host was told about itself; what it refused is another's.
                if matches!(ending, DestinationEnding::Discarded(_)) {
                    let state = told_state(&reason.code, &reason.message);
                    self.agent.remedy(state.into_iter());
                }
            }
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
            info.error = reason.map(|reason| api_error(reason, &[], outcome, false));
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

fn streams_failure(error: &StreamsError) -> Failure {
    Failure {
        reason: Reason::new("data-stream", chain(error)),
        vm_gone: false,
    }
}

fn missing(what: &str) -> Failure {
    Failure {
        reason: Reason::new("internal", format!("no {what} at this point")),
        vm_gone: false,
    }
}
