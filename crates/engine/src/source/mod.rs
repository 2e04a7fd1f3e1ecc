//! The source: owns the VM until its commit record is durable.
//!
//! ```text
//! Ordering ─▶ Connecting ─▶ Greeting ─▶ Vouching ─▶ Offering ─▶ Judging ─▶ OpeningStreams ─▶ Arming
//!    ─▶ Collecting ⇄ Sending | Calm ─▶ Pausing ─▶ Draining ─▶ AwaitReady
//!    ─▶ Committing ═▶ AwaitRunning ─▶ Releasing ─▶ Erasing ─▶ Closing ─▶ Ended
//!                          │  ▲
//!                          ▼  │ verdict
//!                        InDoubt ─▶ TakingBack ─▶ Resuming ─▶ Ended
//! post-copy:  AwaitRunning ─▶ Serving ─▶ Verifying ─▶ Releasing …
//!                                │ ▲
//!                                ▼ │ streams, pages present
//!                        InDoubt ─▶ Rejoining
//! Arming, Collecting, Sending, Calm ⇄ Redialling
//! any state left of ═▶ :  Resuming ─▶ RecordingAbort ─▶ Ended(running on the source)
//! ```
//!
//! Left of `═▶` the VM may be resumed at any time; right of it only the destination's durable answer decides. Left of
//! `OpeningStreams` nothing of the VM has left; `AwaitReady` waits for equal roots and for the second judgement.

mod action;
mod judging;
mod post_copy;
mod present;
mod redial;
mod state;
mod steps;
mod turn_back;

use std::collections::VecDeque;
use std::time::Duration;

pub use self::action::{
    AbortDisposition, Ending, Failure, Op, RoundMark, SourceAction, SourceConfig, SourceDone,
    SourcePhase,
};
use self::judging::LastJudgement;
use self::post_copy::PostCopy;
use self::state::{
    AfterResume, Doubt, Draining, DrainingPages, Interrupted, Link, Redialling, Sending,
    SendingStep, State, Step,
};
use crate::ids::{Epoch, Root};
use crate::journal::{SourceRecord, SourceRecovery};
use crate::message::{Hello, Message, Offer, Query, Reason, Verdict, WireBlocker};
use crate::order::Order;
use crate::pages::{PageSet, RamLayout};
use crate::progress::{Progress, SentCounters};
use crate::strategy::Scheduler;
use crate::time::{Liveness, Pulse, Time};

/// Most attempts to resume a VM that stays paused.
const RESUME_ATTEMPTS: u32 = 5;
/// Longest delay before dialling again while pages are to be sent.
const REDIAL_MAX_COPYING: Duration = Duration::from_secs(1);

/// The state machine of a source, see the [module](self).
#[derive(Clone, Debug)]
pub struct Source {
    config: SourceConfig,
    offer: Option<Offer>,
    state: State,
    actions: VecDeque<SourceAction>,
    next_op: u64,
    attempt: u32,
    redials: u32,
    live: Option<Liveness>,
    deadline: Option<Time>,
    round_acknowledged: u32,
    touched: PageSetOnce,
    reason: Option<Reason>,
    blockers: Vec<WireBlocker>,
    vm_may_be_paused: bool,
    vm_gone: bool,
    root: Option<Root>,
    mark: Time,
    progress: Progress,
    scheduler: Scheduler,
    layout: Option<RamLayout>,
    /// Pages that wait for the last round.
    backlog: Option<PageSet>,
    /// Pages given to the streams in this round.
    round_sent_pages: u64,
    post_copy: Option<PostCopy>,
    pages_lost: bool,
    /// Whether the destination has said that it runs the VM and needs pages.
    told_pulling: bool,
    /// Why the VM ended on the destination, which owned it.
    ended_there: Option<Reason>,
    /// Whether this goes on after a restart: then it is not known how the VM was sealed.
    recovered: bool,
    /// Data streams that were agreed on, and whether there is one more for pages that the VM waits for.
    streams: Option<(u16, bool)>,
    /// The connection broke since the last collection.
    interrupted: bool,
    /// Reconnections one after the other before which nothing arrived.
    stalled: u32,
    /// Whole rounds that had arrived at the newest reconnection, and pages of the next.
    arrived_before: (u32, u64),
    /// The migration ended here, and the destination may wait for its source.
    untold: bool,
    /// A gate refused.
    refused: bool,
}

