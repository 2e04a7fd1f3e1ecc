//! Whether copying leads anywhere: the rules of `auto`.
//!
//! Let `w(t)` be what a guest writes in a time `t`, each page counted once, and `R` what the path carries. `w` grows ever
//! more slowly, since pages are written again (Clark et al., NSDI 2005, measured it as the writable working set). A round
//! that takes `t` leaves `w(t)` behind. From that follows:
//!
//! - While `w(t) < R t`, rounds of plain pre-copy shrink by themselves, and no page may wait that the pause has no room
//!   for: it would have to be sent after all. Pages that are written all the time (Ma et al., ICIA 2010) wait only if they
//!   leave room in the pause; and where rounds with pages waiting leave no less behind, none wait any more.
//! - Once `w(t) >= R t`, the same holds for every shorter time: no later round is shorter, and all that is sent is sent in
//!   vain. Then the migration *rests*: only pages that have not been written for a while are sent. One round says so where
//!   far more is left than was sent; otherwise the last rounds together, if they would not be done by the deadline.
//! - It copies again once the guest writes less than the path carries, watched for about as long as the pause: so short a
//!   time overestimates what longer rounds leave behind. If that is so from the start, resting was a mistake and is not
//!   repeated: the two must not alternate.
//! - Near the pause allowed, chance decides: there pre-copy goes on, for as many rounds as plain pre-copy is given.

use std::collections::VecDeque;
use std::time::Duration;

use super::Boundary;
use crate::convergence::Limits;
use crate::pages::PageSet;

/// Rounds that are judged together.
const WINDOW: usize = 3;
/// Writes for each page sent from which one round says that the path loses.
const OUTRUN: f64 = 1.25;
/// Writes for each page sent below which copying is taken up again.
const CALMED: f64 = 0.95;
/// The same where the VM can be throttled more: that helps sooner than many rounds that hardly shrink.
const THROTTLED: f64 = 0.8;
/// What is left, in pauses, that one lucky round may bring down to one.
const NEAR: u64 = 2;
/// A prediction that exceeds the time left by less than this may be wrong.
const DOUBT: u32 = 2;
/// Shortest time over which a guest is watched.
const WATCH_MIN: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Debug, Hash)]
struct Round {
    sent_bytes: u64,
    /// Left behind, without what was postponed.
    fresh_bytes: u64,
    /// Left behind.
    left_bytes: u64,
}

/// Whether pre-copy goes on, or rests because it would send pages in vain.
#[derive(Clone, Debug, Default, Hash)]
pub(super) struct Pace {
    resting: bool,
    /// Nothing is postponed any more.
    plain: bool,
    /// It rested once although the guest wrote less than the path carries: pre-copy goes on as it is.
    mistaken: bool,
    throttled: bool,
    /// Times that the guest was watched since it rests.
    watches: u32,
    /// The boundary before.
    last: Duration,
    /// Pages that did not go with the round that ends at the next boundary.
    postponed_bytes: u64,
    /// The last rounds.
    rounds: VecDeque<Round>,
    /// What was written since, while it rests.
    watch: Option<(Duration, PageSet)>,
}

impl Pace {
    /// Judges what the last round brought; `stalled` is whether the last ones left no less behind. Gives whether another
    /// way of copying begins: what was left before is no measure for it.
    pub(super) fn boundary(&mut self, at: &Boundary<'_>, limits: &Limits, stalled: bool) -> bool {
        let took = at.elapsed.saturating_sub(self.last);
        self.last = at.elapsed;
        let time_left = limits.deadline.saturating_sub(at.elapsed);
        if self.resting {
            let calmed = self.calmed(at, limits, time_left);
            if calmed {
                self.mistaken |= self.watches == 1 && !self.throttled;
                self.anew();
            }
            return calmed;
        }
        if at.sent_bytes == 0 {
            return false;
        }
        let fresh = at.left.bytes().saturating_sub(self.postponed_bytes);
        self.rounds.push_back(Round {
            sent_bytes: at.sent_bytes,
            fresh_bytes: fresh,
            left_bytes: at.left.bytes(),
        });
        if self.rounds.len() > WINDOW {
            self.rounds.pop_front();
        }
        // A shorter time says nothing: the pause may be as long as this.
        let pause = at.predictor.time_for(at.predictor.pause_bytes(limits));
        let outrun = pause.is_some_and(|pause| took >= pause)
            && fresh as f64 >= at.sent_bytes as f64 * OUTRUN;
        let too_late = || {
            let predicted = self.predicted(at, limits);
            predicted.is_none_or(|predicted| predicted > time_left * DOUBT)
        };
        if (outrun || stalled) && self.postponed_bytes > 0 {
            self.plain = true;
            self.rounds.clear();
            return true;
        }
        let lucky = at.rounds < limits.max_rounds && self.chance(at.predictor.pause_bytes(limits));
        if lucky || self.mistaken || !(outrun || stalled && too_late()) {
            return false;
        }
        self.resting = true;
        self.watches = 0;
        false
    }

