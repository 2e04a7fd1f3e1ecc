//! Frames and their payloads against a VM's memory; and what our own encoder makes of pages.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use arbitrary::{Result, Unstructured};
use palanquin_agent::digest::Digests;
use palanquin_agent::reduction::decode::{Decoder, Target as Memory};
use palanquin_agent::reduction::encode::Encoder;
use palanquin_agent::reduction::{PAGE, delta, stream_of};
use palanquin_api::control::Compress;
use palanquin_engine::frame::{Codec, Frame, HEADER_BYTES, PAYLOAD_MAX, REFERENCE_BYTES};
use palanquin_engine::pages::{Block, PageSet, RamLayout};
use palanquin_host::Error;
use palanquin_host::vm::{GuestRam, Region};

use super::within;
use crate::entry::Target;

/// Frames that nobody has to have encoded, on two streams.
pub(crate) const FRAMES: Target = Target::new("frames", frames, || {
    // Each begins with a choice of the stream and of what is made; see `a_frame`.
    let mut seeds: Vec<_> = (0..12)
        .map(|kind| [vec![kind, 0, 1, 255], vec![kind; 120]].concat())
        .collect();
    seeds.push((0..=255).cycle().take(900).collect());
    seeds
});

/// What the encoder sends is what arrives.
pub(crate) const ROUND_TRIP: Target = Target::new(
    "round-trip",
    |data| {
        let _ = round_trip(data);
    },
    || {
        let mut seeds: Vec<_> = (0..8).map(|kind| vec![kind * 32; 200]).collect();
        seeds.push((0..=255).cycle().take(600).collect());
        seeds
    },
);

/// Deltas alone.
pub(crate) const DELTA: Target = Target::new("delta", deltas, || {
    let delta = |bytes: &[&[u8]]| bytes.concat();
    vec![
        delta(&[&[0], &[0x80, 0x20]]),
        delta(&[&[0], &[0x00, 0x80, 0x20], &[9; PAGE]]),
        delta(&[&[0], &[0xff, 0x1f, 1, 7]]),
        // Beyond the page, an empty run, a count of three bytes, and ends within.
        delta(&[&[0], &[0xff, 0x7f]]),
        delta(&[&[0], &[0xff, 0x1f, 2, 7, 7]]),
        delta(&[&[0], &[4, 0]]),
        delta(&[&[0], &[0x80, 0x80, 1]]),
        delta(&[&[0], &[4, 4, 1]]),
        delta(&[&[1], &[200; 64]]),
    ]
});

const PAGES: [u64; 2] = [600, 3];
const STREAMS: usize = 2;
/// Most memory that decoding a frame may take: a block's pages, and the library's own.
const DECODER_BYTES: usize = PAYLOAD_MAX + (1 << 20);

/// Most frames of an input: more find nothing else, only more slowly.
const FRAMES_MAX: usize = 12;

type Page = (usize, u64);

/// Memory that knows which pages were read and written.
struct Ram {
    pages: Mutex<BTreeMap<Page, Vec<u8>>>,
    touched: Mutex<(Vec<Page>, Vec<Page>)>,
}

impl Ram {
    fn new() -> Self {
        Self {
            pages: Mutex::default(),
            touched: Mutex::default(),
        }
    }

    fn get(&self, page: Page) -> Vec<u8> {
        self.pages
            .lock()
            .expect("one thread")
            .get(&page)
            .cloned()
            .unwrap_or_else(|| vec![0; PAGE])
    }

    /// Pages read and pages written since the last time.
    fn take_touched(&self) -> (Vec<Page>, Vec<Page>) {
        std::mem::take(&mut self.touched.lock().expect("one thread"))
    }
}

fn pages_of(region: usize, offset: u64, len: u64) -> impl Iterator<Item = Page> {
    let page = PAGE as u64;
    assert!(offset.is_multiple_of(page) && len.is_multiple_of(page) && len > 0);
    let end = offset.checked_add(len).expect("an address");
    assert!(end / page <= PAGES[region], "behind the end of the memory");
    (offset / page..end / page).map(move |page| (region, page))
}

impl GuestRam for Ram {
    fn regions(&self) -> &[Region] {
        &[]
    }

    fn data_extents(&self, _: usize) -> std::result::Result<Vec<Range<u64>>, Error> {
        Ok(Vec::new())
    }

