//! Executes what concerns the container one at a time and in order.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use palanquin_engine::destination::{DestinationDone, Op};
use palanquin_engine::message::{Complete, Offer, Reason, WireBlocker};
use palanquin_engine::order::Order;
use palanquin_engine::pages::PAGE_BYTES;
use palanquin_engine::source::Failure;
use palanquin_engine::strategy::PostCopyUse;
use palanquin_host::measure::{self, Empty};
use palanquin_host::vm::{
    Descriptor, GuestRam, MissingPages, Obstacle, PrepareError, RunState, Vm,
};
use palanquin_trust::advertisement::needed_bytes;
use tracing::{debug, warn};

use super::DestinationEvent;
use crate::agent::Agent;
use crate::chain::chain;
use crate::fail_point::fail_point;
use crate::store::StoredVm;
use crate::streams_in::InStreams;

/// Longest wait for a piece of the device state: it is saved while it is loaded.
const STATE_TIMEOUT: Duration = Duration::from_secs(20);

/// Something to do with the container.
pub(super) enum ContainerJob {
    Reserve(Op, Box<Offer>),
    /// Load the device state while it arrives; what was not saved early when it is released.
    Load(Op, Arc<InStreams>, ReleaseSlot),
    /// Let nothing wait for pages any more; whether the digests of all that arrived are known.
    EndPulling(Op, MissingSlot, Option<Arc<InStreams>>, bool),
    Activate(Op),
    Terminate(Op),
}

/// Accesses to missing pages, once they wait.
pub(super) type MissingSlot = Arc<OnceLock<Arc<dyn MissingPages>>>;

/// Set before the device state is released: with a slot where the VM waits for pages which are not here.
pub(super) type ReleaseSlot = Arc<OnceLock<Option<MissingSlot>>>;

/// The thread that does it.
pub(super) struct ContainerWorker {
    jobs: Sender<ContainerJob>,
}

struct Work {
    agent: Arc<Agent>,
    order: Order,
    vm: Option<Arc<dyn Vm>>,
    /// Whether anybody may have told it to let the VM run.
    may_have_run: bool,
    events: Sender<DestinationEvent>,
}

/// What a container turned out to be.
struct Container {
    vm: Arc<dyn Vm>,
    ram: Arc<dyn GuestRam>,
    post_copy: bool,
    /// Its RAM had no data; absent where that does not matter, or could not be seen.
    empty: Option<Empty>,
}

impl ContainerWorker {
    pub(super) fn start(
        agent: &Arc<Agent>,
        order: &Order,
        vm: Option<Arc<dyn Vm>>,
        events: Sender<DestinationEvent>,
    ) -> io::Result<Self> {
        let (jobs, receiver) = channel();
        let work = Work {
            agent: Arc::clone(agent),
            order: order.clone(),
            // An agent that was restarted does not know.
            may_have_run: vm.is_some(),
            vm,
            events,
        };
        thread::Builder::new()
            .name("container".to_owned())
            .spawn(move || work.run(&receiver))?;
        Ok(Self { jobs })
    }

    pub(super) fn give(&self, job: ContainerJob) {
        // The thread lives as long as this sender does.
        let _ = self.jobs.send(job);
    }
}

/// From now on accesses to pages that are not here wait.
pub(super) fn wait_for_pages(vm: &Arc<dyn Vm>, slot: &MissingSlot) -> Result<(), Failure> {
    let missing = vm
        .miss_pages()
        .map_err(|error| failure("post-copy", &error))?;
    slot.set(missing).map_err(|_| Failure {
        reason: Reason::new("internal", "pages are waited for already"),
        vm_gone: false,
    })
}

fn failure(code: &str, error: &palanquin_host::Error) -> Failure {
    Failure {
        reason: Reason::new(code, chain(error)),
        vm_gone: error.is_process_gone(),
    }
}

/// An obstacle as it crosses the wire, cut to what the protocol allows.
pub fn wire_blocker(obstacle: &Obstacle) -> WireBlocker {
    let cut = |text: &str, len: usize| text.chars().take(len).collect();
    WireBlocker {
        code: cut(&obstacle.code, 64),
        message: cut(&obstacle.message, 500),
        remedy: cut(&obstacle.remedy, 500),
    }
}

/// Reads the description of a hypervisor and checks that it agrees with the layout on offer.
///
/// # Errors
///
/// It can't be read, or its memory is another.
pub fn descriptor_of(offer: &Offer) -> Result<Descriptor, WireBlocker> {
    let odd = |message: String| WireBlocker {
        code: "descriptor".to_owned(),
        // What cannot be read may be quoted in full.
        message: message.chars().take(500).collect(),
        remedy: "Report this: the source describes a VM that cannot exist.".to_owned(),
    };
    let descriptor: Descriptor = serde_json::from_slice(&offer.descriptor)
        .map_err(|error| odd(format!("the description of the VM cannot be read: {error}")))?;
    let sizes = descriptor.regions.iter().map(|region| region.size_bytes);
    if !sizes.eq(offer
        .region_pages
        .iter()
        .map(|pages| pages.saturating_mul(PAGE_BYTES)))
    {
        return Err(odd(
            "the description's memory is not the memory on offer".to_owned()
        ));
    }
    Ok(descriptor)
}

