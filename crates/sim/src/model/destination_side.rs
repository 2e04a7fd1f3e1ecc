//! What the destination's agent does for its machine.

use std::sync::Arc;

use palanquin_engine::destination::{DestinationAction, DestinationDone, DestinationPhase, Op};
use palanquin_engine::journal::DestinationRecovery;
use palanquin_engine::message::{Complete, Message, Present, WireBlocker};
use palanquin_engine::order::Ledger;
use palanquin_engine::strategy::PostCopyUse;
use palanquin_engine::{Destination, DestinationRecord};

use super::world::{
    Container, ContainerJob, NOW, Recovery, Run, World, failure, layout, order, plain, reason, root,
};
use crate::mutation::Mutation;

impl World {
    pub(super) fn destination_engine(&mut self) -> Option<&mut Destination> {
        self.destination.engine.as_mut().map(Arc::make_mut)
    }

    fn destination_done(&mut self, op: Op, done: DestinationDone) {
        if let Some(destination) = self.destination_engine() {
            destination.handle_done(NOW, op, Ok(done));
        }
    }

    fn destination_failed(&mut self, op: Op, vm_gone: bool) {
        if let Some(destination) = self.destination_engine() {
            destination.handle_done(NOW, op, Err(failure(vm_gone)));
        }
    }

