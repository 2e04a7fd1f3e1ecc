//! The encoder and decoder together, and what a hostile source may send.

use std::ops::Range;
use std::sync::Mutex;

use palanquin_api::control::Compress;
use palanquin_engine::frame::{Codec, Frame, HEADER_BYTES};
use palanquin_engine::pages::{Block, PageSet, RamLayout};
use palanquin_host::vm::{GuestRam, Region};
use proptest::prelude::*;

use super::decode::{DecodeError, Decoder, Target};
use super::delta::DeltaError;
use super::encode::{Counts, Encoder};
use super::{PAGE, stream_of};
use crate::digest::Digests;

/// Memory of a guest that is not there.
pub(super) struct Ram {
    regions: Vec<Region>,
    bytes: Mutex<Vec<Vec<u8>>>,
}

impl Ram {
    pub(super) fn new(layout: &RamLayout) -> Self {
        let sizes = (0..layout.regions()).map(|region| layout.pages(region) as usize * PAGE);
        Self {
            regions: Vec::new(),
            bytes: Mutex::new(sizes.map(|size| vec![0; size]).collect()),
        }
    }
}

impl GuestRam for Ram {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn data_extents(&self, _: usize) -> Result<Vec<Range<u64>>, palanquin_host::Error> {
        Ok(Vec::new())
    }

    fn read(
        &self,
        region: usize,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), palanquin_host::Error> {
        let at = offset as usize;
        buffer.copy_from_slice(&self.bytes.lock().unwrap()[region][at..at + buffer.len()]);
        Ok(())
    }

    fn write(&self, region: usize, offset: u64, bytes: &[u8]) -> Result<(), palanquin_host::Error> {
        let at = offset as usize;
        self.bytes.lock().unwrap()[region][at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn discard(&self, region: usize, range: Range<u64>) -> Result<(), palanquin_host::Error> {
        self.bytes.lock().unwrap()[region][range.start as usize..range.end as usize].fill(0);
        Ok(())
    }
}

/// Both ends of a migration, without what is between them.
struct Pair {
    layout: RamLayout,
    source: Ram,
    destination: Ram,
    sent: Digests,
    received: Digests,
    encoders: Vec<Encoder>,
    decoders: Vec<Decoder>,
    references: bool,
    counts: Counts,
    wire: usize,
}

impl Pair {
    fn new(pages: &[u64], mode: Compress, streams: usize, cache: usize) -> Self {
        let layout = RamLayout::new(pages.to_vec()).unwrap();
        Self {
            source: Ram::new(&layout),
            destination: Ram::new(&layout),
            sent: Digests::new(&layout, 7),
            received: Digests::new(&layout, 7),
            encoders: (0..streams)
                .map(|_| Encoder::with_cache(mode, cache))
                .collect(),
            decoders: (0..streams).map(Decoder::new).collect(),
            layout,
            references: true,
            counts: Counts::default(),
            wire: 0,
        }
    }

    fn set(&self, region: usize, page: u64, contents: &[u8]) {
        let offset = page * PAGE as u64;
        self.source.write(region, offset, contents).unwrap();
    }

    fn get(&self, region: usize, page: u64) -> Vec<u8> {
        let mut contents = vec![0; PAGE];
        let offset = page * PAGE as u64;
        self.source.read(region, offset, &mut contents).unwrap();
        contents
    }

    fn send(&mut self, pages: &PageSet) {
        for block in pages.blocks() {
            let stream = stream_of(block.region, block.index, self.encoders.len());
            let encoder = &mut self.encoders[stream];
            let mut room = encoder.room(&block);
            for run in block.runs() {
                let (pages, rest) = room.split_at_mut(run.len() * PAGE);
                let offset = (block.first_page() + u64::from(run.start)) * PAGE as u64;
                let region = usize::from(block.region);
                self.source.read(region, offset, pages).unwrap();
                room = rest;
            }
            let encoded = encoder.encode(block, &self.sent);
            let frames = encoded.bytes.concat();
            assert_eq!(frames.len() as u64, encoded.sent.wire);
            let (counts, all) = (encoded.counts, &mut self.counts);
            all.zero += counts.zero;
            all.delta += counts.delta;
            all.duplicate += counts.duplicate;
            all.compressed += counts.compressed;
            all.raw += counts.raw;
            all.saved_bytes += counts.saved_bytes;
            self.wire += frames.len();
            self.deliver(stream, &frames);
        }
    }

    fn deliver(&mut self, stream: usize, mut frames: &[u8]) {
        while let Some((header, rest)) = frames.split_first_chunk::<HEADER_BYTES>() {
            let frame = Frame::decode(header, &self.layout).unwrap();
            let (payload, rest) = rest.split_at(frame.payload_bytes());
            self.apply(stream, &frame, payload).unwrap();
            frames = rest;
        }
        assert!(frames.is_empty());
    }

    fn apply(&mut self, stream: usize, frame: &Frame, payload: &[u8]) -> Result<u64, DecodeError> {
        let target = Target {
            ram: &self.destination,
            layout: &self.layout,
            digests: &self.received,
            streams: self.decoders.len(),
            references: self.references,
        };
        self.decoders[stream].apply(frame, payload, &target)
    }

    fn is_equal(&self) -> bool {
        *self.source.bytes.lock().unwrap() == *self.destination.bytes.lock().unwrap()
            && self.sent.root() == self.received.root()
    }
}

/// Bytes that no encoder makes shorter.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

const PAGES: [u64; 2] = [600, 300];

#[derive(Clone, Debug)]
enum Change {
    Zero,
    Fill(u8),
    Noise(u64),
    Poke(usize, u8),
    CopyOf(usize, u64),
    Nothing,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Zero),
        (1u8..4).prop_map(Change::Fill),
        (0u64..6).prop_map(Change::Noise),
        (0..PAGE, any::<u8>()).prop_map(|(at, value)| Change::Poke(at, value)),
        (0..PAGES.len(), 0u64..300).prop_map(|(region, page)| Change::CopyOf(region, page)),
        Just(Change::Nothing),
    ]
}

