//! VMs that run while their pages are still at the source.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use palanquin_host::qemu::Qemu;
use palanquin_host::vm::{Accel, GuestRam, Handle, Hypervisor, MissingPages, RunState};

use crate::bench::{Bench, Guard, QEMU, data_pages, listens, memory, sweeps, wait_for};

const PAGE: usize = 4096;
/// What the boot sector rewrites: 1 MiB to 64 MiB.
const SWEPT: std::ops::Range<usize> = 256..16384;

pub(crate) fn kvm_opens() -> bool {
    let kvm = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    kvm.is_ok()
}

/// Answers accesses until told to stop; gives how long each answer took.
pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<Vec<Duration>>>,
}

impl Server {
    pub(crate) fn start(from: Arc<dyn GuestRam>, missing: Arc<dyn MissingPages>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut times = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let mut touched = Vec::new();
                missing
                    .wait_faults(Duration::from_millis(20), &mut |region, page| {
                        touched.push((region, page));
                    })
                    .unwrap();
                for (region, page) in touched {
                    let began = Instant::now();
                    let mut bytes = [0; PAGE];
                    from.read(region, page * 4096, &mut bytes).unwrap();
                    missing.place(region, page, &bytes).unwrap();
                    times.push(began.elapsed());
                }
            }
            times
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    pub(crate) fn end(mut self) -> Vec<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Everything that is not there yet, in blocks.
fn push(from: &dyn GuestRam, missing: &dyn MissingPages) -> u64 {
    let mut placed = 0;
    for (region, info) in from.regions().iter().enumerate() {
        let mut at = 0;
        for extent in from.data_extents(region).unwrap() {
            placed += missing
                .place_zero(region, at / 4096..extent.start / 4096)
                .unwrap();
            at = extent.start;
            while at < extent.end {
                let len = (extent.end - at).min(1 << 20);
                let mut bytes = vec![0; usize::try_from(len).unwrap()];
                from.read(region, at, &mut bytes).unwrap();
                placed += missing.place(region, at / 4096, &bytes).unwrap();
                at += len;
            }
        }
        let pages = at / 4096..info.size_bytes / 4096;
        placed += missing.place_zero(region, pages).unwrap();
    }
    placed
}

/// The boot sector counts up the first byte of a page after the other: there is one step down at most. A page that
/// was lost on the way counts from another number.
fn assert_no_page_was_lost(ram: &dyn GuestRam) {
    let counts: Vec<u8> = SWEPT
        .map(|page| {
            let mut byte = [0];
            ram.read(0, (page * PAGE) as u64, &mut byte).unwrap();
            byte[0]
        })
        .collect();
    let steps: Vec<(usize, u8, u8)> = counts
        .windows(2)
        .enumerate()
        .filter(|(_, pair)| pair[0] != pair[1])
        .map(|(page, pair)| (page + SWEPT.start, pair[0], pair[1]))
        .collect();
    assert!(
        steps.len() <= 1,
        "pages were lost: {:?}",
        &steps[..8.min(steps.len())]
    );
    if let [(_, before, after)] = steps[..] {
        assert_eq!(before, after.wrapping_add(1), "{steps:?}");
    }
}

fn open_userfaultfds(pid: u32) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let is_one = |fd: &std::fs::DirEntry| {
        std::fs::read_link(fd.path()).is_ok_and(|l| l.to_string_lossy().contains("userfaultfd"))
    };
    fds.flatten().filter(is_one).count()
}

/// A source that has counted far enough for a page of zeros to be noticed, paused; its state; and an empty container.
pub(crate) fn halfway(bench: &Bench, accel: Accel, bytes: u64) -> (Guard, Vec<u8>, Guard) {
    let dir = bench.path("a");
    let machine = bench.machine(accel, vec![bytes]);
    let source = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("sweeps", 60, || sweeps(&dir) >= 5);
    let descriptor = source.0.describe().unwrap();
    let container = bench.qemu.prepare(&descriptor, &bench.path("b"), 8 << 30);
    let container = Guard(container.unwrap_or_else(|error| panic!("{error:?}")));
    source.0.prepare_to_save().unwrap();
    source.0.pause().unwrap();
    let mut state = Vec::new();
    source.0.save_device_state(64 << 20, &mut state).unwrap();
    (source, state, container)
}

