//! The destination: owns nothing until its record of ownership is durable.
//!
//! ```text
//! Greeting ─▶ AwaitOffer ─▶ Consulting ─▶ Recording ─▶ Reserving ─▶ OpeningStreams ─▶ Receiving
//!    ─▶ Loading ─▶ AwaitCommit ─▶ Owning ═▶ Activating ─▶ AwaitErased ─▶ Ended(owned)
//! any state left of ═▶ :  Terminating ─▶ RecordingDiscard ─▶ Ended(discarded)
//! ```
//!
//! A lost connection left of `Owning` discards; the container never ran. A source that had committed learns
//! that from the durable record.

use std::collections::VecDeque;
use std::time::Duration;

use crate::ids::{Epoch, Root, StreamSecret};
use crate::journal::DestinationRecord;
use crate::message::{
    Accepted, HelloReply, Message, Offer, Reason, Refused, Seal, Verdict, WireBlocker,
};
use crate::order::{Ledger, Order};
use crate::pages::RamLayout;
use crate::source::Failure;
pub use crate::source::Op;
use crate::time::{Liveness, Pulse, Time, Timing};

/// Most attempts to resume a VM that is owned.
const ACTIVATE_ATTEMPTS: u32 = 5;

/// What a destination is made of.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// Deadlines.
    pub timing: Timing,
    /// Version of the software, told to the other side.
    pub software: String,
    /// Fresh random bytes, from which the proofs that open the streams are made.
    pub stream_secret: StreamSecret,
    /// Most data streams accepted, at least 1.
    pub streams_max: u16,
    /// Largest device state accepted, in bytes.
    pub device_state_max: u64,
}

/// What the driver has to do. Actions that concern the container are executed one at a time and in order; so
/// are journal records.
#[derive(Clone, Debug, PartialEq)]
pub enum DestinationAction {
    /// Send on the connection.
    Send(Message),
    /// Look up what is known about this order; answer with [`Destination::handle_ledger`].
    ConsultLedger(Order),
    /// Make durable, then report.
    Journal(Op, DestinationRecord),
    /// Start an empty container, then report.
    Reserve(Op, Offer),
    /// Accept this many data streams that prove knowledge of the secret, report when all are open, and from
    /// then on apply what they bring.
    ExpectStreams {
        /// To report with.
        op: Op,
        /// Number of streams.
        streams: u16,
        /// Layout that every frame must fit.
        layout: RamLayout,
    },
    /// Check the device state that arrived against the seal and load it, then report.
    LoadDeviceState(Op, Seal),
    /// Compute the root over the digests of what arrived, then report.
    ComputeRoot(Op),
    /// Let the VM run (or leave it paused where the order says so), then report.
    Activate(Op),
    /// Close the streams and end the container, then report. It has never run.
    Terminate(Op),
    /// Ended; nothing follows.
    Finish(DestinationEnding),
}

/// How an action ended well.
#[derive(Clone, Debug, PartialEq)]
pub enum DestinationDone {
    /// Just done.
    Done,
    /// The container can't be had, for these reasons.
    Blocked(Vec<WireBlocker>),
    /// The root asked for.
    Root(Root),
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq)]
pub enum DestinationEnding {
    /// The VM is ours and runs.
    Owned,
    /// The VM is ours, but its hypervisor ended when or after it was resumed.
    OwnedButEnded(Reason),
    /// Nothing of it is left here.
    Discarded(Reason),
    /// Nothing was ever here.
    Refused(Reason),
}

/// Where a destination is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationPhase {
    /// Greeting and order.
    Preparing,
    /// Starting the container.
    Reserving,
    /// Pages arrive.
    Receiving,
    /// Loading the device state, and `Ready`.
    Switchover,
    /// Owned, or being recorded as such.
    Committing,
    /// Discarding.
    Finishing,
    /// Ended.
    Ended,
}

