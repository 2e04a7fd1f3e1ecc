//! What runs inside a test guest: it writes memory at a set rate and verifies it, answers HTTP, NTP and
//! an echo port, keeps a sentence in memory for eavesdroppers to look for, and says on its console
//! five times a second that it lives.
//!
//! Configured by the kernel's command line (see [`settings::Settings`]). Only the standard library,
//! linked statically, because an initial RAM disk has nothing else.

#![forbid(unsafe_code)]

mod canary;
mod clock;
mod console;
mod document;
mod memory;
mod page;
mod server;
mod settings;
mod stats;
mod wait;

use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use document::Document;
use memory::Memory;
use settings::Settings;
use stats::Stats;

/// Distance between two lines on the console.
const BEAT: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    match run() {
        Ok(never) => match never {},
        Err(why) => {
            console::line(&format!("palanquin-workload error: {why}"));
            ExitCode::FAILURE
        }
    }
}

/// Starts everything and beats for ever.
fn run() -> Result<Infallible, String> {
    let command_line = fs::read_to_string("/proc/cmdline")
        .map_err(|why| format!("/proc/cmdline can't be read: {why}"))?;
    let settings = Settings::parse(&command_line).map_err(|why| why.to_string())?;
    let boot_id = boot_id()?;
    let available = stats::memory_available().ok_or("/proc/meminfo doesn't say MemAvailable")?;
    let memory = Memory::fill(&settings, available)?;
    let document = settings.open.as_deref().map(Document::open).transpose()?;
    let stats = Arc::new(Stats::new(boot_id.clone()));
    server::start(&stats)?;
    clock::serve()?;
    console::line(&format!("palanquin-workload ready boot_id={boot_id}"));

    let of_worker = Arc::clone(&stats);
    thread::Builder::new()
        .name("memory".into())
        .spawn(move || memory.work(&of_worker))
        .map_err(|why| format!("no thread for the memory: {why}"))?;
    let mut next = Instant::now();
    loop {
        // Beats missed while the guest was paused are not made up for: a burst would hide the gap.
        next = (next + BEAT).max(Instant::now());
        wait::until(next);
        console::line(&stats.beat());
        if document.as_ref().is_some_and(|open| !open.verify()) {
            return Err("the open document is not what it was: CORRUPT".to_owned());
        }
    }
}

/// Sixteen random bytes as hexadecimal digits: a guest that was started again has others.
fn boot_id() -> Result<String, String> {
    let mut bytes = [0_u8; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|why| format!("/dev/urandom can't be read: {why}"))?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    }))
}
