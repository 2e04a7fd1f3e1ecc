//! From frames to guest memory, as a stream receives them. All of a frame is hostile.

use palanquin_engine::frame::{Codec, Frame, PAYLOAD_MAX, REFERENCE_BYTES};
use palanquin_engine::pages::{BLOCK_PAGES, Block, PAGE_BYTES, RamLayout};
use palanquin_host::vm::GuestRam;

use super::delta::{self, DeltaError};
use super::{PAGE, stream_of};
use crate::digest::Digests;

/// Why a frame was refused.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not what a compressor makes, or more than the pages of the frame.
    #[error("the compressed pages of block {0} are damaged or too large")]
    Compressed(u32),
    /// Less than the pages of the frame.
    #[error("the compressed pages of block {block} became {bytes} bytes instead of {expected}")]
    Size {
        /// Block.
        block: u32,
        /// What came out.
        bytes: usize,
        /// What the frame's pages have.
        expected: usize,
    },
    /// A delta breaks a rule.
    #[error("the delta of page {page} in region {region} is damaged: {error}")]
    Delta {
        /// Region.
        region: u16,
        /// Page.
        page: u64,
        /// The rule.
        error: DeltaError,
    },
    /// A delta against, or a reference to, a page that was not sent or is zero.
    #[error("page {page} in region {region} is referred to and was never sent")]
    NeverSent {
        /// Region.
        region: u16,
        /// Page.
        page: u64,
    },
    /// A reference to a page that the VM does not have.
    #[error("page {page} in region {region} is referred to and does not exist")]
    NoSuchPage {
        /// Region.
        region: u16,
        /// Page.
        page: u64,
    },
    /// A delta against, or a reference to, a page of another stream: their order is not known.
    #[error("page {page} in region {region} is referred to by another stream than its own")]
    OtherStream {
        /// Region.
        region: u16,
        /// Page.
        page: u64,
    },
    /// A reference to a page of the same frame.
    #[error("page {page} in region {region} is referred to by the frame that replaces it")]
    SameFrame {
        /// Region.
        region: u16,
        /// Page.
        page: u64,
    },
    /// The VM runs here, so that its memory is not what was sent any more.
    #[error("a delta or duplicate came after the VM began to run here")]
    NotAnyMore,
    /// A frame or payload that does not belong here; the caller has checked headers and lengths.
    #[error("a frame of pages has the wrong kind or length")]
    Payload,
    /// Guest memory.
    #[error("guest memory cannot be read or written: {0}")]
    Memory(#[from] palanquin_host::Error),
}

/// What a decoder works on.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    /// Guest memory.
    pub ram: &'a dyn GuestRam,
    /// Its layout.
    pub layout: &'a RamLayout,
    /// Digests of what arrived.
    pub digests: &'a Digests,
    /// Number of streams of the migration.
    pub streams: usize,
    /// Whether deltas and duplicates are still allowed.
    pub references: bool,
}

/// The decoder of one stream: a block's pages of memory, and no more whatever arrives.
pub struct Decoder {
    index: usize,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    pages: Vec<u8>,
}

impl Decoder {
    /// For the stream of this index.
    pub fn new(index: usize) -> Self {
        Self {
            index,
            zstd: None,
            pages: Vec::new(),
        }
    }

    /// Writes a frame's pages to guest memory; gives their bytes, 0 for zeros. The header has passed
    /// [`Frame::decode`], and `payload` is as long as it says.
    ///
    /// # Errors
    ///
    /// A rule is broken: the stream must be closed. Guest memory may hold a part of the frame.
    pub fn apply(
        &mut self,
        frame: &Frame,
        payload: &[u8],
        target: &Target<'_>,
    ) -> Result<u64, DecodeError> {
        if payload.len() != frame.payload_bytes() || payload.len() > PAYLOAD_MAX {
            return Err(DecodeError::Payload);
        }
        match *frame {
            Frame::Pages(block) => store(&block, payload, target),
            Frame::Zero(block) => zero(&block, target),
            Frame::Compressed { codec, block, .. } => {
                self.make_room();
                let len = block.len() as usize * PAGE;
                let pages = self.pages.get_mut(..len).ok_or(DecodeError::Payload)?;
                let bytes = decompress(&mut self.zstd, codec, payload, pages)
                    .ok_or(DecodeError::Compressed(block.index))?;
                if bytes != len {
                    return Err(DecodeError::Size {
                        block: block.index,
                        bytes,
                        expected: len,
                    });
                }
                store(&block, pages, target)
            }
            Frame::Delta { block, .. } => self.delta(&block, payload, target),
            Frame::Duplicate(block) => self.duplicate(&block, payload, target),
            Frame::Stale(_)
            | Frame::Drained { .. }
            | Frame::RoundEnd { .. }
            | Frame::DeviceState { .. } => Err(DecodeError::Payload),
        }
    }

    fn make_room(&mut self) {
        if self.pages.is_empty() {
            self.pages = vec![0; PAYLOAD_MAX];
        }
    }

