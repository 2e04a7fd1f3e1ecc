//! Executes what concerns the VM one at a time and in order, because a pause must never overtake a resume.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use palanquin_engine::message::Reason;
use palanquin_engine::pages::{PageSet, RamLayout};
use palanquin_engine::source::{Failure, Op, SourceDone};
use palanquin_host::vm::{RunState, Vm};
use tracing::debug;

use super::{SourceEvent, chain, failure, missing};
use crate::fail_point::fail_point;
use crate::streams_out::DeviceStateOut;

/// Something to do with the VM.
pub(super) enum VmJob {
    /// Pause it, and save what can be saved before that to the first stream. With the layout of its RAM: tell what devices
    /// look into.
    Pause(Op, DeviceStateOut, Option<RamLayout>),
    /// Save the rest to it.
    Save(Op),
    Resume(Op),
    Erase(Op),
}

/// The thread that does it.
pub(super) struct VmWorker {
    jobs: Sender<VmJob>,
}

struct Work {
    vm: Option<Arc<dyn Vm>>,
    dir: PathBuf,
    state_limit: u64,
    run: bool,
    /// Where the device state goes, once the VM is paused.
    out: Option<DeviceStateOut>,
    events: Sender<SourceEvent>,
}

impl VmWorker {
    pub(super) fn start(
        vm: Option<Arc<dyn Vm>>,
        dir: PathBuf,
        state_limit: u64,
        run: bool,
        events: Sender<SourceEvent>,
    ) -> io::Result<Self> {
        let (jobs, receiver) = channel();
        let work = Work {
            vm,
            dir,
            state_limit,
            run,
            out: None,
            events,
        };
        thread::Builder::new()
            .name("vm-work".to_owned())
            .spawn(move || work.run(&receiver))?;
        Ok(Self { jobs })
    }

    pub(super) fn give(&self, job: VmJob) {
        // The thread lives as long as this sender does.
        let _ = self.jobs.send(job);
    }
}

impl Work {
    fn run(mut self, jobs: &Receiver<VmJob>) {
        while let Ok(job) = jobs.recv() {
            let event = match job {
                VmJob::Pause(op, out, look) => SourceEvent::Vm(op, self.pause(out, look)),
                VmJob::Save(op) => SourceEvent::Vm(op, self.save()),
                VmJob::Resume(op) => SourceEvent::Vm(op, self.resume()),
                VmJob::Erase(op) => SourceEvent::Vm(op, self.erase()),
            };
            if self.events.send(event).is_err() {
                return;
            }
        }
    }

    fn vm(&self) -> Result<&Arc<dyn Vm>, Failure> {
        self.vm.as_ref().ok_or_else(|| Failure {
            reason: Reason::new("vm-ended", "the VM's hypervisor ended on the source"),
            vm_gone: true,
        })
    }

    fn pause(
        &mut self,
        mut out: DeviceStateOut,
        look: Option<RamLayout>,
    ) -> Result<SourceDone, Failure> {
        let vm = self.vm()?;
        let looked_into = look.map(|layout| looked_into(vm.as_ref(), &layout));
        let since = vm
            .pause_to_save(self.state_limit, &mut Early(&mut out))
            .map_err(|error| failure("pause", &error))?;
        out.paused();
        debug!(?since, "paused");
        fail_point("source-paused");
        self.out = Some(out);
        Ok(SourceDone::Paused { since, looked_into })
    }

    fn save(&mut self) -> Result<SourceDone, Failure> {
        debug!("save the rest of the device state");
        fail_point("source-saving");
        let mut out = self.out.take().ok_or_else(|| missing("device state"))?;
        self.vm()?
            .save_device_state(self.state_limit, &mut out)
            .map_err(|error| failure("device-state", &error))?;
        let (bytes, sha256) = out.finish();
        Ok(SourceDone::DeviceState { bytes, sha256 })
    }

    fn resume(&self) -> Result<SourceDone, Failure> {
        let vm = self.vm()?;
        vm.stop_saving()
            .map_err(|error| failure("resume", &error))?;
        let state = vm.run_state().map_err(|error| failure("resume", &error))?;
        debug!(?state, run = self.run, "resume");
        match state {
            RunState::Paused if self.run => {
                vm.resume().map_err(|error| failure("resume", &error))?;
            }
            RunState::Ended => {
                return Err(Failure {
                    reason: Reason::new("vm-ended", "the guest ended on the source"),
                    vm_gone: true,
                });
            }
            RunState::Running | RunState::Paused | RunState::Incoming => {}
        }
        vm.settle();
        Ok(SourceDone::Done)
    }

    fn erase(&self) -> Result<SourceDone, Failure> {
        if let Some(vm) = &self.vm {
            vm.terminate().map_err(|error| failure("erase", &error))?;
        }
        fail_point("source-erasing");
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure {
                reason: Reason::new("erase", chain(&error)),
                vm_gone: false,
            }),
            _ => Ok(SourceDone::Done),
        }
    }
}

/// What devices look into, as far as the hypervisor tells.
fn looked_into(vm: &dyn Vm, layout: &RamLayout) -> PageSet {
    let mut pages = PageSet::empty(layout);
    for (region, page) in vm.device_pages() {
        if region < layout.regions() && page < layout.pages(region) {
            pages.insert(region, page..page + 1);
        }
    }
    pages
}

/// The device state while the VM may still run.
struct Early<'a>(&'a mut DeviceStateOut);

impl io::Write for Early<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        fail_point("source-pausing");
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
