//! Runs as the first process of a test guest: keeps memory busy, checks it, and tells how it is.
//!
//! Kernel command line: `palanquin.fill_mib=`, `palanquin.buffer_mib=`, `palanquin.dirty_mib_s=`,
//! `palanquin.canary=` (spaces as `%20`), `palanquin.ip=ADDRESS/PREFIX`.
#![forbid(unsafe_code)]

mod memory;
mod service;

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use memory::{Buffer, Fill, Random};

/// What the guest tells of itself.
#[derive(Default)]
struct Status {
    boot_id: u64,
    beats: AtomicU64,
    sweeps: AtomicU64,
    verified: AtomicU64,
    corrupt: AtomicU64,
}

fn main() {
    let _ = fs::create_dir_all("/proc");
    run("mount", &["-t", "proc", "proc", "/proc"]);
    run("mount", &["-t", "sysfs", "sys", "/sys"]);
    let options = options(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    let number = |key: &str| {
        options
            .get(key)
            .and_then(|v| v.parse::<usize>().ok())
            .unwrap_or(0)
    };
    load_modules();
    if let Some(ip) = options.get("ip") {
        run("ip", &["link", "set", "lo", "up"]);
        run("ip", &["link", "set", "eth0", "up"]);
        run("ip", &["addr", "add", ip, "dev", "eth0"]);
    }
    let seed = fs::read("/proc/sys/kernel/random/uuid")
        .unwrap_or_default()
        .iter()
        .fold(7_u64, |seed, byte| {
            seed.wrapping_mul(31).wrapping_add(u64::from(*byte))
        });
    let status = Arc::new(Status {
        boot_id: seed,
        ..Status::default()
    });
    let canaries = canaries(options.get("canary").map_or("", String::as_str));
    let fill = Fill::new(number("fill_mib"), seed);
    let buffer = Buffer::new(number("buffer_mib").max(1));
    service::start(&status);
    println!("palanquin-workload ready boot_id={seed:016x}");
    let rate = number("dirty_mib_s");
    let busy = Arc::clone(&status);
    thread::spawn(move || work(&busy, buffer, &fill, rate));
    beat(&status, &canaries);
}

fn options(line: &str) -> HashMap<String, String> {
    line.split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("palanquin.")?.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.replace("%20", " ")))
        .collect()
}

fn run(program: &str, arguments: &[&str]) {
    if let Err(error) = Command::new("/bin/busybox")
        .arg(program)
        .args(arguments)
        .status()
    {
        println!("{program}: {error}");
    }
}

/// The drivers of the network card, in the order the build wrote down.
fn load_modules() {
    let order = fs::read_to_string("/modules/order").unwrap_or_default();
    for module in order.lines() {
        run("insmod", &[&format!("/modules/{module}")]);
    }
}

/// Many copies of the sentence, in ASCII and UTF-16.
fn canaries(sentence: &str) -> Vec<Vec<u8>> {
    let wide: Vec<u8> = sentence.encode_utf16().flat_map(u16::to_le_bytes).collect();
    (0..64)
        .flat_map(|_| [sentence.as_bytes().to_vec(), wide.clone()])
        .collect()
}

/// Rewrites and checks the buffer at the rate, and the fill in the background.
fn work(status: &Status, mut buffer: Buffer, fill: &Fill, rate_mib_s: usize) {
    let (_keep, never) = channel::<()>();
    let mut random = Random::new(status.boot_id);
    loop {
        // Ten steps a second; a guest that can't keep up does what it can.
        let pages = rate_mib_s * 256 / 10;
        let (verified, corrupt, sweeps) = buffer.step(pages);
        let (fill_verified, fill_corrupt) = fill.check(16, &mut random);
        status
            .verified
            .fetch_add(verified + fill_verified, Ordering::Relaxed);
        status.sweeps.fetch_add(sweeps, Ordering::Relaxed);
        if corrupt + fill_corrupt > 0 {
            status
                .corrupt
                .fetch_add(corrupt + fill_corrupt, Ordering::Relaxed);
            println!("CORRUPT buffer {corrupt} fill {fill_corrupt}");
        }
        let _ = never.recv_timeout(Duration::from_millis(100));
    }
}

/// One line every 200 ms on the console.
fn beat(status: &Status, canaries: &[Vec<u8>]) {
    let (_keep, never) = channel::<()>();
    let console = Mutex::new(std::io::stdout());
    loop {
        let beat = status.beats.fetch_add(1, Ordering::Relaxed);
        let line = format!(
            "beat {beat} sweeps {} verified {} corrupt {} canaries {}\n",
            status.sweeps.load(Ordering::Relaxed),
            status.verified.load(Ordering::Relaxed),
            status.corrupt.load(Ordering::Relaxed),
            std::hint::black_box(canaries).len(),
        );
        if let Ok(mut console) = console.lock() {
            let _ = console.write_all(line.as_bytes());
            let _ = console.flush();
        }
        if never.recv_timeout(Duration::from_millis(200)) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}
