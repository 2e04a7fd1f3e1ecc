//! The hardware clock, by the moments at which its seconds change.
//!
//! It shows whole seconds only, so it is asked again and again about when the next one is due. Under QEMU it follows the
//! host's time of day, also while the guest is stopped or is being moved, when all of the guest's other clocks stand still.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::thread::nanosleep;
use rustix::time::Timespec;

use super::Unread;
use super::clocks::{Edge, raw_ns};

const DIR: &str = "/sys/class/rtc";
const SECOND_NS: i64 = 1_000_000_000;
/// It is asked so long before the next second is due.
const EARLY_NS: i64 = 3_000_000;
/// Time between two questions then ...
const NEAR: Duration = Duration::from_micros(300);
/// ... and while nothing is known of when it is due.
const FAR: Duration = Duration::from_millis(2);
/// An edge known less exactly than this is not one: something came between. The next one is waited for.
const ERROR_MAX_NS: i64 = 10_000_000;

/// The hardware clock.
#[derive(Debug)]
pub struct Rtc {
    file: File,
    edge: Option<Edge>,
}

impl Rtc {
    /// The first one of this machine.
    ///
    /// # Errors
    ///
    /// If there is none, or it can't be read.
    pub fn open() -> Result<Self, Unread> {
        let unread = |why: String| Unread {
            what: "hardware clock",
            why,
            hint: "without it a pause is noticed only by the clocks of neighbours; the kernel needs a driver (rtc_cmos)",
        };
        let path = first().ok_or_else(|| unread(format!("there is none in {DIR}")))?;
        let shown = path.display();
        let file = File::open(&path).map_err(|error| unread(format!("{shown}: {error}")))?;
        let clock = Self { file, edge: None };
        clock
            .seconds()
            .map_err(|error| unread(format!("{shown}: {error}")))?;
        Ok(clock)
    }

    /// What it shows, in seconds since 1970.
    fn seconds(&self) -> io::Result<i64> {
        let mut bytes = [0; 32];
        let count = self.file.read_at(&mut bytes, 0)?;
        let text = std::str::from_utf8(&bytes[..count]).unwrap_or_default();
        text.trim()
            .parse()
            .map_err(|_| io::Error::other("it shows no number of seconds"))
    }

    /// Waits until it goes on to its next second. Nothing if it does not within `patience`, or can't be read any more.
    pub fn edge(&mut self, patience: Duration) -> Option<Edge> {
        let patience_ns = i64::try_from(patience.as_nanos()).unwrap_or(i64::MAX);
        let deadline_ns = raw_ns().saturating_add(patience_ns);
        if let Some(due_ns) = self.due_ns() {
            let wait_ns = due_ns.min(deadline_ns).saturating_sub(raw_ns());
            pause(Duration::from_nanos(u64::try_from(wait_ns).unwrap_or(0)));
        }
        let step = if self.edge.is_some() { NEAR } else { FAR };
        let mut asked_ns = raw_ns();
        let mut shown = self.seconds().ok()?;
        let mut near_until_ns = asked_ns.saturating_add(4 * EARLY_NS);
        while asked_ns < deadline_ns {
            pause(if asked_ns < near_until_ns { step } else { FAR });
            let again_ns = raw_ns();
            let now = self.seconds().ok()?;
            let until_ns = raw_ns();
            if now != shown {
                let edge = Edge {
                    rtc_s: now,
                    at_ns: asked_ns + (until_ns - asked_ns) / 2,
                    error_ns: (until_ns - asked_ns) / 2,
                };
                if edge.error_ns <= ERROR_MAX_NS {
                    self.edge = Some(edge);
                    return Some(edge);
                }
                // Now it is known about when.
                near_until_ns = until_ns.saturating_add(2 * SECOND_NS);
            }
            (asked_ns, shown) = (again_ns, now);
        }
        // It does not go on as it did.
        self.edge = None;
        None
    }

    /// When to begin to ask, if the clock goes on as it did.
    fn due_ns(&self) -> Option<i64> {
        let edge = self.edge?;
        let passed_ns = raw_ns().checked_sub(edge.at_ns)?.checked_add(EARLY_NS)?;
        let seconds = passed_ns.checked_div(SECOND_NS)?.checked_add(1)?;
        let next_ns = edge.at_ns.checked_add(seconds.checked_mul(SECOND_NS)?)?;
        next_ns.checked_sub(EARLY_NS)
    }
}

/// The clock that sorts first.
fn first() -> Option<PathBuf> {
    let entries = std::fs::read_dir(DIR).ok()?;
    let paths = entries
        .flatten()
        .map(|entry| entry.path().join("since_epoch"));
    paths.filter(|path| path.is_file()).min()
}

/// Nobody tells when the hardware clock goes on: it can only be asked.
fn pause(duration: Duration) {
    if let Ok(time) = Timespec::try_from(duration) {
        // A signal that ends it early only makes it ask earlier.
        let _ = nanosleep(&time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock in a file that does not go on, or that nobody can read.
    fn stands_at(text: &str) -> (tempfile::NamedTempFile, Rtc) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let clock = Rtc {
            file: file.reopen().unwrap(),
            edge: None,
        };
        (file, clock)
    }

    #[test]
    fn a_clock_that_stands_still_has_no_edge_and_is_not_waited_for_without_end() {
        let (_file, mut clock) = stands_at("1700000000\n");
        let began = std::time::Instant::now();
        assert_eq!(clock.edge(Duration::from_millis(50)), None);
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_clock_that_shows_nonsense_is_not_read() {
        for text in ["", "yesterday", "99999999999999999999999"] {
            let (_file, mut clock) = stands_at(text);
            assert_eq!(clock.edge(Duration::from_millis(5)), None, "{text:?}");
        }
    }

    #[test]
    fn an_edge_is_where_the_second_changes() {
        let (file, mut clock) = stands_at("1700000000");
        let path = file.path().to_owned();
        let changer = std::thread::spawn(move || {
            pause(Duration::from_millis(30));
            let before_ns = raw_ns();
            // As long as the other, so that nobody reads half of it.
            std::fs::OpenOptions::new()
                .write(true)
                .open(path)
                .and_then(|file| file.write_at(b"1700000001", 0))
                .unwrap();
            (before_ns, raw_ns())
        });
        let edge = clock.edge(Duration::from_secs(10));
        let (before_ns, after_ns) = changer.join().unwrap();
        // On a machine that is busy it may have been too inexact to be one.
        let Some(edge) = edge else { return };
        assert_eq!(edge.rtc_s, 1_700_000_001);
        assert!(edge.at_ns + edge.error_ns >= before_ns && edge.at_ns - edge.error_ns <= after_ns);
    }
}
