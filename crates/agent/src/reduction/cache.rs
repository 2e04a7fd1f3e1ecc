//! Versions of pages that one stream has sent last: what deltas start from and duplicates refer to.
//!
//! Copying each page into a cache would cost a tenth of an idle migration. So a page comes in only once there is a
//! sign that this pays: it was sent before, or a page with the same digest was sent not long ago. What is in stays as
//! long as it is of use: a guest that rewrites more than fits, again and again in the same order, would otherwise
//! evict every page just before it is asked for. Pages that were of no use for two generations make room; a
//! generation is a round, or [`ATTEMPTS`] times as many refused pages as fit.
//!
//! Equality is never taken from a digest: bytes are compared.

use std::collections::HashMap;

use super::PAGE;

/// See the module's description.
const ATTEMPTS: u64 = 16;
/// Entries that are looked at for one that can go, for each page that wants in.
const LOOK: usize = 4;

struct Entry {
    region: u16,
    page: u64,
    digest: u128,
    /// When it was of use last.
    used: u64,
    contents: Box<[u8]>,
}

/// The cache of one stream.
pub struct Cache {
    capacity: usize,
    entries: Vec<Entry>,
    /// Entries that hold no page.
    free: Vec<usize>,
    by_page: HashMap<(u16, u64), usize>,
    by_digest: HashMap<u128, usize>,
    /// Parts of the digests of pages sent not long ago, each at a place that follows from the digest.
    seen: Vec<u32>,
    hand: usize,
    generation: u64,
    attempts: u64,
}

