//! Which encoding pays: the one with which the slower of CPU and link takes the least time for a byte of guest memory.
//!
//! A stream is a pipeline of one thread and a link. With an encoder that needs `e` seconds and leaves `r` bytes for
//! each byte of memory, it moves a byte in `max(p + e + s r, r / l)` seconds, where `p` is what reading and digesting
//! cost, `s` what encrypting and sending cost for each byte on the wire, and `l` the rate of the link. `p`, `s` and, for
//! the encoder in use, `e` and `r` are measured all the time; the other encoders are tried on samples. The link's rate
//! can be measured only while the thread waits for it. While it does not, the last rate is trusted less and less, until
//! it pays to look again.
//!
//! Nothing here reads a clock.

use std::time::Duration;

use palanquin_api::control::Compress;
use palanquin_engine::frame::Codec;

/// Input after which is decided, unless [`WINDOW_TIME`] is over before.
const WINDOW_BYTES: u64 = 8 << 20;
/// Time after which is decided.
const WINDOW_TIME: Duration = Duration::from_millis(100);
/// Share of a window that must be spent waiting for the link to be called its bottleneck.
const LINK_BOUND: f64 = 0.125;
/// What a second of CPU weighs against a second of the migration: of encoders that take equally long, the cheaper one
/// is chosen, but not one that is hardly cheaper, so that memory may be mixed.
const CPU_WEIGHT: f64 = 0.1;
/// Advantage of the encoder in use.
const STAY: f64 = 0.95;
/// Share of a window spent waiting from which on CPU time counts as free.
const FREE: f64 = 0.5;
/// Share of the time that may be spent on samples.
const SAMPLING: f64 = 0.01;
/// How a rate that is not measured any more is believed to grow in each window: at first, and at least.
const GROWTH_FIRST: f64 = 1.1;
const GROWTH_LEAST: f64 = 1.02;
/// Windows within which going back tells that the rate had not grown.
const EXCURSION: u32 = 4;

/// What an encoder is known to do.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Seconds for each byte of input.
    seconds: f64,
    /// Bytes of output for each byte of input.
    ratio: f64,
}

/// A block that was sent, and how long the parts of that took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// How its pages were compressed, if they were.
    pub codec: Option<Codec>,
    /// Bytes of pages that could have been compressed.
    pub input: u64,
    /// What they became.
    pub output: u64,
    /// All bytes of the block given to the connection.
    pub wire: u64,
    /// Reading, digesting, looking for references.
    pub prepare: Duration,
    /// Compressing.
    pub encode: Duration,
    /// Encrypting and sending, without waiting.
    pub send: Duration,
    /// Waiting for the link, or for the rate that was asked for.
    pub blocked: Duration,
}

/// Decides for one stream.
#[derive(Debug)]
pub struct Chooser {
    mode: Compress,
    current: Option<Codec>,
    known: [Option<Known>; 2],
    prepare: Option<f64>,
    send: Option<f64>,
    link: Option<f64>,
    /// Whether the last window measured it.
    measured: bool,
    growth: f64,
    free_cpu: bool,
    window: Sent,
    windows_since_step_up: u32,
    /// Seconds so far: in all, and on samples.
    elapsed: f64,
    sampling: f64,
}

fn smooth(old: Option<f64>, new: f64, weight: f64) -> Option<f64> {
    Some(old.map_or(new, |old| old + (new - old) * weight))
}

fn index(codec: Codec) -> usize {
    match codec {
        Codec::Lz4 => 0,
        Codec::Zstd => 1,
    }
}

impl Chooser {
    /// Nothing measured yet: the automatic choice begins without compression.
    pub fn new(mode: Compress) -> Self {
        let current = match mode {
            Compress::Lz4 => Some(Codec::Lz4),
            Compress::Zstd => Some(Codec::Zstd),
            _ => None,
        };
        Self {
            mode,
            current,
            known: [None; 2],
            prepare: None,
            send: None,
            link: None,
            measured: false,
            growth: GROWTH_FIRST,
            free_cpu: false,
            window: Sent::default(),
            windows_since_step_up: u32::MAX,
            elapsed: 0.0,
            sampling: 0.0,
        }
    }

    /// Whether there is anything to decide.
    pub fn is_adaptive(&self) -> bool {
        self.mode == Compress::Auto
    }

    /// How the next block is to be compressed.
    pub fn codec(&self) -> Option<Codec> {
        self.current
    }

