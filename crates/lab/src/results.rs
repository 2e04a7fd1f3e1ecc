//! What the experiment and the attacks have found, one line of JSON each, so that a run that was interrupted goes on where
//! it was, and a report needs no run.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest line that is read.
const LINE: u64 = 1 << 20;

/// Where and with what a run was made. What differs between two runs is not to be compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the CPU.
    pub cpu: String,
    /// Number of CPUs.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Version of the kernel.
    pub kernel: String,
    /// First lines of what programs say of their version, by name.
    pub versions: BTreeMap<String, String>,
}

impl Machine {
    /// This one, with the versions of some programs; each is a command line.
    ///
    /// # Errors
    ///
    /// If the kernel does not tell.
    pub fn this(programs: &[(&str, Command)]) -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("no /proc/cpuinfo")?;
        let cpu = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, model)| model);
        let meminfo = fs::read_to_string("/proc/meminfo").context("no /proc/meminfo")?;
        let kib: u64 = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next())
            .and_then(|number| number.parse().ok())
            .context("no MemTotal")?;
        let versions = programs.iter().map(|(name, command)| {
            let mut again = Command::new(command.get_program());
            again.args(command.get_args());
            (*name, again)
        });
        Ok(Self {
            cpu: cpu.to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory_mib: kib / 1024,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            versions: versions
                .map(|(name, mut command)| (name.to_owned(), version(&mut command)))
                .collect(),
        })
    }
}

/// The first line that a program says.
fn version(command: &mut Command) -> String {
    let Ok(output) = command.output() else {
        return "not installed".to_owned();
    };
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    said.lines().next().unwrap_or("unknown").trim().to_owned()
}

/// What became of an attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The attacker has what he wanted.
    Succeeded,
    /// He has not, and who is attacked knows: an error, a refusal, or a record names it.
    FailedDetected,
    /// He has not, and nobody was told.
    FailedUnnoticed,
}

/// One attack on one transport.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttackCell {
    /// Name of the attack, as on the command line.
    pub attack: String,
    /// Name of the transport, as on the command line.
    pub transport: String,
    /// What became of it.
    pub verdict: Verdict,
    /// What shows it: what was found where, or what was said.
    pub evidence: String,
    /// How long it took, in seconds.
    pub seconds: f64,
}

/// One migration of the experiment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Leg {
    /// Name of the transport, as on the command line.
    pub transport: String,
    /// MTU of the path in bytes.
    pub mtu: u32,
    /// Number of the run, from 1.
    pub run: u32,
    /// `there` or `back`.
    pub way: String,
    /// Whether the guest arrived and goes on with its memory whole; why not is in `reason`.
    pub completed: bool,
    /// Why it did not complete.
    pub reason: Option<String>,
    /// How often the sentence is in the capture as ASCII.
    pub ascii_found: u64,
    /// How often it is there as UTF-16.
    pub utf16_found: u64,
    /// How often the sentence is, in either form, in a capture of the isolated segment, where there is one.
    #[serde(default)]
    pub segment_found: Option<u64>,
    /// From the request to the answer, in milliseconds.
    pub total_ms: f64,
    /// How long the guest stood still, as those who moved it say, in milliseconds.
    pub downtime_ms: Option<f64>,
    /// Pings, one each 50 ms, that were not answered.
    pub lost_pings: u64,
    /// Longest time without an answer, in milliseconds.
    pub ping_gap_ms: f64,
    /// CPU time of both hosts in seconds, the guest's own included.
    pub cpu_s: f64,
    /// CPU time over the time it took, in percent of one CPU.
    pub cpu_percent: f64,
    /// Largest such share within half a second.
    pub peak_cpu_percent: f64,
    /// Bytes that the source sent.
    pub bytes: u64,
    /// Packets that the source sent.
    pub packets: u64,
    /// Packets that the observer missed.
    pub missed_packets: u64,
}

/// What the path of a transport does by itself, with no migration under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PathCell {
    /// Name of the path.
    pub path: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Number of the run, from 1.
    pub run: u32,
    /// Median round trip of a ping, in milliseconds.
    pub rtt_ms: Option<f64>,
    /// What iperf3 carried over one connection, in Mbit/s.
    pub mbit_s: Option<f64>,
    /// Why something is missing.
    pub reason: Option<String>,
}

/// A line of a file of results.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Line {
    /// How what follows was made.
    Run {
        /// The command that repeats it.
        command: String,
        /// Day, as seconds since 1970.
        at_s: u64,
        /// The machine.
        machine: Machine,
    },
    /// A migration.
    Leg(Leg),
    /// A path.
    Path(PathCell),
    /// An attack.
    Attack(AttackCell),
}

/// A file of results.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    /// Bytes of its whole lines, if the last one was cut short.
    whole: Option<u64>,
    /// What is in it.
    pub lines: Vec<Line>,
}

