//! Configuration of the agent `palanquind`: TOML, kebab-case, unknown keys refused.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::size::{ByteSize, HumanDuration};
use crate::trust::Trust;

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
    /// What the agent's processes may do.
    #[serde(default)]
    pub privileges: Privileges,
    /// By what is judged who may move which VM where. Absent: nothing is judged.
    #[serde(default)]
    pub trust: Option<Trust>,
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

/// A rule that a file or request breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the key, for example `limits.max-inbound` or `disk[0].path`.
    pub key: String,
    /// What is wrong with its value, one lowercase sentence.
    pub message: String,
    /// What would be right, where the message does not say it.
    pub hint: Option<String>,
}

impl Violation {
    /// A violation of the rule for a key.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            message: message.into(),
            hint: None,
        }
    }

    /// With what would be right.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`: {}", self.key, self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

fn list(violations: &[Violation]) -> String {
    let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
    lines.join("; ")
}

/// Gathers the rules that something breaks.
#[derive(Debug, Default)]
pub(crate) struct Rules(Vec<Violation>);

impl Rules {
    /// Notes a violation unless the rule holds.
    pub(crate) fn check(
        &mut self,
        holds: bool,
        key: impl Into<String>,
        message: impl Into<String>,
        hint: &str,
    ) {
        if !holds {
            self.0.push(Violation::new(key, message).hint(hint));
        }
    }

    /// Notes what others have found.
    pub(crate) fn extend(&mut self, violations: Vec<Violation>) {
        self.0.extend(violations);
    }

    /// All violations, in the order they were noted.
    pub(crate) fn into_violations(self) -> Vec<Violation> {
        self.0
    }
}

/// What [`is_name`] wants, in words.
pub const NAME_RULE: &str =
    "1 to 64 letters, digits, `.`, `_` or `-`, starting with a letter or digit";

/// What [`is_host_name`] wants, in words.
pub const HOST_NAME_RULE: &str = "1 to 63 letters, digits, `_` or `-` between dots, at most 64 in all; no `-` \
                                  at either end of a part and not only digits in the last";

/// Whether this is a name a VM or operator may have: 1 to 64 of `a-z A-Z 0-9 . _ -`, starting with a letter or digit.
pub fn is_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Whether this is a DNS name (RFC 1123, section 2.1, and `_`): what TLS finds among the names of a certificate.
pub fn is_dns_name(name: &str) -> bool {
    let part = |part: &str| {
        (1..=63).contains(&part.len())
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
    };
    let last = name.rsplit('.').next().unwrap_or_default();
    name.len() <= 253 && name.split('.').all(part) && !last.bytes().all(|b| b.is_ascii_digit())
}

/// Whether this is a name a host may have: one of [`is_name`] that is also one of [`is_dns_name`].
pub fn is_host_name(name: &str) -> bool {
    is_name(name) && is_dns_name(name)
}

/// Longest state directory: `vms/UUID/state-out` and a slash more must fit into the 107 bytes of a
/// socket's path (unix(7)).
const STATE_DIR_MAX: usize = 50;
/// Longest runtime directory: `control.sock` and `observe.sock` lie in it.
const RUNTIME_DIR_MAX: usize = 90;
/// Highest limit of what may begin in an hour: the agent remembers each.
const PER_HOUR_MAX: u32 = 10_000;

impl AgentConfig {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    ///
    /// Where it is not TOML of this form, with line and column, or every rule that it breaks.
    pub fn from_toml(text: &str) -> Result<Self, LoadError> {
        let config: Self = toml::from_str(text)?;
        let violations = config.validate();
        if violations.is_empty() {
            Ok(config)
        } else {
            Err(LoadError::Rules(violations))
        }
    }

