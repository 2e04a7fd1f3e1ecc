//! QEMU, unmodified, with guest RAM in shared memory.

mod allowed;
mod command_line;
mod confinement;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod missing;
mod program;
mod qmp;
mod ram;
mod record;
mod rings;
mod roms;
mod state;
mod storage;
mod text;
mod tracker;
mod vm;

use std::fs;
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::confinement::Confinement;
pub(crate) use self::missing::Placer;

use self::command_line::VM_DIR;
use self::program::Program;
use self::vm::QemuVm;
use crate::Error;
use crate::facts;
use crate::measure::Meter;
use crate::numa;
use crate::process::{Process, boot_id, wait_child};
use crate::sys::session;
use crate::throttle;
use crate::vm::{
    Descriptor, GuestRam, Handle, Hypervisor, Machine, Obstacle, PAGE_SIZE, PrepareError, RunState,
    Vm,
};

/// Longest time for QEMU to answer after its start.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest time for QEMU to tell its version or its machines.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest answer about itself that is read, in bytes.
const ANSWER_MAX: u64 = 1 << 20;
/// Longest wait for a process to end after it was killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest piece of a text from another host that is repeated in a message.
const SHOWN_CHARS: usize = 200;
const REGIONS_MAX: usize = 64;
const CPU_WORDS_MAX: usize = 256;
/// What QEMU needs beside guest RAM.
const OVERHEAD_BYTES: u64 = 64 << 20;

/// QEMU on this machine.
#[derive(Clone, Debug)]
pub struct Qemu {
    binary: PathBuf,
    allowed_paths: Vec<PathBuf>,
    confinement: Confinement,
    meter: Arc<Meter>,
    nodes_dir: PathBuf,
}

impl Qemu {
    /// The binary, and the directories below which an arriving VM may name files.
    pub fn new(binary: PathBuf, allowed_paths: Vec<PathBuf>) -> Self {
        Self {
            binary,
            allowed_paths,
            confinement: Confinement::default(),
            meter: Arc::default(),
            nodes_dir: numa::NODES_DIR.into(),
        }
    }

    /// Reads what memory nodes there are in another directory than the kernel's.
    #[must_use]
    pub fn with_nodes_of(mut self, dir: PathBuf) -> Self {
        self.nodes_dir = dir;
        self
    }

    /// Measures what is started, with a meter that others use too.
    #[must_use]
    pub fn measured_by(mut self, meter: Arc<Meter>) -> Self {
        self.meter = meter;
        self
    }

    /// What those that are started from now on may not do.
    #[must_use]
    pub fn confined(mut self, confinement: Confinement) -> Self {
        self.confinement = confinement;
        self
    }

