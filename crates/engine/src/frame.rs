//! Frames of the data streams.
//!
//! A stream is a sequence of frames, each a header of 48 bytes and a payload of known length:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | kind: 1 pages, 2 end of round, 3 device state, 4 stale pages, 5 drained |
//! | 1 | encoding of pages, see below; for an end of round: 1 if it is the last; for drained: 1 if the VM runs before all pages are there; for device state: 1 if it is early |
//! | 2..4 | region (little endian, as all that follows) |
//! | 4..8 | block within the region; round; chunk of the device state |
//! | 8..40 | mask of pages, bit 0 of byte 8 is the block's first page |
//! | 40..44 | length of the payload |
//! | 44..48 | reserved, 0 |
//!
//! Every field is checked against the VM's layout before a byte of payload is read. What the payload of pages holds,
//! `n` being the number of pages in the mask:
//!
//! | encoding | payload | its length |
//! |---|---|---|
//! | 0 raw | the pages, one after the other | `n` * 4096 |
//! | 1 zero | nothing: all their bytes are zero | 0 |
//! | 2 lz4 | one LZ4 block (lz4_Block_format.md of the LZ4 project) of the raw payload | 1 to `n` * 4096 - 1 |
//! | 3 zstd | one Zstandard frame (RFC 8878) of the raw payload | 1 to `n` * 4096 - 1 |
//! | 4 delta | for each page what differs from the version sent before it, see below | 2 `n` to `n` * 4096 - 1 |
//! | 5 duplicate | for each page the region (2 bytes) and number (8 bytes) of a page that it equals | `n` * 10 |
//!
//! Drained means: the VM is paused, and this stream has sent all of its pages that were written until then. When all streams
//! have, the device state may be loaded while it still arrives. Its pieces are on the first stream, anywhere before the
//! end of the last round. What saving it wrote follows behind drained: as QEMU orders it, the state of devices comes behind
//! the memory that they look at, and what is written later is complete before the VM runs.
//!
//! Device state that is early was saved before the pause and is loaded at once: it does not look at guest memory. None of it
//! comes behind a piece that is not early.
//!
//! Stale pages have no payload: they come anew once the VM runs at the destination, which forgets what it has of them.
//! A stream that has sent the end of the last round twice has sent all of those, too.
//!
//! How many bytes a payload becomes is known from the mask alone. A delta needs that its page was sent before over
//! the same stream, as something else than zeros. So does a duplicate of the page it refers to, which must not be in the
//! mask itself and is taken as it is when the frame arrives. Neither may be used once the VM runs at the destination.
//!
//! A delta (after XBZRLE: Svärd, Hudzia, Tordsson, Elmroth, "Evaluation of delta compression techniques for efficient
//! live migration of large virtual machines", VEE 2011) is a sequence of: how many bytes stay as they are, how many
//! follow, and these; both counts as LEB128 of at most 2 bytes. A page is complete after 4096 bytes; the second count is
//! left out where the first completes it.

use crate::pages::{Block, PAGE_BYTES, RamLayout};

/// Length of a frame's header.
pub const HEADER_BYTES: usize = 48;
/// Longest payload: a whole block.
pub const PAYLOAD_MAX: usize = 1 << 20;

/// Length of a reference in the payload of [`Frame::Duplicate`].
pub const REFERENCE_BYTES: usize = 10;
/// Length of the shortest delta of a page.
pub const DELTA_MIN: usize = 2;

const KIND_PAGES: u8 = 1;
const KIND_ROUND_END: u8 = 2;
const KIND_DEVICE_STATE: u8 = 3;
const KIND_STALE: u8 = 4;
const KIND_DRAINED: u8 = 5;

