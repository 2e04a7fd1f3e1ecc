//! A source over a path of a known rate, in virtual time.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use palanquin_engine::convergence::Limits;
use palanquin_engine::ids::{Root, Sha256, StreamSecret};
use palanquin_engine::message::{Accepted, HelloReply, Message};
use palanquin_engine::source::{Ending, Op, RoundMark, SourceDone};
use palanquin_engine::strategy::{PostCopyUse, Strategy};
use palanquin_engine::time::Timing;
use palanquin_engine::{PageSet, RamLayout, Source, SourceAction, SourceConfig, Time};

use crate::guest::{Guest, PAGES, Random, Workload};

/// What collecting takes, and what the destination's answer takes.
const SHORT: Duration = Duration::from_millis(1);
/// What saving the device state takes, beside the pages.
const SAVE: Duration = Duration::from_millis(8);
/// Interval of pings of the destination.
const PING: Duration = Duration::from_secs(1);

/// What the source and its path are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) strategy: Strategy,
    pub(crate) limits: Limits,
    pub(crate) path_bytes_per_s: f64,
    /// Percent by which the path's rate varies from one batch of pages to the next.
    pub(crate) jitter_percent: u64,
}

/// How it ended.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// Whether it came to the switchover.
    pub(crate) completed: bool,
    pub(crate) post_copy: bool,
    pub(crate) rounds: u32,
    /// Until the destination could run the VM; until the deadline where it did not come to that.
    pub(crate) total: Duration,
    /// Guest pages sent, under post-copy with those that follow the switchover.
    pub(crate) bytes: u64,
    /// From the pause until everything was sent.
    pub(crate) downtime: Duration,
    /// The least share of its CPU time that the VM got.
    pub(crate) share: f64,
    pub(crate) notes: Vec<String>,
}

enum Event {
    Done(Op, SourceDone),
    Message(Message),
    Ping,
}

struct World {
    source: Source,
    guest: Guest,
    setting: Setting,
    random: Random,
    now: Time,
    /// When the path has carried what was given to it.
    free: Time,
    events: BTreeMap<(Time, Reverse<u64>), Event>,
    numbered: u64,
    paused: Option<Time>,
    outcome: Outcome,
    ended: bool,
}

/// Plays a migration.
pub(crate) fn migrate(setting: Setting, load: Workload) -> Outcome {
    let offer = crate::common::offer(PAGES, 2);
    let config = SourceConfig {
        order: offer.order.clone(),
        strategy: setting.strategy,
        limits: setting.limits,
        timing: Timing::default(),
        software: "test".to_owned(),
        layout: Some(RamLayout::new(vec![PAGES]).expect("a layout")),
        challenge: crate::common::CHALLENGE,
        last_challenge: crate::common::LAST_CHALLENGE,
    };
    let mut world = World {
        source: Source::new(Time::default(), config, offer),
        guest: Guest::new(load),
        setting,
        random: Random(load.seed),
        now: Time::default(),
        free: Time::default(),
        events: BTreeMap::new(),
        numbered: 0,
        paused: None,
        outcome: Outcome {
            completed: false,
            post_copy: false,
            rounds: 0,
            total: Duration::ZERO,
            bytes: 0,
            downtime: Duration::ZERO,
            share: 1.0,
            notes: Vec::new(),
        },
        ended: false,
    };
    world.at(Time::default() + PING, Event::Ping);
    world.play();
    world.outcome
}

impl World {
    fn at(&mut self, time: Time, event: Event) {
        self.numbered += 1;
        self.events
            .insert((time, Reverse(u64::MAX - self.numbered)), event);
    }

    fn play(&mut self) {
        loop {
            while let Some(action) = self.source.poll_action() {
                self.execute(action);
            }
            if self.ended {
                break;
            }
            let timer = self.source.poll_timeout();
            let event = self.events.first_key_value().map(|((time, _), _)| *time);
            let next = timer
                .into_iter()
                .chain(event)
                .min()
                .expect("something under way");
            self.now = self.now.max(next);
            self.guest.run(self.now);
            if event == Some(next) {
                let (_, event) = self.events.pop_first().expect("an event");
                match event {
                    Event::Done(op, done) => self.source.handle_done(self.now, op, Ok(done)),
                    Event::Message(message) => self.source.handle_message(self.now, 1, message),
                    Event::Ping => {
                        self.source.handle_message(self.now, 1, Message::Ping);
                        self.at(self.now + PING, Event::Ping);
                    }
                }
            } else {
                self.source.handle_timeout(self.now);
            }
        }
        let progress = self.source.progress();
        self.outcome.rounds = progress.rounds;
        self.outcome.total = self.now - Time::default();
        self.outcome.notes = progress
            .notes()
            .iter()
            .map(|note| format!("{}: {}", note.rounds, note.why))
            .collect();
    }