    fn start(&self, arguments: &[String], vm_dir: &Path, incoming: bool) -> Result<QemuVm, Error> {
        make_dir(vm_dir)?;
        let qmp = vm_dir.join("qmp");
        if qmp.as_os_str().len() > 107 {
            return Err(Error::SocketPath(qmp));
        }
        let log_path = vm_dir.join("qemu.log");
        let log = fs::File::create(&log_path).map_err(Error::io("making QEMU's log"))?;
        let dir = vm_dir.to_string_lossy();
        let program = Program::open(&self.binary, vm_dir, &self.meter)?;
        let mut command = Command::new(program.path());
        command
            .arg0(&self.binary)
            .args(
                arguments
                    .iter()
                    .map(|argument| argument.replace(VM_DIR, &dir)),
            )
            .args(
                self.confinement
                    .options(&self.version().unwrap_or_default()),
            )
            .arg("-qmp")
            .arg(monitor_argument(&qmp));
        if incoming {
            command.args(["-incoming", "defer", "-S"]);
        }
        // The VM outlives the agent.
        session::inherit_nothing(session::renounce(session::detach(&mut command)));
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(Error::io("making QEMU's log"))?)
            .stderr(log)
            .spawn()
            .map_err(Error::io(format!("starting {}", self.binary.display())))?;
        let failed = || Error::Start {
            log: tail(&log_path),
        };
        let process = Process::open(child.id()).map_err(|_| failed())?;
        let vm = QemuVm::new(process, &qmp, vm_dir);
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match vm.run_state() {
                Ok(_) => {
                    if let Err(error) = program.check(&vm.process, &self.meter) {
                        vm.process.kill(KILL_TIMEOUT);
                        return Err(error);
                    }
                    return Ok(vm);
                }
                Err(error) => {
                    if vm.process.has_ended(Duration::from_millis(10)) {
                        return Err(failed());
                    }
                    if Instant::now() >= deadline {
                        vm.process.kill(KILL_TIMEOUT);
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Starts a container whose memory comes from a node that has room for it, where this machine has several.
    fn start_placed(&self, descriptor: &Descriptor, vm_dir: &Path) -> Result<QemuVm, Error> {
        let parts = descriptor.regions.iter().map(|region| region.size_bytes);
        let nodes = numa::choose(&numa::nodes(&self.nodes_dir), parts);
        let arguments = command_line::placed(&descriptor.arguments, &descriptor.regions, &nodes);
        match self.start(&arguments, vm_dir, true) {
            // It may have been built without support for nodes.
            Err(Error::Start { log }) if arguments != descriptor.arguments => {
                tracing::warn!(
                    log,
                    "QEMU does not start; once more without memory of chosen nodes"
                );
                self.start(&descriptor.arguments, vm_dir, true)
            }
            started => started,
        }
    }

    fn machines(&self) -> Result<String, Error> {
        self.ask(&["-machine", "help"])
    }

    fn ask(&self, arguments: &[&str]) -> Result<String, Error> {
        let action = format!("running {} {}", self.binary.display(), arguments.join(" "));
        let mut child = Command::new(&self.binary)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Error::io(action.clone()))?;
        // Its answers are smaller than a pipe.
        let ended = wait_child(&mut child, ASK_TIMEOUT).map_err(Error::io(action.clone()))?;
        if ended.is_none() {
            return Err(Error::Timeout("asking QEMU about itself"));
        }
        let mut text = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            let mut stdout = stdout.take(ANSWER_MAX);
            stdout.read_to_end(&mut text).map_err(Error::io(action))?;
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Lifts what an agent that died has left. A VM that can't be let go faster can be used all the same.
fn lift_throttle(process: &Process) {
    if let Err(error) = throttle::lift(process) {
        tracing::warn!(%error, pid = process.pid(), "the virtual CPUs stay limited");
    }
}

/// Makes the directory for the agent alone.
fn make_dir(vm_dir: &Path) -> Result<(), Error> {
    let action = || Error::io(format!("making {}", vm_dir.display()));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(vm_dir)
        .map_err(action())?;
    // It may have been there.
    fs::set_permissions(vm_dir, fs::Permissions::from_mode(0o700)).map_err(action())
}

/// What makes a QEMU listen for the agent.
fn monitor_argument(qmp: &Path) -> String {
    // QEMU writes a comma within a value twice.
    let path = qmp.to_string_lossy().replace(',', ",,");
    format!("unix:{path},server=on,wait=off")
}

/// End of a log, for an error message.
fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned();
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    if lines.is_empty() {
        return "it ended without a word".to_owned();
    }
    lines.into_iter().rev().collect::<Vec<_>>().join("; ")
}

/// A text from another host, for a message.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(SHOWN_CHARS).collect();
    format!("{short:?}")
}

fn obstacle(code: &str, message: String, remedy: &str) -> Obstacle {
    Obstacle {
        code: code.to_owned(),
        message,
        remedy: remedy.to_owned(),
    }
}

/// Major and minor of a version such as `7.2.22`.
fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

impl Hypervisor for Qemu {
    fn spawn(&self, machine: &Machine, vm_dir: &Path) -> Result<Arc<dyn Vm>, Error> {
        let arguments = command_line::arguments(machine);
        if let Some(obstacle) = self.confinement.disks(&arguments)?.first() {
            return Err(Error::Start {
                log: format!("{} {}", obstacle.message, obstacle.remedy),
            });
        }
        Ok(Arc::new(self.start(&arguments, vm_dir, false)?))
    }

    fn adopt(&self, pid: u32, qmp: &Path, vm_dir: &Path) -> Result<Arc<dyn Vm>, Error> {
        make_dir(vm_dir)?;
        let vm = QemuVm::new(Process::open(pid)?, qmp, vm_dir);
        lift_throttle(&vm.process);
        vm.run_state()?;
        Ok(Arc::new(vm))
    }

    fn attach(&self, handle: &Handle, vm_dir: &Path) -> Result<Arc<dyn Vm>, Error> {
        let process = match Process::open(handle.pid) {
            Ok(process)
                if process.start_ticks() == handle.start_ticks && boot_id()? == handle.boot_id =>
            {
                process
            }
            other => {
                throttle::remove_abandoned();
                let gone = Error::ProcessGone { pid: handle.pid };
                return Err(other.err().unwrap_or(gone));
            }
        };
        lift_throttle(&process);
        Ok(Arc::new(QemuVm::new(process, &handle.qmp, vm_dir)))
    }

    fn prepare(
        &self,
        descriptor: &Descriptor,
        vm_dir: &Path,
        available_bytes: u64,
    ) -> Result<Arc<dyn Vm>, PrepareError> {
        let obstacles = self.check(descriptor, available_bytes);
        if !obstacles.is_empty() {
            return Err(PrepareError::Blocked(obstacles));
        }
        let vm = match self.start_placed(descriptor, vm_dir) {
            Ok(vm) => vm,
            Err(Error::Start { log }) => {
                return Err(PrepareError::Blocked(vec![obstacle(
                    "container-start",
                    format!("QEMU does not start with the VM's command line: {log}"),
                    "Make what QEMU names available on the destination: tap devices, files, machine type.",
                )]));
            }
            Err(error) => return Err(error.into()),
        };
        match examine(&vm, descriptor) {
            Ok(found) if found.is_empty() => Ok(Arc::new(vm)),
            result => {
                if let Err(error) = vm.terminate() {
                    tracing::warn!(%error, "a container that is not wanted does not end");
                }
                match result {
                    Ok(found) => Err(PrepareError::Blocked(found)),
                    Err(error) => Err(error.into()),
                }
            }
        }
    }

    fn check(&self, descriptor: &Descriptor, available_bytes: u64) -> Vec<Obstacle> {
        let mut obstacles = Vec::new();
        if descriptor.hypervisor != "qemu" {
            obstacles.push(obstacle(
                "hypervisor",
                format!(
                    "the VM needs {}, this host has QEMU",
                    shown(&descriptor.hypervisor)
                ),
                "Choose a destination with the same hypervisor.",
            ));
            return obstacles;
        }
        match self.version() {
            Ok(ours) => {
                let theirs = major_minor(&descriptor.version);
                // A version that is none is refused too.
                if theirs.is_none() || major_minor(&ours) < theirs {
                    obstacles.push(obstacle(
                        "qemu-version",
                        format!(
                            "QEMU is {ours} here and {} at the source",
                            shown(&descriptor.version)
                        ),
                        "Upgrade QEMU on the destination to at least the source's version.",
                    ));
                }
            }
            Err(error) => obstacles.push(obstacle(
                "qemu-missing",
                error.to_string(),
                "Install QEMU on the destination, or set `qemu.binary`.",
            )),
        }
        let known = self.machines().unwrap_or_default();
        if !known
            .lines()
            .any(|line| line.split(' ').next() == Some(&descriptor.machine))
        {
            obstacles.push(obstacle(
                "machine-type",
                format!("QEMU here has no machine {}", shown(&descriptor.machine)),
                "Upgrade QEMU on the destination, or start the VM with a machine type that both know.",
            ));
        }
        if descriptor.cpu_features.len() > CPU_WORDS_MAX {
            obstacles.push(obstacle(
                "cpu-feature",
                "the VM announces more CPU feature words than there are".to_owned(),
                "Report this: the source describes a VM that cannot exist.",
            ));
        }
        obstacles.extend(region_obstacles(descriptor, available_bytes));
        let refused = allowed::judge(descriptor, &self.allowed_paths);
        if refused.is_empty() {
            match self.confinement.disks(&descriptor.arguments) {
                Ok(found) => obstacles.extend(found),
                Err(error) => obstacles.push(obstacle(
                    "disk-permission",
                    error.to_string(),
                    "Look whether the storage of the VM's disks answers on the destination.",
                )),
            }
        }
        obstacles.extend(refused);
        let wants_kvm = descriptor
            .arguments
            .windows(2)
            .any(|pair| match pair[0].as_str() {
                "-accel" => pair[1].starts_with("kvm"),
                "-machine" => pair[1].contains("accel=kvm"),
                _ => false,
            });
        if wants_kvm && !facts::kvm_opens() {
            obstacles.push(obstacle(
                "kvm",
                "the VM needs KVM, and /dev/kvm does not open here".to_owned(),
                "Load the kvm module, or choose another destination.",
            ));
        }
        obstacles
    }

    fn sweep(&self, vm_dir: &Path) -> Result<(), Error> {
        let qmp = vm_dir.join("qmp");
        let argument = monitor_argument(&qmp);
        // By the command line, not the socket: it may be just about to listen.
        for process in processes_with(&argument)? {
            QemuVm::new(process, &qmp, vm_dir).terminate()?;
        }
        Ok(())
    }

    fn unconfined(&self) -> Vec<String> {
        self.confinement.lacks()
    }

    fn version(&self) -> Result<String, Error> {
        let text = self.ask(&["--version"])?;
        let version = text
            .split_ascii_whitespace()
            .find(|word| major_minor(word).is_some());
        version.map(str::to_owned).ok_or_else(|| Error::Answer {
            command: "--version",
            problem: text.chars().take(200).collect(),
        })
    }
}

/// Processes that have this argument.
fn processes_with(argument: &str) -> Result<Vec<Process>, Error> {
    let has_it = |pid: u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|&byte| byte == 0)
            .any(|word| word == argument.as_bytes())
    };
    let entries = fs::read_dir("/proc").map_err(Error::io("listing processes"))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(pids
        .filter(|pid| has_it(*pid))
        .filter_map(|pid| Process::open(pid).ok())
        // Looked at again: the ID may have been used anew before the process was held.
        .filter(|process| has_it(process.pid()))
        .collect())
}

