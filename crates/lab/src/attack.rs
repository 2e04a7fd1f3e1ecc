//! Attacks on a migration, each tried on each transport, with what shows how it ended.
//!
//! An attack that wins against nothing proves nothing: where QEMU's own migration stands undefended, each of them is expected to
//! win, and [`won_nowhere`] names those that do not. Whether the attacker has what he wanted is looked up where he would
//! find it (in the capture, in a process's memory, on a guest's console), and never follows from the absence of an error.

mod advertisement;
mod alter;
mod capture;
mod dirty;
mod divert;
mod flood;
mod hostile_stream;
mod memory;
mod mover;
mod packets;
mod path;
mod remanence;
mod replay;
mod truncate;
mod unauthorised;

use std::time::Instant;

use anyhow::{Context, Result};

use crate::guest::GuestSpec;
use crate::results::{AttackCell, Verdict};
use crate::transport::Transport;

/// Sentence in the guest's memory.
const SENTENCE: &str = "The heron stands in the shallow water at dawn";
/// What an attacker makes of it; as long.
const ALTERED: &str = "The heron drowns in the shallow water at dawn";
const VM: &str = "prey";

/// What moves a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// QEMU's own migration.
    Qemu(Transport),
    /// Palanquin.
    Palanquin,
}

/// A transport that is attacked.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// As on the command line and in results.
    pub name: &'static str,
    /// What it is, for people.
    pub about: &'static str,
    carrier: Carrier,
}

/// All of them, the undefended ones first.
pub const WAYS: [Way; 6] = [
    Way {
        name: "qemu",
        about: "QEMU, plaintext",
        carrier: Carrier::Qemu(Transport::Plain),
    },
    Way {
        name: "qemu-segment",
        about: "QEMU, plaintext on an isolated segment, in which the attacker is not; for who is in it, it is plaintext",
        carrier: Carrier::Qemu(Transport::Segment),
    },
    Way {
        name: "qemu-tls",
        about: "QEMU, TLS with certificates of both ends",
        carrier: Carrier::Qemu(Transport::Tls),
    },
    Way {
        name: "qemu-ssh",
        about: "QEMU through ssh",
        carrier: Carrier::Qemu(Transport::Ssh),
    },
    Way {
        name: "qemu-ipsec",
        about: "QEMU through IPsec",
        carrier: Carrier::Qemu(Transport::Ipsec),
    },
    Way {
        name: PALANQUIN,
        about: "Palanquin",
        carrier: Carrier::Palanquin,
    },
];

/// Name of the transport against which an attack that succeeds is a defect.
pub const PALANQUIN: &str = "palanquin";

/// An attack.
#[derive(Clone, Copy)]
pub struct Attack {
    /// As on the command line and in results.
    pub name: &'static str,
    /// What the attacker does.
    pub about: &'static str,
    /// What he has when it succeeded.
    pub wins: &'static str,
    run: fn(Carrier) -> Result<Found>,
}

impl std::fmt::Debug for Attack {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name)
    }
}

/// All of them, in the order in which they are tried.
pub const ATTACKS: [Attack; 11] = [
    Attack {
        name: "capture",
        about: "records everything that crosses the switch",
        wins: "the sentence in the guest's memory is in the capture, as ASCII or UTF-16",
        run: capture::run,
    },
    Attack {
        name: "alter",
        about: "stands on the path and changes the sentence in the stream; where it is not to be seen, one bit of it blindly",
        wins: "the guest runs at the destination, and its RAM holds what he made of the sentence",
        run: alter::run,
    },
    Attack {
        name: "truncate",
        about: "stands on the path and cuts in the middle; then keeps back the last bytes of the stream",
        wins: "the guest runs nowhere although the source says that it has moved, or it runs twice, or half of it runs",
        run: truncate::run,
    },
    Attack {
        name: "replay",
        about: "records a migration and sends its bytes again to a receiver that waits",
        wins: "an old state of the guest runs",
        run: replay::run,
    },
    Attack {
        name: "divert",
        about: "takes the destination's address and waits with a receiver of his own",
        wins: "the guest runs at the attacker's host",
        run: divert::run,
    },
    Attack {
        name: "unauthorised-out",
        about: "may enter the management socket, has no right to move the VM, and orders it to be moved",
        wins: "the guest runs where he wanted it",
        run: unauthorised::run,
    },
    Attack {
        name: "advertisement",
        about: "a host says that it has much more memory than it has",
        wins: "the guest runs at the host that lied",
        run: advertisement::run,
    },
    Attack {
        name: "flood",
        about: "holds 2000 connections to the receiver that say nothing",
        wins: "a migration to it fails, or takes more than ten times as long",
        run: flood::run,
    },
    Attack {
        name: "hostile-stream",
        about: "a stranger sends the receiver what is no migration",
        wins: "the receiver ends, or a migration to it fails afterwards",
        run: hostile_stream::run,
    },
    Attack {
        name: "remanence",
        about: "reads what the source keeps after the VM has moved: memory of its processes, and files",
        wins: "the sentence is still there",
        run: remanence::run,
    },
    Attack {
        name: "dirty-destination",
        about: "has prepared the memory that the VM gets at the destination",
        wins: "the guest runs there, and its RAM holds what he left",
        run: dirty::run,
    },
];

