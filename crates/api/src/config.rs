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

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not TOML, an unknown key, or a value of another kind; says where.
    #[error("{0}")]
    Syntax(#[from] toml::de::Error),
    /// Rules that it breaks, all of them.
    #[error("{}", list(.0))]
    Rules(Vec<Violation>),
}

/// A rule that a file breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the key, for example `limits.max-inbound`.
    pub key: String,
    /// What is wrong, one lowercase sentence.
    pub message: String,
}

impl Violation {
    /// A violation of the rule for a key.
    pub fn new(key: &str, message: impl Into<String>) -> Self {
        Self {
            key: key.to_owned(),
            message: message.into(),
        }
    }
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`: {}", self.key, self.message)
    }
}

fn list(violations: &[Violation]) -> String {
    let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
    lines.join("; ")
}

/// Whether this is a name a VM or host may have: 1 to 64 of `a-z A-Z 0-9 . _ -`, starting with a letter or digit.
pub fn is_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

impl AgentConfig {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    ///
    /// Where it is not TOML of this form, or every rule that it breaks.
    pub fn from_toml(text: &str) -> Result<Self, LoadError> {
        let config: Self = toml::from_str(text)?;
        let violations = config.validate();
        if violations.is_empty() {
            Ok(config)
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
        rule(self.hosts.keys().all(|host| is_name(host)), "hosts", name);
        let absolute = "is an absolute path";
        rule(self.state_dir.is_absolute(), "state-dir", absolute);
        rule(self.runtime_dir.is_absolute(), "runtime-dir", absolute);
        // `vms/UUID/state-out` and a slash more, in the 107 bytes of a socket's path.
        let room = self.state_dir.as_os_str().len() <= 50;
        rule(
            room,
            "state-dir",
            "is at most 50 bytes long, because sockets lie below it",
        );
        let room = self.runtime_dir.as_os_str().len() <= 90;
        rule(
            room,
            "runtime-dir",
            "is at most 90 bytes long, because sockets lie in it",
        );
        let limits = &self.limits;
        rule(
            (1..=64).contains(&limits.max_inbound),
            "limits.max-inbound",
            "is 1 to 64",
        );
        rule(
            (1..=64).contains(&limits.max_outbound),
            "limits.max-outbound",
            "is 1 to 64",
        );
        let silence = limits.peer_silence.get().as_millis();
        rule(
            (1000..=300_000).contains(&silence),
            "limits.peer-silence",
            "is 1 s to 5 min",
        );
        let state = limits.device_state.bytes();
        let bounds = (1 << 20)..=(16 << 30);
        rule(
            bounds.contains(&state),
            "limits.device-state",
            "is 1 MiB to 16 GiB",
        );
        rule(self.qemu.binary.is_absolute(), "qemu.binary", absolute);
        let all = self
            .qemu
            .allowed_paths
            .iter()
            .all(|path| path.is_absolute());
        rule(all, "qemu.allowed-paths", "are absolute paths");
        found
    }
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