    /// Every rule that it breaks. Looks at nothing but the values: whether files exist is the caller's to see.
    pub fn validate(&self) -> Vec<Violation> {
        let mut rules = Rules::default();
        let no_name = |name: &str| format!("{name:?} is no name for a host");
        rules.check(
            is_host_name(&self.name),
            "name",
            no_name(&self.name),
            HOST_NAME_RULE,
        );
        self.check_paths(&mut rules);
        let port = self.listen.migration.port();
        rules.check(
            port != 0,
            "listen.migration",
            "port 0 is no port that other hosts could know",
            "7810 is customary",
        );
        for (name, host) in &self.hosts {
            let key = format!("hosts.{name}");
            rules.check(
                is_host_name(name),
                key.as_str(),
                no_name(name),
                HOST_NAME_RULE,
            );
            let address = host.address;
            let reachable = address.port() != 0
                && !address.ip().is_unspecified()
                && !address.ip().is_multicast();
            rules.check(
                reachable,
                format!("{key}.address"),
                format!("{address} is no address of a single host"),
                "address and port of its agent, as in 192.0.2.2:7810",
            );
        }
        self.check_limits(&mut rules);
        if let Some(trust) = &self.trust {
            trust.check(&mut rules);
        }
        rules.into_violations()
    }

    fn check_paths(&self, rules: &mut Rules) {
        let tls = &self.tls;
        for (key, path) in [
            ("state-dir", &self.state_dir),
            ("runtime-dir", &self.runtime_dir),
            ("tls.ca", &tls.ca),
            ("tls.certificate", &tls.certificate),
            ("tls.key", &tls.key),
            ("qemu.binary", &self.qemu.binary),
        ] {
            check_absolute(rules, key, path);
        }
        for (index, path) in self.qemu.allowed_paths.iter().enumerate() {
            let key = format!("qemu.allowed-paths[{index}]");
            check_absolute(rules, &key, path);
            rules.check(
                path != Path::new("/"),
                key,
                "`/` would let an arriving VM read every file of this host",
                "name the directories that hold kernels and disk images",
            );
        }
        for (key, path, max) in [
            ("state-dir", &self.state_dir, STATE_DIR_MAX),
            ("runtime-dir", &self.runtime_dir, RUNTIME_DIR_MAX),
        ] {
            let length = path.as_os_str().len();
            rules.check(
                length <= max,
                key,
                format!("{length} bytes are too long for a directory with sockets"),
                &format!("at most {max} bytes"),
            );
        }
    }

    fn check_limits(&self, rules: &mut Rules) {
        let limits = &self.limits;
        for (key, count) in [
            ("limits.max-inbound", limits.max_inbound),
            ("limits.max-outbound", limits.max_outbound),
            (
                "limits.max-outbound-per-operator",
                limits.max_outbound_per_operator,
            ),
            (
                "limits.max-outbound-per-target",
                limits.max_outbound_per_target,
            ),
            (
                "limits.max-inbound-per-source",
                limits.max_inbound_per_source,
            ),
        ] {
            let message = format!("{count} is out of bounds");
            rules.check((1..=64).contains(&count), key, message, "1 to 64");
        }
        for (key, count) in [
            ("limits.starts-per-hour", limits.starts_per_hour),
            (
                "limits.starts-per-hour-per-operator",
                limits.starts_per_hour_per_operator,
            ),
            (
                "limits.starts-per-hour-per-target",
                limits.starts_per_hour_per_target,
            ),
            (
                "limits.arrivals-per-hour-per-source",
                limits.arrivals_per_hour_per_source,
            ),
        ] {
            let message = format!("{count} is out of bounds");
            let fits = (1..=PER_HOUR_MAX).contains(&count);
            rules.check(fits, key, message, "1 to 10000");
        }
        let most = limits.max_pending;
        for (key, count, bounds) in [
            ("limits.max-pending", most, 16..=4096),
            (
                "limits.max-pending-per-address",
                limits.max_pending_per_address,
                4..=most,
            ),
            (
                "limits.max-pending-per-host",
                limits.max_pending_per_host,
                4..=most,
            ),
        ] {
            let message = format!("{count} is out of bounds");
            let hint = format!("{} to {}", bounds.start(), bounds.end());
            rules.check(bounds.contains(&count), key, message, &hint);
        }
        let silence = limits.peer_silence;
        rules.check(
            (1000..=300_000).contains(&silence.as_millis()),
            "limits.peer-silence",
            format!("{silence} is out of bounds"),
            "1s to 5min",
        );
        let redial = limits.redial;
        rules.check(
            redial.as_millis() <= 3_600_000,
            "limits.redial",
            format!("{redial} is out of bounds"),
            "at most 1h; 0s: never",
        );
        let copying = limits.copying;
        rules.check(
            (60_000..=720 * 3_600_000).contains(&copying.as_millis()),
            "limits.copying",
            format!("{copying} is out of bounds"),
            "1min to 720h",
        );
        for (key, size, min, max, hint) in [
            (
                "limits.device-state",
                limits.device_state,
                ByteSize::mib(1),
                ByteSize::mib(16 << 10),
                "1MiB to 16GiB",
            ),
            (
                "limits.memory-reserve",
                limits.memory_reserve,
                ByteSize::mib(0),
                ByteSize::mib(8 << 20),
                "0 to 8TiB",
            ),
        ] {
            let message = format!("{size} is out of bounds");
            rules.check((min..=max).contains(&size), key, message, hint);
        }
    }
}

