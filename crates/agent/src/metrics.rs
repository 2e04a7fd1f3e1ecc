//! Metrics in Prometheus' text format, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::Write;

use palanquin_api::control::{Outcome, Phase, Side};

use crate::agent::Agent;

fn side(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}

/// Everything that is counted.
pub fn render(agent: &Agent) -> String {
    let mut ended: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    let mut active: BTreeMap<&str, u64> = BTreeMap::from([("source", 0), ("destination", 0)]);
    let mut in_doubt = 0_u64;
    let mut wire_bytes = 0_u64;
    for tracked in agent.migrations() {
        let info = tracked.info();
        wire_bytes += info.bytes_on_wire;
        if info.phase == Phase::Done {
            let outcome = match info.outcome {
                Some(Outcome::Completed) => "completed",
                Some(Outcome::RunningOnSource) => "running_on_source",
                Some(Outcome::VmEnded) => "vm_ended",
                _ => "in_doubt",
            };
            *ended.entry((side(info.side), outcome)).or_default() += 1;
        } else {
            *active.entry(side(info.side)).or_default() += 1;
            in_doubt += u64::from(info.phase == Phase::InDoubt);
        }
    }
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, u64)]| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    let vms = agent.entries().len() as u64;
    family(
        "palanquin_vms",
        "gauge",
        "VMs and containers on this host.",
        &[(String::new(), vms)],
    );
    let samples: Vec<_> = active
        .iter()
        .map(|(side, count)| (format!("{{side=\"{side}\"}}"), *count))
        .collect();
    family(
        "palanquin_migrations_active",
        "gauge",
        "Migrations under way.",
        &samples,
    );
    let help = "Migrations whose end is not known yet.";
    family(
        "palanquin_migrations_in_doubt",
        "gauge",
        help,
        &[(String::new(), in_doubt)],
    );
    let samples: Vec<_> = ended
        .iter()
        .map(|((side, outcome), count)| {
            (format!("{{side=\"{side}\",outcome=\"{outcome}\"}}"), *count)
        })
        .collect();
    family(
        "palanquin_migrations_total",
        "counter",
        "Migrations that have ended.",
        &samples,
    );
    let judges = u64::from(agent.gate.judges());
    family(
        "palanquin_trust_configured",
        "gauge",
        "Whether policies and passports are asked: 0 where everything is let through.",
        &[(String::new(), judges)],
    );
    let (permitted, refused) = agent.gate.decided();
    family(
        "palanquin_decisions_total",
        "counter",
        "What the gates have decided since the start.",
        &[
            ("{permitted=\"true\"}".to_owned(), permitted),
            ("{permitted=\"false\"}".to_owned(), refused),
        ],
    );
    let help = "Bytes sent to destinations.";
    family(
        "palanquin_wire_bytes_total",
        "counter",
        help,
        &[(String::new(), wire_bytes)],
    );
    text
}
