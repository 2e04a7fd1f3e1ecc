//! How a [`Calibration`] is made from traces.
//!
//! 1. Thresholds: quiet VM-days are watched by a detector that knows nothing; of every ten minutes the largest value of
//!    each statistic is kept. A threshold for a rate of false alarms is the value that so many of these exceed. What is
//!    suspicious is not learnt, which changes what follows: so other quiet VM-days are watched with these thresholds, and
//!    that of warnings is raised until there is at most one a day.
//! 2. Tables: trials of each class are watched with these thresholds; what the channels of the episode say is counted, each
//!    trial as one.
//! 3. Curves: other trials are scored with these tables; the share of migrations among trials of a score, migrations and all
//!    else together counted as equally frequent, is fitted by isotonic regression.
//! 4. The least score of an alarm: other quiet VM-days are watched with all of it, and the trials of step 3 in which a file
//!    is copied; the score is raised until at most one alarm in ten VM-days is left, one of a hundred synthetic copies, and
//!    none of a recorded copy.
//!
//! Steps 2 to 4 are done twice: for who hears announcements, and, from the same traces without them, for who does not.
//!
//! Quiet days are synthetic. Trials are synthetic and, where there are any, recorded sessions, of which each event counts as
//! ten trials: half of the events for step 2, the other half for step 3, and all of them for step 4.

use std::fmt::Write as _;

use crate::calibration::{
    CURVE_POINTS, Calibration, Curve, SYMBOLS_MAX, Table, Thresholds, Weights,
};
use crate::finding::{Channel, Class, Finding, Level, Stage};
use crate::fusion::{self, Symbols, is_migration};
use crate::observation::{Observation, Reading, Role};
use crate::synthetic::{Endpoint, Trial};
use crate::watcher::{LATENESS_US, Watcher};

/// Seconds of which the largest value is kept.
const BLOCK_S: u64 = 600;
const DAY_S: u64 = 86_400;
/// Seconds in which a new target is learnt, and nothing is counted.
const LEARN_S: u64 = 600;
/// As if each symbol had been seen that often under each class.
const PRIOR: f64 = 0.5;

/// An event that was recorded counts as so many synthetic trials.
const RECORDED_WEIGHT: f64 = 10.0;

/// What began so long before an event may still be of it: onsets are estimates.
pub const ONSET_SLACK_S: f64 = 4.0;
/// Share of the synthetic copies of files that may be alarms: a few outliers among them are not to decide on all.
const COPIES: f64 = 0.01;

/// How much is watched.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Quiet VM-days for the thresholds, and as many others for the score of an alarm.
    pub vm_days: u64,
    /// Trials of each class for the tables, and as many others for the curves.
    pub trials: u64,
    /// Start of all chance.
    pub seed: u64,
}

/// What follows from synthetic traces alone: thresholds, and what channels said in trials.
pub struct Synthetic {
    effort: Effort,
    thresholds: Calibration,
    /// With an ear and without; for tables and for curves.
    snapshots: [[Vec<(Class, Snapshot)>; 2]; 2],
}

impl Synthetic {
    /// Watches synthetic traces; `tell` hears how far it is.
    pub fn new(effort: Effort, mut tell: impl FnMut(&str)) -> Self {
        let mut calibration = Calibration::blank();
        let [rise, silence, clock] = thresholds(&effort);
        (calibration.rise, calibration.silence, calibration.clock) = (rise, silence, clock);
        calibration.quiet_vm_days = effort.vm_days as f64;
        raise_warnings(&effort, &mut calibration);
        let rise = calibration.rise;
        tell(&format!("thresholds: {rise:?} {silence:?} {clock:?}"));
        let mut of = Self {
            effort,
            thresholds: calibration,
            snapshots: Default::default(),
        };
        for hears in [true, false] {
            for (part, to) in (1..).zip(&mut of.snapshots[usize::from(!hears)]) {
                for class in Class::ALL {
                    for at in 0..effort.trials {
                        let trial = Trial::new(class, effort.seed + (part << 32) + at);
                        let watched = watch(trial, &of.thresholds, hears);
                        to.extend(watched.snapshots.into_iter().map(|of| (class, of)));
                    }
                }
                tell(&format!("trials for step {}", part + 1));
            }
        }
        of
    }

