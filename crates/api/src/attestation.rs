//! The section `[trust.attestation]` of an agent's configuration: what a host shows of itself, and what it wants to be shown.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Violation;
use crate::size::HumanDuration;

/// Registers that are quoted where nothing else is said: firmware, added devices, boot loader, Secure Boot.
const REGISTERS: [u8; 4] = [0, 2, 4, 7];
/// Where Linux has the log of what firmware measured.
const EVENT_LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";

/// Of which hosts evidence is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Demand {
    /// Of none; what enrolled hosts show is looked at where policies or owners' passports ask for it.
    Never,
    /// Of those that are enrolled.
    #[default]
    Enrolled,
    /// Of all: a host that is not enrolled is refused.
    Always,
}

/// The section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Attestation {
    /// This host's TPM: `device:/dev/tpmrm0`, or `swtpm:host=HOST,port=PORT`. Without it the host has no evidence to show.
    pub tpm: Option<String>,
    /// The key that signs quotes, as `palanquin attest request` has made it. Default: `attestation-key` in `state-dir`.
    pub key: Option<PathBuf>,
    /// Registers that are quoted, 0 to 23. Default 0, 2, 4, 7.
    pub registers: Vec<u8>,
    /// Log of what firmware measured; one that is not there is left out. Default: Linux's of the first TPM.
    pub event_log: PathBuf,
    /// Directory with the enrolments of other hosts, `*.toml`, as `palanquin attest accept` writes them. Read again on
    /// SIGHUP.
    pub enrolled: Option<PathBuf>,
    /// Of which hosts evidence is wanted. Default `enrolled`.
    pub demand: Demand,
    /// How long evidence is believed. 10 s to 1 day, default 10 min.
    pub lifetime: HumanDuration,
    /// What is run where a host's measured state is not what it must be.
    pub remediation_hook: Option<RemediationHook>,
}

/// A program that may remedy what is wrong with this host, before it is checked again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RemediationHook {
    /// Program and arguments; started without a shell. What is to be remedied is on its standard input, as JSON.
    pub command: Vec<String>,
    /// User as whom it runs. Default `nobody`.
    #[serde(default)]
    pub user: Option<String>,
    /// Longest time that it may take. 1 s to 1 h, default 1 min.
    #[serde(default = "hook_deadline")]
    pub deadline: HumanDuration,
}

fn hook_deadline() -> HumanDuration {
    HumanDuration::from_secs(60)
}

impl Default for Attestation {
    fn default() -> Self {
        Self {
            tpm: None,
            key: None,
            registers: REGISTERS.to_vec(),
            event_log: PathBuf::from(EVENT_LOG),
            enrolled: None,
            demand: Demand::default(),
            lifetime: HumanDuration::from_secs(600),
            remediation_hook: None,
        }
    }
}

/// Whether this names a TPM in a form that is known.
pub fn is_tpm(name: &str) -> bool {
    let plain = name.len() <= 200 && !name.chars().any(char::is_control);
    plain
        && (name
            .strip_prefix("device:")
            .is_some_and(|path| Path::new(path).is_absolute())
            || name
                .strip_prefix("swtpm:")
                .is_some_and(|rest| !rest.is_empty()))
}

impl Attestation {
    /// Registers as bits.
    pub fn pcrs(&self) -> u32 {
        let valid = self.registers.iter().filter(|register| **register < 24);
        valid.fold(0, |pcrs, register| pcrs | 1 << register)
    }

    /// Every rule that the section breaks; keys begin with `trust.attestation`.
    pub fn validate(&self) -> Vec<Violation> {
        let mut violations = Vec::new();
        let mut check = |holds: bool, key: &str, message: String, hint: &str| {
            if !holds {
                let key = format!("trust.attestation.{key}");
                violations.push(Violation::new(key, message).hint(hint));
            }
        };
        let tpm = self.tpm.as_deref();
        check(
            tpm.is_none_or(is_tpm),
            "tpm",
            format!("{:?} names no TPM", tpm.unwrap_or_default()),
            "as in device:/dev/tpmrm0",
        );
        let paths = [
            ("key", self.key.as_deref()),
            ("event-log", Some(self.event_log.as_path())),
            ("enrolled", self.enrolled.as_deref()),
        ];
        for (key, path) in paths {
            check(
                path.is_none_or(Path::is_absolute),
                key,
                format!("{:?} is not usable", path.unwrap_or(Path::new(""))),
                "an absolute path",
            );
        }
        check(
            !self.registers.is_empty() && self.pcrs().count_ones() as usize == self.registers.len(),
            "registers",
            format!("{:?} are not usable", self.registers),
            "1 to 24 different numbers from 0 to 23",
        );
        check(
            (10_000..=86_400_000).contains(&self.lifetime.as_millis()),
            "lifetime",
            format!("{} is out of bounds", self.lifetime),
            "10s to 1day",
        );
        check(
            self.demand != Demand::Always || self.enrolled.is_some(),
            "demand",
            "evidence is wanted of all hosts, and none can be known".to_owned(),
            "set `trust.attestation.enrolled`",
        );
        if let Some(hook) = &self.remediation_hook {
            let program = hook.command.first().map(Path::new);
            check(
                program.is_some_and(Path::is_absolute),
                "remediation-hook.command",
                format!("{:?} cannot be run", hook.command),
                "an absolute path, and arguments",
            );
            check(
                (1000..=3_600_000).contains(&hook.deadline.as_millis()),
                "remediation-hook.deadline",
                format!("{} is out of bounds", hook.deadline),
                "1s to 1h",
            );
        }
        violations
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Attestation {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn an_empty_section_is_good_and_shows_nothing() {
        let section = read("");
        assert_eq!(section, Attestation::default());
        assert_eq!(section.validate(), []);
        assert_eq!((section.pcrs(), section.demand), (0x95, Demand::Enrolled));
    }

    #[test]
    fn a_whole_section_is_read_and_written() {
        let section = read(
            "tpm = \"device:/dev/tpmrm0\"\nkey = \"/var/lib/palanquin/attestation-key\"\nregisters = [0, 7]\n\
             enrolled = \"/etc/palanquin/enrolled\"\ndemand = \"always\"\nlifetime = \"5min\"\n\
             [remediation-hook]\ncommand = [\"/usr/local/sbin/remedy\", \"--now\"]\nuser = \"nobody\"\ndeadline = \"2min\"\n",
        );
        assert_eq!(section.validate(), []);
        assert_eq!(read(&toml::to_string(&section).unwrap()), section);
        assert!(toml::from_str::<Attestation>("tcti = \"x\"").is_err());
    }

    #[test]
    fn every_violation_is_named_at_once() {
        let section = read(
            "tpm = \"tabrmd:x\"\nkey = \"key\"\nevent-log = \"log\"\nregisters = [7, 7]\ndemand = \"always\"\nlifetime = \"1s\"\n\
             [remediation-hook]\ncommand = [\"remedy\"]\ndeadline = \"2h\"\n",
        );
        let keys: Vec<String> = section
            .validate()
            .into_iter()
            .map(|found| found.key)
            .collect();
        let expected = [
            "tpm",
            "key",
            "event-log",
            "registers",
            "lifetime",
            "demand",
            "remediation-hook.command",
            "remediation-hook.deadline",
        ];
        assert_eq!(keys, expected.map(|key| format!("trust.attestation.{key}")));
        for odd in ["device:tpm0", "swtpm:", "mssim:port=1", "", "swtpm:a\nb"] {
            assert!(!is_tpm(odd), "{odd}");
        }
    }
}
