//! Standard output and standard error: a reader that went away is quiet, and what came from another host cannot
//! steer the terminal.

use std::io::{self, Write};

use palanquin_api::control::ErrorKind;

use crate::failure::Failure;

/// Writes to standard output. A reader that went away (as in `| head`) is no failure; a full disk is.
pub(crate) fn say(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(ErrorKind::Internal, "cannot write to standard output").cause(error))
        }
        _ => Ok(()),
    }
}

/// The same with a line's end.
pub(crate) fn say_line(text: &str) -> Result<(), Failure> {
    say(&format!("{text}\n"))
}

/// Writes a line to standard error; nobody can be told if that is not possible.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// As one line of JSON.
pub(crate) fn to_json(value: &impl serde::Serialize) -> String {
    // These types always serialize.
    serde_json::to_string(value).unwrap_or_default()
}

/// One line without control characters, which could steer a terminal: some texts were written by another host.
pub(crate) fn line(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

/// The same for a text of several lines; all but the first are indented.
pub(crate) fn lines(text: &str, indent: &str) -> String {
    let lines: Vec<String> = text.trim_end().lines().map(line).collect();
    lines.join(&format!("\n{indent}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_host_wrote_cannot_steer_the_terminal() {
        assert_eq!(
            line("a\u{1b}[2Jb\nc\u{9b}"),
            "a\u{fffd}[2Jb\u{fffd}c\u{fffd}"
        );
        assert_eq!(lines("a\nb\x07\n", "  "), "a\n  b\u{fffd}");
    }
}
