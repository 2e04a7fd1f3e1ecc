//! What a destination shows of itself, and what its gates keep out.
#![forbid(unsafe_code)]

mod common;

use std::time::Duration;

use palanquin_engine::destination::{DestinationDone, DestinationEnding, Op};
use palanquin_engine::ids::{Sha256, StreamSecret};
use palanquin_engine::message::{EVIDENCE_MAX, Hello, Message, Ready, Reason, Seal, WireBlocker};
use palanquin_engine::order::Ledger;
use palanquin_engine::source::Failure;
use palanquin_engine::time::Timing;
use palanquin_engine::{
    Destination, DestinationAction, DestinationConfig, DestinationRecord, Epoch, Root, Time,
};

const ROOT: Root = Root([5; 32]);
const SILENCE: Duration = Duration::from_secs(3);

/// A destination and its driver, whose evidence, root and loading wait for the test.
struct Play {
    destination: Destination,
    now: Time,
    ledger: Ledger,
    /// What the container is reported with.
    evidence: Vec<u8>,
    did: Vec<DestinationAction>,
    attest: Option<Op>,
    load: Option<Op>,
    root: Option<Op>,
    consults: bool,
    ending: Option<DestinationEnding>,
}

impl Play {
    fn new() -> Self {
        let config = DestinationConfig {
            timing: Timing::default(),
            software: String::new(),
            stream_secret: StreamSecret([0; 32]),
            streams_max: 1,
            device_state_max: 9,
            challenge: common::THEIR_CHALLENGE,
        };
        let now = Time::default();
        Self {
            destination: Destination::new(now, config),
            now,
            ledger: Ledger {
                host: "b".to_owned(),
                peer: "a".to_owned(),
                ..Ledger::default()
            },
            evidence: b"first".to_vec(),
            did: Vec::new(),
            attest: None,
            load: None,
            root: None,
            consults: true,
            ending: None,
        }
    }

    fn done(&mut self, op: Op, done: DestinationDone) {
        self.destination.handle_done(self.now, op, Ok(done));
        self.pump();
    }

    fn hears(&mut self, message: Message) {
        self.destination.handle_message(self.now, message);
        self.pump();
    }

    fn pump(&mut self) {
        while let Some(action) = self.destination.poll_action() {
            self.did.push(action.clone());
            let (now, destination) = (self.now, &mut self.destination);
            let mut done = |op, done| destination.handle_done(now, op, Ok(done));
            match action {
                DestinationAction::ConsultLedger(offer) => {
                    assert_eq!(offer.credentials, b"credentials");
                    if self.consults {
                        destination.handle_ledger(now, &self.ledger);
                    }
                }
                DestinationAction::Reserve(op, _) => {
                    let reserved = DestinationDone::Reserved {
                        post_copy: false,
                        evidence: self.evidence.clone(),
                    };
                    done(op, reserved);
                }
                DestinationAction::Journal(op, _)
                | DestinationAction::ExpectStreams { op, .. }
                | DestinationAction::Terminate(op) => done(op, DestinationDone::Done),
                DestinationAction::Attest { op, challenge } => {
                    assert_eq!(challenge, common::LAST_CHALLENGE);
                    self.attest = Some(op);
                }
                DestinationAction::LoadDeviceState(op) => self.load = Some(op),
                DestinationAction::ComputeRoot(op) => self.root = Some(op),
                DestinationAction::Finish(ending) => self.ending = Some(ending),
                _ => {}
            }
        }
    }

    fn offered(&mut self) {
        self.hears(Message::Hello(Hello::ours("", common::CHALLENGE)));
        let mut offer = common::offer(1, 1);
        offer.credentials = b"credentials".to_vec();
        self.hears(Message::Offer(offer));
    }

    /// Until pages may arrive.
    fn receiving() -> Self {
        let mut play = Self::new();
        play.offered();
        assert!(play.sent("StreamsReady"));
        play
    }

    fn seal(&mut self) {
        self.hears(Message::Seal(Seal {
            rounds: 1,
            device_state_bytes: 1,
            device_state_sha256: Sha256([0; 32]),
            post_copy: false,
        }));
    }

    /// The VM is paused, and everything has been sent.
    fn delivered(&mut self) {
        self.destination.handle_drained(self.now, false);
        self.destination.handle_round(self.now, 1, true);
        self.pump();
        self.seal();
    }

