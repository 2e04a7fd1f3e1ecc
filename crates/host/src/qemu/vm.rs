//! A VM that is a QEMU process.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::Value;

use super::command_line::portable;
use super::missing::QemuMissing;
use super::obstacle;
use super::qmp::Monitor;
use super::ram::QemuRam;
use super::record;
use super::state::{self, Saving};
use super::storage::direct_disks;
use super::tracker::QemuTracker;
use super::{rings, roms};
use crate::Error;
use crate::process::{Process, boot_id};
use crate::throttle::CgroupThrottle;
use crate::vm::{
    Descriptor, GuestRam, Handle, MissingPages, Obstacle, RunState, Throttle, Vm, WriteTracker,
};

/// Longest wait for the process to end after it was killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for QEMU to end when it was asked to.
const QUIT_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for QEMU to finish its migration before it can resume.
const FINALIZE_TIMEOUT: Duration = Duration::from_secs(5);
/// Where Linux tells which huge pages it gives out.
const HUGE_PAGES_DIR: &str = "/sys/kernel/mm/transparent_hugepage";
/// How long we look for what devices look into. The VM runs meanwhile.
const RINGS_PATIENCE: Duration = Duration::from_millis(100);
const CPU_WORDS_MAX: usize = 256;
const CPUS_MAX: usize = 4096;

pub(crate) struct QemuVm {
    pub(crate) process: Arc<Process>,
    pub(crate) monitor: Monitor,
    dir: PathBuf,
    ram: Mutex<Option<Arc<QemuRam>>>,
    /// Where a container waits for its state.
    incoming: Mutex<Option<UnixStream>>,
    /// Where a source will save to, once that is prepared.
    outgoing: Mutex<Option<UnixStream>>,
    /// What of the state is saved already.
    saving: Mutex<Option<Saving>>,
    /// Pages may be missed soon, and are not yet.
    ready_to_miss: AtomicBool,
}

impl QemuVm {
    pub(crate) fn new(process: Process, qmp: &Path, dir: &Path) -> Self {
        let monitor = Monitor::new(qmp);
        Self {
            process: Arc::new(process),
            monitor,
            dir: dir.to_owned(),
            ram: Mutex::new(None),
            incoming: Mutex::new(None),
            outgoing: Mutex::new(None),
            saving: Mutex::new(None),
            ready_to_miss: AtomicBool::new(false),
        }
    }

    /// Runs a command; what fails because the process has ended says so.
    fn run<C: qapi::Command>(&self, command: &C) -> Result<Value, Error> {
        self.or_gone(self.monitor.execute_value(command))
    }

