//! Configuration of the agent `palanquind`: TOML, kebab-case, unknown keys refused.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::size::{ByteSize, HumanDuration};

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AgentConfig {
    /// Name of this host; must be the one in its certificate.
    pub name: String,
    /// Where the journal, the VMs' consoles and all else that must survive lies.
    /// Default `/var/lib/palanquin`.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Where the sockets lie. Default `/run/palanquin`.
    #[serde(default = "default_runtime_dir")]
    pub runtime_dir: PathBuf,
    /// Identity and trust.
    pub tls: Tls,
    /// Where the agent listens.
    #[serde(default)]
    pub listen: Listen,
    /// Hosts this one may migrate to and from, by name.
    #[serde(default)]
    pub hosts: BTreeMap<String, Host>,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
    /// The hypervisor.
    #[serde(default)]
    pub qemu: Qemu,
}

/// Identity and trust: PEM files made by `palanquin ca`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Tls {
    /// Certificate of the authority.
    pub ca: PathBuf,
    /// This host's certificate.
    pub certificate: PathBuf,
    /// Its private key; must not be readable by others.
    pub key: PathBuf,
}

/// Where the agent listens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Listen {
    /// Address for other hosts. Default `[::]:7810`.
    #[serde(default = "default_listen")]
    pub migration: SocketAddr,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            migration: default_listen(),
        }
    }
}

/// A peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Host {
    /// Address and port of its agent.
    pub address: SocketAddr,
}

/// Bounds; each protects the host from a peer or an operator's slip.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Limits {
    /// Migrations arriving at the same time. 1 to 64, default 2.
    pub max_inbound: u32,
    /// Migrations leaving at the same time. 1 to 64, default 2.
    pub max_outbound: u32,
    /// Memory that is never given to a VM. Default 256 MiB.
    pub memory_reserve: ByteSize,
    /// Largest device state accepted. Default 256 MiB.
    pub device_state: ByteSize,
    /// Silence of a peer after which the connection counts as lost. 1 s to 5 min, default 10 s.
    pub peer_silence: HumanDuration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_inbound: 2,
            max_outbound: 2,
            memory_reserve: ByteSize::mib(256),
            device_state: ByteSize::mib(256),
            peer_silence: HumanDuration::from_secs(10),
        }
    }
}

/// The hypervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Qemu {
    /// The binary. Default `/usr/bin/qemu-system-x86_64`.
    pub binary: PathBuf,
    /// Directories below which an arriving VM may name files (kernels, disk images). Default none:
    /// such a VM is refused.
    pub allowed_paths: Vec<PathBuf>,
}

impl Default for Qemu {
    fn default() -> Self {
        Self {
            binary: "/usr/bin/qemu-system-x86_64".into(),
            allowed_paths: Vec::new(),
        }
    }
}

fn default_state_dir() -> PathBuf {
    "/var/lib/palanquin".into()
}

fn default_runtime_dir() -> PathBuf {
    "/run/palanquin".into()
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0_u16; 8], 7810))
}
