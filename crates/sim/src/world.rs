//! The world of one seed.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use palanquin_engine::convergence::Limits;
use palanquin_engine::destination::{
    DestinationAction, DestinationConfig, DestinationDone, DestinationEnding,
};
use palanquin_engine::ids::{Sha256, StreamSecret};
use palanquin_engine::journal::{DestinationRecovery, verdict};
use palanquin_engine::message::{HelloReply, Offer, Reason, Verdict};
use palanquin_engine::order::Ledger;
use palanquin_engine::source::{
    Ending, Failure, Op, RoundMark, SourceAction, SourceConfig, SourceDone,
};
use palanquin_engine::time::Timing;
use palanquin_engine::{
    Destination, DestinationRecord, Epoch, Message, MigrationId, Order, PageSet, RamLayout, Root,
    Source, SourceRecord, Time, VmId,
};

use crate::mutation::Mutation;
use crate::random::Random;

const PAGES: u64 = 40;
/// Faults happen before this time (microseconds); then everything is well.
const FAULTS_END: u64 = 20_000_000;
/// By this time everything must have ended.
const HORIZON: u64 = 400_000_000;
const MS: u64 = 1000;

/// How a seed ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The VM runs on the destination.
    Completed,
    /// The VM runs on the source, which never committed.
    TurnedBack,
    /// The VM runs on the source, which had committed.
    TakenBack,
    /// The simulation killed the VM's hypervisor.
    VmKilled,
}

/// What is told about a seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// Whether the source was in doubt on the way.
    pub doubted: bool,
    /// Agents that crashed.
    pub crashes: u32,
    /// Virtual time in microseconds.
    pub time_us: u64,
    /// One line for each event, where asked for.
    pub trace: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    Running,
    Paused,
    Incoming,
}

#[derive(Clone, Debug)]
struct Copy {
    run: Run,
    memory: Vec<u64>,
    dirty: PageSet,
}

#[derive(Clone, Debug)]
enum Event {
    SourceTimer,
    DestinationTimer,
    Connected(u32, bool),
    ToSource(u32, Message),
    ToDestination(u32, Message),
    SourceLost(u32),
    DestinationLost(u32),
    Pages(u32, Vec<(u64, u64)>),
    RoundEnd(u32, u32, bool),
    State(u32),
    SourceJournal(u64, Op, SourceRecord),
    DestinationJournal(u64, Op, DestinationRecord),
    SourceDone(u64, Op, Result<SourceDone, bool>),
    SourceVm(u64),
    DestinationVm(u64),
    GuestWrites,
    Cut,
    Blackhole,
    Heal,
    CrashSource,
    CrashDestination,
    RestartSource,
    RestartDestination,
    Abort,
    KillVm(usize),
}

#[derive(Clone, Copy, Debug)]
enum VmJob {
    Pause(Op),
    Save(Op),
    Resume(Op),
    Erase(Op),
}

#[derive(Clone, Copy, Debug)]
enum ContainerJob {
    Reserve(Op),
    Load(Op),
    Activate(Op),
    Terminate(Op),
}

struct World {
    now: u64,
    random: Random,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: Vec<Option<Event>>,
    mutation: Option<Mutation>,
    layout: RamLayout,
    order: Order,
    copies: [Option<Copy>; 2],
    killed: bool,
    // Source agent.
    source: Option<Source>,
    source_life: u64,
    source_up: bool,
    source_records: Vec<SourceRecord>,
    source_jobs: VecDeque<VmJob>,
    source_busy: bool,
    source_timer: u64,
    sent_versions: Vec<u64>,
    ending: Option<Ending>,
    // Destination agent.
    destination: Option<Destination>,
    destination_life: u64,
    destination_up: bool,
    destination_records: Vec<DestinationRecord>,
    destination_jobs: VecDeque<ContainerJob>,
    destination_busy: bool,
    destination_timer: u64,
    received_versions: Vec<u64>,
    state_arrived: bool,
    expecting: Option<Op>,
    corrupt: bool,
    container_killed: bool,
    // Wire.
    connection: u32,
    source_end: u32,
    destination_end: u32,
    session_connection: u32,
    black: bool,
    wire_free: u64,
    back_free: u64,
    // What happened.
    doubted: bool,
    crashes: u32,
    aborted_early: bool,
    paused_memory: Option<Vec<u64>>,
    tracing: bool,
    trace: Vec<String>,
}

/// Plays one seed. The error says which law broke.
///
/// # Errors
///
/// A law broke; the text has the seed's last events.
pub fn simulate(seed: u64, mutation: Option<Mutation>, tracing: bool) -> Result<Report, String> {
    let mut world = World::new(seed, mutation, tracing);
    world.begin();
    let result = world.play();
    let report = Report {
        outcome: world.outcome(),
        doubted: world.doubted,
        crashes: world.crashes,
        time_us: world.now,
        trace: std::mem::take(&mut world.trace),
    };
    match result {
        Ok(()) => Ok(report),
        Err(law) => Err(format!("seed {seed}: {law}\n{}", report.trace.join("\n"))),
    }
}

