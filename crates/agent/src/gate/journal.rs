//! Decisions as they are kept, told to operators and told to the other host.

use palanquin_api::control::{ApiError, Blocker, ErrorKind, GateDecision, GateReason, Side};
use palanquin_engine::message::{Reason as WireReason, WireBlocker};
use palanquin_engine::{MigrationId, Order};
use palanquin_trust::Identity;
use palanquin_trust::decision::{Action, Decision, Denied, Gate, Reason};
use tracing::{error, warn};
use uuid::Uuid;

use super::Clearance;
use crate::agent::Agent;
use crate::chain::chain;
use crate::operations::error as api_error;

/// Something was refused.
#[derive(Debug)]
pub struct Refusal {
    /// Everything that refused.
    pub reasons: Vec<Reason>,
    /// The decision, where the policies were asked.
    decision: Option<Box<Decision>>,
}

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        vec![reason].into()
    }
}

impl From<Vec<Reason>> for Refusal {
    fn from(reasons: Vec<Reason>) -> Self {
        Self {
            reasons,
            decision: None,
        }
    }
}

impl From<Box<Denied>> for Refusal {
    fn from(denied: Box<Denied>) -> Self {
        Self {
            reasons: denied.0.reasons.clone(),
            decision: Some(Box::new(denied.0)),
        }
    }
}

/// What it was about that was refused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    /// What was to be done.
    pub(crate) action: Action,
    /// By whom, as far as it is known.
    pub(crate) operator: &'a str,
    /// To which VM.
    pub(crate) vm: Option<Uuid>,
    /// In which migration.
    pub(crate) migration: Option<MigrationId>,
}

/// What was decided, as it is kept.
fn kept(decision: &Decision, migration: Option<MigrationId>) -> GateDecision {
    GateDecision {
        at_unix_s: decision.decided_unix_s,
        action: decision.action.to_string(),
        operator: decision.operator.to_string(),
        vm: Some(decision.vm),
        migration: migration.map(|id| Uuid::from_bytes(id.0)),
        permitted: decision.permitted,
        permitted_by: decision.permitted_by.clone(),
        reasons: decision.reasons.iter().map(told).collect(),
        policy_sha256: Some(decision.policy_sha256.to_string()),
        passport_sha256: decision.passport_sha256.map(|sha256| sha256.to_string()),
        peer: None,
        times: 1,
        last_unix_s: None,
    }
}

fn told(reason: &Reason) -> GateReason {
    GateReason {
        gate: reason.gate.name().to_owned(),
        code: reason.code.to_owned(),
        message: reason.message.clone(),
        remedy: reason.remedy.clone(),
        policy: reason.policy.clone(),
    }
}

/// A refusal by a gate before, or without, the policies.
fn refused_early(subject: &Subject<'_>, reasons: &[Reason], now_unix_s: u64) -> GateDecision {
    GateDecision {
        at_unix_s: now_unix_s,
        action: subject.action.to_string(),
        operator: subject.operator.to_owned(),
        vm: subject.vm,
        migration: subject.migration.map(|id| Uuid::from_bytes(id.0)),
        permitted: false,
        permitted_by: Vec::new(),
        reasons: reasons.iter().map(told).collect(),
        policy_sha256: None,
        passport_sha256: None,
        peer: None,
        times: 1,
        last_unix_s: None,
    }
}

/// Reasons as the control interface tells them.
pub fn api_blockers(side: Side, reasons: &[Reason]) -> Vec<Blocker> {
    let blockers = reasons.iter().map(|reason| Blocker {
        side,
        gate: Some(reason.gate.name().to_owned()),
        code: reason.code.to_owned(),
        message: reason.message.clone(),
        remedy: reason.remedy.clone(),
    });
    blockers.collect()
}

/// Reasons as the other host is told: the code names the gate, as in `policy:policy-forbids`.
pub fn wire_blockers(reasons: &[Reason]) -> Vec<WireBlocker> {
    let blockers = reasons.iter().map(|reason| WireBlocker {
        code: format!("{}:{}", reason.gate.name(), reason.code),
        message: reason.message.clone(),
        remedy: reason.remedy.clone(),
    });
    blockers.collect()
}

/// Reasons as the engine is told: the first, with a code that names its gate, and how many more there are.
pub(crate) fn told_reason(reasons: &[Reason]) -> WireReason {
    let Some(first) = reasons.first() else {
        return WireReason::new("refused", "refused");
    };
    let more = match reasons.len() {
        1 => String::new(),
        count => format!(" (and {} more)", count - 1),
    };
    let code = format!("{}:{}", first.gate.name(), first.code);
    let message: String = first.message.chars().take(400).collect();
    WireReason::new(&code, message + &more)
}

/// The answer to an operator who is refused.
pub fn refusal(what: &str, reasons: &[Reason]) -> ApiError {
    ApiError {
        blockers: api_blockers(Side::Source, reasons),
        ..api_error(
            ErrorKind::Refused,
            format!("{what} is refused"),
            Some("each reason says what to do; `palanquin decision ls` shows what was decided"),
        )
    }
}

