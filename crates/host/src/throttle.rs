//! Holding threads of a process back with the bandwidth control of cgroups: `cpu.cfs_quota_us` of version 1, `cpu.max` of
//! version 2.
//!
//! Nothing is remembered but what the kernel shows: a group of ours lies in the group that its threads came from and has
//! a name of ours. So what an agent that died has left is found and removed like one's own.
//!
//! Version 1 takes single threads. Version 2 does in a threaded group, which most groups may have below them; where one
//! may not, but has nobody in it except the process, the limit is its own and holds for all of the process.
//!
//! Sources: the kernel's `Documentation/scheduler/sched-bwc.rst`, `admin-guide/cgroup-v1/cgroups.rst` and
//! `admin-guide/cgroup-v2.rst`; cgroups(7).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::Error;
use crate::process::Process;
use crate::vm::Throttle;

/// Smallest share.
const SHARE_MIN: f64 = 0.01;
/// Shortest and longest period of the limit: a VM that may run half of the time stands still for half of a period.
const PERIOD_US: (f64, f64) = (10_000.0, 100_000.0);
/// What a VM runs at least in one go, if the period allows it. The kernel hands out time in slices of up to 5 ms.
const RUN_US: f64 = 5_000.0;
/// Shortest quota that the kernel takes.
const QUOTA_MIN_US: f64 = 1_000.0;
/// Weight of a thread beside others, and the largest of a group, by version.
const WEIGHT_V1: (usize, usize) = (1024, 262_144);
const WEIGHT_V2: (usize, usize) = (100, 10_000);
/// Name of our group for threads, with the process's ID behind it.
const GROUP: &str = "palanquin-throttle-";
/// Name of the empty group that says that the limit of the group around it is ours.
const MARK: &str = "palanquin-throttle-process-";
/// Deepest and most groups that are looked through for abandoned ones.
const DEPTH_MAX: usize = 8;
const GROUPS_MAX: usize = 20_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The hierarchy that has the controller of processor time.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    mount: PathBuf,
    /// Which group is mounted there.
    root: PathBuf,
}

impl Hierarchy {
    fn find() -> Result<Self, Error> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")
            .map_err(Error::io("reading /proc/self/mountinfo"))?;
        let mut reasons = Vec::new();
        for hierarchy in mounts.lines().filter_map(parse_mount) {
            let at = hierarchy.mount.display();
            match hierarchy.version {
                Version::One => return Ok(hierarchy),
                Version::Two => {
                    match fs::read_to_string(hierarchy.mount.join("cgroup.controllers")) {
                        Ok(list) if has_word(&list, "cpu") => return Ok(hierarchy),
                        Ok(_) => reasons.push(format!("cgroup v2 at {at} does not have it")),
                        Err(error) => reasons.push(format!("{at}: {error}")),
                    }
                }
            }
        }
        reasons.push("cgroup v1 is not mounted with it".to_owned());
        let reasons = reasons.join("; ");
        Err(Error::Throttle(format!("no `cpu` controller: {reasons}")))
    }

    /// The group that a thread of the process is in.
    fn group_of(&self, pid: u32, thread: u32) -> Result<PathBuf, Error> {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/cgroup"))
            .map_err(|_| Error::ProcessGone { pid })?;
        let path = text.lines().find_map(|line| self.parse_group(line));
        let below = path.and_then(|path| path.strip_prefix(&self.root).ok());
        let below = below.filter(|below| !below.components().any(|part| part.as_os_str() == ".."));
        below.map(|below| self.mount.join(below)).ok_or_else(|| {
            Error::Throttle(format!(
                "the group of process {pid} cannot be seen from here"
            ))
        })
    }

    /// The group in a line of `/proc/PID/cgroup`, if it is of this hierarchy.
    fn parse_group<'a>(&self, line: &'a str) -> Option<&'a Path> {
        let mut fields = line.splitn(3, ':');
        let (id, controllers) = (fields.next()?, fields.next()?);
        let is_it = match self.version {
            Version::One => controllers.split(',').any(|name| name == "cpu"),
            Version::Two => id == "0" && controllers.is_empty(),
        };
        fields.next().filter(|_| is_it).map(Path::new)
    }

    fn move_thread(&self, thread: u32, group: &Path) -> Result<(), Error> {
        let file = match self.version {
            Version::One => "tasks",
            Version::Two => "cgroup.threads",
        };
        match write(&group.join(file), &thread.to_string()) {
            // It has ended.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other.map_err(failed("moving a thread to", group)),
        }
    }
}

