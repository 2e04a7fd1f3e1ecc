//! The thread that reads what the machine shows of itself: it waits for the hardware clock, which nothing else must.

use std::collections::BTreeMap;
use std::sync::mpsc as orders;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use palanquin_api::control::ErrorKind;
use palanquin_host::inside::{
    self as machine, Benchmark, Pages, Platform, Rtc, Unread, read_clocks, stay_on_one_processor,
};
use palanquin_watch::inside::{Clocks, Edge, Sample, Speeds, Writes};
use serde::Serialize;
use tokio::sync::mpsc;

use crate::failure::Failure;

/// So long it waits for the hardware clock to go on to its next second.
const PATIENCE: Duration = Duration::from_millis(1500);

/// A sample begins so long before the hardware clock goes on to its next second.
const EARLY: Duration = Duration::from_millis(50);

/// After a slow first write it looks again so soon, ...
const SOON: Duration = Duration::from_secs(1);
/// ... so often. A copy may be over before the next look that is due.
const SOON_LOOKS: u32 = 3;

/// What the machine looks like at the beginning.
#[derive(Serialize)]
pub(super) struct Start {
    pub(super) fingerprint: BTreeMap<String, String>,
    pub(super) clocks: Clocks,
    pub(super) speeds: Speeds,
    pub(super) writes: Option<Writes>,
    pub(super) stolen_ms: Option<u64>,
    #[serde(skip)]
    pub(super) unread: Vec<Unread>,
}

/// What it tells.
pub(super) enum Read {
    Start(Box<Start>),
    Sample(Box<Sample>),
}

/// The thread; it ends when this is dropped.
pub(super) struct Reader {
    stop: Option<orders::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    pub(super) fn start(
        rtc: Option<Rtc>,
        every: Duration,
        is_once: bool,
        to: mpsc::Sender<Read>,
    ) -> Result<Self, Failure> {
        let (stop, stopped) = orders::channel();
        let thread = std::thread::Builder::new()
            .name("inside".to_owned())
            .spawn(move || {
                // On several processors counters and speeds would be those of now this and now that one.
                let stays = stay_on_one_processor();
                let mut of = Machine {
                    rtc,
                    benchmark: Benchmark::new(),
                    pages: Pages::new(),
                    stolen_ms: machine::stolen_ms(),
                    edge: Instant::now(),
                    are_slow: false,
                    soon: 0,
                };
                let mut start = of.start();
                if let Err(error) = stays {
                    start.unread.push(Unread {
                        what: "one processor at a time",
                        why: error.to_string(),
                        hint: "benchmarks of unlike processors are mixed; allow sched_setaffinity(2)",
                    });
                }
                if to.blocking_send(Read::Start(Box::new(start))).is_err() || is_once {
                    return;
                }
                of.go_on(every, &stopped, &to);
            })
            .map_err(|error| {
                Failure::new(ErrorKind::Internal, "no thread to read clocks").cause(error)
            })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// It ends only when it is told to. A watcher that sees nothing any more must not look as if it had done its work.
    pub(super) fn ended_by_itself(&self) -> Failure {
        Failure::new(ErrorKind::Internal, "nothing is watched any more")
            .cause("the thread that reads clocks has ended by itself")
            .hint("start it again; its last words are above")
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Machine {
    rtc: Option<Rtc>,
    benchmark: Benchmark,
    pages: Pages,
    stolen_ms: Option<u64>,
    /// When clocks were read last, which is right after the hardware clock went on.
    edge: Instant,
    /// Whether first writes were slow at the last look.
    are_slow: bool,
    /// Looks that are to come soon.
    soon: u32,
}

impl Machine {
    fn start(&mut self) -> Start {
        let platform = Platform::read();
        let mut unread = platform.unread;
        unread.extend(self.pages.unread().cloned());
        let clocks = read_clocks(self.rtc.as_mut(), PATIENCE);
        if self.rtc.is_some() && clocks.rtc.is_none() {
            unread.push(Unread {
                what: "seconds of the hardware clock",
                why: "it did not go on to another second exactly enough within 1.5 s".to_owned(),
                hint: "it is tried again; if this stays so, pauses are noticed only by the clocks of neighbours",
            });
        }
        Start {
            fingerprint: platform.values,
            clocks: shown(clocks),
            speeds: speeds(self.benchmark.run()),
            writes: self.pages.write().map(writes),
            stolen_ms: self.stolen_ms,
            unread,
        }
    }

    /// A sample at each time it is due, until it is told to stop or nobody listens.
    fn go_on(&mut self, every: Duration, stopped: &orders::Receiver<()>, to: &mpsc::Sender<Read>) {
        let mut due = Instant::now();
        loop {
            let step = if self.soon > 0 { SOON } else { every };
            due += step;
            let wait = due.saturating_duration_since(Instant::now());
            if !matches!(
                stopped.recv_timeout(wait),
                Err(orders::RecvTimeoutError::Timeout)
            ) {
                return;
            }
            let late = Instant::now().saturating_duration_since(due);
            if late > step {
                // What was missed is not made up for.
                due = Instant::now();
            }
            let sample = self.sample(late.as_secs_f64() * 1e3);
            if sample.clocks.rtc.is_some() {
                // The next one begins shortly before the hardware clock goes on, instead of waiting for that.
                due = self.edge.checked_sub(EARLY).unwrap_or(self.edge);
            }
            if to.blocking_send(Read::Sample(Box::new(sample))).is_err() {
                return;
            }
        }
    }

    fn writes(&mut self) -> Option<Writes> {
        let writes = self.pages.write().map(writes);
        let are_slow = writes.is_some_and(|writes| writes.are_slow());
        self.soon = self.soon.saturating_sub(1);
        if are_slow && !self.are_slow {
            // Once for each time that it begins: a machine may be copied always.
            self.soon = SOON_LOOKS;
        }
        self.are_slow = are_slow;
        writes
    }

    fn sample(&mut self, late_ms: f64) -> Sample {
        let clocks = shown(read_clocks(self.rtc.as_mut(), PATIENCE));
        self.edge = Instant::now();
        let before = self.stolen_ms;
        self.stolen_ms = machine::stolen_ms();
        let stolen = before
            .zip(self.stolen_ms)
            .map(|(before, now)| now.saturating_sub(before) as f64);
        Sample {
            clocks,
            late_ms,
            stolen_ms: stolen,
            fingerprint: Some(Platform::read().values),
            speeds: Some(speeds(self.benchmark.run())),
            writes: self.writes(),
            neighbours: Vec::new(),
        }
    }
}

fn shown(clocks: machine::Clocks) -> Clocks {
    Clocks {
        raw_ns: clocks.raw_ns,
        monotonic_ns: clocks.monotonic_ns,
        boottime_ns: clocks.boottime_ns,
        realtime_ns: clocks.realtime_ns,
        tsc: clocks.tsc,
        error_ns: clocks.error_ns,
        rtc: clocks.rtc.map(|edge| Edge {
            rtc_s: edge.rtc_s,
            at_ns: edge.at_ns,
            error_ns: edge.error_ns,
        }),
    }
}

fn writes(writes: machine::Writes) -> Writes {
    Writes {
        first_ns: writes.first_ns,
        again_ns: writes.again_ns,
    }
}

fn speeds(speeds: machine::Speeds) -> Speeds {
    Speeds {
        alu_ns: speeds.alu_ns,
        first_cache_ns: speeds.first_cache_ns,
        second_cache_ns: speeds.second_cache_ns,
        memory_ns: speeds.memory_ns,
        syscall_ns: speeds.syscall_ns,
        cpuid_ns: speeds.cpuid_ns,
    }
}
