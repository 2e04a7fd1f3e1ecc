//! What became of all events, in tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use palanquin_watch::calibrate::alarm_scores;
use palanquin_watch::{Calibration, Class};
use serde::Serialize;

use crate::corpus::{Part, Session};
use crate::interval::{rate_at_most, wilson};
use crate::judge::{Judged, Verdicts, judge};

const HOUR_S: f64 = 3600.0;
/// A migration that takes longer is to be warned of before its end.
pub const LONG_S: f64 = 10.0;
/// Bins of probabilities.
const BINS: usize = 5;

/// How often migrations were noticed at a rate of false alarms.
#[derive(Clone, Debug, Serialize)]
pub struct Recall {
    /// False alarms in a VM-day, by synthetic quiet days.
    pub rate: f64,
    /// Least score of an alarm for it.
    pub score: f64,
    /// Migrations that were alarms.
    pub alarms: usize,
    /// Migrations.
    pub of: usize,
    /// False alarms in all sessions, of events as well.
    pub false_alarms: usize,
}

/// All that is counted.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Sessions that were judged.
    pub sessions: usize,
    /// Hours of VMs in which none was moved.
    pub unmoved_h: f64,
    /// By rate.
    pub recalls: Vec<Recall>,
    /// Migrations that the heuristics of 2013 noticed.
    pub old_alarms: usize,
    /// Their false alarms.
    pub old_false_alarms: usize,
    /// Seconds from the end of each blackout until the alarm, sorted.
    pub delays_s: Vec<f64>,
    /// The same of the heuristics of 2013, which do not wait for late answers.
    pub old_delays_s: Vec<f64>,
    /// Migrations of more than ten seconds that were warned of before the blackout, and all of them.
    pub warned: (usize, usize),
    /// The same of all migrations.
    pub warned_of_all: (usize, usize),
    /// Migrations that were alarms or warnings, early or late.
    pub told: usize,
    /// Warnings where nothing was about to be moved.
    pub false_warnings: usize,
    /// Mean square of what probabilities were off.
    pub brier: f64,
    /// Probabilities that were told last: their mean, the share of migrations, and how many, by bins.
    pub bins: Vec<(f64, f64, usize)>,
    /// Events by class: what they were told to be last, alarms, and alarms of 2013.
    pub confusion: BTreeMap<String, Row>,
    /// Alarms where nothing was moved, by what happened.
    pub false_by: BTreeMap<String, usize>,
    /// Migrations by tool and strategy: alarms and all.
    pub by_way: BTreeMap<String, (usize, usize)>,
    /// Spoilt events.
    pub spoilt: usize,
    /// What was not noticed: session, time, and what it was.
    pub missed: Vec<String>,
}

/// What became of the events of a class.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// Events.
    pub events: usize,
    /// Events with an alarm.
    pub alarms: usize,
    /// Events with an alarm of 2013.
    pub old_alarms: usize,
    /// Events with an alarm or a warning.
    pub told: usize,
    /// What they were told to be last.
    pub named: BTreeMap<String, usize>,
}

/// Rates of false alarms in a VM-day that are reported.
pub const RATES: [f64; 3] = [0.01, 0.1, 1.0];

/// Counts what becomes of sessions of a part, with an ear for announcements or without. `quiet_days` synthetic quiet VM-days say which score has which rate; with
/// none, only the calibration's own score of an alarm is reported.
#[must_use]
pub fn report(
    sessions: &[Session],
    part: Part,
    calibration: &Calibration,
    hears: bool,
    quiet_days: u64,
) -> Report {
    let sessions = of_part(sessions, part);
    let judged = |calibration: &Calibration| -> Vec<Verdicts> {
        sessions
            .iter()
            .enumerate()
            .map(|(number, session)| judge(number, session, calibration, hears))
            .collect()
    };
    let verdicts = judged(calibration);
    let built_in_score = calibration.alarm_score(hears);
    let mut recalls = vec![recall(f64::NAN, built_in_score, &verdicts)];
    if quiet_days > 0 {
        let scores = alarm_scores(quiet_days, &RATES, calibration, hears);
        for (rate, score) in RATES.into_iter().zip(scores) {
            let mut other = calibration.clone();
            other.set_alarm_score(hears, score);
            recalls.push(recall(rate, score, &judged(&other)));
        }
    }
    count(&verdicts, &sessions, recalls)
}