/// Pages sent at least once, to count what is sent again.
type PageSetOnce = Option<PageSet>;

impl Source {
    /// Begins a migration.
    pub fn new(now: Time, config: SourceConfig, offer: Offer) -> Self {
        let mut source = Self::at(now, config, Some(offer));
        let record = SourceRecord::Ordered(source.config.order.clone());
        let op = source.journal(record);
        source.state = State::Ordering(op);
        source
    }

    /// Goes on after a restart of the agent, from the newest durable record. The VM may be paused.
    pub fn recover(now: Time, config: SourceConfig, record: &SourceRecord) -> Self {
        let mut source = Self::at(now, config, None);
        source.recovered = true;
        source.untold = matches!(record, SourceRecord::Ordered(_));
        let restarted = Reason::new("agent-restarted", "the agent of the source was restarted");
        match record.recovery() {
            SourceRecovery::Resume => {
                source.vm_may_be_paused = true;
                let after = match record {
                    SourceRecord::TakenBack(_) => AfterResume::Finish,
                    _ => AfterResume::RecordAbort,
                };
                source.reason = Some(restarted);
                source.resume(after);
            }
            SourceRecovery::AskDestination(_) => {
                source.reason = Some(restarted);
                source.state = State::InDoubt(Doubt::Waiting);
                source.deadline = Some(now);
            }
            SourceRecovery::Erase => source.erase(),
            SourceRecovery::Nothing => source.state = State::Ended,
        }
        source
    }

    fn at(now: Time, config: SourceConfig, offer: Option<Offer>) -> Self {
        let scheduler = Scheduler::new(config.strategy, config.limits);
        let offer = offer.map(|offer| Offer {
            post_copy: scheduler.post_copy_use(),
            ..offer
        });
        Self {
            scheduler,
            layout: config.layout.clone(),
            backlog: None,
            round_sent_pages: 0,
            post_copy: None,
            pages_lost: false,
            told_pulling: false,
            ended_there: None,
            recovered: false,
            streams: None,
            interrupted: false,
            stalled: 0,
            arrived_before: (0, 0),
            untold: false,
            refused: false,
            config,
            offer,
            state: State::Ended,
            actions: VecDeque::new(),
            next_op: 0,
            attempt: 0,
            redials: 0,
            live: None,
            deadline: None,
            round_acknowledged: 0,
            touched: None,
            reason: None,
            blockers: Vec::new(),
            vm_may_be_paused: false,
            vm_gone: false,
            root: None,
            mark: now,
            progress: Progress::new(now),
        }
    }

    /// The order.
    pub fn order(&self) -> &Order {
        &self.config.order
    }

    /// Epoch under which the destination will own the VM.
    pub fn commit_epoch(&self) -> Epoch {
        self.config.order.epoch.next()
    }

    /// Epoch under which the source owns a VM that it took back after its commit.
    pub fn taken_back_epoch(&self) -> Epoch {
        self.commit_epoch().next()
    }

    /// Why the migration ends as it does, or what it waits for.
    pub fn reason(&self) -> Option<&Reason> {
        self.reason.as_ref()
    }

    /// The root, once the destination has confirmed it.
    pub fn verified_root(&self) -> Option<Root> {
        self.root
    }

    /// Progress so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Whether the source still may resume the VM on its own decision.
    pub fn may_turn_back(&self) -> bool {
        !matches!(
            self.state,
            State::Committing(_)
                | State::AwaitRunning
                | State::Serving
                | State::Rejoining { .. }
                | State::Verifying { .. }
                | State::InDoubt(_)
                | State::Releasing(_)
                | State::Erasing { .. }
                | State::Closing(_)
                | State::Retrying(_)
                | State::TakingBack(_)
                | State::Ended
        )
    }

