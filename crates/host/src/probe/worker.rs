//! The thread that sends and receives.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, mpsc};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::announce::{Heard, Mac};
use super::clock::Clock;
use super::ear::{Ear, Noise};
use super::icmp::{self, Answer, QUESTION_BYTES_MAX, Question};
use super::ntp::{NtpError, PACKET_BYTES, Packet, Timestamp};
use super::socket::{Buffers, Incoming, Socket, Use};
use super::target::{Counters, Timetable, us};
use super::{ANNOUNCEMENTS_MAX, BURSTING_MAX, Command, Event, Kind, News, ProberSpec, Reading};

/// Most questions under way; more are not asked.
const PENDING_MAX: usize = 1 << 16;
/// Answers that are read before something is sent again.
const AT_ONCE_MAX: usize = 4096;
/// Messages that are listened to before something is sent again.
const HEARD_MAX: usize = 512;
/// What was heard so long ago, by the kernel's clock, was not: somebody has set the time of day.
const HEARD_AGO_US: u64 = 10_000_000;
/// Hardware addresses that are remembered of a target.
const MACS_MAX: usize = 4;
/// If sending takes longer, it is not known when the question was sent.
const SENDING_US_MAX: u64 = 1_000;
/// The thread looks around at least that often.
const TICK_US: u64 = 1_000_000;
/// Identifiers of raw sockets are used for so many questions: a firewall may have learnt to drop one.
const ID_QUESTIONS: u16 = 512;
/// Reasons that are remembered as told, of each target.
const TOLD_MAX: usize = 8;

/// A question under way.
struct Pending {
    target: usize,
    sent_us: u64,
    id: u16,
    sequence: u16,
}

struct State {
    address: IpAddr,
    port: u16,
    table: Timetable,
    id: u16,
    sequence: u16,
    told: Vec<News>,
    /// Hardware addresses that it has; the latest last.
    macs: Vec<Mac>,
    is_pinned: bool,
    /// The second of its latest announcement, and how many were told of that second.
    announced: (u64, u32),
}

impl State {
    /// Whether it is whom a message is about. Who has its address has its hardware address too, unless that is given.
    fn is_meant(&mut self, heard: Heard) -> bool {
        let has_address = heard.address == Some(self.address);
        if has_address && !self.is_pinned && !self.macs.contains(&heard.mac) {
            if self.macs.len() == MACS_MAX {
                self.macs.remove(0);
            }
            self.macs.push(heard.mac);
        }
        has_address || self.macs.contains(&heard.mac)
    }

    /// Whether an announcement is told, and not one too many of its second.
    fn may_tell(&mut self, at_us: u64) -> bool {
        let second = at_us / 1_000_000;
        if self.announced.0 != second {
            self.announced = (second, 0);
        }
        self.announced.1 += 1;
        self.announced.1 <= ANNOUNCEMENTS_MAX
    }
}

pub(super) struct Worker<F> {
    spec: ProberSpec,
    sockets: Vec<Socket>,
    ear: Option<Ear>,
    /// If it became deaf: when it is tried next whether it hears again.
    deaf_until_us: Option<u64>,
    clock: Clock,
    counters: Arc<[Counters]>,
    tell: F,
    states: Vec<State>,
    due: BTreeSet<(u64, usize, Kind)>,
    /// By what comes back with the answer.
    pending: HashMap<(Kind, u64), Pending>,
    /// In the order of sending, which is that of deadlines.
    deadlines: VecDeque<(u64, Kind, u64)>,
}

/// Whom nobody can guess.
fn random() -> u64 {
    let mut bytes = [0; 8];
    // A system without randomness has no cookies that nobody could guess; answers are still told apart.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    u64::from_ne_bytes(bytes)
}

