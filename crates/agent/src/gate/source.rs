//! The source: may this VM leave, and is the target still one to which it may go?

use palanquin_api::control::{Allow, StartMigration, Strategy};
use palanquin_engine::Order;
use palanquin_trust::decision::{Action, Gate, Reason};
use palanquin_trust::evidence::{Measured, Role};
use palanquin_trust::{Identity, Kind, Order as SignedOrder, Sha256, Signed, VerifiedClaims};
use uuid::Uuid;

use super::credentials::Credentials;
use super::evidence::Question;
use super::journal::Subject;
use super::passports::{judges_nothing, not_journaled, verify_approval};
use super::{Ask, Books, Clearance, Gatekeeper, Proven, Refusal};
use crate::agent::Agent;
use crate::operations::Answer;
use std::sync::Arc;

/// A VM may leave: what that rests on.
#[derive(Debug)]
pub struct OutClearance {
    out: Clearance,
    /// What the move leaves behind is removed: judged before, because nothing may stand in its way after the commit.
    erase: Clearance,
    order: Signed<SignedOrder>,
    /// What the target has proven.
    claims: Option<VerifiedClaims>,
}

impl OutClearance {
    /// Who has ordered it.
    pub(super) fn operator(&self) -> &Identity {
        &self.out.operator
    }

    /// Where the VM goes.
    pub(super) fn target(&self) -> &Identity {
        &self.out.ask.target
    }

    /// Digest of the signed order, to which evidence is bound.
    pub fn order_sha256(&self) -> Sha256 {
        Sha256::of(self.order.as_bytes())
    }

    /// What speaks for the order at the destination, but for evidence.
    pub fn credentials(&self) -> Credentials {
        let approvals = self.out.approvals.iter();
        Credentials {
            order: self.order.as_bytes().to_vec().into(),
            passport: self.out.passport.as_signed_bytes().to_vec().into(),
            approvals: approvals
                .map(|approval| approval.as_signed_bytes().to_vec().into())
                .collect(),
            evidence: Vec::new().into(),
        }
    }
}

/// The credentials with this evidence, as they travel.
///
/// # Errors
///
/// They are longer than the protocol carries.
pub fn encoded(credentials: Credentials, evidence: Vec<u8>) -> Result<Vec<u8>, Reason> {
    let credentials = Credentials {
        evidence: evidence.into(),
        ..credentials
    };
    credentials.to_bytes().map_err(|error| {
        let remedy = "Ask the owner for a shorter passport, or give fewer approvals.";
        Reason::new(Gate::Passport, "credentials", error.to_string(), remedy)
    })
}

/// Whether both say the same of what a host runs.
fn is_unchanged(before: &VerifiedClaims, now: &VerifiedClaims) -> bool {
    let of = |claims: &VerifiedClaims| {
        let measured = claims.measured().clone();
        // A container is empty only at its beginning.
        let measured = Measured {
            container: None,
            ..measured
        };
        (claims.quote().pcr_digest, measured)
    };
    of(before) == of(now)
}

/// Whether the VM may run on the destination before all of its pages are there.
fn may_post_copy(request: &StartMigration) -> bool {
    matches!(request.strategy, Strategy::PostCopy | Strategy::Hybrid)
        || request.allow.contains(&Allow::PostCopy)
}

impl Gatekeeper {
    fn sign(&self, order: &SignedOrder) -> Result<Signed<SignedOrder>, Reason> {
        let judged = self.judged.as_ref();
        let signer = judged.map(|judged| &judged.signer);
        let signed = signer.map(|signer| Signed::sign(order, signer));
        let why = match signed {
            Some(Ok(signed)) => return Ok(signed),
            Some(Err(error)) => error.to_string(),
            None => "nothing is judged".to_owned(),
        };
        Err(Reason::new(
            Gate::Identity,
            "order-unsigned",
            format!("this host does not sign the order: {why}"),
            "Look at the agent's log.",
        ))
    }
}

