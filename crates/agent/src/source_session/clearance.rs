//! What the gates of this host say while a migration is under way.

use palanquin_api::control::{ApiError, Blocker, ErrorKind, Side};
use palanquin_engine::message::Reason;
use palanquin_engine::source::{Op, SourceDone};
use palanquin_trust::decision::Reason as GateReason;

use super::SourceSession;
use crate::gate::{api_blockers, gate_of, told_reason};

impl SourceSession {
    /// Makes what speaks for this host and its order at the destination; nothing where nothing is judged.
    pub(super) fn vouch(&mut self, op: Op) {
        let clearance = self.params.clearance.as_ref();
        let evidence = self.agent.gate.evidence();
        match clearance.map(|clearance| clearance.credentials(evidence)) {
            None => self.report(op, Ok(SourceDone::Vouched(Vec::new()))),
            Some(Ok(credentials)) => self.report(op, Ok(SourceDone::Vouched(credentials))),
            Some(Err(reason)) => self.refuse(op, vec![reason]),
        }
    }

    /// Judges the destination, by what it says about itself and by the policies that hold now.
    pub(super) fn judge(&mut self, op: Op, evidence: &[u8]) {
        let clearance = self.params.clearance.as_mut();
        let judged = self
            .agent
            .judge_target(clearance, self.engine.order(), evidence);
        match judged {
            Ok(()) => self.report(op, Ok(SourceDone::Done)),
            Err(reasons) => self.refuse(op, reasons),
        }
    }

    fn refuse(&mut self, op: Op, reasons: Vec<GateReason>) {
        let told = told_reason(&reasons);
        self.refusals = reasons;
        self.fail(op, told);
    }

    /// Names the gates that refused, where it was one: here, or at the destination after it had accepted.
    pub(super) fn name_gates(&self, error: &mut ApiError, reason: &Reason) {
        if !self.refusals.is_empty() {
            error.kind = ErrorKind::Refused;
            error.blockers = api_blockers(Side::Source, &self.refusals);
        } else if error.kind == ErrorKind::Refused
            && error.blockers.is_empty()
            && let (Some(gate), code) = gate_of(&reason.code)
        {
            error.blockers.push(Blocker {
                side: Side::Destination,
                gate: Some(gate.to_owned()),
                code: code.to_owned(),
                message: reason.message.clone(),
                remedy: "`palanquin decision ls` on the destination shows every reason.".to_owned(),
            });
        }
    }
}
