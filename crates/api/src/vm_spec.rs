//! What a VM is made of, as an operator writes it (TOML) and as the control interface carries it.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::{LoadError, Violation, is_name};
use crate::size::ByteSize;

/// A VM to run with `palanquin vm run SPEC.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmSpec {
    /// Name, unique on a host: 1 to 64 of `a-z A-Z 0-9 . _ -`, starting with a letter or digit.
    pub name: String,
    /// Identity over all hosts; made up when absent.
    #[serde(default)]
    pub uuid: Option<Uuid>,
    /// Guest RAM: one size, or several for as many NUMA nodes with a memory backend each.
    pub memory: Memory,
    /// Virtual CPUs, 1 to 255. Default 1.
    #[serde(default = "one")]
    pub cpus: u16,
    /// How guest code runs. Default `auto`: KVM where `/dev/kvm` opens, else TCG.
    #[serde(default)]
    pub accel: Accel,
    /// QEMU machine type. Default `q35`.
    #[serde(default = "default_machine")]
    pub machine: String,
    /// QEMU CPU model. Default: QEMU's.
    #[serde(default)]
    pub cpu: Option<String>,
    /// Kernel to boot directly.
    #[serde(default)]
    pub kernel: Option<String>,
    /// Initial RAM disk for `kernel`.
    #[serde(default)]
    pub initrd: Option<String>,
    /// Command line for `kernel`.
    #[serde(default)]
    pub append: Option<String>,
    /// Disks, on storage that both hosts see under the same path.
    #[serde(default, rename = "disk")]
    pub disks: Vec<Disk>,
    /// Network interfaces.
    #[serde(default, rename = "network")]
    pub networks: Vec<Network>,
    /// Whether the first serial port is written to a file in the VM's directory. Default true.
    #[serde(default = "yes")]
    pub console: bool,
}

impl VmSpec {
    /// Reads and checks a specification.
    ///
    /// # Errors
    ///
    /// Where it is not TOML of this form, or every rule that it breaks.
    pub fn from_toml(text: &str) -> Result<Self, LoadError> {
        let spec: Self = toml::from_str(text)?;
        let violations = spec.validate();
        if violations.is_empty() {
            Ok(spec)
        } else {
            Err(LoadError::Rules(violations))
        }
    }

    /// Every rule that it breaks.
    pub fn validate(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        let mut rule = |holds: bool, key: &str, message: &str| {
            if !holds {
                found.push(Violation::new(key, message));
            }
        };
        let name = "is 1 to 64 letters, digits, `.`, `_` or `-`, starting with a letter or digit";
        rule(is_name(&self.name), "name", name);
        let sizes = self.memory.sizes();
        rule(
            (1..=16).contains(&sizes.len()),
            "memory",
            "has 1 to 16 nodes",
        );
        let fits = |size: &ByteSize| {
            let bytes = size.bytes();
            bytes.is_multiple_of(1 << 20) && ((16 << 20)..=(8 << 40)).contains(&bytes)
        };
        rule(
            sizes.iter().all(fits),
            "memory",
            "is 16 MiB to 8 TiB in whole MiB",
        );
        rule((1..=255).contains(&self.cpus), "cpus", "is 1 to 255");
        rule(
            is_word(&self.machine),
            "machine",
            "has letters, digits, `.`, `_` and `-`",
        );
        let cpu = self
            .cpu
            .as_deref()
            .is_none_or(|cpu| cpu.split(',').all(is_cpu_word));
        rule(cpu, "cpu", "is a QEMU CPU model with its features");
        for (key, path) in [("kernel", &self.kernel), ("initrd", &self.initrd)] {
            rule(path.as_deref().is_none_or(is_path), key, PATH);
        }
        let boots = self.kernel.is_some() || (self.initrd.is_none() && self.append.is_none());
        rule(
            boots,
            "kernel",
            "is needed where there is `initrd` or `append`",
        );
        let plain = self
            .append
            .as_deref()
            .is_none_or(|text| !text.chars().any(char::is_control));
        rule(plain, "append", "has no control characters");
        for disk in &self.disks {
            rule(is_path(&disk.path), "disk.path", PATH);
            rule(
                ["raw", "qcow2"].contains(&disk.format.as_str()),
                "disk.format",
                "is raw or qcow2",
            );
            let known = ["virtio", "ide"].contains(&disk.interface.as_str());
            rule(known, "disk.interface", "is virtio or ide");
        }
        for network in &self.networks {
            let tap = is_word(&network.tap) && network.tap.len() <= 15;
            rule(
                tap,
                "network.tap",
                "is the name of a network device, at most 15 characters",
            );
            rule(
                is_mac(&network.mac),
                "network.mac",
                "is written 52:54:00:12:34:56",
            );
        }
        found
    }
}

