//! What the agent needs of a hypervisor: a VM on this host, its RAM and the pages it writes.
//!
//! The traits are as narrow as the migration needs, so that a fake VM in tests and another
//! hypervisor later fit behind them. Implementations block; callers bring their own threads.

use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Error;

/// Unit of tracking and transfer in bytes. Huge pages are tracked and sent as several of these.
pub const PAGE_SIZE: u64 = 4096;

/// A contiguous piece of guest RAM backed by shared memory, in the hypervisor's order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Name of the RAM block, equal on both hosts (for QEMU the backend's object path or `id`).
    pub name: String,
    /// Bytes; a multiple of [`PAGE_SIZE`].
    pub size_bytes: u64,
}

/// What another process may do with guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Read it.
    Read,
    /// Read and write it.
    ReadWrite,
}

/// A part of a region where a process has it mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Address in that process.
    pub address: u64,
    /// Offset in the region.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// What it takes to see accesses to missing pages, and to place those.
#[derive(Debug)]
pub struct SharedFaults {
    /// A userfaultfd(2) of the hypervisor.
    pub uffd: OwnedFd,
    /// Process ID of the hypervisor, for messages.
    pub pid: u32,
    /// Where each region is mapped in it.
    pub windows: Vec<Vec<Window>>,
}

/// Guest RAM, seen from outside the hypervisor.
pub trait GuestRam: Send + Sync {
    /// All regions; indexes below refer to this order.
    fn regions(&self) -> &[Region];

    /// Byte ranges that hold data, page aligned and ascending; what lies between are holes, which
    /// read as zeros and must not be read (reading through a mapping would fill them).
    fn data_extents(&self, region: usize) -> Result<Vec<Range<u64>>, Error>;

    /// Reads `buffer.len()` bytes at `offset`; never fills holes. The guest may write meanwhile: such a
    /// page may be torn, and the next collection of the tracker names it again.
    fn read(&self, region: usize, offset: u64, buffer: &mut [u8]) -> Result<(), Error>;