impl World {
    fn new(seed: u64, mutation: Option<Mutation>, tracing: bool) -> Self {
        // Bounds are constants that are known to be good.
        let layout = RamLayout::new(vec![PAGES]).unwrap_or_else(|_| unreachable!("layout"));
        let order = Order {
            migration: MigrationId([1; 16]),
            vm: VmId([2; 16]),
            vm_name: "vm".to_owned(),
            epoch: Epoch(1),
            source: "a".to_owned(),
            destination: "b".to_owned(),
            expires_unix_s: 100,
            run: true,
        };
        let running = Copy {
            run: Run::Running,
            memory: (1..=PAGES).collect(),
            dirty: PageSet::empty(&layout),
        };
        Self {
            now: 0,
            random: Random::new(seed),
            queue: BinaryHeap::new(),
            events: Vec::new(),
            mutation,
            layout,
            order,
            copies: [Some(running), None],
            killed: false,
            source: None,
            source_life: 1,
            source_up: true,
            source_records: Vec::new(),
            source_jobs: VecDeque::new(),
            source_busy: false,
            source_timer: u64::MAX,
            sent_versions: vec![0; PAGES as usize],
            ending: None,
            destination: None,
            destination_life: 1,
            destination_up: true,
            destination_records: Vec::new(),
            destination_jobs: VecDeque::new(),
            destination_busy: false,
            destination_timer: u64::MAX,
            received_versions: vec![0; PAGES as usize],
            state_arrived: false,
            expecting: None,
            corrupt: false,
            container_killed: false,
            connection: 0,
            source_end: 0,
            destination_end: 0,
            session_connection: 0,
            black: false,
            wire_free: 0,
            back_free: 0,
            doubted: false,
            crashes: 0,
            aborted_early: false,
            paused_memory: None,
            tracing,
            trace: Vec::new(),
        }
    }

    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    fn time(&self) -> Time {
        Time::from_micros(self.now)
    }

    fn after(&mut self, delay: u64, event: Event) {
        let index = self.events.len() as u64;
        self.events.push(Some(event));
        self.queue.push(Reverse((self.now + delay, index)));
    }

    fn delay(&mut self, up_to_ms: u64) -> u64 {
        50 + self.random.below(up_to_ms * MS)
    }

    /// A disk is quick, but for the times when it is not.
    fn disk_delay(&mut self) -> u64 {
        if self.random.one_in(12) {
            self.delay(3000)
        } else {
            self.delay(5)
        }
    }

    fn timing() -> Timing {
        Timing {
            silence: Duration::from_secs(3),
            ..Timing::default()
        }
    }

    fn config(&self) -> SourceConfig {
        SourceConfig {
            order: self.order.clone(),
            limits: Limits {
                max_rounds: 8,
                ..Limits::default()
            },
            timing: Self::timing(),
            software: "sim".to_owned(),
        }
    }

    fn begin(&mut self) {
        let offer = Offer {
            order: self.order.clone(),
            descriptor: Vec::new(),
            region_pages: vec![PAGES],
            streams: 2,
            digest_seed: 0,
        };
        self.source = Some(Source::new(self.time(), self.config(), offer));
        self.after(0, Event::GuestWrites);
        let faults = self.random.below(5);
        for _ in 0..faults {
            // Most migrations of this size are over within 300 ms of virtual time.
            let at = if self.random.one_in(4) {
                FAULTS_END
            } else {
                400 * MS
            };
            let at = self.random.below(at);
            let event = match self.random.below(9) {
                0 | 1 => Event::Cut,
                2 => Event::Blackhole,
                3 | 4 => Event::CrashSource,
                5 | 6 => Event::CrashDestination,
                7 => Event::Abort,
                _ if self.random.one_in(3) => Event::KillVm(self.random.below(2) as usize),
                _ => Event::Cut,
            };
            self.after(at, event);
        }
        self.after(FAULTS_END, Event::Heal);
    }

    fn play(&mut self) -> Result<(), String> {
        self.pump();
        while let Some(Reverse((at, index))) = self.queue.pop() {
            if at > HORIZON {
                break;
            }
            self.now = at;
            let Some(event) = self.events.get_mut(index as usize).and_then(Option::take) else {
                continue;
            };
            if self.tracing && !matches!(event, Event::GuestWrites) {
                self.trace.push(format!("{:>9} us  {event:?}", self.now));
            }
            self.handle(event)?;
            self.pump();
            self.check()?;
            if self.now > FAULTS_END && self.settled() {
                break;
            }
        }
        self.check_end()
    }

