//! Stopping or killing a host's agent at a named point of a migration, if it was built with its feature `fail-points`.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::host::Host;
use crate::wait;

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The agent dies by SIGKILL.
    Kill,
    /// The thread that came there stays until [`Host::release`], at most half a minute.
    Stop,
    /// Only that it was reached is noted.
    Note,
}

impl Host {
    fn point(&self, name: &str) -> PathBuf {
        self.dir().join("points").join(name)
    }

    /// Arms a point, for the first thread that comes there.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn arm(&self, name: &str, mode: Mode) -> Result<()> {
        let what = match mode {
            Mode::Kill => "kill",
            Mode::Stop => "stop",
            Mode::Note => "note",
        };
        // Whole or not at all: the agent may look at any moment.
        let beside = self.point(&format!("{name}.new"));
        fs::write(&beside, what)?;
        fs::rename(&beside, self.point(name))?;
        Ok(())
    }

    /// Whether the point was reached since it was armed, and not released yet.
    pub fn has_reached(&self, name: &str) -> bool {
        self.point(&format!("{name}.reached")).exists()
    }

    /// Waits until the point is reached; `alive` says why it cannot be any more.
    ///
    /// # Errors
    ///
    /// If it is not reached in time, or `alive` fails.
    pub fn wait_reached(
        &self,
        name: &str,
        limit: Duration,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        wait::until_true(&format!("{} reaches {name}", self.name()), limit, || {
            if self.has_reached(name) {
                return Ok(true);
            }
            alive()?;
            Ok(false)
        })
        .with_context(|| {
            format!(
                "is the agent built with the feature `fail-points`? {}",
                self.log_tail()
            )
        })
    }

    /// Lets the thread go on that stopped there, and disarms the point.
    ///
    /// # Errors
    ///
    /// If the files cannot be removed.
    pub fn release(&self, name: &str) -> Result<()> {
        for file in [name.to_owned(), format!("{name}.reached")] {
            match fs::remove_file(self.point(&file)) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    bail!("{file} cannot be removed: {error}")
                }
                _ => {}
            }
        }
        Ok(())
    }
}
