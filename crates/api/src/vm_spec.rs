//! What a VM is made of, as an operator writes it (TOML) and as the control interface carries it.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

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
