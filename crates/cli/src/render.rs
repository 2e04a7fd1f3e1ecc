//! What people read: tables, one VM, one migration.

use palanquin_api::control::{
    AbortAnswer, AbortOutcome, Blocker, DoctorReport, GateDecision, HostInfo, MigrationInfo,
    Outcome, Phase, Side, VmInfo, VmState,
};
use palanquin_trust::passport::date;

use crate::output::line;

/// A table with aligned columns.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| line(cell)).collect())
        .collect();
    let mut widths: Vec<usize> = header.iter().map(|title| title.len()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let written = |cells: Vec<&str>| {
        let cells = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = written(header.to_vec());
    for row in &rows {
        text += &written(row.iter().map(String::as_str).collect());
    }
    text
}

/// A size in the largest unit that leaves a digit before the point.
pub(crate) fn bytes(bytes: u64) -> String {
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} B"),
    }
}

/// Milliseconds, in seconds where there are many.
pub(crate) fn ms(ms: f64) -> String {
    if ms >= 10_000.0 {
        format!("{:.1} s", ms / 1e3)
    } else {
        format!("{ms:.1} ms")
    }
}

/// A VM's state in a word.
pub(crate) fn vm_state(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Held => "held",
        VmState::Incoming => "incoming",
        VmState::Stopped => "stopped",
        _ => "unknown",
    }
}

/// A migration's phase in a word.
pub(crate) fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Preparing => "preparing",
        Phase::Reserving => "reserving",
        Phase::PreCopy => "pre-copy",
        Phase::Switchover => "switchover",
        Phase::PostCopy => "post-copy, runs on the destination",
        Phase::Committing => "committing",
        Phase::InDoubt => "in doubt",
        Phase::Erasing => "finishing",
        Phase::Done => "done",
        _ => "unknown",
    }
}

/// A migration's outcome in words.
pub(crate) fn outcome(outcome: Option<Outcome>) -> &'static str {
    match outcome {
        None => "under way",
        Some(Outcome::Completed) => "completed",
        Some(Outcome::RunningOnSource) => "running on the source",
        Some(Outcome::InDoubt) => "in doubt",
        Some(Outcome::VmEnded) => "the VM ended",
        Some(_) => "unknown",
    }
}

/// All VMs.
pub(crate) fn vms(vms: &[VmInfo]) -> String {
    if vms.is_empty() {
        return "No VMs on this host.\n".to_owned();
    }
    let rows: Vec<Vec<String>> = vms
        .iter()
        .map(|vm| {
            vec![
                vm.name.clone(),
                vm_state(vm.state).to_owned(),
                bytes(vm.memory_bytes),
                vm.epoch.to_string(),
                vm.pid.map_or_else(String::new, |pid| pid.to_string()),
                vm.migration.map_or_else(String::new, |id| id.to_string()),
            ]
        })
        .collect();
    table(
        &["NAME", "STATE", "MEMORY", "EPOCH", "PID", "MIGRATION"],
        &rows,
    )
}

fn list(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    pairs
        .iter()
        .map(|(name, value)| format!("{name:width$}  {}\n", line(value)))
        .collect()
}

/// One VM.
pub(crate) fn vm(vm: &VmInfo) -> String {
    list(&[
        ("name", vm.name.clone()),
        ("uuid", vm.uuid.to_string()),
        ("state", vm_state(vm.state).to_owned()),
        ("memory", bytes(vm.memory_bytes)),
        ("epoch", vm.epoch.to_string()),
        (
            "pid",
            vm.pid
                .map_or_else(|| "none".to_owned(), |pid| pid.to_string()),
        ),
        ("adopted", if vm.adopted { "yes" } else { "no" }.to_owned()),
        (
            "console",
            vm.console.clone().unwrap_or_else(|| "none".to_owned()),
        ),
        (
            "migration",
            vm.migration
                .map_or_else(|| "none".to_owned(), |id| id.to_string()),
        ),
        (
            "passport",
            vm.passport.as_ref().map_or_else(
                || "none".to_owned(),
                |passport| {
                    let until = date(passport.expires_unix_s);
                    let (version, owner) = (passport.version, &passport.owner);
                    format!("version {version} of {owner}, until {until}")
                },
            ),
        ),
    ])
}