impl<F: FnMut(Event)> Worker<F> {
    pub(super) fn new(
        spec: ProberSpec,
        (sockets, ear): (Vec<Socket>, Option<Ear>),
        clock: Clock,
        counters: Arc<[Counters]>,
        tell: F,
    ) -> Self {
        let now_us = clock.now_us();
        let (mut states, mut due) = (Vec::new(), BTreeSet::new());
        for (at, target) in spec.targets.iter().enumerate() {
            let is_v6 = target.address.is_ipv6();
            let has = |of: Use| {
                sockets
                    .iter()
                    .any(|socket| socket.of == of && socket.is_v6 == is_v6)
            };
            let can = [has(Use::Echo), has(Use::Timestamp), has(Use::Ntp)];
            let table = Timetable::new(target, spec.burst, can, now_us);
            for kind in Kind::ALL {
                // Not all at once, and kinds of one target not together either.
                if let Some(interval_us) = table.interval_us(kind) {
                    let share = (at * 3 + kind as usize) as u64;
                    let phase_us = interval_us * share / (spec.targets.len() as u64 * 3);
                    due.insert((now_us + phase_us.min(TICK_US), at, kind));
                }
            }
            states.push(State {
                address: target.address,
                port: target.ntp.map_or(0, |ntp| ntp.port),
                table,
                id: random() as u16,
                sequence: 0,
                told: Vec::new(),
                macs: target.mac.into_iter().collect(),
                is_pinned: target.mac.is_some(),
                announced: (0, 0),
            });
        }
        Self {
            spec,
            sockets,
            ear,
            deaf_until_us: None,
            clock,
            counters,
            tell,
            states,
            due,
            pending: HashMap::new(),
            deadlines: VecDeque::new(),
        }
    }

    /// Until it is told to stop.
    pub(super) fn run(&mut self, orders: &mpsc::Receiver<Command>, wake: &OwnedFd) {
        let mut buffers = Buffers::new();
        loop {
            let now_us = self.clock.now_us();
            let next_us = self.next_us().min(now_us + TICK_US);
            self.wait(wake, next_us.saturating_sub(now_us));
            self.notice_stall(next_us);
            // It holds a number that says only that there is something.
            let _ = rustix::io::read(wake, &mut [0; 8]);
            while let Ok(order) = orders.try_recv() {
                match order {
                    Command::Burst(target) => self.burst(target),
                    Command::Stop => return,
                }
            }
            self.receive(&mut buffers);
            self.listen(&mut buffers);
            // Whoever is told may have kept us.
            self.notice_stall(self.next_us());
            self.expire();
            self.end_bursts();
            self.ask();
        }
    }

    fn next_us(&self) -> u64 {
        let due_us = self.due.first().map(|(due_us, ..)| *due_us);
        let deadline_us = self.deadlines.front().map(|(deadline_us, ..)| *deadline_us);
        let next_us = due_us.into_iter().chain(deadline_us).min();
        next_us.unwrap_or(u64::MAX)
    }

    fn wait(&self, wake: &OwnedFd, left_us: u64) {
        let mut polled: Vec<PollFd<'_>> = self
            .sockets
            .iter()
            .map(|socket| PollFd::from_borrowed_fd(socket.fd(), PollFlags::IN))
            .collect();
        let ears = self.ear.iter().flat_map(Ear::fds);
        polled.extend(ears.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        polled.push(PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN));
        let left = Timespec {
            tv_sec: (left_us / 1_000_000).cast_signed(),
            tv_nsec: (left_us % 1_000_000 * 1000).cast_signed(),
        };
        // A signal only lets it look earlier.
        let _ = poll(&mut polled, Some(&left));
    }

    /// If what was next is overdue, the thread stood still, and whatever was under way has been timed by nobody.
    fn notice_stall(&mut self, from_us: u64) {
        let until_us = self.clock.now_us();
        if until_us <= from_us.saturating_add(us(self.spec.stall)) {
            return;
        }
        let earliest_us = self.pending.values().map(|pending| pending.sent_us).min();
        for pending in self.pending.values() {
            self.counters[pending.target].dropped();
        }
        self.pending.clear();
        self.deadlines.clear();
        // What is overdue is due now.
        let later = self.due.split_off(&(until_us, 0, Kind::Echo));
        let overdue = std::mem::replace(&mut self.due, later);
        let now = overdue
            .into_iter()
            .map(|(_, target, kind)| (until_us, target, kind));
        self.due.extend(now);
        let from_us = earliest_us.map_or(from_us, |earliest_us| earliest_us.min(from_us));
        (self.tell)(Event::Stalled { from_us, until_us });
    }

