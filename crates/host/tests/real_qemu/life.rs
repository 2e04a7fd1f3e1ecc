//! How QEMUs begin, are found, and end.

use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use palanquin_host::vm::{Accel, Hypervisor, RunState};

use crate::bench::{Bench, Guard, QEMU, listens, sweeps, wait_for};

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
        vm.0.save_device_state(64 << 20, &mut io::sink()).unwrap();
        vm.0.resume().unwrap();
    }
    let before = sweeps(&dir);
    wait_for("more sweeps", 60, || sweeps(&dir) > before + 1);
    vm.0.pause().unwrap();
    let saved = vm.0.save_device_state(1000, &mut io::sink());
    assert!(saved.is_err(), "the limit holds");
    vm.0.resume().unwrap();
    let before = sweeps(&dir);
    wait_for("more sweeps", 60, || sweeps(&dir) > before + 1);
}

fn runs_on(vm: &Guard, dir: &Path) {
    assert_eq!(vm.0.run_state().unwrap(), RunState::Running);
    let before = sweeps(dir);
    wait_for("more sweeps", 60, || sweeps(dir) > before + 1);
}

#[test]
fn most_of_the_state_is_saved_while_the_vm_runs_and_it_resumes_after_all_or_a_part_of_it() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    for save_all in [true, false, true] {
        vm.0.prepare_to_save().unwrap();
        let mut state = Vec::new();
        let began = Instant::now();
        let paused_for = vm.0.pause_to_save(64 << 20, &mut state).unwrap();
        assert!(paused_for <= began.elapsed());
        assert_eq!(vm.0.run_state().unwrap(), RunState::Paused);
        let early = state.len();
        assert!(early > 100 << 10, "firmware is large");
        if save_all {
            vm.0.save_device_state(64 << 20, &mut state).unwrap();
            assert!(state.len() > early);
            assert_eq!(vm.0.run_state().unwrap(), RunState::Paused);
        }
        vm.0.stop_saving().unwrap();
        vm.0.resume().unwrap();
        vm.0.settle();
        runs_on(&vm, &dir);
    }
    vm.0.prepare_to_save().unwrap();
    let saved = vm.0.pause_to_save(1000, &mut io::sink());
    assert!(saved.is_err(), "the limit holds before the pause too");
    vm.0.stop_saving().unwrap();
    runs_on(&vm, &dir);
    vm.0.stop_saving().unwrap();
    runs_on(&vm, &dir);
}

#[test]
fn a_vm_runs_on_however_far_saving_it_had_come_when_it_was_given_up() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    // Gives up when it is given that many bytes: QEMU is at all stages of pausing the VM when it hears of it.
    struct Until(usize);
    impl io::Write for Until {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self
                .0
                .checked_sub(bytes.len())
                .ok_or(io::ErrorKind::Other)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    vm.0.prepare_to_save().unwrap();
    let mut whole = Vec::new();
    vm.0.pause_to_save(64 << 20, &mut whole).unwrap();
    vm.0.stop_saving().unwrap();
    vm.0.resume().unwrap();
    for nth in 0..60 {
        vm.0.prepare_to_save().unwrap();
        let bytes = if nth % 3 == 0 {
            whole.len() * nth / 60
        } else {
            whole.len() - 1
        };
        let given_up = vm.0.pause_to_save(64 << 20, &mut Until(bytes));
        vm.0.stop_saving().unwrap();
        if given_up.is_ok() {
            // All of it had come, and QEMU had stopped before.
            vm.0.resume().unwrap();
        }
        assert_eq!(vm.0.run_state().unwrap(), RunState::Running, "time {nth}");
    }
    runs_on(&vm, &dir);
}

#[test]
fn another_agent_takes_back_a_vm_that_was_paused_to_be_saved() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let first = bench.qemu.spawn(&machine, &dir).unwrap();
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    first.prepare_to_save().unwrap();
    first.pause_to_save(64 << 20, &mut io::sink()).unwrap();
    let handle = first.handle();
    drop(first);
    let second = Guard(bench.qemu.attach(&handle, &dir).unwrap());
    assert_eq!(second.0.run_state().unwrap(), RunState::Paused);
    second.0.stop_saving().unwrap();
    second.0.resume().unwrap();
    runs_on(&second, &dir);
}

