//! What a source asks before anything of its VM leaves, and before it gives it away.
#![forbid(unsafe_code)]

mod common;

use std::time::Duration;

use palanquin_engine::convergence::Limits;
use palanquin_engine::ids::{Challenge32, Sha256, StreamSecret};
use palanquin_engine::message::{
    Accepted, CREDENTIALS_MAX, HelloReply, Message, Ready, Reason, Refused,
};
use palanquin_engine::source::{Ending, Failure, Op, RoundMark, SourceDone, SourcePhase};
use palanquin_engine::strategy::{PostCopyUse, Strategy};
use palanquin_engine::time::Timing;
use palanquin_engine::{
    PageSet, RamLayout, Root, Source, SourceAction, SourceConfig, SourceRecord, Time,
};

const OURS: Root = Root([5; 32]);
const SILENCE: Duration = Duration::from_secs(3);

/// A source, its driver and a good destination; what is to be judged, vouched for and computed waits for the test.
struct Play {
    source: Source,
    now: Time,
    /// All actions, oldest first.
    did: Vec<SourceAction>,
    vouch: Option<(Op, Challenge32)>,
    judge: Option<(Op, Vec<u8>, bool)>,
    root: Option<Op>,
    greeting: Option<Challenge32>,
    ending: Option<Ending>,
}

impl Play {
    fn new(strategy: Strategy) -> Self {
        let offer = common::offer(1, 1);
        let config = SourceConfig {
            order: offer.order.clone(),
            strategy,
            limits: Limits::default(),
            timing: Timing::default(),
            software: String::new(),
            layout: RamLayout::new(vec![1]).ok(),
            challenge: common::CHALLENGE,
            last_challenge: common::LAST_CHALLENGE,
        };
        let now = Time::default();
        Self {
            source: Source::new(now, config, offer),
            now,
            did: Vec::new(),
            vouch: None,
            judge: None,
            root: None,
            greeting: Some(common::THEIR_CHALLENGE),
            ending: None,
        }
    }

    fn done(&mut self, op: Op, done: SourceDone) {
        self.source.handle_done(self.now, op, Ok(done));
    }

    fn hears(&mut self, message: Message) {
        self.source.handle_message(self.now, 1, message);
        self.pump();
    }

    fn pump(&mut self) {
        let layout = RamLayout::new(vec![1]).expect("one page");
        while let Some(action) = self.source.poll_action() {
            self.did.push(action.clone());
            match action {
                SourceAction::Connect { attempt } => {
                    self.source.handle_connected(self.now, attempt);
                }
                SourceAction::Vouch { op, challenge } => self.vouch = Some((op, challenge)),
                SourceAction::Judge {
                    op,
                    challenge,
                    evidence,
                    last,
                } => {
                    let expected = [common::CHALLENGE, common::LAST_CHALLENGE];
                    assert_eq!(challenge, expected[usize::from(last)]);
                    self.judge = Some((op, evidence, last));
                }
                SourceAction::ComputeRoot(op) => self.root = Some(op),
                SourceAction::Send(Message::Hello(hello)) => {
                    assert_eq!(hello.challenge, Some(common::CHALLENGE));
                    let reply = HelloReply {
                        challenge: self.greeting,
                        ..HelloReply::to(&hello, "", common::THEIR_CHALLENGE)
                    };
                    let reply = Message::HelloReply(reply);
                    self.source.handle_message(self.now, 1, reply);
                }
                SourceAction::Send(Message::Offer(offer)) => {
                    assert_eq!(offer.credentials, b"credentials");
                    let accepted = Accepted {
                        streams: 1,
                        stream_secret: StreamSecret([0; 32]),
                        post_copy: offer.post_copy != PostCopyUse::No,
                        evidence: b"first".to_vec(),
                    };
                    let accepted = Message::Accepted(accepted);
                    self.source.handle_message(self.now, 1, accepted);
                }
                SourceAction::OpenStreams { op, .. } => {
                    self.done(op, SourceDone::Done);
                    self.source
                        .handle_message(self.now, 1, Message::StreamsReady);
                }
                SourceAction::Collect { op, .. } => {
                    self.done(op, SourceDone::Collected(PageSet::empty(&layout)));
                }
                SourceAction::SaveDeviceState(op) => {
                    let state = SourceDone::DeviceState {
                        bytes: 1,
                        sha256: Sha256([0; 32]),
                    };
                    self.done(op, state);
                }
                SourceAction::SendPages {
                    op, round, then, ..
                } => {
                    self.done(op, SourceDone::Done);
                    if then == RoundMark::End {
                        let received = Message::RoundReceived(round);
                        self.source.handle_message(self.now, 1, received);
                    }
                }
                SourceAction::Journal(_, SourceRecord::Committed(_)) => {}
                SourceAction::SendStale { op, .. }
                | SourceAction::Journal(op, _)
                | SourceAction::StartTracking(op)
                | SourceAction::Pause(op)
                | SourceAction::Resume(op) => self.done(op, SourceDone::Done),
                SourceAction::Finish(ending) => self.ending = Some(ending),
                _ => {}
            }
        }
    }