fn runs_before_its_pages_are_here(accel: Accel) {
    let bench = Bench::new();
    let (source, state, destination) = halfway(&bench, accel, 96 << 20);
    let (dir, pid) = (bench.path("b"), destination.0.handle().pid);
    assert_eq!(destination.0.post_copy_obstacles().unwrap(), []);
    assert_eq!(open_userfaultfds(pid), 0);
    let missing = destination.0.miss_pages().unwrap();
    let from = source.0.ram().unwrap();
    let server = Server::start(Arc::clone(&from), Arc::clone(&missing));
    destination.0.load_device_state(&mut &state[..]).unwrap();
    destination.0.resume().unwrap();
    // The first one was begun at the source.
    wait_for("a whole sweep on faults alone", 60, || sweeps(&dir) >= 2);
    let pushed = push(&*from, &*missing);
    assert_eq!(push(&*from, &*missing), 0, "all pages are there");
    let before = sweeps(&dir);
    wait_for("more sweeps", 60, || sweeps(&dir) >= before + 2);
    let times = server.end();
    assert!(times.len() >= SWEPT.len(), "{} faults", times.len());
    assert!(pushed >= 24576 - times.len() as u64, "{pushed} pushed");
    missing.finish().unwrap();
    missing.finish().unwrap();
    assert_eq!(open_userfaultfds(pid), 0, "left in QEMU");
    assert!(!dir.join("missing.json").exists());

    destination.0.pause().unwrap();
    assert_no_page_was_lost(&*destination.0.ram().unwrap());
    let (ours, theirs) = (memory(&*source.0), memory(&*destination.0));
    let is_other = |page: &usize| {
        let bytes = page * PAGE..(page + 1) * PAGE;
        !SWEPT.contains(page) && ours[0][bytes.clone()] != theirs[0][bytes]
    };
    let others: Vec<usize> = (0..ours[0].len() / PAGE).filter(is_other).collect();
    // With KVM, loading the state makes QEMU patch its own option ROM in guest memory (`kvmvapic`).
    let patched = if accel == Accel::Tcg { 0 } else { 4 };
    assert!(others.len() <= patched, "{others:?}");
    // What was missing once can be followed as any VM.
    destination.0.resume().unwrap();
    assert_eq!(destination.0.obstacles().unwrap(), []);
}

#[test]
fn a_vm_runs_before_its_pages_are_here_under_tcg() {
    runs_before_its_pages_are_here(Accel::Tcg);
}

#[test]
fn a_vm_runs_before_its_pages_are_here_under_kvm() {
    if !kvm_opens() {
        eprintln!("skipped: /dev/kvm does not open here");
        return;
    }
    runs_before_its_pages_are_here(Accel::Kvm);
}

#[test]
fn pages_are_placed_once_and_bounds_are_kept() {
    let bench = Bench::new();
    let machine = bench.machine(Accel::Tcg, vec![64 << 20]);
    let source = Guard(bench.qemu.spawn(&machine, &bench.path("a")).unwrap());
    let descriptor = source.0.describe().unwrap();
    let container = bench
        .qemu
        .prepare(&descriptor, &bench.path("b"), 8 << 30)
        .unwrap();
    let vm = Guard(container);
    let (ram, missing) = (vm.0.ram().unwrap(), vm.0.miss_pages().unwrap());
    let page_of = |page: u64| {
        let mut bytes = [0; PAGE];
        ram.read(0, page * 4096, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "torn");
        bytes[0]
    };
    ram.write(0, 102 * 4096, &[7; PAGE]).unwrap();
    assert_eq!(missing.place(0, 102, &[8; PAGE]).unwrap(), 0);
    assert_eq!(missing.place(0, 100, &[9; 5 * PAGE]).unwrap(), 4);
    assert_eq!(missing.place_zero(0, 99..106).unwrap(), 2);
    let bytes: Vec<u8> = (99..106).map(page_of).collect();
    assert_eq!(bytes, [0, 9, 9, 7, 9, 9, 0]);
    assert_eq!(missing.place(0, 5, &[]).unwrap(), 0);
    // A page that is given back is missing again.
    ram.discard(0, 101 * 4096..102 * 4096).unwrap();
    assert_eq!(missing.place(0, 101, &[1; PAGE]).unwrap(), 1);

    let last = (64 << 20) / 4096 - 1;
    assert_eq!(missing.place(0, last, &[1; PAGE]).unwrap(), 1);
    assert!(missing.place(0, last, &[1; 2 * PAGE]).is_err());
    assert!(missing.place(0, u64::MAX, &[1; PAGE]).is_err());
    assert!(missing.place(0, 0, &[1; 100]).is_err());
    assert!(missing.place(1, 0, &[1; PAGE]).is_err());
    assert!(missing.place_zero(0, 0..u64::MAX).is_err());
    let mut touched = 0;
    let began = Instant::now();
    missing
        .wait_faults(Duration::from_millis(30), &mut |_, _| touched += 1)
        .unwrap();
    assert_eq!(touched, 0);
    assert!(began.elapsed() >= Duration::from_millis(30));
    vm.0.terminate().unwrap();
    let gone = missing.wait_faults(Duration::from_secs(5), &mut |_, _| ());
    assert!(gone.unwrap_err().is_process_gone());
    assert!(
        missing
            .place(0, 7, &[1; PAGE])
            .unwrap_err()
            .is_process_gone()
    );
    assert!(missing.finish().unwrap_err().is_process_gone());
}

