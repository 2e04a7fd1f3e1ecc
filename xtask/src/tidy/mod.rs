//! Rules that no compiler checks, one file each.

mod dependencies;
mod left_to_do;
mod length;
mod machine_paths;
mod tests_last;
mod unsafe_code;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::programs::{self, root};

/// A place that breaks a rule.
type Finding = String;

/// A file of the repository.
struct Source {
    /// Path from the root of the repository.
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// A finding on a line, counted from 1.
    fn finding(&self, line: usize, what: &str) -> Finding {
        format!("{}:{line}: {what}", self.path)
    }
}

/// Checks all rules and prints every finding.
pub(crate) fn check() -> Result<()> {
    let mut findings = dependencies::check()?;
    let sources = sources()?;
    let rules = [
        left_to_do::check,
        length::check,
        machine_paths::check,
        tests_last::check,
        unsafe_code::check,
    ];
    for rule in rules {
        findings.extend(sources.iter().flat_map(rule));
    }
    findings.extend(unsafe_code::check_roots(&sources, &dependencies::roots()?));
    findings.sort();
    for finding in &findings {
        println!("{finding}");
    }
    if findings.is_empty() {
        println!("tidy: {} files, nothing to mend", sources.len());
        Ok(())
    } else {
        bail!("{} places break the rules", findings.len())
    }
}

/// Texts of the repository, also those not added yet.
fn sources() -> Result<Vec<Source>> {
    let listed = programs::text(programs::program("git").args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))?;
    let mut sources = Vec::new();
    for path in listed.split('\0').filter(|path| !path.is_empty()) {
        if let Some(text) = text(&root().join(path))? {
            sources.push(Source {
                path: path.to_owned(),
                text,
            });
        }
    }
    Ok(sources)
}

/// The file as text; nothing if it was removed or isn't text.
fn text(path: &Path) -> Result<Option<String>> {
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(String::from_utf8(bytes).ok())
}

#[cfg(test)]
fn source(path: &str, text: &str) -> Source {
    Source {
        path: path.to_owned(),
        text: text.to_owned(),
    }
}
