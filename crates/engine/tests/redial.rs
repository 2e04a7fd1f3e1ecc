//! A source whose connection breaks while it copies, and what it does with a destination that comes back.
#![forbid(unsafe_code)]

mod common;

use std::time::Duration;

use palanquin_engine::convergence::Limits;
use palanquin_engine::ids::StreamSecret;
use palanquin_engine::message::{
    Accepted, Hello, HelloReply, Message, Present, Reason, Rejoin, Verdict,
};
use palanquin_engine::source::{AbortDisposition, Op, RoundMark, SourceDone, SourcePhase};
use palanquin_engine::strategy::Strategy;
use palanquin_engine::time::Timing;
use palanquin_engine::{PageSet, RamLayout, Source, SourceAction, SourceConfig, Time};

const PAGES: u64 = 128;

/// A source, and a destination that answers what it is told to.
struct Play {
    source: Source,
    now: Time,
    attempt: u32,
    /// Pages of the newest round that were given to the streams, what follows them, and their operation.
    given: Option<(Op, PageSet, RoundMark)>,
    /// How a query is answered: with so many whole rounds, and these pages of the next.
    whole: u32,
    arrived: PageSet,
    answers: bool,
    resumed: bool,
    judgements: u32,
    challenges: u32,
}

fn layout() -> RamLayout {
    RamLayout::new(vec![PAGES]).expect("a layout")
}

fn pages(range: std::ops::Range<u64>) -> PageSet {
    let mut set = PageSet::empty(&layout());
    set.insert(0, range);
    set
}

impl Play {
    /// Until the first round, which has all pages, was given to the streams.
    fn begin() -> Self {
        let offer = common::offer(PAGES, 1);
        let config = SourceConfig {
            order: offer.order.clone(),
            strategy: Strategy::PreCopy,
            limits: Limits::default(),
            timing: Timing::default(),
            software: String::new(),
            layout: Some(layout()),
            challenge: common::CHALLENGE,
            last_challenge: common::LAST_CHALLENGE,
        };
        let now = Time::default();
        let mut play = Self {
            source: Source::new(now, config, offer),
            now,
            attempt: 0,
            given: None,
            whole: 0,
            arrived: pages(0..0),
            answers: true,
            resumed: false,
            judgements: 0,
            challenges: 0,
        };
        play.pump();
        let given = play.given.take().expect("a round");
        assert_eq!((given.1.len(), given.2), (PAGES, RoundMark::End));
        play
    }

    fn pump(&mut self) {
        while let Some(action) = self.source.poll_action() {
            let (source, now, attempt) = (&mut self.source, self.now, self.attempt);
            match action {
                SourceAction::Connect { attempt } => {
                    self.attempt = attempt;
                    if self.answers {
                        source.handle_connected(now, attempt);
                    } else {
                        let reason = Reason::new("unreachable", "the link is cut");
                        source.handle_connection_lost(now, attempt, reason);
                    }
                }
                SourceAction::Send(Message::Hello(_)) => {
                    let hello = Hello::ours("", common::CHALLENGE);
                    let reply = HelloReply::to(&hello, "", common::THEIR_CHALLENGE);
                    source.handle_message(now, attempt, Message::HelloReply(reply));
                }
                SourceAction::Send(Message::Offer(_)) => {
                    let accepted = Accepted {
                        streams: 1,
                        stream_secret: StreamSecret([0; 32]),
                        post_copy: false,
                        evidence: Vec::new(),
                    };
                    source.handle_message(now, attempt, Message::Accepted(accepted));
                }
                SourceAction::Send(Message::Query(_)) => {
                    let rejoin = Rejoin {
                        streams: 1,
                        stream_secret: StreamSecret([1; 32]),
                    };
                    let verdict = Verdict::Receiving(rejoin, self.whole);
                    source.handle_message(now, attempt, Message::Verdict(verdict));
                }
                SourceAction::Vouch { op, .. } => {
                    source.handle_done(now, op, Ok(SourceDone::Vouched(Vec::new())));
                }
                SourceAction::Judge { op, .. } => {
                    self.judgements += 1;
                    source.handle_done(now, op, Ok(SourceDone::Done));
                }
                SourceAction::Send(Message::Challenge(_)) => self.challenges += 1,
                SourceAction::OpenStreams { op, secret, .. } => {
                    source.handle_done(now, op, Ok(SourceDone::Done));
                    source.handle_message(now, attempt, Message::StreamsReady);
                    if secret == StreamSecret([1; 32]) {
                        let present = Present {
                            region: 0,
                            first_page: 0,
                            bits: self.arrived.bits(0, 0, 64),
                            last: true,
                        };
                        source.handle_message(now, attempt, Message::Present(present));
                    }
                }
                SourceAction::Collect { op, first } => {
                    let found = if first { 0..PAGES } else { 0..0 };
                    let done = SourceDone::Collected(pages(found));
                    source.handle_done(now, op, Ok(done));
                }
                SourceAction::SendPages {
                    op, pages, then, ..
                } => self.given = Some((op, pages, then)),
                SourceAction::Journal(op, _)
                | SourceAction::StartTracking(op)
                | SourceAction::Pause { op, .. } => {
                    source.handle_done(now, op, Ok(SourceDone::Done));
                }
                SourceAction::Resume(_) => self.resumed = true,
                _ => {}
            }
        }
    }

