//! `palanquin watch record`: what probes see, as `palanquin watch replay` reads it.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use palanquin_host::probe::Event;
use palanquin_watch::trace::{self, Entry};
use palanquin_watch::{LATENESS_US, Reading};
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::both::ended;
use super::config::Config;
use super::probing::{Detector, TICK, ended_by_itself, reading, start, words};
use crate::arguments::RecordArgs;
use crate::commands::show;
use crate::failure::Failure;
use crate::output::{line, note};

/// What a recording has come to.
#[derive(Serialize)]
struct Recorded {
    file: String,
    observations: u64,
    /// Observations that came so late that a replay would refuse them; they were left out.
    late: u64,
    stalls: u64,
    stalled_s: f64,
    seconds: f64,
    /// Of probes, both ways, with the headers of IP.
    bytes: u64,
}

/// Does what was typed.
pub(crate) async fn record(arguments: &RecordArgs, json: bool) -> Result<(), Failure> {
    let config = Config::load(&arguments.config)?;
    // It only says when to probe more often: what a live detector would have seen is what is to be recorded.
    let mut detector = Detector::new(&config)?;
    let (prober, mut events) = start(&config)?;
    let cannot = |error: io::Error| {
        let failure = Failure::usage(format!("cannot write {}", arguments.out.display()));
        let failure = failure.cause(&error);
        if error.kind() == io::ErrorKind::AlreadyExists {
            failure.hint("nothing is overwritten: choose another name, or move it away")
        } else {
            failure
        }
    };
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&arguments.out)
        .map_err(cannot)?;
    let mut out = Trace::new(BufWriter::new(file), &config);
    writeln!(out.to, "{}", trace::HEADER).map_err(cannot)?;
    writeln!(out.to, "{}", trace::ear(prober.hears())).map_err(cannot)?;
    detector.watcher.listen(prober.hears());
    let began = Instant::now();
    let end = arguments.duration.map(|duration| began + duration.get());
    let far = began + Duration::from_secs(86_400 * 365);
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ending = std::pin::pin!(ended());
    let mut is_whole = true;
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(Event::Seen { target, sent_us, reading: seen }) => {
                    let seen = reading(seen);
                    detector.observe(target, sent_us, seen);
                    out.take(sent_us, target, seen);
                }
                Some(Event::Stalled { from_us, until_us }) => {
                    detector.watcher.stalled(from_us, until_us);
                    out.stalled(from_us, until_us).map_err(cannot)?;
                }
                Some(Event::News { target, news }) => {
                    if let Some(target) = config.targets.get(target).filter(|_| !json) {
                        note(&format!("{}: {}", target.name, line(&words(&news))));
                    }
                }
                Some(Event::Deaf { why }) => {
                    detector.watcher.listen(false);
                    writeln!(out.to, "{}", trace::ear(false)).map_err(cannot)?;
                    note(&format!("warning: announcements are not heard any more: {why}"));
                }
                Some(Event::Hears) => {
                    detector.watcher.listen(true);
                    writeln!(out.to, "{}", trace::ear(true)).map_err(cannot)?;
                    note("announcements are heard again");
                }
                None => {
                    is_whole = false;
                    break;
                }
            },
            _ = tick.tick() => {
                detector.advance(&prober);
                while detector.watcher.poll().is_some() {}
                // Behind the time that answers take.
                let settled_us = prober.clock().now_us().saturating_sub(LATENESS_US);
                out.write(settled_us).map_err(cannot)?;
                out.to.flush().map_err(cannot)?;
            }
            () = sleep_until(end.unwrap_or(far)) => break,
            () = &mut ending => break,
        }
    }
    out.write(u64::MAX).map_err(cannot)?;
    let counted = (0..config.targets.len()).map(|target| prober.counted(target).bytes);
    let recorded = Recorded {
        file: arguments.out.display().to_string(),
        observations: out.observations,
        late: out.late,
        stalls: out.stalls,
        stalled_s: out.stalled_s,
        seconds: began.elapsed().as_secs_f64(),
        bytes: counted.sum(),
    };
    out.to
        .into_inner()
        .map_err(io::IntoInnerError::into_error)
        .and_then(|file| file.sync_all())
        .map_err(cannot)?;
    show(&recorded, text, json)?;
    if is_whole {
        Ok(())
    } else {
        Err(ended_by_itself())
    }
}

