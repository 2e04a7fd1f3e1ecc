//! Messages of the control channel: CBOR (RFC 8949) with numbered fields, each behind its length.
//!
//! A decoder skips fields it does not know, so that fields may be added without a new version; what changes
//! the meaning of a migration needs a new version or a feature that both sides named in the greeting.

use minicbor::{Decode, Encode};

use crate::ids::{Challenge32, Epoch, MigrationId, Root, Sha256, StreamSecret, VmId};
use crate::order::Order;
use crate::strategy::PostCopyUse;

/// Versions of the protocol that this code speaks, best first.
pub const VERSIONS: [u16; 1] = [5];
/// Longest encoded message in bytes, without its length.
pub const MESSAGE_MAX: usize = 512 * 1024;
/// Longest descriptor in bytes.
pub const DESCRIPTOR_MAX: usize = 256 * 1024;
/// Longest credentials of an offer in bytes.
pub const CREDENTIALS_MAX: usize = 64 * 1024;
/// Longest evidence of a destination in bytes.
pub const EVIDENCE_MAX: usize = 32 * 1024;
/// Longest code of a reason or blocker in bytes.
const CODE_MAX: usize = 64;
/// Longest text of a reason or blocker in bytes.
const TEXT_MAX: usize = 2048;
/// Most data streams of a migration.
pub const STREAMS_MAX: u16 = 16;
/// Most blockers that are told.
pub const BLOCKERS_MAX: usize = 64;
/// Most bytes of bits in a [`Present`]: enough for 8 GiB of RAM.
pub const PRESENT_MAX: usize = 256 * 1024;
/// Most entries of a histogram of waiting times.
pub const FAULT_BUCKETS: usize = 40;

