//! What can happen next.

use std::sync::Arc;
use std::time::Duration;

use palanquin_engine::source::SourcePhase;
use palanquin_engine::{Destination, Source, Time};

use super::world::{ContainerJob, NOW, VmJob, World};

/// Deadlines after this never pass: connections are not found silent, and nobody has a limit for the whole.
const LAST_DEADLINE: Duration = Duration::from_secs(100);
/// Connections at the same time: the newest, and one whose other end has not noticed.
const CONNECTIONS_MAX: usize = 2;

/// One step. Numbers are those of connections, oldest first; with crashes, how many of the records on their way to the
/// disk are there afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Dialled(bool),
    ToDestination(u8),
    ToSource(u8),
    Data(u8),
    SourceNoticesLoss(u8),
    DestinationNoticesLoss(u8),
    StreamsOpen,
    SourceJournal,
    DestinationJournal,
    SourceJob,
    ContainerJob,
    RestartSource,
    RestartDestination,
    DestinationRecovers,
    /// The destination is judged, and nothing is held against it.
    SourceJudges,
    /// The same of the order and its source.
    GatesJudge,
    Attests,
    SourceTimer,
    DestinationTimer,
    GuestWrites,
    GuestWaits,
    // What follows is bounded.
    SourceTimerEarly,
    DestinationTimerEarly,
    Cut(u8),
    CrashSource(u8),
    CrashDestination(u8),
    SourceJournalFails {
        durable: bool,
    },
    DestinationJournalFails {
        durable: bool,
    },
    SourceJobFails,
    ContainerJobFails,
    SourceRefuses,
    GatesRefuse,
    AttestingFails,
    AbortAtSource,
    AbortAtDestination,
}

impl Step {
    /// Whether a good end has to be reachable without it.
    pub(super) fn is_fault(self) -> bool {
        matches!(
            self,
            Self::SourceTimerEarly
                | Self::DestinationTimerEarly
                | Self::Cut(_)
                | Self::CrashSource(_)
                | Self::CrashDestination(_)
                | Self::SourceJournalFails { .. }
                | Self::DestinationJournalFails { .. }
                | Self::SourceJobFails
                | Self::ContainerJobFails
                | Self::SourceRefuses
                | Self::GatesRefuse
                | Self::AttestingFails
                | Self::AbortAtSource
                | Self::AbortAtDestination
        )
    }
}

impl World {
    /// Steps that need no fault and no deadline.
    fn ordinary(&self, steps: &mut Vec<Step>) {
        if self.source.dialling {
            if self.destination.up && self.connections.len() < CONNECTIONS_MAX {
                steps.push(Step::Dialled(true));
            }
            if !self.destination.up {
                steps.push(Step::Dialled(false));
            }
        }
        for (index, connection) in (0..).zip(&self.connections) {
            let newest = connection.attempt == self.source.attempt;
            if connection.destination_open && !connection.to_destination.is_empty() {
                steps.push(Step::ToDestination(index));
            }
            if connection.destination_open && !connection.data.is_empty() {
                steps.push(Step::Data(index));
            }
            if connection.source_open && !connection.to_source.is_empty() {
                steps.push(Step::ToSource(index));
            }
            let closed = !connection.destination_open && connection.to_source.is_empty();
            if connection.source_open && (connection.cut || closed || !newest) {
                steps.push(Step::SourceNoticesLoss(index));
            }
            let closed = !connection.source_open && connection.to_destination.is_empty();
            if connection.destination_open && (connection.cut || closed) {
                steps.push(Step::DestinationNoticesLoss(index));
            }
        }
        let always = [
            (self.source.opening.is_some(), Step::StreamsOpen),
            (!self.source.journal.is_empty(), Step::SourceJournal),
            (
                !self.destination.journal.is_empty(),
                Step::DestinationJournal,
            ),
            (!self.source.jobs.is_empty(), Step::SourceJob),
            (self.container_job_ready(), Step::ContainerJob),
            (!self.source.up, Step::RestartSource),
            (!self.destination.up, Step::RestartDestination),
            (
                !self.destination.recovery.is_empty(),
                Step::DestinationRecovers,
            ),
            (self.source.judging.is_some(), Step::SourceJudges),
            (self.destination.consulting, Step::GatesJudge),
            (self.destination.attesting.is_some(), Step::Attests),
        ];
        steps.extend(
            always
                .into_iter()
                .filter(|(can, _)| *can)
                .map(|(_, step)| step),
        );
    }

