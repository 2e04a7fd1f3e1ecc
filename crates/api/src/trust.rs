//! `[trust]` in the agent's configuration: by what is judged who may move which VM where.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::attestation::Attestation;
use crate::config::{Rules, check_absolute, is_name};

/// Most entries of each table.
const ENTRIES_MAX: usize = 1000;

/// By what is judged. Whoever has this section has every migration judged, and every VM needs a passport.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Trust {
    /// Directory with `*.cedar` and `directory.toml`, as `palanquin policy check` reads it. Read again on SIGHUP.
    pub policies: PathBuf,
    /// Public keys of VMs' owners: identity, and PEM files. Read again on SIGHUP.
    #[serde(default)]
    pub owners: BTreeMap<String, Vec<PathBuf>>,
    /// Public keys or certificates of operators whose approvals count: identity, and PEM files. Read again on SIGHUP.
    #[serde(default)]
    pub approvers: BTreeMap<String, Vec<PathBuf>>,
    /// Which operator a local user is, by the name or number of the user. Others may not change anything.
    #[serde(default)]
    pub operators: BTreeMap<String, String>,
    /// What this host shows of itself, and what it wants to be shown. Without it it shows nothing, and knows nothing of others.
    #[serde(default)]
    pub attestation: Option<Attestation>,
}

/// Whether this is an identity of that kind: `spiffe://TRUST-DOMAIN/KIND/NAME`.
fn is_identity(uri: &str, kind: &str) -> bool {
    let parts = uri.strip_prefix("spiffe://").and_then(|rest| {
        let (domain, rest) = rest.split_once('/')?;
        Some((domain, rest.split_once('/')?))
    });
    parts.is_some_and(|(domain, (word, name))| {
        let is_of_domains =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        word == kind
            && is_name(name)
            && (1..=255).contains(&domain.len())
            && domain.bytes().all(is_of_domains)
    })
}

impl Trust {
    pub(crate) fn check(&self, rules: &mut Rules) {
        check_absolute(rules, "trust.policies", &self.policies);
        for (table, kind, files) in [
            ("owners", "owner", &self.owners),
            ("approvers", "operator", &self.approvers),
        ] {
            for (identity, paths) in files {
                let key = format!("trust.{table}.{identity}");
                check_identity(rules, &key, identity, kind);
                let message = "no file is named";
                rules.check(
                    !paths.is_empty(),
                    key.as_str(),
                    message,
                    "name a PEM file, or leave it out",
                );
                for path in paths {
                    check_absolute(rules, &key, path);
                }
            }
        }
        if let Some(attestation) = &self.attestation {
            rules.extend(attestation.validate());
        }
        for (user, identity) in &self.operators {
            let key = format!("trust.operators.{user}");
            let message = format!("{user:?} is no user");
            rules.check(
                is_name(user),
                key.as_str(),
                message,
                "the name or number of a local user",
            );
            check_identity(rules, &key, identity, "operator");
        }
        for (table, len) in [
            ("owners", self.owners.len()),
            ("approvers", self.approvers.len()),
            ("operators", self.operators.len()),
        ] {
            let message = format!("{len} entries are too many");
            let hint = format!("at most {ENTRIES_MAX}");
            rules.check(len <= ENTRIES_MAX, format!("trust.{table}"), message, &hint);
        }
    }
}

fn check_identity(rules: &mut Rules, key: &str, identity: &str, kind: &str) {
    rules.check(
        is_identity(identity, kind),
        key,
        format!("{identity:?} is no identity of an {kind}"),
        &format!("spiffe://TRUST-DOMAIN/{kind}/NAME"),
    );
}

#[cfg(test)]
mod tests {
    use crate::config::{AgentConfig, LoadError};

    const GOOD: &str = "name = \"alpha\"\n[tls]\nca = \"/c/ca.pem\"\ncertificate = \"/c/alpha.pem\"\n\
                        key = \"/c/alpha.key\"\n[trust]\n";

    #[test]
    fn by_what_is_judged_is_read() {
        let text = format!(
            "{GOOD}policies = \"/p\"\n[trust.owners]\n\"spiffe://example.org/owner/acme\" = [\"/k/acme.pub\"]\n\
             [trust.operators]\nalice = \"spiffe://example.org/operator/alice\"\n1000 = \
             \"spiffe://example.org/operator/bob\"\n"
        );
        let trust = AgentConfig::from_toml(&text).unwrap().trust.unwrap();
        assert_eq!(trust.operators["1000"], "spiffe://example.org/operator/bob");
        assert_eq!(trust.owners.len(), 1);
        assert!(trust.approvers.is_empty());
        assert!(AgentConfig::from_toml(GOOD).is_err(), "no policies");
    }

    #[test]
    fn every_violation_is_named_at_once() {
        let text = format!(
            "{GOOD}policies = \"p\"\n[trust.owners]\n\"spiffe://example.org/host/acme\" = []\n\
             [trust.approvers]\n\"spiffe://example.org/operator/a\" = [\"k\"]\n\
             [trust.operators]\n\"a b\" = \"spiffe://EXAMPLE/operator/a\"\n"
        );
        let Err(LoadError::Rules(found)) = AgentConfig::from_toml(&text) else {
            panic!("it is taken");
        };
        let keys: Vec<_> = found.iter().map(|found| found.key.as_str()).collect();
        let owner = "trust.owners.spiffe://example.org/host/acme";
        assert_eq!(
            keys,
            [
                "trust.policies",
                owner,
                owner,
                "trust.approvers.spiffe://example.org/operator/a",
                "trust.operators.a b",
                "trust.operators.a b"
            ]
        );
    }
}
