//! A file that grows too long holds more than one thing.

use super::{Finding, Source};

const LINES_MAX: usize = 900;

pub(super) fn check(source: &Source) -> Vec<Finding> {
    let lines = source.text.lines().count();
    if !source.is_rust() || lines <= LINES_MAX {
        return Vec::new();
    }
    vec![source.finding(
        LINES_MAX + 1,
        &format!("the file has {lines} lines, more than {LINES_MAX}: does it hold one thing?"),
    )]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::source;

    #[test]
    fn only_more_than_the_limit_is_too_long() {
        assert!(check(&source("a.rs", &"x\n".repeat(LINES_MAX))).is_empty());
        assert_eq!(
            check(&source("a.rs", &"x\n".repeat(LINES_MAX + 1))).len(),
            1
        );
        assert!(check(&source("Cargo.lock", &"x\n".repeat(5000))).is_empty());
    }
}
