//! `palanquin watch`: the detector, on recorded observations and on what probes see now.

#[cfg(feature = "watch-probes")]
mod board;
mod both;
#[cfg(feature = "watch-probes")]
mod config;
mod inside;
#[cfg(feature = "watch-probes")]
mod live;
#[cfg(feature = "watch-probes")]
mod metrics;
#[cfg(feature = "watch-probes")]
mod ordered;
#[cfg(feature = "watch-probes")]
mod page;
#[cfg(feature = "watch-probes")]
mod probing;
#[cfg(feature = "watch-probes")]
mod record;
#[cfg(feature = "watch-probes")]
mod screen;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use palanquin_watch::baseline::Baseline;
use palanquin_watch::inside::Evidence;
use palanquin_watch::outside::Outside;
use palanquin_watch::trace::{self, LINE_MAX, Replay, TraceError};
use palanquin_watch::{
    Calibration, Class, Joined, Ledger, Level, Record, TargetId, Unconfirmed, Verdict,
};
use serde::Serialize;

use crate::arguments::{ReplayArgs, WatchCommand};
use crate::commands::show;
use crate::failure::Failure;
use crate::files::read_text;
use crate::output::line;

/// Longest file of records, in bytes.
const RECORDS_FILE_MAX: usize = 4 << 20;
/// Most findings that are shown; later ones are counted.
const FINDINGS_MAX: usize = 10_000;

/// What a replay has come to.
#[derive(Serialize)]
struct Report {
    file: String,
    observations: u64,
    from_s: Option<f64>,
    to_s: Option<f64>,
    targets: Vec<Summary>,
    findings: Vec<Joined>,
    /// Findings beyond those shown.
    findings_dropped: u64,
    /// Records of which nothing was noticed.
    unconfirmed: Vec<Unconfirmed>,
    /// Targets that look otherwise, or answer faster or slower, than they did.
    signs: Vec<Sign>,
    /// Alarms of the heuristics of 2013, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    baseline: Option<Vec<BaselineAlarm>>,
    calibration: Provenance,
}

/// What is most serious about a target.
#[derive(Serialize)]
struct Summary {
    target: String,
    role: &'static str,
    findings: usize,
    /// Of the most serious finding, as it was told last.
    level: Option<Level>,
    class: Option<Class>,
    likelihood: Option<f64>,
    /// Whether a migration is among them that nobody ordered.
    unexplained: bool,
}

#[derive(Serialize)]
struct Sign {
    target: String,
    time_s: f64,
    #[serde(flatten)]
    sign: Evidence,
}

#[derive(Serialize)]
struct BaselineAlarm {
    target: String,
    time_s: f64,
    likelihood: f64,
}

/// What probabilities and thresholds are from.
#[derive(Serialize)]
struct Provenance {
    traces: &'static str,
    quiet_vm_days: f64,
    /// Whether announcements could be heard in the end: probabilities are others without.
    hears: bool,
}

/// Does what was typed.
pub(crate) async fn run(command: &WatchCommand, json: bool) -> Result<(), Failure> {
    match command {
        WatchCommand::Replay(arguments) => replay(arguments, json),
        WatchCommand::Inside(arguments) => inside::run(arguments, json).await,
        #[cfg(feature = "watch-probes")]
        WatchCommand::Record(arguments) => record::record(arguments, json).await,
        #[cfg(feature = "watch-probes")]
        WatchCommand::Run(arguments) => live::run(arguments, json).await,
        #[cfg(not(feature = "watch-probes"))]
        WatchCommand::Record(_) | WatchCommand::Run(_) => {
            let failure = Failure::usage("this program was built without probes");
            Err(failure.hint("build it with the feature `watch-probes`"))
        }
    }
}

fn replay(arguments: &ReplayArgs, json: bool) -> Result<(), Failure> {
    let mut ledger = Ledger::new();
    if let Some(file) = &arguments.records {
        add_records(&mut ledger, file)?;
    }
    let calibration = Calibration::built_in();
    let quiet_vm_days = calibration.quiet_vm_days;
    let mut run = Run {
        replay: Replay::new(calibration, arguments.hosts.clone()),
        ledger,
        report: Report {
            file: arguments.file.display().to_string(),
            observations: 0,
            from_s: None,
            to_s: None,
            targets: Vec::new(),
            findings: Vec::new(),
            findings_dropped: 0,
            unconfirmed: Vec::new(),
            signs: Vec::new(),
            baseline: arguments.baseline.then(Vec::new),
            calibration: Provenance {
                traces: "mostly synthetic",
                quiet_vm_days,
                hears: false,
            },
        },
        baselines: BTreeMap::new(),
        outside: BTreeMap::new(),
        names: BTreeMap::new(),
    };
    run.read(&arguments.file)?;
    let report = run.finish(&arguments.hosts);
    show(&report, text, json)
}

