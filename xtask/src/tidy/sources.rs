//! Rules of source files: where `unsafe` may be, how long a file may be, what must not be left in it.

use super::Finding;

const LINES_MAX: usize = 900;

pub(super) fn check(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut found = |line: usize, what: &str| findings.push(format!("{path}:{line}: {what}"));
    // Written in two parts, so that this file passes.
    let home = [
        concat!("/wo", "rk/"),
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
    ];
    for (number, line) in (1..).zip(text.lines()) {
        if home.iter().any(|dir| line.contains(dir)) {
            found(number, "the path of somebody's machine");
        }
        if path.ends_with(".rs") {
            for left in [
                concat!("TO", "DO"),
                concat!("FIX", "ME"),
                concat!("todo", "!("),
                concat!("unimpl", "emented!("),
            ] {
                if line.contains(left) {
                    found(number, "something is left to do");
                }
            }
            if is_unsafe(line) && !path.starts_with("crates/host/src/sys/") {
                found(number, "unsafe code outside crates/host/src/sys");
            }
        }
    }
    if path.ends_with(".rs") {
        if text.lines().count() > LINES_MAX {
            found(LINES_MAX, "the file is too long: does it hold one thing?");
        }
        let is_root = ["src/lib.rs", "src/main.rs"]
            .iter()
            .any(|root| path.ends_with(root));
        if is_root && !path.starts_with("crates/host/") && !text.contains("#![forbid(unsafe_code)]")
        {
            found(1, "a crate without #![forbid(unsafe_code)]");
        }
        if let Some(at) = text.find("\nmod tests {") {
            let after = text[at..]
                .split_once("\n}\n")
                .map_or("", |(_, after)| after);
            if !after.trim().is_empty() {
                found(text[..at].lines().count() + 1, "`mod tests` is not last");
            }
        }
    }
    findings
}

fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let keyword = concat!("uns", "afe");
    [" {", " fn", " impl", " extern"]
        .iter()
        .any(|rest| code.contains(&format!("{keyword}{rest}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_code_is_found_outside_its_place() {
        let code = concat!("fn f() { uns", "afe { g() } }\n");
        assert_eq!(check("crates/agent/src/x.rs", code).len(), 1);
        assert!(check("crates/host/src/sys/x.rs", code).is_empty());
        assert!(check("crates/agent/src/x.rs", "// not a word about it\n").is_empty());
    }

    #[test]
    fn tests_come_last_and_roots_forbid_what_they_must() {
        assert_eq!(
            check("crates/x/src/y.rs", "\nmod tests {\n}\nfn after() {}\n").len(),
            1
        );
        assert!(check("crates/x/src/y.rs", "\nmod tests {\n}\n").is_empty());
        assert_eq!(check("crates/x/src/lib.rs", "//! Docs\n").len(), 1);
    }

    #[test]
    fn long_files_and_what_is_left_to_do_are_found() {
        assert_eq!(check("a.rs", &"x\n".repeat(901)).len(), 1);
        assert_eq!(check("a.rs", concat!("// TO", "DO\n")).len(), 1);
        assert_eq!(check("a.md", concat!("see /wo", "rk/x\n")).len(), 1);
    }
}