#[derive(Debug)]
enum State {
    Greeting,
    AwaitOffer,
    Consulting(Box<Offer>),
    Recording {
        op: Op,
        offer: Box<Offer>,
    },
    Reserving {
        op: Op,
    },
    OpeningStreams {
        op: Op,
    },
    Receiving {
        last: Option<u32>,
        seal: Option<Seal>,
    },
    Loading {
        load: Option<Op>,
        root_op: Op,
        root: Option<Root>,
    },
    AwaitCommit,
    Owning(Op),
    Activating {
        op: Option<Op>,
        attempts: u32,
    },
    Activated(Op),
    AwaitErased,
    Terminating {
        op: Op,
    },
    RecordingDiscard {
        op: Op,
    },
    Ended,
}

/// The state machine of a destination, see the [module](self).
#[derive(Debug)]
pub struct Destination {
    config: DestinationConfig,
    state: State,
    actions: VecDeque<DestinationAction>,
    next_op: u64,
    order: Option<Order>,
    layout: Option<RamLayout>,
    streams: u16,
    rounds: u32,
    live: Option<Liveness>,
    deadline: Option<Time>,
    reason: Option<Reason>,
    blockers: Vec<WireBlocker>,
    refused_in_words: bool,
    container_gone: bool,
    root: Option<Root>,
}

impl Destination {
    /// Begins with a connection whose other end is an authenticated host.
    pub fn new(now: Time, config: DestinationConfig) -> Self {
        let live = Some(Liveness::new(now, config.timing.silence));
        let deadline = Some(now + config.timing.handshake);
        Self {
            config,
            state: State::Greeting,
            actions: VecDeque::new(),
            next_op: 0,
            order: None,
            layout: None,
            streams: 0,
            rounds: 0,
            live,
            deadline,
            reason: None,
            blockers: Vec::new(),
            refused_in_words: false,
            container_gone: false,
            root: None,
        }
    }

    /// The order, once there is one.
    pub fn order(&self) -> Option<&Order> {
        self.order.as_ref()
    }

    /// Epoch under which this host will own the VM.
    pub fn commit_epoch(&self) -> Option<Epoch> {
        self.order.as_ref().map(|order| order.epoch.next())
    }

    /// Why it ends as it does.
    pub fn reason(&self) -> Option<&Reason> {
        self.reason.as_ref()
    }

    /// Rounds received.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// The root, once computed.
    pub fn root(&self) -> Option<Root> {
        self.root
    }

    /// Where it is.
    pub fn phase(&self) -> DestinationPhase {
        match self.state {
            State::Greeting | State::AwaitOffer | State::Consulting(_) => {
                DestinationPhase::Preparing
            }
            State::Recording { .. } | State::Reserving { .. } | State::OpeningStreams { .. } => {
                DestinationPhase::Reserving
            }
            State::Receiving { .. } => DestinationPhase::Receiving,
            State::Loading { .. } | State::AwaitCommit => DestinationPhase::Switchover,
            State::Owning(_)
            | State::Activating { .. }
            | State::Activated(_)
            | State::AwaitErased => DestinationPhase::Committing,
            State::Terminating { .. } | State::RecordingDiscard { .. } => {
                DestinationPhase::Finishing
            }
            State::Ended => DestinationPhase::Ended,
        }
    }

    /// Whether this side still may discard.
    pub fn may_discard(&self) -> bool {
        !matches!(
            self.phase(),
            DestinationPhase::Committing | DestinationPhase::Finishing | DestinationPhase::Ended
        )
    }

