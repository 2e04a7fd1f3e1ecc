//! What an agent does when it starts: it finds its VMs again, and goes on with every migration from its newest
//! record.

use std::sync::Arc;

use palanquin_api::control::{Outcome, Phase, Side};
use palanquin_engine::journal::DestinationRecovery;
use palanquin_engine::message::Reason;
use palanquin_engine::source::SourceConfig;
use palanquin_engine::{DestinationRecord, MigrationId, Order, Source, SourceRecord};
use palanquin_host::vm::RunState;
use tracing::{error, info, warn};

use crate::agent::{Agent, Entry};
use crate::source_session::{SourceParams, chain};
use crate::store::{StoreError, Unfinished};
use crate::tracked::{Tracked, info_of};

/// Brings the agent to where it was.
///
/// # Errors
///
/// The state file cannot be read or written. What concerns a single VM or migration is logged and left as it is.
pub fn recover(agent: &Arc<Agent>) -> Result<(), StoreError> {
    for mut info in agent.store.infos()? {
        let id = MigrationId(*info.id.as_bytes());
        info.phase = Phase::Done;
        agent.track(id, &Arc::new(Tracked::new(info, None)));
    }
    for stored in agent.store.vms()? {
        let dir = agent.vm_dir(stored.id);
        let vm = match agent.hypervisor.attach(&stored.handle, &dir) {
            Ok(vm) => Some(vm),
            Err(problem) => {
                warn!(
                    vm = stored.name,
                    problem = chain(&problem),
                    "its hypervisor is not there"
                );
                None
            }
        };
        agent.put_entry(Entry {
            stored,
            vm,
            migration: None,
        });
    }
    for unfinished in agent.store.unfinished()? {
        match unfinished {
            Unfinished::Source(order, record) => source(agent, order, &record),
            Unfinished::Destination(order, record) => match record.recovery() {
                DestinationRecovery::Discard => discard(agent, &order),
                DestinationRecovery::Activate(_) => activate(agent, &order),
                DestinationRecovery::Nothing => {}
            },
        }
    }
    Ok(())
}

fn source(agent: &Arc<Agent>, order: Order, record: &SourceRecord) {
    info!(migration = %order.migration, ?record, "going on as its source");
    let entry = agent
        .entries()
        .into_iter()
        .find(|entry| entry.stored.id == order.vm);
    agent.claim(order.vm, order.migration);
    let ram_bytes = entry.as_ref().map_or(0, |entry| entry.stored.memory_bytes);
    let vm = entry.and_then(|entry| entry.vm);
    let config = SourceConfig {
        order: order.clone(),
        limits: Default::default(),
        timing: agent.timing(),
        software: crate::SOFTWARE.to_owned(),
    };
    let engine = Source::recover(agent.now(), config, record);
    let params = SourceParams {
        bandwidth_bytes_per_s: None,
        compress: Default::default(),
        layout: None,
        digest_seed: 0,
        device_state_max: agent.config.limits.device_state.bytes(),
    };
    let info = info_of(&order, Side::Source, ram_bytes);
    if let Err(problem) = agent.run_source(engine, vm, params, info) {
        error!(%problem, migration = %order.migration, "no thread for it");
    }
}

/// Ends the container of a migration that was never owned, and records that it is discarded.
pub fn discard(agent: &Arc<Agent>, order: &Order) {
    info!(migration = %order.migration, "discarding: it was never committed here");
    let entry = agent
        .entries()
        .into_iter()
        .find(|entry| entry.stored.id == order.vm);
    let dir = agent.vm_dir(order.vm);
    let ended = match entry.as_ref().and_then(|entry| entry.vm.as_ref()) {
        Some(vm) => vm.terminate(),
        None => agent.hypervisor.sweep(&dir),
    };
    if let Err(problem) = ended {
        error!(
            problem = chain(&problem),
            "the container does not end; it is not resumed either"
        );
    }
    let _ = std::fs::remove_dir_all(dir);
    let reason = Reason::new(
        "agent-restarted",
        "the agent of the destination was restarted",
    );
    let record = DestinationRecord::Discarded(reason.clone());
    if let Err(problem) = agent.store.record_destination(order, &record) {
        error!(
            problem = chain(&problem),
            "the discard is not recorded; the source will ask again"
        );
        return;
    }
    agent.remove_entry(order.vm);
    done(agent, order, Outcome::RunningOnSource, Some(&reason));
}

/// Resumes a VM that this host owns and that was not resumed, or not known to be.
fn activate(agent: &Arc<Agent>, order: &Order) {
    info!(migration = %order.migration, "the VM is ours");
    let entry = agent
        .entries()
        .into_iter()
        .find(|entry| entry.stored.id == order.vm);
    let mut reason = None;
    match entry.as_ref().and_then(|entry| entry.vm.as_ref()) {
        Some(vm) => {
            let paused = vm.run_state().is_ok_and(|state| state == RunState::Paused);
            if paused
                && order.run
                && let Err(problem) = vm.resume()
            {
                error!(
                    problem = chain(&problem),
                    "the VM cannot be resumed; it stays paused here"
                );
                // Not recorded as activated: the next start tries again.
                return;
            }
        }
        None => {
            let what = "its hypervisor ended on the destination while the agent was away";
            reason = Some(Reason::new("vm-ended", what));
        }
    }
    if let Err(problem) = agent
        .store
        .record_destination(order, &DestinationRecord::Activated)
    {
        error!(problem = chain(&problem), "the activation is not recorded");
    }
    let outcome = if reason.is_some() {
        Outcome::VmEnded
    } else {
        Outcome::Completed
    };
    done(agent, order, outcome, reason.as_ref());
}

fn done(agent: &Arc<Agent>, order: &Order, outcome: Outcome, reason: Option<&Reason>) {
    let mut info = info_of(order, Side::Destination, 0);
    info.phase = Phase::Done;
    info.outcome = Some(outcome);
    info.reason = reason.map(|reason| reason.message.clone());
    agent.keep_info(&info);
    agent.track(order.migration, &Arc::new(Tracked::new(info, None)));
}