pub(crate) fn check_absolute(rules: &mut Rules, key: &str, path: &Path) {
    let plain = path
        .to_str()
        .is_some_and(|text| !text.chars().any(|c| c == ',' || c.is_control()));
    rules.check(
        path.is_absolute() && plain,
        key,
        format!("{path:?} is not usable"),
        "an absolute path without commas and control characters",
    );
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

/// What the agent's processes may do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Privileges {
    /// User as whom the process runs that talks to other hosts. Default `palanquin-net` if there is such a user, else
    /// `nobody`.
    #[serde(default)]
    pub network_user: Option<String>,
    /// Whether the agent refuses to start where its processes can't be confined as they should be (kernel without
    /// landlock or seccomp, users that do not exist). Default `false`: it says so and goes on.
    #[serde(default)]
    pub require: bool,
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
    /// Of those, ordered by one operator. 1 to 64, default 64.
    pub max_outbound_per_operator: u32,
    /// Of those, to one host. 1 to 64, default 64.
    pub max_outbound_per_target: u32,
    /// Of those that arrive, from one host. 1 to 64, default 64.
    pub max_inbound_per_source: u32,
    /// Migrations that may begin here within an hour. 1 to 10000, default 600.
    pub starts_per_hour: u32,
    /// Of those, ordered by one operator. 1 to 10000, default 600.
    pub starts_per_hour_per_operator: u32,
    /// Of those, to one host. 1 to 10000, default 600.
    pub starts_per_hour_per_target: u32,
    /// Migrations of one host that may begin to arrive here within an hour. 1 to 10000, default 600.
    pub arrivals_per_hour_per_source: u32,
    /// Memory that is never given to a VM. At most 8 TiB, default 256 MiB.
    pub memory_reserve: ByteSize,
    /// Largest device state accepted. 1 MiB to 16 GiB, default 256 MiB.
    pub device_state: ByteSize,
    /// Silence of a peer after which the connection counts as lost. 1 s to 5 min, default 10 s.
    pub peer_silence: HumanDuration,
    /// How long a migration whose connection broke before its VM was paused is kept for the connection to be made again,
    /// at the source; at the destination longer by twice `peer-silence`. At most 1 h, 0 for not at all, default 30 s.
    pub redial: HumanDuration,
    /// How long a place is held here for a VM whose memory still arrives; then its migration is given up, and it runs on
    /// where it is. Not from its pause on. 1 min to 720 h, default 24 h.
    pub copying: HumanDuration,
    /// Connections whose other end has not authenticated itself, and, apart from those, connections of hosts that belong
    /// to no migration. Where one more comes, the oldest of whoever has most is closed. 16 to 4096, default 256.
    pub max_pending: u32,
    /// Connections from one address (of IPv6 a /64) whose other end has not authenticated itself; where one more comes,
    /// the oldest is closed. 4 to `max-pending`, default 64.
    pub max_pending_per_address: u32,
    /// Connections of one host that belong to no migration; where one more comes, the oldest is closed.
    /// 4 to `max-pending`, default 64.
    pub max_pending_per_host: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_inbound: 2,
            max_outbound: 2,
            max_outbound_per_operator: 64,
            max_outbound_per_target: 64,
            max_inbound_per_source: 64,
            starts_per_hour: 600,
            starts_per_hour_per_operator: 600,
            starts_per_hour_per_target: 600,
            arrivals_per_hour_per_source: 600,
            memory_reserve: ByteSize::mib(256),
            device_state: ByteSize::mib(256),
            peer_silence: HumanDuration::from_secs(10),
            redial: HumanDuration::from_secs(30),
            copying: HumanDuration::from_secs(24 * 3600),
            max_pending: 256,
            max_pending_per_address: 64,
            max_pending_per_host: 64,
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
    /// User that hypervisors become when they have opened what they were given. Default `palanquin-qemu` if there is such
    /// a user, else none: they run as the agent does. Must be able to read and write the VMs' disks.
    pub user: Option<String>,
    /// Whether hypervisors get a sandbox of their own (`-sandbox on`). Default `true`; a QEMU that was built without it
    /// does not start.
    pub sandbox: bool,
}

