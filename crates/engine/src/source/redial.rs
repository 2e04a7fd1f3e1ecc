//! The connection broke while the VM runs here and its pages are being sent: it is made again, and what has arrived is not
//! sent again.
//!
//! The tracking of writes goes on meanwhile. What of the interrupted round has arrived only the destination knows: it
//! tells, and what was given to the streams and is not among it is sent once more, in the same round. A page that has
//! arrived and was written since is named by the next collection, as always.
//!
//! From the pause on nothing is dialled: a VM that stands still must not wait for a link.

use super::{
    Interrupted, Link, Op, REDIAL_MAX_COPYING, Redialling, Sending, SendingStep, Source,
    SourceAction, SourceDone, State,
};
use crate::message::{Message, Present, Query, Reason, Rejoin, Verdict};
use crate::order::Order;
use crate::pages::PageSet;
use crate::time::Time;

/// Most reconnections one after the other before which nothing arrived: whoever breaks every connection at its first bytes
/// must not be humoured for ever.
const STALLED_MAX: u32 = 5;

impl Redialling {
    /// Whether this is the operation that opens the streams.
    pub(super) fn opens(&self, op: Op) -> bool {
        matches!(self.link, Link::Opening { open: Some(open), .. } if open == op)
    }

    /// Whether this is an operation that went on while the connection was lost.
    pub(super) fn works_at(&self, op: Op) -> bool {
        match self.work {
            Interrupted::Arming(expected) | Interrupted::Collecting(expected) => expected == op,
            _ => false,
        }
    }

    /// An operation ended.
    pub(super) fn done(&mut self, op: Op, done: SourceDone) {
        if let (Link::Opening { open, .. }, SourceDone::Done) = (&mut self.link, &done)
            && *open == Some(op)
        {
            *open = None;
            return;
        }
        match (&self.work, done) {
            (Interrupted::Arming(expected), SourceDone::Done) if *expected == op => {
                self.work = Interrupted::Armed;
            }
            (Interrupted::Collecting(expected), SourceDone::Collected(pages))
                if *expected == op =>
            {
                self.work = Interrupted::Collected(pages);
            }
            // Late reports of the streams that broke.
            _ => {}
        }
    }
}

impl Source {
    /// Whether the connection of this state is made again when it breaks.
    pub(super) fn may_redial(&self) -> bool {
        matches!(
            self.state,
            State::Arming(_)
                | State::Collecting(_)
                | State::Sending(_)
                | State::Calm
                | State::Redialling(_)
        ) && !self.config.timing.redial.is_zero()
    }

    /// Whether the connection broke before the VM was paused, and is being made again.
    pub fn is_redialling(&self) -> bool {
        matches!(self.state, State::Redialling(_))
    }

    /// Whether the migration has ended here while the destination may still wait for its source: it should be told, so
    /// that it need not keep what arrived.
    pub fn is_untold(&self) -> bool {
        self.untold
    }

    /// Whether what is said now reaches the destination's session.
    pub(super) fn is_heard(&self) -> bool {
        let elsewhere = match &self.state {
            State::Redialling(redialling) => !matches!(redialling.link, Link::Opening { .. }),
            _ => false,
        };
        self.live.is_some() && !elsewhere
    }

    /// Whether the destination may know of this migration.
    pub(super) fn was_offered(&self) -> bool {
        !matches!(
            self.state,
            State::Ordering(_) | State::Connecting | State::Greeting | State::Vouching(_)
        )
    }

    /// The connection broke, or what was to replace it did.
    pub(super) fn redial(&mut self, now: Time, reason: Reason, may_still_tell: bool) {
        let work = match std::mem::replace(&mut self.state, State::Calm) {
            State::Redialling(redialling) => {
                self.state = State::Redialling(redialling);
                return self.redial_failed(now, reason);
            }
            State::Arming(op) => Interrupted::Arming(op),
            State::Collecting(op) => Interrupted::Collecting(op),
            State::Sending(Sending { given, rest, .. }) => Interrupted::Round { given, rest },
            _ => Interrupted::Calm,
        };
        self.live = None;
        self.interrupted = true;
        self.redials = 0;
        self.actions.push_back(SourceAction::CloseStreams);
        if !may_still_tell {
            self.actions.push_back(SourceAction::Disconnect);
        }
        if self.scheduler.is_throttled() {
            // Nothing converges meanwhile.
            self.actions.push_back(SourceAction::Throttle(1.0));
        }
        self.note(&format!("{reason}; dialling again"));
        self.reason = Some(reason);
        self.state = State::Redialling(Box::new(Redialling {
            link: Link::Waiting,
            work,
            until: now + self.config.timing.redial,
        }));
        self.wait_to_dial(now);
    }

