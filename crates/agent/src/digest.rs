//! A digest for each page of the version last sent or received, and the root over them.
//!
//! The digests find pages that were lost, mixed up or altered by a defect; against an attacker on the path the
//! channel's own authentication stands. XXH3-128 with a seed that both sides know, because it costs next to
//! nothing beside encryption. The root is SHA-256 over the digests, region by region.

use std::sync::atomic::{AtomicU64, Ordering};

use aws_lc_rs::digest::{Context, SHA256};
use palanquin_engine::pages::RamLayout;
use palanquin_engine::{Root, ids::Sha256};
use twox_hash::XxHash3_128;

/// The digests of all pages of a VM: 16 bytes each. A page of zeros has the digest 0, as a hole has.
pub struct Digests {
    seed: u64,
    regions: Vec<Vec<[AtomicU64; 2]>>,
}

/// What [`Digests::set`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The new digest.
    pub digest: u128,
    /// Whether the page had contents before that were not all zero.
    pub before: bool,
}

impl Digests {
    /// All pages are zero.
    pub fn new(layout: &RamLayout, seed: u64) -> Self {
        let regions = (0..layout.regions())
            .map(|region| {
                (0..layout.pages(region))
                    .map(|_| Default::default())
                    .collect()
            })
            .collect();
        Self { seed, regions }
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    fn slot(&self, region: u16, page: u64) -> Option<&[AtomicU64; 2]> {
        self.regions
            .get(usize::from(region))?
            .get(usize::try_from(page).ok()?)
    }

    /// The page has these contents, which are not all zero.
    pub fn set(&self, region: u16, page: u64, contents: &[u8]) -> Stored {
        let digest = XxHash3_128::oneshot_with_seed(self.seed, contents);
        let before = self.slot(region, page).is_some_and(|[low, high]| {
            // Each page belongs to one stream, and the streams are joined before the root is computed.
            let before = low.load(Ordering::Relaxed) | high.load(Ordering::Relaxed);
            low.store(digest as u64, Ordering::Relaxed);
            high.store((digest >> 64) as u64, Ordering::Relaxed);
            before != 0
        });
        Stored { digest, before }
    }

    /// Whether the page has contents that are not all zero.
    pub fn is_known(&self, region: u16, page: u64) -> bool {
        self.slot(region, page).is_some_and(|[low, high]| {
            low.load(Ordering::Relaxed) | high.load(Ordering::Relaxed) != 0
        })
    }

    /// The page is all zeros; true if it was not so before.
    pub fn set_zero(&self, region: u16, page: u64) -> bool {
        self.slot(region, page).is_some_and(|[low, high]| {
            let was = low.swap(0, Ordering::Relaxed) | high.swap(0, Ordering::Relaxed);
            was != 0
        })
    }

    /// The root over all pages.
    pub fn root(&self) -> Root {
        let mut context = Context::new(&SHA256);
        context.update(b"palanquin memory root v1");
        context.update(&self.seed.to_le_bytes());
        let mut block = Vec::with_capacity(4096);
        for region in &self.regions {
            context.update(&(region.len() as u64).to_le_bytes());
            // A digest of the digests of a block first: SHA-256 over 16 bytes for each page would take
            // milliseconds of the pause.
            for pages in region.chunks(256) {
                block.clear();
                for [low, high] in pages {
                    block.extend_from_slice(&low.load(Ordering::Relaxed).to_le_bytes());
                    block.extend_from_slice(&high.load(Ordering::Relaxed).to_le_bytes());
                }
                let digest = XxHash3_128::oneshot_with_seed(self.seed, &block);
                context.update(&digest.to_le_bytes());
            }
        }
        let mut root = [0; 32];
        root.copy_from_slice(context.finish().as_ref());
        Root(root)
    }
}

/// SHA-256 of bytes that come one after the other.
pub struct Sha256Of(Context);

impl Default for Sha256Of {
    fn default() -> Self {
        Self(Context::new(&SHA256))
    }
}

impl Sha256Of {
    /// These come next.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all.
    pub fn finish(self) -> Sha256 {
        let digest = self.0.finish();
        let mut out = [0; 32];
        out.copy_from_slice(digest.as_ref());
        Sha256(out)
    }
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most pages differ from zero early; the rest of the check runs in wide steps.
    let (head, rest) = bytes.split_at(bytes.len().min(64));
    head.iter().all(|&byte| byte == 0)
        && rest
            .chunks(256)
            .all(|chunk| chunk.iter().fold(0, |all, &byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_zeros_counts_as_a_hole_and_any_other_byte_changes_the_root() {
        let layout = RamLayout::new(vec![600, 2]).unwrap();
        let digests = Digests::new(&layout, 7);
        let empty = digests.root();
        let mut page = vec![0; 4096];
        page[4095] = 1;
        assert!(!digests.is_known(1, 1));
        assert!(!digests.set(1, 1, &page).before);
        assert!(digests.is_known(1, 1) && digests.set(1, 1, &page).before);
        let one = digests.root();
        assert_ne!(one, empty);
        assert!(digests.set_zero(1, 1));
        assert!(!digests.set_zero(1, 1));
        assert_eq!(digests.root(), empty);
        digests.set(1, 0, &page);
        assert_ne!(
            digests.root(),
            one,
            "the same page elsewhere is another memory"
        );
    }

    #[test]
    fn zero_is_found_at_every_place() {
        let mut page = vec![0; 4096];
        assert!(is_zero(&page));
        for at in [0, 1, 63, 64, 65, 4000, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }
}
