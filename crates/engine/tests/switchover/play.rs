//! A source up to the commit.

use std::time::Duration;

use palanquin_engine::convergence::Limits;
use palanquin_engine::ids::{Challenge32, Sha256, StreamSecret};
use palanquin_engine::message::{Accepted, HelloReply, Message, Ready, Reason};
use palanquin_engine::source::{Ending, Failure, Op, RoundMark, SourceDone};
use palanquin_engine::strategy::{PostCopyUse, Strategy};
use palanquin_engine::time::Timing;
use palanquin_engine::{
    PageSet, RamLayout, Root, Source, SourceAction, SourceConfig, SourceRecord, Time,
};

use super::common;

pub(crate) const OURS: Root = Root([5; 32]);
/// Of the VM.
pub(crate) const PAGES: u64 = 8;
const SILENCE: Duration = Duration::from_secs(3);

/// A source, its driver and a good destination; what is to be judged, vouched for and computed waits for the test.
pub(crate) struct Play {
    pub(crate) source: Source,
    pub(crate) now: Time,
    /// All actions, oldest first.
    pub(crate) did: Vec<SourceAction>,
    pub(crate) vouch: Option<(Op, Challenge32)>,
    pub(crate) judge: Option<(Op, Vec<u8>, bool)>,
    pub(crate) root: Option<Op>,
    pub(crate) greeting: Option<Challenge32>,
    pub(crate) ending: Option<Ending>,
    layout: RamLayout,
    /// What is named when pages are collected; nothing from then on.
    pub(crate) written: PageSet,
    /// What the hypervisor says when it has paused the VM.
    pub(crate) looked_into: Option<PageSet>,
    /// Pages are reported as sent by the test.
    pub(crate) sends: Option<Op>,
}

impl Play {
    pub(crate) fn new(strategy: Strategy) -> Self {
        let layout = RamLayout::new(vec![PAGES]).expect("a few pages");
        let offer = common::offer(PAGES, 1);
        let config = SourceConfig {
            order: offer.order.clone(),
            strategy,
            limits: Limits::default(),
            timing: Timing::default(),
            software: String::new(),
            layout: Some(layout.clone()),
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
            written: PageSet::empty(&layout),
            looked_into: None,
            sends: None,
            layout,
        }
    }

    pub(crate) fn done(&mut self, op: Op, done: SourceDone) {
        self.source.handle_done(self.now, op, Ok(done));
    }

    pub(crate) fn hears(&mut self, message: Message) {
        self.source.handle_message(self.now, 1, message);
        self.pump();
    }

    pub(crate) fn pump(&mut self) {
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
                    let nothing = PageSet::empty(&self.layout);
                    let written = std::mem::replace(&mut self.written, nothing);
                    self.done(op, SourceDone::Collected(written));
                }
                SourceAction::Pause { op, post_copy } => {
                    let looked_into = self.looked_into.clone().filter(|_| post_copy);
                    let since = Duration::ZERO;
                    self.done(op, SourceDone::Paused { since, looked_into });
                }
                SourceAction::SaveDeviceState(op) => {
                    let state = SourceDone::DeviceState {
                        bytes: 1,
                        sha256: Sha256([0; 32]),
                    };
                    self.done(op, state);
                }
                SourceAction::SendPages {
                    op,
                    then: RoundMark::None,
                    ..
                } => self.sends = Some(op),
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
                | SourceAction::Resume(op) => self.done(op, SourceDone::Done),
                SourceAction::Finish(ending) => self.ending = Some(ending),
                _ => {}
            }
        }
    }

    /// Until the destination's first evidence is to be judged.
    pub(crate) fn until_first_judgement(strategy: Strategy) -> Self {
        let mut play = Self::new(strategy);
        play.pump();
        let (op, challenge) = play.vouch.take().expect("credentials are asked for");
        assert_eq!(challenge, common::THEIR_CHALLENGE);
        play.done(op, SourceDone::Vouched(b"credentials".to_vec()));
        play.pump();
        play
    }

    /// Until everything was sent and the destination is to say that it is ready.
    pub(crate) fn until_sealed(strategy: Strategy) -> Self {
        let mut play = Self::until_first_judgement(strategy);
        let (op, evidence, last) = play.judge.take().expect("a judgement");
        assert_eq!((evidence.as_slice(), last), (&b"first"[..], false));
        play.done(op, SourceDone::Done);
        play.pump();
        assert!(play.sent("Seal"));
        play
    }

    pub(crate) fn ready(&mut self, root: Root) -> Op {
        self.hears(Message::Ready(Ready {
            root,
            evidence: b"last".to_vec(),
        }));
        let (op, evidence, last) = self.judge.take().expect("a judgement");
        assert_eq!((evidence.as_slice(), last), (&b"last"[..], true));
        op
    }

    pub(crate) fn root(&mut self) {
        let op = self.root.take().expect("a root");
        self.done(op, SourceDone::Root(OURS));
        self.pump();
    }

    pub(crate) fn refuse(&mut self, op: Op) {
        let reason = Reason::new("attestation-stale", "the evidence is an old one");
        let failure = Failure {
            reason,
            vm_gone: false,
        };
        self.source.handle_done(self.now, op, Err(failure));
        self.pump();
    }

    /// Lets time pass, with a destination that is there and says nothing.
    pub(crate) fn wait_for_the_end(&mut self) -> Duration {
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

    pub(crate) fn position(&self, what: impl Fn(&SourceAction) -> bool) -> Option<usize> {
        self.did.iter().position(what)
    }

    pub(crate) fn sent(&self, name: &str) -> bool {
        let sent = |a: &SourceAction| matches!(a, SourceAction::Send(m) if m.name() == name);
        self.position(sent).is_some()
    }

    pub(crate) fn did(&self, what: impl Fn(&SourceAction) -> bool) -> bool {
        self.position(what).is_some()
    }

    pub(crate) fn committed(&self) -> bool {
        self.did(|a| matches!(a, SourceAction::Journal(_, SourceRecord::Committed(_))))
    }

    pub(crate) fn why(&self) -> &str {
        match &self.ending {
            Some(Ending::RunningOnSource(reason, _)) => &reason.code,
            other => panic!("another end: {other:?}"),
        }
    }
}