    fn burst(&mut self, target: usize) {
        let now_us = self.clock.now_us();
        let bursting = |state: &&State| state.table.burst_end_us().is_some();
        let may_begin = self.states.iter().filter(bursting).count() < BURSTING_MAX;
        let Some(state) = self.states.get_mut(target) else {
            return;
        };
        match state.table.burst(now_us, may_begin) {
            (true, true) => {
                for kind in Kind::ALL {
                    self.sooner(target, kind, now_us);
                }
                self.news(target, News::BurstBegan);
                self.forget(target, &News::BurstRefused);
            }
            (true, false) => {}
            (false, _) => self.once(target, News::BurstRefused),
        }
    }

    fn end_bursts(&mut self) {
        let now_us = self.clock.now_us();
        for target in 0..self.states.len() {
            let table = &mut self.states[target].table;
            if table.burst_end_us().is_some_and(|end_us| end_us <= now_us) {
                table.end_burst(now_us);
                self.news(target, News::BurstEnded);
            }
        }
    }

    /// Lets the next question of a kind be asked within the interval that holds now.
    fn sooner(&mut self, target: usize, kind: Kind, now_us: u64) {
        let Some(interval_us) = self.states[target].table.interval_us(kind) else {
            return;
        };
        let is_it = |(_, at, of): &&(u64, usize, Kind)| (*at, *of) == (target, kind);
        if let Some(old) = self.due.iter().find(is_it).copied() {
            self.due.remove(&old);
            self.due
                .insert((old.0.min(now_us + interval_us), target, kind));
        }
    }

    fn ask(&mut self) {
        let now_us = self.clock.now_us();
        while let Some((due_us, target, kind)) = self.due.first().copied() {
            if due_us > now_us {
                break;
            }
            self.due.pop_first();
            let table = &self.states[target].table;
            if let Some(interval_us) = table.interval_us(kind) {
                let next_us = due_us + interval_us;
                // What was missed is not made up for.
                let next_us = if next_us > now_us {
                    next_us
                } else {
                    now_us + interval_us
                };
                self.due.insert((next_us, target, kind));
            }
            if table.may_ask(kind, now_us) && self.pending.len() < PENDING_MAX {
                self.send(target, kind);
            }
        }
    }

    fn send(&mut self, target: usize, kind: Kind) {
        let state = &mut self.states[target];
        state.sequence = state.sequence.wrapping_add(1);
        if state.sequence.is_multiple_of(ID_QUESTIONS) {
            state.id = random() as u16;
        }
        let (id, sequence) = (state.id, state.sequence);
        let (to, is_v6) = (state.address, state.address.is_ipv6());
        let of = match kind {
            Kind::Echo => Use::Echo,
            Kind::Timestamp => Use::Timestamp,
            Kind::Ntp => Use::Ntp,
        };
        let Some(socket) = self
            .sockets
            .iter()
            .find(|socket| socket.of == of && socket.is_v6 == is_v6)
        else {
            return;
        };
        let mut key = random();
        if kind == Kind::Timestamp {
            // It stands for a time of the day.
            let cookie = (key % u64::from(icmp::DAY_MS)) as u32;
            key = timestamp_key(id, sequence, cookie);
        }
        let mut buffer = [0; QUESTION_BYTES_MAX];
        let packet = Packet::question(key).encode();
        let (message, port) = match kind {
            Kind::Ntp => (&packet[..], state.port),
            Kind::Echo => {
                let cookie = key;
                let question = Question::Echo {
                    id,
                    sequence,
                    cookie,
                };
                (icmp::write(question, is_v6, &mut buffer), 0)
            }
            Kind::Timestamp => {
                let cookie = key as u32;
                let question = Question::Timestamp {
                    id,
                    sequence,
                    cookie,
                };
                (icmp::write(question, is_v6, &mut buffer), 0)
            }
        };
        let sent_us = self.clock.now_us();
        let sent = socket.send(message, to, port);
        let took_us = self.clock.now_us().saturating_sub(sent_us);
        let bytes = on_the_wire(message.len(), kind, is_v6);
        match sent {
            Ok(()) => {}
            // Nobody there answers the question for its link address: as silent as a lost probe.
            Err(error) if error.kind() == io::ErrorKind::HostUnreachable => {}
            Err(error) => {
                self.counters[target].not_sent();
                self.once(target, News::NotSent(kind, error.to_string()));
                return;
            }
        }
        let counters = &self.counters[target];
        counters.sent(kind, bytes);
        if took_us > SENDING_US_MAX {
            // It was not we who ran meanwhile: nobody knows when the question went.
            counters.dropped();
            return;
        }
        let pending = Pending {
            target,
            sent_us,
            id,
            sequence,
        };
        self.pending.insert((kind, key), pending);
        let deadline_us = sent_us.saturating_add(us(self.spec.timeout));
        self.deadlines.push_back((deadline_us, kind, key));
    }

