//! What the detector, and the heuristics of 2013, say of a recorded session, event by event.

use palanquin_watch::baseline::Baseline;
use palanquin_watch::calibrate::{ONSET_SLACK_S, Recorded};
use palanquin_watch::{
    Calibration, Class, Finding, LATENESS_US, Level, Observation, Reading, Role, Watcher,
};

use crate::corpus::{Event, Seen, Session};

/// What is told so long before an event is of something else.
const BEFORE_S: f64 = 1.0;
/// What is told so long after an event, and before the next one of this target, is still of it.
const AFTER_S: f64 = 60.0;
/// In this time no target is judged: it is learnt.
pub const LEARN_S: f64 = 60.0;

/// What became of an event.
#[derive(Clone, Debug)]
pub struct Judged {
    /// Number of the session.
    pub session: usize,
    /// The event.
    pub event: Event,
    /// When an alarm was told first, in seconds of the trace, including the time that the detector waits for late answers.
    pub alarm_s: Option<f64>,
    /// When it was told first that a migration may be under way.
    pub warned_s: Option<f64>,
    /// What was told last, if anything.
    pub named: Option<Class>,
    /// Probability of a migration that was told last; 0 if nothing was.
    pub likelihood: f64,
    /// Highest score of an alarm.
    pub score: Option<f64>,
    /// When the heuristics of 2013 began an alarm first.
    pub old_alarm_s: Option<f64>,
}

/// An alarm where nothing was moved.
#[derive(Clone, Debug)]
pub struct FalseAlarm {
    /// Number of the session.
    pub session: usize,
    /// Of whom.
    pub target: String,
    /// When it was told.
    pub at_s: f64,
    /// What happened then: a class, of this target or another.
    pub during: Option<(Class, bool)>,
}

/// What became of a session.
#[derive(Clone, Debug, Default)]
pub struct Verdicts {
    /// Each event that is not spoilt.
    pub events: Vec<Judged>,
    /// The detector's false alarms.
    pub false_alarms: Vec<FalseAlarm>,
    /// Those of the heuristics of 2013.
    pub old_false_alarms: Vec<FalseAlarm>,
    /// Warnings where nothing was about to be moved.
    pub false_warnings: Vec<FalseAlarm>,
    /// Seconds of VMs that were watched and in which none was moved.
    pub unmoved_s: f64,
}

/// When a finding is told: its second is over, and what may come late has come.
fn told_s(finding: &Finding) -> f64 {
    finding.time_s + LATENESS_US as f64 / 1e6
}

/// All that the detector finds in a session, the earliest first; with an ear for announcements or without.
#[must_use]
pub fn findings(session: &Session, calibration: &Calibration, hears: bool) -> Vec<Finding> {
    let mut watcher = Watcher::new(calibration.clone());
    watcher.listen(hears);
    let targets: Vec<_> = session
        .labels
        .targets
        .iter()
        .filter_map(|of| watcher.add(&of.name, of.role()).ok())
        .collect();
    let mut stalls = session.labels.stalls_s.iter().peekable();
    let mut findings = Vec::new();
    let heard = |seen: &&Seen| hears || seen.reading != Reading::Announced;
    for seen in session.seen.iter().filter(heard) {
        let at_s = seen.sent_us as f64 / 1e6;
        while let Some((from_s, until_s)) = stalls.next_if(|(_, until_s)| *until_s <= at_s) {
            watcher.stalled((from_s * 1e6) as u64, (until_s * 1e6) as u64);
        }
        // Parsing has refused what the detector would, and nothing is late in what is sorted.
        let _ = watcher.observe(Observation {
            sent_us: seen.sent_us,
            target: targets[seen.target],
            reading: seen.reading,
        });
        findings.extend(std::iter::from_fn(|| watcher.poll()));
    }
    watcher.finish();
    findings.extend(std::iter::from_fn(|| watcher.poll()));
    findings
}

