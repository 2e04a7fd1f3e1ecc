//! Headers of frames.

use palanquin_engine::frame::{Frame, HEADER_BYTES, PAYLOAD_MAX};
use palanquin_engine::pages::{BLOCK_PAGES, Block, PAGES_MAX, RamLayout};

use crate::entry::Target;

/// Headers, for a small VM, the largest, and one of many regions.
pub(crate) const FRAME: Target = Target::new("frame", run, seeds);

fn layouts() -> [RamLayout; 3] {
    [vec![600, 3], vec![PAGES_MAX], vec![1; 64]]
        .map(|pages| RamLayout::new(pages).expect("a layout"))
}

fn seeds() -> Vec<Vec<u8>> {
    let block = |index, mask| Block {
        region: 0,
        index,
        mask,
    };
    let all = block(0, [u64::MAX; 4]);
    let one = block(1, [1, 0, 0, 0]);
    let frames = [
        Frame::Pages(all),
        Frame::Zero(one),
        Frame::Compressed {
            codec: palanquin_engine::frame::Codec::Lz4,
            block: all,
            len: 9,
        },
        Frame::Compressed {
            codec: palanquin_engine::frame::Codec::Zstd,
            block: one,
            len: 4095,
        },
        Frame::Delta { block: one, len: 2 },
        Frame::Duplicate(one),
        Frame::Stale(all),
        Frame::RoundEnd {
            round: 1,
            last: true,
        },
        Frame::DeviceState {
            chunk: 0,
            early: true,
            len: PAYLOAD_MAX as u32,
        },
        // Behind the end of the region: by one page, by a block, by as much as the field holds.
        Frame::Pages(block(2, [0, 1 << 24, 0, 0])),
        Frame::Pages(block(3, [1, 0, 0, 0])),
        Frame::Pages(block(u32::MAX, [0, 0, 0, 1 << 63])),
        Frame::Pages(block(0, [0; 4])),
        Frame::Pages(Block {
            region: 1,
            index: 0,
            mask: [8, 0, 0, 0],
        }),
        Frame::Pages(Block {
            region: 64,
            index: 0,
            mask: [1, 0, 0, 0],
        }),
    ];
    let headers: Vec<_> = frames.iter().map(Frame::encode).collect();
    let mut seeds: Vec<_> = headers
        .iter()
        .map(|header| [&[0][..], header].concat())
        .collect();
    // Other lengths, reserved bits, an unknown kind and encoding.
    for (at, byte) in [(40, 1), (43, 0xff), (44, 1), (0, 9), (1, 9), (2, 1)] {
        let mut header = headers[0];
        header[at] = byte;
        seeds.push([&[1][..], &header].concat());
    }
    seeds
}

fn run(data: &[u8]) {
    let Some((which, header)) = data.split_first() else {
        return;
    };
    let Some(header) = header.first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let layout = &layouts()[usize::from(which % 3)];
    let Ok(frame) = Frame::decode(header, layout) else {
        return;
    };
    assert_eq!(&frame.encode(), header, "every bit of a header counts");
    assert!(frame.payload_bytes() <= PAYLOAD_MAX);
    let (Frame::Pages(block)
    | Frame::Zero(block)
    | Frame::Compressed { block, .. }
    | Frame::Delta { block, .. }
    | Frame::Duplicate(block)
    | Frame::Stale(block)) = frame
    else {
        return;
    };
    assert!((1..=BLOCK_PAGES as u32).contains(&block.len()));
    let pages = layout.pages(block.region.into());
    let mut named = 0;
    for run in block.runs() {
        assert!(run.start < run.end && block.first_page() + u64::from(run.end) <= pages);
        named += run.end - run.start;
    }
    assert_eq!(named as usize, block.len() as usize);
}
