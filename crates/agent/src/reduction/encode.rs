//! From pages to frames, as a stream sends them.

use std::time::{Duration, Instant};

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use palanquin_api::control::Compress;
use palanquin_engine::frame::{Codec, Frame, HEADER_BYTES, PAYLOAD_MAX};
use palanquin_engine::pages::Block;

use super::cache::Cache;
use super::choose::{Chooser, DeltaGate, Sent};
use super::{CACHE_BYTES, PAGE, delta};
use crate::digest::{Digests, Stored, is_zero};

/// Longest delta of a page: from here on compression does as well.
const DELTA_MAX: usize = PAGE / 2;
/// Bytes that encoders are tried on.
const SAMPLE_BYTES: usize = 64 * 1024;
/// Zstandard's fastest ordinary level: the next ones cost more than they save at the rates of a network.
const ZSTD_LEVEL: i32 = 1;

/// How many pages of a block went how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// As nothing but a bit.
    pub zero: u32,
    /// As what differs.
    pub delta: u32,
    /// As a reference.
    pub duplicate: u32,
    /// Compressed.
    pub compressed: u32,
    /// As they are.
    pub raw: u32,
    /// Bytes less than the pages that are not zero have.
    pub saved_bytes: u64,
}

/// What one block became.
pub struct Encoded<'a> {
    /// Whole frames, to be sent in this order.
    pub bytes: [&'a [u8]; 2],
    /// What went how.
    pub counts: Counts,
    /// Whether [`Encoder::sent`] wants to know what became of it.
    pub adaptive: bool,
    /// What it wants to know; the durations of preparing and sending are still missing.
    pub sent: Sent,
    /// Time spent with encoders, samples included.
    pub encoding: Duration,
}

#[derive(Default)]
struct Packer {
    lz4: Option<CompressTable>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    packed: Vec<u8>,
}

impl Packer {
    /// Compresses to `self.packed`, behind room for a header; the length if that is worth the receiver's work.
    fn pack(&mut self, codec: Codec, input: &[u8]) -> Option<usize> {
        // Samples need little; the rest comes with the first block that is compressed.
        let room = HEADER_BYTES + get_maximum_output_size(input.len());
        if self.packed.len() < room {
            self.packed.resize(room, 0);
        }
        let output = self.packed.get_mut(HEADER_BYTES..)?;
        let limit = input.len() - input.len() / 32;
        let len = match codec {
            Codec::Lz4 => {
                let table = self.lz4.get_or_insert_with(CompressTable::large);
                compress_into_with_table(input, output, table).ok()?
            }
            Codec::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok();
                }
                // An output that does not fit is given up early.
                let output = output.get_mut(..limit)?;
                self.zstd.as_mut()?.compress_to_buffer(input, output).ok()?
            }
        };
        (len < limit).then_some(len)
    }

    /// Length and time for a sample.
    fn sample(&mut self, codec: Codec, input: &[u8]) -> (usize, Duration) {
        let fresh = match codec {
            Codec::Lz4 => self.lz4.is_none(),
            Codec::Zstd => self.zstd.is_none(),
        };
        if fresh {
            // The first use also pays for its tables.
            self.pack(codec, input);
        }
        let began = Instant::now();
        let len = self.pack(codec, input).unwrap_or(input.len());
        (len, began.elapsed())
    }
}

/// The encoder of one stream.
pub struct Encoder {
    /// Room for a header, and a block's pages.
    buffer: Vec<u8>,
    /// Frames that need little room.
    small: Vec<u8>,
    deltas: Vec<u8>,
    references: Vec<u8>,
    packer: Packer,
    cache: Option<Cache>,
    chooser: Chooser,
    gate: DeltaGate,
    samples: usize,
    adaptive: bool,
}

impl Encoder {
    /// For one of `streams` streams.
    pub fn new(mode: Compress, streams: usize) -> Self {
        let pages = (CACHE_BYTES / PAGE / streams.max(1)).max(1);
        Self::with_cache(mode, pages)
    }