/// When the heuristics of 2013 begin an alarm, and of whom.
fn old_alarms(session: &Session) -> Vec<(usize, f64)> {
    let mut all: Vec<Baseline> = session
        .labels
        .targets
        .iter()
        .map(|_| Baseline::default())
        .collect();
    let mut alarms = Vec::new();
    for seen in &session.seen {
        let is_vm = session.labels.targets[seen.target].role() == Role::Vm;
        if is_vm && all[seen.target].take(seen.sent_us, seen.reading) {
            alarms.push((seen.target, seen.sent_us as f64 / 1e6));
        }
    }
    alarms
}

/// Judges a session, with an ear for announcements or without.
#[must_use]
pub fn judge(number: usize, session: &Session, calibration: &Calibration, hears: bool) -> Verdicts {
    let labels = &session.labels;
    let mut verdicts = Verdicts::default();
    let found = findings(session, calibration, hears);
    let old = old_alarms(session);
    for (at, event) in labels.events.iter().enumerate() {
        if event.spoilt.is_some() {
            continue;
        }
        let (from_s, until_s) = window(&labels.events, at);
        let within = |s: f64| (from_s..until_s).contains(&s);
        let mut judged = Judged {
            session: number,
            event: event.clone(),
            alarm_s: None,
            warned_s: None,
            named: None,
            likelihood: 0.0,
            score: None,
            old_alarm_s: None,
        };
        for finding in &found {
            // What is told last of something before is not of this. Round trips may have grown for another reason before.
            let since_s = finding.break_s.unwrap_or(finding.onset_s);
            let is_own = since_s >= event.from_s - ONSET_SLACK_S;
            if finding.target != event.target || !is_own || !within(told_s(finding)) {
                continue;
            }
            let told_s = told_s(finding);
            if finding.level >= Level::Alarm {
                judged.alarm_s = judged.alarm_s.or(Some(told_s));
                let best = judged.score.unwrap_or(f64::NEG_INFINITY);
                judged.score = Some(best.max(finding.score));
            }
            if finding.level >= Level::Warn {
                judged.warned_s = judged.warned_s.or(Some(told_s));
            }
            // What is told as nothing takes back what was told.
            judged.named = Some(finding.class).filter(|class| *class != Class::Quiet);
            judged.likelihood = finding.likelihood;
        }
        let target = session.target(&event.target);
        judged.old_alarm_s = old
            .iter()
            .find(|(of, s)| Some(*of) == target && within(*s))
            .map(|(_, s)| *s);
        verdicts.events.push(judged);
    }
    let mut told: Vec<(&str, u64, bool)> = Vec::new();
    for finding in &found {
        let is_alarm = finding.level >= Level::Alarm;
        let key = (finding.target.as_str(), finding.episode, is_alarm);
        if finding.level < Level::Warn || told.contains(&key) {
            continue;
        }
        let at_s = told_s(finding);
        let alarm = false_alarm(number, session, &finding.target, at_s, !is_alarm);
        // When it was told first counts, not that it is told again when it has ended.
        told.push(key);
        if let Some(alarm) = alarm {
            if is_alarm {
                verdicts.false_alarms.push(alarm);
            } else {
                verdicts.false_warnings.push(alarm);
            }
        }
    }
    for (target, at_s) in old {
        let name = &labels.targets[target].name;
        let alarm = false_alarm(number, session, name, at_s, false);
        verdicts.old_false_alarms.extend(alarm);
    }
    let vms = labels.targets.iter().filter(|of| !of.is_host).count();
    let moved_s: f64 = (0..labels.events.len())
        .filter(|at| counts_as_moved(&labels.events[*at], false))
        .map(|at| {
            let (from_s, until_s) = window(&labels.events, at);
            until_s.min(labels.length_s) - from_s
        })
        .sum();
    verdicts.unmoved_s = (vms as f64 * (labels.length_s - LEARN_S) - moved_s).max(0.0);
    verdicts
}

/// Whether what is told of this is no false alarm.
fn counts_as_moved(event: &Event, is_warning: bool) -> bool {
    event.class == Class::Migration
        || event.spoilt.is_some()
        || (is_warning && event.class == Class::AbortedMigration)
}

