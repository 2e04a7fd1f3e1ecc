//! The experiment with the letter and its report, as somebody runs them: the sentence is on the wire where nothing
//! protects it, and nowhere else, and what is done is not done again.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_lab::process;
use palanquin_lab::results::{Leg, Results};

const LONG: Duration = Duration::from_secs(300);

fn lab(dir: &Path, words: &[&str]) -> Result<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palanquin-lab"));
    command.args(words).current_dir(dir);
    // Beside this program's own directory, where the lab's program does not look.
    if std::env::var_os("PALANQUIN_BIN_DIR").is_none() {
        let beside = Path::new(env!("CARGO_BIN_EXE_palanquin-lab")).parent();
        command.env("PALANQUIN_BIN_DIR", beside.context("no directory")?);
    }
    let output = process::output(&mut command, LONG)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

#[test]
fn the_letter_is_on_the_wire_in_plaintext_and_nowhere_else() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let words = [
        "experiment",
        "--runs=1",
        "--mtu=1500",
        "--memory-mib=192",
        "--fill-mib=8",
        "--results=letter.jsonl",
    ];
    lab(dir.path(), &[&words[..], &["--transport=qemu"]].concat())?;
    let before = fs::read_to_string(dir.path().join("letter.jsonl"))?;
    let said = lab(
        dir.path(),
        &[
            &words[..],
            &["--transport=qemu,qemu-segment,qemu-ipsec,palanquin"],
        ]
        .concat(),
    )?;
    ensure!(
        !said.contains("run 1 qemu  "),
        "what was done was done again: {said}"
    );
    let after = fs::read_to_string(dir.path().join("letter.jsonl"))?;
    ensure!(after.starts_with(&before));

    let results = Results::open(&dir.path().join("letter.jsonl"))?;
    let of = |transport: &str| -> Vec<Leg> {
        let legs = results.legs().filter(|leg| leg.transport == transport);
        legs.cloned().collect()
    };
    // QEMU's own migration may lose an emulated guest, but never its letter.
    for leg in of("qemu") {
        ensure!(leg.ascii_found > 0 && leg.utf16_found > 0, "{leg:?}");
    }
    for leg in of("qemu-segment") {
        ensure!(leg.ascii_found + leg.utf16_found == 0, "{leg:?}");
        ensure!(leg.segment_found.is_some_and(|found| found > 0), "{leg:?}");
    }
    for transport in ["qemu-ipsec", "palanquin"] {
        let legs = of(transport);
        ensure!(!legs.is_empty(), "{transport} was not tried");
        for leg in legs {
            ensure!(leg.ascii_found + leg.utf16_found == 0, "{leg:?}");
            ensure!(leg.bytes > 8 << 20, "nothing was moved: {leg:?}");
        }
    }
    ensure!(of("palanquin").iter().filter(|leg| leg.completed).count() == 2);
    let ipsec = results.paths().find(|cell| cell.path == "ipsec");
    let ipsec = ipsec.context("the tunnel was not measured")?;
    ensure!(ipsec.mbit_s.is_some_and(|rate| rate > 1.0), "{ipsec:?}");

    lab(
        dir.path(),
        &[
            "report",
            "--experiment=letter.jsonl",
            "--attack=none.jsonl",
            "--out=report",
        ],
    )?;
    let text = fs::read_to_string(dir.path().join("report/report.md"))?;
    ensure!(
        text.contains("| Palanquin | in 0 of 2 migrations |"),
        "{text}"
    );
    let page = fs::read_to_string(dir.path().join("report/report.html"))?;
    ensure!(
        page.starts_with("<!DOCTYPE html>") && page.contains("<svg") == text.contains("by MTU")
    );
    Ok(())
}
