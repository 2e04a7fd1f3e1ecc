//! Something unusual, from its beginning until nothing is left of it.

use crate::calibration::{Calibration, Thresholds};
use crate::finding::{Channel, Class, Evidence, Finding, Level, Stage};
use crate::fusion::{self, Symbols, Weighed};
use crate::target::{Signals, Target, Wake};

/// An episode is over when nothing was unusual for so long ...
const CALM_S: u64 = 30;
/// ... and clocks were read since, or could have been.
const CLOCK_WAIT_S: u64 = 100;
/// What goes on for longer has become usual.
const LENGTH_MAX_S: u64 = 1800;
/// A note waits for what may still come.
const NOTE_WAIT_S: u64 = 10;
/// Early findings below this probability are not told.
const WARN_LIKELIHOOD: f64 = 0.2;
/// Round trips that had grown for so long before the break: memory was being copied.
const BEFORE_MIN_S: u64 = 3;
/// Round trips that are high for so long behind the break: they have grown then. What is high is told by a mean over some
/// seconds, so that it lasts for four seconds longer.
const AFTER_MIN_S: u64 = 8;
/// Breaks further apart than this are of two things that happened: a VM that was moved is silent, announces itself and has
/// another clock within less.
const APART_S: u64 = 15;
/// For so long after something unusual, more probes are wanted.
const RECENT_S: u64 = 10;
/// Silences up to this are short.
const SHORT_US: u64 = 3_000_000;
/// Silences up to this are medium.
const MEDIUM_US: u64 = 15_000_000;
/// A lag below this is slight: a guest whose host is busy has as much without having been moved.
const SLIGHT_MS: f64 = 20.0;
/// A clock may lag by so much more than the silence that was seen.
const LAG_SLACK_MS: f64 = 20.0;
/// A clock is read, and a probe sent, so rarely if nothing else is known of when it answered.
const ROOM_MS: f64 = 1000.0;
/// An answer that was late by so much, and by no more than the clock lags, may have waited where it stood still.
const KEPT_MS: f64 = 30.0;
/// So many announcements are no chance: QEMU sends five at least, and a guest that hears of it as many of its own.
const ANNOUNCED_OFTEN: u32 = 3;
/// Runs of losses within half a minute that make them scattered.
const SCATTERED: usize = 3;
/// A channel speaks for a migration from here on.
const SPEAKS: f64 = 1.0;
/// Hosts that are named.
const HOSTS_MAX: usize = 8;

/// What happens to other targets at the same time.
#[derive(Default)]
pub(crate) struct Surroundings {
    /// Hosts whose round trips have grown; nothing if none is watched.
    pub(crate) hosts: Option<Vec<usize>>,
    /// Share of the other VMs that are disturbed; nothing if too few are watched.
    pub(crate) company: Option<f64>,
    /// Whether announcements can be heard.
    pub(crate) hears: bool,
}

/// One episode of one VM.
pub(crate) struct Episode {
    number: u64,
    earliest: u64,
    began: u64,
    onset: u64,
    /// Last second in which anything was unusual.
    unusual: u64,
    rise: f64,
    high_s: u64,
    low_s: u64,
    /// When the break was seen, and for how long round trips had grown before.
    broke: Option<(u64, u64)>,
    /// Last second with a silence or an announcement; the first if there was none.
    struck: u64,
    high_after_s: u64,
    silence_us: u64,
    least_silence_us: u64,
    surprise: f64,
    late_ms: f64,
    held: bool,
    scattered: usize,
    /// By how much its clock has jumped, how clearly, and how it answered then.
    step: Option<(f64, f64, Option<Wake>)>,
    has_clock: bool,
    path: i16,
    announcements: u32,
    hosts: Option<Vec<usize>>,
    company: Option<f64>,
    hears: bool,
    told: Option<(Level, Class)>,
}

/// What an episode comes to in a second.
pub(crate) enum Turn {
    /// It goes on, with nothing new to say.
    On,
    /// It goes on, and this is new.
    Told(Box<Finding>),
    /// It is over; what is said last, if anything.
    Over(Option<Box<Finding>>),
}