/// In which time what is told of its target belongs to an event.
fn window(events: &[Event], at: usize) -> (f64, f64) {
    let event = &events[at];
    let next = events[at + 1..]
        .iter()
        .find(|next| next.target == event.target)
        .map_or(f64::INFINITY, |next| next.from_s - BEFORE_S);
    (event.from_s - BEFORE_S, (event.until_s + AFTER_S).min(next))
}

/// A session as the detector is calibrated with it.
#[must_use]
pub fn recorded(session: &Session) -> Recorded {
    let events = &session.labels.events;
    let good = (0..events.len()).filter(|at| events[*at].spoilt.is_none());
    Recorded {
        targets: session
            .labels
            .targets
            .iter()
            .map(|of| (of.name.clone(), of.role()))
            .collect(),
        seen: session
            .seen
            .iter()
            .map(|seen| (seen.target, seen.sent_us, seen.reading))
            .collect(),
        events: good
            .filter_map(|at| {
                let target = session.target(&events[at].target)?;
                let (from_s, until_s) = window(events, at);
                Some((target, events[at].class, from_s, until_s))
            })
            .collect(),
    }
}

/// What an alarm then is, unless it is a true one.
fn false_alarm(
    number: usize,
    session: &Session,
    target: &str,
    at_s: f64,
    is_warning: bool,
) -> Option<FalseAlarm> {
    let events = &session.labels.events;
    let mut during: Option<(Class, bool)> = None;
    for (at, event) in events.iter().enumerate() {
        let (from_s, until_s) = window(events, at);
        if !(from_s..until_s).contains(&at_s) {
            continue;
        }
        let is_own = event.target == target;
        if is_own && counts_as_moved(event, is_warning) {
            return None;
        }
        // Its own event explains more than another's, and a later one more than an earlier.
        if is_own || during.is_none_or(|(_, own)| !own) {
            during = Some((event.class, is_own));
        }
    }
    Some(FalseAlarm {
        session: number,
        target: target.to_owned(),
        at_s,
        during,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::sample;

    fn event(class: Class, from_s: f64, until_s: f64) -> Event {
        Event {
            target: "vm".to_owned(),
            class,
            what: String::new(),
            from_s,
            until_s,
            blackout_s: None,
            tool: None,
            strategy: None,
            way: None,
            spoilt: None,
        }
    }

    #[test]
    fn an_event_ends_where_the_next_one_of_its_target_begins() {
        let events = [
            event(Class::Migration, 100.0, 110.0),
            event(Class::Pause, 140.0, 141.0),
        ];
        assert_eq!(window(&events, 0), (99.0, 139.0));
        assert_eq!(window(&events, 1), (139.0, 201.0));
    }

    #[test]
    fn an_alarm_is_true_only_while_its_own_target_is_moved() {
        let mut labels = sample();
        labels.events = vec![
            event(Class::Migration, 100.0, 110.0),
            event(Class::Pause, 140.0, 141.0),
        ];
        let session = Session {
            labels,
            seen: Vec::new(),
        };
        let of = |target, at_s| false_alarm(0, &session, target, at_s, false);
        assert!(of("vm", 112.0).is_none());
        assert_eq!(
            of("other", 112.0).unwrap().during,
            Some((Class::Migration, false))
        );
        assert_eq!(of("vm", 143.0).unwrap().during, Some((Class::Pause, true)));
        assert_eq!(of("vm", 90.0).unwrap().during, None);
    }

    #[test]
    fn a_session_in_which_nothing_happens_has_no_alarms() {
        let mut labels = sample();
        labels.length_s = 200.0;
        let seen = (0..400_u64).map(|at| Seen {
            sent_us: at * 500_000,
            target: 0,
            reading: Reading::Rtt {
                ms: 1.0 + (at * 7 % 13) as f64 / 100.0,
            },
        });
        let session = Session {
            labels,
            seen: seen.collect(),
        };
        let verdicts = judge(0, &session, &Calibration::built_in(), true);
        assert!(verdicts.false_alarms.is_empty() && verdicts.old_false_alarms.is_empty());
        assert!((verdicts.unmoved_s - 140.0).abs() < 1e-9);
    }
}
