//! Policies and passports together.

use palanquin_api::control::Strategy;
use proptest::prelude::*;

use super::*;
use crate::approval::tests::approval;
use crate::evidence::tests::{challenge, claims};
use crate::keys::tests::signer;
use crate::passport::tests::passport;
use crate::{Action, Keyring, Sign, Signed};

const NOW: u64 = 1_800_000_010;

const POLICIES: &str = r#"
@id("p1")
permit(principal in Role::"migrator", action in [Action::"migrateOut", Action::"migrateIn", Action::"adopt"], resource)
when { principal.tenants.contains(resource.tenant) };

@id("p2")
permit(principal, action in [Action::"abort", Action::"erase"], resource);

@id("f1")
@reason("the target has not proven what it runs within the last minute")
forbid(principal, action in [Action::"migrateOut", Action::"migrateIn"], resource)
unless { context has targetAttestation && context.targetAttestation.ageS <= 60 };

@id("f2")
@reason("the VM is held for a court")
@remedy("Ask the legal department.")
forbid(principal, action, resource) when { resource.legalHold };

@id("f3")
forbid(principal, action == Action::"migrateOut", resource)
when { resource.sensitivity >= 4 && !(context.approvals >= 1 && context.approverRoles.contains(Role::"officer")) };
"#;

const DIRECTORY: &str = r#"
version = 7
roles = ["migrator", "officer"]
groups = ["gold"]
[operators."spiffe://example.org/operator/alice"]
roles = ["migrator"]
tenants = ["spiffe://example.org/owner/acme"]
[operators."spiffe://example.org/operator/bob"]
roles = ["officer"]
[hosts."spiffe://example.org/host/alpha"]
region = "de"
[hosts."spiffe://example.org/host/beta"]
groups = ["gold"]
region = "de"
[vms.03030303-0303-0303-0303-030303030303]
legal-hold = true
"#;

pub(crate) fn files() -> Files {
    Files {
        policies: [("p.cedar".to_owned(), POLICIES.to_owned())].into(),
        directory: DIRECTORY.to_owned(),
    }
}

fn policies() -> Policies {
    Policies::load(&files()).unwrap()
}

fn id(uri: &str) -> Identity {
    format!("spiffe://example.org/{uri}").parse().unwrap()
}

/// One that passport and policies permit.
pub(crate) fn case() -> Case {
    Case {
        action: Action::MigrateOut,
        operator: id("operator/alice"),
        vm: passport().vm,
        passport: Some(passport()),
        approvers: BTreeSet::new(),
        source: id("host/alpha"),
        target: id("host/beta"),
        source_claims: None,
        target_claims: Some(Claims {
            age_s: 10,
            boot: Sha256([7; 32]),
            hypervisor: Some(Sha256([8; 32])),
            policy_version: 5,
        }),
        strategy: Strategy::Auto,
        post_copy: false,
        now_unix_s: NOW,
    }
}

fn because(case: &Case) -> Vec<String> {
    policies().rehearse(case).because().into_iter().collect()
}

#[test]
fn both_the_provider_and_the_owner_must_permit() {
    let decision = policies().rehearse(&case());
    assert!(decision.permitted, "{:?}", decision.reasons);
    assert_eq!(decision.permitted_by, ["p1"]);
    assert_eq!(decision.policy_sha256, policies().sha256());
    let mut owner_refuses = case();
    owner_refuses.passport.as_mut().unwrap().regions = Some(vec!["fr".to_owned()]);
    assert_eq!(because(&owner_refuses), ["passport-region"]);
    let mut provider_refuses = case();
    provider_refuses.passport.as_mut().unwrap().attestation = None;
    provider_refuses.target_claims = None;
    assert_eq!(because(&provider_refuses), ["f1"]);
    let mut both = case();
    both.target_claims = None;
    both.passport.as_mut().unwrap().vm = Uuid::nil();
    assert_eq!(
        because(&both),
        ["evidence-missing", "f1", "passport-other-vm"]
    );
}

#[test]
fn what_no_policy_permits_is_refused() {
    let mut stranger = case();
    stranger.operator = id("operator/bob");
    stranger.passport.as_mut().unwrap().roles = None;
    assert_eq!(because(&stranger), ["policy-no-permit"]);
    let mut tenant = case();
    tenant.passport.as_mut().unwrap().owner = id("owner/other");
    assert_eq!(because(&tenant), ["policy-no-permit"]);
    let empty = Files {
        policies: BTreeMap::new(),
        ..files()
    };
    let decision = Policies::load(&empty).unwrap().rehearse(&case());
    assert!(!decision.permitted);
}

#[test]
fn a_policy_that_forbids_tells_why_and_what_to_do() {
    let mut held = case();
    held.vm = Uuid::from_bytes([3; 16]);
    held.passport.as_mut().unwrap().vm = held.vm;
    for action in Action::ALL {
        held.action = action;
        let decision = policies().rehearse(&held);
        assert!(!decision.permitted);
        let reason = decision
            .reasons
            .iter()
            .find(|r| r.policy.as_deref() == Some("f2"))
            .unwrap();
        assert_eq!(
            reason.message,
            "policy f2 forbids it: the VM is held for a court"
        );
        assert_eq!(reason.remedy, "Ask the legal department.");
    }
}

