//! The world of one seed.

mod destination_host;
mod path;
mod rogue;
mod source_host;
mod trust;
mod wire;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use palanquin_engine::convergence::Limits;
use palanquin_engine::destination::{
    DestinationAction, DestinationConfig, DestinationDone, DestinationEnding, DestinationPhase,
};
use palanquin_engine::ids::{Sha256, StreamSecret};
use palanquin_engine::journal::{DestinationRecovery, verdict};
use palanquin_engine::message::{
    Complete, Demand, HelloReply, Offer, Present, Reason, Refused, Verdict,
};
use palanquin_engine::order::Ledger;
use palanquin_engine::source::{
    AbortDisposition, Ending, Failure, Op, RoundMark, SourceAction, SourceConfig, SourceDone,
    SourcePhase,
};
use palanquin_engine::strategy::{Allowed, PostCopyUse, Strategy};
use palanquin_engine::time::Timing;
use palanquin_engine::{
    Destination, DestinationRecord, Epoch, Message, MigrationId, Order, PageSet, RamLayout, Root,
    Source, SourceRecord, Time, VmId,
};

use self::path::{Direction, Record, Tampering};
use self::rogue::Rogue;
use self::trust::{CHALLENGE, LAST_CHALLENGE, Trust};
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
    /// One host was a liar; the other kept its laws.
    Lied,
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
    /// Times that somebody on the path was noticed.
    pub noticed: u32,
    /// Whether the source gave up because a gate refused.
    pub refused: bool,
    /// Times that both came together again after their connection broke.
    pub rejoined: u32,
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
    /// Post-copy: a page of version 0 is not there, and whoever touches it waits.
    waits: bool,
}