    /// Makes a calibration from it and from recorded sessions.
    pub fn calibrate(&self, recorded: &[Recorded], mut tell: impl FnMut(&str)) -> Calibration {
        let mut calibration = self.thresholds.clone();
        for hears in [true, false] {
            let weights = self.learn(recorded, hears);
            *calibration.weights_mut(hears) = weights;
            let score = alarm_score(&self.effort, recorded, &calibration, hears);
            calibration.weights_mut(hears).alarm_score = score;
            let of = if hears { "with" } else { "without" };
            tell(&format!("score of an alarm {of} an ear: {score}"));
        }
        calibration
    }

    /// Makes the weights of one who hears announcements, or does not; any score is enough for an alarm.
    fn learn(&self, recorded: &[Recorded], hears: bool) -> Weights {
        let [tables, curves] = &self.snapshots[usize::from(!hears)];
        let mut counts = [Counts::default(), Counts::default()];
        for (class, snapshot) in tables {
            counts[snapshot.stage as usize].add(*class, snapshot);
        }
        for of in events(recorded, &self.thresholds, hears, 0) {
            for snapshot in &of.snapshots {
                counts[snapshot.stage as usize].add(of.class, snapshot);
            }
        }
        let mut weights = self.thresholds.weights(hears).clone();
        weights.early = counts[0].table();
        weights.full = counts[1].table();
        let of_sessions: Vec<Snapshots> = events(recorded, &self.thresholds, hears, 1).collect();
        let mut scores = [Vec::new(), Vec::new()];
        for class in Class::ALL {
            let mut of_class = [Vec::new(), Vec::new()];
            let of_sessions = of_sessions.iter().filter(|of| of.class == class);
            let of_trials = curves.iter().filter(|(of, _)| *of == class);
            let all = of_sessions.flat_map(|of| &of.snapshots);
            for snapshot in all.chain(of_trials.map(|(_, snapshot)| snapshot)) {
                let stage = snapshot.stage;
                let score = fusion::weigh(&weights, stage, &snapshot.symbols).score;
                of_class[stage as usize].push((score, snapshot.weight));
            }
            for (stage, of_class) in [Stage::Early, Stage::Full].into_iter().zip(of_class) {
                let is_positive = is_migration(class, stage);
                let kinds = Class::ALL
                    .into_iter()
                    .filter(|other| is_migration(*other, stage) == is_positive);
                // Each class as frequent as others of its kind, both kinds as frequent as each other.
                let total: f64 = of_class.iter().map(|(_, weight)| weight).sum();
                let share = 1.0 / (total.max(1.0) * kinds.count() as f64);
                let weighed = of_class
                    .into_iter()
                    .map(|(score, weight)| (score, weight * share, is_positive));
                scores[stage as usize].extend(weighed);
            }
        }
        let [early, full] = scores;
        weights.early_curve = curve(early);
        weights.full_curve = curve(full);
        weights.alarm_score = 0.0;
        weights
    }
}

/// A session that was recorded, with what happened in it.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// Names and roles of targets.
    pub targets: Vec<(String, Role)>,
    /// Readings, the earliest first: number of the target, when the probe was sent, what it saw.
    pub seen: Vec<(usize, u64, Reading)>,
    /// What happened: number of the target, class, and from and until when its findings are of it, in seconds.
    pub events: Vec<(usize, Class, f64, f64)>,
}

/// What was seen of an event.
struct Snapshots {
    class: Class,
    snapshots: Vec<Snapshot>,
    findings: Vec<Finding>,
}