    /// With a cache of so many pages.
    pub fn with_cache(mode: Compress, pages: usize) -> Self {
        let chooser = Chooser::new(mode);
        Self {
            buffer: vec![0; HEADER_BYTES + PAYLOAD_MAX],
            small: Vec::new(),
            deltas: Vec::new(),
            references: Vec::new(),
            packer: Packer::default(),
            cache: (mode != Compress::Off).then(|| Cache::new(pages)),
            adaptive: chooser.is_adaptive(),
            chooser,
            gate: DeltaGate::default(),
            samples: 0,
        }
    }

    /// From now on no deltas and no duplicates: the destination's memory is not what was sent any more. There is no
    /// way back.
    pub fn forbid_references(&mut self) {
        self.cache = None;
    }

    /// A round has ended.
    pub fn end_round(&mut self) {
        if let Some(cache) = &mut self.cache {
            cache.end_generation();
        }
    }

    /// Where the pages of a block are to be read to, in order.
    pub fn room(&mut self, block: &Block) -> &mut [u8] {
        let len = (block.len() as usize * PAGE).min(PAYLOAD_MAX);
        &mut self.buffer[HEADER_BYTES..HEADER_BYTES + len]
    }

    /// Encodes the block whose pages were read to [`Encoder::room`]. The frames must be sent, or the stream closed.
    pub fn encode(&mut self, block: Block, digests: &Digests) -> Encoded<'_> {
        self.small.clear();
        self.deltas.clear();
        self.references.clear();
        let look = !self.adaptive || self.gate.is_open(block.index, self.chooser.has_free_cpu());
        let mut masks = Masks::default();
        let (mut from, mut end) = (HEADER_BYTES, HEADER_BYTES);
        for in_block in block.runs().flatten() {
            let page = block.first_page() + u64::from(in_block);
            // The copy is looked at, not the memory: the guest may write it at any time, and then the page comes
            // again.
            let contents = &self.buffer[from..from + PAGE];
            let place = if is_zero(contents) {
                if digests.set_zero(block.region, page)
                    && let Some(cache) = &mut self.cache
                {
                    cache.forget(block.region, page);
                }
                Place::Zero
            } else {
                let stored = digests.set(block.region, page, contents);
                match &mut self.cache {
                    Some(cache) => {
                        let mut references = References {
                            cache,
                            gate: &mut self.gate,
                            look,
                            deltas: &mut self.deltas,
                            references: &mut self.references,
                        };
                        references.place(&block, page, contents, stored)
                    }
                    None => Place::Rest,
                }
            };
            masks.add(place, in_block);
            if place == Place::Rest {
                if from != end {
                    self.buffer.copy_within(from..from + PAGE, end);
                }
                end += PAGE;
            }
            from += PAGE;
        }
        self.frames(&block, &masks, end)
    }

    fn frames(&mut self, block: &Block, masks: &Masks, end: usize) -> Encoded<'_> {
        let of = |mask| Block { mask, ..*block };
        let [zero, duplicate, differs, rest] = [
            masks.of(Place::Zero),
            masks.of(Place::Duplicate),
            masks.of(Place::Delta),
            masks.of(Place::Rest),
        ]
        .map(of);
        if !zero.is_empty() {
            self.small.extend(Frame::Zero(zero).encode());
        }
        if !duplicate.is_empty() {
            self.small.extend(Frame::Duplicate(duplicate).encode());
            self.small.extend_from_slice(&self.references);
        }
        if !differs.is_empty() {
            // Less than half of a block.
            let len = self.deltas.len() as u32;
            let frame = Frame::Delta {
                block: differs,
                len,
            };
            self.small.extend(frame.encode());
            self.small.extend_from_slice(&self.deltas);
        }
        let mut counts = Counts {
            zero: zero.len(),
            duplicate: duplicate.len(),
            delta: differs.len(),
            ..Counts::default()
        };
        let mut sent = Sent::default();
        let mut encoding = Duration::ZERO;
        let raw = end - HEADER_BYTES;
        let mut packed = None;
        if raw > 0 {
            encoding += self.take_samples(raw);
            sent.codec = self.chooser.codec();
            if let Some(codec) = sent.codec {
                let began = Instant::now();
                packed = self.packer.pack(codec, &self.buffer[HEADER_BYTES..end]);
                sent.encode = began.elapsed();
                encoding += sent.encode;
            }
        }
        let bulk = match (packed, sent.codec) {
            (Some(len), Some(codec)) => {
                counts.compressed = rest.len();
                let frame = Frame::Compressed {
                    codec,
                    block: rest,
                    len: len as u32,
                };
                self.packer.packed[..HEADER_BYTES].copy_from_slice(&frame.encode());
                &self.packer.packed[..HEADER_BYTES + len]
            }
            _ if raw > 0 => {
                counts.raw = rest.len();
                self.buffer[..HEADER_BYTES].copy_from_slice(&Frame::Pages(rest).encode());
                &self.buffer[..end]
            }
            _ => &[],
        };
        sent.input = raw as u64;
        sent.output = packed.unwrap_or(raw) as u64;
        sent.wire = (self.small.len() + bulk.len()) as u64;
        let pages = u64::from(duplicate.len() + differs.len()) * PAGE as u64;
        let references = (self.references.len() + self.deltas.len()) as u64;
        counts.saved_bytes = pages - references + sent.input - sent.output;
        Encoded {
            bytes: [&self.small, bulk],
            counts,
            adaptive: self.adaptive,
            sent,
            encoding,
        }
    }

    /// Tries encoders on a part of the pages that are left, if it is time for that.
    fn take_samples(&mut self, raw: usize) -> Duration {
        if raw < SAMPLE_BYTES {
            return Duration::ZERO;
        }
        let began = Instant::now();
        let codecs = self.chooser.samples();
        if codecs.is_empty() {
            return Duration::ZERO;
        }
        // Another part each time.
        self.samples += 1;
        let at =
            HEADER_BYTES + self.samples * SAMPLE_BYTES % (raw - SAMPLE_BYTES + 1) / PAGE * PAGE;
        for &codec in codecs {
            let input = &self.buffer[at..at + SAMPLE_BYTES];
            let (len, took) = self.packer.sample(codec, input);
            self.chooser
                .sampled(codec, SAMPLE_BYTES as u64, len as u64, took);
        }
        began.elapsed()
    }

    /// What encoding and sending a block took.
    pub fn sent(&mut self, sent: &Sent) {
        self.chooser.record(sent);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Zero,
    Duplicate,
    Delta,
    Rest,
}

