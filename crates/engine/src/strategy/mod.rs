//! What to send next, and when to switch over: the algorithms of live migration.
//!
//! | strategy | rounds | the VM is paused for | source |
//! |---|---|---|---|
//! | stop-and-copy | none | everything | Sapuntzakis et al., OSDI 2002 |
//! | pre-copy | all pages, then what the last round wrote | the last round | Clark et al., NSDI 2005 |
//! | improved | the same, but pages that are written all the time wait for the last round | the last round | Ma et al., ICIA 2010 |
//! | post-copy | none | the device state | Hines and Gopalan, VEE 2009 |
//! | hybrid | a few, then the rest after the switchover | the device state | Hines and Gopalan, VEE 2009 |
//! | auto | as pre-copy, as long as rounds shrink; pages wait as under improved where the pause has room for them, see `pace`; then what was allowed | | |
//!
//! A [`Scheduler`] is asked at every boundary of a round. It sees sets and rates, never a page or a clock.

mod hot;
mod pace;
mod stall;

use std::time::Duration;

use minicbor::{Decode, Encode};

use self::hot::HotPages;
use self::pace::Pace;
use self::stall::Stall;
use crate::convergence::{Limits, Predictor};
use crate::pages::PageSet;

/// Most rounds of improved pre-copy (Ma et al.).
const IMPROVED_ROUNDS: u32 = 5;
/// Rounds after which a hybrid migration stops copying in advance: what is still written then is written all the time.
const HYBRID_ROUNDS: u32 = 3;
/// Share of the time allowed after which a migration that does not converge does what it may.
const LATE: f64 = 0.7;
/// Share of the pause that pages may fill which wait for it while rounds still shrink.
const WAITING: f64 = 0.8;
/// Rounds of fewer bytes wait for more, where others wait anyway: 1 MiB.
const TINY_BYTES: u64 = 1 << 20;
/// How long a step of throttling is given.
const THROTTLE_STEP: Duration = Duration::from_secs(1);
/// Steps of throttling, as shares of the VM's CPU time. QEMU's auto-converge goes from 80 % down to 1 %.
const SHARES: [f64; 7] = [0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.02];

/// An algorithm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// Pause, then send everything.
    StopAndCopy,
    /// Rounds until what is left fits into the pause.
    PreCopy,
    /// The same in at most five rounds, without sending again and again what is written all the time.
    Improved,
    /// Run on the destination at once, and fetch the pages there.
    PostCopy,
    /// A few rounds, then as post-copy.
    Hybrid,
    /// What fits the limits.
    #[default]
    Auto,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::StopAndCopy,
        Self::PreCopy,
        Self::Improved,
        Self::PostCopy,
        Self::Hybrid,
        Self::Auto,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::StopAndCopy => "stop-and-copy",
            Self::PreCopy => "pre-copy",
            Self::Improved => "improved",
            Self::PostCopy => "post-copy",
            Self::Hybrid => "hybrid",
            Self::Auto => "auto",
        }
    }

    /// The one of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|strategy| strategy.name() == name)
    }

    /// Whether pages that are written while a round is under way are left out of it.
    pub(crate) fn skips_written(self) -> bool {
        matches!(self, Self::Improved | Self::Hybrid | Self::Auto)
    }
}

/// What a migration may do to the VM when it does not converge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Allowed {
    /// Give it less CPU time for a while.
    pub throttle: bool,
    /// Run it on the destination before all of its pages are there. Then it needs both hosts until they are.
    pub post_copy: bool,
}

/// How far a migration may use post-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum PostCopyUse {
    /// Not at all.
    #[n(0)]
    No,
    /// Where the destination can.
    #[n(1)]
    IfPossible,
    /// It was asked for.
    #[n(2)]
    Required,
}

/// What a scheduler sees when a round has arrived.
#[derive(Debug)]
pub struct Boundary<'a> {
    /// Rounds that have arrived; 0 before the first.
    pub rounds: u32,
    /// Pages written since the last boundary; before the first round all pages that hold data.
    pub written: &'a PageSet,
    /// Pages whose newest version has not been sent: `written`, and what was left out before.
    pub left: &'a PageSet,
    /// Bytes of pages sent since the last boundary.
    pub sent_bytes: u64,
    /// Time since the migration began.
    pub elapsed: Duration,
    /// Rates so far.
    pub predictor: &'a Predictor,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Another round, without these pages.
    Round {
        /// They wait for the last round.
        postponed: PageSet,
    },
    /// Give the VM this share of its CPU time, then another round without these pages.
    Throttle {
        /// Above 0, at most 1.
        share: f64,
        /// They wait for the last round.
        postponed: PageSet,
    },
    /// Pause, and send what is left.
    Switchover,
    /// Pause, and send what is left once the VM runs on the destination.
    PostCopy,
    /// Give up.
    NotConverging,
}

