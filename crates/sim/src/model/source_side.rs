//! What the source's agent does for its machine.

use std::sync::Arc;

use palanquin_engine::ids::Sha256;
use palanquin_engine::journal::SourceRecovery;
use palanquin_engine::message::Message;
use palanquin_engine::source::{AbortDisposition, Ending, Op, RoundMark, SourceAction, SourceDone};
use palanquin_engine::{PageSet, Source, SourceRecord};

use super::world::{Data, NOW, VmJob, World, failure, layout, plain, reason, root};
use crate::mutation::Mutation;

impl World {
    pub(super) fn source_engine(&mut self) -> Option<&mut Source> {
        self.source.engine.as_mut().map(Arc::make_mut)
    }

    fn source_done(&mut self, op: Op, done: SourceDone) {
        if let Some(source) = self.source_engine() {
            source.handle_done(NOW, op, Ok(done));
        }
    }

    fn source_failed(&mut self, op: Op, vm_gone: bool) {
        if let Some(source) = self.source_engine() {
            source.handle_done(NOW, op, Err(failure(vm_gone)));
        }
    }

    pub(super) fn source_action(&mut self, action: SourceAction) {
        self.check_judged(&action);
        match action {
            SourceAction::Vouch { op, .. } => self.source_done(op, SourceDone::Vouched(Vec::new())),
            SourceAction::Judge { op, last, .. } => {
                let blind = if last {
                    Mutation::CommitUnjudged
                } else {
                    Mutation::OpenUnjudged
                };
                if self.is(blind) {
                    return self.source_done(op, SourceDone::Done);
                }
                self.source.judging = Some((op, last));
            }
            SourceAction::Connect { attempt } => {
                self.source.attempt = attempt;
                self.source.dialling = true;
            }
            SourceAction::Send(message) => self.send_to_destination(message),
            SourceAction::Disconnect => {
                self.source.dialling = false;
                if let Some(connection) = self.newest() {
                    connection.source_open = false;
                    connection.to_source.clear();
                }
            }
            SourceAction::Journal(op, record) => self.source_records(op, record),
            SourceAction::OpenStreams { op, .. } => self.source.opening = Some(op),
            SourceAction::StartTracking(op) => self.source_done(op, SourceDone::Done),
            SourceAction::Collect { op, first } => {
                let pages = match &mut self.source.vm {
                    Some(vm) => (std::mem::take(&mut vm.dirty) || first).then_some(()),
                    None => return self.source_failed(op, true),
                };
                self.source_done(op, SourceDone::Collected(set(pages.is_some())));
            }
            SourceAction::Peek(op) => {
                let dirty = self.source.vm.as_ref().is_some_and(|vm| vm.dirty);
                self.source_done(op, SourceDone::Collected(set(dirty)));
            }
            SourceAction::FindData(op) => {
                let there = self.source.vm.is_some();
                self.source_done(op, SourceDone::Collected(set(there)));
            }
            SourceAction::SendPages {
                op,
                pages,
                round,
                then,
            } => {
                self.send_pages(&pages, round, then);
                self.source_done(op, SourceDone::Done);
            }
            SourceAction::SendStale { op, pages } => {
                if pages.contains(0, 0) {
                    self.source.sent = 0;
                    self.send_data(Data::Stale);
                }
                self.send_data(Data::Drained(true));
                self.source_done(op, SourceDone::Done);
            }
            SourceAction::SendUrgent { op, .. } => {
                if let Some(version) = self.source.vm.as_ref().map(|vm| vm.version) {
                    self.send_data(Data::Page(version));
                }
                self.source_done(op, SourceDone::Done);
            }
            SourceAction::ComputeRoot(op) => {
                let root = root(self.source.sent);
                self.source_done(op, SourceDone::Root(root));
            }
            SourceAction::ComputePulledRoot(op) => self.source_done(op, SourceDone::NoRoot),
            SourceAction::CloseStreams => self.source.opening = None,
            SourceAction::StopCopying => {
                self.source.opening = None;
                // Nobody waits for it any more.
                self.source.judging = None;
            }
            SourceAction::Throttle(_) => {}
            SourceAction::Pause { op, .. } => self.source.jobs.push_back((op, VmJob::Pause)),
            SourceAction::SaveDeviceState(op) => self.source.jobs.push_back((op, VmJob::Save)),
            SourceAction::Resume(op) => self.source.jobs.push_back((op, VmJob::Resume)),
            SourceAction::Erase(op) => self.source.jobs.push_back((op, VmJob::Erase)),
            SourceAction::Finish(ending) => {
                if let Ending::RunningOnSource(reason, _) = &ending
                    && reason.code == "root-mismatch"
                {
                    self.broken = Some("what arrived is not what was sent");
                }
                self.source.engine = None;
                self.source.opening = None;
            }
        }
    }

    /// The destination was looked at.
    pub(super) fn source_judges(&mut self, passes: bool) {
        let Some((op, last)) = self.source.judging.take() else {
            return;
        };
        if !passes {
            return self.source_failed(op, false);
        }
        self.source.judged[usize::from(last)] = true;
        self.source_done(op, SourceDone::Done);
    }