/// What became of an attack, and what shows it.
#[derive(Debug)]
struct Found {
    verdict: Verdict,
    evidence: String,
}

impl Found {
    fn succeeded(evidence: impl Into<String>) -> Self {
        Self::new(Verdict::Succeeded, evidence)
    }

    fn detected(evidence: impl Into<String>) -> Self {
        Self::new(Verdict::FailedDetected, evidence)
    }

    fn unnoticed(evidence: impl Into<String>) -> Self {
        Self::new(Verdict::FailedUnnoticed, evidence)
    }

    fn new(verdict: Verdict, evidence: impl Into<String>) -> Self {
        Self {
            verdict,
            evidence: evidence.into(),
        }
    }
}

/// Tries one attack on one transport, in a rig of its own.
///
/// # Errors
///
/// If the attack could not be carried out: then nothing is known.
pub fn play(attack: &Attack, way: &Way) -> Result<AttackCell> {
    let began = Instant::now();
    let found = (attack.run)(way.carrier);
    let found = found.with_context(|| format!("{} on {}", attack.name, way.name))?;
    Ok(AttackCell {
        attack: attack.name.to_owned(),
        transport: way.name.to_owned(),
        verdict: found.verdict,
        // A line of a table.
        evidence: found
            .evidence
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" "),
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// Its name in tables.
pub fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Succeeded => "SUCCEEDED",
        Verdict::FailedDetected => "detected",
        Verdict::FailedUnnoticed => "failed, unnoticed",
    }
}

/// The cells as a table: a row for each attack, a column for each transport. What was not tried is a dash.
pub fn matrix(cells: &[AttackCell]) -> String {
    let mut text = format!("{:<18}", "");
    for way in &WAYS {
        text += &format!("{:<19}", way.name);
    }
    for attack in &ATTACKS {
        text += &format!("\n{:<18}", attack.name);
        for way in &WAYS {
            let cell = cell_of(cells, attack, way).map_or("-", |cell| word(cell.verdict));
            text += &format!("{cell:<19}");
        }
    }
    text.lines()
        .map(str::trim_end)
        .collect::<Vec<_>>()
        .join("\n")
}

/// The result of an attack on a transport, if there is one.
pub fn cell_of<'a>(cells: &'a [AttackCell], attack: &Attack, way: &Way) -> Option<&'a AttackCell> {
    cells
        .iter()
        .rfind(|cell| cell.attack == attack.name && cell.transport == way.name)
}

/// Attacks that were tried, and won against no transport: what others say about them proves nothing.
pub fn won_nowhere(cells: &[AttackCell]) -> Vec<&'static str> {
    let of = |attack: &Attack| {
        cells
            .iter()
            .filter(|cell| cell.attack == attack.name)
            .count()
    };
    let won = |attack: &Attack| {
        cells
            .iter()
            .any(|cell| cell.attack == attack.name && cell.verdict == Verdict::Succeeded)
    };
    ATTACKS
        .iter()
        .filter(|attack| of(attack) > 0 && !won(attack))
        .map(|attack| attack.name)
        .collect()
}

/// The guest that is attacked: small, with the sentence in its memory.
fn prey() -> GuestSpec {
    let mut guest = GuestSpec::small(VM);
    guest.buffer_mib = 8;
    guest.dirty_mib_s = 2;
    guest.canary = SENTENCE.to_owned();
    guest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(attack: &str, transport: &str, verdict: Verdict) -> AttackCell {
        AttackCell {
            attack: attack.to_owned(),
            transport: transport.to_owned(),
            verdict,
            evidence: String::new(),
            seconds: 1.0,
        }
    }

    #[test]
    fn an_attack_that_was_tried_and_won_against_nobody_is_named() {
        let cells = [
            cell("capture", "qemu", Verdict::Succeeded),
            cell("capture", PALANQUIN, Verdict::FailedUnnoticed),
            cell("replay", PALANQUIN, Verdict::FailedDetected),
        ];
        assert_eq!(won_nowhere(&cells), ["replay"]);
    }

    #[test]
    fn a_matrix_has_a_row_for_each_attack_and_a_dash_for_what_was_not_tried() {
        let table = matrix(&[cell("capture", PALANQUIN, Verdict::FailedUnnoticed)]);
        let rows: Vec<&str> = table.lines().collect();
        assert_eq!(rows.len(), 1 + ATTACKS.len());
        let words: Vec<&str> = rows[1].split_whitespace().collect();
        assert_eq!(
            words,
            ["capture", "-", "-", "-", "-", "-", "failed,", "unnoticed"]
        );
    }

    #[test]
    fn what_is_changed_in_a_stream_is_as_long_as_before() {
        assert_eq!(SENTENCE.len(), ALTERED.len());
    }
}