    fn redial_failed(&mut self, now: Time, reason: Reason) {
        let State::Redialling(redialling) = &mut self.state else {
            return;
        };
        if matches!(redialling.link, Link::Waiting) {
            // We have closed it ourselves, and know better why.
            return;
        }
        if reason.code == "identity-refused" {
            // No link is broken here.
            return self.abort(now, reason);
        }
        let opening = matches!(redialling.link, Link::Opening { .. });
        redialling.link = Link::Waiting;
        self.live = None;
        self.actions.push_back(SourceAction::Disconnect);
        if opening {
            self.actions.push_back(SourceAction::CloseStreams);
        }
        self.reason = Some(reason);
        self.wait_to_dial(now);
    }

    fn wait_to_dial(&mut self, now: Time) {
        let longest = REDIAL_MAX_COPYING.min(self.config.timing.redial_max);
        let at = now + self.next_delay(longest);
        self.set_redial_deadline(at);
    }

    fn set_redial_deadline(&mut self, at: Time) {
        if let State::Redialling(redialling) = &self.state {
            self.deadline = Some(at.min(redialling.until));
        }
    }

    pub(super) fn dial_again(&mut self, now: Time) {
        let State::Redialling(redialling) = &mut self.state else {
            return;
        };
        redialling.link = Link::Dialling;
        self.set_redial_deadline(now + self.config.timing.handshake);
        // One whose streams broke may still be there.
        self.actions.push_back(SourceAction::Disconnect);
        self.attempt += 1;
        self.actions.push_back(SourceAction::Connect {
            attempt: self.attempt,
        });
    }

    /// The deadline of a step has passed, or that of all.
    pub(super) fn redialling_too_long(&mut self, now: Time) {
        let State::Redialling(redialling) = &self.state else {
            return;
        };
        if now >= redialling.until {
            return self.abort(now, self.not_reached_again());
        }
        if matches!(redialling.link, Link::Waiting) {
            return self.dial_again(now);
        }
        let reason = Reason::new("peer-silent", "the destination does not answer");
        self.redial_failed(now, reason);
    }

    /// Why a migration ends whose connection could not be made again.
    pub(super) fn not_reached_again(&self) -> Reason {
        let last = self.reason_or_unknown();
        Reason::new(
            "connection-lost",
            format!("the connection was lost and could not be made again in time: {last}"),
        )
    }

    /// A message that arrives while the connection is lost or new.
    pub(super) fn told_while_redialling(&mut self, now: Time, message: Message) {
        let State::Redialling(redialling) = &mut self.state else {
            return;
        };
        match (&mut redialling.link, message) {
            (_, Message::Discarded(reason) | Message::Abort(reason)) => self.abort(now, reason),
            // Of the connection whose streams broke.
            (Link::Waiting | Link::Dialling, _) => {}
            (Link::Greeting, Message::HelloReply(reply)) => {
                if reply.version.is_none() {
                    let what = "no common version of the protocol any more";
                    return self.abort(now, Reason::new("protocol-version", what));
                }
                redialling.link = Link::Asked;
                self.set_redial_deadline(now + self.config.timing.handshake);
                let Order { migration, vm, .. } = self.config.order;
                self.send(now, Message::Query(Query { migration, vm }));
            }
            (Link::Asked, Message::Verdict(verdict)) => self.judged_while_redialling(now, verdict),
            (Link::Opening { ready, .. }, Message::StreamsReady) if !*ready => {
                *ready = true;
                self.go_on(now);
            }
            (Link::Opening { .. }, Message::Present(present)) => self.told_arrived(now, &present),
            (_, message) => {
                let what = format!("it sent {} out of turn", message.name());
                self.misbehaved(now, &what);
            }
        }
    }

    fn judged_while_redialling(&mut self, now: Time, verdict: Verdict) {
        match verdict {
            Verdict::Receiving(rejoin, rounds) => self.open_again(now, rejoin, rounds),
            Verdict::Undecided => {
                let what = "the destination has not decided yet; asking again";
                self.redial_failed(now, Reason::new("undecided", what));
            }
            Verdict::Discarded => {
                let what = "the destination gave the migration up when the connection was lost";
                self.abort(now, Reason::new("destination-discarded", what));
            }
            Verdict::Unknown => {
                let what = "the destination has no record of this migration any more";
                self.abort(now, Reason::new("destination-forgot", what));
            }
            Verdict::Owned(_) | Verdict::Pulling(_) => {
                self.misbehaved(now, "it claims a VM that was not given to it");
            }
        }
    }