impl Agent {
    /// Makes a decision durable and known. A permission that cannot be journaled is none: then false.
    pub(crate) fn note_decision(&self, decision: GateDecision) -> bool {
        if !decision.permitted {
            let reasons: Vec<String> = decision
                .reasons
                .iter()
                .map(|reason| format!("{} ({}): {}", reason.gate, reason.code, reason.message))
                .collect();
            warn!(
                action = decision.action,
                operator = decision.operator,
                reasons = reasons.join("; "),
                "refused"
            );
        }
        self.gate.count(decision.permitted);
        let stored = match &decision.peer {
            // It may be refused as often as it likes, and must not fill the journal.
            Some(peer) if !decision.permitted => self.store.put_refused_arrival(peer, &decision),
            _ => self.store.put_decision(&decision),
        };
        if let Err(problem) = &stored {
            error!(problem = chain(problem), "a decision is not journaled");
        }
        if let Some(tracked) = decision
            .migration
            .and_then(|id| self.migration(MigrationId(*id.as_bytes())))
        {
            tracked.update(|info| info.gate_decisions.push(decision));
        }
        stored.is_ok()
    }

    /// What was decided on a migration.
    pub(crate) fn decisions_on(&self, migration: MigrationId) -> Vec<GateDecision> {
        self.store
            .decisions_on(migration)
            .unwrap_or_else(|problem| {
                error!(problem = chain(&problem), "what was decided is not told");
                Vec::new()
            })
    }

    /// Makes a refusal durable and known.
    pub(crate) fn note_refusal(&self, subject: &Subject<'_>, refusal: &Refusal) {
        self.note_decision(match &refusal.decision {
            Some(decision) => kept(decision, subject.migration),
            None => refused_early(subject, &refusal.reasons, self.unix_s()),
        });
    }

    /// Notes that something was done although it could not be judged, and why it could not.
    pub(super) fn note_excused(&self, subject: &Subject<'_>, reason: &Reason) {
        warn!(
            action = %subject.action,
            operator = subject.operator,
            reason = reason.message,
            "excused from being judged"
        );
        self.note_decision(GateDecision {
            permitted: true,
            ..refused_early(subject, std::slice::from_ref(reason), self.unix_s())
        });
    }

    /// Makes a refusal durable and known of what that host has brought; what it repeats is counted.
    pub(super) fn note_refused_arrival(
        &self,
        peer: &Identity,
        subject: &Subject<'_>,
        refusal: &Refusal,
    ) {
        let decision = match &refusal.decision {
            Some(decision) => kept(decision, subject.migration),
            None => refused_early(subject, &refusal.reasons, self.unix_s()),
        };
        self.note_decision(GateDecision {
            peer: Some(peer.to_string()),
            ..decision
        });
    }

    /// Makes what was decided durable; false if it is not, or nothing was.
    pub(super) fn note_clearance(
        &self,
        clearance: &Clearance,
        migration: Option<MigrationId>,
    ) -> bool {
        let decision = clearance.decision();
        decision.is_some_and(|decision| self.note_decision(kept(decision, migration)))
    }

    /// Notes that an order was refused by the engine's own rules: names, time, epoch, or that it was seen before.
    pub(crate) fn note_refused_order(&self, order: &Order, peer: &str, refused: &[WireBlocker]) {
        let reasons = refused.iter().map(|blocker| {
            let (gate, code) = gate_of(&blocker.code);
            GateReason {
                gate: gate.unwrap_or(Gate::Identity.name()).to_owned(),
                code: code.to_owned(),
                message: blocker.message.clone(),
                remedy: blocker.remedy.clone(),
                policy: None,
            }
        });
        let subject = Subject {
            action: Action::MigrateIn,
            operator: peer,
            vm: Some(Uuid::from_bytes(order.vm.0)),
            migration: Some(order.migration),
        };
        let reasons = reasons.collect();
        self.note_decision(GateDecision {
            reasons,
            peer: Some(peer.to_owned()),
            ..refused_early(&subject, &[], self.unix_s())
        });
    }
}

/// The gate in a code that another host has told, and the rest of it.
pub(crate) fn gate_of(code: &str) -> (Option<&str>, &str) {
    match code.split_once(':') {
        Some((gate, code)) => (Some(gate), code),
        // The engine's own rules for orders.
        None if code.starts_with("order-") => (Some(Gate::Identity.name()), code),
        None => (None, code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_host_is_told_which_gate_refused() {
        let reason = Reason::new(Gate::Policy, "policy-forbids", "m", "r");
        let told = wire_blockers(&[reason]);
        assert_eq!(gate_of(&told[0].code), (Some("policy"), "policy-forbids"));
        assert_eq!(
            gate_of("order-replayed"),
            (Some("identity"), "order-replayed")
        );
        assert_eq!(gate_of("memory-short"), (None, "memory-short"));
    }
}
