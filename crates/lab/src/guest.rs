//! The test guest: Debian's kernel with the workload that verifies its own memory, or a boot sector.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::paths::guest_dir;
use crate::wait;

/// What a guest is to be.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// Name of the VM.
    pub name: String,
    /// MiB of each memory backend.
    pub memory_mib: Vec<u64>,
    /// MiB that are rewritten and verified.
    pub buffer_mib: u64,
    /// MiB rewritten each second.
    pub dirty_mib_s: u64,
    /// MiB of incompressible bytes.
    pub fill_mib: u64,
    /// MiB of what is not rewritten that are verified each second.
    pub audit_mib_s: u64,
    /// Sentence kept in memory.
    pub canary: String,
    /// Address in 10.77.0.0/16, and the tap; none without a network.
    pub network: Option<(String, String)>,
    /// URL of a tar archive that the guest unpacks into its RAM disk before its workload starts; needs a network. If it has a
    /// program `start`, that runs beside the workload.
    pub files: Option<String>,
    /// Path in the guest of a text file that its workload opens.
    pub open: Option<String>,
}

impl GuestSpec {
    /// A guest of 192 MiB that rewrites 4 of 16 MiB each second, without a network.
    pub fn small(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            memory_mib: vec![192],
            buffer_mib: 16,
            dirty_mib_s: 4,
            fill_mib: 0,
            audit_mib_s: 16,
            canary: String::new(),
            network: None,
            files: None,
            open: None,
        }
    }

    /// With so much incompressible memory, so that a migration takes a while.
    #[must_use]
    pub fn filled(mut self, mib: u64) -> Self {
        self.fill_mib = mib;
        self
    }

    /// On the network, at 10.77.1.10 with the first tap.
    #[must_use]
    pub fn on_network(mut self) -> Self {
        self.network = Some(("10.77.1.10".to_owned(), "vm0".to_owned()));
        self
    }

    /// Kernel command line.
    pub fn command_line(&self) -> String {
        let Self {
            buffer_mib,
            dirty_mib_s,
            fill_mib,
            audit_mib_s,
            ..
        } = self;
        let mut line = format!(
            "console=ttyS0 quiet panic=-1 palanquin.buffer_mib={buffer_mib} palanquin.dirty_mib_s={dirty_mib_s} \
             palanquin.fill_mib={fill_mib} palanquin.audit_mib_s={audit_mib_s}"
        );
        if !self.canary.is_empty() {
            line += &format!(" palanquin.canary={}", self.canary.replace(' ', "%20"));
        }
        if let Some((address, _)) = &self.network {
            line += &format!(" palanquin.ip={address}/{}", crate::network::PREFIX_LENGTH);
        }
        if let Some(url) = &self.files {
            line += &format!(" palanquin.files={url}");
        }
        if let Some(path) = &self.open {
            line += &format!(" palanquin.open={path}");
        }
        line
    }

    /// As `palanquin vm run` reads it.
    ///
    /// # Errors
    ///
    /// If the guests are not built.
    pub fn to_toml(&self) -> Result<String> {
        let dir = guest_dir()?;
        let sizes: Vec<String> = self
            .memory_mib
            .iter()
            .map(|mib| format!("\"{mib}MiB\""))
            .collect();
        let memory = match &sizes[..] {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let mut text = format!(
            "name = {:?}\nmemory = {memory}\naccel = \"tcg\"\nkernel = {:?}\ninitrd = {:?}\nappend = {:?}\n",
            self.name,
            dir.join("vmlinuz"),
            dir.join("initrd.gz"),
            self.command_line(),
        );
        if let Some((address, tap)) = &self.network {
            let mac = mac(address);
            text += &format!("[[network]]\ntap = {tap:?}\nmac = {mac:?}\n");
        }
        Ok(text)
    }
}

/// A hardware address that follows from the network's.
pub fn mac(address: &str) -> String {
    let mut octets = address
        .split('.')
        .filter_map(|octet| octet.parse::<u8>().ok());
    let mut bytes = [0x52, 0x54, 0, 0, 0, 0];
    for (byte, octet) in bytes[2..].iter_mut().zip(&mut octets) {
        *byte = octet;
    }
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// One `beat` of the workload on the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Counts the beats since the guest's start.
    pub number: u64,
    /// Sweeps over the buffer.
    pub sweeps: u64,
    /// Pages verified so far.
    pub verified: u64,
    /// Pages found wrong so far.
    pub corrupt: u64,
    /// Passes over all that is not rewritten.
    pub audits: u64,
}

