//! Which crate may depend on which, see ARCHITECTURE.md.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Finding;
use crate::root;

/// What each crate may use of ours; crates for development may use anything.
const ALLOWED: [(&str, &[&str]); 6] = [
    ("palanquin-engine", &[]),
    ("palanquin-host", &[]),
    ("palanquin-api", &[]),
    (
        "palanquin-agent",
        &["palanquin-engine", "palanquin-host", "palanquin-api"],
    ),
    ("palanquin-cli", &["palanquin-api"]),
    ("palanquin-sim", &["palanquin-engine"]),
];

/// Names of crates that say nothing.
const BANNED: [&str; 4] = ["common", "util", "utils", "types"];

pub(super) fn check() -> Result<Vec<Finding>> {
    let output = Command::new("cargo")
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .context("cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let mut findings = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let uses: Vec<&str> = package["dependencies"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|dependency| dependency["kind"].is_null() && dependency["path"].is_string())
            .filter_map(|dependency| dependency["name"].as_str())
            .collect();
        findings.extend(judge(name, &uses));
    }
    Ok(findings)
}

fn judge(name: &str, uses: &[&str]) -> Vec<Finding> {
    let mut findings = Vec::new();
    if BANNED
        .iter()
        .any(|banned| name.ends_with(&format!("-{banned}")))
    {
        findings.push(format!("{name}: a crate's name says what it is for"));
    }
    if let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) {
        for used in uses.iter().filter(|used| !allowed.contains(used)) {
            findings.push(format!("{name} must not depend on {used}"));
        }
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
        assert_eq!(judge("palanquin-util", &[]).len(), 1);
    }
}
