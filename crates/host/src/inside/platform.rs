//! What says which processor, firmware and hypervisor this machine has.

use std::collections::BTreeMap;

use super::{Unread, text};

/// Longest value, in characters; longer ones are cut.
const VALUE_MAX: usize = 256;
/// What of `/sys/class/dmi/id` is looked at. Serial numbers are not: they name a machine, and only root may read them.
const DMI: [&str; 7] = [
    "bios_vendor",
    "bios_version",
    "board_name",
    "chassis_vendor",
    "product_name",
    "product_version",
    "sys_vendor",
];
/// What else is looked at: name, file, and what it means if it is not there.
const FILES: [(&str, &str); 5] = [
    (
        "clocksource",
        "/sys/devices/system/clocksource/clocksource0/current_clocksource",
    ),
    (
        "clocksources",
        "/sys/devices/system/clocksource/clocksource0/available_clocksource",
    ),
    ("hypervisor.type", "/sys/hypervisor/type"),
    ("hypervisor.uuid", "/sys/hypervisor/uuid"),
    ("hypervisor.features", "/sys/hypervisor/properties/features"),
];

/// The fingerprint of a machine: names and values, such as `cpu.brand`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// What was read.
    pub values: BTreeMap<String, String>,
    /// What can't be.
    pub unread: Vec<Unread>,
}

impl Platform {
    /// Reads it. To be called on a thread that stays on one processor: those of one machine may differ.
    #[must_use]
    pub fn read() -> Self {
        let mut platform = Self::default();
        platform.cpu();
        let mut why = None;
        for name in DMI {
            match text(format!("/sys/class/dmi/id/{name}")) {
                Ok(value) => platform.add(&format!("dmi.{name}"), &value),
                Err(error) => why = Some(error),
            }
        }
        if !platform.values.keys().any(|name| name.starts_with("dmi."))
            && let Some(error) = why
        {
            platform.unread.push(Unread {
                what: "names of the machine (DMI)",
                why: format!("/sys/class/dmi/id: {error}"),
                hint: "small virtual machines have no firmware that tells; nothing can be done",
            });
        }
        for (name, path) in FILES {
            if let Ok(value) = text(path) {
                platform.add(name, &value);
            }
        }
        if !platform.values.contains_key("clocksource") {
            platform.unread.push(Unread {
                what: "clock source",
                why: "the kernel shows none in /sys/devices/system/clocksource".to_owned(),
                hint: "mount sysfs at /sys",
            });
        }
        platform
    }

    fn add(&mut self, name: &str, value: &str) {
        let value: String = value.chars().take(VALUE_MAX).collect();
        self.values.insert(name.to_owned(), value);
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn cpu(&mut self) {
        self.unread.push(Unread {
            what: "CPUID",
            why: "this processor has no such instruction".to_owned(),
            hint: "nothing can be done",
        });
    }

    /// By CPUID (Intel's manual, volume 2; leaves from 0x4000_0000 on are the hypervisor's).
    #[cfg(target_arch = "x86_64")]
    fn cpu(&mut self) {
        use core::arch::x86_64::{__cpuid_count as cpuid, CpuidResult};
        const HYPERVISOR: u32 = 0x4000_0000;
        const EXTENDED: u32 = 0x8000_0000;
        let bytes = |registers: &[u32]| -> Vec<u8> {
            registers.iter().flat_map(|of| of.to_le_bytes()).collect()
        };
        let name = |registers: &[u32]| printable(&bytes(registers));
        let hex = |of: CpuidResult| {
            let CpuidResult { eax, ebx, ecx, edx } = of;
            format!("{eax:08x} {ebx:08x} {ecx:08x} {edx:08x}")
        };
        let base = cpuid(0, 0);
        self.add("cpu.vendor", &name(&[base.ebx, base.edx, base.ecx]));
        self.add("cpu.leaves", &format!("{:#x}", base.eax));
        let mut first = cpuid(1, 0);
        let has_hypervisor = first.ecx >> 31 == 1;
        // Which processor of the machine this is.
        first.ebx &= 0x0000_ffff;
        // Whether the kernel has enabled XSAVE is the kernel's matter.
        first.ecx &= !(1 << 27);
        self.add("cpu.features", &hex(first));
        for (leaf, subleaf, name) in [
            (0x07, 0, "cpu.features-7"),
            (0x15, 0, "cpu.tsc"),
            (0x16, 0, "cpu.frequencies"),
        ] {
            if leaf <= base.eax {
                let mut value = cpuid(leaf, subleaf);
                if leaf == 7 {
                    // Whether the kernel uses protection keys.
                    value.ecx &= !(1 << 4);
                }
                self.add(name, &hex(value));
            }
        }
        let extended = cpuid(EXTENDED, 0).eax;
        if extended >= EXTENDED + 4 {
            let brand = [2, 3, 4].map(|leaf| cpuid(EXTENDED + leaf, 0));
            let brand: Vec<u32> = brand
                .into_iter()
                .flat_map(|of| [of.eax, of.ebx, of.ecx, of.edx])
                .collect();
            self.add("cpu.brand", &name(&brand));
        }
        for (leaf, name) in [(1, "cpu.features-81"), (7, "cpu.power"), (8, "cpu.sizes")] {
            if extended >= EXTENDED + leaf {
                let mut value = cpuid(EXTENDED + leaf, 0);
                if leaf == 1 {
                    value.ebx = 0;
                }
                self.add(name, &hex(value));
            }
        }
        if !has_hypervisor {
            self.add("hypervisor", "none that CPUID tells of");
            return;
        }
        let hypervisor = cpuid(HYPERVISOR, 0);
        let vendor = name(&[hypervisor.ebx, hypervisor.ecx, hypervisor.edx]);
        self.add("hypervisor", &vendor);
        self.add("hypervisor.leaves", &format!("{:#x}", hypervisor.eax));
        if (HYPERVISOR + 1..HYPERVISOR + 0x100).contains(&hypervisor.eax) {
            self.add("hypervisor.cpuid", &hex(cpuid(HYPERVISOR + 1, 0)));
        }
    }
}

/// What can be shown of a name.
fn printable(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |at| at + 1);
    bytes[..end]
        .iter()
        .map(|byte| match byte {
            b' '..=b'~' => char::from(*byte),
            _ => '.',
        })
        .collect::<String>()
        .trim()
        .to_owned()
}

/// Time that the hypervisor gave to others while this machine's processors had work, since it was started, in milliseconds
/// (proc(5), `/proc/stat`: the eighth number, in ticks of 10 ms). Stays 0 where no hypervisor tells.
#[must_use]
pub fn stolen_ms() -> Option<u64> {
    let stat = text("/proc/stat").ok()?;
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: u64 = line.split_ascii_whitespace().nth(7)?.parse().ok()?;
    ticks.checked_mul(10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_looks_the_same_when_looked_at_again() {
        crate::inside::stay_on_one_processor().unwrap();
        let first = Platform::read();
        assert!(first.values.contains_key("cpu.vendor"), "{first:?}");
        for _ in 0..20 {
            assert_eq!(Platform::read(), first);
        }
    }

    #[test]
    fn names_are_shown_without_what_could_steer_a_terminal() {
        assert_eq!(printable(b"KVMKVMKVM\0\0\0"), "KVMKVMKVM");
        assert_eq!(printable(b"\x1b[2J\0x\n"), ".[2J.x.");
        assert_eq!(printable(&[0; 12]), "");
    }
}
