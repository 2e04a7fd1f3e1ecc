//! What the gates of this host say to what arrives, and what it shows of itself.

use std::sync::Arc;
use std::thread;

use palanquin_engine::Message;
use palanquin_engine::destination::{DestinationDone, Op};
use palanquin_engine::ids::Challenge32;
use palanquin_engine::message::{Offer, Reason};
use palanquin_host::measure::Empty;
use palanquin_trust::evidence::Role;

use super::{DestinationEvent, DestinationSession, Failure, missing};
use crate::chain::chain;
use crate::gate::{Bringer, Question, told_reason, wire_blockers};

impl DestinationSession {
    /// What is known about an order, and what the gates of this host say to its offer.
    pub(super) fn consult(&mut self, offer: &Offer) {
        let now = self.agent.now();
        let ledger = self.agent.ledger(&offer.order, &self.peer);
        let (mut ledger, channel) = match (ledger, self.channel()) {
            (Ok(ledger), Some(channel)) => (ledger, channel),
            (Err(error), _) => {
                let reason = Reason::new("journal", chain(&error));
                return self.engine.handle_connection_lost(now, reason);
            }
            (_, None) => {
                let reason = Reason::new("connection-lost", "the source is gone");
                return self.engine.handle_connection_lost(now, reason);
            }
        };
        let bringer = Bringer {
            identity: &channel.peer,
            key: channel.peer_key.as_ref(),
            asked: (self.engine.own_challenge(), channel.exporter()),
        };
        match self.agent.clear_in(offer, bringer, false) {
            Ok(clearance) => {
                let operator = clearance.as_ref().map(|c| c.operator().to_string());
                self.tracked.update(|info| info.operator = operator);
                self.clearance = clearance;
            }
            Err(reasons) => ledger.refusals = wire_blockers(&reasons),
        }
        self.engine.handle_ledger(now, &ledger);
    }

    /// The container is there: tells the source, with what this host shows of both.
    pub(super) fn show_container(&mut self, op: Op, post_copy: bool, empty: Option<Empty>) {
        let challenge = self.engine.challenge();
        self.show(op, challenge, empty, move |evidence| {
            DestinationDone::Reserved {
                post_copy,
                evidence,
            }
        });
    }

    /// The VM is being paused: what was permitted has to hold still, and the source is told what this host is.
    pub(super) fn attest(&mut self, op: Op, challenge: Challenge32) {
        let Some(order) = self.engine.order() else {
            return self.report(op, Err(missing("order")));
        };
        match self.agent.judge_arrival(self.clearance.as_mut(), order) {
            Ok(()) => self.show(op, Some(challenge), None, DestinationDone::Attested),
            // The source is told why, and ends it. If it does not, this is never attested, so that it can't commit, and the
            // engine's time for it runs out. Ending it here would break the streams, before it has heard the reason.
            Err(reasons) => self.send(&Message::Abort(told_reason(&reasons))),
        }
    }

    /// Reports evidence, from a thread of its own: a TPM takes its time. Where this host shows nothing, at once.
    fn show(
        &mut self,
        op: Op,
        challenge: Option<Challenge32>,
        empty: Option<Empty>,
        done: impl FnOnce(Vec<u8>) -> DestinationDone + Send + 'static,
    ) {
        let question = self.question(challenge);
        let Some(question) = question.filter(|_| self.agent.gate.shows_something()) else {
            return self.report(op, Ok(done(Vec::new())));
        };
        let agent = Arc::clone(&self.agent);
        let hypervisor = self.vm.as_ref().map(|vm| vm.handle());
        let events = self.sender.clone();
        let work = move || {
            let evidence = agent
                .gate
                .evidence(Role::Target, &question, hypervisor.as_ref(), empty);
            let _ = events.send(DestinationEvent::Container(op, Ok(done(evidence))));
        };
        let thread = thread::Builder::new().name("evidence".to_owned());
        if let Err(error) = thread.spawn(work) {
            let reason = Reason::new("evidence", chain(&error));
            let vm_gone = false;
            self.report(op, Err(Failure { reason, vm_gone }));
        }
    }

    /// What the source asks, on the connection that stands now.
    fn question(&self, challenge: Option<Challenge32>) -> Option<Question> {
        let (order, channel) = (self.engine.order()?, self.channel()?);
        let sha256 = self.clearance.as_ref()?.order_sha256();
        Some(Question::new(challenge?, &channel, order, sha256))
    }
}
