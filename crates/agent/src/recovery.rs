//! What an agent does when it starts: it finds its VMs again, and goes on with every migration from its newest
//! record.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use palanquin_api::control::{Outcome, Phase, Side};
use palanquin_engine::ids::{Challenge32, StreamSecret};
use palanquin_engine::journal::DestinationRecovery;
use palanquin_engine::message::Reason;
use palanquin_engine::pages::PAGE_BYTES;
use palanquin_engine::source::SourceConfig;
use palanquin_engine::{
    Destination, DestinationRecord, MigrationId, Order, RamLayout, Source, SourceRecord,
};
use palanquin_host::vm::{RunState, Vm};
use tracing::{error, info, warn};

use crate::agent::{Agent, Entry};
use crate::chain::chain;
use crate::challenge;
use crate::destination_session::DestinationSession;
use crate::listener::destination_config;
use crate::operations::default_streams;
use crate::source_session::SourceParams;
use crate::store::{StoreError, Unfinished};
use crate::tracked::{Session, Tracked, info_of};

/// How soon is tried again what does not work because a hypervisor does not answer.
const AGAIN: Duration = Duration::from_secs(2);

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
            Unfinished::Source(order, record) => source(agent, &order, &record),
            Unfinished::Destination(order, record) => match record.recovery() {
                DestinationRecovery::Discard => discard(agent, &order),
                DestinationRecovery::Activate(_) => activate(agent, &order),
                DestinationRecovery::Pull(_) => pull(agent, &order),
                DestinationRecovery::Nothing => {}
            },
        }
    }
    Ok(())
}

fn entry_of(agent: &Agent, order: &Order) -> Option<Entry> {
    let mut entries = agent.entries().into_iter();
    entries.find(|entry| entry.stored.id == order.vm)
}

/// A VM that a migration is about, with the layout of its RAM; none if its hypervisor has ended.
type Found = Option<(Arc<dyn Vm>, RamLayout)>;

/// Looks for the VM, anew where its hypervisor was not found a moment ago. An error says that it is not known whether
/// it lives: then nothing may be concluded.
fn find(agent: &Agent, order: &Order) -> Result<Found, Reason> {
    let Some(entry) = entry_of(agent, order) else {
        return Ok(None);
    };
    let vm = match entry.vm.clone() {
        Some(vm) => vm,
        None => {
            let dir = agent.vm_dir(order.vm);
            match agent.hypervisor.attach(&entry.stored.handle, &dir) {
                Ok(vm) => {
                    agent.put_entry(Entry {
                        vm: Some(Arc::clone(&vm)),
                        ..entry
                    });
                    vm
                }
                Err(problem) if problem.is_process_gone() => return Ok(None),
                Err(problem) => return Err(Reason::new("vm-unknown", chain(&problem))),
            }
        }
    };
    if vm.wait_ended(Duration::ZERO) {
        return Ok(None);
    }
    let layout = layout_of(&vm);
    let layout = layout.ok_or_else(|| Reason::new("memory", "its memory is not found"))?;
    Ok(Some((vm, layout)))
}

/// Tries until it succeeds: at once, then in a thread, because others do not wait for this VM.
fn persist(
    agent: &Arc<Agent>,
    order: &Order,
    work: impl Fn(&Arc<Agent>, &Order) -> Result<(), Reason> + Send + 'static,
) {
    let Err(reason) = work(agent, order) else {
        return;
    };
    error!(%reason, migration = %order.migration, "its VM cannot be looked after yet; trying on");
    let (agent, order) = (Arc::clone(agent), order.clone());
    let again = move || {
        let (_open, never) = channel::<()>();
        loop {
            let _ = never.recv_timeout(AGAIN);
            match work(&agent, &order) {
                Ok(()) => return,
                Err(reason) => warn!(%reason, migration = %order.migration, "not yet"),
            }
        }
    };
    if let Err(problem) = thread::Builder::new()
        .name("recover".to_owned())
        .spawn(again)
    {
        error!(%problem, "the VM stands still until the agent is started again");
    }
}

fn source(agent: &Arc<Agent>, order: &Order, record: &SourceRecord) {
    info!(migration = %order.migration, ?record, "going on as its source");
    agent.claim(order.vm, order.migration);
    if matches!(record, SourceRecord::Committed(_)) {
        // The VM may run on the destination and need pages: they are not given up for a hypervisor that is only busy.
        let record = record.clone();
        persist(agent, order, move |agent, order| {
            let (vm, layout) = find(agent, order)?.unzip();
            source_session(agent, order, &record, vm, layout);
            Ok(())
        });
    } else {
        let vm = entry_of(agent, order).and_then(|entry| entry.vm);
        source_session(agent, order, record, vm, None);
    }
}

