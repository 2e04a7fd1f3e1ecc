//! The destination.

use std::collections::{BTreeSet, VecDeque};

use arbitrary::{Result, Unstructured};
use palanquin_engine::destination::{DestinationDone, DestinationEnding, DestinationPhase, Op};
use palanquin_engine::ids::StreamSecret;
use palanquin_engine::journal::DestinationRecovery;
use palanquin_engine::message::{Complete, EVIDENCE_MAX, Hello, Offer, Seal, Verdict, WireBlocker};
use palanquin_engine::order::Ledger;
use palanquin_engine::pages::RamLayout;
use palanquin_engine::source::Failure;
use palanquin_engine::time::Timing;
use palanquin_engine::{
    Destination, DestinationAction, DestinationConfig, DestinationRecord, Message, Root, Time,
};

use super::messages::{self, COMMIT_EPOCH, reason};
use super::pause;
use crate::entry::Target;
use crate::targets::message::{CHALLENGE, LAST_CHALLENGE, REPLY_CHALLENGE, offer_sample};

/// Any sequence of events.
pub(crate) const DESTINATION: Target = Target::new(
    "destination",
    |data| {
        let _ = run(data);
    },
    seeds,
);

/// Walks of what comes next, with something else after a while.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for began in [4, 8, 12, 16, 20, 24, 30, 40] {
        for other in [100, 130, 150, 180, 195, 205, 212, 220, 235, 250] {
            seeds.push(
                [
                    vec![10; began],
                    vec![other, 1],
                    vec![10; 20],
                    vec![other; 8],
                    vec![10; 30],
                ]
                .concat(),
            );
        }
    }
    seeds
}

/// What a report is awaited of.
#[derive(Clone, Debug)]
enum Kind {
    Journal(DestinationRecord),
    Reserve,
    Streams,
    Attest,
    Load,
    Root,
    End,
    Activate,
    Terminate,
}

impl Kind {
    /// What ends in the order in which it was asked for.
    fn queue(&self) -> u8 {
        match self {
            Self::Journal(_) => 1,
            Self::Reserve | Self::Load | Self::End | Self::Activate | Self::Terminate => 2,
            _ => 0,
        }
    }
}

/// What was seen so far, by which actions are judged.
#[derive(Default)]
struct Seen {
    connected: bool,
    /// The ledger is being looked at; it had nothing against the order.
    consulting: bool,
    ordered: bool,
    /// Records on the disk, as far as the engine was told.
    reserved: bool,
    owned: bool,
    activated: bool,
    discarded: bool,
    /// A record of ownership, or of a discard, was asked for.
    asked_owned: bool,
    asked_discard: bool,
    container: bool,
    opened: bool,
    rounds: u32,
    /// The VM is paused at the source; whether its last pages come after the switchover.
    drained: Option<bool>,
    /// A piece of the device state is here that was saved before the pause.
    early: bool,
    last_round: bool,
    seal: Option<Seal>,
    loaded: bool,
    /// The source has asked for evidence, and it is there.
    challenged: bool,
    attested: bool,
    root: Option<Root>,
    ready: bool,
    committed: bool,
    post_copy: bool,
    /// The VM was resumed; is being; was to be ended.
    ran: bool,
    terminated: bool,
    pulled: bool,
    container_gone: bool,
    recovered: bool,
    finished: bool,
    ops: BTreeSet<Op>,
}

struct Player {
    destination: Destination,
    config: DestinationConfig,
    now: Time,
    pending: VecDeque<(Op, Kind)>,
    disk: Vec<DestinationRecord>,
    offered: Option<Offer>,
    seen: Seen,
}

