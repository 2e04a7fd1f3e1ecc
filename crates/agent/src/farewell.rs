//! A source that ended its migration while the connection was lost tells the destination, which may wait for it and keep
//! a container until then.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use palanquin_engine::Message;
use palanquin_engine::message::{Hello, Query, Reason, Verdict};
use palanquin_engine::order::Order;
use tracing::{debug, warn};

use crate::agent::Agent;
use crate::challenge;
use crate::channel::{Channel, ChannelError};
use crate::dial::dial;

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest wait for a message.
const PATIENCE: Duration = Duration::from_secs(10);

/// Tells in the background, as long as the destination may wait. Only ever about a migration that was not committed and
/// whose end here is durable.
pub fn begin(agent: &Arc<Agent>, order: &Order, reason: Option<Reason>) {
    let (agent, order) = (Arc::clone(agent), order.clone());
    let reason = reason.unwrap_or_else(|| Reason::new("unknown", "no reason was recorded"));
    let started = thread::Builder::new()
        .name("farewell".to_owned())
        .spawn(move || {
            let end = Instant::now() + agent.timing().rejoin;
            while !tell(&agent, &order, &reason) && Instant::now() < end {
                // Nobody wakes it: there is no event that says that a link is back.
                thread::park_timeout(PAUSE);
            }
        });
    if let Err(error) = started {
        // It finds out by itself, later.
        warn!(%error, "the destination is not told that the migration has ended");
    }
}

/// True where there is nothing more to tell.
fn tell(agent: &Agent, order: &Order, reason: &Reason) -> bool {
    let channel = match dial(agent, &order.destination) {
        Ok(channel) => channel,
        Err(reason) => {
            debug!(%reason, "the destination cannot be told that the migration has ended");
            return false;
        }
    };
    let told = say(&channel, order, reason);
    channel.close();
    if let Err(error) = &told {
        debug!(%error, "the destination cannot be told that the migration has ended");
    }
    told.is_ok()
}

fn say(channel: &Channel, order: &Order, reason: &Reason) -> Result<(), ChannelError> {
    channel.set_receive_timeout(Some(PATIENCE));
    let hello = Hello::ours(crate::SOFTWARE, challenge::fresh()?);
    channel.send(&Message::Hello(hello))?;
    channel.receive()?;
    channel.send(&Message::Query(Query {
        migration: order.migration,
        vm: order.vm,
    }))?;
    if !matches!(channel.receive()?, Message::Verdict(Verdict::Receiving(..))) {
        // It waits for nobody.
        return Ok(());
    }
    channel.send(&Message::Abort(reason.clone()))?;
    loop {
        match channel.receive() {
            Ok(Message::Discarded(_)) | Err(ChannelError::Closed) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error),
        }
    }
}
