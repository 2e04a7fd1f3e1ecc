//! The destination: owns nothing until its record of ownership is durable.
//!
//! ```text
//! Greeting ─▶ AwaitOffer ─▶ Consulting ─▶ Recording ─▶ Reserving ─▶ OpeningStreams ─▶ Receiving
//!    ─▶ Loading ─▶ AwaitCommit ─▶ Owning ═▶ Activating ─▶ AwaitErased ─▶ Ended(owned)
//! post-copy: Activating ─▶ Pulling ⇄ Rejoining ─▶ Finishing ─▶ AwaitErased
//! any state left of ═▶ :  Terminating ─▶ RecordingDiscard ─▶ Ended(discarded)
//! Owning, Activating, not resumed:  GivingBack ─▶ Terminating …
//! Receiving ⇄ AwaitRejoin, Reopening, until the VM is paused
//! ```
//!
//! `Consulting` waits for the ledger and the gates; nothing is recorded before. `Receiving` and `Loading` make evidence anew
//! beside all else, once the source begins to pause the VM.
//!
//! A connection that is lost while pages arrive may be made again by the source for a while. One that is lost later, left
//! of `Owning`, discards; the container never ran. A source that had committed learns
//! that from the durable record.

mod action;
mod rejoin;
mod showing;
mod state;
mod steps;

use std::collections::VecDeque;
use std::time::Duration;

pub use self::action::{
    DestinationAction, DestinationConfig, DestinationDone, DestinationEnding, DestinationPhase, Op,
};
use self::state::{Attest, Load, State};
use crate::ids::{Challenge32, Epoch, Root, StreamSecret};
use crate::journal::DestinationRecord;
use crate::message::{
    Accepted, Complete, HelloReply, Message, Reason, Refused, Rejoin, Verdict, WireBlocker,
};
use crate::order::Order;
use crate::pages::RamLayout;
use crate::source::Failure;
use crate::time::{Liveness, Pulse, Time};

/// Most attempts to resume a VM that is owned.
const ACTIVATE_ATTEMPTS: u32 = 5;
/// Delay before something is tried again for which there is no alternative.
const RETRY: Duration = Duration::from_secs(1);