impl Episode {
    /// Whether that is unusual enough to look closer.
    pub(crate) fn begins(signals: &Signals, calibration: &Calibration) -> bool {
        (signals.is_high && signals.rise >= calibration.rise.clear)
            || Self::has_silence(signals, calibration)
            || Self::has_step(signals, calibration)
            || signals.path.is_some()
            || signals.announcements > 0
    }

    /// Whether that is unusual enough to send more probes.
    pub(crate) fn may_begin(signals: &Signals, calibration: &Calibration) -> bool {
        let has_step = signals
            .step
            .is_some_and(|step| step.statistic >= calibration.clock.weak);
        (signals.is_high && signals.rise >= calibration.rise.weak)
            || Self::has_silence(signals, calibration)
            || has_step
    }

    /// Where this second shows the break of something else than this episode is about: when that began. A clock may be read
    /// late: that it has jumped is of what was there before.
    pub(crate) fn another(
        &self,
        second: u64,
        signals: &Signals,
        calibration: &Calibration,
    ) -> Option<u64> {
        let began = match signals.run {
            Some((run, _)) if Self::has_silence(signals, calibration) => run.first_us / 1_000_000,
            _ if signals.announcements > 0 => second,
            _ => return None,
        };
        (self.broke.is_some() && began > self.struck + APART_S).then_some(began)
    }

    /// Whether something was unusual in the seconds before `next`.
    pub(crate) fn is_recent(&self, next: u64) -> bool {
        next.saturating_sub(self.unusual) <= RECENT_S
    }

    /// Begins in this second. What was unusual before `earliest` was of something else.
    pub(crate) fn new(number: u64, second: u64, earliest: u64) -> Self {
        Self {
            number,
            earliest,
            began: second,
            onset: second,
            unusual: second,
            rise: 0.0,
            high_s: 0,
            low_s: 0,
            broke: None,
            struck: second,
            high_after_s: 0,
            silence_us: 0,
            least_silence_us: 0,
            surprise: 0.0,
            late_ms: 0.0,
            held: false,
            scattered: 0,
            step: None,
            has_clock: false,
            path: 0,
            announcements: 0,
            hosts: None,
            company: None,
            hears: false,
            told: None,
        }
    }

    /// Takes the next second.
    pub(crate) fn second(
        &mut self,
        second: u64,
        target: &Target,
        around: Surroundings,
        names: &dyn Fn(usize) -> String,
        calibration: &Calibration,
    ) -> Turn {
        let signals = &target.signals;
        self.hears = around.hears;
        self.take(second, signals, around, calibration);
        let quiet_s = second.saturating_sub(self.unusual);
        let clock_is_known = !self.has_clock
            || quiet_s >= CLOCK_WAIT_S
            || target.clock_is_settled(self.unusual * 1_000_000);
        let is_over = (quiet_s >= CALM_S && clock_is_known)
            || second.saturating_sub(self.began) >= LENGTH_MAX_S;
        self.turn(second, is_over, &target.name, names, calibration)
    }

    /// Ends it, because nothing more will be seen.
    pub(crate) fn end(
        mut self,
        second: u64,
        name: &str,
        names: &dyn Fn(usize) -> String,
        calibration: &Calibration,
    ) -> Option<Box<Finding>> {
        match self.turn(second, true, name, names, calibration) {
            Turn::Over(finding) => finding,
            Turn::On | Turn::Told(_) => None,
        }
    }

    /// Whether it went on for so long that it is usual by now.
    pub(crate) fn has_become_usual(&self, second: u64) -> bool {
        second.saturating_sub(self.began) >= LENGTH_MAX_S
    }

    pub(crate) fn onset(&self) -> u64 {
        self.onset
    }

    pub(crate) fn stage(&self) -> Stage {
        if self.broke.is_some() || self.low_s >= BEFORE_MIN_S + 2 {
            Stage::Full
        } else {
            Stage::Early
        }
    }