    /// The next action, until there is none.
    pub fn poll_action(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// When [`Destination::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Time> {
        if matches!(self.state, State::Ended) {
            return None;
        }
        [self.deadline, self.live.as_ref().map(Liveness::next)]
            .into_iter()
            .flatten()
            .min()
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Time) {
        if let Some(live) = self.live {
            match live.pulse(now) {
                Pulse::Quiet => {}
                Pulse::Ping => self.send(now, Message::Ping),
                Pulse::Lost => {
                    let what = "the source has not been heard any more";
                    self.handle_connection_lost(now, Reason::new("peer-silent", what));
                }
            }
        }
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.deadline = None;
            match &mut self.state {
                State::Activating { op, .. } if op.is_none() => {
                    let again = Op(self.next_op);
                    self.next_op += 1;
                    *op = Some(again);
                    self.actions.push_back(DestinationAction::Activate(again));
                }
                State::AwaitErased => self.finish(DestinationEnding::Owned),
                _ => self.discard(now, Reason::new("timeout", "the source took too long")),
            }
        }
    }

    /// The connection is lost.
    pub fn handle_connection_lost(&mut self, now: Time, reason: Reason) {
        self.live = None;
        match self.state {
            State::AwaitErased => self.finish(DestinationEnding::Owned),
            _ => self.discard(now, reason),
        }
    }

    /// The source asks on another connection what became of this migration: it has lost this one.
    pub fn handle_query(&mut self, now: Time) {
        let what = "the source lost the connection and asks anew";
        self.discard(now, Reason::new("connection-lost", what));
    }

    /// The container's hypervisor ended by itself.
    pub fn handle_container_gone(&mut self, now: Time) {
        let what = "the container's hypervisor ended on the destination";
        self.container_gone = true;
        self.discard(now, Reason::new("container-ended", what));
    }

    /// The operator or the agent wants to end the migration; false if it is too late.
    pub fn handle_abort(&mut self, now: Time, reason: Reason) -> bool {
        let may = self.may_discard();
        self.discard(now, reason);
        may
    }

    /// A message arrived.
    pub fn handle_message(&mut self, now: Time, message: Message) {
        if let Some(live) = &mut self.live {
            live.heard(now);
        }
        let may_discard = self.may_discard();
        match (&mut self.state, message) {
            (_, Message::Ping) => {}
            (State::Greeting, Message::Hello(hello)) => {
                let reply = HelloReply::to(&hello, &self.config.software);
                let common = reply.version.is_some();
                self.state = State::AwaitOffer;
                self.deadline = Some(now + self.config.timing.handshake);
                self.send(now, Message::HelloReply(reply));
                if !common {
                    let what = "no common version of the protocol";
                    self.finish_refused(Reason::new("protocol-version", what));
                }
            }
            (State::AwaitOffer, Message::Offer(offer)) => {
                self.deadline = None;
                self.order = Some(offer.order.clone());
                match RamLayout::new(offer.region_pages.clone()) {
                    Ok(layout) => self.layout = Some(layout),
                    Err(error) => {
                        let blocker = WireBlocker {
                            code: "ram-layout".to_owned(),
                            message: error.to_string(),
                            remedy: "Report this: the source offered a VM that cannot exist."
                                .to_owned(),
                        };
                        return self.refuse(now, true, vec![blocker]);
                    }
                }
                self.streams = offer.streams.min(self.config.streams_max).max(1);
                self.actions
                    .push_back(DestinationAction::ConsultLedger(offer.order.clone()));
                self.state = State::Consulting(Box::new(offer));
            }
            (State::Receiving { seal, last }, Message::Seal(sealed)) if seal.is_none() => {
                if sealed.device_state_bytes == 0
                    || sealed.device_state_bytes > self.config.device_state_max
                {
                    let what = "the device state is empty or larger than this host accepts";
                    return self.discard(now, Reason::new("device-state-size", what));
                }
                let complete = *last == Some(sealed.rounds);
                *seal = Some(sealed);
                if complete {
                    self.load();
                }
            }
            (State::AwaitCommit, Message::Commit(epoch)) => {
                if Some(epoch) != self.commit_epoch() {
                    let what = "the source committed another epoch than it ordered";
                    return self.discard(now, Reason::new("epoch-mismatch", what));
                }
                let op = self.journal(DestinationRecord::Owned(epoch));
                self.state = State::Owning(op);
            }
            (State::AwaitErased, Message::Erased) => self.finish(DestinationEnding::Owned),
            (_, Message::Abort(reason)) if may_discard => self.discard(now, reason),
            (_, message) if may_discard => {
                let what = format!("the source sent {} out of turn", message.name());
                self.discard(now, Reason::new("peer-misbehaved", what));
            }
            _ => {}
        }
    }

    /// What is known about the order.
    pub fn handle_ledger(&mut self, now: Time, ledger: &Ledger) {
        if !matches!(self.state, State::Consulting(_)) {
            return;
        }
        let State::Consulting(offer) = std::mem::replace(&mut self.state, State::AwaitOffer) else {
            return;
        };
        match offer.order.judge(ledger) {
            Ok(()) => {
                let op = self.journal(DestinationRecord::Reserved(offer.order.clone()));
                self.state = State::Recording { op, offer };
            }
            Err(error) => {
                let blocker = WireBlocker {
                    code: error.code().to_owned(),
                    message: error.to_string(),
                    remedy: remedy(error.code()).to_owned(),
                };
                self.refuse(now, error.is_refusal(), vec![blocker]);
            }
        }
    }

    /// All streams have delivered this round.
    pub fn handle_round(&mut self, now: Time, round: u32, is_last: bool) {
        let State::Receiving { last, seal } = &mut self.state else {
            return;
        };
        if round != self.rounds + 1 || last.is_some() {
            let what = "a round arrived out of turn";
            return self.discard(now, Reason::new("peer-misbehaved", what));
        }
        self.rounds = round;
        if is_last {
            *last = Some(round);
        }
        let complete = is_last && seal.as_ref().is_some_and(|seal| seal.rounds == round);
        self.send(now, Message::RoundReceived(round));
        if complete {
            self.load();
        }
    }

    /// An action ended.
    pub fn handle_done(&mut self, now: Time, op: Op, result: Result<DestinationDone, Failure>) {
        match result {
            Ok(done) => self.done(now, op, done),
            Err(failure) => self.failed(now, op, failure),
        }
    }

    fn done(&mut self, now: Time, op: Op, done: DestinationDone) {
        match (&mut self.state, done) {
            (
                State::Recording {
                    op: expected,
                    offer,
                },
                DestinationDone::Done,
            ) if *expected == op => {
                let offer = (**offer).clone();
                let op = self.op();
                self.state = State::Reserving { op };
                self.actions
                    .push_back(DestinationAction::Reserve(op, offer));
            }
            (State::Reserving { op: expected }, DestinationDone::Done) if *expected == op => {
                let Some(layout) = self.layout.clone() else {
                    return;
                };
                let (op, streams) = (self.op(), self.streams);
                self.state = State::OpeningStreams { op };
                self.deadline = Some(now + self.config.timing.handshake);
                self.actions.push_back(DestinationAction::ExpectStreams {
                    op,
                    streams,
                    layout,
                });
                let stream_secret = self.config.stream_secret;
                self.send(
                    now,
                    Message::Accepted(Accepted {
                        streams,
                        stream_secret,
                    }),
                );
            }
            (State::Reserving { op: expected }, DestinationDone::Blocked(mut blockers))
                if *expected == op =>
            {
                blockers.truncate(crate::message::BLOCKERS_MAX);
                self.send(
                    now,
                    Message::Refused(Refused {
                        by_gate: false,
                        blockers: blockers.clone(),
                    }),
                );
                self.refused_in_words = true;
                self.blockers = blockers;
                let what = "this host can't take the VM";
                self.discard(now, Reason::new("blocked", what));
            }
            (State::OpeningStreams { op: expected }, DestinationDone::Done) if *expected == op => {
                self.deadline = None;
                self.state = State::Receiving {
                    last: None,
                    seal: None,
                };
                self.send(now, Message::StreamsReady);
            }
            (State::Loading { load, .. }, DestinationDone::Done) if *load == Some(op) => {
                *load = None;
                self.ready(now);
            }
            (State::Loading { root_op, root, .. }, DestinationDone::Root(computed))
                if *root_op == op =>
            {
                *root = Some(computed);
                self.ready(now);
            }
            (State::Owning(expected), DestinationDone::Done)
                if *expected == op && self.container_gone =>
            {
                // It ended before it was ever told to run: the source's copy is the newest, and a durable
                // discard gives the VM back, see [`crate::journal::verdict`].
                let what = "the container's hypervisor ended on the destination before it ran";
                self.reason = Some(Reason::new("container-ended", what));
                self.terminate();
            }
            (State::Owning(expected), DestinationDone::Done) if *expected == op => {
                let op = self.op();
                self.state = State::Activating {
                    op: Some(op),
                    attempts: 0,
                };
                self.actions.push_back(DestinationAction::Activate(op));
            }
            (State::Activating { op: expected, .. }, DestinationDone::Done)
                if *expected == Some(op) =>
            {
                if let Some(epoch) = self.commit_epoch() {
                    self.send(now, Message::Running(epoch));
                }
                let op = self.journal(DestinationRecord::Activated);
                self.state = State::Activated(op);
            }
            (State::Activated(expected), DestinationDone::Done) if *expected == op => {
                self.activated(now);
            }
            (State::Terminating { op: expected }, DestinationDone::Done) if *expected == op => {
                self.record_discard();
            }
            (State::RecordingDiscard { op: expected }, DestinationDone::Done)
                if *expected == op =>
            {
                let reason = self.reason_or_unknown();
                if !self.refused_in_words {
                    self.send(now, Message::Discarded(reason.clone()));
                }
                self.finish(DestinationEnding::Discarded(reason));
            }
            _ => {}
        }
    }

    fn failed(&mut self, now: Time, op: Op, failure: Failure) {
        let concerns_us = self.may_discard() && self.is_current(op);
        match &mut self.state {
            State::Owning(expected) if *expected == op => {
                // The VM has not run here. Whether the record is on the disk is unknown; a durable discard
                // after it overrules it, see [`crate::journal::verdict`].
                self.reason = Some(failure.reason);
                self.terminate();
            }
            State::Activating {
                op: expected,
                attempts,
            } if *expected == Some(op) => {
                *expected = None;
                *attempts += 1;
                if failure.vm_gone {
                    // It may have run for a moment: it is ours, and it ended here.
                    if let Some(epoch) = self.commit_epoch() {
                        self.send(now, Message::Verdict(Verdict::Owned(epoch)));
                    }
                    self.finish(DestinationEnding::OwnedButEnded(failure.reason));
                } else if *attempts >= ACTIVATE_ATTEMPTS {
                    // It stayed paused all the time: it never ran here, so it can be given back.
                    self.reason = Some(failure.reason);
                    self.terminate();
                } else {
                    self.deadline = Some(now + Duration::from_millis(200));
                }
            }
            State::Activated(expected) if *expected == op => self.activated(now),
            // A container that can't be ended is never resumed either; the record is what counts.
            State::Terminating { op: expected } if *expected == op => self.record_discard(),
            State::RecordingDiscard { op: expected } if *expected == op => {
                // Without a durable record nothing may be claimed; the source asks again later.
                self.finish(DestinationEnding::Discarded(failure.reason));
            }
            _ if concerns_us => self.discard(now, failure.reason),
            _ => {}
        }
    }

    fn load(&mut self) {
        let State::Receiving {
            seal: Some(seal), ..
        } = &self.state
        else {
            return;
        };
        let seal = seal.clone();
        let load = self.op();
        let root_op = self.op();
        self.state = State::Loading {
            load: Some(load),
            root_op,
            root: None,
        };
        self.actions
            .push_back(DestinationAction::ComputeRoot(root_op));
        self.actions
            .push_back(DestinationAction::LoadDeviceState(load, seal));
    }

    fn ready(&mut self, now: Time) {
        let State::Loading {
            load: None,
            root: Some(root),
            ..
        } = self.state
        else {
            return;
        };
        self.root = Some(root);
        self.state = State::AwaitCommit;
        self.send(now, Message::Ready(root));
    }

    fn activated(&mut self, now: Time) {
        if self.live.is_some() {
            self.state = State::AwaitErased;
            // The source erases in its own time; that it has not yet is no reason to wait for ever.
            self.deadline = Some(now + self.config.timing.reservation);
        } else {
            self.finish(DestinationEnding::Owned);
        }
    }

    fn refuse(&mut self, now: Time, by_gate: bool, blockers: Vec<WireBlocker>) {
        let reason = blockers.first().map_or_else(
            || Reason::new("refused", "refused"),
            |blocker| Reason::new(&blocker.code, blocker.message.clone()),
        );
        self.send(now, Message::Refused(Refused { by_gate, blockers }));
        self.finish_refused(reason);
    }

    fn finish_refused(&mut self, reason: Reason) {
        self.reason = Some(reason.clone());
        self.finish(DestinationEnding::Refused(reason));
    }

    /// Gives the migration up, unless it is owned.
    fn discard(&mut self, _now: Time, reason: Reason) {
        if !self.may_discard() {
            return;
        }
        match self.state {
            // Nothing is here yet and nothing is recorded.
            State::Greeting | State::AwaitOffer | State::Consulting(_) => {
                self.finish_refused(reason);
            }
            _ => {
                self.reason.get_or_insert(reason);
                self.terminate();
            }
        }
    }

    fn terminate(&mut self) {
        let op = self.op();
        self.deadline = None;
        self.state = State::Terminating { op };
        self.actions.push_back(DestinationAction::Terminate(op));
    }

    fn record_discard(&mut self) {
        let reason = self.reason_or_unknown();
        let op = self.journal(DestinationRecord::Discarded(reason));
        self.state = State::RecordingDiscard { op };
    }

    fn finish(&mut self, ending: DestinationEnding) {
        self.deadline = None;
        self.live = None;
        self.state = State::Ended;
        self.actions.push_back(DestinationAction::Finish(ending));
    }

    fn reason_or_unknown(&self) -> Reason {
        self.reason
            .clone()
            .unwrap_or_else(|| Reason::new("unknown", "no reason was recorded"))
    }

    fn is_current(&self, op: Op) -> bool {
        match &self.state {
            State::Recording { op: expected, .. }
            | State::Reserving { op: expected }
            | State::OpeningStreams { op: expected } => *expected == op,
            State::Loading { load, root_op, .. } => *load == Some(op) || *root_op == op,
            _ => false,
        }
    }

    fn op(&mut self) -> Op {
        let op = Op(self.next_op);
        self.next_op += 1;
        op
    }

    fn journal(&mut self, record: DestinationRecord) -> Op {
        let op = self.op();
        self.actions
            .push_back(DestinationAction::Journal(op, record));
        op
    }

    fn send(&mut self, now: Time, message: Message) {
        if let Some(live) = &mut self.live {
            live.spoke(now);
            self.actions.push_back(DestinationAction::Send(message));
        }
    }
}

/// What to do about an order that was refused with this code.
pub fn remedy(code: &str) -> &'static str {
    match code {
        "order-expired" => "Compare the clocks of both hosts, then try again.",
        "order-stale-epoch" => {
            "The VM has moved on since: find its newest owner and remove the old copy."
        }
        "vm-present" => "Stop or rename the VM on the destination.",
        "host-full" => "Wait until other migrations to that host have ended.",
        "order-replayed" => "Start a new migration.",
        _ => "Check the names of both hosts and in their certificates.",
    }
}
