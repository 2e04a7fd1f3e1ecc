//! What a source asks before anything of its VM leaves, and before it gives it away.

use palanquin_engine::message::{CREDENTIALS_MAX, Message, Ready, Refused};
use palanquin_engine::source::{SourceDone, SourcePhase};
use palanquin_engine::strategy::Strategy;
use palanquin_engine::time::Timing;
use palanquin_engine::{Root, SourceAction};

use super::common;
use super::play::{OURS, Play};

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
        SourceAction::OpenStreams { .. }
            | SourceAction::SendPages { .. }
            | SourceAction::Pause { .. }
    )));
}

#[test]
fn the_destination_is_asked_anew_before_the_vm_is_paused() {
    for strategy in [Strategy::StopAndCopy, Strategy::PreCopy, Strategy::PostCopy] {
        let play = Play::until_sealed(strategy);
        let asked =
            |a: &SourceAction| *a == SourceAction::Send(Message::Challenge(common::LAST_CHALLENGE));
        let asked = play.position(asked).expect("a challenge");
        let paused = play.position(|a| matches!(a, SourceAction::Pause { .. }));
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
