//! The source's agent and its VM.

use super::*;

impl World {
    pub(super) fn crash_source(&mut self) {
        if !self.source_up {
            return;
        }
        self.crashes += 1;
        self.source_up = false;
        self.source_life += 1;
        self.disk_free[0] = self.now;
        self.source = None;
        self.source_jobs.clear();
        self.source_busy = false;
        self.half_written();
        self.let_go();
        self.drop_connection();
        let delay = self.delay(3000);
        self.after(delay, Event::RestartSource);
    }

    /// A hypervisor whose state can't be saved any more may let the VM run again by itself.
    fn let_go(&mut self) {
        if std::mem::take(&mut self.unsaved)
            && self.random.one_in(2)
            && let Some(copy) = &mut self.copies[0]
        {
            copy.run = Run::Running;
        }
    }

    /// Records on their way to the disk are there after a crash, or not.
    pub(super) fn half_written(&mut self) {
        let mut kept = Vec::new();
        for event in self.events.iter_mut().rev().take(64) {
            match event {
                Some(Event::SourceJournal(life, _, record)) if *life + 1 == self.source_life => {
                    kept.push((true, Some(record.clone()), None));
                    *event = None;
                }
                Some(Event::DestinationJournal(life, _, record))
                    if *life + 1 == self.destination_life =>
                {
                    kept.push((false, None, Some(record.clone())));
                    *event = None;
                }
                _ => {}
            }
        }
        for (_, source, destination) in kept.into_iter().rev() {
            if self.random.one_in(2) {
                self.source_records.extend(source);
                self.destination_records.extend(destination);
            }
        }
    }

    pub(super) fn drop_connection(&mut self) {
        self.lose_in_flight();
        let (source, destination) = (self.source_end, self.destination_end);
        let (one, other) = (self.delay(30), self.delay(30));
        self.after(one, Event::SourceLost(source));
        self.after(other, Event::DestinationLost(destination));
    }

    pub(super) fn restart_source(&mut self) {
        self.source_up = true;
        self.source_end = 0;
        let Some(record) = self.source_records.last().cloned() else {
            // Nothing was recorded: nothing began.
            return;
        };
        if self.is(Mutation::RecoveryIgnoresCommit) {
            if let Some(copy) = &mut self.copies[0] {
                copy.run = Run::Running;
            }
            return;
        }
        if record.recovery() != palanquin_engine::journal::SourceRecovery::Nothing {
            self.source = Some(Source::recover(self.time(), self.config(), &record));
        }
    }

    pub(super) fn source_journaled(&mut self, life: u64, op: Op, record: SourceRecord) {
        if life != self.source_life {
            return;
        }
        let now = self.time();
        self.writes[0] += 1;
        if let Some((write, durable)) = self.crash_at[0]
            && write == self.writes[0]
        {
            if durable {
                self.source_records.push(record);
            }
            return self.crash_source();
        }
        let fails = self.now < FAULTS_END && self.random.one_in(150);
        self.source_write_failed |= fails;
        // What is reported as failed may be on the disk all the same.
        if !fails || self.random.one_in(2) {
            self.source_records.push(record);
        }
        if let Some(source) = &mut self.source {
            let result = if fails {
                Err(failed(false))
            } else {
                Ok(SourceDone::Done)
            };
            source.handle_done(now, op, result);
        }
    }

    pub(super) fn next_source_job(&mut self) {
        if !self.source_busy && !self.source_jobs.is_empty() {
            self.source_busy = true;
            let delay = self.delay(15);
            self.after(delay, Event::SourceVm(self.source_life));
        }
    }

    /// A hypervisor tells what its devices look into, or does not.
    fn paused(&mut self, post_copy: bool) -> SourceDone {
        if self.random.one_in(2) {
            return SourceDone::Done;
        }
        let looked_into = post_copy.then(|| {
            let mut pages = PageSet::empty(&self.layout);
            for _ in 0..self.random.below(4) {
                let page = self.random.below(PAGES);
                pages.insert(0, page..page + 1);
            }
            pages
        });
        SourceDone::Paused {
            since: Duration::ZERO,
            looked_into,
        }
    }

