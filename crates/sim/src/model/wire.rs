//! What arrives.

use std::sync::Arc;

use palanquin_engine::Destination;
use palanquin_engine::DestinationRecord;
use palanquin_engine::ids::StreamSecret;
use palanquin_engine::journal::verdict;
use palanquin_engine::message::{Hello, HelloReply, Message, Refused, Verdict};
use palanquin_engine::source::SourceDone;

use super::world::{CHALLENGE, Connection, Data, NOW, World, failure, reason};
use crate::mutation::Mutation;

impl World {
    /// A connection that the source dials stands, or can't be had.
    pub(super) fn dialled(&mut self, stands: bool) {
        self.source.dialling = false;
        let attempt = self.source.attempt;
        if stands {
            self.connections.push(Connection {
                attempt,
                source_open: true,
                destination_open: true,
                cut: false,
                to_destination: Default::default(),
                to_source: Default::default(),
                data: Default::default(),
            });
        }
        let Some(source) = self.source_engine() else {
            return;
        };
        if stands {
            source.handle_connected(NOW, attempt);
        } else {
            source.handle_connection_lost(NOW, attempt, reason());
        }
    }

    pub(super) fn cut(&mut self, index: usize) {
        if let Some(connection) = self.connections.get_mut(index) {
            connection.cut = true;
            connection.to_destination.clear();
            connection.to_source.clear();
            connection.data.clear();
        }
    }

    pub(super) fn source_notices(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        connection.source_open = false;
        let attempt = connection.attempt;
        if self.is(Mutation::ResumeOnLostConnection)
            && let Some(vm) = &mut self.source.vm
        {
            vm.running = true;
        }
        if let Some(source) = self.source_engine() {
            source.handle_connection_lost(NOW, attempt, reason());
        }
    }

    pub(super) fn destination_notices(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        connection.destination_open = false;
        connection.data.clear();
        if self.destination.session == Some(index)
            && let Some(destination) = self.destination_engine()
        {
            destination.handle_connection_lost(NOW, reason());
        }
    }

    pub(super) fn arrives_at_source(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let attempt = connection.attempt;
        let Some(message) = connection.to_source.pop_front() else {
            return;
        };
        if self.is(Mutation::EraseAtRunning) && matches!(message, Message::Running(_)) {
            self.erase();
        }
        let resumes = self.is(Mutation::ResumeOnUndecided)
            && matches!(message, Message::Verdict(Verdict::Undecided));
        if resumes && let Some(vm) = &mut self.source.vm {
            vm.running = true;
        }
        if let Some(source) = self.source_engine() {
            source.handle_message(NOW, attempt, message);
        }
    }

    pub(super) fn arrives_at_destination(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let Some(message) = connection.to_destination.pop_front() else {
            return;
        };
        if self.destination.session == Some(index) {
            if let Some(destination) = self.destination_engine() {
                destination.handle_message(NOW, message);
            }
            return;
        }
        match message {
            Message::Hello(hello) => {
                let reply = HelloReply::to(&hello, "", CHALLENGE);
                self.answer(index, Message::HelloReply(reply));
            }
            Message::Query(_) => self.query(index),
            Message::Offer(offer) => {
                let seen = !self.destination.records.is_empty();
                if self.destination.engine.is_some() || seen {
                    return self.answer(
                        index,
                        Message::Refused(Refused {
                            by_gate: true,
                            blockers: Vec::new(),
                        }),
                    );
                }
                let mut engine = Destination::new(NOW, Self::destination_config());
                engine.handle_message(NOW, Message::Hello(Hello::ours("", CHALLENGE)));
                // The agent has answered the greeting itself.
                while engine.poll_action().is_some() {}
                engine.handle_message(NOW, Message::Offer(offer));
                self.destination.session = Some(index);
                self.destination.engine = Some(Arc::new(engine));
            }
            // An agent hangs up.
            _ => {
                if let Some(connection) = self.connections.get_mut(index) {
                    connection.destination_open = false;
                    connection.to_destination.clear();
                }
            }
        }
    }

    fn query(&mut self, index: usize) {
        if let Some(destination) = self.destination_engine()
            && destination.handle_query(NOW, StreamSecret([1; 32]))
        {
            // It answers for itself, on the new connection.
            let old = self.destination.session.replace(index);
            if let Some(old) = old.and_then(|old| self.connections.get_mut(old)) {
                old.destination_open = false;
                old.to_destination.clear();
                old.data.clear();
            }
            return;
        }
        let at_work = self.destination.engine.is_some();
        let answer = match verdict(&self.destination.records, at_work) {
            Verdict::Undecided if self.is(Mutation::AnswerUndecidedAsDiscarded) => {
                Verdict::Discarded
            }
            Verdict::Undecided if !at_work => {
                let reserved = matches!(
                    self.destination.records.last(),
                    Some(DestinationRecord::Reserved(_))
                );
                if reserved && self.destination.recovery.is_empty() {
                    self.discard_leftover();
                }
                Verdict::Undecided
            }
            other => other,
        };
        self.answer(index, Message::Verdict(answer));
    }

    pub(super) fn data_arrives(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let Some(data) = connection.data.pop_front() else {
            return;
        };
        if self.destination.session != Some(index) || self.destination.engine.is_none() {
            return;
        }
        let keeps = self.is(Mutation::KeepStalePages);
        match data {
            Data::Page(version) => {
                if let Some(container) = &mut self.destination.container {
                    if !container.waits {
                        self.destination.arrived = true;
                        self.destination.received = version;
                        container.version = version;
                    } else if container.version == 0 {
                        container.version = version;
                    }
                }
            }
            Data::Stale => {
                self.destination.received = 0;
                if let Some(container) = &mut self.destination.container
                    && !keeps
                {
                    container.version = 0;
                }
            }
            Data::State => self.destination.state_arrived = true,
            Data::Drained(post_copy) => {
                if let Some(destination) = self.destination_engine() {
                    destination.handle_drained(NOW, post_copy);
                }
            }
            Data::RoundEnd(round, last) => {
                if let Some(destination) = self.destination_engine() {
                    let before = destination.rounds();
                    destination.handle_round(NOW, round, last);
                    if destination.rounds() != before {
                        self.destination.arrived = false;
                    }
                }
            }
            Data::Pushed => {
                if let Some(destination) = self.destination_engine() {
                    destination.handle_pushed(NOW);
                }
            }
        }
    }

    /// The source's streams reach a destination that expects them on this connection, or nobody.
    pub(super) fn streams_open(&mut self) {
        let Some(op) = self.source.opening.take() else {
            return;
        };
        let attempt = self.source.attempt;
        let same = self
            .session()
            .is_some_and(|c| !c.cut && c.source_open && c.attempt == attempt);
        let expected = if same {
            self.destination.expecting.take()
        } else {
            None
        };
        if let (Some(expected), Some(destination)) = (expected, self.destination_engine()) {
            let done = palanquin_engine::destination::DestinationDone::Done;
            destination.handle_done(NOW, expected, Ok(done));
        }
        if let Some(source) = self.source_engine() {
            let result = match expected {
                Some(_) => Ok(SourceDone::Done),
                None => Err(failure(false)),
            };
            source.handle_done(NOW, op, result);
        }
    }
}
