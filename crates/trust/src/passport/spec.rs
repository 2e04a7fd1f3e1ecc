//! A passport as its owner writes it: TOML.

use palanquin_api::control::Strategy;
use palanquin_api::size::HumanDuration;
use serde::Deserialize;
use uuid::Uuid;

use super::{Demands, Passport, strategy_order};
use crate::digest::Sha256;
use crate::identity::Identity;
use crate::signed::{Document, FieldError};

/// Longest specification in bytes.
const SPEC_MAX: usize = 256 * 1024;

/// A text that is no specification of a passport.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// More than 256 KiB.
    #[error("{0} bytes, at most {SPEC_MAX} are allowed")]
    TooLong(usize),
    /// Not TOML, an unknown key, or a value of another kind; says where.
    #[error("{0}")]
    Syntax(#[from] toml::de::Error),
    /// A date without a time, or not in UTC.
    #[error("{0}: not a time in UTC, as in 2027-01-31T12:00:00Z")]
    Time(&'static str),
    /// A field out of bounds.
    #[error(transparent)]
    Field(#[from] FieldError),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Spec {
    vm: Uuid,
    owner: Identity,
    version: u64,
    not_before: toml::value::Datetime,
    expires: toml::value::Datetime,
    #[serde(default)]
    sensitivity: u8,
    #[serde(default)]
    allow: AllowSpec,
    attestation: Option<DemandsSpec>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct AllowSpec {
    hosts: Option<Vec<Identity>>,
    groups: Option<Vec<String>>,
    regions: Option<Vec<String>>,
    roles: Option<Vec<String>>,
    strategies: Option<Vec<Strategy>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct DemandsSpec {
    max_age: HumanDuration,
    boots: Option<Vec<Sha256>>,
    hypervisors: Option<Vec<Sha256>>,
    policy_version_min: Option<u64>,
}

/// Sorted, and without what is there twice: order has no meaning.
fn set<T: Ord>(list: Option<Vec<T>>) -> Option<Vec<T>> {
    list.map(|mut list| {
        list.sort();
        list.dedup();
        list
    })
}

pub(crate) fn unix_s(field: &'static str, time: &toml::value::Datetime) -> Result<u64, SpecError> {
    let odd = || SpecError::Time(field);
    let time = humantime::parse_rfc3339(&time.to_string()).map_err(|_| odd())?;
    let since = time.duration_since(std::time::UNIX_EPOCH);
    Ok(since.map_err(|_| odd())?.as_secs())
}

impl Passport {
    /// Reads what an owner wrote.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn from_toml(text: &str) -> Result<Self, SpecError> {
        if text.len() > SPEC_MAX {
            return Err(SpecError::TooLong(text.len()));
        }
        let spec: Spec = toml::from_str(text)?;
        let passport = Self {
            vm: spec.vm,
            owner: spec.owner,
            version: spec.version,
            not_before_unix_s: unix_s("not-before", &spec.not_before)?,
            expires_unix_s: unix_s("expires", &spec.expires)?,
            sensitivity: spec.sensitivity,
            hosts: set(spec.allow.hosts),
            groups: set(spec.allow.groups),
            regions: set(spec.allow.regions),
            roles: set(spec.allow.roles),
            strategies: spec.allow.strategies.map(|mut list| {
                list.sort_by_key(|strategy| strategy_order(*strategy));
                list.dedup();
                list
            }),
            attestation: spec.attestation.map(|demands| Demands {
                max_age_s: demands.max_age.as_millis() / 1000,
                boots: set(demands.boots),
                hypervisors: set(demands.hypervisors),
                policy_version_min: demands.policy_version_min,
            }),
        };
        passport.check()?;
        Ok(passport)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passport::tests::passport;

    fn text() -> String {
        let digest = |byte: &str| format!("sha256:{}", byte.repeat(32));
        format!(
            r#"
            vm = "02020202-0202-0202-0202-020202020202"
            owner = "spiffe://example.org/owner/acme"
            version = 3
            not-before = 2026-09-21T14:13:20Z
            expires = 2029-11-22T00:00:00Z
            sensitivity = 2

            [allow]
            hosts = ["spiffe://example.org/host/beta"]
            groups = ["gold"]
            regions = ["fr", "de", "fr"]
            roles = ["migrator"]
            strategies = ["pre-copy", "auto"]

            [attestation]
            max-age = "60s"
            boots = ["{}"]
            hypervisors = ["{}", "{}"]
            policy-version-min = 5
            "#,
            digest("07"),
            digest("09"),
            digest("08")
        )
    }

    #[test]
    fn what_an_owner_writes_becomes_a_passport() {
        let mut expected = passport();
        expected.not_before_unix_s = 1_790_000_000;
        expected.expires_unix_s = 1_889_999_999 / 86400 * 86400;
        let read = Passport::from_toml(&text()).unwrap();
        expected.expires_unix_s = read.expires_unix_s;
        assert_eq!(read, expected);
        assert_eq!(
            crate::passport::date(read.expires_unix_s),
            "2029-11-22T00:00:00Z"
        );
    }

    #[test]
    fn unknown_keys_local_times_and_empty_lists_are_refused() {
        let with = |from: &str, to: &str| {
            let changed = text().replacen(from, to, 1);
            assert_ne!(changed, text(), "{from}");
            Passport::from_toml(&changed).unwrap_err().to_string()
        };
        assert!(with("groups =", "group =").contains("unknown field `group`"));
        assert!(with("00:00:00Z", "00:00:00").contains("expires: not a time in UTC"));
        assert!(with("T00:00:00Z", "").contains("expires: not a time in UTC"));
        assert!(with("[\"gold\"]", "[]").contains("allow.groups: an empty list"));
        assert!(with("\"60s\"", "\"500ms\"").contains("attestation.max-age"));
        assert!(with("\"auto\"", "\"teleport\"").contains("unknown variant `teleport`"));
        assert!(with("host/beta", "hosts/beta").contains("spiffe://"));
        let long = format!("{}\n#{}", text(), "x".repeat(SPEC_MAX));
        assert!(matches!(
            Passport::from_toml(&long),
            Err(SpecError::TooLong(_))
        ));
    }
}
