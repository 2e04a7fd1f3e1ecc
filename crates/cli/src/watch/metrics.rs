//! Metrics in Prometheus' text format, version 0.0.4.

use std::fmt::{Display, Write};

use palanquin_host::probe::{Kind, Prober};

use super::board::{Board, Mood};

/// A value of a label: what would end it is escaped.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(label, of)| format!("{label}=\"{}\"", escaped(of)))
            .collect();
        let labels = if labels.is_empty() {
            String::new()
        } else {
            format!("{{{}}}", labels.join(","))
        };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }
}

/// Everything that is counted.
pub(crate) fn render(board: &Board, prober: &Prober) -> String {
    let mut text = Text(String::new());
    let kinds = [
        (Kind::Echo, "echo"),
        (Kind::Timestamp, "timestamp"),
        (Kind::Ntp, "ntp"),
    ];
    let counted: Vec<_> = (0..board.targets.len())
        .map(|target| prober.counted(target))
        .collect();
    for (name, help) in [
        ("palanquin_watch_requests_total", "Probes sent."),
        (
            "palanquin_watch_responses_total",
            "Probes answered in time.",
        ),
        (
            "palanquin_watch_unanswered_total",
            "Probes not answered in time.",
        ),
    ] {
        text.family(name, "counter", help);
        for (target, counted) in board.targets.iter().zip(&counted) {
            for (kind, word) in kinds {
                let of = match name {
                    "palanquin_watch_requests_total" => counted.sent,
                    "palanquin_watch_responses_total" => counted.answered,
                    _ => counted.unanswered,
                };
                let labels = [("target", target.name.as_str()), ("probe", word)];
                text.sample(name, &labels, of[kind as usize]);
            }
        }
    }
    for (name, help) in [
        (
            "palanquin_watch_send_errors_total",
            "Probes that could not be sent.",
        ),
        (
            "palanquin_watch_refused_answers_total",
            "Answers that could not be used.",
        ),
        (
            "palanquin_watch_announcements_total",
            "Announcements heard: RARP, gratuitous ARP, neighbour advertisements.",
        ),
        (
            "palanquin_watch_probe_bytes_total",
            "Bytes of probes, both ways, with the headers of IP.",
        ),
    ] {
        text.family(name, "counter", help);
        for (target, counted) in board.targets.iter().zip(&counted) {
            let value = match name {
                "palanquin_watch_send_errors_total" => counted.not_sent,
                "palanquin_watch_refused_answers_total" => counted.refused,
                "palanquin_watch_announcements_total" => counted.announced,
                _ => counted.bytes,
            };
            text.sample(name, &[("target", &target.name)], value);
        }
    }
    gauges(&mut text, board);
    own(&mut text, board);
    text.0
}

fn gauges(text: &mut Text, board: &Board) {
    let name = "palanquin_watch_response_duration_seconds";
    text.family(
        name,
        "gauge",
        "Longest round trip of the latest second that had one.",
    );
    for target in &board.targets {
        if let Some(rtt_ms) = target.rtt_ms {
            text.sample(name, &[("target", &target.name)], rtt_ms / 1e3);
        }
    }
    let name = "palanquin_watch_loss_ratio";
    text.family(
        name,
        "gauge",
        "Share of the last minute's echoes that were lost.",
    );
    for target in &board.targets {
        if let Some(loss) = target.loss {
            text.sample(name, &[("target", &target.name)], loss);
        }
    }
    let name = "palanquin_watch_clock_offset_seconds";
    text.family(name, "gauge", "The target's clock less the watcher's.");
    for target in &board.targets {
        if let Some(offset_ms) = target.offset_ms {
            text.sample(name, &[("target", &target.name)], offset_ms / 1e3);
        }
    }
    let name = "palanquin_watch_migration_likelihood";
    text.family(
        name,
        "gauge",
        "Likelihood of a migration in the episode that goes on, 0 without one.",
    );
    for target in board.targets.iter().filter(|target| target.role == "vm") {
        text.sample(name, &[("target", &target.name)], target.likelihood);
    }
    let name = "palanquin_watch_state";
    text.family(
        name,
        "gauge",
        "1 for what the target is: calm, ordered, warn or alarm.",
    );
    for target in board.targets.iter().filter(|target| target.role == "vm") {
        for mood in [Mood::Calm, Mood::Ordered, Mood::Warn, Mood::Alarm] {
            let labels = [("target", target.name.as_str()), ("state", mood.name())];
            text.sample(name, &labels, u8::from(mood == target.mood));
        }
    }
}

fn own(text: &mut Text, board: &Board) {
    let name = "palanquin_watch_findings_total";
    text.family(name, "counter", "Findings told.");
    for (level, count) in ["note", "warn", "alarm", "confirmed"]
        .into_iter()
        .zip(board.findings)
    {
        text.sample(name, &[("level", level)], count);
    }
    for (name, help, value) in [
        (
            "palanquin_watch_observations_total",
            "Observations.",
            board.observations,
        ),
        (
            "palanquin_watch_refused_observations_total",
            "Observations that the detector refused, for example as too late.",
            board.refused,
        ),
        (
            "palanquin_watch_stalls_total",
            "Times that the watcher itself was late.",
            board.stalls,
        ),
    ] {
        text.family(name, "counter", help);
        text.sample(name, &[], value);
    }
    let name = "palanquin_watch_stalled_seconds_total";
    text.family(
        name,
        "counter",
        "Time of which the watcher has seen nothing, because it was late itself.",
    );
    text.sample(name, &[], board.stalled_s);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_ends_where_it_should() {
        let mut text = Text(String::new());
        text.sample("x", &[("target", "a\"}\n\\b")], 1);
        assert_eq!(text.0, "x{target=\"a\\\"}\\n\\\\b\"} 1\n");
    }
}
