//! What the gates of this host say while a migration is under way.

use std::sync::Arc;
use std::thread;

use palanquin_api::control::{ApiError, Blocker, ErrorKind, Side};
use palanquin_engine::ids::Challenge32;
use palanquin_engine::message::{Reason, WireBlocker};
use palanquin_engine::source::{Op, SourceDone};
use palanquin_trust::decision::Reason as GateReason;
use palanquin_trust::evidence::Role;

use super::{Failure, SourceEvent, SourceSession, failure};
use crate::gate::{Question, api_blockers, encoded, gate_of, told_reason, told_state};

impl SourceSession {
    /// Makes what speaks for this host and its order at the destination; nothing where nothing is judged. On a thread of its
    /// own: a TPM takes its time.
    pub(super) fn vouch(&mut self, op: Op, challenge: Challenge32) {
        let (Some(clearance), Some(question)) = (&self.params.clearance, self.question(challenge))
        else {
            return self.report(op, Ok(SourceDone::Vouched(Vec::new())));
        };
        let credentials = clearance.credentials();
        if !self.agent.gate.shows_something() {
            return match encoded(credentials, Vec::new()) {
                Ok(credentials) => self.report(op, Ok(SourceDone::Vouched(credentials))),
                Err(reason) => self.refuse(op, vec![reason]),
            };
        }
        let agent = Arc::clone(&self.agent);
        let hypervisor = self.vm.as_ref().map(|vm| vm.handle());
        let events = self.sender.clone();
        let work = move || {
            let evidence = agent
                .gate
                .evidence(Role::Source, &question, hypervisor.as_ref(), None);
            let vouched = encoded(credentials, evidence).map(SourceDone::Vouched);
            let vouched = vouched.map_err(|reason| Failure {
                reason: told_reason(&[reason]),
                vm_gone: false,
            });
            let _ = events.send(SourceEvent::Vm(op, vouched));
        };
        let thread = thread::Builder::new().name("evidence".to_owned());
        if let Err(error) = thread.spawn(work) {
            self.report(op, Err(failure("evidence", &error)));
        }
    }

    /// Judges the destination, by what it says about itself and by the policies that hold now.
    pub(super) fn judge(&mut self, op: Op, challenge: Challenge32, evidence: &[u8], last: bool) {
        let layout = self.params.layout.as_ref().filter(|_| !last);
        let container_bytes = layout.map(|layout| layout.total_bytes());
        let question = self.question(challenge);
        let shown = question.as_ref().map(|question| (question, evidence));
        let clearance = self.params.clearance.as_mut();
        let judged =
            self.agent
                .judge_target(clearance, self.engine.order(), shown, container_bytes);
        match judged {
            Ok(()) => self.report(op, Ok(SourceDone::Done)),
            Err(reasons) => self.refuse(op, reasons),
        }
    }

    /// What is asked on the connection that stands now.
    fn question(&self, challenge: Challenge32) -> Option<Question> {
        let (channel, clearance) = (self.channel.as_ref()?, self.params.clearance.as_ref()?);
        let order = self.engine.order();
        Some(Question::new(
            challenge,
            channel,
            order,
            clearance.order_sha256(),
        ))
    }

    /// Whether a gate of the destination refused. Where it did not, what it says may be compared with what it had promised: a
    /// false advertisement is refused by a gate of this host.
    pub(super) fn was_refused(&mut self, blockers: &[WireBlocker]) -> bool {
        if let (Some(cleared), Some(layout)) = (&self.params.clearance, &self.params.layout) {
            let (order, ram_bytes) = (self.engine.order(), layout.total_bytes());
            let audited = self
                .agent
                .audit_refusal(cleared, order, ram_bytes, blockers);
            self.refusals.extend(audited);
        }
        self.engine.is_refused()
    }

    fn refuse(&mut self, op: Op, reasons: Vec<GateReason>) {
        let told = told_reason(&reasons);
        self.refusals = reasons;
        self.fail(op, told);
    }

    /// Names the gates that refused, where it was one: here, or at the destination after it had accepted. What this host has
    /// shown and was refused for may be remedied.
    pub(super) fn name_gates(&self, error: &mut ApiError, reason: &Reason) {
        if !self.refusals.is_empty() {
            error.kind = ErrorKind::Refused;
            // With what the destination said to it, where that was the reason.
            let told = std::mem::replace(
                &mut error.blockers,
                api_blockers(Side::Source, &self.refusals),
            );
            error.blockers.extend(told);
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
        let told = error.blockers.iter().filter(|blocker| {
            blocker.side == Side::Destination && blocker.gate.as_deref() == Some("attestation")
        });
        let states = told.filter_map(|blocker| told_state(&blocker.code, &blocker.message));
        self.agent.remedy(states);
    }
}