    fn sent(&self, name: &str) -> bool {
        self.did
            .iter()
            .any(|a| matches!(a, DestinationAction::Send(m) if m.name() == name))
    }

    fn ready(&self) -> Option<&Ready> {
        self.did.iter().find_map(|action| match action {
            DestinationAction::Send(Message::Ready(ready)) => Some(ready),
            _ => None,
        })
    }

    /// Why nothing came of it, and whether anything was here.
    fn why(&self) -> (&str, bool) {
        match &self.ending {
            Some(DestinationEnding::Discarded(reason)) => (&reason.code, true),
            Some(DestinationEnding::Refused(reason)) => (&reason.code, false),
            other => panic!("another end: {other:?}"),
        }
    }
}

fn blocker(code: &str) -> WireBlocker {
    WireBlocker {
        code: code.to_owned(),
        message: "m".to_owned(),
        remedy: "r".to_owned(),
    }
}

#[test]
fn what_the_gates_refuse_is_told_in_full_and_leaves_no_record() {
    let mut play = Play::new();
    play.ledger.refusals = vec![blocker("policy"), blocker("attestation")];
    play.offered();
    let refused = play.did.iter().find_map(|action| match action {
        DestinationAction::Send(Message::Refused(refused)) => Some(refused),
        _ => None,
    });
    let refused = refused.expect("a refusal");
    assert!(refused.by_gate);
    assert_eq!(refused.blockers, play.ledger.refusals);
    assert_eq!(play.why(), ("policy", false));
    assert!(!play.did.iter().any(|action| matches!(
        action,
        DestinationAction::Journal(..) | DestinationAction::Reserve(..)
    )));
}

#[test]
fn gates_that_come_to_no_end_let_nobody_in() {
    let mut play = Play::new();
    play.consults = false;
    play.offered();
    play.now = play.destination.poll_timeout().expect("a deadline");
    while play.ending.is_none() {
        play.destination.handle_message(play.now, Message::Ping);
        play.destination.handle_timeout(play.now);
        play.pump();
        let next = play.destination.poll_timeout();
        play.now = next.map_or(play.now, |at| at.max(play.now));
    }
    assert_eq!(play.now - Time::default(), Timing::default().handshake);
    assert_eq!(play.why(), ("not-judged", false));
    assert!(play.sent("Refused"));
    // Too late.
    play.destination.handle_ledger(play.now, &play.ledger);
    assert_eq!(play.destination.poll_action(), None);
}

#[test]
fn a_container_is_accepted_together_with_its_evidence() {
    let play = Play::receiving();
    assert_eq!(play.destination.challenge(), Some(common::CHALLENGE));
    let accepted = play.did.iter().find_map(|action| match action {
        DestinationAction::Send(Message::Accepted(accepted)) => Some(accepted),
        _ => None,
    });
    assert_eq!(accepted.map(|a| a.evidence.as_slice()), Some(&b"first"[..]));
}

#[test]
fn evidence_is_made_beside_all_else_and_ready_waits_for_it() {
    // In whichever order the three end.
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let mut play = Play::receiving();
        play.hears(Message::Challenge(common::LAST_CHALLENGE));
        let attest = play.attest.take().expect("asked for at once");
        play.delivered();
        let load = play.load.take().expect("loads meanwhile");
        let root = play.root.take().expect("a root");
        for step in order {
            assert_eq!(play.ready(), None);
            match step {
                0 => play.done(attest, DestinationDone::Attested(b"last".to_vec())),
                1 => play.done(load, DestinationDone::Done),
                _ => play.done(root, DestinationDone::Root(ROOT)),
            }
        }
        let ready = Ready {
            root: ROOT,
            evidence: b"last".to_vec(),
        };
        assert_eq!(play.ready(), Some(&ready));
    }
}

#[test]
fn evidence_may_be_ready_before_anything_was_drained() {
    let mut play = Play::receiving();
    play.hears(Message::Challenge(common::LAST_CHALLENGE));
    let attest = play.attest.take().expect("asked for at once");
    play.done(attest, DestinationDone::Attested(Vec::new()));
    play.delivered();
    let load = play.load.take().expect("loads");
    play.done(load, DestinationDone::Done);
    let root = play.root.take().expect("a root");
    play.done(root, DestinationDone::Root(ROOT));
    assert!(play.ready().is_some());
}