impl Cache {
    /// Holds so many pages, and remembers as many times 16 digests (rounded up to a power of two) of 4 bytes.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            entries: Vec::new(),
            free: Vec::new(),
            by_page: HashMap::new(),
            by_digest: HashMap::new(),
            seen: vec![0; (capacity * 16).next_power_of_two()],
            hand: 0,
            generation: 0,
            attempts: 0,
        }
    }

    /// Notes that a page with this digest is sent; whether there was one not long ago. May be wrong either way.
    pub fn note(&mut self, digest: u128) -> bool {
        let place = (digest as usize) & (self.seen.len() - 1);
        let part = (digest >> 96) as u32;
        std::mem::replace(&mut self.seen[place], part) == part
    }

    /// The version of the page that was sent last.
    pub fn version(&mut self, region: u16, page: u64) -> Option<&[u8]> {
        let slot = *self.by_page.get(&(region, page))?;
        let entry = self.entries.get_mut(slot)?;
        entry.used = self.generation;
        Some(&entry.contents)
    }

    /// A page whose version sent last has these very contents.
    pub fn find(&mut self, digest: u128, contents: &[u8]) -> Option<(u16, u64)> {
        let slot = *self.by_digest.get(&digest)?;
        let entry = self.entries.get_mut(slot)?;
        if *entry.contents != *contents {
            return None;
        }
        entry.used = self.generation;
        Some((entry.region, entry.page))
    }

    /// The page is sent with these contents. If it is cached, the new version replaces the old one; else it comes in
    /// where it is wanted and there is room.
    pub fn sent(&mut self, region: u16, page: u64, digest: u128, contents: &[u8], wanted: bool) {
        if let Some(&slot) = self.by_page.get(&(region, page)) {
            self.forget_digest(slot);
            self.fill(slot, region, page, digest, contents);
        } else if wanted && let Some(slot) = self.room() {
            self.by_page.insert((region, page), slot);
            self.fill(slot, region, page, digest, contents);
        }
    }

    fn fill(&mut self, slot: usize, region: u16, page: u64, digest: u128, contents: &[u8]) {
        let Some(entry) = self.entries.get_mut(slot) else {
            return;
        };
        entry.contents.copy_from_slice(contents);
        (entry.region, entry.page, entry.digest) = (region, page, digest);
        entry.used = self.generation;
        self.by_digest.insert(digest, slot);
    }

    /// The page is sent as something that is not kept.
    pub fn forget(&mut self, region: u16, page: u64) {
        if let Some(slot) = self.by_page.remove(&(region, page)) {
            self.forget_digest(slot);
            self.free.push(slot);
        }
    }

    fn forget_digest(&mut self, slot: usize) {
        let Some(entry) = self.entries.get(slot) else {
            return;
        };
        // Several entries may have the same contents; the last one is found by them.
        if self.by_digest.get(&entry.digest) == Some(&slot) {
            self.by_digest.remove(&entry.digest);
        }
    }

    fn room(&mut self) -> Option<usize> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.entries.len() < self.capacity {
            self.entries.push(Entry {
                region: 0,
                page: 0,
                digest: 0,
                used: 0,
                contents: vec![0; PAGE].into_boxed_slice(),
            });
            return Some(self.entries.len() - 1);
        }
        for _ in 0..LOOK.min(self.capacity) {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.capacity;
            let entry = self.entries.get(slot)?;
            if entry.used + 2 <= self.generation {
                let (region, page) = (entry.region, entry.page);
                self.forget(region, page);
                return self.free.pop();
            }
        }
        self.attempts += 1;
        if self.attempts >= self.capacity as u64 * ATTEMPTS {
            self.end_generation();
        }
        None
    }

    /// A round has ended.
    pub fn end_generation(&mut self) {
        self.generation += 1;
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(value: u8) -> Vec<u8> {
        vec![value; PAGE]
    }

    fn put(cache: &mut Cache, number: u64, value: u8) {
        cache.sent(0, number, value.into(), &page(value), true);
    }

    #[test]
    fn the_version_sent_last_is_found_by_page_and_by_contents() {
        let mut cache = Cache::new(2);
        put(&mut cache, 5, 1);
        put(&mut cache, 5, 2);
        assert_eq!(cache.version(0, 5), Some(&page(2)[..]));
        assert_eq!(cache.find(2, &page(2)), Some((0, 5)));
        assert_eq!(cache.find(1, &page(1)), None, "that version is gone");
        cache.forget(0, 5);
        assert_eq!(cache.version(0, 5), None);
        assert_eq!(cache.find(2, &page(2)), None);
    }

    #[test]
    fn an_equal_digest_of_other_contents_is_no_duplicate() {
        let mut cache = Cache::new(2);
        put(&mut cache, 5, 1);
        assert_eq!(cache.find(1, &page(9)), None);
    }

    #[test]
    fn pages_of_equal_contents_leave_no_false_trace_of_each_other() {
        let mut cache = Cache::new(4);
        put(&mut cache, 5, 1);
        put(&mut cache, 6, 1);
        put(&mut cache, 5, 2);
        assert_eq!(cache.find(1, &page(1)), Some((0, 6)));
        put(&mut cache, 6, 3);
        assert_eq!(cache.find(1, &page(1)), None);
    }

    #[test]
    fn what_is_rewritten_in_turn_and_does_not_fit_is_kept_in_part() {
        let mut cache = Cache::new(8);
        let mut hits = 0;
        for round in 0..10 {
            for number in 0..64 {
                hits += u32::from(cache.version(0, number).is_some());
                put(&mut cache, number, round);
            }
            cache.end_generation();
        }
        assert_eq!(hits, 9 * 8);
    }

    #[test]
    fn pages_that_are_of_no_use_any_more_make_room() {
        let mut cache = Cache::new(8);
        for number in 0..8 {
            put(&mut cache, number, 1);
        }
        cache.end_generation();
        put(&mut cache, 100, 1);
        assert_eq!(cache.version(0, 100), None, "all of it was of use just now");
        cache.end_generation();
        for number in 100..108 {
            put(&mut cache, number, 2);
        }
        assert!((100..108).all(|number| cache.version(0, number).is_some()));
        assert!((0..8).all(|number| cache.version(0, number).is_none()));
        assert_eq!(cache.entries.len(), 8);
    }

    #[test]
    fn a_round_that_does_not_end_makes_room_too() {
        let mut cache = Cache::new(4);
        for number in 0..4 {
            put(&mut cache, number, 1);
        }
        for number in 10..10 + 3 * 4 * ATTEMPTS {
            put(&mut cache, number, 2);
        }
        assert!(cache.version(0, 0).is_none());
    }

    #[test]
    fn a_digest_counts_as_seen_the_second_time() {
        let mut cache = Cache::new(4);
        let digest = 0xabcd_0000_0000_0000_0000_0000_0000_0001;
        assert!(!cache.note(digest));
        assert!(cache.note(digest));
        assert!(!cache.note(digest ^ 1 << 127));
    }
}
