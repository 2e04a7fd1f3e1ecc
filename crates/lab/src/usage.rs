//! What a rig uses of this machine, measured the same way whoever moves its guest.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::host::Host;
use crate::network;
use crate::process;
use crate::rig::Rig;
use crate::wait;

/// Others may use at most this share of the machine; with more, it is they who are measured.
pub const QUIET: f64 = 0.10;

/// Over how long a peak of CPU time is looked for. The kernel counts in steps of 10 ms.
pub const WINDOW: Duration = Duration::from_millis(500);

/// Waits until the rest of the machine is quiet.
///
/// # Errors
///
/// If it is not within 10 min.
pub fn wait_quiet(rig: &Rig) -> Result<()> {
    let own = Inhabitants::of(rig, Vec::new())?;
    wait::until_true(
        "this machine is quiet enough to measure",
        Duration::from_secs(600),
        || {
            let watch = Watch::start(own.clone())?;
            wait::pause(Duration::from_secs(2))?;
            Ok(watch.finish().foreign_share < QUIET)
        },
    )
}

/// Writes to so much free memory once. Memory that the machine's own host has to provide first is slower by an order of
/// magnitude on virtual machines; whoever is measured first would pay for all.
///
/// # Errors
///
/// If there is not so much.
pub fn warm_up(mib: u64) -> Result<()> {
    let bytes = usize::try_from(mib << 20)?;
    let mut memory = Vec::new();
    memory.try_reserve_exact(bytes)?;
    memory.resize(bytes, 1_u8);
    std::hint::black_box(&memory);
    Ok(())
}

/// Who takes part: the processes in the namespaces of a rig's hosts, whenever they start.
#[derive(Clone, Debug)]
pub struct Inhabitants {
    /// Inode numbers of the namespaces.
    namespaces: Vec<u64>,
    /// Processes that do not count.
    but: Vec<u32>,
}

impl Inhabitants {
    /// Of all hosts, without some.
    ///
    /// # Errors
    ///
    /// If a host's namespace is gone.
    pub fn of(rig: &Rig, but: Vec<u32>) -> Result<Self> {
        let inode = |host: &Host| -> Result<u64> {
            let path = Path::new("/run/netns").join(host.namespace.name());
            Ok(fs::metadata(&path)
                .with_context(|| format!("no {}", path.display()))?
                .ino())
        };
        Ok(Self {
            namespaces: rig.hosts.iter().map(inode).collect::<Result<_>>()?,
            but,
        })
    }

    /// Who is there now.
    fn list(&self) -> Vec<u32> {
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| !self.but.contains(pid))
            .filter(|pid| {
                fs::metadata(format!("/proc/{pid}/ns/net"))
                    .is_ok_and(|namespace| self.namespaces.contains(&namespace.ino()))
            })
            .collect()
    }
}

/// What a watch saw.
#[derive(Clone, Copy, Debug)]
pub struct Watched {
    /// CPU time in seconds.
    pub cpu_s: f64,
    /// Largest sum of anonymous memory in MiB.
    pub rss_mib: f64,
    /// As [`Watched::rss_mib`], of agents alone.
    pub agents_rss_mib: f64,
    /// Largest CPU time within a [`WINDOW`], in percent of one CPU.
    pub peak_cpu_percent: f64,
    /// User-mode CPU time of everybody else meanwhile, as a share of all CPUs' time, 0 to 1.
    pub foreign_share: f64,
}

/// CPU times of a process: all of it and in user mode, at the beginning and last.
#[derive(Clone, Copy)]
struct Used {
    all: (Duration, Duration),
    user: (Duration, Duration),
    agent: bool,
}

struct Seen {
    who: Inhabitants,
    /// A process that ends keeps what was seen last.
    used: BTreeMap<u32, Used>,
    rss_kib: u64,
    agents_rss_kib: u64,
    /// CPU time used at the looks within the last window, oldest first.
    recent: VecDeque<(Instant, Duration)>,
    peak_percent: f64,
}

impl Seen {
    /// Looks who is there; who was not there at the beginning has used nothing by then.
    fn discover(&mut self, first: bool) {
        for pid in self.who.list() {
            if self.used.contains_key(&pid) {
                continue;
            }
            let then = |time: Option<Duration>| time.filter(|_| first).unwrap_or_default();
            let all = then(process::cpu_time(pid));
            let user = then(process::user_time(pid));
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let used = Used {
                all: (all, all),
                user: (user, user),
                agent: matches!(name.trim(), "palanquind" | "palanquin-net"),
            };
            self.used.insert(pid, used);
        }
    }