    /// Time until what is left fits into the pause, if rounds go on like the last ones.
    fn predicted(&self, at: &Boundary<'_>, limits: &Limits) -> Option<Duration> {
        rest(at, limits, self.ratio()?)
    }

    /// Whether what is left will fit into the pause before the deadline.
    pub(super) fn in_time(&self, at: &Boundary<'_>, limits: &Limits) -> bool {
        let time_left = limits.deadline.saturating_sub(at.elapsed);
        self.predicted(at, limits)
            .is_some_and(|predicted| predicted <= time_left)
    }

    /// Whether the last rounds say that it will not.
    pub(super) fn too_slow(&self, at: &Boundary<'_>, limits: &Limits) -> bool {
        self.rounds.len() == WINDOW && !self.in_time(at, limits)
    }

    /// Notes what the next round leaves out.
    pub(super) fn postpone(&mut self, pages: &PageSet) {
        self.postponed_bytes = pages.bytes();
    }

    /// Whether postponing has not helped.
    pub(super) fn is_plain(&self) -> bool {
        self.plain
    }

    /// Whether sending what is written all the time leads nowhere.
    pub(super) fn rests(&self) -> bool {
        self.resting
    }

    /// Copies again, because something was changed.
    fn anew(&mut self) {
        self.resting = false;
        self.plain = self.mistaken;
        self.rounds.clear();
        self.watch = None;
    }

    /// The VM was throttled: it is watched before pages are sent again.
    pub(super) fn throttled(&mut self) {
        self.throttled = true;
        self.resting = true;
        self.watch = None;
    }

    fn ratio(&self) -> Option<f64> {
        let sum = |bytes: fn(&Round) -> u64| self.rounds.iter().map(bytes).sum::<u64>() as f64;
        let sent = sum(|round| round.sent_bytes);
        (sent > 0.0).then(|| sum(|round| round.fresh_bytes) / sent)
    }

    /// Whether what is left may fit into the pause by chance: there is not much too much, or it goes up and down a lot.
    fn chance(&self, pause_bytes: u64) -> bool {
        let left = || self.rounds.iter().map(|round| round.left_bytes);
        let (least, most) = (left().min().unwrap_or(0), left().max().unwrap_or(0));
        least.saturating_sub(most - least) <= pause_bytes || least <= NEAR * pause_bytes
    }

    /// Looks how much the guest writes in about the time that the pause may take.
    fn calmed(&mut self, at: &Boundary<'_>, limits: &Limits, time_left: Duration) -> bool {
        let none = || PageSet::empty(at.written.layout());
        let Some((since, written)) = &mut self.watch else {
            self.watch = Some((at.elapsed, none()));
            return false;
        };
        written.union(at.written);
        let watched = at.elapsed.saturating_sub(*since);
        let bytes = at.predictor.pause_bytes(limits);
        let wanted = at
            .predictor
            .time_for(bytes)
            .unwrap_or_default()
            .max(WATCH_MIN);
        if watched < wanted {
            return false;
        }
        self.watches += 1;
        let rate = written.bytes() as f64 / watched.as_secs_f64();
        let ratio = rate / (at.predictor.rate_bytes_per_s() as f64).max(1.0);
        self.watch = Some((at.elapsed, none()));
        // Over a long time the same page counts once only: that says too little.
        watched < wanted * 2
            && ratio <= if self.throttled { THROTTLED } else { CALMED }
            && rest(at, limits, ratio).is_some_and(|predicted| predicted <= time_left)
    }
}

/// Time until what is left fits into the pause, where each round leaves this share of what it sends: the sum of the
/// rounds is a geometric series. `None` where they do not shrink.
fn rest(at: &Boundary<'_>, limits: &Limits, ratio: f64) -> Option<Duration> {
    if ratio >= 1.0 {
        return None;
    }
    let excess = at
        .left
        .bytes()
        .saturating_sub(at.predictor.pause_bytes(limits));
    at.predictor
        .time_for((excess as f64 / (1.0 - ratio)) as u64)
}
