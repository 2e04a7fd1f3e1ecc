//! What operators may ask of the agent. Everything here blocks.

mod doctor;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use aws_lc_rs::rand;
use palanquin_api::control::{
    AbortAnswer, AbortOutcome, Allow, ApiError, Blocker, ErrorKind, HostInfo, MigrationInfo,
    OperatorAssertion, Outcome, Phase, ResolveMigration, Side, StartMigration, Strategy, VmInfo,
};
use palanquin_api::vm_spec::{Accel, VmSpec};
use palanquin_engine::convergence::Limits;
use palanquin_engine::message::{Offer, Reason, Verdict};
use palanquin_engine::order::is_name;
use palanquin_engine::pages::{PAGE_BYTES, RamLayout};
use palanquin_engine::source::{AbortDisposition, SourceConfig};
use palanquin_engine::strategy::{Allowed, PostCopyUse};
use palanquin_engine::time::Timing;
use palanquin_engine::{MigrationId, Order, Source, VmId};
use palanquin_host::facts;
use palanquin_host::vm::{Disk, Machine, Network, Obstacle, RunState, Vm};
use palanquin_trust::Action;
use uuid::Uuid;

use crate::agent::{Agent, Entry};
use crate::chain::chain;
use crate::challenge;
use crate::fail_point::fail_point;
use crate::gate::{Adoption, Caller, Ending, Leaving, Subject, Turn};
use crate::source_session::{SourceEvent, SourceParams};
use crate::store::StoredVm;
use crate::tracked::{Session, info_of};

/// Data streams where none are asked for: one for each CPU that this agent may use, within these bounds. More than four
/// outrun any link that a host has, and take CPUs from its VMs.
const STREAMS_DEFAULT: std::ops::RangeInclusive<usize> = 2..=4;
/// Seconds for which an order is good: hosts' clocks may differ by some of them.
const ORDER_LIFE_S: u64 = 300;
/// Longest wait for an abort's outcome.
const ABORT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for the destination's answer once it is too late to abort.
const TOO_LATE_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) type Answer<T> = Result<T, ApiError>;

/// An error for operators.
pub fn error(kind: ErrorKind, message: impl Into<String>, hint: Option<&str>) -> ApiError {
    ApiError {
        kind,
        message: message.into(),
        causes: Vec::new(),
        hint: hint.map(str::to_owned),
        blockers: Vec::new(),
    }
}

pub(crate) fn internal(message: &str, cause: &dyn std::error::Error) -> ApiError {
    ApiError {
        causes: vec![chain(cause)],
        ..error(ErrorKind::Internal, message, None)
    }
}

fn blocker(side: Side, obstacle: Obstacle) -> Blocker {
    let Obstacle {
        code,
        message,
        remedy,
    } = obstacle;
    Blocker {
        side,
        gate: None,
        code,
        message,
        remedy,
    }
}

fn new_uuid() -> Answer<Uuid> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes)
        .map_err(|_| error(ErrorKind::Internal, "this host has no randomness", None))?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

impl Agent {
    /// Deadlines of the engines under this configuration.
    pub fn timing(&self) -> Timing {
        let silence = self.config.limits.peer_silence.get();
        let redial = self.config.limits.redial.get();
        Timing {
            silence,
            redial,
            // Either side may take so long to notice.
            rejoin: if redial.is_zero() {
                redial
            } else {
                redial + 2 * silence
            },
            copying: self.config.limits.copying.get(),
            ..Timing::default()
        }
    }

    /// This host.
    ///
    /// # Errors
    ///
    /// This machine does not tell its memory.
    pub fn host_info(&self) -> Answer<HostInfo> {
        let problem = |e: palanquin_host::Error| internal("this machine can't be looked at", &e);
        Ok(HostInfo {
            name: self.config.name.clone(),
            spiffe_id: self.network.identity().to_string(),
            version: crate::SOFTWARE.to_owned(),
            qemu_version: self.hypervisor.version().ok(),
            kernel: facts::kernel_release(),
            memory_total_bytes: facts::memory_total_bytes().map_err(problem)?,
            memory_available_bytes: self
                .memory_for(MigrationId([0; 16]), None)
                .map_err(|e| internal("this machine can't be looked at", &e))?,
            peers: self.config.hosts.keys().cloned().collect(),
            network_pid: self.network.pid(),
            unconfined: self.unconfined(),
            trust: self.gate.info(),
        })
    }

