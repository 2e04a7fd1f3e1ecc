//! Points at which the end-to-end tests kill the agent; nothing in builds without the feature `fail-points`.

/// Dies here by SIGKILL if the environment variable `PALANQUIN_FAIL_POINT` has this name.
#[cfg(feature = "fail-points")]
pub fn fail_point(name: &str) {
    if std::env::var("PALANQUIN_FAIL_POINT").as_deref() == Ok(name) {
        eprintln!("FAIL POINT {name}");
        // The signal cannot be caught, so this does not return.
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Nothing.
#[cfg(not(feature = "fail-points"))]
pub fn fail_point(_name: &str) {}
