//! Drives [`palanquin_engine::Source`]: executes its actions on this machine and tells it how they ended.

mod clearance;
mod fault_wait;
mod pages;
mod vm_worker;

use std::collections::HashMap;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use palanquin_api::control::{Compress, Decision, Downtime, Outcome, Phase};
use palanquin_engine::ids::StreamSecret;
use palanquin_engine::message::{Reason, Verdict};
use palanquin_engine::pages::{PAGE_BYTES, PageSet, RamLayout};
use palanquin_engine::progress::SentCounters;
use palanquin_engine::source::{
    AbortDisposition, Ending, Failure, Op, RoundMark, Source, SourceAction, SourceDone, SourcePhase,
};
use palanquin_engine::{Message, Time};
use palanquin_host::vm::{Throttle, Vm, WriteTracker};
use tracing::{debug, info, warn};

use self::fault_wait::fault_wait;
use self::vm_worker::{VmJob, VmWorker};
use crate::agent::Agent;
use crate::chain::chain;
use crate::channel::{BACKLOG_MAX, Channel, ChannelError};
use crate::dial::{dial, reach};
use crate::fail_point::{fail_point, fail_point_at, fail_point_record};
use crate::farewell;
use crate::gate::OutClearance;
use crate::net::protocol::{Outgoing, Told};
use crate::net::{CANCELLED, LOST};
use crate::streams_out::{Job, OutEvent, OutStreams};
use crate::tracked::{Tracked, api_error, ms};

/// How often progress is told.
const TICK: Duration = Duration::from_millis(100);

/// What happens to a session.
pub enum SourceEvent {
    /// A connection stands.
    Connected(u32, Arc<Channel>),
    /// It does not, or not any more.
    Lost(u32, Reason),
    /// A message arrived.
    Message(u32, Message),
    /// The connections for streams stand, or not.
    Connections(Op, StreamSecret, Result<Vec<TcpStream>, Reason>),
    /// What becomes of the streams that were handed over at this number.
    Streams(u32, OutEvent),
    /// The VM worker has ended a job.
    Vm(Op, Result<SourceDone, Failure>),
    /// The hypervisor ended.
    VmGone,
    /// Somebody wants to abort; the answer says whether that is still possible.
    Abort(Reason, Sender<AbortDisposition>),
    /// The operator says what became of the VM.
    Assert(Verdict),
    /// Ask the destination now.
    Redial,
    /// Whoever receives messages wants to know when those before have been worked on.
    Sync(Sender<()>),
}

/// Parameters beyond the engine's.
pub struct SourceParams {
    /// Limit of the rate.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// How pages are made shorter.
    pub compress: Compress,
    /// Layout of the VM's RAM; absent after a restart.
    pub layout: Option<RamLayout>,
    /// Seed of the page digests.
    pub digest_seed: u64,
    /// Largest device state.
    pub device_state_max: u64,
    /// That the VM may leave; absent where nothing is judged, and after a restart.
    pub clearance: Option<OutClearance>,
}

/// A source at work.
pub struct SourceSession {
    agent: Arc<Agent>,
    engine: Source,
    vm: Option<Arc<dyn Vm>>,
    params: SourceParams,
    tracked: Arc<Tracked>,
    sender: Sender<SourceEvent>,
    worker: VmWorker,
    ended: Arc<AtomicBool>,
    /// Whether the streams include one for pages that the VM waits for.
    urgent: bool,
    channel: Option<Arc<Channel>>,
    /// Which connection that is.
    attempt: u32,
    tracker: Option<Box<dyn WriteTracker>>,
    /// The streams' side in the network process, with what it knows of the pages that were sent.
    streams: Option<OutStreams>,
    /// Whether they are open.
    open: bool,
    /// The operation that opens them.
    opening: Option<Op>,
    /// Counts how often they were handed over.
    handed_over: u32,
    /// What was sent so far.
    sent: SentCounters,
    /// The jobs that the streams are at, and how many reports are still to come.
    jobs: HashMap<Op, usize>,
    throttle: Option<Box<dyn Throttle>>,
    /// Whether this goes on after a restart, of the agent or its network process: what was sent before is not known.
    recovered: bool,
    /// Whether the hypervisor was made ready to save.
    prepared: bool,
    /// The operation with which the first stream reports pieces of the device state: that of the pause, where it begins.
    saving: Option<Op>,
    phase: SourcePhase,
    redialling: bool,
    /// Why a gate of this host refused.
    refusals: Vec<palanquin_trust::Reason>,
}

