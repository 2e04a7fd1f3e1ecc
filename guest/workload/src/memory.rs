//! Memory that knows what it should hold.

const PAGE: usize = 4096;

/// SplitMix64 (Steele, Lea, Flood 2014): incompressible enough, and made again from its seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn pattern(page: &mut [u8], seed: u64) {
    let mut random = Random::new(seed);
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
}

/// Memory that is written once, with incompressible data.
pub(crate) struct Fill {
    bytes: Vec<u8>,
    seed: u64,
}

impl Fill {
    pub(crate) fn new(mib: usize, seed: u64) -> Self {
        let mut bytes = vec![0; mib << 20];
        for (index, page) in bytes.chunks_exact_mut(PAGE).enumerate() {
            pattern(page, seed ^ index as u64);
        }
        Self { bytes, seed }
    }

    /// Checks some pages at random: how many were good, and how many were not.
    pub(crate) fn check(&self, pages: usize, random: &mut Random) -> (u64, u64) {
        let all = self.bytes.len() / PAGE;
        let (mut good, mut bad) = (0, 0);
        let mut expected = vec![0; PAGE];
        for _ in 0..if all == 0 { 0 } else { pages } {
            let index = (random.next() % all as u64) as usize;
            pattern(&mut expected, self.seed ^ index as u64);
            if self.bytes[index * PAGE..(index + 1) * PAGE] == expected[..] {
                good += 1;
            } else {
                bad += 1;
            }
        }
        (good, bad)
    }
}

/// Memory that is rewritten all the time: every page holds what its number and generation say.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    next: usize,
    generation: u64,
}

impl Buffer {
    pub(crate) fn new(mib: usize) -> Self {
        let mut buffer = Self {
            bytes: vec![0; mib << 20],
            next: 0,
            generation: 1,
        };
        for (index, page) in buffer.bytes.chunks_exact_mut(PAGE).enumerate() {
            pattern(page, seed_of(index, 0));
        }
        buffer.next = 0;
        buffer
    }

    /// Checks the next pages against their old generation and rewrites them; good pages, bad pages, sweeps done.
    pub(crate) fn step(&mut self, pages: usize) -> (u64, u64, u64) {
        let all = self.bytes.len() / PAGE;
        let (mut good, mut bad, mut sweeps) = (0, 0, 0);
        let mut expected = vec![0; PAGE];
        for _ in 0..pages {
            let page = &mut self.bytes[self.next * PAGE..(self.next + 1) * PAGE];
            pattern(&mut expected, seed_of(self.next, self.generation - 1));
            if page == &expected[..] {
                good += 1;
            } else {
                bad += 1;
            }
            pattern(page, seed_of(self.next, self.generation));
            self.next += 1;
            if self.next == all {
                self.next = 0;
                self.generation += 1;
                sweeps += 1;
            }
        }
        (good, bad, sweeps)
    }
}

fn seed_of(page: usize, generation: u64) -> u64 {
    (page as u64) << 32 ^ generation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_is_found() {
        let mut buffer = Buffer::new(1);
        assert_eq!(buffer.step(300), (300, 0, 1));
        let at = buffer.next * PAGE + 17;
        buffer.bytes[at] ^= 1;
        assert_eq!(buffer.step(2), (1, 1, 0));
        let mut fill = Fill::new(1, 5);
        assert_eq!(fill.check(10, &mut Random::new(1)), (10, 0));
        fill.bytes.fill(0);
        assert_eq!(fill.check(10, &mut Random::new(1)), (0, 10));
    }
}