/// This host.
pub(crate) fn host(host: &HostInfo) -> String {
    let (policies, problem) = host.trust.as_ref().map_or_else(
        || ("none: nothing is judged".to_owned(), None),
        |trust| {
            let (version, sha256) = (trust.policy_version, &trust.policy_sha256);
            let text = format!("version {version} ({sha256})");
            (text, trust.reload_error.clone())
        },
    );
    let mut pairs = vec![
        ("name", host.name.clone()),
        ("identity", host.spiffe_id.clone()),
        ("version", host.version.clone()),
        (
            "qemu",
            host.qemu_version
                .clone()
                .unwrap_or_else(|| "not found".to_owned()),
        ),
        ("kernel", host.kernel.clone()),
        ("memory", bytes(host.memory_total_bytes)),
        ("available", bytes(host.memory_available_bytes)),
        ("peers", host.peers.join(", ")),
        ("policies", policies),
    ];
    pairs.extend(problem.map(|problem| ("not replaced", problem)));
    list(&pairs)
}

/// Decisions of this host's gates, each with its reasons below it.
pub(crate) fn decisions(decisions: &[GateDecision]) -> String {
    if decisions.is_empty() {
        return "Nothing was decided on this host.\n".to_owned();
    }
    let mut text = String::new();
    for decision in decisions {
        let of = match decision.vm {
            Some(vm) => format!(" of VM {vm}"),
            // These are about hosts; the reason names which.
            None if ["acceptAdvertisement", "pardon"].contains(&&*decision.action) => String::new(),
            None => " of a VM without passport".to_owned(),
        };
        let by = match decision.permitted_by.join(", ") {
            policies if policies.is_empty() => String::new(),
            policies => format!(" by {policies}"),
        };
        let verdict = if decision.permitted {
            "permitted"
        } else {
            "REFUSED  "
        };
        let brought = decision.peer.as_ref();
        let brought = brought.map_or_else(String::new, |peer| format!(", brought by {peer}"));
        let last = decision.last_unix_s.map_or_else(String::new, |last| {
            format!(", {} times until {}", decision.times, date(last))
        });
        text += &line(&format!(
            "{}  {verdict}  {}{of}, asked by {}{by}{brought}{last}",
            date(decision.at_unix_s),
            decision.action,
            decision.operator,
        ));
        text.push('\n');
        for reason in &decision.reasons {
            let (gate, code, message) = (&reason.gate, &reason.code, &reason.message);
            text += &format!("    {}\n", line(&format!("{message} ({gate}, {code})")));
        }
    }
    text
}

/// All migrations.
pub(crate) fn migrations(infos: &[MigrationInfo]) -> String {
    if infos.is_empty() {
        return "No migrations on this host.\n".to_owned();
    }
    let rows: Vec<Vec<String>> = infos
        .iter()
        .map(|info| {
            vec![
                info.id.to_string()[..8].to_owned(),
                info.vm.clone(),
                format!("{} -> {}", info.from, info.to),
                phase(info.phase).to_owned(),
                outcome(info.outcome).to_owned(),
                ms(info.total_time_ms),
                ms(info.downtime_ms),
            ]
        })
        .collect();
    table(
        &["ID", "VM", "WAY", "PHASE", "OUTCOME", "TIME", "DOWNTIME"],
        &rows,
    )
}

