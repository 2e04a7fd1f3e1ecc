//! How long the steps take. `cargo test -p palanquin-host --release --test real_qemu -- --ignored --nocapture`

use std::time::{Duration, Instant};

use palanquin_host::vm::{Accel, Hypervisor};

use crate::bench::{Bench, Guard, copy, data_pages, sweeps, wait_for};
use crate::missing::{Server, halfway};

const MIB: u64 = 1 << 20;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn timed<T>(times: &mut Vec<Duration>, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let result = work();
    times.push(began.elapsed());
    result
}

#[test]
#[ignore = "a measurement"]
fn injection_scan_and_copy() {
    let bench = Bench::new();
    let dir = bench.path("a");
    let machine = bench.machine(Accel::Tcg, vec![1536 * MIB]);
    let vm = Guard(bench.qemu.spawn(&machine, &dir).unwrap());
    wait_for("the first sweep", 60, || sweeps(&dir) >= 1);
    let ram = vm.0.ram().unwrap();
    let block = vec![0x5a; MIB as usize];
    let mut write = Vec::new();
    timed(&mut write, || {
        for at in 128..1152 {
            ram.write(0, at * MIB, &block).unwrap();
        }
    });
    let mut rewrite = Vec::new();
    timed(&mut rewrite, || {
        for at in 128..1152 {
            ram.write(0, at * MIB, &block).unwrap();
        }
    });
    let mut buffer = vec![0; MIB as usize];
    let mut read = Vec::new();
    timed(&mut read, || {
        for at in 128..1152 {
            ram.read(0, at * MIB, &mut buffer).unwrap();
        }
    });
    let rate = |time: &[Duration]| 1.074 / time[0].as_secs_f64();
    println!(
        "1 GiB in 1 MiB blocks: first write {:.2} GB/s, write again {:.2} GB/s, read {:.2} GB/s",
        rate(&write),
        rate(&rewrite),
        rate(&read)
    );
    let (mut start, mut first, mut again, mut pages) = (vec![], vec![], vec![], 0);
    for _ in 0..21 {
        let mut tracker = timed(&mut start, || vm.0.track_writes().unwrap());
        timed(&mut first, || tracker.collect(&mut |_, _| {}).unwrap());
        for _ in 0..5 {
            timed(&mut again, || {
                tracker
                    .collect(&mut |_, found| pages += found.end - found.start)
                    .unwrap();
            });
        }
    }
    println!(
        "1.5 GiB: tracking starts in {:?}, first collection {:?}, later ones {:?} ({} pages each)",
        median(start),
        median(first),
        median(again.clone()),
        pages / again.len() as u64
    );
}

#[test]
#[ignore = "a measurement"]
fn pause_save_load_resume() {
    for accel in [Accel::Tcg, Accel::Auto] {
        let (mut pause, mut save, mut load, mut resume) = (vec![], vec![], vec![], vec![]);
        let (mut size, mut prepare) = (0, vec![]);
        for _ in 0..7 {
            let bench = Bench::new();
            let (from, to) = (bench.path("a"), bench.path("b"));
            let machine = bench.machine(accel, vec![128 * MIB]);
            let source = Guard(bench.qemu.spawn(&machine, &from).unwrap());
            wait_for("the first sweep", 60, || sweeps(&from) >= 1);
            let descriptor = source.0.describe().unwrap();
            let container = timed(&mut prepare, || {
                bench.qemu.prepare(&descriptor, &to, 8 << 30)
            });
            let destination = Guard(container.unwrap_or_else(|error| panic!("{error:?}")));
            source.0.prepare_to_save().unwrap();
            let mut state = Vec::new();
            pause.push(source.0.pause_to_save(64 * MIB, &mut state).unwrap());
            timed(&mut save, || {
                source.0.save_device_state(64 * MIB, &mut state).unwrap();
            });
            size = state.len();
            copy(&*source.0, &*destination.0, &data_pages(&*source.0));
            timed(&mut load, || {
                destination.0.load_device_state(&mut &state[..]).unwrap();
            });
            timed(&mut resume, || destination.0.resume().unwrap());
        }
        println!(
            "{accel:?}: pause {:?}, save {:?} ({size} bytes), load {:?}, resume {:?}; a container is ready in {:?}",
            median(pause),
            median(save),
            median(load),
            median(resume),
            median(prepare)
        );
    }
}

#[test]
#[ignore = "a measurement"]
fn missing_pages() {
    for accel in [Accel::Tcg, Accel::Auto] {
        let bench = Bench::new();
        let (source, state, destination) = halfway(&bench, accel, 96 * MIB);
        let dir = bench.path("b");
        let mut start = Vec::new();
        let missing = timed(&mut start, || destination.0.miss_pages().unwrap());
        let server = Server::start(source.0.ram().unwrap(), missing);
        destination.0.load_device_state(&mut &state[..]).unwrap();
        let began = Instant::now();
        destination.0.resume().unwrap();
        wait_for("two sweeps", 60, || sweeps(&dir) >= 2);
        let ran = began.elapsed();
        let times = server.end();
        let faults = u32::try_from(times.len()).unwrap();
        println!(
            "{accel:?}: misses pages after {:?}; {faults} faults, each read and placed in {:?}; the guest lost at most {:?} \
             with each",
            start[0],
            median(times),
            ran / faults,
        );
    }
    let bench = Bench::new();
    let machine = bench.machine(Accel::Tcg, vec![1536 * MIB]);
    let source = Guard(bench.qemu.spawn(&machine, &bench.path("a")).unwrap());
    let descriptor = source.0.describe().unwrap();
    // The first one takes memory that the machine may not have had yet.
    for pages in [256, 1, 16, 256] {
        let container = bench.qemu.prepare(&descriptor, &bench.path("b"), 8 << 30);
        let vm = Guard(container.unwrap_or_else(|error| panic!("{error:?}")));
        let missing = vm.0.miss_pages().unwrap();
        let block = vec![0x5a; pages * 4096];
        let (mut place, mut again, mut zero) = (vec![], vec![], vec![]);
        let blocks = (128 << 8..1152 << 8).step_by(pages);
        timed(&mut place, || {
            blocks.clone().for_each(|page| {
                missing.place(0, page, &block).unwrap();
            });
        });
        timed(&mut again, || {
            blocks.for_each(|page| {
                missing.place(0, page, &block).unwrap();
            });
        });
        timed(&mut zero, || missing.place_zero(0, 0..128 << 8).unwrap());
        let rate = |bytes: u64, time: &[Duration]| bytes as f64 / 1e9 / time[0].as_secs_f64();
        println!(
            "{pages} pages at once: placed {:.2} GB/s, found there already {:.2} GB/s; zeros {:.2} GB/s",
            rate(1 << 30, &place),
            rate(1 << 30, &again),
            rate(128 << 20, &zero)
        );
    }
}