    fn settled(&self) -> bool {
        self.source.is_none()
            && self.destination.is_none()
            && self.source_up
            && self.destination_up
            && !self.destination_busy
    }

    fn check(&self) -> Result<(), String> {
        let running = self
            .copies
            .iter()
            .flatten()
            .filter(|copy| copy.run == Run::Running)
            .count();
        if running > 1 {
            return Err("both copies run".to_owned());
        }
        if self.corrupt && !self.killed {
            return Err(
                "the destination's VM does not have the memory of the source at its pause"
                    .to_owned(),
            );
        }
        if !self.killed
            && self
                .copies
                .iter()
                .flatten()
                .all(|copy| copy.run == Run::Incoming)
        {
            return Err("no copy is left that could run".to_owned());
        }
        Ok(())
    }

    fn check_end(&self) -> Result<(), String> {
        if !self.settled() {
            return Err(format!(
                "it did not end: source {:?}, destination {:?}",
                self.source.as_ref().map(Source::phase),
                self.destination.as_ref().map(Destination::phase)
            ));
        }
        if self.killed {
            return Ok(());
        }
        let [source, destination] = &self.copies;
        match (source, destination) {
            (Some(copy), None) | (None, Some(copy)) if copy.run == Run::Running => {}
            _ => {
                let state = |copy: &Option<Copy>| copy.as_ref().map(|copy| copy.run);
                return Err(format!(
                    "at the end there must be one running copy: {:?} {:?}",
                    state(source),
                    state(destination)
                ));
            }
        }
        if destination.is_some() && self.aborted_early {
            return Err("an abort was promised and the VM moved all the same".to_owned());
        }
        Ok(())
    }

    fn outcome(&self) -> Outcome {
        let committed = |r: &SourceRecord| matches!(r, SourceRecord::Committed(_));
        if self.killed {
            Outcome::VmKilled
        } else if self.copies[1].is_some() {
            Outcome::Completed
        } else if self.source_records.iter().any(committed) {
            Outcome::TakenBack
        } else {
            Outcome::TurnedBack
        }
    }

    // Events.

    fn handle(&mut self, event: Event) -> Result<(), String> {
        let now = self.time();
        match event {
            Event::SourceTimer => {
                self.source_timer = u64::MAX;
                if let Some(source) = &mut self.source {
                    source.handle_timeout(now);
                }
            }
            Event::DestinationTimer => {
                self.destination_timer = u64::MAX;
                if let Some(destination) = &mut self.destination {
                    destination.handle_timeout(now);
                }
            }
            Event::Connected(attempt, works) => self.connected(attempt, works),
            Event::ToSource(connection, message) => {
                if connection == self.source_end && self.source_up {
                    self.source_receives(connection, message);
                }
            }
            Event::ToDestination(connection, message) => {
                if connection == self.destination_end && self.destination_up {
                    self.destination_receives(connection, message);
                }
            }
            Event::SourceLost(connection) if connection == self.source_end => {
                self.source_end = 0;
                self.source_lost();
            }
            Event::DestinationLost(connection) if connection == self.destination_end => {
                self.destination_end = 0;
                self.destination_lost(connection);
            }
            Event::SourceLost(_) | Event::DestinationLost(_) => {}
            Event::Pages(connection, pages) => self.pages(connection, &pages),
            Event::RoundEnd(connection, round, last) => {
                if connection == self.session_connection
                    && let Some(destination) = &mut self.destination
                {
                    destination.handle_round(now, round, last);
                }
            }
            Event::State(connection) => {
                self.state_arrived |= connection == self.session_connection;
            }
            Event::SourceJournal(life, op, record) => self.source_journaled(life, op, record),
            Event::DestinationJournal(life, op, record) => {
                self.destination_journaled(life, op, record);
            }
            Event::SourceDone(life, op, result) => {
                if life == self.source_life
                    && let Some(source) = &mut self.source
                {
                    let result = result.map_err(failed);
                    source.handle_done(now, op, result);
                }
            }
            Event::SourceVm(life) => {
                if life == self.source_life {
                    self.source_job()?;
                }
            }
            Event::DestinationVm(life) => {
                if life == self.destination_life {
                    self.destination_job();
                }
            }
            Event::GuestWrites => self.guest_writes(),
            Event::Cut => self.cut(),
            Event::Blackhole => self.black = true,
            Event::Heal => self.black = false,
            Event::CrashSource => self.crash_source(),
            Event::CrashDestination => self.crash_destination(),
            Event::RestartSource => self.restart_source(),
            Event::RestartDestination => self.restart_destination(),
            Event::Abort => {
                if let Some(source) = &mut self.source {
                    let early = source.may_turn_back();
                    source.handle_abort(now, Reason::new("operator", "aborted"));
                    self.aborted_early |= early;
                }
            }
            Event::KillVm(host) => self.kill_vm(host),
        }
        Ok(())
    }

