//! Pages whose content follows from their number, so that any other content is an error.

/// Bytes of a page.
pub(crate) const PAGE_SIZE: u64 = 4096;
/// Pages of a mebibyte.
pub(crate) const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_SIZE;

const WORDS: usize = 512;
const HEADER: usize = 3;

/// One page of guest memory, aligned as the hypervisor tracks it.
#[repr(align(4096))]
#[derive(Clone)]
pub(crate) struct Page([u64; WORDS]);

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It holds another page.
    Number { found: u64 },
    /// It holds another version of itself: a write was lost or came twice.
    Generation { found: u64 },
    /// Its body doesn't belong to its header: it is torn or altered.
    Checksum,
    /// Its random data are not the ones that were written.
    Content,
}

impl Page {
    pub(crate) fn zeroed() -> Self {
        Self([0; WORDS])
    }

    /// Writes version `generation` of page `number`: incompressible, its header tells what it is.
    pub(crate) fn write(&mut self, seed: u64, number: u64, generation: u64) {
        let mut state = start(seed ^ generation.rotate_left(40), number);
        let mut sum = first_sum(number, generation);
        for word in &mut self.0[HEADER..] {
            state = next(state);
            *word = state;
            sum = checksum(sum, state);
        }
        self.0[..HEADER].copy_from_slice(&[number, generation, sum]);
    }

    /// Says whether this is version `generation` of page `number`.
    pub(crate) fn verify(&self, number: u64, generation: u64) -> Result<(), Fault> {
        let [found_number, found_generation, found_sum] = [self.0[0], self.0[1], self.0[2]];
        if found_number != number {
            return Err(Fault::Number {
                found: found_number,
            });
        }
        if found_generation != generation {
            return Err(Fault::Generation {
                found: found_generation,
            });
        }
        let sum = self.0[HEADER..]
            .iter()
            .fold(first_sum(number, generation), |sum, word| {
                checksum(sum, *word)
            });
        if sum == found_sum {
            Ok(())
        } else {
            Err(Fault::Checksum)
        }
    }

    /// Fills the page with random data that follow from `seed` and `number` alone.
    pub(crate) fn fill(&mut self, seed: u64, number: u64) {
        let mut state = start(seed, number);
        for word in &mut self.0 {
            state = next(state);
            *word = state;
        }
    }

    /// Makes the random data again and compares.
    pub(crate) fn verify_fill(&self, seed: u64, number: u64) -> Result<(), Fault> {
        let mut state = start(seed, number);
        for word in &self.0 {
            state = next(state);
            if *word != state {
                return Err(Fault::Content);
            }
        }
        Ok(())
    }
}

/// First state of a page's generator; the finaliser of splitmix64, so that neighbours differ.
fn start(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    // The generator stays at zero for ever if it starts there.
    (z ^ (z >> 31)) | 1
}

/// Marsaglia's xorshift64: few instructions, because the guest may be translated.
fn next(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^ (x << 17)
}

/// Not zero for page 0: memory that was lost reads as zeros and must not pass for a page.
fn first_sum(number: u64, generation: u64) -> u64 {
    !number ^ generation.rotate_left(32)
}

fn checksum(sum: u64, word: u64) -> u64 {
    (sum ^ word)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(29)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_page_verifies_as_itself_only() {
        let mut page = Page::zeroed();
        page.write(7, 3, 9);
        assert_eq!(page.verify(3, 9), Ok(()));
        assert_eq!(page.verify(4, 9), Err(Fault::Number { found: 3 }));
        assert_eq!(page.verify(3, 10), Err(Fault::Generation { found: 9 }));
    }

    #[test]
    fn a_torn_page_is_noticed() {
        let (mut new, mut old) = (Page::zeroed(), Page::zeroed());
        new.write(7, 3, 9);
        old.write(7, 3, 8);
        new.0[256..].copy_from_slice(&old.0[256..]);
        assert_eq!(new.verify(3, 9), Err(Fault::Checksum));
    }

    #[test]
    fn every_single_flipped_word_is_noticed() {
        let mut page = Page::zeroed();
        page.write(1, 2, 3);
        for index in 0..WORDS {
            page.0[index] ^= 1 << (index % 64);
            assert!(page.verify(2, 3).is_err(), "word {index}");
            page.0[index] ^= 1 << (index % 64);
        }
    }

    #[test]
    fn fill_is_made_again_from_seed_and_number() {
        let mut page = Page::zeroed();
        page.fill(5, 100);
        assert_eq!(page.verify_fill(5, 100), Ok(()));
        assert_eq!(page.verify_fill(5, 101), Err(Fault::Content));
        assert_eq!(page.verify_fill(6, 100), Err(Fault::Content));
        page.0[511] ^= 1;
        assert_eq!(page.verify_fill(5, 100), Err(Fault::Content));
    }

    #[test]
    fn a_zero_page_is_never_a_valid_one() {
        assert!(Page::zeroed().verify(0, 0).is_err());
        assert!(Page::zeroed().verify_fill(0, 0).is_err());
    }
}