/// Counts what becomes of the sessions for calibration if each is judged by a calibration from all the others.
#[must_use]
pub fn cross_validated(
    sessions: &[Session],
    hears: bool,
    calibration_without: impl Fn(&Session) -> Calibration,
) -> Report {
    let sessions = of_part(sessions, Part::Calibration);
    let (mut verdicts, mut score) = (Vec::new(), 0.0);
    for (number, session) in sessions.iter().enumerate() {
        let calibration = calibration_without(session);
        score += calibration.alarm_score(hears) / sessions.len() as f64;
        verdicts.push(judge(number, session, &calibration, hears));
    }
    let recalls = vec![recall(f64::NAN, score, &verdicts)];
    count(&verdicts, &sessions, recalls)
}

fn of_part(sessions: &[Session], part: Part) -> Vec<&Session> {
    let all = sessions.iter();
    all.filter(|session| session.labels.part == part).collect()
}

fn recall(rate: f64, score: f64, verdicts: &[Verdicts]) -> Recall {
    let migrations = verdicts.iter().flat_map(|of| &of.events).filter(is_moved);
    Recall {
        rate,
        score,
        alarms: migrations.clone().filter(|of| of.alarm_s.is_some()).count(),
        of: migrations.count(),
        false_alarms: verdicts.iter().map(|of| of.false_alarms.len()).sum(),
    }
}

fn is_moved(judged: &&Judged) -> bool {
    judged.event.class == Class::Migration
}

