//! The provider's policies, in Cedar, together with the owner's passport: both must permit.
//!
//! Cedar denies what no policy permits, and a policy that forbids overrides all that permit. A policy whose evaluation
//! fails is skipped by Cedar, also one that forbids; here any such failure denies.

mod directory;
mod explain;
mod load;
mod rehearse;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use cedar_policy::{
    Authorizer, Context, Decision as CedarDecision, Entities, Entity, EntityUid, PolicySet,
    Request as CedarRequest, RestrictedExpression, Schema,
};
use palanquin_api::control::Strategy;
use uuid::Uuid;

pub use directory::{Directory, ENTRIES_MAX, Host, Operator, Vm};
pub use explain::{Explanation, Part, Trace};
pub use load::{
    FILE_MAX, FILES_MAX, Files, LoadError, NESTING_MAX, POLICIES_MAX, Problem, TOKENS_MAX,
};
pub use rehearse::{Expected, Rehearsal, RehearsalError, rehearsals};

use crate::approval::Approval;
use crate::decision::{Decision, Denied, Gate, Permit, Reason, Wish};
use crate::digest::Sha256;
use crate::evidence::{Role, VerifiedClaims};
use crate::identity::{Identity, Kind};
use crate::passport::{Known, LastPassport, Passport, UNIX_S_MAX, date, strategy_word};
use crate::signed::{Document, Verified};

/// What policies may speak of, in Cedar's language for schemas.
pub const SCHEMA: &str = include_str!("palanquin.cedarschema");
/// Longest time a permit is good for, in seconds, whatever it rests on.
pub const PERMIT_MAX_S: u64 = 3600;

/// Policies that were validated, and the directory they speak of.
pub struct Policies {
    set: PolicySet,
    schema: Schema,
    directory: Directory,
    sha256: Sha256,
    file_of: BTreeMap<String, String>,
}

/// What is asked, with what was verified.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What is to be done.
    pub wish: Wish<'a>,
    /// Who asks, as the channel has authenticated them.
    pub operator: &'a Identity,
    /// The owner's passport of the VM.
    pub passport: Option<&'a Verified<Passport>>,
    /// The newest that this host has seen before.
    pub last_passport: Option<&'a LastPassport>,
    /// What other operators have agreed to.
    pub approvals: &'a [Verified<Approval>],
    /// What the source has proven.
    pub source_claims: Option<&'a VerifiedClaims>,
    /// What the target has proven.
    pub target_claims: Option<&'a VerifiedClaims>,
    /// Whether this was permitted before and is judged anew: the source is asked for evidence only once, at the beginning, and
    /// that it has got older since does not count against it. Policies see how old it is.
    pub under_way: bool,
    /// Seconds since 1970.
    pub now_unix_s: u64,
}

/// The facts of one case, wherever they come from. What is decided on it is no permission: only [`Policies::decide`] takes
/// these from what was verified, and gives one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// What is to be done.
    pub action: crate::Action,
    /// Who asks.
    pub operator: Identity,
    /// To which VM.
    pub vm: Uuid,
    /// What its owner allows.
    pub passport: Option<Passport>,
    /// Others who agree.
    pub approvers: BTreeSet<Identity>,
    /// Where the VM is.
    pub source: Identity,
    /// Where it will be.
    pub target: Identity,
    /// What is known of the source.
    pub source_claims: Option<Claims>,
    /// What is known of the target.
    pub target_claims: Option<Claims>,
    /// How the pages are moved.
    pub strategy: Strategy,
    /// Whether the VM may run on the target before all of its pages are there.
    pub post_copy: bool,
    /// Seconds since 1970.
    pub now_unix_s: u64,
}

/// What policies and passports see of claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Seconds since they were verified.
    pub age_s: u64,
    /// Digest over the quoted registers.
    pub boot: Sha256,
    /// Digest of the hypervisor's binary, where it was measured.
    pub hypervisor: Option<Sha256>,
    /// Version of that host's policies.
    pub policy_version: u64,
}

