//! What the gates of this host say to what arrives, and what it shows of itself.

use std::sync::Arc;
use std::thread;

use palanquin_engine::Message;
use palanquin_engine::destination::{DestinationDone, Op};
use palanquin_engine::ids::Challenge32;
use palanquin_engine::message::{Offer, Reason};
use palanquin_engine::order::Ledger;
use palanquin_host::measure::Empty;
use palanquin_trust::evidence::Role;
use tracing::warn;

use super::{DestinationEvent, DestinationSession, missing};
use crate::chain::chain;
use crate::gate::{Bringer, InClearance, Question, told_reason, wire_blockers};

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
        let (agent, offer, nonce) = (
            Arc::clone(&self.agent),
            offer.clone(),
            self.engine.own_challenge(),
        );
        let consult = move || {
            let bringer = Bringer {
                identity: &channel.peer,
                key: channel.peer_key.as_ref(),
                asked: (nonce, channel.exporter()),
            };
            let clearance = match agent.clear_in(&offer, bringer, false) {
                Ok(clearance) => clearance.map(Box::new),
                Err(reasons) => {
                    ledger.refusals = wire_blockers(&reasons);
                    None
                }
            };
            (Box::new(ledger), clearance)
        };
        if !self.agent.gate.shows_something() {
            let (ledger, clearance) = consult();
            return self.consulted(&ledger, clearance);
        }
        let events = self.sender.clone();
        self.beside(move || {
            let (ledger, clearance) = consult();
            let _ = events.send(DestinationEvent::Consulted(ledger, clearance));
        });
    }

    /// What is known about an order, and what the gates say, is there.
    pub(super) fn consulted(&mut self, ledger: &Ledger, clearance: Option<Box<InClearance>>) {
        let operator = clearance.as_ref().map(|c| c.operator().to_string());
        self.tracked.update(|info| info.operator = operator);
        self.clearance = clearance;
        self.engine.handle_ledger(self.agent.now(), ledger);
    }

    /// On a thread of its own, because a TPM takes its time. Where there is none the engine's deadlines end it.
    fn beside(&self, work: impl FnOnce() + Send + 'static) {
        let thread = thread::Builder::new().name("evidence".to_owned());
        if let Err(error) = thread.spawn(work) {
            warn!(%error, "no thread for evidence");
        }
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
        let Some(order) = self.engine.order().cloned() else {
            return self.report(op, Err(missing("order")));
        };
        let mut clearance = self.clearance.take();
        let (agent, question) = (
            Arc::clone(&self.agent),
            self.question_of(clearance.as_deref(), challenge),
        );
        let Some(question) = question.filter(|_| agent.gate.shows_something()) else {
            let judged = agent.judge_arrival(clearance.as_deref_mut(), &order, None);
            let result = judged.map(|()| Vec::new());
            let result = result.map_err(|reasons| told_reason(&reasons));
            return self.attested(op, clearance, result);
        };
        let hypervisor = self.vm.as_ref().map(|vm| vm.handle());
        let events = self.sender.clone();
        self.beside(move || {
            let evidence = agent
                .gate
                .evidence(Role::Target, &question, hypervisor.as_ref(), None);
            let shown = Some((&question, &evidence[..]));
            let judged = agent.judge_arrival(clearance.as_deref_mut(), &order, shown);
            let result = judged.map(|()| evidence);
            let _ = events.send(DestinationEvent::Attested {
                op,
                clearance,
                result: result.map_err(|reasons| told_reason(&reasons)),
            });
        });
    }

    /// What this host shows while the VM is being paused, or why it must not have it any more.
    pub(super) fn attested(
        &mut self,
        op: Op,
        clearance: Option<Box<InClearance>>,
        result: Result<Vec<u8>, Reason>,
    ) {
        self.clearance = clearance;
        match result {
            Ok(evidence) => self.report(op, Ok(DestinationDone::Attested(evidence))),
            // The source is told why, and ends it. If it does not, this is never attested, so that it can't commit, and the
            // engine's time for it runs out. Ending it here would break the streams, before it has heard the reason.
            Err(reason) => self.send(&Message::Abort(reason)),
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
        let clearance = self.clearance.as_deref();
        let question = challenge.and_then(|challenge| self.question_of(clearance, challenge));
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
        self.beside(work);
    }

    /// What the source asks, on the connection that stands now.
    fn question_of(
        &self,
        clearance: Option<&InClearance>,
        challenge: Challenge32,
    ) -> Option<Question> {
        let (order, channel) = (self.engine.order()?, self.channel()?);
        let sha256 = clearance?.order_sha256();
        Some(Question::new(challenge, &channel, order, sha256))
    }
}