/// One migration with everything.
pub(crate) fn migration(info: &MigrationInfo) -> String {
    let parts = &info.downtime;
    let mut pairs = vec![
        ("id", info.id.to_string()),
        ("vm", format!("{} ({})", info.vm, info.vm_uuid)),
        ("way", format!("{} -> {}", info.from, info.to)),
        ("side", side(info.side).to_owned()),
        (
            "ordered by",
            info.operator
                .clone()
                .unwrap_or_else(|| "not known".to_owned()),
        ),
        ("phase", phase(info.phase).to_owned()),
        ("outcome", outcome(info.outcome).to_owned()),
    ];
    if let Some(reason) = &info.reason {
        pairs.push(("reason", reason.clone()));
    }
    if let Some(hint) = info.error.as_ref().and_then(|error| error.hint.clone()) {
        pairs.push(("hint", hint));
    }
    pairs.push(("strategy", strategy(info)));
    if info.outcome.is_none() {
        pairs.extend([
            ("done", format!("{:.0} %", info.percent)),
            ("left in this round", bytes(info.bytes_remaining)),
            ("rate", format!("{}/s", bytes(info.rate_bytes_per_s))),
            (
                "guest writes",
                format!("{}/s", bytes(info.dirty_rate_bytes_per_s)),
            ),
        ]);
        let predicted = info.predicted_downtime_ms;
        pairs.push((
            "downtime now",
            predicted.map_or_else(
                || "not known yet".to_owned(),
                |value| format!("about {}", ms(value)),
            ),
        ));
    }
    let repeated = |pages: u64| format!("{pages} ({})", bytes(pages.saturating_mul(4096)));
    pairs.extend([
        ("total time", ms(info.total_time_ms)),
        ("downtime", ms(info.downtime_ms)),
        ("  pause", ms(parts.pause_ms)),
        ("  final pages", ms(parts.final_pages_ms)),
        ("  device state", ms(parts.device_state_ms)),
        ("  commit", ms(parts.commit_ms)),
        ("  resume", ms(parts.resume_ms)),
        ("rounds", info.rounds.to_string()),
        ("on the wire", bytes(info.bytes_on_wire)),
        ("pages sent", repeated(info.pages_sent)),
        ("  deltas", info.pages_delta.to_string()),
        ("  duplicates", info.pages_duplicate.to_string()),
        ("  compressed", info.pages_compressed.to_string()),
        ("  saved", bytes(info.bytes_saved)),
        ("pages zero", repeated(info.pages_zero)),
        ("pages resent", repeated(info.pages_resent)),
    ]);
    pairs.extend(on_the_way(info));
    pairs.extend([
        ("memory", bytes(info.ram_bytes)),
        ("streams", info.streams.to_string()),
        (
            "cipher",
            info.cipher.clone().unwrap_or_else(|| "none yet".to_owned()),
        ),
        (
            "key exchange",
            info.key_exchange
                .clone()
                .unwrap_or_else(|| "none yet".to_owned()),
        ),
        (
            "memory root",
            info.memory_root
                .clone()
                .unwrap_or_else(|| "none yet".to_owned()),
        ),
        (
            "verified",
            if info.verified {
                "yes, equal on both hosts"
            } else {
                "no"
            }
            .to_owned(),
        ),
        ("epoch", info.epoch.to_string()),
    ]);
    list(&pairs)
}

/// What not every migration has.
fn on_the_way(info: &MigrationInfo) -> Vec<(&'static str, String)> {
    let mut pairs = Vec::new();
    if info.pages_skipped > 0 {
        pairs.push(("pages skipped", info.pages_skipped.to_string()));
    }
    if let Some(share) = info.throttle_share.filter(|share| *share < 1.0) {
        pairs.push((
            "throttled to",
            format!("{:.0} % of its CPU time", share * 100.0),
        ));
    }
    if info.pages_demanded > 0 {
        pairs.push(("pages asked for", info.pages_demanded.to_string()));
    }
    if let Some(wait) = &info.fault_wait {
        let text = format!(
            "{} accesses, half below {} us, 99 % below {} us, all below {} us",
            wait.count, wait.p50_below_us, wait.p99_below_us, wait.max_below_us
        );
        pairs.push(("waits for pages", text));
    }
    if info.rejoined > 0 {
        pairs.push(("reconnected", count(info.rejoined.into(), "time", "times")));
    }
    for decision in &info.decisions {
        let after = count(decision.rounds.into(), "round", "rounds");
        pairs.push(("decided", format!("after {after}: {}", decision.why)));
    }
    for decision in &info.gate_decisions {
        let verdict = if decision.permitted {
            "permitted"
        } else {
            "refused"
        };
        let (action, operator) = (&decision.action, &decision.operator);
        let mut text = format!("{action} for {operator}");
        for reason in &decision.reasons {
            let (gate, code, message) = (&reason.gate, &reason.code, &reason.message);
            text += &format!("; {message} ({gate}, {code})");
        }
        pairs.push((verdict, text));
    }
    pairs
}

