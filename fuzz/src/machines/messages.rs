//! Any message, with contents that are right more often than by chance.

use arbitrary::{Result, Unstructured};
use palanquin_engine::ids::{Challenge32, Sha256, StreamSecret};
use palanquin_engine::message::{
    Accepted, Complete, Demand, Hello, HelloReply, Present, Query, Ready, Reason, Refused, Rejoin,
    Seal, Verdict,
};
use palanquin_engine::{Epoch, Message, MigrationId, Root, VmId};

use crate::targets::message::{CHALLENGE, LAST_CHALLENGE, REPLY_CHALLENGE, offer_sample};

/// Epoch under which the destination owns the VM.
pub(crate) const COMMIT_EPOCH: Epoch = Epoch(5);

/// One of few roots.
pub(crate) fn root(u: &mut Unstructured<'_>) -> Result<Root> {
    Ok(Root([u8::from(u.ratio(1, 8)?); 32]))
}

/// Why something ends.
pub(crate) fn reason() -> Reason {
    Reason::new("fuzzed", "an input said so")
}

fn epoch(u: &mut Unstructured<'_>) -> Result<Epoch> {
    Ok(if u.ratio(1, 8)? {
        Epoch(u.int_in_range(0..=9)?)
    } else {
        COMMIT_EPOCH
    })
}

/// An answer to a source in doubt.
pub(crate) fn verdict(u: &mut Unstructured<'_>) -> Result<Verdict> {
    Ok(match u.int_in_range(0..=5)? {
        5 => Verdict::Receiving(
            Rejoin {
                streams: offer_sample().streams,
                stream_secret: StreamSecret([3; 32]),
            },
            u.int_in_range(0..=3)?,
        ),
        0 => Verdict::Owned(epoch(u)?),
        1 => Verdict::Discarded,
        2 => Verdict::Undecided,
        3 => Verdict::Unknown,
        _ => Verdict::Pulling(Rejoin {
            streams: 1,
            stream_secret: StreamSecret([3; 32]),
        }),
    })
}

/// Pages that are there.
pub(crate) fn present(u: &mut Unstructured<'_>) -> Result<Present> {
    Ok(Present {
        region: u.int_in_range(0..=2)?,
        first_page: 64 * u.int_in_range(0..=9_u64)?,
        bits: vec![u.arbitrary()?; u.int_in_range(0..=8)?],
        last: u.arbitrary()?,
    })
}

/// The seal of a migration with that many rounds.
pub(crate) fn seal(u: &mut Unstructured<'_>, rounds: u32) -> Result<Seal> {
    Ok(Seal {
        rounds,
        device_state_bytes: if u.ratio(1, 16)? { u.arbitrary()? } else { 9 },
        device_state_sha256: Sha256([1; 32]),
        post_copy: u.arbitrary()?,
    })
}

/// A challenge that is mostly there.
fn challenge(u: &mut Unstructured<'_>, good: Challenge32) -> Result<Option<Challenge32>> {
    Ok(if u.ratio(1, 8)? { None } else { Some(good) })
}

/// What a host says about itself; the machines do not look into it.
pub(crate) fn evidence(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    Ok(vec![1; u.int_in_range(0..=2)?])
}

/// What a destination says that is ready.
pub(crate) fn ready(u: &mut Unstructured<'_>) -> Result<Ready> {
    Ok(Ready {
        root: root(u)?,
        evidence: evidence(u)?,
    })
}

/// Any message. One that the protocol gets anew is reached through the last kind until it is entered here.
pub(crate) fn any(u: &mut Unstructured<'_>) -> Result<Message> {
    Ok(match u.int_in_range(0..=22)? {
        0 => Message::Hello(Hello {
            challenge: challenge(u, CHALLENGE)?,
            ..Hello::ours("fuzz", CHALLENGE)
        }),
        1 => {
            let hello = Hello::ours("fuzz", CHALLENGE);
            let reply = HelloReply::to(&hello, "fuzz", REPLY_CHALLENGE);
            let challenge = challenge(u, REPLY_CHALLENGE)?;
            let version = if u.arbitrary()? {
                reply.version
            } else {
                u.arbitrary()?
            };
            Message::HelloReply(HelloReply {
                version,
                challenge,
                ..reply
            })
        }
        2 => Message::Offer(offer_sample()),
        3 => Message::Refused(Refused {
            by_gate: u.arbitrary()?,
            blockers: vec![],
        }),
        4 => Message::Accepted(Accepted {
            streams: u.int_in_range(1..=16)?,
            stream_secret: StreamSecret([2; 32]),
            post_copy: u.arbitrary()?,
            evidence: evidence(u)?,
        }),
        5 => Message::StreamsReady,
        6 => Message::RoundReceived(if u.ratio(1, 8)? {
            u.arbitrary()?
        } else {
            u.int_in_range(0..=9)?
        }),
        7 => {
            let rounds = u.int_in_range(0..=9)?;
            Message::Seal(seal(u, rounds)?)
        }
        8 => Message::Ready(ready(u)?),
        9 => Message::Commit(epoch(u)?),
        10 => Message::Running(epoch(u)?),
        11 => Message::Erased,
        12 => Message::Abort(reason()),
        13 => Message::Discarded(reason()),
        14 => Message::Ping,
        15 => Message::Query(Query {
            migration: MigrationId([1; 16]),
            vm: VmId([2; 16]),
        }),
        16 => Message::Verdict(verdict(u)?),
        17 => Message::CheckReply(vec![]),
        18 => Message::Demand(Demand {
            region: u.int_in_range(0..=2)?,
            page: if u.ratio(1, 8)? {
                u.arbitrary()?
            } else {
                u.int_in_range(0..=610)?
            },
        }),
        19 => Message::Present(present(u)?),
        20 => Message::Complete(Complete {
            root: if u.arbitrary()? { Some(root(u)?) } else { None },
            fault_wait_log2_us: vec![],
        }),
        21 => Message::Challenge(if u.ratio(1, 8)? {
            CHALLENGE
        } else {
            LAST_CHALLENGE
        }),
        _ => {
            let len = u.int_in_range(0..=32_usize)?.min(u.len());
            Message::decode(u.bytes(len)?).unwrap_or(Message::Ping)
        }
    })
}
