//! The detector: observations in, findings out.

use std::collections::{BTreeMap, VecDeque};

use thiserror::Error;

use crate::calibration::Calibration;
use crate::episode::{Episode, Surroundings, Turn};
use crate::finding::{Finding, Stage};
use crate::fusion::Symbols;
use crate::observation::{Observation, ObservationError, Reading, Role, TIME_US_MAX, TargetId};
use crate::target::Target;

/// Most targets of one watcher.
pub const TARGETS_MAX: usize = 1024;
/// Longest name of a target, in bytes.
pub const NAME_MAX: usize = 128;
/// Most observations of one target that wait until their second is over.
pub const PENDING_MAX: usize = 512;
/// So long a second stays open for answers, in microseconds: a probe that has none after this is lost.
pub const LATENESS_US: u64 = 1_000_000;
/// Most findings that wait to be taken; later ones are counted and dropped.
pub const FINDINGS_MAX: usize = 4096;

/// After so many seconds without any observation nothing that was going on counts any more.
const SILENT_MAX_S: u64 = 120;
/// Other VMs needed to say whether they were disturbed too.
const OTHERS_MIN: usize = 2;

/// Why a target can't be added.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TargetError {
    /// An empty or too long name, or one with control characters.
    #[error("a target's name has 1 to {NAME_MAX} bytes and no control characters")]
    Name,
    /// A name that is taken.
    #[error("there is a target {0:?} already")]
    Taken(String),
    /// More than [`TARGETS_MAX`].
    #[error("more than {TARGETS_MAX} targets")]
    TooMany,
}

/// What is known of a target at present.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Status {
    /// Statistic of growing round trips.
    pub rise: f64,
    /// Whether round trips are high.
    pub is_high: bool,
    /// Whether something unusual goes on.
    pub in_episode: bool,
}

struct Vm {
    episodes: u64,
    episode: Option<Episode>,
}

/// Watches any number of targets. It has no clock: what time it is follows from what it is given.
///
/// Give it observations ([`Self::observe`]) in any order within [`LATENESS_US`], the time while there are none
/// ([`Self::advance`]), and take what it finds ([`Self::poll`]).
pub struct Watcher {
    calibration: Calibration,
    names: BTreeMap<String, TargetId>,
    targets: Vec<Target>,
    vms: Vec<Vm>,
    /// The second that is judged next.
    next: Option<u64>,
    newest_us: u64,
    silent_s: u64,
    hears: bool,
    findings: VecDeque<Finding>,
    dropped: u64,
}

impl Watcher {
    /// One without targets.
    #[must_use]
    pub fn new(calibration: Calibration) -> Self {
        Self {
            calibration,
            names: BTreeMap::new(),
            targets: Vec::new(),
            vms: Vec::new(),
            next: None,
            newest_us: 0,
            silent_s: 0,
            hears: false,
            findings: VecDeque::new(),
            dropped: 0,
        }
    }