    /// What the channels have seen; without an ear, that nobody announced itself says nothing.
    pub(crate) fn symbols(&self, calibration: &Calibration) -> Symbols {
        let mut symbols = Symbols::default();
        let mut set = |channel: Channel, symbol: u8| symbols[channel as usize] = Some(symbol);
        let has_risen = self.rise >= calibration.rise.weak;
        set(Channel::Rise, grade(self.rise, &calibration.rise));
        set(
            Channel::Order,
            match self.broke {
                None => u8::from(has_risen),
                Some((_, before_s)) => {
                    let before = before_s >= BEFORE_MIN_S;
                    let after = self.high_after_s >= AFTER_MIN_S;
                    match (before, after) {
                        (true, false) => 2,
                        (false, false) => 3,
                        (false, true) => 4,
                        (true, true) => 5,
                    }
                }
            },
        );
        set(
            Channel::Silence,
            if self.surprise >= calibration.silence.clear {
                let beyond = [SHORT_US, MEDIUM_US];
                3 + beyond
                    .iter()
                    .filter(|most| self.least_silence_us > **most)
                    .count() as u8
            } else if self.surprise >= calibration.silence.weak {
                2
            } else {
                u8::from(self.surprise > 0.0)
            },
        );
        set(
            Channel::Late,
            if self.held {
                2
            } else {
                u8::from(self.late_ms > 0.0)
            },
        );
        set(Channel::Scatter, u8::from(self.scattered >= SCATTERED));
        let step = self
            .step
            .filter(|(ms, _, wake)| wake.is_none_or(|wake| ms.abs() > wake.noise_ms));
        if let Some((ms, _, wake)) = step {
            let room_ms = wake.map_or(ROOM_MS, |wake| wake.room_us as f64 / 1e3);
            let longest_ms = (self.silence_us as f64 / 1e3).max(room_ms);
            let waking = wake.map(|wake| waking(&wake, -ms));
            let was_still = self.surprise >= calibration.silence.weak || waking == Some(2);
            set(
                Channel::Clock,
                if ms > 0.0 {
                    3
                } else if -ms < SLIGHT_MS {
                    4
                } else if -ms > longest_ms + LAG_SLACK_MS {
                    2
                } else if was_still {
                    1
                } else {
                    5
                },
            );
            if let Some(waking) = waking {
                set(Channel::Wake, waking);
            }
        } else if self.has_clock {
            set(Channel::Clock, 0);
        }
        set(Channel::Path, u8::from(self.path != 0));
        if self.hears {
            set(
                Channel::Announcement,
                match self.announcements {
                    0 => 0,
                    1..ANNOUNCED_OFTEN => 1,
                    _ => 2,
                },
            );
        }
        if let Some(hosts) = &self.hosts {
            set(Channel::Hosts, hosts.len().min(2) as u8);
        }
        if let Some(company) = self.company {
            set(Channel::Company, u8::from(company >= 0.5));
        }
        symbols
    }

    fn has_silence(signals: &Signals, calibration: &Calibration) -> bool {
        signals
            .run
            .is_some_and(|(_, surprise)| surprise >= calibration.silence.weak)
    }

    fn has_step(signals: &Signals, calibration: &Calibration) -> bool {
        signals
            .step
            .is_some_and(|step| step.statistic >= calibration.clock.clear && step.is_settled())
    }

