//! `cargo xtask test`: what continuous integration runs.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::{fuzz, guest, programs, root, run, setup, tidy};

/// Something that passes or says why not.
type Step = fn() -> Result<()>;

/// Version of the licence checker that this repository is checked with.
const DENY: &str = "0.20.2";

/// All steps; stops at the first that fails, and always says how far it came.
pub(crate) fn test() -> Result<()> {
    let steps: [(&str, Step); 13] = [
        ("install", setup::install_for_tests),
        ("format", || {
            run("cargo", &["fmt", "--all", "--check"])?;
            run(
                "cargo",
                &["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"],
            )
        }),
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
        ("without TPMs", || {
            run(
                "cargo",
                &[
                    "check",
                    "-p",
                    "palanquin-cli",
                    "-p",
                    "palanquin-agent",
                    "--no-default-features",
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
        ("fuzz smoke", fuzz::smoke),
        ("build for the end", build_for_the_end),
        ("end to end", || {
            setup::require_root("the end-to-end tests make network namespaces")?;
            run(
                "cargo",
                &["test", "-p", "palanquin-lab", "--", "--test-threads=2"],
            )
        }),
    ];
    sequence(&steps)
}

/// The programs that the end-to-end tests run.
pub(crate) fn build_for_the_end() -> Result<()> {
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
}

/// Runs steps in order up to the first that fails; their output is shown as it comes, and a table
/// of times is printed in any case.
fn sequence(steps: &[(&str, Step)]) -> Result<()> {
    let began = Instant::now();
    let mut done = Vec::new();
    let mut end = Ok(());
    for (name, step) in steps {
        println!("==> {name}");
        let step_began = Instant::now();
        let result = step();
        let mark = if result.is_ok() { "ok" } else { "FAILED" };
        let line = format!(
            "{mark:6} {:7.1} s  {name}",
            step_began.elapsed().as_secs_f64()
        );
        println!("{line}");
        done.push(line);
        if let Err(error) = result {
            end = Err(error.context(format!("step failed: {name}")));
            break;
        }
    }
    println!("\n{}", done.join("\n"));
    let left = steps.len() - done.len();
    let not_run = if left > 0 {
        format!(", {left} steps not run")
    } else {
        String::new()
    };
    println!(
        "       {:7.1} s  in all{not_run}",
        began.elapsed().as_secs_f64()
    );
    end
}

/// Bans, licences and sources.
fn licences() -> Result<()> {
    println!("advisories are not asked: their database isn't reachable from everywhere");
    let tools = root().join("target/tools");
    let deny = tools.join("bin/cargo-deny");
    if !deny.exists() {
        println!("installing cargo-deny {DENY} (some minutes, once)");
        // Unoptimised and without its own downloads: half the time to build, fast enough to run.
        programs::visible(
            programs::cargo()
                .args(["install", "cargo-deny", "--version", DENY, "--locked"])
                .args(["--debug", "--no-default-features", "--quiet", "--root"])
                .arg(&tools),
        )?;
    }
    // The fuzz targets are a workspace of their own.
    for manifest in ["Cargo.toml", "fuzz/Cargo.toml"] {
        let mut deny = programs::program(&deny);
        deny.args(["--manifest-path", manifest, "check"]);
        programs::visible(deny.args(["bans", "licenses", "sources"]))
            .with_context(|| format!("a dependency of {manifest} breaks deny.toml"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn the_first_failure_ends_the_sequence_and_is_named() {
        let steps: [(&str, Step); 3] = [
            ("one", || Ok(())),
            ("two", || bail!("broken")),
            ("three", || unreachable!("a step after the failure")),
        ];
        let error = sequence(&steps).unwrap_err();
        assert_eq!(format!("{error:#}"), "step failed: two: broken");
        assert!(sequence(&steps[..1]).is_ok());
    }
}
