//! Points at which the end-to-end tests stop or kill the agent; nothing in builds without the feature `fail-points`.
//!
//! A test arms a point with a file of its name in the directory that `PALANQUIN_FAIL_POINTS` names. The first thread
//! that comes there renames the file to `NAME.reached`, so that a point counts once, and does what is in it:
//!
//! - `kill`: the agent dies by SIGKILL;
//! - `stop`: the thread stays until `NAME.reached` is removed, at most half a minute;
//! - `note`: nothing more.
//!
//! Points that come with every message and record are named for them: `source-sent-Commit`,
//! `destination-recorded-Owned`.

#[cfg(feature = "fail-points")]
pub use self::armed::{fail_point, fail_point_at, fail_point_record};

#[cfg(feature = "fail-points")]
mod armed {
    use std::fmt::Debug;
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::time::{Duration, Instant};
    use std::{env, fs};

    use rustix::event::{Timespec, poll};
    use rustix::process::{Signal, getpid, kill_process};

    /// Longest stop: a test that failed must not leave a thread behind for ever.
    const DEADLINE: Duration = Duration::from_secs(30);
    /// How often a thread that stands still looks whether it may go on.
    const LOOK: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 2_000_000,
    };

    fn directory() -> Option<&'static PathBuf> {
        static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
        DIRECTORY
            .get_or_init(|| env::var_os("PALANQUIN_FAIL_POINTS").map(Into::into))
            .as_ref()
    }

    /// Does here what a test asked for, see the [module](super).
    pub fn fail_point(name: &str) {
        let Some(directory) = directory() else {
            return;
        };
        let armed = directory.join(name);
        let Ok(what) = fs::read_to_string(&armed) else {
            return;
        };
        let reached = directory.join(format!("{name}.reached"));
        // Another thread was here first, or it was disarmed meanwhile.
        if fs::rename(&armed, &reached).is_err() {
            return;
        }
        eprintln!("FAIL POINT {name}: {what}");
        match what.trim() {
            // The signal cannot be caught, so this does not return.
            "kill" => drop(kill_process(getpid(), Signal::KILL)),
            "stop" => {
                let deadline = Instant::now() + DEADLINE;
                while reached.exists() && Instant::now() < deadline {
                    let _ = poll(&mut [], Some(&LOOK));
                }
            }
            _ => {}
        }
    }

    /// The point `STEP-WHAT`.
    pub fn fail_point_at(step: &str, what: &str) {
        if directory().is_some() {
            fail_point(&format!("{step}-{what}"));
        }
    }

    /// The point `STEP-RECORD`, where a record is named for its variant.
    pub fn fail_point_record(step: &str, record: &impl Debug) {
        if directory().is_some() {
            let record = format!("{record:?}");
            let name = record.split(|c: char| !c.is_alphanumeric()).next();
            fail_point_at(step, name.unwrap_or_default());
        }
    }
}

/// Nothing.
#[cfg(not(feature = "fail-points"))]
pub fn fail_point(_name: &str) {}

/// Nothing.
#[cfg(not(feature = "fail-points"))]
pub fn fail_point_at(_step: &str, _what: &str) {}

/// Nothing.
#[cfg(not(feature = "fail-points"))]
pub fn fail_point_record(_step: &str, _record: &impl std::fmt::Debug) {}