    pub(crate) fn named(&self, name: &str) -> Answer<Entry> {
        self.entry(name).ok_or_else(|| {
            let hint = "`palanquin vm ls` lists the VMs of this host";
            error(
                ErrorKind::NotFound,
                format!("there is no VM {name:?} on this host"),
                Some(hint),
            )
        })
    }

    /// A VM by its name.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn show_vm(&self, name: &str) -> Answer<VmInfo> {
        self.named(name).map(|entry| self.vm_info(&entry))
    }

    fn free_name(&self, name: &str) -> Answer<()> {
        if !is_name(name) {
            let hint = "1 to 64 letters, digits, `.`, `_` or `-`, starting with a letter or digit";
            return Err(error(
                ErrorKind::Usage,
                format!("{name:?} is no name for a VM"),
                Some(hint),
            ));
        }
        match self.entry(name) {
            None => Ok(()),
            Some(_) => {
                let hint = "`palanquin vm stop` removes it, or choose another name";
                Err(error(
                    ErrorKind::Usage,
                    format!("there is a VM {name:?} already"),
                    Some(hint),
                ))
            }
        }
    }

    /// Starts a VM.
    ///
    /// # Errors
    ///
    /// The specification makes no sense, its name is taken, a gate refuses, or QEMU does not start.
    pub fn run_vm(
        self: &Arc<Self>,
        spec: &VmSpec,
        passport: Option<&[u8]>,
        caller: Caller,
    ) -> Answer<VmInfo> {
        self.free_name(&spec.name)?;
        let violations = spec.validate();
        if !violations.is_empty() {
            let mut error = error(ErrorKind::Usage, "the specification is not usable", None);
            error.causes = violations.iter().map(ToString::to_string).collect();
            return Err(error);
        }
        let adoption = self.clear_adoption(caller, &spec.name, passport)?;
        let uuid = self.new_vm(spec.uuid, &adoption)?;
        let id = VmId(*uuid.as_bytes());
        let machine = machine_of(spec, uuid);
        let dir = self.vm_dir(id);
        let _turn = self.spare_promises(spec.memory.total_bytes())?;
        let vm = self.hypervisor.spawn(&machine, &dir).map_err(|problem| {
            let mut error = internal("the VM does not start", &problem);
            error.kind = ErrorKind::Blocked;
            error
        })?;
        let taken = self
            .adopted(&adoption)
            .and_then(|()| self.adopt_entry(&vm, id, &spec.name, false, spec.memory.total_bytes()));
        taken.inspect_err(|_| {
            if let Err(problem) = vm.terminate() {
                let problem = chain(&problem);
                tracing::error!(problem, "a VM that is not recorded does not end");
            }
        })
    }

    /// Identity of a VM that begins here: that of its passport, that of its specification, or a new one.
    fn new_vm(&self, specified: Option<Uuid>, adoption: &Adoption) -> Answer<Uuid> {
        let uuid = match (specified, adoption.vm()) {
            (Some(specified), Some(passport)) if specified != passport => {
                return Err(error(
                    ErrorKind::Usage,
                    format!(
                        "the passport is of VM {passport}, the specification of VM {specified}"
                    ),
                    Some("leave `uuid` out of the specification, or give the passport of this VM"),
                ));
            }
            (Some(uuid), _) | (None, Some(uuid)) => uuid,
            (None, None) => new_uuid()?,
        };
        let id = VmId(*uuid.as_bytes());
        if self.entries().iter().any(|entry| entry.stored.id == id) {
            return Err(error(
                ErrorKind::Usage,
                format!("there is a VM {uuid} already"),
                None,
            ));
        }
        Ok(uuid)
    }

    /// Takes over a running QEMU.
    ///
    /// # Errors
    ///
    /// It can't be reached, its name or identity is taken, or a gate refuses.
    pub fn adopt_vm(
        self: &Arc<Self>,
        name: &str,
        pid: u32,
        qmp: &Path,
        passport: Option<&[u8]>,
        caller: Caller,
    ) -> Answer<VmInfo> {
        self.free_name(name)?;
        let adoption = self.clear_adoption(caller, name, passport)?;
        let uuid = self.new_vm(None, &adoption)?;
        let id = VmId(*uuid.as_bytes());
        let vm = self.hypervisor.adopt(pid, qmp, &self.vm_dir(id)).map_err(|problem| {
            let mut error = internal("that QEMU can't be adopted", &problem);
            error.kind = ErrorKind::Blocked;
            error.hint = Some(
                "the socket must be a QMP socket of that process which nobody else is connected to".to_owned(),
            );
            error
        })?;
        // Adopted VMs that can't be moved are still worth watching.
        let regions = vm
            .ram()
            .map(|ram| ram.regions().iter().map(|r| r.size_bytes).sum());
        self.adopted(&adoption)?;
        self.adopt_entry(&vm, id, name, true, regions.unwrap_or(0))
    }

    fn adopt_entry(
        &self,
        vm: &Arc<dyn Vm>,
        id: VmId,
        name: &str,
        adopted: bool,
        memory_bytes: u64,
    ) -> Answer<VmInfo> {
        let stored = self.next_epoch(id).and_then(|epoch| {
            let stored = StoredVm {
                id,
                name: name.to_owned(),
                epoch,
                handle: vm.handle(),
                adopted,
                incoming: false,
                memory_bytes,
            };
            self.store.put_vm(&stored).map(|()| stored)
        });
        let stored = match stored {
            Ok(stored) => stored,
            Err(problem) => return Err(internal("the VM can't be recorded", &problem)),
        };
        let entry = Entry {
            stored,
            vm: Some(Arc::clone(vm)),
            migration: None,
        };
        let info = self.vm_info(&entry);
        self.put_entry(entry);
        Ok(info)
    }

    /// Ends a VM and removes what is left of it.
    ///
    /// # Errors
    ///
    /// There is none of that name, a migration works on it, a gate refuses, or it does not end.
    pub fn stop_vm(&self, name: &str, caller: Caller) -> Answer<VmInfo> {
        let mut entry = self.named(name)?;
        self.clear_erasure(caller, Uuid::from_bytes(entry.stored.id.0), name)?;
        let pulling = entry.migration.and_then(|id| self.migration(id));
        let pulling = pulling.filter(|tracked| {
            let info = tracked.info();
            info.side == Side::Destination && info.phase == Phase::PostCopy
        });
        if let (Some(tracked), Some(vm)) = (pulling, &entry.vm) {
            // It runs here and nowhere else; if its missing pages are lost, this is the only way out. The migration
            // ends with it.
            vm.terminate()
                .map_err(|problem| internal("the VM does not end", &problem))?;
            tracked.wait_done(ABORT_TIMEOUT);
            entry = self.named(name)?;
        }
        if entry.migration.is_some() || entry.stored.incoming {
            let hint = "`palanquin migration ls` shows it; abort it first";
            return Err(error(
                ErrorKind::Usage,
                "a migration works on this VM",
                Some(hint),
            ));
        }
        let mut info = self.vm_info(&entry);
        if let Some(vm) = &entry.vm {
            vm.terminate()
                .map_err(|problem| internal("the VM does not end", &problem))?;
        }
        self.store
            .remove_vm(entry.stored.id)
            .map_err(|problem| internal("the VM's end can't be recorded", &problem))?;
        self.remove_entry(entry.stored.id);
        let _ = std::fs::remove_dir_all(self.vm_dir(entry.stored.id));
        info.state = palanquin_api::control::VmState::Stopped;
        info.pid = None;
        Ok(info)
    }

    /// Starts a migration.
    ///
    /// # Errors
    ///
    /// The request makes no sense, a gate refuses, or something on this host stands in its way.
    pub fn start_migration(
        self: &Arc<Self>,
        request: &StartMigration,
        caller: Caller,
    ) -> Answer<MigrationInfo> {
        check_request(request)?;
        let entry = self.named(&request.vm)?;
        if !self.config.hosts.contains_key(&request.to) {
            let hint = "list it under `[hosts]` in the agent's configuration";
            let message = format!("host {:?} is not known here", request.to);
            return Err(error(ErrorKind::NotFound, message, Some(hint)));
        }
        if request.to == self.config.name {
            return Err(error(
                ErrorKind::Usage,
                "the VM is on that host already",
                None,
            ));
        }
        let uuid = Uuid::from_bytes(entry.stored.id.0);
        let what = format!("moving VM {:?} to {}", request.vm, request.to);
        let operator = self.operator_of(caller, Action::MigrateOut, Some(uuid), &what)?;
        let asked_by = operator
            .as_ref()
            .map_or_else(|| caller.local_user(), ToString::to_string);
        let (vm, offer, layout) = self.offer_of(&entry, &request.to, request.streams)?;
        // While it is held nobody else begins; asking QEMU may take long.
        let turn = self.outbound_turn(&asked_by, &request.to, uuid, &what)?;
        let order = offer.order.clone();
        let fresh = || challenge::fresh().map_err(|e| internal("the migration can't be begun", &e));
        let (challenge, last_challenge) = (fresh()?, fresh()?);
        let clearance = self.clear_out(operator.as_ref(), &order, request, false)?;
        self.note_departure(&order, layout.total_bytes())?;
        if !self.claim(order.vm, order.migration) {
            let hint = "`palanquin migration ls` shows it";
            return Err(error(
                ErrorKind::Usage,
                "a migration works on this VM already",
                Some(hint),
            ));
        }
        let limits = limits_of(request);
        let config = SourceConfig {
            order: order.clone(),
            strategy: strategy_of(request.strategy)?,
            layout: Some(layout.clone()),
            limits,
            timing: self.timing(),
            software: crate::SOFTWARE.to_owned(),
            challenge,
            last_challenge,
        };
        let params = SourceParams {
            bandwidth_bytes_per_s: request.bandwidth_bytes_per_s,
            compress: request.compress,
            layout: Some(layout.clone()),
            digest_seed: offer.digest_seed,
            device_state_max: self.config.limits.device_state.bytes(),
            clearance,
        };
        let mut info = info_of(&order, Side::Source, layout.total_bytes());
        info.strategy = request.strategy;
        info.operator = Some(asked_by);
        info.gate_decisions = self.decisions_on(order.migration);
        let engine = Source::new(self.now(), config, offer);
        match self.run_source(engine, Some(vm), params, info) {
            Ok(tracked) => {
                turn.begun();
                Ok(tracked.info())
            }
            Err(problem) => {
                self.put_entry(Entry {
                    migration: None,
                    ..entry
                });
                Err(internal("no thread for the migration", &problem))
            }
        }
    }

    /// The right to begin a migration, as far as quotas go.
    fn outbound_turn(&self, asked_by: &str, to: &str, vm: Uuid, what: &str) -> Answer<Turn<'_>> {
        let leaving = || {
            let mut leaving = Leaving::default();
            for info in self.migrations().iter().map(|tracked| tracked.info()) {
                if info.side == Side::Source && info.phase != Phase::Done {
                    leaving.all += 1;
                    leaving.of_operator += usize::from(info.operator.as_deref() == Some(asked_by));
                    leaving.to_target += usize::from(info.to == to);
                }
            }
            leaving
        };
        self.gate
            .quotas
            .turn(asked_by, to, leaving)
            .map_err(|reasons| {
                let subject = Subject {
                    action: Action::MigrateOut,
                    operator: asked_by,
                    vm: Some(vm),
                    migration: None,
                };
                self.refused_here(&subject, &reasons.into(), what)
            })
    }

    /// What would be offered for a VM: fails with every blocker of this side.
    fn offer_of(
        &self,
        entry: &Entry,
        to: &str,
        streams: Option<u16>,
    ) -> Answer<(Arc<dyn Vm>, Offer, RamLayout)> {
        let stored = &entry.stored;
        let gone = || {
            let hint = "`palanquin vm show` tells its state";
            error(
                ErrorKind::Blocked,
                format!("VM {:?} does not run here", stored.name),
                Some(hint),
            )
        };
        let vm = entry
            .vm
            .clone()
            .filter(|_| !stored.incoming)
            .ok_or_else(gone)?;
        let looked = vm
            .obstacles()
            .map_err(|problem| internal("the VM can't be looked at", &problem))?;
        if !looked.is_empty() {
            return Err(ApiError {
                blockers: looked
                    .into_iter()
                    .map(|found| blocker(Side::Source, found))
                    .collect(),
                ..error(
                    ErrorKind::Blocked,
                    format!("VM {:?} can't be migrated", stored.name),
                    None,
                )
            });
        }
        let problem = |e: palanquin_host::Error| internal("the VM can't be described", &e);
        let descriptor = vm.describe().map_err(problem)?;
        let run = vm
            .run_state()
            .map_err(|e| internal("the VM can't be described", &e))?
            == RunState::Running;
        let region_pages: Vec<u64> = descriptor
            .regions
            .iter()
            .map(|region| region.size_bytes / PAGE_BYTES)
            .collect();
        let layout = RamLayout::new(region_pages.clone())
            .map_err(|problem| internal("the VM can't be described", &problem))?;
        let mut seed = [0; 8];
        rand::fill(&mut seed)
            .map_err(|_| error(ErrorKind::Internal, "this host has no randomness", None))?;
        let order = Order {
            migration: MigrationId(*new_uuid()?.as_bytes()),
            vm: stored.id,
            vm_name: stored.name.clone(),
            epoch: stored.epoch,
            source: self.config.name.clone(),
            destination: to.to_owned(),
            expires_unix_s: self.unix_s() + ORDER_LIFE_S,
            run,
        };
        let descriptor = serde_json::to_vec(&descriptor)
            .map_err(|problem| internal("the VM can't be described", &problem))?;
        let offer = Offer {
            order,
            descriptor,
            region_pages,
            streams: streams.unwrap_or_else(default_streams),
            digest_seed: u64::from_le_bytes(seed),
            // Set by the strategy.
            post_copy: PostCopyUse::No,
            // Made when the destination has said to what it has to be bound.
            credentials: Vec::new(),
        };
        Ok((vm, offer, layout))
    }

    /// A migration by its identity.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn tracked(&self, id: Uuid) -> Answer<Arc<crate::tracked::Tracked>> {
        self.migration(MigrationId(*id.as_bytes())).ok_or_else(|| {
            let hint = "`palanquin migration ls` lists them";
            error(
                ErrorKind::NotFound,
                format!("there is no migration {id} here"),
                Some(hint),
            )
        })
    }

    /// Ends a migration, if that is still possible.
    ///
    /// # Errors
    ///
    /// There is none, a gate refuses, it has ended with the VM lost, or its session does not answer.
    pub fn abort_migration(&self, id: Uuid, caller: Caller) -> Answer<AbortAnswer> {
        let tracked = self.tracked(id)?;
        self.clear_ending(caller, &tracked.info(), Ending::Abort)?;
        let reason = Reason::new("operator", "aborted by the operator");
        let disposition = match tracked.session() {
            None => None,
            Some(Session::Source(sender)) => {
                let (reply, answer) = channel();
                let _ = sender.send(SourceEvent::Abort(reason, reply));
                fail_point("abort-asked");
                answer.recv_timeout(ABORT_TIMEOUT).ok()
            }
            Some(Session::Destination(sender)) => {
                let (reply, answer) = channel();
                let _ = sender.send(crate::destination_session::DestinationEvent::Abort(
                    reason, reply,
                ));
                fail_point("abort-asked");
                let aborting = answer.recv_timeout(ABORT_TIMEOUT).ok();
                aborting.map(|yes| {
                    if yes {
                        AbortDisposition::Aborting
                    } else {
                        AbortDisposition::TooLate
                    }
                })
            }
        };
        let timeout = match disposition {
            Some(AbortDisposition::TooLate) => TOO_LATE_TIMEOUT,
            _ => ABORT_TIMEOUT,
        };
        let info = tracked.wait_done(timeout);
        let (outcome, hint) = match (info.phase, info.outcome) {
            (Phase::Done, Some(Outcome::Completed)) | (Phase::PostCopy, _) => {
                (AbortOutcome::TooLateCommitted, None)
            }
            (Phase::Done, Some(Outcome::RunningOnSource)) => (AbortOutcome::RunningOnSource, None),
            (Phase::Done, _) => {
                let message = info.reason.unwrap_or_else(|| "the VM ended".to_owned());
                return Err(error(ErrorKind::Internal, message, None));
            }
            _ => (
                AbortOutcome::InDoubt,
                Some(format!(
                    "the destination has not answered; `palanquin migration watch {id}`"
                )),
            ),
        };
        Ok(AbortAnswer { outcome, hint })
    }

    /// Helps a migration in doubt to its end.
    ///
    /// # Errors
    ///
    /// There is none, it is not in doubt, or a gate refuses what is asserted.
    pub fn resolve_migration(
        &self,
        id: Uuid,
        request: &ResolveMigration,
        caller: Caller,
    ) -> Answer<MigrationInfo> {
        let tracked = self.tracked(id)?;
        let Some(Session::Source(sender)) = tracked.session() else {
            return Ok(tracked.info());
        };
        let info = tracked.info();
        if info.phase != Phase::InDoubt {
            let hint = "`palanquin migration watch` shows how it goes on";
            return Err(error(
                ErrorKind::Usage,
                "this migration is not in doubt",
                Some(hint),
            ));
        }
        if let Some(assertion) = request.assert {
            let how = match assertion {
                OperatorAssertion::DestinationLostIt => Ending::TakeBack,
                OperatorAssertion::DestinationRunsIt => Ending::GiveUp,
            };
            self.clear_ending(caller, &info, how)?;
        }
        let event = match request.assert {
            None => SourceEvent::Redial,
            Some(OperatorAssertion::DestinationLostIt) => SourceEvent::Assert(Verdict::Discarded),
            Some(OperatorAssertion::DestinationRunsIt) => {
                SourceEvent::Assert(Verdict::Owned(palanquin_engine::Epoch(info.epoch)))
            }
        };
        let _ = sender.send(event);
        Ok(tracked.wait_done(Duration::from_secs(20)))
    }
}