impl Work {
    fn run(mut self, jobs: &Receiver<ContainerJob>) {
        while let Ok(job) = jobs.recv() {
            let activates = matches!(job, ContainerJob::Activate(_));
            let event = match job {
                ContainerJob::Reserve(op, offer) => match self.reserve(&offer) {
                    Ok(Ok(container)) => DestinationEvent::Reserved {
                        op,
                        vm: container.vm,
                        ram: container.ram,
                        post_copy: container.post_copy,
                        empty: container.empty,
                    },
                    Ok(Err(blockers)) => {
                        DestinationEvent::Container(op, Ok(DestinationDone::Blocked(blockers)))
                    }
                    Err(failure) => DestinationEvent::Container(op, Err(failure)),
                },
                ContainerJob::Load(op, streams, release) => {
                    DestinationEvent::Container(op, self.load(&streams, &release))
                }
                ContainerJob::EndPulling(op, missing, streams, comparable) => {
                    let result = end_pulling(&missing, streams.as_deref(), comparable);
                    DestinationEvent::Container(op, result)
                }
                ContainerJob::Activate(op) => DestinationEvent::Container(op, self.activate()),
                ContainerJob::Terminate(op) => DestinationEvent::Container(op, self.terminate()),
            };
            let runs = activates && matches!(event, DestinationEvent::Container(_, Ok(_)));
            if self.events.send(event).is_err() {
                return;
            }
            if let (true, Some(vm)) = (runs, &self.vm) {
                // In no hurry: the VM runs, and it was told.
                vm.settle();
            }
        }
    }

    /// Starts a container, or says why there can be none.
    fn reserve(&mut self, offer: &Offer) -> Result<Result<Container, Vec<WireBlocker>>, Failure> {
        let descriptor = match descriptor_of(offer) {
            Ok(descriptor) => descriptor,
            Err(blocker) => return Ok(Err(vec![blocker])),
        };
        let dir = self.agent.vm_dir(self.order.vm);
        // Until what is taken is known to others.
        let turn = self.agent.reserving();
        let from = Some(&*self.order.source);
        let available = self.agent.memory_for(self.order.migration, from);
        let available = available.map_err(|error| failure("memory", &error))?;
        let vm = match self.agent.hypervisor.prepare(&descriptor, &dir, available) {
            Ok(vm) => vm,
            Err(PrepareError::Blocked(obstacles)) => {
                return Ok(Err(obstacles.iter().map(wire_blocker).collect()));
            }
            Err(PrepareError::Failed(error)) => return Err(failure("container", &error)),
        };
        self.vm = Some(Arc::clone(&vm));
        let ram = vm.ram().map_err(|error| failure("container", &error))?;
        // Known before it is told to anybody, so that a restarted agent finds and ends it.
        let stored = StoredVm {
            id: self.order.vm,
            name: self.order.vm_name.clone(),
            epoch: self.order.epoch,
            handle: vm.handle(),
            adopted: false,
            incoming: true,
            memory_bytes: descriptor
                .regions
                .iter()
                .map(|region| region.size_bytes)
                .sum(),
        };
        self.agent
            .register_container(&stored, &vm, self.order.migration)
            .and_then(|()| {
                let taken = needed_bytes(stored.memory_bytes);
                self.agent.store.keep_promise(&self.order.source, taken)
            })
            .map_err(|error| Failure {
                reason: Reason::new("journal", chain(&error)),
                vm_gone: false,
            })?;
        drop(turn);
        fail_point("destination-reserving");
        let mut post_copy = offer.post_copy != PostCopyUse::No;
        if post_copy {
            let obstacles = vm.post_copy_obstacles();
            let obstacles = obstacles.map_err(|error| failure("container", &error))?;
            post_copy = obstacles.is_empty();
            if !post_copy && offer.post_copy == PostCopyUse::Required {
                return Ok(Err(obstacles.iter().map(wire_blocker).collect()));
            }
        }
        vm.prepare_to_load()
            .map_err(|error| failure("container", &error))?;
        if post_copy {
            vm.prepare_to_miss()
                .map_err(|error| failure("container", &error))?;
        }
        // Also where nobody asks for evidence: pages that are zero at the source are not sent, so that what lay here
        // before would stay in the VM.
        let empty =
            measure::empty(ram.as_ref()).map_err(|error| failure("container-not-empty", &error))?;
        let shows = self.agent.gate.shows_something();
        Ok(Ok(Container {
            vm,
            ram,
            post_copy,
            empty: shows.then_some(empty),
        }))
    }

