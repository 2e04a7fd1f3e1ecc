//! The prober and the detector together: what one sees the other judges, and what that suspects is probed more often.

use std::time::Duration;

use palanquin_api::control::ErrorKind;
use palanquin_host::probe::{self, Event, News, Prober};
use palanquin_watch::{Calibration, Observation, Reading, TargetId, Watcher};
use tokio::sync::mpsc;

use super::both::refused;
use super::config::{Config, TargetRole};
use crate::failure::Failure;
use crate::output::note;

/// Most events of the prober that wait for us.
const WAITING_MAX: usize = 1 << 16;
/// How often the detector is told what time it is, and asked whether it suspects something.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// A burst that goes on is prolonged that often, in microseconds.
const BURST_AGAIN_US: u64 = 2_000_000;

/// Begins to probe.
pub(super) fn start(config: &Config) -> Result<(Prober, mpsc::Receiver<Event>), Failure> {
    let (sender, events) = mpsc::channel(WAITING_MAX);
    let tell = move |event| {
        // Who does not keep up must not make the prober late; a full queue shows as seconds without probes.
        let _ = sender.try_send(event);
    };
    let prober = Prober::start(config.prober(), tell).map_err(|error| refused(&error))?;
    for error in prober.without() {
        note(&format!("warning: {error}; goes on without"));
    }
    Ok((prober, events))
}

/// The prober ends only when it is told to. A watcher that sees nothing any more must not look as if it had done its work.
pub(super) fn ended_by_itself() -> Failure {
    Failure::new(ErrorKind::Internal, "nothing is watched any more")
        .cause("the thread that probes has ended by itself")
        .hint("start it again; its last words are above")
}

/// What the prober has seen, as the detector takes it.
pub(super) fn reading(reading: probe::Reading) -> Reading {
    match reading {
        probe::Reading::Rtt { ms } => Reading::Rtt { ms },
        probe::Reading::Lost => Reading::Lost,
        probe::Reading::Ttl { hops } => Reading::Ttl { hops },
        probe::Reading::IcmpOffset { ms } => Reading::IcmpOffset { ms },
        probe::Reading::NtpOffset { ms } => Reading::NtpOffset { ms },
        probe::Reading::NtpHeld { ms } => Reading::NtpHeld { ms },
        probe::Reading::Announced => Reading::Announced,
    }
}

/// What happened with probes, in words.
pub(super) fn words(news: &News) -> String {
    match news {
        News::BurstBegan => "burst of probes begins".to_owned(),
        News::BurstEnded => "burst of probes ends".to_owned(),
        News::BurstRefused => {
            "no burst: probes have been sent often for as long as they may".to_owned()
        }
        News::Refused(kind, why) => format!("an answer by {} can't be used: {why}", kind.name()),
        News::NotSent(kind, why) => format!("{} can't be sent: {why}", kind.name()),
        News::Unanswered(kind) => {
            format!("{} is not answered: it is asked less often", kind.name())
        }
    }
}

/// The detector, with its targets in the order of the configuration.
pub(super) struct Detector {
    pub(super) watcher: Watcher,
    targets: Vec<Watched>,
}

struct Watched {
    id: TargetId,
    is_vm: bool,
    /// When a burst was asked for last.
    burst_us: u64,
}

impl Detector {
    pub(super) fn new(config: &Config) -> Result<Self, Failure> {
        let mut watcher = Watcher::new(Calibration::built_in());
        let mut targets = Vec::new();
        for target in &config.targets {
            let id = watcher
                .add(&target.name, target.role.into())
                .map_err(|error| Failure::usage("a target can't be watched").cause(error))?;
            targets.push(Watched {
                id,
                is_vm: target.role == TargetRole::Vm,
                burst_us: 0,
            });
        }
        Ok(Self { watcher, targets })
    }

    /// Takes what was seen of a target; whether it could be used.
    pub(super) fn observe(&mut self, target: usize, sent_us: u64, reading: Reading) -> bool {
        let Some(of) = self.targets.get(target) else {
            return false;
        };
        let target = of.id;
        let observation = Observation {
            sent_us,
            target,
            reading,
        };
        self.watcher.observe(observation).is_ok()
    }

    /// Judges what is over, and asks for more probes of VMs of which something is suspected.
    pub(super) fn advance(&mut self, prober: &Prober) {
        let now_us = prober.clock().now_us();
        // A time beyond all bounds is none of a clock that shows the time of day.
        let _ = self.watcher.advance(now_us);
        for (at, target) in self.targets.iter_mut().enumerate() {
            if target.is_vm
                && now_us.saturating_sub(target.burst_us) >= BURST_AGAIN_US
                && self.watcher.suspects(target.id)
            {
                target.burst_us = now_us;
                prober.burst(at);
            }
        }
    }
}
