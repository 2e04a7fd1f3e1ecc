//! Steps forward, in the order of a migration.

use super::{
    Doubt, Draining, DrainingPages, Op, RoundMark, Source, SourceAction, SourceDone, State,
};
use crate::convergence::Next;
use crate::ids::{Epoch, Sha256};
use crate::journal::SourceRecord;
use crate::message::{Message, Reason, Seal, Verdict};
use crate::pages::{PAGE_BYTES, PageSet};
use crate::time::Time;

impl Source {
    pub(super) fn arm(&mut self) {
        let op = self.op();
        self.deadline = None;
        self.state = State::Arming(op);
        self.actions.push_back(SourceAction::StartTracking(op));
    }

    pub(super) fn collect(&mut self, first: bool) {
        let op = self.op();
        self.state = State::Collecting(op);
        self.actions.push_back(SourceAction::Collect { op, first });
    }

    /// `pages` were written since the last round began: send them, or switch over.
    pub(super) fn collected(&mut self, now: Time, pages: PageSet) {
        let rounds = self.progress.rounds;
        if rounds > 0 {
            let elapsed = now - self.mark;
            let bytes = self.progress.round_pages * PAGE_BYTES;
            self.progress.predictor.round(bytes, elapsed, pages.len());
            self.progress.predicted_downtime =
                self.progress.predictor.predicted_downtime(pages.bytes());
        }
        let next = if rounds == 0 {
            Next::Round
        } else {
            self.progress
                .predictor
                .decide(&self.config.limits, rounds, pages.bytes())
        };
        match next {
            Next::Round => {
                self.mark = now;
                self.begin_round(&pages);
                let op = self.op();
                self.state = State::Sending(Some(op));
                self.actions.push_back(SourceAction::SendPages {
                    op,
                    pages,
                    round: self.progress.rounds,
                    then: RoundMark::End,
                });
            }
            Next::Switchover => {
                let op = self.op();
                self.vm_may_be_paused = true;
                self.state = State::Pausing {
                    op,
                    pending: pages,
                    began: now,
                };
                self.deadline = Some(now + self.config.timing.switchover);
                self.actions.push_back(SourceAction::Pause(op));
            }
            Next::NotConverging => self.abort(now, self.why_not_done()),
        }
    }

    pub(super) fn begin_round(&mut self, pages: &PageSet) {
        self.progress.rounds += 1;
        self.progress.pages_before += self.progress.round_pages;
        self.progress.round_pages = pages.len();
        self.count_resent(pages);
    }

    pub(super) fn count_resent(&mut self, pages: &PageSet) {
        match &mut self.touched {
            Some(touched) => {
                self.progress.pages_resent += touched.count_common(pages);
                touched.union(pages);
            }
            None => self.touched = Some(pages.clone()),
        }
    }

    pub(super) fn paused(&mut self, now: Time) {
        let State::Pausing { pending, began, .. } =
            std::mem::replace(&mut self.state, State::Ended)
        else {
            return;
        };
        self.progress.downtime.pause = now - began;
        self.mark = now;
        let save = self.op();
        let op = self.op();
        self.state = State::Draining(Draining {
            save: Some(save),
            saved: None,
            pages: DrainingPages::Collecting { op, pending },
        });
        self.actions
            .push_back(SourceAction::Collect { op, first: false });
        self.actions.push_back(SourceAction::SaveDeviceState(save));
    }

    pub(super) fn drained(&mut self, now: Time, op: Op, done: SourceDone) {
        let next = Op(self.next_op);
        let mut begin: Option<PageSet> = None;
        let mut action = None;
        let mut finished = None;
        let round = self.progress.rounds;
        let State::Draining(draining) = &mut self.state else {
            return;
        };
        match (&mut draining.pages, done) {
            (_, SourceDone::DeviceState { bytes, sha256 }) if draining.save == Some(op) => {
                draining.save = None;
                draining.saved = Some((bytes, sha256));
            }
            (
                DrainingPages::Collecting {
                    op: expected,
                    pending,
                },
                SourceDone::Collected(pages),
            ) if *expected == op => {
                pending.union(&pages);
                let pages = pending.clone();
                begin = Some(pages.clone());
                draining.pages = DrainingPages::Sending(next);
                action = Some(SourceAction::SendPages {
                    op: next,
                    pages,
                    round: round + 1,
                    then: RoundMark::None,
                });
            }
            (DrainingPages::Sending(expected), SourceDone::Done) if *expected == op => {
                draining.pages = DrainingPages::Sent;
                self.progress.downtime.final_pages = now - self.mark;
            }
            (DrainingPages::Rechecking(expected), SourceDone::Collected(pages))
                if *expected == op =>
            {
                draining.pages = DrainingPages::Last(next);
                action = Some(SourceAction::SendPages {
                    op: next,
                    pages,
                    round,
                    then: RoundMark::Last,
                });
            }
            (DrainingPages::Last(expected), SourceDone::Done) if *expected == op => {
                finished = draining.saved;
            }
            _ => {}
        }
        let recheck = draining.saved.is_some() && matches!(draining.pages, DrainingPages::Sent);
        if recheck {
            draining.pages = DrainingPages::Rechecking(next);
            action = Some(SourceAction::Collect {
                op: next,
                first: false,
            });
        }
        if let Some(pages) = begin {
            self.begin_round(&pages);
        }
        if let Some(action) = action {
            if let SourceAction::SendPages {
                pages,
                then: RoundMark::Last,
                ..
            } = &action
            {
                self.progress.round_pages += pages.len();
                self.count_resent(pages);
            }
            self.next_op += 1;
            self.actions.push_back(action);
        }
        if let Some((bytes, sha256)) = finished {
            self.seal(now, bytes, sha256);
        }
    }

