//! Medians of several runs, as a table and as JSON.

use palanquin_lab::usage::median;
use serde::{Deserialize, Serialize};

use crate::measure::Sample;

/// What one path took for one workload: medians of its undisturbed runs. Times are of the migrations that completed, or
/// if none did, of those that did not.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Which way it was done.
    pub(crate) path: String,
    /// What the guest did meanwhile.
    pub(crate) workload: String,
    /// As [`Sample::total_ms`].
    pub(crate) total_ms: Option<f64>,
    /// As [`Sample::downtime_ms`].
    pub(crate) downtime_ms: Option<f64>,
    /// As [`Sample::bytes_on_wire`].
    pub(crate) bytes_on_wire: Option<f64>,
    /// As [`Sample::cpu_s`].
    pub(crate) cpu_s: Option<f64>,
    /// As [`Sample::rss_mib`].
    pub(crate) rss_mib: Option<f64>,
    /// As [`Sample::agents_rss_mib`].
    pub(crate) agents_rss_mib: Option<f64>,
    /// Whether every run completed.
    pub(crate) completed: bool,
    /// Why it did not complete, or was not offered.
    pub(crate) reason: Option<String>,
    /// Whether the agent does not offer this path; nothing was measured then.
    pub(crate) refused: bool,
    /// Smallest and largest total time of a run.
    pub(crate) total_ms_spread: Option<(f64, f64)>,
    /// Smallest and largest downtime of a run.
    pub(crate) downtime_ms_spread: Option<(f64, f64)>,
    /// As [`Sample::reported_total_ms`].
    pub(crate) reported_total_ms: Option<f64>,
    /// As [`Sample::reported_downtime_ms`].
    pub(crate) reported_downtime_ms: Option<f64>,
    /// As [`Sample::ping_gap_ms`].
    pub(crate) ping_gap_ms: Option<f64>,
    /// As [`Sample::rounds`].
    pub(crate) rounds: Option<f64>,
    /// As [`Sample::rewritten_mib_s`].
    pub(crate) rewritten_mib_s: Option<f64>,
    /// As [`Sample::foreign_share`].
    pub(crate) foreign_share: Option<f64>,
    /// Runs.
    pub(crate) runs: usize,
    /// What else there is to say of the workload.
    pub(crate) conditions: String,
}

impl Row {
    /// Of one path and one workload.
    pub(crate) fn new(samples: &[&Sample], conditions: &str) -> Option<Self> {
        let first = samples.first()?;
        let some_completed = samples.iter().any(|sample| sample.completed);
        let counted: Vec<&Sample> = samples
            .iter()
            .copied()
            .filter(|sample| sample.completed == some_completed)
            .collect();
        let of = |value: fn(&Sample) -> Option<f64>| {
            median(counted.iter().filter_map(|sample| value(sample)))
        };
        let spread = |value: fn(&Sample) -> Option<f64>| {
            let values = || counted.iter().filter_map(|sample| value(sample));
            let low = values().min_by(f64::total_cmp)?;
            Some((low, values().max_by(f64::total_cmp)?))
        };
        Some(Self {
            path: first.path.clone(),
            workload: first.workload.clone(),
            total_ms: of(|sample| Some(sample.total_ms)),
            downtime_ms: of(|sample| sample.downtime_ms),
            bytes_on_wire: of(|sample| Some(sample.bytes_on_wire as f64)),
            cpu_s: of(|sample| Some(sample.cpu_s)),
            rss_mib: of(|sample| Some(sample.rss_mib)),
            agents_rss_mib: of(|sample| sample.agents_rss_mib),
            completed: samples.iter().all(|sample| sample.completed),
            reason: samples.iter().find_map(|sample| sample.reason.clone()),
            refused: false,
            total_ms_spread: spread(|sample| Some(sample.total_ms)),
            downtime_ms_spread: spread(|sample| sample.downtime_ms),
            reported_total_ms: of(|sample| sample.reported_total_ms),
            reported_downtime_ms: of(|sample| sample.reported_downtime_ms),
            ping_gap_ms: of(|sample| Some(sample.ping_gap_ms)),
            rounds: of(|sample| sample.rounds.map(|rounds| rounds as f64)),
            rewritten_mib_s: of(|sample| sample.rewritten_mib_s),
            foreign_share: of(|sample| Some(sample.foreign_share)),
            runs: samples.len(),
            conditions: conditions.to_owned(),
        })
    }