/// A frame, without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The block's pages follow, in order.
    Pages(Block),
    /// The block's pages are all zeros; nothing follows.
    Zero(Block),
    /// The block's pages follow, compressed together.
    Compressed {
        /// How.
        codec: Codec,
        /// The pages.
        block: Block,
        /// Bytes of payload: at least 1, less than the pages have.
        len: u32,
    },
    /// What follows says how the pages differ from the versions sent before.
    Delta {
        /// The pages.
        block: Block,
        /// Bytes of payload: at least [`DELTA_MIN`] for each page, less than the pages have.
        len: u32,
    },
    /// For each page a reference to an equal one follows.
    Duplicate(Block),
    /// The block's pages come anew after the device state; nothing follows.
    Stale(Block),
    /// The VM is paused, and this stream has sent its pages that were written until then.
    Drained {
        /// Whether the VM is to run before all of its pages are there.
        post_copy: bool,
    },
    /// This stream has sent all its pages of the round.
    RoundEnd {
        /// The round, the first is 1.
        round: u32,
        /// Whether no round follows.
        last: bool,
    },
    /// A piece of the device state follows.
    DeviceState {
        /// Counts the pieces from 0.
        chunk: u32,
        /// Whether it was saved before the pause.
        early: bool,
        /// Bytes of this piece, 1 to [`PAYLOAD_MAX`].
        len: u32,
    },
}

/// How pages are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// LZ4, block format.
    Lz4,
    /// Zstandard.
    Zstd,
}

/// A header that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A kind this version does not know.
    #[error("unknown kind of frame {0}")]
    Kind(u8),
    /// An encoding this version does not know, or not for this kind.
    #[error("unknown encoding {0}")]
    Encoding(u8),
    /// Fields that must be zero are not.
    #[error("reserved bits are set")]
    Reserved,
    /// The region does not exist.
    #[error("region {0} does not exist")]
    Region(u16),
    /// The mask names pages behind the end of the region, or none.
    #[error("mask of block {0} names no page or one outside the region")]
    Mask(u32),
    /// The payload's length is not what the other fields say.
    #[error("payload of {0} bytes does not fit the frame")]
    Length(u32),
    /// Rounds count from 1.
    #[error("round 0")]
    Round,
}

impl Frame {
    /// Bytes of payload behind the header.
    pub fn payload_bytes(&self) -> usize {
        match self {
            Self::Pages(block) => block.len() as usize * PAGE_BYTES as usize,
            Self::Zero(_) | Self::Stale(_) | Self::Drained { .. } | Self::RoundEnd { .. } => 0,
            Self::Duplicate(block) => block.len() as usize * REFERENCE_BYTES,
            Self::Compressed { len, .. }
            | Self::Delta { len, .. }
            | Self::DeviceState { len, .. } => *len as usize,
        }
    }

    /// The pages that are in guest memory once the frame has been applied.
    pub fn pages(&self) -> Option<&Block> {
        match self {
            Self::Pages(block)
            | Self::Zero(block)
            | Self::Compressed { block, .. }
            | Self::Delta { block, .. }
            | Self::Duplicate(block) => Some(block),
            Self::Stale(_)
            | Self::Drained { .. }
            | Self::RoundEnd { .. }
            | Self::DeviceState { .. } => None,
        }
    }

