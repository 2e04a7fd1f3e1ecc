//! `mod tests` stands last in its file, where a reader expects it.

use super::{Finding, Source};

pub(super) fn check(source: &Source) -> Vec<Finding> {
    if !source.is_rust() {
        return Vec::new();
    }
    let mut lines = (1..).zip(source.text.lines());
    let Some((start, _)) = lines.find(|(_, line)| *line == "mod tests {") else {
        return Vec::new();
    };
    // Formatted code closes an item of the file with a brace in the first column.
    let after = lines.skip_while(|(_, line)| *line != "}").skip(1);
    if after.into_iter().all(|(_, line)| line.trim().is_empty()) {
        Vec::new()
    } else {
        vec![source.finding(start, "`mod tests` is not last")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::source;

    #[test]
    fn code_after_the_tests_is_found() {
        let text = "fn a() {}\nmod tests {\n    fn t() {\n    }\n}\n\nfn b() {}\n";
        assert_eq!(
            check(&source("a.rs", text)),
            ["a.rs:2: `mod tests` is not last"]
        );
    }

    #[test]
    fn tests_at_the_end_pass() {
        let text = "fn a() {}\nmod tests {\n    fn t() {\n    }\n}\n";
        assert!(check(&source("a.rs", text)).is_empty());
        assert!(check(&source("a.rs", "fn a() {}\n")).is_empty());
    }
}