    pub(super) fn destination_action(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Send(message) => self.send_to_source(message),
            DestinationAction::ConsultLedger(_) => self.destination.consulting = true,
            DestinationAction::Attest { op, .. } => self.destination.attesting = Some(op),
            DestinationAction::Journal(op, record) => self.destination_records(op, record),
            DestinationAction::Reserve(op, offer) => {
                self.destination.wishes = offer.post_copy;
                self.give(op, ContainerJob::Reserve);
            }
            DestinationAction::ExpectStreams { op, .. } => self.destination.expecting = Some(op),
            DestinationAction::SealDeviceState(_) => self.destination.state_sealed = true,
            DestinationAction::LoadDeviceState(op) => self.destination.loading = Some(op),
            DestinationAction::ReleaseDeviceState { post_copy } => {
                if let Some(container) = &mut self.destination.container {
                    container.waits = post_copy;
                }
                if let Some(op) = self.destination.loading.take() {
                    self.give(op, ContainerJob::Load);
                }
            }
            DestinationAction::ComputeRoot(op) => {
                let root = root(self.destination.received);
                self.destination_done(op, DestinationDone::Root(root));
            }
            DestinationAction::TellReceived => {
                let told = self.destination.arrived || self.is(Mutation::ClaimMissingReceived);
                self.send_to_source(Message::Present(Present {
                    region: 0,
                    first_page: 0,
                    bits: vec![u8::from(told)],
                    last: true,
                }));
            }
            DestinationAction::TellPresent => {
                let container = self.destination.container.as_ref();
                let there = container.is_some_and(|container| container.version != 0);
                let told = there || self.is(Mutation::ClaimMissingPagePresent);
                self.send_to_source(Message::Present(Present {
                    region: 0,
                    first_page: 0,
                    bits: vec![u8::from(told)],
                    last: true,
                }));
            }
            DestinationAction::EndPulling(op) => self.give(op, ContainerJob::EndPulling),
            DestinationAction::Disconnect => {
                if let Some(connection) = self.session() {
                    connection.destination_open = false;
                    connection.to_destination.clear();
                    connection.data.clear();
                }
            }
            DestinationAction::Activate(op) => self.give(op, ContainerJob::Activate),
            DestinationAction::Terminate(op) => {
                self.destination.expecting = None;
                // Nobody waits for it any more.
                self.destination.attesting = None;
                // A load that still waits for its state is given up.
                self.destination
                    .jobs
                    .retain(|(_, job)| *job != ContainerJob::Load);
                self.give(op, ContainerJob::Terminate);
            }
            DestinationAction::Finish(_) => {
                self.destination.engine = None;
                self.destination.expecting = None;
                self.destination.consulting = false;
                // The thread that served the connection ends with the session.
                if let Some(connection) = self.session() {
                    connection.destination_open = false;
                    connection.to_destination.clear();
                    connection.data.clear();
                }
                self.destination.session = None;
            }
        }
    }

    /// The gates have judged the offer.
    pub(super) fn gates_judge(&mut self, pass: bool) {
        self.destination.consulting = false;
        let unheard = self.is(Mutation::ReserveInSpiteOfGates);
        self.destination.refused = !pass || unheard;
        let refusal = WireBlocker {
            code: "model".to_owned(),
            message: String::new(),
            remedy: String::new(),
        };
        let heard = !pass && !unheard;
        let ledger = Ledger {
            host: order().destination,
            peer: order().source,
            unix_s: 1,
            migration_seen: !self.destination.records.is_empty(),
            vm_present: self.destination.container.is_some(),
            refusals: heard.then_some(refusal).into_iter().collect(),
            ..Ledger::default()
        };
        if let Some(destination) = self.destination_engine() {
            destination.handle_ledger(NOW, &ledger);
        }
    }

    /// Evidence for the source's challenge is there, or cannot be had.
    pub(super) fn attests(&mut self, succeeds: bool) {
        let Some(op) = self.destination.attesting.take() else {
            return;
        };
        if succeeds {
            self.destination_done(op, DestinationDone::Attested(Vec::new()));
        } else {
            self.destination_failed(op, false);
        }
    }

    fn give(&mut self, op: Op, job: ContainerJob) {
        self.destination.jobs.push_back((op, job));
    }

    fn destination_records(&mut self, op: Op, record: DestinationRecord) {
        let owned = matches!(
            record,
            DestinationRecord::Owned(_) | DestinationRecord::Pulling(_)
        );
        if matches!(record, DestinationRecord::Reserved(_)) && self.destination.refused {
            self.broken = Some("an order was taken that a gate refused");
        }
        if owned && self.is(Mutation::RunBeforeOwnedIsDurable) {
            self.run_there();
        }
        if owned && self.is(Mutation::ClaimDiscardWithoutDoing) {
            self.send_to_source(Message::Discarded(reason()));
        }
        let record = match record {
            DestinationRecord::Discarded(_) => DestinationRecord::Discarded(reason()),
            other => other,
        };
        self.destination.journal.push_back((op, record));
    }

    pub(super) fn send_to_source(&mut self, message: Message) {
        if let Some(index) = self.destination.session {
            self.answer(index, message);
        }
    }

    pub(super) fn answer(&mut self, index: usize, message: Message) {
        if let Some(connection) = self.connections.get_mut(index)
            && connection.destination_open
            && connection.source_open
            && !connection.cut
        {
            connection.to_source.push_back(plain(message));
        }
    }

    pub(super) fn destination_journal(&mut self, durable: bool, succeeds: bool) {
        let Some((op, record)) = self.destination.journal.pop_front() else {
            return;
        };
        if durable {
            self.destination.records.push(record);
        }
        if succeeds {
            self.destination_done(op, DestinationDone::Done);
        } else {
            self.destination_failed(op, false);
        }
    }

    /// Whether the next job can end: the device state is awaited, unless nothing will come any more.
    pub(super) fn container_job_ready(&self) -> bool {
        match self.destination.jobs.front() {
            Some((_, ContainerJob::Load)) => {
                let all = self.destination.state_arrived && self.destination.state_sealed;
                all || self.hopeless()
            }
            Some(_) => true,
            None => false,
        }
    }

    fn hopeless(&self) -> bool {
        let finishing = |d: &Arc<Destination>| d.phase() == DestinationPhase::Finishing;
        let session = self.destination.session;
        let connection = session.and_then(|index| self.connections.get(index));
        self.destination.engine.as_ref().is_none_or(finishing)
            || connection.is_none_or(|c| !c.destination_open || c.cut)
    }

    pub(super) fn container_job(&mut self, succeeds: bool) {
        let Some((op, job)) = self.destination.jobs.pop_front() else {
            return;
        };
        if job == ContainerJob::Terminate {
            self.destination.container = None;
            return self.destination_done(op, DestinationDone::Done);
        }
        if !succeeds {
            // A restarted agent never gives up; there it fails once.
            let engine = self.destination.engine.as_ref();
            let gives_up = engine.is_some_and(|d| d.phase() == DestinationPhase::Committing);
            if job == ContainerJob::Activate && gives_up {
                self.destination.cannot_resume = 4;
            }
            return self.destination_failed(op, false);
        }
        if job == ContainerJob::Reserve {
            self.destination.container = Some(Container {
                run: Run::Incoming,
                version: 0,
                waits: false,
            });
            self.destination.received = 0;
            self.destination.arrived = false;
            self.destination.state_arrived = false;
            self.destination.state_sealed = false;
            let post_copy = self.destination.wishes != PostCopyUse::No;
            let reserved = DestinationDone::Reserved {
                post_copy,
                evidence: Vec::new(),
            };
            return self.destination_done(op, reserved);
        }
        let Some(container) = &mut self.destination.container else {
            return self.destination_failed(op, true);
        };
        match job {
            ContainerJob::Load
                if !self.destination.state_arrived || !self.destination.state_sealed =>
            {
                return self.destination_failed(op, false);
            }
            ContainerJob::Load => container.run = Run::Paused,
            ContainerJob::Activate if self.destination.cannot_resume > 0 => {
                self.destination.cannot_resume -= 1;
                return self.destination_failed(op, false);
            }
            ContainerJob::Activate => self.run_there(),
            ContainerJob::EndPulling => {
                container.waits = false;
                let complete = Complete {
                    root: None,
                    fault_wait_log2_us: Vec::new(),
                };
                return self.destination_done(op, DestinationDone::Pulled(complete));
            }
            ContainerJob::Reserve | ContainerJob::Terminate => {}
        }
        self.destination_done(op, DestinationDone::Done);
    }

    pub(super) fn crash_destination(&mut self, durable: usize) {
        for _ in 0..durable {
            let record = self.destination.journal.pop_front();
            let record = record.map(|(_, record)| record);
            self.destination.records.extend(record);
        }
        self.destination.journal.clear();
        self.destination.jobs.clear();
        self.destination.recovery.clear();
        self.destination.expecting = None;
        self.destination.loading = None;
        self.destination.consulting = false;
        self.destination.attesting = None;
        self.destination.session = None;
        self.destination.cannot_resume = 0;
        self.destination.engine = None;
        self.destination.up = false;
        for connection in &mut self.connections {
            connection.destination_open = false;
            connection.to_destination.clear();
            connection.data.clear();
        }
    }

    pub(super) fn restart_destination(&mut self) {
        self.destination.up = true;
        if self.is(Mutation::JournalLostOnRestart) {
            self.destination.records.clear();
        }
        let recovery = self.destination.records.last();
        match recovery.map(DestinationRecord::recovery) {
            Some(DestinationRecovery::Discard) if self.is(Mutation::RecoveryRunsReserved) => {
                self.run_there();
            }
            Some(DestinationRecovery::Activate(_)) if self.is(Mutation::RecoveryDiscardsOwned) => {
                self.discard_leftover();
            }
            Some(DestinationRecovery::Discard) => self.discard_leftover(),
            Some(DestinationRecovery::Pull(_)) if self.is(Mutation::RecoveryForgetsMissing) => {
                if let Some(container) = &mut self.destination.container {
                    container.waits = false;
                }
                self.recover_with([Recovery::Resume, Recovery::RecordActivated]);
            }
            Some(DestinationRecovery::Pull(_)) if self.destination.container.is_some() => {
                let config = Self::destination_config();
                let engine = Destination::recover(NOW, config, order(), layout());
                self.destination.engine = Some(Arc::new(engine));
            }
            Some(DestinationRecovery::Pull(_) | DestinationRecovery::Activate(_)) => {
                self.recover_with([Recovery::Resume, Recovery::RecordActivated]);
            }
            Some(DestinationRecovery::Nothing) | None => {}
        }
    }

    fn recover_with(&mut self, steps: [Recovery; 2]) {
        self.destination.recovery.extend(steps);
    }

    pub(super) fn discard_leftover(&mut self) {
        self.recover_with([Recovery::Terminate, Recovery::RecordDiscarded]);
    }

    pub(super) fn recover_step(&mut self) {
        match self.destination.recovery.pop_front() {
            Some(Recovery::Terminate) => self.destination.container = None,
            Some(Recovery::RecordDiscarded) => {
                let record = DestinationRecord::Discarded(reason());
                self.destination.records.push(record);
            }
            // A container that is gone has ended by itself: nothing can be done about it.
            Some(Recovery::Resume) => self.run_there(),
            Some(Recovery::RecordActivated) => {
                let record = DestinationRecord::Activated;
                self.destination.records.push(record);
            }
            None => {}
        }
    }
}
