//! What a passport says to what is asked for.

use std::collections::BTreeSet;

use palanquin_api::control::Strategy;

use super::{Demands, Passport, date, strategy_word};
use crate::decision::{Action, Gate, Reason};
use crate::identity::Identity;
use crate::policy::{Case, Claims};
use crate::signed::{Document, WindowError};

/// What the provider's directory says of those whom a passport speaks of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known<'a> {
    /// Groups of the target.
    pub(crate) groups: &'a BTreeSet<String>,
    /// Region of the target.
    pub(crate) region: Option<&'a str>,
    /// Roles of the operator.
    pub(crate) roles: &'a BTreeSet<String>,
}

fn refused(code: &'static str, message: String, remedy: &str) -> Reason {
    Reason::new(Gate::Passport, code, message, remedy)
}

impl Passport {
    /// Everything in the passport that stands against it.
    ///
    /// To end a migration or to remove what is left of a VM needs a role only: a passport that has expired must not keep
    /// anybody from it.
    pub(crate) fn judge(&self, case: &Case, known: &Known<'_>) -> Vec<Reason> {
        let mut reasons = Vec::new();
        if self.vm != case.vm {
            reasons.push(refused(
                "passport-other-vm",
                format!("the passport is of VM {}", self.vm),
                "Give the passport of this VM.",
            ));
        }
        if let Some(roles) = &self.roles
            && !roles.iter().any(|role| known.roles.contains(role))
        {
            reasons.push(refused(
                "passport-role",
                format!(
                    "{} has none of the roles {}",
                    case.operator,
                    roles.join(", ")
                ),
                "Ask an operator with one of these roles, or the owner for another passport.",
            ));
        }
        if !case.action.brings() {
            return reasons;
        }
        reasons.extend(self.judge_time(case.now_unix_s));
        reasons.extend(self.judge_place(&case.target, known));
        if case.action != Action::Adopt {
            reasons.extend(self.judge_strategy(case.strategy, case.post_copy));
        }
        if let Some(demands) = &self.attestation {
            reasons.extend(demands.judge(&case.target, case.target_claims.as_ref()));
        }
        reasons
    }

    fn judge_time(&self, now_unix_s: u64) -> Option<Reason> {
        let remedy = "Ask the owner for a passport that holds now.";
        match self.window().check(now_unix_s) {
            Ok(()) => None,
            Err(WindowError::Early { .. }) => {
                let from = date(self.not_before_unix_s);
                let message = format!("the passport holds from {from} on");
                Some(refused("passport-early", message, remedy))
            }
            Err(WindowError::Expired(_)) => {
                let message = format!("the passport expired at {}", date(self.expires_unix_s));
                Some(refused("passport-expired", message, remedy))
            }
        }
    }

    fn judge_place(&self, target: &Identity, known: &Known<'_>) -> Vec<Reason> {
        let mut reasons = Vec::new();
        let is_named = self.hosts.as_ref().map(|hosts| hosts.contains(target));
        let is_grouped = self
            .groups
            .as_ref()
            .map(|groups| groups.iter().any(|group| known.groups.contains(group)));
        // Where both lists are there, one of them is enough.
        let is_allowed = match (is_named, is_grouped) {
            (None, None) => true,
            (named, grouped) => named.unwrap_or(false) || grouped.unwrap_or(false),
        };
        if !is_allowed {
            reasons.push(refused(
                "passport-host",
                format!(
                    "{target} is none of the hosts and in none of the groups that the owner allows"
                ),
                "Choose another host; `palanquin passport show` names those allowed.",
            ));
        }
        if let Some(regions) = &self.regions
            && !known
                .region
                .is_some_and(|region| regions.iter().any(|allowed| allowed == region))
        {
            let place = known.region.unwrap_or("no region that is known");
            reasons.push(refused(
                "passport-region",
                format!(
                    "{target} is in {place}; the owner allows {}",
                    regions.join(", ")
                ),
                "Choose a host in one of these regions.",
            ));
        }
        reasons
    }