fn check_request(request: &StartMigration) -> Answer<()> {
    if !request.allow.is_empty() && request.strategy != Strategy::Auto {
        let hint = "leave one of both out";
        return Err(error(
            ErrorKind::Usage,
            "what is allowed concerns strategy `auto` only",
            Some(hint),
        ));
    }
    if request
        .streams
        .is_some_and(|streams| !(1..=16).contains(&streams))
    {
        return Err(error(
            ErrorKind::Usage,
            "a migration has 1 to 16 streams",
            None,
        ));
    }
    if request
        .bandwidth_bytes_per_s
        .is_some_and(|rate| rate < 100_000)
    {
        return Err(error(
            ErrorKind::Usage,
            "a migration needs at least 100 kB/s",
            None,
        ));
    }
    if request.deadline_ms == Some(0) {
        return Err(error(
            ErrorKind::Usage,
            "a deadline of nothing can't be met",
            None,
        ));
    }
    Ok(())
}

/// How many data streams a migration has if nobody says.
pub fn default_streams() -> u16 {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let streams = cpus.clamp(*STREAMS_DEFAULT.start(), *STREAMS_DEFAULT.end());
    u16::try_from(streams).unwrap_or(2)
}

fn strategy_of(strategy: Strategy) -> Answer<palanquin_engine::strategy::Strategy> {
    use palanquin_engine::strategy::Strategy as Engine;
    Ok(match strategy {
        Strategy::Auto => Engine::Auto,
        Strategy::StopAndCopy => Engine::StopAndCopy,
        Strategy::PreCopy => Engine::PreCopy,
        Strategy::Improved => Engine::Improved,
        Strategy::PostCopy => Engine::PostCopy,
        Strategy::Hybrid => Engine::Hybrid,
        _ => {
            return Err(error(
                ErrorKind::Usage,
                "this agent does not know the strategy",
                None,
            ));
        }
    })
}

