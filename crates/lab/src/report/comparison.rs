//! Palanquin beside other systems: what was read of them, and what was run here.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use palanquin_lab::results::Results;
use serde::Deserialize;

use super::document::{Block, Cell, Document, Tone};
use super::{attacks, letter};

/// What was read, with its sources.
const FEATURES: &str = include_str!("features.json");

#[derive(Deserialize)]
struct Table {
    systems: Vec<System>,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct System {
    id: String,
    title: String,
    version: String,
    source: String,
}

#[derive(Deserialize)]
struct Row {
    feature: String,
    why: String,
    cells: BTreeMap<String, Feature>,
}

#[derive(Deserialize)]
struct Feature {
    text: String,
    level: Level,
    basis: Basis,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Yes,
    Partly,
    No,
    Unknown,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Basis {
    /// In documentation or source.
    Read,
    /// On this project's own rig.
    Run,
}

/// The whole comparison.
pub(super) fn document(letter: &Results, attacks: &Results) -> Result<Document> {
    let table: Table = serde_json::from_str(FEATURES).context("the table of features")?;
    let mut document = Document::new("Palanquin beside other systems");
    document.paragraph(
        "This file is generated: `cargo xtask lab report --comparison docs/comparison.md`. What is said of other systems was \
         read in their documentation and source, not run, unless it is marked \"(run)\": that was seen on this project's own \
         rig. \"Unknown\" is what was not found.",
    );
    let systems = table
        .systems
        .iter()
        .map(|system| format!("{}: {}; {}", system.title, system.version, system.source));
    document.blocks.push(Block::List(systems.collect()));
    document.heading("Features");
    // Eight columns are too many for a page: four at a time, ours first in each.
    let (ours, others) = table.systems.split_first().context("no systems")?;
    for group in others.chunks(4) {
        let columns: Vec<&System> = [ours].into_iter().chain(group).collect();
        let mut head = vec!["feature"];
        head.extend(columns.iter().map(|system| system.title.as_str()));
        let mut rows = Vec::new();
        for row in &table.rows {
            let mut cells = vec![Cell::plain(format!("{} ({})", row.feature, row.why))];
            for system in &columns {
                let Some(feature) = row.cells.get(&system.id) else {
                    bail!("no word on {:?} of {}", row.feature, system.id);
                };
                cells.push(cell(feature));
            }
            rows.push(cells);
        }
        document.table(&head, rows);
    }
    letter::add(&mut document, letter);
    attacks::add(&mut document, attacks);
    super::made(&mut document, &[letter, attacks]);
    Ok(document)
}

fn cell(feature: &Feature) -> Cell {
    let (word, tone) = match feature.level {
        Level::Yes => ("yes", Tone::Good),
        Level::Partly => ("partly", Tone::Fair),
        Level::No => ("no", Tone::Bad),
        Level::Unknown => ("unknown", Tone::Plain),
    };
    let run = if feature.basis == Basis::Run {
        " (run)"
    } else {
        ""
    };
    Cell::toned(format!("{word}: {}{run}", feature.text), tone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_system_has_a_word_on_every_feature() {
        let dir = tempfile::tempdir().unwrap();
        let empty = || Results::open(&dir.path().join("none.jsonl")).unwrap();
        let document = document(&empty(), &empty()).unwrap();
        assert!(document.blocks.len() > 3);
    }
}