    fn guest_writes(&mut self) {
        for host in 0..2 {
            let page = self.random.below(PAGES);
            if let Some(copy) = &mut self.copies[host]
                && copy.run == Run::Running
            {
                copy.memory[page as usize] += 1000;
                copy.dirty.insert(0, page..page + 1);
            }
        }
        if self.now < FAULTS_END {
            let delay = self.delay(6);
            self.after(delay, Event::GuestWrites);
        }
    }

    fn kill_vm(&mut self, host: usize) {
        let Some(copy) = self.copies[host].take() else {
            return;
        };
        let now = self.time();
        // A container that is not owned may die without anybody losing anything.
        let owned = self
            .destination_records
            .iter()
            .any(|r| matches!(r, DestinationRecord::Owned(_)));
        self.killed |= host == 0 || owned || copy.run == Run::Running;
        self.container_killed |= host == 1;
        if host == 0
            && let Some(source) = &mut self.source
        {
            source.handle_vm_gone(now);
        }
        if host == 1
            && let Some(destination) = &mut self.destination
        {
            destination.handle_container_gone(now);
        }
    }

    // The wire.

    fn cut(&mut self) {
        let (source, destination) = (self.source_end, self.destination_end);
        self.connection += 1;
        let (one, other) = (self.delay(30), self.delay(30));
        self.after(one, Event::SourceLost(source));
        self.after(other, Event::DestinationLost(destination));
        // What is on its way is lost too.
        self.lose_in_flight();
    }

    fn lose_in_flight(&mut self) {
        for event in self.events.iter_mut().rev().take(64) {
            let in_flight = matches!(
                event,
                Some(
                    Event::ToSource(..)
                        | Event::ToDestination(..)
                        | Event::Pages(..)
                        | Event::RoundEnd(..)
                        | Event::State(_)
                )
            );
            if in_flight {
                *event = None;
            }
        }
    }

    fn connect(&mut self, attempt: u32) {
        let works = self.destination_up && !self.black && !self.random.one_in(25);
        let delay = self.delay(20);
        self.after(delay, Event::Connected(attempt, works));
    }

    fn connected(&mut self, attempt: u32, works: bool) {
        if !self.source_up {
            return;
        }
        let now = self.time();
        let works = works && self.destination_up;
        if works {
            // The destination's end of an older connection may not know yet.
            let old = self.destination_end;
            self.connection += 1;
            self.source_end = self.connection;
            if old != 0 && old == self.session_connection {
                let delay = self.delay(2000);
                self.after(delay, Event::DestinationLost(old));
            }
            self.destination_end = self.connection;
            self.wire_free = self.now;
            self.back_free = self.now;
        }
        if let Some(source) = &mut self.source {
            if works {
                source.handle_connected(now, attempt);
            } else {
                let reason = Reason::new("unreachable", "no connection");
                source.handle_connection_lost(now, attempt, reason);
            }
        }
    }

    fn put_on_wire(&mut self, event: Event, back: bool) {
        if self.black {
            return;
        }
        let delay = self.delay(8);
        let free = if back {
            &mut self.back_free
        } else {
            &mut self.wire_free
        };
        // In order, as TCP delivers.
        let at = (*free).max(self.now + delay) + 1;
        *free = at;
        self.after(at - self.now, event);
    }

    fn send_to_destination(&mut self, message: Message) {
        if self.source_end != 0 {
            self.put_on_wire(Event::ToDestination(self.source_end, message), false);
        }
    }

    fn send_to_source(&mut self, message: Message) {
        if self.destination_end != 0 {
            self.put_on_wire(Event::ToSource(self.destination_end, message), true);
        }
    }

    fn source_lost(&mut self) {
        let now = self.time();
        if self.is(Mutation::ResumeOnLostConnection)
            && let Some(copy) = &mut self.copies[0]
        {
            copy.run = Run::Running;
        }
        // The driver names the newest attempt; an older one is ignored by the engine.
        if let Some(source) = &mut self.source {
            for attempt in 0..64 {
                source.handle_connection_lost(now, attempt, Reason::new("connection-lost", "cut"));
            }
        }
    }

    fn destination_lost(&mut self, connection: u32) {
        let now = self.time();
        if connection == self.session_connection
            && let Some(destination) = &mut self.destination
        {
            destination.handle_connection_lost(now, Reason::new("connection-lost", "cut"));
        }
    }

    fn source_receives(&mut self, _connection: u32, message: Message) {
        let now = self.time();
        if let Some(source) = &mut self.source {
            for attempt in 0..64 {
                source.handle_message(now, attempt, message.clone());
            }
        }
    }