const PATH: &str = "is an absolute path without commas and control characters";

fn is_path(path: &str) -> bool {
    path.starts_with('/') && !path.contains(',') && !path.chars().any(char::is_control)
}

fn is_word(word: &str) -> bool {
    let known = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !word.is_empty() && word.len() <= 64 && word.bytes().all(known)
}

fn is_cpu_word(word: &str) -> bool {
    let known = |b: u8| b.is_ascii_alphanumeric() || b"._-+=".contains(&b);
    !word.is_empty() && word.len() <= 64 && word.bytes().all(known)
}

fn is_mac(mac: &str) -> bool {
    let octets: Vec<&str> = mac.split(':').collect();
    octets.len() == 6
        && octets
            .iter()
            .all(|o| o.len() == 2 && o.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Memory {
    /// One backend.
    One(ByteSize),
    /// One backend for each NUMA node.
    Nodes(Vec<ByteSize>),
}

impl Memory {
    /// The backends' sizes in order.
    pub fn sizes(&self) -> &[ByteSize] {
        match self {
            Self::One(size) => std::slice::from_ref(size),
            Self::Nodes(sizes) => sizes,
        }
    }

    /// Sum of all backends, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.sizes()
            .iter()
            .fold(0_u64, |sum, size| sum.saturating_add(size.bytes()))
    }
}

/// How guest code runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// KVM where `/dev/kvm` opens, else TCG.
    #[default]
    Auto,
    /// Linux's KVM.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

/// A disk image on storage both hosts see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Disk {
    /// Absolute path of the image.
    pub path: String,
    /// `raw` or `qcow2`. Default `raw`.
    #[serde(default = "raw")]
    pub format: String,
    /// `virtio` or `ide`. Default `virtio`.
    #[serde(default = "virtio")]
    pub interface: String,
    /// Writes go to a temporary file and are lost at the end (QEMU's `snapshot=on`). Default false.
    #[serde(default)]
    pub ephemeral: bool,
}

/// A network interface on a tap device that exists under the same name on both hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Network {
    /// Name of the tap device.
    pub tap: String,
    /// Hardware address, for example `52:54:00:12:34:56`.
    pub mac: String,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

fn default_machine() -> String {
    "q35".to_owned()
}

fn raw() -> String {
    "raw".to_owned()
}

fn virtio() -> String {
    "virtio".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "name = \"web\"\nmemory = [\"1GiB\", \"512MiB\"]\n";

    #[test]
    fn a_short_specification_has_sensible_defaults() {
        let spec = VmSpec::from_toml(GOOD).unwrap();
        assert_eq!(
            (spec.cpus, spec.machine.as_str(), spec.console),
            (1, "q35", true)
        );
        assert_eq!(spec.memory.total_bytes(), 1536 << 20);
    }

    #[test]
    fn all_violations_are_named_at_once() {
        let text = "name = \"../x\"\nmemory = \"1MiB\"\ncpus = 0\nmachine = \"q35,x=y\"\ninitrd = \"relative\"\n\
                    [[network]]\ntap = \"tap0,script=/x\"\nmac = \"zz\"\n[[disk]]\npath = \"/a,b\"\n";
        let Err(LoadError::Rules(found)) = VmSpec::from_toml(text) else {
            panic!("it passed")
        };
        let keys: Vec<&str> = found
            .iter()
            .map(|violation| violation.key.as_str())
            .collect();
        assert_eq!(
            keys,
            [
                "name",
                "memory",
                "cpus",
                "machine",
                "initrd",
                "kernel",
                "disk.path",
                "network.tap",
                "network.mac"
            ]
        );
    }

    #[test]
    fn unknown_keys_are_refused_with_their_place() {
        let error = VmSpec::from_toml(&format!("{GOOD}memroy = 1\n"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("memroy") && error.contains("line 3"),
            "{error}"
        );
    }
}
