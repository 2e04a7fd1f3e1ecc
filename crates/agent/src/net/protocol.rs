//! What the agent and its network process tell each other: CBOR (RFC 8949) in the packets of a [`super::port::Port`].
//!
//! There is one *link* between the two. For each control connection, and for the data streams of each migration, there
//! is a port of its own beside it, so that none waits for another and each ends by itself.

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};
use palanquin_engine::ids::{Root, StreamSecret};
use palanquin_engine::pages::{BLOCK_PAGES, Block, PAGE_BYTES, PageSet, REGIONS_MAX, RamLayout};
use palanquin_engine::{MessageError, MigrationId};

/// Longest code or name, in bytes.
const WORD_MAX: usize = 255;
/// Longest sentence, in bytes.
const TEXT_MAX: usize = 4096;
/// Bytes of an encoded block.
const BLOCK_BYTES: usize = 38;
/// Most certificates that a host shows, and most bytes of all of them.
const CHAIN_MAX: usize = 8;
const CHAIN_BYTES_MAX: usize = 32 * 1024;
/// Most entries of a list that the network process tells.
const LIST_MAX: usize = 1 << 16;

/// A packet that breaks a rule.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Not CBOR of this form.
    #[error("a packet is malformed: {0}")]
    Malformed(String),
    /// A value out of bounds.
    #[error("a packet has a {0} out of bounds")]
    OutOfBounds(&'static str),
    /// Descriptors are missing or left over.
    #[error("a packet has {0} descriptors")]
    Descriptors(usize),
    /// A message for another host.
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// To the network process, over the link.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum ToNetwork {
    /// First: what it needs to know.
    #[n(0)]
    Start(#[n(0)] Start),
    /// Accept connections at the listening socket that comes with it.
    #[n(1)]
    Listen(#[n(0)] Listen),
    /// Answer to [`FromNetwork::Sign`].
    #[n(2)]
    Signed(#[n(0)] Signed),
    /// Authenticate the connection to a host that comes with it, and serve it at the port that comes with it.
    #[n(3)]
    Connect(#[n(0)] String),
    /// A migration leaves this host: port, counters and regions come with it.
    #[n(4)]
    Send(#[n(0)] Outgoing),
    /// A migration arrives here: port, counters and regions come with it.
    #[n(5)]
    Receive(#[n(0)] Incoming),
}

/// What the network process needs to know.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Start {
    /// Certificates of authorities, DER.
    #[n(0)]
    pub roots: Vec<ByteVec>,
    /// This host's certificate and what lies between it and an authority, DER.
    #[n(1)]
    pub chain: Vec<ByteVec>,
    /// Signature schemes of this host's key, best first (RFC 8446, section 4.2.3).
    #[n(2)]
    pub schemes: Vec<u16>,
}

/// How many connections that belong to no migration there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Listen {
    /// Of those that have not authenticated themselves, and as many of those that have.
    #[n(0)]
    pub pending: u32,
    /// Of one address that have not authenticated themselves.
    #[n(1)]
    pub per_address: u32,
    /// Of one host.
    #[n(2)]
    pub per_host: u32,
    /// Migrations that arrive at the same time.
    #[n(3)]
    pub migrations: u32,
}

/// A signature.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Signed {
    /// Of which question.
    #[n(0)]
    pub id: u64,
    /// It; absent if it was refused.
    #[n(1)]
    pub signature: Option<ByteVec>,
}

/// A region of guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RamRegion {
    /// Name.
    #[n(0)]
    pub name: String,
    /// Bytes.
    #[n(1)]
    pub size_bytes: u64,
}

/// A migration that leaves.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Outgoing {
    /// It.
    #[n(0)]
    pub migration: MigrationId,
    /// Name of the other host.
    #[n(1)]
    pub host: String,
    /// Guest RAM.
    #[n(2)]
    pub regions: Vec<RamRegion>,
    /// Seed of the page digests.
    #[n(3)]
    pub digest_seed: u64,
    /// Limit of the rate.
    #[n(4)]
    pub bandwidth_bytes_per_s: Option<u64>,
    /// How pages are made shorter: JSON of the control interface's type.
    #[n(5)]
    pub compress: String,
}

/// A migration that arrives.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Incoming {
    /// It.
    #[n(0)]
    pub migration: MigrationId,
    /// Name of the other host.
    #[n(1)]
    pub host: String,
    /// Guest RAM.
    #[n(2)]
    pub regions: Vec<RamRegion>,
    /// Seed of the page digests.
    #[n(3)]
    pub digest_seed: u64,
    /// Data streams that pages are spread over.
    #[n(4)]
    pub streams: u16,
    /// Largest device state in bytes.
    #[n(5)]
    pub device_state_max: u64,
}