    fn judge_strategy(&self, strategy: Strategy, post_copy: bool) -> Option<Reason> {
        let allowed = self.strategies.as_ref()?;
        let splits = [Strategy::PostCopy, Strategy::Hybrid];
        let words = || {
            let words: Vec<_> = allowed.iter().copied().map(strategy_word).collect();
            words.join(", ")
        };
        let word = strategy_word(strategy);
        if !allowed.contains(&strategy) {
            let message = format!("the owner allows strategies {}, not {word}", words());
            return Some(refused(
                "passport-strategy",
                message,
                "Choose one of these with --strategy.",
            ));
        }
        if post_copy && !splits.iter().any(|split| allowed.contains(split)) {
            let message = format!(
                "{word} may run the VM before all of its pages are there, and the owner allows {} only",
                words()
            );
            return Some(refused(
                "passport-post-copy",
                message,
                "Leave post-copy out of --allow.",
            ));
        }
        None
    }
}

impl Demands {
    fn judge(&self, target: &Identity, claims: Option<&Claims>) -> Vec<Reason> {
        let attested = |code, message: String, remedy: &str| {
            Reason::new(Gate::Attestation, code, message, remedy)
        };
        let Some(claims) = claims else {
            let message =
                format!("{target} has given no evidence of what it runs, and the owner demands it");
            let remedy = "Enrol the host's TPM, or choose another host.";
            return vec![attested("evidence-missing", message, remedy)];
        };
        let mut reasons = Vec::new();
        if claims.age_s > self.max_age_s {
            let (age, most) = (claims.age_s, self.max_age_s);
            reasons.push(attested(
                "evidence-old",
                format!("the evidence of {target} is {age} s old, the owner allows {most} s"),
                "Try again: the host is asked anew.",
            ));
        }
        if let Some(boots) = &self.boots
            && !boots.contains(&claims.boot)
        {
            reasons.push(attested(
                "boot-not-allowed",
                format!(
                    "{target} has booted {}, which the owner does not allow",
                    claims.boot
                ),
                "Boot the host as the owner expects it, or ask the owner to allow this boot.",
            ));
        }
        if let Some(hypervisors) = &self.hypervisors
            && !claims
                .hypervisor
                .is_some_and(|runs| hypervisors.contains(&runs))
        {
            let runs = claims.hypervisor.map_or_else(
                || "an unmeasured hypervisor".to_owned(),
                |runs| runs.to_string(),
            );
            reasons.push(attested(
                "hypervisor-not-allowed",
                format!("{target} runs {runs}, which the owner does not allow"),
                "Install a hypervisor that the owner allows, or ask the owner to allow this one.",
            ));
        }
        if let Some(least) = self.policy_version_min
            && claims.policy_version < least
        {
            let version = claims.policy_version;
            reasons.push(attested(
                "policy-old",
                format!("{target} has policies of version {version}, the owner demands {least}"),
                "Bring the host's policies up to date.",
            ));
        }
        reasons
    }
}

#[cfg(test)]
mod tests {
    use palanquin_api::control::Strategy;
    use proptest::prelude::*;

    use super::*;
    use crate::digest::Sha256;
    use crate::passport::tests::passport;
    use crate::policy::tests::case;

    struct World {
        groups: BTreeSet<String>,
        region: Option<&'static str>,
        roles: BTreeSet<String>,
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn good() -> World {
        World {
            groups: set(&["silver"]),
            region: Some("de"),
            roles: set(&["auditor", "migrator"]),
        }
    }

    fn codes(passport: &Passport, case: &Case, world: &World) -> Vec<&'static str> {
        let known = Known {
            groups: &world.groups,
            region: world.region,
            roles: &world.roles,
        };
        let reasons = passport.judge(case, &known);
        reasons.iter().map(|reason| reason.code).collect()
    }

    #[test]
    fn what_the_owner_allows_is_not_refused() {
        assert_eq!(codes(&passport(), &case(), &good()), [""; 0]);
    }