fn count(verdicts: &[Verdicts], sessions: &[&Session], recalls: Vec<Recall>) -> Report {
    let spoilt = sessions
        .iter()
        .flat_map(|session| &session.labels.events)
        .filter(|event| event.spoilt.is_some())
        .count();
    let events: Vec<&Judged> = verdicts.iter().flat_map(|of| &of.events).collect();
    let migrations: Vec<&Judged> = events.iter().copied().filter(is_moved).collect();
    let ended = |judged: &Judged| {
        judged
            .event
            .blackout_s
            .map_or(judged.event.until_s, |of| of.1)
    };
    let begun = |judged: &Judged| {
        judged
            .event
            .blackout_s
            .map_or(judged.event.until_s, |of| of.0)
    };
    let delays = |of: &dyn Fn(&Judged) -> Option<f64>| {
        let mut delays: Vec<f64> = migrations
            .iter()
            .filter_map(|judged| Some(of(judged)? - ended(judged)))
            .collect();
        delays.sort_by(f64::total_cmp);
        delays
    };
    let warned = |least_s: f64| {
        let long = migrations
            .iter()
            .filter(|judged| begun(judged) - judged.event.from_s >= least_s);
        let warned = long
            .clone()
            .filter(|judged| judged.warned_s.is_some_and(|s| s <= begun(judged)));
        (warned.count(), long.count())
    };
    let mut confusion: BTreeMap<String, Row> = BTreeMap::new();
    let mut by_way: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    let mut bins = vec![(0.0, 0.0, 0); BINS];
    let mut brier = 0.0;
    for judged in &events {
        let row = confusion.entry(judged.event.class.name().to_owned());
        let row = row.or_default();
        row.events += 1;
        row.alarms += usize::from(judged.alarm_s.is_some());
        row.told += usize::from(judged.warned_s.is_some());
        row.old_alarms += usize::from(judged.old_alarm_s.is_some());
        let name = judged.named.map_or("nothing", Class::name);
        *row.named.entry(name.to_owned()).or_default() += 1;
        let is_moved = is_moved(judged);
        let truth = f64::from(u8::from(is_moved));
        brier += (judged.likelihood - truth).powi(2) / events.len() as f64;
        let bin = ((judged.likelihood * BINS as f64) as usize).min(BINS - 1);
        bins[bin].0 += judged.likelihood;
        bins[bin].1 += truth;
        bins[bin].2 += 1;
        if is_moved {
            let known = |text: &Option<String>| text.clone().unwrap_or_default();
            let way = format!(
                "{} {}",
                known(&judged.event.tool),
                known(&judged.event.strategy)
            );
            let of_way = by_way.entry(way).or_default();
            of_way.0 += usize::from(judged.alarm_s.is_some());
            of_way.1 += 1;
        }
    }
    for bin in &mut bins {
        let number = bin.2.max(1) as f64;
        (bin.0, bin.1) = (bin.0 / number, bin.1 / number);
    }
    let mut false_by: BTreeMap<String, usize> = BTreeMap::new();
    for alarm in verdicts.iter().flat_map(|of| &of.false_alarms) {
        let what = match alarm.during {
            Some((class, true)) => class.name().to_owned(),
            Some((class, false)) => format!("{} of another", class.name()),
            None => "quiet".to_owned(),
        };
        *false_by.entry(what).or_default() += 1;
    }
    let missed = migrations
        .iter()
        .filter(|judged| judged.alarm_s.is_none())
        .map(|judged| {
            let (event, blackout) = (&judged.event, judged.event.blackout_s);
            let blackout = blackout.map_or("?".to_owned(), |(from, until)| {
                format!("{:.0}", (until - from) * 1e3)
            });
            format!(
                "{} at {:.0} s: {}, copied for {:.1} s, blackout {blackout} ms, told to be {}",
                sessions[judged.session].labels.session,
                event.from_s,
                event.what,
                begun(judged) - event.from_s,
                judged.named.map_or("nothing", Class::name)
            )
        })
        .collect();
    Report {
        sessions: verdicts.len(),
        unmoved_h: verdicts.iter().map(|of| of.unmoved_s).sum::<f64>() / HOUR_S,
        recalls,
        old_alarms: migrations
            .iter()
            .filter(|judged| judged.old_alarm_s.is_some())
            .count(),
        old_false_alarms: verdicts.iter().map(|of| of.old_false_alarms.len()).sum(),
        delays_s: delays(&|judged| judged.alarm_s),
        old_delays_s: delays(&|judged| judged.old_alarm_s),
        warned: warned(LONG_S),
        warned_of_all: warned(0.0),
        told: migrations
            .iter()
            .filter(|judged| judged.warned_s.is_some())
            .count(),
        false_warnings: verdicts.iter().map(|of| of.false_warnings.len()).sum(),
        brier,
        bins,
        confusion,
        false_by,
        by_way,
        spoilt,
        missed,
    }
}

/// The value below which that share of sorted values lies.
#[must_use]
pub fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get((last as f64 * share).round() as usize).copied()
}

fn share(hits: usize, of: usize) -> String {
    let (low, high) = wilson(hits, of);
    format!(
        "{hits} of {of} ({:.0} to {:.0} %)",
        low * 100.0,
        high * 100.0
    )
}

fn seconds(sorted: &[f64], at: f64) -> String {
    quantile(sorted, at).map_or("-".to_owned(), |s| format!("{s:.1} s"))
}

fn list(counts: &BTreeMap<String, usize>) -> String {
    let mut counts: Vec<_> = counts.iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let words: Vec<_> = counts
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    if words.is_empty() {
        "none".to_owned()
    } else {
        words.join(", ")
    }
}

