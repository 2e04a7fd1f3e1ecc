//! Rules that no compiler checks, one file each.

mod dependencies;
mod sources;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::root;

/// A place that breaks a rule.
pub(crate) type Finding = String;

/// Checks all rules and prints every finding.
pub(crate) fn check() -> Result<()> {
    let mut findings = dependencies::check()?;
    for path in tracked()? {
        if let Ok(text) = std::fs::read_to_string(root().join(&path)) {
            findings.extend(sources::check(&path.display().to_string(), &text));
        }
    }
    for finding in &findings {
        println!("{finding}");
    }
    if findings.is_empty() {
        Ok(())
    } else {
        bail!("{} places break the rules", findings.len())
    }
}

/// Files of the repository, also those not added yet.
fn tracked() -> Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(PathBuf::from)
        .collect())
}
