//! What was ordered explains what was noticed: within its window, for its VM and its hosts, once.
//!
//! Records come from the control plane, verified by whoever adds them. What no record explains stays what it is, an alarm;
//! a record that nothing was noticed of is "unconfirmed". A record never makes the detector blind: it only says why.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::finding::{Finding, Level};
use crate::watcher::NAME_MAX;

/// Longest window of a record, in seconds.
pub const WINDOW_S_MAX: f64 = 86_400.0;
/// Most records that are not over.
pub const RECORDS_MAX: usize = 4096;
/// Clocks and estimated beginnings may differ by so much, in seconds.
pub const SLACK_S: f64 = 15.0;
/// So long after its window a record may still be confirmed, in seconds: clocks are read seldom.
pub const CONFIRM_WAIT_S: f64 = 150.0;
/// So long after its window a record goes on explaining what it has explained, in seconds: a finding is told once more
/// when its episode is over.
const EXPLAIN_S: f64 = 7200.0;

/// A migration that somebody ordered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its name, used once.
    pub id: String,
    /// Name of the VM, as it is watched.
    pub vm: String,
    /// Name of the host it leaves.
    pub source: String,
    /// Name of the host it goes to.
    pub destination: String,
    /// Not before this, in seconds of the observations' clock.
    pub from_s: f64,
    /// Not after this.
    pub to_s: f64,
}

/// Why a record does not count.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum RecordError {
    /// Its window was over when it came.
    #[error("record {0:?} came after its window was over")]
    Expired(String),
    /// An empty or too long name.
    #[error("the names in a record have 1 to {NAME_MAX} bytes")]
    Name,
    /// One of that name was added before.
    #[error("record {0:?} was there before")]
    Replayed(String),
    /// Source and destination are the same.
    #[error("record {0:?} moves a VM from a host to the same host")]
    SameHost(String),
    /// More than [`RECORDS_MAX`].
    #[error("more than {RECORDS_MAX} records that are not over")]
    TooMany,
    /// No times, or an end before the beginning, or more than [`WINDOW_S_MAX`] between them.
    #[error("the window of record {0:?} is none, or is longer than {WINDOW_S_MAX} s")]
    Window(String),
}

/// Whether a finding is explained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum Verdict {
    /// By this record.
    Authorised {
        /// Its name.
        record: String,
    },
    /// It looks like what this record says, but hosts are disturbed that are not in it: not explained.
    Elsewhere {
        /// Its name.
        record: String,
        /// These hosts.
        hosts: Vec<String>,
    },
    /// It is not taken for a migration: there is nothing to explain.
    NoMigration,
    /// Nobody ordered it.
    Unknown,
}

impl Verdict {
    /// Whether a migration is left that nobody ordered.
    #[must_use]
    pub fn is_unexplained(&self) -> bool {
        matches!(self, Self::Elsewhere { .. } | Self::Unknown)
    }
}

/// A finding and what explains it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Joined {
    /// What was found.
    #[serde(flatten)]
    pub finding: Finding,
    /// Whether somebody ordered it.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// A record of which nothing was noticed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Unconfirmed {
    /// The record.
    pub record: Record,
    /// Whether the VM was watched then: if not, nothing could be noticed.
    pub watched: bool,
}

struct Entry {
    record: Record,
    /// Whether any finding was explained by it.
    is_confirmed: bool,
    /// The episode in which the VM was seen to move.
    used_by: Option<u64>,
}

/// The records that are not over.
#[derive(Default)]
pub struct Ledger {
    entries: BTreeMap<String, Entry>,
    now_s: f64,
}