/// A decision, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What to do.
    pub next: Next,
    /// Why, one lowercase sentence.
    pub why: String,
}

/// Decides at every boundary of a round.
#[derive(Clone, Debug, Hash)]
pub struct Scheduler {
    strategy: Strategy,
    limits: Limits,
    /// Whether the destination is ready for post-copy.
    post_copy: bool,
    hot: HotPages,
    stall: Stall,
    pace: Pace,
    /// Steps of throttling taken.
    throttled: usize,
    throttle_works: bool,
    throttled_at: Duration,
    /// Whether a round was cut short because of the time.
    cut: bool,
}

impl Scheduler {
    /// For a migration.
    pub fn new(strategy: Strategy, limits: Limits) -> Self {
        Self {
            strategy,
            limits,
            post_copy: false,
            hot: HotPages::default(),
            stall: Stall::default(),
            pace: Pace::default(),
            throttled: 0,
            throttle_works: true,
            throttled_at: Duration::ZERO,
            cut: false,
        }
    }

    /// The algorithm.
    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// How far it may use post-copy.
    pub fn post_copy_use(&self) -> PostCopyUse {
        match self.strategy {
            Strategy::PostCopy | Strategy::Hybrid => PostCopyUse::Required,
            Strategy::Auto if self.limits.allowed.post_copy => PostCopyUse::IfPossible,
            _ => PostCopyUse::No,
        }
    }

    /// Whether the destination is ready for post-copy; it is not until this is said.
    pub fn post_copy_ready(&mut self, ready: bool) {
        self.post_copy = ready;
    }

    /// The VM can't be throttled.
    pub fn throttle_failed(&mut self) {
        self.throttle_works = false;
    }

    /// Whether the VM is throttled.
    pub fn is_throttled(&self) -> bool {
        self.throttled > 0
    }

    /// Whether the round under way ends now, because time is running out and something else may be done. Its other pages
    /// are left at the boundary that follows. True once at most: more short rounds would not help.
    pub fn cuts_round(&mut self, elapsed: Duration) -> bool {
        let post_copy = self.post_copy && self.limits.allowed.post_copy;
        let other = post_copy || self.may_throttle() && !self.is_throttled();
        let cuts = self.strategy == Strategy::Auto && !self.cut && other && self.late(elapsed);
        self.cut |= cuts;
        cuts
    }

    /// Decides.
    pub fn decide(&mut self, at: &Boundary<'_>) -> Decision {
        let left = at.left.bytes();
        let fits = at.rounds > 0 && at.predictor.fits(&self.limits, left);
        if at.rounds > 0 {
            self.stall.round(left);
            let stalled = self.stall.stalled();
            if self.strategy == Strategy::Auto && self.pace.boundary(at, &self.limits, stalled) {
                self.stall.forget();
            }
        }
        match self.strategy {
            Strategy::StopAndCopy => decision(Next::Switchover, "stop-and-copy was asked for"),
            Strategy::PostCopy => decision(Next::PostCopy, "post-copy was asked for"),
            _ if at.rounds == 0 => decision(
                self.round(at),
                "the first round sends all pages that hold data",
            ),
            _ if fits => {
                let why = format!(
                    "what is left ({} MiB) moves within the pause allowed ({} ms)",
                    left >> 20,
                    self.limits.max_downtime.as_millis()
                );
                decision(Next::Switchover, why)
            }
            Strategy::PreCopy => self.pre_copy(at),
            Strategy::Improved => self.improved(at),
            Strategy::Hybrid => self.hybrid(at),
            Strategy::Auto => self.auto(at),
        }
    }