#[test]
fn a_source_that_seals_without_a_challenge_or_challenges_twice_breaks_the_protocol() {
    let mut sealed = Play::receiving();
    sealed.destination.handle_drained(sealed.now, false);
    sealed.destination.handle_round(sealed.now, 1, true);
    sealed.seal();
    assert_eq!(sealed.why(), ("peer-misbehaved", true));
    let mut twice = Play::receiving();
    twice.hears(Message::Challenge(common::LAST_CHALLENGE));
    twice.hears(Message::Challenge(common::LAST_CHALLENGE));
    assert_eq!(twice.why(), ("peer-misbehaved", true));
    let mut early = Play::new();
    early.hears(Message::Hello(Hello::ours("", common::CHALLENGE)));
    early.hears(Message::Challenge(common::LAST_CHALLENGE));
    assert_eq!(early.why(), ("peer-misbehaved", false));
}

#[test]
fn a_greeting_without_a_challenge_is_refused() {
    let mut play = Play::new();
    let hello = Hello {
        challenge: None,
        ..Hello::ours("", common::CHALLENGE)
    };
    play.hears(Message::Hello(hello));
    assert_eq!(play.why(), ("peer-misbehaved", false));
}

#[test]
fn evidence_that_fails_or_is_too_long_or_comes_too_late_discards() {
    let mut failed = Play::receiving();
    failed.hears(Message::Challenge(common::LAST_CHALLENGE));
    let op = failed.attest.take().expect("asked for");
    let failure = Failure {
        reason: Reason::new("tpm", "the TPM does not answer"),
        vm_gone: false,
    };
    failed.destination.handle_done(failed.now, op, Err(failure));
    failed.pump();
    assert_eq!(failed.why(), ("tpm", true));
    assert!(failed.sent("Discarded"));

    let mut too_long = Play::receiving();
    too_long.hears(Message::Challenge(common::LAST_CHALLENGE));
    let op = too_long.attest.take().expect("asked for");
    too_long.done(op, DestinationDone::Attested(vec![0; EVIDENCE_MAX + 1]));
    assert_eq!(too_long.why(), ("evidence-too-long", true));

    let mut container = Play::new();
    container.evidence = vec![0; EVIDENCE_MAX + 1];
    container.offered();
    assert_eq!(container.why(), ("evidence-too-long", true));
    assert!(!container.sent("Accepted"));

    let mut late = Play::receiving();
    late.hears(Message::Challenge(common::LAST_CHALLENGE));
    late.delivered();
    while late.ending.is_none() {
        let at = late.destination.poll_timeout().expect("a deadline");
        late.now = at.min(late.now + SILENCE).max(late.now);
        late.destination.handle_message(late.now, Message::Ping);
        late.destination.handle_timeout(late.now);
        late.pump();
    }
    assert_eq!(late.now - Time::default(), Timing::default().switchover);
    assert_eq!(late.why(), ("timeout", true));
}

#[test]
fn a_deadline_of_evidence_that_is_there_does_not_end_anything() {
    let mut play = Play::receiving();
    play.hears(Message::Challenge(common::LAST_CHALLENGE));
    let attest = play.attest.take().expect("asked for");
    play.done(attest, DestinationDone::Attested(Vec::new()));
    play.now = play.now + Timing::default().switchover * 2;
    play.destination.handle_message(play.now, Message::Ping);
    play.destination.handle_timeout(play.now);
    play.pump();
    assert_eq!(play.ending, None);
    assert!(!play.did.iter().any(|a| matches!(
        a,
        DestinationAction::Journal(_, DestinationRecord::Discarded(_))
    )));
}

#[test]
fn a_source_that_was_about_to_pause_the_vm_does_not_come_back() {
    let mut play = Play::receiving();
    play.hears(Message::Challenge(common::LAST_CHALLENGE));
    let lost = Reason::new("connection-lost", "cut");
    play.destination.handle_connection_lost(play.now, lost);
    play.pump();
    assert_eq!(play.why(), ("connection-lost", true));
    let mut before = Play::receiving();
    let lost = Reason::new("connection-lost", "cut");
    before.destination.handle_connection_lost(before.now, lost);
    before.pump();
    assert!(before.destination.is_waiting_for_source());
}