#[derive(Default)]
struct Masks([[u64; 4]; 4]);

impl Masks {
    fn add(&mut self, place: Place, in_block: u32) {
        self.0[place as usize][(in_block / 64) as usize] |= 1 << (in_block % 64);
    }

    fn of(&self, place: Place) -> [u64; 4] {
        self.0[place as usize]
    }
}

struct References<'a> {
    cache: &'a mut Cache,
    gate: &'a mut DeltaGate,
    look: bool,
    deltas: &'a mut Vec<u8>,
    references: &'a mut Vec<u8>,
}

impl References<'_> {
    fn place(&mut self, block: &Block, page: u64, contents: &[u8], stored: Stored) -> Place {
        let Stored { digest, before } = stored;
        let (cache, region) = (&mut *self.cache, block.region);
        let seen = cache.note(digest);
        if seen
            && let Some((other, number)) = cache.find(digest, contents)
            // What a page of this block holds at the destination depends on the order of the frames.
            && !block.names(other, number)
        {
            self.references.extend(other.to_le_bytes());
            self.references.extend(number.to_le_bytes());
            cache.sent(region, page, digest, contents, false);
            return Place::Duplicate;
        }
        if before && let Some(old) = cache.version(region, page) {
            let won = self.look && delta::encode(old, contents, DELTA_MAX, self.deltas);
            if self.look {
                self.gate.record(won);
            }
            if won {
                cache.sent(region, page, digest, contents, true);
                return Place::Delta;
            }
            // Another page may have more use for the room.
            cache.forget(region, page);
        } else if seen || (before && self.look) {
            cache.sent(region, page, digest, contents, true);
        }
        Place::Rest
    }
}
