//! The passport of a VM: what its owner allows, signed by the owner. It travels with the VM, and no host's policies can
//! allow more.

mod judge;
mod spec;

use std::fmt;

use minicbor::{Decode, Encode};
use palanquin_api::config::is_name;
use palanquin_api::control::Strategy;
use serde::Serialize;
use uuid::Uuid;

use crate::digest::Sha256;
use crate::identity::{Identity, Kind};
use crate::signed::{Document, FieldError, Verified, Window};

pub(crate) use judge::Known;
pub use spec::SpecError;
pub(crate) use spec::unix_s;

/// Most entries of a list in a passport.
pub const LIST_MAX: usize = 256;
/// Highest sensitivity.
pub const SENSITIVITY_MAX: u8 = 4;
/// Longest time for which evidence may be believed, in seconds: a day.
pub const EVIDENCE_AGE_MAX_S: u64 = 24 * 3600;
/// Last second that a document may name: the end of the year 9999.
pub const UNIX_S_MAX: u64 = 253_402_300_799;

/// What the owner of a VM allows. A list that is absent allows everything, and none is empty.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "kebab-case")]
#[cbor(map)]
pub struct Passport {
    /// The VM: its UUID.
    #[cbor(n(0), with = "crate::cbor::uuid")]
    pub vm: Uuid,
    /// Whose VM it is; signs.
    #[n(1)]
    pub owner: Identity,
    /// Grows with every passport of this VM, from 1 on: hosts refuse an older one than they know.
    #[n(2)]
    pub version: u64,
    /// From when on it holds, seconds since 1970.
    #[n(3)]
    pub not_before_unix_s: u64,
    /// Until when, seconds since 1970.
    #[n(4)]
    pub expires_unix_s: u64,
    /// How much harm disclosure would do, 0 (none) to [`SENSITIVITY_MAX`]; for the provider's policies.
    #[n(5)]
    pub sensitivity: u8,
    /// Hosts on which the VM may run; with `groups`: or hosts of these groups.
    #[n(6)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<Identity>>,
    /// Groups of hosts on which the VM may run, named in the provider's directory.
    #[n(7)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub groups: Option<Vec<String>>,
    /// Regions in which the VM may run, named in the provider's directory.
    #[n(8)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regions: Option<Vec<String>>,
    /// Roles of operators of which one is needed for whatever is done to the VM.
    #[n(9)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roles: Option<Vec<String>>,
    /// Strategies by which the VM may be moved. `auto` with `--allow post-copy` needs `post-copy` or `hybrid` too.
    #[cbor(n(10), with = "crate::cbor::strategies", has_nil)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strategies: Option<Vec<Strategy>>,
    /// What a host has to prove; absent: nothing.
    #[n(11)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attestation: Option<Demands>,
}

/// What a host has to prove by evidence before it gets the VM.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "kebab-case")]
#[cbor(map)]
pub struct Demands {
    /// Age up to which evidence is believed, in seconds, 1 to [`EVIDENCE_AGE_MAX_S`].
    #[n(0)]
    pub max_age_s: u64,
    /// Measured boots (digest over the quoted PCRs) of which it must be one.
    #[n(1)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boots: Option<Vec<Sha256>>,
    /// Measured hypervisors of which it must be one.
    #[n(2)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hypervisors: Option<Vec<Sha256>>,
    /// Least version of the provider's policies.
    #[n(3)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_version_min: Option<u64>,
}

/// A passport that is not newer than one that is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuccessionError {
    /// Rolled back.
    #[error("the passport has version {0}, and version {1} of this VM is known")]
    Older(u64, u64),
    /// Two passports of one version: the owner's mistake, or somebody has the owner's key.
    #[error("another passport of version {0} of this VM is known")]
    Forked(u64),
    /// Not the same VM's.
    #[error("the passport is of VM {0}")]
    OtherVm(Uuid),
    /// Not by the owner who is known.
    #[error("the VM belongs to {known}, the passport is of {new}")]
    OtherOwner {
        /// Who is known.
        known: Identity,
        /// Who signed.
        new: Identity,
    },
}