    fn read(
        &self,
        region: usize,
        offset: u64,
        buffer: &mut [u8],
    ) -> std::result::Result<(), Error> {
        let pages = pages_of(region, offset, buffer.len() as u64);
        for (page, bytes) in pages.zip(buffer.chunks_mut(PAGE)) {
            bytes.copy_from_slice(&self.get(page));
            self.touched.lock().expect("one thread").0.push(page);
        }
        Ok(())
    }

    fn write(&self, region: usize, offset: u64, bytes: &[u8]) -> std::result::Result<(), Error> {
        let pages = pages_of(region, offset, bytes.len() as u64);
        for (page, bytes) in pages.zip(bytes.chunks(PAGE)) {
            self.pages
                .lock()
                .expect("one thread")
                .insert(page, bytes.to_vec());
            self.touched.lock().expect("one thread").1.push(page);
        }
        Ok(())
    }

    fn discard(&self, region: usize, range: Range<u64>) -> std::result::Result<(), Error> {
        for page in pages_of(region, range.start, range.end - range.start) {
            self.pages.lock().expect("one thread").remove(&page);
            self.touched.lock().expect("one thread").1.push(page);
        }
        Ok(())
    }
}

fn layout() -> RamLayout {
    RamLayout::new(PAGES.to_vec()).expect("a layout")
}

/// A block of few pages of that stream.
fn a_block(u: &mut Unstructured<'_>) -> Result<Block> {
    let region = u.int_in_range(0..=1_u16)?;
    let index = if region == 0 {
        u.int_in_range(0..=2)?
    } else {
        0
    };
    let mut mask = [0; 4];
    for word in &mut mask {
        *word = match u.int_in_range(0..=31)? {
            0..=3 => u64::from(u.arbitrary::<u8>()?),
            4 => u.arbitrary()?,
            5 => u64::MAX,
            _ => 0,
        };
    }
    if mask == [0; 4] {
        mask[0] = 1 << u.int_in_range(0..=2)?;
    }
    Ok(Block {
        region,
        index,
        mask,
    })
}

/// Contents that compress, one byte of input for some of output.
fn contents(u: &mut Unstructured<'_>, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![u.arbitrary()?; len];
    for _ in 0..u.int_in_range(0..=3)? {
        let at = u.int_in_range(0..=len - 1)?;
        bytes[at] = u.arbitrary()?;
    }
    Ok(bytes)
}

fn some(u: &mut Unstructured<'_>, max: usize) -> Result<Vec<u8>> {
    let len = u.int_in_range(0..=max.min(u.len()))?;
    Ok(u.bytes(len)?.to_vec())
}

/// A header and a payload; either may be nonsense.
fn a_frame(u: &mut Unstructured<'_>) -> Result<([u8; HEADER_BYTES], Vec<u8>)> {
    let kind = u.int_in_range(0..=11)?;
    let block = a_block(u)?;
    let pages = block.len() as usize;
    let raw = pages * PAGE;
    let (frame, payload) = match kind {
        0 => (Frame::Pages(block), contents(u, raw)?),
        1 => (Frame::Zero(block), vec![]),
        2 | 3 | 4 | 5 => {
            // What should become the pages, and sometimes more or less of it: by bytes, or by very much.
            let len = match u.int_in_range(0..=7)? {
                0 => raw + 1,
                1 => raw - 1,
                2 => 2 << 20,
                _ => raw,
            };
            let (codec, mut bytes) = if kind % 2 == 0 {
                (Codec::Lz4, lz4_flex::block::compress(&contents(u, len)?))
            } else {
                (
                    Codec::Zstd,
                    zstd::bulk::compress(&contents(u, len)?, 1).expect("bytes"),
                )
            };
            if kind > 3 {
                let at = u.int_in_range(0..=bytes.len() - 1)?;
                bytes[at] = u.arbitrary()?;
            }
            (
                Frame::Compressed {
                    codec,
                    block,
                    len: bytes.len() as u32,
                },
                bytes,
            )
        }
        6 | 7 => {
            let codec = if kind == 6 { Codec::Lz4 } else { Codec::Zstd };
            let bytes = some(u, 300)?;
            (
                Frame::Compressed {
                    codec,
                    block,
                    len: bytes.len() as u32,
                },
                bytes,
            )
        }
        8 => {
            let mut bytes = Vec::new();
            for _ in 0..pages {
                let old = vec![0; PAGE];
                delta::encode(&old, &contents(u, PAGE)?, 64, &mut bytes);
            }
            if u.arbitrary()? {
                bytes.extend(some(u, 40)?);
            }
            (
                Frame::Delta {
                    block,
                    len: bytes.len() as u32,
                },
                bytes,
            )
        }
        9 => {
            let bytes = some(u, 600)?;
            (
                Frame::Delta {
                    block,
                    len: bytes.len() as u32,
                },
                bytes,
            )
        }
        10 => {
            let mut bytes = Vec::new();
            for _ in 0..pages {
                let region = if u.ratio(1, 32)? {
                    u.arbitrary()?
                } else {
                    u.int_in_range(0..=1_u16)?
                };
                let page = if u.ratio(1, 32)? {
                    u.arbitrary()?
                } else {
                    u.int_in_range(0..=610_u64)?
                };
                bytes.extend_from_slice(&region.to_le_bytes());
                bytes.extend_from_slice(&page.to_le_bytes());
            }
            assert_eq!(bytes.len(), pages * REFERENCE_BYTES);
            (Frame::Duplicate(block), bytes)
        }
        _ => {
            let mut header = [0; HEADER_BYTES];
            u.fill_buffer(&mut header)?;
            return Ok((header, some(u, 4096)?));
        }
    };
    Ok((frame.encode(), payload))
}

