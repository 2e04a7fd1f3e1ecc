//! Who sits on the path, and what stands against him.
//!
//! A control connection carries encoded messages in records, as TLS does: each has a number and a tag over its bytes
//! that only the two ends can make, anew for each connection and direction. The tag here is no cryptography: the
//! attacker of this simulation does not try to forge one, he flips, cuts, repeats, swaps and replays. What he did is
//! noticed, and the connection is over.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::*;

/// Most records that the attacker keeps to replay.
const KEPT_MAX: usize = 32;

/// One record of a control connection.
#[derive(Clone, Debug)]
pub(super) struct Record {
    bytes: Vec<u8>,
    sequence: u64,
    tag: u64,
}

/// What the attacker does to the next record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tampering {
    Flip,
    Truncate,
    /// The half of it arrives, then the connection ends.
    Half,
    Duplicate,
    /// It and the next change places.
    Reorder,
    /// One that was recorded before, on whatever connection, arrives instead.
    Replay,
    /// It, and all that follows, arrives much later.
    Delay,
}

impl Tampering {
    pub(super) const ALL: [Self; 7] = [
        Self::Flip,
        Self::Truncate,
        Self::Half,
        Self::Duplicate,
        Self::Reorder,
        Self::Replay,
        Self::Delay,
    ];
}

/// One direction of one connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Direction {
    connection: u32,
    sent: u64,
    received: u64,
    /// Something else than what comes next has arrived: nothing more does.
    over: bool,
    /// What was sent and has not arrived: the truth that the tags stand for.
    truth: VecDeque<Message>,
}

impl Direction {
    pub(super) fn of(connection: u32) -> Self {
        Self {
            connection,
            ..Self::default()
        }
    }

    fn tag(&self, back: bool, sequence: u64, bytes: &[u8]) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.connection, back, sequence, bytes).hash(&mut hasher);
        hasher.finish()
    }
}

impl World {
    fn direction(&mut self, back: bool) -> &mut Direction {
        &mut self.directions[usize::from(back)]
    }

    /// Encodes and seals a message, and hands it to whoever is on the path.
    pub(super) fn send_record(&mut self, message: Message, back: bool) {
        let Ok(bytes) = message.encode() else {
            self.broken = Some("a machine sent a message that cannot be encoded");
            return;
        };
        let direction = self.direction(back);
        let sequence = direction.sent;
        direction.sent += 1;
        let tag = direction.tag(back, sequence, &bytes);
        direction.truth.push_back(message);
        let record = Record {
            bytes,
            sequence,
            tag,
        };
        if self.kept.len() < KEPT_MAX {
            self.kept.push(record.clone());
        }
        self.on_the_path(record, back);
    }

    fn on_the_path(&mut self, mut record: Record, back: bool) {
        if let Some((held, _)) = self.held.take_if(|(_, direction)| *direction == back) {
            self.put_record(record, back);
            return self.put_record(held, back);
        }
        let Some(tampering) = self.tampering.take() else {
            return self.put_record(record, back);
        };
        if self.tracing {
            let (now, name) = (self.now, Message::decode(&record.bytes[4..]));
            let name = name.map_or("?", |message| message.name());
            self.trace
                .push(format!("{now:>9} us    path: {tampering:?} {name}"));
        }
        match tampering {
            Tampering::Flip => {
                let bit = self.random.below(record.bytes.len() as u64 * 8);
                record.bytes[bit as usize / 8] ^= 1 << (bit % 8);
                self.put_record(record, back);
            }
            Tampering::Truncate | Tampering::Half => {
                let length = self.random.below(record.bytes.len() as u64);
                record.bytes.truncate(length as usize);
                self.put_record(record, back);
                if tampering == Tampering::Half {
                    self.end_after_this();
                }
            }
            Tampering::Duplicate => {
                self.put_record(record.clone(), back);
                self.put_record(record, back);
            }
            Tampering::Reorder => self.held = Some((record, back)),
            Tampering::Replay => {
                let index = self.random.below(self.kept.len() as u64) as usize;
                let other = self.kept.get(index).cloned().unwrap_or(record);
                self.put_record(other, back);
            }
            Tampering::Delay => {
                let delay = self.delay(4000);
                let free = if back {
                    &mut self.back_free
                } else {
                    &mut self.wire_free
                };
                *free = (*free).max(self.now + delay);
                self.put_record(record, back);
            }
        }
    }

    fn put_record(&mut self, record: Record, back: bool) {
        let event = if back {
            Event::ToSource(self.destination_end, record)
        } else {
            Event::ToDestination(self.source_end, record)
        };
        self.put_on_wire(event, back);
    }

    /// Opens a record. None: it is not what comes next on this connection, which is over.
    pub(super) fn open_record(&mut self, record: &Record, back: bool) -> Option<Message> {
        let trusts = self.is(Mutation::PathIsTrusted);
        let takes_half = self.is(Mutation::HalfMessageAccepted);
        let direction = self.direction(back);
        let expected = direction.received;
        let genuine = record.sequence == expected
            && record.tag == direction.tag(back, expected, &record.bytes);
        direction.received += 1;
        if direction.over || !genuine && !trusts && !takes_half {
            return None;
        }
        let truth = direction.truth.pop_front();
        let mut prefix = [0; 4];
        prefix.copy_from_slice(record.bytes.get(..4)?);
        let length = Message::length(prefix).ok()?;
        let cbor = record.bytes.get(4..)?;
        if cbor.len() < length && takes_half {
            self.broken = Some("half a message was taken for a whole one");
        }
        let message = Message::decode(cbor.get(..length)?).ok()?;
        if truth.as_ref() != Some(&message) {
            self.broken = Some("a message was accepted that was not sent like that");
        }
        Some(message)
    }

    /// The connection is over for the end that noticed; the other learns of it.
    pub(super) fn tampering_noticed(&mut self, back: bool) {
        if !std::mem::replace(&mut self.direction(back).over, true) {
            self.noticed += 1;
            self.cut();
        }
    }

    fn end_after_this(&mut self) {
        let delay = self.delay(10);
        self.after(delay, Event::Cut);
    }
}