fn limits_of(request: &StartMigration) -> Limits {
    let default = Limits::default();
    let given = |ms: Option<u64>, default| ms.map_or(default, Duration::from_millis);
    Limits {
        max_downtime: given(request.max_downtime_ms, default.max_downtime),
        deadline: given(request.deadline_ms, default.deadline),
        allowed: Allowed {
            throttle: request.allow.contains(&Allow::Throttle),
            post_copy: request.allow.contains(&Allow::PostCopy),
        },
        ..default
    }
}

fn machine_of(spec: &VmSpec, uuid: Uuid) -> Machine {
    Machine {
        name: spec.name.clone(),
        uuid: uuid.to_string(),
        memory_bytes: spec
            .memory
            .sizes()
            .iter()
            .map(|size| size.bytes())
            .collect(),
        cpus: spec.cpus,
        accel: match spec.accel {
            Accel::Auto => palanquin_host::vm::Accel::Auto,
            Accel::Kvm => palanquin_host::vm::Accel::Kvm,
            Accel::Tcg => palanquin_host::vm::Accel::Tcg,
        },
        machine: spec.machine.clone(),
        cpu: spec.cpu.clone(),
        kernel: spec.kernel.clone(),
        initrd: spec.initrd.clone(),
        append: spec.append.clone(),
        disks: spec
            .disks
            .iter()
            .map(|disk| Disk {
                path: disk.path.clone(),
                format: disk.format.clone(),
                interface: disk.interface.clone(),
                ephemeral: disk.ephemeral,
            })
            .collect(),
        networks: spec
            .networks
            .iter()
            .map(|network| Network {
                tap: network.tap.clone(),
                mac: network.mac.clone(),
            })
            .collect(),
        console: spec.console,
    }
}