fn frames(data: &[u8]) {
    let (layout, ram) = (layout(), Ram::new());
    let digests = Digests::new(&layout, 7);
    // An input that ends within a frame has no more frames.
    let _ = take_frames(data, &layout, &ram, &digests);
    // Whatever came: what a digest says is what the memory holds.
    let fresh = Digests::new(&layout, 7);
    for (page, contents) in &*ram.pages.lock().expect("one thread") {
        assert!(
            digests.is_known(page.0 as u16, page.1),
            "{page:?} holds data that no digest tells of"
        );
        fresh.set(page.0 as u16, page.1, contents);
    }
    assert_eq!(fresh.root(), digests.root());
}

fn take_frames(data: &[u8], layout: &RamLayout, ram: &Ram, digests: &Digests) -> Result<()> {
    let mut u = Unstructured::new(data);
    let mut decoders = [Decoder::new(0), Decoder::new(1)];
    for _ in 0..FRAMES_MAX {
        if u.is_empty() {
            break;
        }
        let index = u.int_in_range(0..=1_usize)?;
        let references = !u.ratio(1, 16)?;
        let (header, payload) = a_frame(&mut u)?;
        let Ok(frame) = Frame::decode(&header, layout) else {
            continue;
        };
        let target = Memory {
            ram,
            layout,
            digests,
            streams: STREAMS,
            references,
        };
        // Our memory is a map of pages, which the decoder fills: a block and a half for that.
        let known = |page: &Page| digests.is_known(page.0 as u16, page.1);
        let before: Vec<Page> = ram
            .pages
            .lock()
            .expect("one thread")
            .keys()
            .copied()
            .filter(known)
            .collect();
        let allowed = DECODER_BYTES + 2 * PAYLOAD_MAX + 64 * 1024;
        let result = within(allowed, || decoders[index].apply(&frame, &payload, &target));
        let (read, written) = ram.take_touched();
        let named = |page: &Page| match frame {
            Frame::Pages(block)
            | Frame::Zero(block)
            | Frame::Compressed { block, .. }
            | Frame::Delta { block, .. }
            | Frame::Duplicate(block) => block.names(page.0 as u16, page.1),
            _ => false,
        };
        assert!(
            written.iter().all(named),
            "a page that the frame does not name was written"
        );
        for page in &read {
            assert!(references, "a reference where none may be");
            assert!(before.contains(page), "a page that was never sent was read");
            let block = u32::try_from(page.1 / 256).expect("small");
            assert_eq!(stream_of(page.0 as u16, block, STREAMS), index);
            assert!(!matches!(frame, Frame::Duplicate(_)) || !named(page));
        }
        if let Ok(bytes) = result {
            let block = match frame {
                Frame::Zero(block) => {
                    assert_eq!(bytes, 0);
                    block
                }
                Frame::Pages(block)
                | Frame::Compressed { block, .. }
                | Frame::Delta { block, .. }
                | Frame::Duplicate(block) => {
                    assert_eq!(bytes, u64::from(block.len()) * PAGE as u64);
                    block
                }
                other => panic!("{other:?} has no pages"),
            };
            for page in block.runs().flatten() {
                let page = (usize::from(block.region), block.first_page() + page as u64);
                let expected = matches!(frame, Frame::Zero(_));
                assert_eq!(known(&page), !expected);
                assert!(!expected || ram.get(page).iter().all(|byte| *byte == 0));
            }
        }
    }
    Ok(())
}

