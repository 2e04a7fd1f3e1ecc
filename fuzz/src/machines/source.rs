//! The source.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use palanquin_engine::convergence::Limits;
use palanquin_engine::ids::Sha256;
use palanquin_engine::ids::StreamSecret;
use palanquin_engine::message::{Accepted, Complete, HelloReply, Rejoin, Verdict};
use palanquin_engine::pages::{PageSet, RamLayout};
use palanquin_engine::progress::SentCounters;
use palanquin_engine::source::{AbortDisposition, Ending, Failure, Op, RoundMark, SourceDone};
use palanquin_engine::strategy::{Allowed, PostCopyUse, Strategy};
use palanquin_engine::time::Timing;
use palanquin_engine::{Message, Root, Source, SourceAction, SourceConfig, SourceRecord, Time};

use super::messages::{self, COMMIT_EPOCH, reason};
use super::pause;
use crate::entry::Target;
use crate::targets::message::{CHALLENGE, LAST_CHALLENGE, REPLY_CHALLENGE, offer_sample};

/// Any sequence of events.
pub(crate) const SOURCE: Target = Target::new(
    "source",
    |data| {
        let _ = run(data);
    },
    seeds,
);

/// Walks of what comes next, under every strategy, with something else at the end.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for strategy in 0..6 {
        for other in [0, 90, 110, 150, 180, 200, 220, 235, 250] {
            let mut seed = vec![strategy, 1, 1, 0];
            seed.extend(
                [
                    [10; 40].as_slice(),
                    &[60, 0, 90, 3],
                    &[10; 90],
                    &[other; 24],
                    &[10; 60],
                ]
                .concat(),
            );
            seeds.push(seed);
        }
    }
    seeds
}

/// What a report is awaited of.
#[derive(Clone, Debug)]
enum Kind {
    Journal(SourceRecord),
    Pause,
    Save,
    Resume,
    Erase,
    Pages,
    Sent,
    Root,
    PulledRoot,
    Streams,
    Tracking,
    Vouch,
    /// For the last time or not.
    Judge(bool),
}

impl Kind {
    /// What ends in the order in which it was asked for.
    fn queue(&self) -> u8 {
        match self {
            Self::Journal(_) => 1,
            Self::Pause | Self::Save | Self::Resume | Self::Erase => 2,
            _ => 0,
        }
    }
}

/// What was seen so far, by which actions are judged.
#[derive(Default)]
struct Seen {
    /// `Committed` is on the disk, as far as the engine was told.
    committed: bool,
    /// The same of `Released`, `TakenBack`, `Erased`.
    released: bool,
    taken_back: bool,
    erased: bool,
    /// The destination or the operator said that it owns the VM; that it does not; that it runs it.
    told_owned: bool,
    told_discarded: bool,
    told_running: bool,
    /// Nothing was held against the destination: before anything was sent, before the commit.
    judged: [bool; 2],
    /// The credentials were made.
    vouched: bool,
    ours: Option<Root>,
    theirs: Vec<Root>,
    vm_gone: bool,
    /// The VM was paused and was not resumed since.
    paused: bool,
    connected: bool,
    stopped: bool,
    promised_abort: bool,
    finished: bool,
    challenged: bool,
    recovered: bool,
    /// Of this incarnation.
    ops: BTreeSet<Op>,
    attempt: u32,
    rounds_ended: u32,
    acknowledged: u32,
    said: Option<Message>,
    streams_asked: bool,
}

struct Player {
    source: Source,
    config: SourceConfig,
    layout: RamLayout,
    now: Time,
    pending: VecDeque<(Op, Kind)>,
    /// Records on the disk.
    disk: Vec<SourceRecord>,
    seen: Seen,
}