    /// Of a path that is not offered.
    pub(crate) fn refused(path: &str, workload: &str, reason: String, conditions: &str) -> Self {
        Self {
            path: path.to_owned(),
            workload: workload.to_owned(),
            total_ms: None,
            downtime_ms: None,
            bytes_on_wire: None,
            cpu_s: None,
            rss_mib: None,
            agents_rss_mib: None,
            completed: false,
            reason: Some(reason),
            refused: true,
            total_ms_spread: None,
            downtime_ms_spread: None,
            reported_total_ms: None,
            reported_downtime_ms: None,
            ping_gap_ms: None,
            rounds: None,
            rewritten_mib_s: None,
            foreign_share: None,
            runs: 0,
            conditions: conditions.to_owned(),
        }
    }

    fn end(&self) -> String {
        match (&self.reason, self.refused, self.completed) {
            (Some(reason), true, _) => format!("refused: {reason}"),
            (Some(reason), _, false) => format!("NOT completed: {reason}"),
            _ => "completed".to_owned(),
        }
    }
}

/// A number with a unit, or a dash.
pub(crate) fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}

fn spread(value: Option<(f64, f64)>, digits: usize) -> String {
    value.map_or(String::new(), |(low, high)| {
        format!(" ({low:.digits$} to {high:.digits$})")
    })
}

/// The rows of one workload, as Markdown.
pub(crate) fn table(rows: &[&Row]) -> String {
    let mut text = "| path | total ms (spread) | downtime ms (spread) | ping gap ms | wire MiB | CPU s | RSS MiB | rounds | end |\n\
                    |---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for row in rows {
        text += &format!(
            "| {} | {}{} | {}{} | {} | {} | {} | {} | {} | {} |\n",
            row.path,
            shown(row.total_ms, 0),
            spread(row.total_ms_spread, 0),
            shown(row.downtime_ms, 1),
            spread(row.downtime_ms_spread, 1),
            shown(row.ping_gap_ms, 0),
            shown(row.bytes_on_wire.map(|bytes| bytes / f64::from(1 << 20)), 0),
            shown(row.cpu_s, 2),
            shown(row.rss_mib, 0),
            shown(row.rounds, 0),
            row.end(),
        );
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(path: &str, workload: &str, total_ms: f64, completed: bool) -> Sample {
        Sample {
            path: path.to_owned(),
            workload: workload.to_owned(),
            completed,
            reason: (!completed).then(|| "too slow".to_owned()),
            total_ms,
            downtime_ms: completed.then_some(total_ms / 10.0),
            reported_total_ms: None,
            reported_downtime_ms: None,
            ping_gap_ms: 10.0,
            bytes_on_wire: 1000,
            cpu_s: 1.0,
            rss_mib: 50.0,
            agents_rss_mib: None,
            rounds: None,
            rewritten_mib_s: None,
            foreign_share: 0.0,
        }
    }

    #[test]
    fn medians_are_of_the_runs_that_completed_and_the_others_are_told() {
        let samples = [
            sample("x", "hot", 100.0, true),
            sample("x", "hot", 900.0, false),
            sample("x", "hot", 300.0, true),
            sample("x", "hot", 200.0, true),
        ];
        let row = Row::new(&samples.iter().collect::<Vec<_>>(), "").unwrap();
        assert_eq!(row.total_ms, Some(200.0));
        assert_eq!(row.total_ms_spread, Some((100.0, 300.0)));
        assert_eq!((row.completed, row.runs), (false, 4));
        assert!(table(&[&row]).contains("NOT completed: too slow"));
    }

    #[test]
    fn a_path_that_is_not_offered_has_dashes() {
        let row = Row::refused("x", "hot", "not there yet".to_owned(), "");
        let text = table(&[&row]);
        assert!(
            text.contains("| x | - | - | - | - | - | - | - | refused: not there yet |"),
            "{text}"
        );
    }
}
