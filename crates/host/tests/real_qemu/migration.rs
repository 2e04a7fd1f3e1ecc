//! A VM copied from outside, from one QEMU to another.

use std::io::{Cursor, Read};
use std::path::Path;
use std::time::Duration;

use palanquin_host::Error;
use palanquin_host::vm::{Accel, Hypervisor, RunState};

use crate::bench::{Bench, Guard, copy, data_pages, different_pages, listens, sweeps, wait_for};

fn migrate(accel: Accel, sizes: Vec<u64>) {
    let bench = Bench::new();
    let source_dir = bench.path("a");
    let source = Guard(
        bench
            .qemu
            .spawn(&bench.machine(accel, sizes), &source_dir)
            .unwrap(),
    );
    copy_over(&bench, &source, &source_dir);
}

fn copy_over(bench: &Bench, source: &Guard, source_dir: &Path) {
    let source = &*source.0;
    let destination_dir = bench.path("b");
    wait_for("the second sweep", 60, || sweeps(source_dir) >= 2);
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

    let mut state = Vec::new();
    source.pause_to_save(64 << 20, &mut state).unwrap();
    let mut last = Vec::new();
    tracker
        .collect(&mut |region, pages| last.push((region, pages)))
        .unwrap();
    copy(source, destination, &last);
    // Before the state is loaded: with KVM, loading it makes QEMU patch its own option ROM in guest memory
    // (`kvmvapic`), as every load of a QEMU with that device does.
    assert_eq!(different_pages(source, destination), [], "memory differs");
    // It is loaded while the rest of it is being saved.
    let (from, mut to) = std::io::pipe().unwrap();
    std::thread::scope(|scope| {
        let mut from = Cursor::new(state).chain(from);
        let loading = scope.spawn(move || destination.load_device_state(&mut from));
        source.save_device_state(64 << 20, &mut to).unwrap();
        drop(to);
        loading.join().unwrap().unwrap();
    });
    let mut late = Vec::new();
    tracker
        .collect(&mut |region, pages| late.push((region, pages)))
        .unwrap();
    assert_eq!(late, [], "saving the state wrote guest memory");
    source.settle();
    destination.settle();
    // Though it was saved as a VM that runs: nothing but `resume` may let it.
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
fn a_state_that_is_not_to_be_used_is_not_loaded() {
    let bench = Bench::new();
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let source = Guard(bench.qemu.spawn(&machine, &bench.path("a")).unwrap());
    let descriptor = source.0.describe().unwrap();
    let prepared = bench.qemu.prepare(&descriptor, &bench.path("b"), 8 << 30);
    let destination = Guard(prepared.unwrap_or_else(|error| panic!("{error:?}")));
    source.0.prepare_to_save().unwrap();
    source.0.pause().unwrap();
    let mut state = Vec::new();
    source.0.save_device_state(64 << 20, &mut state).unwrap();
    let half = Cursor::new(&state[..state.len() / 2]);
    let error = destination.0.load_device_state(&mut half.chain(Broken));
    let error = error.unwrap_err();
    assert!(matches!(error, Error::DeviceStateGiven(_)), "{error}");
    assert_ne!(destination.0.run_state().ok(), Some(RunState::Paused));
    source.0.resume().unwrap();
}

/// Gives nothing but errors.
struct Broken;

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::Error::other("it is another"))
    }
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

/// Needs huge pages: `echo 140 > /proc/sys/vm/nr_hugepages`.
#[test]
fn memory_in_huge_pages_is_copied() {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = text
        .lines()
        .find_map(|line| line.strip_prefix("HugePages_Free:"))
        .and_then(|rest| rest.trim().parse::<u64>().ok());
    if free.unwrap_or(0) < 96 {
        eprintln!("skipped: fewer than 96 huge pages of 2 MiB are free");
        return;
    }
    let bench = Bench::new();
    let (qmp, dir) = (bench.path("qmp"), bench.path("a"));
    std::fs::create_dir(&dir).unwrap();
    let child = std::process::Command::new(crate::bench::QEMU)
        .args(["-M", "q35,memory-backend=mem", "-m", "96", "-nodefaults"])
        .args(["-accel", "tcg", "-display", "none", "-object"])
        .arg("memory-backend-memfd,id=mem,size=96M,share=on,hugetlb=on,hugetlbsize=2M,prealloc=on")
        .arg("-drive")
        .arg(format!(
            "if=none,id=d,format=raw,file={},snapshot=on",
            bench.path("dirty_loop.img").display()
        ))
        .args(["-device", "ide-hd,drive=d", "-serial"])
        .arg(format!("file:{}", dir.join("console.log").display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", qmp.display()))
        .stdin(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the socket", 20, || listens(&qmp));
    let source = Guard(bench.qemu.adopt(child.id(), &qmp, &dir).unwrap());
    drop(child);
    copy_over(&bench, &source, &dir);
}