/// A message of the control channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum Message {
    /// First message of the side that connected.
    #[n(0)]
    Hello(#[n(0)] Hello),
    /// Its answer.
    #[n(1)]
    HelloReply(#[n(0)] HelloReply),
    /// The source asks to move a VM here.
    #[n(2)]
    Offer(#[n(0)] Offer),
    /// The destination will not or can't; nothing was reserved.
    #[n(3)]
    Refused(#[n(0)] Refused),
    /// The destination holds an empty container.
    #[n(4)]
    Accepted(#[n(0)] Accepted),
    /// All data streams are open.
    #[n(5)]
    StreamsReady,
    /// All streams have delivered the round.
    #[n(6)]
    RoundReceived(#[n(0)] u32),
    /// Everything has been sent.
    #[n(7)]
    Seal(#[n(0)] Seal),
    /// The destination has loaded everything and could run.
    #[n(8)]
    Ready(#[n(0)] Ready),
    /// The source gives the VM away. It has made that durable.
    #[n(9)]
    Commit(#[n(0)] Epoch),
    /// The VM runs on the destination, which owns it durably.
    #[n(10)]
    Running(#[n(0)] Epoch),
    /// The source has removed the VM.
    #[n(11)]
    Erased,
    /// The source ends the migration before its commit.
    #[n(12)]
    Abort(#[n(0)] Reason),
    /// The destination has durably given the migration up and will never run its VM.
    #[n(13)]
    Discarded(#[n(0)] Reason),
    /// Still there.
    #[n(14)]
    Ping,
    /// After a reconnection: what became of this migration?
    #[n(15)]
    Query(#[n(0)] Query),
    /// Its answer.
    #[n(16)]
    Verdict(#[n(0)] Verdict),
    /// What would stand in the way of this offer? Reserves nothing.
    #[n(17)]
    Check(#[n(0)] Offer),
    /// Its answer.
    #[n(18)]
    CheckReply(#[n(0)] Vec<WireBlocker>),
    /// Post-copy: the VM waits for this page.
    #[n(19)]
    Demand(#[n(0)] Demand),
    /// After a reconnection: pages that are on the destination already. Under post-copy all of them; before the
    /// switchover those of the round that is being received.
    #[n(20)]
    Present(#[n(0)] Present),
    /// Post-copy: all pages have arrived.
    #[n(21)]
    Complete(#[n(0)] Complete),
    /// The source begins to pause the VM: the evidence in [`Ready`] has to be bound to this.
    #[n(22)]
    Challenge(#[n(0)] Challenge32),
}

impl Message {
    /// Name of the message, for logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::HelloReply(_) => "HelloReply",
            Self::Offer(_) => "Offer",
            Self::Refused(_) => "Refused",
            Self::Accepted(_) => "Accepted",
            Self::StreamsReady => "StreamsReady",
            Self::RoundReceived(_) => "RoundReceived",
            Self::Seal(_) => "Seal",
            Self::Ready(_) => "Ready",
            Self::Commit(_) => "Commit",
            Self::Running(_) => "Running",
            Self::Erased => "Erased",
            Self::Abort(_) => "Abort",
            Self::Discarded(_) => "Discarded",
            Self::Ping => "Ping",
            Self::Query(_) => "Query",
            Self::Verdict(_) => "Verdict",
            Self::Check(_) => "Check",
            Self::CheckReply(_) => "CheckReply",
            Self::Demand(_) => "Demand",
            Self::Present(_) => "Present",
            Self::Complete(_) => "Complete",
            Self::Challenge(_) => "Challenge",
        }
    }
}

/// Versions and features on offer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Hello {
    /// Versions of the protocol, best first.
    #[n(0)]
    pub versions: Vec<u16>,
    /// Names of optional features.
    #[n(1)]
    pub features: Vec<String>,
    /// Version of the software, for logs.
    #[n(2)]
    pub software: String,
    /// What the destination has to bind the evidence in [`Accepted`] to. Only a side of another version has none.
    #[n(3)]
    pub challenge: Option<Challenge32>,
}

/// What was selected; empty where nothing fits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct HelloReply {
    /// The version, one of those on offer.
    #[n(0)]
    pub version: Option<u16>,
    /// Features, each one of those on offer.
    #[n(1)]
    pub features: Vec<String>,
    /// Version of the software, for logs.
    #[n(2)]
    pub software: String,
    /// Versions this side speaks, so that a mismatch can be explained.
    #[n(3)]
    pub versions: Vec<u16>,
    /// What the source has to bind the evidence in its credentials to. Only a side of another version has none.
    #[n(4)]
    pub challenge: Option<Challenge32>,
}

/// The order and what a container needs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Offer {
    /// The permission.
    #[n(0)]
    pub order: Order,
    /// Description of the hypervisor, opaque to the protocol, at most [`DESCRIPTOR_MAX`] bytes.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub descriptor: Vec<u8>,
    /// Pages of each region of RAM.
    #[n(2)]
    pub region_pages: Vec<u64>,
    /// Data streams wanted, 1 to [`STREAMS_MAX`].
    #[n(3)]
    pub streams: u16,
    /// Seed of the page digests.
    #[n(4)]
    pub digest_seed: u64,
    /// Whether the VM may run on the destination before all of its pages are there.
    #[n(5)]
    pub post_copy: PostCopyUse,
    /// What speaks for the source and its order, for the gates of the destination: opaque to the protocol, at most
    /// [`CREDENTIALS_MAX`] bytes. Empty where nobody asks for any.
    #[cbor(n(6), with = "minicbor::bytes")]
    pub credentials: Vec<u8>,
}

/// Why a destination does not take the VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Refused {
    /// Whether a gate (identity, attestation, authorisation) refused, rather than the host being unable.
    #[n(0)]
    pub by_gate: bool,
    /// All reasons, at most [`BLOCKERS_MAX`].
    #[n(1)]
    pub blockers: Vec<WireBlocker>,
}

/// One reason.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct WireBlocker {
    /// Stable code.
    #[n(0)]
    pub code: String,
    /// What is wrong.
    #[n(1)]
    pub message: String,
    /// What to do.
    #[n(2)]
    pub remedy: String,
}

/// The container is there.
#[derive(Clone, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Accepted {
    /// Data streams, at most as many as wanted.
    #[n(0)]
    pub streams: u16,
    /// From this the proofs are made that open the streams.
    #[n(1)]
    pub stream_secret: StreamSecret,
    /// Whether post-copy is possible; then one more stream is opened, for pages that the VM waits for.
    #[n(2)]
    pub post_copy: bool,
    /// What the destination says about itself and the container: opaque to the protocol, at most [`EVIDENCE_MAX`] bytes.
    /// Empty where it has none.
    #[cbor(n(3), with = "minicbor::bytes")]
    pub evidence: Vec<u8>,
}

impl std::fmt::Debug for Accepted {
    /// The secret must not end in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accepted")
            .field("streams", &self.streams)
            .field("post_copy", &self.post_copy)
            .field("evidence", &self.evidence)
            .finish_non_exhaustive()
    }
}

/// A page that a virtual CPU waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Demand {
    /// Region of RAM.
    #[n(0)]
    pub region: u16,
    /// Page within the region.
    #[n(1)]
    pub page: u64,
}

/// Some of the pages that are on the destination; those not named by any message are not.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Present {
    /// Region of RAM.
    #[n(0)]
    pub region: u16,
    /// The page of the first bit; a multiple of 64.
    #[n(1)]
    pub first_page: u64,
    /// A bit for each page, the lowest of each byte first; at most [`PRESENT_MAX`] bytes.
    #[cbor(n(2), with = "minicbor::bytes")]
    pub bits: Vec<u8>,
    /// Whether no other message follows.
    #[n(3)]
    pub last: bool,
}

/// All pages have arrived after the VM began to run.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Complete {
    /// Root over the pages that arrived; absent where the destination was restarted meanwhile and does not know.
    #[n(0)]
    pub root: Option<Root>,
    /// How many accesses had to wait for how long: entry `n` counts those below 2 to the power of `n` microseconds,
    /// and not in an entry before; at most [`FAULT_BUCKETS`].
    #[n(1)]
    pub fault_wait_log2_us: Vec<u64>,
}

/// From this the streams of a migration that lost its connection are opened anew.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Rejoin {
    /// Data streams, without the one for pages that the VM waits for.
    #[n(0)]
    pub streams: u16,
    /// From this the proofs are made that open the streams.
    #[n(1)]
    pub stream_secret: StreamSecret,
}

impl std::fmt::Debug for Rejoin {
    /// The secret must not end in a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rejoin")
            .field("streams", &self.streams)
            .finish_non_exhaustive()
    }
}

/// What the destination must have when it has everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Seal {
    /// Number of rounds.
    #[n(0)]
    pub rounds: u32,
    /// Length of the device state.
    #[n(1)]
    pub device_state_bytes: u64,
    /// Its SHA-256.
    #[n(2)]
    pub device_state_sha256: Sha256,
    /// Whether pages follow once the VM runs.
    #[n(3)]
    pub post_copy: bool,
}

/// The destination could run the VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Ready {
    /// Root over the pages that arrived.
    #[n(0)]
    pub root: Root,
    /// As in [`Accepted`], but made since the source began to pause the VM, and bound to [`Message::Challenge`].
    #[cbor(n(1), with = "minicbor::bytes")]
    pub evidence: Vec<u8>,
}

/// Why a migration ends, in words that cross the wire.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Reason {
    /// Stable code.
    #[n(0)]
    pub code: String,
    /// What happened, one lowercase sentence.
    #[n(1)]
    pub message: String,
}

impl WireBlocker {
    /// The same with texts that are cut to what a message may have.
    #[must_use]
    pub fn cut(mut self) -> Self {
        let bounded = [
            (&mut self.code, CODE_MAX),
            (&mut self.message, TEXT_MAX),
            (&mut self.remedy, TEXT_MAX),
        ];
        for (text, most) in bounded {
            text.truncate(text.floor_char_boundary(most));
        }
        self
    }
}

impl Reason {
    /// A reason from a code and a sentence.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            message: message.into(),
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.message.fmt(f)
    }
}

/// A question of a source that is in doubt, or whose connection broke before its commit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub struct Query {
    /// The migration.
    #[n(0)]
    pub migration: MigrationId,
    /// Its VM.
    #[n(1)]
    pub vm: VmId,
}