impl Recorded {
    fn watch(&self, calibration: &Calibration, hears: bool) -> Vec<Snapshots> {
        let mut watcher = Watcher::new(calibration.clone());
        watcher.listen(hears);
        let ids: Vec<_> = self
            .targets
            .iter()
            .filter_map(|(name, role)| watcher.add(name, *role).ok())
            .collect();
        let mut all: Vec<Snapshots> = self
            .events
            .iter()
            .map(|(_, class, ..)| Snapshots {
                class: *class,
                snapshots: Vec::new(),
                findings: Vec::new(),
            })
            .collect();
        let mut next = 0;
        let heard = |reading| hears || reading != Reading::Announced;
        for (target, sent_us, reading) in self.seen.iter().filter(|seen| heard(seen.2)) {
            let _ = watcher.observe(Observation {
                sent_us: *sent_us,
                target: ids[*target],
                reading: *reading,
            });
            let second = sent_us / 1_000_000;
            if second < next {
                continue;
            }
            next = second + 3;
            let now_s = second as f64;
            for ((target, _, from_s, until_s), of) in self.events.iter().zip(&mut all) {
                if let Some((stage, symbols)) = watcher.symbols(ids[*target])
                    && (*from_s..*until_s).contains(&now_s)
                    // What is left of something before says nothing of this.
                    && watcher
                        .onset_s(ids[*target])
                        .is_some_and(|onset_s| onset_s as f64 >= from_s - ONSET_SLACK_S)
                {
                    of.snapshots.push(Snapshot {
                        stage,
                        symbols,
                        weight: RECORDED_WEIGHT,
                    });
                }
            }
        }
        watcher.finish();
        for finding in std::iter::from_fn(|| watcher.poll()) {
            for ((target, _, from_s, until_s), of) in self.events.iter().zip(&mut all) {
                let is_of = self.targets[*target].0 == finding.target;
                let is_own = finding.onset_s >= from_s - ONSET_SLACK_S;
                if is_of && is_own && (*from_s..*until_s).contains(&finding.time_s) {
                    of.findings.push(finding.clone());
                }
            }
        }
        for of in &mut all {
            share_out(&mut of.snapshots);
        }
        all
    }
}

/// Every second of the recorded events: half of them is for tables, the other half for curves.
fn events<'a>(
    recorded: &'a [Recorded],
    calibration: &'a Calibration,
    hears: bool,
    half: usize,
) -> impl Iterator<Item = Snapshots> + 'a {
    let all = recorded
        .iter()
        .flat_map(move |of| of.watch(calibration, hears));
    all.enumerate()
        .filter(move |(at, _)| at % 2 == half)
        .map(|(_, of)| of)
}

/// What the channels said at a moment of a trial, which counts as one together with its others of that stage.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// How far the episode had come.
    pub stage: Stage,
    /// What the channels said.
    pub symbols: Symbols,
    /// Share of the trial.
    pub weight: f64,
}

/// What became of a trial.
pub struct Watched {
    /// The trial.
    pub trial: Trial,
    /// All that was found about its first target, the oldest first.
    pub findings: Vec<Finding>,
    /// What the channels said of it, while it lasted.
    pub snapshots: Vec<Snapshot>,
}

impl Watched {
    /// The highest level that was told.
    #[must_use]
    pub fn level(&self) -> Option<Level> {
        self.findings.iter().map(|finding| finding.level).max()
    }

    /// What was told last.
    #[must_use]
    pub fn class(&self) -> Option<Class> {
        self.findings.last().map(|finding| finding.class)
    }
}