    /// Until the destination's first evidence is to be judged.
    fn until_first_judgement(strategy: Strategy) -> Self {
        let mut play = Self::new(strategy);
        play.pump();
        let (op, challenge) = play.vouch.take().expect("credentials are asked for");
        assert_eq!(challenge, common::THEIR_CHALLENGE);
        play.done(op, SourceDone::Vouched(b"credentials".to_vec()));
        play.pump();
        play
    }

    /// Until everything was sent and the destination is to say that it is ready.
    fn until_sealed(strategy: Strategy) -> Self {
        let mut play = Self::until_first_judgement(strategy);
        let (op, evidence, last) = play.judge.take().expect("a judgement");
        assert_eq!((evidence.as_slice(), last), (&b"first"[..], false));
        play.done(op, SourceDone::Done);
        play.pump();
        assert!(play.sent("Seal"));
        play
    }

    fn ready(&mut self, root: Root) -> Op {
        self.hears(Message::Ready(Ready {
            root,
            evidence: b"last".to_vec(),
        }));
        let (op, evidence, last) = self.judge.take().expect("a judgement");
        assert_eq!((evidence.as_slice(), last), (&b"last"[..], true));
        op
    }

    fn root(&mut self) {
        let op = self.root.take().expect("a root");
        self.done(op, SourceDone::Root(OURS));
        self.pump();
    }

    fn refuse(&mut self, op: Op) {
        let reason = Reason::new("attestation-stale", "the evidence is an old one");
        let failure = Failure {
            reason,
            vm_gone: false,
        };
        self.source.handle_done(self.now, op, Err(failure));
        self.pump();
    }

    /// Lets time pass, with a destination that is there and says nothing.
    fn wait_for_the_end(&mut self) -> Duration {
        let began = self.now;
        while self.ending.is_none() {
            let at = self.source.poll_timeout().expect("a deadline");
            self.now = at.min(self.now + SILENCE).max(self.now);
            assert!(self.now - began < Duration::from_secs(100), "for ever");
            self.source.handle_message(self.now, 1, Message::Ping);
            self.source.handle_timeout(self.now);
            self.pump();
        }
        self.now - began
    }

    fn position(&self, what: impl Fn(&SourceAction) -> bool) -> Option<usize> {
        self.did.iter().position(what)
    }

    fn sent(&self, name: &str) -> bool {
        let sent = |a: &SourceAction| matches!(a, SourceAction::Send(m) if m.name() == name);
        self.position(sent).is_some()
    }

    fn did(&self, what: impl Fn(&SourceAction) -> bool) -> bool {
        self.position(what).is_some()
    }

    fn committed(&self) -> bool {
        self.did(|a| matches!(a, SourceAction::Journal(_, SourceRecord::Committed(_))))
    }

    fn why(&self) -> &str {
        match &self.ending {
            Some(Ending::RunningOnSource(reason, _)) => &reason.code,
            other => panic!("another end: {other:?}"),
        }
    }
}

#[test]
fn no_stream_is_opened_before_the_destination_was_judged() {
    let mut play = Play::until_first_judgement(Strategy::PreCopy);
    let opens = |a: &SourceAction| matches!(a, SourceAction::OpenStreams { .. });
    assert!(!play.did(opens));
    assert_eq!(play.source.phase(), SourcePhase::Reserving);
    let (op, ..) = play.judge.take().expect("a judgement");
    play.done(op, SourceDone::Done);
    play.pump();
    assert!(play.did(opens));
}

#[test]
fn a_destination_that_does_not_pass_gets_nothing_and_the_vm_runs_on() {
    let mut play = Play::until_first_judgement(Strategy::PreCopy);
    let (op, ..) = play.judge.take().expect("a judgement");
    play.refuse(op);
    assert_eq!(play.why(), "attestation-stale");
    assert!(play.source.is_refused() && play.sent("Abort"));
    assert!(!play.did(|a| matches!(
        a,
        SourceAction::OpenStreams { .. } | SourceAction::SendPages { .. } | SourceAction::Pause(_)
    )));
}

#[test]
fn the_destination_is_asked_anew_before_the_vm_is_paused() {
    for strategy in [Strategy::StopAndCopy, Strategy::PreCopy, Strategy::PostCopy] {
        let play = Play::until_sealed(strategy);
        let asked =
            |a: &SourceAction| *a == SourceAction::Send(Message::Challenge(common::LAST_CHALLENGE));
        let asked = play.position(asked).expect("a challenge");
        let paused = play.position(|a| matches!(a, SourceAction::Pause(_)));
        assert!(asked < paused.expect("a pause"), "{strategy:?}");
    }
}

