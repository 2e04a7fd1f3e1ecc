//! Waiting for something, with a deadline, and given up when the operator interrupts.

use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

struct Interrupt {
    /// Signal that came, if one did.
    signal: Mutex<Option<i32>>,
    came: Condvar,
}

fn interrupt() -> &'static Interrupt {
    static INTERRUPT: OnceLock<Interrupt> = OnceLock::new();
    INTERRUPT.get_or_init(|| Interrupt {
        signal: Mutex::new(None),
        came: Condvar::new(),
    })
}

/// Turns SIGINT, SIGTERM and SIGHUP into an error of every wait of this crate, so that what was built is taken down.
///
/// # Errors
///
/// The signals can't be caught.
pub fn catch_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot catch Ctrl-C")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                let interrupt = interrupt();
                *interrupt
                    .signal
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(signal);
                interrupt.came.notify_all();
            }
        })
        .context("no thread for signals")?;
    Ok(())
}

/// Whether a signal came.
pub fn is_interrupted() -> bool {
    interrupt()
        .signal
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .is_some()
}

/// Lets that much time pass.
///
/// # Errors
///
/// A signal came.
pub fn pause(duration: Duration) -> Result<()> {
    let interrupt = interrupt();
    let signal = interrupt
        .signal
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let (signal, _) = interrupt
        .came
        .wait_timeout_while(signal, duration, |signal| signal.is_none())
        .unwrap_or_else(PoisonError::into_inner);
    if signal.is_some() {
        bail!("interrupted");
    }
    Ok(())
}

/// Asks again and again, every 20 ms, until there is an answer.
///
/// # Errors
///
/// There is none within `limit`, a signal came, or asking failed.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask().with_context(|| format!("waiting until {what}"))? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {limit:?}");
        }
        pause(Duration::from_millis(20))?;
    }
}

/// As [`until`], for a condition.
///
/// # Errors
///
/// As [`until`].
pub fn until_true(
    what: &str,
    limit: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    until(what, limit, || Ok(holds()?.then_some(())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_the_answer_or_at_its_deadline() {
        let mut asked = 0;
        let answer = until("three", Duration::from_secs(5), || {
            asked += 1;
            Ok((asked == 3).then_some(asked))
        });
        assert_eq!(answer.unwrap(), 3);
        let never = until_true("never", Duration::from_millis(30), || Ok(false));
        assert!(never.unwrap_err().to_string().contains("never: not within"));
    }
}
