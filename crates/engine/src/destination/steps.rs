//! Steps, in the order of a migration, and what all of them use.

use std::hash::{Hash, Hasher};

use super::{Attest, Destination, DestinationAction, DestinationEnding, Load, Op, State};
use crate::journal::DestinationRecord;
use crate::message::{Message, Ready, Reason, Refused};
use crate::time::Time;

/// How many times the longest switchover a container that could run is held for the commit.
const SWITCHOVERS_HELD: u32 = 4;

impl Destination {
    /// Feeds what decides how it goes on to a hasher, so that whoever explores all states can tell them apart. Left out
    /// is what never changes and what is only told to people. The actions have to be taken out before.
    pub fn hash_behaviour<H: Hasher>(&self, hasher: &mut H) {
        let Self {
            config: _,
            state,
            actions,
            next_op,
            order,
            layout,
            streams,
            rounds,
            live,
            deadline,
            held_until,
            reason: _,
            blockers: _,
            refused_in_words,
            container_gone,
            root,
            post_copy_ready,
            post_copy,
            complete,
            resuming,
            resume_at,
            pages_lost,
            may_be_owned,
            challenge,
        } = self;
        debug_assert!(actions.is_empty(), "actions decide too");
        (state, next_op, order, layout, streams, rounds).hash(hasher);
        (live, deadline, held_until).hash(hasher);
        (refused_in_words, container_gone, root).hash(hasher);
        (post_copy_ready, post_copy, complete).hash(hasher);
        (resuming, resume_at, pages_lost, may_be_owned, challenge).hash(hasher);
    }

    pub(super) fn resume_again(&mut self) {
        let op = self.op();
        self.resuming = Some(op);
        self.actions.push_back(DestinationAction::Activate(op));
    }

    pub(super) fn record_end(&mut self) {
        let op = self.journal(DestinationRecord::Activated);
        self.deadline = None;
        self.resume_at = None;
        self.state = State::RecordingEnd(Some(op));
    }

    /// Whether the VM runs before all of its pages are here, or is about to.
    pub fn is_post_copy(&self) -> bool {
        self.post_copy
    }

    pub(super) fn end_pulling(&mut self) {
        let op = self.op();
        self.state = State::EndingPull(Some(op));
        self.actions.push_back(DestinationAction::EndPulling(op));
    }

    pub(super) fn activate(&mut self) {
        let op = self.op();
        self.state = State::Activating {
            op: Some(op),
            attempts: 0,
        };
        self.actions.push_back(DestinationAction::Activate(op));
    }

    /// Everything has arrived; the device state may still be loading.
    pub(super) fn arrived(&mut self) {
        let State::Receiving { load, attest, .. } = &mut self.state else {
            return;
        };
        let load = *load;
        let attest = std::mem::replace(attest, Attest::NotYet);
        let root_op = self.op();
        self.state = State::Loading {
            load,
            attest,
            root_op,
            root: None,
        };
        self.actions
            .push_back(DestinationAction::ComputeRoot(root_op));
    }

    pub(super) fn ready(&mut self, now: Time) {
        let State::Loading {
            load: Load::Loaded,
            attest: Attest::Attested(evidence),
            root: Some(root),
            ..
        } = &mut self.state
        else {
            return;
        };
        let ready = Ready {
            root: *root,
            evidence: std::mem::take(evidence),
        };
        self.root = Some(ready.root);
        // Before this a long pause may have been asked for, as stop-and-copy is. From here on the source waits for nothing but
        // its own judgement, and resumes after one switchover.
        self.held_until = Some(now + self.config.timing.switchover * SWITCHOVERS_HELD);
        self.state = State::AwaitCommit;
        self.send(now, Message::Ready(ready));
    }

    pub(super) fn activated(&mut self, now: Time) {
        if let Some(complete) = self.complete.take() {
            self.send(now, Message::Complete(complete));
        }
        if self.live.is_some() {
            self.state = State::AwaitErased;
            // The source erases in its own time; that it has not yet is no reason to wait for ever.
            self.deadline = Some(now + self.config.timing.reservation);
        } else {
            self.finish(DestinationEnding::Owned);
        }
    }

    pub(super) fn refuse(&mut self, now: Time, refused: Refused) {
        let reason = refused.blockers.first().map_or_else(
            || Reason::new("refused", "refused"),
            |blocker| Reason::new(&blocker.code, blocker.message.clone()),
        );
        self.send(now, Message::Refused(refused));
        self.finish_refused(reason);
    }

    pub(super) fn finish_refused(&mut self, reason: Reason) {
        self.reason = Some(reason.clone());
        self.finish(DestinationEnding::Refused(reason));
    }

    /// Gives the migration up, unless it is owned.
    pub(super) fn discard(&mut self, _now: Time, reason: Reason) {
        if !self.may_discard() {
            return;
        }
        match self.state {
            // Nothing is here yet and nothing is recorded.
            State::Greeting | State::AwaitOffer | State::Consulting(_) => {
                self.finish_refused(reason);
            }
            State::AwaitRejoin { .. } | State::Reopening { .. } => {
                // What it waited for is not why it ends.
                self.reason = Some(reason);
                self.terminate();
            }
            _ => {
                self.reason.get_or_insert(reason);
                self.terminate();
            }
        }
    }

    /// Gives the VM up, which has not run here.
    pub(super) fn terminate(&mut self) {
        match self.order.clone() {
            Some(order) if self.may_be_owned => {
                let op = self.journal(DestinationRecord::Reserved(order));
                self.deadline = None;
                self.held_until = None;
                self.state = State::GivingBack(Some(op));
            }
            _ => self.remove(),
        }
    }

    pub(super) fn remove(&mut self) {
        let op = self.op();
        self.deadline = None;
        self.held_until = None;
        self.state = State::Terminating { op };
        self.actions.push_back(DestinationAction::Terminate(op));
    }

    pub(super) fn record_discard(&mut self) {
        let reason = self.reason_or_unknown();
        let op = self.journal(DestinationRecord::Discarded(reason));
        self.state = State::RecordingDiscard { op: Some(op) };
    }

    pub(super) fn finish(&mut self, ending: DestinationEnding) {
        self.deadline = None;
        self.held_until = None;
        self.resume_at = None;
        self.live = None;
        self.state = State::Ended;
        self.actions.push_back(DestinationAction::Finish(ending));
    }

    pub(super) fn reason_or_unknown(&self) -> Reason {
        self.reason
            .clone()
            .unwrap_or_else(|| Reason::new("unknown", "no reason was recorded"))
    }

    pub(super) fn is_current(&self, op: Op) -> bool {
        match &self.state {
            State::Recording { op: expected, .. }
            | State::Reserving { op: expected }
            | State::OpeningStreams { op: expected } => *expected == op,
            State::Receiving { load, attest, .. } => {
                *load == Load::Loading(op) || *attest == Attest::Attesting(op)
            }
            State::Loading {
                load,
                attest,
                root_op,
                ..
            } => *load == Load::Loading(op) || *attest == Attest::Attesting(op) || *root_op == op,
            _ => false,
        }
    }

    pub(super) fn op(&mut self) -> Op {
        let op = Op(self.next_op);
        self.next_op += 1;
        op
    }

    pub(super) fn journal(&mut self, record: DestinationRecord) -> Op {
        let op = self.op();
        self.actions
            .push_back(DestinationAction::Journal(op, record));
        op
    }

    pub(super) fn send(&mut self, now: Time, message: Message) {
        if let Some(live) = &mut self.live {
            live.spoke(now);
            self.actions.push_back(DestinationAction::Send(message));
        }
    }
}
