//! Sets of guest pages.

use std::ops::Range;

/// Unit of tracking and transfer in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// Pages of one block; a block is 1 MiB.
pub const BLOCK_PAGES: u64 = 256;
/// Most regions of a VM.
pub const REGIONS_MAX: usize = 64;
/// Most pages of a VM: 8 TiB.
pub const PAGES_MAX: u64 = 1 << 31;

/// A layout that a VM cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No region at all, or more than [`REGIONS_MAX`].
    #[error("{0} regions of guest memory, expected 1 to {REGIONS_MAX}")]
    RegionCount(usize),
    /// A region without pages.
    #[error("region {0} of guest memory is empty")]
    EmptyRegion(usize),
    /// More than [`PAGES_MAX`] pages.
    #[error("more than {PAGES_MAX} pages of guest memory")]
    TooLarge,
}

/// Sizes of a VM's regions of RAM, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    region_pages: Vec<u64>,
}

impl RamLayout {
    /// Checks the sizes, given in pages.
    ///
    /// # Errors
    ///
    /// One of [`LayoutError`]'s rules is broken.
    pub fn new(region_pages: Vec<u64>) -> Result<Self, LayoutError> {
        if region_pages.is_empty() || region_pages.len() > REGIONS_MAX {
            return Err(LayoutError::RegionCount(region_pages.len()));
        }
        if let Some(empty) = region_pages.iter().position(|&pages| pages == 0) {
            return Err(LayoutError::EmptyRegion(empty));
        }
        let total = region_pages
            .iter()
            .try_fold(0_u64, |sum, &pages| sum.checked_add(pages));
        match total {
            Some(total) if total <= PAGES_MAX => Ok(Self { region_pages }),
            _ => Err(LayoutError::TooLarge),
        }
    }

    /// Number of regions.
    pub fn regions(&self) -> usize {
        self.region_pages.len()
    }

    /// Pages of a region; 0 for one that does not exist.
    pub fn pages(&self, region: usize) -> u64 {
        self.region_pages.get(region).copied().unwrap_or(0)
    }

    /// Pages of all regions.
    pub fn total_pages(&self) -> u64 {
        self.region_pages.iter().sum()
    }

    /// Bytes of all regions.
    pub fn total_bytes(&self) -> u64 {
        self.total_pages() * PAGE_BYTES
    }
}

/// A set of pages of a VM, one bit each: 32 KiB for each GiB of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    layout: RamLayout,
    words: Vec<Vec<u64>>,
}

impl PageSet {
    /// No pages.
    pub fn empty(layout: &RamLayout) -> Self {
        let words = (0..layout.regions())
            .map(|region| vec![0; usize::try_from(layout.pages(region).div_ceil(64)).unwrap_or(0)])
            .collect();
        Self {
            layout: layout.clone(),
            words,
        }
    }

    /// The layout it belongs to.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Adds pages; what lies outside the region is ignored.
    pub fn insert(&mut self, region: usize, pages: Range<u64>) {
        let end = pages.end.min(self.layout.pages(region));
        let Some(words) = self.words.get_mut(region) else {
            return;
        };
        let mut page = pages.start;
        while page < end {
            let bit = page % 64;
            let count = (64 - bit).min(end - page);
            let ones = if count == 64 {
                u64::MAX
            } else {
                ((1 << count) - 1) << bit
            };
            if let Some(word) = usize::try_from(page / 64)
                .ok()
                .and_then(|i| words.get_mut(i))
            {
                *word |= ones;
            }
            page += count;
        }
    }

    /// Whether a page is in the set.
    pub fn contains(&self, region: usize, page: u64) -> bool {
        usize::try_from(page / 64)
            .ok()
            .and_then(|i| self.words.get(region)?.get(i))
            .is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// Adds all pages of the other set, which has the same layout.
    pub fn union(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            for (word, other) in mine.iter_mut().zip(theirs) {
                *word |= other;
            }
        }
    }

    /// Pages in both sets.
    pub fn count_common(&self, other: &Self) -> u64 {
        let regions = self.words.iter().zip(&other.words);
        regions
            .flat_map(|(mine, theirs)| mine.iter().zip(theirs))
            .map(|(word, other)| u64::from((word & other).count_ones()))
            .sum()
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.words
            .iter()
            .flatten()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.words.iter().flatten().all(|&word| word == 0)
    }

    /// Bytes of its pages.
    pub fn bytes(&self) -> u64 {
        self.len() * PAGE_BYTES
    }