fn round_trip(data: &[u8]) -> Result<()> {
    let mut u = Unstructured::new(data);
    let layout = layout();
    let (source, destination) = (Ram::new(), Ram::new());
    let (sent, received) = (Digests::new(&layout, 7), Digests::new(&layout, 7));
    let mode = match u.int_in_range(0..=3)? {
        0 => Compress::Off,
        1 => Compress::Lz4,
        2 => Compress::Zstd,
        _ => Compress::Auto,
    };
    let mut encoders = [Encoder::with_cache(mode, 8), Encoder::with_cache(mode, 8)];
    let mut decoders = [Decoder::new(0), Decoder::new(1)];
    let mut references = true;
    while !u.is_empty() {
        let mut dirty = PageSet::empty(&layout);
        for _ in 0..u.int_in_range(1..=6)? {
            let region = u.int_in_range(0..=1_usize)?;
            let page = (region, u.int_in_range(0..=PAGES[region] - 1)?);
            let mut bytes = source.get(page);
            match u.int_in_range(0..=4)? {
                0 => bytes.fill(0),
                1 => bytes = contents(&mut u, PAGE)?,
                2 => {
                    let at = u.int_in_range(0..=PAGE - 1)?;
                    bytes[at] = u.arbitrary()?;
                }
                3 => {
                    // Another page's contents.
                    let other = (0, u.int_in_range(0..=PAGES[0] - 1)?);
                    bytes = source.get(other);
                }
                _ => {
                    // Hard to compress.
                    let mut state = u.arbitrary::<u64>()? | 1;
                    for byte in &mut bytes {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        *byte = state as u8;
                    }
                }
            }
            let offset = page.1 * PAGE as u64;
            drop(source.write(region, offset, &bytes));
            dirty.insert(region, page.1..page.1 + 1);
        }
        if references && u.ratio(1, 24)? {
            references = false;
            encoders.iter_mut().for_each(Encoder::forbid_references);
        }
        for block in dirty.blocks() {
            let stream = stream_of(block.region, block.index, STREAMS);
            let encoder = &mut encoders[stream];
            let mut room = encoder.room(&block);
            for run in block.runs() {
                let (pages, rest) = room.split_at_mut(run.len() * PAGE);
                let offset = (block.first_page() + run.start as u64) * PAGE as u64;
                drop(source.read(block.region.into(), offset, pages));
                room = rest;
            }
            let encoded = encoder.encode(block, &sent);
            let bytes = encoded.bytes.concat();
            let mut rest = &bytes[..];
            while let Some((header, behind)) = rest.split_first_chunk::<HEADER_BYTES>() {
                let frame = Frame::decode(header, &layout).expect("a frame of ours");
                let (payload, behind) = behind.split_at(frame.payload_bytes());
                let ram = &destination;
                let target = Memory {
                    ram,
                    layout: &layout,
                    digests: &received,
                    streams: STREAMS,
                    references,
                };
                decoders[stream]
                    .apply(&frame, payload, &target)
                    .expect("a frame of ours");
                rest = behind;
            }
            assert!(rest.is_empty());
        }
        if u.ratio(1, 4)? {
            encoders.iter_mut().for_each(Encoder::end_round);
        }
    }
    let written: Vec<Page> = source
        .pages
        .lock()
        .expect("one thread")
        .keys()
        .copied()
        .collect();
    for page in written {
        assert!(
            source.get(page) == destination.get(page),
            "page {page:?} differs"
        );
    }
    assert_eq!(sent.root(), received.root());
    Ok(())
}

fn deltas(data: &[u8]) {
    let Some((&kind, payload)) = data.split_first() else {
        return;
    };
    let old = vec![kind; PAGE];
    let (mut page, mut rest) = (old.clone(), payload);
    if delta::apply(&mut rest, &mut page).is_ok() {
        assert!(payload.len() - rest.len() >= 2);
        let mut again = Vec::new();
        assert!(delta::encode(&old, &page, 2 * PAGE, &mut again));
        let (mut copy, mut all) = (old, &again[..]);
        assert_eq!(delta::apply(&mut all, &mut copy), Ok(()));
        assert!(all.is_empty() && copy == page);
    }
}