    fn look(&mut self) {
        let (mut all, mut agents) = (0, 0);
        let mut total = Duration::ZERO;
        for (pid, used) in &mut self.used {
            used.all.1 = process::cpu_time(*pid).unwrap_or(used.all.1);
            used.user.1 = process::user_time(*pid).unwrap_or(used.user.1);
            total += used.all.1.saturating_sub(used.all.0);
            let anonymous = process::status_value(*pid, "RssAnon").unwrap_or(0);
            all += anonymous;
            if used.agent {
                agents += anonymous;
            }
        }
        self.rss_kib = self.rss_kib.max(all);
        self.agents_rss_kib = self.agents_rss_kib.max(agents);
        let now = Instant::now();
        self.recent.push_back((now, total));
        while let Some(&(then, before)) = self.recent.front() {
            let elapsed = now.saturating_duration_since(then);
            if elapsed < WINDOW {
                break;
            }
            let share = total.saturating_sub(before).as_secs_f64() / elapsed.as_secs_f64();
            self.peak_percent = self.peak_percent.max(share * 100.0);
            self.recent.pop_front();
        }
    }
}

/// Watches processes while a migration runs.
pub struct Watch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    began: Instant,
    machine: Duration,
}

impl Watch {
    /// Distance between two looks.
    const STEP: Duration = Duration::from_millis(10);
    /// Looks between two searches for new processes.
    const SEARCH: u32 = 10;

    /// Begins to count.
    ///
    /// # Errors
    ///
    /// If there is no `/proc`.
    pub fn start(who: Inhabitants) -> Result<Self> {
        let mut seen = Seen {
            who,
            used: BTreeMap::new(),
            rss_kib: 0,
            agents_rss_kib: 0,
            recent: VecDeque::new(),
            peak_percent: 0.0,
        };
        seen.discover(true);
        seen.look();
        let machine = process::machine_user_time().context("no /proc/stat")?;
        let began = Instant::now();
        let seen = Arc::new(Mutex::new(seen));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            for step in 1_u32.. {
                let last = stopped.load(Ordering::Relaxed) || wait::pause(Self::STEP).is_err();
                let mut seen = shared.lock().unwrap_or_else(PoisonError::into_inner);
                if last || step.is_multiple_of(Self::SEARCH) {
                    seen.discover(false);
                }
                seen.look();
                if last {
                    return;
                }
            }
        });
        Ok(Self {
            seen,
            stop,
            thread,
            began,
            machine,
        })
    }

    /// Ends.
    pub fn finish(self) -> Watched {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        let elapsed = self.began.elapsed().as_secs_f64();
        let machine = process::machine_user_time()
            .unwrap_or_default()
            .saturating_sub(self.machine);
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let difference = |of: fn(&Used) -> (Duration, Duration)| -> Duration {
            let times = seen.used.values().map(of);
            times.map(|(first, last)| last.saturating_sub(first)).sum()
        };
        let others = machine.saturating_sub(difference(|used| used.user));
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let cpu_s = difference(|used| used.all).as_secs_f64();
        Watched {
            cpu_s,
            // What was shorter than a window has its mean.
            peak_cpu_percent: seen
                .peak_percent
                .max(cpu_s / elapsed.max(WINDOW.as_secs_f64()) * 100.0),
            rss_mib: seen.rss_kib as f64 / 1024.0,
            agents_rss_mib: seen.agents_rss_kib as f64 / 1024.0,
            foreign_share: others.as_secs_f64() / (elapsed * cpus as f64),
        }
    }
}

/// Bytes that a host's uplink has sent so far.
///
/// # Errors
///
/// If it has no uplink.
pub fn sent_bytes(host: &Host) -> Result<u64> {
    Ok(sent(host, "eth0")?.0)
}

/// Bytes and packets that a device of a host has sent so far.
///
/// # Errors
///
/// If there is no such device.
pub fn sent(host: &Host, device: &str) -> Result<(u64, u64)> {
    let link = network::link(&host.namespace, device)?;
    let counter = |what: &str| {
        let counter = link["stats64"]["tx"][what].as_u64();
        counter.with_context(|| format!("no counter of {device}"))
    };
    Ok((counter("bytes")?, counter("packets")?))
}

/// The middle value; of an even number the lower one of the two.
pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    values.get((values.len().max(1) - 1) / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_a_value_that_was_measured() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.0));
        assert_eq!(median([f64::NAN].into_iter()), None);
    }
}
