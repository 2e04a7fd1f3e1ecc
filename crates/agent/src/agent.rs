//! What this agent is: its VMs, its migrations and its state, and what operators may ask of them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use palanquin_api::config::AgentConfig;
use palanquin_api::control::{MigrationInfo, Phase, Side, VmInfo, VmState};
use palanquin_engine::destination::DestinationEnding;
use palanquin_engine::order::Ledger;
use palanquin_engine::source::Ending;
use palanquin_engine::{Epoch, MigrationId, Order, Time, VmId};
use palanquin_host::facts;
use palanquin_host::vm::{Hypervisor, RunState, Vm};
use tracing::error;
use uuid::Uuid;

use crate::destination_session::{DestinationEvent, DestinationSession};
use crate::gate::Gatekeeper;
use crate::network::Network;
use crate::source_session::{SourceEvent, SourceSession};
use crate::store::{Store, StoreError, StoredVm};
use crate::tracked::{Session, Tracked};

/// A VM of this host.
#[derive(Clone)]
pub struct Entry {
    /// What is stored of it.
    pub stored: StoredVm,
    /// Its hypervisor, while it lives.
    pub vm: Option<Arc<dyn Vm>>,
    /// The migration that works on it.
    pub migration: Option<MigrationId>,
}

/// The agent.
pub struct Agent {
    /// Configuration.
    pub config: AgentConfig,
    /// What talks to other hosts.
    pub network: Arc<Network>,
    /// State that survives.
    pub store: Store,
    /// The hypervisor.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Who may have what done.
    pub gate: Gatekeeper,
    /// Held while memory is given or promised to somebody, so that it is not given twice.
    reserving: Mutex<()>,
    origin: Instant,
    vms: Mutex<HashMap<VmId, Entry>>,
    migrations: Mutex<HashMap<MigrationId, Arc<Tracked>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    /// With nothing known yet: see [`crate::recovery`].
    pub fn new(
        config: AgentConfig,
        network: Arc<Network>,
        store: Store,
        hypervisor: Arc<dyn Hypervisor>,
        gate: Gatekeeper,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            network,
            store,
            hypervisor,
            gate,
            reserving: Mutex::default(),
            origin: Instant::now(),
            vms: Mutex::default(),
            migrations: Mutex::default(),
        })
    }

    /// Time for the engines.
    pub fn now(&self) -> Time {
        let micros = self.origin.elapsed().as_micros();
        Time::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
    }

    /// Seconds since 1970.
    pub fn unix_s(&self) -> u64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs())
    }

    /// Directory of a VM.
    pub fn vm_dir(&self, vm: VmId) -> PathBuf {
        self.config
            .state_dir
            .join("vms")
            .join(Uuid::from_bytes(vm.0).to_string())
    }

    /// Address of another host's agent.
    pub fn address_of(&self, host: &str) -> Option<SocketAddr> {
        self.config.hosts.get(host).map(|host| host.address)
    }

    // VMs.

    /// All VMs.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries: Vec<Entry> = lock(&self.vms).values().cloned().collect();
        entries.sort_by(|a, b| a.stored.name.cmp(&b.stored.name));
        entries
    }

    /// A VM by its name.
    pub fn entry(&self, name: &str) -> Option<Entry> {
        lock(&self.vms)
            .values()
            .find(|entry| entry.stored.name == name)
            .cloned()
    }

    /// Adds or replaces a VM in memory; the caller has stored it.
    pub fn put_entry(&self, entry: Entry) {
        lock(&self.vms).insert(entry.stored.id, entry);
    }

    /// Removes a VM from memory.
    pub fn remove_entry(&self, vm: VmId) {
        lock(&self.vms).remove(&vm);
    }

    /// Claims a VM for a migration; false if it has one or is not there.
    pub fn claim(&self, vm: VmId, migration: MigrationId) -> bool {
        match lock(&self.vms).get_mut(&vm) {
            Some(entry) if entry.migration.is_none() => {
                entry.migration = Some(migration);
                true
            }
            _ => false,
        }
    }

    /// Stores a container and makes it known.
    ///
    /// # Errors
    ///
    /// The state file cannot be written.
    pub fn register_container(
        &self,
        stored: &StoredVm,
        vm: &Arc<dyn Vm>,
        migration: MigrationId,
    ) -> Result<(), StoreError> {
        self.store.put_vm(stored)?;
        let vm = Some(Arc::clone(vm));
        self.put_entry(Entry {
            stored: stored.clone(),
            vm,
            migration: Some(migration),
        });
        Ok(())
    }

    /// The right to give memory to somebody: while it lives nobody else does.
    pub fn reserving(&self) -> MutexGuard<'_, ()> {
        lock(&self.reserving)
    }

    /// Memory that may be given to the VM of this migration from that host: what is free, less what arrives already and what
    /// other hosts have been promised.
    ///
    /// # Errors
    ///
    /// This machine does not tell.
    pub fn memory_for(
        &self,
        migration: MigrationId,
        from: Option<&str>,
    ) -> Result<u64, palanquin_host::Error> {
        let free = self.memory_free(migration)?;
        Ok(free.saturating_sub(self.held_from(from)))
    }

    /// What is free, less what other migrations bring and what this host keeps for itself.
    ///
    /// # Errors
    ///
    /// This machine does not tell.
    pub(crate) fn memory_free(&self, migration: MigrationId) -> Result<u64, palanquin_host::Error> {
        let promised: u64 = lock(&self.vms)
            .values()
            .filter(|entry| entry.stored.incoming && entry.migration != Some(migration))
            .map(|entry| entry.stored.memory_bytes)
            .sum();
        let free = facts::memory_available_bytes()?;
        Ok(free
            .saturating_sub(promised)
            .saturating_sub(self.config.limits.memory_reserve.bytes()))
    }

    /// A VM as operators see it.
    pub fn vm_info(&self, entry: &Entry) -> VmInfo {
        let stored = &entry.stored;
        let held = entry
            .migration
            .and_then(|id| self.migration(id))
            .is_some_and(|tracked| {
                matches!(
                    tracked.info().phase,
                    Phase::Committing | Phase::InDoubt | Phase::Erasing
                )
            });
        let state = match &entry.vm {
            None => VmState::Stopped,
            Some(vm) if vm.wait_ended(Duration::ZERO) => VmState::Stopped,
            Some(_) if stored.incoming => VmState::Incoming,
            Some(vm) => match vm.run_state() {
                Ok(RunState::Running) => VmState::Running,
                Ok(RunState::Paused | RunState::Incoming) if held => VmState::Held,
                Ok(RunState::Paused | RunState::Incoming) => VmState::Paused,
                Ok(RunState::Ended) | Err(_) => VmState::Stopped,
            },
        };
        let console = self.vm_dir(stored.id).join("console.log");
        VmInfo {
            name: stored.name.clone(),
            uuid: Uuid::from_bytes(stored.id.0),
            epoch: stored.epoch.0,
            state,
            pid: entry.vm.as_ref().map(|vm| vm.handle().pid),
            memory_bytes: stored.memory_bytes,
            adopted: stored.adopted,
            console: console.exists().then(|| console.display().to_string()),
            migration: entry.migration.map(|id| Uuid::from_bytes(id.0)),
            passport: self.passport_info(stored.id),
        }
    }

    // Migrations.

    /// All migrations, oldest first.
    pub fn migrations(&self) -> Vec<Arc<Tracked>> {
        lock(&self.migrations).values().cloned().collect()
    }

    /// A migration.
    pub fn migration(&self, id: MigrationId) -> Option<Arc<Tracked>> {
        lock(&self.migrations).get(&id).cloned()
    }

    /// Makes a migration known.
    pub fn track(&self, id: MigrationId, tracked: &Arc<Tracked>) {
        lock(&self.migrations).insert(id, Arc::clone(tracked));
    }

    /// As [`Agent::track`], unless the migration is known already: then false.
    pub fn track_new(&self, id: MigrationId, tracked: &Arc<Tracked>) -> bool {
        let mut migrations = lock(&self.migrations);
        let is_new = !migrations.contains_key(&id);
        if is_new {
            migrations.insert(id, Arc::clone(tracked));
        }
        is_new
    }

    /// Forgets a migration that was not taken.
    pub fn untrack(&self, id: MigrationId) {
        lock(&self.migrations).remove(&id);
    }

    /// Migrations under way on one side.
    pub fn active(&self, side: Side) -> usize {
        self.migrations()
            .iter()
            .filter(|tracked| {
                let info = tracked.info();
                info.side == side && info.phase != Phase::Done
            })
            .count()
    }

    /// Keeps what people may ask about a migration later.
    pub fn keep_info(&self, info: &MigrationInfo) {
        if let Err(problem) = self.store.put_info(info) {
            error!(%problem, "the summary of a migration is lost");
        }
    }

    /// What this host knows when it judges an order from that peer.
    ///
    /// # Errors
    ///
    /// The state file cannot be read.
    pub fn ledger(&self, order: &Order, peer: &str) -> Result<Ledger, StoreError> {
        let present = lock(&self.vms)
            .values()
            .any(|entry| entry.stored.id == order.vm || entry.stored.name == order.vm_name);
        // The migration that asks is counted among the active ones.
        let max_inbound = usize::try_from(self.config.limits.max_inbound).unwrap_or(usize::MAX);
        Ok(Ledger {
            host: self.config.name.clone(),
            peer: peer.to_owned(),
            unix_s: self.unix_s(),
            migration_seen: self.store.migration_seen(order.migration)?,
            epoch_known: self.store.epoch(order.vm)?,
            vm_present: present,
            full: self.active(Side::Destination) > max_inbound,
            refusals: Vec::new(),
        })
    }

    /// A source's session has ended.
    pub fn source_ended(&self, order: &Order, ending: &Ending) {
        let mut vms = lock(&self.vms);
        match ending {
            Ending::Completed => {
                vms.remove(&order.vm);
            }
            Ending::RunningOnSource(..) | Ending::VmLost(_) => {
                let Some(entry) = vms.get_mut(&order.vm) else {
                    return;
                };
                entry.migration = None;
                if matches!(ending, Ending::VmLost(_)) {
                    entry.vm = None;
                }
                let Ok(stored) = self.store.vms() else { return };
                match stored.into_iter().find(|vm| vm.id == order.vm) {
                    Some(stored) => entry.stored = stored,
                    // It was the destination's already, and is not ours to keep.
                    None => drop(vms.remove(&order.vm)),
                }
            }
        }
    }

    /// A destination's session has ended.
    pub fn destination_ended(
        &self,
        order: &Order,
        ending: &DestinationEnding,
        vm: Option<&Arc<dyn Vm>>,
    ) {
        let mut vms = lock(&self.vms);
        match ending {
            DestinationEnding::Owned | DestinationEnding::OwnedButEnded(_) => {
                if let Some(entry) = vms.get_mut(&order.vm) {
                    entry.migration = None;
                    entry.stored.incoming = false;
                    entry.stored.epoch = order.epoch.next();
                    entry.vm = match ending {
                        DestinationEnding::Owned => vm.cloned(),
                        _ => None,
                    };
                }
            }
            DestinationEnding::Discarded(_) => {
                // Only the container of this migration: another VM of the name is not ours to forget.
                if vms
                    .get(&order.vm)
                    .is_some_and(|entry| entry.migration == Some(order.migration))
                {
                    vms.remove(&order.vm);
                }
            }
            DestinationEnding::Refused(_) => {}
        }
    }

    /// Starts the thread of a source.
    ///
    /// # Errors
    ///
    /// No thread can be had; the VM is as it was.
    pub fn run_source(
        self: &Arc<Self>,
        engine: palanquin_engine::Source,
        vm: Option<Arc<dyn Vm>>,
        params: crate::source_session::SourceParams,
        info: MigrationInfo,
    ) -> std::io::Result<Arc<Tracked>> {
        let (sender, events) = channel::<SourceEvent>();
        let id = engine.order().migration;
        let tracked = Arc::new(Tracked::new(info, Some(Session::Source(sender.clone()))));
        let session = SourceSession::new(self, engine, vm, params, &tracked, sender)?;
        self.track(id, &tracked);
        let span = tracing::info_span!("source", migration = %id);
        thread::Builder::new()
            .name("source".to_owned())
            .spawn(move || span.in_scope(|| session.run(&events)))?;
        Ok(tracked)
    }

    /// Works as the destination of a migration on the calling thread.
    pub fn run_destination(
        self: &Arc<Self>,
        session: DestinationSession,
        events: &std::sync::mpsc::Receiver<DestinationEvent>,
        id: MigrationId,
    ) {
        let span = tracing::info_span!("destination", migration = %id);
        span.in_scope(|| session.run(events));
    }

    /// Epoch under which this host has a VM, for a new one: the next after every one known.
    ///
    /// # Errors
    ///
    /// The state file cannot be read.
    pub fn next_epoch(&self, vm: VmId) -> Result<Epoch, StoreError> {
        Ok(self.store.epoch(vm)?.map_or(Epoch(1), Epoch::next))
    }
}
