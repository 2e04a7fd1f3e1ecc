//! What is said, as text.

use std::fmt::Write as _;

use palanquin_watch::inside::{Clocks, Finding};

use super::super::both::clock_text;
use super::super::word;
use super::Summary;
use crate::output::line;

/// What the machine looks like, and what of it can't be read.
pub(super) fn start(summary: &Summary<'_>) -> String {
    let mut text = "This machine from inside:\n".to_owned();
    let mut row = |name: &str, value: &str| {
        let _ = writeln!(text, "  {:<22} {}", line(name), line(value));
    };
    for (name, value) in &summary.start.fingerprint {
        row(name, value);
    }
    let clocks = &summary.start.clocks;
    row("time of day", &clock_text(clocks.realtime_ns as f64 / 1e9));
    if let Some(text) = hardware_clock(clocks) {
        row("hardware clock", &text);
    }
    if let Some(ms) = summary.start.stolen_ms {
        let seconds = ms as f64 / 1e3;
        row("stolen since its start", &format!("{seconds:.1} s"));
    }
    let speeds = &summary.start.speeds;
    for (name, ns) in [
        ("arithmetic", speeds.alu_ns),
        ("first cache", speeds.first_cache_ns),
        ("second cache", speeds.second_cache_ns),
        ("memory", speeds.memory_ns),
        ("system call", speeds.syscall_ns),
        ("CPUID", speeds.cpuid_ns),
    ] {
        let value = ns.map_or("no time for it".to_owned(), |ns| format!("{ns:.2} ns"));
        row(name, &value);
    }
    let value = summary.start.writes.map_or_else(
        || "the clock is too coarse".to_owned(),
        |of| format!("{:.2} ns, the next one {:.2} ns", of.first_ns, of.again_ns),
    );
    row("first write to a page", &value);
    for unread in &summary.unread {
        let _ = writeln!(text, "not read: {}: {}", unread.what, line(&unread.why));
        let _ = writeln!(text, "  hint: {}", unread.hint);
    }
    for seen in summary.cells.iter().filter(|seen| !seen.watched) {
        let _ = writeln!(text, "not watched: {}", word(&seen.cell.method));
    }
    let neighbours = match summary.neighbours.len() {
        0 => "no neighbours".to_owned(),
        _ => format!("neighbours {}", summary.neighbours.join(", ")),
    };
    let _ = writeln!(text, "Looks every {} s, {neighbours}.", summary.every_s);
    text
}

fn hardware_clock(clocks: &Clocks) -> Option<String> {
    let edge = clocks.rtc?;
    let since_ns = clocks.raw_ns.saturating_sub(edge.at_ns);
    let day_ns = clocks.realtime_ns.saturating_sub(since_ns);
    let ahead_ms = edge.rtc_s as f64 * 1e3 - day_ns as f64 / 1e6;
    let error_ms = edge.error_ns as f64 / 1e6;
    Some(format!(
        "{ahead_ms:+.1} ms from the time of day, within {error_ms:.1} ms"
    ))
}

/// A finding with its evidence, without its time.
pub(super) fn finding(finding: &Finding) -> String {
    let stood = finding
        .stood_still_ms
        .map_or(String::new(), |ms| format!(", stood still for {ms:.0} ms"));
    let over = if finding.ended_s.is_some() {
        ", over"
    } else {
        ""
    };
    let mut text = format!(
        "{}: {}{stood}{over}\n",
        word(&finding.level),
        finding.class.name()
    );
    for evidence in &finding.evidence {
        let _ = writeln!(text, "    {}", line(&evidence.text));
    }
    text
}