    /// The destination goes on with us, with so many whole rounds.
    fn open_again(&mut self, now: Time, rejoin: Rejoin, rounds: u32) {
        let op = self.op();
        let (acknowledged, begun) = (self.round_acknowledged, self.progress.rounds);
        let (Some((streams, urgent)), Some(layout), State::Redialling(redialling)) =
            (self.streams, &self.layout, &mut self.state)
        else {
            return;
        };
        let whole = matches!(&redialling.work, Interrupted::Round { rest, .. } if rest.is_empty());
        let fits = rounds == acknowledged || whole && rounds == acknowledged + 1 && rounds == begun;
        if rejoin.streams != streams || !fits {
            let what = "it goes on with other streams or rounds than it had";
            return self.misbehaved(now, what);
        }
        redialling.link = Link::Opening {
            open: Some(op),
            ready: false,
            rounds,
            arrived: PageSet::empty(layout),
            all_told: false,
        };
        self.set_redial_deadline(now + self.config.timing.handshake);
        self.actions.push_back(SourceAction::OpenStreams {
            op,
            streams,
            urgent,
            secret: rejoin.stream_secret,
        });
    }

    fn told_arrived(&mut self, now: Time, told: &Present) {
        let State::Redialling(redialling) = &mut self.state else {
            return;
        };
        let Link::Opening {
            arrived, all_told, ..
        } = &mut redialling.link
        else {
            return;
        };
        let region = usize::from(told.region);
        if *all_told || !arrived.insert_bits(region, told.first_page, &told.bits) {
            return self.misbehaved(now, "it named pages that the VM does not have");
        }
        *all_told = told.last;
        self.go_on(now);
    }

    /// These pages were counted as sent and are sent again, but have not arrived: only once counts.
    fn not_resent(&mut self, missing: &PageSet) {
        if self.progress.rounds > 1 {
            let counted = &mut self.progress.pages_resent;
            *counted = counted.saturating_sub(missing.len());
        } else if let Some(touched) = &mut self.touched {
            touched.subtract(missing);
        }
    }

    /// Goes on where everything is ready.
    pub(super) fn go_on(&mut self, now: Time) {
        let State::Redialling(redialling) = &self.state else {
            return;
        };
        let waits = matches!(
            redialling.work,
            Interrupted::Arming(_) | Interrupted::Collecting(_)
        );
        let Link::Opening {
            open: None,
            ready: true,
            rounds,
            ref arrived,
            all_told: true,
        } = redialling.link
        else {
            return;
        };
        if waits {
            return;
        }
        let so_far = (rounds, arrived.len());
        self.stalled = if so_far > self.arrived_before {
            0
        } else {
            self.stalled + 1
        };
        self.arrived_before = so_far;
        if self.stalled > STALLED_MAX {
            let last = self.reason_or_unknown();
            let what =
                format!("the connection breaks again and again before anything arrives: {last}");
            return self.abort(now, Reason::new("connection-lost", what));
        }
        let State::Redialling(redialling) = std::mem::replace(&mut self.state, State::Calm) else {
            return;
        };
        let Redialling { link, work, .. } = *redialling;
        let Link::Opening { arrived, .. } = link else {
            return;
        };
        self.deadline = None;
        self.reason = None;
        self.progress.rejoined += 1;
        self.note("connected again; going on with what has not arrived");
        if self.scheduler.is_throttled() {
            let share = self.progress.throttle_share;
            self.actions.push_back(SourceAction::Throttle(share));
        }
        match work {
            Interrupted::Arming(_) | Interrupted::Armed => self.collect(true),
            Interrupted::Collecting(_) | Interrupted::Calm => self.collect(false),
            Interrupted::Collected(pages) => self.collected(now, pages),
            Interrupted::Round { .. } if rounds > self.round_acknowledged => {
                self.round_acknowledged = rounds;
                self.collect(false);
            }
            Interrupted::Round {
                mut given,
                mut rest,
            } => {
                let mut missing = given.clone();
                missing.subtract(&arrived);
                given.subtract(&missing);
                rest.union(&missing);
                self.not_resent(&missing);
                self.progress.round_left(rest.len());
                self.mark = now;
                self.round_sent_pages = 0;
                self.state = State::Sending(Sending {
                    step: SendingStep::Acknowledged,
                    given,
                    rest,
                    cursor: (0, 0),
                });
                self.send_slice(now);
            }
        }
    }
}
