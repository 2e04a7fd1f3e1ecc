//! Cases as they are written down, to test policies with: TOML.

use std::collections::{BTreeMap, BTreeSet};

use palanquin_api::config::is_name;
use palanquin_api::control::Strategy;
use palanquin_api::size::HumanDuration;
use serde::Deserialize;
use uuid::Uuid;

use super::{Case, Claims, Policies};
use crate::decision::{Action, Decision};
use crate::digest::Sha256;
use crate::identity::Identity;
use crate::passport::{Passport, SpecError, UNIX_S_MAX};

/// Most cases in a file.
const CASES_MAX: usize = 10_000;

/// A case and what is expected of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rehearsal {
    /// What it is about, in a sentence.
    pub name: String,
    /// The facts.
    pub case: Case,
    /// What is to be decided; absent where nothing is expected.
    pub expected: Option<Expected>,
}

/// What is to be decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Whether it is permitted.
    pub permitted: bool,
    /// Names of the policies that permit or forbid, and codes of what else refuses: exactly these.
    pub because: Option<BTreeSet<String>>,
}

/// A file of cases that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// Not TOML.
    #[error("{0}")]
    Syntax(#[from] toml::de::Error),
    /// A case with an unknown key or a value of another kind.
    #[error("test {0}: {1}")]
    Case(String, toml::de::Error),
    /// More than 10000, or more than 4 MiB.
    #[error("too many cases, or too long")]
    TooMany,
    /// No passport of that name.
    #[error("test {0:?}: there is no passports/{1}.toml")]
    NoPassport(String, String),
    /// A passport that is none.
    #[error("passports/{0}.toml: {1}")]
    Passport(String, SpecError),
    /// Neither `vm` nor `passport`.
    #[error("test {0:?} names no vm")]
    NoVm(String),
    /// A time that is not in UTC.
    #[error("test {0:?}: {1}")]
    Time(String, SpecError),
    /// Two cases of one name.
    #[error("two tests have the name {0:?}")]
    Twice(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Written {
    name: String,
    action: Action,
    operator: Identity,
    vm: Option<Uuid>,
    passport: Option<String>,
    #[serde(default)]
    approved_by: BTreeSet<Identity>,
    source: Identity,
    target: Option<Identity>,
    source_attestation: Option<WrittenClaims>,
    target_attestation: Option<WrittenClaims>,
    #[serde(default)]
    strategy: Strategy,
    #[serde(default)]
    post_copy: bool,
    at: toml::value::Datetime,
    expect: Option<Word>,
    because: Option<BTreeSet<String>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Permit,
    Deny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct WrittenClaims {
    age: HumanDuration,
    boot: Sha256,
    hypervisor: Option<Sha256>,
    policy_version: u64,
}

impl From<WrittenClaims> for Claims {
    fn from(written: WrittenClaims) -> Self {
        Self {
            age_s: written.age.as_millis() / 1000,
            boot: written.boot,
            hypervisor: written.hypervisor,
            policy_version: written.policy_version,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    defaults: toml::Table,
    #[serde(default)]
    test: Vec<toml::Table>,
}

/// Reads cases. What a case does not say it has from `[defaults]`; `false` there for a table or a name means that there is
/// none. Passports are named without `.toml`, as specifications: a rehearsal needs no signature.
///
/// # Errors
///
/// The first thing that is wrong.
pub fn rehearsals(
    text: &str,
    passports: &BTreeMap<String, String>,
) -> Result<Vec<Rehearsal>, RehearsalError> {
    if text.len() > 4 << 20 {
        return Err(RehearsalError::TooMany);
    }
    let file: File = toml::from_str(text)?;
    if file.test.len() > CASES_MAX {
        return Err(RehearsalError::TooMany);
    }
    let mut all: Vec<Rehearsal> = Vec::new();
    for (number, own) in (1..).zip(file.test) {
        let mut table = file.defaults.clone();
        table.extend(own);
        table.retain(|key, value| key == "post-copy" || *value != toml::Value::Boolean(false));
        let label = match table.get("name").and_then(toml::Value::as_str) {
            Some(name) => format!("{name:?}"),
            None => format!("number {number}"),
        };
        let written: Written = table
            .try_into()
            .map_err(|error| RehearsalError::Case(label, error))?;
        if all.iter().any(|other| other.name == written.name) {
            return Err(RehearsalError::Twice(written.name));
        }
        all.push(rehearsal(written, passports)?);
    }
    Ok(all)
}

fn rehearsal(
    written: Written,
    passports: &BTreeMap<String, String>,
) -> Result<Rehearsal, RehearsalError> {
    let name = written.name;
    let passport = match &written.passport {
        None => None,
        Some(file) => {
            let text = passports.get(file).filter(|_| is_name(file));
            let text =
                text.ok_or_else(|| RehearsalError::NoPassport(name.clone(), file.clone()))?;
            let passport = Passport::from_toml(text)
                .map_err(|error| RehearsalError::Passport(file.clone(), error))?;
            Some(passport)
        }
    };
    let vm = written.vm.or(passport.as_ref().map(|passport| passport.vm));
    let vm = vm.ok_or_else(|| RehearsalError::NoVm(name.clone()))?;
    let now_unix_s = crate::passport::unix_s("at", &written.at)
        .map_err(|error| RehearsalError::Time(name.clone(), error))?;
    let because = written.because;
    Ok(Rehearsal {
        case: Case {
            action: written.action,
            operator: written.operator,
            vm,
            passport,
            approvers: written.approved_by,
            target: written.target.unwrap_or_else(|| written.source.clone()),
            source: written.source,
            source_claims: written.source_attestation.map(Into::into),
            target_claims: written.target_attestation.map(Into::into),
            strategy: written.strategy,
            post_copy: written.post_copy,
            now_unix_s: now_unix_s.min(UNIX_S_MAX),
        },
        expected: written.expect.map(|word| Expected {
            permitted: word == Word::Permit,
            because,
        }),
        name,
    })
}

impl Decision {
    /// Names of the policies that permit or forbid, and codes of what else refuses.
    pub fn because(&self) -> BTreeSet<String> {
        if self.permitted {
            return self.permitted_by.iter().cloned().collect();
        }
        let names = self.reasons.iter().map(|reason| match &reason.policy {
            Some(policy) => policy.clone(),
            None => reason.code.to_owned(),
        });
        names.collect()
    }
}

impl Rehearsal {
    /// What is decided, and whether that is what is expected.
    pub fn run(&self, policies: &Policies) -> (Decision, bool) {
        let decision = policies.rehearse(&self.case);
        let fits = self.expected.as_ref().is_none_or(|expected| {
            expected.permitted == decision.permitted
                && expected
                    .because
                    .as_ref()
                    .is_none_or(|names| *names == decision.because())
        });
        (decision, fits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::files;

    const PASSPORT: &str = r#"
        vm = "02020202-0202-0202-0202-020202020202"
        owner = "spiffe://example.org/owner/acme"
        version = 1
        not-before = 2026-01-01T00:00:00Z
        expires = 2030-01-01T00:00:00Z
    "#;

    const TESTS: &str = r#"
        [defaults]
        action = "migrateOut"
        operator = "spiffe://example.org/operator/alice"
        passport = "web"
        source = "spiffe://example.org/host/alpha"
        target = "spiffe://example.org/host/beta"
        at = 2027-01-01T12:00:00Z
        target-attestation = { age = "10s", boot = "sha256:0707070707070707070707070707070707070707070707070707070707070707", policy-version = 7 }

        [[test]]
        name = "the rule"
        expect = "permit"
        because = ["p1"]

        [[test]]
        name = "no evidence"
        target-attestation = false
        expect = "deny"
        because = ["f1"]

        [[test]]
        name = "no passport"
        passport = false
        vm = "02020202-0202-0202-0202-020202020202"
        expect = "deny"
    "#;

    fn passports() -> BTreeMap<String, String> {
        [("web".to_owned(), PASSPORT.to_owned())].into()
    }

    #[test]
    fn cases_are_read_and_run() {
        let policies = Policies::load(&files()).unwrap();
        for rehearsal in rehearsals(TESTS, &passports()).unwrap() {
            let (decision, fits) = rehearsal.run(&policies);
            assert!(fits, "{}: {decision:?}", rehearsal.name);
        }
    }

    #[test]
    fn an_expectation_that_is_not_met_is_noticed() {
        let policies = Policies::load(&files()).unwrap();
        for (from, to) in [
            ("\"permit\"", "\"deny\""),
            ("[\"f1\"]", "[\"f1\", \"f2\"]"),
            ("[\"p1\"]", "[]"),
        ] {
            let changed = TESTS.replacen(from, to, 1);
            assert_ne!(changed, TESTS);
            let all = rehearsals(&changed, &passports()).unwrap();
            let failed = all.iter().filter(|rehearsal| !rehearsal.run(&policies).1);
            assert_eq!(failed.count(), 1, "{to}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_case_is_told_with_its_name() {
        let with = |from: &str, to: &str| {
            let changed = TESTS.replacen(from, to, 1);
            assert_ne!(changed, TESTS, "{from}");
            rehearsals(&changed, &passports()).unwrap_err().to_string()
        };
        assert!(
            with("because = [\"p1\"]", "becuase = []")
                .starts_with("test \"the rule\": unknown field")
        );
        assert_eq!(
            with("\"web\"", "\"../web\""),
            "test \"the rule\": there is no passports/../web.toml"
        );
        assert_eq!(with("vm = ", "# "), "test \"no passport\" names no vm");
        assert_eq!(
            with("no evidence", "the rule"),
            "two tests have the name \"the rule\""
        );
        assert!(with("12:00:00Z", "12:00:00").contains("not a time in UTC"));
        assert!(with("[defaults]", "[default]").contains("unknown field"));
    }
}
