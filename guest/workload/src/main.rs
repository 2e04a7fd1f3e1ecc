//! Workload of the test guests: rewrites and verifies memory, keeps a canary sentence, and says on the console and
//! on the network how it fares. Runs as the guest's first process, configured by the kernel command line.
#![forbid(unsafe_code)]

mod memory;
mod report;
mod serve;
mod settings;

use std::fs;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use memory::{Buffer, Corruption, Fill, PAGES_PER_MIB};
use report::Report;
use settings::Settings;

const TICK: Duration = Duration::from_millis(20);
const TICKS_PER_S: u64 = 50;
const BEAT: Duration = Duration::from_millis(200);
/// Corruptions printed in full; all are counted.
const PRINTED: u32 = 16;

fn main() -> ExitCode {
    let settings = fs::read_to_string("/proc/cmdline")
        .map_err(|cause| format!("no command line: {cause}"))
        .and_then(|line| Settings::from_command_line(&line).map_err(|cause| cause.to_string()));
    let settings = match settings {
        Ok(settings) => settings,
        Err(cause) => {
            println!("workload cannot start: {cause}");
            return ExitCode::FAILURE;
        }
    };
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot_id = boot_id.trim().to_owned();
    let report = Arc::new(Report::new(boot_id));
    if let Err(cause) = serve::start(&report) {
        println!("workload cannot serve: {cause}");
    }
    let canary = Canary::new(&settings.canary);
    let seed = 0x5041_4c41_4e51_5549;
    let fill = Fill::new(settings.fill_mib, seed);
    let buffer = Buffer::new(settings.buffer_mib, seed);
    println!(
        "workload ready buffer {} MiB fill {} MiB boot {}",
        settings.buffer_mib, settings.fill_mib, report.boot_id
    );
    let beats = Arc::clone(&report);
    thread::spawn(move || {
        loop {
            println!("{}", beats.beat());
            wait(BEAT);
        }
    });
    work(&settings, buffer, fill, &canary, &report)
}

/// The canary sentence as ASCII (or UTF-8) and as UTF-16 with the low byte first, repeated over a few pages.
struct Canary {
    ascii: Vec<u8>,
    utf16: Vec<u8>,
}

impl Canary {
    fn new(sentence: &str) -> Self {
        let utf16: Vec<u8> = sentence.encode_utf16().flat_map(u16::to_le_bytes).collect();
        Self {
            ascii: sentence.as_bytes().repeat(64),
            utf16: utf16.repeat(64),
        }
    }

    /// Keeps the compiler from seeing that nobody reads the canary.
    fn hold(&self) {
        std::hint::black_box((&self.ascii, &self.utf16));
    }
}

fn work(
    settings: &Settings,
    mut buffer: Buffer,
    mut fill: Fill,
    canary: &Canary,
    report: &Report,
) -> ! {
    let mut printed = 0;
    let mut note = |place: &str, found: Option<Corruption>| {
        let Some(found) = found else { return };
        report.corrupt();
        if printed < PRINTED {
            printed += 1;
            let Corruption {
                page,
                word,
                expected,
                found,
            } = found;
            println!(
                "CORRUPT {place} page {page} word {word} expected {expected:#x} found {found:#x}"
            );
        }
    };
    // A sweep over the buffer takes a second, where the CPU can.
    let checked_per_tick = (buffer.len() as u64).div_ceil(TICKS_PER_S);
    let fill_per_tick = if fill.len() == 0 {
        0
    } else {
        (settings.fill_verify_mib_s * PAGES_PER_MIB).div_ceil(TICKS_PER_S)
    };
    let mut owed = 0;
    let mut next = Instant::now();
    loop {
        owed += settings.dirty_mib_s * PAGES_PER_MIB;
        while owed >= TICKS_PER_S {
            owed -= TICKS_PER_S;
            note("buffer", buffer.rewrite_next());
        }
        for _ in 0..checked_per_tick {
            let (found, complete) = buffer.check_next();
            note("buffer", found);
            if complete {
                report.swept();
            }
        }
        for _ in 0..fill_per_tick {
            note("fill", fill.check_next().0);
        }
        report.verified(checked_per_tick + fill_per_tick);
        canary.hold();
        next += TICK;
        let now = Instant::now();
        match next.checked_duration_since(now) {
            Some(rest) => wait(rest),
            // Too slow for this rate, or paused meanwhile: what was missed is not made up for.
            None => next = now,
        }
    }
}

/// Lets that much time pass.
fn wait(duration: Duration) {
    let end = Instant::now() + duration;
    while let Some(rest) = end.checked_duration_since(Instant::now()) {
        thread::park_timeout(rest);
        if rest.is_zero() {
            return;
        }
    }
}