    /// Whether this thread has mostly waited of late.
    pub fn has_free_cpu(&self) -> bool {
        self.free_cpu
    }

    /// The encoders that a sample of the next block is to be tried on; none for most blocks.
    pub fn samples(&self) -> &'static [Codec] {
        if !self.is_adaptive() || self.sampling > self.elapsed * SAMPLING {
            return &[];
        }
        match self.current {
            None => &[Codec::Lz4, Codec::Zstd],
            Some(Codec::Lz4) => &[Codec::Zstd],
            Some(Codec::Zstd) => &[Codec::Lz4],
        }
    }

    /// What became of a sample.
    pub fn sampled(&mut self, codec: Codec, input: u64, output: u64, took: Duration) {
        // What was not spent for long is not made up for at once.
        let least = self.elapsed * SAMPLING - WINDOW_TIME.as_secs_f64() * SAMPLING;
        self.sampling = self.sampling.max(least) + took.as_secs_f64();
        self.learn(codec, input, output, took, 0.5);
    }

    fn learn(&mut self, codec: Codec, input: u64, output: u64, took: Duration, weight: f64) {
        if input == 0 {
            return;
        }
        let seconds = took.as_secs_f64() / input as f64;
        let ratio = output as f64 / input as f64;
        let known = &mut self.known[index(codec)];
        *known = Some(known.map_or(Known { seconds, ratio }, |old| Known {
            seconds: old.seconds + (seconds - old.seconds) * weight,
            ratio: old.ratio + (ratio - old.ratio) * weight,
        }));
    }

    /// A block was sent.
    pub fn record(&mut self, sent: &Sent) {
        if !self.is_adaptive() {
            return;
        }
        if let Some(codec) = sent.codec {
            self.learn(codec, sent.input, sent.output, sent.encode, 0.25);
        }
        let window = &mut self.window;
        window.input += sent.input;
        window.wire += sent.wire;
        window.prepare += sent.prepare;
        window.encode += sent.encode;
        window.send += sent.send;
        window.blocked += sent.blocked;
        let wall = window.prepare + window.encode + window.send + window.blocked;
        if window.input >= WINDOW_BYTES || wall >= WINDOW_TIME {
            let window = std::mem::take(window);
            self.end_window(&window, wall.as_secs_f64());
        }
    }

    fn end_window(&mut self, window: &Sent, wall: f64) {
        if wall <= 0.0 || window.wire == 0 {
            return;
        }
        self.elapsed += wall;
        let blocked = window.blocked.as_secs_f64() / wall;
        self.free_cpu = blocked > FREE;
        let rate = window.wire as f64 / wall;
        let measured = blocked > LINK_BOUND;
        self.link = match self.link {
            // After a while without one, a measurement says more than what was believed.
            _ if measured && !self.measured => Some(rate),
            old if measured => smooth(old, rate, 0.5),
            old => old.map(|old| (old * self.growth).max(rate)),
        };
        self.measured = measured;
        let send = window.send.as_secs_f64() / window.wire as f64;
        self.send = smooth(self.send, send, 0.5);
        if window.input > 0 {
            let prepare = window.prepare.as_secs_f64() / window.input as f64;
            self.prepare = smooth(self.prepare, prepare, 0.5);
            self.choose();
        }
    }

    /// Seconds for a byte of memory: of CPU, and in all.
    fn cost(&self, codec: Option<Codec>) -> Option<(f64, f64)> {
        let known = match codec {
            None => Known {
                seconds: 0.0,
                ratio: 1.0,
            },
            Some(codec) => self.known[index(codec)]?,
        };
        let cpu = self.prepare? + known.seconds + self.send? * known.ratio;
        let link = self.link.map_or(0.0, |link| known.ratio / link);
        Some((cpu, cpu.max(link)))
    }

    fn choose(&mut self) {
        let costs = [None, Some(Codec::Lz4), Some(Codec::Zstd)].map(|codec| {
            let (cpu, all) = self.cost(codec)?;
            let all = if codec == self.current {
                all * STAY
            } else {
                all
            };
            Some((codec, all + cpu * CPU_WEIGHT))
        });
        let costs = costs.into_iter().flatten();
        let Some((codec, _)) = costs.min_by(|(_, a), (_, b)| a.total_cmp(b)) else {
            return;
        };
        self.windows_since_step_up = self.windows_since_step_up.saturating_add(1);
        if codec == self.current {
            return;
        }
        let ratio = |codec: Option<Codec>| {
            let known = codec.and_then(|codec| self.known[index(codec)]);
            known.map_or(1.0, |known| known.ratio)
        };
        if ratio(codec) > ratio(self.current) {
            self.windows_since_step_up = 0;
        } else if self.windows_since_step_up <= EXCURSION {
            // The link was not as fast as hoped: hope more slowly.
            self.growth = (1.0 + (self.growth - 1.0) / 2.0).max(GROWTH_LEAST);
        } else {
            self.growth = GROWTH_FIRST;
        }
        self.current = codec;
    }
}

