//! Steps forward, in the order of a migration.

use std::time::Duration;

use super::{
    Doubt, Draining, DrainingPages, LastJudgement, Op, PostCopy, REDIAL_MAX_COPYING, RoundMark,
    Sending, SendingStep, Source, SourceAction, SourceDone, State,
};
use crate::ids::{Epoch, Sha256};
use crate::journal::SourceRecord;
use crate::message::{Message, Reason, Seal, Verdict};
use crate::pages::{BLOCK_PAGES, PAGE_BYTES, PageSet};
use crate::strategy::{Boundary, Next, Strategy};
use crate::time::Time;

/// Most pages of a round that are given to the streams at once where pages that were written again are left out: 64 MiB.
const SLICE_PAGES_MAX: u64 = 16_384;
/// Least of them: 1 MiB.
const SLICE_PAGES_MIN: u64 = 256;
/// The same while nothing is known of the path: 8 MiB.
const SLICE_PAGES_FIRST: u64 = 2048;
/// How long nothing is done when nothing but pages that wait for the last round is left.
const CALM: Duration = Duration::from_millis(50);

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

    /// `pages` were written since the last collection: send them, or switch over.
    pub(super) fn collected(&mut self, now: Time, pages: PageSet) {
        let rounds = self.progress.rounds;
        let mut left = pages.clone();
        if let Some(backlog) = &self.backlog {
            left.union(backlog);
        }
        // What was measured across an outage says nothing about the path or the guest.
        let interrupted = std::mem::take(&mut self.interrupted);
        let sent_bytes = if interrupted {
            0
        } else {
            self.round_sent_pages * PAGE_BYTES
        };
        if rounds > 0 {
            if !interrupted {
                let elapsed = now - self.mark;
                self.progress
                    .predictor
                    .round(sent_bytes, elapsed, pages.len());
            }
            self.progress.predicted_downtime =
                self.progress.predictor.predicted_downtime(left.bytes());
        }
        let decision = self.scheduler.decide(&Boundary {
            rounds,
            written: &pages,
            left: &left,
            sent_bytes,
            elapsed: now - self.progress.began,
            predictor: &self.progress.predictor,
        });
        self.note(&decision.why);
        match decision.next {
            Next::Round { postponed } => self.next_round(now, left, &postponed),
            Next::Throttle { share, postponed } => {
                self.progress.throttle_share = share;
                self.actions.push_back(SourceAction::Throttle(share));
                self.next_round(now, left, &postponed);
            }
            Next::Switchover => self.switch_over(now, left, false),
            Next::PostCopy => self.switch_over(now, left, true),
            Next::NotConverging => self.abort(now, self.why_not_done()),
        }
    }

    /// Sends what is left but the pages that wait for the last round.
    fn next_round(&mut self, now: Time, mut left: PageSet, postponed: &PageSet) {
        let mut sends = left.clone();
        sends.subtract(postponed);
        self.mark = now;
        self.round_sent_pages = 0;
        if sends.is_empty() && self.progress.rounds > 0 {
            self.backlog = Some(left);
            self.state = State::Calm;
            self.deadline = Some(now + CALM);
            return;
        }
        left.intersect(postponed);
        self.backlog = Some(left);
        self.begin_round(sends.len());
        self.state = State::Sending(Sending {
            step: SendingStep::Acknowledged,
            given: PageSet::empty(sends.layout()),
            rest: sends,
            cursor: (0, 0),
        });
        self.send_slice(now);
    }

    /// Gives the streams the next pages of the round.
    pub(super) fn send_slice(&mut self, now: Time) {
        let op = self.op();
        let slice_pages = if self.scheduler.strategy().skips_written() {
            self.slice_pages(now)
        } else {
            u64::MAX
        };
        let State::Sending(sending) = &mut self.state else {
            return;
        };
        let (pages, cursor) = sending.rest.take(sending.cursor, slice_pages);
        let last = sending.rest.is_empty();
        sending.given.union(&pages);
        sending.cursor = cursor;
        sending.step = SendingStep::Slice(op, last);
        self.count_resent(&pages);
        self.round_sent_pages += pages.len();
        self.actions.push_back(SourceAction::SendPages {
            op,
            pages,
            round: self.progress.rounds,
            then: if last {
                RoundMark::End
            } else {
                RoundMark::None
            },
        });
    }

    /// About a second's worth: what is decided between slices must not wait for long.
    fn slice_pages(&self, now: Time) -> u64 {
        let elapsed = now - self.mark;
        let rate_bytes_per_s = if self.round_sent_pages > 0 && !elapsed.is_zero() {
            let sent = self.round_sent_pages * PAGE_BYTES;
            (sent as f64 / elapsed.as_secs_f64()) as u64
        } else {
            self.progress.predictor.rate_bytes_per_s()
        };
        match rate_bytes_per_s / PAGE_BYTES {
            0 => SLICE_PAGES_FIRST,
            pages => pages.clamp(SLICE_PAGES_MIN, SLICE_PAGES_MAX),
        }
    }

    /// Looks which pages of the round were written again before their turn has come.
    pub(super) fn peek(&mut self) {
        let op = self.op();
        if let State::Sending(sending) = &mut self.state {
            sending.step = SendingStep::Peeking(op);
            self.actions.push_back(SourceAction::Peek(op));
        }
    }

    /// Leaves out what was written again: the next collection names it anyway (`TO_SKIP` of Ma et al.).
    /// Where time runs out the rest stays behind too.
    pub(super) fn peeked(&mut self, now: Time, written: &PageSet) {
        let elapsed = now - self.progress.began;
        if let State::Sending(sending) = &mut self.state {
            let before = sending.rest.len();
            sending.rest.subtract(written);
            let skipped = before - sending.rest.len();
            self.progress.pages_skipped += skipped;
            self.progress.round_pages = self.progress.round_pages.saturating_sub(skipped);
            if self.scheduler.cuts_round(elapsed) {
                let none = PageSet::empty(written.layout());
                let rest = std::mem::replace(&mut sending.rest, none);
                self.progress.round_pages = self.progress.round_pages.saturating_sub(rest.len());
                match &mut self.backlog {
                    Some(backlog) => backlog.union(&rest),
                    None => self.backlog = Some(rest),
                }
            }
        }
        self.send_slice(now);
    }

    fn switch_over(&mut self, now: Time, left: PageSet, post_copy: bool) {
        let op = self.op();
        self.backlog = None;
        self.vm_may_be_paused = true;
        // With the share it has left it would take longer to stop.
        self.lift_throttle();
        self.state = State::Pausing {
            op,
            pending: left,
            began: now,
            post_copy,
        };
        // Whoever asks for stop-and-copy asks for a long pause.
        let allowed = match self.scheduler.strategy() {
            Strategy::StopAndCopy => self.config.limits.deadline,
            _ => self.config.timing.switchover,
        };
        self.deadline = Some(now + allowed.max(self.config.timing.switchover));
        self.challenge_again(now);
        self.actions
            .push_back(SourceAction::Pause { op, post_copy });
    }

    fn begin_round(&mut self, pages: u64) {
        self.progress.rounds += 1;
        self.progress.pages_before += self.progress.round_pages;
        self.progress.round_pages = pages;
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

    /// The VM has been paused for this long, at most since it was asked for. Devices look into these pages when they are
    /// loaded.
    pub(super) fn paused(&mut self, now: Time, since: Duration, looked_into: Option<PageSet>) {
        let State::Pausing {
            pending,
            began,
            post_copy,
            ..
        } = std::mem::replace(&mut self.state, State::Ended)
        else {
            return;
        };
        self.progress.downtime.pause = since.min(now - began);
        self.mark = now;
        let save = self.op();
        let op = self.op();
        self.state = State::Draining(Draining {
            save,
            saved: None,
            post_copy,
            looked_into,
            ahead: None,
            pages: DrainingPages::Collecting { op, pending },
        });
        // Saving first: it is done elsewhere, and what it writes meanwhile is looked for when it has ended.
        self.actions.push_back(SourceAction::SaveDeviceState(save));
        self.actions
            .push_back(SourceAction::Collect { op, first: false });
    }

    /// Something that is done while the VM is paused is done.
    pub(super) fn drained(&mut self, now: Time, op: Op, done: SourceDone) {
        let State::Draining(draining) = &mut self.state else {
            return;
        };
        match (&mut draining.pages, done) {
            (_, SourceDone::DeviceState { bytes, sha256 }) if draining.save == op => {
                draining.saved = Some((bytes, sha256));
            }
            (
                DrainingPages::Collecting {
                    op: expected,
                    pending,
                },
                SourceDone::Collected(mut pages),
            ) if *expected == op => {
                pages.union(pending);
                let post_copy = draining.post_copy;
                let looked_into = draining.looked_into.take();
                return self.drain(pages, post_copy, looked_into);
            }
            (DrainingPages::Sending(expected), SourceDone::Done) if *expected == op => {
                draining.pages = DrainingPages::Sent;
                self.progress.downtime.final_pages = now - self.mark;
            }
            (DrainingPages::Rechecking(expected), SourceDone::Collected(pages))
                if *expected == op =>
            {
                return self.end_rounds(pages);
            }
            (DrainingPages::Last(expected), SourceDone::Done) if *expected == op => {
                draining.pages = DrainingPages::Ended;
            }
            (_, SourceDone::Done) if draining.ahead == Some(op) => draining.ahead = None,
            _ => {}
        }
        if let (DrainingPages::Ended, None, Some((bytes, sha256))) =
            (&draining.pages, draining.ahead, draining.saved)
        {
            let save = draining.save;
            return self.seal(now, save, bytes, sha256);
        }
        if draining.saved.is_some() && matches!(draining.pages, DrainingPages::Sent) {
            let op = Op(self.next_op);
            self.next_op += 1;
            draining.pages = DrainingPages::Rechecking(op);
            self.actions
                .push_back(SourceAction::Collect { op, first: false });
        }
    }

    /// Sends what was written until the pause, or tells that it comes later.
    fn drain(&mut self, mut pages: PageSet, post_copy: bool, looked_into: Option<PageSet>) {
        if post_copy {
            self.begin_round(0);
            // Also what was never sent: a page that was may have brought zeros in for its neighbours, where the
            // destination's kernel gives out huge pages.
            let mut stale = match &self.touched {
                Some(_) => pages.clone(),
                None => PageSet::empty(pages.layout()),
            };
            let looked_into = looked_into.filter(|ahead| ahead.layout() == pages.layout());
            if let Some(mut ahead) = looked_into {
                ahead.intersect(&pages);
                pages.subtract(&ahead);
                // These bring zeros in for their neighbours, too.
                stale.union(&beside(&ahead));
                stale.intersect(&pages);
                self.send_ahead(ahead);
            }
            let op = self.op();
            self.draining_pages(DrainingPages::Sending(op));
            self.post_copy = Some(PostCopy::new(pages));
            self.actions
                .push_back(SourceAction::SendStale { op, pages: stale });
        } else {
            let op = self.op();
            self.begin_round(pages.len());
            self.count_resent(&pages);
            self.actions.push_back(SourceAction::SendPages {
                op,
                pages,
                round: self.progress.rounds,
                then: RoundMark::Drained,
            });
            self.draining_pages(DrainingPages::Sending(op));
        }
    }

    fn draining_pages(&mut self, pages: DrainingPages) {
        if let State::Draining(draining) = &mut self.state {
            draining.pages = pages;
        }
    }

    /// Post-copy: sends what devices look into ahead of their state. Each of these pages would be asked for, one after the
    /// other, while the VM stands still. Nobody waits until they have left: the end of the last round comes behind them.
    fn send_ahead(&mut self, pages: PageSet) {
        if pages.is_empty() {
            return;
        }
        self.note(&format!(
            "{} pages that devices look into are sent ahead",
            pages.len()
        ));
        self.progress.round_pages += pages.len();
        self.count_resent(&pages);
        let op = self.op();
        if let State::Draining(draining) = &mut self.state {
            draining.ahead = Some(op);
        }
        self.actions.push_back(SourceAction::SendPages {
            op,
            pages,
            round: self.progress.rounds,
            then: RoundMark::None,
        });
    }

    /// Sends what saving the device state has written, and ends the last round. These pages are complete before the VM
    /// runs, also under post-copy: they don't wait to be asked for.
    fn end_rounds(&mut self, pages: PageSet) {
        let op = self.op();
        if !pages.is_empty() {
            self.note(&format!(
                "saving the device state wrote {} pages; they are sent behind it",
                pages.len()
            ));
        }
        if let Some(post_copy) = &mut self.post_copy {
            post_copy.sent_before(&pages);
        }
        self.progress.round_pages += pages.len();
        self.count_resent(&pages);
        self.actions.push_back(SourceAction::SendPages {
            op,
            pages,
            round: self.progress.rounds,
            then: RoundMark::Last,
        });
        self.draining_pages(DrainingPages::Last(op));
    }

    pub(super) fn seal(&mut self, now: Time, save: Op, bytes: u64, sha256: Sha256) {
        // What was counted as `final_pages` ended with them; saving what overlapped them belongs to the state.
        let since_pause = now - self.mark;
        let pages = self.progress.downtime.final_pages.min(since_pause);
        self.progress.downtime.final_pages = pages;
        self.mark = self.mark + pages;
        let root_op = self.op();
        let seal = Seal {
            rounds: self.progress.rounds,
            device_state_bytes: bytes,
            device_state_sha256: sha256,
            post_copy: self.post_copy.is_some(),
        };
        self.state = State::AwaitReady {
            save,
            root_op,
            root: None,
            theirs: None,
            judged: LastJudgement::NotYet,
        };
        self.send(now, Message::Seal(seal));
        // Last, because it takes milliseconds, and the destination loads meanwhile.
        self.actions.push_back(SourceAction::ComputeRoot(root_op));
    }

    pub(super) fn compare(&mut self, now: Time) {
        let State::AwaitReady {
            root: Some(ours),
            theirs: Some(theirs),
            judged,
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
        if judged != LastJudgement::Passed {
            return;
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
        // A destination that says nothing but that it is there must not keep us from asking, nor an operator from deciding.
        self.deadline = Some(now + self.config.timing.switchover);
        let commit = Message::Commit(self.commit_epoch());
        self.send(now, commit);
    }

    pub(super) fn doubt(&mut self, now: Time, reason: Reason) {
        self.reason = Some(reason);
        self.live = None;
        self.actions.push_back(SourceAction::Disconnect);
        if self.post_copy.is_some() {
            self.actions.push_back(SourceAction::CloseStreams);
        }
        let longest = if self.runs_on_destination() {
            REDIAL_MAX_COPYING.min(self.config.timing.redial_max)
        } else {
            self.config.timing.redial_max
        };
        self.deadline = Some(now + self.next_delay(longest));
        self.state = State::InDoubt(Doubt::Waiting);
    }

    /// How long to wait before dialling again.
    pub(super) fn next_delay(&mut self, longest: Duration) -> Duration {
        let exponent = self.redials.min(16);
        self.redials = self.redials.saturating_add(1);
        (self.config.timing.redial_min * 2_u32.pow(exponent)).min(longest)
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
            Verdict::Owned(epoch) if epoch == self.commit_epoch() => {
                if self.post_copy.is_some() && self.progress.pulled_verified.is_none() {
                    self.progress.pulled_verified = Some(false);
                    self.note("the connection broke before the pages sent after the switchover were compared");
                }
                self.release(epoch);
            }
            Verdict::Pulling(rejoin) if self.post_copy.is_some() || self.recovered => {
                self.rejoin(now, rejoin);
            }
            Verdict::Receiving(..) => self.doubt(
                now,
                Reason::new("peer-misbehaved", "the destination goes on receiving a VM that it was given"),
            ),
            Verdict::Pulling(_) => self.doubt(
                now,
                Reason::new("peer-misbehaved", "the destination asks for pages that it was not promised"),
            ),
            Verdict::Owned(_) => self.doubt(
                now,
                Reason::new("epoch-mismatch", "the destination names another epoch of the VM"),
            ),
            Verdict::Discarded if self.runs_on_destination() => self.doubt(
                now,
                Reason::new("peer-misbehaved", "the destination discards a VM that it runs"),
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

/// All pages of the blocks that these are in, which are sent by the same stream. Larger huge pages are an obstacle to
/// post-copy at the destination.
fn beside(pages: &PageSet) -> PageSet {
    let mut beside = PageSet::empty(pages.layout());
    for block in pages.blocks() {
        let region = usize::from(block.region);
        let first = block.first_page();
        let end = (first + BLOCK_PAGES).min(pages.layout().pages(region));
        beside.insert(region, first..end);
    }
    beside
}