/// Watches a trial, with an ear for announcements or without.
#[must_use]
pub fn watch(mut trial: Trial, calibration: &Calibration, hears: bool) -> Watched {
    let mut watcher = Watcher::new(calibration.clone());
    watcher.listen(hears);
    let targets: Vec<_> = trial
        .targets
        .iter()
        .filter_map(|(name, role)| watcher.add(name, *role).ok())
        .collect();
    let watcher = std::cell::RefCell::new(watcher);
    let mut snapshots: Vec<Snapshot> = Vec::new();
    let (from_s, until_s) = (trial.from_s, trial.until_s);
    trial.run(
        |target, sent_us, reading| {
            if reading == Reading::Announced && !hears {
                return;
            }
            let target = targets[target];
            // Nothing of a trial is refused.
            let _ = watcher.borrow_mut().observe(Observation {
                sent_us,
                target,
                reading,
            });
        },
        |second, target| {
            if target == 0 && second >= from_s && second.is_multiple_of(3)
                && let Some((stage, symbols)) = watcher.borrow().symbols(targets[0])
                // What is still early when all is over will not be judged as such.
                && (stage == Stage::Full || second <= until_s)
            {
                snapshots.push(Snapshot {
                    stage,
                    symbols,
                    weight: 1.0,
                });
            }
            let mut watcher = watcher.borrow_mut();
            // What is over is told by what comes next; the seconds that are waited for are the prober's delay, too.
            let _ = watcher.advance((second + 1) * 1_000_000);
            watcher.suspects(targets[target])
        },
    );
    let mut watcher = watcher.into_inner();
    watcher.finish();
    share_out(&mut snapshots);
    let name = trial.targets[0].0.clone();
    let findings = std::iter::from_fn(|| watcher.poll())
        .filter(|finding| finding.target == name && finding.time_s > from_s as f64)
        .collect();
    Watched {
        trial,
        findings,
        snapshots,
    }
}

/// All that were taken of something in a stage count as one.
fn share_out(snapshots: &mut [Snapshot]) {
    for stage in [Stage::Early, Stage::Full] {
        let mut of_stage: Vec<&mut Snapshot> = snapshots
            .iter_mut()
            .filter(|snapshot| snapshot.stage == stage)
            .collect();
        let share = 1.0 / of_stage.len().max(1) as f64;
        for snapshot in &mut of_stage {
            snapshot.weight *= share;
        }
    }
}

/// Watches a quiet VM-day, with an ear for announcements or without; `after` sees the detector after every second.
pub fn quiet_day(
    seed: u64,
    calibration: &Calibration,
    hears: bool,
    mut after: impl FnMut(u64, &mut Watcher, crate::TargetId),
) {
    let mut watcher = Watcher::new(calibration.clone());
    watcher.listen(hears);
    let Ok(target) = watcher.add("vm", Role::Vm) else {
        return;
    };
    let mut endpoint = Endpoint::new(seed);
    for second in 0..LEARN_S + DAY_S {
        endpoint.quiet(second, |sent_us, reading| {
            let _ = watcher.observe(Observation {
                sent_us,
                target,
                reading,
            });
        });
        let _ = watcher.advance((second + 1) * 1_000_000 + LATENESS_US);
        endpoint.burst(watcher.suspects(target));
        if second >= LEARN_S {
            after(second - LEARN_S, &mut watcher, target);
        }
    }
}

fn thresholds(effort: &Effort) -> [Thresholds; 3] {
    let mut largest: [Vec<f64>; 3] = Default::default();
    let blank = Calibration::blank();
    for day in 0..effort.vm_days {
        let mut of_day: [Vec<f64>; 3] = Default::default();
        quiet_day(
            effort.seed + (3 << 32) + day,
            &blank,
            false,
            |second, watcher, target| {
                if second.is_multiple_of(BLOCK_S) {
                    of_day.iter_mut().for_each(|of| of.push(0.0));
                }
                let is_high = watcher.status(target).is_some_and(|status| status.is_high);
                let Some(mut statistics) = watcher.statistics(target) else {
                    return;
                };
                if !is_high {
                    // A growth that is over begins nothing.
                    statistics[0] = 0.0;
                }
                for (of, value) in of_day.iter_mut().zip(statistics) {
                    if let Some(last) = of.last_mut() {
                        *last = last.max(value);
                    }
                }
            },
        );
        for (of, of_day) in largest.iter_mut().zip(of_day) {
            // Who loses nothing at all, or has no clock, says nothing about those who do.
            if of_day.iter().any(|value| *value > 0.0) {
                of.extend(of_day);
            }
        }
    }
    largest.map(|mut of| {
        of.sort_by(|a, b| b.total_cmp(a));
        let at = |per_day: f64| {
            let exceed = per_day * of.len() as f64 / (DAY_S / BLOCK_S) as f64;
            above(of.get(exceed as usize).copied().unwrap_or(f64::MAX))
        };
        Thresholds {
            weak: at(24.0),
            clear: at(1.0),
            strong: at(0.1),
        }
    })
}

