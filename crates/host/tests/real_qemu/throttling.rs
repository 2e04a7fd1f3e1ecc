//! Virtual CPUs that get less processor time.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use palanquin_host::vm::{Accel, Hypervisor, Vm};

use crate::bench::{Bench, Guard, sweeps, wait_for};

fn threads(pid: u32) -> Vec<PathBuf> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.flatten().map(|task| task.path()).collect()
}

/// Processor time of all threads, from the scheduler, which counts nanoseconds.
fn used(pid: u32) -> Duration {
    let of = |task: &PathBuf| {
        let text = std::fs::read_to_string(task.join("schedstat")).unwrap_or_default();
        let first = text.split_ascii_whitespace().next();
        first.and_then(|ns| ns.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(threads(pid).iter().map(of).sum())
}

/// How many processors the VM uses, over about a second.
fn usage(vm: &dyn Vm) -> f64 {
    let pid = vm.handle().pid;
    let (began, before) = (Instant::now(), used(pid));
    assert!(!vm.wait_ended(Duration::from_millis(1000)));
    let used = used(pid).checked_sub(before).unwrap();
    used.as_secs_f64() / began.elapsed().as_secs_f64()
}

fn groups(pid: u32) -> Vec<String> {
    let of = |task: &PathBuf| std::fs::read_to_string(task.join("cgroup")).unwrap_or_default();
    threads(pid).iter().map(of).collect()
}

fn has_group_of_ours(dir: &Path, pid: u32) -> bool {
    let name = format!("palanquin-throttle-{pid}");
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .any(|entry| entry.file_name() == *name || has_group_of_ours(&entry.path(), pid))
}

fn is_free(vm: &dyn Vm) -> bool {
    let pid = vm.handle().pid;
    !has_group_of_ours(Path::new("/sys/fs/cgroup"), pid)
        && !groups(pid)
            .iter()
            .any(|group| group.contains("palanquin-throttle"))
}

#[test]
fn the_virtual_cpus_get_their_share_and_then_all_again() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    let pid = vm.0.handle().pid;
    let before = groups(pid);
    let mut throttle = vm.0.throttle().unwrap();
    assert!(is_free(&*vm.0), "nothing is limited before it is said");
    for odd in [0.0, -1.0, 1.01, f64::NAN, f64::INFINITY] {
        assert!(throttle.set(odd).is_err(), "{odd}");
    }
    // Other tests may use the processors too: it gets no more, and perhaps less.
    for share in [0.4, 0.1, 0.02] {
        throttle.set(share).unwrap();
        let used = usage(&*vm.0);
        eprintln!("share {share}: used {used:.3}");
        assert!(used < share * 1.3 + 0.03, "{used} processors of {share}");
        assert!(used > share * 0.2, "{used} processors of {share}");
    }
    let limited = groups(pid)
        .iter()
        .filter(|g| g.contains("palanquin-throttle"))
        .count();
    assert_eq!(limited, 1, "the virtual CPU alone");
    assert!(vm.0.run_state().is_ok());
    throttle.set(1.0).unwrap();
    assert!(is_free(&*vm.0));
    wait_for("all processor time", 20, || usage(&*vm.0) > 0.45);
    throttle.set(0.1).unwrap();
    assert!(!is_free(&*vm.0));
    drop(throttle);
    assert!(is_free(&*vm.0));
    assert_eq!(groups(pid).first(), before.first());
    wait_for("all processor time", 20, || usage(&*vm.0) > 0.45);
}

#[test]
fn a_throttle_leaves_nothing_behind_when_the_vm_has_ended() {
    let bench = Bench::new();
    let machine = bench.machine(Accel::Tcg, vec![64 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &bench.path("a")).unwrap());
    let pid = vm.0.handle().pid;
    let mut throttle = vm.0.throttle().unwrap();
    throttle.set(0.5).unwrap();
    vm.0.terminate().unwrap();
    assert!(throttle.set(0.2).unwrap_err().is_process_gone());
    drop(throttle);
    assert!(!has_group_of_ours(Path::new("/sys/fs/cgroup"), pid));
}

#[test]
fn a_throttle_that_an_agent_left_is_lifted_by_the_next() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let mut machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    machine.cpus = 2;
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    let handle = vm.0.handle();
    let abandon = || {
        let mut throttle = vm.0.throttle().unwrap();
        throttle.set(0.1).unwrap();
        // As when the agent dies.
        std::mem::forget(throttle);
        assert!(!is_free(&*vm.0));
    };
    abandon();
    let limited = groups(handle.pid);
    assert_eq!(
        limited
            .iter()
            .filter(|g| g.contains("palanquin-throttle"))
            .count(),
        2
    );
    let again = bench.qemu.attach(&handle, &dir).unwrap();
    assert!(is_free(&*again));
    abandon();
    vm.0.terminate().unwrap();
    assert!(has_group_of_ours(Path::new("/sys/fs/cgroup"), handle.pid));
    assert!(bench.qemu.attach(&handle, &dir).is_err());
    assert!(!has_group_of_ours(Path::new("/sys/fs/cgroup"), handle.pid));
}