impl fmt::Debug for Policies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Policies({} of {})", self.file_of.len(), self.sha256)
    }
}

impl Policies {
    /// Digest of schema, policies and directory, for the journal and for orders.
    pub fn sha256(&self) -> Sha256 {
        self.sha256
    }

    /// The directory.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The names of all policies, and the file of each.
    pub fn names(&self) -> &BTreeMap<String, String> {
        &self.file_of
    }

    /// Whether any policy looks at what a target has proven.
    pub fn look_at_targets(&self) -> bool {
        let mut policies = self.set.policies();
        policies.any(|policy| policy.to_string().contains("targetAttestation"))
    }

    /// Decides.
    ///
    /// # Errors
    ///
    /// It is refused; the decision has every reason.
    pub fn decide(&self, request: &Request<'_>) -> Result<Permit, Box<Denied>> {
        let Request {
            wish, now_unix_s, ..
        } = *request;
        let mut reasons = Vec::new();
        let mut expires_unix_s = now_unix_s.saturating_add(PERMIT_MAX_S);
        let mut until = |unix_s: u64| expires_unix_s = expires_unix_s.min(unix_s);
        if let (Some(passport), Some(last)) = (request.passport, request.last_passport)
            && let Err(error) = passport.follows(last)
        {
            let remedy = "Give the newest passport of this VM.";
            let reason = Reason::new(
                Gate::Passport,
                "passport-not-newest",
                error.to_string(),
                remedy,
            );
            reasons.push(reason);
        }
        if let Some(passport) = request.passport.filter(|_| wish.action.brings()) {
            until(passport.expires_unix_s);
        }
        let approvals: Vec<_> = request
            .approvals
            .iter()
            .filter(|approval| {
                approval.is_for(&wish) && approval.window().check(now_unix_s).is_ok()
            })
            .collect();
        approvals
            .iter()
            .for_each(|approval| until(approval.expires_unix_s));
        let mut claims = |claims: Option<&VerifiedClaims>, host: &Identity, role| {
            let claims = claims?;
            let is_kept = request.under_way && role == Role::Source;
            let at_unix_s = if is_kept {
                claims.verified_unix_s()
            } else {
                now_unix_s
            };
            if let Some(reason) = judge_claims(claims, host, role, &wish, at_unix_s) {
                reasons.push(reason);
                return None;
            }
            if !is_kept {
                until(claims.expires_unix_s());
            }
            let demands = request
                .passport
                .and_then(|passport| passport.attestation.as_ref());
            if let Some(demands) = demands.filter(|_| role == Role::Target) {
                until(claims.verified_unix_s().saturating_add(demands.max_age_s));
            }
            Some(Claims {
                age_s: now_unix_s.saturating_sub(claims.verified_unix_s()),
                boot: claims.quote().pcr_digest,
                hypervisor: claims.measured().hypervisor,
                policy_version: claims.measured().policy_version,
            })
        };
        let case = Case {
            action: wish.action,
            operator: request.operator.clone(),
            vm: wish.vm,
            passport: request.passport.map(|passport| (**passport).clone()),
            approvers: approvals.iter().map(|a| a.operator.clone()).collect(),
            source: wish.source.clone(),
            target: wish.target.clone(),
            source_claims: claims(request.source_claims, wish.source, Role::Source),
            target_claims: claims(request.target_claims, wish.target, Role::Target),
            strategy: wish.strategy,
            post_copy: wish.post_copy,
            now_unix_s,
        };
        let mut decision = self.rehearse(&case);
        decision.passport_sha256 = request.passport.map(Verified::sha256);
        decision.reasons.splice(0..0, reasons);
        decision.permitted = decision.permitted && decision.reasons.is_empty();
        if !decision.permitted {
            return Err(Box::new(Denied(decision)));
        }
        Ok(Permit {
            decision,
            source: case.source,
            target: case.target,
            strategy: case.strategy,
            post_copy: case.post_copy,
            expires_unix_s,
        })
    }