/// A little above a value, and short, so that the table can be read.
fn above(value: f64) -> f64 {
    if value < 1e12 {
        ((value * 1000.0).floor() + 1.0) / 1000.0
    } else {
        value
    }
}

#[derive(Default)]
struct Counts {
    counts: Vec<[[f64; SYMBOLS_MAX]; Channel::ALL.len()]>,
}

impl Counts {
    fn add(&mut self, class: Class, snapshot: &Snapshot) {
        self.counts.resize(Class::ALL.len(), Default::default());
        for (channel, symbol) in self.counts[class.index()].iter_mut().zip(snapshot.symbols) {
            if let Some(symbol) = symbol {
                channel[usize::from(symbol)] += snapshot.weight;
            }
        }
    }

    fn table(&self) -> Table {
        let mut table = Calibration::blank().hearing.full;
        for class in Class::ALL {
            for channel in Channel::ALL {
                let known = self
                    .counts
                    .get(class.index())
                    .map(|of| of[channel as usize]);
                let counts = known.unwrap_or_default();
                let symbols = channel.symbols().len();
                let total: f64 = counts.iter().sum::<f64>() + PRIOR * symbols as f64;
                for (symbol, log) in table[class.index()][channel as usize]
                    .iter_mut()
                    .enumerate()
                {
                    if symbol < symbols {
                        let share = (counts[symbol] + PRIOR) / total;
                        *log = (share.ln() * 1000.0).round() / 1000.0;
                    }
                }
            }
        }
        table
    }
}

/// Isotonic regression by pooling adjacent violators, reduced to a few points.
fn curve(mut scores: Vec<(f64, f64, bool)>) -> Curve {
    scores.sort_by(|a, b| a.0.total_cmp(&b.0));
    // Each: lowest and highest score, weight, weight of migrations.
    let mut pools: Vec<(f64, f64, f64, f64)> = Vec::new();
    for (score, weight, is_positive) in scores {
        let positive = if is_positive { weight } else { 0.0 };
        pools.push((score, score, weight, positive));
        while pools.len() >= 2 {
            let (a, b) = (pools[pools.len() - 2], pools[pools.len() - 1]);
            if a.3 * b.2 < b.3 * a.2 && a.1 < b.0 {
                break;
            }
            pools.truncate(pools.len() - 2);
            pools.push((a.0, b.1, a.2 + b.2, a.3 + b.3));
        }
    }
    let all: f64 = pools.iter().map(|pool| pool.2).sum();
    let mut points = [(0.0, 0.5); CURVE_POINTS];
    let (mut left, mut next) = (all, 0);
    let mut merged = (0.0, 0.0, 0.0);
    for (at, pool) in pools.iter().enumerate() {
        merged.0 += (pool.0 + pool.1) / 2.0 * pool.2;
        merged.1 += pool.2;
        merged.2 += pool.3;
        // What is left is shared evenly by the points that are left; the last takes all.
        let is_full = next + 1 < CURVE_POINTS && merged.1 >= left / (CURVE_POINTS - next) as f64;
        if is_full || at + 1 == pools.len() {
            // As if one trial of a thousand of each kind were here, too: nothing is certain.
            let share = (merged.2 + all * 0.0005) / (merged.1 + all * 0.001);
            points[next] = (merged.0 / merged.1, share);
            next += 1;
            left -= merged.1;
            merged = (0.0, 0.0, 0.0);
        }
    }
    let last = if next == 0 {
        (0.0, 0.5)
    } else {
        points[next - 1]
    };
    for (at, point) in points.iter_mut().enumerate() {
        if at >= next {
            *point = last;
        }
        *point = (
            (point.0 * 1000.0).round() / 1000.0,
            (point.1 * 10_000.0).round() / 10_000.0,
        );
    }
    for at in 1..CURVE_POINTS {
        // What is as if it were here may make it fall by a little.
        points[at].1 = points[at].1.max(points[at - 1].1);
    }
    points
}