    fn vm(&self) -> Result<&Arc<dyn Vm>, Failure> {
        self.vm.as_ref().ok_or_else(|| Failure {
            reason: Reason::new("container-ended", "there is no container"),
            vm_gone: true,
        })
    }

    fn load(
        &mut self,
        streams: &InStreams,
        release: &ReleaseSlot,
    ) -> Result<DestinationDone, Failure> {
        let broke = |error| super::streams_failure(&error);
        let vm = Arc::clone(self.vm()?);
        let mut waits = None;
        let mut failed = None;
        let mut prepare = || {
            if let Some(missing) = release.get().and_then(Option::as_ref) {
                // Before the devices look into guest memory.
                wait_for_pages(&vm, missing)?;
                if let Some(missing) = missing.get() {
                    waits = Some(streams.wait(missing.as_ref()).map_err(broke)?);
                }
            }
            fail_point("destination-loading");
            Ok(())
        };
        let released = || {
            prepare().map_err(|failure: Failure| {
                let text = failure.reason.message.clone();
                failed = Some(failure);
                io::Error::other(text)
            })
        };
        let state = streams.device_state();
        let loaded = vm.load_device_state(&mut state.reader(STATE_TIMEOUT, released));
        if let Some(failed) = failed {
            return Err(failed);
        }
        loaded.map_err(|error| failure("device-state", &error))?;
        if let Some(waits) = waits {
            // Answered while the devices were loaded; before anybody hears that pages may be sent.
            waits.done().map_err(broke)?;
        }
        fail_point("destination-loaded");
        Ok(DestinationDone::Done)
    }

    fn activate(&mut self) -> Result<DestinationDone, Failure> {
        let vm = Arc::clone(self.vm()?);
        if !self.may_have_run && vm.wait_ended(Duration::ZERO) {
            return Ok(DestinationDone::NeverRan);
        }
        if self.order.run {
            // After a restart it may run already: then this does nothing.
            self.may_have_run = true;
            vm.resume().map_err(|error| failure("resume", &error))?;
        }
        debug_assert!(!matches!(vm.run_state(), Ok(RunState::Incoming)));
        Ok(DestinationDone::Done)
    }

    fn terminate(&mut self) -> Result<DestinationDone, Failure> {
        debug!("end the container");
        if let Some(vm) = self.vm.take() {
            vm.terminate()
                .map_err(|error| failure("container", &error))?;
        }
        match std::fs::remove_dir_all(self.agent.vm_dir(self.order.vm)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure {
                reason: Reason::new("container", chain(&error)),
                vm_gone: false,
            }),
            _ => Ok(DestinationDone::Done),
        }
    }
}

fn end_pulling(
    missing: &MissingSlot,
    streams: Option<&InStreams>,
    comparable: bool,
) -> Result<DestinationDone, Failure> {
    let missing = missing.get().ok_or_else(|| Failure {
        reason: Reason::new("internal", "nothing waits for pages"),
        vm_gone: false,
    })?;
    fail_point("destination-pulled");
    missing
        .finish()
        .map_err(|error| failure("post-copy", &error))?;
    // All pages are here, whether they can still be compared or not.
    let pulled = streams.and_then(|streams| {
        let pulled = streams.pulled();
        pulled
            .inspect_err(|error| warn!(%error, "the pages that were pulled are not compared"))
            .ok()
    });
    let (root, waits) = pulled.unzip();
    Ok(DestinationDone::Pulled(Complete {
        root: root.filter(|_| comparable),
        fault_wait_log2_us: waits.unwrap_or_default(),
    }))
}

#[cfg(test)]
mod tests {
    use palanquin_engine::ids::{Epoch, MigrationId, VmId};
    use palanquin_engine::message::{Message, Refused};
    use palanquin_engine::order::Order;
    use palanquin_engine::strategy::PostCopyUse;

    use super::*;

    #[test]
    fn a_description_that_cannot_be_read_is_refused_in_words_that_fit_a_message() {
        let offer = Offer {
            order: Order {
                migration: MigrationId([1; 16]),
                vm: VmId([2; 16]),
                vm_name: "web".to_owned(),
                epoch: Epoch(1),
                source: "a".to_owned(),
                destination: "b".to_owned(),
                expires_unix_s: 0,
                run: true,
            },
            descriptor: format!("{{\"arguments\":\"{}\"}}", "x".repeat(5000)).into_bytes(),
            region_pages: vec![1],
            streams: 1,
            digest_seed: 0,
            post_copy: PostCopyUse::No,
            credentials: Vec::new(),
        };
        let blockers = vec![descriptor_of(&offer).unwrap_err()];
        let refused = Message::Refused(Refused {
            by_gate: false,
            blockers,
        });
        let bytes = refused.encode().unwrap();
        assert_eq!(Message::decode(&bytes[4..]), Ok(refused));
    }
}
