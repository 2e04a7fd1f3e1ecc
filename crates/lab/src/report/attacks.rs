//! What the attacks have come to.

use palanquin_lab::results::{AttackCell, Results, Verdict};

use super::document::{Block, Cell, Document, Tone};

/// Adds it to a document.
pub(super) fn add(document: &mut Document, results: &Results) {
    let cells: Vec<&AttackCell> = results.attacks().collect();
    if cells.is_empty() {
        return;
    }
    let attacks = in_order(cells.iter().map(|cell| cell.attack.as_str()));
    let transports = in_order(cells.iter().map(|cell| cell.transport.as_str()));
    document.heading("Every attack tried");
    document.paragraph(
        "Each attack was tried on a real migration over each transport. \"Succeeded\" means that the attacker had what he \
         wanted, as the evidence below shows. He is at the switch that all hosts share, not within an isolated segment. An \
         attack that has won nowhere proves nothing, and is named.",
    );
    let find = |attack: &str, transport: &str| {
        cells
            .iter()
            .rev()
            .find(|cell| cell.attack == attack && cell.transport == transport)
    };
    let rows = attacks
        .iter()
        .map(|attack| {
            let verdicts = transports.iter().map(|transport| {
                find(attack, transport).map_or(Cell::plain("not tried"), |cell| verdict(cell))
            });
            [Cell::plain(*attack)].into_iter().chain(verdicts).collect()
        })
        .collect();
    let mut head = vec!["attack"];
    head.extend(&transports);
    document.table(&head, rows);
    let nowhere: Vec<&str> = attacks
        .iter()
        .copied()
        .filter(|attack| {
            !cells
                .iter()
                .any(|cell| cell.attack == *attack && cell.verdict == Verdict::Succeeded)
        })
        .collect();
    if nowhere.is_empty() {
        document.paragraph("Each of them has won against at least one transport.");
    } else {
        document.paragraph(&format!(
            "Won nowhere, and so prove nothing: {}.",
            nowhere.join(", ")
        ));
    }
    for attack in attacks {
        document.heading(&format!("Evidence: {attack}"));
        let evidence = transports.iter().filter_map(|transport| {
            let cell = find(attack, transport)?;
            Some(format!(
                "{transport}: {}. {} ({:.0} s)",
                words(cell.verdict),
                cell.evidence,
                cell.seconds
            ))
        });
        document.blocks.push(Block::List(evidence.collect()));
    }
}

fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut all = Vec::new();
    for name in names {
        if !all.contains(&name) {
            all.push(name);
        }
    }
    all
}

fn words(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Succeeded => "succeeded",
        Verdict::FailedDetected => "failed, detected",
        Verdict::FailedUnnoticed => "failed, unnoticed",
    }
}

fn verdict(cell: &AttackCell) -> Cell {
    let tone = match cell.verdict {
        Verdict::Succeeded => Tone::Bad,
        Verdict::FailedDetected => Tone::Good,
        Verdict::FailedUnnoticed => Tone::Fair,
    };
    Cell::toned(words(cell.verdict), tone)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use palanquin_lab::results::Line;

    use super::*;

    #[test]
    fn an_attack_that_won_nowhere_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut results = Results::open(&dir.path().join(Path::new("a.jsonl"))).unwrap();
        for (attack, verdict) in [
            ("capture", Verdict::Succeeded),
            ("truncate", Verdict::FailedDetected),
        ] {
            results
                .add(Line::Attack(AttackCell {
                    attack: attack.to_owned(),
                    transport: "qemu".to_owned(),
                    verdict,
                    evidence: "seen".to_owned(),
                    seconds: 1.0,
                }))
                .unwrap();
        }
        let mut document = Document::new("t");
        add(&mut document, &results);
        let text = super::super::markdown::render(&document);
        assert!(
            text.contains("Won nowhere, and so prove nothing: truncate."),
            "{text}"
        );
        assert!(text.contains("| capture | succeeded |"), "{text}");
    }
}