    fn destination_receives(&mut self, connection: u32, message: Message) {
        let now = self.time();
        match message {
            Message::Hello(hello) => {
                self.send_to_source(Message::HelloReply(HelloReply::to(&hello, "sim")));
            }
            Message::Query(_) => self.query(),
            Message::Offer(offer) => {
                let mut engine = Destination::new(
                    now,
                    DestinationConfig {
                        timing: Self::timing(),
                        software: "sim".to_owned(),
                        stream_secret: StreamSecret([0; 32]),
                        streams_max: 2,
                        device_state_max: 1 << 20,
                    },
                );
                engine.handle_message(
                    now,
                    Message::Hello(palanquin_engine::message::Hello::ours("sim")),
                );
                while engine.poll_action().is_some() {}
                engine.handle_message(now, Message::Offer(offer));
                self.session_connection = connection;
                self.destination = Some(engine);
            }
            other if connection == self.session_connection => {
                if let Some(destination) = &mut self.destination {
                    destination.handle_message(now, other);
                }
            }
            _ => {}
        }
    }

    fn query(&mut self) {
        let now = self.time();
        if let Some(destination) = &mut self.destination {
            destination.handle_query(now);
            self.pump_destination();
        }
        let answer = match verdict(&self.destination_records, self.destination.is_some()) {
            Verdict::Undecided if self.is(Mutation::AnswerUndecidedAsDiscarded) => {
                Verdict::Discarded
            }
            Verdict::Undecided if self.destination.is_none() && !self.destination_busy => {
                self.discard_leftover();
                verdict(&self.destination_records, false)
            }
            other => other,
        };
        self.send_to_source(Message::Verdict(answer));
    }

    fn pages(&mut self, connection: u32, pages: &[(u64, u64)]) {
        if connection != self.session_connection || self.destination.is_none() {
            return;
        }
        if let Some(copy) = &mut self.copies[1] {
            for &(page, version) in pages {
                copy.memory[page as usize] = version;
                self.received_versions[page as usize] = version;
            }
        }
    }

    // The source's agent.

    fn crash_source(&mut self) {
        if !self.source_up {
            return;
        }
        self.crashes += 1;
        self.source_up = false;
        self.source_life += 1;
        self.source = None;
        self.source_jobs.clear();
        self.source_busy = false;
        self.half_written();
        self.drop_connection();
        let delay = self.delay(3000);
        self.after(delay, Event::RestartSource);
    }

    /// Records on their way to the disk are there after a crash, or not.
    fn half_written(&mut self) {
        let mut kept = Vec::new();
        for event in self.events.iter_mut().rev().take(64) {
            match event {
                Some(Event::SourceJournal(life, _, record)) if *life + 1 == self.source_life => {
                    kept.push((true, Some(record.clone()), None));
                    *event = None;
                }
                Some(Event::DestinationJournal(life, _, record))
                    if *life + 1 == self.destination_life =>
                {
                    kept.push((false, None, Some(record.clone())));
                    *event = None;
                }
                _ => {}
            }
        }
        for (_, source, destination) in kept.into_iter().rev() {
            if self.random.one_in(2) {
                self.source_records.extend(source);
                self.destination_records.extend(destination);
            }
        }
    }

    fn drop_connection(&mut self) {
        self.lose_in_flight();
        let (source, destination) = (self.source_end, self.destination_end);
        let (one, other) = (self.delay(30), self.delay(30));
        self.after(one, Event::SourceLost(source));
        self.after(other, Event::DestinationLost(destination));
    }

    fn restart_source(&mut self) {
        self.source_up = true;
        self.source_end = 0;
        let Some(record) = self.source_records.last().cloned() else {
            // Nothing was recorded: nothing began.
            return;
        };
        if self.is(Mutation::RecoveryIgnoresCommit) {
            if let Some(copy) = &mut self.copies[0] {
                copy.run = Run::Running;
            }
            return;
        }
        if record.recovery() != palanquin_engine::journal::SourceRecovery::Nothing {
            self.source = Some(Source::recover(self.time(), self.config(), &record));
        }
    }

    fn source_journaled(&mut self, life: u64, op: Op, record: SourceRecord) {
        if life != self.source_life {
            return;
        }
        let now = self.time();
        let fails = self.now < FAULTS_END && self.random.one_in(150);
        if !fails {
            self.source_records.push(record);
        }
        if let Some(source) = &mut self.source {
            let result = if fails {
                Err(failed(false))
            } else {
                Ok(SourceDone::Done)
            };
            source.handle_done(now, op, result);
        }
    }

    fn next_source_job(&mut self) {
        if !self.source_busy && !self.source_jobs.is_empty() {
            self.source_busy = true;
            let delay = self.delay(15);
            self.after(delay, Event::SourceVm(self.source_life));
        }
    }