    pub(super) fn source_job(&mut self) -> Result<(), String> {
        self.source_busy = false;
        let Some(job) = self.source_jobs.pop_front() else {
            return Ok(());
        };
        let now = self.time();
        let fails = self.now < FAULTS_END && self.random.one_in(120);
        let alive = self.copies[0].is_some();
        let (op, result) = match job {
            VmJob::Pause(op, _) | VmJob::Save(op) | VmJob::Resume(op) if fails || !alive => {
                self.let_go();
                (op, Err(failed(!alive)))
            }
            VmJob::Pause(op, post_copy) => {
                self.unsaved = true;
                if self.random.one_in(2) {
                    self.put_on_wire(Event::EarlyState(self.source_end), false);
                }
                if let Some(copy) = &mut self.copies[0] {
                    copy.run = Run::Paused;
                    self.paused_memory = Some(copy.memory.clone());
                }
                (op, Ok(self.paused(post_copy)))
            }
            VmJob::Save(op) => {
                self.unsaved = false;
                self.saving_writes();
                self.put_on_wire(Event::State(self.source_end), false);
                (
                    op,
                    Ok(SourceDone::DeviceState {
                        bytes: 100,
                        sha256: Sha256([0; 32]),
                    }),
                )
            }
            VmJob::Resume(op) => {
                self.unsaved = false;
                if let Some(copy) = &mut self.copies[0] {
                    copy.run = Run::Running;
                }
                (op, Ok(SourceDone::Done))
            }
            VmJob::Erase(op) => {
                let records = &self.destination_records;
                let owned = |record: &DestinationRecord| {
                    matches!(
                        record,
                        DestinationRecord::Owned(_) | DestinationRecord::Pulling(_)
                    )
                };
                // What a liar claims is not known to be true; that it was believed only after the record is checked elsewhere.
                let honest = self.rogue.is_none();
                if honest && !records.iter().any(owned) {
                    return Err("erased before the destination owned it durably".to_owned());
                }
                let pulls = matches!(records.last(), Some(DestinationRecord::Pulling(_)));
                if honest && pulls && !self.killed {
                    return Err("erased while the destination still needed pages".to_owned());
                }
                self.copies[0] = None;
                (op, Ok(SourceDone::Done))
            }
        };
        if let Some(source) = &mut self.source {
            source.handle_done(now, op, result);
        }
        self.next_source_job();
        Ok(())
    }

    pub(super) fn pump_source(&mut self) {
        while let Some(action) = self.source.as_mut().and_then(Source::poll_action) {
            if self.tracing {
                let text = format!("{action:?}");
                self.trace
                    .push(format!("{:>9} us    source: {:.160}", self.now, text));
            }
            self.source_action(action);
        }
        if let Some(source) = &self.source {
            self.doubted |= source.phase() == SourcePhase::InDoubt;
            self.rejoined = self.rejoined.max(source.progress().rejoined);
            if let Some(at) = source.poll_timeout() {
                let at = at.as_micros().max(self.now);
                if at < self.source_timer {
                    self.source_timer = at;
                    self.after(at - self.now, Event::SourceTimer);
                }
            }
        }
    }

