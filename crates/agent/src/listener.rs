//! Connections from other hosts.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use aws_lc_rs::rand;
use palanquin_api::control::Side;
use palanquin_engine::destination::DestinationAction;
use palanquin_engine::ids::{Challenge32, StreamSecret};
use palanquin_engine::journal::verdict;
use palanquin_engine::message::{
    Hello, HelloReply, Offer, Query, Reason, Refused, Verdict, WireBlocker,
};
use palanquin_engine::order::{Order, OrderError};
use palanquin_engine::pages::PAGE_BYTES;
use palanquin_engine::{Destination, DestinationConfig, DestinationRecord, Message};
use tracing::{info, warn};

use crate::agent::Agent;
use crate::chain::chain;
use crate::challenge;
use crate::channel::{BACKLOG_MAX, Channel, ChannelError};
use crate::crowd::{Complaints, Crowd, Place};
use crate::destination_session::{
    DestinationEvent, DestinationSession, descriptor_of, wire_blocker,
};
use crate::gate::{Bringer, wire_blockers};
use crate::net::protocol::Listen;
use crate::recovery;
use crate::tls::HANDSHAKE_DEADLINE;
use crate::tracked::{Session, Tracked, info_of};

/// Most data streams accepted for one migration.
const STREAMS_MAX: u16 = 16;
/// Longest wait for a session to decide, when its source asks.
const DECISION_TIMEOUT: Duration = Duration::from_secs(8);

/// Serves the connections that the network process accepts at this socket, each on a thread of its own.
pub fn start(agent: &Arc<Agent>, listener: TcpListener) {
    let limits = &agent.config.limits;
    let listen = Listen {
        pending: limits.max_pending,
        per_address: limits.max_pending_per_address,
        per_host: limits.max_pending_per_host,
        migrations: limits.max_inbound,
    };
    let door = Arc::new(Door::new(&listen));
    let serving = Arc::downgrade(agent);
    let arrived = move |channel: Channel| {
        if let Some(agent) = serving.upgrade() {
            door.open(agent, channel);
        }
    };
    agent.network.listen(listener, listen, Box::new(arrived));
}

/// Bounds what hosts that belong to no migration can make this agent hold, and so what its network process can.
struct Door {
    /// Connections of hosts that are not part of a migration, by the name in the certificate.
    hosts: Arc<Crowd<String, Arc<Channel>>>,
    /// Threads that serve a connection, and the most there may be.
    threads: Arc<AtomicUsize>,
    threads_max: usize,
    complaints: Arc<Complaints>,
}

impl Door {
    fn new(limits: &Listen) -> Self {
        let count = |limit: u32| usize::try_from(limit).unwrap_or(usize::MAX);
        let most = count(limits.pending);
        Self {
            hosts: Crowd::new(most, count(limits.per_host)),
            threads: Arc::default(),
            // The crowd, the threads of those that have just left it, and the migrations.
            threads_max: 2 * most + 2 * count(limits.migrations),
            complaints: Arc::default(),
        }
    }

