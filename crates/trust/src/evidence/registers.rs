//! Which values a host's registers may have, what differs, and what is to be done about it.

use std::collections::BTreeMap;
use std::fmt;

use super::event_log::Event;
use super::quote::PCRS;
use crate::digest::Sha256;

/// Most values that one register may have.
pub const VALUES_MAX: usize = 64;

/// What registers may hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegisterPolicy {
    allowed: BTreeMap<u8, Vec<Sha256>>,
    events: BTreeMap<u8, Vec<Event>>,
}

/// A register, or values of it, that can't be in a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// There is none.
    #[error("there is no register {0}: they are 0 to 23")]
    Register(u8),
    /// Nothing would be allowed, or too much to be meant.
    #[error("register {0} must have 1 to {VALUES_MAX} allowed values")]
    Values(u8),
    /// Everything would be allowed.
    #[error("no register is checked")]
    Empty,
}

/// A register that does not hold what it must.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Stable code for scripts.
    pub code: &'static str,
    /// The register.
    pub register: u8,
    /// Values of which it must have one.
    pub expected: Vec<Sha256>,
    /// The value that it has; nothing if the host has not told it.
    pub found: Option<Sha256>,
    /// The first thing that was measured otherwise than when the host was enrolled, as far as logs tell.
    pub component: Option<String>,
    /// What an operator can do.
    pub remedy: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "register {} ({})", self.register, meaning(self.register))?;
        match self.found {
            Some(found) => write!(f, " holds {found}")?,
            None => f.write_str(" was not told")?,
        }
        f.write_str(", expected ")?;
        for (at, value) in self.expected.iter().take(3).enumerate() {
            write!(f, "{}{value}", if at == 0 { "" } else { " or " })?;
        }
        if self.expected.len() > 3 {
            write!(f, " or one of {} others", self.expected.len() - 3)?;
        }
        match &self.component {
            Some(component) => write!(f, ": {component}"),
            None => Ok(()),
        }
    }
}

impl RegisterPolicy {
    /// With these values; `events` are those that led to them where that is known.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn new(
        allowed: BTreeMap<u8, Vec<Sha256>>,
        events: BTreeMap<u8, Vec<Event>>,
    ) -> Result<Self, PolicyError> {
        if allowed.is_empty() {
            return Err(PolicyError::Empty);
        }
        for (register, values) in &allowed {
            if *register >= PCRS {
                return Err(PolicyError::Register(*register));
            }
            if !(1..=VALUES_MAX).contains(&values.len()) {
                return Err(PolicyError::Values(*register));
            }
        }
        Ok(Self { allowed, events })
    }

    /// Registers that it speaks of: bit n is register n.
    pub fn pcrs(&self) -> u32 {
        self.allowed
            .keys()
            .fold(0, |pcrs, register| pcrs | 1 << register)
    }

    /// Values that each register may have.
    pub fn allowed(&self) -> &BTreeMap<u8, Vec<Sha256>> {
        &self.allowed
    }

    /// What led to the values at enrolment.
    pub fn events(&self) -> &BTreeMap<u8, Vec<Event>> {
        &self.events
    }

    /// Every register that does not hold what it must, lowest first.
    pub fn judge(
        &self,
        registers: &BTreeMap<u8, Sha256>,
        events: &BTreeMap<u8, Vec<Event>>,
    ) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (register, expected) in &self.allowed {
            let found = registers.get(register).copied();
            if found.is_some_and(|found| expected.contains(&found)) {
                continue;
            }
            let component = match (self.events.get(register), events.get(register)) {
                (Some(before), Some(now)) => difference(before, now),
                _ => None,
            };
            findings.push(Finding {
                code: if found.is_some() {
                    "register-not-allowed"
                } else {
                    "register-not-told"
                },
                register: *register,
                expected: expected.clone(),
                found,
                component,
                remedy: remedy(*register, found.is_some()),
            });
        }
        findings
    }
}

