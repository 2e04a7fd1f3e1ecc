//! Connections that are cut, delayed and swallowed.

use super::*;

impl World {
    pub(super) fn cut(&mut self) {
        let (source, destination) = (self.source_end, self.destination_end);
        self.connection += 1;
        let (one, other) = (self.delay(30), self.delay(30));
        self.after(one, Event::SourceLost(source));
        self.after(other, Event::DestinationLost(destination));
        // What is on its way is lost too, but for what lies in the destination's buffers already.
        let late = if self.random.one_in(2) {
            self.first_pages()
        } else {
            Vec::new()
        };
        self.lose_in_flight();
        let mut delay = 0;
        for pages in late {
            delay += self.delay(1500);
            self.after(delay, pages);
        }
    }

    /// The first pages on their way: they arrive late, where whoever reads them from a broken stream is slow.
    fn first_pages(&mut self) -> Vec<Event> {
        let mut left = 1 + self.random.below(3);
        let mut taken = Vec::new();
        for index in self.events.len().saturating_sub(64)..self.events.len() {
            match &self.events[index] {
                Some(Event::Pages(..)) if left > 0 => left -= 1,
                // Nothing overtakes it.
                Some(
                    Event::RoundEnd(..)
                    | Event::Drained(..)
                    | Event::Stale(..)
                    | Event::Pushed(_)
                    | Event::State(_)
                    | Event::EarlyState(_),
                ) => break,
                _ => continue,
            }
            taken.extend(self.events[index].take());
        }
        taken
    }

    pub(super) fn lose_in_flight(&mut self) {
        // A connection that lost something delivers nothing any more: no stream of TLS has gaps.
        self.dead = self.dead.max(self.source_end).max(self.destination_end);
        for event in self.events.iter_mut().rev().take(64) {
            let in_flight = matches!(
                event,
                Some(
                    Event::ToSource(..)
                        | Event::ToDestination(..)
                        | Event::Pages(..)
                        | Event::RoundEnd(..)
                        | Event::Drained(..)
                        | Event::Stale(..)
                        | Event::Pushed(_)
                        | Event::State(_)
                        | Event::EarlyState(_)
                )
            );
            if in_flight {
                *event = None;
            }
        }
    }

    pub(super) fn connect(&mut self, attempt: u32) {
        self.source_attempt = attempt;
        let works = self.destination_up && !self.black && !self.random.one_in(25);
        let delay = self.delay(20);
        self.after(delay, Event::Connected(attempt, works));
    }

    pub(super) fn connected(&mut self, attempt: u32, works: bool) {
        if !self.source_up {
            return;
        }
        let now = self.time();
        let works = works && self.destination_up;
        if works {
            // The destination's end of an older connection may not know yet.
            let old = self.destination_end;
            self.connection += 1;
            self.directions = [(); 2].map(|()| Direction::of(self.connection));
            self.held = None;
            self.source_end = self.connection;
            if old != 0 && old == self.session_connection {
                let delay = self.delay(2000);
                self.after(delay, Event::DestinationLost(old));
            }
            self.destination_end = self.connection;
            self.wire_free = self.now;
            self.back_free = self.now;
        }
        if let Some(source) = &mut self.source {
            if works {
                source.handle_connected(now, attempt);
            } else {
                let reason = Reason::new("unreachable", "no connection");
                source.handle_connection_lost(now, attempt, reason);
            }
        }
    }

    pub(super) fn put_on_wire(&mut self, event: Event, back: bool) {
        let end = if back {
            self.destination_end
        } else {
            self.source_end
        };
        if self.black {
            // What comes later can't be delivered without it.
            self.dead = self.dead.max(end);
        }
        if end <= self.dead {
            return;
        }
        let delay = self.delay(8);
        let free = if back {
            &mut self.back_free
        } else {
            &mut self.wire_free
        };
        // In order, as TCP delivers.
        let at = (*free).max(self.now + delay) + 1;
        *free = at;
        self.after(at - self.now, event);
    }

    pub(super) fn send_to_destination(&mut self, message: Message) {
        if self.source_end != 0 {
            self.send_as_it_may(message, false);
        }
    }

    pub(super) fn send_to_source(&mut self, message: Message) {
        if self.destination_end != 0 {
            self.send_as_it_may(message, true);
        }
    }

    fn send_as_it_may(&mut self, message: Message, back: bool) {
        if !self.lies(back) {
            return self.send_record(message, back);
        }
        for message in self.twisted(message) {
            self.send_record(message, back);
        }
    }