fn run(data: &[u8]) -> Result<()> {
    let mut u = Unstructured::new(data);
    let config = DestinationConfig {
        timing: Timing::default(),
        software: "fuzz".to_owned(),
        stream_secret: StreamSecret([2; 32]),
        streams_max: 4,
        device_state_max: 1 << 20,
        challenge: REPLY_CHALLENGE,
    };
    let now = Time::from_micros(1_000_000);
    let mut player = Player {
        destination: Destination::new(now, config.clone()),
        config,
        now,
        pending: VecDeque::new(),
        disk: Vec::new(),
        offered: None,
        seen: Seen {
            connected: true,
            ..Seen::default()
        },
    };
    while !u.is_empty() && player.event(&mut u)? {}
    Ok(())
}

impl Player {
    /// False where nothing can follow.
    fn event(&mut self, u: &mut Unstructured<'_>) -> Result<bool> {
        let now = self.now;
        match u.arbitrary::<u8>()? {
            // What comes next.
            0..=89 => {
                if self.pending.is_empty() || u.ratio(1, 8)? {
                    self.proceed(u)?;
                } else {
                    self.report(u, true)?;
                }
            }
            90..=109 => self.report(u, false)?,
            110..=119 => {
                let op = Op(u.int_in_range(0..=40)?);
                let done = Self::any_done(u)?;
                if self.pending.iter().all(|(pending, _)| *pending != op) {
                    let result = if u.arbitrary()? {
                        Ok(done)
                    } else {
                        Err(self.failure(u)?)
                    };
                    self.destination.handle_done(now, op, result);
                }
            }
            120..=144 => {
                let message = messages::any(u)?;
                self.deliver(message);
            }
            145..=174 => {
                self.now = now + pause(u)?;
                self.time_passes();
            }
            175..=184 => {
                self.seen.connected = false;
                self.destination.handle_connection_lost(now, reason());
            }
            185..=194 => self.query(),
            195..=199 => {
                self.seen.container_gone = true;
                self.destination.handle_container_gone(now);
            }
            200..=206 => {
                let may = self.destination.may_discard();
                assert_eq!(self.destination.handle_abort(now, reason()), may);
            }
            207..=211 => {
                let (round, last) = (u.int_in_range(0..=5)?, u.arbitrary()?);
                self.round(round, last);
            }
            212 => self.early(),
            213..=214 => {
                let post_copy = u.arbitrary()?;
                self.drained(post_copy);
            }
            215..=217 => {
                self.seen.pulled = true;
                self.destination.handle_pushed(now);
            }
            218..=221 => self.ledger(u)?,
            222..=231 => {
                if !self.crash(u)? {
                    return Ok(false);
                }
            }
            _ => self.destination.handle_timeout(now),
        }
        self.pump();
        let seen = &self.seen;
        let phase = self.destination.phase();
        if !seen.finished {
            // Under post-copy the VM runs and waits for its source, for as long as it takes.
            let waits = !self.pending.is_empty()
                || seen.consulting
                || self.destination.poll_timeout().is_some()
                || phase == DestinationPhase::PostCopy;
            assert!(
                waits,
                "nothing will ever happen again: {:?}",
                self.destination
            );
            assert!(phase != DestinationPhase::Ended, "ended without saying so");
        }
        assert!(
            !(seen.owned && self.destination.may_discard()),
            "owned, and it would discard"
        );
        Ok(true)
    }

    fn time_passes(&mut self) {
        for _ in 0..8 {
            match self.destination.poll_timeout() {
                Some(due) if due <= self.now => self.destination.handle_timeout(self.now),
                _ => return,
            }
            self.pump();
        }
        panic!(
            "timers that are due again and again: {:?}",
            self.destination
        );
    }

    fn query(&mut self) {
        let connected = self
            .destination
            .handle_query(self.now, StreamSecret([4; 32]));
        if connected {
            let copies = self.seen.opened && self.seen.drained.is_none();
            assert!(
                self.seen.post_copy || copies && !self.seen.asked_discard,
                "a connection is taken over and no pages are needed"
            );
            self.seen.connected = true;
        }
    }

