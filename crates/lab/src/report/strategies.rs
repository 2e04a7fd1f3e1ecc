//! Pre-copy and improved pre-copy, and the other strategies, on the same work: what `palanquin-bench strategies` wrote.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::document::{Cell, Document, Tone};

/// What is read of the bench's file.
#[derive(Deserialize)]
struct Report {
    link_mbit_s: u32,
    memory_mib: u64,
    buffer_mib: u64,
    points: Vec<Point>,
}

#[derive(Deserialize)]
struct Point {
    strategy: String,
    dirty_mib_s: u64,
    rounds: Option<f64>,
    downtime_ms: Option<f64>,
    total_ms: Option<f64>,
    bytes_on_wire: Option<f64>,
    completed: bool,
    runs: usize,
}

/// Adds it to a document, if the bench was run.
pub(super) fn add(document: &mut Document, path: &Path) -> Result<()> {
    let Ok(text) = fs::read_to_string(path) else {
        return Ok(());
    };
    let report: Report = serde_json::from_str(&text)
        .with_context(|| format!("{} is no file of the bench", path.display()))?;
    document.heading("Strategies on the same work");
    document.paragraph(&format!(
        "A guest of {} MiB rewrites {} MiB at a rate, over a link of {} Mbit/s. Medians of {} runs. Pre-copy is that of \
         Clark et al. (2005), improved is that of Ma et al. (2010). What did not complete within its deadline says so.",
        report.memory_mib,
        report.buffer_mib,
        report.link_mbit_s,
        report.points.iter().map(|point| point.runs).max().unwrap_or(0),
    ));
    let number = |value: Option<f64>, scale: f64, digits: usize| {
        let shown = value.map(|value| format!("{:.digits$}", value / scale));
        Cell::plain(shown.unwrap_or_else(|| "-".to_owned()))
    };
    let rows = report
        .points
        .iter()
        .map(|point| {
            let completed = if point.completed {
                Cell::plain("yes")
            } else {
                Cell::toned("no", Tone::Fair)
            };
            vec![
                Cell::plain(point.dirty_mib_s.to_string()),
                Cell::plain(&point.strategy),
                completed,
                number(point.rounds, 1.0, 0),
                number(point.downtime_ms.filter(|_| point.completed), 1.0, 1),
                number(point.total_ms, 1.0, 0),
                number(point.bytes_on_wire, f64::from(1 << 20), 0),
            ]
        })
        .collect();
    document.table(
        &[
            "rewritten, MiB/s",
            "strategy",
            "completed",
            "rounds",
            "downtime, ms",
            "total, ms",
            "sent, MiB",
        ],
        rows,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_bench_is_a_table_and_a_missing_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("strategies.json");
        let mut document = Document::new("t");
        add(&mut document, &path).unwrap();
        assert!(document.blocks.is_empty());
        fs::write(
            &path,
            r#"{"link_mbit_s":1000,"memory_mib":512,"buffer_mib":128,"deadline_s":20,"points":[{"strategy":"improved",
            "dirty_mib_s":50,"dirtied_mib_s":49.0,"rounds":5.0,"downtime_ms":20.0,"total_ms":4000.0,
            "bytes_on_wire":209715200.0,"completed":true,"refused":false,"reason":null,"runs":3}],"samples":[]}"#,
        )
        .unwrap();
        add(&mut document, &path).unwrap();
        let text = super::super::markdown::render(&document);
        assert!(
            text.contains("| 50 | improved | yes | 5 | 20.0 | 4000 | 200 |"),
            "{text}"
        );
        fs::write(&path, "{}").unwrap();
        assert!(add(&mut document, &path).is_err());
    }
}