/// File that the guest's console is written to.
#[derive(Clone, Debug)]
pub struct Console {
    path: PathBuf,
}

impl Console {
    /// The file need not be there yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is in it; empty while it is not there.
    pub fn text(&self) -> String {
        fs::read(&self.path).map_or_else(
            |_| String::new(),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// Bytes in it.
    pub fn len(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |metadata| metadata.len())
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The complete beats, oldest first.
    pub fn beats(&self) -> Vec<Beat> {
        beats(&self.text())
    }

    /// Waits for a text.
    ///
    /// # Errors
    ///
    /// If it does not come in time; the error has the console's end.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        wait::until_true(&format!("{text:?} on the console"), limit, || {
            Ok(self.text().contains(text))
        })
        .with_context(|| self.tail())
    }

    /// Waits for the guest to go on for `more` beats from now, and gives the last one.
    ///
    /// # Errors
    ///
    /// If it does not in time, or has found corrupt memory.
    pub fn wait_beats(&self, more: usize, limit: Duration) -> Result<Beat> {
        let before = self.beats().len();
        let beat = wait::until("the guest beats", limit, || {
            let beats = self.beats();
            Ok((beats.len() >= before + more)
                .then(|| beats.last().copied())
                .flatten())
        })
        .with_context(|| self.tail())?;
        self.check(&beat)?;
        Ok(beat)
    }

    /// Waits until the guest has verified at least so many pages in all.
    ///
    /// # Errors
    ///
    /// If it does not in time, or has found corrupt memory.
    pub fn wait_verified(&self, pages: u64, limit: Duration) -> Result<Beat> {
        let beat = wait::until(&format!("{pages} pages verified"), limit, || {
            Ok(self
                .beats()
                .last()
                .copied()
                .filter(|beat| beat.verified >= pages))
        })
        .with_context(|| self.tail())?;
        self.check(&beat)?;
        Ok(beat)
    }

    /// Waits until the guest has verified all of its memory from now on: what it rewrites, and what stays.
    ///
    /// # Errors
    ///
    /// If it does not in time, or has found corrupt memory.
    pub fn wait_all_verified(&self, limit: Duration) -> Result<Beat> {
        let before = self.wait_beats(1, limit)?;
        // The passes under way began earlier: the next ones count.
        let beat = wait::until("all memory is verified", limit, || {
            Ok(self.beats().last().copied().filter(|beat| {
                beat.sweeps >= before.sweeps + 2 && beat.audits >= before.audits + 2
            }))
        })
        .with_context(|| self.tail())?;
        self.check(&beat)?;
        Ok(beat)
    }

    fn check(&self, beat: &Beat) -> Result<()> {
        if beat.corrupt != 0 || self.text().contains("CORRUPT") {
            bail!("the guest found corrupt memory: {}", self.tail());
        }
        Ok(())
    }

    /// The last lines, for an error.
    pub fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(8);
        format!("console {}: {:?}", self.path.display(), &lines[from..])
    }
}

/// The first line after a migration may be the second half of one: such a line has no beginning and is skipped.
pub(crate) fn beats(text: &str) -> Vec<Beat> {
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete.lines().filter_map(beat).collect()
}

fn beat(line: &str) -> Option<Beat> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let value = |key: &str| -> Option<u64> {
        let at = words.iter().position(|word| *word == key)?;
        words.get(at + 1)?.parse().ok()
    };
    if words.first() != Some(&"beat") {
        return None;
    }
    Some(Beat {
        number: value("beat")?,
        sweeps: value("sweeps")?,
        verified: value("verified")?,
        corrupt: value("corrupt")?,
        audits: value("audits")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_are_beats() {
        let text = "eat 1 sweeps 2\nbeat 2 sweeps 3 verified 9 corrupt 0 audits 1\r\nbeat 3 sweeps 3 verified 9 corr";
        let expected = Beat {
            number: 2,
            sweeps: 3,
            verified: 9,
            corrupt: 0,
            audits: 1,
        };
        assert_eq!(beats(text), [expected]);
    }

    #[test]
    fn a_hardware_address_follows_from_the_address() {
        assert_eq!(mac("10.77.1.10"), "52:54:0a:4d:01:0a");
    }
}
