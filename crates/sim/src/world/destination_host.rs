//! The destination's agent and its container.

use super::*;

impl World {
    pub(super) fn streams_open(&mut self) {
        let now = self.time();
        if let (Some(destination), Some(op)) = (&mut self.destination, self.expecting.take()) {
            destination.handle_done(now, op, Ok(DestinationDone::Done));
        }
    }

    pub(super) fn crash_destination(&mut self) {
        if !self.destination_up {
            return;
        }
        self.crashes += 1;
        // An agent that restarts can't know whether a container that it owns and that is gone ever ran.
        self.killed |= self.container_killed;
        self.destination_up = false;
        self.destination_life += 1;
        self.offered = false;
        self.disk_free[1] = self.now;
        self.destination = None;
        self.destination_jobs.clear();
        self.loading = None;
        self.destination_busy = false;
        self.half_written();
        self.drop_connection();
        let delay = self.delay(3000);
        self.after(delay, Event::RestartDestination);
    }

    pub(super) fn restart_destination(&mut self) {
        self.destination_up = true;
        self.destination_end = 0;
        if self.is(Mutation::JournalLostOnRestart) {
            self.destination_records.clear();
        }
        match self
            .destination_records
            .last()
            .map(DestinationRecord::recovery)
        {
            Some(DestinationRecovery::Discard) if self.is(Mutation::RecoveryRunsReserved) => {
                if let Some(copy) = &mut self.copies[1] {
                    copy.run = Run::Running;
                }
            }
            Some(DestinationRecovery::Discard) => self.discard_leftover(),
            Some(DestinationRecovery::Activate(_)) if self.is(Mutation::RecoveryDiscardsOwned) => {
                self.discard_leftover();
            }
            Some(DestinationRecovery::Pull(_)) if self.is(Mutation::RecoveryForgetsMissing) => {
                if let Some(copy) = &mut self.copies[1] {
                    copy.run = Run::Running;
                    copy.waits = false;
                }
                self.destination_records.push(DestinationRecord::Activated);
            }
            Some(DestinationRecovery::Pull(_)) if self.copies[1].is_none() => {
                self.destination_records.push(DestinationRecord::Activated);
            }
            Some(DestinationRecovery::Pull(_)) => {
                let config = self.destination_config();
                let (order, layout) = (self.order.clone(), self.layout.clone());
                self.destination = Some(Destination::recover(self.time(), config, order, layout));
            }
            Some(DestinationRecovery::Activate(_)) => {
                if let Some(copy) = &mut self.copies[1] {
                    copy.run = Run::Running;
                }
                self.destination_records.push(DestinationRecord::Activated);
            }
            _ => {}
        }
    }

    /// A stale order is one of an epoch that this host knows to be over.
    fn epoch_known(&self) -> Option<Epoch> {
        let forgets = self.is(Mutation::StaleEpochAccepted);
        (self.stale_order && !forgets).then(|| self.order.epoch.next())
    }

    /// Whether the destination's agent knows that the VM never ran there: one that was restarted does not.
    pub(super) fn container_never_ran(&self) -> bool {
        !self.ran && self.destination_life == 1
    }

    pub(super) fn discard_leftover(&mut self) {
        self.copies[1] = None;
        self.destination_records
            .push(DestinationRecord::Discarded(Reason::new(
                "restart", "restart",
            )));
    }

    pub(super) fn kill_vm(&mut self, host: usize) {
        let Some(copy) = self.copies[host].take() else {
            return;
        };
        let now = self.time();
        // A container that is not owned, or never ran, may die without anybody losing anything.
        let owned = self.destination_records.iter().any(|r| {
            matches!(
                r,
                DestinationRecord::Owned(_) | DestinationRecord::Pulling(_)
            )
        });
        let may_have_run = copy.run == Run::Running || owned && !self.container_never_ran();
        self.killed |= host == 0 || may_have_run;
        self.container_killed |= host == 1;
        if host == 0
            && let Some(source) = &mut self.source
        {
            source.handle_vm_gone(now);
        }
        if host == 1
            && let Some(destination) = &mut self.destination
        {
            destination.handle_container_gone(now);
        }
    }

    pub(super) fn destination_journaled(&mut self, life: u64, op: Op, record: DestinationRecord) {
        if life != self.destination_life {
            return;
        }
        let now = self.time();
        self.writes[1] += 1;
        if let Some((write, durable)) = self.crash_at[1]
            && write == self.writes[1]
        {
            if durable {
                self.destination_records.push(record);
            }
            return self.crash_destination();
        }
        let fails = self.now < FAULTS_END && self.random.one_in(150);
        // What is reported as failed may be on the disk all the same.
        if !fails || self.random.one_in(2) {
            self.destination_records.push(record);
        }
        if let Some(destination) = &mut self.destination {
            let result = if fails {
                Err(failed(false))
            } else {
                Ok(DestinationDone::Done)
            };
            destination.handle_done(now, op, result);
        }
    }