#[test]
fn nothing_is_committed_before_the_last_evidence_was_judged() {
    for (strategy, root_first) in [
        (Strategy::PreCopy, true),
        (Strategy::PreCopy, false),
        (Strategy::PostCopy, true),
    ] {
        let mut play = Play::until_sealed(strategy);
        if root_first {
            play.root();
        }
        let op = play.ready(OURS);
        assert!(!play.committed());
        play.done(op, SourceDone::Done);
        play.pump();
        assert_eq!(play.committed(), root_first);
        if !root_first {
            play.root();
        }
        assert!(play.committed() && !play.source.is_refused());
    }
}

#[test]
fn a_destination_that_does_not_pass_at_the_end_does_not_get_the_vm() {
    for strategy in [Strategy::PreCopy, Strategy::PostCopy] {
        let mut play = Play::until_sealed(strategy);
        let op = play.ready(OURS);
        play.root();
        play.refuse(op);
        assert_eq!(play.why(), "attestation-stale");
        assert!(play.source.is_refused() && play.sent("Abort"));
        assert!(play.did(|a| matches!(a, SourceAction::Resume(_))));
        assert!(!play.committed() && !play.sent("Commit"));
    }
}

#[test]
fn a_judgement_does_not_make_up_for_another_root() {
    let mut play = Play::until_sealed(Strategy::PreCopy);
    play.root();
    let op = play.ready(Root([6; 32]));
    play.done(op, SourceDone::Done);
    play.pump();
    assert_eq!(play.why(), "root-mismatch");
    assert!(!play.committed() && !play.source.is_refused());
}

#[test]
fn what_is_never_judged_or_made_ends_the_migration_in_time() {
    let handshake = Timing::default().handshake;
    let mut unvouched = Play::new(Strategy::PreCopy);
    unvouched.pump();
    assert_eq!(unvouched.wait_for_the_end(), handshake);
    assert!(!unvouched.sent("Offer"));
    let mut first = Play::until_first_judgement(Strategy::PreCopy);
    assert_eq!(first.wait_for_the_end(), handshake);
    // Also where somebody has asked for a long pause.
    for strategy in [Strategy::PreCopy, Strategy::StopAndCopy] {
        let mut last = Play::until_sealed(strategy);
        last.root();
        let op = last.ready(OURS);
        assert_eq!(last.wait_for_the_end(), Timing::default().switchover);
        assert_eq!(last.why(), "timeout");
        // Too late it changes nothing.
        last.done(op, SourceDone::Done);
        last.pump();
        assert!(!last.committed());
        assert!(!last.source.is_refused(), "nobody refused");
    }
}

#[test]
fn a_greeting_without_a_challenge_ends_it() {
    let mut play = Play::new(Strategy::PreCopy);
    play.greeting = None;
    play.pump();
    assert_eq!(play.why(), "peer-misbehaved");
    assert!(!play.sent("Offer"));
}

#[test]
fn credentials_that_no_message_can_carry_are_not_sent() {
    let mut play = Play::new(Strategy::PreCopy);
    play.pump();
    let (op, _) = play.vouch.take().expect("credentials are asked for");
    play.done(op, SourceDone::Vouched(vec![0; CREDENTIALS_MAX + 1]));
    play.pump();
    assert_eq!(play.why(), "credentials-too-long");
    assert!(!play.sent("Offer"));
}

#[test]
fn a_destination_that_is_ready_twice_or_challenges_breaks_the_protocol() {
    let mut play = Play::until_sealed(Strategy::PreCopy);
    let op = play.ready(OURS);
    play.hears(Message::Ready(Ready {
        root: OURS,
        evidence: b"another".to_vec(),
    }));
    assert_eq!(play.why(), "peer-misbehaved");
    play.done(op, SourceDone::Done);
    play.pump();
    assert!(!play.committed());
    let mut play = Play::until_first_judgement(Strategy::PreCopy);
    play.hears(Message::Challenge(common::THEIR_CHALLENGE));
    assert_eq!(play.why(), "peer-misbehaved");
}

#[test]
fn a_refusal_of_the_other_side_is_told_apart_from_what_it_lacks() {
    for by_gate in [true, false] {
        let mut play = Play::new(Strategy::PreCopy);
        play.pump();
        let (op, _) = play.vouch.take().expect("credentials are asked for");
        play.done(op, SourceDone::Vouched(Vec::new()));
        // Before it is taken out, the offer is on its way.
        let offer = play.source.poll_action();
        assert!(matches!(offer, Some(SourceAction::Send(Message::Offer(_)))));
        play.hears(Message::Refused(Refused {
            by_gate,
            blockers: Vec::new(),
        }));
        assert_eq!(play.why(), if by_gate { "refused" } else { "blocked" });
        assert_eq!(play.source.is_refused(), by_gate);
    }
}
