//! Which crate may depend on which: inside on nothing of ours, the edge on the inside, and only
//! what is for development on anything.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Finding;
use crate::programs;

/// What each crate may use of ours; a new crate is entered here, with what it may use.
const ALLOWED: [(&str, &[&str]); 10] = [
    (
        "palanquin-agent",
        &[
            "palanquin-api",
            "palanquin-engine",
            "palanquin-host",
            "palanquin-trust",
            "palanquin-trust-files",
            "palanquin-watch",
        ],
    ),
    ("palanquin-api", &[]),
    (
        "palanquin-cli",
        &[
            "palanquin-api",
            "palanquin-host",
            "palanquin-trust",
            "palanquin-trust-files",
            "palanquin-watch",
        ],
    ),
    ("palanquin-engine", &[]),
    ("palanquin-host", &[]),
    ("palanquin-sim", &["palanquin-engine"]),
    ("palanquin-trust", &["palanquin-api"]),
    ("palanquin-trust-files", &["palanquin-trust"]),
    ("palanquin-watch", &["palanquin-api"]),
    ("palanquin-workload", &[]),
];

/// Crates for development, which may use anything.
const FREE: [&str; 4] = [
    "palanquin-benches",
    "palanquin-lab",
    "palanquin-trials",
    "xtask",
];

/// Names of crates that say nothing.
const BANNED: [&str; 4] = ["common", "util", "utils", "types"];

pub(super) fn check() -> Result<Vec<Finding>> {
    let metadata = metadata()?;
    let packages = metadata["packages"].as_array();
    Ok(packages
        .into_iter()
        .flatten()
        .flat_map(|package| {
            let uses: Vec<&str> = package["dependencies"]
                .as_array()
                .into_iter()
                .flatten()
                // A test may use what the crate itself must not.
                .filter(|dependency| dependency["kind"] != "dev" && dependency["path"].is_string())
                .filter_map(|dependency| dependency["name"].as_str())
                .collect();
            judge(package["name"].as_str().unwrap_or_default(), &uses)
        })
        .collect())
}

/// Files from which the compiler starts, as paths from the root of the repository.
pub(super) fn roots() -> Result<Vec<String>> {
    let metadata = metadata()?;
    let top = Path::new(metadata["workspace_root"].as_str().unwrap_or_default());
    Ok(metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|package| package["targets"].as_array().into_iter().flatten())
        .filter_map(|target| {
            Path::new(target["src_path"].as_str()?)
                .strip_prefix(top)
                .ok()
        })
        .map(|path| path.display().to_string())
        .collect())
}

fn metadata() -> Result<Value> {
    let text = programs::output(programs::cargo().args([
        "metadata",
        "--format-version",
        "1",
        "--no-deps",
        "--offline",
    ]))?;
    serde_json::from_slice(&text).context("cargo metadata can't be read")
}

fn judge(name: &str, uses: &[&str]) -> Vec<Finding> {
    let mut findings = Vec::new();
    if BANNED
        .iter()
        .any(|banned| name.ends_with(&format!("-{banned}")))
    {
        findings.push(format!("{name}: a crate's name says what it is for"));
    }
    if FREE.contains(&name) {
        return findings;
    }
    match ALLOWED.iter().find(|(known, _)| *known == name) {
        Some((_, allowed)) => findings.extend(
            uses.iter()
                .filter(|used| !allowed.contains(used))
                .map(|used| format!("{name} must not depend on {used}")),
        ),
        None => findings.push(format!(
            "{name} is in no list of xtask/src/tidy/dependencies.rs: what may it depend on?"
        )),
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dependency_against_the_direction_is_found() {
        assert!(judge("palanquin-agent", &["palanquin-host"]).is_empty());
        assert_eq!(judge("palanquin-engine", &["palanquin-host"]).len(), 1);
        assert_eq!(judge("palanquin-cli", &["palanquin-agent"]).len(), 1);
        assert!(judge("palanquin-lab", &["palanquin-agent"]).is_empty());
    }

    #[test]
    fn a_new_crate_has_to_be_entered_and_named_well() {
        assert_eq!(judge("palanquin-planner", &[]).len(), 1);
        assert_eq!(judge("palanquin-util", &[]).len(), 2);
    }

    #[test]
    fn every_program_of_the_workspace_is_a_root() {
        let roots = roots().unwrap();
        assert!(roots.contains(&"xtask/src/main.rs".to_owned()));
    }
}