    pub(super) fn source_action(&mut self, action: SourceAction) {
        let life = self.source_life;
        self.check_judged(&action);
        match action {
            SourceAction::Vouch { op, challenge } => self.vouch(op, challenge),
            SourceAction::Judge {
                op,
                challenge,
                evidence,
                last,
            } => self.judge(op, challenge, &evidence, last),
            SourceAction::Connect { attempt } => self.connect(attempt),
            SourceAction::Send(message) => self.send_to_destination(message),
            SourceAction::Disconnect => {
                let end = std::mem::take(&mut self.source_end);
                if end != 0 {
                    let delay = self.delay(30);
                    self.after(delay, Event::DestinationLost(end));
                }
            }
            SourceAction::Journal(op, record) => {
                if matches!(record, SourceRecord::Committed(_)) {
                    if self.is(Mutation::CommitBeforeDurable) {
                        self.send_to_destination(Message::Commit(self.order.epoch.next()));
                    }
                    if self.is(Mutation::EraseAtCommit) {
                        self.copies[0] = None;
                    }
                }
                let delay = self.disk_delay(0);
                self.after(delay, Event::SourceJournal(life, op, record));
            }
            SourceAction::StartTracking(op) => {
                if let Some(copy) = &mut self.copies[0] {
                    copy.dirty = PageSet::empty(&self.layout);
                }
                let delay = self.delay(10);
                self.after(delay, Event::SourceDone(life, op, Ok(SourceDone::Done)));
            }
            SourceAction::OpenStreams { op, .. } => {
                // The destination sees its streams at about the same time.
                self.streams_open();
                let delay = self.delay(10);
                self.after(delay, Event::SourceDone(life, op, Ok(SourceDone::Done)));
            }
            SourceAction::Peek(op) => {
                let result = match &self.copies[0] {
                    Some(copy) => Ok(SourceDone::Collected(copy.dirty.clone())),
                    None => Err(true),
                };
                self.after(100, Event::SourceDone(life, op, result));
            }
            SourceAction::FindData(op) => {
                let mut pages = PageSet::empty(&self.layout);
                pages.insert(0, 0..PAGES);
                let result = match &self.copies[0] {
                    Some(_) => Ok(SourceDone::Collected(pages)),
                    None => Err(true),
                };
                self.after(100, Event::SourceDone(life, op, result));
            }
            SourceAction::Throttle(_) => {
                if self.random.one_in(4)
                    && let Some(source) = &mut self.source
                {
                    source.handle_throttle_failed(&Reason::new("throttle", "not here"));
                }
            }
            SourceAction::SendStale { op, pages } => {
                let stale: Vec<u64> = (0..PAGES).filter(|&page| pages.contains(0, page)).collect();
                for &page in &stale {
                    self.sent_versions[page as usize] = 0;
                }
                self.put_on_wire(Event::Stale(self.source_end, stale), false);
                self.put_on_wire(Event::Drained(self.source_end, true), false);
                self.after(100, Event::SourceDone(life, op, Ok(SourceDone::Done)));
            }
            SourceAction::SendUrgent { op, block } => {
                let mut pages = PageSet::empty(&self.layout);
                for page in block.runs().flatten().map(u64::from) {
                    pages.insert(0, page..page + 1);
                }
                let versions = self.read_pages(&pages, 0);
                self.put_on_wire(Event::Pages(self.source_end, versions, false), false);
                let delay = self.delay(5);
                self.after(delay, Event::SourceDone(life, op, Ok(SourceDone::Done)));
            }
            SourceAction::ComputePulledRoot(op) => {
                self.after(100, Event::SourceDone(life, op, Ok(SourceDone::NoRoot)));
            }
            SourceAction::CloseStreams => {}
            SourceAction::Collect { op, first } => {
                let mut pages = PageSet::empty(&self.layout);
                if let Some(copy) = &mut self.copies[0] {
                    std::mem::swap(&mut pages, &mut copy.dirty);
                    if first {
                        pages.insert(0, 0..PAGES);
                    }
                }
                let gone = self.copies[0].is_none();
                let result = if gone {
                    Err(true)
                } else {
                    Ok(SourceDone::Collected(pages))
                };
                self.after(100, Event::SourceDone(life, op, result));
            }
            SourceAction::SendPages {
                op,
                pages,
                round,
                then,
            } => {
                self.send_pages(&pages, round, then);
                let delay = self.delay(20);
                self.after(delay, Event::SourceDone(life, op, Ok(SourceDone::Done)));
            }
            SourceAction::ComputeRoot(op) => {
                let root = root(&self.sent_versions);
                self.after(100, Event::SourceDone(life, op, Ok(SourceDone::Root(root))));
            }
            SourceAction::Pause { op, post_copy } => {
                self.source_jobs.push_back(VmJob::Pause(op, post_copy));
            }
            SourceAction::SaveDeviceState(op) => self.source_jobs.push_back(VmJob::Save(op)),
            SourceAction::Resume(op) => self.source_jobs.push_back(VmJob::Resume(op)),
            SourceAction::Erase(op) => self.source_jobs.push_back(VmJob::Erase(op)),
            SourceAction::StopCopying => {}
            SourceAction::Finish(ending) => {
                if let Ending::RunningOnSource(reason, _) = &ending
                    && reason.code == "root-mismatch"
                    && self.rogue.is_none()
                    && !self.killed
                {
                    self.broken = Some("what arrived is not what was sent, and nobody lied");
                }
                self.ending = Some(ending);
                self.trust.ended_it |= self.source.as_ref().is_some_and(Source::is_refused);
                self.source = None;
            }
        }
        self.next_source_job();
    }

    pub(super) fn send_pages(&mut self, pages: &PageSet, round: u32, then: RoundMark) {
        let last = then == RoundMark::Last;
        let forgets = match self.mutation {
            // The last pages come in pieces that don't end a round.
            Some(Mutation::LastPagesNotSent) => then != RoundMark::End,
            Some(Mutation::PagesForgotten) => true,
            _ => false,
        };
        let versions = self.read_pages(pages, usize::from(forgets));
        let serving = self
            .source
            .as_ref()
            .is_some_and(Source::runs_on_destination);
        if !serving {
            for &(page, version) in &versions {
                self.sent_versions[page as usize] = version;
            }
        }
        self.put_on_wire(Event::Pages(self.source_end, versions, !serving), false);
        match then {
            RoundMark::None => {}
            RoundMark::Drained => {
                self.put_on_wire(Event::Drained(self.source_end, false), false);
            }
            RoundMark::End | RoundMark::Last => {
                self.put_on_wire(Event::RoundEnd(self.source_end, round, last), false);
            }
            RoundMark::Pushed => self.put_on_wire(Event::Pushed(self.source_end), false),
        }
    }

    /// Saving the state of devices may write guest memory.
    fn saving_writes(&mut self) {
        if !self.random.one_in(3) {
            return;
        }
        let page = self.random.below(PAGES);
        if let Some(copy) = &mut self.copies[0] {
            copy.memory[page as usize] += 1000;
            copy.dirty.insert(0, page..page + 1);
            self.paused_memory = Some(copy.memory.clone());
        }
    }

    fn read_pages(&self, pages: &PageSet, skip: usize) -> Vec<(u64, u64)> {
        let Some(copy) = &self.copies[0] else {
            return Vec::new();
        };
        (0..PAGES)
            .filter(|&page| pages.contains(0, page))
            .skip(skip)
            .map(|page| (page, copy.memory[page as usize]))
            .collect()
    }
}