    fn receive(&mut self, buffers: &mut Buffers) {
        for at in 0..self.sockets.len() {
            for _ in 0..AT_ONCE_MAX {
                // What a socket complains about has been sent before, and will be lost.
                let Ok(Some(incoming)) = self.sockets[at].next(buffers) else {
                    break;
                };
                let (is_v6, is_raw, of) = (
                    self.sockets[at].is_v6,
                    self.sockets[at].is_raw,
                    self.sockets[at].of,
                );
                self.take(&incoming, of, is_v6, is_raw);
            }
        }
    }

    /// Takes what was announced. An interface that was taken away may come back under its name.
    fn listen(&mut self, buffers: &mut Buffers) {
        let now_us = self.clock.now_us();
        if self
            .deaf_until_us
            .is_some_and(|again_us| again_us <= now_us)
        {
            self.deaf_until_us = Some(now_us + TICK_US);
            let has_v6 = self.spec.targets.iter().any(|of| of.address.is_ipv6());
            let interface = self.spec.interface.as_deref().unwrap_or_default();
            if let Ok(ear) = Ear::open(interface, has_v6) {
                (self.ear, self.deaf_until_us) = (Some(ear), None);
                (self.tell)(Event::Hears);
            }
        }
        let mut most = HEARD_MAX;
        while let Some(ear) = &self.ear {
            match ear.next(buffers, &mut most) {
                Ok(Some(noise)) => self.hear(&noise),
                Ok(None) => return,
                Err(error) => {
                    (self.ear, self.deaf_until_us) = (None, Some(now_us + TICK_US));
                    let why = error.to_string();
                    (self.tell)(Event::Deaf { why });
                }
            }
        }
    }

    fn hear(&mut self, noise: &Noise) {
        let since_us = self.clock.now_us().saturating_sub(HEARD_AGO_US);
        let by_kernel = noise.received_us;
        let at_us = by_kernel.and_then(|of_day_us| self.clock.at(of_day_us, since_us));
        let at_us = at_us.unwrap_or_else(|| self.clock.now_us());
        for target in 0..self.states.len() {
            let state = &mut self.states[target];
            if !state.is_meant(noise.heard) || !noise.heard.is_announcement {
                continue;
            }
            self.counters[target].announced();
            if state.may_tell(at_us) {
                self.seen(target, at_us, Reading::Announced);
            }
        }
    }