impl Results {
    /// Reads a file that may not be there yet. A last line that was cut short is passed over, and removed before something
    /// is added: what it said is done again.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or a line is none.
    pub fn open(path: &Path) -> Result<Self> {
        let mut results = Self {
            path: path.to_owned(),
            whole: None,
            lines: Vec::new(),
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(results),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let mut reader = BufReader::new(file);
        let mut whole = 0_u64;
        loop {
            let mut text = Vec::new();
            let read = std::io::Read::take(&mut reader, LINE).read_until(b'\n', &mut text)?;
            if read == 0 {
                break;
            }
            if text.last() != Some(&b'\n') {
                results.whole = Some(whole);
                break;
            }
            results.lines.push(parse(&text).with_context(|| {
                let number = results.lines.len() + 1;
                format!(
                    "line {number} of {} is no result, or one of another version: --fresh begins anew",
                    path.display()
                )
            })?);
            whole += read as u64;
        }
        Ok(results)
    }

    /// Begins a run: the same machine and versions as before go on, others are refused.
    ///
    /// # Errors
    ///
    /// If the file is of another machine or other programs.
    pub fn begin(&mut self, command: &str, machine: Machine) -> Result<()> {
        let before = self.lines.iter().find_map(|line| match line {
            Line::Run { machine, .. } => Some(machine),
            _ => None,
        });
        match before {
            Some(before) if *before != machine => bail!(
                "{} holds results of another machine or other programs: begin anew with --fresh",
                self.path.display()
            ),
            Some(_) => Ok(()),
            None => self.add(Line::Run {
                command: command.to_owned(),
                at_s: std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .map_or(0, |since| since.as_secs()),
                machine,
            }),
        }
    }

    /// Adds a line, and writes it down at once.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn add(&mut self, line: Line) -> Result<()> {
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        let mut file: File = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path)
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        if let Some(whole) = self.whole.take() {
            file.set_len(whole)?;
        }
        file.write_all(&text)?;
        self.lines.push(line);
        Ok(())
    }

    /// The attacks in it.
    pub fn attacks(&self) -> impl Iterator<Item = &AttackCell> {
        self.lines.iter().filter_map(|line| match line {
            Line::Attack(cell) => Some(cell),
            _ => None,
        })
    }

    /// The migrations in it.
    pub fn legs(&self) -> impl Iterator<Item = &Leg> {
        self.lines.iter().filter_map(|line| match line {
            Line::Leg(leg) => Some(leg),
            _ => None,
        })
    }

    /// The paths in it.
    pub fn paths(&self) -> impl Iterator<Item = &PathCell> {
        self.lines.iter().filter_map(|line| match line {
            Line::Path(cell) => Some(cell),
            _ => None,
        })
    }
}

fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T> {
    Ok(serde_json::from_slice(text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(attack: &str) -> Line {
        Line::Attack(AttackCell {
            attack: attack.to_owned(),
            transport: "qemu".to_owned(),
            verdict: Verdict::FailedDetected,
            evidence: "it said so".to_owned(),
            seconds: 1.5,
        })
    }

    fn machine(kernel: &str) -> Machine {
        Machine {
            cpu: "one".to_owned(),
            cpus: 2,
            memory_mib: 1024,
            kernel: kernel.to_owned(),
            versions: BTreeMap::new(),
        }
    }

    #[test]
    fn what_was_written_is_read_and_a_line_cut_short_is_done_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/attack.jsonl");
        let mut results = Results::open(&path).unwrap();
        results.begin("lab attack", machine("6")).unwrap();
        results.add(cell("capture")).unwrap();
        results.add(cell("alter")).unwrap();
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 4]).unwrap();
        let mut again = Results::open(&path).unwrap();
        let names: Vec<_> = again.attacks().map(|cell| cell.attack.clone()).collect();
        assert_eq!(names, ["capture"]);
        again.add(cell("alter")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn results_of_another_machine_are_not_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attack.jsonl");
        let mut results = Results::open(&path).unwrap();
        results.begin("lab attack", machine("6")).unwrap();
        let mut again = Results::open(&path).unwrap();
        again.begin("lab attack", machine("6")).unwrap();
        assert_eq!(again.lines.len(), 1);
        let error = again.begin("lab attack", machine("7")).unwrap_err();
        assert!(error.to_string().contains("--fresh"), "{error}");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_not_taken_for_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let error = Results::open(&dir.path().join("a.jsonl/b")).map(drop);
        assert!(error.is_ok(), "there is nothing yet");
        let error = Results::open(dir.path()).unwrap_err().to_string();
        assert!(!error.is_empty());
    }

    #[test]
    fn a_line_that_is_no_result_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attack.jsonl");
        fs::write(&path, "{\"kind\":\"nothing\"}\n").unwrap();
        let error = Results::open(&path).unwrap_err().to_string();
        assert!(error.contains("line 1"), "{error}");
    }
}