    /// Adds a target.
    ///
    /// # Errors
    /// If its name is not one or is taken, or there are too many.
    pub fn add(&mut self, name: &str, role: Role) -> Result<TargetId, TargetError> {
        if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
            return Err(TargetError::Name);
        }
        if self.names.contains_key(name) {
            return Err(TargetError::Taken(name.to_owned()));
        }
        if self.targets.len() == TARGETS_MAX {
            return Err(TargetError::TooMany);
        }
        let id = TargetId(self.targets.len());
        self.names.insert(name.to_owned(), id);
        self.targets.push(Target::new(name.to_owned(), role));
        self.vms.push(Vm {
            episodes: 0,
            episode: None,
        });
        Ok(id)
    }

    /// Says whether somebody listens for announcements where VMs would make them. If nobody does, which is taken for so
    /// until it is said or one is heard, that there are none says nothing.
    pub fn listen(&mut self, hears: bool) {
        self.hears = hears;
    }

    /// Whether announcements can be heard.
    #[must_use]
    pub fn hears(&self) -> bool {
        self.hears
    }

    /// The target of that name.
    #[must_use]
    pub fn target(&self, name: &str) -> Option<TargetId> {
        self.names.get(name).copied()
    }

    /// Takes an observation. It may be older than others by at most [`LATENESS_US`] and what its second has left.
    ///
    /// # Errors
    /// If it can't be true, comes too late or is of no target; then nothing has changed.
    pub fn observe(&mut self, observation: Observation) -> Result<(), ObservationError> {
        let Observation {
            sent_us,
            target,
            reading,
        } = observation;
        if sent_us > TIME_US_MAX {
            return Err(ObservationError::Time(sent_us));
        }
        reading.check()?;
        let second = sent_us / 1_000_000;
        if let Some(next) = self.next
            && second < next
        {
            let closed_us = next * 1_000_000;
            return Err(ObservationError::TooLate { sent_us, closed_us });
        }
        let pending = self.targets.get(target.0);
        if pending.ok_or(ObservationError::UnknownTarget)?.pending() >= PENDING_MAX {
            // Perhaps they only wait for a later one to say that their seconds are over.
            self.advance(sent_us)?;
            if self.targets[target.0].pending() >= PENDING_MAX {
                return Err(ObservationError::TooMany);
            }
        }
        if self.next.is_none() {
            // Others may have been sent before this one.
            self.next = Some(second.saturating_sub(LATENESS_US / 1_000_000));
        }
        // Who hears one could hear others.
        self.hears |= reading == Reading::Announced;
        self.targets[target.0].add(sent_us, reading);
        self.advance(sent_us)
    }

    /// Says that it is that time: everything older than [`LATENESS_US`] before it is judged.
    ///
    /// # Errors
    /// If that is beyond all times. A time that is past changes nothing.
    pub fn advance(&mut self, now_us: u64) -> Result<(), ObservationError> {
        if now_us > TIME_US_MAX {
            return Err(ObservationError::Time(now_us));
        }
        self.newest_us = self.newest_us.max(now_us);
        let open = self.newest_us.saturating_sub(LATENESS_US) / 1_000_000;
        self.judge_until(open);
        Ok(())
    }

    /// Judges everything, and ends what goes on: nothing more will come.
    pub fn finish(&mut self) {
        self.judge_until(self.newest_us / 1_000_000 + 1);
        self.interrupt();
    }

    /// Says that the watcher itself stood still in that time, or was late: what was sent then says nothing about
    /// targets. To be said before that time is judged.
    pub fn stalled(&mut self, from_us: u64, until_us: u64) {
        for target in &mut self.targets {
            target.discard(from_us, until_us);
        }
    }

    /// Forgets what was usual for a target: it lives elsewhere now.
    pub fn relearn(&mut self, target: TargetId) {
        if let Some(target) = self.targets.get_mut(target.0) {
            target.relearn();
        }
    }

    /// The next finding, the oldest first.
    pub fn poll(&mut self) -> Option<Finding> {
        self.findings.pop_front()
    }

    /// How many findings nobody took in time.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// What is known of a target at present.
    #[must_use]
    pub fn status(&self, target: TargetId) -> Option<Status> {
        let signals = &self.targets.get(target.0)?.signals;
        Some(Status {
            rise: signals.rise,
            is_high: signals.is_high,
            in_episode: self.vms[target.0].episode.is_some(),
        })
    }

    /// Whether more probes of a target would tell more than usual: something unusual goes on, or may be about to. Whoever
    /// probes it may send some twenty a second until this ends.
    #[must_use]
    pub fn suspects(&self, target: TargetId) -> bool {
        let Some(of) = self.targets.get(target.0) else {
            return false;
        };
        let episode = self.vms[target.0].episode.as_ref();
        let is_recent = episode
            .zip(self.next)
            .is_some_and(|(episode, next)| episode.is_recent(next));
        is_recent || Episode::may_begin(&of.signals, &self.calibration)
    }

    /// What calibrating needs: the statistics of the last second (growing round trips, a run of losses, a clock's jump).
    #[must_use]
    pub fn statistics(&self, target: TargetId) -> Option<[f64; 3]> {
        let signals = &self.targets.get(target.0)?.signals;
        Some([
            signals.rise,
            signals.run.map_or(0.0, |(_, surprise)| surprise),
            signals.step.map_or(0.0, |step| step.statistic),
        ])
    }

    /// What calibrating needs: what the channels say of the episode that goes on.
    #[must_use]
    pub fn symbols(&self, target: TargetId) -> Option<(Stage, Symbols)> {
        let episode = self.vms.get(target.0)?.episode.as_ref()?;
        Some((episode.stage(), episode.symbols(&self.calibration)))
    }

    /// What calibrating needs: since which second what goes on has been unusual.
    #[must_use]
    pub fn onset_s(&self, target: TargetId) -> Option<u64> {
        let episode = self.vms.get(target.0)?.episode.as_ref()?;
        Some(episode.onset())
    }

    fn judge_until(&mut self, end: u64) {
        let Some(mut second) = self.next else {
            return;
        };
        while second < end {
            if self.silent_s > SILENT_MAX_S {
                self.next = Some(second);
                self.interrupt();
                // However long that was, there is nothing to judge in it.
                let earliest = self.targets.iter().filter_map(Target::earliest_us).min();
                let next = earliest.map_or(end, |earliest_us| earliest_us / 1_000_000);
                second = next.clamp(second, end);
                self.silent_s = 0;
                continue;
            }
            self.judge(second);
            second += 1;
        }
        self.next = Some(second);
    }

    fn judge(&mut self, second: u64) {
        let mut is_silent = true;
        for (target, vm) in self.targets.iter_mut().zip(&self.vms) {
            target.second(second, vm.episode.is_some(), &self.calibration);
            is_silent &= !target.signals.is_seen;
        }
        self.silent_s = if is_silent { self.silent_s + 1 } else { 0 };
        let disturbed: Vec<bool> = self
            .targets
            .iter()
            .map(|target| self.is_disturbed(target))
            .collect();
        for at in 0..self.targets.len() {
            if self.targets[at].role == Role::Vm {
                self.judge_vm(at, second, &disturbed);
            } else if self.targets[at].signals.rise > 0.0 {
                self.calm_host(at);
            }
        }
    }

    fn judge_vm(&mut self, at: usize, second: u64, disturbed: &[bool]) {
        let mut earliest = 0;
        let signals = &self.targets[at].signals;
        if let Some(episode) = &self.vms[at].episode
            && let Some(began) = episode.another(second, signals, &self.calibration)
            && let Some(before) = self.vms[at].episode.take()
        {
            earliest = began;
            self.targets[at].calm();
            self.end_episode(at, second, before);
        }
        let target = &self.targets[at];
        if self.vms[at].episode.is_none() {
            if !Episode::begins(&target.signals, &self.calibration) {
                return;
            }
            self.vms[at].episodes += 1;
            let number = self.vms[at].episodes;
            self.vms[at].episode = Some(Episode::new(number, second, earliest));
        }
        let around = self.surroundings(at, disturbed);
        let Some(mut episode) = self.vms[at].episode.take() else {
            return;
        };
        let names = |host: usize| self.targets[host].name.clone();
        let turn = episode.second(second, target, around, &names, &self.calibration);
        let finding = match turn {
            Turn::On => None,
            Turn::Told(finding) => Some(finding),
            Turn::Over(finding) => {
                if episode.has_become_usual(second) {
                    self.targets[at].relearn();
                } else {
                    self.targets[at].calm();
                }
                self.tell(finding);
                return;
            }
        };
        self.vms[at].episode = Some(episode);
        self.tell(finding);
    }

    fn surroundings(&self, at: usize, disturbed: &[bool]) -> Surroundings {
        let mut around = Surroundings {
            hears: self.hears,
            ..Surroundings::default()
        };
        let (mut others, mut others_disturbed) = (0, 0);
        for (other, target) in self.targets.iter().enumerate() {
            match target.role {
                Role::Host => {
                    let hosts = around.hosts.get_or_insert_default();
                    if disturbed[other] {
                        hosts.push(other);
                    }
                }
                Role::Vm if other != at => {
                    others += 1;
                    others_disturbed += usize::from(disturbed[other]);
                }
                Role::Vm => {}
            }
        }
        if others >= OTHERS_MIN {
            around.company = Some(others_disturbed as f64 / others as f64);
        }
        around
    }

    fn is_disturbed(&self, target: &Target) -> bool {
        let signals = &target.signals;
        let has_risen = signals.is_high && signals.rise >= self.calibration.rise.clear;
        let silence = &self.calibration.silence;
        let is_silent = signals
            .run
            .is_some_and(|(_, surprise)| surprise >= silence.weak);
        has_risen || is_silent
    }

    /// A host has no episodes; a growth that is over is forgotten all the same.
    fn calm_host(&mut self, at: usize) {
        let signals = &self.targets[at].signals;
        if signals.rise >= self.calibration.rise.clear && !signals.is_high {
            self.targets[at].calm();
        }
    }

    fn interrupt(&mut self) {
        for at in 0..self.targets.len() {
            if let Some(episode) = self.vms[at].episode.take() {
                self.end_episode(at, self.next.unwrap_or(0), episode);
            }
            self.targets[at].interrupted();
        }
    }

    fn end_episode(&mut self, at: usize, second: u64, episode: Episode) {
        let names = |host: usize| self.targets[host].name.clone();
        let name = &self.targets[at].name;
        let finding = episode.end(second, name, &names, &self.calibration);
        self.tell(finding);
    }

    fn tell(&mut self, finding: Option<Box<Finding>>) {
        let Some(finding) = finding else {
            return;
        };
        if self.findings.len() == FINDINGS_MAX {
            self.dropped += 1;
        } else {
            self.findings.push_back(*finding);
        }
    }
}