impl Agent {
    /// Judges whether a VM may leave; absent where nothing is judged. Journaled, unless it is only tried.
    ///
    /// # Errors
    ///
    /// A gate refuses.
    pub fn clear_out(
        &self,
        operator: Option<&Identity>,
        order: &Order,
        request: &StartMigration,
        tried: bool,
    ) -> Answer<Option<OutClearance>> {
        let (Some(books), Some(operator)) = (self.gate.books(), operator) else {
            return if request.approvals.is_empty() {
                Ok(None)
            } else {
                Err(judges_nothing())
            };
        };
        let what = format!("moving VM {:?} to {}", order.vm_name, order.destination);
        let shown = operator.to_string();
        let subject = Subject {
            action: Action::MigrateOut,
            operator: &shown,
            vm: Some(Uuid::from_bytes(order.vm.0)),
            migration: Some(order.migration),
        };
        match self.judge_out(&books, operator, order, request) {
            Ok(cleared) => {
                let decided = [&cleared.out, &cleared.erase]
                    .into_iter()
                    .filter(|clearance| clearance.decision().is_some());
                for clearance in decided {
                    if !tried && !self.note_clearance(clearance, Some(order.migration)) {
                        return Err(not_journaled());
                    }
                }
                Ok(Some(cleared))
            }
            Err(refused) if tried => Err(super::refusal(&what, &refused.reasons)),
            Err(refused) => Err(self.refused_here(&subject, &refused, &what)),
        }
    }

    fn judge_out(
        &self,
        books: &Arc<Books>,
        operator: &Identity,
        order: &Order,
        request: &StartMigration,
    ) -> Result<OutClearance, Refusal> {
        let (host, now) = (self.gate.host(), self.unix_s());
        let vm = Uuid::from_bytes(order.vm.0);
        let target = Identity::new(host.trust_domain(), Kind::Host, &order.destination);
        let target = target.map_err(|error| {
            let remedy = "Check the names of both hosts.";
            Reason::new(Gate::Identity, "host-unknown", error.to_string(), remedy)
        })?;
        self.refuse_liar(&target)?;
        let approvals = request.approvals.iter();
        let approvals = approvals
            .map(|approval| verify_approval(books, &approval.0))
            .collect::<Result<Vec<_>, _>>()?;
        let (passport, last) = self.passport_of(books, vm)?;
        let passport_sha256 = passport.sha256();
        let ask = |action| Ask {
            action,
            vm,
            source: host.clone(),
            target: target.clone(),
            strategy: request.strategy,
            post_copy: may_post_copy(request),
        };
        let judge = |action| {
            Clearance::ask(
                Arc::clone(books),
                ask(action),
                operator.clone(),
                (passport.clone(), Some(&last)),
                approvals.clone(),
                Proven::default(),
                now,
            )
        };
        let out = match judge(Action::MigrateOut) {
            // Neither policies nor passports can be asked before the target has shown what it is.
            Err(refused)
                if self.gate.awaits_evidence(&target)
                    && refused
                        .reasons
                        .iter()
                        .all(|reason| matches!(reason.gate, Gate::Attestation | Gate::Policy))
                    && (books.policies.look_at_targets()
                        || refused
                            .reasons
                            .iter()
                            .any(|reason| reason.gate == Gate::Attestation)) =>
            {
                Clearance::wait(
                    Arc::clone(books),
                    ask(Action::MigrateOut),
                    operator.clone(),
                    passport.clone(),
                    approvals.clone(),
                )
            }
            judged => judged?,
        };
        let erase = judge(Action::Erase)?;
        let order = self.gate.sign(&SignedOrder {
            migration: Uuid::from_bytes(order.migration.0),
            vm,
            vm_name: order.vm_name.clone(),
            epoch: order.epoch.0,
            source: host.clone(),
            destination: target.clone(),
            operator: operator.clone(),
            issued_unix_s: now,
            expires_unix_s: order.expires_unix_s,
            strategy: request.strategy,
            post_copy: may_post_copy(request),
            run: order.run,
            policy_sha256: books.policies.sha256(),
            passport_sha256,
        })?;
        Ok(OutClearance {
            out,
            erase,
            order,
            claims: None,
        })
    }