fn mode() -> impl Strategy<Value = Compress> {
    prop::sample::select(vec![
        Compress::Auto,
        Compress::Off,
        Compress::Lz4,
        Compress::Zstd,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_destination_has_what_was_sent_after_every_round(
        mode in mode(),
        streams in 1usize..4,
        cache in 1usize..40,
        // Few pages, so that they come again and refer to each other.
        rounds in prop::collection::vec(
            prop::collection::vec((0..PAGES.len(), prop::sample::select(vec![0u64, 1, 2, 250, 255, 256, 257, 299]), 1u64..6, change()), 1..20),
            1..8,
        ),
        forbidden_after in 0usize..10,
    ) {
        let mut pair = Pair::new(&PAGES, mode, streams, cache);
        for (number, round) in rounds.into_iter().enumerate() {
            if number == forbidden_after {
                pair.encoders.iter_mut().for_each(Encoder::forbid_references);
                pair.references = false;
            }
            let mut pages = PageSet::empty(&pair.layout);
            for (region, first, count, change) in round {
                for page in first..(first + count).min(PAGES[region]) {
                    let mut contents = pair.get(region, page);
                    match change {
                        Change::Zero => contents.fill(0),
                        Change::Fill(value) => contents.fill(value),
                        Change::Noise(seed) => contents = noise(seed + page % 3, PAGE),
                        Change::Poke(at, value) => contents[at] = value,
                        Change::CopyOf(region, page) => contents = pair.get(region, page),
                        Change::Nothing => {}
                    }
                    pair.set(region, page, &contents);
                    pages.insert(region, page..page + 1);
                }
            }
            pair.send(&pages);
            pair.encoders.iter_mut().for_each(Encoder::end_round);
            prop_assert!(pair.is_equal());
        }
    }

    #[test]
    fn no_payload_makes_the_decoder_panic_or_write_elsewhere(
        frames in prop::collection::vec(
            (0u8..4, 0u32..3, 1u64..8, prop::collection::vec(any::<u8>(), 0..400), prop::option::of(0usize..400)),
            1..20,
        ),
    ) {
        let mut pair = Pair::new(&[512, 100], Compress::Off, 2, 1);
        for (kind, index, mask, mut payload, packed) in frames {
            let block = Block { region: 0, index: index & 1, mask: [mask, 0, 0, 0] };
            if let Some(len) = packed {
                // Something that begins as it should.
                payload = zstd::bulk::compress(&noise(len as u64, PAGE), 1).unwrap();
                payload.truncate(4096 - len);
            }
            let len = payload.len() as u32;
            let frame = match kind {
                0 => Frame::Compressed { codec: Codec::Lz4, block, len },
                1 => Frame::Compressed { codec: Codec::Zstd, block, len },
                2 => Frame::Delta { block, len },
                _ => Frame::Duplicate(block),
            };
            payload.resize(frame.payload_bytes(), 0);
            let _ = pair.apply((index & 1) as usize, &frame, &payload);
        }
        let bytes = pair.destination.bytes.lock().unwrap();
        prop_assert!(bytes[0][8 * PAGE..256 * PAGE].iter().all(|&byte| byte == 0));
        prop_assert!(bytes[1].iter().all(|&byte| byte == 0));
    }
}

fn all(layout: &RamLayout) -> PageSet {
    let mut pages = PageSet::empty(layout);
    for region in 0..layout.regions() {
        pages.insert(region, 0..layout.pages(region));
    }
    pages
}

#[test]
fn a_counter_in_noise_becomes_a_delta_with_the_third_version() {
    let mut pair = Pair::new(&[64], Compress::Lz4, 1, 64);
    for version in 1..=4 {
        for page in 0..64 {
            let mut contents = noise(page + 1, PAGE);
            contents[2000] = version;
            pair.set(0, page, &contents);
        }
        let pages = all(&pair.layout);
        pair.send(&pages);
        let expected = 64 * u32::from(version.saturating_sub(2));
        assert_eq!(pair.counts.delta, expected, "version {version}");
    }
    assert!(pair.is_equal());
    assert!(pair.wire < 2 * 64 * (PAGE + 10) + 2000, "{}", pair.wire);
}

#[test]
fn the_same_noise_all_over_becomes_references() {
    let mut pair = Pair::new(&[1024], Compress::Auto, 1, 64);
    for page in 0..1024 {
        pair.set(0, page, &noise(3, PAGE));
    }
    let pages = all(&pair.layout);
    pair.send(&pages);
    assert_eq!(pair.counts.duplicate, 768, "all but the first block's");
    assert!(pair.is_equal());
}

#[test]
fn without_reduction_every_page_is_sent_as_it_is() {
    let mut pair = Pair::new(&[512], Compress::Off, 1, 64);
    for page in 0..511 {
        pair.set(0, page, &[3; PAGE]);
    }
    for _ in 0..3 {
        let pages = all(&pair.layout);
        pair.send(&pages);
    }
    let expected = Counts {
        raw: 3 * 511,
        zero: 3,
        ..Counts::default()
    };
    assert_eq!(pair.counts, expected);
    assert!(pair.is_equal());
}

fn block(index: u32, mask: u64) -> Block {
    Block {
        region: 0,
        index,
        mask: [mask, 0, 0, 0],
    }
}

#[test]
fn a_bomb_is_refused_at_the_size_of_its_pages() {
    let mut pair = Pair::new(&[512], Compress::Off, 1, 1);
    let zeros = vec![0; 64 << 20];
    let zstd = zstd::bulk::compress(&zeros, 19).unwrap();
    let lz4 = lz4_flex::block::compress(&zeros[..PAGE + 1]);
    let cases = [
        (Codec::Zstd, &zstd[..zstd.len().min(PAGE - 1)]),
        (Codec::Lz4, &lz4),
    ];
    for (codec, payload) in cases {
        let len = payload.len() as u32;
        let frame = Frame::Compressed {
            codec,
            block: block(0, 1),
            len,
        };
        let result = pair.apply(0, &frame, payload);
        assert!(
            matches!(result, Err(DecodeError::Compressed(0))),
            "{result:?}"
        );
    }
    assert!(!pair.received.is_known(0, 0));
}

#[test]
fn too_few_pages_are_refused() {
    let mut pair = Pair::new(&[512], Compress::Off, 1, 1);
    let page = [1; PAGE];
    let zstd = zstd::bulk::compress(&page, 1).unwrap();
    let lz4 = lz4_flex::block::compress(&page);
    for (codec, payload) in [(Codec::Zstd, &zstd), (Codec::Lz4, &lz4)] {
        let len = payload.len() as u32;
        let frame = Frame::Compressed {
            codec,
            block: block(0, 3),
            len,
        };
        let result = pair.apply(0, &frame, payload);
        assert!(
            matches!(result, Err(DecodeError::Size { bytes: PAGE, .. })),
            "{result:?}"
        );
    }
}

fn reference(region: u16, page: u64) -> Vec<u8> {
    [&region.to_le_bytes()[..], &page.to_le_bytes()].concat()
}

#[test]
fn references_to_what_is_not_there_are_refused() {
    let mut pair = Pair::new(&[1024, 10], Compress::Off, 2, 1);
    // Page 0 of block 0 and page 0 of block 1 have arrived, each over its stream.
    for index in 0..2 {
        let frame = Frame::Pages(block(index, 1));
        pair.apply(index as usize, &frame, &[1; PAGE]).unwrap();
    }
    let mut refused = |region, page| {
        let frame = Frame::Duplicate(block(2, 1));
        pair.apply(0, &frame, &reference(region, page)).unwrap_err()
    };
    for (region, page) in [(0, 1024), (0, u64::MAX), (1, 10), (2, 0), (u16::MAX, 0)] {
        let error = refused(region, page);
        assert!(
            matches!(error, DecodeError::NoSuchPage { .. }),
            "{region} {page}: {error}"
        );
    }
    assert!(matches!(refused(0, 1), DecodeError::NeverSent { .. }));
    assert!(matches!(refused(0, 256), DecodeError::OtherStream { .. }));
    let frame = Frame::Duplicate(block(0, 3));
    let payload = [reference(0, 0), reference(0, 0)].concat();
    let error = pair.apply(0, &frame, &payload).unwrap_err();
    assert!(matches!(error, DecodeError::SameFrame { .. }), "{error}");
}

#[test]
fn deltas_against_what_is_not_there_are_refused() {
    let mut pair = Pair::new(&[1024], Compress::Off, 2, 1);
    let delta = |payload: &[u8]| Frame::Delta {
        block: block(0, 1),
        len: payload.len() as u32,
    };
    let same = [0x80, 0x20];
    let error = pair.apply(0, &delta(&same), &same).unwrap_err();
    assert!(matches!(error, DecodeError::NeverSent { .. }), "{error}");
    pair.apply(0, &Frame::Pages(block(0, 1)), &[1; PAGE])
        .unwrap();
    pair.apply(0, &delta(&same), &same).unwrap();
    let error = pair.apply(1, &delta(&same), &same).unwrap_err();
    assert!(matches!(error, DecodeError::OtherStream { .. }), "{error}");
    let long = [0x80, 0x20, 0];
    let error = pair.apply(0, &delta(&long), &long).unwrap_err();
    let trailing = DeltaError::Trailing;
    assert!(
        matches!(error, DecodeError::Delta { error, .. } if error == trailing),
        "{error}"
    );
    pair.apply(0, &Frame::Zero(block(0, 1)), &[]).unwrap();
    let error = pair.apply(0, &delta(&same), &same).unwrap_err();
    assert!(matches!(error, DecodeError::NeverSent { .. }), "{error}");
}

#[test]
fn references_are_refused_once_the_vm_runs_here() {
    let mut pair = Pair::new(&[1024], Compress::Off, 1, 1);
    pair.apply(0, &Frame::Pages(block(0, 1)), &[1; PAGE])
        .unwrap();
    pair.references = false;
    let delta = Frame::Delta {
        block: block(0, 1),
        len: 2,
    };
    let error = pair.apply(0, &delta, &[0x80, 0x20]).unwrap_err();
    assert!(matches!(error, DecodeError::NotAnyMore), "{error}");
    let frame = Frame::Duplicate(block(1, 1));
    let error = pair.apply(0, &frame, &reference(0, 0)).unwrap_err();
    assert!(matches!(error, DecodeError::NotAnyMore), "{error}");
}
