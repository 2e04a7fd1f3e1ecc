//! No file names a place that exists on one developer's machine only.

use super::{Finding, Source};

/// Written in two parts, so that this file passes.
const PLACES: [&str; 3] = [
    concat!("/wo", "rk/"),
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
];

pub(super) fn check(source: &Source) -> Vec<Finding> {
    (1..)
        .zip(source.text.lines())
        .filter(|(_, line)| PLACES.iter().any(|place| names(line, place)))
        .map(|(number, _)| source.finding(number, "the path of somebody's machine"))
        .collect()
}

/// Whether `place` stands in the line as the beginning of an absolute path.
fn names(line: &str, place: &str) -> bool {
    line.match_indices(place).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "_-.}/".contains(c))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::source;

    #[test]
    fn an_absolute_path_is_found_in_any_file() {
        let text = concat!("first\nsee `/wo", "rk/x`\n");
        assert_eq!(
            check(&source("a.md", text)),
            ["a.md:2: the path of somebody's machine"]
        );
    }

    #[test]
    fn a_part_of_another_path_is_not_one() {
        for text in [concat!("frame/wo", "rk/x"), concat!("./wo", "rk/x")] {
            assert!(check(&source("a.md", text)).is_empty(), "{text}");
        }
    }
}
