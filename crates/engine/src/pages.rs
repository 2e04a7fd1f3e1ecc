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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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
        self.each_word(other, |word, other| *word |= other);
    }

    /// Removes all pages of the other set, which has the same layout.
    pub fn subtract(&mut self, other: &Self) {
        self.each_word(other, |word, other| *word &= !other);
    }

    /// Keeps only pages that are in the other set too, which has the same layout.
    pub fn intersect(&mut self, other: &Self) {
        self.each_word(other, |word, other| *word &= other);
    }

    fn each_word(&mut self, other: &Self, change: impl Fn(&mut u64, u64)) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            for (word, other) in mine.iter_mut().zip(theirs) {
                change(word, *other);
            }
        }
    }

    /// Takes whole blocks out, from `cursor` (region, block) on and then from the beginning, until at least `pages`
    /// pages are taken or none is left. Gives them and where to go on.
    pub fn take(&mut self, cursor: (usize, u64), pages: u64) -> (Self, (usize, u64)) {
        let mut taken = Self::empty(&self.layout);
        let mut count = 0;
        let mut next = cursor;
        let (region, block) = cursor;
        let order = (region..self.words.len())
            .chain(0..=region.min(self.words.len().saturating_sub(1)))
            .enumerate();
        for (nth, region) in order {
            let words = self.words.get_mut(region).into_iter().flatten();
            let resumes = nth == 0 && region == cursor.0;
            let skip = if resumes { block as usize * 4 } else { 0 };
            for (index, word) in words.enumerate().skip(skip) {
                if index % 4 == 0 && count >= pages {
                    return (taken, (region, index as u64 / 4));
                }
                if *word != 0 {
                    count += u64::from(word.count_ones());
                    if let Some(mine) = taken.words.get_mut(region).and_then(|w| w.get_mut(index)) {
                        *mine |= *word;
                    }
                    *word = 0;
                }
                next = (region, index as u64 / 4);
            }
        }
        (taken, next)
    }

    /// Takes the pages of a range within one block out.
    pub fn take_within_block(&mut self, region: u16, pages: Range<u64>) -> Block {
        let mut block = Block {
            region,
            index: u32::try_from(pages.start / BLOCK_PAGES).unwrap_or(u32::MAX),
            mask: [0; 4],
        };
        let words = self.words.get_mut(usize::from(region));
        let words = words.map_or(&mut [][..], Vec::as_mut_slice);
        for page in pages {
            let word = usize::try_from(page / 64)
                .ok()
                .and_then(|i| words.get_mut(i));
            if let Some(word) = word.filter(|word| **word >> (page % 64) & 1 == 1) {
                *word &= !(1 << (page % 64));
                block.insert(page);
            }
        }
        block
    }

    /// Bits of some pages of a region, the lowest bit of the first byte for page `first`, which must be a multiple of
    /// 64: the form in which sets travel. Empty behind the region's end.
    pub fn bits(&self, region: usize, first: u64, bytes_max: usize) -> Vec<u8> {
        let start = usize::try_from(first / 64).unwrap_or(usize::MAX);
        let words = self.words.get(region).and_then(|words| words.get(start..));
        let words = words.unwrap_or_default();
        let bytes = words.iter().take(bytes_max / 8);
        bytes.flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Adds pages from the form that [`PageSet::bits`] gives; false if a page lies outside of the region.
    pub fn insert_bits(&mut self, region: usize, first: u64, bits: &[u8]) -> bool {
        let pages = self.layout.pages(region);
        let mut fits = true;
        for (index, byte) in (0_u64..).zip(bits) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                let page = first.saturating_add(index * 8 + bit);
                fits &= page < pages;
                self.insert(region, page..page.saturating_add(1));
            }
        }
        fits
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

    /// Adds a page of the region; one of another block is ignored.
    pub fn insert(&mut self, page: u64) {
        let within = page.checked_sub(self.first_page());
        if let Some(within) = within.and_then(|within| usize::try_from(within).ok())
            && let Some(word) = self.mask.get_mut(within / 64)
        {
            *word |= 1 << (within % 64);
        }
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
        fn what_is_taken_in_slices_is_everything_once(
            ranges in prop::collection::vec((0usize..2, 0u64..3000, 1u64..600), 0..20),
            cursor in (0usize..3, 0u64..14),
            size in 1u64..900,
        ) {
            let layout = layout(&[2500, 300]);
            let mut set = PageSet::empty(&layout);
            for (region, start, len) in ranges {
                set.insert(region, start..start + len);
            }
            let whole = set.clone();
            let mut all = PageSet::empty(&layout);
            let mut cursor = cursor;
            while !set.is_empty() {
                let (slice, next) = set.take(cursor, size);
                prop_assert!(!slice.is_empty());
                prop_assert!(slice.len() < size + BLOCK_PAGES);
                prop_assert_eq!(all.count_common(&slice), 0);
                all.union(&slice);
                cursor = next;
            }
            prop_assert_eq!(all, whole);
        }

        #[test]
        fn bits_carry_a_set(ranges in prop::collection::vec((0u64..3000, 1u64..600), 0..20)) {
            let layout = layout(&[2500]);
            let mut set = PageSet::empty(&layout);
            for (start, len) in ranges {
                set.insert(0, start..start + len);
            }
            let mut copy = PageSet::empty(&layout);
            for first in (0..2500).step_by(640) {
                prop_assert!(copy.insert_bits(0, first, &set.bits(0, first, 80)));
            }
            prop_assert_eq!(&copy, &set);
            prop_assert!(!copy.insert_bits(0, 2496, &[0xff]));
        }

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