    fn take(&mut self, incoming: &Incoming<'_>, of: Use, is_v6: bool, is_raw: bool) {
        let message = incoming.message;
        if of == Use::Ntp {
            return self.take_ntp(incoming, is_v6);
        }
        // A raw socket gets answers to others as well: what is not ours is passed over.
        let Ok(answer) = icmp::read(message, is_v6) else {
            return;
        };
        let (kind, key, id, sequence) = match answer {
            Answer::Echo {
                id,
                sequence,
                cookie,
            } => (Kind::Echo, cookie, id, sequence),
            Answer::Timestamp {
                id,
                sequence,
                cookie,
                ..
            } => (
                Kind::Timestamp,
                timestamp_key(id, sequence, cookie),
                id,
                sequence,
            ),
        };
        // The kernel chooses the identifier of a socket without rights, and gives it only its own answers.
        let fits =
            |pending: &Pending| sequence == pending.sequence && (!is_raw || id == pending.id);
        let Some((pending, received_us)) = self.settle(kind, key, incoming, fits) else {
            return;
        };
        let (target, sent_us) = (pending.target, pending.sent_us);
        self.counters[target].answered(kind, on_the_wire(message.len(), kind, is_v6));
        self.states[target].table.answered(kind);
        match answer {
            Answer::Echo { .. } => {
                let ms = (received_us - sent_us) as f64 / 1e3;
                self.seen(target, sent_us, Reading::Rtt { ms });
                if let Some(hops) = incoming.control.hops
                    && self.states[target].table.is_news(hops)
                {
                    self.seen(target, sent_us, Reading::Ttl { hops });
                }
            }
            Answer::Timestamp {
                receive, transmit, ..
            } => match icmp::offset_ms(receive, transmit, sent_us, received_us) {
                Some(ms) => self.seen(target, sent_us, Reading::IcmpOffset { ms }),
                None => {
                    let why = "its clock does not count milliseconds of the day".to_owned();
                    self.refused(target, Kind::Timestamp, why);
                }
            },
        }
    }

    fn take_ntp(&mut self, incoming: &Incoming<'_>, is_v6: bool) {
        // What is no answer to a question of ours could be anybody's.
        let Ok(packet) = Packet::decode(incoming.message) else {
            return;
        };
        let key = packet.origin.0;
        let Some((pending, received_us)) = self.settle(Kind::Ntp, key, incoming, |_| true) else {
            return;
        };
        let (target, sent_us) = (pending.target, pending.sent_us);
        let bytes = on_the_wire(incoming.message.len(), Kind::Ntp, is_v6);
        self.counters[target].answered(Kind::Ntp, bytes);
        self.states[target].table.answered(Kind::Ntp);
        let (sent, received) = (
            Timestamp::from_unix_us(sent_us),
            Timestamp::from_unix_us(received_us),
        );
        match packet.read(key, sent, received) {
            Ok(ms) => {
                self.seen(target, sent_us, Reading::NtpOffset { ms });
                let ms = packet.held_ms();
                self.seen(target, sent_us, Reading::NtpHeld { ms });
            }
            Err(error) => {
                if let NtpError::Kiss(kiss) = error {
                    let now_us = self.clock.now_us();
                    self.states[target]
                        .table
                        .refuses(Kind::Ntp, kiss.is_final(), now_us);
                }
                self.refused(target, Kind::Ntp, reason(error));
            }
        }
    }

    /// Takes the question that this answers, if its target sent it and all else fits, and when the answer came.
    fn settle(
        &mut self,
        kind: Kind,
        key: u64,
        incoming: &Incoming<'_>,
        fits: impl FnOnce(&Pending) -> bool,
    ) -> Option<(Pending, u64)> {
        let pending = self.pending.get(&(kind, key))?;
        if self.states[pending.target].address != incoming.from || !fits(pending) {
            return None;
        }
        let pending = self.pending.remove(&(kind, key))?;
        let by_kernel = incoming.control.received_us;
        let received_us = by_kernel.and_then(|of_day_us| self.clock.at(of_day_us, pending.sent_us));
        let received_us = received_us.unwrap_or_else(|| self.clock.now_us());
        if received_us.saturating_sub(pending.sent_us) <= us(self.spec.timeout) {
            let received_us = received_us.max(pending.sent_us);
            return Some((pending, received_us));
        }
        // It came after its time, and we looked only now.
        self.lost(kind, &pending);
        None
    }

    fn expire(&mut self) {
        let now_us = self.clock.now_us();
        while let Some((deadline_us, kind, key)) = self.deadlines.front().copied() {
            if deadline_us > now_us {
                break;
            }
            self.deadlines.pop_front();
            if let Some(pending) = self.pending.remove(&(kind, key)) {
                self.lost(kind, &pending);
            }
        }
    }

    fn lost(&mut self, kind: Kind, pending: &Pending) {
        let target = pending.target;
        self.counters[target].unanswered(kind);
        if self.states[target].table.unanswered(kind) {
            self.news(target, News::Unanswered(kind));
        }
        if kind == Kind::Echo {
            self.seen(target, pending.sent_us, Reading::Lost);
        }
    }