fn add_records(ledger: &mut Ledger, file: &Path) -> Result<(), Failure> {
    let wrong = || Failure::usage(format!("{} can't be used", file.display()));
    let records: Vec<Record> = serde_json::from_str(&read_text(file, RECORDS_FILE_MAX)?)
        .map_err(|error| wrong().cause(error))?;
    for record in records {
        ledger.add(record).map_err(|error| wrong().cause(error))?;
    }
    Ok(())
}

struct Run {
    replay: Replay,
    ledger: Ledger,
    report: Report,
    baselines: BTreeMap<TargetId, Baseline>,
    outside: BTreeMap<TargetId, Outside>,
    names: BTreeMap<String, TargetId>,
}

impl Run {
    fn read(&mut self, path: &Path) -> Result<(), Failure> {
        let unreadable =
            |error| Failure::usage(format!("cannot read {}", path.display())).cause(error);
        let mut reader = BufReader::new(File::open(path).map_err(unreadable)?);
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            // One byte more than a line may have, and its end.
            let mut bounded = reader.by_ref().take(LINE_MAX as u64 + 2);
            if bounded.read_until(b'\n', &mut bytes).map_err(unreadable)? == 0 {
                return Ok(());
            }
            if bytes.last() == Some(&b'\n') {
                bytes.pop();
            }
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
            }
            self.line(&bytes).map_err(|error| {
                let what = format!("{} can't be replayed", path.display());
                Failure::usage(what).cause(error)
            })?;
        }
    }

    fn line(&mut self, bytes: &[u8]) -> Result<(), TraceError> {
        self.replay.line(bytes)?;
        if let Ok(Some(entry)) = trace::parse(bytes) {
            self.note(&entry);
        }
        self.take_findings();
        Ok(())
    }

    fn note(&mut self, entry: &trace::Entry<'_>) {
        let time_s = entry.sent_us as f64 / 1e6;
        let report = &mut self.report;
        report.from_s = Some(report.from_s.map_or(time_s, |from_s| from_s.min(time_s)));
        report.to_s = Some(report.to_s.map_or(time_s, |to_s| to_s.max(time_s)));
        let Some(target) = self.replay.watcher.target(entry.target) else {
            return;
        };
        if !self.names.contains_key(entry.target) {
            self.names.insert(entry.target.to_owned(), target);
        }
        let outside = self.outside.entry(target).or_default();
        if let Some(sign) = outside.read(entry.reading)
            && report.signs.len() < FINDINGS_MAX
        {
            report.signs.push(Sign {
                target: entry.target.to_owned(),
                time_s,
                sign,
            });
        }
        let Some(alarms) = &mut report.baseline else {
            return;
        };
        let baseline = self.baselines.entry(target).or_default();
        if baseline.take(entry.sent_us, entry.reading) && alarms.len() < FINDINGS_MAX {
            alarms.push(BaselineAlarm {
                target: entry.target.to_owned(),
                time_s,
                likelihood: baseline.likelihood(),
            });
        }
    }

    fn take_findings(&mut self) {
        while let Some(finding) = self.replay.watcher.poll() {
            self.advance(finding.time_s);
            let joined = self.ledger.judge(finding);
            let is_over = joined.finding.ended_s.is_some();
            if is_over && matches!(joined.verdict, Verdict::Authorised { .. }) {
                // It lives elsewhere now: other round trips are usual there.
                if let Some(target) = self.replay.watcher.target(&joined.finding.target) {
                    self.replay.watcher.relearn(target);
                }
            }
            if self.report.findings.len() < FINDINGS_MAX {
                self.report.findings.push(joined);
            } else {
                self.report.findings_dropped += 1;
            }
        }
    }

    fn advance(&mut self, now_s: f64) {
        let (names, from_s) = (&self.names, self.report.from_s);
        let to_s = self.report.to_s;
        let unconfirmed = self.ledger.advance(now_s, |record| {
            let is_then = from_s.is_some_and(|from_s| from_s <= record.to_s)
                && to_s.is_some_and(|to_s| record.from_s <= to_s);
            names.contains_key(&record.vm) && is_then
        });
        self.report.unconfirmed.extend(unconfirmed);
    }

    fn finish(mut self, hosts: &[String]) -> Report {
        self.replay.watcher.finish();
        self.take_findings();
        self.advance(f64::INFINITY);
        let mut report = self.report;
        report.observations = self.replay.observations;
        report.calibration.hears = self.replay.watcher.hears();
        report.findings_dropped += self.replay.watcher.dropped();
        report.targets = self
            .names
            .keys()
            .map(|name| summary(name, hosts.contains(name), &report.findings))
            .collect();
        report
    }
}