    /// Judges the target of a migration by its evidence, before anything is sent (then the container has to be empty, and as
    /// large as told) and at last before the commit. What was
    /// permitted by other policies, or has expired meanwhile, is judged anew.
    ///
    /// # Errors
    ///
    /// Everything that refuses.
    pub fn judge_target(
        &self,
        cleared: Option<&mut OutClearance>,
        order: &Order,
        shown: Option<(&Question, &[u8])>,
        container_bytes: Option<u64>,
    ) -> Result<(), Vec<Reason>> {
        let Some(books) = self.gate.books() else {
            return Ok(());
        };
        let cleared = cleared.ok_or_else(|| vec![never_cleared()])?;
        let now = self.unix_s();
        let vm = cleared.out.ask.vm;
        let last = self.last_passport(vm).map_err(|reason| vec![reason])?;
        let (question, evidence) = shown.ok_or_else(|| vec![never_asked()])?;
        let operator = cleared.out.operator.to_string();
        let subject = |action| Subject {
            action,
            operator: &operator,
            vm: Some(vm),
            migration: Some(order.migration),
        };
        let target = cleared.out.ask.target.clone();
        let claims = self
            .claims(&target, Role::Target, question, evidence)
            .inspect_err(|reasons| {
                let refused = reasons.clone().into();
                self.note_refusal(&subject(Action::MigrateOut), &refused);
            })?;
        if let (Some(bytes), Some(claims)) = (container_bytes, &claims) {
            let container = claims.measured().container.as_ref();
            if container.is_none_or(|container| container.empty_bytes != bytes) {
                let reason = not_empty(&target);
                self.note_refusal(&subject(Action::MigrateOut), &reason.clone().into());
                return Err(vec![reason]);
            }
            if let Some(reason) = self.audit_hypervisor(cleared, order, claims) {
                return Err(vec![reason]);
            }
        }
        let is_unchanged = match (&cleared.claims, &claims) {
            (Some(before), Some(now)) => is_unchanged(before, now),
            (None, None) => true,
            _ => false,
        };
        let proven = Proven {
            target: claims.as_ref(),
            ..Proven::default()
        };
        for clearance in [&mut cleared.out, &mut cleared.erase] {
            let stands = is_unchanged || clearance.ask.action != Action::MigrateOut;
            if stands && clearance.holds(&books, last.as_ref(), now) {
                continue;
            }
            let subject = subject(clearance.ask.action);
            if let Err(refused) = clearance.renew(&books, last.as_ref(), proven, now) {
                self.note_refusal(&subject, &refused);
                return Err(refused.reasons);
            }
            if !self.note_clearance(clearance, Some(order.migration)) {
                return Err(vec![unjournaled()]);
            }
        }
        cleared.claims = claims;
        Ok(())
    }
}

/// Its evidence does not say that the container is what the VM needs.
fn not_empty(target: &Identity) -> Reason {
    Reason::new(
        Gate::Attestation,
        "container-not-empty",
        format!("{target} has not proven that all memory of the container is empty"),
        "Look at the log of that host's agent.",
    )
}

/// The connection on which it was to be asked is gone.
fn never_asked() -> Reason {
    Reason::new(
        Gate::Attestation,
        "evidence-missing",
        "the connection to the destination is gone",
        "Start a new migration.",
    )
}

/// Where something is judged, nothing goes on that was not.
pub(super) fn never_cleared() -> Reason {
    Reason::new(
        Gate::Policy,
        "never-permitted",
        "this migration was never permitted here",
        "Start a new migration.",
    )
}

/// A decision that is not on the disk permits nothing.
pub(super) fn unjournaled() -> Reason {
    Reason::new(
        Gate::Policy,
        "decision-not-journaled",
        "the decision cannot be journaled",
        "Look at the agent's log.",
    )
}