/// What a host remembers of the newest passport of a VM that it has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastPassport {
    /// The VM.
    pub vm: Uuid,
    /// Whose it is.
    pub owner: Identity,
    /// Version of the passport.
    pub version: u64,
    /// Digest of its envelope.
    pub sha256: Sha256,
}

impl Verified<Passport> {
    /// What to remember of it.
    pub fn to_last(&self) -> LastPassport {
        LastPassport {
            vm: self.vm,
            owner: self.owner.clone(),
            version: self.version,
            sha256: self.sha256(),
        }
    }

    /// Whether this may be used where that one is known: it is the same, or a later one of the same owner.
    ///
    /// # Errors
    ///
    /// It is another VM's, another owner's, older, or a second one of the same version.
    pub fn follows(&self, known: &LastPassport) -> Result<(), SuccessionError> {
        if self.vm != known.vm {
            return Err(SuccessionError::OtherVm(self.vm));
        }
        if self.owner != known.owner {
            return Err(SuccessionError::OtherOwner {
                known: known.owner.clone(),
                new: self.owner.clone(),
            });
        }
        match self.version.cmp(&known.version) {
            std::cmp::Ordering::Less => Err(SuccessionError::Older(self.version, known.version)),
            std::cmp::Ordering::Equal if self.sha256() != known.sha256 => {
                Err(SuccessionError::Forked(self.version))
            }
            _ => Ok(()),
        }
    }
}

fn check_list<T>(
    field: &'static str,
    list: Option<&Vec<T>>,
    sorts: impl Fn(&T, &T) -> bool,
    fits: impl Fn(&T) -> bool,
) -> Result<(), FieldError> {
    let Some(list) = list else {
        return Ok(());
    };
    let odd = |message: &str| Err(FieldError::new(field, message));
    match list.len() {
        0 => odd("an empty list allows nothing at all; leave it out, or name something"),
        1..=LIST_MAX if !list.iter().all(fits) => odd("an entry is no proper name or value"),
        1..=LIST_MAX if !list.windows(2).all(|pair| sorts(&pair[0], &pair[1])) => {
            odd("not in order, or an entry is there twice")
        }
        1..=LIST_MAX => Ok(()),
        _ => odd("too long"),
    }
}

pub(crate) fn strategy_order(strategy: Strategy) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Their order is that of their numbers.
    let _ =
        crate::cbor::strategy::encode(&strategy, &mut minicbor::Encoder::new(&mut bytes), &mut ());
    bytes
}

impl Document for Passport {
    const CONTENT_TYPE: &'static str = "application/vnd.palanquin.passport+cbor";
    const WORD: &'static str = "passport";
    const SIGNER: Kind = Kind::Owner;

    fn signer(&self) -> &Identity {
        &self.owner
    }

    fn window(&self) -> Window {
        Window {
            not_before_unix_s: self.not_before_unix_s,
            expires_unix_s: self.expires_unix_s,
        }
    }

    fn check(&self) -> Result<(), FieldError> {
        if self.owner.kind() != Kind::Owner {
            let what = format!("{} is no owner", self.owner);
            return Err(FieldError::new("owner", what));
        }
        if !(1..u64::MAX).contains(&self.version) {
            return Err(FieldError::new("version", "not 1 or more"));
        }
        if self.expires_unix_s < self.not_before_unix_s || self.expires_unix_s > UNIX_S_MAX {
            let what = "before it begins, or after the year 9999";
            return Err(FieldError::new("expires", what));
        }
        if self.sensitivity > SENSITIVITY_MAX {
            return Err(FieldError::new("sensitivity", "more than 4"));
        }
        let names = |field, list: &Option<Vec<String>>| {
            check_list(field, list.as_ref(), |a, b| a < b, |name| is_name(name))
        };
        let is_host = |host: &Identity| host.kind() == Kind::Host;
        check_list("allow.hosts", self.hosts.as_ref(), |a, b| a < b, is_host)?;
        names("allow.groups", &self.groups)?;
        names("allow.regions", &self.regions)?;
        names("allow.roles", &self.roles)?;
        let order = |a: &Strategy, b: &Strategy| strategy_order(*a) < strategy_order(*b);
        check_list("allow.strategies", self.strategies.as_ref(), order, |_| {
            true
        })?;
        self.attestation.as_ref().map_or(Ok(()), Demands::check)
    }
}