fn text(recorded: &Recorded) -> String {
    let Recorded {
        file,
        observations,
        late,
        stalls,
        stalled_s,
        seconds,
        ..
    } = recorded;
    format!(
        "{observations} observations in {seconds:.1} s to {file}; {late} came too late; the watcher stalled {stalls} times, {stalled_s:.1} s in all.\n"
    )
}

/// Lines in the order of sending, as far as a replay needs it.
struct Trace<'a, W> {
    to: W,
    config: &'a Config,
    waiting: BTreeMap<u64, Vec<(usize, Reading)>>,
    /// Everything before is written.
    written_us: u64,
    observations: u64,
    late: u64,
    stalls: u64,
    stalled_s: f64,
}

impl<'a, W: Write> Trace<'a, W> {
    fn new(to: W, config: &'a Config) -> Self {
        Self {
            to,
            config,
            waiting: BTreeMap::new(),
            written_us: 0,
            observations: 0,
            late: 0,
            stalls: 0,
            stalled_s: 0.0,
        }
    }

    fn take(&mut self, sent_us: u64, target: usize, reading: Reading) {
        // A replay refuses what is older than that, and all the rest with it.
        if sent_us.saturating_add(LATENESS_US) < self.written_us {
            self.late += 1;
            return;
        }
        let waiting = self.waiting.entry(sent_us).or_default();
        waiting.push((target, reading));
    }

    fn write(&mut self, until_us: u64) -> io::Result<()> {
        let later = self.waiting.split_off(&until_us);
        for (sent_us, seen) in std::mem::replace(&mut self.waiting, later) {
            self.written_us = self.written_us.max(sent_us);
            for (target, reading) in seen {
                let Some(target) = self.config.targets.get(target) else {
                    continue;
                };
                let target = target.name.as_str();
                let entry = Entry {
                    sent_us,
                    target,
                    reading,
                };
                writeln!(self.to, "{}", trace::line(&entry))?;
                self.observations += 1;
            }
        }
        Ok(())
    }

    fn stalled(&mut self, from_us: u64, until_us: u64) -> io::Result<()> {
        self.stalls += 1;
        let long_s = until_us.saturating_sub(from_us) as f64 / 1e6;
        self.stalled_s += long_s;
        // A comment is passed over by whoever reads the file.
        let from_s = from_us as f64 / 1e6;
        writeln!(
            self.to,
            "# {from_s:.3} the watcher stalled for {long_s:.3} s: what it saw then is left out"
        )
    }
}

#[cfg(test)]
mod tests {
    use palanquin_watch::Calibration;
    use palanquin_watch::trace::Replay;

    use super::*;

    fn config() -> Config {
        let text = "[[target]]\nname = 'web'\naddress = '10.0.0.1'\nrole = 'vm'\n\
                    [[target]]\nname = 'db'\naddress = '10.0.0.2'\nrole = 'vm'";
        toml::from_str(text).unwrap()
    }

    #[test]
    fn lines_are_written_in_the_order_of_sending_and_every_one_can_be_replayed() {
        let config = config();
        let mut trace = Trace::new(Vec::new(), &config);
        let all = [
            Reading::Rtt { ms: 0.125 },
            Reading::Lost,
            Reading::NtpOffset { ms: -1.5 },
            Reading::IcmpOffset { ms: 0.5 },
            Reading::Ttl { hops: 63 },
            Reading::Announced,
        ];
        for (at, reading) in all.into_iter().enumerate().rev() {
            trace.take(10_000_000 + at as u64 * 1000, at % 2, reading);
        }
        trace.write(10_002_500).unwrap();
        trace.stalled(10_002_500, 10_900_000).unwrap();
        // Late, but not too late; and too late.
        trace.take(9_500_000, 0, Reading::Lost);
        trace.take(1_000_000, 0, Reading::Lost);
        trace.write(u64::MAX).unwrap();
        assert_eq!((trace.observations, trace.late, trace.stalls), (7, 1, 1));
        let text = String::from_utf8(trace.to).unwrap();
        let mut replay = Replay::new(Calibration::built_in(), Vec::new());
        for line in text.lines() {
            replay.line(line.as_bytes()).unwrap();
        }
        assert_eq!(replay.observations, 7, "{text}");
        assert!(text.starts_with("10.000000,web,rtt_ms,0.125\n10.001000,db,lost,1\n"));
    }
}