    pub(super) fn next_destination_job(&mut self) {
        if !self.destination_busy && !self.destination_jobs.is_empty() {
            self.destination_busy = true;
            let delay = self.delay(20);
            self.after(delay, Event::DestinationVm(self.destination_life));
        }
    }

    pub(super) fn destination_job(&mut self) {
        self.destination_busy = false;
        let Some(job) = self.destination_jobs.pop_front() else {
            return;
        };
        let now = self.time();
        let fails = self.now < FAULTS_END && self.random.one_in(120);
        let alive = self.copies[1].is_some();
        let (op, result) = match job {
            ContainerJob::Terminate(op) => {
                self.copies[1] = None;
                (op, Ok(DestinationDone::Done))
            }
            ContainerJob::Reserve(op) if fails => (op, Err(failed(false))),
            ContainerJob::Reserve(op) => {
                let memory = vec![0; PAGES as usize];
                let dirty = PageSet::empty(&self.layout);
                self.copies[1] = Some(Copy {
                    run: Run::Incoming,
                    memory,
                    dirty,
                    waits: false,
                });
                self.received_versions = vec![0; PAGES as usize];
                self.received_now = PageSet::empty(&self.layout);
                self.state_arrived = false;
                self.state_sealed = false;
                let post_copy = self.wishes != PostCopyUse::No && self.post_copy_possible;
                if self.wishes == PostCopyUse::Required && !post_copy {
                    (op, Ok(DestinationDone::Blocked(Vec::new())))
                } else {
                    let evidence = self.first_evidence();
                    let done = DestinationDone::Reserved {
                        post_copy,
                        evidence,
                    };
                    (op, Ok(done))
                }
            }
            ContainerJob::Activate(op)
                if !alive && self.container_never_ran() && !self.is(Mutation::LoseWhatNeverRan) =>
            {
                (op, Ok(DestinationDone::NeverRan))
            }
            ContainerJob::Load(op) | ContainerJob::Activate(op) if fails || !alive => {
                (op, Err(failed(!alive)))
            }
            ContainerJob::Load(op) if !self.state_arrived || !self.state_sealed => {
                // It follows on the stream: look again.
                self.destination_jobs.push_front(ContainerJob::Load(op));
                return self.next_destination_job();
            }
            ContainerJob::Load(op) => {
                if let Some(copy) = &mut self.copies[1] {
                    copy.run = Run::Paused;
                }
                (op, Ok(DestinationDone::Done))
            }
            ContainerJob::Activate(op) => {
                if let Some(copy) = &mut self.copies[1] {
                    copy.run = Run::Running;
                    let paused = self.paused_memory.iter().flatten();
                    let differs = paused
                        .zip(&copy.memory)
                        .any(|(paused, here)| paused != here && !(copy.waits && *here == 0));
                    // Found by the final check as a second running copy never is: say it here.
                    self.corrupt |= !self.ran && differs;
                    self.ran = true;
                }
                (op, Ok(DestinationDone::Done))
            }
        };
        if let Some(destination) = &mut self.destination {
            destination.handle_done(now, op, result);
        }
        self.next_destination_job();
    }

    pub(super) fn pump_destination(&mut self) {
        while let Some(action) = self.destination.as_mut().and_then(Destination::poll_action) {
            if self.tracing {
                let text = format!("{action:?}");
                self.trace
                    .push(format!("{:>9} us    destination: {:.160}", self.now, text));
            }
            self.destination_action(action);
        }
        if let Some(at) = self
            .destination
            .as_ref()
            .and_then(Destination::poll_timeout)
        {
            let at = at.as_micros().max(self.now);
            if at < self.destination_timer {
                self.destination_timer = at;
                self.after(at - self.now, Event::DestinationTimer);
            }
        }
    }

