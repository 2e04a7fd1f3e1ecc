//! An observer on the path: records everything that crosses the switch, and looks for sentences in it.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::network::Switch;
use crate::process::Kept;
use crate::wait;

const PATIENCE: Duration = Duration::from_secs(30);

/// A recording under way.
#[derive(Debug)]
pub struct Recording {
    tcpdump: Kept,
    capture: PathBuf,
    log: PathBuf,
}

/// A finished recording.
#[derive(Debug)]
pub struct Capture {
    /// Where it lies, in the form of pcap.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// Packets that the kernel could not give to the observer.
    pub dropped: u64,
}

impl Recording {
    /// Begins to record the switch's traffic.
    ///
    /// # Errors
    ///
    /// If tcpdump cannot be started.
    pub fn start(switch: &Switch, dir: &Path) -> Result<Self> {
        Self::named(switch, dir, "wire")
    }

    /// As [`Recording::start`], with a name for the file, so that two can be under way.
    ///
    /// # Errors
    ///
    /// If tcpdump cannot be started.
    pub fn named(switch: &Switch, dir: &Path, name: &str) -> Result<Self> {
        let (capture, log) = (
            dir.join(format!("{name}.pcap")),
            dir.join(format!("{name}.log")),
        );
        let mut command = switch.namespace.command("tcpdump");
        // A bridge in promiscuous mode sees what it forwards. 64 MiB of buffer, because a migration comes in bursts.
        command.args([
            "-i", "br0", "-n", "-s", "0", "-B", "65536", "-Z", "root", "-w",
        ]);
        command
            .arg(&capture)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        let tcpdump = Kept::new(command.spawn().context("cannot start tcpdump")?);
        wait::until_true("tcpdump listens", PATIENCE, || {
            Ok(fs::read_to_string(&log)?.contains("listening on"))
        })?;
        Ok(Self {
            tcpdump,
            capture,
            log,
        })
    }

    /// Ends the recording.
    ///
    /// # Errors
    ///
    /// If tcpdump does not end.
    pub fn finish(mut self) -> Result<Capture> {
        self.tcpdump.signal(Signal::INT);
        self.tcpdump.wait(PATIENCE)?;
        let log = fs::read_to_string(&self.log)?;
        let dropped = log
            .lines()
            .find(|line| line.ends_with("dropped by kernel"))
            .and_then(|line| line.split(' ').next()?.parse().ok());
        Ok(Capture {
            bytes: fs::metadata(&self.capture)?.len(),
            path: self.capture,
            dropped: dropped.context("tcpdump did not say what it lost")?,
        })
    }
}

impl Capture {
    /// How often a sentence is in it, as ASCII (or UTF-8) or as UTF-16 with the low byte first.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn count(&self, sentence: &str) -> Result<u64> {
        Ok(self.count_plain(sentence)? + self.count_wide(sentence)?)
    }

    /// How often a sentence is in it as ASCII (or UTF-8).
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn count_plain(&self, sentence: &str) -> Result<u64> {
        count(File::open(&self.path)?, &[sentence.as_bytes()])
    }

    /// How often a sentence is in it as UTF-16 with the low byte first: its letters separated by zero bytes.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn count_wide(&self, sentence: &str) -> Result<u64> {
        let wide: Vec<u8> = sentence.encode_utf16().flat_map(u16::to_le_bytes).collect();
        count(File::open(&self.path)?, &[&wide])
    }
}

/// Counts the places at which one of the patterns begins.
pub(crate) fn count(from: impl Read, patterns: &[&[u8]]) -> Result<u64> {
    const CHUNK: usize = 1 << 20;
    let longest = patterns
        .iter()
        .map(|pattern| pattern.len())
        .max()
        .unwrap_or(0);
    let mut from = BufReader::new(from);
    let mut window: Vec<u8> = Vec::with_capacity(CHUNK + longest);
    let mut found = 0;
    loop {
        let kept = window.len();
        let read = from.by_ref().take(CHUNK as u64).read_to_end(&mut window)?;
        for pattern in patterns.iter().filter(|pattern| !pattern.is_empty()) {
            // What ends in the part kept from before was counted before.
            let from = kept.saturating_sub(pattern.len() - 1);
            found += occurrences(&window[from..], pattern);
        }
        if read == 0 {
            return Ok(found);
        }
        let keep = window.len().min(longest.saturating_sub(1));
        window.drain(..window.len() - keep);
    }
}

fn occurrences(text: &[u8], pattern: &[u8]) -> u64 {
    let (first, mut found, mut at) = (pattern[0], 0, 0);
    while let Some(next) = text[at..].iter().position(|&byte| byte == first) {
        at += next;
        if text[at..].starts_with(pattern) {
            found += 1;
        }
        at += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_across_two_chunks_is_found_once() {
        let mut text = vec![b'x'; (1 << 20) - 3];
        text.extend(b"canary and canary");
        assert_eq!(count(&text[..], &[b"canary"]).unwrap(), 2);
        assert_eq!(count(&text[..], &[b"canaries"]).unwrap(), 0);
    }

    #[test]
    fn letters_separated_by_zero_bytes_are_found() {
        let text = b"..h\0i\0..hi";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, text).unwrap();
        let capture = Capture {
            path,
            bytes: 10,
            dropped: 0,
        };
        assert_eq!(capture.count("hi").unwrap(), 2);
    }
}