    /// The header as it goes onto the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let (kind, encoding, region, index, mask) = match *self {
            Self::Pages(block) => (KIND_PAGES, 0, block.region, block.index, block.mask),
            Self::Zero(block) => (KIND_PAGES, 1, block.region, block.index, block.mask),
            Self::Compressed { codec, block, .. } => {
                let encoding = match codec {
                    Codec::Lz4 => 2,
                    Codec::Zstd => 3,
                };
                (KIND_PAGES, encoding, block.region, block.index, block.mask)
            }
            Self::Delta { block, .. } => (KIND_PAGES, 4, block.region, block.index, block.mask),
            Self::Duplicate(block) => (KIND_PAGES, 5, block.region, block.index, block.mask),
            Self::Stale(block) => (KIND_STALE, 0, block.region, block.index, block.mask),
            Self::Drained { post_copy } => (KIND_DRAINED, u8::from(post_copy), 0, 0, [0; 4]),
            Self::RoundEnd { round, last } => (KIND_ROUND_END, u8::from(last), 0, round, [0; 4]),
            Self::DeviceState { chunk, early, .. } => {
                (KIND_DEVICE_STATE, u8::from(early), 0, chunk, [0; 4])
            }
        };
        header[0] = kind;
        header[1] = encoding;
        header[2..4].copy_from_slice(&region.to_le_bytes());
        header[4..8].copy_from_slice(&index.to_le_bytes());
        for (bytes, word) in header[8..40].chunks_exact_mut(8).zip(mask) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let len = u32::try_from(self.payload_bytes()).unwrap_or(u32::MAX);
        header[40..44].copy_from_slice(&len.to_le_bytes());
        header
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    ///
    /// The field that breaks a rule; the stream must be closed.
    pub fn decode(header: &[u8; HEADER_BYTES], layout: &RamLayout) -> Result<Self, FrameError> {
        let [kind, encoding, r0, r1, i0, i1, i2, i3, rest @ ..] = *header;
        let region = u16::from_le_bytes([r0, r1]);
        let index = u32::from_le_bytes([i0, i1, i2, i3]);
        let mut mask = [0_u64; 4];
        for (word, bytes) in mask.iter_mut().zip(rest.chunks_exact(8)) {
            *word = bytes
                .iter()
                .rev()
                .fold(0, |word, &byte| word << 8 | u64::from(byte));
        }
        let [l0, l1, l2, l3, reserved @ ..] = [
            rest[32], rest[33], rest[34], rest[35], rest[36], rest[37], rest[38], rest[39],
        ];
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        if reserved != [0; 4] {
            return Err(FrameError::Reserved);
        }
        let frame = match kind {
            KIND_PAGES => {
                let block = check_block(
                    Block {
                        region,
                        index,
                        mask,
                    },
                    layout,
                )?;
                match encoding {
                    0 => Self::Pages(block),
                    1 => Self::Zero(block),
                    2 | 3 => Self::Compressed {
                        codec: if encoding == 2 {
                            Codec::Lz4
                        } else {
                            Codec::Zstd
                        },
                        len: check_shorter(len, &block, 1)?,
                        block,
                    },
                    4 => Self::Delta {
                        len: check_shorter(len, &block, DELTA_MIN * block.len() as usize)?,
                        block,
                    },
                    5 => Self::Duplicate(block),
                    other => return Err(FrameError::Encoding(other)),
                }
            }
            KIND_STALE if encoding != 0 => return Err(FrameError::Encoding(encoding)),
            KIND_STALE => Self::Stale(check_block(
                Block {
                    region,
                    index,
                    mask,
                },
                layout,
            )?),
            KIND_ROUND_END | KIND_DEVICE_STATE | KIND_DRAINED if region != 0 || mask != [0; 4] => {
                return Err(FrameError::Reserved);
            }
            KIND_ROUND_END if index == 0 => return Err(FrameError::Round),
            KIND_ROUND_END => match encoding {
                0 | 1 => Self::RoundEnd {
                    round: index,
                    last: encoding == 1,
                },
                other => return Err(FrameError::Encoding(other)),
            },
            KIND_DRAINED if index != 0 => return Err(FrameError::Reserved),
            KIND_DRAINED => match encoding {
                0 | 1 => Self::Drained {
                    post_copy: encoding == 1,
                },
                other => return Err(FrameError::Encoding(other)),
            },
            KIND_DEVICE_STATE if encoding > 1 => return Err(FrameError::Encoding(encoding)),
            KIND_DEVICE_STATE if len == 0 || len as usize > PAYLOAD_MAX => {
                return Err(FrameError::Length(len));
            }
            KIND_DEVICE_STATE => Self::DeviceState {
                chunk: index,
                early: encoding == 1,
                len,
            },
            other => return Err(FrameError::Kind(other)),
        };
        if len as usize != frame.payload_bytes() {
            return Err(FrameError::Length(len));
        }
        Ok(frame)
    }
}

/// A payload that is longer than the pages themselves is of no use to anybody.
fn check_shorter(len: u32, block: &Block, least: usize) -> Result<u32, FrameError> {
    let raw = block.len() as usize * PAGE_BYTES as usize;
    if (least..raw).contains(&(len as usize)) {
        Ok(len)
    } else {
        Err(FrameError::Length(len))
    }
}

