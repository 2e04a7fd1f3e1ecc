//! A destination that takes the commit, stays connected and never says what became of it.
#![forbid(unsafe_code)]

mod common;

use std::time::Duration;

use palanquin_engine::convergence::Limits;
use palanquin_engine::ids::{Sha256, StreamSecret};
use palanquin_engine::message::{Accepted, Hello, HelloReply, Message, Ready, Reason, Verdict};
use palanquin_engine::source::{SourceDone, SourcePhase};
use palanquin_engine::strategy::Strategy;
use palanquin_engine::time::Timing;
use palanquin_engine::{
    Epoch, PageSet, RamLayout, Root, Source, SourceAction, SourceConfig, SourceRecord, Time,
};

fn begin() -> Source {
    let offer = common::offer(1, 1);
    let config = SourceConfig {
        order: offer.order.clone(),
        strategy: Strategy::StopAndCopy,
        limits: Limits::default(),
        timing: Timing::default(),
        software: String::new(),
        layout: RamLayout::new(vec![1]).ok(),
        challenge: common::CHALLENGE,
        last_challenge: common::LAST_CHALLENGE,
    };
    Source::new(Time::default(), config, offer)
}

/// Plays a good destination until the commit is sent.
fn play_until_commit(source: &mut Source) {
    let now = Time::default();
    let layout = RamLayout::new(vec![1]).expect("one page");
    let mut attempt = 0;
    while let Some(action) = source.poll_action() {
        let done = |source: &mut Source, op| source.handle_done(now, op, Ok(SourceDone::Done));
        match action {
            SourceAction::Connect { attempt: newest } => {
                attempt = newest;
                source.handle_connected(now, attempt);
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
            SourceAction::OpenStreams { op, .. } => {
                done(source, op);
                source.handle_message(now, attempt, Message::StreamsReady);
            }
            SourceAction::Collect { op, .. } => {
                let pages = SourceDone::Collected(PageSet::empty(&layout));
                source.handle_done(now, op, Ok(pages));
            }
            SourceAction::SaveDeviceState(op) => {
                let state = SourceDone::DeviceState {
                    bytes: 1,
                    sha256: Sha256([0; 32]),
                };
                source.handle_done(now, op, Ok(state));
            }
            SourceAction::ComputeRoot(op) => {
                source.handle_done(now, op, Ok(SourceDone::Root(Root([0; 32]))));
                let ready = Ready {
                    root: Root([0; 32]),
                    evidence: Vec::new(),
                };
                source.handle_message(now, attempt, Message::Ready(ready));
            }
            SourceAction::Vouch { op, .. } => {
                source.handle_done(now, op, Ok(SourceDone::Vouched(Vec::new())));
            }
            SourceAction::SendPages { op, .. }
            | SourceAction::Judge { op, .. }
            | SourceAction::Journal(op, _)
            | SourceAction::StartTracking(op)
            | SourceAction::Pause { op, .. } => done(source, op),
            SourceAction::Send(Message::Commit(_)) => return,
            SourceAction::Send(_) => {}
            other => panic!("not expected: {other:?}"),
        }
    }
    panic!("the commit was not sent");
}

#[test]
fn a_source_whose_commit_is_never_answered_comes_into_doubt_and_an_operator_can_end_it() {
    let mut source = begin();
    play_until_commit(&mut source);
    let mut now = Time::default();
    for _ in 0..40 {
        now = now + Duration::from_secs(1);
        source.handle_message(now, 1, Message::Ping);
        source.handle_timeout(now);
        if source.phase() == SourcePhase::InDoubt {
            break;
        }
    }
    assert_eq!(source.phase(), SourcePhase::InDoubt);
    source.handle_operator_verdict(now, Verdict::Discarded);
    assert_eq!(source.phase(), SourcePhase::Finishing);
}

#[test]
fn a_destination_that_names_another_epoch_owns_nothing() {
    let others = [0, 1, 3, u64::MAX].map(Epoch);
    for epoch in others {
        // By itself, while its answer is awaited.
        for message in [
            Message::Running(epoch),
            Message::Verdict(Verdict::Owned(epoch)),
        ] {
            let mut source = begin();
            play_until_commit(&mut source);
            source.handle_message(Time::default(), 1, message);
            assert!(!lets_go(&mut source), "it gave the VM up");
        }
        // And asked, on another connection.
        let mut source = begin();
        play_until_commit(&mut source);
        let now = Time::default();
        source.handle_connection_lost(now, 1, Reason::new("connection-lost", "x"));
        source.handle_redial(now);
        source.handle_connected(now, 2);
        let hello = Hello::ours("", common::CHALLENGE);
        let reply = HelloReply::to(&hello, "", common::THEIR_CHALLENGE);
        source.handle_message(now, 2, Message::HelloReply(reply));
        source.handle_message(now, 2, Message::Verdict(Verdict::Owned(epoch)));
        assert!(!lets_go(&mut source), "it gave the VM up");
        assert_eq!(source.phase(), SourcePhase::InDoubt);
        assert_eq!(
            source.reason().map(|reason| &*reason.code),
            Some("epoch-mismatch")
        );
    }
}

/// Whether the source gives its VM up.
fn lets_go(source: &mut Source) -> bool {
    let mut lets_go = false;
    while let Some(action) = source.poll_action() {
        lets_go |= matches!(
            action,
            SourceAction::Journal(_, SourceRecord::Released(_)) | SourceAction::Erase(_)
        );
    }
    lets_go
}