/// A line of `/proc/PID/mountinfo` that shows cgroups of version 1 with the controller, or of version 2.
fn parse_mount(line: &str) -> Option<Hierarchy> {
    let (place, kind) = line.split_once(" - ")?;
    let mut kind = kind.split(' ');
    let version = match (kind.next()?, kind.nth(1)?) {
        ("cgroup", options) if options.split(',').any(|word| word == "cpu") => Version::One,
        ("cgroup2", _) => Version::Two,
        _ => return None,
    };
    let mut place = place.split(' ').skip(3);
    let (root, mount) = (place.next()?, place.next()?);
    Some(Hierarchy {
        version,
        mount: mount.into(),
        root: root.into(),
    })
}

fn has_word(text: &str, word: &str) -> bool {
    text.split_ascii_whitespace().any(|other| other == word)
}

fn failed(action: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    Error::io(format!("{action} {}", path.display()))
}

/// Writes what a control file expects in one piece; makes no file.
fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

fn make_group(path: &Path) -> Result<(), Error> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(failed("making the group", path)(error))
        }
        _ => Ok(()),
    }
}

fn remove_group(path: &Path) -> Result<(), Error> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(failed("removing the group", path)(error))
        }
        _ => Ok(()),
    }
}

/// Quota and period in microseconds that let a group use so many processors.
fn limit(processors: f64) -> (u64, u64) {
    let period = (RUN_US / processors).clamp(PERIOD_US.0, PERIOD_US.1);
    let quota = (period * processors).max(QUOTA_MIN_US);
    (quota.round() as u64, period.round() as u64)
}

/// How many processors these threads can use at once.
fn parallel(threads: &[u32]) -> usize {
    let sets = threads.iter().filter_map(|thread| {
        let pid = Pid::from_raw(i32::try_from(*thread).ok()?)?;
        sched_getaffinity(Some(pid)).ok()
    });
    let processors: BTreeSet<usize> = sets
        .flat_map(|set| (0..CpuSet::MAX_CPU).filter(move |cpu| set.is_set(*cpu)))
        .collect();
    match processors.len() {
        // More than can be told.
        0 => threads.len(),
        count => count.min(threads.len()),
    }
}

/// Where the limit is.
enum Place {
    /// In our group within the one that these threads came from.
    Threads { group: PathBuf, count: usize },
    /// In the process's own group.
    Process { group: PathBuf },
}

/// A limit for threads of a process.
pub(crate) struct CgroupThrottle {
    process: Arc<Process>,
    threads: Vec<u32>,
    hierarchy: Hierarchy,
    /// Groups that were made, with those around them: no thread shows them any more when the process has ended.
    made: BTreeSet<(PathBuf, PathBuf)>,
}

impl CgroupThrottle {
    /// For these threads of the process.
    pub(crate) fn new(process: &Arc<Process>, threads: Vec<u32>) -> Result<Self, Error> {
        let hierarchy = Hierarchy::find()?;
        if threads.is_empty() {
            return Err(Error::Throttle("there are no virtual CPUs".to_owned()));
        }
        lift(process)?;
        Ok(Self {
            process: Arc::clone(process),
            threads,
            hierarchy,
            made: BTreeSet::new(),
        })
    }

    /// Puts every thread where it can be limited. May be repeated.
    fn establish(&mut self) -> Result<Vec<Place>, Error> {
        let pid = self.process.pid();
        let name = format!("{GROUP}{pid}");
        let mut origins: BTreeMap<PathBuf, Vec<u32>> = BTreeMap::new();
        for &thread in &self.threads {
            let mut group = self.hierarchy.group_of(pid, thread)?;
            if group.ends_with(&name) {
                group.pop();
            }
            origins.entry(group).or_default().push(thread);
        }
        let mut places = Vec::new();
        for (origin, threads) in origins {
            let group = origin.join(&name);
            let count = threads.len();
            self.made.insert((group.clone(), origin.clone()));
            let made = match self.hierarchy.version {
                Version::One => make_group(&group),
                Version::Two => {
                    has_controller(&origin)?;
                    make_threaded(&origin, &group)
                }
            };
            let moved = made.and_then(|()| {
                weigh(self.hierarchy.version, &group, count);
                let mut threads = threads.iter();
                threads.try_for_each(|thread| self.hierarchy.move_thread(*thread, &group))
            });
            match moved {
                Ok(()) => places.push(Place::Threads { group, count }),
                Err(error) if self.hierarchy.version == Version::One => return Err(error),
                Err(error) => {
                    tracing::debug!(%error, "no group of threads");
                    lift(&self.process)?;
                    mark(&origin, pid).map_err(|why| {
                        Error::Throttle(format!(
                            "{}: {why}; nor for its threads: {error}",
                            origin.display()
                        ))
                    })?;
                    let mark = origin.join(format!("{MARK}{pid}"));
                    self.made.insert((mark, origin.clone()));
                    return Ok(vec![Place::Process { group: origin }]);
                }
            }
        }
        Ok(places)
    }
}