#[derive(Clone, Debug)]
enum Event {
    SourceTimer,
    DestinationTimer,
    Connected(u32, bool),
    ToSource(u32, Record),
    ToDestination(u32, Record),
    SourceLost(u32),
    DestinationLost(u32),
    /// Pages, and whether they belong to a round.
    Pages(u32, Vec<(u64, u64)>, bool),
    Drained(u32, bool),
    RoundEnd(u32, u32, bool),
    Stale(u32, Vec<u64>),
    Pushed(u32),
    State(u32),
    /// A piece of it that was saved before the pause.
    EarlyState(u32),
    SourceJournal(u64, Op, SourceRecord),
    DestinationJournal(u64, Op, DestinationRecord),
    SourceDone(u64, Op, Result<SourceDone, bool>),
    DestinationDone(u64, Op, Result<DestinationDone, bool>),
    /// For the last time or not, and whether nothing is held against the destination.
    Judged(u64, Op, bool, bool),
    SourceVm(u64),
    DestinationVm(u64),
    GuestWrites,
    Cut,
    Tamper(Tampering),
    Operator,
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
    Pause(Op, bool),
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
    strategy: Strategy,
    limits: Limits,
    /// How long the source dials again, and times that this worked.
    redial: Duration,
    /// How long the destination is patient with one that copies.
    copying: Duration,
    rejoined: u32,
    post_copy_possible: bool,
    /// Longest time between two writes of the guest.
    write_delay_ms: u64,
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
    /// Pages that have arrived since the last whole round.
    received_now: PageSet,
    state_arrived: bool,
    state_sealed: bool,
    wishes: PostCopyUse,
    ran: bool,
    expecting: Option<Op>,
    corrupt: bool,
    container_killed: bool,
    // Wire.
    connection: u32,
    source_end: u32,
    destination_end: u32,
    session_connection: u32,
    black: bool,
    /// Connections up to this one have lost something.
    dead: u32,
    wire_free: u64,
    back_free: u64,
    /// The control connection: to the destination, and back.
    directions: [Direction; 2],
    tampering: Option<Tampering>,
    held: Option<(Record, bool)>,
    kept: Vec<Record>,
    noticed: u32,
    // Liars.
    rogue: Option<Rogue>,
    rogue_said: Vec<Message>,
    stale_order: bool,
    /// Journal writes so far, and the one at which an agent dies: before it is durable, or behind it.
    writes: [u32; 2],
    crash_at: [Option<(u32, bool)>; 2],
    /// When each disk has written what it was given: records become durable in order.
    disk_free: [u64; 2],
    /// This life of the destination's agent has seen the migration.
    offered: bool,
    source_write_failed: bool,
    source_attempt: u32,
    /// A law that something broke on the way.
    broken: Option<&'static str>,
    // What happened.
    doubted: bool,
    crashes: u32,
    aborted_early: bool,
    paused_memory: Option<Vec<u64>>,
    /// Whether the source's VM was paused to be saved, and is not saved.
    unsaved: bool,
    /// The destination has begun to load.
    loading: Option<Op>,
    trust: Trust,
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
        noticed: world.noticed,
        refused: world.trust.ended_it,
        rejoined: world.rejoined,
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
            waits: false,
        };
        let mut random = Random::new(seed);
        let rogue = match random.below(10) {
            0 => Some(Rogue::Source),
            1 => Some(Rogue::Destination),
            _ => None,
        };
        let stale_order = rogue == Some(Rogue::Source) && random.one_in(4);
        let strategy = Strategy::ALL[random.below(Strategy::ALL.len() as u64) as usize];
        let allowed = Allowed {
            throttle: random.one_in(2),
            post_copy: random.one_in(2),
        };
        // A pause that short makes the rounds count.
        let max_downtime = Duration::from_millis(if random.one_in(2) { 1 } else { 300 });
        // Some are not patient enough for every outage, some not at all.
        let redial = match random.below(8) {
            0 => Duration::ZERO,
            1 | 2 => Duration::from_secs(1),
            _ => Timing::default().redial,
        };
        let copying = if random.one_in(16) {
            Duration::from_millis(50 + random.below(2000))
        } else {
            Timing::default().copying
        };
        let trust = Trust::new(&mut random);
        Self {
            trust,
            redial,
            copying,
            rejoined: 0,
            strategy,
            limits: Limits {
                max_rounds: 8,
                max_downtime,
                allowed,
                ..Limits::default()
            },
            post_copy_possible: !random.one_in(5),
            write_delay_ms: if random.one_in(4) { 1 } else { 6 },
            now: 0,
            random,
            queue: BinaryHeap::new(),
            events: Vec::with_capacity(1024),
            mutation,
            received_now: PageSet::empty(&layout),
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
            state_sealed: false,
            wishes: PostCopyUse::No,
            ran: false,
            expecting: None,
            corrupt: false,
            container_killed: false,
            connection: 0,
            source_end: 0,
            destination_end: 0,
            session_connection: 0,
            black: false,
            dead: 0,
            wire_free: 0,
            back_free: 0,
            directions: Default::default(),
            tampering: None,
            held: None,
            kept: Vec::new(),
            noticed: 0,
            rogue,
            rogue_said: Vec::new(),
            stale_order,
            writes: [0; 2],
            crash_at: [None; 2],
            disk_free: [0; 2],
            offered: false,
            source_write_failed: false,
            source_attempt: 0,
            broken: None,
            doubted: false,
            crashes: 0,
            aborted_early: false,
            paused_memory: None,
            unsaved: false,
            loading: None,
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
    fn disk_delay(&mut self, host: usize) -> u64 {
        let slow = self.random.one_in(12);
        let delay = self.delay(if slow { 3000 } else { 5 });
        let at = (self.now + delay).max(self.disk_free[host] + 1);
        self.disk_free[host] = at;
        at - self.now
    }

    fn timing(&self) -> Timing {
        Timing {
            silence: Duration::from_secs(3),
            redial: self.redial,
            // Also shorter than the source's patience.
            rejoin: self.redial * 2 / 3,
            copying: self.copying,
            ..Timing::default()
        }
    }

    fn config(&self) -> SourceConfig {
        SourceConfig {
            order: self.order.clone(),
            strategy: self.strategy,
            limits: self.limits,
            layout: self.copies[0].is_some().then(|| self.layout.clone()),
            timing: self.timing(),
            software: "sim".to_owned(),
            challenge: CHALLENGE,
            last_challenge: LAST_CHALLENGE,
        }
    }

    fn destination_config(&self) -> DestinationConfig {
        DestinationConfig {
            timing: self.timing(),
            software: "sim".to_owned(),
            stream_secret: StreamSecret([0; 32]),
            streams_max: 2,
            device_state_max: 1 << 20,
            challenge: self.destination_challenge(),
        }
    }

    fn begin(&mut self) {
        let offer = Offer {
            order: self.order.clone(),
            descriptor: Vec::new(),
            region_pages: vec![PAGES],
            streams: 2,
            digest_seed: 0,
            post_copy: PostCopyUse::No,
            credentials: Vec::new(),
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
            if self.random.one_in(4) {
                // At a write of the journal, before or behind the moment when it is durable.
                let host = self.random.below(2) as usize;
                let write = 1 + self.random.below(5) as u32;
                self.crash_at[host] = Some((write, self.random.one_in(2)));
                continue;
            }
            let event = match self.random.below(12) {
                9..12 => {
                    let index = self.random.below(Tampering::ALL.len() as u64);
                    Event::Tamper(Tampering::ALL[index as usize])
                }
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
        if self.rogue.is_some() {
            self.after(2 * FAULTS_END, Event::Operator);
        }
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
        if let Some(rogue) = self.rogue {
            // Under post-copy the honest side serves, or waits for pages, as long as the liar wants: the VM has an owner.
            return match rogue {
                Rogue::Destination => {
                    let serves = |s: &Source| s.phase() == SourcePhase::PostCopy;
                    self.source_up && self.source.as_ref().is_none_or(serves)
                }
                Rogue::Source => {
                    let pulls = |d: &Destination| d.phase() == DestinationPhase::PostCopy;
                    self.destination_up && self.destination.as_ref().is_none_or(pulls)
                }
            };
        }
        // A VM whose missing pages are lost waits for its operator.
        let lost = self.copies[0].is_none()
            && self
                .destination
                .as_ref()
                .is_some_and(|d| d.phase() == DestinationPhase::PostCopy);
        self.source.is_none()
            && (self.destination.is_none() || self.killed && lost)
            && self.source_up
            && self.destination_up
            && !self.destination_busy
    }

    /// Whether the destination's journal says that the VM is its own.
    fn owned(&self) -> bool {
        let mut newest_first = self.destination_records.iter().rev();
        let decides = newest_first.find(|r| !matches!(r, DestinationRecord::Activated));
        matches!(
            decides,
            Some(DestinationRecord::Owned(_) | DestinationRecord::Pulling(_))
        )
    }

    /// Whether the source's journal says that the VM is its own. After a write that failed its engine may know more.
    fn source_may_run(&self) -> bool {
        let ours = matches!(
            self.source_records.last(),
            Some(SourceRecord::Ordered(_) | SourceRecord::Aborted(_) | SourceRecord::TakenBack(_))
                | None
        );
        ours || self.source_write_failed
    }

    fn check(&self) -> Result<(), String> {
        if let Some(law) = self.broken {
            return Err(law.to_owned());
        }
        if self.rogue.is_some() {
            return self.check_honest();
        }
        self.check_records()?;
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

    /// What both journals say together, and what can be recovered from the copies by them.
    fn check_records(&self) -> Result<(), String> {
        let [source, destination] = &self.copies;
        let runs = |copy: &Option<Copy>| copy.as_ref().is_some_and(|c| c.run == Run::Running);
        let last = self.source_records.last();
        let ours = matches!(
            last,
            Some(SourceRecord::Ordered(_) | SourceRecord::Aborted(_) | SourceRecord::TakenBack(_))
                | None
        );
        if ours && self.owned() {
            return Err("both journals say that the VM is theirs".to_owned());
        }
        if runs(source) && !self.source_may_run() {
            return Err("the source runs a VM that its journal gave away".to_owned());
        }
        if self.killed {
            return Ok(());
        }
        if runs(destination) && !self.owned() {
            return Err("the destination runs a VM that its journal does not own".to_owned());
        }
        let discarded = matches!(
            self.destination_records.last(),
            Some(DestinationRecord::Discarded(_))
        );
        if matches!(last, Some(SourceRecord::TakenBack(_))) && !discarded {
            return Err("taken back without the destination's durable discard".to_owned());
        }
        if source.is_none() {
            // What is on the destination is all there is.
            let whole = |copy: &Copy| !copy.memory.contains(&0);
            if !destination.as_ref().is_some_and(whole) {
                return Err("no copy is left that has all of its memory".to_owned());
            }
            if !self.owned() {
                return Err("the only copy left belongs to nobody".to_owned());
            }
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
        if self.killed || self.rogue.is_some() {
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
        if self.rogue.is_some() {
            Outcome::Lied
        } else if self.killed {
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
            Event::ToSource(connection, record) => {
                if connection == self.source_end && self.source_up {
                    match self.open_record(&record, true) {
                        Some(message) => self.source_receives(message),
                        None => self.tampering_noticed(true),
                    }
                }
            }
            Event::ToDestination(connection, record) => {
                if connection == self.destination_end && self.destination_up {
                    match self.open_record(&record, false) {
                        Some(message) => self.destination_receives(connection, message),
                        None => self.tampering_noticed(false),
                    }
                }
            }
            Event::Tamper(tampering) => self.tampering = Some(tampering),
            Event::Operator => {
                self.operator_steps_in();
                self.after(FAULTS_END, Event::Operator);
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
            Event::Pages(connection, pages, direct) => self.pages(connection, &pages, direct),
            Event::Drained(connection, post_copy) => {
                if connection == self.session_connection
                    && let Some(destination) = &mut self.destination
                {
                    destination.handle_drained(now, post_copy);
                }
            }
            Event::RoundEnd(connection, round, last) => {
                if connection == self.session_connection
                    && let Some(destination) = &mut self.destination
                {
                    let before = destination.rounds();
                    destination.handle_round(now, round, last);
                    if destination.rounds() != before {
                        self.received_now = PageSet::empty(&self.layout);
                    }
                }
            }
            Event::Stale(connection, pages) => self.stale(connection, &pages),
            Event::Pushed(connection) => {
                if connection == self.session_connection
                    && let Some(destination) = &mut self.destination
                {
                    destination.handle_pushed(now);
                }
            }
            Event::EarlyState(connection) => {
                if connection == self.session_connection
                    && let Some(destination) = &mut self.destination
                {
                    destination.handle_early_state(now);
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
            Event::DestinationDone(life, op, result) => {
                if life == self.destination_life
                    && let Some(destination) = &mut self.destination
                {
                    destination.handle_done(now, op, result.map_err(failed));
                }
            }
            Event::Judged(life, op, last, passes) => {
                if life == self.source_life {
                    self.judged(op, last, passes);
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
                    let answer = source.handle_abort(now, Reason::new("operator", "aborted"));
                    self.aborted_early |= early;
                    if early != (answer == AbortDisposition::Aborting) {
                        self.broken = Some("an abort was answered with what is not true");
                    }
                }
            }
            Event::KillVm(host) => self.kill_vm(host),
        }
        Ok(())
    }

    fn guest_writes(&mut self) {
        for host in 0..2 {
            let page = self.random.below(PAGES);
            let Some(copy) = &mut self.copies[host] else {
                continue;
            };
            if copy.waits && copy.memory[page as usize] == 0 {
                // Also while the device state is loaded.
                if self.destination.is_some() {
                    self.send_to_source(Message::Demand(Demand { region: 0, page }));
                }
            } else if copy.run == Run::Running {
                // A page that is not there and does not wait reads as zeros.
                self.corrupt |= copy.memory[page as usize] == 0;
                copy.memory[page as usize] += 1000;
                copy.dirty.insert(0, page..page + 1);
            }
        }
        if self.now < FAULTS_END {
            // Nobody looks at the writes of a guest that is not being moved.
            let moving = self.source.is_some() || self.destination.is_some();
            let every_ms = if moving { self.write_delay_ms } else { 250 };
            let delay = self.delay(every_ms);
            self.after(delay, Event::GuestWrites);
        }
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
