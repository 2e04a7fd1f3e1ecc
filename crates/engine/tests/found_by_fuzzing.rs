//! What the fuzz targets of the state machines found, each as the shortest sequence of events that shows it.
#![forbid(unsafe_code)]

use std::time::Duration;

use palanquin_engine::convergence::Limits;
use palanquin_engine::destination::{DestinationDone, DestinationEnding};
use palanquin_engine::ids::{Challenge32, StreamSecret};
use palanquin_engine::message::{Reason, Rejoin, Verdict};
use palanquin_engine::source::Failure;
use palanquin_engine::strategy::Strategy;
use palanquin_engine::time::Timing;
use palanquin_engine::{
    Destination, DestinationAction, DestinationConfig, DestinationRecord, Epoch, MigrationId,
    Order, RamLayout, Source, SourceAction, SourceConfig, SourceRecord, Time, VmId,
};

fn order() -> Order {
    Order {
        migration: MigrationId([1; 16]),
        vm: VmId([2; 16]),
        vm_name: "web".to_owned(),
        epoch: Epoch(4),
        source: "a".to_owned(),
        destination: "b".to_owned(),
        expires_unix_s: 1000,
        run: true,
    }
}

fn layout() -> RamLayout {
    RamLayout::new(vec![600]).expect("a layout")
}

/// A destination that was restarted, whose VM could not be resumed and is to be once more in a second.
fn not_resumed(now: Time) -> Destination {
    let config = DestinationConfig {
        timing: Timing::default(),
        software: String::new(),
        stream_secret: StreamSecret([3; 32]),
        streams_max: 2,
        device_state_max: 1 << 20,
        challenge: Challenge32([3; 32]),
    };
    let mut destination = Destination::recover(now, config, order(), layout());
    let Some(DestinationAction::Activate(op)) = destination.poll_action() else {
        panic!("a VM that is ours is resumed");
    };
    let reason = Reason::new("x", "it stays paused");
    destination.handle_done(
        now,
        op,
        Err(Failure {
            reason,
            vm_gone: false,
        }),
    );
    assert!(destination.poll_timeout().is_some());
    destination
}

#[test]
fn a_vm_whose_hypervisor_ended_is_not_resumed_any_more() {
    let now = Time::from_micros(0);
    let mut destination = not_resumed(now);
    destination.handle_container_gone(now);
    let Some(DestinationAction::Journal(op, DestinationRecord::Activated)) =
        destination.poll_action()
    else {
        panic!("the end is recorded");
    };
    let later = now + Duration::from_secs(2);
    destination.handle_timeout(later);
    assert_eq!(destination.poll_action(), None);
    destination.handle_done(later, op, Ok(DestinationDone::Done));
    let ended = destination.poll_action();
    assert!(
        matches!(
            ended,
            Some(DestinationAction::Finish(DestinationEnding::OwnedButEnded(
                _
            )))
        ),
        "{ended:?}"
    );
    destination.handle_timeout(later + Duration::from_secs(60));
    assert_eq!(destination.poll_action(), None);
}

#[test]
fn an_attempt_to_resume_that_fails_after_the_end_is_not_made_again() {
    let now = Time::from_micros(0);
    let mut destination = not_resumed(now);
    let later = now + Duration::from_secs(2);
    destination.handle_timeout(later);
    let Some(DestinationAction::Activate(resume)) = destination.poll_action() else {
        panic!("it is tried again");
    };
    destination.handle_container_gone(later);
    let Some(DestinationAction::Journal(record, _)) = destination.poll_action() else {
        panic!("the end is recorded");
    };
    let failed = || {
        let reason = Reason::new("x", "it stays paused");
        Err(Failure {
            reason,
            vm_gone: false,
        })
    };
    destination.handle_done(later, resume, failed());
    destination.handle_timeout(later + Duration::from_secs(2));
    assert_eq!(destination.poll_action(), None);
    destination.handle_done(later, record, Ok(DestinationDone::Done));
    assert!(destination.poll_action().is_some());
    destination.handle_timeout(later + Duration::from_secs(60));
    assert_eq!(destination.poll_action(), None);
}

#[test]
fn an_operator_cannot_say_that_pages_are_needed() {
    let now = Time::from_micros(0);
    let config = SourceConfig {
        order: order(),
        strategy: Strategy::PostCopy,
        limits: Limits::default(),
        timing: Timing::default(),
        software: String::new(),
        layout: Some(layout()),
        challenge: Challenge32([1; 32]),
        last_challenge: Challenge32([2; 32]),
    };
    let mut source = Source::recover(now, config, &SourceRecord::Committed(Epoch(5)));
    let rejoin = Rejoin {
        streams: 1,
        stream_secret: StreamSecret([3; 32]),
    };
    // It would serve pages without a connection, and wait for nothing at all.
    source.handle_operator_verdict(now, Verdict::Pulling(rejoin));
    assert_eq!(source.poll_action(), None);
    source.handle_timeout(now);
    assert!(
        matches!(source.poll_action(), Some(SourceAction::Connect { .. })),
        "it still asks the destination"
    );
    source.handle_operator_verdict(now, Verdict::Owned(Epoch(5)));
    assert!(matches!(
        source.poll_action(),
        Some(SourceAction::Journal(_, SourceRecord::Released(Epoch(5))))
    ));
}