impl Ledger {
    /// One without records.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a record.
    ///
    /// # Errors
    /// If it is none, came too late or before; then it explains nothing.
    pub fn add(&mut self, record: Record) -> Result<(), RecordError> {
        let names = [&record.id, &record.vm, &record.source, &record.destination];
        if names
            .iter()
            .any(|name| name.is_empty() || name.len() > NAME_MAX)
        {
            return Err(RecordError::Name);
        }
        let length_s = record.to_s - record.from_s;
        let is_window = record.from_s.is_finite() && (0.0..=WINDOW_S_MAX).contains(&length_s);
        if !is_window {
            return Err(RecordError::Window(record.id));
        }
        if record.source == record.destination {
            return Err(RecordError::SameHost(record.id));
        }
        if record.to_s + SLACK_S < self.now_s {
            return Err(RecordError::Expired(record.id));
        }
        if self.entries.contains_key(&record.id) {
            return Err(RecordError::Replayed(record.id));
        }
        if self.entries.len() == RECORDS_MAX {
            return Err(RecordError::TooMany);
        }
        let entry = Entry {
            record,
            is_confirmed: false,
            used_by: None,
        };
        self.entries.insert(entry.record.id.clone(), entry);
        Ok(())
    }

    /// Adds the record of something that goes on, or moves the end of its window to a later time: nobody knows beforehand
    /// how long a migration takes. Nothing else of a record can change, nor can an end become an earlier one.
    ///
    /// # Errors
    /// As [`Self::add`], and if the record names another VM or other hosts than before; then nothing has changed.
    pub fn follow(&mut self, record: Record) -> Result<(), RecordError> {
        let Some(entry) = self.entries.get_mut(&record.id) else {
            return self.add(record);
        };
        let own = &mut entry.record;
        let is_same = (&own.vm, &own.source, &own.destination)
            == (&record.vm, &record.source, &record.destination);
        if !is_same {
            return Err(RecordError::Replayed(record.id));
        }
        let length_s = record.to_s - own.from_s;
        if length_s.is_nan() || length_s > WINDOW_S_MAX {
            return Err(RecordError::Window(record.id));
        }
        own.to_s = own.to_s.max(record.to_s);
        Ok(())
    }

    /// Says whether a finding is explained. One migration uses a record up: what moves the VM again is not explained
    /// by it.
    pub fn judge(&mut self, finding: Finding) -> Joined {
        let verdict = self.verdict(&finding);
        Joined { finding, verdict }
    }

    /// Says that it is that time, and gives the records that are over without that anything was noticed of them.
    pub fn advance(
        &mut self,
        now_s: f64,
        is_watched: impl Fn(&Record) -> bool,
    ) -> Vec<Unconfirmed> {
        // A time that is none changes nothing.
        self.now_s = self.now_s.max(now_s);
        let mut unconfirmed = Vec::new();
        self.entries.retain(|_, entry| {
            let wait_s = if entry.is_confirmed {
                EXPLAIN_S
            } else {
                CONFIRM_WAIT_S
            };
            let is_over = entry.record.to_s + wait_s < self.now_s;
            if is_over && !entry.is_confirmed {
                unconfirmed.push(Unconfirmed {
                    watched: is_watched(&entry.record),
                    record: entry.record.clone(),
                });
            }
            !is_over
        });
        unconfirmed
    }

    /// Gives all that nothing was noticed of, over or not: nothing more will come.
    pub fn finish(&mut self, is_watched: impl Fn(&Record) -> bool) -> Vec<Unconfirmed> {
        self.advance(f64::INFINITY, is_watched)
    }

    fn verdict(&mut self, finding: &Finding) -> Verdict {
        if finding.level == Level::Note {
            return Verdict::NoMigration;
        }
        let mut elsewhere = None;
        for (id, entry) in &mut self.entries {
            let record = &entry.record;
            let is_used = entry
                .used_by
                .is_some_and(|episode| episode != finding.episode);
            if record.vm != finding.target || is_used || !covers(record, finding) {
                continue;
            }
            let strangers: Vec<String> = finding
                .hosts
                .iter()
                .filter(|host| **host != record.source && **host != record.destination)
                .cloned()
                .collect();
            if !strangers.is_empty() {
                elsewhere.get_or_insert(Verdict::Elsewhere {
                    record: id.clone(),
                    hosts: strangers,
                });
                continue;
            }
            entry.is_confirmed = true;
            if finding.break_s.is_some() {
                entry.used_by = Some(finding.episode);
            }
            return Verdict::Authorised { record: id.clone() };
        }
        elsewhere.unwrap_or(Verdict::Unknown)
    }
}