    pub(super) fn source_lost(&mut self) {
        let now = self.time();
        if self.is(Mutation::ResumeOnLostConnection)
            && let Some(copy) = &mut self.copies[0]
        {
            copy.run = Run::Running;
        }
        if let Some(source) = &mut self.source {
            let reason = Reason::new("connection-lost", "cut");
            source.handle_connection_lost(now, self.source_attempt, reason);
        }
    }

    pub(super) fn destination_lost(&mut self, connection: u32) {
        let now = self.time();
        if connection == self.session_connection
            && let Some(destination) = &mut self.destination
        {
            destination.handle_connection_lost(now, Reason::new("connection-lost", "cut"));
        }
    }

    pub(super) fn source_receives(&mut self, message: Message) {
        let now = self.time();
        if self.is(Mutation::EraseAtRunning) && matches!(message, Message::Running(_)) {
            self.copies[0] = None;
        }
        let resumes = match &message {
            Message::Verdict(Verdict::Undecided) => self.is(Mutation::ResumeOnUndecided),
            Message::Abort(_) => self.is(Mutation::AbortUndoesCommit),
            _ => false,
        };
        if resumes && let Some(copy) = &mut self.copies[0] {
            copy.run = Run::Running;
        }
        if let Some(source) = &mut self.source {
            source.handle_message(now, self.source_attempt, message);
        }
    }

    pub(super) fn destination_receives(&mut self, connection: u32, message: Message) {
        let now = self.time();
        match message {
            Message::Hello(hello) => {
                let reply = HelloReply::to(&hello, "sim", self.destination_challenge());
                self.send_to_source(Message::HelloReply(reply));
                self.trust.greeted = Some((connection, hello));
            }
            Message::Query(_) => self.query(),
            // An agent takes each migration once, whoever repeats the order.
            Message::Offer(_) if self.offered && connection != self.session_connection => {
                self.send_to_source(Message::Refused(Refused {
                    by_gate: true,
                    blockers: Vec::new(),
                }));
            }
            Message::Offer(offer) if !self.offered => {
                // An agent hangs up on whoever has not greeted.
                let greeted = self.trust.greeted.take();
                let Some((_, hello)) = greeted.filter(|(on, _)| *on == connection) else {
                    return;
                };
                self.offered = true;
                let mut engine = Destination::new(now, self.destination_config());
                engine.handle_message(now, Message::Hello(hello));
                while engine.poll_action().is_some() {}
                engine.handle_message(now, Message::Offer(offer));
                self.session_connection = connection;
                self.destination = Some(engine);
            }
            other if connection == self.session_connection => {
                if let Some(destination) = &mut self.destination {
                    destination.handle_message(now, other);
                }
            }
            _ => {}
        }
    }

    pub(super) fn query(&mut self) {
        let now = self.time();
        if let Some(destination) = &mut self.destination {
            if destination.handle_query(now, StreamSecret([1; 32])) {
                // It answers for itself, on the new connection.
                self.session_connection = self.destination_end;
                return;
            }
            self.pump_destination();
        }
        let answer = match verdict(&self.destination_records, self.destination.is_some()) {
            Verdict::Undecided if self.is(Mutation::AnswerUndecidedAsDiscarded) => {
                Verdict::Discarded
            }
            Verdict::Undecided if self.destination.is_none() && !self.destination_busy => {
                self.discard_leftover();
                verdict(&self.destination_records, false)
            }
            other => other,
        };
        self.send_to_source(Message::Verdict(answer));
    }

    pub(super) fn pages(&mut self, connection: u32, pages: &[(u64, u64)], direct: bool) {
        let old = connection != self.session_connection && !self.is(Mutation::OldStreamsAccepted);
        if old || self.destination.is_none() {
            return;
        }
        if let Some(copy) = &mut self.copies[1] {
            for &(page, version) in pages {
                if direct {
                    self.received_now.insert(0, page..page + 1);
                }
                let page = page as usize;
                if direct {
                    copy.memory[page] = version;
                    self.received_versions[page] = version;
                } else if copy.memory[page] == 0 {
                    // What the guest has written since is newer.
                    copy.memory[page] = version;
                    // Before it runs, what saving the devices wrote may still come.
                    let paused = self.paused_memory.as_ref().filter(|_| self.ran);
                    self.corrupt |= paused.is_some_and(|memory| memory[page] != version);
                }
            }
        }
    }

    pub(super) fn stale(&mut self, connection: u32, pages: &[u64]) {
        let keeps = self.is(Mutation::KeepStalePages);
        if connection != self.session_connection || self.destination.is_none() {
            return;
        }
        if let Some(copy) = &mut self.copies[1] {
            for &page in pages {
                self.received_versions[page as usize] = 0;
                if !keeps {
                    copy.memory[page as usize] = 0;
                }
            }
        }
    }
}