    /// What would be decided on such a case. It permits nothing.
    pub fn rehearse(&self, case: &Case) -> Decision {
        on_a_deep_stack(|| self.judge(case))
    }

    fn judge(&self, case: &Case) -> Decision {
        let mut reasons = self.strangers(case);
        let mut permitted_by = Vec::new();
        match &case.passport {
            Some(passport) => {
                let (host, operator) = (Host::default(), Operator::default());
                let host = self.directory.hosts.get(&case.target).unwrap_or(&host);
                let known = Known {
                    groups: &host.groups,
                    region: host.region.as_deref(),
                    roles: &self
                        .directory
                        .operators
                        .get(&case.operator)
                        .unwrap_or(&operator)
                        .roles,
                };
                reasons.extend(passport.judge(case, &known));
                permitted_by = self.ask(case, passport, &mut reasons);
            }
            None => reasons.push(Reason::new(
                Gate::Passport,
                "passport-missing",
                "the VM has no passport of its owner",
                "Give it one: `palanquin passport sign`.",
            )),
        }
        Decision {
            permitted: reasons.is_empty() && !permitted_by.is_empty(),
            action: case.action,
            operator: case.operator.clone(),
            vm: case.vm,
            permitted_by,
            reasons,
            policy_sha256: self.sha256,
            passport_sha256: None,
            decided_unix_s: case.now_unix_s,
        }
    }

    /// Whom the directory does not know.
    fn strangers(&self, case: &Case) -> Vec<Reason> {
        let remedy = "Enter it into directory.toml, or use another.";
        let stranger = |code, who: &Identity, kind: Kind| {
            let message = format!("{who} is no {} that the directory knows", kind.word());
            Reason::new(Gate::Identity, code, message, remedy)
        };
        let mut reasons = Vec::new();
        if !self.directory.operators.contains_key(&case.operator) {
            reasons.push(stranger("operator-unknown", &case.operator, Kind::Operator));
        }
        let hosts: BTreeSet<_> = [&case.source, &case.target].into();
        for host in hosts {
            // What ends a migration must not need a directory that is up to date.
            if case.action.brings() && !self.directory.hosts.contains_key(host) {
                reasons.push(stranger("host-unknown", host, Kind::Host));
            }
        }
        reasons
    }

    /// Asks Cedar; the policies that permit it.
    fn ask(&self, case: &Case, passport: &Passport, reasons: &mut Vec<Reason>) -> Vec<String> {
        let failed = |message: String| {
            Reason::new(
                Gate::Policy,
                "policy-error",
                message,
                "Mend the policy; `palanquin policy explain` shows it.",
            )
        };
        let (request, entities) = match self.question(case, passport) {
            Ok(question) => question,
            Err(message) => {
                reasons.push(failed(format!(
                    "the case can't be put to the policies: {message}"
                )));
                return Vec::new();
            }
        };
        let response = Authorizer::new().is_authorized(&request, &self.set, &entities);
        let before = reasons.len();
        for error in response.diagnostics().errors() {
            let cedar_policy::AuthorizationError::PolicyEvaluationError(error) = error;
            let mut reason = failed(format!(
                "policy {} can't be evaluated: {}",
                error.policy_id(),
                error.inner()
            ));
            reason.policy = Some(error.policy_id().to_string());
            reasons.push(reason);
        }
        let mut determining: Vec<_> = response.diagnostics().reason().cloned().collect();
        determining.sort();
        if response.decision() == CedarDecision::Allow {
            let names = determining.iter().map(ToString::to_string);
            return if reasons.len() == before {
                names.collect()
            } else {
                Vec::new()
            };
        }
        for id in &determining {
            let because = self.set.annotation(id, "reason").unwrap_or_default();
            let message = match because {
                "" => format!("policy {id} forbids it"),
                because => format!("policy {id} forbids it: {because}"),
            };
            let remedy = self.set.annotation(id, "remedy");
            let remedy = remedy.filter(|remedy| !remedy.is_empty());
            let remedy =
                remedy.unwrap_or("`palanquin policy explain` shows which condition it is.");
            let mut reason = Reason::new(Gate::Policy, "policy-forbids", message, remedy);
            reason.policy = Some(id.to_string());
            reasons.push(reason);
        }
        if determining.is_empty() {
            reasons.push(Reason::new(
                Gate::Policy,
                "policy-no-permit",
                format!(
                    "no policy permits {} to {} this VM",
                    case.operator, case.action
                ),
                "`palanquin policy explain` shows what each policy that permits asks for.",
            ));
        }
        Vec::new()
    }