    fn source_deadline(&self) -> Option<Time> {
        let at = self.source.engine.as_ref().and_then(|s| s.poll_timeout());
        at.filter(|at| *at <= NOW + LAST_DEADLINE)
    }

    fn destination_deadline(&self) -> Option<Time> {
        let engine = self.destination.engine.as_ref();
        let at = engine.and_then(|d| Arc::as_ref(d).poll_timeout());
        at.filter(|at| *at <= NOW + LAST_DEADLINE)
    }

    /// Whether the source does nothing but wait until it dials again.
    fn waits_to_dial(&self) -> bool {
        let dials = |s: &Arc<Source>| {
            let in_doubt = matches!(s.phase(), SourcePhase::InDoubt | SourcePhase::PostCopy);
            in_doubt || s.is_redialling()
        };
        self.source.engine.as_ref().is_some_and(dials)
            && !self.source.dialling
            && self.source.opening.is_none()
            && !self
                .connections
                .iter()
                .any(|connection| connection.source_open)
    }

    /// All steps that are possible here.
    pub(super) fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        self.ordinary(&mut steps);
        let quiet = steps.is_empty();
        let left = &self.left;
        if self.source_deadline().is_some() {
            if quiet || self.waits_to_dial() {
                steps.push(Step::SourceTimer);
            } else if left.early_timers > 0 {
                steps.push(Step::SourceTimerEarly);
            }
        }
        if self.destination_deadline().is_some() {
            if quiet {
                steps.push(Step::DestinationTimer);
            } else if left.early_timers > 0 {
                steps.push(Step::DestinationTimerEarly);
            }
        }
        self.guest(&mut steps);
        self.faults(&mut steps);
        steps
    }

    fn guest(&self, steps: &mut Vec<Step>) {
        let vm = self.source.vm.as_ref();
        let container = self.destination.container.as_ref();
        let writes = vm.is_some_and(|vm| vm.running && self.source.engine.is_some());
        if self.left.writes > 0 && writes {
            steps.push(Step::GuestWrites);
        }
        let missing = container.is_some_and(|c| c.waits && c.version == 0);
        if self.left.waits > 0 && missing && self.destination.engine.is_some() {
            steps.push(Step::GuestWaits);
        }
    }

    fn faults(&self, steps: &mut Vec<Step>) {
        let left = &self.left;
        if left.cuts > 0 {
            let whole =
                |c: &super::world::Connection| !c.cut && (c.source_open || c.destination_open);
            let indices = (0..).zip(&self.connections).filter(|(_, c)| whole(c));
            steps.extend(indices.map(|(index, _)| Step::Cut(index)));
        }
        if left.source_crashes > 0 && self.source.up {
            let written = 0..=self.source.journal.len() as u8;
            steps.extend(written.map(Step::CrashSource));
        }
        if left.destination_crashes > 0 && self.destination.up {
            let written = 0..=self.destination.journal.len() as u8;
            steps.extend(written.map(Step::CrashDestination));
        }
        for durable in [false, true] {
            if left.journal_failures > 0 && !self.source.journal.is_empty() {
                steps.push(Step::SourceJournalFails { durable });
            }
            if left.journal_failures > 0 && !self.destination.journal.is_empty() {
                steps.push(Step::DestinationJournalFails { durable });
            }
        }
        if left.vm_failures > 0 {
            if self
                .source
                .jobs
                .front()
                .is_some_and(|(_, job)| *job != VmJob::Erase)
            {
                steps.push(Step::SourceJobFails);
            }
            let job = self.destination.jobs.front();
            if self.container_job_ready()
                && job.is_some_and(|(_, job)| *job != ContainerJob::Terminate)
            {
                steps.push(Step::ContainerJobFails);
            }
            let judging = [
                (self.source.judging.is_some(), Step::SourceRefuses),
                (self.destination.consulting, Step::GatesRefuse),
                (self.destination.attesting.is_some(), Step::AttestingFails),
            ];
            steps.extend(judging.iter().filter(|(can, _)| *can).map(|(_, step)| step));
        }
        if left.aborts > 0 {
            if self.source.engine.is_some() {
                steps.push(Step::AbortAtSource);
            }
            if self.destination.engine.is_some() {
                steps.push(Step::AbortAtDestination);
            }
        }
    }

    /// Takes a step.
    pub(super) fn take(&mut self, step: Step) {
        if self.said.is_some() {
            self.say("step", &step);
        }
        match step {
            Step::Dialled(stands) => self.dialled(stands),
            Step::ToDestination(index) => self.arrives_at_destination(index.into()),
            Step::ToSource(index) => self.arrives_at_source(index.into()),
            Step::Data(index) => self.data_arrives(index.into()),
            Step::SourceNoticesLoss(index) => self.source_notices(index.into()),
            Step::DestinationNoticesLoss(index) => self.destination_notices(index.into()),
            Step::StreamsOpen => self.streams_open(),
            Step::SourceJournal => self.source_journal(true, true),
            Step::DestinationJournal => self.destination_journal(true, true),
            Step::SourceJob => self.source_job(true),
            Step::ContainerJob => self.container_job(true),
            Step::RestartSource => self.restart_source(),
            Step::RestartDestination => self.restart_destination(),
            Step::DestinationRecovers => self.recover_step(),
            Step::SourceJudges => self.source_judges(true),
            Step::GatesJudge => self.gates_judge(true),
            Step::Attests => self.attests(true),
            Step::SourceTimer => self.source_timer(),
            Step::DestinationTimer => self.destination_timer(),
            Step::GuestWrites => {
                self.left.writes -= 1;
                if let Some(vm) = &mut self.source.vm {
                    vm.version += 1;
                    vm.dirty = true;
                }
            }
            Step::GuestWaits => {
                self.left.waits -= 1;
                let demand = palanquin_engine::message::Demand { region: 0, page: 0 };
                self.send_to_source(palanquin_engine::Message::Demand(demand));
            }
            Step::SourceTimerEarly => {
                self.left.early_timers -= 1;
                self.source_timer();
            }
            Step::DestinationTimerEarly => {
                self.left.early_timers -= 1;
                self.destination_timer();
            }
            Step::Cut(index) => {
                self.left.cuts -= 1;
                self.cut(index.into());
            }
            Step::CrashSource(durable) => {
                self.left.source_crashes -= 1;
                self.crash_source(durable.into());
            }
            Step::CrashDestination(durable) => {
                self.left.destination_crashes -= 1;
                self.crash_destination(durable.into());
            }
            Step::SourceJournalFails { durable } => {
                self.left.journal_failures -= 1;
                self.source_journal(durable, false);
            }
            Step::DestinationJournalFails { durable } => {
                self.left.journal_failures -= 1;
                self.destination_journal(durable, false);
            }
            Step::SourceJobFails => {
                self.left.vm_failures -= 1;
                self.source_job(false);
            }
            Step::ContainerJobFails => {
                self.left.vm_failures -= 1;
                self.container_job(false);
            }
            Step::SourceRefuses => {
                self.left.vm_failures -= 1;
                self.source_judges(false);
            }
            Step::GatesRefuse => {
                self.left.vm_failures -= 1;
                self.gates_judge(false);
            }
            Step::AttestingFails => {
                self.left.vm_failures -= 1;
                self.attests(false);
            }
            Step::AbortAtSource => {
                self.left.aborts -= 1;
                self.abort_at_source();
            }
            Step::AbortAtDestination => {
                self.left.aborts -= 1;
                if let Some(destination) = self.destination_engine() {
                    destination.handle_abort(NOW, super::world::reason());
                }
            }
        }
        self.pump();
    }

    fn source_timer(&mut self) {
        if let (Some(at), Some(source)) = (self.source_deadline(), self.source_engine()) {
            source.handle_timeout(at);
        }
    }

    fn destination_timer(&mut self) {
        let at = self.destination_deadline();
        let destination: Option<&mut Destination> = self.destination_engine();
        if let (Some(at), Some(destination)) = (at, destination) {
            destination.handle_timeout(at);
        }
    }
}
