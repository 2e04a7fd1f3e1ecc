//! Pages that have arrived since the last whole round, so that a source that comes back need not send them again.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use palanquin_engine::pages::{Block, PageSet, RamLayout};

/// A bit for each page of a VM: 32 KiB for each GiB of RAM.
pub struct Received {
    layout: RamLayout,
    regions: Vec<Vec<AtomicU64>>,
    /// Streams that have delivered their part of the round.
    delivered: AtomicUsize,
    /// The last round that has arrived whole.
    whole: AtomicU32,
}

impl Received {
    /// None.
    pub fn new(layout: &RamLayout) -> Self {
        let words = |region| layout.pages(region).div_ceil(64);
        let regions = (0..layout.regions())
            .map(|region| (0..words(region)).map(|_| AtomicU64::new(0)).collect())
            .collect();
        Self {
            layout: layout.clone(),
            regions,
            delivered: AtomicUsize::new(0),
            whole: AtomicU32::new(0),
        }
    }

    /// These pages are in guest memory, and so are their digests. What lies outside of the layout is ignored.
    pub fn mark(&self, block: &Block) {
        let Some(words) = self.regions.get(usize::from(block.region)) else {
            return;
        };
        let first = block.index as usize * block.mask.len();
        for (word, mask) in words.iter().skip(first).zip(block.mask) {
            // The streams are joined before anybody reads this.
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }

    /// One of so many streams has delivered its part of the round. Behind the last of them the next round begins; to be
    /// called before that stream tells so, because the source then sends of the next.
    pub fn round_end(&self, round: u32, streams: usize) {
        // What the others have marked comes before.
        if self.delivered.fetch_add(1, Ordering::AcqRel) + 1 < streams {
            return;
        }
        self.delivered.store(0, Ordering::Relaxed);
        self.whole.store(round, Ordering::Relaxed);
        for word in self.regions.iter().flatten() {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Streams are opened anew: what was said of a round that is not whole does not count.
    pub fn begin(&self) {
        self.delivered.store(0, Ordering::Relaxed);
    }

    /// The pages of the round after so many whole ones. All, where it has arrived whole and the session does not know that.
    pub fn pages(&self, rounds: u32) -> PageSet {
        let mut pages = PageSet::empty(&self.layout);
        if self.whole.load(Ordering::Relaxed) > rounds {
            for region in 0..self.layout.regions() {
                pages.insert(region, 0..self.layout.pages(region));
            }
            return pages;
        }
        for (region, words) in self.regions.iter().enumerate() {
            for (first, word) in (0..).step_by(64).zip(words) {
                let word = word.load(Ordering::Relaxed);
                if word != 0 {
                    pages.insert_bits(region, first, &word.to_le_bytes());
                }
            }
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_marked_is_there_until_the_round_is_whole() {
        let layout = RamLayout::new(vec![600, 3]).unwrap();
        let received = Received::new(&layout);
        assert!(received.pages(0).is_empty());
        let block = Block {
            region: 0,
            index: 2,
            mask: [1, 1 << 23, 0, 0],
        };
        received.mark(&block);
        received.mark(&Block {
            region: 1,
            index: 0,
            mask: [0b101, 0, 0, 0],
        });
        received.mark(&Block { region: 7, ..block });
        received.round_end(1, 2);
        let pages = received.pages(0);
        assert_eq!(pages.len(), 4);
        for (region, page) in [(0, 512), (0, 599), (1, 0), (1, 2)] {
            assert!(pages.contains(region, page), "{region} {page}");
        }
        received.round_end(1, 2);
        assert!(received.pages(1).is_empty());
    }

    #[test]
    fn a_round_is_whole_when_all_streams_of_the_same_connection_have_delivered_it() {
        let layout = RamLayout::new(vec![600]).unwrap();
        let received = Received::new(&layout);
        let block = Block {
            region: 0,
            index: 0,
            mask: [1; 4],
        };
        received.mark(&block);
        received.round_end(1, 2);
        received.begin();
        received.round_end(1, 2);
        assert_eq!(received.pages(0).len(), 4);
        received.round_end(1, 2);
        assert!(received.pages(1).is_empty());
    }

    #[test]
    fn of_a_round_that_is_whole_and_not_known_to_be_nothing_is_missing() {
        let layout = RamLayout::new(vec![600, 3]).unwrap();
        let received = Received::new(&layout);
        received.round_end(1, 1);
        assert_eq!(received.pages(0).len(), 603);
        assert!(received.pages(1).is_empty());
    }
}