/// What the destination's durable record says, or its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum Verdict {
    /// The destination owns the VM since this epoch.
    #[n(0)]
    Owned(#[n(0)] Epoch),
    /// Never committed and discarded: the VM will never run there.
    #[n(1)]
    Discarded,
    /// Not decided yet; ask again.
    #[n(2)]
    Undecided,
    /// No record of it: only the operator can tell.
    #[n(3)]
    Unknown,
    /// The destination owns and runs the VM, and needs the pages that it does not have yet.
    #[n(4)]
    Pulling(#[n(0)] Rejoin),
    /// Nothing is committed; the destination keeps what has arrived, and so many whole rounds have.
    #[n(5)]
    Receiving(#[n(0)] Rejoin, #[n(1)] u32),
}

/// Bytes that are not a message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Longer than [`MESSAGE_MAX`].
    #[error("message of {0} bytes, at most {MESSAGE_MAX} are allowed")]
    TooLong(u64),
    /// Not CBOR, or not a message of this protocol.
    #[error("not a message of this protocol: {0}")]
    Malformed(String),
    /// A message and then more.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// A field is longer than its bound.
    #[error("{0} is out of bounds")]
    OutOfBounds(&'static str),
}

impl Message {
    /// The message as it goes onto the wire: four bytes of length, little endian, and the CBOR.
    ///
    /// # Errors
    ///
    /// The message is longer than [`MESSAGE_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let mut bytes = vec![0; 4];
        minicbor::encode(self, &mut bytes).map_err(|e| MessageError::Malformed(e.to_string()))?;
        let len = bytes.len() - 4;
        match u32::try_from(len) {
            Ok(prefix) if len <= MESSAGE_MAX => bytes[..4].copy_from_slice(&prefix.to_le_bytes()),
            _ => return Err(MessageError::TooLong(len as u64)),
        }
        Ok(bytes)
    }

    /// Length of the CBOR behind a prefix, checked before anything is allocated for it.
    ///
    /// # Errors
    ///
    /// Longer than [`MESSAGE_MAX`], or empty.
    pub fn length(prefix: [u8; 4]) -> Result<usize, MessageError> {
        let len = u32::from_le_bytes(prefix);
        match usize::try_from(len) {
            Ok(0) => Err(MessageError::Malformed("empty message".to_owned())),
            Ok(len) if len <= MESSAGE_MAX => Ok(len),
            _ => Err(MessageError::TooLong(u64::from(len))),
        }
    }

    /// Reads a message from its CBOR.
    ///
    /// # Errors
    ///
    /// The rule that is broken; the connection must be closed.
    pub fn decode(cbor: &[u8]) -> Result<Self, MessageError> {
        if cbor.len() > MESSAGE_MAX {
            return Err(MessageError::TooLong(cbor.len() as u64));
        }
        let mut decoder = minicbor::Decoder::new(cbor);
        let message: Self = decoder
            .decode()
            .map_err(|e| MessageError::Malformed(e.to_string()))?;
        if decoder.position() != cbor.len() {
            return Err(MessageError::Trailing(cbor.len() - decoder.position()));
        }
        message.check_bounds().map(|()| message)
    }

    fn check_bounds(&self) -> Result<(), MessageError> {
        let check = |fits: bool, what: &'static str| {
            if fits {
                Ok(())
            } else {
                Err(MessageError::OutOfBounds(what))
            }
        };
        let words = |list: &[String]| list.len() <= 64 && list.iter().all(|word| word.len() <= 64);
        let blockers = |list: &[WireBlocker]| {
            list.len() <= BLOCKERS_MAX
                && list.iter().all(|b| {
                    b.code.len() <= CODE_MAX
                        && b.message.len() <= TEXT_MAX
                        && b.remedy.len() <= TEXT_MAX
                })
        };
        match self {
            Self::Hello(hello) => {
                check(hello.versions.len() <= 64, "list of versions")?;
                check(words(&hello.features), "list of features")?;
                check(hello.software.len() <= 64, "software version")
            }
            Self::HelloReply(reply) => {
                check(reply.versions.len() <= 64, "list of versions")?;
                check(words(&reply.features), "list of features")?;
                check(reply.software.len() <= 64, "software version")
            }
            Self::Offer(offer) | Self::Check(offer) => {
                check(offer.descriptor.len() <= DESCRIPTOR_MAX, "descriptor")?;
                check(offer.credentials.len() <= CREDENTIALS_MAX, "credentials")?;
                check(
                    (1..=STREAMS_MAX).contains(&offer.streams),
                    "number of streams",
                )?;
                check(
                    offer.region_pages.len() <= crate::pages::REGIONS_MAX,
                    "number of regions",
                )
            }
            Self::Accepted(accepted) => {
                check(accepted.evidence.len() <= EVIDENCE_MAX, "evidence")?;
                check(
                    (1..=STREAMS_MAX).contains(&accepted.streams),
                    "number of streams",
                )
            }
            Self::Ready(ready) => check(ready.evidence.len() <= EVIDENCE_MAX, "evidence"),
            Self::Refused(refused) => check(blockers(&refused.blockers), "list of blockers"),
            Self::CheckReply(list) => check(blockers(list), "list of blockers"),
            Self::Verdict(Verdict::Pulling(rejoin) | Verdict::Receiving(rejoin, _)) => check(
                (1..=STREAMS_MAX).contains(&rejoin.streams),
                "number of streams",
            ),
            Self::Present(present) => {
                check(present.bits.len() <= PRESENT_MAX, "set of pages")?;
                check(present.first_page.is_multiple_of(64), "first page of a set")
            }
            Self::Complete(complete) => check(
                complete.fault_wait_log2_us.len() <= FAULT_BUCKETS,
                "histogram",
            ),
            Self::Abort(reason) | Self::Discarded(reason) => check(
                reason.code.len() <= CODE_MAX && reason.message.len() <= TEXT_MAX,
                "reason",
            ),
            _ => Ok(()),
        }
    }
}