fn check_block(block: Block, layout: &RamLayout) -> Result<Block, FrameError> {
    let pages = layout.pages(usize::from(block.region));
    if pages == 0 {
        return Err(FrameError::Region(block.region));
    }
    let highest = block
        .mask
        .iter()
        .enumerate()
        .rev()
        .find(|(_, word)| **word != 0)
        .map(|(index, word)| index as u64 * 64 + u64::from(63 - word.leading_zeros()));
    match highest {
        Some(highest) if block.first_page() + highest < pages => Ok(block),
        _ => Err(FrameError::Mask(block.index)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout() -> RamLayout {
        RamLayout::new(vec![1000, 3]).unwrap()
    }

    #[test]
    fn pages_behind_the_end_of_the_region_are_refused() {
        let block = Block {
            region: 1,
            index: 0,
            mask: [0b1000, 0, 0, 0],
        };
        let header = Frame::Pages(block).encode();
        assert_eq!(Frame::decode(&header, &layout()), Err(FrameError::Mask(0)));
        let block = Block {
            region: 0,
            index: u32::MAX,
            mask: [1, 0, 0, 0],
        };
        let header = Frame::Zero(block).encode();
        assert_eq!(
            Frame::decode(&header, &layout()),
            Err(FrameError::Mask(u32::MAX))
        );
    }

    #[test]
    fn a_zero_frame_with_payload_is_refused() {
        let mut header = Frame::Zero(Block {
            region: 0,
            index: 0,
            mask: [1, 0, 0, 0],
        })
        .encode();
        header[41] = 16;
        assert_eq!(
            Frame::decode(&header, &layout()),
            Err(FrameError::Length(4096))
        );
    }

    #[test]
    fn a_reduced_payload_is_bounded_by_its_pages() {
        let block = Block {
            region: 0,
            index: 1,
            mask: [0b111, 0, 0, 0],
        };
        let decoded = |frame: Frame| Frame::decode(&frame.encode(), &layout());
        for codec in [Codec::Lz4, Codec::Zstd] {
            let frame = |len| Frame::Compressed { codec, block, len };
            for len in [1, 3 * 4096 - 1] {
                assert_eq!(decoded(frame(len)), Ok(frame(len)));
            }
            for len in [0, 3 * 4096, u32::MAX] {
                assert_eq!(decoded(frame(len)), Err(FrameError::Length(len)));
            }
        }
        let frame = |len| Frame::Delta { block, len };
        for len in [6, 3 * 4096 - 1] {
            assert_eq!(decoded(frame(len)), Ok(frame(len)));
        }
        for len in [0, 5, 3 * 4096] {
            assert_eq!(decoded(frame(len)), Err(FrameError::Length(len)));
        }
        let mut header = Frame::Duplicate(block).encode();
        assert_eq!(
            Frame::decode(&header, &layout()),
            Ok(Frame::Duplicate(block))
        );
        header[40] += 1;
        assert_eq!(
            Frame::decode(&header, &layout()),
            Err(FrameError::Length(31))
        );
    }

    proptest! {
        #[test]
        fn any_header_is_refused_or_encodes_to_itself(
            mut bytes in prop::array::uniform32(any::<u8>()),
            kind in 0u8..7,
            encoding in 0u8..8,
            small in any::<bool>(),
            len in 0u32..3 * 4096,
        ) {
            let mut header = [0; HEADER_BYTES];
            if small {
                bytes[2..].fill(0);
            }
            header[8..40].copy_from_slice(&bytes);
            header[0] = kind;
            header[1] = encoding;
            header[4] = bytes[0] & 3;
            let pages: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
            let len = match (kind, encoding) {
                (KIND_PAGES, 0) => pages * 4096,
                (KIND_PAGES, 5) => pages * 10,
                (KIND_PAGES, 2..=4) | (KIND_DEVICE_STATE, _) => len,
                _ => 0,
            };
            header[40..44].copy_from_slice(&len.to_le_bytes());
            if let Ok(frame) = Frame::decode(&header, &layout()) {
                prop_assert_eq!(frame.encode(), header);
                prop_assert!(frame.payload_bytes() <= PAYLOAD_MAX);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), HEADER_BYTES)) {
            let header: [u8; HEADER_BYTES] = bytes.try_into().unwrap();
            let _ = Frame::decode(&header, &layout());
        }
    }
}
