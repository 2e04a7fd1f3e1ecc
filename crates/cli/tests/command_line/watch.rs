//! `palanquin watch`, on files.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn replay(dir: &Path, trace: &str, rest: &[&str]) -> Output {
    let file = dir.join("trace.csv");
    fs::write(&file, trace).unwrap();
    Command::new(env!("CARGO_BIN_EXE_palanquin"))
        .args(["watch", "replay"])
        .arg(&file)
        .args(rest)
        .output()
        .unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A VM that is copied from second 400 on, stands still at 420, announces itself, and lags by 900 ms from then on; its host
/// feels the copy.
fn moved() -> String {
    let mut trace = "time_s,target,kind,value\n".to_owned();
    for tick in 0..1000_u32 {
        let time = f64::from(tick) / 2.0;
        // Neighbours must not resemble each other.
        let mixed = (u64::from(tick) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let noise = (mixed >> 40) as f64 / f64::from(1 << 24);
        let is_copied = (400.0..420.0).contains(&time);
        let grown = if is_copied { 2.0 + 3.0 * noise } else { 0.0 };
        let _ = writeln!(trace, "{time},alpha,rtt_ms,{}", 0.3 + 0.05 * noise + grown);
        if (420.0..421.0).contains(&time) {
            let _ = writeln!(trace, "{time},web,lost,");
        } else {
            let _ = writeln!(trace, "{time},web,rtt_ms,{}", 0.4 + 0.05 * noise + grown);
        }
        if (421.0..424.0).contains(&time) {
            let _ = writeln!(trace, "{time},web,announced,1");
        }
        if tick % 8 == 0 {
            let lag = if time > 420.0 { -900.0 } else { 0.0 };
            let _ = writeln!(trace, "{time},web,offset_ms,{}", lag + 0.2 * noise);
        }
    }
    trace
}

#[test]
fn a_migration_that_nobody_ordered_is_an_unexplained_alarm_and_an_ordered_one_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let report = json(&replay(
        dir.path(),
        &moved(),
        &["--json", "--host", "alpha"],
    ));
    let web = report["targets"]
        .as_array()
        .unwrap()
        .iter()
        .find(|target| target["target"] == "web")
        .unwrap();
    assert_eq!(web["class"], "migration", "{report:#}");
    assert!(["alarm", "confirmed"].contains(&web["level"].as_str().unwrap()));
    assert!(web["likelihood"].as_f64().unwrap() > 0.5);
    assert_eq!(web["unexplained"], true);
    let early = &report["findings"][0];
    assert_eq!(early["level"], "warn");
    assert!(
        early["time_s"].as_f64().unwrap() < 420.0,
        "before it stands still"
    );
    let records = dir.path().join("records.json");
    let order = |destination: &str, to_s: u32| {
        format!(
            r#"[{{"id":"m1","vm":"web","source":"alpha","destination":"{destination}","from_s":395,"to_s":{to_s}}}]"#
        )
    };
    let with = |text: String| {
        fs::write(&records, text).unwrap();
        let records = records.to_str().unwrap();
        let rest = ["--json", "--host", "alpha", "--records", records];
        json(&replay(dir.path(), &moved(), &rest))
    };
    let explained = with(order("beta", 430));
    for finding in explained["findings"].as_array().unwrap() {
        assert_eq!(finding["verdict"], "authorised", "{finding:#}");
    }
    assert_eq!(explained["unconfirmed"], serde_json::json!([]));
    let too_early = with(order("beta", 401));
    let verdicts: Vec<_> = too_early["findings"].as_array().unwrap().iter().collect();
    assert!(
        verdicts
            .iter()
            .any(|finding| finding["verdict"] == "unknown"),
        "{too_early:#}"
    );
}

#[test]
fn a_quiet_trace_has_no_findings_and_leaves_a_record_unconfirmed() {
    let dir = tempfile::tempdir().unwrap();
    let records = dir.path().join("records.json");
    let order =
        r#"[{"id":"m1","vm":"web","source":"a","destination":"b","from_s":100,"to_s":160}]"#;
    fs::write(&records, order).unwrap();
    let trace: String = moved()
        .lines()
        .take_while(|line| !line.starts_with("399"))
        .map(|line| format!("{line}\n"))
        .collect();
    let rest = [
        "--json",
        "--host",
        "alpha",
        "--records",
        records.to_str().unwrap(),
    ];
    let report = json(&replay(dir.path(), &trace, &rest));
    assert_eq!(report["findings"], serde_json::json!([]));
    assert_eq!(report["unconfirmed"][0]["record"]["id"], "m1");
    assert_eq!(report["unconfirmed"][0]["watched"], true);
}

#[test]
fn a_bad_line_is_named_with_its_number() {
    let dir = tempfile::tempdir().unwrap();
    for (line, cause) in [
        ("2,web,rtt_ms,NaN", "line 3: a round trip can't take NaN ms"),
        ("2,web,rtt,1", "line 3: \"rtt\" is no kind"),
        ("0,web", "line 3: a line has four fields"),
        ("-5,web,lost,", "line 3: \"-5\" is no time in seconds"),
    ] {
        let trace = format!("time_s,target,kind,value\n1,web,rtt_ms,1\n{line}\n");
        let output = replay(dir.path(), &trace, &[]);
        assert_eq!(output.status.code(), Some(2));
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.contains(cause), "{told}");
    }
    let long = format!("1,web,rtt_ms,{}\n", "1".repeat(10_000_000));
    let output = replay(dir.path(), &long, &["--json"]);
    assert_eq!(output.status.code(), Some(2));
    let told: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(told["causes"][0], "line 1: a line has at most 1024 bytes");
}

#[test]
fn text_says_what_was_found_and_cannot_steer_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let output = replay(dir.path(), &moved(), &["--host", "alpha", "--baseline"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("migration, likelihood"), "{text}");
    assert!(text.contains("nobody ordered it"), "{text}");
    assert!(text.contains("synthetic"), "{text}");
    let output = replay(dir.path(), "1,we\u{1b}[2Jb,rtt_ms,1\n", &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(!output.stderr.contains(&0x1b));
}
