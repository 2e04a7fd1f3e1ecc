//! What is to be watched: TOML, kebab-case, unknown keys refused.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use palanquin_api::config::{LoadError, Violation, is_name};
use palanquin_api::size::HumanDuration;
use palanquin_host::probe::{
    INTERVAL_MAX, Mac, MacError, NtpSpec, ProberSpec, TARGETS_MAX, TargetSpec,
};
use palanquin_watch::{LATENESS_US, Role};
use serde::Deserialize;

use crate::failure::Failure;
use crate::files::read_text;

/// Longest file, in bytes.
const CONFIG_MAX: usize = 1 << 20;
/// What would exceed the promised 20 kbit/s of a target at rest.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// Most agents that are asked.
const AGENTS_MAX: usize = 256;

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Config {
    /// Migrations that somebody ordered, as for `watch replay`; read again when it changes.
    pub(crate) records: Option<PathBuf>,
    /// Sockets of agents that are asked which migrations they make; the observe socket is enough.
    #[serde(default)]
    pub(crate) agents: Vec<PathBuf>,
    /// Interface on which announcements (RARP, gratuitous ARP, neighbour advertisements) are heard; none to hear none.
    interface: Option<String>,
    /// Where the page and the metrics are served; none to serve none.
    pub(crate) listen: Option<SocketAddr>,
    /// Whether `listen` may be reachable from elsewhere: whoever reaches it sees everything.
    #[serde(default)]
    pub(crate) listen_to_all: bool,
    /// Time between two ICMP echoes of targets that say nothing else.
    #[serde(default = "half_a_second")]
    interval: HumanDuration,
    /// The watcher was late by more than this: it drops what it saw meanwhile.
    #[serde(default = "hundred_ms")]
    stall: HumanDuration,
    /// Whom it watches.
    #[serde(rename = "target", default)]
    pub(crate) targets: Vec<Target>,
}

/// A target.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    pub(crate) role: TargetRole,
    interval: Option<HumanDuration>,
    /// Whether its clock is read by ICMP timestamps, which IPv6 has not.
    #[serde(default = "yes")]
    timestamps: bool,
    /// Time between two questions by NTP; none to ask none.
    ntp: Option<HumanDuration>,
    #[serde(default = "ntp_port")]
    ntp_port: u16,
    /// Its hardware address; if it is missing it is learnt.
    mac: Option<MacText>,
}

/// A hardware address as text.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
struct MacText(Mac);

impl TryFrom<String> for MacText {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse().map(Self)
    }
}

/// What a target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TargetRole {
    Vm,
    Host,
}

impl TargetRole {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Host => "host",
        }
    }
}

impl From<TargetRole> for Role {
    fn from(role: TargetRole) -> Self {
        match role {
            TargetRole::Vm => Self::Vm,
            TargetRole::Host => Self::Host,
        }
    }
}

fn half_a_second() -> HumanDuration {
    "500ms".parse().unwrap_or(HumanDuration::from_secs(1))
}

fn hundred_ms() -> HumanDuration {
    "100ms".parse().unwrap_or(HumanDuration::from_secs(1))
}

fn yes() -> bool {
    true
}

fn ntp_port() -> u16 {
    123
}

impl Config {
    /// Reads a file and names everything that is wrong with it.
    pub(crate) fn load(path: &Path) -> Result<Self, Failure> {
        let unusable = || Failure::usage(format!("{} is not usable", path.display()));
        let text = read_text(path, CONFIG_MAX)?;
        let config: Self = toml::from_str(&text)
            .map_err(|error| {
                let is_address = error.message().contains("IP address");
                let failure = unusable().load_error(LoadError::Syntax(error));
                if is_address {
                    failure.hint("targets are IP addresses: a name that points elsewhere tomorrow would hide a move")
                } else {
                    failure.hint("`examples/watch.toml` has every key")
                }
            })?;
        let found = config.violations();
        if found.is_empty() {
            return Ok(config);
        }
        Err(unusable().load_error(LoadError::Rules(found)))
    }

