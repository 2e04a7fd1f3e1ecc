//! What crosses the control channel, what a restart reads, and what opens a data stream.

use std::fmt::Debug;

use palanquin_agent::net::wire::take_message;
use palanquin_agent::stream_proof::{OPENING_BYTES, Opening};
use palanquin_engine::ids::{Challenge32, Sha256, StreamSecret};
use palanquin_engine::journal::{DestinationRecord, SourceRecord, verdict};
use palanquin_engine::message::{
    Accepted, Complete, Demand, Hello, HelloReply, MESSAGE_MAX, Offer, Present, Query, Ready,
    Reason, Refused, Rejoin, Seal, Verdict, WireBlocker,
};
use palanquin_engine::order::{Ledger, NAME_MAX};
use palanquin_engine::strategy::PostCopyUse;
use palanquin_engine::{Epoch, Message, MessageError, MigrationId, Order, Root, VmId};

use super::within;
use crate::entry::Target;

/// Most bytes that reading a message may take for each of its own: a text of one byte becomes 24, and lists grow by
/// doubling.
const EXPANSION: usize = 96;
/// What errors and the like may take besides.
const SLACK: usize = 16 << 10;

/// One message.
pub(crate) const MESSAGE: Target = Target::new("message", message, || {
    let mut seeds: Vec<_> = samples().iter().map(cbor).collect();
    seeds.extend(odd());
    seeds
});

/// Bytes as they come from the channel, cut anywhere.
pub(crate) const MESSAGE_PIECES: Target = Target::new("message-pieces", pieces, || {
    let whole = |messages: &[Message]| {
        let mut bytes = vec![3];
        bytes.extend(messages.iter().flat_map(|m| m.encode().expect("a sample")));
        bytes
    };
    let mut seeds = vec![whole(&samples()), whole(&[Message::Ping, Message::Ping])];
    // Lengths at and beyond every bound, and messages shorter and longer than they say.
    for len in [
        0,
        1,
        2,
        0x7f,
        MESSAGE_MAX as u32,
        MESSAGE_MAX as u32 + 1,
        1 << 31,
        u32::MAX,
    ] {
        seeds.push([&[1][..], &len.to_le_bytes(), b"\x82\x0e\x80"].concat());
    }
    seeds
});

/// Records of the journal, as a restarted agent reads them.
pub(crate) const RECORDS: Target = Target::new("records", records, || {
    let order = order_sample();
    let reason = Reason::new("code", "message");
    let rejoin = [
        SourceRecord::Ordered(order.clone()),
        SourceRecord::Committed(Epoch(5)),
        SourceRecord::Released(Epoch(5)),
        SourceRecord::Erased,
        SourceRecord::Aborted(reason.clone()),
        SourceRecord::TakenBack(Epoch(6)),
    ];
    let source = rejoin
        .iter()
        .map(|record| [vec![0], to_cbor(record)].concat());
    let destination = [
        DestinationRecord::Reserved(order),
        DestinationRecord::Owned(Epoch(5)),
        DestinationRecord::Activated,
        DestinationRecord::Discarded(reason),
        DestinationRecord::Pulling(Epoch(5)),
    ];
    let all = destination.iter().flat_map(to_cbor);
    let all = [vec![1], all.collect()].concat();
    source.chain([all]).collect()
});

/// Orders, judged with any knowledge.
pub(crate) const ORDER: Target = Target::new("order", order, || {
    let mut names = vec![order_sample()];
    for name in ["", "../x", "a/b", "a\0", "\u{430}", &"a".repeat(65), "A"] {
        names.push(Order {
            vm_name: name.to_owned(),
            ..order_sample()
        });
    }
    for epoch in [0, u64::MAX - 3, u64::MAX - 2, u64::MAX] {
        names.push(Order {
            epoch: Epoch(epoch),
            ..order_sample()
        });
    }
    let flags = (0..8).map(|flags| [vec![flags, 4], to_cbor(&order_sample())].concat());
    let orders = names
        .iter()
        .map(|order| [vec![0, 0], to_cbor(order)].concat());
    orders.chain(flags).collect()
});