impl Play {
    /// All of the switchover until the source may commit.
    fn until_ready(&mut self) {
        self.hears(Message::Challenge(common::LAST_CHALLENGE));
        let attest = self.attest.take().expect("asked for");
        self.done(attest, DestinationDone::Attested(Vec::new()));
        self.delivered();
        let load = self.load.take().expect("loads");
        self.done(load, DestinationDone::Done);
        let root = self.root.take().expect("a root");
        self.done(root, DestinationDone::Root(ROOT));
        assert!(self.ready().is_some());
    }

    /// The source says that it is there, until it is over or nothing is due any more; returns how long it lasted.
    fn stays(&mut self, most: Duration) -> Duration {
        let began = self.now;
        while self.ending.is_none() && self.now - began < most {
            let next = self.destination.poll_timeout().expect("a deadline");
            self.now = next.max(self.now);
            self.destination.handle_message(self.now, Message::Ping);
            self.destination.handle_timeout(self.now);
            self.pump();
        }
        self.now - began
    }
}

#[test]
fn a_source_that_copies_for_ever_loses_its_place() {
    let mut play = Play::receiving();
    let copying = Timing::default().copying;
    assert_eq!(play.stays(copying * 2), copying);
    assert_eq!(play.why(), ("copied-too-long", true));
}

#[test]
fn the_time_for_copying_goes_on_while_a_source_is_away_and_does_not_begin_anew() {
    let mut play = Play::receiving();
    let copying = Timing::default().copying;
    play.stays(copying / 2);
    let reason = Reason::new("connection-lost", "cut");
    play.destination.handle_connection_lost(play.now, reason);
    play.pump();
    assert!(
        play.destination
            .handle_query(play.now, StreamSecret([1; 32]))
    );
    play.pump();
    play.stays(copying * 2);
    assert_eq!(play.why(), ("copied-too-long", true));
    assert_eq!(play.now - Time::default(), copying);
}

#[test]
fn a_long_pause_that_was_asked_for_is_not_cut_short_while_its_pages_arrive() {
    // As stop-and-copy does: the challenge comes first, and all pages after it.
    let mut play = Play::receiving();
    play.hears(Message::Challenge(common::LAST_CHALLENGE));
    let attest = play.attest.take().expect("asked for");
    play.done(attest, DestinationDone::Attested(Vec::new()));
    let long = Timing::default().switchover * 100;
    assert!(play.stays(long) >= long);
    assert_eq!(play.ending, None);
    play.stays(Timing::default().copying);
    assert_eq!(play.why(), ("copied-too-long", true));
    assert_eq!(play.now - Time::default(), Timing::default().copying);
}

#[test]
fn a_source_that_never_commits_loses_its_place_sooner() {
    let mut play = Play::receiving();
    play.stays(Timing::default().copying / 2);
    let began = play.now;
    play.until_ready();
    play.stays(Timing::default().copying);
    assert_eq!(play.why(), ("timeout", true));
    assert_eq!(play.now - began, Timing::default().switchover * 4);
}

#[test]
fn a_committed_vm_is_not_given_up_by_any_deadline() {
    let mut play = Play::receiving();
    play.until_ready();
    let epoch = play.destination.commit_epoch().expect("an epoch");
    play.hears(Message::Commit(epoch));
    play.stays(Timing::default().copying * 2);
    assert!(
        !matches!(play.ending, Some(DestinationEnding::Discarded(_))),
        "{:?}",
        play.ending
    );
}

#[test]
fn a_commit_of_an_epoch_that_was_not_ordered_is_none() {
    // The order is of epoch 1, so that the VM would be the destination's under 2.
    for epoch in [0, 1, 3, u64::MAX] {
        let mut play = Play::receiving();
        play.until_ready();
        play.hears(Message::Commit(Epoch(epoch)));
        assert_eq!(play.why(), ("epoch-mismatch", true));
        let owned = |action: &DestinationAction| {
            matches!(
                action,
                DestinationAction::Journal(_, DestinationRecord::Owned(_))
            )
        };
        assert!(!play.did.iter().any(owned), "it took the VM");
    }
}