    fn source_records(&mut self, op: Op, record: SourceRecord) {
        if matches!(record, SourceRecord::Committed(_)) {
            if self.is(Mutation::CommitBeforeDurable) {
                self.send_to_destination(Message::Commit(super::world::order().epoch.next()));
            }
            if self.is(Mutation::EraseAtCommit) {
                self.erase();
            }
        }
        let record = match record {
            SourceRecord::Aborted(_) => SourceRecord::Aborted(reason()),
            other => other,
        };
        self.source.journal.push_back((op, record));
    }

    fn send_to_destination(&mut self, message: Message) {
        if let Some(connection) = self.newest()
            && !connection.cut
            && connection.destination_open
        {
            connection.to_destination.push_back(plain(message));
        }
    }

    fn send_data(&mut self, data: Data) {
        if let Some(connection) = self.newest()
            && !connection.cut
            && connection.destination_open
        {
            connection.data.push_back(data);
        }
    }

    fn send_pages(&mut self, pages: &PageSet, round: u32, then: RoundMark) {
        let forgets = self.is(Mutation::PagesForgotten)
            || self.is(Mutation::LastPagesNotSent) && then != RoundMark::End;
        let version = self.source.vm.as_ref().map(|vm| vm.version);
        if let Some(version) = version.filter(|_| pages.contains(0, 0) && !forgets) {
            let serving = self.source.engine.as_ref();
            if !serving.is_some_and(|source| source.runs_on_destination()) {
                self.source.sent = version;
            }
            self.send_data(Data::Page(version));
        }
        match then {
            RoundMark::None => {}
            RoundMark::Drained => self.send_data(Data::Drained(false)),
            RoundMark::End => self.send_data(Data::RoundEnd(round, false)),
            RoundMark::Last => self.send_data(Data::RoundEnd(round, true)),
            RoundMark::Pushed => self.send_data(Data::Pushed),
        }
    }

    /// The oldest write ends; one that is reported as failed may be durable all the same.
    pub(super) fn source_journal(&mut self, durable: bool, succeeds: bool) {
        let Some((op, record)) = self.source.journal.pop_front() else {
            return;
        };
        if durable {
            self.source.records.push(record);
        }
        if succeeds {
            self.source_done(op, SourceDone::Done);
        } else {
            self.source_failed(op, false);
        }
    }

    pub(super) fn source_job(&mut self, succeeds: bool) {
        let Some((op, job)) = self.source.jobs.pop_front() else {
            return;
        };
        let Some(vm) = &mut self.source.vm else {
            // What is not there need not be removed.
            return match job {
                VmJob::Erase => self.source_done(op, SourceDone::Done),
                _ => self.source_failed(op, true),
            };
        };
        if !succeeds {
            // A hypervisor whose state can't be saved lets the VM run again by itself.
            vm.running |= job == VmJob::Save;
            return self.source_failed(op, false);
        }
        let done = match job {
            VmJob::Pause => {
                vm.running = false;
                self.paused_version = vm.version;
                SourceDone::Done
            }
            VmJob::Save => {
                self.send_data(Data::State);
                SourceDone::DeviceState {
                    bytes: 1,
                    sha256: Sha256([0; 32]),
                }
            }
            VmJob::Resume => {
                vm.running = true;
                SourceDone::Done
            }
            VmJob::Erase => {
                self.erase();
                SourceDone::Done
            }
        };
        self.source_done(op, done);
    }

    pub(super) fn crash_source(&mut self, durable: usize) {
        for _ in 0..durable {
            self.source
                .records
                .extend(self.source.journal.pop_front().map(|(_, record)| record));
        }
        self.source.journal.clear();
        self.source.jobs.clear();
        self.source.opening = None;
        self.source.judging = None;
        self.source.dialling = false;
        self.source.engine = None;
        self.source.up = false;
        for connection in &mut self.connections {
            connection.source_open = false;
            connection.to_source.clear();
        }
    }

    pub(super) fn restart_source(&mut self) {
        self.source.up = true;
        // Without a record nothing began.
        let Some(record) = self.source.records.last() else {
            return;
        };
        if self.is(Mutation::RecoveryIgnoresCommit) {
            if let Some(vm) = &mut self.source.vm {
                vm.running = true;
            }
            return;
        }
        if record.recovery() != SourceRecovery::Nothing {
            let source = Source::recover(NOW, self.source_config(), record);
            self.source.attempt = 0;
            self.source.engine = Some(Arc::new(source));
        }
    }

    pub(super) fn abort_at_source(&mut self) {
        let Some(source) = self.source_engine() else {
            return;
        };
        let answer = source.handle_abort(NOW, reason());
        self.source.promised |= answer == AbortDisposition::Aborting;
    }
}

fn set(page: bool) -> PageSet {
    let mut set = PageSet::empty(&layout());
    if page {
        set.insert(0, 0..1);
    }
    set
}