    fn source_job(&mut self) -> Result<(), String> {
        self.source_busy = false;
        let Some(job) = self.source_jobs.pop_front() else {
            return Ok(());
        };
        let now = self.time();
        let fails = self.now < FAULTS_END && self.random.one_in(120);
        let alive = self.copies[0].is_some();
        let (op, result) = match job {
            VmJob::Pause(op) | VmJob::Save(op) | VmJob::Resume(op) if fails || !alive => {
                (op, Err(failed(!alive)))
            }
            VmJob::Pause(op) => {
                if let Some(copy) = &mut self.copies[0] {
                    copy.run = Run::Paused;
                    self.paused_memory = Some(copy.memory.clone());
                }
                (op, Ok(SourceDone::Done))
            }
            VmJob::Save(op) => (
                op,
                Ok(SourceDone::DeviceState {
                    bytes: 100,
                    sha256: Sha256([0; 32]),
                }),
            ),
            VmJob::Resume(op) => {
                if let Some(copy) = &mut self.copies[0] {
                    copy.run = Run::Running;
                }
                (op, Ok(SourceDone::Done))
            }
            VmJob::Erase(op) => {
                let owned =
                    |record: &DestinationRecord| matches!(record, DestinationRecord::Owned(_));
                if !self.destination_records.iter().any(owned) {
                    return Err("erased before the destination owned it durably".to_owned());
                }
                self.copies[0] = None;
                (op, Ok(SourceDone::Done))
            }
        };
        if let Some(source) = &mut self.source {
            source.handle_done(now, op, result);
        }
        self.next_source_job();
        Ok(())
    }

    fn pump_source(&mut self) {
        while let Some(action) = self.source.as_mut().and_then(Source::poll_action) {
            if self.tracing {
                let text = format!("{action:?}");
                self.trace
                    .push(format!("{:>9} us    source: {:.160}", self.now, text));
            }
            self.source_action(action);
        }
        if let Some(source) = &self.source {
            self.doubted |= source.phase() == palanquin_engine::source::SourcePhase::InDoubt;
            if let Some(at) = source.poll_timeout() {
                let at = at.as_micros().max(self.now);
                if at < self.source_timer {
                    self.source_timer = at;
                    self.after(at - self.now, Event::SourceTimer);
                }
            }
        }
    }

    fn source_action(&mut self, action: SourceAction) {
        let life = self.source_life;
        match action {
            SourceAction::Connect { attempt } => self.connect(attempt),
            SourceAction::Send(message) => self.send_to_destination(message),
            SourceAction::Disconnect => {
                let end = std::mem::take(&mut self.source_end);
                let delay = self.delay(30);
                self.after(delay, Event::DestinationLost(end));
            }
            SourceAction::Journal(op, record) => {
                if matches!(record, SourceRecord::Committed(_)) {
                    if self.is(Mutation::CommitBeforeDurable) {
                        self.send_to_destination(Message::Commit(self.order.epoch.next()));
                    }
                    if self.is(Mutation::EraseAtCommit) {
                        self.copies[0] = None;
                    }
                }
                let delay = self.disk_delay();
                self.after(delay, Event::SourceJournal(life, op, record));
            }
            SourceAction::OpenStreams { op, .. } | SourceAction::StartTracking(op) => {
                if let Some(copy) = &mut self.copies[0] {
                    copy.dirty = PageSet::empty(&self.layout);
                }
                // The destination sees its streams at about the same time.
                self.streams_open();
                let delay = self.delay(10);
                self.after(delay, Event::SourceDone(life, op, Ok(SourceDone::Done)));
            }
            SourceAction::Collect { op, first } => {
                let mut pages = PageSet::empty(&self.layout);
                if let Some(copy) = &mut self.copies[0] {
                    std::mem::swap(&mut pages, &mut copy.dirty);
                    if first {
                        pages.insert(0, 0..PAGES);
                    }
                }
                let gone = self.copies[0].is_none();
                let result = if gone {
                    Err(true)
                } else {
                    Ok(SourceDone::Collected(pages))
                };
                self.after(100, Event::SourceDone(life, op, result));
            }
            SourceAction::SendPages {
                op,
                pages,
                round,
                then,
            } => {
                self.send_pages(&pages, round, then);
                let delay = self.delay(20);
                self.after(delay, Event::SourceDone(life, op, Ok(SourceDone::Done)));
            }
            SourceAction::SendDeviceState(op) => {
                self.put_on_wire(Event::State(self.source_end), false);
                self.after(100, Event::SourceDone(life, op, Ok(SourceDone::Done)));
            }
            SourceAction::ComputeRoot(op) => {
                let root = root(&self.sent_versions);
                self.after(100, Event::SourceDone(life, op, Ok(SourceDone::Root(root))));
            }
            SourceAction::Pause(op) => self.source_jobs.push_back(VmJob::Pause(op)),
            SourceAction::SaveDeviceState(op) => self.source_jobs.push_back(VmJob::Save(op)),
            SourceAction::Resume(op) => self.source_jobs.push_back(VmJob::Resume(op)),
            SourceAction::Erase(op) => self.source_jobs.push_back(VmJob::Erase(op)),
            SourceAction::StopCopying => {}
            SourceAction::Finish(ending) => {
                self.ending = Some(ending);
                self.source = None;
            }
        }
        self.next_source_job();
    }

