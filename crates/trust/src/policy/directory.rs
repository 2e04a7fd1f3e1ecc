//! The provider's directory: who has which role, and what is known of hosts and VMs.

use std::collections::{BTreeMap, BTreeSet};

use palanquin_api::config::{NAME_RULE, is_name};
use serde::Deserialize;
use uuid::Uuid;

use crate::identity::{Identity, Kind};

/// Most entries of each table of a directory.
pub const ENTRIES_MAX: usize = 10_000;

/// What the provider knows. In a file: TOML, kebab-case, unknown keys refused.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Directory {
    /// Grows with every change, from 1 on.
    pub version: u64,
    /// Roles that there are.
    #[serde(default)]
    pub roles: BTreeSet<String>,
    /// Groups of hosts that there are.
    #[serde(default)]
    pub groups: BTreeSet<String>,
    /// Operators.
    #[serde(default)]
    pub operators: BTreeMap<Identity, Operator>,
    /// Hosts.
    #[serde(default)]
    pub hosts: BTreeMap<Identity, Host>,
    /// VMs of which there is something to say.
    #[serde(default)]
    pub vms: BTreeMap<Uuid, Vm>,
}

/// What is known of an operator.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Operator {
    /// Roles.
    #[serde(default)]
    pub roles: BTreeSet<String>,
    /// Owners for whom this operator works.
    #[serde(default)]
    pub tenants: BTreeSet<Identity>,
}

/// What is known of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Host {
    /// Groups.
    #[serde(default)]
    pub groups: BTreeSet<String>,
    /// Where it stands, in the provider's words.
    pub region: Option<String>,
    /// Whether nothing is to be moved there.
    #[serde(default)]
    pub quarantined: bool,
}

/// What is known of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Vm {
    /// Whether a court or an investigation wants it left as it is.
    #[serde(default)]
    pub legal_hold: bool,
}

impl Directory {
    /// Reads a directory; all that is wrong with it, each with the key.
    pub(crate) fn from_toml(text: &str) -> Result<Self, Vec<String>> {
        let directory: Self = toml::from_str(text).map_err(|error| vec![error.to_string()])?;
        let found = directory.problems();
        if found.is_empty() {
            Ok(directory)
        } else {
            Err(found)
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        let tables = [
            ("roles", self.roles.len()),
            ("groups", self.groups.len()),
            ("operators", self.operators.len()),
            ("hosts", self.hosts.len()),
            ("vms", self.vms.len()),
        ];
        for (table, len) in tables {
            if len > ENTRIES_MAX {
                found.push(format!(
                    "{table}: {len} entries, at most {ENTRIES_MAX} are allowed"
                ));
            }
        }
        if !(1..=i64::MAX.unsigned_abs()).contains(&self.version) {
            found.push("version: not 1 or more".to_owned());
        }
        for (table, names) in [("roles", &self.roles), ("groups", &self.groups)] {
            for name in names.iter().filter(|name| !is_name(name)) {
                found.push(format!("{table}: {name:?} is not {NAME_RULE}"));
            }
        }
        for (identity, operator) in &self.operators {
            let key = format!("operators.{identity}");
            if identity.kind() != Kind::Operator {
                found.push(format!("{key}: no operator's identity"));
            }
            for role in operator.roles.difference(&self.roles) {
                found.push(format!(
                    "{key}.roles: {role:?} is not among the roles of this directory"
                ));
            }
            for tenant in operator.tenants.iter().filter(|t| t.kind() != Kind::Owner) {
                found.push(format!("{key}.tenants: {tenant} is no owner"));
            }
        }
        for (identity, host) in &self.hosts {
            let key = format!("hosts.{identity}");
            if identity.kind() != Kind::Host {
                found.push(format!("{key}: no host's identity"));
            }
            for group in host.groups.difference(&self.groups) {
                found.push(format!(
                    "{key}.groups: {group:?} is not among the groups of this directory"
                ));
            }
            if let Some(region) = &host.region
                && !is_name(region)
            {
                found.push(format!("{key}.region: {region:?} is not {NAME_RULE}"));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        version = 7
        roles = ["migrator"]
        groups = ["gold"]
        [operators."spiffe://example.org/operator/alice"]
        roles = ["migrator"]
        tenants = ["spiffe://example.org/owner/acme"]
        [hosts."spiffe://example.org/host/beta"]
        groups = ["gold"]
        region = "de"
        [vms.02020202-0202-0202-0202-020202020202]
        legal-hold = true
    "#;

    #[test]
    fn a_directory_is_read() {
        let directory = Directory::from_toml(GOOD).unwrap();
        assert!(directory.vms[&Uuid::from_bytes([2; 16])].legal_hold);
        assert_eq!((directory.version, directory.operators.len()), (7, 1));
    }

    #[test]
    fn names_that_are_declared_nowhere_are_found_and_all_at_once() {
        let odd = GOOD
            .replace(
                "[\"migrator\"]\n        tenants",
                "[\"migratr\"]\n        tenants",
            )
            .replace("\"gold\"]\n        region", "\"gld\"]\n        region")
            .replace("owner/acme", "host/acme")
            .replace("version = 7", "version = 0");
        let found = Directory::from_toml(&odd).unwrap_err();
        assert_eq!(found.len(), 4, "{found:?}");
        let unknown = GOOD.replace("legal-hold", "legalhold");
        assert!(Directory::from_toml(&unknown).unwrap_err()[0].contains("unknown field"));
        let kind = GOOD.replace("operator/alice", "host/alice");
        assert_eq!(Directory::from_toml(&kind).unwrap_err().len(), 1);
    }
}