/// Whether it pays to look for what differs from versions sent before.
///
/// Guests that rewrite whole pages with other contents gain nothing from it. Then only one block in [`Self::SAMPLE`] is
/// looked at, always the same ones, until that changes.
#[derive(Debug)]
pub struct DeltaGate {
    tried: u32,
    won: u32,
    open: bool,
}

impl Default for DeltaGate {
    fn default() -> Self {
        Self {
            tried: 0,
            won: 0,
            open: true,
        }
    }
}

impl DeltaGate {
    /// See the type's description.
    pub const SAMPLE: u32 = 16;
    /// Tries after which is decided.
    const TRIES: u32 = 256;

    /// Whether this block is worth a try.
    pub fn is_open(&self, block: u32, free_cpu: bool) -> bool {
        // Multiplicative hashing, so that the sample is spread over regular patterns.
        self.open || free_cpu || block.wrapping_mul(0x9e37_79b1) >> 28 == 0
    }

    /// One page was tried.
    pub fn record(&mut self, won: bool) {
        self.tried += 1;
        self.won += u32::from(won);
        if self.tried == Self::TRIES {
            self.open = self.won * 4 >= self.tried;
            (self.tried, self.won) = (0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A machine of known speeds in bytes per second, and guest memory of known ratios.
    #[derive(Clone, Copy)]
    struct World {
        prepare: f64,
        send: f64,
        /// Rate and ratio.
        lz4: (f64, f64),
        zstd: (f64, f64),
        link: f64,
    }

    const COMPRESSIBLE: World = World {
        prepare: 4e9,
        send: 2e9,
        lz4: (1e9, 0.5),
        zstd: (4e8, 0.3),
        link: 1e10,
    };

    const INCOMPRESSIBLE: World = World {
        lz4: (3e9, 1.0),
        zstd: (1.5e9, 1.0),
        ..COMPRESSIBLE
    };

    impl World {
        fn codec(&self, codec: Codec) -> (f64, f64) {
            match codec {
                Codec::Lz4 => self.lz4,
                Codec::Zstd => self.zstd,
            }
        }

        /// Sends a block; gives how long that took in all.
        fn step(&self, chooser: &mut Chooser) -> f64 {
            let mut probing = 0.0;
            for &codec in chooser.samples() {
                let (rate, ratio) = self.codec(codec);
                let took = 65536.0 / rate;
                probing += took;
                let output = (65536.0 * ratio) as u64;
                chooser.sampled(codec, 65536, output, Duration::from_secs_f64(took));
            }
            let codec = chooser.codec();
            let (encode, ratio) = codec.map_or((0.0, 1.0), |codec| {
                let (rate, ratio) = self.codec(codec);
                (MIB as f64 / rate, ratio)
            });
            let wire = MIB as f64 * ratio;
            let (prepare, send) = (MIB as f64 / self.prepare, wire / self.send);
            let blocked = (wire / self.link - prepare - encode - send).max(0.0);
            chooser.record(&Sent {
                codec,
                input: MIB,
                output: wire as u64,
                wire: wire as u64,
                prepare: Duration::from_secs_f64(prepare),
                encode: Duration::from_secs_f64(encode),
                send: Duration::from_secs_f64(send),
                blocked: Duration::from_secs_f64(blocked),
            });
            probing + prepare + encode + send + blocked
        }

        fn run(&self, chooser: &mut Chooser, blocks: u32) -> f64 {
            (0..blocks).map(|_| self.step(chooser)).sum()
        }
    }

    #[test]
    fn incompressible_memory_over_a_fast_link_costs_no_more_than_two_percent() {
        let mut auto = Chooser::new(Compress::Auto);
        let took = INCOMPRESSIBLE.run(&mut auto, 512);
        let without = INCOMPRESSIBLE.run(&mut Chooser::new(Compress::Off), 512);
        assert_eq!(auto.codec(), None);
        assert!(took < without * 1.02, "{took} against {without}");
    }

    #[test]
    fn incompressible_memory_over_a_slow_link_is_sent_as_it_is() {
        let slow = World {
            link: 6e7,
            ..INCOMPRESSIBLE
        };
        let mut auto = Chooser::new(Compress::Auto);
        slow.run(&mut auto, 64);
        assert_eq!(auto.codec(), None);
    }

    #[test]
    fn the_encoder_follows_the_rate_of_the_link() {
        for (link, codec) in [
            (1e10, None),
            (2e9, None),
            (5e8, Some(Codec::Lz4)),
            (6e7, Some(Codec::Zstd)),
            (1e6, Some(Codec::Zstd)),
        ] {
            let world = World {
                link,
                ..COMPRESSIBLE
            };
            let mut auto = Chooser::new(Compress::Auto);
            world.run(&mut auto, 64);
            assert_eq!(auto.codec(), codec, "{link}");
        }
    }

    #[test]
    fn a_link_that_changes_is_followed_both_ways() {
        let slow = World {
            link: 6e7,
            ..COMPRESSIBLE
        };
        let mut auto = Chooser::new(Compress::Auto);
        for _ in 0..3 {
            slow.run(&mut auto, 200);
            assert_eq!(auto.codec(), Some(Codec::Zstd));
            COMPRESSIBLE.run(&mut auto, 2000);
            assert_eq!(auto.codec(), None);
        }
    }

    #[test]
    fn memory_that_changes_is_followed_both_ways() {
        let link = 6e7;
        let (yes, no) = (
            World {
                link,
                ..COMPRESSIBLE
            },
            World {
                link,
                ..INCOMPRESSIBLE
            },
        );
        let mut auto = Chooser::new(Compress::Auto);
        no.run(&mut auto, 100);
        assert_eq!(auto.codec(), None);
        yes.run(&mut auto, 100);
        assert_eq!(auto.codec(), Some(Codec::Zstd));
        let took = no.run(&mut auto, 100);
        assert!(took < 1.02 * 100.0 * MIB as f64 / link, "{took}");
    }

    #[test]
    fn mixed_memory_over_a_slow_link_is_compressed_where_it_can_be() {
        let link = 6e7;
        let time = |mode| {
            let mut chooser = Chooser::new(mode);
            (0..400)
                .map(|block| {
                    let world = if block / 7 % 2 == 0 {
                        INCOMPRESSIBLE
                    } else {
                        COMPRESSIBLE
                    };
                    World { link, ..world }.step(&mut chooser)
                })
                .sum::<f64>()
        };
        let (auto, zstd) = (time(Compress::Auto), time(Compress::Zstd));
        assert!(auto < zstd * 1.1, "{auto} against {zstd}");
    }

    #[test]
    fn no_encoder_that_was_fixed_is_much_better_than_the_choice() {
        for link in [3e7, 1e8, 2e8, 4e8, 8e8, 1.6e9, 1e10] {
            let world = World {
                link,
                ..COMPRESSIBLE
            };
            let time = |mode| world.run(&mut Chooser::new(mode), 4000);
            let best = [Compress::Off, Compress::Lz4, Compress::Zstd]
                .map(time)
                .into_iter()
                .fold(f64::MAX, f64::min);
            let auto = time(Compress::Auto);
            assert!(auto < best * 1.12, "{link}: {auto} against {best}");
        }
    }

    #[test]
    fn what_was_asked_for_is_done_without_samples() {
        for (mode, codec) in [
            (Compress::Off, None),
            (Compress::Lz4, Some(Codec::Lz4)),
            (Compress::Zstd, Some(Codec::Zstd)),
        ] {
            let mut fixed = Chooser::new(mode);
            COMPRESSIBLE.run(&mut fixed, 100);
            assert_eq!(fixed.codec(), codec);
            assert!(fixed.samples().is_empty());
        }
    }

    #[test]
    fn deltas_that_do_not_pay_are_tried_now_and_then_and_taken_up_again() {
        let mut gate = DeltaGate::default();
        let open = |gate: &DeltaGate| {
            (0..1600)
                .filter(|&block| gate.is_open(block, false))
                .count()
        };
        assert_eq!(open(&gate), 1600);
        (0..256).for_each(|_| gate.record(false));
        assert!((50..200).contains(&open(&gate)), "{}", open(&gate));
        assert!(gate.is_open(1, true), "free CPU time costs nothing");
        (0..256).for_each(|_| gate.record(true));
        assert_eq!(open(&gate), 1600);
    }
}
