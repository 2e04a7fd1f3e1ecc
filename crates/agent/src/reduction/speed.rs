//! How fast the encoders are here: `cargo test --release -p palanquin-agent speed -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use palanquin_api::control::Compress;
use palanquin_engine::frame::{Frame, HEADER_BYTES};
use palanquin_engine::pages::{Block, RamLayout};

use super::decode::{Decoder, Target};
use super::encode::Encoder;
use super::tests::{Ram, noise};
use super::{PAGE, delta};
use crate::digest::Digests;

const BLOCKS: u32 = 64;
const BLOCK: usize = 256 * PAGE;

struct Run {
    encode: Duration,
    decode: Duration,
    wire: u64,
}

/// Sends the same memory `times` times, changed by `change` before each; measures the last time.
fn run(mode: Compress, memory: &mut [u8], times: u64, change: impl Fn(u64, &mut [u8])) -> Run {
    let layout = RamLayout::new(vec![u64::from(BLOCKS) * 256]).unwrap();
    let (sent, received) = (Digests::new(&layout, 7), Digests::new(&layout, 7));
    let ram = Ram::new(&layout);
    let target = Target {
        ram: &ram,
        layout: &layout,
        digests: &received,
        streams: 1,
        references: true,
    };
    let mut encoder = Encoder::with_cache(mode, 256 * BLOCKS as usize);
    let mut decoder = Decoder::new(0);
    let mut run = Run {
        encode: Duration::ZERO,
        decode: Duration::ZERO,
        wire: 0,
    };
    for time in 0..times {
        (run.encode, run.decode, run.wire) = (Duration::ZERO, Duration::ZERO, 0);
        change(time, memory);
        for (index, bytes) in (0..).zip(memory.chunks_exact(BLOCK)) {
            let block = Block {
                region: 0,
                index,
                mask: [u64::MAX; 4],
            };
            encoder.room(&block).copy_from_slice(bytes);
            let began = Instant::now();
            let encoded = encoder.encode(block, &sent);
            run.encode += began.elapsed();
            run.wire += encoded.sent.wire;
            let began = Instant::now();
            for mut frames in encoded.bytes {
                while let Some((header, rest)) = frames.split_first_chunk::<HEADER_BYTES>() {
                    let frame = Frame::decode(header, &layout).unwrap();
                    let (payload, rest) = rest.split_at(frame.payload_bytes());
                    decoder.apply(&frame, payload, &target).unwrap();
                    frames = rest;
                }
            }
            run.decode += began.elapsed();
        }
        encoder.end_round();
    }
    assert!(sent.root() == received.root());
    run
}

#[test]
#[ignore = "a measurement"]
fn speed_of_every_encoder() {
    let len = BLOCKS as usize * BLOCK;
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let like_guest: Vec<u8> = program.into_iter().cycle().take(len).collect();
    println!("memory       mode   encode GB/s  decode GB/s  wire/memory");
    let show = |name: &str, mode: Compress, run: &Run| {
        let rate = |took: Duration| len as f64 / 1e9 / took.as_secs_f64();
        let (encode, decode) = (rate(run.encode), rate(run.decode));
        let ratio = run.wire as f64 / len as f64;
        let mode = format!("{mode:?}");
        println!("{name:12} {mode:6} {encode:11.2} {decode:12.2} {ratio:12.4}");
    };
    let modes = [Compress::Off, Compress::Auto, Compress::Lz4, Compress::Zstd];
    for (name, memory) in [
        ("zero", vec![0; len]),
        ("noise", noise(1, len)),
        ("program", like_guest),
    ] {
        for mode in modes {
            let run = run(mode, &mut memory.clone(), 1, |_, _| ());
            show(name, mode, &run);
        }
    }
    for mode in [Compress::Off, Compress::Auto, Compress::Zstd] {
        let run = run(mode, &mut noise(1, len), 3, |time, memory| {
            for page in memory.chunks_exact_mut(PAGE) {
                page[100] = time as u8;
            }
        });
        show("counter", mode, &run);
    }
    for mode in [Compress::Off, Compress::Auto, Compress::Zstd] {
        let run = run(mode, &mut vec![0; len], 3, |time, memory| {
            let fresh = noise(time + 1, len);
            memory.copy_from_slice(&fresh);
        });
        show("rewritten", mode, &run);
    }
    for mode in [Compress::Off, Compress::Auto] {
        let run = run(mode, &mut vec![0; len], 1, |_, memory| {
            let one = noise(5, PAGE);
            for page in memory.chunks_exact_mut(PAGE) {
                page.copy_from_slice(&one);
            }
        });
        show("duplicates", mode, &run);
    }
    let (old, mut new) = (noise(1, PAGE), noise(1, PAGE));
    new[2000] ^= 1;
    let mut out = Vec::new();
    let began = Instant::now();
    for _ in 0..100_000 {
        out.clear();
        assert!(delta::encode(&old, &new, 2048, &mut out));
    }
    let rate = 1e5 * PAGE as f64 / 1e9 / began.elapsed().as_secs_f64();
    println!("delta of a page alone: {rate:.2} GB/s");
}