    /// Pages that were written in two rounds in a row would be sent in vain.
    fn round(&mut self, at: &Boundary<'_>) -> Next {
        let none = PageSet::empty(at.written.layout());
        if !self.strategy.skips_written() || at.rounds == 0 {
            return Next::Round { postponed: none };
        }
        let mut postponed = self.hot.round(at.elapsed, at.written, at.left);
        if self.strategy == Strategy::Auto {
            let pause = at.predictor.pause_bytes(&self.limits) as f64;
            if self.pace.rests() {
                postponed = self.hot.busy(at.left);
                // One round of next to nothing would follow the other.
                if at.left.bytes() - postponed.bytes() < TINY_BYTES {
                    postponed = at.left.clone();
                }
            } else if self.pace.is_plain() || postponed.bytes() as f64 > pause * WAITING {
                postponed = none;
            }
            self.pace.postpone(&postponed);
        }
        Next::Round { postponed }
    }

    fn pre_copy(&mut self, at: &Boundary<'_>) -> Decision {
        if at.rounds >= self.limits.max_rounds {
            return self.give_up(at);
        }
        decision(
            self.round(at),
            "what is left would pause the VM for too long",
        )
    }

    fn improved(&mut self, at: &Boundary<'_>) -> Decision {
        // The last of the rounds is the one that is sent while the VM is paused.
        if at.rounds
            >= IMPROVED_ROUNDS
                .min(self.limits.max_rounds)
                .saturating_sub(1)
        {
            return self.give_up(at);
        }
        let next = self.round(at);
        if matches!(&next, Next::Round { postponed } if postponed == at.left) {
            // Nothing but what waits for the last round.
            return self.give_up(at);
        }
        decision(
            next,
            "pages written in two rounds in a row wait for the last round",
        )
    }

    fn hybrid(&mut self, at: &Boundary<'_>) -> Decision {
        let enough = at.rounds >= HYBRID_ROUNDS.min(self.limits.max_rounds);
        if enough || self.stall.stalled() && self.stall.at_minimum() {
            let why = format!(
                "{} rounds have sent what rests; {} MiB that the guest goes on writing follow after the switchover",
                at.rounds,
                at.left.bytes() >> 20
            );
            return decision(Next::PostCopy, why);
        }
        decision(self.round(at), "another round still leaves less behind")
    }

    fn auto(&mut self, at: &Boundary<'_>) -> Decision {
        let late = self.late(at.elapsed);
        let post_copy = self.post_copy && self.limits.allowed.post_copy;
        let other = post_copy || self.may_throttle();
        let too_slow = other && self.pace.too_slow(at, &self.limits);
        if !late && !too_slow && !self.pace.rests() {
            return decision(self.round(at), "each round leaves less behind");
        }
        let because = if late {
            "the time allowed is running out"
        } else if too_slow {
            "rounds would not be done within the time allowed"
        } else {
            "rounds do not leave less behind any more"
        };
        // Throttling harms the VM less than depending on two hosts: it comes first, as long as there is time for it.
        let needed = self.pace.rests() || !self.pace.in_time(at, &self.limits);
        let throttle = needed && self.may_throttle() && !(late && post_copy);
        if throttle && let Some(share) = SHARES.get(self.throttled) {
            if self.throttled > 0 && at.elapsed < self.throttled_at + THROTTLE_STEP {
                return decision(self.round(at), "waiting for what throttling brings");
            }
            self.throttled += 1;
            self.throttled_at = at.elapsed;
            self.stall.forget();
            self.pace.throttled();
            let Next::Round { postponed } = self.round(at) else {
                return self.give_up(at);
            };
            let next = Next::Throttle {
                share: *share,
                postponed,
            };
            let why = format!(
                "{because}: the VM gets {:.0} % of its CPU time",
                share * 100.0
            );
            return decision(next, why);
        }
        if post_copy && (late || self.stall.at_minimum()) {
            let why = format!("{because}: post-copy was allowed");
            return decision(Next::PostCopy, why);
        }
        decision(
            self.round(at),
            format!("{because}; trying on until the deadline"),
        )
    }

    fn may_throttle(&self) -> bool {
        self.limits.allowed.throttle && self.throttle_works
    }

    fn late(&self, elapsed: Duration) -> bool {
        elapsed.as_secs_f64() >= self.limits.deadline.as_secs_f64() * LATE
    }

    fn give_up(&self, at: &Boundary<'_>) -> Decision {
        let why = format!(
            "after {} rounds a switchover would still pause the VM for about {} ms",
            at.rounds,
            at.predictor
                .predicted_downtime(at.left.bytes())
                .unwrap_or_default()
                .as_millis()
        );
        decision(Next::NotConverging, why)
    }
}

fn decision(next: Next, why: impl Into<String>) -> Decision {
    Decision {
        next,
        why: why.into(),
    }
}

#[cfg(test)]
mod tests;