    fn take(
        &mut self,
        second: u64,
        signals: &Signals,
        around: Surroundings,
        calibration: &Calibration,
    ) {
        let has_risen = signals.is_high && signals.rise >= calibration.rise.weak;
        if has_risen {
            self.onset = self.onset.min(signals.rise_onset.max(self.earliest));
            self.rise = self.rise.max(signals.rise);
            self.high_s += 1;
            self.low_s = 0;
        } else {
            self.low_s += 1;
        }
        let has_silence = Self::has_silence(signals, calibration);
        let has_step = Self::has_step(signals, calibration);
        if let Some((run, surprise)) = signals.run {
            if surprise >= self.surprise {
                self.surprise = surprise;
            }
            self.silence_us = self.silence_us.max(run.longest_us());
            self.least_silence_us = self.least_silence_us.max(run.shortest_us());
            if has_silence {
                self.onset = self
                    .onset
                    .min((run.after_us / 1_000_000).max(self.earliest));
            }
        }
        if let Some((_, ms)) = signals.late {
            self.late_ms = self.late_ms.max(ms);
        }
        self.held |= signals.held;
        if let Some(step) = signals.step.filter(|_| has_step)
            && self
                .step
                .is_none_or(|(_, statistic, _)| step.statistic > statistic)
        {
            self.step = Some((step.ms, step.statistic, signals.wake));
        }
        // Whoever announces itself has come from somewhere.
        let is_announced = signals.announcements > 0;
        if self.broke.is_none() && (has_silence || has_step || is_announced) {
            // Of several, the earliest; a clock says only between which readings it was.
            let silence = signals.run.filter(|_| has_silence);
            let step = signals.step.filter(|_| has_step);
            let at_us = match (silence, step) {
                (Some((run, _)), _) => run.first_us,
                (None, Some(step)) => step.seen_us,
                (None, None) => second * 1_000_000,
            };
            let at = at_us / 1_000_000;
            let before_s = if self.high_s > 0 {
                at.saturating_sub(self.onset)
            } else {
                0
            };
            self.broke = Some((at, before_s));
        } else if self.broke.is_some() && has_risen {
            self.high_after_s += 1;
        }
        self.scattered = self.scattered.max(signals.scattered);
        self.has_clock |= signals.has_clock;
        self.path = signals.path.unwrap_or(self.path);
        self.announcements = self.announcements.saturating_add(signals.announcements);
        // Not by clocks: their readings scatter more while memory is copied, and look like small steps then.
        if has_silence || is_announced {
            self.struck = second;
        }
        let is_unusual = has_risen
            || has_silence
            || has_step
            || signals.path.is_some()
            || signals.announcements > 0;
        if is_unusual {
            self.unusual = second;
            // Only what coincides counts.
            if let Some(hosts) = around.hosts {
                let known = self.hosts.get_or_insert_default();
                for host in hosts {
                    if !known.contains(&host) && known.len() < HOSTS_MAX {
                        known.push(host);
                    }
                }
            }
            if let Some(company) = around.company {
                self.company = Some(self.company.unwrap_or(0.0).max(company));
            }
        }
    }

    fn turn(
        &mut self,
        second: u64,
        is_over: bool,
        name: &str,
        names: &dyn Fn(usize) -> String,
        calibration: &Calibration,
    ) -> Turn {
        let stage = if is_over { Stage::Full } else { self.stage() };
        let symbols = self.symbols(calibration);
        let weighed = fusion::weigh(calibration.weights(self.hears), stage, &symbols);
        let level = self.level(stage, &weighed, calibration);
        // What was told is taken back only if something else is the better explanation, not for a little less of score.
        let is_still = weighed.class == Class::Migration && weighed.likelihood >= 0.5;
        let level = match self.told {
            Some((told, _)) if is_still && self.broke.is_some() => level.max(told),
            _ => level,
        };
        let is_told = if is_over {
            self.told.is_some() || weighed.class != Class::Quiet
        } else {
            let is_known = self.told.is_some_and(|(told, _)| told >= level);
            let is_ripe = level > Level::Note
                || (weighed.class != Class::Quiet
                    && weighed.share >= 0.5
                    && self
                        .broke
                        .is_some_and(|(at, _)| second.saturating_sub(at) >= NOTE_WAIT_S));
            is_ripe && !is_known
        };
        if !is_told {
            return if is_over { Turn::Over(None) } else { Turn::On };
        }
        self.told = Some((level, weighed.class));
        let finding = Box::new(Finding {
            target: name.to_owned(),
            episode: self.number,
            time_s: (second + 1) as f64,
            onset_s: self.onset as f64,
            break_s: self.broke.map(|(at, _)| at as f64),
            ended_s: is_over.then_some((self.unusual + 1) as f64),
            level,
            class: weighed.class,
            likelihood: weighed.likelihood,
            stage,
            score: weighed.score,
            evidence: self.evidence(&symbols, &weighed),
            hosts: self
                .hosts
                .iter()
                .flatten()
                .map(|host| names(*host))
                .collect(),
        });
        if is_over {
            Turn::Over(Some(finding))
        } else {
            Turn::Told(finding)
        }
    }