    fn refused(&mut self, target: usize, kind: Kind, why: String) {
        self.counters[target].refused();
        self.once(target, News::Refused(kind, why));
    }

    fn seen(&mut self, target: usize, sent_us: u64, reading: Reading) {
        (self.tell)(Event::Seen {
            target,
            sent_us,
            reading,
        });
    }

    fn news(&mut self, target: usize, news: News) {
        (self.tell)(Event::News { target, news });
    }

    /// Tells it, if it was not told before.
    fn once(&mut self, target: usize, news: News) {
        let told = &mut self.states[target].told;
        if told.contains(&news) {
            return;
        }
        if told.len() == TOLD_MAX {
            told.remove(0);
        }
        told.push(news.clone());
        self.news(target, news);
    }

    fn forget(&mut self, target: usize, news: &News) {
        self.states[target].told.retain(|told| told != news);
    }
}

/// What of a timestamp comes back.
fn timestamp_key(id: u16, sequence: u16, cookie: u32) -> u64 {
    u64::from(id) << 48 | u64::from(sequence) << 32 | u64::from(cookie)
}

/// Without the numbers, which would make every one another reason.
fn reason(error: NtpError) -> String {
    match error {
        NtpError::Held { .. } => {
            "it says to have kept the question for a time that can't be".to_owned()
        }
        other => other.to_string(),
    }
}

/// Bytes of a packet with these bytes in it.
fn on_the_wire(bytes: usize, kind: Kind, is_v6: bool) -> usize {
    let ip = if is_v6 { 40 } else { 20 };
    let udp = if kind == Kind::Ntp { 8 } else { 0 };
    debug_assert!(kind != Kind::Ntp || bytes >= PACKET_BYTES);
    bytes + ip + udp
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::TargetSpec;

    fn state(mac: Option<Mac>) -> State {
        let mut spec = TargetSpec::new("t", [10, 0, 0, 7].into());
        spec.mac = mac;
        let burst = ProberSpec::new(Vec::new()).burst;
        State {
            address: spec.address,
            port: 0,
            table: Timetable::new(&spec, burst, [true; 3], 0),
            id: 0,
            sequence: 0,
            told: Vec::new(),
            macs: mac.into_iter().collect(),
            is_pinned: mac.is_some(),
            announced: (0, 0),
        }
    }

    fn heard(mac: u8, address: Option<[u8; 4]>) -> Heard {
        Heard {
            mac: Mac([2, 0, 0, 0, 0, mac]),
            address: address.map(IpAddr::from),
            is_announcement: true,
        }
    }

    #[test]
    fn a_hardware_address_is_learnt_from_whoever_has_the_address_and_few_are_remembered() {
        let mut state = state(None);
        assert!(!state.is_meant(heard(1, None)));
        assert!(!state.is_meant(heard(1, Some([10, 0, 0, 8]))));
        assert!(state.is_meant(heard(1, Some([10, 0, 0, 7]))));
        assert!(state.is_meant(heard(1, None)));
        for mac in 2..40 {
            assert!(state.is_meant(heard(mac, Some([10, 0, 0, 7]))));
        }
        assert_eq!(state.macs.len(), MACS_MAX);
        assert!(state.is_meant(heard(39, None)) && !state.is_meant(heard(1, None)));
    }

    #[test]
    fn a_hardware_address_that_is_given_is_not_replaced_by_who_claims_the_address() {
        let mut state = state(Some(Mac([2, 0, 0, 0, 0, 9])));
        assert!(state.is_meant(heard(9, None)));
        for forged in 10..30 {
            state.is_meant(heard(forged, Some([10, 0, 0, 7])));
        }
        assert!(state.is_meant(heard(9, None)) && !state.is_meant(heard(10, None)));
    }

    #[test]
    fn a_flood_of_announcements_is_not_told_in_full() {
        let mut state = state(None);
        let told = (0..1000).filter(|_| state.may_tell(5_000_000)).count();
        assert_eq!(told, ANNOUNCEMENTS_MAX as usize);
        assert!(state.may_tell(6_000_000));
    }
}