    /// Where it is.
    pub fn phase(&self) -> SourcePhase {
        match self.state {
            State::Ordering(_) | State::Connecting | State::Greeting | State::Vouching(_) => {
                SourcePhase::Preparing
            }
            State::Offering | State::Judging { .. } | State::OpeningStreams { .. } => {
                SourcePhase::Reserving
            }
            State::Arming(_)
            | State::Collecting(_)
            | State::Sending(_)
            | State::Calm
            | State::Redialling(_) => SourcePhase::PreCopy,
            State::Pausing { .. } | State::Draining(_) | State::AwaitReady { .. } => {
                SourcePhase::Switchover
            }
            State::Committing(_) | State::AwaitRunning => SourcePhase::Committing,
            State::Serving | State::Rejoining { .. } | State::Verifying { .. } => {
                SourcePhase::PostCopy
            }
            State::InDoubt(_) if self.runs_on_destination() => SourcePhase::PostCopy,
            State::InDoubt(_) => SourcePhase::InDoubt,
            State::Releasing(_)
            | State::Erasing { .. }
            | State::Closing(_)
            | State::Retrying(_)
            | State::TakingBack(_)
            | State::Resuming { .. }
            | State::RecordingAbort { .. } => SourcePhase::Finishing,
            State::Ended => SourcePhase::Ended,
        }
    }

