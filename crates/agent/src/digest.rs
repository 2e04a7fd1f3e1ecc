//! A digest for each page of the version last sent or received, and the root over them.
//!
//! The digests find pages that were lost, mixed up or altered by a defect; against an attacker on the path the
//! channel's own authentication stands. XXH3-128 with a seed that both sides know, because it costs next to
//! nothing beside encryption. The root is SHA-256 over the digests, region by region.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};
use palanquin_engine::pages::{BLOCK_PAGES, RamLayout};
use palanquin_engine::{Root, ids::Sha256};
use twox_hash::XxHash3_128;

/// Bytes of a digest.
const DIGEST_BYTES: usize = 16;
/// Pages whose digests have a digest together.
const GROUP: usize = BLOCK_PAGES as usize;

/// The digests of all pages of a VM: 16 bytes each. A page of zeros has the digest 0, as a hole has.
pub struct Digests {
    seed: u64,
    regions: Vec<Region>,
    /// Held by who computes digests of groups: of two at once the one that has seen less might write last.
    settling: Mutex<()>,
}

struct Region {
    pages: Vec<[AtomicU64; 2]>,
    groups: Vec<Group>,
}

/// A digest of the digests of a block.
#[derive(Default)]
struct Group {
    /// Whether one of its pages has changed since it was computed. Set after the page's digest.
    changed: AtomicBool,
    digest: [AtomicU64; 2],
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
        let zeros = XxHash3_128::oneshot_with_seed(seed, &[0; GROUP * DIGEST_BYTES]);
        let region = |region| {
            let pages: Vec<_> = (0..layout.pages(region))
                .map(|_| Default::default())
                .collect();
            let group = |pages: &[_]| Group {
                changed: AtomicBool::new(pages.len() != GROUP),
                digest: halves(zeros).map(AtomicU64::new),
            };
            let groups = pages.chunks(GROUP).map(group).collect();
            Region { pages, groups }
        };
        Self {
            seed,
            regions: (0..layout.regions()).map(region).collect(),
            settling: Mutex::default(),
        }
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    fn slot(&self, region: u16, page: u64) -> Option<(&[AtomicU64; 2], &Group)> {
        let region = self.regions.get(usize::from(region))?;
        let page = usize::try_from(page).ok()?;
        region.pages.get(page).zip(region.groups.get(page / GROUP))
    }

    /// The page has these contents, which are not all zero.
    pub fn set(&self, region: u16, page: u64, contents: &[u8]) -> Stored {
        let digest = XxHash3_128::oneshot_with_seed(self.seed, contents);
        let before = self.slot(region, page).is_some_and(|([low, high], group)| {
            // Each page belongs to one stream, and the streams are joined before the root is computed.
            let before = low.load(Ordering::Relaxed) | high.load(Ordering::Relaxed);
            let [new_low, new_high] = halves(digest);
            low.store(new_low, Ordering::Relaxed);
            high.store(new_high, Ordering::Relaxed);
            group.changed.store(true, Ordering::Release);
            before != 0
        });
        Stored { digest, before }
    }

    /// Whether the page has contents that are not all zero.
    pub fn is_known(&self, region: u16, page: u64) -> bool {
        self.slot(region, page).is_some_and(|([low, high], _)| {
            low.load(Ordering::Relaxed) | high.load(Ordering::Relaxed) != 0
        })
    }

    /// The page is all zeros; true if it was not so before.
    pub fn set_zero(&self, region: u16, page: u64) -> bool {
        self.slot(region, page).is_some_and(|([low, high], group)| {
            let was = low.swap(0, Ordering::Relaxed) | high.swap(0, Ordering::Relaxed);
            if was != 0 {
                group.changed.store(true, Ordering::Release);
            }
            was != 0
        })
    }

    /// Does what of the root can be done before everything has arrived: of the pages of a VM it takes milliseconds, which
    /// the pause need not have. Other threads may go on.
    pub fn settle(&self) {
        let _one = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let mut digests = Vec::with_capacity(GROUP * DIGEST_BYTES);
        for region in &self.regions {
            for (group, pages) in region.groups.iter().zip(region.pages.chunks(GROUP)) {
                // Before they are read: what changes meanwhile is looked at again.
                if !group.changed.swap(false, Ordering::AcqRel) {
                    continue;
                }
                digests.clear();
                for half in pages.iter().flatten() {
                    digests.extend_from_slice(&half.load(Ordering::Relaxed).to_le_bytes());
                }
                let digest = XxHash3_128::oneshot_with_seed(self.seed, &digests);
                for (kept, half) in group.digest.iter().zip(halves(digest)) {
                    kept.store(half, Ordering::Relaxed);
                }
            }
        }
    }

    /// The root over all pages.
    pub fn root(&self) -> Root {
        self.settle();
        let mut context = Context::new(&SHA256);
        context.update(b"palanquin memory root v1");
        context.update(&self.seed.to_le_bytes());
        for region in &self.regions {
            context.update(&(region.pages.len() as u64).to_le_bytes());
            for half in region.groups.iter().flat_map(|group| &group.digest) {
                context.update(&half.load(Ordering::Relaxed).to_le_bytes());
            }
        }
        let mut root = [0; 32];
        root.copy_from_slice(context.finish().as_ref());
        Root(root)
    }
}

/// The lower half first.
fn halves(digest: u128) -> [u64; 2] {
    [digest as u64, (digest >> 64) as u64]
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
    fn the_root_is_the_same_however_often_and_by_whomever_it_was_begun() {
        let layout = RamLayout::new(vec![600, 2]).unwrap();
        let (once, often) = (Digests::new(&layout, 7), Digests::new(&layout, 7));
        let page = |n: u64| [n.to_le_bytes(); 512].concat();
        for n in 0..2000 {
            once.set(0, n * 7 % 600, &page(n));
        }
        std::thread::scope(|scope| {
            // As streams do: each its own blocks, and each settles all of them.
            for stream in 0..2 {
                let often = &often;
                scope.spawn(move || {
                    for n in (0..2000).filter(|n| n * 7 % 600 / 256 % 2 == stream) {
                        often.set(0, n * 7 % 600, &page(n));
                        often.settle();
                    }
                });
            }
        });
        assert_eq!(once.root(), often.root());
        assert!(often.set_zero(0, 599) && once.set_zero(0, 599));
        assert_eq!(once.root(), often.root());
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
