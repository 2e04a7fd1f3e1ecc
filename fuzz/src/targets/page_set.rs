//! Sets of pages, compared with a plain set of numbers; among them the form in which they travel.

use std::collections::BTreeSet;

use arbitrary::{Result, Unstructured};
use palanquin_engine::pages::{BLOCK_PAGES, PageSet, RamLayout};

use crate::entry::Target;

/// Any sequence of what can be done with a set.
pub(crate) const PAGE_SET: Target = Target::new(
    "page-set",
    |data| {
        let _ = run(data);
    },
    || {
        let mut seeds: Vec<_> = (0..8).map(|kind| vec![kind; 60]).collect();
        seeds.push((0..=255).collect());
        seeds
    },
);

const PAGES: [u64; 2] = [700, 65];

fn read(set: &PageSet) -> BTreeSet<(usize, u64)> {
    let pages = |block: palanquin_engine::pages::Block| {
        let runs = block.runs().flatten().collect::<Vec<_>>();
        let region = usize::from(block.region);
        runs.into_iter()
            .map(move |page| (region, block.first_page() + page as u64))
    };
    set.blocks().flat_map(pages).collect()
}

fn run(data: &[u8]) -> Result<()> {
    let mut u = Unstructured::new(data);
    let layout = RamLayout::new(PAGES.to_vec()).expect("a layout");
    let (mut set, mut model) = (PageSet::empty(&layout), BTreeSet::new());
    let (mut other, mut other_model) = (PageSet::empty(&layout), BTreeSet::new());
    let mut cursor = (0, 0);
    while !u.is_empty() {
        let region = u.int_in_range(0..=2_usize)?;
        let last = PAGES.get(region).copied().unwrap_or(0);
        let page = |u: &mut Unstructured<'_>| -> Result<u64> {
            if u.ratio(1, 16)? {
                u.arbitrary()
            } else {
                u.int_in_range(0..=720)
            }
        };
        match u.int_in_range(0..=9)? {
            0 | 1 => {
                let (from, to) = (page(&mut u)?, page(&mut u)?);
                set.insert(region, from..to);
                model.extend((from..to.min(last)).map(|page| (region, page)));
            }
            2 => {
                let first = page(&mut u)?;
                let bits = u.bytes((u.len() / 2).min(24))?;
                let fits = set.insert_bits(region, first, bits);
                let mut all_fit = true;
                for (at, byte) in (0_u64..).zip(bits) {
                    for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                        let page = first.checked_add(at * 8 + bit);
                        match page.filter(|page| *page < last) {
                            Some(page) => drop(model.insert((region, page))),
                            None => all_fit = false,
                        }
                    }
                }
                assert_eq!(fits, all_fit);
            }
            3 => {
                // As a set travels: in pieces, each from a multiple of 64 on.
                let step = 64 * u.int_in_range(1..=4_u64)?;
                let mut copy = PageSet::empty(&layout);
                for (region, pages) in PAGES.into_iter().enumerate() {
                    for first in (0..pages).step_by(step as usize) {
                        let bits = set.bits(region, first, step as usize / 8);
                        assert!(bits.len() <= step as usize / 8);
                        assert!(copy.insert_bits(region, first, &bits));
                    }
                }
                assert_eq!(copy, set);
                let _ = set.bits(region, page(&mut u)?, u.arbitrary()?);
            }
            4 => {
                let wanted = u.int_in_range(0..=400)?;
                let before = set.len();
                let (taken, next) = set.take(cursor, wanted);
                let taken_model = read(&taken);
                assert!(taken.len() >= wanted.min(before));
                assert!(taken_model.is_subset(&model));
                model.retain(|page| !taken_model.contains(page));
                cursor = next;
            }
            5 => {
                let first = page(&mut u)?.min(1 << 40);
                let first = first - first % 16;
                let pages = first..first + 16;
                let region = u16::try_from(region).expect("small");
                let block = set.take_within_block(region, pages.clone());
                for page in pages {
                    let was = model.remove(&(region.into(), page));
                    // A page beyond what a block's number can say is in no set.
                    assert_eq!(block.names(region, page), was);
                }
            }
            6 => {
                std::mem::swap(&mut set, &mut other);
                std::mem::swap(&mut model, &mut other_model);
            }
            7 => {
                set.union(&other);
                model.extend(&other_model);
            }
            8 => {
                set.subtract(&other);
                model.retain(|page| !other_model.contains(page));
            }
            _ => {
                assert_eq!(
                    set.count_common(&other),
                    model.intersection(&other_model).count() as u64
                );
                if u.arbitrary()? {
                    set.intersect(&other);
                    model.retain(|page| other_model.contains(page));
                }
                cursor = (u.int_in_range(0..=3)?, page(&mut u)? / BLOCK_PAGES);
            }
        }
        assert_eq!(read(&set), model);
        assert_eq!(set.len(), model.len() as u64);
        assert_eq!(set.is_empty(), model.is_empty());
        let probe = page(&mut u)?;
        assert_eq!(
            set.contains(region, probe),
            model.contains(&(region, probe))
        );
    }
    Ok(())
}