fn strategy(info: &MigrationInfo) -> String {
    // The word that was typed is the word in JSON.
    serde_json::to_value(info.strategy)
        .ok()
        .and_then(|word| word.as_str().map(str::to_owned))
        .unwrap_or_else(|| "unknown".to_owned())
}

fn count(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

/// A migration that has completed, in two sentences.
pub(crate) fn summary(info: &MigrationInfo) -> String {
    let text = format!(
        "VM {} runs on {} after {} and a downtime of {}.\n{}, {} on the wire{} over {} ({}, {}); \
         memory verified equal: {}.",
        info.vm,
        info.to,
        ms(info.total_time_ms),
        ms(info.downtime_ms),
        count(info.rounds.into(), "round", "rounds"),
        bytes(info.bytes_on_wire),
        if info.bytes_saved == 0 {
            String::new()
        } else {
            format!(" ({} saved)", bytes(info.bytes_saved))
        },
        count(info.streams.into(), "stream", "streams"),
        info.cipher.as_deref().unwrap_or("cipher not known"),
        info.key_exchange
            .as_deref()
            .unwrap_or("key exchange not known"),
        if info.verified { "yes" } else { "no" },
    );
    crate::output::lines(&text, "") + "\n"
}

/// An abort's answer in words.
pub(crate) fn abort(answer: &AbortAnswer) -> String {
    let text = match answer.outcome {
        AbortOutcome::RunningOnSource => "Aborted. The VM runs on the source.",
        AbortOutcome::TooLateCommitted => "Too late. The VM runs on the destination.",
        AbortOutcome::InDoubt => {
            "Too late. Whether the VM runs on the destination is not known yet."
        }
    };
    match &answer.hint {
        Some(hint) => format!("{text}\n  hint: {}", line(hint)),
        None => text.to_owned(),
    }
}

/// One of two hosts in a word.
fn side(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}

/// What stands in the way, without what to do about it.
pub(crate) fn blocker(blocker: &Blocker) -> String {
    let gate = blocker.gate.as_deref();
    let gate = gate.map_or_else(String::new, |gate| format!("{gate}: "));
    line(&format!(
        "{} ({}, {gate}{})",
        blocker.message,
        side(blocker.side),
        blocker.code
    ))
}

/// What was looked at.
pub(crate) fn doctor(report: &DoctorReport) -> String {
    let mut text = String::new();
    for passed in &report.passed {
        text += &format!("ok    {}\n", line(passed));
    }
    for found in &report.blockers {
        text += &format!("STOP  {}\n      {}\n", blocker(found), line(&found.remedy));
    }
    if report.blockers.is_empty() {
        text += "Nothing stands in the way.\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_have_no_trailing_space() {
        let text = table(&["A", "LONG"], &[vec!["xyz".to_owned(), "1".to_owned()]]);
        assert_eq!(text, "A    LONG\nxyz  1\n");
    }

    #[test]
    fn sizes_and_times_have_the_unit_people_expect() {
        assert_eq!(bytes(1536 << 20), "1.5 GiB");
        assert_eq!(bytes(512), "512 B");
        assert_eq!(ms(23.44), "23.4 ms");
        assert_eq!(ms(61_000.0), "61.0 s");
    }
}
