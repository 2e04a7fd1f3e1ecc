//! What lies in the memory of processes, and in files.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::host::Host;
use crate::observer;

const PAGE: u64 = 4096;
/// Pages that are asked for at once.
const LOOK: u64 = 8192;

/// How often a sentence is in the memory of a process, as ASCII or UTF-16: in whatever it has mapped, as far as it is there.
pub(super) fn in_process(pid: u32, sentence: &str) -> Result<u64> {
    let wide: Vec<u8> = sentence.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
        .with_context(|| format!("no process {pid}"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let pages = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut found = 0;
    for line in maps.lines() {
        let Some((start, end)) = readable(line) else {
            continue;
        };
        let present = Present {
            memory: &memory,
            pages: &pages,
            // Guest memory that this process has not touched may be there all the same.
            shared: line.contains(" rw-s ") || line.contains(" r--s "),
            at: start,
            end,
            run_end: start,
        };
        found += observer::count(present, &[sentence.as_bytes(), &wide])?;
    }
    Ok(found)
}

fn readable(line: &str) -> Option<(u64, u64)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    words.next().filter(|rights| rights.starts_with('r'))?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(start)?, number(end)?))
}

/// The pages of a mapping that are there, one after the other.
struct Present<'a> {
    memory: &'a File,
    pages: &'a File,
    shared: bool,
    at: u64,
    end: u64,
    /// Until here all are there.
    run_end: u64,
}

impl Present<'_> {
    /// Goes on to the next page that is there; none is left when `at` is `end`.
    fn seek(&mut self) -> io::Result<()> {
        while self.at >= self.run_end && self.at < self.end {
            if self.shared {
                self.run_end = self.end;
                return Ok(());
            }
            let count = ((self.end - self.at) / PAGE).clamp(1, LOOK);
            let mut entries = vec![0; usize::try_from(count * 8).unwrap_or(8)];
            let read = self.pages.read_at(&mut entries, self.at / PAGE * 8)?;
            // Bits 62 and 63: swapped, present (pagemap of the kernel's documentation).
            let there: Vec<bool> = entries[..read]
                .chunks_exact(8)
                .map(|entry| entry[7] & 0xC0 != 0)
                .collect();
            let Some(first) = there.iter().position(|&there| there) else {
                self.at += count * PAGE;
                self.run_end = self.at;
                continue;
            };
            let run = there[first..].iter().take_while(|&&there| there).count();
            self.at += first as u64 * PAGE;
            self.run_end = self.at + run as u64 * PAGE;
        }
        Ok(())
    }
}

impl Read for Present<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.seek()?;
            if self.at >= self.end {
                return Ok(0);
            }
            let most = usize::try_from(self.run_end.min(self.end) - self.at).unwrap_or(usize::MAX);
            let length = buffer.len().min(most);
            match self.memory.read_at(&mut buffer[..length], self.at) {
                Ok(0) | Err(_) => {
                    // Mapped, and nothing to be read: a device, or gone meanwhile.
                    self.at += PAGE.min(self.end - self.at);
                }
                Ok(count) => {
                    self.at += count as u64;
                    return Ok(count);
                }
            }
        }
    }
}

/// Where a sentence is found at a host: processes by name, files by path, and how much was looked at.
#[derive(Debug, Default)]
pub(super) struct Search {
    /// Where it is, and how often.
    pub(super) found: Vec<(String, u64)>,
    /// Processes that were looked into.
    pub(super) processes: usize,
    /// Files that were looked into.
    pub(super) files: usize,
}

impl Search {
    /// How often in all.
    pub(super) fn count(&self) -> u64 {
        self.found.iter().map(|(_, count)| count).sum()
    }
}

/// Looks for a sentence in every process of a host, in its files, and in files of shared memory.
pub(super) fn in_host(host: &Host, sentence: &str) -> Result<Search> {
    let mut search = Search::default();
    for pid in host.namespace.processes()? {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        // One may have ended meanwhile.
        let Ok(count) = in_process(pid, sentence) else {
            continue;
        };
        search.processes += 1;
        if count > 0 {
            search
                .found
                .push((format!("{} ({pid})", name.trim()), count));
        }
    }
    let wide: Vec<u8> = sentence.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let patterns: [&[u8]; 2] = [sentence.as_bytes(), &wide];
    for dir in [host.dir(), Path::new("/dev/shm")] {
        in_files(dir, &patterns, &mut search)?;
    }
    Ok(search)
}

fn in_files(dir: &Path, patterns: &[&[u8]], search: &mut Search) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        if kind.is_dir() {
            in_files(&entry.path(), patterns, search)?;
        } else if kind.is_file() {
            let Ok(file) = File::open(entry.path()) else {
                continue;
            };
            let count = observer::count(file, patterns)?;
            search.files += 1;
            if count > 0 {
                search
                    .found
                    .push((entry.path().display().to_string(), count));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_in_this_process_is_found() {
        let kept = std::hint::black_box(["a bittern ", "booms at night"].concat());
        assert!(in_process(std::process::id(), &kept).unwrap() > 0);
    }

    #[test]
    fn what_a_process_may_not_read_itself_is_not_looked_into() {
        assert!(readable("7f00-7f01 ---p 00000000 00:00 0").is_none());
        assert_eq!(readable("10-20 r--p 00000000 00:00 0"), Some((16, 32)));
    }
}