#[test]
fn a_second_person_is_another_one_who_is_known_and_has_the_role() {
    let mut secret = case();
    secret.passport.as_mut().unwrap().sensitivity = 4;
    assert_eq!(because(&secret), ["f3"]);
    for (who, expected) in [("alice", "f3"), ("mallory", "f3"), ("bob", "p1")] {
        secret.approvers = [id(&format!("operator/{who}"))].into();
        assert_eq!(because(&secret), [expected], "{who}");
    }
}

#[test]
fn whom_the_directory_does_not_know_is_a_stranger() {
    let mut odd = case();
    odd.operator = id("operator/mallory");
    odd.target = id("host/m");
    let decision = policies().rehearse(&odd);
    let codes: Vec<_> = decision
        .reasons
        .iter()
        .map(|reason| (reason.gate, reason.code))
        .collect();
    assert_eq!(
        codes[..2],
        [
            (Gate::Identity, "operator-unknown"),
            (Gate::Identity, "host-unknown")
        ]
    );
    odd.operator = id("operator/alice");
    odd.action = Action::Abort;
    assert_eq!(because(&odd), ["p2"]);
}

#[test]
fn a_policy_that_fails_when_it_is_evaluated_denies_also_where_it_would_forbid() {
    let mut files = files();
    // Validation can't see that a sum is too large.
    let text = "@id(\"f9\") forbid(principal, action, resource) when { 9223372036854775807 + resource.sensitivity < 0 };";
    files
        .policies
        .insert("f9.cedar".to_owned(), text.to_owned());
    let policies = Policies::load(&files).unwrap();
    let decision = policies.rehearse(&case());
    assert!(!decision.permitted && decision.permitted_by.is_empty());
    let reason = &decision.reasons[0];
    assert_eq!(
        (reason.code, reason.policy.as_deref()),
        ("policy-error", Some("f9"))
    );
    // Where the sum fits nothing fails.
    let mut public = case();
    public.passport.as_mut().unwrap().sensitivity = 0;
    assert!(policies.rehearse(&public).permitted);
}

fn verified<T: Document>(document: &T, seed: u8) -> Verified<T> {
    let mut ring = Keyring::default();
    ring.insert(document.signer().clone(), signer(seed).public_key())
        .unwrap();
    Signed::sign(document, &signer(seed))
        .unwrap()
        .verify_lapsed(&ring)
        .unwrap()
}

struct World {
    operator: Identity,
    source: Identity,
    target: Identity,
    passport: Verified<Passport>,
    target_claims: VerifiedClaims,
}

impl World {
    fn new() -> Self {
        Self {
            operator: id("operator/alice"),
            source: id("host/alpha"),
            target: id("host/beta"),
            passport: verified(&passport(), 1),
            target_claims: claims(challenge(), NOW - 10),
        }
    }

    fn request(&self) -> Request<'_> {
        Request {
            wish: Wish {
                action: Action::MigrateOut,
                vm: passport().vm,
                source: &self.source,
                target: &self.target,
                strategy: Strategy::Auto,
                post_copy: false,
            },
            operator: &self.operator,
            passport: Some(&self.passport),
            last_passport: None,
            approvals: &[],
            source_claims: None,
            target_claims: Some(&self.target_claims),
            under_way: false,
            now_unix_s: NOW,
        }
    }
}

fn codes(denied: Result<Permit, Box<Denied>>) -> Vec<&'static str> {
    denied
        .unwrap_err()
        .0
        .reasons
        .iter()
        .map(|reason| reason.code)
        .collect()
}

#[test]
fn a_permit_is_for_exactly_what_was_asked_and_for_a_while() {
    let world = World::new();
    let permit = policies().decide(&world.request()).unwrap();
    assert_eq!(
        permit.decision().passport_sha256,
        Some(world.passport.sha256())
    );
    // The owner believes evidence for a minute; it is ten seconds old.
    assert_eq!(permit.expires_unix_s(), NOW + 50);
    let wish = world.request().wish;
    assert_eq!(permit.covers(&wish, NOW + 50), Ok(()));
    assert!(permit.covers(&wish, NOW + 51).is_err());
    let others = [
        Wish {
            action: Action::MigrateIn,
            ..wish
        },
        Wish {
            vm: Uuid::nil(),
            ..wish
        },
        Wish {
            source: &world.target,
            ..wish
        },
        Wish {
            target: &world.source,
            ..wish
        },
        Wish {
            strategy: Strategy::PreCopy,
            ..wish
        },
        Wish {
            post_copy: true,
            ..wish
        },
    ];
    for other in others {
        assert!(permit.covers(&other, NOW).is_err(), "{other:?}");
    }
}