/// The first thing that differs.
fn difference(before: &[Event], now: &[Event]) -> Option<String> {
    let at = before
        .iter()
        .zip(now)
        .position(|(before, now)| before != now)
        .unwrap_or(before.len().min(now.len()));
    let number = at + 1;
    Some(match (before.get(at), now.get(at)) {
        (Some(before), Some(now)) if before.kind == now.kind => format!(
            "measurement {number}, {}, was {} and is {}",
            kind(now.kind),
            before.digest,
            now.digest
        ),
        (Some(before), Some(now)) => format!(
            "measurement {number} was {} and is {} ({})",
            kind(before.kind),
            kind(now.kind),
            now.digest
        ),
        (Some(before), None) => format!(
            "measurement {number}, {} ({}), is missing",
            kind(before.kind),
            before.digest
        ),
        (None, Some(now)) => format!(
            "measurement {number}, {} ({}), is new",
            kind(now.kind),
            now.digest
        ),
        (None, None) => return None,
    })
}

/// What a register is for (PC Client Platform Firmware Profile, section 3.3.4; from 8 on by custom of boot loaders and
/// Linux).
pub fn meaning(register: u8) -> &'static str {
    match register {
        0 => "the firmware",
        1 => "the firmware's settings",
        2 => "firmware of added devices",
        3 => "settings of added devices",
        4 => "the boot loader",
        5 => "the boot loader's settings and partitions",
        6 => "the manufacturer's own",
        7 => "Secure Boot's keys and whether it is on",
        8 => "the boot loader's commands",
        9 => "kernel and initial RAM disk",
        10 => "files by the kernel's integrity measurement",
        11 => "the unified kernel image",
        12 => "the kernel's command line",
        14 => "keys of the shim",
        15 => "the system's identity",
        16 => "for tests",
        17..=22 => "a late launch",
        _ => "of the operating system's own use",
    }
}

fn remedy(register: u8, told: bool) -> String {
    if !told {
        return format!(
            "Let the host quote register {register}: name it in its `trust.attestation.registers`."
        );
    }
    match register {
        0..=3 | 6 => format!(
            "Put the host's {} back to what was enrolled, or, if the change was meant, enrol the host again.",
            match register {
                0 => "firmware",
                1 => "firmware settings",
                2 => "devices and their firmware",
                3 => "devices' settings",
                _ => "platform",
            }
        ),
        4 | 5 | 8 | 9 | 11 | 12 => format!(
            "Boot the host with the boot loader, kernel and settings that were enrolled ({}), or enrol it again after the \
             update.",
            meaning(register)
        ),
        7 => "Switch Secure Boot on with the keys that were enrolled, or enrol the host again."
            .to_owned(),
        _ => format!(
            "Find out what was measured into register {register} ({}), start the host again without it, or enrol it again.",
            meaning(register)
        ),
    }
}