fn has_controller(group: &Path) -> Result<(), Error> {
    let file = group.join("cgroup.controllers");
    let list = fs::read_to_string(&file).map_err(failed("reading", &file))?;
    if has_word(&list, "cpu") {
        return Ok(());
    }
    let group = group.display();
    Err(Error::Throttle(format!(
        "{group} does not have the `cpu` controller: enable it in the groups above (systemd: `Delegate=yes`)"
    )))
}

/// Makes a threaded group of version 2 that has the controller.
fn make_threaded(origin: &Path, group: &Path) -> Result<(), Error> {
    make_group(group)?;
    let kind = group.join("cgroup.type");
    let current = fs::read_to_string(&kind).map_err(failed("reading", &kind))?;
    if current.trim() != "threaded" {
        write(&kind, "threaded").map_err(failed("writing", &kind))?;
    }
    let control = origin.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&control).map_err(failed("reading", &control))?;
    if !has_word(&enabled, "cpu") {
        write(&control, "+cpu").map_err(failed("writing", &control))?;
    }
    Ok(())
}

/// Takes the limit of the process's own group, if nobody else is in it or has limited it.
fn mark(group: &Path, pid: u32) -> Result<(), String> {
    let read = |file: &str| {
        fs::read_to_string(group.join(file)).map_err(|error| format!("{file}: {error}"))
    };
    if read("cgroup.procs")?.trim() != pid.to_string() {
        return Err("the group has other processes than the VM's".to_owned());
    }
    let mark = group.join(format!("{MARK}{pid}"));
    if !mark.exists() && !has_word(&read("cpu.max")?, "max") {
        return Err("the group is limited already".to_owned());
    }
    make_group(&mark).map_err(|error| error.to_string())
}

/// Lets a group weigh what its threads weighed: as one it would weigh as much as a single thread beside it.
fn weigh(version: Version, group: &Path, threads: usize) {
    let (file, (each, most)) = match version {
        Version::One => ("cpu.shares", WEIGHT_V1),
        Version::Two => ("cpu.weight", WEIGHT_V2),
    };
    let weight = each.saturating_mul(threads).min(most);
    if let Err(error) = write(&group.join(file), &weight.to_string()) {
        tracing::debug!(%error, group = %group.display(), "the weight stays");
    }
}

fn limit_v1(group: &Path, limit: Option<(u64, u64)>) -> Result<(), Error> {
    let quota_file = group.join("cpu.cfs_quota_us");
    let unlimited = || write(&quota_file, "-1").map_err(failed("writing", &quota_file));
    unlimited()?;
    let Some((quota, period)) = limit else {
        return Ok(());
    };
    let period_file = group.join("cpu.cfs_period_us");
    write(&period_file, &period.to_string()).map_err(failed("writing", &period_file))?;
    match write(&quota_file, &quota.to_string()) {
        // More than a group around it has: that holds then.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => unlimited(),
        other => other.map_err(failed("writing", &quota_file)),
    }
}

fn limit_v2(group: &Path, limit: Option<(u64, u64)>) -> Result<(), Error> {
    let text = match limit {
        Some((quota, period)) => format!("{quota} {period}"),
        None => "max".to_owned(),
    };
    let file = group.join("cpu.max");
    write(&file, &text).map_err(failed("writing", &file))
}