    fn send_pages(&mut self, pages: &PageSet, round: u32, then: RoundMark) {
        let last = then == RoundMark::Last;
        let forgets = match self.mutation {
            // The last pages come in pieces that don't end a round.
            Some(Mutation::LastPagesNotSent) => then != RoundMark::End,
            Some(Mutation::PagesForgotten) => true,
            _ => false,
        };
        let mut versions = Vec::new();
        if let Some(copy) = &self.copies[0] {
            let pages = (0..PAGES).filter(|&page| pages.contains(0, page));
            for page in pages.skip(usize::from(forgets)) {
                let version = copy.memory[page as usize];
                self.sent_versions[page as usize] = version;
                versions.push((page, version));
            }
        }
        self.put_on_wire(Event::Pages(self.source_end, versions), false);
        if then != RoundMark::None {
            self.put_on_wire(Event::RoundEnd(self.source_end, round, last), false);
        }
    }

    // The destination's agent.

    fn streams_open(&mut self) {
        let now = self.time();
        if let (Some(destination), Some(op)) = (&mut self.destination, self.expecting.take()) {
            destination.handle_done(now, op, Ok(DestinationDone::Done));
        }
    }

    fn crash_destination(&mut self) {
        if !self.destination_up {
            return;
        }
        self.crashes += 1;
        // An agent that restarts can't know whether a container that it owns and that is gone ever ran.
        self.killed |= self.container_killed;
        self.destination_up = false;
        self.destination_life += 1;
        self.destination = None;
        self.destination_jobs.clear();
        self.destination_busy = false;
        self.half_written();
        self.drop_connection();
        let delay = self.delay(3000);
        self.after(delay, Event::RestartDestination);
    }

    fn restart_destination(&mut self) {
        self.destination_up = true;
        self.destination_end = 0;
        if self.is(Mutation::JournalLostOnRestart) {
            self.destination_records.clear();
        }
        match self
            .destination_records
            .last()
            .map(DestinationRecord::recovery)
        {
            Some(DestinationRecovery::Discard) if self.is(Mutation::RecoveryRunsReserved) => {
                if let Some(copy) = &mut self.copies[1] {
                    copy.run = Run::Running;
                }
            }
            Some(DestinationRecovery::Discard) => self.discard_leftover(),
            Some(DestinationRecovery::Activate(_)) if self.is(Mutation::RecoveryDiscardsOwned) => {
                self.discard_leftover();
            }
            Some(DestinationRecovery::Activate(_)) => {
                if let Some(copy) = &mut self.copies[1] {
                    copy.run = Run::Running;
                }
                self.destination_records.push(DestinationRecord::Activated);
            }
            _ => {}
        }
    }

    fn discard_leftover(&mut self) {
        self.copies[1] = None;
        self.destination_records
            .push(DestinationRecord::Discarded(Reason::new(
                "restart", "restart",
            )));
    }

    fn destination_journaled(&mut self, life: u64, op: Op, record: DestinationRecord) {
        if life != self.destination_life {
            return;
        }
        let now = self.time();
        let fails = self.now < FAULTS_END && self.random.one_in(150);
        if !fails {
            self.destination_records.push(record);
        }
        if let Some(destination) = &mut self.destination {
            let result = if fails {
                Err(failed(false))
            } else {
                Ok(DestinationDone::Done)
            };
            destination.handle_done(now, op, result);
        }
    }

    fn next_destination_job(&mut self) {
        if !self.destination_busy && !self.destination_jobs.is_empty() {
            self.destination_busy = true;
            let delay = self.delay(20);
            self.after(delay, Event::DestinationVm(self.destination_life));
        }
    }

