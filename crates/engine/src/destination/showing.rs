//! What this host says about itself and the container, and what its gates say about the source.

use super::{Attest, Destination, DestinationAction, State};
use crate::ids::Challenge32;
use crate::journal::DestinationRecord;
use crate::message::{EVIDENCE_MAX, Reason, WireBlocker};
use crate::order::Ledger;
use crate::time::Time;

impl Destination {
    /// What the evidence of [`DestinationDone::Reserved`](super::DestinationDone::Reserved) has to be bound to; none before the
    /// source has greeted.
    pub fn challenge(&self) -> Option<Challenge32> {
        self.challenge
    }

    /// What the evidence in the source's credentials has to be bound to.
    pub fn own_challenge(&self) -> Challenge32 {
        self.config.challenge
    }

    /// What is known about the order, and what the gates say.
    pub fn handle_ledger(&mut self, now: Time, ledger: &Ledger) {
        if !matches!(self.state, State::Consulting(_)) {
            return;
        }
        let State::Consulting(offer) = std::mem::replace(&mut self.state, State::AwaitOffer) else {
            return;
        };
        self.deadline = None;
        if let Some(refused) = offer.order.refused(ledger) {
            return self.refuse(now, refused);
        }
        let op = self.journal(DestinationRecord::Reserved(offer.order.clone()));
        self.state = State::Recording { op, offer };
    }

    /// The gates have not come to an end: they let nobody in.
    pub(super) fn not_judged(&mut self, now: Time) {
        let blocker = WireBlocker {
            code: "not-judged".to_owned(),
            message: "the destination could not judge the order in time".to_owned(),
            remedy: "Look at the log of the destination's agent.".to_owned(),
        };
        let refused = crate::message::Refused {
            by_gate: false,
            blockers: vec![blocker],
        };
        self.refuse(now, refused);
    }

    /// Whether this is too much to be told; then it is over.
    pub(super) fn is_too_long(&mut self, now: Time, evidence: &[u8]) -> bool {
        let too_long = evidence.len() > EVIDENCE_MAX;
        if too_long {
            let what = format!(
                "the evidence of the destination has {} bytes, at most {EVIDENCE_MAX} are allowed",
                evidence.len()
            );
            self.discard(now, Reason::new("evidence-too-long", what));
        }
        too_long
    }

    /// The source begins to pause the VM.
    pub(super) fn challenged(&mut self, now: Time, challenge: Challenge32) {
        let op = self.op();
        if let State::Receiving { attest, .. } = &mut self.state {
            *attest = Attest::Attesting(op);
            self.deadline = Some(now + self.config.timing.switchover);
            self.actions
                .push_back(DestinationAction::Attest { op, challenge });
        }
    }

    /// The evidence for the challenge is here.
    pub(super) fn attested(&mut self, now: Time, evidence: Vec<u8>) {
        if self.is_too_long(now, &evidence) {
            return;
        }
        if let State::Receiving { attest, .. } | State::Loading { attest, .. } = &mut self.state {
            *attest = Attest::Attested(evidence);
            self.deadline = None;
            self.ready(now);
        }
    }
}