    fn lose(&mut self) {
        let reason = Reason::new("connection-lost", "cut");
        self.source
            .handle_connection_lost(self.now, self.attempt, reason);
        self.pump();
    }

    /// Lets time pass until the source goes on or has ended.
    fn wait(&mut self) {
        for _ in 0..1000 {
            if !self.source.is_redialling() {
                return;
            }
            self.now = self.source.poll_timeout().expect("a deadline");
            self.source.handle_timeout(self.now);
            self.pump();
        }
        panic!("it dials for ever");
    }
}

#[test]
fn what_has_arrived_of_the_interrupted_round_is_not_sent_again() {
    let mut play = Play::begin();
    play.lose();
    assert!(play.source.is_redialling() && play.source.may_turn_back());
    assert_eq!(play.source.phase(), SourcePhase::PreCopy);
    assert_eq!(
        play.source.reason().map(|r| r.code.as_str()),
        Some("connection-lost")
    );
    play.arrived = pages(0..100);
    play.wait();
    let (_, sent, then) = play.given.take().expect("the rest of the round");
    assert_eq!((sent, then), (pages(100..PAGES), RoundMark::End));
    let progress = play.source.progress();
    assert_eq!((progress.rejoined, progress.rounds), (1, 1));
    assert_eq!(progress.pages_resent, 0, "they had not arrived");
    assert_eq!(play.source.reason(), None);
}

#[test]
fn a_round_whose_acknowledgement_was_lost_is_not_sent_again() {
    let mut play = Play::begin();
    play.lose();
    play.whole = 1;
    play.wait();
    // Nothing was written meanwhile: it switches over, also without a round that could be measured.
    let (_, sent, then) = play.given.take().expect("the last pages");
    assert_eq!((sent.len(), then), (0, RoundMark::Drained));
    assert_eq!(play.source.phase(), SourcePhase::Switchover);
    // Who the destination is was judged when it had the container; what it is now is asked when the pause begins.
    assert_eq!((play.judgements, play.challenges), (1, 1));
}

#[test]
fn a_link_that_stays_cut_ends_it_after_the_time_allowed() {
    let mut play = Play::begin();
    play.answers = false;
    play.lose();
    play.wait();
    let waited = play.now - Time::default();
    assert_eq!(waited, Timing::default().redial);
    assert!(!play.resumed, "it was never paused");
    let reason = play.source.reason().expect("a reason");
    assert!(
        reason.message.contains("could not be made again in time"),
        "{reason}"
    );
    assert!(play.source.is_untold());
}

#[test]
fn whoever_breaks_every_connection_before_anything_arrives_ends_it() {
    let mut play = Play::begin();
    let mut reconnections = 0;
    while play.source.phase() == SourcePhase::PreCopy {
        play.lose();
        play.wait();
        reconnections += 1;
        assert!(reconnections < 10, "for ever");
    }
    assert_eq!(play.source.progress().rejoined, 5);
    let took = play.now - Time::default();
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn an_operator_ends_it_at_once_and_is_named_as_the_reason() {
    let mut play = Play::begin();
    play.answers = false;
    play.lose();
    let reason = Reason::new("operator", "aborted by the operator");
    let answer = play.source.handle_abort(play.now, reason);
    assert_eq!(answer, AbortDisposition::Aborting);
    assert_eq!(play.now, Time::default());
    let code = play.source.reason().map(|reason| reason.code.clone());
    assert_eq!(code.as_deref(), Some("operator"));
}
