//! Connections from other hosts.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use aws_lc_rs::rand;
use palanquin_api::control::Side;
use palanquin_engine::destination::DestinationAction;
use palanquin_engine::ids::StreamSecret;
use palanquin_engine::journal::verdict;
use palanquin_engine::message::{
    Hello, HelloReply, Offer, Query, Reason, Refused, Verdict, WireBlocker,
};
use palanquin_engine::order::is_name;
use palanquin_engine::pages::PAGE_BYTES;
use palanquin_engine::time::Timing;
use palanquin_engine::{Destination, DestinationConfig, DestinationRecord, Message};
use rustls::Connection;
use tracing::{debug, info, warn};

use crate::agent::Agent;
use crate::channel::{Channel, ChannelError};
use crate::destination_session::{
    DestinationEvent, DestinationSession, descriptor_of, wire_blocker,
};
use crate::recovery;
use crate::source_session::chain;
use crate::stream_proof::{OPENING_BYTES, Opening};
use crate::tls::{Authenticated, HANDSHAKE_DEADLINE};
use crate::tracked::{Session, Tracked, info_of};

/// Most connections that have not shown what they are for; more are closed at once.
const PENDING_MAX: usize = 64;
/// Most data streams accepted for one migration.
const STREAMS_MAX: u16 = 16;
/// Longest wait for a session to decide, when its source asks.
const DECISION_TIMEOUT: Duration = Duration::from_secs(8);

/// Accepts connections for ever on a thread of its own.
///
/// # Errors
///
/// No thread can be had.
pub fn start(agent: &Arc<Agent>, listener: TcpListener) -> io::Result<()> {
    let agent = Arc::clone(agent);
    let pending = Arc::new(AtomicUsize::new(0));
    thread::Builder::new()
        .name("accept".to_owned())
        .spawn(move || {
            loop {
                match listener.accept() {
                    Ok((tcp, address)) => {
                        if pending.fetch_add(1, Ordering::Relaxed) >= PENDING_MAX {
                            pending.fetch_sub(1, Ordering::Relaxed);
                            warn!(%address, "too many connections at once, one was closed");
                            continue;
                        }
                        let (agent, guard) = (Arc::clone(&agent), Pending(Arc::clone(&pending)));
                        let work = move || serve(&agent, tcp, guard);
                        if let Err(error) =
                            thread::Builder::new().name("peer".to_owned()).spawn(work)
                        {
                            warn!(%error, "no thread for a connection");
                        }
                    }
                    Err(error) => {
                        warn!(%error, "a connection could not be accepted");
                        // Out of descriptors, most likely: other connections have to end first.
                        let pause = rustix::event::Timespec {
                            tv_sec: 0,
                            tv_nsec: 100_000_000,
                        };
                        let _ = rustix::event::poll(&mut [], Some(&pause));
                    }
                }
            }
        })?;
    Ok(())
}

