//! The backend on a real QEMU with a boot sector that rewrites 63 MiB for ever.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use palanquin_host::qemu::Qemu;
use palanquin_host::vm::{Accel, Disk, Hypervisor, Machine, RunState, Vm};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Ends the hypervisor also when the test fails.
struct Guard(Arc<dyn Vm>);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.terminate();
    }
}

struct Bench {
    dir: tempfile::TempDir,
    qemu: Qemu,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("dirty_loop.img");
        let source = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../guest/payload/dirty_loop.asm"
        );
        let built = Command::new("nasm")
            .args(["-f", "bin", source, "-o"])
            .arg(&image)
            .status()
            .expect("nasm is needed: cargo xtask setup");
        assert!(built.success());
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&image)
            .unwrap();
        file.set_len(1 << 20).unwrap();
        let qemu = Qemu::new(QEMU.into(), vec![dir.path().to_owned()]);
        Self { dir, qemu }
    }

    fn machine(&self, accel: Accel, memory_bytes: Vec<u64>) -> Machine {
        Machine {
            name: "payload".to_owned(),
            uuid: "6f1f6f44-0000-4000-8000-000000000001".to_owned(),
            memory_bytes,
            cpus: 1,
            accel,
            machine: "q35".to_owned(),
            cpu: None,
            kernel: None,
            initrd: None,
            append: None,
            disks: vec![Disk {
                path: self.dir.path().join("dirty_loop.img").display().to_string(),
                format: "raw".to_owned(),
                interface: "ide".to_owned(),
                ephemeral: true,
            }],
            networks: Vec::new(),
            console: true,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn wait_for(what: &str, seconds: u64, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let (_sender, receiver) = std::sync::mpsc::channel::<()>();
    while !check() {
        assert!(
            Instant::now() < deadline,
            "{what} did not happen in {seconds} s"
        );
        let _ = receiver.recv_timeout(Duration::from_millis(20));
    }
}

fn sweeps(dir: &Path) -> usize {
    let console = std::fs::read(dir.join("console.log")).unwrap_or_default();
    console.iter().filter(|&&byte| byte == b'B').count()
}

fn copy(from: &dyn Vm, to: &dyn Vm, pages: &[(usize, Range<u64>)]) {
    let (from, to) = (from.ram().unwrap(), to.ram().unwrap());
    for (region, pages) in pages {
        for page in pages.clone() {
            let mut buffer = [0; 4096];
            from.read(*region, page * 4096, &mut buffer).unwrap();
            to.write(*region, page * 4096, &buffer).unwrap();
        }
    }
}

fn data_pages(vm: &dyn Vm) -> Vec<(usize, Range<u64>)> {
    let ram = vm.ram().unwrap();
    let regions = 0..ram.regions().len();
    let extents = regions.flat_map(|region| {
        let extents = ram.data_extents(region).unwrap();
        extents
            .into_iter()
            .map(move |e| (region, e.start / 4096..e.end / 4096))
    });
    extents.collect()
}

fn memory(vm: &dyn Vm) -> Vec<Vec<u8>> {
    let ram = vm.ram().unwrap();
    let mut all = Vec::new();
    for (region, info) in ram.regions().iter().enumerate() {
        let mut bytes = vec![0; usize::try_from(info.size_bytes).unwrap()];
        for extent in ram.data_extents(region).unwrap() {
            let range =
                usize::try_from(extent.start).unwrap()..usize::try_from(extent.end).unwrap();
            ram.read(region, extent.start, &mut bytes[range]).unwrap();
        }
        all.push(bytes);
    }
    all
}

fn different_pages(one: &dyn Vm, other: &dyn Vm) -> Vec<(usize, usize)> {
    let (one, other) = (memory(one), memory(other));
    let mut different = Vec::new();
    for (region, (one, other)) in one.iter().zip(&other).enumerate() {
        let pages = one.chunks(4096).zip(other.chunks(4096)).enumerate();
        different.extend(
            pages
                .filter(|(_, (a, b))| a != b)
                .map(|(page, _)| (region, page)),
        );
    }
    different.truncate(20);
    different
}

fn migrate(accel: Accel, sizes: Vec<u64>) {
    let bench = Bench::new();
    let (source_dir, destination_dir) = (bench.path("a"), bench.path("b"));
    let source = Guard(
        bench
            .qemu
            .spawn(&bench.machine(accel, sizes), &source_dir)
            .unwrap(),
    );
    let source = &*source.0;
    wait_for("the second sweep", 60, || sweeps(&source_dir) >= 2);
    assert_eq!(source.obstacles().unwrap(), []);
    let descriptor = source.describe().unwrap();
    let prepared = bench.qemu.prepare(&descriptor, &destination_dir, 8 << 30);
    let destination = Guard(prepared.unwrap_or_else(|error| panic!("{error:?}")));
    let destination = &*destination.0;
    assert_eq!(destination.run_state().unwrap(), RunState::Incoming);
    assert_eq!(data_pages(destination), [], "fresh memory has no data");

    source.prepare_to_save().unwrap();
    let mut tracker = source.track_writes().unwrap();
    let mut first = 0;
    tracker
        .collect(&mut |_, pages| first += pages.end - pages.start)
        .unwrap();
    let total: u64 = source
        .ram()
        .unwrap()
        .regions()
        .iter()
        .map(|r| r.size_bytes / 4096)
        .sum();
    assert_eq!(first, total, "the first collection names every page");
    copy(source, destination, &data_pages(source));
    let mut again = Vec::new();
    wait_for("writes", 20, || {
        tracker
            .collect(&mut |region, pages| again.push((region, pages)))
            .unwrap();
        !again.is_empty()
    });
    copy(source, destination, &again);

    source.pause().unwrap();
    let state = source.save_device_state(64 << 20).unwrap();
    let mut last = Vec::new();
    tracker
        .collect(&mut |region, pages| last.push((region, pages)))
        .unwrap();
    copy(source, destination, &last);
    // Before the state is loaded: with KVM, loading it makes QEMU patch its own option ROM in guest memory
    // (`kvmvapic`), as every load of a QEMU with that device does.
    assert_eq!(different_pages(source, destination), [], "memory differs");
    destination.load_device_state(&state).unwrap();
    assert_eq!(destination.run_state().unwrap(), RunState::Paused);
    let before = sweeps(&destination_dir);
    destination.resume().unwrap();
    wait_for("the next sweep", 60, || {
        sweeps(&destination_dir) >= before + 2
    });
    source.terminate().unwrap();
    assert!(source.wait_ended(Duration::ZERO));
}

#[test]
fn a_vm_is_copied_from_outside_under_tcg_and_goes_on() {
    migrate(Accel::Tcg, vec![128 << 20]);
}

#[test]
fn two_memory_backends_are_copied_each_to_its_own() {
    migrate(Accel::Tcg, vec![96 << 20, 64 << 20]);
}

#[test]
fn a_vm_is_copied_from_outside_under_kvm_and_goes_on() {
    if std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        eprintln!("skipped: /dev/kvm does not open here");
        return;
    }
    migrate(Accel::Kvm, vec![128 << 20]);
}

#[test]
fn a_hundred_system_calls_inside_leave_a_busy_vm_healthy() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    for _ in 0..100 {
        let mut tracker = vm.0.track_writes().unwrap();
        tracker.collect(&mut |_, _| {}).unwrap();
    }
    let before = sweeps(&dir);
    wait_for("more sweeps", 60, || sweeps(&dir) > before + 1);
    let fds = std::fs::read_dir(format!("/proc/{}/fd", vm.0.handle().pid)).unwrap();
    let left = fds.flatten().filter(|fd| {
        std::fs::read_link(fd.path()).is_ok_and(|l| l.to_string_lossy().contains("userfaultfd"))
    });
    assert_eq!(left.count(), 0, "descriptors were left in QEMU");
}