/// From the network process, over the link.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum FromNetwork {
    /// It has given up its privileges, but for what this host lacks.
    #[n(0)]
    Ready(#[n(0)] Vec<String>),
    /// Another host opened a control connection; its port comes with it.
    #[n(1)]
    Arrived(#[n(0)] Connected),
    /// A signature is needed for a handshake.
    #[n(2)]
    Sign(#[n(0)] Sign),
}

/// An authenticated control connection.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Connected {
    /// Its number in the network process.
    #[n(0)]
    pub id: u64,
    /// Name of the host at its other end.
    #[n(1)]
    pub host: String,
    /// Cipher suite.
    #[n(2)]
    pub cipher: String,
    /// Key agreement.
    #[n(3)]
    pub key_exchange: String,
    /// The certificates that it has shown, its own first, DER.
    #[n(4)]
    pub certificates: Vec<ByteVec>,
    /// Keying material of this connection alone, for evidence.
    #[cbor(n(5), with = "minicbor::bytes")]
    pub exporter: [u8; 32],
}

/// What is to be signed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Sign {
    /// Names the answer.
    #[n(0)]
    pub id: u64,
    /// Signature scheme.
    #[n(1)]
    pub scheme: u16,
    /// What the signature covers.
    #[n(2)]
    pub message: ByteVec,
}

/// From the network process, over the port of a control connection. What goes the other way is a message's CBOR, or nothing:
/// the connection belongs to a migration from now on.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum FromControl {
    /// The connection that was asked for stands.
    #[n(0)]
    Connected(#[n(0)] Connected),
    /// A message's CBOR.
    #[n(1)]
    Message(#[n(0)] ByteVec),
    /// The connection ended: code and sentence. The last packet.
    #[n(2)]
    Ended(#[n(0)] Told),
}

/// A code and a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Told {
    /// Stable code.
    #[n(0)]
    pub code: String,
    /// One sentence.
    #[n(1)]
    pub message: String,
}

/// For whom a job of the streams is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Whom {
    /// All but the one for pages that are waited for.
    #[n(0)]
    All,
    /// The first.
    #[n(1)]
    First,
    /// The one for pages that are waited for.
    #[n(2)]
    Urgent,
}

/// To the network process, over the port of a migration that leaves.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub enum ToSending {
    /// Open data streams over the connections that come with it; the last is for pages that are waited for where there
    /// is one.
    #[n(0)]
    Open {
        /// Names the report.
        #[n(0)]
        op: u64,
        /// Whether the last is for pages that are waited for.
        #[n(1)]
        urgent: bool,
        /// From which their proofs are made.
        #[n(2)]
        secret: StreamSecret,
        /// Whether pages may refer to what was sent before.
        #[n(3)]
        references: bool,
    },
    /// Something for streams to do.
    #[n(1)]
    Job {
        /// Names the reports, one from each stream.
        #[n(0)]
        op: u64,
        /// Who does it.
        #[n(1)]
        whom: Whom,
        /// It.
        #[n(2)]
        job: WireJob,
    },
    /// From the next job on pages must not refer to what was sent before.
    #[n(2)]
    ForbidReferences,
    /// End the streams at once.
    #[n(3)]
    Cancel,
    /// End the streams when they have done what they were given.
    #[n(4)]
    Finish,
    /// What is the root over the digests of the pages sent until the end of the last round (`false`) or after it (`true`)?
    #[n(5)]
    Root(#[n(0)] u64, #[n(1)] bool),
}

