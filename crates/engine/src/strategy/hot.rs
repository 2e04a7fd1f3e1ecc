//! Pages that are written all the time.

use std::time::Duration;

use crate::pages::PageSet;

/// Time without a write after which a page does not wait any more.
const WINDOW: Duration = Duration::from_secs(2);

/// The bitmaps of Ma et al. (ICIA 2010): `TO_SEND` are the pages written in the last round; those among them that were
/// written in the round before too go to `TO_SEND_LAST` and wait for the last round. (`TO_SKIP`, pages that are written
/// again before their turn comes, is looked up while a round is under way.)
///
/// One thing is ours: a page leaves `TO_SEND_LAST` when it is not written for [`WINDOW`]. Otherwise every page that was
/// busy once would lengthen the pause. A round is no measure for that: once all busy pages wait, rounds are short.
#[derive(Clone, Debug, Default, Hash)]
pub(super) struct HotPages {
    before: Option<PageSet>,
    last: Option<PageSet>,
    /// Pages written since this time.
    seen: Option<(Duration, PageSet)>,
    /// Pages written in the [`WINDOW`] before.
    earlier: Option<PageSet>,
}

impl HotPages {
    /// Notes what was written until `now`; gives the pages of `left` that wait.
    pub(super) fn round(&mut self, now: Duration, written: &PageSet, left: &PageSet) -> PageSet {
        let (since, seen) = self
            .seen
            .get_or_insert_with(|| (now, PageSet::empty(written.layout())));
        seen.union(written);
        if now.saturating_sub(*since) >= WINDOW {
            if let Some(last) = &mut self.last {
                last.intersect(seen);
            }
            let seen = std::mem::replace(seen, PageSet::empty(written.layout()));
            self.earlier = Some(seen);
            *since = now;
        }
        let mut waiting = written.clone();
        match &self.before {
            Some(before) => waiting.intersect(before),
            None => waiting = PageSet::empty(written.layout()),
        }
        if let Some(last) = &self.last {
            waiting.union(last);
        }
        self.before = Some(written.clone());
        self.last = Some(waiting.clone());
        waiting.intersect(left);
        waiting
    }

    /// The pages of `left` that were written within the last [`WINDOW`], or not long before.
    pub(super) fn busy(&self, left: &PageSet) -> PageSet {
        let mut busy = PageSet::empty(left.layout());
        let seen = self.seen.as_ref().map(|(_, seen)| seen);
        for written in seen.into_iter().chain(&self.earlier) {
            busy.union(written);
        }
        busy.intersect(left);
        busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::RamLayout;

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::empty(&RamLayout::new(vec![100]).unwrap());
        for &page in pages {
            set.insert(0, page..page + 1);
        }
        set
    }

    #[test]
    fn a_page_waits_from_its_second_round_in_a_row_until_it_is_spared_for_long() {
        let mut hot = HotPages::default();
        let mut round = |seconds, pages: &[u64]| {
            let now = Duration::from_secs(seconds);
            hot.round(now, &set(pages), &set(&[1, 2, 3, 4]))
        };
        assert_eq!(round(0, &[1, 2]), set(&[]));
        assert_eq!(round(1, &[2, 3]), set(&[2]));
        assert_eq!(round(1, &[3, 4]), set(&[2, 3]));
        assert_eq!(round(2, &[3]), set(&[2, 3]));
        assert_eq!(round(3, &[3]), set(&[2, 3]));
        assert_eq!(round(4, &[3]), set(&[3]));
    }

    #[test]
    fn only_what_is_left_waits() {
        let mut hot = HotPages::default();
        hot.round(Duration::ZERO, &set(&[1]), &set(&[1]));
        assert_eq!(hot.round(Duration::ZERO, &set(&[1]), &set(&[])), set(&[]));
    }
}
