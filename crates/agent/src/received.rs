//! Pages that have arrived since the last whole round, so that a source that comes back need not send them again.

use std::sync::atomic::{AtomicU64, Ordering};

use palanquin_engine::pages::{Block, PageSet, RamLayout};

/// A bit for each page of a VM: 32 KiB for each GiB of RAM.
pub struct Received {
    layout: RamLayout,
    regions: Vec<Vec<AtomicU64>>,
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

    /// The round has arrived whole: the next begins.
    pub fn forget(&self) {
        for word in self.regions.iter().flatten() {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// The pages.
    pub fn pages(&self) -> PageSet {
        let mut pages = PageSet::empty(&self.layout);
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
        assert!(received.pages().is_empty());
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
        let pages = received.pages();
        assert_eq!(pages.len(), 4);
        for (region, page) in [(0, 512), (0, 599), (1, 0), (1, 2)] {
            assert!(pages.contains(region, page), "{region} {page}");
        }
        received.forget();
        assert!(received.pages().is_empty());
    }
}