    pub(super) fn seal(&mut self, now: Time, bytes: u64, sha256: Sha256) {
        // What was counted as `final_pages` ended with them; saving what overlapped them belongs to the state.
        let since_pause = now - self.mark;
        let pages = self.progress.downtime.final_pages.min(since_pause);
        self.progress.downtime.final_pages = pages;
        self.mark = self.mark + pages;
        let send = self.op();
        let root_op = self.op();
        let seal = Seal {
            rounds: self.progress.rounds,
            device_state_bytes: bytes,
            device_state_sha256: sha256,
        };
        self.state = State::Sealing {
            send: Some(send),
            root_op,
            root: None,
            seal,
        };
        self.actions.push_back(SourceAction::SendDeviceState(send));
        self.actions.push_back(SourceAction::ComputeRoot(root_op));
    }

    pub(super) fn sealed(&mut self, now: Time) {
        let State::Sealing {
            root_op,
            root,
            seal,
            ..
        } = std::mem::replace(&mut self.state, State::Ended)
        else {
            return;
        };
        self.state = State::AwaitReady {
            root_op,
            root,
            theirs: None,
        };
        self.send(now, Message::Seal(seal));
    }

    pub(super) fn compare(&mut self, now: Time) {
        let State::AwaitReady {
            root: Some(ours),
            theirs: Some(theirs),
            ..
        } = self.state
        else {
            return;
        };
        if ours != theirs {
            let reason = Reason::new(
                "root-mismatch",
                "the destination's memory is not the memory that was sent",
            );
            return self.abort(now, reason);
        }
        self.root = Some(ours);
        let record = SourceRecord::Committed(self.commit_epoch());
        let op = self.journal(record);
        self.deadline = None;
        self.state = State::Committing(op);
    }

    pub(super) fn committed(&mut self, now: Time) {
        if self.live.is_none() {
            let reason = self.reason.clone().unwrap_or_else(|| {
                Reason::new(
                    "connection-lost",
                    "the connection was lost while committing",
                )
            });
            return self.doubt(now, reason);
        }
        self.state = State::AwaitRunning;
        let commit = Message::Commit(self.commit_epoch());
        self.send(now, commit);
    }

    pub(super) fn doubt(&mut self, now: Time, reason: Reason) {
        self.reason = Some(reason);
        self.live = None;
        self.actions.push_back(SourceAction::Disconnect);
        let exponent = self.redials.min(16);
        let delay = self.config.timing.redial_min * 2_u32.pow(exponent);
        let delay = delay.min(self.config.timing.redial_max);
        self.redials = self.redials.saturating_add(1);
        self.deadline = Some(now + delay);
        self.state = State::InDoubt(Doubt::Waiting);
    }

    pub(super) fn dial(&mut self, now: Time) {
        self.state = State::InDoubt(Doubt::Dialling);
        self.deadline = Some(now + self.config.timing.handshake);
        self.attempt += 1;
        self.actions.push_back(SourceAction::Connect {
            attempt: self.attempt,
        });
    }

    pub(super) fn judged(&mut self, now: Time, verdict: Verdict) {
        match verdict {
            Verdict::Owned(epoch) if epoch == self.commit_epoch() => self.release(epoch),
            Verdict::Owned(_) => self.doubt(
                now,
                Reason::new("epoch-mismatch", "the destination names another epoch of the VM"),
            ),
            Verdict::Discarded => {
                self.reason = Some(Reason::new(
                    "destination-discarded",
                    "the destination discarded the migration before it was committed there",
                ));
                self.take_back();
            }
            Verdict::Undecided => self.doubt(
                now,
                Reason::new("undecided", "the destination has not decided yet; asking again"),
            ),
            Verdict::Unknown => self.doubt(
                now,
                Reason::new(
                    "destination-forgot",
                    "the destination has no record of this migration; look at it, then resolve by hand",
                ),
            ),
        }
    }

    pub(super) fn release(&mut self, epoch: Epoch) {
        self.deadline = None;
        let op = self.journal(SourceRecord::Released(epoch));
        self.state = State::Releasing(op);
    }

    pub(super) fn erase(&mut self) {
        let op = self.op();
        self.deadline = None;
        self.state = State::Erasing { op };
        self.actions.push_back(SourceAction::StopCopying);
        self.actions.push_back(SourceAction::Erase(op));
    }

    pub(super) fn close(&mut self) {
        self.deadline = None;
        let op = self.journal(SourceRecord::Erased);
        self.state = State::Closing(op);
    }

    pub(super) fn take_back(&mut self) {
        self.deadline = None;
        let record = SourceRecord::TakenBack(self.taken_back_epoch());
        let op = self.journal(record);
        self.state = State::TakingBack(op);
    }
}