/// The state machine of a destination, see the [module](self).
#[derive(Clone, Debug)]
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
    /// When its patience with a source ends that says it is there and comes to no commit.
    held_until: Option<Time>,
    reason: Option<Reason>,
    blockers: Vec<WireBlocker>,
    refused_in_words: bool,
    container_gone: bool,
    root: Option<Root>,
    /// Whether this migration may use post-copy, and whether it does.
    post_copy_ready: bool,
    post_copy: bool,
    complete: Option<Complete>,
    /// After a restart the VM is resumed while pages arrive already: it may wait for one. The attempt under way, and
    /// when the next is.
    resuming: Option<Op>,
    resume_at: Option<Time>,
    pages_lost: bool,
    /// Whether a record of ownership was written, or tried to be.
    may_be_owned: bool,
    /// Of the source, from its greeting.
    challenge: Option<Challenge32>,
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
            held_until: None,
            reason: None,
            blockers: Vec::new(),
            refused_in_words: false,
            container_gone: false,
            root: None,
            post_copy_ready: false,
            post_copy: false,
            complete: None,
            resuming: None,
            resume_at: None,
            pages_lost: false,
            may_be_owned: false,
            challenge: None,
        }
    }

    /// Goes on after a restart of the agent with a VM that needs pages which are still on the source, see
    /// [`DestinationRecord::Pulling`]. Accesses to pages that are not here have to wait.
    pub fn recover(now: Time, config: DestinationConfig, order: Order, layout: RamLayout) -> Self {
        let mut destination = Self::new(now, config);
        destination.live = None;
        destination.deadline = None;
        destination.order = Some(order);
        destination.layout = Some(layout);
        destination.post_copy_ready = true;
        destination.post_copy = true;
        destination.streams = destination.config.streams_max;
        let what = "the agent was restarted; waiting for the source, which has pages of the VM";
        destination.reason = Some(Reason::new("agent-restarted", what));
        destination.state = State::Pulling;
        destination.resume_again();
        destination
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
            State::Receiving { drained: None, .. }
            | State::AwaitRejoin { .. }
            | State::Reopening { .. } => DestinationPhase::Receiving,
            State::Receiving { .. } | State::Loading { .. } | State::AwaitCommit => {
                DestinationPhase::Switchover
            }
            State::Owning(_)
            | State::Activating { .. }
            | State::Activated(_)
            | State::AwaitErased => DestinationPhase::Committing,
            State::Pulling
            | State::Rejoining(_)
            | State::EndingPull(_)
            | State::RecordingEnd(_) => DestinationPhase::PostCopy,
            State::GivingBack(_) | State::Terminating { .. } | State::RecordingDiscard { .. } => {
                DestinationPhase::Finishing
            }
            State::Ended => DestinationPhase::Ended,
        }
    }

    /// Whether this side still may discard.
    pub fn may_discard(&self) -> bool {
        !matches!(
            self.phase(),
            DestinationPhase::Committing
                | DestinationPhase::PostCopy
                | DestinationPhase::Finishing
                | DestinationPhase::Ended
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
        let live = self.live.as_ref().map(Liveness::next);
        [self.deadline, self.resume_at, self.held_until, live]
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
        if self.held_until.is_some_and(|until| now >= until) {
            self.held_until = None;
            self.end_holding(now);
        }
        if self.resume_at.is_some_and(|at| now >= at) {
            self.resume_at = None;
            self.resume_again();
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
                State::EndingPull(_) => self.end_pulling(),
                State::RecordingEnd(_) => self.record_end(),
                State::GivingBack(_) => self.terminate(),
                State::RecordingDiscard { .. } => self.record_discard(),
                State::AwaitRejoin { .. } => self.discard(now, self.not_back()),
                State::Rejoining(_) | State::Reopening { .. } => {
                    let what = "the source did not open its streams in time";
                    self.handle_connection_lost(now, Reason::new("timeout", what));
                }
                State::Consulting(_) => self.not_judged(now),
                State::Receiving { .. } | State::Loading { .. } => {
                    let what = "the evidence of the destination was not ready in time";
                    self.discard(now, Reason::new("timeout", what));
                }
                _ => self.discard(now, Reason::new("timeout", "the source took too long")),
            }
        }
    }

    /// The connection is lost.
    pub fn handle_connection_lost(&mut self, now: Time, reason: Reason) {
        self.live = None;
        match self.state {
            State::AwaitErased => self.finish(DestinationEnding::Owned),
            // The VM runs on what it has. The source dials again.
            State::Pulling | State::Rejoining(_) => {
                self.deadline = None;
                self.state = State::Pulling;
                if !self.pages_lost {
                    self.reason = Some(reason);
                }
                self.actions.push_back(DestinationAction::Disconnect);
            }
            // The same in a moment: the source must notice, because its streams may be what broke.
            State::Owning(_) | State::Activating { .. } if self.post_copy => {
                self.reason = Some(reason);
                self.actions.push_back(DestinationAction::Disconnect);
            }
            State::AwaitRejoin { .. } => {}
            _ if self.may_rejoin() => self.await_rejoin(now, reason),
            _ => self.discard(now, reason),
        }
    }

    /// The source asks on another connection what became of this migration: it has lost this one. True if it goes on,
    /// because pages are still arriving, or because the VM runs here and needs pages: then the connection is this
    /// migration's from now on, and the streams are opened anew with this fresh secret. What was on the way on the old
    /// ones does not count.
    pub fn handle_query(&mut self, now: Time, stream_secret: StreamSecret) -> bool {
        if self.may_rejoin() {
            self.reopen(now, stream_secret);
            return true;
        }
        if let State::Activating { op, .. } = self.state
            && self.post_copy
        {
            // Resuming may itself wait for a page that only the source has. The VM is ours: go on as after a restart,
            // with the resuming under way or tried again.
            self.resuming = op;
            self.resume_at = op.is_none().then_some(now + RETRY);
            self.deadline = None;
            self.state = State::Pulling;
        }
        if let (State::Pulling | State::Rejoining(_), Some(layout)) = (&self.state, &self.layout) {
            let layout = layout.clone();
            let (op, streams) = (self.op(), self.streams);
            self.live = Some(Liveness::new(now, self.config.timing.silence));
            self.deadline = Some(now + self.config.timing.handshake);
            self.state = State::Rejoining(op);
            self.actions.push_back(DestinationAction::ExpectStreams {
                op,
                streams,
                urgent: true,
                secret: stream_secret,
                layout,
            });
            let rejoin = Rejoin {
                streams,
                stream_secret,
            };
            self.send(now, Message::Verdict(Verdict::Pulling(rejoin)));
            return true;
        }
        let what = "the source lost the connection and asks anew";
        self.discard(now, Reason::new("connection-lost", what));
        false
    }

    /// The container's hypervisor ended by itself.
    pub fn handle_container_gone(&mut self, now: Time) {
        let what = "the container's hypervisor ended on the destination";
        self.container_gone = true;
        if matches!(self.state, State::RecordingEnd(_)) {
            return;
        }
        if self.phase() == DestinationPhase::PostCopy {
            // It is ours, and it ended here: only when that is durable the source may let go of its pages.
            self.reason = Some(Reason::new("container-ended", what));
            return self.record_end();
        }
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
                let reply = HelloReply::to(&hello, &self.config.software, self.config.challenge);
                let common = reply.version.is_some();
                self.challenge = hello.challenge;
                self.state = State::AwaitOffer;
                // With the time in which the source makes its credentials.
                self.deadline = Some(now + self.config.timing.handshake * 2);
                self.send(now, Message::HelloReply(reply));
                if !common {
                    let what = "no common version of the protocol";
                    self.finish_refused(Reason::new("protocol-version", what));
                } else if hello.challenge.is_none() {
                    let what = "the source greeted without a challenge";
                    self.discard(now, Reason::new("peer-misbehaved", what));
                }
            }
            (State::AwaitOffer, Message::Offer(offer)) => {
                self.deadline = Some(now + self.config.timing.handshake);
                self.held_until = Some(now + self.config.timing.copying);
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
                        let refused = Refused {
                            by_gate: true,
                            blockers: vec![blocker],
                        };
                        return self.refuse(now, refused);
                    }
                }
                self.streams = offer.streams.min(self.config.streams_max).max(1);
                let offer = Box::new(offer);
                self.actions
                    .push_back(DestinationAction::ConsultLedger(offer.clone()));
                self.state = State::Consulting(offer);
            }
            (
                State::Receiving {
                    attest: Attest::NotYet,
                    ..
                },
                Message::Challenge(challenge),
            ) => self.challenged(now, challenge),
            (
                State::Receiving {
                    seal,
                    last,
                    drained,
                    attest: Attest::Attesting(_) | Attest::Attested(_),
                    ..
                },
                Message::Seal(sealed),
            ) if seal.is_none() => {
                if sealed.device_state_bytes == 0
                    || sealed.device_state_bytes > self.config.device_state_max
                {
                    let what = "the device state is empty or larger than this host accepts";
                    return self.discard(now, Reason::new("device-state-size", what));
                }
                if sealed.post_copy && !self.post_copy_ready {
                    let what = "the source seals for post-copy, which was not agreed on";
                    return self.discard(now, Reason::new("peer-misbehaved", what));
                }
                if drained.is_some_and(|post_copy| post_copy != sealed.post_copy) {
                    let what = "the source seals otherwise than it said when it paused the VM";
                    return self.discard(now, Reason::new("peer-misbehaved", what));
                }
                let complete = *last == Some(sealed.rounds);
                *seal = Some(sealed.clone());
                self.actions
                    .push_back(DestinationAction::SealDeviceState(sealed));
                if complete {
                    self.arrived();
                }
            }
            (State::AwaitCommit, Message::Commit(epoch)) => {
                if Some(epoch) != self.commit_epoch() {
                    let what = "the source committed another epoch than it ordered";
                    return self.discard(now, Reason::new("epoch-mismatch", what));
                }
                let record = if self.post_copy {
                    DestinationRecord::Pulling(epoch)
                } else {
                    DestinationRecord::Owned(epoch)
                };
                let op = self.journal(record);
                self.may_be_owned = true;
                self.held_until = None;
                self.state = State::Owning(op);
            }
            (State::Pulling | State::Rejoining(_), Message::Abort(reason)) => {
                // The pages are lost. The VM runs until it touches one; its operator decides.
                self.pages_lost = true;
                self.reason = Some(reason);
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

    /// Post-copy: all streams have delivered all pages.
    pub fn handle_pushed(&mut self, now: Time) {
        if !matches!(self.state, State::Pulling) {
            let reason = Reason::new("peer-misbehaved", "the end of all pages came out of turn");
            return self.handle_connection_lost(now, reason);
        }
        self.end_pulling();
    }

    /// The VM is paused at the source, and all streams have delivered what was written until then.
    pub fn handle_drained(&mut self, now: Time, post_copy: bool) {
        let State::Receiving {
            drained,
            load,
            seal,
            ..
        } = &mut self.state
        else {
            return;
        };
        let sealed_otherwise = seal
            .as_ref()
            .is_some_and(|seal| seal.post_copy != post_copy);
        if drained.is_some() || sealed_otherwise || (post_copy && !self.post_copy_ready) {
            let what = "the source pauses the VM twice, or otherwise than was agreed on";
            return self.discard(now, Reason::new("peer-misbehaved", what));
        }
        *drained = Some(post_copy);
        let begun = *load != Load::NotYet;
        self.post_copy = post_copy;
        if !begun {
            self.begin_loading();
        }
        self.actions
            .push_back(DestinationAction::ReleaseDeviceState { post_copy });
    }

    /// The first piece of the device state has arrived that is marked as early: the source is about to pause the VM.
    pub fn handle_early_state(&mut self, now: Time) {
        match self.state {
            State::Receiving {
                drained: None,
                load: Load::NotYet,
                ..
            } => self.begin_loading(),
            // Its connection broke before the pause, it says.
            State::AwaitRejoin { .. } | State::Reopening { .. } => {
                let what = "device state arrived from a source that is to come back";
                self.discard(now, Reason::new("peer-misbehaved", what));
            }
            _ => {}
        }
    }

    fn begin_loading(&mut self) {
        let begun = self.op();
        if let State::Receiving { load, .. } = &mut self.state {
            *load = Load::Loading(begun);
            self.actions
                .push_back(DestinationAction::LoadDeviceState(begun));
        }
    }

    /// All streams have delivered this round.
    pub fn handle_round(&mut self, now: Time, round: u32, is_last: bool) {
        let State::Receiving {
            last,
            seal,
            drained,
            ..
        } = &mut self.state
        else {
            return;
        };
        // After the pause there is one more end of a round, and before it that is not the last.
        if round != self.rounds + 1 || last.is_some() || drained.is_some() != is_last {
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
            self.arrived();
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
        if self.resuming == Some(op) {
            self.resuming = None;
            if matches!(done, DestinationDone::NeverRan) {
                // The source was told already that it is ours.
                self.handle_container_gone(now);
            }
            return;
        }
        match (&mut self.state, done) {
            (State::RecordingEnd(expected), DestinationDone::Done) if *expected == Some(op) => {
                if let Some(epoch) = self.commit_epoch() {
                    self.send(now, Message::Verdict(Verdict::Owned(epoch)));
                }
                let reason = self.reason_or_unknown();
                self.finish(DestinationEnding::OwnedButEnded(reason));
            }
            // A VM that does not run yet is not complete.
            (State::EndingPull(expected), DestinationDone::Pulled(_))
                if *expected == Some(op)
                    && (self.resuming.is_some() || self.resume_at.is_some()) =>
            {
                *expected = None;
                self.deadline = Some(now + RETRY);
            }
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
            (
                State::Reserving { op: expected },
                DestinationDone::Reserved {
                    post_copy,
                    evidence,
                },
            ) if *expected == op => {
                if self.is_too_long(now, &evidence) {
                    return;
                }
                let Some(layout) = self.layout.clone() else {
                    return;
                };
                self.post_copy_ready = post_copy;
                let (op, streams) = (self.op(), self.streams);
                let stream_secret = self.config.stream_secret;
                self.state = State::OpeningStreams { op };
                // With the time in which the source judges.
                self.deadline = Some(now + self.config.timing.handshake * 2);
                self.actions.push_back(DestinationAction::ExpectStreams {
                    op,
                    streams,
                    urgent: post_copy,
                    secret: stream_secret,
                    layout,
                });
                self.send(
                    now,
                    Message::Accepted(Accepted {
                        streams,
                        stream_secret,
                        post_copy,
                        evidence,
                    }),
                );
            }
            (State::Reserving { op: expected }, DestinationDone::Blocked(blockers))
                if *expected == op =>
            {
                let told = blockers.into_iter().take(crate::message::BLOCKERS_MAX);
                let blockers: Vec<_> = told.map(WireBlocker::cut).collect();
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
                self.receive(now);
            }
            (State::Reopening { op: expected, .. }, DestinationDone::Done) if *expected == op => {
                self.receive(now);
                self.actions.push_back(DestinationAction::TellReceived);
            }
            (
                State::Receiving { load, .. } | State::Loading { load, .. },
                DestinationDone::Done,
            ) if *load == Load::Loading(op) => {
                *load = Load::Loaded;
                self.ready(now);
            }
            (
                State::Receiving { attest, .. } | State::Loading { attest, .. },
                DestinationDone::Attested(evidence),
            ) if *attest == Attest::Attesting(op) => self.attested(now, evidence),
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
            (State::Activating { op: expected, .. }, DestinationDone::NeverRan)
                if *expected == Some(op) =>
            {
                // As above: nobody has lost anything yet.
                let what = "the container's hypervisor ended on the destination before it ran";
                self.reason = Some(Reason::new("container-ended", what));
                self.terminate();
            }
            (State::Owning(expected), DestinationDone::Done) if *expected == op => self.activate(),
            (State::Activating { op: expected, .. }, DestinationDone::Done)
                if *expected == Some(op) =>
            {
                if let Some(epoch) = self.commit_epoch() {
                    self.send(now, Message::Running(epoch));
                }
                if self.post_copy {
                    self.state = State::Pulling;
                    return;
                }
                let op = self.journal(DestinationRecord::Activated);
                self.state = State::Activated(op);
            }
            (State::Rejoining(expected), DestinationDone::Done) if *expected == op => {
                self.deadline = None;
                self.reason = None;
                self.state = State::Pulling;
                self.send(now, Message::StreamsReady);
                self.actions.push_back(DestinationAction::TellPresent);
            }
            (State::EndingPull(expected), DestinationDone::Pulled(complete))
                if *expected == Some(op) =>
            {
                self.complete = Some(complete);
                let op = self.journal(DestinationRecord::Activated);
                self.state = State::Activated(op);
            }
            (State::Activated(expected), DestinationDone::Done) if *expected == op => {
                self.activated(now);
            }
            (State::GivingBack(expected), DestinationDone::Done) if *expected == Some(op) => {
                self.remove();
            }
            (State::Terminating { op: expected }, DestinationDone::Done) if *expected == op => {
                self.record_discard();
            }
            (State::RecordingDiscard { op: expected }, DestinationDone::Done)
                if *expected == Some(op) =>
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
        if self.resuming == Some(op) {
            self.resuming = None;
            if failure.vm_gone {
                self.handle_container_gone(now);
            } else if !matches!(self.state, State::RecordingEnd(_) | State::Ended) {
                self.resume_at = Some(now + RETRY);
            }
            return;
        }
        match &mut self.state {
            State::RecordingEnd(expected) if *expected == Some(op) => {
                *expected = None;
                self.deadline = Some(now + RETRY);
            }
            State::GivingBack(expected) if *expected == Some(op) => {
                *expected = None;
                self.deadline = Some(now + RETRY);
            }
            State::Owning(expected) if *expected == op => {
                // The VM has not run here. Whether the record is on the disk is unknown; a durable reservation and
                // discard after it overrule it, see [`crate::journal::verdict`].
                self.reason = Some(failure.reason);
                self.terminate();
            }
            State::Activating {
                op: expected,
                attempts,
            } if *expected == Some(op) => {
                *expected = None;
                *attempts += 1;
                if failure.vm_gone && self.post_copy {
                    self.reason = Some(failure.reason);
                    self.record_end();
                } else if failure.vm_gone {
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
            State::Activated(expected) if *expected == op && self.post_copy => {
                // A restarted agent would wait for pages of a source that has let go: it must not let go before.
                self.reason = Some(failure.reason);
                self.state = State::EndingPull(None);
                self.deadline = Some(now + RETRY);
            }
            State::Activated(expected) if *expected == op => self.activated(now),
            State::Rejoining(expected) | State::Reopening { op: expected, .. }
                if *expected == op =>
            {
                self.handle_connection_lost(now, failure.reason);
            }
            State::EndingPull(expected) if *expected == Some(op) => {
                *expected = None;
                self.reason = Some(failure.reason);
                self.deadline = Some(now + RETRY);
            }
            // A container that can't be ended is never resumed either; the record is what counts.
            State::Terminating { op: expected } if *expected == op => self.record_discard(),
            State::RecordingDiscard { op: expected }
                if *expected == Some(op) && self.may_be_owned =>
            {
                // The newest record says that the VM is ours, and it is not here: only a discard gives it back.
                *expected = None;
                self.deadline = Some(now + RETRY);
            }
            State::RecordingDiscard { op: expected } if *expected == Some(op) => {
                // Without a durable record nothing may be claimed; the source asks again later.
                self.finish(DestinationEnding::Discarded(failure.reason));
            }
            _ if concerns_us => self.discard(now, failure.reason),
            _ => {}
        }
    }
}