    fn open(&self, agent: Arc<Agent>, channel: Channel) {
        let peer = channel.peer.name().to_owned();
        if self.threads.fetch_add(1, Ordering::Relaxed) >= self.threads_max {
            self.threads.fetch_sub(1, Ordering::Relaxed);
            let why = "too many connections";
            return self.complaints.complain("closed at once", &why, &peer);
        }
        let guard = Thread(Arc::clone(&self.threads));
        let channel = Arc::new(channel);
        let (place, left) = self.hosts.enter(peer.clone(), Arc::clone(&channel));
        if let Some((from, channel)) = left {
            // Its thread notices.
            channel.close();
            let why = "too many connections that belong to no migration";
            self.complaints.complain("closed the oldest", &why, &from);
        }
        let (complaints, name) = (Arc::clone(&self.complaints), peer.clone());
        let work = move || {
            let _guard = guard;
            match converse(&agent, &channel, place) {
                Ok(()) | Err(ChannelError::Closed) => {}
                Err(error) => {
                    let why = chain(&error);
                    complaints.complain("a control connection ended", &why, &name);
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("peer".to_owned()).spawn(work) {
            self.complaints
                .complain("no thread for a connection", &error, &peer);
        }
    }
}

/// Counts a thread for as long as it serves a connection.
struct Thread(Arc<AtomicUsize>);

impl Drop for Thread {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection of a host, as long as it belongs to no migration.
type Waiting = Place<String, Arc<Channel>>;

/// Serves a control connection: a greeting, then questions or one offer.
fn converse(
    agent: &Arc<Agent>,
    channel: &Arc<Channel>,
    waiting: Waiting,
) -> Result<(), ChannelError> {
    channel.set_receive_timeout(Some(HANDSHAKE_DEADLINE));
    let Message::Hello(hello) = channel.receive()? else {
        return out_of_turn(channel, "a greeting was expected");
    };
    let challenge = challenge::fresh()?;
    let reply = HelloReply::to(&hello, crate::SOFTWARE, challenge);
    let common = reply.version.is_some();
    channel.send(&Message::HelloReply(reply))?;
    if !common {
        info!(peer = %channel.peer, software = hello.software, "no common version of the protocol");
        return Ok(());
    }
    if hello.challenge.is_none() {
        return out_of_turn(channel, "a challenge was expected in the greeting");
    }
    loop {
        match channel.receive()? {
            Message::Ping => {}
            Message::Query(query) => {
                let verdict = match answer(agent, &query, channel) {
                    Answer::Verdict(verdict) => verdict,
                    // The session answers, and has the connection from now on.
                    Answer::Rejoined(events, generation) => {
                        drop(waiting);
                        channel.settle();
                        forward(channel, &events, generation);
                        return Ok(());
                    }
                };
                info!(peer = %channel.peer, migration = %query.migration, ?verdict, "asked by the source");
                channel.send(&Message::Verdict(verdict))?;
            }
            Message::Check(offer) => {
                let blockers = check(agent, &offer, channel);
                channel.send(&Message::CheckReply(blockers))?;
            }
            Message::Offer(offer) => {
                return arrive(agent, channel, &hello, challenge, offer, waiting);
            }
            _ => return out_of_turn(channel, "a question or an offer was expected"),
        }
    }
}

fn out_of_turn(channel: &Channel, what: &str) -> Result<(), ChannelError> {
    warn!(peer = %channel.peer, what, "the peer broke the protocol");
    let reason = Reason::new("peer-misbehaved", what);
    // Nothing was recorded: a source in doubt may conclude nothing from it, as it would from a discard.
    channel.send(&Message::Abort(reason))?;
    channel.close();
    Ok(())
}

/// What would stand in the way of an offer.
fn check(agent: &Arc<Agent>, offer: &Offer, channel: &Channel) -> Vec<WireBlocker> {
    let mut blockers = Vec::new();
    match agent.ledger(&offer.order, channel.peer.name()) {
        Ok(ledger) => {
            if let Err(error) = offer.order.judge(&ledger) {
                blockers.push(error.into());
            }
        }
        Err(error) => blockers.push(WireBlocker {
            code: "journal".to_owned(),
            message: chain(&error),
            remedy: "Look at the log of the destination's agent.".to_owned(),
        }),
    }
    let bringer = Bringer {
        identity: &channel.peer,
        key: channel.peer_key.as_ref(),
        // Nothing is shown before it is asked for.
        asked: (Challenge32([0; 32]), channel.exporter()),
    };
    if let Err(reasons) = agent.clear_in(offer, bringer, true) {
        blockers.extend(wire_blockers(&reasons));
    }
    match descriptor_of(offer) {
        Ok(descriptor) => {
            let available = agent
                .memory_for(offer.order.migration, Some(&offer.order.source))
                .unwrap_or(0);
            let obstacles = agent.hypervisor.check(&descriptor, available);
            blockers.extend(obstacles.iter().map(wire_blocker));
        }
        Err(blocker) => blockers.push(blocker),
    }
    blockers.truncate(palanquin_engine::message::BLOCKERS_MAX);
    blockers.into_iter().map(WireBlocker::cut).collect()
}

/// What a source that asks gets.
enum Answer {
    Verdict(Verdict),
    /// Pages are still arriving, or the VM runs here and needs some: the connection is the migration's, of this
    /// generation.
    Rejoined(Sender<DestinationEvent>, u32),
}

/// What became of a migration to this host, for its source.
fn answer(agent: &Arc<Agent>, query: &Query, channel: &Arc<Channel>) -> Answer {
    let peer = channel.peer.name();
    if let Ok(Some((order, _))) = agent.store.destination_records(query.migration)
        && order.source == peer
        && order.vm == query.vm
        && let Some(tracked) = agent.migration(query.migration)
        && let Some(Session::Destination(sender)) = tracked.session()
    {
        let (reply, replied) = std::sync::mpsc::channel();
        let _ = sender.send(DestinationEvent::Query(Arc::clone(channel), reply));
        if let Ok(Some(generation)) = replied.recv_timeout(DECISION_TIMEOUT) {
            return Answer::Rejoined(sender, generation);
        }
    }
    Answer::Verdict(decided(agent, query, peer))
}

/// What the records say.
fn decided(agent: &Arc<Agent>, query: &Query, peer: &str) -> Verdict {
    let records = |agent: &Agent| agent.store.destination_records(query.migration);
    let Ok(Some((order, _))) = records(agent) else {
        return Verdict::Unknown;
    };
    if order.source != peer || order.vm != query.vm {
        warn!(peer, migration = %query.migration, "a host asks about a migration that is not its own");
        return Verdict::Unknown;
    }
    if let Some(tracked) = agent.migration(query.migration)
        && let Some(Session::Destination(_)) = tracked.session()
    {
        tracked.wait_done(DECISION_TIMEOUT);
        if tracked.session().is_some() {
            // It owns the VM and waits for the source to erase, or can't decide yet: the records tell.
            return records(agent)
                .ok()
                .flatten()
                .map_or(Verdict::Undecided, |(_, r)| verdict(&r, true));
        }
    }
    match records(agent) {
        Ok(Some((order, list))) => match verdict(&list, false) {
            Verdict::Undecided => {
                // No session decides it any more.
                match list.last() {
                    Some(DestinationRecord::Reserved(_)) => {
                        recovery::discard(agent, &order);
                        let list = records(agent).ok().flatten();
                        list.map_or(Verdict::Undecided, |(_, list)| verdict(&list, false))
                    }
                    _ => Verdict::Undecided,
                }
            }
            decided => decided,
        },
        // A record that can't be read decides nothing.
        _ => Verdict::Undecided,
    }
}

/// Takes an offer: this connection becomes the control channel of a migration.
fn arrive(
    agent: &Arc<Agent>,
    channel: &Arc<Channel>,
    hello: &Hello,
    challenge: Challenge32,
    offer: Offer,
    waiting: Waiting,
) -> Result<(), ChannelError> {
    let order = offer.order.clone();
    // The session judges it once more; but an order that is refused must not cost one.
    if let Ok(ledger) = agent.ledger(&order, channel.peer.name())
        && let Err(error) = order.judge(&ledger)
    {
        return refuse(agent, channel, &order, error);
    }
    let mut secret = StreamSecret([0; 32]);
    if rand::fill(&mut secret.0).is_err() {
        return out_of_turn(channel, "this host has no randomness");
    }
    let config = destination_config(agent, secret, challenge);
    let now = agent.now();
    let mut engine = Destination::new(now, config);
    engine.handle_message(now, Message::Hello(hello.clone()));
    // The greeting was answered before it was known what the connection is for.
    while let Some(action) = engine.poll_action() {
        debug_assert!(matches!(
            action,
            DestinationAction::Send(Message::HelloReply(_))
        ));
    }
    let ram_bytes = offer
        .region_pages
        .iter()
        .fold(0_u64, |sum, p| sum.saturating_add(*p));
    let mut info = info_of(
        &order,
        Side::Destination,
        ram_bytes.saturating_mul(PAGE_BYTES),
    );
    info.cipher = Some(channel.cipher.clone());
    info.key_exchange = Some(channel.key_exchange.clone());
    let (sender, events) = channel_of();
    let tracked = Arc::new(Tracked::new(
        info,
        Some(Session::Destination(sender.clone())),
    ));
    if !agent.track_new(order.migration, &tracked) {
        return refuse(agent, channel, &order, OrderError::Replayed);
    }
    let session = DestinationSession::new(agent, engine, &offer, channel, &tracked, sender.clone());
    let session = session.inspect_err(|_| agent.untrack(order.migration))?;
    drop(waiting);
    channel.settle();
    let _ = sender.send(DestinationEvent::Message(0, Message::Offer(offer)));
    let reader = Arc::clone(channel);
    thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || forward(&reader, &sender, 0))?;
    agent.run_destination(session, &events, order.migration);
    Ok(())
}

/// Says why an order is not taken; nothing of it stays.
fn refuse(
    agent: &Agent,
    channel: &Channel,
    order: &Order,
    error: OrderError,
) -> Result<(), ChannelError> {
    warn!(peer = %channel.peer, migration = %order.migration, code = error.code(), %error, "an order was refused");
    let by_gate = error.is_refusal();
    let blockers = vec![error.into()];
    if by_gate && agent.gate.judges() {
        agent.note_refused_order(order, &channel.peer.to_string(), &blockers);
    }
    channel.send(&Message::Refused(Refused { by_gate, blockers }))?;
    channel.close();
    Ok(())
}

/// Tells a session what arrives on its connection, which is the one of this generation, until that is lost.
fn forward(channel: &Channel, events: &Sender<DestinationEvent>, generation: u32) {
    loop {
        for _ in 0..BACKLOG_MAX {
            let event = match channel.receive() {
                Ok(message) => DestinationEvent::Message(generation, message),
                Err(error) => {
                    let reason = Reason::new("connection-lost", chain(&error));
                    DestinationEvent::Lost(generation, reason)
                }
            };
            let lost = matches!(event, DestinationEvent::Lost(..));
            if events.send(event).is_err() || lost {
                return;
            }
        }
        // Whoever sends faster than the session works waits.
        let (done, all_done) = channel_of();
        if events.send(DestinationEvent::Sync(done)).is_err() || all_done.recv().is_err() {
            return;
        }
    }
}

/// The settings of a destination; the challenge is that of the greeting.
pub fn destination_config(
    agent: &Agent,
    stream_secret: StreamSecret,
    challenge: Challenge32,
) -> DestinationConfig {
    let limits = &agent.config.limits;
    DestinationConfig {
        timing: agent.timing(),
        software: crate::SOFTWARE.to_owned(),
        stream_secret,
        streams_max: STREAMS_MAX,
        device_state_max: limits.device_state.bytes(),
        challenge,
    }
}

fn channel_of<T>() -> (Sender<T>, std::sync::mpsc::Receiver<T>) {
    channel()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::tests::{arrives, channel as channel_and_process, sent};

    #[test]
    fn who_breaks_the_protocol_is_not_told_that_anything_was_discarded() {
        let (channel, process) = channel_and_process();
        out_of_turn(&channel, "another message was expected").unwrap();
        assert!(matches!(sent(&process), Message::Abort(_)));
    }

    #[test]
    fn whoever_sends_faster_than_the_session_works_waits() {
        let (channel, process) = channel_and_process();
        let (sender, events) = channel_of();
        let forwarding = thread::spawn(move || forward(&channel, &sender, 0));
        for _ in 0..10 * BACKLOG_MAX {
            arrives(&process, &Message::Ping);
        }
        for _ in 0..3 {
            let mut messages = 0;
            let done = loop {
                match events.recv_timeout(HANDSHAKE_DEADLINE) {
                    Ok(DestinationEvent::Message(0, Message::Ping)) => messages += 1,
                    Ok(DestinationEvent::Sync(done)) => break done,
                    _ => panic!("another event, or none"),
                }
            };
            assert_eq!(messages, BACKLOG_MAX);
            let more = events.recv_timeout(Duration::from_millis(100));
            assert!(more.is_err(), "it does not wait");
            done.send(()).unwrap();
        }
        drop(events);
        forwarding.join().unwrap();
    }
}