    fn or_gone<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        match result {
            Err(Error::Qmp { .. } | Error::Io { .. })
                if self.process.has_ended(Duration::from_millis(100)) =>
            {
                Err(Error::ProcessGone {
                    pid: self.process.pid(),
                })
            }
            other => other,
        }
    }

    pub(crate) fn qemu_ram(&self) -> Result<Arc<QemuRam>, Error> {
        let mut ram = self.ram.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ram) = &*ram {
            return Ok(Arc::clone(ram));
        }
        let noted = record::read(&self.dir, &self.process);
        let found = noted.map_or_else(|| QemuRam::find(&self.process, &self.monitor), Ok);
        let found = Arc::new(self.or_gone(found)?);
        *ram = Some(Arc::clone(&found));
        Ok(found)
    }

    fn saving(&self) -> MutexGuard<'_, Option<Saving>> {
        self.saving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_outgoing(&self) -> Result<UnixStream, Error> {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        match outgoing.take() {
            Some(stream) => Ok(stream),
            None => self.or_gone(state::connection(&self.monitor)),
        }
    }

    fn shared_ram(&self, ram: &QemuRam) -> Result<Vec<Obstacle>, Error> {
        let others = ram.shared_with(self.process.pid())?;
        let others = others.into_iter().map(|other| {
            obstacle(
                "ram-shared",
                format!("process {other} has the VM's memory mapped too and can write it unseen"),
                "Remove the device that it serves, or end it.",
            )
        });
        Ok(others.collect())
    }

    fn ram_obstacles(&self, ram: &Arc<QemuRam>) -> Result<Vec<Obstacle>, Error> {
        let mut obstacles = self.shared_ram(ram)?;
        for (name, bytes) in self.or_gone(ram.large_others(&self.monitor))? {
            obstacles.push(obstacle(
                "ram-private",
                format!(
                    "the {} MiB of {name:?} are private to QEMU",
                    bytes >> 20
                ),
                "Give the VM all its memory with `memory-backend-memfd,share=on`; make video memory smaller.",
            ));
        }
        // The proof that tracking works is to track.
        match QemuTracker::start(&self.process, Arc::clone(ram)) {
            Ok(_) => Ok(obstacles),
            Err(error @ Error::ProcessGone { .. }) => Err(error),
            Err(error) => {
                obstacles.push(obstacle(
                    "tracking",
                    format!("writes to the VM's memory cannot be followed: {}", chain(&error)),
                    "Linux 6.7 or newer is needed, and an agent with CAP_SYS_PTRACE that no other tracer forestalls.",
                ));
                Ok(obstacles)
            }
        }
    }

    fn status(&self) -> Result<String, Error> {
        let answer = self.run(&qmp::query_status {})?;
        let status = answer["status"].as_str();
        status.map(str::to_owned).ok_or_else(|| Error::Answer {
            command: "query-status",
            problem: "no status".to_owned(),
        })
    }

    fn is_finishing(&self) -> Result<bool, Error> {
        let status = self.run(&qmp::query_status {})?;
        let migration = self.run(&qmp::query_migrate {})?;
        // `cont` may have been refused a moment before the migration was finished.
        let settled = matches!(status["status"].as_str(), Some("postmigrate" | "paused"));
        let active = matches!(
            migration["status"].as_str(),
            Some("setup" | "active" | "device" | "cancelling" | "completed" | "cancelled")
        );
        Ok(!settled || active)
    }

    fn arguments(&self) -> Result<Vec<String>, Error> {
        let pid = self.process.pid();
        let bytes =
            fs::read(format!("/proc/{pid}/cmdline")).map_err(|_| Error::ProcessGone { pid })?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(text
            .split_terminator('\0')
            .skip(1)
            .map(str::to_owned)
            .collect())
    }

    fn machine_type(&self) -> Result<String, Error> {
        let get = qmp::qom_get {
            path: "/machine".to_owned(),
            property: "type".to_owned(),
        };
        let value = self.run(&get)?;
        let name = value.as_str().unwrap_or_default();
        Ok(name.strip_suffix("-machine").unwrap_or(name).to_owned())
    }

    /// Feature words of the first virtual CPU, which is like the others.
    pub(crate) fn cpu_features(&self) -> Result<Vec<(String, u64)>, Error> {
        let cpus = self.run(&qmp::query_cpus_fast {})?;
        let Some(path) = cpus[0]["qom-path"].as_str() else {
            return Ok(Vec::new());
        };
        let get = qmp::qom_get {
            path: path.to_owned(),
            property: "feature-words".to_owned(),
        };
        let words = match self.run(&get) {
            Ok(words) => words,
            // Not an x86 CPU.
            Err(Error::Refused { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let words = words.as_array().into_iter().flatten().take(CPU_WORDS_MAX);
        Ok(words
            .map(|word| {
                let name = format!(
                    "cpuid {:#x}/{}.{}",
                    word["cpuid-input-eax"].as_u64().unwrap_or(0),
                    word["cpuid-input-ecx"].as_u64().unwrap_or(0),
                    word["cpuid-register"].as_str().unwrap_or("?"),
                );
                (name, word["features"].as_u64().unwrap_or(0))
            })
            .collect())
    }

    pub(crate) fn version(&self) -> Result<String, Error> {
        let version = self.run(&qmp::query_version {})?;
        let number = |part: &str| version["qemu"][part].as_u64().unwrap_or(0);
        Ok(format!(
            "{}.{}.{}",
            number("major"),
            number("minor"),
            number("micro")
        ))
    }
}

fn private_ram(message: String) -> Obstacle {
    obstacle(
        "ram-private",
        message,
        "Start the VM with `-object memory-backend-memfd,id=ram,size=SIZE,share=on -machine ...,memory-backend=ram`.",
    )
}

/// Where the kernel gives out huge pages for shared memory by itself, a page that arrives brings its neighbours in as
/// zeros: they would not be missed, and the guest would read zeros (Documentation/admin-guide/mm/transhuge.rst, "Hugepages
/// in tmpfs/shmem"). With `advise` only accesses through QEMU's mapping do, and those wait.
///
/// Each size has a setting of its own beside the common one, which counts where it says `inherit`.
fn shmem_huge_pages(dir: &Path) -> Option<Obstacle> {
    let sizes = fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = sizes.map(|entry| entry.path()).filter(|path| path.is_dir());
    sizes.chain([dir.to_owned()]).find_map(|dir| {
        let setting = dir.join("shmem_enabled");
        let text = fs::read_to_string(&setting).ok()?;
        let gives_out = ["[always]", "[within_size]", "[force]"];
        gives_out.iter().any(|word| text.contains(word)).then(|| {
            obstacle(
                "post-copy-huge-pages",
                format!(
                    "the kernel gives out huge pages for shared memory ({}: {})",
                    setting.display(),
                    text.trim()
                ),
                "Write `advise` or `never` to that file.",
            )
        })
    })
}

fn huge_pages(region: &str) -> Obstacle {
    obstacle(
        "post-copy-huge-pages",
        Error::HugePages(region.to_owned()).to_string(),
        "Choose a strategy without post-copy, or start the VM with memory that has no huge pages.",
    )
}

/// Devices that write guest RAM past QEMU, so that their writes can't be followed.
fn device_obstacles(arguments: &[String]) -> Vec<Obstacle> {
    // Names and texts may contain anything.
    const OPTIONS: [&str; 6] = ["-device", "-netdev", "-net", "-nic", "-object", "-blockdev"];
    let values = arguments.windows(2).filter_map(|pair| {
        let option = pair[0]
            .strip_prefix('-')
            .filter(|rest| rest.starts_with('-'));
        OPTIONS
            .contains(&option.unwrap_or(&pair[0]))
            .then_some(&pair[1])
    });
    let found = |what: &str| values.clone().find(|value| value.contains(what));
    let mut obstacles = Vec::new();
    for (what, code) in [
        ("vhost-user", "device-vhost-user"),
        ("vfio", "device-vfio"),
        ("ivshmem", "device-ivshmem"),
        ("vhost-vdpa", "device-vhost-vdpa"),
        ("vhost-scsi", "device-vhost-scsi"),
        // Commands go to the disk as they are, and it writes the answers into guest memory.
        ("scsi-block", "device-scsi-passthrough"),
        ("scsi-generic", "device-scsi-passthrough"),
    ] {
        if let Some(argument) = found(what) {
            obstacles.push(obstacle(
                code,
                format!("{argument:?}: another process or device writes the guest's memory"),
                "Unplug the device, or move the VM switched off.",
            ));
        }
    }
    obstacles
}

impl Vm for QemuVm {
    fn handle(&self) -> Handle {
        Handle {
            pid: self.process.pid(),
            start_ticks: self.process.start_ticks(),
            // Without it the handle finds nothing after a restart, which is the safe side.
            boot_id: boot_id().unwrap_or_default(),
            qmp: self.monitor.path().to_owned(),
        }
    }

    fn obstacles(&self) -> Result<Vec<Obstacle>, Error> {
        let mut obstacles = device_obstacles(&self.arguments()?);
        match self.qemu_ram() {
            Ok(ram) => obstacles.extend(self.ram_obstacles(&ram)?),
            Err(Error::Ram(message)) => obstacles.push(private_ram(message)),
            Err(error) => return Err(error),
        }
        let nodes = self.run(&qmp::query_named_block_nodes { flat: Some(true) })?;
        obstacles.extend(direct_disks(&nodes));
        let migration = self.run(&qmp::query_migrate {})?;
        for reason in migration["blocked-reasons"]
            .as_array()
            .into_iter()
            .flatten()
        {
            obstacles.push(obstacle(
                "qemu-blocked",
                format!(
                    "QEMU cannot migrate it: {}",
                    reason.as_str().unwrap_or("no reason given")
                ),
                "Remove the device that QEMU names.",
            ));
        }
        if matches!(
            migration["status"].as_str(),
            Some("setup" | "active" | "device" | "pre-switchover")
        ) {
            obstacles.push(obstacle(
                "migration-active",
                "a migration of QEMU's own is under way".to_owned(),
                "Wait for it to end, or cancel it.",
            ));
        }
        if self.status()? == "suspended" {
            obstacles.push(obstacle(
                "vm-suspended",
                "the guest sleeps".to_owned(),
                "Wake it, and try again.",
            ));
        }
        if self.run_state()? == RunState::Ended {
            obstacles.push(obstacle(
                "vm-ended",
                "the guest has shut down or crashed".to_owned(),
                "Stop the VM and start it again.",
            ));
        }
        Ok(obstacles)
    }

    fn describe(&self) -> Result<Descriptor, Error> {
        let machine = self.machine_type()?;
        Ok(Descriptor {
            hypervisor: "qemu".to_owned(),
            version: self.version()?,
            arguments: portable(&self.arguments()?, &self.dir, &machine),
            machine,
            regions: self.qemu_ram()?.regions().to_vec(),
            cpu_features: self.cpu_features()?,
        })
    }

    fn ram(&self) -> Result<Arc<dyn GuestRam>, Error> {
        Ok(self.qemu_ram()?)
    }

    fn track_writes(&self) -> Result<Box<dyn WriteTracker>, Error> {
        let ram = self.qemu_ram()?;
        let tracker = QemuTracker::start(&self.process, ram);
        Ok(Box::new(self.or_gone(tracker)?))
    }

    fn prepare_to_miss(&self) -> Result<(), Error> {
        let ram = self.qemu_ram()?;
        let prepared = QemuMissing::prepare(&self.process, &self.monitor, &ram, &self.dir);
        self.or_gone(prepared)?;
        self.ready_to_miss.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn miss_pages(&self) -> Result<Arc<dyn MissingPages>, Error> {
        let ram = self.qemu_ram()?;
        self.ready_to_miss.store(false, Ordering::Relaxed);
        let started = QemuMissing::start(&self.process, &self.monitor, &ram, &self.dir);
        Ok(Arc::new(self.or_gone(started)?))
    }

    fn post_copy_obstacles(&self) -> Result<Vec<Obstacle>, Error> {
        let mut obstacles = device_obstacles(&self.arguments()?);
        let ram = match self.qemu_ram() {
            Ok(ram) => ram,
            Err(Error::Ram(message)) => {
                obstacles.push(private_ram(message));
                return Ok(obstacles);
            }
            Err(error) => return Err(error),
        };
        obstacles.extend(self.shared_ram(&ram)?);
        let huge: Vec<Obstacle> = ram.huge_regions().map(huge_pages).collect();
        if !huge.is_empty() {
            obstacles.extend(huge);
            return Ok(obstacles);
        }
        obstacles.extend(shmem_huge_pages(Path::new(HUGE_PAGES_DIR)));
        // The proof that it works is to do it.
        match self.or_gone(QemuMissing::probe(&self.process, &self.monitor, &ram)) {
            Ok(()) => {}
            Err(error @ Error::ProcessGone { .. }) => return Err(error),
            Err(error @ Error::FaultPrivilege(_)) => obstacles.push(obstacle(
                "post-copy-privilege",
                chain(&error),
                "Let the agent open /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1.",
            )),
            Err(error) => obstacles.push(obstacle(
                "post-copy",
                format!("accesses to missing pages cannot be caught: {}", chain(&error)),
                "Linux 6.7 or newer is needed, and an agent with CAP_SYS_PTRACE that no other tracer forestalls.",
            )),
        }
        Ok(obstacles)
    }

    fn throttle(&self) -> Result<Box<dyn Throttle>, Error> {
        let cpus = self.run(&qmp::query_cpus_fast {})?;
        let threads = cpus.as_array().into_iter().flatten().take(CPUS_MAX);
        let threads: BTreeSet<u32> = threads
            .filter_map(|cpu| u32::try_from(cpu["thread-id"].as_u64()?).ok())
            .collect();
        let threads = threads.into_iter().collect();
        Ok(Box::new(CgroupThrottle::new(&self.process, threads)?))
    }

    fn run_state(&self) -> Result<RunState, Error> {
        Ok(match self.status()?.as_str() {
            // A sleeping guest runs on when it is woken.
            "running" | "suspended" => RunState::Running,
            "inmigrate" => RunState::Incoming,
            "shutdown" | "guest-panicked" | "internal-error" => RunState::Ended,
            _ => RunState::Paused,
        })
    }

    fn pause(&self) -> Result<(), Error> {
        let stopped = self.or_gone(self.monitor.execute_for(&qmp::stop {}, "STOP"))?;
        if stopped {
            // Asking would make the pause longer.
            return Ok(());
        }
        // It was paused before. Or it sleeps: then it was not stopped, and would go on when it is woken.
        match self.status()?.as_str() {
            status @ ("running" | "suspended" | "inmigrate") => Err(Error::Answer {
                command: "stop",
                problem: format!("the VM is {status} afterwards"),
            }),
            _ => Ok(()),
        }
    }

    fn pause_to_save(&self, limit_bytes: u64, to: &mut dyn Write) -> Result<Duration, Error> {
        // It would not be stopped, and go on when it is woken.
        if self.status()? == "suspended" {
            return Err(Error::Answer {
                command: "query-status",
                problem: "the VM sleeps (suspended); wake it, then migrate it".to_owned(),
            });
        }
        let stream = self.take_outgoing()?;
        self.or_gone(state::enable_hold(&self.monitor))?;
        let mut saving = Saving::new(stream, limit_bytes);
        let begun = saving.begin(&self.process, &self.monitor, to);
        let stopped = self.or_gone(begun)?;
        *self.saving() = Some(saving);
        Ok(stopped)
    }

    fn resume(&self) -> Result<(), Error> {
        let deadline = Instant::now() + FINALIZE_TIMEOUT;
        // Right after its state was saved, or saving was cancelled, QEMU still finishes its migration.
        loop {
            // The event comes when all that can go wrong has not. The answer can take milliseconds longer where the guest
            // waits for pages; to ask would, too.
            let resumed = self.monitor.execute_until(&qmp::cont {}, "RESUME");
            let error = match self.or_gone(resumed) {
                Ok(true) => return Ok(()),
                Ok(false) => break,
                Err(error) => error,
            };
            let busy = matches!(error, Error::Refused { .. }) && self.is_finishing()?;
            if !busy || Instant::now() >= deadline {
                return Err(error);
            }
            if self.process.has_ended(Duration::from_millis(1)) {
                return Err(Error::ProcessGone {
                    pid: self.process.pid(),
                });
            }
        }
        // It ran before, or this was only noted for later.
        match self.run_state()? {
            RunState::Running => Ok(()),
            state => Err(Error::Answer {
                command: "cont",
                problem: format!("the VM is {state:?} afterwards"),
            }),
        }
    }

    fn prepare_to_save(&self) -> Result<(), Error> {
        self.or_gone(state::enable(&self.monitor))?;
        state::describe(&self.monitor, false);
        self.or_gone(state::unlimit(&self.monitor))?;
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        if outgoing.is_none() {
            *outgoing = Some(self.or_gone(state::connection(&self.monitor))?);
        }
        Ok(())
    }

    fn device_pages(&self) -> Vec<(usize, u64)> {
        let Ok(ram) = self.qemu_ram() else {
            return Vec::new();
        };
        let mut pages = rings::pages(&self.monitor, &ram, RINGS_PATIENCE);
        pages.extend(roms::pages(&self.monitor, &ram));
        pages
    }

    fn save_device_state(&self, limit_bytes: u64, to: &mut dyn Write) -> Result<(), Error> {
        let begun = self.saving().take();
        let is_begun = begun.is_some();
        let saving = match begun {
            Some(saving) => saving,
            None => Saving::new(self.take_outgoing()?, limit_bytes),
        };
        self.or_gone(saving.end(&self.process, &self.monitor, is_begun, to))
    }

    fn stop_saving(&self) -> Result<(), Error> {
        *self.saving() = None;
        self.or_gone(state::give_up(
            &self.process,
            &self.monitor,
            FINALIZE_TIMEOUT,
        ))
    }

    fn prepare_to_load(&self) -> Result<(), Error> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        if incoming.is_none() {
            state::describe(&self.monitor, false);
            *incoming = Some(self.or_gone(state::await_state(&self.monitor))?);
        }
        Ok(())
    }

    fn load_device_state(&self, from: &mut dyn Read) -> Result<(), Error> {
        self.prepare_to_load()?;
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = incoming.take() else {
            return Err(Error::DeviceState("nothing waits for it".to_owned()));
        };
        drop(incoming);
        let loaded = state::load(&self.process, &self.monitor, stream, from);
        self.or_gone(loaded)
    }

    fn settle(&self) {
        state::describe(&self.monitor, true);
        state::disable(&self.monitor);
        if self.ready_to_miss.swap(false, Ordering::Relaxed)
            && let Err(error) = QemuMissing::unprepare(&self.process, &self.dir)
        {
            tracing::debug!(%error, "a descriptor stays open in QEMU");
        }
    }

    fn terminate(&self) -> Result<(), Error> {
        let began = Instant::now();
        let quit = self.monitor.execute_within(&qmp::quit {}, QUIT_TIMEOUT);
        // One that does not answer gets no more time; any other may be flushing its disks.
        let hangs = quit.is_err_and(|error| error.is_timeout());
        let patience = if hangs { Duration::ZERO } else { QUIT_TIMEOUT };
        if self.process.has_ended(patience) {
            return Ok(());
        }
        tracing::debug!(pid = self.process.pid(), waited = ?began.elapsed(), "killing QEMU");
        if self.process.kill(KILL_TIMEOUT) {
            Ok(())
        } else {
            Err(Error::Timeout("killing QEMU"))
        }
    }

    fn kill(&self) {
        // Not over the monitor: it may answer nobody while a device waits for a page.
        self.process.kill(KILL_TIMEOUT);
    }

    fn wait_ended(&self, timeout: Duration) -> bool {
        self.process.has_ended(timeout)
    }
}

/// An error with all its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_of_any_size_that_the_kernel_gives_out_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let set = |size: &str, text: &str| {
            let dir = dir.path().join(size);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("shmem_enabled"), text).unwrap();
        };
        set("", "always within_size [advise] never deny force\n");
        set(
            "hugepages-64kB",
            "always inherit within_size advise [never]\n",
        );
        set(
            "hugepages-2048kB",
            "always [inherit] within_size advise never\n",
        );
        assert_eq!(shmem_huge_pages(dir.path()), None);
        set(
            "hugepages-64kB",
            "[always] inherit within_size advise never\n",
        );
        let found = shmem_huge_pages(dir.path()).unwrap();
        assert!(found.message.contains("hugepages-64kB"), "{found:?}");
        set(
            "hugepages-64kB",
            "always inherit within_size advise [never]\n",
        );
        set("", "[always] within_size advise never deny force\n");
        assert!(shmem_huge_pages(dir.path()).is_some());
        assert_eq!(shmem_huge_pages(&dir.path().join("nowhere")), None);
    }

    #[test]
    fn devices_that_write_past_qemu_are_named_all_at_once() {
        let arguments: Vec<String> = ["-device", "vfio-pci,host=1", "-device", "vhost-user-fs-pci"]
            .map(str::to_owned)
            .to_vec();
        let codes: Vec<String> = device_obstacles(&arguments)
            .into_iter()
            .map(|o| o.code)
            .collect();
        assert_eq!(codes, ["device-vhost-user", "device-vfio"]);
    }

    #[test]
    fn a_name_that_sounds_like_a_device_is_none() {
        let arguments = ["-name", "vfio-tests", "-append", "x=vhost-user ivshmem"];
        let arguments = arguments.map(str::to_owned).to_vec();
        assert_eq!(device_obstacles(&arguments), []);
    }
}
