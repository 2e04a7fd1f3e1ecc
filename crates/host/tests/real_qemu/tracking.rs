//! System calls inside QEMU, and the writes that they make visible.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use palanquin_host::qemu::Qemu;
use palanquin_host::vm::{Accel, Hypervisor, Vm, WriteTracker};

use crate::bench::{Bench, Guard, QEMU, listens, sweeps, wait_for};

fn written(tracker: &mut dyn WriteTracker) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    tracker
        .collect(&mut |_, found| pages.extend(found))
        .unwrap();
    pages
}

/// What the boot sector rewrites: 1 MiB to 64 MiB.
fn swept() -> BTreeSet<u64> {
    (256..16384).collect()
}

fn sees_a_whole_sweep(vm: &dyn Vm, sweeps: impl Fn() -> usize) {
    let mut tracker = vm.track_writes().unwrap();
    written(&mut *tracker);
    let before = sweeps();
    wait_for("two sweeps", 60, || sweeps() >= before + 2);
    assert!(
        written(&mut *tracker).is_superset(&swept()),
        "writes were missed"
    );
    vm.pause().unwrap();
    written(&mut *tracker);
    let quiet = written(&mut *tracker);
    assert!(quiet.is_empty(), "a paused VM wrote {quiet:?}");
    vm.resume().unwrap();
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
fn every_page_of_a_sweep_is_seen_and_none_of_a_paused_vm() {
    for accel in [Accel::Tcg, Accel::Auto] {
        let bench = Bench::new();
        let dir = bench.path("a");
        let machine = bench.machine(accel, vec![96 << 20]);
        let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
        wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
        sees_a_whole_sweep(&*vm.0, || sweeps(&dir));
    }
}

#[test]
fn a_peek_names_what_was_written_and_leaves_it_to_the_collection() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    let peeked = |tracker: &mut dyn WriteTracker| {
        let mut pages = BTreeSet::new();
        tracker.peek(&mut |_, found| pages.extend(found)).unwrap();
        pages
    };
    let mut tracker = vm.0.track_writes().unwrap();
    assert_eq!(peeked(&mut *tracker).len(), 24576);
    assert_eq!(
        written(&mut *tracker).len(),
        24576,
        "the first collection names every page after a peek too"
    );
    let before = sweeps(&dir);
    wait_for("two sweeps", 60, || sweeps(&dir) >= before + 2);
    vm.0.pause().unwrap();
    let peeks = [peeked(&mut *tracker), peeked(&mut *tracker)];
    assert!(peeks[0].is_superset(&swept()));
    assert_eq!(peeks[0], peeks[1]);
    assert_eq!(written(&mut *tracker), peeks[0]);
    assert!(peeked(&mut *tracker).is_empty(), "they were collected");
}

#[test]
fn a_page_that_was_written_and_then_discarded_is_seen() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    let mut tracker = vm.0.track_writes().unwrap();
    written(&mut *tracker);
    let before = sweeps(&dir);
    wait_for("two sweeps", 60, || sweeps(&dir) >= before + 2);
    vm.0.pause().unwrap();
    let ram = vm.0.ram().unwrap();
    // As a balloon does.
    ram.discard(0, 32 << 20..40 << 20).unwrap();
    assert!(written(&mut *tracker).is_superset(&swept()));
}

#[test]
fn nothing_is_written_outside_a_region() {
    let bench = Bench::new();
    let machine = bench.machine(Accel::Tcg, vec![64 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &bench.path("a")).unwrap());
    let ram = vm.0.ram().unwrap();
    assert!(ram.write(0, (64 << 20) - 10, &[0; 20]).is_err());
    assert!(ram.write(0, u64::MAX, &[0; 20]).is_err());
    assert!(ram.write(1, 0, &[0]).is_err());
    assert!(ram.read(0, (64 << 20) - 10, &mut [0; 20]).is_err());
}

/// A QEMU that somebody else started as another user.
#[test]
fn a_qemu_without_privileges_is_followed_too() {
    let bench = Bench::new();
    let (qmp, console) = (bench.path("run/qmp"), bench.path("run/console"));
    let run = bench.path("run");
    std::fs::create_dir(&run).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&run, open).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(bench.dir.path(), open).unwrap();
    let child = Command::new(QEMU)
        .args(["-M", "q35,memory-backend=mem", "-m", "96", "-nodefaults"])
        .args(["-accel", "tcg", "-display", "none", "-sandbox"])
        .arg("on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
        .args(["-object", "memory-backend-memfd,id=mem,size=96M,share=on"])
        .arg("-drive")
        .arg(format!(
            "if=none,id=d,format=raw,file={},readonly=on",
            bench.path("dirty_loop.img").display()
        ))
        .args(["-device", "ide-cd,drive=d", "-serial"])
        .arg(format!("file:{}", console.display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", qmp.display()))
        .stdin(Stdio::null())
        .uid(65534)
        .gid(65534)
        .spawn()
        .unwrap();
    wait_for("the socket", 20, || listens(&qmp));
    let vm = Guard(
        bench
            .qemu
            .adopt(child.id(), &qmp, &bench.path("a"))
            .unwrap(),
    );
    drop(child);
    assert_eq!(vm.0.obstacles().unwrap(), []);
    let mut tracker = vm.0.track_writes().unwrap();
    assert_eq!(written(&mut *tracker).len(), 24576);
    vm.0.ram().unwrap().write(0, 90 << 20, &[1]).unwrap();
    // It may not enter the VM's directory.
    vm.0.prepare_to_save().unwrap();
    vm.0.pause().unwrap();
    let mut state = Vec::new();
    vm.0.save_device_state(64 << 20, &mut state).unwrap();
    assert!(!state.is_empty());
    vm.0.resume().unwrap();
}

const TRACKED: &str = "PALANQUIN_TEST_TRACKED";

/// Only where the next test runs it: tracks the VM that it names, until it is killed.
#[test]
fn another_process_tracks_until_it_is_killed() {
    let Ok(tracked) = std::env::var(TRACKED) else {
        return;
    };
    let (pid, dir) = tracked.split_once(' ').unwrap();
    let dir = std::path::Path::new(dir);
    let qemu = Qemu::new(QEMU.into(), Vec::new());
    let vm = qemu.adopt(pid.parse().unwrap(), &dir.join("qmp"), dir);
    let mut tracker = vm.unwrap().track_writes().unwrap();
    tracker.collect(&mut |_, _| {}).unwrap();
    println!("\ntracking");
    let _ = std::io::stdin().read_line(&mut String::new());
}

/// In another process, because the kernel must end the tracking when that one is killed.
#[test]
fn the_vm_runs_on_when_its_tracker_is_killed_and_is_tracked_anew() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    // The monitor serves one client at a time: this one connects when it is first used.
    let handle = bench.qemu.spawn(&machine, &dir).unwrap().handle();
    let vm = Guard(bench.qemu.attach(&handle, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    let mut tracking = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "tracking::another_process_tracks_until_it_is_killed",
            "--nocapture",
        ])
        .env(TRACKED, format!("{} {}", handle.pid, dir.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(tracking.stdout.take().unwrap());
    let begins = output
        .lines()
        .map_while(Result::ok)
        .any(|line| line == "tracking");
    tracking.kill().unwrap();
    tracking.wait().unwrap();
    assert!(begins, "the other process did not track");
    let before = sweeps(&dir);
    wait_for("more sweeps", 60, || sweeps(&dir) >= before + 2);
    sees_a_whole_sweep(&*vm.0, || sweeps(&dir));
}