impl Hello {
    /// What this code offers; the challenge has to be fresh.
    pub fn ours(software: &str, challenge: Challenge32) -> Self {
        Self {
            versions: VERSIONS.to_vec(),
            features: Vec::new(),
            software: software.to_owned(),
            challenge: Some(challenge),
        }
    }
}

impl HelloReply {
    /// Selects the best common version, and of the features those we know: none yet. The challenge has to be fresh.
    pub fn to(hello: &Hello, software: &str, challenge: Challenge32) -> Self {
        let version = VERSIONS
            .into_iter()
            .find(|version| hello.versions.contains(version));
        Self {
            version,
            features: Vec::new(),
            software: software.to_owned(),
            versions: VERSIONS.to_vec(),
            challenge: Some(challenge),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::order::tests::order;

    fn samples() -> Vec<Message> {
        let blocker = WireBlocker {
            code: "memory-short".to_owned(),
            message: "m".to_owned(),
            remedy: "r".to_owned(),
        };
        let hello = Hello::ours("0.1.0", Challenge32([10; 32]));
        vec![
            Message::HelloReply(HelloReply::to(&hello, "0.1.0", Challenge32([11; 32]))),
            Message::Hello(hello),
            Message::Offer(Offer {
                order: order(),
                descriptor: vec![7; 300],
                region_pages: vec![393_216, 1],
                streams: 2,
                digest_seed: 9,
                post_copy: PostCopyUse::IfPossible,
                credentials: vec![6; 500],
            }),
            Message::Refused(Refused {
                by_gate: true,
                blockers: vec![blocker.clone()],
            }),
            Message::Accepted(Accepted {
                streams: 2,
                stream_secret: StreamSecret([3; 32]),
                post_copy: true,
                evidence: vec![1; 20],
            }),
            Message::StreamsReady,
            Message::RoundReceived(7),
            Message::Seal(Seal {
                rounds: 3,
                device_state_bytes: 200_000,
                device_state_sha256: Sha256([4; 32]),
                post_copy: true,
            }),
            Message::Challenge(Challenge32([12; 32])),
            Message::Ready(Ready {
                root: Root([5; 32]),
                evidence: vec![2; 20],
            }),
            Message::Commit(Epoch(9)),
            Message::Running(Epoch(9)),
            Message::Erased,
            Message::Abort(Reason::new("operator", "aborted by the operator")),
            Message::Discarded(Reason::new("peer", "gone")),
            Message::Ping,
            Message::Query(Query {
                migration: MigrationId([1; 16]),
                vm: VmId([2; 16]),
            }),
            Message::Verdict(Verdict::Owned(Epoch(3))),
            Message::Verdict(Verdict::Discarded),
            Message::CheckReply(vec![blocker]),
            Message::Verdict(Verdict::Pulling(Rejoin {
                streams: 2,
                stream_secret: StreamSecret([6; 32]),
            })),
            Message::Verdict(Verdict::Receiving(
                Rejoin {
                    streams: 2,
                    stream_secret: StreamSecret([6; 32]),
                },
                3,
            )),
            Message::Demand(Demand {
                region: 1,
                page: 77,
            }),
            Message::Present(Present {
                region: 1,
                first_page: 640,
                bits: vec![1, 2, 3],
                last: true,
            }),
            Message::Complete(Complete {
                root: Some(Root([8; 32])),
                fault_wait_log2_us: vec![0, 3],
            }),
        ]
    }

    #[test]
    fn every_message_survives_the_wire() {
        for message in samples() {
            let bytes = message.encode().unwrap();
            let len = Message::length(bytes[..4].try_into().unwrap()).unwrap();
            assert_eq!(len, bytes.len() - 4);
            assert_eq!(Message::decode(&bytes[4..]).unwrap(), message);
        }
    }

    #[test]
    fn lengths_beyond_the_cap_are_refused_before_allocation() {
        assert_eq!(
            Message::length([0; 4]).unwrap_err().to_string(),
            "not a message of this protocol: empty message"
        );
        assert_eq!(
            Message::length([0xff; 4]),
            Err(MessageError::TooLong(u64::from(u32::MAX)))
        );
        let cap = u32::try_from(MESSAGE_MAX).unwrap();
        assert_eq!(Message::length(cap.to_le_bytes()), Ok(MESSAGE_MAX));
        assert!(Message::length((cap + 1).to_le_bytes()).is_err());
    }

    #[test]
    fn trailing_bytes_and_out_of_bounds_fields_are_refused() {
        let mut bytes = Message::Ping.encode().unwrap();
        bytes.push(0);
        assert_eq!(Message::decode(&bytes[4..]), Err(MessageError::Trailing(1)));
        let many = Message::Accepted(Accepted {
            streams: 17,
            stream_secret: StreamSecret([0; 32]),
            post_copy: false,
            evidence: Vec::new(),
        });
        let bytes = many.encode().unwrap();
        assert_eq!(
            Message::decode(&bytes[4..]),
            Err(MessageError::OutOfBounds("number of streams"))
        );
    }

    #[test]
    fn credentials_and_evidence_have_bounds() {
        let ready = |len| {
            Message::Ready(Ready {
                root: Root([0; 32]),
                evidence: vec![1; len],
            })
        };
        let accepted = |len| {
            Message::Accepted(Accepted {
                streams: 1,
                stream_secret: StreamSecret([0; 32]),
                post_copy: false,
                evidence: vec![1; len],
            })
        };
        let offered = |len, wrap: fn(Offer) -> Message| {
            wrap(Offer {
                order: order(),
                descriptor: vec![1; DESCRIPTOR_MAX],
                region_pages: vec![u64::MAX; crate::pages::REGIONS_MAX],
                streams: 1,
                digest_seed: u64::MAX,
                post_copy: PostCopyUse::No,
                credentials: vec![1; len],
            })
        };
        let (evidence, credentials) = (EVIDENCE_MAX, CREDENTIALS_MAX);
        for (fits, too_long, what) in [
            (ready(evidence), ready(evidence + 1), "evidence"),
            (accepted(evidence), accepted(evidence + 1), "evidence"),
            (
                offered(credentials, Message::Offer),
                offered(credentials + 1, Message::Offer),
                "credentials",
            ),
            (
                offered(credentials, Message::Check),
                offered(credentials + 1, Message::Check),
                "credentials",
            ),
        ] {
            assert_eq!(
                Message::decode(&fits.encode().unwrap()[4..]).as_ref(),
                Ok(&fits)
            );
            assert_eq!(
                Message::decode(&too_long.encode().unwrap()[4..]),
                Err(MessageError::OutOfBounds(what))
            );
        }
    }

    #[test]
    fn a_greeting_of_another_version_needs_no_challenge() {
        // What version 4 sends.
        let bytes = [
            0x82, 0x00, 0x81, 0xa3, 0x00, 0x81, 0x04, 0x01, 0x80, 0x02, 0x61, b'4',
        ];
        let Message::Hello(hello) = Message::decode(&bytes).unwrap() else {
            panic!()
        };
        assert_eq!(
            (hello.versions.as_slice(), hello.challenge),
            (&[4][..], None)
        );
        let reply = HelloReply::to(&hello, "5", Challenge32([1; 32]));
        assert_eq!(reply.version, None);
    }

    #[test]
    fn a_blocker_is_cut_to_what_a_message_may_have() {
        let long = WireBlocker {
            code: "c".repeat(100),
            message: "\u{fc}".repeat(1025),
            remedy: "\u{20ac}".repeat(700),
        };
        let cut = long.cut();
        let lens = [cut.code.len(), cut.message.len(), cut.remedy.len()];
        assert_eq!(lens, [64, 2048, 2046]);
        let bytes = Message::CheckReply(vec![cut; BLOCKERS_MAX])
            .encode()
            .unwrap();
        assert!(Message::decode(&bytes[4..]).is_ok());
    }

    #[test]
    fn a_secret_does_not_show_in_debug_output() {
        let accepted = Accepted {
            streams: 1,
            stream_secret: StreamSecret([0xab; 32]),
            post_copy: false,
            evidence: Vec::new(),
        };
        assert!(!format!("{:?}", Message::Accepted(accepted)).contains("abab"));
    }

    #[test]
    fn unknown_fields_are_skipped() {
        // Hello as a map with a field 9 that this version does not know.
        let mut bytes = Vec::new();
        let mut e = minicbor::Encoder::new(&mut bytes);
        e.array(2)
            .unwrap()
            .u32(0)
            .unwrap()
            .array(1)
            .unwrap()
            .map(4)
            .unwrap();
        e.u8(0).unwrap().array(1).unwrap().u16(1).unwrap();
        e.u8(1).unwrap().array(0).unwrap();
        e.u8(2).unwrap().str("9.9").unwrap();
        e.u8(9).unwrap().array(1).unwrap().str("new").unwrap();
        let Message::Hello(hello) = Message::decode(&bytes).unwrap() else {
            panic!()
        };
        assert_eq!(hello.software, "9.9");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Message::decode(&bytes);
        }

        #[test]
        fn a_flipped_byte_is_refused_or_gives_another_valid_message(
            which in any::<prop::sample::Index>(),
            at in any::<prop::sample::Index>(),
            flip in 1u8..,
        ) {
            let message = which.get(&samples()).clone();
            let mut bytes = message.encode().unwrap();
            let at = 4 + at.index(bytes.len() - 4);
            bytes[at] ^= flip;
            if let Ok(other) = Message::decode(&bytes[4..]) {
                prop_assert!(other.encode().is_ok());
            }
        }
    }
}