/// Whether all of it happened in the record's window.
fn covers(record: &Record, finding: &Finding) -> bool {
    let last_s = finding.break_s.unwrap_or(finding.onset_s);
    finding.onset_s >= record.from_s - SLACK_S && last_s <= record.to_s + SLACK_S
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::{Class, Stage};

    fn record() -> Record {
        Record {
            id: "m1".to_owned(),
            vm: "web".to_owned(),
            source: "a".to_owned(),
            destination: "b".to_owned(),
            from_s: 1000.0,
            to_s: 1060.0,
        }
    }

    fn finding(onset_s: f64, break_s: f64, hosts: &[&str]) -> Finding {
        Finding {
            target: "web".to_owned(),
            episode: 1,
            time_s: break_s + 2.0,
            onset_s,
            break_s: Some(break_s),
            ended_s: None,
            level: Level::Alarm,
            class: Class::Migration,
            likelihood: 0.97,
            stage: Stage::Full,
            score: 3.5,
            evidence: Vec::new(),
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
        }
    }

    fn ledger() -> Ledger {
        let mut ledger = Ledger::new();
        ledger.add(record()).unwrap();
        ledger
    }

    #[test]
    fn a_record_explains_what_happens_in_its_window_to_its_vm_between_its_hosts() {
        let authorised = Verdict::Authorised {
            record: "m1".to_owned(),
        };
        for hosts in [&[][..], &["a"], &["a", "b"]] {
            let joined = ledger().judge(finding(1005.0, 1030.0, hosts));
            assert_eq!(joined.verdict, authorised);
        }
        let mut other = finding(1005.0, 1030.0, &[]);
        other.target = "db".to_owned();
        assert_eq!(ledger().judge(other).verdict, Verdict::Unknown);
        let mut note = finding(5.0, 6.0, &[]);
        note.level = Level::Note;
        assert_eq!(ledger().judge(note).verdict, Verdict::NoMigration);
    }

    #[test]
    fn outside_its_window_a_record_explains_nothing() {
        for (onset_s, break_s) in [(900.0, 1030.0), (1005.0, 1100.0), (2000.0, 2010.0)] {
            let joined = ledger().judge(finding(onset_s, break_s, &["a"]));
            assert_eq!(joined.verdict, Verdict::Unknown, "{onset_s} {break_s}");
            assert!(joined.verdict.is_unexplained());
        }
    }

    #[test]
    fn a_migration_to_another_host_than_ordered_is_not_explained() {
        let joined = ledger().judge(finding(1005.0, 1030.0, &["a", "thief"]));
        let hosts = vec!["thief".to_owned()];
        let record = "m1".to_owned();
        assert_eq!(joined.verdict, Verdict::Elsewhere { record, hosts });
        assert!(joined.verdict.is_unexplained());
    }

    #[test]
    fn one_record_explains_one_migration() {
        let mut ledger = ledger();
        let mut warning = finding(1002.0, 0.0, &[]);
        (warning.break_s, warning.level) = (None, Level::Warn);
        // One that was aborted first, then the one that was ordered, as it goes on.
        assert!(!ledger.judge(warning).verdict.is_unexplained());
        let mut again = finding(1005.0, 1030.0, &[]);
        again.episode = 2;
        assert!(!ledger.judge(again.clone()).verdict.is_unexplained());
        assert!(!ledger.judge(again.clone()).verdict.is_unexplained());
        again.episode = 3;
        assert_eq!(ledger.judge(again).verdict, Verdict::Unknown);
    }

    #[test]
    fn a_record_without_a_signal_is_unconfirmed_once() {
        let mut ledger = ledger();
        assert!(ledger.advance(1060.0 + CONFIRM_WAIT_S, |_| true).is_empty());
        let unconfirmed = ledger.advance(1061.0 + CONFIRM_WAIT_S, |record| record.vm == "web");
        let expected = Unconfirmed {
            record: record(),
            watched: true,
        };
        assert_eq!(unconfirmed, [expected]);
        assert!(ledger.finish(|_| true).is_empty());
    }

    #[test]
    fn what_was_explained_stays_so_when_it_is_told_again_later() {
        let mut ledger = ledger();
        assert!(
            !ledger
                .judge(finding(1005.0, 1030.0, &[]))
                .verdict
                .is_unexplained()
        );
        assert!(
            ledger
                .advance(1060.0 + 10.0 * CONFIRM_WAIT_S, |_| true)
                .is_empty()
        );
        assert!(
            !ledger
                .judge(finding(1005.0, 1030.0, &[]))
                .verdict
                .is_unexplained()
        );
        assert!(ledger.finish(|_| true).is_empty());
    }

    #[test]
    fn expired_replayed_and_absurd_records_do_not_count() {
        let mut ledger = ledger();
        let refused = |ledger: &mut Ledger, change: fn(&mut Record)| {
            let mut record = record();
            record.id = "m2".to_owned();
            change(&mut record);
            ledger.add(record).unwrap_err()
        };
        let name = || "m2".to_owned();
        assert_eq!(
            ledger.add(record()),
            Err(RecordError::Replayed("m1".to_owned()))
        );
        assert_eq!(refused(&mut ledger, |r| r.vm.clear()), RecordError::Name);
        assert_eq!(
            refused(&mut ledger, |r| r.source = "x".repeat(200)),
            RecordError::Name
        );
        assert_eq!(
            refused(&mut ledger, |r| r.destination = "a".to_owned()),
            RecordError::SameHost(name())
        );
        for change in [
            (|r| r.from_s = f64::NAN) as fn(&mut Record),
            |r| r.to_s = f64::INFINITY,
            |r| r.from_s = f64::NEG_INFINITY,
            |r| r.to_s = 999.0,
            |r| r.to_s = 1000.0 + WINDOW_S_MAX + 1.0,
        ] {
            assert_eq!(refused(&mut ledger, change), RecordError::Window(name()));
        }
        ledger.advance(5000.0, |_| true);
        assert_eq!(refused(&mut ledger, |_| {}), RecordError::Expired(name()));
        assert_eq!(
            ledger.add(record()),
            Err(RecordError::Expired("m1".to_owned()))
        );
    }

    #[test]
    fn the_window_of_what_goes_on_grows_within_its_bound_and_nothing_else_of_it_changes() {
        let mut ledger = Ledger::new();
        let until = |to_s: f64| Record { to_s, ..record() };
        ledger.follow(until(1010.0)).unwrap();
        assert!(
            ledger
                .judge(finding(1005.0, 1050.0, &[]))
                .verdict
                .is_unexplained()
        );
        ledger.follow(until(1060.0)).unwrap();
        ledger.follow(until(1020.0)).unwrap();
        assert!(
            !ledger
                .judge(finding(1005.0, 1050.0, &[]))
                .verdict
                .is_unexplained()
        );
        for to_s in [f64::NAN, f64::INFINITY, 1001.0 + WINDOW_S_MAX] {
            let error = ledger.follow(until(to_s)).unwrap_err();
            assert_eq!(error, RecordError::Window("m1".to_owned()));
        }
        let mut other = until(1070.0);
        other.destination = "thief".to_owned();
        assert_eq!(
            ledger.follow(other),
            Err(RecordError::Replayed("m1".to_owned()))
        );
        assert_eq!(ledger.finish(|_| true).len(), 0, "it was confirmed");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut ledger = Ledger::new();
        for number in 0..RECORDS_MAX {
            let id = format!("m{number}");
            ledger.add(Record { id, ..record() }).unwrap();
        }
        let id = "last".to_owned();
        assert_eq!(
            ledger.add(Record { id, ..record() }),
            Err(RecordError::TooMany)
        );
    }
}
