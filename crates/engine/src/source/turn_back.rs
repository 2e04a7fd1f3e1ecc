//! Turning back: the VM goes on running on the source.

use super::{AfterResume, Ending, Source, SourceAction, State};
use crate::journal::SourceRecord;
use crate::message::{Message, Reason};
use crate::time::Time;

impl Source {
    pub(super) fn misbehaved(&mut self, now: Time, what: &str) {
        let reason = Reason::new(
            "peer-misbehaved",
            format!("the destination broke the protocol: {what}"),
        );
        self.abort(now, reason);
    }

    /// Ends a migration that is not committed.
    pub(super) fn abort(&mut self, now: Time, reason: Reason) {
        if self.turning_back() || !self.may_turn_back() {
            return;
        }
        if matches!(self.state, State::Redialling(_)) {
            // What it waited for is not why it ends.
            self.reason = None;
        }
        self.turn_back(now, reason);
    }

    pub(super) fn turn_back(&mut self, now: Time, reason: Reason) {
        let ordering = matches!(self.state, State::Ordering(_));
        self.untold = !self.is_heard() && self.was_offered();
        if self.live.is_some() && !ordering {
            self.send(now, Message::Abort(reason.clone()));
        }
        self.reason.get_or_insert(reason);
        self.deadline = None;
        self.lift_throttle();
        if self.vm_may_be_paused && !self.vm_gone {
            // The VM first: nobody waits for the rest.
            self.resume(AfterResume::RecordAbort);
            self.actions.push_back(SourceAction::StopCopying);
        } else {
            self.actions.push_back(SourceAction::StopCopying);
            self.resumed(AfterResume::RecordAbort);
        }
    }

    pub(super) fn lift_throttle(&mut self) {
        if self.scheduler.is_throttled() {
            self.actions.push_back(SourceAction::Throttle(1.0));
            self.progress.throttle_share = 1.0;
        }
    }

    pub(super) fn resume(&mut self, after: AfterResume) {
        let op = self.op();
        self.state = State::Resuming {
            op: Some(op),
            attempts: 0,
            after,
        };
        self.actions.push_back(SourceAction::Resume(op));
    }

    pub(super) fn resumed(&mut self, after: AfterResume) {
        match after {
            AfterResume::Finish => self.end_on_source(),
            AfterResume::RecordAbort => {
                let reason = self.reason_or_unknown();
                let op = self.journal(SourceRecord::Aborted(reason));
                self.state = State::RecordingAbort { op };
            }
        }
    }

    pub(super) fn end_on_source(&mut self) {
        let reason = self.reason_or_unknown();
        let ending = if self.vm_gone {
            Ending::VmLost(reason)
        } else {
            Ending::RunningOnSource(reason, std::mem::take(&mut self.blockers))
        };
        self.finish(ending);
    }

    pub(super) fn finish(&mut self, ending: Ending) {
        self.deadline = None;
        self.live = None;
        self.state = State::Ended;
        self.actions.push_back(SourceAction::Disconnect);
        self.actions.push_back(SourceAction::Finish(ending));
    }
}