#[test]
fn a_source_resumes_after_its_state_was_saved() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    vm.0.prepare_to_save().unwrap();
    for _ in 0..3 {
        vm.0.pause().unwrap();
        vm.0.save_device_state(64 << 20).unwrap();
        vm.0.resume().unwrap();
    }
    let before = sweeps(&dir);
    wait_for("more sweeps", 60, || sweeps(&dir) > before + 1);
    vm.0.pause().unwrap();
    assert!(vm.0.save_device_state(1000).is_err(), "the limit holds");
    vm.0.resume().unwrap();
    let before = sweeps(&dir);
    wait_for("more sweeps", 60, || sweeps(&dir) > before + 1);
}

#[test]
fn an_adopted_vm_is_found_again_by_its_handle_and_a_reused_one_is_not() {
    let bench = Bench::new();
    let (dir, qmp) = (bench.path("a"), bench.path("qmp"));
    let image = bench.path("dirty_loop.img");
    let child = Command::new(QEMU)
        .args([
            "-M",
            "q35,memory-backend=mem",
            "-m",
            "96",
            "-nographic",
            "-nodefaults",
            "-accel",
            "tcg",
        ])
        .args(["-object", "memory-backend-memfd,id=mem,size=96M,share=on"])
        .arg("-drive")
        .arg(format!(
            "if=none,id=d,format=raw,file={},snapshot=on",
            image.display()
        ))
        .args(["-device", "ide-hd,drive=d", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", qmp.display()))
        .stdin(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id();
    wait_for("the socket", 20, || qmp.exists());
    let vm = Guard(bench.qemu.adopt(pid, &qmp, &dir).unwrap());
    drop(child);
    let descriptor = vm.0.describe().unwrap();
    assert!(
        !descriptor.arguments.iter().any(|a| a.contains("qmp")),
        "{:?}",
        descriptor.arguments
    );
    assert_eq!(
        descriptor.machine,
        "pc-q35-7.2".replace("7.2", &descriptor.machine[7..])
    );
    assert_eq!(bench.qemu.check(&descriptor, 8 << 30), []);
    let handle = vm.0.handle();
    assert!(bench.qemu.attach(&handle, &dir).is_ok());
    let mut other = handle.clone();
    other.start_ticks += 1;
    let error = bench.qemu.attach(&other, &dir).err().unwrap();
    assert!(error.is_process_gone());
    vm.0.terminate().unwrap();
    assert!(
        bench
            .qemu
            .attach(&handle, &dir)
            .err()
            .unwrap()
            .is_process_gone()
    );
}

#[test]
fn private_ram_and_missing_memory_are_named() {
    let bench = Bench::new();
    let (dir, qmp) = (bench.path("a"), bench.path("qmp"));
    let child = Command::new(QEMU)
        .args([
            "-M",
            "q35",
            "-m",
            "64",
            "-nographic",
            "-nodefaults",
            "-accel",
            "tcg",
            "-qmp",
        ])
        .arg(format!("unix:{},server=on,wait=off", qmp.display()))
        .stdin(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id();
    wait_for("the socket", 20, || qmp.exists());
    let vm = Guard(bench.qemu.adopt(pid, &qmp, &dir).unwrap());
    drop(child);
    let codes: Vec<String> =
        vm.0.obstacles()
            .unwrap()
            .into_iter()
            .map(|o| o.code)
            .collect();
    assert_eq!(codes, ["ram-private"]);
    vm.0.terminate().unwrap();

    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let shared = Guard(bench.qemu.spawn(&machine, &bench.path("c")).unwrap());
    let descriptor = shared.0.describe().unwrap();
    let codes: Vec<String> = bench
        .qemu
        .check(&descriptor, 1 << 20)
        .into_iter()
        .map(|o| o.code)
        .collect();
    assert_eq!(codes, ["memory-short"]);
}

#[test]
fn a_qemu_that_does_not_start_says_why() {
    let bench = Bench::new();
    let mut machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    machine.machine = "no-such-machine".to_owned();
    let error = bench.qemu.spawn(&machine, &bench.path("a")).err().unwrap();
    assert!(
        error.to_string().contains("unsupported machine type"),
        "{error}"
    );
}