/// Counts a connection until it has shown what it is for.
struct Pending(Arc<AtomicUsize>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(agent: &Arc<Agent>, tcp: TcpStream, pending: Pending) {
    let address = tcp
        .peer_addr()
        .map_or_else(|_| "?".to_owned(), |address| address.to_string());
    let authenticated = match agent.tls.accept(tcp) {
        Ok(authenticated) => authenticated,
        Err(error) => {
            warn!(%address, error = chain(&error), refused = error.is_refusal(), "connection refused");
            return;
        }
    };
    debug!(peer = %authenticated.peer, data = authenticated.is_data(), "connected");
    if authenticated.is_data() {
        match read_opening(authenticated) {
            Ok((stream, opening)) => agent.route_stream(stream, opening),
            Err(error) => debug!(%address, %error, "a data stream did not open"),
        }
        return;
    }
    let result = Channel::new(authenticated)
        .map_err(ChannelError::from)
        .and_then(|channel| {
            let channel = Arc::new(channel);
            converse(agent, &channel, pending)
        });
    match result {
        Ok(()) | Err(ChannelError::Closed) => {}
        Err(error) => debug!(%address, error = chain(&error), "a control connection ended"),
    }
}

fn read_opening(mut stream: Authenticated) -> io::Result<(Authenticated, Opening)> {
    use std::io::Read;

    stream.tcp.set_read_timeout(Some(HANDSHAKE_DEADLINE))?;
    let mut bytes = [0; OPENING_BYTES];
    let mut filled = 0;
    while filled < OPENING_BYTES {
        match stream.connection.reader().read(&mut bytes[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                filled += count;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if stream.connection.read_tls(&mut stream.tcp)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        process(&mut stream.connection)?;
    }
    stream.tcp.set_read_timeout(None)?;
    Ok((stream, Opening::decode(&bytes)))
}

fn process(connection: &mut Connection) -> io::Result<()> {
    connection
        .process_new_packets()
        .map(drop)
        .map_err(io::Error::other)
}

/// Serves a control connection: a greeting, then questions or one offer.
fn converse(
    agent: &Arc<Agent>,
    channel: &Arc<Channel>,
    pending: Pending,
) -> Result<(), ChannelError> {
    channel.set_receive_timeout(Some(HANDSHAKE_DEADLINE))?;
    let Message::Hello(hello) = channel.receive()? else {
        return out_of_turn(channel, "a greeting was expected");
    };
    let reply = HelloReply::to(&hello, crate::SOFTWARE);
    let common = reply.version.is_some();
    channel.send(&Message::HelloReply(reply))?;
    if !common {
        info!(peer = %channel.peer, software = hello.software, "no common version of the protocol");
        return Ok(());
    }
    drop(pending);
    loop {
        match channel.receive()? {
            Message::Ping => {}
            Message::Query(query) => {
                let verdict = match answer(agent, &query, channel) {
                    Answer::Verdict(verdict) => verdict,
                    // The session answers, and has the connection from now on.
                    Answer::Rejoined(events, generation) => {
                        channel.set_receive_timeout(None)?;
                        forward(channel, &events, generation);
                        return Ok(());
                    }
                };
                info!(migration = %query.migration, ?verdict, "asked by the source");
                channel.send(&Message::Verdict(verdict))?;
            }
            Message::Check(offer) => {
                let blockers = check(agent, &offer, &channel.peer.name);
                channel.send(&Message::CheckReply(blockers))?;
            }
            Message::Offer(offer) => return arrive(agent, channel, &hello, offer),
            _ => return out_of_turn(channel, "a question or an offer was expected"),
        }
    }
}

fn out_of_turn(channel: &Channel, what: &str) -> Result<(), ChannelError> {
    warn!(peer = %channel.peer, what, "the peer broke the protocol");
    let reason = Reason::new("peer-misbehaved", what);
    channel.send(&Message::Discarded(reason))?;
    channel.close();
    Ok(())
}

/// What would stand in the way of an offer.
fn check(agent: &Agent, offer: &Offer, peer: &str) -> Vec<WireBlocker> {
    let mut blockers = Vec::new();
    match agent.ledger(&offer.order, peer) {
        Ok(ledger) => {
            if let Err(error) = offer.order.judge(&ledger) {
                blockers.push(WireBlocker {
                    code: error.code().to_owned(),
                    message: error.to_string(),
                    remedy: palanquin_engine::destination::remedy(error.code()).to_owned(),
                });
            }
        }
        Err(error) => blockers.push(WireBlocker {
            code: "journal".to_owned(),
            message: chain(&error),
            remedy: "Look at the log of the destination's agent.".to_owned(),
        }),
    }
    match descriptor_of(offer) {
        Ok(descriptor) => {
            let available = agent.memory_for(offer.order.migration).unwrap_or(0);
            let obstacles = agent.hypervisor.check(&descriptor, available);
            blockers.extend(obstacles.iter().map(wire_blocker));
        }
        Err(blocker) => blockers.push(blocker),
    }
    blockers.truncate(palanquin_engine::message::BLOCKERS_MAX);
    blockers
}

/// What a source that asks gets.
enum Answer {
    Verdict(Verdict),
    /// The VM runs here and needs pages: the connection is the migration's, of this generation.
    Rejoined(Sender<DestinationEvent>, u32),
}

/// What became of a migration to this host, for its source.
fn answer(agent: &Arc<Agent>, query: &Query, channel: &Arc<Channel>) -> Answer {
    let peer = &channel.peer.name;
    if let Ok(Some((order, _))) = agent.store.destination_records(query.migration)
        && order.source == *peer
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
    offer: Offer,
) -> Result<(), ChannelError> {
    channel.set_receive_timeout(None)?;
    let order = offer.order.clone();
    if !is_name(&order.vm_name) || agent.migration(order.migration).is_some() {
        let blocker = WireBlocker {
            code: "order-replayed".to_owned(),
            message: "a migration of this identity was seen before, or its names make no sense"
                .to_owned(),
            remedy: "Start a new migration.".to_owned(),
        };
        return channel.send(&Message::Refused(Refused {
            by_gate: true,
            blockers: vec![blocker],
        }));
    }
    let mut secret = StreamSecret([0; 32]);
    if rand::fill(&mut secret.0).is_err() {
        return out_of_turn(channel, "this host has no randomness");
    }
    let config = destination_config(agent, secret);
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
    let (sender, events) = channel_of_events();
    let tracked = Arc::new(Tracked::new(
        info,
        Some(Session::Destination(sender.clone())),
    ));
    let session =
        DestinationSession::new(agent, engine, &offer, channel, &tracked, sender.clone())?;
    agent.track(order.migration, &tracked);
    let _ = sender.send(DestinationEvent::Message(0, Message::Offer(offer)));
    let reader = Arc::clone(channel);
    thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || forward(&reader, &sender, 0))?;
    agent.run_destination(session, &events, order.migration);
    Ok(())
}

/// Tells a session what arrives on its connection, which is the one of this generation, until that is lost.
fn forward(channel: &Channel, events: &Sender<DestinationEvent>, generation: u32) {
    loop {
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
}

/// The settings of a destination.
pub fn destination_config(agent: &Agent, stream_secret: StreamSecret) -> DestinationConfig {
    let limits = &agent.config.limits;
    DestinationConfig {
        timing: Timing {
            silence: limits.peer_silence.get(),
            ..Timing::default()
        },
        software: crate::SOFTWARE.to_owned(),
        stream_secret,
        streams_max: STREAMS_MAX,
        device_state_max: limits.device_state.bytes(),
    }
}

fn channel_of_events() -> (
    Sender<DestinationEvent>,
    std::sync::mpsc::Receiver<DestinationEvent>,
) {
    channel()
}
