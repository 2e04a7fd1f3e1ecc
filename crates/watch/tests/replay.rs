//! A recorded trace, line by line, as `palanquin watch replay` reads it.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use palanquin_watch::trace::{HEADER, Replay};
use palanquin_watch::{Calibration, Class, Finding, Ledger, Level, Record, Verdict};

/// A VM that is copied from second 400 on, stands still at 420 for one, announces itself, and lags by 900 ms from then on;
/// its host feels the copy.
fn moved() -> Vec<String> {
    let mut lines = vec![HEADER.to_owned()];
    for tick in 0..1000_u32 {
        let time = f64::from(tick) / 2.0;
        // Neighbours must not resemble each other.
        let mixed = (u64::from(tick) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let noise = (mixed >> 40) as f64 / f64::from(1 << 24);
        let is_copied = (400.0..420.0).contains(&time);
        let grown = if is_copied { 2.0 + 3.0 * noise } else { 0.0 };
        lines.push(format!(
            "{time},alpha,rtt_ms,{}",
            0.3 + 0.05 * noise + grown
        ));
        if (420.0..421.0).contains(&time) {
            lines.push(format!("{time},web,lost,"));
        } else {
            lines.push(format!("{time},web,rtt_ms,{}", 0.4 + 0.05 * noise + grown));
        }
        if (421.0..424.0).contains(&time) {
            lines.push(format!("{time},web,announced,1"));
        }
        if tick % 8 == 0 {
            let lag = if time > 420.0 { -900.0 } else { 0.0 };
            lines.push(format!("{time},web,offset_ms,{}", lag + 0.2 * noise));
        }
    }
    lines
}

fn replay(lines: &[String]) -> Vec<Finding> {
    let mut replay = Replay::new(Calibration::built_in(), vec!["alpha".to_owned()]);
    for line in lines {
        replay.line(line.as_bytes()).unwrap();
    }
    replay.watcher.finish();
    std::iter::from_fn(|| replay.watcher.poll()).collect()
}

fn order(to_s: f64) -> Ledger {
    let mut ledger = Ledger::new();
    let record = Record {
        id: "m1".to_owned(),
        vm: "web".to_owned(),
        source: "alpha".to_owned(),
        destination: "beta".to_owned(),
        from_s: 395.0,
        to_s,
    };
    ledger.add(record).unwrap();
    ledger
}

#[test]
fn a_migration_is_warned_of_while_memory_is_copied_and_then_an_alarm() {
    let findings = replay(&moved());
    let first = findings.first().unwrap();
    assert_eq!(first.level, Level::Warn, "{first:?}");
    assert!((400.0..420.0).contains(&first.time_s), "{first:?}");
    let alarm = findings
        .iter()
        .find(|finding| finding.level >= Level::Alarm)
        .unwrap();
    assert_eq!(alarm.class, Class::Migration);
    assert!(alarm.likelihood > 0.5 && alarm.time_s <= 425.0, "{alarm:?}");
    let last = findings.last().unwrap();
    assert_eq!(
        (last.class, last.ended_s.is_some()),
        (Class::Migration, true)
    );
    assert!(
        last.level >= Level::Alarm && last.hosts == ["alpha"],
        "{last:?}"
    );
    let clock = last
        .evidence
        .iter()
        .find(|evidence| evidence.seen == "lag-fits-silence");
    assert!((clock.unwrap().value + 900.0).abs() < 1.0);
}

#[test]
fn a_record_explains_it_unless_its_window_is_over_too_early() {
    let mut ledger = order(430.0);
    for finding in replay(&moved()) {
        let joined = ledger.judge(finding);
        let record = "m1".to_owned();
        assert_eq!(joined.verdict, Verdict::Authorised { record }, "{joined:?}");
    }
    assert!(ledger.finish(|_| true).is_empty());
    let mut ledger = order(401.0);
    let verdicts: Vec<_> = replay(&moved())
        .into_iter()
        .map(|finding| ledger.judge(finding).verdict)
        .collect();
    assert!(verdicts.contains(&Verdict::Unknown), "{verdicts:?}");
}

#[test]
fn nothing_is_found_where_nothing_happened() {
    let quiet: Vec<String> = moved()
        .into_iter()
        .take_while(|line| !line.starts_with("399"))
        .collect();
    assert_eq!(replay(&quiet), []);
    assert_eq!(order(430.0).finish(|_| true).len(), 1);
}