fn region_obstacles(descriptor: &Descriptor, available_bytes: u64) -> Vec<Obstacle> {
    let regions = &descriptor.regions;
    let sizes_fit = regions
        .iter()
        .all(|region| region.size_bytes > 0 && region.size_bytes.is_multiple_of(PAGE_SIZE));
    if regions.is_empty() || regions.len() > REGIONS_MAX || !sizes_fit {
        return vec![obstacle(
            "ram-layout",
            "the VM's memory has a layout that cannot be".to_owned(),
            "Report this: the source describes a VM that cannot exist.",
        )];
    }
    let needed = regions.iter().fold(OVERHEAD_BYTES, |sum, region| {
        sum.saturating_add(region.size_bytes)
    });
    if needed <= available_bytes {
        return Vec::new();
    }
    vec![obstacle(
        "memory-short",
        format!(
            "the VM needs {} MiB, {} MiB can be given to it here",
            needed >> 20,
            available_bytes >> 20
        ),
        "Move other VMs away from the destination, lower `limits.memory-reserve`, or choose another host.",
    )]
}

/// Looks at a container that was started: is it what the VM needs, and is its RAM empty?
fn examine(vm: &QemuVm, descriptor: &Descriptor) -> Result<Vec<Obstacle>, Error> {
    let mut obstacles = Vec::new();
    if vm.run_state()? != RunState::Incoming {
        return Err(Error::Answer {
            command: "query-status",
            problem: "the container does not wait for a VM".to_owned(),
        });
    }
    state::enable(&vm.monitor)?;
    let ram = match vm.qemu_ram() {
        Ok(ram) => ram,
        Err(Error::Ram(message)) => {
            let remedy = "Use memory-backend-memfd with share=on at the source.";
            return Ok(vec![obstacle("ram-private", message, remedy)]);
        }
        Err(error) => return Err(error),
    };
    if ram.regions() != descriptor.regions {
        obstacles.push(obstacle(
            "ram-layout",
            "the container's memory has another layout than the VM's".to_owned(),
            "Start the VM with all its memory on the command line; memory that was plugged in later is not \
             supported.",
        ));
    }
    if !ram.prove_zero()? {
        obstacles.push(obstacle(
            "ram-not-zero",
            "the container's memory is not empty".to_owned(),
            "Report this: fresh memory must be empty.",
        ));
    }
    let ours = vm.cpu_features()?;
    for (name, wanted) in &descriptor.cpu_features {
        let has = ours
            .iter()
            .find(|(word, _)| word == name)
            .map_or(0, |(_, bits)| *bits);
        let missing = wanted & !has;
        if missing != 0 {
            obstacles.push(obstacle(
                "cpu-feature",
                format!("the CPU here lacks bits {missing:#x} of {}", shown(name)),
                "Start the VM with a CPU model that both hosts have.",
            ));
        }
    }
    Ok(obstacles)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_major_and_minor() {
        assert_eq!(major_minor("7.2.22"), Some((7, 2)));
        assert!(major_minor("10.0.2") > major_minor("7.2.22"));
        assert_eq!(major_minor("emulator"), None);
    }

    #[test]
    fn sizes_that_overflow_are_short_of_memory_not_a_panic() {
        let region = |size_bytes| crate::vm::Region {
            name: "r".to_owned(),
            size_bytes,
        };
        let mut descriptor = Descriptor {
            hypervisor: "qemu".to_owned(),
            version: String::new(),
            machine: String::new(),
            arguments: Vec::new(),
            regions: vec![region(u64::MAX - 4095), region(1 << 40)],
            cpu_features: Vec::new(),
        };
        assert_eq!(
            region_obstacles(&descriptor, 1 << 40)[0].code,
            "memory-short"
        );
        descriptor.regions = vec![region(4095)];
        assert_eq!(region_obstacles(&descriptor, 1 << 40)[0].code, "ram-layout");
    }
}