/// Raises the threshold of warnings until there is at most one in a VM-day.
fn raise_warnings(effort: &Effort, calibration: &mut Calibration) {
    let mut values = Vec::new();
    for day in 0..effort.vm_days {
        let mut warned = None;
        quiet_day(
            effort.seed + (5 << 32) + day,
            calibration,
            false,
            |_, watcher, _| {
                while let Some(finding) = watcher.poll() {
                    if finding.level == Level::Warn {
                        warned = Some(finding.episode);
                    }
                    let rise = finding
                        .evidence
                        .iter()
                        .find(|of| of.channel == Channel::Rise);
                    if finding.ended_s.is_some() && warned == Some(finding.episode) {
                        values.extend(rise.map(|of| of.value));
                    }
                }
            },
        );
    }
    values.sort_by(|a, b| b.total_cmp(a));
    let value = values.get(effort.vm_days as usize).copied().unwrap_or(0.0);
    let rise = &mut calibration.rise;
    rise.clear = rise.clear.max(above(value));
    rise.strong = rise.strong.max(rise.clear);
}

/// The least scores with which synthetic quiet VM-days have that many alarms a day, one for each rate. Days are those of
/// [`Effort::seed`] 0, which calibrating uses not.
#[must_use]
pub fn alarm_scores(
    vm_days: u64,
    rates: &[f64],
    calibration: &Calibration,
    hears: bool,
) -> Vec<f64> {
    let scores = quiet_scores(vm_days, 6 << 32, calibration, hears);
    let at = |rate: &f64| {
        let allowed = (vm_days as f64 * rate) as usize;
        above(scores.get(allowed).copied().unwrap_or(0.0).max(0.0))
    };
    rates.iter().map(at).collect()
}

/// Scores of all that would be alarms in quiet VM-days if any score were enough, the highest first.
fn quiet_scores(vm_days: u64, seed: u64, calibration: &Calibration, hears: bool) -> Vec<f64> {
    let mut calibration = calibration.clone();
    calibration.weights_mut(hears).alarm_score = 0.0;
    let mut scores = Vec::new();
    for day in 0..vm_days {
        let mut of_day: Vec<(u64, f64)> = Vec::new();
        quiet_day(seed + day, &calibration, hears, |_, watcher, _| {
            while let Some(finding) = watcher.poll() {
                if finding.level < Level::Alarm {
                    continue;
                }
                match of_day.last_mut() {
                    Some((episode, score)) if *episode == finding.episode => {
                        *score = score.max(finding.score);
                    }
                    _ => of_day.push((finding.episode, finding.score)),
                }
            }
        });
        scores.extend(of_day.into_iter().map(|(_, score)| score));
    }
    scores.sort_by(|a, b| b.total_cmp(a));
    scores
}