impl Throttle for CgroupThrottle {
    fn set(&mut self, share: f64) -> Result<(), Error> {
        if !(SHARE_MIN..=1.0).contains(&share) {
            return Err(Error::ThrottleShare(share));
        }
        if share >= 1.0 {
            return lift(&self.process);
        }
        let processors = share * parallel(&self.threads) as f64;
        for place in self.establish()? {
            let (group, part) = match &place {
                Place::Threads { group, count } => {
                    (group, *count as f64 / self.threads.len() as f64)
                }
                Place::Process { group } => (group, 1.0),
            };
            let limit = Some(limit(processors * part));
            match self.hierarchy.version {
                Version::One => limit_v1(group, limit)?,
                Version::Two => limit_v2(group, limit)?,
            }
        }
        Ok(())
    }
}

impl Drop for CgroupThrottle {
    fn drop(&mut self) {
        match lift(&self.process) {
            Err(error) if !error.is_process_gone() => {
                tracing::warn!(%error, "the virtual CPUs stay limited");
            }
            _ => {}
        }
        for (group, origin) in self.made.iter().filter(|(group, _)| group.exists()) {
            if let Err(error) = remove_group(group) {
                tracing::warn!(%error, "a group stays");
            }
            release(&self.hierarchy, origin);
        }
    }
}

/// Lifts every limit of ours from the process, also one that an agent before us left. Nothing to do is no error.
pub(crate) fn lift(process: &Process) -> Result<(), Error> {
    let Ok(hierarchy) = Hierarchy::find() else {
        // Then there is no limit.
        return Ok(());
    };
    let pid = process.pid();
    let (name, mark) = (format!("{GROUP}{pid}"), format!("{MARK}{pid}"));
    let mut origins = BTreeSet::new();
    let mut first_error = None;
    let mut note = |result: Result<(), Error>| {
        if let Err(error) = result {
            first_error.get_or_insert(error);
        }
    };
    let tasks =
        fs::read_dir(format!("/proc/{pid}/task")).map_err(|_| Error::ProcessGone { pid })?;
    let threads = tasks.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    for thread in threads {
        // One that has just ended is in no group.
        let Ok(mut group) = hierarchy.group_of(pid, thread) else {
            continue;
        };
        if group.ends_with(&name) {
            group.pop();
            note(hierarchy.move_thread(thread, &group));
        }
        origins.insert(group);
    }
    for origin in origins {
        let group = origin.join(&name);
        if group.exists() {
            note(remove_group(&group));
            release(&hierarchy, &origin);
        }
        let mark = origin.join(&mark);
        if mark.exists() {
            note(limit_v2(&origin, None));
            note(remove_group(&mark));
        }
    }
    first_error.map_or(Ok(()), Err)
}

/// Takes the controller back from the groups below, if there are none left: then this one is as it was.
fn release(hierarchy: &Hierarchy, origin: &Path) {
    let is_used = fs::read_dir(origin).map_or(true, |mut entries| {
        entries.any(|entry| entry.is_ok_and(|e| e.file_type().is_ok_and(|kind| kind.is_dir())))
    });
    if hierarchy.version == Version::Two
        && !is_used
        && let Err(error) = write(&origin.join("cgroup.subtree_control"), "-cpu")
    {
        tracing::debug!(%error, group = %origin.display(), "the controller stays enabled");
    }
}

/// Removes groups of ours whose process has ended.
pub(crate) fn remove_abandoned() {
    let Ok(hierarchy) = Hierarchy::find() else {
        return;
    };
    let mut open = vec![(hierarchy.mount.clone(), 0)];
    let mut seen = 0;
    while let Some((dir, depth)) = open.pop() {
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        for entry in entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())) {
            seen += 1;
            if let Some(pid) = entry.file_name().to_str().and_then(owner) {
                // One with threads in it is not removed by the kernel either.
                if !Path::new(&format!("/proc/{pid}")).exists()
                    && fs::remove_dir(entry.path()).is_ok()
                {
                    release(&hierarchy, &dir);
                }
            } else if depth < DEPTH_MAX && seen < GROUPS_MAX {
                open.push((entry.path(), depth + 1));
            }
        }
    }
}

/// Process that a group of ours is for.
fn owner(name: &str) -> Option<u32> {
    let rest = name.strip_prefix(MARK).or(name.strip_prefix(GROUP))?;
    rest.parse().ok()
}