#[test]
fn a_vm_that_was_paused_before_is_saved_and_stays_paused() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![96 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    vm.0.pause().unwrap();
    vm.0.prepare_to_save().unwrap();
    vm.0.pause_to_save(64 << 20, &mut io::sink()).unwrap();
    vm.0.save_device_state(64 << 20, &mut io::sink()).unwrap();
    vm.0.stop_saving().unwrap();
    assert_eq!(vm.0.run_state().unwrap(), RunState::Paused);
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
    wait_for("the socket", 20, || listens(&qmp));
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
    wait_for("the socket", 20, || listens(&qmp));
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

#[test]
fn a_stray_qemu_is_swept_out_of_its_directory_and_others_are_not() {
    let bench = Bench::new();
    let machine = bench.machine(Accel::Tcg, vec![64 << 20]);
    let stray = Guard(bench.qemu.spawn(&machine, &bench.path("a")).unwrap());
    let other = Guard(bench.qemu.spawn(&machine, &bench.path("b")).unwrap());
    bench.qemu.sweep(&bench.path("a")).unwrap();
    assert!(stray.0.wait_ended(std::time::Duration::ZERO));
    assert!(!other.0.wait_ended(std::time::Duration::ZERO));
    bench.qemu.sweep(&bench.path("a")).unwrap();
    bench.qemu.sweep(&bench.path("never-there")).unwrap();
}

#[test]
fn a_qemu_that_hangs_is_ended_all_the_same() {
    let bench = Bench::new();
    let machine = bench.machine(Accel::Tcg, vec![64 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &bench.path("a")).unwrap());
    let pid = vm.0.handle().pid.to_string();
    assert!(
        Command::new("kill")
            .args(["-STOP", &pid])
            .status()
            .unwrap()
            .success()
    );
    let began = Instant::now();
    vm.0.terminate().unwrap();
    assert!(vm.0.wait_ended(std::time::Duration::ZERO));
    assert!(began.elapsed() < std::time::Duration::from_secs(6));
}

#[test]
fn a_qemu_is_alone_in_its_session_and_its_directory_is_private() {
    let bench = Bench::new();
    let dir = bench.path("a");
    std::fs::create_dir(&dir).unwrap();
    let machine = bench.machine(Accel::Tcg, vec![64 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    let pid = vm.0.handle().pid;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_ascii_whitespace()
        .nth(3);
    assert_eq!(session, Some(pid.to_string().as_str()));
    let mode = std::fs::metadata(&dir).unwrap().permissions();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777,
        0o700
    );
}

#[test]
fn a_vm_whose_memory_another_process_maps_is_named() {
    let bench = Bench::new();
    let machine = bench.machine(Accel::Tcg, vec![64 << 20]);
    let vm = Guard(bench.qemu.spawn(&machine, &bench.path("a")).unwrap());
    let fds = std::fs::read_dir(format!("/proc/{}/fd", vm.0.handle().pid)).unwrap();
    let memory = fds
        .flatten()
        .map(|fd| fd.path())
        .find(|fd| {
            std::fs::read_link(fd).is_ok_and(|l| l.to_string_lossy().contains("memory-backend"))
        })
        .unwrap();
    let script = format!(
        "import mmap,sys; f=open({:?},'r+b'); m=mmap.mmap(f.fileno(),4096); print('mapped',flush=True); \
         sys.stdin.read()",
        memory.display().to_string()
    );
    let mut other = Command::new("python3")
        .args(["-c", &script])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let output = io::BufReader::new(other.stdout.take().unwrap());
    io::BufRead::read_line(&mut { output }, &mut line).unwrap();
    let codes: Vec<String> =
        vm.0.obstacles()
            .unwrap()
            .into_iter()
            .map(|o| o.code)
            .collect();
    drop(other.stdin.take());
    other.wait().unwrap();
    assert_eq!(codes, ["ram-shared"]);
    assert_eq!(vm.0.obstacles().unwrap(), []);
}

#[test]
fn a_disk_that_is_read_past_the_page_cache_is_named() {
    let bench = Bench::new();
    let (dir, qmp) = (bench.path("a"), bench.path("qmp"));
    let image = bench.path("dirty_loop.img");
    let child = Command::new(QEMU)
        .args(["-M", "q35,memory-backend=mem", "-m", "64", "-nodefaults"])
        .args(["-accel", "tcg", "-display", "none"])
        .args(["-object", "memory-backend-memfd,id=mem,size=64M,share=on"])
        .arg("-drive")
        .arg(format!(
            "if=none,id=d,format=raw,file={},cache=none",
            image.display()
        ))
        .args(["-device", "ide-hd,drive=d", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", qmp.display()))
        .stdin(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the socket", 20, || listens(&qmp));
    let vm = Guard(bench.qemu.adopt(child.id(), &qmp, &dir).unwrap());
    drop(child);
    let found = vm.0.obstacles().unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].code, "disk-direct-io");
    assert!(found[0].message.contains("dirty_loop.img"), "{found:?}");
}