    fn level(&self, stage: Stage, weighed: &Weighed, calibration: &Calibration) -> Level {
        match stage {
            Stage::Early => {
                let has_risen = self.rise >= calibration.rise.clear;
                if has_risen && weighed.likelihood >= WARN_LIKELIHOOD {
                    Level::Warn
                } else {
                    Level::Note
                }
            }
            Stage::Full => {
                if self.broke.is_none() || weighed.likelihood < 0.5 {
                    return Level::Note;
                }
                let is_migration = (self.hears || weighed.class == Class::Migration)
                    && weighed.score >= calibration.weights(self.hears).alarm_score;
                if !is_migration {
                    // Who can't hear whether a VM announces itself can't tell a migration from a pause, or a clock that was
                    // set, while nobody asked. He says at least that it may have been one.
                    return if self.hears { Level::Note } else { Level::Warn };
                }
                // What follows from the same packets is one voice.
                let voices = [
                    &[Channel::Rise, Channel::Order][..],
                    &[Channel::Silence, Channel::Late, Channel::Wake],
                    &[Channel::Clock],
                    &[Channel::Path],
                    &[Channel::Announcement],
                    &[Channel::Hosts],
                ];
                let speaks = |channels: &&&[Channel]| {
                    channels
                        .iter()
                        .any(|channel| weighed.ratios[*channel as usize] >= SPEAKS)
                };
                match voices.iter().filter(speaks).count() {
                    // Nothing that means much by itself: many things together that are each as usual elsewhere.
                    0 => Level::Note,
                    1 => Level::Alarm,
                    _ => Level::Confirmed,
                }
            }
        }
    }

    fn evidence(&self, symbols: &Symbols, weighed: &Weighed) -> Vec<Evidence> {
        let value = |channel| match channel {
            Channel::Rise => self.rise,
            Channel::Order => self.broke.map_or(self.high_s, |(_, before_s)| before_s) as f64,
            Channel::Silence => self.silence_us as f64 / 1e3,
            Channel::Late => self.late_ms,
            Channel::Scatter => self.scattered as f64,
            Channel::Clock => self.step.map_or(0.0, |(ms, ..)| ms),
            Channel::Wake => self
                .step
                .and_then(|(.., wake)| wake)
                .map_or(0.0, |wake| wake.slowest_ms),
            Channel::Path => f64::from(self.path),
            Channel::Announcement => f64::from(self.announcements),
            Channel::Hosts => self.hosts.as_ref().map_or(0, Vec::len) as f64,
            Channel::Company => self.company.unwrap_or(0.0),
        };
        Channel::ALL
            .into_iter()
            .filter_map(|channel| {
                let symbol = symbols[channel as usize]?;
                Some(Evidence {
                    channel,
                    seen: channel.symbols().get(usize::from(symbol))?,
                    value: value(channel),
                    log_likelihood_ratio: weighed.ratios[channel as usize],
                })
            })
            .collect()
    }
}

/// How it answered when its clock had jumped to lag by so much.
fn waking(wake: &Wake, lag_ms: f64) -> u8 {
    if !wake.is_slow {
        0
    } else if (KEPT_MS..=lag_ms + LAG_SLACK_MS).contains(&wake.slowest_ms) {
        2
    } else {
        1
    }
}

fn grade(value: f64, thresholds: &Thresholds) -> u8 {
    [thresholds.weak, thresholds.clear, thresholds.strong]
        .iter()
        .filter(|threshold| value >= **threshold)
        .count() as u8
}