/// The group in a text of `/proc/PID/cgroup`, in the first hierarchy of a text of `/proc/PID/mountinfo`; and the
/// processes that groups of these names are for.
#[cfg(feature = "fuzzing")]
pub(crate) fn group(mounts: &str, groups: &str) -> (Option<PathBuf>, Vec<u32>) {
    let owners = groups.lines().filter_map(owner).collect();
    let hierarchy = mounts.lines().find_map(parse_mount);
    let group = hierarchy.and_then(|hierarchy| {
        let path = groups.lines().find_map(|line| hierarchy.parse_group(line));
        path.map(Path::to_owned)
    });
    (group, owners)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_hierarchy_with_the_controller_is_told_from_others() {
        let one = parse_mount("32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct")
            .unwrap();
        assert_eq!(
            (one.version, one.mount.as_path()),
            (Version::One, Path::new("/sys/fs/cgroup/cpu"))
        );
        let two = parse_mount(
            "41 31 0:38 /lxc/a /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw",
        );
        let two = two.unwrap();
        assert_eq!(
            (two.version, two.root.as_path()),
            (Version::Two, Path::new("/lxc/a"))
        );
        for other in [
            "33 31 0:30 / /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpuacct",
            "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755",
            "32 31 - cgroup",
            "",
        ] {
            assert_eq!(parse_mount(other), None, "{other}");
        }
        let group = |hierarchy: &Hierarchy, line| hierarchy.parse_group(line).map(Path::to_owned);
        assert_eq!(group(&one, "4:cpu,cpuacct:/a:b"), Some("/a:b".into()));
        assert_eq!(group(&one, "2:cpuacct:/a"), None);
        assert_eq!(group(&one, "0::/a"), None);
        assert_eq!(group(&two, "0::/lxc/a/b"), Some("/lxc/a/b".into()));
        assert_eq!(group(&two, "4:cpu:/a"), None);
        assert_eq!(group(&two, "nonsense"), None);
    }

    /// Processor time of a thread of this process, from the scheduler, which counts nanoseconds.
    fn used(thread: u32) -> f64 {
        let text = fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap();
        text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
    }

    #[test]
    fn a_thread_is_held_back_and_let_go() {
        let (tell, thread) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let busy = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid()).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let thread = thread
            .recv()
            .unwrap()
            .as_raw_nonzero()
            .get()
            .cast_unsigned();
        let process = Arc::new(Process::open(std::process::id()).unwrap());
        let usage = || {
            let (before, began) = (used(thread), Instant::now());
            // It does not end.
            assert!(!process.has_ended(Duration::from_millis(1000)));
            (used(thread) - before) / began.elapsed().as_secs_f64()
        };
        let group = || fs::read_to_string(format!("/proc/self/task/{thread}/cgroup")).unwrap();
        let before = group();
        let limited = CgroupThrottle::new(&process, vec![thread])
            .and_then(|mut throttle| throttle.set(0.25).map(|()| throttle));
        match limited {
            Ok(mut throttle) => {
                let limited = usage();
                let places = throttle.establish().unwrap();
                let place = match &places[0] {
                    Place::Threads { group, .. } | Place::Process { group } => group,
                };
                println!("{}: used {limited:.3}", place.display());
                assert!((0.05..0.35).contains(&limited), "{limited} instead of 0.25");
                drop(throttle);
                assert_eq!(group(), before);
                let deadline = Instant::now() + Duration::from_secs(20);
                while usage() < 0.4 {
                    assert!(Instant::now() < deadline, "it is still held back");
                }
            }
            // A machine whose groups belong to others.
            Err(error @ Error::Throttle(_)) => println!("skipped: {error}"),
            Err(error) => panic!("{error:?}"),
        }
        stop.store(true, Ordering::Relaxed);
        busy.join().unwrap();
    }

    #[test]
    fn limits_are_what_the_kernel_takes_and_short_where_they_can_be() {
        assert_eq!(limit(0.5), (5_000, 10_000));
        assert_eq!(limit(0.1), (5_000, 50_000));
        assert_eq!(limit(0.01), (1_000, 100_000));
        assert_eq!(limit(8.0), (80_000, 10_000));
    }

    #[test]
    fn groups_of_ours_are_known_by_their_name() {
        assert_eq!(owner("palanquin-throttle-12"), Some(12));
        assert_eq!(owner("palanquin-throttle-process-12"), Some(12));
        assert_eq!(owner("palanquin-throttle-process-"), None);
        assert_eq!(owner("user.slice"), None);
    }
}