    fn deliver(&mut self, message: Message) {
        match &message {
            Message::Offer(offer) if self.offered.is_none() => self.offered = Some(offer.clone()),
            Message::Challenge(_) if self.seen.opened => self.seen.challenged = true,
            Message::Seal(seal) if self.seen.seal.is_none() && self.seen.opened => {
                self.seen.seal = Some(seal.clone());
            }
            Message::Commit(epoch) if *epoch == COMMIT_EPOCH && self.seen.ready => {
                self.seen.committed = true
            }
            _ => {}
        }
        self.destination.handle_message(self.now, message);
    }

    fn round(&mut self, round: u32, last: bool) {
        let in_turn = round == self.seen.rounds + 1 && last == self.seen.drained.is_some();
        let receives = self.seen.opened && !self.destination.is_waiting_for_source();
        if receives && !self.seen.last_round && in_turn {
            self.seen.rounds = round;
            self.seen.last_round = last;
        }
        self.destination.handle_round(self.now, round, last);
    }

    fn early(&mut self) {
        if self.seen.opened && !self.destination.is_waiting_for_source() {
            self.seen.early = true;
        }
        self.destination.handle_early_state(self.now);
    }

    fn drained(&mut self, post_copy: bool) {
        let receives = self.seen.opened && !self.destination.is_waiting_for_source();
        if receives && self.seen.drained.is_none() {
            self.seen.drained = Some(post_copy);
        }
        self.destination.handle_drained(self.now, post_copy);
    }

    fn ledger(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let bad = u.ratio(1, 8)?;
        let ledger = Ledger {
            host: "b".to_owned(),
            peer: "a".to_owned(),
            unix_s: 900,
            migration_seen: bad && u.arbitrary()?,
            refusals: if bad && u.arbitrary()? {
                vec![WireBlocker {
                    code: "gate".to_owned(),
                    message: String::new(),
                    remedy: String::new(),
                }]
            } else {
                vec![]
            },
            ..Ledger::default()
        };
        if std::mem::take(&mut self.seen.consulting) {
            let order = self.offered.as_ref().map(|offer| &offer.order);
            self.seen.ordered = ledger.refusals.is_empty()
                && order.is_some_and(|order| order.judge(&ledger).is_ok());
        }
        self.destination.handle_ledger(self.now, &ledger);
        Ok(())
    }

    /// What a source, its streams and the ledger would do next.
    fn proceed(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        if self.seen.consulting {
            return self.ledger(u);
        }
        let message = match self.destination.phase() {
            DestinationPhase::Preparing if self.offered.is_none() && u.arbitrary()? => {
                Message::Offer(Offer {
                    post_copy: palanquin_engine::strategy::PostCopyUse::IfPossible,
                    ..offer_sample()
                })
            }
            DestinationPhase::Preparing => Message::Hello(Hello::ours("fuzz", CHALLENGE)),
            DestinationPhase::Receiving if !self.seen.connected => {
                self.query();
                return Ok(());
            }
            DestinationPhase::Receiving => {
                if u.ratio(1, 8)? {
                    self.early();
                } else if !self.seen.challenged && self.seen.rounds > 0 && !u.ratio(1, 8)? {
                    self.deliver(Message::Challenge(LAST_CHALLENGE));
                } else if u.arbitrary()? {
                    let post_copy = u.arbitrary()?;
                    self.drained(post_copy);
                } else {
                    self.round(self.seen.rounds + 1, false);
                }
                return Ok(());
            }
            DestinationPhase::Switchover if !self.seen.last_round && u.arbitrary()? => {
                self.round(self.seen.rounds + 1, true);
                return Ok(());
            }
            DestinationPhase::Switchover if !self.seen.challenged => {
                Message::Challenge(LAST_CHALLENGE)
            }
            DestinationPhase::Switchover if self.seen.seal.is_none() => {
                let last = self.seen.rounds + u32::from(!self.seen.last_round);
                let mut seal = messages::seal(u, last)?;
                if let (Some(post_copy), false) = (self.seen.drained, u.ratio(1, 16)?) {
                    seal.post_copy = post_copy;
                }
                Message::Seal(seal)
            }
            DestinationPhase::Switchover if !self.seen.last_round => {
                self.round(self.seen.rounds + 1, true);
                return Ok(());
            }
            DestinationPhase::Switchover => Message::Commit(COMMIT_EPOCH),
            DestinationPhase::PostCopy if !self.seen.connected => {
                self.query();
                return Ok(());
            }
            DestinationPhase::PostCopy => {
                self.seen.pulled = true;
                self.destination.handle_pushed(self.now);
                return Ok(());
            }
            DestinationPhase::Committing => Message::Erased,
            _ => return Ok(()),
        };
        self.deliver(message);
        Ok(())
    }