fn run(data: &[u8]) -> Result<()> {
    let mut u = Unstructured::new(data);
    let strategy = Strategy::ALL[u.int_in_range(0..=5_usize)?];
    let allowed = Allowed {
        throttle: u.arbitrary()?,
        post_copy: u.arbitrary()?,
    };
    let layout = RamLayout::new(vec![600, 3]).expect("a layout");
    let limits = Limits {
        deadline: if u.arbitrary()? {
            Duration::from_secs(5)
        } else {
            Limits::default().deadline
        },
        allowed,
        ..Limits::default()
    };
    let config = SourceConfig {
        order: offer_sample().order,
        strategy,
        limits,
        timing: Timing::default(),
        software: "fuzz".to_owned(),
        layout: Some(layout.clone()),
        challenge: CHALLENGE,
        last_challenge: LAST_CHALLENGE,
    };
    let now = Time::from_micros(1_000_000);
    let source = Source::new(now, config.clone(), offer_sample());
    let (disk, pending) = (Vec::new(), VecDeque::new());
    let mut player = Player {
        source,
        config,
        layout,
        now,
        pending,
        disk,
        seen: Seen::default(),
    };
    player.pump();
    while !u.is_empty() {
        player.event(&mut u)?;
    }
    Ok(())
}

impl Player {
    fn event(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let now = self.now;
        match u.arbitrary::<u8>()? {
            // What comes next.
            0..=79 => {
                if !self.reply(u)? {
                    self.report(u, true)?;
                }
            }
            80..=99 => self.report(u, true)?,
            100..=114 => self.report(u, false)?,
            // A report of something else: done before, or never asked for.
            115..=124 => {
                let done = self.any_done(u)?;
                let op = Op(u.int_in_range(0..=60)?);
                if self.pending.iter().all(|(pending, _)| *pending != op) {
                    let result = if u.arbitrary()? {
                        Ok(done)
                    } else {
                        Err(self.failure(u)?)
                    };
                    self.source.handle_done(now, op, result);
                }
            }
            125..=149 => {
                let message = messages::any(u)?;
                let attempt = if u.ratio(1, 8)? {
                    u.int_in_range(0..=3)?
                } else {
                    self.seen.attempt
                };
                self.deliver(attempt, message);
            }
            150..=174 => {
                self.now = now + pause(u)?;
                self.time_passes();
            }
            175..=184 => {
                let attempt = if u.ratio(1, 8)? {
                    u.int_in_range(0..=3)?
                } else {
                    self.seen.attempt
                };
                if u.ratio(1, 4)? {
                    // The connection may still be there, or the machine hangs up.
                    self.source.handle_stream_lost(now, reason());
                } else {
                    self.seen.connected &= attempt != self.seen.attempt;
                    self.source.handle_connection_lost(now, attempt, reason());
                }
            }
            185..=199 => self.connected(),
            200..=206 => {
                let may = self.source.may_turn_back();
                match self.source.handle_abort(now, reason()) {
                    AbortDisposition::Aborting => self.seen.promised_abort = true,
                    AbortDisposition::TooLate => {
                        assert!(!may, "it may turn back and says that it is too late")
                    }
                }
            }
            207..=210 => {
                self.seen.vm_gone = true;
                self.source.handle_vm_gone(now);
            }
            211..=216 => {
                let verdict = messages::verdict(u)?;
                self.told(&verdict);
                self.source.handle_operator_verdict(now, verdict);
            }
            217..=222 => self.source.handle_redial(now),
            223..=226 => self.source.handle_throttle_failed(&reason()),
            227..=230 => self.source.handle_sent(SentCounters {
                pages_raw: u.arbitrary()?,
                wire_bytes: u.arbitrary()?,
                ..SentCounters::default()
            }),
            231..=240 => self.crash(u)?,
            _ => self.source.handle_timeout(now),
        }
        self.pump();
        let seen = &self.seen;
        if !seen.finished && self.source.phase() != palanquin_engine::source::SourcePhase::Ended {
            let waits = !self.pending.is_empty() || self.source.poll_timeout().is_some();
            assert!(waits, "nothing will ever happen again: {:?}", self.source);
        }
        assert!(
            !seen.committed || seen.taken_back || !self.source.may_turn_back(),
            "committed, and it would turn back"
        );
        let percent = self.source.progress().percent();
        assert!((0.0..=100.0).contains(&percent), "{percent} %");
        Ok(())
    }

    /// Plays timers until none is due.
    fn time_passes(&mut self) {
        for _ in 0..8 {
            match self.source.poll_timeout() {
                Some(due) if due <= self.now => self.source.handle_timeout(self.now),
                _ => return,
            }
            self.pump();
        }
        panic!("timers that are due again and again: {:?}", self.source);
    }