fn source_session(
    agent: &Arc<Agent>,
    order: &Order,
    record: &SourceRecord,
    vm: Option<Arc<dyn Vm>>,
    layout: Option<RamLayout>,
) {
    let ram_bytes = entry_of(agent, order).map_or(0, |entry| entry.stored.memory_bytes);
    let challenges = challenge::fresh().and_then(|first| Ok((first, challenge::fresh()?)));
    let (challenge, last_challenge) = match challenges {
        Ok(challenges) => challenges,
        Err(problem) => {
            return error!(%problem, migration = %order.migration, "nothing is done about it");
        }
    };
    let config = SourceConfig {
        order: order.clone(),
        strategy: Default::default(),
        layout: layout.clone(),
        limits: Default::default(),
        timing: agent.timing(),
        software: crate::SOFTWARE.to_owned(),
        challenge,
        last_challenge,
    };
    let engine = Source::recover(agent.now(), config, record);
    let params = SourceParams {
        bandwidth_bytes_per_s: None,
        compress: Default::default(),
        layout,
        digest_seed: 0,
        device_state_max: agent.config.limits.device_state.bytes(),
        clearance: None,
    };
    let info = info_of(order, Side::Source, ram_bytes);
    if let Err(problem) = agent.run_source(engine, vm, params, info) {
        error!(%problem, migration = %order.migration, "no thread for it");
    }
}

/// Layout of a VM's RAM, where its hypervisor tells.
pub fn layout_of(vm: &Arc<dyn Vm>) -> Option<RamLayout> {
    let ram = vm.ram().ok()?;
    let regions = ram.regions().iter();
    RamLayout::new(
        regions
            .map(|region| region.size_bytes / PAGE_BYTES)
            .collect(),
    )
    .ok()
}

/// Goes on with a VM that this host owns and that needs pages which are still on the source.
fn pull(agent: &Arc<Agent>, order: &Order) {
    info!(migration = %order.migration, "the VM is ours and needs pages of the source");
    agent.claim(order.vm, order.migration);
    persist(agent, order, |agent, order| match find(agent, order)? {
        Some((vm, layout)) => recovered_session(agent, order, &vm, &layout),
        None => {
            // Its hypervisor ended; there is nothing to pull for.
            activate(agent, order);
            Ok(())
        }
    });
}

fn recovered_session(
    agent: &Arc<Agent>,
    order: &Order,
    vm: &Arc<dyn Vm>,
    layout: &RamLayout,
) -> Result<(), Reason> {
    let internal = |what: &str| Reason::new("internal", what);
    // Neither is used any more: the source greets the listener, and is told fresh ones.
    let mut config = destination_config(agent, StreamSecret([0; 32]), Challenge32([0; 32]));
    // How many there were is not recorded, and more threads than processors only hold each other up.
    config.streams_max = default_streams();
    let engine = Destination::recover(agent.now(), config, order.clone(), layout.clone());
    let info = info_of(order, Side::Destination, layout.total_bytes());
    let (sender, events) = channel();
    let session = Some(Session::Destination(sender.clone()));
    let tracked = Arc::new(Tracked::new(info, session));
    let session =
        DestinationSession::recovered(agent, engine, order, vm, layout, &tracked, sender)?;
    agent.track(order.migration, &tracked);
    let (agent, migration) = (Arc::clone(agent), order.migration);
    let work = move || agent.run_destination(session, &events, migration);
    thread::Builder::new()
        .name("destination".to_owned())
        .spawn(work)
        .map(drop)
        .map_err(|error| internal(&error.to_string()))
}

/// Ends the container of a migration that was never owned, and records that it is discarded.
pub fn discard(agent: &Arc<Agent>, order: &Order) {
    info!(migration = %order.migration, "discarding: it was never committed here");
    let superseded = match agent.store.superseded(order.migration) {
        Ok(superseded) => superseded,
        Err(problem) => {
            let problem = chain(&problem);
            error!(problem, "it is not known whose container is here");
            return;
        }
    };
    // With a newer migration of the same VM, that is the one whose container, or VM, is here.
    if !superseded {
        end_container(agent, order);
    }
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
    if !superseded {
        agent.remove_entry(order.vm);
    }
    done(agent, order, Outcome::RunningOnSource, Some(&reason));
}

fn end_container(agent: &Agent, order: &Order) {
    let entry = entry_of(agent, order);
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
}

/// Resumes a VM that this host owns and that was not resumed, or not known to be.
fn activate(agent: &Arc<Agent>, order: &Order) {
    info!(migration = %order.migration, "the VM is ours");
    // A hypervisor that is only busy is no hypervisor that has ended: the VM would stay paused for ever.
    persist(agent, order, |agent, order| {
        if let Some((vm, _)) = find(agent, order)? {
            let failed = |problem| Reason::new("resume", chain(&problem));
            if order.run && vm.run_state().map_err(failed)? == RunState::Paused {
                vm.resume().map_err(failed)?;
            }
            activated(agent, order, None);
        } else {
            let what = "its hypervisor ended on the destination while the agent was away";
            activated(agent, order, Some(&Reason::new("vm-ended", what)));
        }
        Ok(())
    });
}

fn activated(agent: &Arc<Agent>, order: &Order, ended: Option<&Reason>) {
    let record = DestinationRecord::Activated;
    if let Err(problem) = agent.store.record_destination(order, &record) {
        error!(problem = chain(&problem), "the activation is not recorded");
    }
    let outcome = match ended {
        Some(_) => Outcome::VmEnded,
        None => Outcome::Completed,
    };
    done(agent, order, outcome, ended);
}

fn done(agent: &Arc<Agent>, order: &Order, outcome: Outcome, reason: Option<&Reason>) {
    let mut info = info_of(order, Side::Destination, 0);
    info.phase = Phase::Done;
    info.outcome = Some(outcome);
    info.reason = reason.map(|reason| reason.message.clone());
    agent.keep_info(&info);
    agent.track(order.migration, &Arc::new(Tracked::new(info, None)));
}