    fn delta(
        &mut self,
        block: &Block,
        mut payload: &[u8],
        target: &Target<'_>,
    ) -> Result<u64, DecodeError> {
        if !target.references {
            return Err(DecodeError::NotAnyMore);
        }
        self.make_room();
        let region = block.region;
        let mut last = block.first_page();
        let mut from = 0;
        for run in block.runs() {
            let first = block.first_page() + u64::from(run.start);
            let end = block.first_page() + u64::from(run.end);
            for page in first..end {
                check(self.index, region, page, target)?;
            }
            let len = run.len() * PAGE;
            let pages = &mut self.pages[from..from + len];
            target
                .ram
                .read(usize::from(region), first * PAGE_BYTES, pages)?;
            for (page, contents) in (first..).zip(pages.chunks_exact_mut(PAGE)) {
                last = page;
                delta::apply(&mut payload, contents).map_err(|error| DecodeError::Delta {
                    region,
                    page,
                    error,
                })?;
            }
            from += len;
        }
        if !payload.is_empty() {
            return Err(DecodeError::Delta {
                region,
                page: last,
                error: DeltaError::Trailing,
            });
        }
        store(block, &self.pages[..from], target)
    }

    fn duplicate(
        &mut self,
        block: &Block,
        payload: &[u8],
        target: &Target<'_>,
    ) -> Result<u64, DecodeError> {
        if !target.references {
            return Err(DecodeError::NotAnyMore);
        }
        self.make_room();
        let mut filled = 0;
        for (reference, contents) in payload
            .chunks_exact(REFERENCE_BYTES)
            .zip(self.pages.chunks_exact_mut(PAGE))
        {
            let Some((region, page)) = reference.split_first_chunk() else {
                return Err(DecodeError::Payload);
            };
            let region = u16::from_le_bytes(*region);
            let page = page
                .first_chunk()
                .map_or(u64::MAX, |page| u64::from_le_bytes(*page));
            check(self.index, region, page, target)?;
            if block.names(region, page) {
                return Err(DecodeError::SameFrame { region, page });
            }
            target
                .ram
                .read(usize::from(region), page * PAGE_BYTES, contents)?;
            filled += PAGE;
        }
        store(block, &self.pages[..filled], target)
    }
}

/// Whether a stream may take the page's present contents for what was sent last.
fn check(index: usize, region: u16, page: u64, target: &Target<'_>) -> Result<(), DecodeError> {
    let none = DecodeError::NoSuchPage { region, page };
    if page >= target.layout.pages(usize::from(region)) {
        return Err(none);
    }
    let block = u32::try_from(page / BLOCK_PAGES).map_err(|_| none)?;
    if stream_of(region, block, target.streams) != index {
        return Err(DecodeError::OtherStream { region, page });
    }
    if !target.digests.is_known(region, page) {
        return Err(DecodeError::NeverSent { region, page });
    }
    Ok(())
}

/// Decompresses to the start of `pages`, which bounds it; how many bytes that were, or nothing if they do not fit or
/// make no sense.
fn decompress(
    zstd: &mut Option<zstd::bulk::Decompressor<'static>>,
    codec: Codec,
    payload: &[u8],
    pages: &mut [u8],
) -> Option<usize> {
    match codec {
        Codec::Lz4 => lz4_flex::block::decompress_into(payload, pages).ok(),
        Codec::Zstd => {
            if zstd.is_none() {
                *zstd = zstd::bulk::Decompressor::new().ok();
            }
            zstd.as_mut()?.decompress_to_buffer(payload, pages).ok()
        }
    }
}

/// Writes the pages of a block, given one after the other.
fn store(block: &Block, pages: &[u8], target: &Target<'_>) -> Result<u64, DecodeError> {
    let mut from = 0;
    for run in block.runs() {
        let first = block.first_page() + u64::from(run.start);
        let len = run.len() * PAGE;
        let bytes = pages.get(from..from + len).ok_or(DecodeError::Payload)?;
        target
            .ram
            .write(usize::from(block.region), first * PAGE_BYTES, bytes)?;
        for (page, contents) in (first..).zip(bytes.chunks_exact(PAGE)) {
            // A page of zeros in this encoding would count as another memory on the other side.
            target.digests.set(block.region, page, contents);
        }
        from += len;
    }
    Ok(from as u64)
}

fn zero(block: &Block, target: &Target<'_>) -> Result<u64, DecodeError> {
    for run in block.runs() {
        let pages =
            block.first_page() + u64::from(run.start)..block.first_page() + u64::from(run.end);
        let mut held_data = false;
        for page in pages.clone() {
            held_data |= target.digests.set_zero(block.region, page);
        }
        // Memory that never held anything is a hole already.
        if held_data {
            let bytes = pages.start * PAGE_BYTES..pages.end * PAGE_BYTES;
            target.ram.discard(usize::from(block.region), bytes)?;
        }
    }
    Ok(0)
}