    fn destination_job(&mut self) {
        self.destination_busy = false;
        let Some(job) = self.destination_jobs.pop_front() else {
            return;
        };
        let now = self.time();
        let fails = self.now < FAULTS_END && self.random.one_in(120);
        let alive = self.copies[1].is_some();
        let (op, result) = match job {
            ContainerJob::Terminate(op) => {
                self.copies[1] = None;
                (op, Ok(DestinationDone::Done))
            }
            ContainerJob::Reserve(op) if fails => (op, Err(failed(false))),
            ContainerJob::Reserve(op) => {
                let memory = vec![0; PAGES as usize];
                let dirty = PageSet::empty(&self.layout);
                self.copies[1] = Some(Copy {
                    run: Run::Incoming,
                    memory,
                    dirty,
                });
                self.received_versions = vec![0; PAGES as usize];
                self.state_arrived = false;
                (op, Ok(DestinationDone::Done))
            }
            ContainerJob::Load(op) | ContainerJob::Activate(op) if fails || !alive => {
                (op, Err(failed(!alive)))
            }
            ContainerJob::Load(op) if !self.state_arrived => {
                // It follows on the stream: look again.
                self.destination_jobs.push_front(ContainerJob::Load(op));
                return self.next_destination_job();
            }
            ContainerJob::Load(op) => {
                if let Some(copy) = &mut self.copies[1] {
                    copy.run = Run::Paused;
                }
                (op, Ok(DestinationDone::Done))
            }
            ContainerJob::Activate(op) => {
                if let Some(copy) = &mut self.copies[1] {
                    copy.run = Run::Running;
                    if self.paused_memory.as_ref() != Some(&copy.memory) {
                        // Found by the final check as a second running copy never is: say it here.
                        self.corrupt = true;
                    }
                }
                (op, Ok(DestinationDone::Done))
            }
        };
        if let Some(destination) = &mut self.destination {
            destination.handle_done(now, op, result);
        }
        self.next_destination_job();
    }

    fn pump_destination(&mut self) {
        while let Some(action) = self.destination.as_mut().and_then(Destination::poll_action) {
            if self.tracing {
                let text = format!("{action:?}");
                self.trace
                    .push(format!("{:>9} us    destination: {:.160}", self.now, text));
            }
            self.destination_action(action);
        }
        if let Some(at) = self
            .destination
            .as_ref()
            .and_then(Destination::poll_timeout)
        {
            let at = at.as_micros().max(self.now);
            if at < self.destination_timer {
                self.destination_timer = at;
                self.after(at - self.now, Event::DestinationTimer);
            }
        }
    }

    fn destination_action(&mut self, action: DestinationAction) {
        let life = self.destination_life;
        let now = self.time();
        match action {
            DestinationAction::Send(message) => {
                if self.session_connection == self.destination_end {
                    self.send_to_source(message);
                }
            }
            DestinationAction::ConsultLedger(_) => {
                let ledger = Ledger {
                    host: "b".to_owned(),
                    peer: "a".to_owned(),
                    unix_s: 1,
                    migration_seen: !self.destination_records.is_empty(),
                    vm_present: self.copies[1].is_some(),
                    ..Ledger::default()
                };
                if let Some(destination) = &mut self.destination {
                    destination.handle_ledger(now, &ledger);
                }
            }
            DestinationAction::Journal(op, record) => {
                let owned = matches!(record, DestinationRecord::Owned(_));
                if owned
                    && self.is(Mutation::RunBeforeOwnedIsDurable)
                    && let Some(copy) = &mut self.copies[1]
                {
                    copy.run = Run::Running;
                }
                if owned && self.is(Mutation::ClaimDiscardWithoutDoing) {
                    self.send_to_source(Message::Discarded(Reason::new("x", "x")));
                }
                let delay = self.disk_delay();
                self.after(delay, Event::DestinationJournal(life, op, record));
            }
            DestinationAction::Reserve(op, _) => {
                self.destination_jobs.push_back(ContainerJob::Reserve(op));
            }
            DestinationAction::ExpectStreams { op, .. } => self.expecting = Some(op),
            DestinationAction::LoadDeviceState(op, _) => {
                self.destination_jobs.push_back(ContainerJob::Load(op));
            }
            DestinationAction::ComputeRoot(op) => {
                let root = root(&self.received_versions);
                if let Some(destination) = &mut self.destination {
                    destination.handle_done(now, op, Ok(DestinationDone::Root(root)));
                }
            }
            DestinationAction::Activate(op) => {
                self.destination_jobs.push_back(ContainerJob::Activate(op));
            }
            DestinationAction::Terminate(op) => {
                self.destination_jobs.push_back(ContainerJob::Terminate(op));
            }
            DestinationAction::Finish(ending) => {
                if let DestinationEnding::Owned = ending
                    && let Some(copy) = &mut self.copies[1]
                    && copy.run != Run::Running
                {
                    self.corrupt = true;
                }
                self.destination = None;
            }
        }
        self.next_destination_job();
    }

    fn pump(&mut self) {
        self.pump_source();
        self.pump_destination();
        self.pump_source();
    }
}

fn failed(vm_gone: bool) -> Failure {
    Failure {
        reason: Reason::new("injected", "the simulation made it fail"),
        vm_gone,
    }
}

/// Stands for the root over all page digests.
fn root(versions: &[u64]) -> Root {
    let mut root = [0; 32];
    for (index, version) in (0_u64..).zip(versions) {
        let mut random = Random::new(version.wrapping_mul(PAGES).wrapping_add(index));
        for byte in &mut root {
            *byte ^= random.number() as u8;
        }
    }
    Root(root)
}