/// A job for streams.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub enum WireJob {
    /// See [`crate::data_send::Job::Pages`].
    #[n(0)]
    Pages(#[n(0)] ByteVec),
    /// See [`crate::data_send::Job::Urgent`].
    #[n(1)]
    Urgent(#[n(0)] ByteVec),
    /// See [`crate::data_send::Job::RoundEnd`].
    #[n(2)]
    RoundEnd(#[n(0)] u32, #[n(1)] bool),
    /// See [`crate::data_send::Job::Stale`].
    #[n(3)]
    Stale(#[n(0)] ByteVec),
    /// See [`crate::data_send::Job::DeviceState`].
    #[n(4)]
    DeviceState(#[n(0)] u32, #[n(1)] ByteVec, #[n(2)] bool),
    /// See [`crate::data_send::Job::Drained`].
    #[n(5)]
    Drained(#[n(0)] bool),
}

/// From the network process, over the port of a migration that leaves.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum FromSending {
    /// The streams stand, or why not.
    #[n(0)]
    Opened(#[n(0)] u64, #[n(1)] Option<Told>),
    /// A stream has done its part of a job, or why not.
    #[n(1)]
    Done(#[n(0)] u64, #[n(1)] Option<Told>),
    /// A root.
    #[n(2)]
    Root(#[n(0)] u64, #[n(1)] Root),
}

/// To the network process, over the port of a migration that arrives. All but the first two are answered.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub enum ToReceiving {
    /// Close the streams.
    #[n(0)]
    Close,
    /// Ask for missing pages on this control connection.
    #[n(1)]
    AskOn(#[n(0)] u64),
    /// Data streams will be opened.
    #[n(2)]
    Expect {
        /// Names the answer.
        #[n(0)]
        id: u64,
        /// In whose reports this comes back.
        #[n(1)]
        generation: u32,
        /// How many.
        #[n(2)]
        count: u16,
        /// From which their proofs are made.
        #[n(3)]
        secret: StreamSecret,
    },
    /// From now on pages are placed where somebody may wait for them: the userfaultfd comes with it.
    #[n(3)]
    Wait {
        /// Names the answer.
        #[n(0)]
        id: u64,
        /// Process ID of the hypervisor, for messages.
        #[n(1)]
        pid: u32,
        /// Where each region is mapped: address, offset, bytes.
        #[n(2)]
        windows: Vec<Vec<(u64, u64, u64)>>,
    },
    /// What has arrived since pages are waited for, and what is waited for?
    #[n(4)]
    Arrived(#[n(0)] u64),
    /// What is the root over the digests of all pages?
    #[n(5)]
    Root(#[n(0)] u64),
    /// Nothing is waited for any more: the root over what arrived since then, and how long was waited.
    #[n(6)]
    Pulled(#[n(0)] u64),
    /// Which pages have arrived of the round after so many whole ones? [`Answer::Arrived`] without any that are waited for.
    #[n(7)]
    Received(#[n(0)] u64, #[n(1)] u32),
}

/// From the network process, over the port of a migration that arrives.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum FromReceiving {
    /// All streams of this generation are open.
    #[n(0)]
    Streams(#[n(0)] u32),
    /// A stream of this generation has delivered its part of a round; whether it was the last.
    #[n(1)]
    RoundEnd(#[n(0)] u32, #[n(1)] u32, #[n(2)] bool),
    /// A stream of this generation has delivered all that follows the last round.
    #[n(2)]
    Pushed(#[n(0)] u32),
    /// A stream of this generation broke: whether the path is to blame, and why.
    #[n(3)]
    Failed(#[n(0)] u32, #[n(1)] bool, #[n(2)] String),
    /// A piece of the device state, and whether it was saved before the pause.
    #[n(4)]
    DeviceState(#[n(0)] ByteVec, #[n(1)] bool),
    /// An answer.
    #[n(5)]
    Answer(#[n(0)] u64, #[n(1)] Answer),
    /// A stream of this generation has delivered what was written until the pause; whether the VM is to run before its
    /// last pages are here.
    #[n(6)]
    Drained(#[n(0)] u32, #[n(1)] bool),
}

/// An answer of the network process about a migration that arrives.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Answer {
    /// It is done.
    #[n(0)]
    Done,
    /// It is not, and why.
    #[n(1)]
    Failed(#[n(0)] String),
    /// A root.
    #[n(2)]
    Root(#[n(0)] Root),
    /// Pages that have arrived (see [`encode_pages`]), and those that are waited for (region and page).
    #[n(3)]
    Arrived(#[n(0)] ByteVec, #[n(1)] Vec<(u16, u64)>),
    /// A root, and how long was waited (see [`palanquin_engine::message::Complete`]).
    #[n(4)]
    Pulled(#[n(0)] Root, #[n(1)] Vec<u64>),
}

/// Something that travels in a packet.
pub trait Wire: Sized + Encode<()> + for<'b> Decode<'b, ()> {
    /// Its bounds.
    ///
    /// # Errors
    ///
    /// One is broken.
    fn check(&self) -> Result<(), ProtocolError>;

    /// Its CBOR.
    fn encoded(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A vector takes everything.
        let _ = minicbor::encode(self, &mut bytes);
        bytes
    }

    /// From its CBOR.
    ///
    /// # Errors
    ///
    /// It has another form, or a bound is broken.
    fn decoded(cbor: &[u8]) -> Result<Self, ProtocolError> {
        let mut decoder = minicbor::Decoder::new(cbor);
        let value: Self = decoder
            .decode()
            .map_err(|error| ProtocolError::Malformed(error.to_string()))?;
        if decoder.position() != cbor.len() {
            return Err(ProtocolError::Malformed("bytes are left over".to_owned()));
        }
        value.check().map(|()| value)
    }
}

fn bound(holds: bool, what: &'static str) -> Result<(), ProtocolError> {
    if holds {
        Ok(())
    } else {
        Err(ProtocolError::OutOfBounds(what))
    }
}

impl Told {
    /// Cut to what may be told.
    pub fn new(code: &str, message: &str) -> Self {
        let cut = |text: &str, max| text.chars().take(max / 4).collect();
        Self {
            code: cut(code, WORD_MAX),
            message: cut(message, TEXT_MAX),
        }
    }

    fn check(&self) -> Result<(), ProtocolError> {
        bound(self.code.len() <= WORD_MAX, "code")?;
        bound(self.message.len() <= TEXT_MAX, "sentence")
    }
}

impl Connected {
    fn check(&self) -> Result<(), ProtocolError> {
        let words = [&self.host, &self.cipher, &self.key_exchange];
        bound(words.iter().all(|word| word.len() <= WORD_MAX), "name")?;
        let bytes: usize = self.certificates.iter().map(|der| der.len()).sum();
        let fits = self.certificates.len() <= CHAIN_MAX && bytes <= CHAIN_BYTES_MAX;
        bound(fits, "chain of certificates")
    }
}

impl Wire for ToNetwork {
    fn check(&self) -> Result<(), ProtocolError> {
        let regions = match self {
            Self::Send(outgoing) => &outgoing.regions,
            Self::Receive(incoming) => &incoming.regions,
            _ => return Ok(()),
        };
        bound(layout(regions).is_some(), "layout")
    }
}

impl Wire for FromNetwork {
    fn check(&self) -> Result<(), ProtocolError> {
        match self {
            Self::Ready(missing) => {
                let words = missing.iter().all(|word| word.len() <= TEXT_MAX);
                bound(missing.len() <= 16 && words, "list")
            }
            Self::Arrived(connected) => connected.check(),
            Self::Sign(sign) => bound(sign.message.len() <= 256, "message to sign"),
        }
    }
}

impl Wire for FromControl {
    fn check(&self) -> Result<(), ProtocolError> {
        match self {
            Self::Connected(connected) => connected.check(),
            Self::Message(message) => bound(
                message.len() <= palanquin_engine::message::MESSAGE_MAX,
                "message",
            ),
            Self::Ended(told) => told.check(),
        }
    }
}

impl Wire for ToSending {
    fn check(&self) -> Result<(), ProtocolError> {
        Ok(())
    }
}

impl Wire for FromSending {
    fn check(&self) -> Result<(), ProtocolError> {
        match self {
            Self::Opened(_, told) | Self::Done(_, told) => {
                told.as_ref().map_or(Ok(()), Told::check)
            }
            Self::Root(..) => Ok(()),
        }
    }
}

impl Wire for ToReceiving {
    fn check(&self) -> Result<(), ProtocolError> {
        Ok(())
    }
}

impl Wire for FromReceiving {
    fn check(&self) -> Result<(), ProtocolError> {
        let text = |text: &String| bound(text.len() <= TEXT_MAX, "sentence");
        match self {
            Self::Failed(_, _, why) | Self::Answer(_, Answer::Failed(why)) => text(why),
            Self::Answer(_, Answer::Arrived(_, wanted)) => bound(wanted.len() <= LIST_MAX, "list"),
            Self::Answer(_, Answer::Pulled(_, waits)) => bound(
                waits.len() <= palanquin_engine::message::FAULT_BUCKETS,
                "histogram",
            ),
            _ => Ok(()),
        }
    }
}

/// Cuts a sentence to what may be told.
pub fn cut(text: &str) -> String {
    text.chars().take(TEXT_MAX / 4).collect()
}

/// Most pages that are told to be waited for at once.
pub const WANTED_MAX: usize = LIST_MAX;

/// Layout of regions; none if it makes no sense.
pub fn layout(regions: &[RamRegion]) -> Option<RamLayout> {
    let page = PAGE_BYTES;
    let whole = regions.iter().all(|r| r.size_bytes.is_multiple_of(page));
    let pages = regions.iter().map(|r| r.size_bytes / page).collect();
    RamLayout::new(pages).ok().filter(|_| whole)
}

/// Blocks as they travel.
pub fn encode_blocks(blocks: impl Iterator<Item = Block>) -> ByteVec {
    let mut bytes = Vec::new();
    for block in blocks {
        bytes.extend_from_slice(&block.region.to_le_bytes());
        bytes.extend_from_slice(&block.index.to_le_bytes());
        for word in block.mask {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    bytes.into()
}

/// Most bytes of a set of pages of a VM with so much RAM: every region may end within a block.
pub fn pages_bytes_max(ram_bytes: u64) -> u64 {
    let blocks = ram_bytes / (PAGE_BYTES * BLOCK_PAGES) + 1 + REGIONS_MAX as u64;
    blocks.saturating_mul(BLOCK_BYTES as u64)
}

/// A set of pages as it travels: only blocks that have some.
pub fn encode_pages(pages: &PageSet) -> ByteVec {
    encode_blocks(pages.blocks())
}

/// Blocks from the form that [`encode_blocks`] gives.
///
/// # Errors
///
/// There is a part of one too much.
pub fn decode_blocks(bytes: &[u8]) -> Result<impl Iterator<Item = Block> + '_, ProtocolError> {
    bound(bytes.len().is_multiple_of(BLOCK_BYTES), "list of blocks")?;
    Ok(bytes.chunks_exact(BLOCK_BYTES).map(|chunk| {
        let mut mask = [0; 4];
        for (word, bytes) in mask.iter_mut().zip(chunk[6..].as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Block {
            region: u16::from_le_bytes([chunk[0], chunk[1]]),
            index: u32::from_le_bytes([chunk[2], chunk[3], chunk[4], chunk[5]]),
            mask,
        }
    }))
}

/// A set of pages from the form that [`encode_pages`] gives.
///
/// # Errors
///
/// A page is none of the layout's.
pub fn decode_pages(bytes: &[u8], layout: &RamLayout) -> Result<PageSet, ProtocolError> {
    let mut pages = PageSet::empty(layout);
    for block in decode_blocks(bytes)? {
        check_block(&block, layout)?;
        for run in block.runs() {
            let first = block.first_page();
            let run = first + u64::from(run.start)..first + u64::from(run.end);
            pages.insert(usize::from(block.region), run);
        }
    }
    Ok(pages)
}

/// Whether all pages of a block are the layout's.
///
/// # Errors
///
/// One is not.
pub fn check_block(block: &Block, layout: &RamLayout) -> Result<(), ProtocolError> {
    let pages = layout.pages(usize::from(block.region));
    let end = block
        .runs()
        .map(|run| block.first_page() + u64::from(run.end));
    let region = usize::from(block.region) < layout.regions();
    bound(region && end.max().is_none_or(|end| end <= pages), "block")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text() -> impl Strategy<Value = String> {
        ".{0,40}"
    }

    fn bytes() -> impl Strategy<Value = ByteVec> {
        proptest::collection::vec(any::<u8>(), 0..200).prop_map(Into::into)
    }

    fn told() -> impl Strategy<Value = Told> {
        (text(), text()).prop_map(|(code, message)| Told::new(&code, &message))
    }

    fn connected() -> impl Strategy<Value = Connected> {
        let certificates = proptest::collection::vec(bytes(), 0..4);
        let words = (text(), text(), text());
        (any::<u64>(), words, certificates, any::<[u8; 32]>()).prop_map(
            |(id, (host, cipher, key_exchange), certificates, exporter)| Connected {
                id,
                host,
                cipher,
                key_exchange,
                certificates,
                exporter,
            },
        )
    }

    fn from_receiving() -> impl Strategy<Value = FromReceiving> {
        prop_oneof![
            any::<u32>().prop_map(FromReceiving::Streams),
            any::<(u32, u32, bool)>().prop_map(|(a, b, c)| FromReceiving::RoundEnd(a, b, c)),
            any::<u32>().prop_map(FromReceiving::Pushed),
            any::<(u32, bool)>().prop_map(|(a, b)| FromReceiving::Drained(a, b)),
            (any::<u32>(), any::<bool>(), text())
                .prop_map(|(a, b, c)| FromReceiving::Failed(a, b, c)),
            (bytes(), any::<bool>()).prop_map(|(a, b)| FromReceiving::DeviceState(a, b)),
            (any::<u64>(), any::<[u8; 32]>(), any::<[u64; 3]>()).prop_map(|(id, root, waits)| {
                FromReceiving::Answer(id, Answer::Pulled(Root(root), waits.to_vec()))
            }),
            (any::<u64>(), bytes(), any::<[(u16, u64); 2]>()).prop_map(|(id, pages, wanted)| {
                FromReceiving::Answer(id, Answer::Arrived(pages, wanted.to_vec()))
            }),
        ]
    }

    fn back<T: Wire + PartialEq + std::fmt::Debug>(value: &T) {
        assert_eq!(T::decoded(&value.encoded()).as_ref(), Ok(value));
    }

    proptest! {
        #[test]
        fn what_is_told_comes_back_as_it_was(
            from_receiving in from_receiving(),
            connected in connected(),
            told in told(),
            bytes in bytes(),
            (op, root) in any::<(u64, [u8; 32])>(),
        ) {
            back(&from_receiving);
            back(&FromNetwork::Arrived(connected.clone()));
            back(&FromNetwork::Sign(Sign { id: op, scheme: 0x0403, message: bytes.clone() }));
            back(&FromControl::Connected(connected));
            back(&FromControl::Message(bytes.clone()));
            back(&FromControl::Ended(told.clone()));
            back(&FromSending::Done(op, Some(told)));
            back(&FromSending::Root(op, Root(root)));
            back(&ToNetwork::Signed(Signed { id: op, signature: Some(bytes) }));
        }

        #[test]
        fn whatever_comes_is_read_without_panic(noise in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = FromNetwork::decoded(&noise);
            let _ = FromControl::decoded(&noise);
            let _ = FromSending::decoded(&noise);
            let _ = FromReceiving::decoded(&noise);
            let _ = ToNetwork::decoded(&noise);
            let _ = ToSending::decoded(&noise);
            let _ = ToReceiving::decoded(&noise);
            let layout = RamLayout::new(vec![1000, 70]).unwrap();
            let _ = decode_pages(&noise, &layout);
        }

        #[test]
        fn page_sets_travel_whole(ranges in proptest::collection::vec((0..2_usize, 0..1000_u64, 1..300_u64), 0..20)) {
            let layout = RamLayout::new(vec![1000, 70]).unwrap();
            let mut pages = PageSet::empty(&layout);
            for (region, first, count) in ranges {
                pages.insert(region, first..first + count);
            }
            prop_assert_eq!(decode_pages(&encode_pages(&pages), &layout), Ok(pages));
        }
    }

    #[test]
    fn all_pages_of_any_vm_are_within_the_bound_of_a_set() {
        for regions in [vec![1], vec![256, 512], vec![257; REGIONS_MAX]] {
            let layout = RamLayout::new(regions.clone()).unwrap();
            let mut pages = PageSet::empty(&layout);
            for (region, count) in regions.iter().enumerate() {
                pages.insert(region, 0..*count);
            }
            let most = pages_bytes_max(regions.iter().sum::<u64>() * PAGE_BYTES);
            assert!(encode_pages(&pages).len() as u64 <= most);
        }
    }

    #[test]
    fn pages_outside_of_the_vm_are_refused() {
        let layout = RamLayout::new(vec![300]).unwrap();
        let block = |region, index, mask| {
            encode_blocks(std::iter::once(Block {
                region,
                index,
                mask,
            }))
        };
        assert!(decode_pages(&block(0, 1, [1 << 43, 0, 0, 0]), &layout).is_ok());
        assert!(decode_pages(&block(0, 1, [1 << 44, 0, 0, 0]), &layout).is_err());
        assert!(decode_pages(&block(1, 0, [1, 0, 0, 0]), &layout).is_err());
        assert!(decode_pages(&block(0, u32::MAX, [1, 0, 0, 0]), &layout).is_err());
        assert!(decode_pages(&[0; 37], &layout).is_err());
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let long = Told {
            code: "x".repeat(WORD_MAX + 1),
            message: String::new(),
        };
        let encoded = FromControl::Ended(long).encoded();
        assert_eq!(
            FromControl::decoded(&encoded),
            Err(ProtocolError::OutOfBounds("code"))
        );
        let sign = FromNetwork::Sign(Sign {
            id: 1,
            scheme: 1,
            message: vec![0; 257].into(),
        });
        assert!(FromNetwork::decoded(&sign.encoded()).is_err());
        let waits = FromReceiving::Answer(1, Answer::Pulled(Root([0; 32]), vec![0; 41]));
        assert!(FromReceiving::decoded(&waits.encoded()).is_err());
    }
}
