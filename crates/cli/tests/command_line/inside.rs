//! `palanquin watch inside`, on the machine that the test runs on.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use palanquin_lab::process::{self, Kept};
use rustix::process::Signal;
use serde_json::Value;

fn inside(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palanquin"));
    command.args(["watch", "inside"]).args(words);
    command
}

fn run(words: &[&str]) -> Output {
    process::output(&mut inside(words), Duration::from_secs(60)).unwrap()
}

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn once_says_what_the_machine_looks_like_and_what_cannot_be_read() {
    let output = run(&["--once"]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("This machine from inside:\n"), "{text}");
    for part in ["cpu.vendor", "memory", "not watched: delay"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    let output = run(&["--once", "--json"]);
    let lines = lines(&output);
    let [start] = &lines[..] else {
        panic!("{lines:?}");
    };
    assert_eq!(start["event"], "start");
    assert!(start["fingerprint"]["cpu.vendor"].is_string(), "{start:#}");
    assert!(start["speeds"]["alu_ns"].as_f64().unwrap() > 0.0);
    let has_rtc = start["clocks"]["rtc"].is_object();
    let unread = start["unread"].as_array().unwrap();
    let names_rtc = unread
        .iter()
        .any(|of| of["what"].as_str().unwrap().contains("hardware clock"));
    assert_eq!(has_rtc, !names_rtc, "{start:#}");
    for of in unread {
        assert!(of["why"].is_string() && of["hint"].is_string(), "{of}");
    }
}

#[test]
fn samples_are_told_and_it_ends_after_its_time() {
    let words = ["--json", "--every", "1s", "--seconds", "4", "--samples"];
    let output = run(&words);
    assert!(output.status.success(), "{output:?}");
    let lines = lines(&output);
    assert_eq!(lines[0]["event"], "start");
    let samples = lines.iter().filter(|line| line["event"] == "sample");
    assert!(samples.clone().count() >= 1, "{lines:?}");
    for sample in samples {
        assert!(sample["sample"]["clocks"]["raw_ns"].is_number());
        assert!(sample["statistics"]["benchmark"].is_number());
    }
}

#[test]
fn a_signal_ends_it_without_a_failure() {
    let mut child = inside(&["--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let stdout = child.stdout.take().unwrap();
    let mut kept = Kept::new(child);
    let mut first = String::new();
    BufReader::new(stdout).read_line(&mut first).unwrap();
    assert!(first.contains("\"event\":\"start\""), "{first}");
    kept.signal(Signal::TERM);
    let status = kept.wait(Duration::from_secs(20)).unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn what_makes_no_sense_is_refused_with_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("inside.toml");
    let path = config.to_str().unwrap();
    let refused = |words: &[&str], what: &str| {
        let output = run(words);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
        assert!(text.contains(what), "{words:?}: {text}");
    };
    refused(&["--every", "100ms"], "is not between 1s and 3600s");
    refused(&["--neighbour", "router"], "it is NAME=ADDRESS");
    refused(&["--neighbour", "a=example.org"], "is no IP address");
    let twice = ["--neighbour", "a=127.0.0.1", "--neighbour", "a=127.0.0.2"];
    refused(&twice, "another one has this name");
    refused(&["--samples"], "as JSON only");
    refused(&["--seconds", "0"], "0 is not in");
    refused(&[path], "cannot read");
    for (text, what) in [
        ("evry = \"5s\"", "unknown field `evry`"),
        ("every = \"2h\"", "is not between"),
        ("[[neighbour]]\nname = \"a\"\naddress = \"b\"", "IP address"),
        (
            "[[neighbour]]\nname = \"-\"\naddress = \"127.0.0.1\"",
            "a name has 1 to 64",
        ),
    ] {
        fs::write(&config, text).unwrap();
        refused(&[path], what);
    }
}

#[test]
fn who_may_not_ping_is_told_which_right_is_missing() {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").unwrap_or_default();
    let is_nobodys = range.split_ascii_whitespace().eq(["1", "0"]);
    if !rustix::process::geteuid().is_root() || !is_nobodys {
        eprintln!("SKIPPED: who may ping here can't be kept from it");
        return;
    }
    // Others can't read where the program was built.
    let dir = tempfile::Builder::new()
        .prefix("inside")
        .tempdir_in("/tmp")
        .unwrap();
    let program = dir.path().join("palanquin");
    fs::copy(env!("CARGO_BIN_EXE_palanquin"), &program).unwrap();
    fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let mut command = Command::new(&program);
    command.args(["watch", "inside", "--neighbour", "a=127.0.0.1"]);
    command.uid(65534).gid(65534);
    let output = process::output(&mut command, Duration::from_secs(60)).unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(
        text.contains("CAP_NET_RAW") && text.contains("hint:"),
        "{text}"
    );
}