/// What opens a stream.
pub(crate) const OPENING: Target = Target::new("stream-opening", opening, || {
    let good = Opening::new(&SECRET, MigrationId([7; 16]), 3, &EXPORTER).encode();
    let mut flipped = good;
    flipped[OPENING_BYTES - 1] ^= 1;
    let mut moved = good;
    moved[16] ^= 1;
    vec![
        good.to_vec(),
        flipped.to_vec(),
        moved.to_vec(),
        vec![0; OPENING_BYTES],
        vec![],
    ]
});

const SECRET: StreamSecret = StreamSecret([5; 32]);
const EXPORTER: [u8; 32] = [6; 32];

fn cbor(message: &Message) -> Vec<u8> {
    message.encode().expect("a sample")[4..].to_vec()
}

fn to_cbor<T: minicbor::Encode<()>>(value: &T) -> Vec<u8> {
    minicbor::to_vec(value).expect("a vector takes everything")
}

/// An order that is good.
pub(crate) fn order_sample() -> Order {
    Order {
        migration: MigrationId([1; 16]),
        vm: VmId([2; 16]),
        vm_name: "web".to_owned(),
        epoch: Epoch(4),
        source: "a".to_owned(),
        destination: "b".to_owned(),
        expires_unix_s: 1000,
        run: true,
    }
}

/// An offer that is good.
pub(crate) fn offer_sample() -> Offer {
    Offer {
        order: order_sample(),
        descriptor: vec![7; 40],
        region_pages: vec![600, 3],
        streams: 2,
        digest_seed: 9,
        post_copy: PostCopyUse::IfPossible,
        credentials: vec![5; 30],
    }
}

/// In the greeting of whoever connects.
pub(crate) const CHALLENGE: Challenge32 = Challenge32([10; 32]);
/// In the answer.
pub(crate) const REPLY_CHALLENGE: Challenge32 = Challenge32([11; 32]);
/// When the VM is being paused.
pub(crate) const LAST_CHALLENGE: Challenge32 = Challenge32([12; 32]);

fn samples() -> Vec<Message> {
    let blocker = WireBlocker {
        code: "memory-short".to_owned(),
        message: "m".to_owned(),
        remedy: "r".to_owned(),
    };
    let stream_secret = SECRET;
    let rejoin = Rejoin {
        streams: 2,
        stream_secret,
    };
    let hello = Hello::ours("0.1.0", CHALLENGE);
    vec![
        Message::HelloReply(HelloReply::to(&hello, "0.1.0", REPLY_CHALLENGE)),
        // Of another version.
        Message::Hello(Hello {
            versions: vec![4],
            challenge: None,
            ..hello.clone()
        }),
        Message::Hello(hello),
        Message::Offer(offer_sample()),
        Message::Check(offer_sample()),
        Message::CheckReply(vec![blocker.clone(), blocker.clone()]),
        Message::Refused(Refused {
            by_gate: true,
            blockers: vec![blocker],
        }),
        Message::Accepted(Accepted {
            streams: 2,
            stream_secret,
            post_copy: true,
            evidence: vec![4; 20],
        }),
        Message::StreamsReady,
        Message::RoundReceived(1),
        Message::Seal(Seal {
            rounds: 3,
            device_state_bytes: 9,
            device_state_sha256: Sha256([3; 32]),
            post_copy: false,
        }),
        Message::Challenge(LAST_CHALLENGE),
        Message::Ready(Ready {
            root: Root([8; 32]),
            evidence: vec![4; 20],
        }),
        Message::Commit(Epoch(5)),
        Message::Running(Epoch(5)),
        Message::Erased,
        Message::Abort(Reason::new("code", "message")),
        Message::Discarded(Reason::new("code", "message")),
        Message::Ping,
        Message::Query(Query {
            migration: MigrationId([1; 16]),
            vm: VmId([2; 16]),
        }),
        Message::Verdict(Verdict::Owned(Epoch(5))),
        Message::Verdict(Verdict::Discarded),
        Message::Verdict(Verdict::Undecided),
        Message::Verdict(Verdict::Unknown),
        Message::Verdict(Verdict::Pulling(rejoin)),
        Message::Verdict(Verdict::Receiving(rejoin, 2)),
        Message::Demand(Demand { region: 0, page: 9 }),
        Message::Present(Present {
            region: 0,
            first_page: 64,
            bits: vec![255; 16],
            last: true,
        }),
        Message::Complete(Complete {
            root: None,
            fault_wait_log2_us: vec![1, 2, 3],
        }),
    ]
}