/// Name of a kind of event (PC Client Platform Firmware Profile, section 10.4.1).
fn kind(number: u32) -> String {
    let name = match number {
        0x01 => "code run after power on",
        0x04 => "a separator",
        0x05 => "an action",
        0x06 => "a tagged event",
        0x07 => "the first code's contents",
        0x08 => "the first code's version",
        0x09 => "microcode of the CPU",
        0x0a => "configuration of the platform",
        0x0b => "tables of devices",
        0x0c => "a short hash",
        0x0d => "what the boot loader loaded",
        0x0e => "data of what the boot loader loaded",
        0x0f | 0x10 => "a device of the platform",
        0x8000_0001 => "a variable of Secure Boot",
        0x8000_0002 | 0x8000_000c => "a variable that says what to boot",
        0x8000_0003 => "a program that firmware started",
        0x8000_0004 | 0x8000_0005 => "a driver that firmware loaded",
        0x8000_0006 => "the partition table",
        0x8000_0007 => "an action of firmware",
        0x8000_0008 | 0x8000_000a => "a part of the firmware",
        0x8000_0009 | 0x8000_000b => "tables that firmware hands over",
        0x8000_0010 => "the hardware's own measurement",
        0x8000_00e0 => "the authority that let a program start",
        _ => return format!("an event of kind {number:#x}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(register: u8, kind: u32, digest: u8) -> Event {
        let digest = Sha256([digest; 32]);
        Event {
            register,
            kind,
            digest,
        }
    }

    fn policy() -> RegisterPolicy {
        let allowed = [
            (0, vec![Sha256([1; 32])]),
            (4, vec![Sha256([2; 32]), Sha256([3; 32])]),
        ];
        let before = vec![event(4, 4, 1), event(4, 0x8000_0003, 2)];
        RegisterPolicy::new(allowed.into(), [(4, before)].into()).unwrap()
    }

    #[test]
    fn registers_with_allowed_values_are_good_whatever_the_others_hold() {
        for four in [2, 3] {
            let registers = [(0, 1), (4, four), (9, 7)].map(|(r, v)| (r, Sha256([v; 32])));
            assert_eq!(policy().judge(&registers.into(), &BTreeMap::new()), []);
        }
        assert_eq!(policy().pcrs(), 0x11);
    }

    #[test]
    fn a_register_that_differs_is_named_with_what_was_measured_into_it() {
        let registers = [(0, 1), (4, 9)].map(|(r, v)| (r, Sha256([v; 32])));
        let judge = |now: Vec<Event>| {
            let findings = policy().judge(&registers.into(), &[(4, now)].into());
            assert_eq!(findings.len(), 1);
            findings.into_iter().next().unwrap()
        };
        let finding = judge(vec![event(4, 4, 1), event(4, 0x8000_0003, 9)]);
        assert_eq!(
            (finding.code, finding.register),
            ("register-not-allowed", 4)
        );
        assert_eq!(finding.found, Some(Sha256([9; 32])));
        let (two, nine) = (Sha256([2; 32]), Sha256([9; 32]));
        let what =
            format!("measurement 2, a program that firmware started, was {two} and is {nine}");
        assert_eq!(finding.component, Some(what.clone()));
        let text = finding.to_string();
        assert!(
            text.starts_with("register 4 (the boot loader) holds sha256:0909"),
            "{text}"
        );
        assert!(text.ends_with(&what), "{text}");
        assert!(finding.remedy.contains("boot loader"), "{}", finding.remedy);
        let missing = judge(vec![event(4, 4, 1)]).component.unwrap();
        assert!(missing.ends_with("is missing"), "{missing}");
        let all = vec![event(4, 4, 1), event(4, 0x8000_0003, 2), event(4, 0xd, 3)];
        let new = judge(all).component.unwrap();
        assert!(
            new.starts_with("measurement 3, what the boot loader loaded"),
            "{new}"
        );
    }

    #[test]
    fn a_register_that_was_not_told_is_not_good() {
        let registers = [(4, Sha256([2; 32]))].into();
        let findings = policy().judge(&registers, &BTreeMap::new());
        let [finding] = &findings[..] else {
            panic!("{findings:?}");
        };
        assert_eq!((finding.code, finding.found), ("register-not-told", None));
        assert!(finding.remedy.contains("trust.attestation.registers"));
    }

    #[test]
    fn a_policy_that_allows_nothing_or_everything_is_none() {
        let new = |allowed: BTreeMap<u8, Vec<Sha256>>| {
            RegisterPolicy::new(allowed, BTreeMap::new()).map(drop)
        };
        assert_eq!(new(BTreeMap::new()), Err(PolicyError::Empty));
        assert_eq!(new([(4, Vec::new())].into()), Err(PolicyError::Values(4)));
        let many = vec![Sha256([1; 32]); VALUES_MAX + 1];
        assert_eq!(new([(4, many)].into()), Err(PolicyError::Values(4)));
        let odd = [(24, vec![Sha256([1; 32])])].into();
        assert_eq!(new(odd), Err(PolicyError::Register(24)));
    }
}