    fn connected(&mut self) {
        let attempt = self.seen.attempt;
        if self.source.phase() != palanquin_engine::source::SourcePhase::Ended
            && !self.seen.connected
        {
            self.seen.connected = true;
            self.source.handle_connected(self.now, attempt);
        }
    }

    fn told(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Owned(epoch) => self.seen.told_owned |= *epoch == COMMIT_EPOCH,
            Verdict::Discarded => self.seen.told_discarded = true,
            Verdict::Pulling(_) => self.seen.told_running = true,
            Verdict::Undecided | Verdict::Unknown | Verdict::Receiving(..) => {}
        }
    }

    fn deliver(&mut self, attempt: u32, message: Message) {
        if attempt == self.seen.attempt {
            match &message {
                Message::Running(epoch) if *epoch == COMMIT_EPOCH => {
                    self.seen.told_owned = true;
                    self.seen.told_running = true;
                }
                Message::Complete(_) => self.seen.told_owned = true,
                Message::Discarded(_) => self.seen.told_discarded = true,
                Message::Verdict(verdict) => self.told(verdict),
                Message::Ready(ready) => self.seen.theirs.push(ready.root),
                Message::RoundReceived(round) if *round == self.seen.acknowledged + 1 => {
                    self.seen.acknowledged += 1;
                }
                _ => {}
            }
        }
        self.source.handle_message(self.now, attempt, message);
    }

    /// What a destination would say next; false if it has nothing to say.
    fn reply(&mut self, u: &mut Unstructured<'_>) -> Result<bool> {
        if !self.seen.connected {
            if self.seen.attempt > 0 && matches!(self.seen.said, None) {
                self.connected();
                self.seen.said = Some(Message::Ping);
                return Ok(true);
            }
            return Ok(false);
        }
        let streams_asked = std::mem::take(&mut self.seen.streams_asked);
        let message = if streams_asked {
            Message::StreamsReady
        } else if self.seen.acknowledged < self.seen.rounds_ended && !self.source.is_redialling() {
            Message::RoundReceived(self.seen.acknowledged + 1)
        } else {
            match self.seen.said.take() {
                Some(Message::Hello(hello)) => {
                    Message::HelloReply(HelloReply::to(&hello, "fuzz", REPLY_CHALLENGE))
                }
                Some(Message::Offer(offer)) => Message::Accepted(Accepted {
                    streams: offer.streams,
                    stream_secret: StreamSecret([2; 32]),
                    post_copy: offer.post_copy != PostCopyUse::No,
                    evidence: messages::evidence(u)?,
                }),
                Some(Message::Seal(_)) => Message::Ready(messages::ready(u)?),
                Some(Message::Commit(_)) => Message::Running(COMMIT_EPOCH),
                Some(Message::Query(_)) if self.source.is_redialling() && u.ratio(7, 8)? => {
                    let whole = self.seen.acknowledged < self.seen.rounds_ended && u.arbitrary()?;
                    self.seen.acknowledged += u32::from(whole);
                    let rejoin = Rejoin {
                        streams: offer_sample().streams,
                        stream_secret: StreamSecret([3; 32]),
                    };
                    Message::Verdict(Verdict::Receiving(rejoin, self.seen.acknowledged))
                }
                Some(Message::Query(_)) => Message::Verdict(messages::verdict(u)?),
                _ if self.source.is_redialling() => Message::Present(messages::present(u)?),
                _ if self.source.runs_on_destination() => match u.int_in_range(0..=3)? {
                    0 => Message::Present(messages::present(u)?),
                    1 => Message::Complete(Complete {
                        root: None,
                        fault_wait_log2_us: vec![],
                    }),
                    _ => return Ok(false),
                },
                _ => return Ok(false),
            }
        };
        self.deliver(self.seen.attempt, message);
        Ok(true)
    }

    fn failure(&mut self, u: &mut Unstructured<'_>) -> Result<Failure> {
        let vm_gone = u.ratio(1, 8)?;
        self.seen.vm_gone |= vm_gone;
        Ok(Failure {
            reason: reason(),
            vm_gone,
        })
    }

    fn pages(&self, u: &mut Unstructured<'_>) -> Result<PageSet> {
        let mut pages = PageSet::empty(&self.layout);
        for _ in 0..u.int_in_range(0..=2)? {
            let first = u.int_in_range(0..=599)?;
            pages.insert(
                u.int_in_range(0..=1)?,
                first..first + u.int_in_range(1..=300)?,
            );
        }
        Ok(pages)
    }

    fn paused(&self, u: &mut Unstructured<'_>) -> Result<SourceDone> {
        Ok(SourceDone::Paused {
            since: Duration::from_micros(u.arbitrary()?),
            looked_into: u.arbitrary::<bool>()?.then(|| self.pages(u)).transpose()?,
        })
    }

    fn any_done(&self, u: &mut Unstructured<'_>) -> Result<SourceDone> {
        Ok(match u.int_in_range(0..=6)? {
            6 => SourceDone::Vouched(vec![1; 70_000 * usize::from(u.arbitrary::<bool>()?)]),
            0 => SourceDone::Done,
            1 => SourceDone::Collected(self.pages(u)?),
            2 => SourceDone::DeviceState {
                bytes: u.arbitrary()?,
                sha256: Sha256([1; 32]),
            },
            3 => SourceDone::Root(messages::root(u)?),
            4 => self.paused(u)?,
            _ => SourceDone::NoRoot,
        })
    }

    /// Reports how something ended that was asked for.
    fn report(&mut self, u: &mut Unstructured<'_>, well: bool) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let at = u.int_in_range(0..=self.pending.len().min(4) - 1)?;
        let queue = self.pending[at].1.queue();
        let at = if queue == 0 {
            at
        } else {
            self.pending
                .iter()
                .position(|(_, kind)| kind.queue() == queue)
                .unwrap_or(at)
        };
        let Some((op, kind)) = self.pending.remove(at) else {
            return Ok(());
        };
        if !well {
            let failure = self.failure(u)?;
            // Whether a record that could not be written is on the disk nobody knows.
            if let Kind::Journal(record) = &kind
                && u.arbitrary()?
            {
                self.disk.push(record.clone());
            }
            if matches!(kind, Kind::Journal(SourceRecord::TakenBack(_))) {
                self.seen.taken_back = true;
            }
            self.source.handle_done(self.now, op, Err(failure));
            return Ok(());
        }
        let done = match &kind {
            Kind::Journal(record) => {
                self.disk.push(record.clone());
                match record {
                    SourceRecord::Committed(_) => self.seen.committed = true,
                    SourceRecord::Released(_) => self.seen.released = true,
                    SourceRecord::TakenBack(_) => self.seen.taken_back = true,
                    SourceRecord::Erased => self.seen.erased = true,
                    _ => {}
                }
                SourceDone::Done
            }
            Kind::Pages => SourceDone::Collected(self.pages(u)?),
            Kind::Pause => self.paused(u)?,
            Kind::Save => SourceDone::DeviceState {
                bytes: 9,
                sha256: Sha256([1; 32]),
            },
            Kind::Root => {
                let root = messages::root(u)?;
                self.seen.ours = Some(root);
                SourceDone::Root(root)
            }
            Kind::Vouch if u.ratio(1, 16)? => SourceDone::Vouched(vec![1; 70_000]),
            Kind::Vouch => {
                self.seen.vouched = true;
                SourceDone::Vouched(b"fuzz".to_vec())
            }
            Kind::Judge(last) => {
                self.seen.judged[usize::from(*last)] = true;
                SourceDone::Done
            }
            Kind::PulledRoot if u.arbitrary()? => SourceDone::NoRoot,
            Kind::PulledRoot => SourceDone::Root(messages::root(u)?),
            Kind::Resume => {
                self.seen.paused = false;
                SourceDone::Done
            }
            _ => SourceDone::Done,
        };
        self.source.handle_done(self.now, op, Ok(done));
        Ok(())
    }

    /// The agent ends, and another goes on from what is on the disk.
    fn crash(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        // Of the records under way some are there: the first ones.
        let under_way = self.pending.iter().filter_map(|(_, kind)| match kind {
            Kind::Journal(record) => Some(record.clone()),
            _ => None,
        });
        let written = u.int_in_range(0..=2)?;
        self.disk.extend(under_way.take(written));
        let Some(newest) = self.disk.last() else {
            return Ok(());
        };
        let vm_gone = u.ratio(1, 8)?;
        let config = SourceConfig {
            layout: (!vm_gone).then(|| self.layout.clone()),
            ..self.config.clone()
        };
        self.source = Source::recover(self.now, config, newest);
        self.pending.clear();
        let gave_back = matches!(newest, SourceRecord::TakenBack(_));
        self.seen = Seen {
            committed: matches!(
                newest,
                SourceRecord::Committed(_) | SourceRecord::Released(_)
            ),
            released: matches!(newest, SourceRecord::Released(_)),
            taken_back: gave_back,
            told_owned: matches!(newest, SourceRecord::Released(_)),
            told_discarded: gave_back,
            vm_gone,
            recovered: true,
            paused: true,
            ..Seen::default()
        };
        if matches!(newest, SourceRecord::Erased | SourceRecord::Aborted(_)) {
            self.seen.finished = true;
        }
        Ok(())
    }

    /// Takes and judges what the source wants.
    fn pump(&mut self) {
        while let Some(action) = self.source.poll_action() {
            assert!(!self.seen.finished, "{action:?} after the end");
            self.judge(action);
        }
        if self.seen.finished {
            assert_eq!(self.source.poll_timeout(), None, "a timer after the end");
        }
    }

    fn wait(&mut self, op: Op, kind: Kind) {
        assert!(self.seen.ops.insert(op), "{op:?} names two actions");
        self.pending.push_back((op, kind));
    }

    fn copies(&self) {
        assert!(!self.seen.stopped, "copying goes on after its end");
    }

    fn judge(&mut self, action: SourceAction) {
        let seen = &mut self.seen;
        match action {
            SourceAction::Connect { attempt } => {
                assert!(attempt > seen.attempt, "two connections of one name");
                seen.attempt = attempt;
                seen.connected = false;
                seen.said = None;
            }
            SourceAction::Send(message) => {
                assert!(seen.connected, "{} without a connection", message.name());
                match &message {
                    Message::Commit(epoch) => {
                        assert!(seen.committed, "the commit was sent before it is durable");
                        assert_eq!(*epoch, COMMIT_EPOCH);
                    }
                    Message::Erased => assert!(seen.erased),
                    Message::Offer(offer) => {
                        assert!(seen.vouched && offer.credentials == b"fuzz");
                    }
                    Message::Challenge(challenge) => {
                        assert_eq!(*challenge, LAST_CHALLENGE);
                        assert!(!seen.challenged, "challenged twice");
                        seen.challenged = true;
                        // It answers when it is ready.
                        return;
                    }
                    Message::Ping => return,
                    _ => {}
                }
                seen.said = Some(message);
            }
            SourceAction::Disconnect => seen.connected = false,
            SourceAction::Journal(op, record) => {
                match &record {
                    SourceRecord::Committed(epoch) => {
                        assert_eq!(*epoch, COMMIT_EPOCH);
                        assert!(
                            seen.ours.is_some_and(|ours| seen.theirs.contains(&ours)),
                            "other memory is committed"
                        );
                        assert!(!seen.promised_abort, "it commits what it promised to abort");
                        assert!(seen.judged[1], "committed and not judged once more");
                    }
                    SourceRecord::Released(epoch) => {
                        assert_eq!(*epoch, COMMIT_EPOCH);
                        assert!(
                            seen.committed && seen.told_owned,
                            "released without an owner"
                        );
                    }
                    SourceRecord::TakenBack(epoch) => {
                        assert_eq!(*epoch, COMMIT_EPOCH.next());
                        assert!(
                            seen.committed && seen.told_discarded,
                            "taken back from an owner"
                        );
                    }
                    SourceRecord::Aborted(_) => assert!(!seen.committed),
                    SourceRecord::Erased => assert!(seen.released || seen.vm_gone),
                    SourceRecord::Ordered(_) => {}
                }
                self.wait(op, Kind::Journal(record));
            }
            SourceAction::OpenStreams { op, streams, .. } => {
                assert!(streams > 0);
                assert!(seen.judged[0] || seen.recovered, "nobody has judged it");
                seen.streams_asked = true;
                self.wait(op, Kind::Streams);
            }
            SourceAction::Vouch { op, challenge } => {
                assert_eq!(challenge, REPLY_CHALLENGE);
                self.wait(op, Kind::Vouch);
            }
            SourceAction::Judge {
                op,
                challenge,
                last,
                ..
            } => {
                let expected = if last { LAST_CHALLENGE } else { CHALLENGE };
                assert_eq!(challenge, expected);
                assert!(
                    !last || seen.challenged,
                    "judged by what it did not ask for"
                );
                self.wait(op, Kind::Judge(last));
            }
            SourceAction::StartTracking(op) => {
                self.copies();
                self.wait(op, Kind::Tracking);
            }
            SourceAction::Collect { op, .. } | SourceAction::Peek(op) => {
                self.copies();
                self.wait(op, Kind::Pages);
            }
            SourceAction::FindData(op) => self.wait(op, Kind::Pages),
            SourceAction::Throttle(share) => assert!(share > 0.0 && share <= 1.0, "{share}"),
            SourceAction::SendPages {
                op,
                pages,
                round,
                then,
            } => {
                self.copies();
                assert_eq!(pages.layout(), &self.layout);
                let seen = &mut self.seen;
                if matches!(then, RoundMark::End | RoundMark::Last) {
                    // Perhaps once more, where the connection broke.
                    seen.rounds_ended = round;
                }
                assert!(
                    then != RoundMark::Pushed || seen.told_running,
                    "the last pages of a VM that may not run"
                );
                self.wait(op, Kind::Sent);
            }
            SourceAction::SendStale { op, .. } => {
                self.copies();
                self.wait(op, Kind::Sent);
            }
            SourceAction::SendUrgent { op, block } => {
                self.copies();
                assert!(!block.is_empty());
                self.wait(op, Kind::Sent);
            }
            SourceAction::Pause { op, .. } => {
                assert!(!seen.committed);
                assert!(seen.connected, "paused, and nobody takes the VM");
                assert!(seen.challenged, "paused, and nobody is asked");
                seen.paused = true;
                self.wait(op, Kind::Pause);
            }
            SourceAction::SaveDeviceState(op) => {
                assert!(seen.paused, "the state of a VM that runs");
                self.wait(op, Kind::Save);
            }
            SourceAction::ComputeRoot(op) => self.wait(op, Kind::Root),
            SourceAction::ComputePulledRoot(op) => self.wait(op, Kind::PulledRoot),
            SourceAction::CloseStreams => {
                let of_streams = |kind: &Kind| matches!(kind, Kind::Sent | Kind::Streams);
                self.pending.retain(|(_, kind)| !of_streams(kind));
                self.seen.streams_asked = false;
            }
            SourceAction::StopCopying => {
                seen.stopped = true;
                self.pending.retain(|(_, kind)| kind.queue() != 0);
            }
            SourceAction::Resume(op) => {
                let records = self.pending.iter().filter_map(|(_, kind)| match kind {
                    Kind::Journal(record) => Some(record),
                    _ => None,
                });
                for record in records {
                    let unsure = matches!(
                        record,
                        SourceRecord::Committed(_) | SourceRecord::TakenBack(_)
                    );
                    assert!(!unsure, "resumed while {record:?} is under way");
                }
                let ours = !seen.committed || (seen.told_discarded && seen.taken_back);
                assert!(ours, "a VM is resumed that was given away");
                self.wait(op, Kind::Resume);
            }
            SourceAction::Erase(op) => {
                let lost = seen.vm_gone && seen.committed && (seen.told_running || seen.told_owned);
                assert!(
                    seen.released || lost,
                    "a VM is erased that nobody else owns"
                );
                self.wait(op, Kind::Erase);
            }
            SourceAction::Finish(ending) => {
                match ending {
                    Ending::Completed => {
                        assert!(
                            seen.erased && seen.released,
                            "completed, and it is still here"
                        );
                        assert!(
                            !seen.promised_abort,
                            "completed in spite of a promise to abort"
                        );
                    }
                    Ending::RunningOnSource(..) => {
                        assert!(!seen.committed || seen.told_discarded);
                        assert!(!seen.paused, "said to run, and it is paused");
                    }
                    Ending::VmLost(_) => {}
                }
                seen.finished = true;
            }
        }
    }
}