/// The firmware lets QEMU read the disk into pages that are missing: there the kernel waits on QEMU's behalf. QEMU has no
/// privileges, so that only the device makes a descriptor with which it does.
#[test]
fn the_kernel_waits_for_pages_on_behalf_of_a_qemu_without_privileges() {
    let bench = Bench::new();
    let (qmp, console) = (bench.path("run/qmp"), bench.path("run/console.log"));
    let run = bench.path("run");
    std::fs::create_dir(&run).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&run, open).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(bench.dir.path(), open).unwrap();
    let child = Command::new(QEMU)
        .args(["-M", "q35,memory-backend=mem", "-m", "96", "-nodefaults"])
        .args(["-accel", "tcg", "-display", "none", "-S", "-sandbox"])
        .arg("on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
        .args(["-object", "memory-backend-memfd,id=mem,size=96M,share=on"])
        .arg("-drive")
        .arg(format!(
            "if=none,id=d,format=raw,file={},readonly=on",
            bench.path("dirty_loop.img").display()
        ))
        .args(["-device", "virtio-blk-pci,drive=d", "-serial"])
        .arg(format!("file:{}", console.display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", qmp.display()))
        .stdin(Stdio::null())
        .uid(65534)
        .gid(65534)
        .spawn()
        .unwrap();
    wait_for("the socket", 20, || listens(&qmp));
    let vm = bench.qemu.adopt(child.id(), &qmp, &bench.path("a"));
    let vm = Guard(vm.unwrap());
    drop(child);
    assert_eq!(vm.0.post_copy_obstacles().unwrap(), []);
    let missing = vm.0.miss_pages().unwrap();
    assert_eq!(open_userfaultfds(vm.0.handle().pid), 1, "only the one");
    // Fresh memory: what is a hole there is zeros.
    let server = Server::start(vm.0.ram().unwrap(), missing);
    vm.0.resume().unwrap();
    wait_for("the first sweep", 60, || sweeps(&run) >= 2);
    assert!(server.end().len() > SWEPT.len());
}

#[test]
fn huge_pages_are_an_obstacle() {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = text
        .lines()
        .find_map(|line| line.strip_prefix("HugePages_Free:"))
        .and_then(|rest| rest.trim().parse::<u64>().ok());
    if free.unwrap_or(0) < 16 {
        eprintln!("skipped: fewer than 16 huge pages of 2 MiB are free");
        return;
    }
    let bench = Bench::new();
    let qmp = bench.path("qmp");
    let child = Command::new(QEMU)
        .args(["-M", "q35,memory-backend=mem", "-m", "32", "-nodefaults"])
        .args(["-accel", "tcg", "-display", "none", "-S", "-object"])
        .arg("memory-backend-memfd,id=mem,size=32M,share=on,hugetlb=on,hugetlbsize=2M")
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", qmp.display()))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the socket", 20, || listens(&qmp));
    let vm = bench.qemu.adopt(child.id(), &qmp, &bench.path("a"));
    let vm = Guard(vm.unwrap());
    drop(child);
    let obstacles = vm.0.post_copy_obstacles().unwrap();
    assert_eq!(obstacles.len(), 1, "{obstacles:?}");
    assert_eq!(obstacles[0].code, "post-copy-huge-pages");
    assert!(vm.0.miss_pages().is_err());
}

const SERVED: &str = "PALANQUIN_TEST_SERVED";

/// Only where the next test runs it: an agent that serves a VM for a while, and then no more.
#[test]
fn another_process_serves_until_it_is_killed() {
    let Ok(dir) = std::env::var(SERVED) else {
        return;
    };
    let dir = Path::new(&dir);
    let handle = std::fs::read(dir.join("handle")).unwrap();
    let handle: Handle = serde_json::from_slice(&handle).unwrap();
    let qemu = Qemu::new(QEMU.into(), Vec::new());
    let vm = qemu.attach(&handle, &dir.join("b")).unwrap();
    let missing = vm.miss_pages().unwrap();
    let memory = std::fs::read(dir.join("memory")).unwrap();
    let state = std::fs::read(dir.join("state")).unwrap();
    let loads = std::thread::spawn(move || {
        vm.load_device_state(&mut &state[..]).unwrap();
        vm.resume().unwrap();
    });
    let mut served = BTreeSet::new();
    while served.len() < 3000 {
        let mut touched = Vec::new();
        missing
            .wait_faults(Duration::from_secs(20), &mut |_, page| touched.push(page))
            .unwrap();
        for page in touched {
            let at = usize::try_from(page).unwrap() * PAGE;
            missing.place(0, page, &memory[at..at + PAGE]).unwrap();
            served.insert(page);
        }
    }
    loads.join().unwrap();
    // Taken from the descriptor, and never answered.
    missing
        .wait_faults(Duration::from_secs(20), &mut |_, _| ())
        .unwrap();
    println!("\nserved");
    let _ = std::io::stdin().read_line(&mut String::new());
}

fn survives_the_agent(accel: Accel) {
    let bench = Bench::new();
    let (source, state, mut container) = halfway(&bench, accel, 96 << 20);
    let (dir, handle) = (bench.path("b"), container.0.handle());
    // The monitor serves one client at a time: the next one connects when it is first used.
    container.0 = bench.qemu.attach(&handle, &dir).unwrap();
    let from = source.0.ram().unwrap();
    let mut memory = vec![0; 96 << 20];
    from.read(0, 0, &mut memory).unwrap();
    std::fs::write(bench.path("memory"), memory).unwrap();
    std::fs::write(bench.path("state"), state).unwrap();
    let bytes = serde_json::to_vec(&handle).unwrap();
    std::fs::write(bench.path("handle"), bytes).unwrap();
    let mut serving = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "missing::another_process_serves_until_it_is_killed",
            "--nocapture",
        ])
        .env(SERVED, bench.dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(serving.stdout.take().unwrap());
    let served = output
        .lines()
        .map_while(Result::ok)
        .any(|line| line == "served");
    serving.kill().unwrap();
    serving.wait().unwrap();
    assert!(served, "the other process did not serve");

    // The guest stands still at a page that is not there.
    let present = || data_pages(&*container.0);
    let before = (sweeps(&dir), present());
    assert!(!container.0.wait_ended(Duration::from_millis(300)));
    assert_eq!((sweeps(&dir), present()), before);
    let before = before.0;

    // QEMU need not answer for it to go on.
    let mut mute = handle.clone();
    mute.qmp = bench.path("nobody-listens");
    let returned = bench.qemu.attach(&mute, &dir).unwrap();
    let missing = returned.miss_pages().unwrap();
    assert_eq!(open_userfaultfds(handle.pid), 1, "the one that was there");
    let server = Server::start(Arc::clone(&from), Arc::clone(&missing));
    wait_for("another sweep", 60, || sweeps(&dir) > before);
    push(&*from, &*missing);
    server.end();
    missing.finish().unwrap();
    assert_eq!(open_userfaultfds(handle.pid), 0);
    let before = sweeps(&dir);
    wait_for("more sweeps", 60, || sweeps(&dir) >= before + 2);
    assert_eq!(container.0.run_state().unwrap(), RunState::Running);
    container.0.pause().unwrap();
    assert_no_page_was_lost(&*container.0.ram().unwrap());
}

#[test]
fn a_vm_outlives_the_agent_that_served_it_and_sees_no_zeros_under_tcg() {
    survives_the_agent(Accel::Tcg);
}

#[test]
fn a_vm_outlives_the_agent_that_served_it_and_sees_no_zeros_under_kvm() {
    if !kvm_opens() {
        eprintln!("skipped: /dev/kvm does not open here");
        return;
    }
    survives_the_agent(Accel::Kvm);
}