    /// Writes at `offset`. A page that was missing holds data then, but who waits for it is not woken: use
    /// [`MissingPages::place`] there.
    fn write(&self, region: usize, offset: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Makes the range read as zeros and gives its memory back; an error if the kernel keeps a part of it (of a huge
    /// page that can't be split), which then is not missing. Not for a range that the guest writes meanwhile.
    fn discard(&self, region: usize, range: Range<u64>) -> Result<(), Error>;

    /// Descriptors of all regions for another process, see [`crate::shared::SharedRam`].
    fn share(&self, _: Sharing) -> Result<Vec<OwnedFd>, Error> {
        Err(Error::Ram("this memory cannot be shared".to_owned()))
    }
}

/// Finds the pages written since the last collection. Dropping it ends the tracking.
///
/// A page that the hypervisor gave back to the host (a balloon does that) and that was not written since the last
/// collection is not named: it reads as zeros there, and as it was before wherever it was copied to. Guests must expect
/// either (virtio, memory balloon device).
pub trait WriteTracker: Send {
    /// Calls `sink(region, pages)` for every run of pages (in units of [`PAGE_SIZE`]) written since the
    /// last call, and arms them again. The first call names every page of every region.
    fn collect(&mut self, sink: &mut dyn FnMut(usize, Range<u64>)) -> Result<(), Error>;

    /// Names the same pages as [`WriteTracker::collect`] would now, without arming them: the next collection names
    /// them again. What was written once more in the middle of a round need not be sent in it (Ma, Liu, Liu:
    /// "Improved pre-copy", 2010).
    fn peek(&mut self, sink: &mut dyn FnMut(usize, Range<u64>)) -> Result<(), Error>;
}

/// Pages of a VM that are not here yet. A virtual CPU, or the hypervisor or kernel on its behalf, that touches one
/// waits until it is placed. Usable from several threads at once.
///
/// A page is there as a whole or not at all, so that [`GuestRam::data_extents`] tells at any time which have arrived.
///
/// Dropping it ends nothing: accesses go on waiting, as they do when the agent dies, until somebody calls
/// [`Vm::miss_pages`] and serves them or [`MissingPages::finish`], or ends the VM. Two of the same VM share the
/// accesses: each is named to one of them only.
pub trait MissingPages: Send + Sync {
    /// Waits until missing pages are touched, calls `sink(region, page)` for each access (page in units of
    /// [`PAGE_SIZE`]) and returns; without any it returns when the time is up. A page may be named again, also after it
    /// was placed: by others that touched it just before, and when the guest gave it back to the host meanwhile (a
    /// balloon does that). So each name needs a call of [`MissingPages::place`] or [`MissingPages::place_zero`], also
    /// for a page that was placed before: then zeros will do, as one that is there keeps what it holds.
    fn wait_faults(&self, timeout: Duration, sink: &mut dyn FnMut(usize, u64))
    -> Result<(), Error>;

    /// Places adjacent pages from `page` on (`bytes`: a multiple of [`PAGE_SIZE`]) and wakes who waits for them. A page
    /// that holds data already keeps it. Returns how many were placed.
    fn place(&self, region: usize, page: u64, bytes: &[u8]) -> Result<u64, Error>;

    /// The same with zeros.
    fn place_zero(&self, region: usize, pages: Range<u64>) -> Result<u64, Error>;

    /// Ends it and wakes everybody: what has not been placed reads as zeros from now on. Idempotent.
    fn finish(&self) -> Result<(), Error>;

    /// For another process, see [`crate::shared::SharedMissing`]. Accesses that were named before, and still wait, are
    /// named again: to whoever asks first.
    fn share(&self) -> Result<SharedFaults, Error> {
        Err(Error::Ram("these accesses cannot be shared".to_owned()))
    }
}

/// Holds the virtual CPUs back from outside, so that the guest writes less. Dropping it lifts the limit.
pub trait Throttle: Send {
    /// Lets the virtual CPUs have this share (0.01 to 1.0) of the processor time that they could use without limit: as
    /// many processors as there are virtual CPUs, or as the host has for them where that is less. At 1.0 there is no
    /// limit. The guest stands still for up to 100 ms at a time.
    fn set(&mut self, share: f64) -> Result<(), Error>;
}

/// What the hypervisor's virtual CPUs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// They run.
    Running,
    /// They stand still; memory and devices do not change.
    Paused,
    /// An empty container that waits for device state.
    Incoming,
    /// The guest ended (shut down, crashed); the process may still be there.
    Ended,
}

/// How to find a hypervisor process again after the agent restarted. Storable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handle {
    /// Process ID.
    pub pid: u32,
    /// Start time of the process in clock ticks since boot (`/proc/PID/stat` field 22): with the boot ID it
    /// tells a reused process ID from the process we knew.
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id` when the handle was made.
    pub boot_id: String,
    /// QMP socket.
    pub qmp: PathBuf,
}

/// What one host tells another so that it can build an equal, empty container. Crosses the wire inside the
/// control channel; everything in it is hostile to the receiver until checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Kind of hypervisor: `qemu`.
    pub hypervisor: String,
    /// Its version, for example `7.2.22`.
    pub version: String,
    /// Machine type with its version, for example `pc-q35-7.2`.
    pub machine: String,
    /// Command line without the program, without what belongs to one host (monitors, sockets,
    /// `-incoming`); directories of the VM are written `@VM_DIR@`.
    pub arguments: Vec<String>,
    /// RAM, in order.
    pub regions: Vec<Region>,
    /// CPU feature words of the first virtual CPU as (name, bits), where the hypervisor tells.
    pub cpu_features: Vec<(String, u64)>,
}

/// Why a VM or host can't take part, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Obstacle {
    /// Stable code: `ram-private`, `device-vhost-user`, `device-vfio`, `memory-short`, `qemu-version`, ...
    pub code: String,
    /// What is wrong, one lowercase sentence.
    pub message: String,
    /// What to do, one sentence.
    pub remedy: String,
}

/// A VM on this host.
pub trait Vm: Send + Sync {
    /// How to find it again.
    fn handle(&self) -> Handle;

    /// Everything that keeps this VM from being migrated, all at once; empty when nothing does.
    fn obstacles(&self) -> Result<Vec<Obstacle>, Error>;

    /// What the destination needs to build a container.
    fn describe(&self) -> Result<Descriptor, Error>;

    /// Its RAM.
    fn ram(&self) -> Result<Arc<dyn GuestRam>, Error>;

    /// Starts tracking writes to its RAM.
    fn track_writes(&self) -> Result<Box<dyn WriteTracker>, Error>;

    /// From now on accesses to pages that hold no data wait until they are placed. [`GuestRam::discard`] what is stale
    /// first, and what was allocated in advance. To be called before [`Vm::load_device_state`]: devices look into
    /// guest memory when their state is loaded.
    ///
    /// It survives the agent: if that dies, accesses go on waiting and never see zeros. An agent that comes back
    /// calls this after [`Hypervisor::attach`] and gets the accesses that wait, also those that were named before. It
    /// does so before anything else that asks the hypervisor: that may wait for a page too, and answers nobody until then.
    fn miss_pages(&self) -> Result<Arc<dyn MissingPages>, Error>;

    /// Makes ready what [`Vm::miss_pages`] needs, so that the pause is shorter. Nothing waits before that; where it never comes,
    /// [`Vm::settle`] takes this back. For an incoming container; idempotent.
    fn prepare_to_miss(&self) -> Result<(), Error>;

    /// Why [`Vm::miss_pages`] would not work here, all at once; empty when it would. For a container or a VM whose
    /// pages are all here.
    fn post_copy_obstacles(&self) -> Result<Vec<Obstacle>, Error>;

    /// Prepares to hold the virtual CPUs back; nothing is limited before the first [`Throttle::set`]. What an agent
    /// that died has left is lifted by [`Hypervisor::attach`] and [`Hypervisor::adopt`]. One at a time.
    fn throttle(&self) -> Result<Box<dyn Throttle>, Error>;

    /// What it does now.
    fn run_state(&self) -> Result<RunState, Error>;

    /// Stops the virtual CPUs; when this returns, memory and devices do not change any more.
    fn pause(&self) -> Result<(), Error>;

    /// Begins to save a VM that may run, to `to`, and pauses it; when this returns, memory and devices do not change any
    /// more. What `to` gets is the beginning of what [`Vm::save_device_state`] goes on with: that part of the state for which
    /// the VM need not stand still. `limit_bytes` bounds the whole. Gives for how long the VM has been paused.
    ///
    /// Until `save_device_state` has returned, a hypervisor whose state cannot be saved any more (an error, or the agent is
    /// gone) may let a VM that ran run again by itself: it has lost nothing, and nobody else has all of it.
    fn pause_to_save(&self, limit_bytes: u64, to: &mut dyn Write) -> Result<Duration, Error>;

    /// Lets the virtual CPUs run, on a source after an abort (also after its state was saved) as on a
    /// destination after its state was loaded.
    fn resume(&self) -> Result<(), Error>;

    /// Makes ready what `save_device_state` needs, so that the pause is shorter. Idempotent.
    fn prepare_to_save(&self) -> Result<(), Error>;

    /// Pages (region, page in units of [`PAGE_SIZE`]) that devices will look into while their state is loaded, as far as the
    /// hypervisor tells within 100 ms. Only a hint, so that they need not be waited for one after the other under post-copy:
    /// it may name too few, or none.
    fn device_pages(&self) -> Vec<(usize, u64)> {
        Vec::new()
    }

    /// Writes the state of CPUs and devices of a paused VM to `to` while it is being saved; `limit_bytes` bounds it. After
    /// [`Vm::pause_to_save`] only the rest, and that limit counts. An error of `to` ends it. Once it has returned well, the
    /// VM stays paused until [`Vm::resume`].
    fn save_device_state(&self, limit_bytes: u64, to: &mut dyn Write) -> Result<(), Error>;

    /// Ends what is under way of saving, also when another agent has begun it; a VM that ran when that began may run
    /// afterwards. To be called before [`Vm::run_state`] is believed and [`Vm::resume`] is asked for. Idempotent.
    fn stop_saving(&self) -> Result<(), Error>;

    /// Makes ready what `load_device_state` needs, so that the pause is shorter. For an incoming container; idempotent.
    fn prepare_to_load(&self) -> Result<(), Error>;

    /// Loads the state into an incoming container; the VM stays paused. Before that RAM must be complete, or
    /// what is not must be missing and served ([`Vm::miss_pages`]) while this runs. The state is read to its end while it
    /// arrives; an error of `from` means that it is not to be used, and ends it. The hypervisor may have taken all of it
    /// by then: the container is of no use any more.
    fn load_device_state(&self, from: &mut dyn Read) -> Result<(), Error>;

    /// Takes back what `prepare_to_save` and `prepare_to_load` changed in a hypervisor that goes on running. Idempotent;
    /// what cannot be taken back is harmless.
    fn settle(&self);

    /// Ends the hypervisor and waits for it, by force where it does not answer. Idempotent.
    fn terminate(&self) -> Result<(), Error>;

    /// Ends the hypervisor by force and at once, also while another thread waits for an answer of it; that gets an error.
    /// For a container that has never run: nothing is flushed.
    fn kill(&self);

    /// Waits until the process has ended or the time is up; true if it has ended.
    fn wait_ended(&self, timeout: Duration) -> bool;
}

/// A VM to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Name, as the hypervisor shows it.
    pub name: String,
    /// Identity.
    pub uuid: String,
    /// Bytes of each memory backend; several make as many NUMA nodes.
    pub memory_bytes: Vec<u64>,
    /// Virtual CPUs.
    pub cpus: u16,
    /// How guest code runs.
    pub accel: Accel,
    /// Machine type.
    pub machine: String,
    /// CPU model; the hypervisor's default where absent.
    pub cpu: Option<String>,
    /// Kernel to boot directly.
    pub kernel: Option<String>,
    /// Its initial RAM disk.
    pub initrd: Option<String>,
    /// Its command line.
    pub append: Option<String>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Network interfaces.
    pub networks: Vec<Network>,
    /// Whether the first serial port goes to a file in the VM's directory.
    pub console: bool,
}

/// How guest code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// KVM where it opens, else TCG.
    Auto,
    /// Linux's KVM.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// A disk of a [`Machine`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Path of the image.
    pub path: String,
    /// `raw` or `qcow2`.
    pub format: String,
    /// `virtio` or `ide`.
    pub interface: String,
    /// Writes are lost at the end.
    pub ephemeral: bool,
}

/// A network interface of a [`Machine`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Tap device.
    pub tap: String,
    /// Hardware address.
    pub mac: String,
}

/// Why a container can't be had.
#[derive(Debug)]
pub enum PrepareError {
    /// For these reasons, all of them.
    Blocked(Vec<Obstacle>),
    /// Something failed.
    Failed(Error),
}

impl From<Error> for PrepareError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// A hypervisor of this machine.
pub trait Hypervisor: Send + Sync {
    /// Starts a VM; it runs when this returns. `vm_dir` is made, and becomes the VM's alone.
    fn spawn(&self, machine: &Machine, vm_dir: &Path) -> Result<Arc<dyn Vm>, Error>;

    /// Takes over a hypervisor that somebody else started.
    fn adopt(&self, pid: u32, qmp: &Path, vm_dir: &Path) -> Result<Arc<dyn Vm>, Error>;

    /// Finds a hypervisor again; an error for which [`Error::is_process_gone`] holds if it has ended.
    fn attach(&self, handle: &Handle, vm_dir: &Path) -> Result<Arc<dyn Vm>, Error>;

    /// Starts an empty container for a VM that another host describes: its RAM is proven zero.
    fn prepare(
        &self,
        descriptor: &Descriptor,
        vm_dir: &Path,
        available_bytes: u64,
    ) -> Result<Arc<dyn Vm>, PrepareError>;

    /// What would stand in the way of [`Hypervisor::prepare`], without starting anything.
    fn check(&self, descriptor: &Descriptor, available_bytes: u64) -> Vec<Obstacle>;

    /// Ends whatever hypervisor was started in this directory and is not known by a handle: one that was started
    /// just before the agent died.
    fn sweep(&self, vm_dir: &Path) -> Result<(), Error>;

    /// What hypervisors that are started from now on may do and should not, one sentence each.
    fn unconfined(&self) -> Vec<String> {
        Vec::new()
    }

    /// Version of the hypervisor.
    fn version(&self) -> Result<String, Error>;
}