    /// The blocks with at least one page, ascending, each with the mask of its pages.
    pub fn blocks(&self) -> impl Iterator<Item = Block> + '_ {
        self.words.iter().enumerate().flat_map(|(region, words)| {
            words
                .chunks(4)
                .enumerate()
                .filter_map(move |(index, chunk)| {
                    let mut mask = [0_u64; 4];
                    mask[..chunk.len()].copy_from_slice(chunk);
                    (mask != [0; 4]).then_some(Block {
                        region: u16::try_from(region).ok()?,
                        index: u32::try_from(index).ok()?,
                        mask,
                    })
                })
        })
    }
}

/// Some pages of one 1 MiB block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Region.
    pub region: u16,
    /// Block within the region.
    pub index: u32,
    /// One bit for each page, the lowest of `mask[0]` first.
    pub mask: [u64; 4],
}

impl Block {
    /// First page of the block within its region.
    pub fn first_page(&self) -> u64 {
        u64::from(self.index) * BLOCK_PAGES
    }

    /// Number of pages in the mask.
    pub fn len(&self) -> u32 {
        self.mask.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether the mask is empty.
    pub fn is_empty(&self) -> bool {
        self.mask == [0; 4]
    }

    /// Whether a page of a region is in the mask.
    pub fn names(&self, region: u16, page: u64) -> bool {
        let at = page.wrapping_sub(self.first_page());
        region == self.region
            && at < BLOCK_PAGES
            && self.mask[(at / 64) as usize] >> (at % 64) & 1 == 1
    }

    /// Runs of adjacent pages, as offsets within the block.
    pub fn runs(&self) -> Runs {
        Runs {
            mask: self.mask,
            next: 0,
        }
    }
}

/// See [`Block::runs`].
#[derive(Clone, Debug)]
pub struct Runs {
    mask: [u64; 4],
    next: u32,
}

impl Runs {
    fn bit(&self, index: u32) -> bool {
        let word = (index / 64) as usize;
        self.mask
            .get(word)
            .is_some_and(|word| word >> (index % 64) & 1 == 1)
    }
}

impl Iterator for Runs {
    type Item = Range<u32>;

    fn next(&mut self) -> Option<Range<u32>> {
        let mut start = self.next;
        while start < 256 && !self.bit(start) {
            start += 1;
        }
        if start >= 256 {
            return None;
        }
        let mut end = start + 1;
        while end < 256 && self.bit(end) {
            end += 1;
        }
        self.next = end;
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(pages: &[u64]) -> RamLayout {
        RamLayout::new(pages.to_vec()).unwrap()
    }

    #[test]
    fn layouts_out_of_bounds_are_refused() {
        assert_eq!(RamLayout::new(vec![]), Err(LayoutError::RegionCount(0)));
        assert_eq!(
            RamLayout::new(vec![1; 65]),
            Err(LayoutError::RegionCount(65))
        );
        assert_eq!(RamLayout::new(vec![1, 0]), Err(LayoutError::EmptyRegion(1)));
        assert_eq!(
            RamLayout::new(vec![u64::MAX, 2]),
            Err(LayoutError::TooLarge)
        );
        assert_eq!(
            RamLayout::new(vec![PAGES_MAX + 1]),
            Err(LayoutError::TooLarge)
        );
    }

    #[test]
    fn a_block_names_its_own_pages_only() {
        let block = Block {
            region: 1,
            index: 2,
            mask: [1, 0, 0, 1 << 63],
        };
        let named = |region| (0..2048).filter(move |&page| block.names(region, page));
        assert_eq!(named(1).collect::<Vec<_>>(), [512, 767]);
        assert_eq!(named(0).count(), 0);
        assert!(!block.names(1, u64::MAX));
    }

    #[test]
    fn pages_outside_the_region_are_ignored() {
        let mut set = PageSet::empty(&layout(&[10]));
        set.insert(0, 8..1000);
        set.insert(7, 0..1);
        assert_eq!(set.len(), 2);
        assert!(!set.contains(0, 10));
    }

    proptest! {
        #[test]
        fn blocks_name_exactly_the_pages_inserted(
            ranges in prop::collection::vec((0usize..2, 0u64..3000, 0u64..600), 0..20),
        ) {
            let layout = layout(&[2500, 300]);
            let mut set = PageSet::empty(&layout);
            let mut model = std::collections::BTreeSet::new();
            for (region, start, len) in ranges {
                set.insert(region, start..start + len);
                model.extend((start..start + len).filter(|&p| p < layout.pages(region)).map(|p| (region, p)));
            }
            let mut seen = std::collections::BTreeSet::new();
            for block in set.blocks() {
                for run in block.runs() {
                    for page in run {
                        let page = block.first_page() + u64::from(page);
                        prop_assert!(block.names(block.region, page));
                        seen.insert((usize::from(block.region), page));
                    }
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(seen, model);
        }
    }
}
