//! What watches while things happen: the prober with bursts on suspicion, and announcements on the network.

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::process::Stdio;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use palanquin_host::probe::{Event, NtpSpec, Prober, ProberSpec, Reading as Probed, TargetSpec};
use palanquin_lab::guest::mac;
use palanquin_lab::network::Namespace;
use palanquin_lab::process::Kept;
use palanquin_watch::{Calibration, Observation, Reading, TargetId, Watcher};

use crate::corpus::{Seen, Target, rounded};

/// How often the detector is asked whether it suspects something.
const TURN: Duration = Duration::from_millis(100);

/// A target with its address.
#[derive(Clone)]
pub(super) struct Watched {
    pub(super) target: Target,
    pub(super) address: Ipv4Addr,
    pub(super) has_ntp: bool,
}

enum Message {
    Probe(Event),
    Announced { target: usize, at_us: u64 },
    Stop,
}

/// Watching, until it is finished.
pub(super) struct Watching {
    sender: Sender<Message>,
    collector: JoinHandle<Collected>,
    /// Ends with it.
    _tcpdump: Kept,
}

/// What was seen, with times since 1970.
#[derive(Default)]
pub(super) struct Collected {
    pub(super) seen: Vec<Seen>,
    pub(super) stalls_us: Vec<(u64, u64)>,
    pub(super) news: Vec<String>,
}

impl Watching {
    /// Begins to watch from a namespace.
    pub(super) fn start(from: &Namespace, watched: &[Watched]) -> Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let targets = watched
            .iter()
            .map(|of| {
                let mut spec = TargetSpec::new(of.target.name.clone(), IpAddr::V4(of.address));
                spec.ntp = of.has_ntp.then_some(NtpSpec {
                    port: 123,
                    interval: Duration::from_secs(8),
                });
                spec
            })
            .collect();
        let spec = ProberSpec::new(targets);
        let tell = sender.clone();
        // Its sockets and its thread are of the namespace in which it is started.
        let prober = from.inside(move || {
            let tell = move |event| drop(tell.send(Message::Probe(event)));
            Prober::start(spec, tell).context("the prober does not start")
        })?;
        let tcpdump = listen(from, watched, sender.clone())?;
        let targets: Vec<Target> = watched.iter().map(|of| of.target.clone()).collect();
        let collector = std::thread::spawn(move || collect(&targets, &prober, &receiver));
        Ok(Self {
            sender,
            collector,
            _tcpdump: tcpdump,
        })
    }

    /// Ends, and gives what was seen.
    pub(super) fn finish(self) -> Result<Collected> {
        // The collector ends by it alone.
        let _ = self.sender.send(Message::Stop);
        let mut collected = self
            .collector
            .join()
            .map_err(|_| anyhow!("the collector panicked"))?;
        collected.seen.sort_by_key(|seen| seen.sent_us);
        Ok(collected)
    }
}

fn collect(targets: &[Target], prober: &Prober, from: &mpsc::Receiver<Message>) -> Collected {
    let mut collected = Collected::default();
    let mut watcher = Watcher::new(Calibration::built_in());
    let ids: Vec<TargetId> = targets
        .iter()
        .filter_map(|of| watcher.add(&of.name, of.role()).ok())
        .collect();
    let mut next = Instant::now();
    loop {
        let mut take = |sent_us, target: usize, reading| {
            let reading = rounded(reading);
            let observation = Observation {
                sent_us,
                target: ids[target],
                reading,
            };
            // What comes too late for a suspicion is kept all the same.
            let _ = watcher.observe(observation);
            collected.seen.push(Seen {
                sent_us,
                target,
                reading,
            });
        };
        match from.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(Message::Probe(Event::Seen {
                target,
                sent_us,
                reading,
            })) => take(sent_us, target, converted(reading)),
            Ok(Message::Announced { target, at_us }) => take(at_us, target, Reading::Announced),
            Ok(Message::Probe(Event::Stalled { from_us, until_us })) => {
                watcher.stalled(from_us, until_us);
                collected.stalls_us.push((from_us, until_us));
            }
            // It listens on no interface: `tcpdump` does.
            Ok(Message::Probe(Event::Deaf { .. } | Event::Hears)) => {}
            Ok(Message::Probe(Event::News { target, news })) => {
                let name = &targets[target].name;
                collected.news.push(format!("{name}: {news:?}"));
            }
            Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return collected,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if Instant::now() >= next {
            next = Instant::now() + TURN;
            for (at, id) in ids.iter().enumerate() {
                if !targets[at].is_host && watcher.suspects(*id) {
                    prober.burst(at);
                }
            }
            while watcher.poll().is_some() {}
        }
    }
}

fn converted(reading: Probed) -> Reading {
    match reading {
        Probed::Rtt { ms } => Reading::Rtt { ms },
        Probed::Lost => Reading::Lost,
        Probed::Ttl { hops } => Reading::Ttl { hops },
        Probed::IcmpOffset { ms } => Reading::IcmpOffset { ms },
        Probed::NtpOffset { ms } => Reading::NtpOffset { ms },
        Probed::NtpHeld { ms } => Reading::NtpHeld { ms },
        Probed::Announced => Reading::Announced,
    }
}

/// Listens for RARP and gratuitous ARP.
fn listen(from: &Namespace, watched: &[Watched], to: Sender<Message>) -> Result<Kept> {
    let macs: Vec<(String, usize)> = (0..)
        .zip(watched)
        .filter(|(_, of)| !of.target.is_host)
        .map(|(at, of)| (mac(&of.address.to_string()), at))
        .collect();
    let mut command = from.command("tcpdump");
    command
        .args(["-i", "eth0", "-n", "-e", "-l", "-tt", "-Z", "root"])
        .arg("rarp or (arp and arp[14:4] = arp[24:4])")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn().context("cannot start tcpdump")?;
    let lines = child.stdout.take().context("tcpdump has no output")?;
    // It ends when tcpdump does.
    std::thread::spawn(move || {
        for line in BufReader::new(lines).lines().map_while(Result::ok) {
            if let Some((at_us, source)) = announcement(&line)
                && let Some((_, target)) = macs.iter().find(|(mac, _)| *mac == source)
            {
                let target = *target;
                let _ = to.send(Message::Announced { target, at_us });
            }
        }
    });
    Ok(Kept::new(child))
}

/// Time since 1970 and hardware address at the beginning of a line of `tcpdump -tt -e`.
fn announcement(line: &str) -> Option<(u64, String)> {
    let mut words = line.split_ascii_whitespace();
    let (seconds, micros) = words.next()?.split_once('.')?;
    let (seconds, micros): (u64, u64) = (seconds.parse().ok()?, micros.parse().ok()?);
    Some((seconds * 1_000_000 + micros, words.next()?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_has_a_time_and_a_source() {
        let line = "1700000000.123456 52:54:0a:4d:01:0b > ff:ff:ff:ff:ff:ff, ethertype Reverse ARP (0x8035), length 60";
        let expected = (1_700_000_000_123_456, "52:54:0a:4d:01:0b".to_owned());
        assert_eq!(announcement(line), Some(expected));
        assert_eq!(announcement("tcpdump: listening on eth0"), None);
    }
}