/// CBOR that is not what a message looks like.
fn odd() -> Vec<Vec<u8>> {
    let mut all = vec![
        vec![],
        vec![0x00],
        // Announced lengths without contents: 2^31 - 1 and more elements, bytes, letters.
        b"\x82\x00\x81\x9a\x7f\xff\xff\xff".to_vec(),
        b"\x82\x00\x81\x9b\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
        b"\x82\x02\x81\xa1\x01\x5b\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
        b"\x82\x0c\x81\xa1\x00\x7b\x80\x00\x00\x00\x00\x00\x00\x00".to_vec(),
        // Of indefinite length, and not ended.
        b"\x9f\x00\x81\xbf\x00\x9f".to_vec(),
        // A message that does not exist, and one with more behind it.
        b"\x82\x18\xff\x80".to_vec(),
        b"\x82\x0e\x80\x00".to_vec(),
        // A key twice, and a key that does not exist.
        b"\x82\x11\x81\xa2\x00\x61a\x00\x61b".to_vec(),
        b"\x82\x0c\x81\xa3\x00\x61a\x01\x61b\x18\x63\x61c".to_vec(),
        // Text that is not UTF-8.
        b"\x82\x0c\x81\xa2\x00\x61\xff\x01\x61b".to_vec(),
    ];
    // Nested deeply, where any value is skipped.
    let deep = [
        b"\x82\x0c\x81\xa3\x00\x61a\x01\x61b\x18\x63".to_vec(),
        vec![0x81; 5000],
        vec![0],
    ];
    all.push(deep.concat());
    all
}

fn message(data: &[u8]) {
    let read = within(data.len() * EXPANSION + SLACK, || Message::decode(data));
    let Ok(message) = read else {
        return;
    };
    assert!(!message.name().is_empty());
    assert!(!format!("{message:?}").is_empty());
    match message.encode() {
        Ok(bytes) => {
            let prefix = *bytes.first_chunk().expect("a length");
            assert_eq!(Message::length(prefix), Ok(bytes.len() - 4));
            assert_eq!(Message::decode(&bytes[4..]), Ok(message));
        }
        // Absent fields are written as such, which takes a byte or two.
        Err(MessageError::TooLong(_)) => assert!(data.len() > MESSAGE_MAX - 64),
        Err(error) => panic!("what was read cannot be written: {error}"),
    }
}

fn pieces(data: &[u8]) {
    let Some((&step, stream)) = data.split_first() else {
        return;
    };
    let all = |step: usize| {
        let mut received = Vec::new();
        let mut messages = Vec::new();
        for piece in stream.chunks(step) {
            received.extend_from_slice(piece);
            loop {
                match take_message(&mut received) {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break,
                    Err(error) => return (messages, Some(error)),
                }
            }
            assert!(
                received.len() < 4 + MESSAGE_MAX + step,
                "it waits for more than a message"
            );
        }
        (messages, None)
    };
    assert_eq!(all(usize::from(step).max(1)), all(stream.len().max(1)));
}

/// Reads what can be read, which must be the same when it is written and read again.
fn again<T>(data: &[u8]) -> Option<(T, usize)>
where
    T: for<'b> minicbor::Decode<'b, ()> + minicbor::Encode<()> + PartialEq + Debug,
{
    let mut decoder = minicbor::Decoder::new(data);
    let value: T = within(data.len() * EXPANSION + SLACK, || decoder.decode()).ok()?;
    let read: T = minicbor::decode(&to_cbor(&value)).expect("what was written can be read");
    assert_eq!(read, value);
    Some((value, decoder.position()))
}

