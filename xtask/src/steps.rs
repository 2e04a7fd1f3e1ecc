//! `cargo xtask test`: what continuous integration runs.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::{guest, root, run, setup, tidy};

/// Something that passes or says why not.
type Step = fn() -> Result<()>;

/// Version of the licence checker that this repository is checked with.
const DENY: &str = "0.20.2";

/// All steps; stops at the first that fails, and always says how far it came.
pub(crate) fn test() -> Result<()> {
    let steps: [(&str, Step); 11] = [
        ("install", setup::install),
        ("format", || run("cargo", &["fmt", "--all", "--check"])),
        ("lints", || {
            run(
                "cargo",
                &[
                    "clippy",
                    "--workspace",
                    "--all-targets",
                    "--all-features",
                    "--",
                    "-D",
                    "warnings",
                ],
            )
        }),
        ("rules", tidy::check),
        ("docs", || {
            run("cargo", &["doc", "--workspace", "--no-deps", "--quiet"])
        }),
        ("licences", licences),
        ("guest", guest::build),
        ("unit and property tests", || {
            run(
                "cargo",
                &[
                    "test",
                    "--workspace",
                    "--all-features",
                    "--exclude",
                    "palanquin-lab",
                    "--quiet",
                ],
            )
        }),
        ("simulation", || {
            run(
                "cargo",
                &["run", "-p", "palanquin-sim", "--", "--seeds", "5000"],
            )
        }),
        ("build for the end", || {
            run(
                "cargo",
                &[
                    "build",
                    "-p",
                    "palanquin-agent",
                    "-p",
                    "palanquin-cli",
                    "--features",
                    "palanquin-agent/fail-points",
                ],
            )
        }),
        ("end to end", || {
            setup::require_root("the end-to-end tests make network namespaces")?;
            run(
                "cargo",
                &["test", "-p", "palanquin-lab", "--", "--test-threads=2"],
            )
        }),
    ];
    let mut done = Vec::new();
    for (name, step) in steps {
        println!("==> {name}");
        let began = Instant::now();
        let result = step();
        let mark = if result.is_ok() { "ok" } else { "FAILED" };
        done.push(format!(
            "{mark:6} {:6.1} s  {name}",
            began.elapsed().as_secs_f64()
        ));
        if let Err(error) = result {
            println!("{}", done.join("\n"));
            bail!("{name}: {error:#}");
        }
    }
    println!("{}", done.join("\n"));
    Ok(())
}

/// Bans, licences and sources. The database of advisories is not reachable everywhere, so it is not asked here.
fn licences() -> Result<()> {
    let tools = root().join("target/tools");
    let deny = tools.join("bin/cargo-deny");
    if !deny.exists() {
        println!("installing cargo-deny {DENY} (some minutes, once)");
        run(
            "cargo",
            &[
                "install",
                "cargo-deny",
                "--version",
                DENY,
                "--locked",
                "--quiet",
                "--root",
                &tools.display().to_string(),
            ],
        )?;
    }
    let status = Command::new(deny)
        .args(["check", "bans", "licenses", "sources"])
        .current_dir(root())
        .status()?;
    if !status.success() {
        bail!("a dependency breaks deny.toml");
    }
    Ok(())
}
