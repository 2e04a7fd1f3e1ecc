//! One line at a time on the console, from any thread.

use std::io::Write as _;

/// Writes one line; a console that is gone is no reason to stop working.
pub(crate) fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(format!("{text}\n").as_bytes());
    let _ = out.flush();
}
