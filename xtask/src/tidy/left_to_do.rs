//! Nothing is left to do in what is committed: an open end belongs in an issue.

use super::{Finding, Source};

/// Written in two parts, so that this file passes.
const WORDS: [&str; 4] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("todo", "!("),
    concat!("unimpl", "emented!("),
];

pub(super) fn check(source: &Source) -> Vec<Finding> {
    if !source.is_rust() {
        return Vec::new();
    }
    (1..)
        .zip(source.text.lines())
        .filter(|(_, line)| WORDS.iter().any(|word| line.contains(word)))
        .map(|(number, _)| source.finding(number, "something is left to do"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::source;

    #[test]
    fn an_open_end_is_found_with_its_line() {
        let text = concat!("fn f() {\n    to", "do!()\n}\n// TO", "DO later\n");
        let findings = check(&source("a.rs", text));
        assert_eq!(
            findings,
            [
                "a.rs:2: something is left to do",
                "a.rs:4: something is left to do"
            ]
        );
    }

    #[test]
    fn other_files_may_speak_of_it() {
        assert!(check(&source("a.md", concat!("TO", "DO"))).is_empty());
    }
}
