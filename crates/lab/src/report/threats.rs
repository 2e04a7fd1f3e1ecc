//! Which threats the attacks stand for, and which are not tried yet.

use palanquin_lab::results::{Results, Verdict};

use super::document::{Cell, Document, Tone};
use crate::experiment::PALANQUIN;

/// A threat, and the attacks that try it.
struct Threat {
    what: &'static str,
    attacks: &'static [&'static str],
    /// Where else it is tried, or that it is not.
    besides: &'static str,
}

const THREATS: [Threat; 12] = [
    Threat {
        what: "a VM is diverted to the attacker's host",
        attacks: &["divert"],
        besides: "`cargo test -p palanquin-lab --test trust --test attestation`",
    },
    Threat {
        what: "unauthorised migrations out, which flood a victim",
        attacks: &["unauthorised-out", "flood"],
        besides: "`--test trust`, `--test hostile`",
    },
    Threat {
        what: "false promises of resources draw VMs to a host",
        attacks: &["advertisement"],
        besides: "`--test adverts`",
    },
    Threat {
        what: "control messages are forged or replayed",
        attacks: &["replay"],
        besides: "`--test hostile`, `--test verbs`",
    },
    Threat {
        what: "memory is read on the path",
        attacks: &["capture"],
        besides: "the letter above",
    },
    Threat {
        what: "memory is altered on the path",
        attacks: &["alter", "truncate"],
        besides: "`--test hostile`: at every record",
    },
    Threat {
        what: "what receives the stream is attacked by what it reads",
        attacks: &["hostile-stream"],
        besides: "docs/fuzzing.md",
    },
    Threat {
        what: "pages stay on the source, or the destination is not clean",
        attacks: &["remanence", "dirty-destination"],
        besides: "evidence for the owner that the source was erased: not yet",
    },
    Threat {
        what: "an old state is brought back, or a check is overtaken",
        attacks: &["replay"],
        besides: "`--test trust`: policy edited meanwhile",
    },
    Threat {
        what: "an insider moves a whole VM away",
        attacks: &["unauthorised-out"],
        besides: "docs/watch.md: noticed from outside; custody for the owner: not yet",
    },
    Threat {
        what: "copies outside of migration (datastore, duplicate)",
        attacks: &[],
        besides: "not yet",
    },
    Threat {
        what: "firewall state and policies are left behind by a VM that moves",
        attacks: &[],
        besides: "not yet",
    },
];

/// Adds it to a document.
pub(super) fn add(document: &mut Document, results: &Results) {
    if results.attacks().next().is_none() {
        return;
    }
    document.heading("Threats");
    document.paragraph("What the attacks stand for, what came of them against Palanquin, and where else each is tried.");
    let rows = THREATS
        .iter()
        .map(|threat| {
            let verdicts: Vec<Option<Verdict>> = threat
                .attacks
                .iter()
                .map(|attack| {
                    let cells = results
                        .attacks()
                        .filter(|cell| cell.attack == **attack && cell.transport == PALANQUIN);
                    cells.last().map(|cell| cell.verdict)
                })
                .collect();
            vec![
                Cell::plain(threat.what),
                Cell::plain(threat.attacks.join(", ")),
                came_of(&verdicts),
                Cell::plain(threat.besides),
            ]
        })
        .collect();
    document.table(&["threat", "attacks", "against Palanquin", "besides"], rows);
}

/// The worst of what came of several attacks.
fn came_of(verdicts: &[Option<Verdict>]) -> Cell {
    let has = |wanted| verdicts.contains(&Some(wanted));
    if has(Verdict::Succeeded) {
        Cell::toned("succeeded", Tone::Bad)
    } else if verdicts.is_empty() || verdicts.contains(&None) {
        Cell::plain("not tried")
    } else if has(Verdict::FailedUnnoticed) {
        Cell::toned("failed, unnoticed", Tone::Fair)
    } else {
        Cell::toned("failed, detected", Tone::Good)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_verdict_counts_and_what_is_missing_was_not_tried() {
        let failed = Some(Verdict::FailedDetected);
        assert_eq!(came_of(&[failed, Some(Verdict::Succeeded)]).tone, Tone::Bad);
        assert_eq!(came_of(&[failed, None]).text, "not tried");
        assert_eq!(came_of(&[]).text, "not tried");
        assert_eq!(came_of(&[failed, failed]).tone, Tone::Good);
    }
}