    /// The case in Cedar's terms.
    fn question(
        &self,
        case: &Case,
        passport: &Passport,
    ) -> Result<(CedarRequest, Entities), String> {
        let operator = uid("Operator", &case.operator)?;
        let vm = uid("Vm", &case.vm)?;
        let request = CedarRequest::new(
            operator,
            uid("Action", &case.action)?,
            vm,
            self.context(case)?,
            Some(&self.schema),
        )
        .map_err(|error| error.to_string())?;
        let entities = Entities::from_entities(self.entities(case, passport)?, Some(&self.schema))
            .map_err(|error| error.to_string())?;
        Ok((request, entities))
    }

    fn context(&self, case: &Case) -> Result<Context, String> {
        let roles: BTreeSet<_> = self
            .approvers(case)
            .flat_map(|operator| &operator.roles)
            .collect();
        let roles: Vec<_> = roles
            .into_iter()
            .map(|role| uid("Role", role).map(RestrictedExpression::new_entity_uid))
            .collect::<Result<_, _>>()?;
        let host = |host| uid("Host", host).map(RestrictedExpression::new_entity_uid);
        let now = date(case.now_unix_s.min(UNIX_S_MAX));
        let mut pairs = vec![
            ("source".to_owned(), host(&case.source)?),
            ("target".to_owned(), host(&case.target)?),
            (
                "strategy".to_owned(),
                RestrictedExpression::new_string(strategy_word(case.strategy)),
            ),
            (
                "postCopy".to_owned(),
                RestrictedExpression::new_bool(case.post_copy),
            ),
            (
                "approvals".to_owned(),
                long(self.approvers(case).count() as u64),
            ),
            (
                "approverRoles".to_owned(),
                RestrictedExpression::new_set(roles),
            ),
            ("policyVersion".to_owned(), long(self.directory.version)),
            ("now".to_owned(), RestrictedExpression::new_datetime(now)),
        ];
        let claims = [
            ("sourceAttestation", &case.source_claims),
            ("targetAttestation", &case.target_claims),
        ];
        for (name, claims) in claims {
            if let Some(claims) = claims {
                pairs.push((name.to_owned(), claims.to_record()?));
            }
        }
        Context::from_pairs(pairs).map_err(|error| error.to_string())
    }

    /// Others than the operator who agree and are known.
    fn approvers<'a>(&'a self, case: &'a Case) -> impl Iterator<Item = &'a Operator> {
        let others = case
            .approvers
            .iter()
            .filter(|other| **other != case.operator);
        others.filter_map(|other| self.directory.operators.get(other))
    }