    fn failure(&mut self, u: &mut Unstructured<'_>) -> Result<Failure> {
        let vm_gone = u.ratio(1, 8)?;
        self.seen.container_gone |= vm_gone;
        Ok(Failure {
            reason: reason(),
            vm_gone,
        })
    }

    fn complete() -> Complete {
        Complete {
            root: None,
            fault_wait_log2_us: vec![],
        }
    }

    /// Now and then more than may be told.
    fn any_evidence(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
        if u.ratio(1, 16)? {
            return Ok(vec![1; EVIDENCE_MAX + 1]);
        }
        messages::evidence(u)
    }

    fn any_done(u: &mut Unstructured<'_>) -> Result<DestinationDone> {
        Ok(match u.int_in_range(0..=6)? {
            6 => DestinationDone::Attested(messages::evidence(u)?),
            0 => DestinationDone::Done,
            5 => DestinationDone::NeverRan,
            1 => DestinationDone::Reserved {
                post_copy: u.arbitrary()?,
                evidence: messages::evidence(u)?,
            },
            2 => DestinationDone::Blocked(vec![]),
            3 => DestinationDone::Pulled(Self::complete()),
            _ => DestinationDone::Root(messages::root(u)?),
        })
    }

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
        let seen = &mut self.seen;
        if !well {
            if let Kind::Journal(record) = &kind
                && u.arbitrary()?
            {
                self.disk.push(record.clone());
            }
            let failure = self.failure(u)?;
            self.destination.handle_done(self.now, op, Err(failure));
            return Ok(());
        }
        let done = match kind {
            Kind::Journal(record) => {
                match &record {
                    DestinationRecord::Reserved(_) => seen.reserved = true,
                    DestinationRecord::Owned(_) | DestinationRecord::Pulling(_) => {
                        seen.owned = true
                    }
                    DestinationRecord::Activated => seen.activated = true,
                    DestinationRecord::Discarded(_) => seen.discarded = true,
                }
                self.disk.push(record);
                DestinationDone::Done
            }
            Kind::Reserve if u.ratio(1, 16)? => DestinationDone::Blocked(vec![]),
            Kind::Reserve => {
                seen.container = true;
                DestinationDone::Reserved {
                    post_copy: u.arbitrary()?,
                    evidence: Self::any_evidence(u)?,
                }
            }
            Kind::Attest => {
                let evidence = Self::any_evidence(u)?;
                seen.attested = evidence.len() <= EVIDENCE_MAX;
                DestinationDone::Attested(evidence)
            }
            Kind::Streams => {
                seen.opened = true;
                DestinationDone::Done
            }
            Kind::Load => {
                seen.loaded = true;
                DestinationDone::Done
            }
            Kind::Root => {
                let root = messages::root(u)?;
                seen.root = Some(root);
                DestinationDone::Root(root)
            }
            Kind::End => DestinationDone::Pulled(Self::complete()),
            Kind::Activate => {
                seen.ran = true;
                DestinationDone::Done
            }
            Kind::Terminate => DestinationDone::Done,
        };
        self.destination.handle_done(self.now, op, Ok(done));
        Ok(())
    }

    /// The agent ends; another goes on where that needs a session. False where it does not.
    fn crash(&mut self, u: &mut Unstructured<'_>) -> Result<bool> {
        let under_way = self.pending.iter().filter_map(|(_, kind)| match kind {
            Kind::Journal(record) => Some(record.clone()),
            _ => None,
        });
        let written = u.int_in_range(0..=2)?;
        self.disk.extend(under_way.take(written));
        let recovery = self.disk.last().map(DestinationRecord::recovery);
        let (Some(DestinationRecovery::Pull(epoch)), Some(offer)) = (recovery, &self.offered)
        else {
            return Ok(false);
        };
        assert_eq!(epoch, COMMIT_EPOCH);
        let layout = RamLayout::new(offer.region_pages.clone()).expect("it was accepted");
        let order = offer.order.clone();
        self.destination = Destination::recover(self.now, self.config.clone(), order, layout);
        self.pending.clear();
        self.seen = Seen {
            reserved: true,
            owned: true,
            asked_owned: true,
            container: true,
            opened: true,
            post_copy: true,
            recovered: true,
            ..Seen::default()
        };
        Ok(true)
    }

    fn pump(&mut self) {
        while let Some(action) = self.destination.poll_action() {
            assert!(!self.seen.finished, "{action:?} after the end");
            self.judge(action);
        }
        if self.seen.finished {
            assert_eq!(
                self.destination.poll_timeout(),
                None,
                "a timer after the end"
            );
        }
    }

    fn wait(&mut self, op: Op, kind: Kind) {
        assert!(self.seen.ops.insert(op), "{op:?} names two actions");
        self.pending.push_back((op, kind));
    }

    fn judge(&mut self, action: DestinationAction) {
        let seen = &mut self.seen;
        match action {
            DestinationAction::Send(message) => {
                assert!(seen.connected, "{} without a connection", message.name());
                match message {
                    Message::Accepted(accepted) => {
                        let offered = self.offered.as_ref().map_or(0, |offer| offer.streams);
                        assert!(seen.container && (1..=offered.min(4)).contains(&accepted.streams));
                        assert!(accepted.evidence.len() <= EVIDENCE_MAX);
                    }
                    Message::StreamsReady => assert!(seen.opened),
                    Message::Ready(ready) => {
                        let all = seen.loaded && seen.attested && seen.root == Some(ready.root);
                        assert!(all, "ready before it is");
                        seen.ready = true;
                    }
                    Message::Running(epoch) => {
                        assert!(
                            seen.owned && seen.ran && epoch == COMMIT_EPOCH,
                            "said to run"
                        );
                    }
                    Message::Verdict(Verdict::Owned(epoch)) => {
                        assert!(seen.owned && epoch == COMMIT_EPOCH, "said to be owned");
                        // Then the source lets go of the pages.
                        assert!(!seen.post_copy || seen.activated);
                    }
                    Message::Verdict(Verdict::Pulling(_)) => assert!(seen.owned && seen.post_copy),
                    Message::Verdict(Verdict::Receiving(_, rounds)) => {
                        assert!(seen.opened && seen.drained.is_none() && !seen.asked_owned);
                        assert_eq!(rounds, seen.rounds, "another number of rounds has arrived");
                    }
                    Message::Verdict(_) => panic!("a session answers for itself: {message:?}"),
                    Message::Discarded(_) => {
                        assert!(seen.discarded, "a discard is told before it is durable")
                    }
                    Message::Complete(_) => {
                        assert!(
                            seen.activated && seen.pulled,
                            "the source would erase pages that are needed"
                        );
                    }
                    Message::Refused(_) => assert!(!seen.container),
                    _ => {}
                }
            }
            DestinationAction::ConsultLedger(offer) => {
                assert_eq!(Some(&*offer), self.offered.as_ref());
                assert!(self.destination.challenge().is_some());
                seen.consulting = true;
            }
            DestinationAction::Journal(op, record) => {
                match &record {
                    DestinationRecord::Reserved(_) => {
                        assert!(seen.ordered, "an order that was refused")
                    }
                    DestinationRecord::Owned(epoch) | DestinationRecord::Pulling(epoch) => {
                        assert!(
                            seen.committed && seen.ready && *epoch == COMMIT_EPOCH,
                            "nobody gave it"
                        );
                        let sealed = seen.seal.as_ref().is_some_and(|seal| seal.post_copy);
                        seen.post_copy = matches!(record, DestinationRecord::Pulling(_));
                        assert_eq!(sealed, seen.post_copy);
                        seen.asked_owned = true;
                    }
                    DestinationRecord::Activated => {
                        assert!(seen.owned, "the record says nothing without an owner");
                        let ended = seen.container_gone;
                        assert!(ended || seen.ran, "not resumed");
                        assert!(ended || !seen.post_copy || seen.pulled, "pages are missing");
                    }
                    DestinationRecord::Discarded(_) => {
                        assert!(!seen.ran && !seen.recovered, "a VM that ran is given back");
                        seen.asked_discard = true;
                    }
                }
                self.wait(op, Kind::Journal(record));
            }
            DestinationAction::Reserve(op, offer) => {
                assert!(seen.reserved && Some(&offer) == self.offered.as_ref());
                self.wait(op, Kind::Reserve);
            }
            DestinationAction::ExpectStreams { op, streams, .. } => {
                assert!(seen.container && (1..=4).contains(&streams));
                self.wait(op, Kind::Streams);
            }
            DestinationAction::Attest { op, challenge } => {
                assert!(seen.challenged && [CHALLENGE, LAST_CHALLENGE].contains(&challenge));
                self.wait(op, Kind::Attest);
            }
            DestinationAction::LoadDeviceState(op) => {
                assert!(
                    seen.drained.is_some() || seen.early,
                    "loaded, and none of it is here"
                );
                self.wait(op, Kind::Load);
            }
            DestinationAction::ReleaseDeviceState { post_copy } => {
                assert_eq!(
                    seen.drained,
                    Some(post_copy),
                    "devices are loaded while the VM runs at its source"
                );
            }
            DestinationAction::SealDeviceState(seal) => {
                assert!((1..=1 << 20).contains(&seal.device_state_bytes));
            }
            DestinationAction::ComputeRoot(op) => self.wait(op, Kind::Root),
            DestinationAction::TellReceived => {
                assert!(seen.connected && seen.opened && seen.drained.is_none());
            }
            DestinationAction::TellPresent => assert!(seen.connected && seen.post_copy),
            DestinationAction::EndPulling(op) => {
                assert!(seen.post_copy && seen.owned && seen.pulled);
                self.wait(op, Kind::End);
            }
            DestinationAction::Disconnect => seen.connected = false,
            DestinationAction::Activate(op) => {
                assert!(seen.owned, "a VM is resumed that is not owned");
                assert!(
                    !seen.asked_discard && !seen.terminated,
                    "a VM is resumed that was given back"
                );
                self.wait(op, Kind::Activate);
            }
            DestinationAction::Terminate(op) => {
                let resumes = self
                    .pending
                    .iter()
                    .any(|(_, kind)| matches!(kind, Kind::Activate));
                assert!(!seen.ran && !resumes, "a VM is ended that may run");
                seen.terminated = true;
                self.wait(op, Kind::Terminate);
            }
            DestinationAction::Finish(ending) => {
                match ending {
                    DestinationEnding::Owned => assert!(seen.owned && seen.ran),
                    DestinationEnding::OwnedButEnded(_) => {
                        assert!(seen.owned && seen.container_gone)
                    }
                    DestinationEnding::Discarded(_) => {
                        assert!(!seen.ran && seen.asked_discard);
                        assert!(
                            !seen.asked_owned || seen.discarded,
                            "ours on the disk, and not here"
                        );
                    }
                    DestinationEnding::Refused(_) => assert!(!seen.reserved),
                }
                seen.finished = true;
            }
        }
    }
}
