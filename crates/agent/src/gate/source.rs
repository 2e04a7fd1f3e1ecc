//! The source: may this VM leave, and is the target still one to which it may go?

use palanquin_api::control::{Allow, StartMigration, Strategy};
use palanquin_engine::Order;
use palanquin_trust::decision::{Action, Gate, Reason};
use palanquin_trust::{Identity, Kind, Order as SignedOrder, Signed};
use uuid::Uuid;

use super::credentials::Credentials;
use super::journal::{Subject, kept};
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
}

impl OutClearance {
    /// What speaks for the order at the destination.
    ///
    /// # Errors
    ///
    /// It is longer than the protocol carries.
    pub fn credentials(&self, evidence: Vec<u8>) -> Result<Vec<u8>, Reason> {
        let approvals = self.out.approvals.iter();
        let credentials = Credentials {
            order: self.order.as_bytes().to_vec().into(),
            passport: self.out.passport.as_signed_bytes().to_vec().into(),
            approvals: approvals
                .map(|approval| approval.as_signed_bytes().to_vec().into())
                .collect(),
            evidence: evidence.into(),
        };
        credentials.to_bytes().map_err(|error| {
            let remedy = "Ask the owner for a shorter passport, or give fewer approvals.";
            Reason::new(Gate::Passport, "credentials", error.to_string(), remedy)
        })
    }
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
                let decisions = [&cleared.out, &cleared.erase].map(Clearance::permit);
                for permit in decisions {
                    if !tried && !self.note_decision(kept(permit.decision(), Some(order.migration)))
                    {
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
        let (out, erase) = (judge(Action::MigrateOut)?, judge(Action::Erase)?);
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
        Ok(OutClearance { out, erase, order })
    }

    /// Judges the target of a migration by its evidence, before anything is sent and at last before the commit. What was
    /// permitted by other policies, or has expired meanwhile, is judged anew.
    ///
    /// # Errors
    ///
    /// Everything that refuses.
    pub fn judge_target(
        &self,
        cleared: Option<&mut OutClearance>,
        order: &Order,
        evidence: &[u8],
    ) -> Result<(), Vec<Reason>> {
        let Some(books) = self.gate.books() else {
            return Ok(());
        };
        let cleared = cleared.ok_or_else(|| vec![never_cleared()])?;
        let now = self.unix_s();
        let vm = cleared.out.ask.vm;
        let last = self.last_passport(vm).map_err(|reason| vec![reason])?;
        let claims = self.gate.claims(evidence);
        let proven = Proven {
            target: claims.as_ref(),
            ..Proven::default()
        };
        for clearance in [&mut cleared.out, &mut cleared.erase] {
            let is_move = clearance.ask.action == Action::MigrateOut;
            let rests_on_claims = is_move && claims.is_some();
            if !rests_on_claims && clearance.holds(&books, last.as_ref(), now) {
                continue;
            }
            let operator = clearance.operator.to_string();
            let subject = Subject {
                action: clearance.ask.action,
                operator: &operator,
                vm: Some(vm),
                migration: Some(order.migration),
            };
            if let Err(refused) = clearance.renew(&books, last.as_ref(), proven, now) {
                self.note_refusal(&subject, &refused);
                return Err(refused.reasons);
            }
            if !self.note_decision(kept(clearance.permit().decision(), Some(order.migration))) {
                return Err(vec![unjournaled()]);
            }
        }
        Ok(())
    }
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