impl Default for Qemu {
    fn default() -> Self {
        Self {
            binary: "/usr/bin/qemu-system-x86_64".into(),
            allowed_paths: Vec::new(),
            user: None,
            sandbox: true,
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "name = \"alpha\"\n[tls]\nca = \"/c/ca.pem\"\ncertificate = \"/c/alpha.pem\"\n\
                        key = \"/c/alpha.key\"\n";

    fn keys(text: &str) -> Vec<String> {
        match AgentConfig::from_toml(text) {
            Err(LoadError::Rules(found)) => found.into_iter().map(|found| found.key).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_short_configuration_has_the_documented_defaults() {
        let config = AgentConfig::from_toml(GOOD).unwrap();
        assert_eq!(config.state_dir, Path::new("/var/lib/palanquin"));
        assert_eq!(config.runtime_dir, Path::new("/run/palanquin"));
        assert_eq!(config.listen.migration.to_string(), "[::]:7810");
        assert_eq!(config.limits, Limits::default());
        assert_eq!(config.limits.peer_silence.as_millis(), 10_000);
        assert_eq!(config.limits.redial.as_millis(), 30_000);
        assert!(config.hosts.is_empty() && config.qemu.allowed_paths.is_empty());
    }

    #[test]
    fn every_violation_is_named_at_once() {
        let text = "name = \"-x\"\nstate-dir = \"relative\"\nruntime-dir = \"/r,x\"\n\
                    [tls]\nca = \"ca.pem\"\ncertificate = \"/c\"\nkey = \"/k\"\n\
                    [listen]\nmigration = \"0.0.0.0:0\"\n[hosts.\"b..c\"]\naddress = \"0.0.0.0:1\"\n\
                    [limits]\nmax-inbound = 0\nmax-outbound = 65\nmax-outbound-per-target = 0\n\
                    starts-per-hour = 10001\narrivals-per-hour-per-source = 0\nmax-pending = 15\n\
                    max-pending-per-address = 3\nmax-pending-per-host = 16\npeer-silence = \"10ms\"\n\
                    device-state = \"1TiB\"\nmemory-reserve = \"9TiB\"\n\
                    [qemu]\nbinary = \"qemu\"\nallowed-paths = [\"/good\", \"/\"]\n";
        assert_eq!(
            keys(text),
            [
                "name",
                "state-dir",
                "runtime-dir",
                "tls.ca",
                "qemu.binary",
                "qemu.allowed-paths[1]",
                "listen.migration",
                "hosts.b..c",
                "hosts.b..c.address",
                "limits.max-inbound",
                "limits.max-outbound",
                "limits.max-outbound-per-target",
                "limits.starts-per-hour",
                "limits.arrivals-per-hour-per-source",
                "limits.max-pending",
                "limits.max-pending-per-address",
                "limits.max-pending-per-host",
                "limits.peer-silence",
                "limits.device-state",
                "limits.memory-reserve",
            ]
        );
    }

    #[test]
    fn directories_that_are_too_long_for_sockets_are_refused() {
        let long = format!("state-dir = \"/{}\"\n{GOOD}", "x".repeat(STATE_DIR_MAX));
        assert_eq!(keys(&long), ["state-dir"]);
        let fits = format!("state-dir = \"/{}\"\n{GOOD}", "x".repeat(STATE_DIR_MAX - 1));
        AgentConfig::from_toml(&fits).unwrap();
    }

    #[test]
    fn unknown_keys_are_refused_with_line_and_column() {
        for (text, place) in [
            (format!("{GOOD}pin = 1\n"), "line 6, column 1"),
            (
                format!("{GOOD}[limits]\nmax_inbound = 1\n"),
                "line 7, column 1",
            ),
            (
                format!("{GOOD}[limits]\npeer-silence = 3\n"),
                "line 7, column 16",
            ),
            (format!("nam = \"a\"\n{GOOD}"), "line 1, column 1"),
        ] {
            let error = AgentConfig::from_toml(&text).unwrap_err();
            assert!(matches!(error, LoadError::Syntax(_)));
            assert!(error.to_string().contains(place), "{error}");
        }
    }

    #[test]
    fn a_violation_says_what_would_be_right() {
        let violation = Violation::new("limits.max-inbound", "0 is out of bounds").hint("1 to 64");
        assert_eq!(
            violation.to_string(),
            "`limits.max-inbound`: 0 is out of bounds (1 to 64)"
        );
    }

    #[test]
    fn host_names_are_dns_names() {
        for good in ["a", "alpha", "A1.example.org", "a_b", "1a", "4.x"] {
            assert!(is_host_name(good), "{good}");
        }
        let long = "a".repeat(64);
        for odd in [
            "", "a.", ".a", "a..b", "-a", "a-", "a-.b", "10.0.0.1", "7", "a/b", &long,
        ] {
            assert!(!is_host_name(odd), "{odd}");
        }
    }

    proptest! {
        #[test]
        fn a_configuration_is_read_back_as_written(
            name in "[a-z][a-z0-9]{0,20}",
            peers in prop::collection::btree_map("[a-z][a-z0-9]{0,8}", 1_u16.., 0..4),
            (max_inbound, max_outbound) in (1_u32..=64, 1_u32..=64),
            (silence, redial, reserve) in (1_u64..=300, 0_u64..=3600, 0_u64..1 << 40),
            copying in 60_u64..=720 * 3600,
        ) {
            let mut config = AgentConfig::from_toml(GOOD).unwrap();
            config.name = name;
            config.hosts = peers
                .into_iter()
                .map(|(name, port)| (name, Host { address: ([192, 0, 2, 1], port).into() }))
                .collect();
            config.limits = Limits {
                max_inbound,
                max_outbound,
                memory_reserve: ByteSize::new(reserve),
                peer_silence: HumanDuration::from_secs(silence),
                redial: HumanDuration::from_secs(redial),
                copying: HumanDuration::from_secs(copying),
                ..Limits::default()
            };
            let text = toml::to_string(&config).unwrap();
            prop_assert_eq!(AgentConfig::from_toml(&text).unwrap(), config);
        }

        #[test]
        fn arbitrary_text_is_answered_and_never_panics(text in "(?s).{0,200}") {
            let _ = AgentConfig::from_toml(&text);
            let _ = AgentConfig::from_toml(&format!("{GOOD}{text}"));
            let _ = (is_name(&text), is_dns_name(&text));
        }
    }
}