#[test]
fn claims_of_another_host_part_or_vm_or_of_yesterday_are_none() {
    let world = World::new();
    let with = |change: fn(&mut crate::evidence::Challenge), at| {
        let mut asked = challenge();
        change(&mut asked);
        let claims = claims(asked, at);
        let request = Request {
            target_claims: Some(&claims),
            ..world.request()
        };
        codes(policies().decide(&request))[0]
    };
    assert_eq!(
        with(|asked| asked.host = id("host/c"), NOW),
        "evidence-other"
    );
    assert_eq!(
        with(|asked| asked.role = Role::Source, NOW),
        "evidence-other"
    );
    assert_eq!(with(|asked| asked.vm = Uuid::nil(), NOW), "evidence-other");
    assert_eq!(with(|_| {}, NOW - 601), "evidence-expired");
    assert_eq!(with(|_| {}, NOW - 61), "evidence-old");
}

#[test]
fn a_passport_that_is_missing_older_or_expired_is_refused() {
    let world = World::new();
    let none = Request {
        passport: None,
        ..world.request()
    };
    assert_eq!(codes(policies().decide(&none)), ["passport-missing"]);
    let newer = verified(
        &Passport {
            version: 4,
            ..passport()
        },
        1,
    )
    .to_last();
    let stale = Request {
        last_passport: Some(&newer),
        ..world.request()
    };
    assert_eq!(codes(policies().decide(&stale)), ["passport-not-newest"]);
    let late = Request {
        now_unix_s: passport().expires_unix_s + 1,
        ..world.request()
    };
    assert!(codes(policies().decide(&late)).contains(&"passport-expired"));
}

#[test]
fn approvals_count_while_they_hold_and_for_what_they_are() {
    let mut world = World::new();
    world.passport = verified(
        &Passport {
            sensitivity: 4,
            ..passport()
        },
        1,
    );
    let decide = |approval: &Approval| {
        let approvals = [verified(approval, 2)];
        let request = Request {
            approvals: &approvals,
            ..world.request()
        };
        policies()
            .decide(&request)
            .map(|permit| permit.expires_unix_s())
    };
    let soon = Approval {
        expires_unix_s: NOW + 20,
        ..approval()
    };
    assert_eq!(decide(&soon), Ok(NOW + 20));
    let expired = Approval {
        expires_unix_s: NOW - 1,
        ..approval()
    };
    let other = Approval {
        vm: Uuid::nil(),
        ..approval()
    };
    for useless in [expired, other] {
        assert!(decide(&useless).is_err());
    }
}

#[test]
fn a_refusal_names_gate_code_and_sentence() {
    let mut world = World::new();
    world.target = id("host/m");
    let text = policies().decide(&world.request()).unwrap_err().to_string();
    assert!(text.starts_with("migrateOut of VM 02020202-"), "{text}");
    assert!(
        text.contains("identity (host-unknown): spiffe://example.org/host/m is no host"),
        "{text}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No case is permitted that the owner's passport alone refuses, or without a policy that permits it.
    #[test]
    fn nothing_is_permitted_that_one_of_both_refuses(
        (operator, source, target) in (0..3usize, 0..3usize, 0..3usize),
        action in prop::sample::select(Action::ALL.to_vec()),
        strategy in prop::sample::select(vec![Strategy::Auto, Strategy::PreCopy, Strategy::Hybrid]),
        (post_copy, has_claims, approved) in any::<(bool, bool, bool)>(),
        (age_s, sensitivity) in (0_u64..120, 0_u8..=4),
        now_unix_s in prop::sample::select(vec![NOW, 0, u64::MAX]),
    ) {
        let hosts = ["host/alpha", "host/beta", "host/m"];
        let mut case = Case {
            action,
            operator: id(["operator/alice", "operator/bob", "operator/m"][operator]),
            source: id(hosts[source]),
            target: id(hosts[target]),
            strategy,
            post_copy,
            now_unix_s,
            ..case()
        };
        case.passport.as_mut().unwrap().sensitivity = sensitivity;
        case.target_claims.as_mut().unwrap().age_s = age_s;
        if !has_claims {
            case.target_claims = None;
        }
        if approved {
            case.approvers.insert(id("operator/bob"));
        }
        let decision = policies().rehearse(&case);
        prop_assert_eq!(decision.permitted, decision.reasons.is_empty());
        prop_assert_eq!(decision.permitted, !decision.permitted_by.is_empty() && decision.reasons.is_empty());
        if decision.permitted && action.brings() {
            prop_assert_eq!((operator, now_unix_s), (0, NOW));
            prop_assert!(target == 1 && source < 2);
            prop_assert!(case.target_claims.is_some_and(|claims| claims.age_s <= 60));
            if action != Action::Adopt {
                prop_assert!(!post_copy && strategy != Strategy::Hybrid);
            }
            prop_assert!(sensitivity < 4 || action != Action::MigrateOut || approved);
        }
        // Denials by Cedar are never errors: the policies are validated.
        prop_assert!(decision.reasons.iter().all(|reason| reason.code != "policy-error"));
    }
}