impl SourceSession {
    /// Takes the VM, where its hypervisor still lives.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub fn new(
        agent: &Arc<Agent>,
        engine: Source,
        vm: Option<Arc<dyn Vm>>,
        params: SourceParams,
        tracked: &Arc<Tracked>,
        sender: Sender<SourceEvent>,
    ) -> std::io::Result<Self> {
        let dir = agent.vm_dir(engine.order().vm);
        let limit = params.device_state_max;
        let worker = VmWorker::start(vm.clone(), dir, limit, engine.order().run, sender.clone())?;
        let ended = Arc::new(AtomicBool::new(false));
        let recovered = engine.is_recovered();
        if let Some(vm) = vm.clone() {
            let (ended, sender) = (Arc::clone(&ended), sender.clone());
            thread::Builder::new()
                .name("vm-watch".to_owned())
                .spawn(move || {
                    while !ended.load(Ordering::Relaxed) {
                        if vm.wait_ended(Duration::from_millis(500)) {
                            let _ = sender.send(SourceEvent::VmGone);
                            return;
                        }
                    }
                })?;
        }
        Ok(Self {
            agent: Arc::clone(agent),
            phase: engine.phase(),
            engine,
            vm,
            params,
            tracked: Arc::clone(tracked),
            sender,
            worker,
            ended,
            urgent: false,
            channel: None,
            attempt: 0,
            tracker: None,
            streams: None,
            open: false,
            opening: None,
            handed_over: 0,
            sent: SentCounters::default(),
            jobs: HashMap::new(),
            throttle: None,
            recovered,
            prepared: false,
            saving: None,
            redialling: false,
            refusals: Vec::new(),
        })
    }

    /// Works until the migration has ended.
    pub fn run(mut self, events: &Receiver<SourceEvent>) {
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
                    self.engine
                        .handle_abort(now, Reason::new("internal", "the session lost its events"));
                }
            }
            let now = self.agent.now();
            if self.engine.poll_timeout().is_some_and(|at| now >= at) {
                self.engine.handle_timeout(now);
            }
        };
        self.stop_copying();
        self.ended.store(true, Ordering::Relaxed);
        if let Some(channel) = self.channel.take() {
            channel.close();
        }
        self.vm = None;
        self.finish(&ending);
    }

    fn handle(&mut self, event: SourceEvent) {
        let now = self.agent.now();
        match event {
            // One that was given up meanwhile.
            SourceEvent::Connected(attempt, channel) if attempt < self.attempt => channel.close(),
            SourceEvent::Connected(attempt, channel) => {
                self.tracked.update(|info| {
                    info.cipher = Some(channel.cipher.clone());
                    info.key_exchange = Some(channel.key_exchange.clone());
                });
                if let Some(before) = self.channel.replace(channel) {
                    before.close();
                }
                self.attempt = attempt;
                self.engine.handle_connected(now, attempt);
            }
            SourceEvent::Lost(attempt, reason) => {
                debug!(%reason, "connection lost");
                self.engine.handle_connection_lost(now, attempt, reason);
            }
            SourceEvent::Message(attempt, message) => {
                debug!(message = message.name(), "received");
                fail_point_at("source-received", message.name());
                self.engine.handle_message(now, attempt, message);
            }
            // Of a connection that was lost meanwhile.
            SourceEvent::Connections(op, ..) if self.opening != Some(op) => {}
            SourceEvent::Connections(op, secret, result) => {
                let opened =
                    result.and_then(|connections| self.hand_over(op, secret, &connections));
                if let Err(reason) = opened {
                    self.fail(op, reason);
                }
            }
            SourceEvent::Streams(number, _) if number != self.handed_over => {}
            SourceEvent::Streams(_, OutEvent::Opened(op, result)) => {
                if self.jobs.remove(&op).is_some() {
                    self.open = result.is_ok();
                    match result {
                        Ok(()) => self.report(op, Ok(SourceDone::Done)),
                        Err(reason) => self.fail(op, reason),
                    }
                }
            }
            SourceEvent::Streams(_, OutEvent::Done(op, result)) => self.stream_job(now, op, result),
            SourceEvent::Streams(_, OutEvent::Lost) => self.streams_lost(),
            SourceEvent::Vm(op, result) => self.engine.handle_done(now, op, result),
            SourceEvent::VmGone => self.engine.handle_vm_gone(now),
            SourceEvent::Abort(reason, reply) => {
                // Who asked may have gone away.
                let _ = reply.send(self.engine.handle_abort(now, reason));
            }
            SourceEvent::Assert(verdict) => self.engine.handle_operator_verdict(now, verdict),
            SourceEvent::Redial => self.engine.handle_redial(now),
            SourceEvent::Sync(done) => drop(done.send(())),
        }
    }

    fn execute_all(&mut self) -> Option<Ending> {
        while let Some(action) = self.engine.poll_action() {
            if let SourceAction::Finish(ending) = action {
                return Some(ending);
            }
            self.execute(action);
        }
        None
    }

    fn execute(&mut self, action: SourceAction) {
        match action {
            SourceAction::Connect { attempt } => self.connect(attempt),
            SourceAction::Send(message) => self.send(&message),
            SourceAction::Disconnect => {
                if let Some(channel) = self.channel.take() {
                    channel.close();
                }
            }
            SourceAction::Journal(op, record) => {
                debug!(?record, "journal");
                let result = self.agent.store.record_source(self.engine.order(), &record);
                fail_point_record("source-recorded", &record);
                self.report(
                    op,
                    result
                        .map(|()| SourceDone::Done)
                        .map_err(|e| failure("journal", &e)),
                );
            }
            SourceAction::Vouch { op, challenge } => self.vouch(op, challenge),
            SourceAction::Judge {
                op,
                challenge,
                evidence,
                last,
            } => self.judge(op, challenge, &evidence, last),
            SourceAction::OpenStreams {
                op,
                streams,
                urgent,
                secret,
            } => {
                self.tracked.update(|info| info.streams = streams);
                self.urgent = urgent;
                self.open_streams(op, streams + u16::from(urgent), secret);
            }
            SourceAction::StartTracking(op) => {
                let result = self.start_tracking();
                self.report(op, result.map(|()| SourceDone::Done));
            }
            SourceAction::Collect { op, first } => {
                let began = std::time::Instant::now();
                let result = self.collect(first);
                let took_us = began.elapsed().as_micros();
                let pages = result.as_ref().map_or(0, PageSet::len);
                debug!(pages, took_us, "looked for written pages");
                self.report(op, result.map(SourceDone::Collected));
            }
            SourceAction::SendPages {
                op,
                pages,
                round,
                then,
            } => {
                self.send_pages(op, &pages, round, then);
            }
            SourceAction::Peek(op) => {
                let result = self.peek();
                self.report(op, result.map(SourceDone::Collected));
            }
            SourceAction::FindData(op) => {
                let result = self.find_data();
                self.report(op, result.map(SourceDone::Collected));
            }
            SourceAction::Throttle(share) => self.set_throttle(share),
            SourceAction::SendStale { op, pages } => self.send_stale(op, &pages),
            SourceAction::SendUrgent { op, block } => {
                fail_point(if self.engine.runs_on_destination() {
                    "source-serving"
                } else {
                    "source-serving-load"
                });
                let jobs = self.open_streams_now().map_or(0, |s| s.urgent(op, block));
                self.expect_jobs(op, jobs);
            }
            SourceAction::ComputePulledRoot(op) => {
                let streams = self.streams.as_ref().filter(|_| !self.recovered);
                let root = streams.and_then(|streams| streams.root(op, true));
                self.report(op, Ok(root.map_or(SourceDone::NoRoot, SourceDone::Root)));
            }
            SourceAction::CloseStreams => self.close_streams(),
            SourceAction::Pause { op, post_copy } => self.pause(op, post_copy),
            SourceAction::SaveDeviceState(op) => self.worker.give(VmJob::Save(op)),
            SourceAction::Resume(op) => self.worker.give(VmJob::Resume(op)),
            SourceAction::Erase(op) => self.worker.give(VmJob::Erase(op)),
            SourceAction::ComputeRoot(op) => {
                let root = self.streams.as_ref().and_then(|s| s.root(op, false));
                self.report(
                    op,
                    root.map(SourceDone::Root).ok_or_else(|| missing("digests")),
                );
            }
            SourceAction::StopCopying => self.stop_copying(),
            // Taken out by the caller.
            SourceAction::Finish(_) => {}
        }
    }

    fn report(&mut self, op: Op, result: Result<SourceDone, Failure>) {
        let now = self.agent.now();
        self.engine.handle_done(now, op, result);
    }

    fn send(&mut self, message: &Message) {
        let Some(channel) = &self.channel else { return };
        debug!(message = message.name(), "send");
        // A channel that broke is reported by the thread that receives from it.
        if let Err(error) = channel.send(message) {
            debug!(%error, "send failed");
            channel.close();
        }
        fail_point_at("source-sent", message.name());
    }

    fn connect(&self, attempt: u32) {
        let (agent, sender) = (Arc::clone(&self.agent), self.sender.clone());
        let host = self.engine.order().destination.clone();
        let work = move || {
            let channel = match dial(&agent, &host) {
                Ok(channel) => Arc::new(channel),
                Err(reason) => {
                    let _ = sender.send(SourceEvent::Lost(attempt, reason));
                    return;
                }
            };
            if sender
                .send(SourceEvent::Connected(attempt, Arc::clone(&channel)))
                .is_err()
            {
                return;
            }
            loop {
                for _ in 0..BACKLOG_MAX {
                    let event = match channel.receive() {
                        Ok(message) => SourceEvent::Message(attempt, message),
                        Err(error) => SourceEvent::Lost(attempt, channel_reason(&error)),
                    };
                    let lost = matches!(event, SourceEvent::Lost(..));
                    if sender.send(event).is_err() || lost {
                        return;
                    }
                }
                // Whoever sends faster than the session works waits.
                let (done, all_done) = std::sync::mpsc::channel();
                if sender.send(SourceEvent::Sync(done)).is_err() || all_done.recv().is_err() {
                    return;
                }
            }
        };
        self.spawn("control", attempt, work);
    }

    fn spawn(&self, name: &str, attempt: u32, work: impl FnOnce() + Send + 'static) {
        if let Err(error) = thread::Builder::new().name(name.to_owned()).spawn(work) {
            let reason = Reason::new("internal", format!("no thread for the connection: {error}"));
            let _ = self.sender.send(SourceEvent::Lost(attempt, reason));
        }
    }

    fn open_streams(&mut self, op: Op, streams: u16, secret: StreamSecret) {
        self.opening = Some(op);
        let (agent, sender) = (Arc::clone(&self.agent), self.sender.clone());
        let host = self.engine.order().destination.clone();
        let work = move || {
            let connections = (0..streams).map(|_| reach(&agent, &host)).collect();
            let _ = sender.send(SourceEvent::Connections(op, secret, connections));
        };
        self.spawn("open-streams", u32::MAX, work);
    }

    /// Gives the connections to the network process, which opens streams over them.
    fn hand_over(
        &mut self,
        op: Op,
        secret: StreamSecret,
        connections: &[TcpStream],
    ) -> Result<(), Reason> {
        if self.streams.is_none() {
            self.streams = Some(self.make_streams()?);
        }
        let references = !self.engine.runs_on_destination();
        if let Some(streams) = &self.streams {
            let opened = streams.open(op, connections, self.urgent, secret, references);
            opened.map_err(|error| Reason::new("connection", chain(&error)))?;
            self.jobs.insert(op, 1);
        }
        Ok(())
    }

    /// What reads and sends pages; what it knows of them lasts as long as it does.
    fn make_streams(&mut self) -> Result<OutStreams, Reason> {
        let (Some(vm), Some(_)) = (&self.vm, &self.params.layout) else {
            return Err(Reason::new("internal", "there is no VM to copy"));
        };
        let ram = vm
            .ram()
            .map_err(|error| Reason::new("memory", chain(&error)))?;
        self.handed_over += 1;
        let (number, sender) = (self.handed_over, self.sender.clone());
        let report = move |event| {
            // A session that has ended wants no reports.
            let _ = sender.send(SourceEvent::Streams(number, event));
        };
        let order = self.engine.order();
        let outgoing = Outgoing {
            migration: order.migration,
            host: order.destination.clone(),
            regions: Vec::new(),
            digest_seed: self.params.digest_seed,
            bandwidth_bytes_per_s: self.params.bandwidth_bytes_per_s,
            compress: serde_json::to_string(&self.params.compress).unwrap_or_default(),
        };
        let network = &self.agent.network;
        network.outgoing(outgoing, ram.as_ref(), self.sent, report)
    }

    fn fail(&mut self, op: Op, reason: Reason) {
        let failure = Failure {
            reason,
            vm_gone: false,
        };
        self.report(op, Err(failure));
    }

    fn open_streams_now(&self) -> Option<&OutStreams> {
        self.streams.as_ref().filter(|_| self.open)
    }

    /// The network process ended, and what it knew of the pages that were sent is lost.
    fn streams_lost(&mut self) {
        warn!("the streams of this migration are lost with the network process");
        self.streams = None;
        self.open = false;
        self.recovered = true;
        if self.engine.phase() == SourcePhase::PreCopy {
            // Without the digests the switchover could not be verified. The connection is lost too, and the destination
            // has to be told on another.
            let now = self.agent.now();
            let reason = Reason::new("connection-lost", "the network process ended");
            self.jobs.clear();
            let lost = reason.clone();
            self.engine.handle_connection_lost(now, self.attempt, lost);
            self.engine.handle_abort(now, reason);
            return;
        }
        let ops: Vec<Op> = self.jobs.drain().map(|(op, _)| op).collect();
        for op in ops {
            self.fail(
                op,
                Reason::new("connection-lost", "the network process ended"),
            );
        }
    }

    fn set_throttle(&mut self, share: f64) {
        if share >= 1.0 {
            self.throttle = None;
            return;
        }
        if self.throttle.is_none() {
            let throttle = self.vm.as_ref().map(|vm| vm.throttle());
            match throttle {
                Some(Ok(throttle)) => self.throttle = Some(throttle),
                Some(Err(error)) => return self.throttle_failed(&error),
                None => {}
            }
        }
        if let Some(throttle) = &mut self.throttle {
            if let Err(error) = throttle.set(share) {
                self.throttle = None;
                return self.throttle_failed(&error);
            }
            info!(share, "throttled");
        }
    }

    fn throttle_failed(&mut self, error: &palanquin_host::Error) {
        warn!(error = chain(error), "the VM cannot be throttled");
        let reason = Reason::new("throttle", chain(error));
        self.engine.handle_throttle_failed(&reason);
    }

    fn start_tracking(&mut self) -> Result<(), Failure> {
        let vm = self.vm.as_ref().ok_or_else(|| missing("VM"))?;
        self.prepared = true;
        vm.prepare_to_save()
            .map_err(|error| failure("prepare", &error))?;
        self.tracker = Some(
            vm.track_writes()
                .map_err(|error| failure("tracking", &error))?,
        );
        Ok(())
    }

    fn send_pages(&mut self, op: Op, pages: &PageSet, round: u32, then: RoundMark) {
        let Some(streams) = self.open_streams_now() else {
            return self.report(op, Err(missing("streams")));
        };
        let mut jobs = streams.all(op, &Job::Pages(pages));
        let last = then != RoundMark::End;
        let end = Job::RoundEnd { round, last };
        match then {
            RoundMark::None => {}
            RoundMark::Drained => jobs += streams.all(op, &Job::Drained { post_copy: false }),
            RoundMark::End | RoundMark::Last => jobs += streams.all(op, &end),
            RoundMark::Pushed => {
                jobs += streams.all(op, &end) + streams.urgent_round_end(op, round, last);
            }
        }
        fail_point(match then {
            // What saving the device state has written, under any strategy.
            RoundMark::Last => "source-last-round",
            // What devices look into, before a switchover to post-copy.
            RoundMark::None => "source-ahead",
            _ => "source-round",
        });
        self.expect_jobs(op, jobs);
    }

    fn pause(&mut self, op: Op, post_copy: bool) {
        match self.open_streams_now().map(|s| s.device_state(op)) {
            Some(out) => {
                self.saving = Some(op);
                let look = self.params.layout.clone().filter(|_| post_copy);
                self.worker.give(VmJob::Pause(op, out, look));
            }
            None => self.report(op, Err(missing("streams"))),
        }
    }

    fn send_stale(&mut self, op: Op, pages: &PageSet) {
        let Some(streams) = self.open_streams_now() else {
            return self.report(op, Err(missing("streams")));
        };
        let drained = Job::Drained { post_copy: true };
        let jobs = streams.all(op, &Job::Stale(pages)) + streams.all(op, &drained);
        // Before the first job whose pages may arrive while the VM runs there.
        streams.forbid_references();
        self.expect_jobs(op, jobs);
    }

    fn expect_jobs(&mut self, op: Op, jobs: usize) {
        if jobs == 0 {
            return self.report(op, Err(missing("streams")));
        }
        self.jobs.insert(op, jobs);
    }

    fn stream_job(&mut self, now: Time, op: Op, result: Result<(), Told>) {
        if self.saving == Some(op) && result.is_ok() {
            // A piece of the device state. That all have left says the end of the last round, which comes behind them.
            return;
        }
        if self.saving == Some(op) {
            self.jobs.insert(op, 1);
        }
        let Some(left) = self.jobs.get_mut(&op) else {
            // Of streams that were closed meanwhile.
            return;
        };
        match result {
            Ok(()) => {
                *left -= 1;
                if *left == 0 {
                    self.jobs.remove(&op);
                    self.engine.handle_done(now, op, Ok(SourceDone::Done));
                }
            }
            Err(told) if told.code == CANCELLED => {}
            Err(told) if told.code == LOST => {
                self.jobs.remove(&op);
                let reason = Reason::new(&told.code, told.message);
                self.engine.handle_stream_lost(now, reason);
            }
            Err(told) => {
                self.jobs.remove(&op);
                self.fail(op, Reason::new(&told.code, told.message));
            }
        }
    }

    fn close_streams(&mut self) {
        if let Some(streams) = &self.streams {
            streams.cancel();
        }
        self.open = false;
        self.opening = None;
        self.jobs.clear();
    }

    fn stop_copying(&mut self) {
        if let Some(streams) = self.streams.take() {
            if self.engine.verified_root().is_some() {
                streams.finish();
            } else {
                streams.cancel();
            }
        }
        self.open = false;
        self.opening = None;
        // What is still told of them is of no interest.
        self.handed_over += 1;
        self.tracker = None;
        self.throttle = None;
        self.jobs.clear();
        self.saving = None;
    }

    fn publish(&mut self) {
        if let Some(streams) = &self.streams {
            self.sent = streams.counters();
            self.engine.handle_sent(self.sent);
        }
        let phase = self.engine.phase();
        if phase != self.phase {
            info!(?phase, rounds = self.engine.progress().rounds, "phase");
            self.phase = phase;
        }
        let redialling = self.engine.is_redialling();
        if redialling != self.redialling {
            self.redialling = redialling;
            if let Some(reason) = self.engine.reason().filter(|_| redialling) {
                warn!(%reason, "the connection is lost; dialling again");
            } else if phase == SourcePhase::PreCopy {
                let times = self.engine.progress().rejoined;
                info!(times, "connected again; going on with what has not arrived");
            }
        }
        let now = self.agent.now();
        let (engine, ram_bytes) = (&self.engine, self.params.layout.as_ref());
        self.tracked.update(|info| {
            let progress = engine.progress();
            info.phase = match phase {
                SourcePhase::Preparing => Phase::Preparing,
                SourcePhase::Reserving => Phase::Reserving,
                SourcePhase::PreCopy => Phase::PreCopy,
                SourcePhase::Switchover => Phase::Switchover,
                SourcePhase::Committing => Phase::Committing,
                SourcePhase::PostCopy => Phase::PostCopy,
                SourcePhase::InDoubt => Phase::InDoubt,
                SourcePhase::Finishing | SourcePhase::Ended => Phase::Erasing,
            };
            info.outcome = (phase == SourcePhase::InDoubt).then_some(Outcome::InDoubt);
            info.reason = engine.reason().map(|reason| reason.message.clone());
            info.rounds = progress.rounds;
            info.total_time_ms = ms(now - progress.began);
            let parts = progress.downtime;
            info.downtime_ms = ms(parts.total());
            info.downtime = Downtime {
                pause_ms: ms(parts.pause),
                final_pages_ms: ms(parts.final_pages),
                device_state_ms: ms(parts.device_state),
                commit_ms: ms(parts.commit),
                resume_ms: ms(parts.resume),
            };
            info.predicted_downtime_ms = progress.predicted_downtime.map(ms);
            info.bytes_on_wire = progress.sent.wire_bytes;
            info.bytes_guest = progress.sent.pages_raw * PAGE_BYTES;
            info.bytes_remaining = progress.round_remaining_pages() * PAGE_BYTES;
            info.rate_bytes_per_s = progress.predictor.rate_bytes_per_s();
            info.dirty_rate_bytes_per_s = progress.predictor.dirty_rate_bytes_per_s();
            info.percent = progress.percent();
            info.pages_sent = progress.sent.pages_raw;
            info.pages_delta = progress.sent.pages_delta;
            info.pages_duplicate = progress.sent.pages_duplicate;
            info.pages_compressed = progress.sent.pages_compressed;
            info.bytes_saved = progress.sent.saved_bytes;
            info.pages_zero = progress.sent.pages_zero;
            info.pages_resent = progress.pages_resent;
            info.pages_skipped = progress.pages_skipped;
            info.throttle_share =
                (progress.throttle_share > 0.0).then_some(progress.throttle_share);
            info.pages_demanded = progress.demands;
            info.fault_wait = fault_wait(&progress.fault_wait_log2_us);
            info.rejoined = progress.rejoined;
            let notes = progress.notes().iter();
            info.decisions = notes
                .map(|note| Decision {
                    rounds: note.rounds,
                    why: note.why.clone(),
                })
                .collect();
            if let Some(layout) = ram_bytes {
                info.ram_bytes = layout.total_bytes();
            }
            if let Some(root) = engine.verified_root() {
                info.memory_root = Some(root.to_string());
                info.verified = progress.pulled_verified.unwrap_or(true);
            }
        });
    }

    fn finish(mut self, ending: &Ending) {
        // Also where it was never paused, and so not resumed.
        if let (Ending::RunningOnSource(..), Some(vm), true) = (ending, &self.vm, self.prepared) {
            vm.settle();
        }
        self.publish();
        let (outcome, reason, blockers) = match ending {
            Ending::Completed => (
                Outcome::Completed,
                self.engine.reason().cloned(),
                Vec::new(),
            ),
            Ending::RunningOnSource(reason, blockers) => (
                Outcome::RunningOnSource,
                Some(reason.clone()),
                blockers.clone(),
            ),
            Ending::VmLost(reason) => (Outcome::VmEnded, Some(reason.clone()), Vec::new()),
        };
        match outcome {
            Outcome::Completed => info!("completed"),
            _ => warn!(reason = %reason.as_ref().map_or("", |r| &r.message), ?outcome, "ended"),
        }
        let refused = self.was_refused(&blockers);
        self.agent.source_ended(self.engine.order(), ending);
        if self.engine.is_untold() {
            farewell::begin(&self.agent, self.engine.order(), reason.clone());
        }
        self.tracked.forget_session();
        self.tracked.update(|info| {
            info.phase = Phase::Done;
            info.outcome = Some(outcome);
            if outcome == Outcome::Completed {
                info.percent = 100.0;
            } else if let Some(reason) = &reason {
                let mut error = api_error(reason, &blockers, outcome, refused);
                self.name_gates(&mut error, reason);
                info.error = Some(error);
            }
            info.reason = reason.map(|reason| reason.message);
        });
        self.agent.keep_info(&self.tracked.info());
    }
}

fn channel_reason(error: &ChannelError) -> Reason {
    // The other end's verdict on our certificate arrives with its first answer (RFC 8446, section 4.4.2.4).
    let code = match error {
        ChannelError::Ended(told) if told.code == "identity-refused" => "identity-refused",
        _ => "connection-lost",
    };
    Reason::new(code, chain(error))
}

fn failure(code: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
    let vm_gone = error
        .downcast_ref::<palanquin_host::Error>()
        .is_some_and(palanquin_host::Error::is_process_gone);
    Failure {
        reason: Reason::new(code, chain(error)),
        vm_gone,
    }
}

fn missing(what: &str) -> Failure {
    Failure {
        reason: Reason::new("internal", format!("no {what} at this point")),
        vm_gone: false,
    }
}
