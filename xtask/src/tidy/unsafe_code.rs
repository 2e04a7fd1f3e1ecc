//! `unsafe` lives in one crate; the compiler is told to refuse it in every other.

use super::{Finding, Source};

/// The crate that may.
const HOME: &str = "crates/host/";
/// Written in two parts, so that this file passes.
const KEYWORD: &str = concat!("uns", "afe");
const FORBID: &str = concat!("#![forbid(uns", "afe_code)]");

pub(super) fn check(source: &Source) -> Vec<Finding> {
    if !source.is_rust() || source.path.starts_with(HOME) {
        return Vec::new();
    }
    (1..)
        .zip(source.text.lines())
        .filter(|(_, line)| is_used(line))
        .map(|(number, _)| source.finding(number, &format!("{KEYWORD} code outside {HOME}")))
        .collect()
}

/// Checks the files from which the compiler starts: libraries, programs, tests.
pub(super) fn check_roots(sources: &[Source], roots: &[String]) -> Vec<Finding> {
    sources
        .iter()
        .filter(|source| roots.contains(&source.path) && !source.path.starts_with(HOME))
        .filter(|source| !source.text.lines().any(|line| line == FORBID))
        .map(|source| source.finding(1, &format!("a crate without {FORBID}")))
        .collect()
}

fn is_used(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    [" {", " fn", " impl", " extern", " trait", "("]
        .iter()
        .any(|rest| code.contains(&format!("{KEYWORD}{rest}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::source;

    #[test]
    fn unsafe_code_is_found_outside_its_crate() {
        let text = concat!("fn f() {\n    uns", "afe { g() }\n}\n");
        assert_eq!(check(&source("crates/agent/src/x.rs", text)).len(), 1);
        assert!(check(&source("crates/host/src/sys/x.rs", text)).is_empty());
        assert!(check(&source("crates/agent/src/x.rs", "// not a word\n")).is_empty());
    }

    #[test]
    fn every_root_forbids_it_but_other_files_need_not() {
        let sources = [
            source("crates/a/src/lib.rs", "//! Docs\n"),
            source("crates/a/src/part.rs", "//! Docs\n"),
            source("crates/b/src/main.rs", &format!("//! Docs\n{FORBID}\n")),
            source("crates/host/src/lib.rs", "//! Docs\n"),
        ];
        let roots = ["a/src/lib.rs", "b/src/main.rs", "host/src/lib.rs"];
        let roots = roots.map(|path| format!("crates/{path}"));
        let findings = check_roots(&sources, &roots);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].starts_with("crates/a/src/lib.rs:1:"));
    }
}