impl Demands {
    fn check(&self) -> Result<(), FieldError> {
        if !(1..=EVIDENCE_AGE_MAX_S).contains(&self.max_age_s) {
            return Err(FieldError::new("attestation.max-age", "not 1 s to 24 h"));
        }
        let digests = |field, list: &Option<Vec<Sha256>>| {
            check_list(field, list.as_ref(), |a, b| a < b, |_| true)
        };
        digests("attestation.boots", &self.boots)?;
        digests("attestation.hypervisors", &self.hypervisors)?;
        match self.policy_version_min {
            Some(0) => Err(FieldError::new(
                "attestation.policy-version-min",
                "not 1 or more",
            )),
            _ => Ok(()),
        }
    }
}

/// A second since 1970 as people write it.
pub fn date(unix_s: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(unix_s.min(UNIX_S_MAX));
    humantime::format_rfc3339_seconds(time).to_string()
}

/// The word for a strategy at the command line and in passports.
pub fn strategy_word(strategy: Strategy) -> String {
    serde_json::to_value(strategy)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

impl fmt::Display for Passport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "VM           {}", self.vm)?;
        writeln!(f, "owner        {}", self.owner)?;
        writeln!(f, "version      {}", self.version)?;
        let (from, to) = (date(self.not_before_unix_s), date(self.expires_unix_s));
        writeln!(f, "holds        {from} to {to}")?;
        writeln!(f, "sensitivity  {}", self.sensitivity)?;
        let mut list = |label: &str, list: Option<Vec<String>>| match list {
            Some(list) => writeln!(f, "{label:12} {}", list.join("\n             ")),
            None => writeln!(f, "{label:12} any"),
        };
        let texts = |list: &Vec<Identity>| list.iter().map(ToString::to_string).collect();
        let digests = |list: &Vec<Sha256>| list.iter().map(ToString::to_string).collect();
        let words = |list: &Vec<Strategy>| list.iter().copied().map(strategy_word).collect();
        match (&self.hosts, &self.groups) {
            // Whoever reads "groups any" beside a list of hosts would think that they are all allowed.
            (Some(hosts), None) => list("hosts", Some(texts(hosts)))?,
            (None, Some(groups)) => list("groups", Some(groups.clone()))?,
            (hosts, groups) => {
                list("hosts", hosts.as_ref().map(texts))?;
                list("or groups", groups.clone())?;
            }
        }
        list("regions", self.regions.clone())?;
        list("roles", self.roles.clone())?;
        list("strategies", self.strategies.as_ref().map(words))?;
        let Some(demands) = &self.attestation else {
            return writeln!(f, "attestation  not demanded");
        };
        list("boots", demands.boots.as_ref().map(digests))?;
        list("hypervisors", demands.hypervisors.as_ref().map(digests))?;
        writeln!(f, "evidence     not older than {} s", demands.max_age_s)?;
        match demands.policy_version_min {
            Some(least) => writeln!(f, "policies     version {least} or later"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use palanquin_api::control::Strategy;
    use proptest::prelude::*;

    use super::*;
    use crate::cbor;
    use crate::keys::tests::signer;
    use crate::signed::Signed;

    pub(crate) fn passport() -> Passport {
        let names = |list: &[&str]| Some(list.iter().map(|name| (*name).to_owned()).collect());
        Passport {
            vm: Uuid::from_bytes([2; 16]),
            owner: "spiffe://example.org/owner/acme".parse().unwrap(),
            version: 3,
            not_before_unix_s: 1_790_000_000,
            expires_unix_s: 1_890_000_000,
            sensitivity: 2,
            hosts: Some(vec!["spiffe://example.org/host/beta".parse().unwrap()]),
            groups: names(&["gold"]),
            regions: names(&["de", "fr"]),
            roles: names(&["migrator"]),
            strategies: Some(vec![Strategy::Auto, Strategy::PreCopy]),
            attestation: Some(Demands {
                max_age_s: 60,
                boots: Some(vec![Sha256([7; 32])]),
                hypervisors: Some(vec![Sha256([8; 32]), Sha256([9; 32])]),
                policy_version_min: Some(5),
            }),
        }
    }

    fn verified(passport: &Passport) -> Verified<Passport> {
        let mut ring = crate::Keyring::default();
        let key = crate::Sign::public_key(&signer(1));
        ring.insert(passport.owner.clone(), key).unwrap();
        let signed = Signed::sign(passport, &signer(1)).unwrap();
        signed.verify_lapsed(&ring).unwrap()
    }

    #[test]
    fn every_rule_for_a_field_is_checked() {
        assert_eq!(passport().check(), Ok(()));
        let names = |list: &[&str]| Some(list.iter().map(|name| (*name).to_owned()).collect());
        let demands = |change: fn(&mut Demands)| {
            let mut demands = passport().attestation.unwrap();
            change(&mut demands);
            Some(demands)
        };
        let long = (0..=LIST_MAX).map(|n| format!("{n:04}")).collect();
        let odd = [
            (
                "owner",
                Passport {
                    owner: "spiffe://a/host/b".parse().unwrap(),
                    ..passport()
                },
            ),
            (
                "version",
                Passport {
                    version: 0,
                    ..passport()
                },
            ),
            (
                "version",
                Passport {
                    version: u64::MAX,
                    ..passport()
                },
            ),
            (
                "expires",
                Passport {
                    expires_unix_s: 1,
                    ..passport()
                },
            ),
            (
                "expires",
                Passport {
                    expires_unix_s: UNIX_S_MAX + 1,
                    ..passport()
                },
            ),
            (
                "sensitivity",
                Passport {
                    sensitivity: 5,
                    ..passport()
                },
            ),
            (
                "allow.hosts",
                Passport {
                    hosts: Some(vec![]),
                    ..passport()
                },
            ),
            (
                "allow.hosts",
                Passport {
                    hosts: Some(vec![passport().owner]),
                    ..passport()
                },
            ),
            (
                "allow.groups",
                Passport {
                    groups: names(&["b", "a"]),
                    ..passport()
                },
            ),
            (
                "allow.groups",
                Passport {
                    groups: Some(long),
                    ..passport()
                },
            ),
            (
                "allow.regions",
                Passport {
                    regions: names(&["a", "a"]),
                    ..passport()
                },
            ),
            (
                "allow.roles",
                Passport {
                    roles: names(&["a b"]),
                    ..passport()
                },
            ),
            (
                "allow.strategies",
                Passport {
                    strategies: Some(vec![Strategy::Hybrid; 2]),
                    ..passport()
                },
            ),
            (
                "attestation.max-age",
                Passport {
                    attestation: demands(|d| d.max_age_s = 0),
                    ..passport()
                },
            ),
            (
                "attestation.boots",
                Passport {
                    attestation: demands(|d| d.boots = Some(vec![])),
                    ..passport()
                },
            ),
            (
                "attestation.policy-version-min",
                Passport {
                    attestation: demands(|d| d.policy_version_min = Some(0)),
                    ..passport()
                },
            ),
        ];
        for (field, odd) in odd {
            assert_eq!(odd.check().unwrap_err().field, field, "{odd:?}");
            // Nor can such a one be signed.
            assert!(Signed::sign(&odd, &signer(1)).is_err());
        }
    }

    #[test]
    fn only_the_same_or_a_later_passport_of_the_same_owner_follows() {
        let known = verified(&passport()).to_last();
        let follows = |passport: &Passport| verified(passport).follows(&known);
        assert_eq!(follows(&passport()), Ok(()));
        assert_eq!(
            follows(&Passport {
                version: 4,
                ..passport()
            }),
            Ok(())
        );
        let older = Passport {
            version: 2,
            ..passport()
        };
        assert_eq!(follows(&older), Err(SuccessionError::Older(2, 3)));
        let forked = Passport {
            sensitivity: 0,
            ..passport()
        };
        assert_eq!(follows(&forked), Err(SuccessionError::Forked(3)));
        let other = Passport {
            vm: Uuid::nil(),
            version: 9,
            ..passport()
        };
        assert_eq!(follows(&other), Err(SuccessionError::OtherVm(Uuid::nil())));
        let stolen = Passport {
            owner: "spiffe://example.org/owner/other".parse().unwrap(),
            version: 9,
            ..passport()
        };
        assert!(matches!(
            follows(&stolen),
            Err(SuccessionError::OtherOwner { .. })
        ));
    }

    #[test]
    fn what_is_shown_does_not_say_any_where_something_else_decides() {
        let hosts_only = Passport {
            groups: None,
            ..passport()
        }
        .to_string();
        assert!(hosts_only.contains("hosts        spiffe://"));
        assert!(!hosts_only.contains("groups"), "{hosts_only}");
        let free = Passport {
            hosts: None,
            groups: None,
            ..passport()
        }
        .to_string();
        assert!(free.contains("hosts        any"), "{free}");
        assert!(
            free.contains("2026-09-21T")
                && free.contains("strategies   auto\n             pre-copy"),
            "{free}"
        );
    }

    prop_compose! {
        fn any_passport()(
            (vm, version, sensitivity) in (any::<[u8; 16]>(), 1..u64::MAX, 0..=SENSITIVITY_MAX),
            (begin, length) in (0..UNIX_S_MAX / 2, 0..UNIX_S_MAX / 2),
            owner in "spiffe://[a-z]{1,20}/owner/[a-z]{1,20}",
            hosts in prop::option::of(prop::collection::btree_set("spiffe://[a-z]{1,9}/host/[a-z]{1,9}", 1..5)),
            lists in prop::collection::vec(prop::option::of(prop::collection::btree_set("[a-z0-9]{1,20}", 1..5)), 3),
            strategies in prop::option::of(prop::sample::subsequence(
                vec![Strategy::Auto, Strategy::StopAndCopy, Strategy::PreCopy, Strategy::Improved, Strategy::PostCopy, Strategy::Hybrid], 1..=6)),
            demands in prop::option::of((1..=EVIDENCE_AGE_MAX_S, prop::option::of(any::<[u8; 32]>()), prop::option::of(1u64..))),
        ) -> Passport {
            let list = |at: usize| lists[at].clone().map(|set| set.into_iter().collect());
            Passport {
                vm: Uuid::from_bytes(vm),
                owner: owner.parse().unwrap(),
                version,
                not_before_unix_s: begin,
                expires_unix_s: begin + length,
                sensitivity,
                hosts: hosts.map(|set| {
                    let mut hosts: Vec<Identity> = set.iter().map(|uri| uri.parse().unwrap()).collect();
                    hosts.sort();
                    hosts
                }),
                groups: list(0),
                regions: list(1),
                roles: list(2),
                strategies,
                attestation: demands.map(|(max_age_s, boot, policy_version_min)| Demands {
                    max_age_s,
                    boots: boot.map(|boot| vec![Sha256(boot)]),
                    hypervisors: None,
                    policy_version_min,
                }),
            }
        }
    }

    proptest! {
        #[test]
        fn a_passport_is_read_as_it_was_signed(passport in any_passport()) {
            prop_assert_eq!(passport.check(), Ok(()));
            prop_assert_eq!(&*verified(&passport), &passport);
            // Whatever it says can be shown.
            prop_assert!(passport.to_string().contains(&passport.vm.to_string()));
        }

        #[test]
        fn there_is_one_form_of_a_passport(passport in any_passport(), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = cbor::to_vec(&passport);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(other) = cbor::from_slice::<Passport>(&bytes) {
                prop_assert_ne!(other, passport);
            }
        }
    }
}