/// The least score of an alarm, by a calibration that takes any for one.
fn alarm_score(
    effort: &Effort,
    recorded: &[Recorded],
    calibration: &Calibration,
    hears: bool,
) -> f64 {
    let scores = quiet_scores(effort.vm_days, effort.seed + (4 << 32), calibration, hears);
    let allowed = (effort.vm_days as f64 * 0.1) as usize;
    let mut score = scores.get(allowed).copied().unwrap_or(0.0).max(0.0);
    let highest = |findings: &[Finding]| {
        let alarms = findings.iter().filter(|of| of.level >= Level::Alarm);
        alarms.map(|of| of.score).fold(0.0, f64::max)
    };
    let mut copies: Vec<f64> = (0..effort.trials)
        .map(|at| {
            let copied = Trial::new(Class::CopyTraffic, effort.seed + (2 << 32) + at);
            highest(&watch(copied, calibration, hears).findings)
        })
        .collect();
    copies.sort_by(|a, b| b.total_cmp(a));
    let allowed = (effort.trials as f64 * COPIES) as usize;
    score = score.max(copies.get(allowed).copied().unwrap_or(0.0));
    for of in recorded
        .iter()
        .flat_map(|session| session.watch(calibration, hears))
    {
        if of.class == Class::CopyTraffic {
            score = score.max(highest(&of.findings));
        }
    }
    above(score)
}

/// A calibration as the source of `calibration/table.rs`.
#[must_use]
pub fn source(made: &Calibration, effort: &Effort, sessions: usize) -> String {
    let mut text = format!(
        "//! Written by `cargo xtask trials calibrate` from synthetic traces, {} quiet VM-days for each step and {} trials of each\n\
         //! class for each step from seed {}, and from {sessions} recorded sessions.\n\n\
         use super::{{Calibration, Thresholds, Weights}};\n\n\
         #[rustfmt::skip]\n\
         pub(super) const BUILT_IN: Calibration = Calibration {{\n",
        effort.vm_days, effort.trials, effort.seed
    );
    for (name, of) in [
        ("rise", made.rise),
        ("silence", made.silence),
        ("clock", made.clock),
    ] {
        let _ = writeln!(text, "    {name}: {of:?},");
    }
    for (name, weights) in [("hearing", &made.hearing), ("deaf", &made.deaf)] {
        let _ = writeln!(text, "    {name}: Weights {{");
        for (name, table) in [("early", &weights.early), ("full", &weights.full)] {
            let _ = writeln!(text, "        {name}: [");
            for class in table {
                let _ = writeln!(text, "            [");
                for channel in class {
                    let _ = writeln!(text, "                {channel:?},");
                }
                let _ = writeln!(text, "            ],");
            }
            let _ = writeln!(text, "        ],");
        }
        for (name, curve) in [
            ("early_curve", weights.early_curve),
            ("full_curve", weights.full_curve),
        ] {
            let _ = writeln!(text, "        {name}: {curve:?},");
        }
        let _ = writeln!(text, "        alarm_score: {:?},", weights.alarm_score);
        let _ = writeln!(text, "    }},");
    }
    let _ = writeln!(text, "    quiet_vm_days: {:?},\n}};", made.quiet_vm_days);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_never_falls_and_ends_where_migrations_are() {
        let mut chance = crate::synthetic::Chance::new(5);
        let scores = (0..4000)
            .map(|at| {
                let is_positive = at % 2 == 0;
                let score = chance.normal() + if is_positive { 1.0 } else { -1.0 };
                (score, 1.0, is_positive)
            })
            .collect();
        let curve = curve(scores);
        assert!(
            curve
                .windows(2)
                .all(|w| w[0].0 <= w[1].0 && w[0].1 <= w[1].1)
        );
        let mut weights = Calibration::blank().hearing;
        weights.full_curve = curve;
        // Of two normal distributions two apart, the odds are exp(2 score).
        for score in [-1.0, 0.0, 0.7] {
            let expected = 1.0 / (1.0 + (-2.0_f64 * score).exp());
            let share = weights.probability(Stage::Full, score);
            assert!(
                (share - expected).abs() < 0.08,
                "{score}: {share} {expected}"
            );
        }
    }
}