    fn entities(&self, case: &Case, passport: &Passport) -> Result<Vec<Entity>, String> {
        let string = |text: &str| RestrictedExpression::new_string(text.to_owned());
        let entity = |uid, attrs: Vec<(&str, RestrictedExpression)>, parents| {
            let attrs = attrs
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value));
            Entity::new(uid, attrs.collect(), parents).map_err(|error| error.to_string())
        };
        let parents = |kind: &str, names: &BTreeSet<String>| {
            names
                .iter()
                .map(|name| uid(kind, name))
                .collect::<Result<HashSet<_>, _>>()
        };
        let stranger = Operator::default();
        let operator = self
            .directory
            .operators
            .get(&case.operator)
            .unwrap_or(&stranger);
        let tenants: Vec<_> = operator
            .tenants
            .iter()
            .map(|tenant| uid("Tenant", tenant).map(RestrictedExpression::new_entity_uid))
            .collect::<Result<_, _>>()?;
        let mut entities = vec![entity(
            uid("Operator", &case.operator)?,
            vec![
                ("domain", string(case.operator.trust_domain())),
                ("tenants", RestrictedExpression::new_set(tenants)),
            ],
            parents("Role", &operator.roles)?,
        )?];
        let unknown = Host {
            quarantined: true,
            ..Host::default()
        };
        let hosts: BTreeSet<_> = [&case.source, &case.target].into();
        for identity in hosts {
            let host = self.directory.hosts.get(identity).unwrap_or(&unknown);
            let mut attributes = vec![
                ("domain", string(identity.trust_domain())),
                (
                    "quarantined",
                    RestrictedExpression::new_bool(host.quarantined),
                ),
            ];
            attributes.extend(
                host.region
                    .as_ref()
                    .map(|region| ("region", string(region))),
            );
            let groups = parents("HostGroup", &host.groups)?;
            entities.push(entity(uid("Host", identity)?, attributes, groups)?);
        }
        let vm = self.directory.vms.get(&case.vm);
        let tenant = RestrictedExpression::new_entity_uid(uid("Tenant", &passport.owner)?);
        let attributes = vec![
            ("tenant", tenant),
            ("sensitivity", long(passport.sensitivity.into())),
            (
                "legalHold",
                RestrictedExpression::new_bool(vm.is_some_and(|vm| vm.legal_hold)),
            ),
        ];
        entities.push(entity(uid("Vm", &case.vm)?, attributes, HashSet::new())?);
        Ok(entities)
    }
}

impl Claims {
    fn to_record(&self) -> Result<RestrictedExpression, String> {
        let digest = |digest: &Sha256| RestrictedExpression::new_string(digest.to_string());
        let mut fields = vec![
            ("ageS".to_owned(), long(self.age_s)),
            ("boot".to_owned(), digest(&self.boot)),
            ("policyVersion".to_owned(), long(self.policy_version)),
        ];
        let hypervisor = self.hypervisor.as_ref().map(digest);
        fields.extend(hypervisor.map(|digest| ("hypervisor".to_owned(), digest)));
        RestrictedExpression::new_record(fields).map_err(|error| error.to_string())
    }
}

/// Runs `work` with at least 2 MiB of stack, whatever thread this is. Cedar recurses, and where the stack is short it does
/// not only end the process: its validator finds nothing wrong any more, without a word.
fn on_a_deep_stack<T>(work: impl FnOnce() -> T) -> T {
    stacker::maybe_grow(2 << 20, 8 << 20, work)
}

fn long(number: u64) -> RestrictedExpression {
    RestrictedExpression::new_long(i64::try_from(number).unwrap_or(i64::MAX))
}

fn uid(kind: &str, id: &dyn fmt::Display) -> Result<EntityUid, String> {
    let kind = kind
        .parse()
        .map_err(|error: cedar_policy::ParseErrors| error.to_string())?;
    Ok(EntityUid::from_type_name_and_id(
        kind,
        cedar_policy::EntityId::new(id.to_string()),
    ))
}

/// Whether claims are this host's, in this part, for this VM, and still believed.
fn judge_claims(
    claims: &VerifiedClaims,
    host: &Identity,
    role: Role,
    wish: &Wish<'_>,
    now_unix_s: u64,
) -> Option<Reason> {
    let asked = claims.challenge();
    let refused = |code, message: String| {
        let remedy = "Ask the host for evidence anew.";
        Some(Reason::new(Gate::Attestation, code, message, remedy))
    };
    if (&asked.host, asked.role, asked.vm) != (host, role, wish.vm) {
        return refused(
            "evidence-other",
            format!("the evidence is not {host}'s for this VM"),
        );
    }
    if now_unix_s > claims.expires_unix_s() {
        return refused(
            "evidence-expired",
            format!("the evidence of {host} is not believed any more"),
        );
    }
    None
}

#[cfg(test)]
pub(crate) mod tests;