    /// The next action, until there is none.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When [`Source::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Time> {
        if matches!(self.state, State::Ended) {
            return None;
        }
        let live = self.live.as_ref().map(Liveness::next);
        let overall = self
            .copying()
            .then(|| self.progress.began + self.config.limits.deadline);
        [self.deadline, live, overall].into_iter().flatten().min()
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Time) {
        if let Some(live) = self.live {
            match live.pulse(now) {
                Pulse::Quiet => {}
                Pulse::Ping => self.send(now, Message::Ping),
                Pulse::Lost => {
                    let reason =
                        Reason::new("peer-silent", "the destination has not been heard any more");
                    self.connection_lost(now, reason);
                }
            }
        }
        if self.copying() && now >= self.progress.began + self.config.limits.deadline {
            let reason = match &self.state {
                State::Redialling(_) => self.not_reached_again(),
                _ => self.why_not_done(),
            };
            return self.abort(now, reason);
        }
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.deadline = None;
            self.deadline_passed(now);
        }
    }

    fn deadline_passed(&mut self, now: Time) {
        let may_turn_back = self.may_turn_back();
        match &mut self.state {
            State::Resuming { op, .. } if op.is_none() => {
                let again = Op(self.next_op);
                self.next_op += 1;
                *op = Some(again);
                self.actions.push_back(SourceAction::Resume(again));
            }
            State::InDoubt(Doubt::Waiting) => self.dial(now),
            State::Calm => self.collect(false),
            State::Redialling(_) => self.redialling_too_long(now),
            State::Rejoining { .. } => {
                let reason = Reason::new("peer-silent", "the destination does not go on");
                self.connection_lost(now, reason);
            }
            State::Retrying(Step::Release) => self.release(self.commit_epoch()),
            State::Retrying(Step::Erase) => self.erase(),
            State::Retrying(Step::Close) => self.close(),
            State::InDoubt(_) | State::AwaitRunning => {
                let reason = Reason::new("peer-silent", "the destination does not answer");
                self.connection_lost(now, reason);
            }
            _ if may_turn_back => {
                let what = match self.state {
                    State::Connecting => "the destination could not be reached in time",
                    State::Greeting => "the destination's agent did not answer the greeting",
                    State::Vouching(_) => "the credentials of this host were not ready in time",
                    State::Judging { .. } => "the destination was not judged in time",
                    State::Offering => "the destination did not answer the offer in time",
                    State::OpeningStreams { .. } => "the data streams did not open in time",
                    _ => "the switchover took too long",
                };
                self.abort(now, Reason::new("timeout", what));
            }
            _ => {}
        }
    }

    /// The operator or the driver wants to end the migration.
    pub fn handle_abort(&mut self, now: Time, reason: Reason) -> AbortDisposition {
        if matches!(
            self.state,
            State::Resuming { .. } | State::RecordingAbort { .. }
        ) {
            return AbortDisposition::Aborting;
        }
        if !self.may_turn_back() {
            return AbortDisposition::TooLate;
        }
        self.abort(now, reason);
        AbortDisposition::Aborting
    }

    /// The VM's hypervisor ended by itself.
    pub fn handle_vm_gone(&mut self, now: Time) {
        self.vm_gone = true;
        if self.may_turn_back() {
            let reason = Reason::new("vm-ended", "the VM's hypervisor ended on the source");
            self.abort(now, reason);
        }
        // In doubt the destination is told once it is connected again, see `rejoin`.
        if matches!(self.state, State::Serving | State::Rejoining { .. }) {
            self.lose_pages(now);
        }
    }

    /// The VM could not be throttled.
    pub fn handle_throttle_failed(&mut self, reason: &Reason) {
        self.scheduler.throttle_failed();
        self.progress.throttle_share = 1.0;
        self.note(&format!("the VM cannot be throttled: {reason}"));
    }

    /// Whether this goes on after a restart of the agent.
    pub fn is_recovered(&self) -> bool {
        self.recovered
    }

    /// Whether the VM is known to run on the destination while pages of it are still here.
    pub fn runs_on_destination(&self) -> bool {
        self.told_pulling || self.post_copy.as_ref().is_some_and(|post| post.runs)
    }

    /// What the streams have sent so far, over the whole migration.
    pub fn handle_sent(&mut self, sent: SentCounters) {
        self.progress.sent(sent);
    }

    /// The connection of this attempt stands; the other end is the destination the order names.
    pub fn handle_connected(&mut self, now: Time, attempt: u32) {
        if attempt != self.attempt {
            return;
        }
        let hello = Hello::ours(&self.config.software, self.config.challenge);
        let hello = Message::Hello(hello);
        match self.state {
            State::Connecting => self.state = State::Greeting,
            State::InDoubt(Doubt::Dialling) => self.state = State::InDoubt(Doubt::Greeting),
            State::Redialling(ref mut redialling) if matches!(redialling.link, Link::Dialling) => {
                redialling.link = Link::Greeting;
            }
            _ => return,
        }
        self.live = Some(Liveness::new(now, self.config.timing.silence));
        self.deadline = Some(now + self.config.timing.handshake);
        self.send(now, hello);
    }

    /// The connection of this attempt could not be made or is lost.
    pub fn handle_connection_lost(&mut self, now: Time, attempt: u32, reason: Reason) {
        if attempt == self.attempt {
            self.connection_lost(now, reason);
        }
    }

    /// A data stream of the newest connection broke. The connection may still tell why.
    pub fn handle_stream_lost(&mut self, now: Time, reason: Reason) {
        if self.may_redial() && !matches!(self.state, State::Redialling(_)) {
            self.redial(now, reason, true);
        } else {
            self.connection_lost(now, reason);
        }
    }

    fn connection_lost(&mut self, now: Time, reason: Reason) {
        self.live = None;
        match self.state {
            // We have closed it ourselves, and know better why.
            State::InDoubt(Doubt::Waiting) => {}
            State::AwaitRunning | State::InDoubt(_) | State::Serving | State::Rejoining { .. } => {
                self.doubt(now, reason);
            }
            // The record is on its way to the disk: when it is there we are in doubt.
            State::Committing(_) => self.reason = Some(reason),
            _ if self.may_redial() => self.redial(now, reason, false),
            _ if self.may_turn_back() => self.abort(now, reason),
            _ => {}
        }
    }

    /// A message arrived on the connection of this attempt.
    pub fn handle_message(&mut self, now: Time, attempt: u32, message: Message) {
        if attempt != self.attempt {
            return;
        }
        if let Some(live) = &mut self.live {
            live.heard(now);
        }
        let may_turn_back = self.may_turn_back();
        let turning_back = self.turning_back();
        match (&mut self.state, message) {
            (_, Message::Ping) | (State::Ended, _) => {}
            (State::Redialling(_), message) => self.told_while_redialling(now, message),
            (State::Greeting, Message::HelloReply(reply)) => self.greeted(now, &reply),
            (State::Offering, Message::Refused(refused)) => self.refused_there(now, refused),
            (State::Offering, Message::Accepted(accepted)) => self.accepted(now, accepted),
            (State::OpeningStreams { ready, opened, .. }, Message::StreamsReady) => {
                *ready = true;
                if *opened {
                    self.arm();
                }
            }
            (
                State::Collecting(_)
                | State::Sending(_)
                | State::Pausing { .. }
                | State::Draining(_)
                | State::AwaitReady { .. },
                Message::RoundReceived(round),
            ) => {
                if round != self.round_acknowledged + 1 || round > self.progress.rounds {
                    return self.misbehaved(now, "it acknowledged a round that was not sent");
                }
                self.round_acknowledged = round;
                let sent = matches!(
                    &self.state,
                    State::Sending(Sending {
                        step: SendingStep::Acknowledged,
                        ..
                    })
                );
                if sent {
                    self.collect(false);
                }
            }
            (State::AwaitReady { theirs: None, .. }, Message::Ready(ready)) => {
                self.ready_there(now, ready);
            }
            (State::AwaitRunning, Message::Running(epoch))
                if self.post_copy.is_some() && epoch == self.config.order.epoch.next() =>
            {
                self.progress.downtime.resume = now - self.mark;
                self.serve();
            }
            (State::AwaitRunning | State::InDoubt(_), Message::Running(epoch))
                if self.post_copy.is_none() && epoch == self.config.order.epoch.next() =>
            {
                self.progress.downtime.resume = now - self.mark;
                self.release(epoch);
            }
            (
                State::Draining(_)
                | State::AwaitReady { .. }
                | State::Committing(_)
                | State::AwaitRunning
                | State::Serving
                | State::Rejoining { .. },
                Message::Demand(demand),
            ) if self.post_copy.is_some() => self.demanded(now, demand),
            (State::Serving, Message::Complete(complete)) => self.completed(complete),
            (State::Rejoining { ready, .. }, Message::StreamsReady) => {
                *ready = true;
                self.rejoined(now);
            }
            (State::Rejoining { .. }, Message::Present(present)) => {
                self.told_present(now, &present);
            }
            (State::AwaitRunning | State::InDoubt(_), Message::Discarded(reason))
                if !(self.told_pulling
                    || self.post_copy.as_ref().is_some_and(|post| post.runs)) =>
            {
                self.reason = Some(reason);
                self.take_back();
            }
            (State::AwaitRunning | State::Serving, Message::Verdict(Verdict::Owned(epoch)))
                if epoch == self.config.order.epoch.next() =>
            {
                let what = "the destination owns the VM, but its hypervisor ended there";
                let reason = Reason::new("vm-ended-on-destination", what);
                self.reason = Some(reason.clone());
                self.ended_there = Some(reason);
                self.release(epoch);
            }
            (State::InDoubt(doubt @ Doubt::Greeting), Message::HelloReply(reply))
                if reply.version.is_some() =>
            {
                *doubt = Doubt::Asked;
                let Order { migration, vm, .. } = self.config.order;
                self.deadline = Some(now + self.config.timing.handshake);
                self.send(now, Message::Query(Query { migration, vm }));
            }
            (State::InDoubt(Doubt::Asked), Message::Verdict(verdict)) => self.judged(now, verdict),
            (_, Message::Discarded(reason) | Message::Abort(reason)) if may_turn_back => {
                self.abort(now, reason);
            }
            // What arrives late, after we have turned back, says nothing any more.
            (_, message) if may_turn_back && !turning_back => {
                let what = format!("it sent {} out of turn", message.name());
                self.misbehaved(now, &what);
            }
            _ => {}
        }
    }

    /// An action ended.
    pub fn handle_done(&mut self, now: Time, op: Op, result: Result<SourceDone, Failure>) {
        match result {
            Ok(done) => self.done(now, op, done),
            Err(failure) => self.failed(now, op, failure),
        }
    }

    fn done(&mut self, now: Time, op: Op, done: SourceDone) {
        let is_post_copy = self.is_post_copy(op);
        match (&mut self.state, done) {
            (State::Redialling(redialling), done) => {
                redialling.done(op, done);
                self.go_on(now);
            }
            (State::Ordering(expected), SourceDone::Done) if *expected == op => {
                self.state = State::Connecting;
                self.deadline = Some(now + self.config.timing.handshake);
                self.attempt += 1;
                self.actions.push_back(SourceAction::Connect {
                    attempt: self.attempt,
                });
            }
            (State::Vouching(expected), SourceDone::Vouched(credentials)) if *expected == op => {
                self.vouched(now, credentials);
            }
            (State::Judging { op: expected, .. }, SourceDone::Done) if *expected == op => {
                self.trusted(now);
            }
            (State::AwaitReady { judged, .. }, SourceDone::Done)
                if *judged == LastJudgement::Judging(op) =>
            {
                *judged = LastJudgement::Passed;
                self.compare(now);
            }
            (
                State::OpeningStreams {
                    op: expected,
                    opened,
                    ready,
                },
                SourceDone::Done,
            ) if *expected == op => {
                *opened = true;
                if *ready {
                    self.arm();
                }
            }
            (State::Arming(expected), SourceDone::Done) if *expected == op => self.collect(true),
            (State::Collecting(expected), SourceDone::Collected(pages)) if *expected == op => {
                self.collected(now, pages);
            }
            (
                State::Sending(Sending {
                    step: SendingStep::Peeking(expected),
                    ..
                }),
                SourceDone::Collected(pages),
            ) if *expected == op => self.peeked(now, &pages),
            (
                State::Sending(Sending {
                    step: SendingStep::Slice(expected, false),
                    ..
                }),
                SourceDone::Done,
            ) if *expected == op => self.peek(),
            (State::Sending(Sending { step, .. }), SourceDone::Done)
                if *step == SendingStep::Slice(op, true) =>
            {
                *step = SendingStep::Acknowledged;
                // A round counts when it has arrived: what lies in socket buffers would lengthen the pause and
                // make the path look faster than it is.
                if self.round_acknowledged == self.progress.rounds {
                    self.collect(false);
                }
            }
            (State::Pausing { op: expected, .. }, SourceDone::Done) if *expected == op => {
                self.paused(now, Duration::MAX, None);
            }
            (State::Pausing { op: expected, .. }, SourceDone::Paused { since, looked_into })
                if *expected == op =>
            {
                self.paused(now, since, looked_into);
            }
            (State::Draining(_), done) if !is_post_copy => self.drained(now, op, done),
            (State::AwaitReady { root_op, root, .. }, SourceDone::Root(computed))
                if *root_op == op =>
            {
                *root = Some(computed);
                self.compare(now);
            }
            (State::Committing(expected), SourceDone::Done) if *expected == op => {
                self.progress.downtime.commit = now - self.mark;
                self.mark = now;
                self.committed(now);
            }
            (State::Releasing(expected), SourceDone::Done) if *expected == op => {
                self.erase();
            }
            (State::Erasing { op: expected }, SourceDone::Done) if *expected == op => {
                self.close();
            }
            (State::Closing(expected), SourceDone::Done) if *expected == op => {
                if self.pages_lost {
                    // It runs on the destination until it touches a page that was lost.
                    let reason = self.reason_or_unknown();
                    return self.finish(Ending::VmLost(reason));
                }
                if let Some(reason) = self.ended_there.take() {
                    self.send(now, Message::Erased);
                    return self.finish(Ending::VmLost(reason));
                }
                self.reason = None;
                self.progress.complete();
                self.send(now, Message::Erased);
                self.finish(Ending::Completed);
            }
            (State::Rejoining { open, .. }, SourceDone::Done) if *open == Some(op) => {
                *open = None;
                self.rejoined(now);
            }
            (State::Rejoining { find, .. }, SourceDone::Collected(pages)) if *find == Some(op) => {
                *find = None;
                self.found_data(pages);
                self.rejoined(now);
            }
            (
                State::Verifying {
                    op: expected,
                    theirs,
                },
                done,
            ) if *expected == op => {
                let theirs = *theirs;
                let ours = match done {
                    SourceDone::Root(root) => Some(root),
                    _ => None,
                };
                self.verified(theirs, ours);
            }
            (State::TakingBack(expected), SourceDone::Done) if *expected == op => {
                self.resume(AfterResume::Finish);
            }
            (
                State::Resuming {
                    op: expected,
                    after,
                    ..
                },
                SourceDone::Done,
            ) if *expected == Some(op) => {
                let after = *after;
                self.vm_may_be_paused = false;
                self.resumed(after);
            }
            (State::RecordingAbort { op: expected }, SourceDone::Done) if *expected == op => {
                self.end_on_source();
            }
            (_, SourceDone::Done) => self.post_copy_sent(op),
            // Late reports of what was given up.
            _ => {}
        }
    }

    fn failed(&mut self, now: Time, op: Op, failure: Failure) {
        let concerns_us = self.may_turn_back() && self.is_current(op);
        let is_post_copy = self.is_post_copy(op);
        self.refused |= self.judges(op);
        self.vm_gone |= failure.vm_gone;
        match &mut self.state {
            State::Committing(expected) if *expected == op => {
                // Whether the record is on the disk is unknown, but it was never sent, so the destination
                // will discard: the VM is ours.
                self.reason = Some(failure.reason);
                let message = "the commit record could not be written on the source";
                self.turn_back(now, Reason::new("journal", message));
            }
            State::Resuming {
                op: expected,
                attempts,
                after,
            } if *expected == Some(op) => {
                *expected = None;
                *attempts += 1;
                let (attempts, after) = (*attempts, *after);
                if failure.vm_gone || attempts >= RESUME_ATTEMPTS {
                    self.reason = Some(failure.reason);
                    self.vm_gone = true;
                    self.resumed(after);
                } else {
                    self.deadline = Some(now + Duration::from_secs(1));
                }
            }
            State::RecordingAbort { op: expected } if *expected == op => self.end_on_source(),
            // The VM is the destination's; that is durable there. What can't be recorded or removed here now is
            // tried again: nothing of the VM may stay behind.
            State::Releasing(expected) if *expected == op => {
                self.retry(now, Step::Release, failure.reason);
            }
            State::Erasing { op: expected } if *expected == op => {
                self.retry(now, Step::Erase, failure.reason);
            }
            State::Closing(expected) if *expected == op => {
                self.retry(now, Step::Close, failure.reason);
            }
            State::TakingBack(expected) if *expected == op => {
                self.reason = Some(failure.reason);
                self.resume(AfterResume::Finish);
            }
            State::Redialling(redialling) if redialling.opens(op) && !failure.vm_gone => {
                self.connection_lost(now, failure.reason);
            }
            State::Rejoining { open, find, .. } if *open == Some(op) || *find == Some(op) => {
                self.connection_lost(now, failure.reason);
            }
            State::Verifying {
                op: expected,
                theirs,
            } if *expected == op => {
                let theirs = *theirs;
                self.verified(theirs, None);
            }
            State::AwaitRunning | State::Serving if is_post_copy => {
                // A stream broke; both sides come together again.
                self.connection_lost(now, failure.reason);
            }
            _ if concerns_us => self.abort(now, failure.reason),
            _ => {}
        }
    }

    /// The operator has looked at the destination and says what became of the VM: that it owns it, or that it does not.
    /// Any other verdict only the destination can give, on a connection; it is ignored here.
    pub fn handle_operator_verdict(&mut self, now: Time, verdict: Verdict) {
        let decides = matches!(verdict, Verdict::Owned(_) | Verdict::Discarded);
        if decides && matches!(self.state, State::InDoubt(_)) {
            self.judged(now, verdict);
        }
    }

    /// Dial at once instead of waiting for the next attempt.
    pub fn handle_redial(&mut self, now: Time) {
        match &self.state {
            State::InDoubt(Doubt::Waiting) => self.dial(now),
            State::Redialling(redialling) if matches!(redialling.link, Link::Waiting) => {
                self.dial_again(now);
            }
            _ => {}
        }
    }

    fn retry(&mut self, now: Time, step: Step, reason: Reason) {
        self.reason = Some(reason);
        self.deadline = Some(now + Duration::from_secs(1));
        self.state = State::Retrying(step);
    }
}