    pub(super) fn destination_action(&mut self, action: DestinationAction) {
        let life = self.destination_life;
        let now = self.time();
        match action {
            DestinationAction::Send(message) => {
                if self.session_connection == self.destination_end {
                    self.send_to_source(message);
                }
            }
            DestinationAction::Attest { op, challenge } => self.attest(op, challenge),
            DestinationAction::ConsultLedger(offer) => {
                let ledger = Ledger {
                    refusals: self.refusals(&offer),
                    host: "b".to_owned(),
                    peer: "a".to_owned(),
                    unix_s: 1,
                    migration_seen: !self.destination_records.is_empty(),
                    vm_present: self.copies[1].is_some(),
                    epoch_known: self.epoch_known(),
                    ..Ledger::default()
                };
                if let Some(destination) = &mut self.destination {
                    destination.handle_ledger(now, &ledger);
                }
            }
            DestinationAction::Journal(op, record) => {
                let owned = matches!(
                    record,
                    DestinationRecord::Owned(_) | DestinationRecord::Pulling(_)
                );
                if matches!(record, DestinationRecord::Reserved(_)) && self.trust.refused {
                    self.broken = Some("an order was taken that a gate refused");
                }
                if owned
                    && self.is(Mutation::RunBeforeOwnedIsDurable)
                    && let Some(copy) = &mut self.copies[1]
                {
                    copy.run = Run::Running;
                }
                if owned && self.is(Mutation::ClaimDiscardWithoutDoing) {
                    self.send_to_source(Message::Discarded(Reason::new("x", "x")));
                }
                let delay = self.disk_delay(1);
                self.after(delay, Event::DestinationJournal(life, op, record));
            }
            DestinationAction::Reserve(op, offer) => {
                self.wishes = offer.post_copy;
                self.destination_jobs.push_back(ContainerJob::Reserve(op));
            }
            DestinationAction::ExpectStreams { op, .. } => self.expecting = Some(op),
            DestinationAction::TellReceived => {
                let mut received = self.received_now.clone();
                if self.is(Mutation::ClaimMissingReceived) {
                    received.insert(0, 0..PAGES);
                }
                if self.session_connection == self.destination_end {
                    self.send_to_source(Message::Present(Present {
                        region: 0,
                        first_page: 0,
                        bits: received.bits(0, 0, 64),
                        last: true,
                    }));
                }
            }
            DestinationAction::TellPresent => {
                let mut present = PageSet::empty(&self.layout);
                let copy = self.copies[1].iter();
                for (page, version) in copy.flat_map(|copy| (0..).zip(&copy.memory)) {
                    if *version != 0 || self.is(Mutation::ClaimMissingPagePresent) {
                        present.insert(0, page..page + 1);
                    }
                }
                self.send_to_source(Message::Present(Present {
                    region: 0,
                    first_page: 0,
                    bits: present.bits(0, 0, 64),
                    last: true,
                }));
            }
            DestinationAction::EndPulling(op) => {
                let fails = self.now < FAULTS_END && self.random.one_in(50);
                if let Some(copy) = self.copies[1].as_mut().filter(|_| !fails) {
                    copy.waits = false;
                    self.corrupt |= copy.memory.contains(&0);
                }
                let result = if fails {
                    Err(failed(false))
                } else {
                    Ok(DestinationDone::Pulled(Complete {
                        root: None,
                        fault_wait_log2_us: Vec::new(),
                    }))
                };
                if let Some(destination) = &mut self.destination {
                    destination.handle_done(now, op, result);
                }
            }
            DestinationAction::Disconnect => {
                // Not one that the source has made since, and has not asked on.
                if self.destination_end == self.session_connection && self.destination_end != 0 {
                    let end = std::mem::take(&mut self.destination_end);
                    let delay = self.delay(30);
                    self.after(delay, Event::SourceLost(end));
                }
            }
            DestinationAction::SealDeviceState(_) => self.state_sealed = true,
            DestinationAction::LoadDeviceState(op) => self.loading = Some(op),
            DestinationAction::ReleaseDeviceState { post_copy } => {
                if let Some(copy) = &mut self.copies[1] {
                    copy.waits = post_copy;
                }
                if let Some(op) = self.loading.take() {
                    self.destination_jobs.push_back(ContainerJob::Load(op));
                }
            }
            DestinationAction::ComputeRoot(op) => {
                let root = root(&self.received_versions);
                if let Some(destination) = &mut self.destination {
                    destination.handle_done(now, op, Ok(DestinationDone::Root(root)));
                }
            }
            DestinationAction::Activate(op) => {
                self.destination_jobs.push_back(ContainerJob::Activate(op));
            }
            DestinationAction::Terminate(op) => {
                self.loading = None;
                // A load that still waits for its state is given up.
                self.destination_jobs
                    .retain(|job| !matches!(job, ContainerJob::Load(_)));
                self.destination_jobs.push_back(ContainerJob::Terminate(op));
            }
            DestinationAction::Finish(ending) => {
                if let DestinationEnding::Owned = ending
                    && let Some(copy) = &mut self.copies[1]
                    && copy.run != Run::Running
                {
                    self.corrupt = true;
                }
                self.destination = None;
            }
        }
        self.next_destination_job();
    }
}