    fn done(&mut self, op: Op, delay: Duration) {
        self.at(self.now + delay, Event::Done(op, SourceDone::Done));
    }

    fn answer(&mut self, message: Message) {
        self.at(self.now + SHORT, Event::Message(message));
    }

    /// Puts pages on the path; gives when they have arrived.
    fn carry(&mut self, pages: &PageSet) -> Time {
        let jitter = self.setting.jitter_percent;
        let percent = 100 + self.random.below(2 * jitter + 1) - jitter;
        let rate = self.setting.path_bytes_per_s * percent as f64 / 100.0;
        self.outcome.bytes += pages.bytes();
        let time = Duration::from_secs_f64(pages.bytes() as f64 / rate);
        self.free = self.free.max(self.now) + time;
        self.free
    }

    fn execute(&mut self, action: SourceAction) {
        match action {
            SourceAction::Vouch { op, .. } => {
                let done = SourceDone::Vouched(Vec::new());
                self.at(self.now, Event::Done(op, done));
            }
            SourceAction::Judge { op, .. }
            | SourceAction::Journal(op, _)
            | SourceAction::StartTracking(op) => {
                self.done(op, Duration::ZERO);
            }
            SourceAction::Connect { attempt } => self.source.handle_connected(self.now, attempt),
            SourceAction::Send(message) => self.receive(message),
            SourceAction::OpenStreams { op, .. } => {
                self.done(op, Duration::ZERO);
                self.answer(Message::StreamsReady);
            }
            SourceAction::Collect { op, first } => {
                let mut pages = self.guest.collect();
                if first {
                    pages.insert(0, 0..PAGES);
                }
                self.at(
                    self.now + SHORT,
                    Event::Done(op, SourceDone::Collected(pages)),
                );
            }
            SourceAction::Peek(op) => {
                let pages = self.guest.peek();
                self.at(
                    self.now + SHORT,
                    Event::Done(op, SourceDone::Collected(pages)),
                );
            }
            SourceAction::Throttle(share) => {
                self.guest.share = share;
                self.outcome.share = self.outcome.share.min(share);
            }
            SourceAction::SendPages {
                op,
                pages,
                round,
                then,
            } => {
                let arrived = self.carry(&pages);
                self.at(arrived, Event::Done(op, SourceDone::Done));
                if matches!(then, RoundMark::End | RoundMark::Last) {
                    self.at(
                        arrived + SHORT,
                        Event::Message(Message::RoundReceived(round)),
                    );
                }
            }
            SourceAction::SendStale { op, pages, .. } => {
                // They follow once the VM runs.
                self.outcome.bytes += pages.bytes();
                self.done(op, SHORT);
            }
            SourceAction::Pause { op, .. } => {
                self.guest.share = 0.0;
                self.paused = Some(self.now);
                self.done(op, SHORT);
            }
            SourceAction::SaveDeviceState(op) => {
                let done = SourceDone::DeviceState {
                    bytes: 1,
                    sha256: Sha256([0; 32]),
                };
                self.at(self.now + SAVE, Event::Done(op, done));
            }
            SourceAction::ComputeRoot(op) => {
                let done = SourceDone::Root(Root([0; 32]));
                self.at(self.now, Event::Done(op, done));
            }
            SourceAction::Finish(ending) => {
                assert!(matches!(ending, Ending::RunningOnSource(..)), "{ending:?}");
                self.ended = true;
            }
            SourceAction::StopCopying | SourceAction::Disconnect => {}
            other => panic!("not before the switchover: {other:?}"),
        }
    }

    fn receive(&mut self, message: Message) {
        match message {
            Message::Hello(hello) => {
                let reply = HelloReply::to(&hello, "test", crate::common::THEIR_CHALLENGE);
                self.answer(Message::HelloReply(reply));
            }
            Message::Offer(offer) => {
                let accepted = Accepted {
                    streams: 2,
                    stream_secret: StreamSecret([0; 32]),
                    post_copy: offer.post_copy != PostCopyUse::No,
                    evidence: Vec::new(),
                };
                self.answer(Message::Accepted(accepted));
            }
            Message::Seal(seal) => {
                self.outcome.completed = true;
                self.outcome.post_copy = seal.post_copy;
                self.outcome.downtime = self.now - self.paused.expect("sealed while it runs");
                self.ended = true;
            }
            Message::Ping | Message::Abort(_) | Message::Challenge(_) => {}
            other => panic!("not before the switchover: {other:?}"),
        }
    }
}