    fn violations(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        let mut wrong = |key: String, message: &str| found.push(Violation::new(key, message));
        if self.targets.is_empty() || self.targets.len() > TARGETS_MAX {
            let message = format!("there are 1 to {TARGETS_MAX} targets");
            wrong("target".to_owned(), &message);
        }
        if let Some(listen) = self.listen
            && !listen.ip().is_loopback()
            && !self.listen_to_all
        {
            let message =
                "whoever reaches the page sees everything; listen-to-all = true allows it";
            wrong("listen".to_owned(), message);
        }
        if self.agents.len() > AGENTS_MAX {
            let message = format!("there are at most {AGENTS_MAX} agents");
            wrong("agents".to_owned(), &message);
        }
        let range = INTERVAL_MIN..=INTERVAL_MAX;
        let message = format!("an interval is between {INTERVAL_MIN:?} and {INTERVAL_MAX:?}");
        if !range.contains(&self.interval.get()) {
            wrong("interval".to_owned(), &message);
        }
        let latest = Duration::from_secs(5);
        if !(Duration::from_millis(1)..=latest).contains(&self.stall.get()) {
            wrong("stall".to_owned(), "a stall is between 1ms and 5s");
        }
        let mut names = BTreeSet::new();
        for (at, target) in self.targets.iter().enumerate() {
            let key = |key: &str| format!("target[{at}].{key}");
            if !is_name(&target.name) {
                wrong(
                    key("name"),
                    "a name has 1 to 64 of a-z A-Z 0-9 . _ - and begins with a letter or digit",
                );
            }
            if !names.insert(&target.name) {
                wrong(key("name"), "another target has this name");
            }
            let address = target.address;
            if address.is_multicast() || address.is_unspecified() {
                wrong(key("address"), "this is no address of one machine");
            }
            for (name, interval) in [("interval", target.interval), ("ntp", target.ntp)] {
                if interval.is_some_and(|interval| !range.contains(&interval.get())) {
                    wrong(key(name), &message);
                }
            }
            if target.ntp_port == 0 {
                wrong(key("ntp-port"), "there is no port 0");
            }
        }
        found
    }

    /// What the prober is to do.
    pub(crate) fn prober(&self) -> ProberSpec {
        let target = |target: &Target| {
            let mut spec = TargetSpec::new(target.name.clone(), target.address);
            spec.interval = target.interval.unwrap_or(self.interval).get();
            if !target.timestamps {
                spec.timestamp_interval = None;
            }
            spec.ntp = target.ntp.map(|interval| NtpSpec {
                port: target.ntp_port,
                interval: interval.get(),
            });
            spec.mac = target.mac.map(|mac| mac.0);
            spec
        };
        let mut spec = ProberSpec::new(self.targets.iter().map(target).collect());
        spec.stall = self.stall.get();
        spec.interface.clone_from(&self.interface);
        // A loss that is told later than the detector waits would come too late.
        debug_assert!(spec.timeout < Duration::from_micros(LATENESS_US));
        spec
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(text: &str) -> Vec<String> {
        let config: Config = toml::from_str(text).unwrap();
        config
            .violations()
            .into_iter()
            .map(|found| found.key)
            .collect()
    }

    #[test]
    fn the_example_is_good() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/watch.toml");
        let config = Config::load(&path).unwrap();
        assert!(config.targets.len() >= 3);
        let spec = config.prober();
        assert_eq!(spec.targets.len(), config.targets.len());
    }

    #[test]
    fn everything_that_is_wrong_is_named_at_once() {
        let text = r#"
            listen = "0.0.0.0:1"
            interval = "1ms"
            stall = "1h"
            [[target]]
            name = "a b"
            address = "224.0.0.1"
            role = "vm"
            ntp = "0s"
            ntp-port = 0
            [[target]]
            name = "a b"
            address = "::1"
            role = "host"
            interval = "10h"
        "#;
        let keys = [
            "listen",
            "interval",
            "stall",
            "target[0].name",
            "target[0].address",
            "target[0].ntp",
            "target[0].ntp-port",
            "target[1].name",
            "target[1].name",
            "target[1].interval",
        ];
        assert_eq!(violations(text), keys);
        assert_eq!(violations(""), ["target"]);
        for odd in [
            "typo = 1",
            "listen = 'x'",
            "[[target]]\nname = 'a'",
            "[[target]]\nname = 'a'\naddress = '10.0.0.1'\nrole = 'vm'\nmac = 'ff:ff:ff:ff:ff:ff'",
        ] {
            assert!(toml::from_str::<Config>(odd).is_err(), "{odd}");
        }
    }
}
