//! What the present state means, and what every step uses.

use std::hash::{Hash, Hasher};

use super::{DrainingPages, Op, SendingStep, Source, SourceAction, State};
use crate::journal::SourceRecord;
use crate::message::{Message, Reason};
use crate::progress::Note;
use crate::time::Time;

impl Source {
    /// Feeds what decides how it goes on to a hasher, so that whoever explores all states can tell them apart. Left out
    /// is what never changes, what is only told to people, and how often it has dialled: two sources of the same
    /// configuration that feed the same behave alike, but for the numbers of their connections and the delay before
    /// they dial again. The actions have to be taken out before.
    pub fn hash_behaviour<H: Hasher>(&self, hasher: &mut H) {
        let Self {
            config: _,
            offer,
            state,
            actions,
            next_op,
            attempt: _,
            redials: _,
            live,
            deadline,
            round_acknowledged,
            touched,
            reason: _,
            blockers: _,
            vm_may_be_paused,
            vm_gone,
            root,
            mark,
            progress,
            scheduler,
            layout: _,
            backlog,
            round_sent_pages,
            post_copy,
            pages_lost,
            told_pulling,
            ended_there,
            recovered,
            streams,
            interrupted,
            stalled,
            arrived_before,
            untold: _,
            refused: _,
        } = self;
        debug_assert!(actions.is_empty(), "actions decide too");
        offer.is_some().hash(hasher);
        (state, next_op, live, deadline).hash(hasher);
        (round_acknowledged, touched, backlog, round_sent_pages).hash(hasher);
        (vm_may_be_paused, vm_gone, root, mark).hash(hasher);
        (progress.began, progress.rounds, &progress.predictor).hash(hasher);
        (scheduler, post_copy, pages_lost, told_pulling).hash(hasher);
        (ended_there.is_some(), recovered).hash(hasher);
        (streams, interrupted, stalled, arrived_before).hash(hasher);
    }

    pub(super) fn reason_or_unknown(&self) -> Reason {
        self.reason
            .clone()
            .unwrap_or_else(|| Reason::new("unknown", "no reason was recorded"))
    }

    pub(super) fn why_not_done(&self) -> Reason {
        let predictor = &self.progress.predictor;
        Reason::new(
            "not-converging",
            format!(
                "not done after {} rounds and the time allowed: the guest writes {} MiB/s, {} MiB/s are \
                 moved, a switchover would pause it for about {} ms",
                self.progress.rounds,
                predictor.dirty_rate_bytes_per_s() >> 20,
                predictor.rate_bytes_per_s() >> 20,
                self.progress
                    .predicted_downtime
                    .unwrap_or_default()
                    .as_millis(),
            ),
        )
    }

    pub(super) fn turning_back(&self) -> bool {
        matches!(
            self.state,
            State::Resuming { .. } | State::RecordingAbort { .. }
        )
    }

    /// Whether the overall deadline counts: a VM that is paused already is better finished.
    pub(super) fn copying(&self) -> bool {
        matches!(
            self.state,
            State::Connecting
                | State::Greeting
                | State::Vouching(_)
                | State::Offering
                | State::Judging { .. }
                | State::OpeningStreams { .. }
                | State::Arming(_)
                | State::Collecting(_)
                | State::Sending(_)
                | State::Calm
                | State::Redialling(_)
        )
    }

    /// Whether a report of this action concerns the present state.
    pub(super) fn is_current(&self, op: Op) -> bool {
        match &self.state {
            State::Ordering(expected)
            | State::Vouching(expected)
            | State::Judging { op: expected, .. }
            | State::OpeningStreams { op: expected, .. }
            | State::Arming(expected)
            | State::Collecting(expected)
            | State::Pausing { op: expected, .. } => *expected == op,
            State::Sending(sending) => match &sending.step {
                SendingStep::Peeking(expected) | SendingStep::Slice(expected, _) => *expected == op,
                SendingStep::Acknowledged => false,
            },
            State::Draining(draining) => {
                draining.save == op
                    || draining.ahead == Some(op)
                    || self.is_post_copy(op)
                    || match &draining.pages {
                        DrainingPages::Collecting { op: expected, .. }
                        | DrainingPages::Sending(expected)
                        | DrainingPages::Rechecking(expected)
                        | DrainingPages::Last(expected) => *expected == op,
                        DrainingPages::Sent | DrainingPages::Ended => false,
                    }
            }
            State::Redialling(redialling) => redialling.works_at(op),
            State::AwaitReady { save, root_op, .. } => {
                *save == op || *root_op == op || self.judges(op) || self.is_post_copy(op)
            }
            _ => false,
        }
    }

    pub(super) fn is_post_copy(&self, op: Op) -> bool {
        self.post_copy
            .as_ref()
            .is_some_and(|post_copy| post_copy.is_current(op))
    }

    /// Notes why something was decided, for people.
    pub(super) fn note(&mut self, why: &str) {
        self.progress.note(Note {
            rounds: self.progress.rounds,
            why: why.to_owned(),
        });
    }

    pub(super) fn op(&mut self) -> Op {
        let op = Op(self.next_op);
        self.next_op += 1;
        op
    }

    pub(super) fn journal(&mut self, record: SourceRecord) -> Op {
        let op = self.op();
        self.actions.push_back(SourceAction::Journal(op, record));
        op
    }

    pub(super) fn send(&mut self, now: Time, message: Message) {
        if let Some(live) = &mut self.live {
            live.spoke(now);
            self.actions.push_back(SourceAction::Send(message));
        }
    }
}