    #[test]
    fn each_clause_refuses_alone() {
        let with = |change: fn(&mut Case)| {
            let mut case = case();
            change(&mut case);
            codes(&passport(), &case, &good())
        };
        let claims = |change: fn(&mut Claims)| {
            let mut case = case();
            change(case.target_claims.as_mut().unwrap());
            codes(&passport(), &case, &good())
        };
        assert_eq!(
            with(|case| case.vm = uuid::Uuid::nil()),
            ["passport-other-vm"]
        );
        assert_eq!(
            with(|case| case.now_unix_s = 1_789_999_939),
            ["passport-early"]
        );
        assert_eq!(
            with(|case| case.now_unix_s = 1_890_000_001),
            ["passport-expired"]
        );
        assert_eq!(
            with(|case| case.strategy = Strategy::Hybrid),
            ["passport-strategy"]
        );
        assert_eq!(with(|case| case.post_copy = true), ["passport-post-copy"]);
        assert_eq!(with(|case| case.target_claims = None), ["evidence-missing"]);
        let other = |case: &mut Case| case.target = "spiffe://example.org/host/c".parse().unwrap();
        assert_eq!(with(other), ["passport-host"]);
        assert_eq!(claims(|claims| claims.age_s = 61), ["evidence-old"]);
        assert_eq!(
            claims(|claims| claims.boot = Sha256([0; 32])),
            ["boot-not-allowed"]
        );
        assert_eq!(
            claims(|claims| claims.hypervisor = None),
            ["hypervisor-not-allowed"]
        );
        assert_eq!(claims(|claims| claims.policy_version = 4), ["policy-old"]);
        let roles = World {
            roles: set(&["auditor"]),
            ..good()
        };
        assert_eq!(codes(&passport(), &case(), &roles), ["passport-role"]);
        for region in [Some("us"), None] {
            let world = World { region, ..good() };
            assert_eq!(codes(&passport(), &case(), &world), ["passport-region"]);
        }
    }

    #[test]
    fn a_host_is_allowed_by_its_name_or_by_its_group() {
        let mut elsewhere = case();
        elsewhere.target = "spiffe://example.org/host/c".parse().unwrap();
        let gold = World {
            groups: set(&["gold"]),
            ..good()
        };
        assert_eq!(codes(&passport(), &elsewhere, &gold), [""; 0]);
        let by_group_only = Passport {
            hosts: None,
            ..passport()
        };
        assert_eq!(codes(&by_group_only, &case(), &good()), ["passport-host"]);
        let by_name_only = Passport {
            groups: None,
            ..passport()
        };
        assert_eq!(codes(&by_name_only, &elsewhere, &gold), ["passport-host"]);
        let free = Passport {
            hosts: None,
            groups: None,
            ..passport()
        };
        assert_eq!(codes(&free, &elsewhere, &good()), [""; 0]);
    }

    #[test]
    fn a_passport_that_has_expired_keeps_nobody_from_ending_a_migration() {
        for action in [Action::Abort, Action::Erase] {
            let mut late = case();
            late.action = action;
            late.now_unix_s = 1_890_000_001;
            late.target_claims = None;
            assert_eq!(codes(&passport(), &late, &good()), [""; 0]);
            let nobody = World {
                roles: set(&[]),
                ..good()
            };
            assert_eq!(codes(&passport(), &late, &nobody), ["passport-role"]);
        }
    }

    #[test]
    fn all_reasons_are_told_at_once() {
        let mut odd = case();
        odd.strategy = Strategy::PostCopy;
        odd.target_claims.as_mut().unwrap().age_s = 1000;
        let world = World {
            groups: set(&[]),
            region: None,
            roles: set(&[]),
        };
        assert_eq!(
            codes(&passport(), &odd, &world),
            [
                "passport-role",
                "passport-region",
                "passport-strategy",
                "evidence-old"
            ]
        );
    }

    proptest! {
        /// Whoever leaves a clause out allows at least as much as before.
        #[test]
        fn a_clause_less_never_refuses_more(
            which in 0..7,
            now in 1_780_000_000_u64..1_900_000_000,
            (host, region, role) in (0..2, 0..2, 0..2),
            age_s in 0_u64..100,
            post_copy in any::<bool>(),
        ) {
            let mut case = case();
            case.now_unix_s = now;
            case.post_copy = post_copy;
            if host == 1 {
                case.target = "spiffe://example.org/host/c".parse().unwrap();
            }
            case.target_claims.as_mut().unwrap().age_s = age_s;
            let world = World {
                region: (region == 1).then_some("us"),
                roles: if role == 1 { set(&[]) } else { good().roles },
                ..good()
            };
            let mut looser = passport();
            match which {
                0 => (looser.hosts, looser.groups) = (None, None),
                1 => looser.regions = None,
                2 => looser.roles = None,
                3 => looser.strategies = None,
                4 => looser.attestation = None,
                5 => looser.expires_unix_s += 10_000_000,
                _ => looser.not_before_unix_s -= 10_000_000,
            }
            let (strict, loose) = (codes(&passport(), &case, &world), codes(&looser, &case, &world));
            prop_assert!(loose.iter().all(|code| strict.contains(code)), "{loose:?} {strict:?}");
        }
    }
}