fn records(data: &[u8]) {
    let Some((&side, mut rest)) = data.split_first() else {
        return;
    };
    if side % 2 == 0 {
        if let Some((record, _)) = again::<SourceRecord>(rest) {
            let _ = record.recovery();
        }
        return;
    }
    let mut all = Vec::new();
    while let Some((record, len)) = again::<DestinationRecord>(rest) {
        let _ = record.recovery();
        all.push(record);
        rest = &rest[len..];
        let at_work = verdict(&all, true);
        let alone = verdict(&all, false);
        let owns = all.iter().any(|record| {
            matches!(
                record,
                DestinationRecord::Owned(_) | DestinationRecord::Pulling(_)
            )
        });
        let discarded = matches!(all.last(), Some(DestinationRecord::Discarded(_)));
        for said in [at_work, alone] {
            match said {
                Verdict::Owned(_) => assert!(owns && !discarded),
                Verdict::Discarded => assert!(discarded),
                Verdict::Unknown => panic!("there is a record"),
                Verdict::Undecided | Verdict::Pulling(_) => {}
                Verdict::Receiving(..) => panic!("only a session can say that"),
            }
        }
        let undecided = all
            .last()
            .is_some_and(|last| matches!(last, DestinationRecord::Owned(_)));
        assert!(
            !undecided || at_work == Verdict::Undecided,
            "the VM may still not be resumed"
        );
    }
}

fn order(data: &[u8]) {
    let [flags, known, rest @ ..] = data else {
        return;
    };
    let Some((order, _)) = again::<Order>(rest) else {
        return;
    };
    let ledger = Ledger {
        host: "b".to_owned(),
        peer: "a".to_owned(),
        unix_s: 1000,
        migration_seen: flags & 1 != 0,
        epoch_known: (flags & 8 == 0).then_some(Epoch(u64::from(*known))),
        vm_present: flags & 2 != 0,
        full: flags & 4 != 0,
        refusals: vec![],
    };
    let judged = order.judge(&ledger);
    let refused = order.refused(&ledger);
    assert_eq!(refused.is_some(), judged.is_err());
    // What a gate refuses is refused by a gate, whatever else there is, and nothing but what it says of the host is told.
    let gates = Ledger {
        refusals: vec![WireBlocker {
            code: "gate".repeat(usize::from(*known)),
            message: String::new(),
            remedy: String::new(),
        }],
        ..ledger.clone()
    };
    let both = order.refused(&gates).expect("a gate refuses");
    assert!(both.by_gate);
    let by_order = refused.is_some_and(|refused| refused.by_gate);
    assert_eq!(both.blockers.len(), 1 + usize::from(by_order));
    assert!(Message::Refused(both).encode().is_ok());
    match judged {
        Ok(()) => {
            for name in [&order.vm_name, &order.source, &order.destination] {
                assert!((1..=NAME_MAX).contains(&name.len()));
                assert!(!name.starts_with(['.', '-', '_']));
                assert!(!name.contains(|c: char| "/\\\0\n ,:".contains(c) || !c.is_ascii()));
            }
            assert_eq!(
                (order.source.as_str(), order.destination.as_str()),
                ("a", "b")
            );
            assert!(order.expires_unix_s >= 1000 && flags & 7 == 0);
            assert!(ledger.epoch_known.is_none_or(|known| known <= order.epoch));
            // The commit and what may follow it have epochs of their own.
            assert!(order.epoch < order.epoch.next());
            assert!(order.epoch.next() < order.epoch.next().next());
        }
        Err(error) => assert!(!error.code().is_empty() && !error.to_string().is_empty()),
    }
}

fn opening(data: &[u8]) {
    let Some(bytes) = data.first_chunk::<OPENING_BYTES>() else {
        return;
    };
    let opening = Opening::decode(bytes);
    assert_eq!(&opening.encode(), bytes);
    let proper = Opening::new(&SECRET, opening.migration, opening.index, &EXPORTER);
    assert_eq!(opening.holds(&SECRET, &EXPORTER), opening == proper);
    assert!(!opening.holds(&SECRET, &[7; 32]));
}