impl Report {
    /// As Markdown.
    #[must_use]
    pub fn to_markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a string can't fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let of = self.recalls.first().map_or(0, |recall| recall.of);
        writeln!(
            text,
            "{} sessions, {of} migrations, {:.1} h of VMs that were not moved, {} spoilt events.\n",
            self.sessions, self.unmoved_h, self.spoilt
        )?;
        writeln!(
            text,
            "| false alarms in a VM-day, by synthetic quiet days | least score | migrations that were alarms (95 %) | false alarms here | at most in a VM-day here (95 %) |"
        )?;
        writeln!(text, "|---|---|---|---|---|")?;
        let at_most = |alarms: usize| rate_at_most(alarms, self.unmoved_h / 24.0);
        for recall in &self.recalls {
            let rate = if recall.rate.is_nan() {
                "as calibrated".to_owned()
            } else {
                recall.rate.to_string()
            };
            writeln!(
                text,
                "| {rate} | {:.1} | {} | {} | {:.0} |",
                recall.score,
                share(recall.alarms, recall.of),
                recall.false_alarms,
                at_most(recall.false_alarms)
            )?;
        }
        writeln!(
            text,
            "| heuristics of 2013 | - | {} | {} | {:.0} |\n",
            share(self.old_alarms, of),
            self.old_false_alarms,
            at_most(self.old_false_alarms)
        )?;
        writeln!(text, "| as calibrated | detector | 2013 |\n|---|---|---|")?;
        for (name, at) in [("half of the", 0.5), ("95 % of the", 0.95)] {
            writeln!(
                text,
                "| {name} alarms within, from the end of the blackout | {} | {} |",
                seconds(&self.delays_s, at),
                seconds(&self.old_delays_s, at)
            )?;
        }
        writeln!(
            text,
            "| warned before the blackout, migrations that copied for at least {LONG_S} s | {} | never |",
            share(self.warned.0, self.warned.1)
        )?;
        writeln!(
            text,
            "| warned before the blackout, all | {} | never |",
            share(self.warned_of_all.0, self.warned_of_all.1)
        )?;
        writeln!(
            text,
            "| migrations that were alarms or warnings, early or late | {} | - |",
            share(self.told, of)
        )?;
        writeln!(
            text,
            "| warnings where nothing was to be moved | {} | - |",
            self.false_warnings
        )?;
        writeln!(
            text,
            "| Brier score of the probability told last | {:.3} | - |",
            self.brier
        )?;
        writeln!(
            text,
            "| alarms where nothing was moved | {} | {} in all |\n",
            list(&self.false_by),
            self.old_false_alarms
        )?;
        writeln!(
            text,
            "| happened | events | alarms | alarms or warnings | alarms of 2013 | told to be, last |\n|---|---|---|---|---|---|"
        )?;
        for (name, row) in &self.confusion {
            writeln!(
                text,
                "| {name} | {} | {} | {} | {} | {} |",
                row.events,
                row.alarms,
                row.told,
                row.old_alarms,
                list(&row.named)
            )?;
        }
        writeln!(text, "\n| moved by | alarms |\n|---|---|")?;
        for (way, (alarms, of)) in &self.by_way {
            writeln!(text, "| {way} | {alarms} of {of} |")?;
        }
        writeln!(
            text,
            "\n| probability told last | events | mean of it | migrations |\n|---|---|---|---|"
        )?;
        for (at, (mean, truth, number)) in self.bins.iter().enumerate() {
            let of = |at: usize| at as f64 / BINS as f64;
            writeln!(
                text,
                "| {:.1} to {:.1} | {number} | {mean:.2} | {truth:.2} |",
                of(at),
                of(at + 1)
            )?;
        }
        if !self.missed.is_empty() {
            writeln!(text, "\nNot noticed:\n")?;
            for line in &self.missed {
                writeln!(text, "- {line}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_value() {
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&[1.0, 2.0, 9.0], 0.5), Some(2.0));
        assert_eq!(quantile(&[1.0, 2.0, 9.0], 1.0), Some(9.0));
    }

    #[test]
    fn a_report_of_nothing_is_written() {
        let report = report(&[], Part::HeldOut, &Calibration::built_in(), true, 0);
        let text = report.to_markdown();
        assert!(
            text.contains("0 sessions") && text.contains("0 of 0 (0 to 100 %)"),
            "{text}"
        );
    }
}