fn summary(name: &str, is_host: bool, findings: &[Joined]) -> Summary {
    // What was told last of an episode replaces what was told before.
    let mut episodes: BTreeMap<u64, &Joined> = BTreeMap::new();
    let own = findings
        .iter()
        .filter(|joined| joined.finding.target == name);
    for joined in own.clone() {
        episodes.insert(joined.finding.episode, joined);
    }
    let worst = episodes.values().max_by(|a, b| {
        let (a, b) = (&a.finding, &b.finding);
        a.level
            .cmp(&b.level)
            .then(a.likelihood.total_cmp(&b.likelihood))
    });
    Summary {
        target: name.to_owned(),
        role: if is_host { "host" } else { "vm" },
        findings: own.count(),
        level: worst.map(|joined| joined.finding.level),
        class: worst.map(|joined| joined.finding.class),
        likelihood: worst.map(|joined| joined.finding.likelihood),
        unexplained: episodes
            .values()
            .any(|joined| joined.verdict.is_unexplained()),
    }
}

/// A finding in a line, without its target and time.
fn finding_text(joined: &Joined) -> String {
    let finding = &joined.finding;
    let verdict = match &joined.verdict {
        Verdict::Authorised { record } => format!(", ordered by {}", line(record)),
        Verdict::Elsewhere { record, hosts } => format!(
            ", not as {} orders: {} is disturbed",
            line(record),
            line(&hosts.join(", "))
        ),
        Verdict::NoMigration => String::new(),
        Verdict::Unknown => ", nobody ordered it".to_owned(),
    };
    format!(
        "{}: {}, likelihood {:.3}{}{verdict}",
        word(&finding.level),
        finding.class.name(),
        finding.likelihood,
        if finding.ended_s.is_some() {
            ", over"
        } else {
            ""
        },
    )
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for joined in &report.findings {
        let finding = &joined.finding;
        let (time_s, target) = (finding.time_s, line(&finding.target));
        let _ = writeln!(text, "{time_s:.0} s  {target}  {}", finding_text(joined));
        for evidence in &finding.evidence {
            if evidence.log_likelihood_ratio.abs() >= 0.1 {
                let _ = writeln!(
                    text,
                    "    {:<12} {:<26} {:>12.3}  {:+.2}",
                    word(&evidence.channel),
                    evidence.seen,
                    evidence.value,
                    evidence.log_likelihood_ratio
                );
            }
        }
    }
    for unconfirmed in &report.unconfirmed {
        let record = &unconfirmed.record;
        let why = if unconfirmed.watched {
            "nothing was noticed"
        } else {
            "it was not watched then"
        };
        let (id, vm) = (line(&record.id), line(&record.vm));
        let _ = writeln!(text, "unconfirmed: {id} moves {vm}, and {why}");
    }
    for sign in &report.signs {
        let (target, text_of) = (line(&sign.target), &sign.sign.text);
        let _ = writeln!(text, "{:.0} s  {target}  {text_of}", sign.time_s);
    }
    for alarm in report.baseline.iter().flatten() {
        let target = line(&alarm.target);
        let _ = writeln!(
            text,
            "{:.0} s  {target}  heuristics of 2013: alarm",
            alarm.time_s
        );
    }
    for target in &report.targets {
        let level = target
            .level
            .as_ref()
            .map_or("nothing noticed".to_owned(), word);
        let likelihood = target
            .likelihood
            .map_or(String::new(), |p| format!(", likelihood {p:.3}"));
        let _ = writeln!(
            text,
            "{} {}: {level}{likelihood}",
            target.role,
            line(&target.target)
        );
    }
    let _ = writeln!(
        text,
        "{} observations. Probabilities are calibrated mostly on synthetic traces, see docs/watch.md.",
        report.observations
    );
    text
}

/// As in JSON.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}
