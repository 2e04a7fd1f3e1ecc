//! The network process can do its work and nothing else: tried by a process that has given up what it gives up.
#![forbid(unsafe_code)]

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};

/// `SIGSYS`, by which seccomp(2) ends a process.
const KILLED: i32 = 31;

fn attempt(what: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_palanquind"))
        .args(["network-process-attempt", &std::process::id().to_string()])
        .args(["65534", "65534", what])
        .stdin(Stdio::null())
        .output()
        .expect("palanquind can be started")
}

/// Whether this machine has what the tests need beside seccomp: root, and a kernel with landlock.
fn is_possible() -> bool {
    let output = attempt("work");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("seccomp"), "{text}");
    if text.contains("lacking") {
        eprintln!("skipped: {text}");
        return false;
    }
    assert_eq!(text.trim(), "done", "{output:?}");
    true
}

#[test]
fn what_it_needs_works() {
    is_possible();
}

#[test]
fn files_cannot_be_opened_made_or_looked_at() {
    if !is_possible() {
        return;
    }
    for what in ["open", "create", "look"] {
        let output = attempt(what);
        assert_eq!(output.status.code(), Some(1), "{what}: {output:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("not implemented"), "{what}: {text}");
    }
    assert!(!std::path::Path::new("/tmp/palanquin-attempt").exists());
    // Of directories nothing can be opened either.
    assert!(!attempt("list").status.success());
}

#[test]
fn anything_else_ends_it() {
    if !is_possible() {
        return;
    }
    for what in [
        "program",
        "connect",
        "listen",
        "datagrams",
        "signal",
        "process",
        "root",
    ] {
        let output = attempt(what);
        assert_eq!(output.status.signal(), Some(KILLED), "{what}: {output:?}");
    }
    assert!(
        attempt("pair").status.success(),
        "a pair of its own is allowed"
    );
}
