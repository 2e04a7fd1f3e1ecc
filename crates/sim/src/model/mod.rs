//! Every state that two engines, two hypervisors, two journals and the connections between them can reach, within bounds.
//!
//! Nothing is modelled but the surroundings: the machines are [`palanquin_engine::Source`] and
//! [`palanquin_engine::Destination`] themselves, cloned at every branch. What an agent does around them is reduced to what
//! decides who may run: durable records, jobs on the hypervisors in their order, control messages and pages in theirs, and
//! a VM of one page.
//!
//! Time is abstract. All calls happen at the origin and all configurable delays are zero, so a deadline is armed or
//! it is not, and whichever is armed may pass. A connection is never found silent: that both ends lose it, each in its
//! own time, is a step of its own.
//!
//! Two things are checked. [`laws`] hold in every state. And from every state a good end (one running copy, nothing
//! of the other left, nobody in doubt) can be reached without any further fault, so that nothing is ever stuck and every
//! doubt ends once both agents and the link are back.
//!
//! States are told apart by 64 bits of SipHash. With `n` states the chance that two of them were taken for one is below
//! `n * n / 2^65`: one in three million for ten million states.

mod destination_side;
mod explore;
mod laws;
mod source_side;
mod step;
mod wire;
mod world;

pub use explore::{Counts, Violation, explore};

use palanquin_engine::strategy::Strategy;

/// How much may go wrong on one path, and which migration it goes wrong in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// The algorithm: [`Strategy::PreCopy`] or [`Strategy::PostCopy`].
    pub strategy: Strategy,
    /// Crashes of the source's agent; whatever is on its way to the disk is there afterwards, or is not.
    pub source_crashes: u8,
    /// Crashes of the destination's agent.
    pub destination_crashes: u8,
    /// Connections that are cut with all that is in flight.
    pub cuts: u8,
    /// Journal writes that are reported as failed, of both sides together; the record is durable or not.
    pub journal_failures: u8,
    /// Jobs on a hypervisor that fail, of both sides together, and instead of them judgements that refuse and evidence that
    /// cannot be had. Resuming on the destination fails until its agent gives up.
    pub vm_failures: u8,
    /// Wishes to abort, on either side.
    pub aborts: u8,
    /// Deadlines that pass though something else could still happen.
    pub early_timers: u8,
    /// Times that the guest writes: each may lead to another round, or to a page of the last one.
    pub writes: u8,
    /// Times that the guest waits for its page, under post-copy.
    pub waits: u8,
}

impl Bounds {
    /// No fault, one write and one page waited for.
    const fn faultless(strategy: Strategy) -> Self {
        Self {
            strategy,
            source_crashes: 0,
            destination_crashes: 0,
            cuts: 0,
            journal_failures: 0,
            vm_failures: 0,
            aborts: 0,
            early_timers: 0,
            writes: 1,
            waits: 1,
        }
    }

    /// What the tests go through, within a minute: agents that die, a cut and a journal that fails; and without crashes
    /// one of everything else.
    pub const fn tested(strategy: Strategy) -> [Self; 2] {
        let faultless = Self::faultless(strategy);
        [
            Self {
                source_crashes: 1,
                destination_crashes: 1,
                cuts: 1,
                journal_failures: 1,
                ..faultless
            },
            Self {
                cuts: 1,
                journal_failures: 1,
                vm_failures: 1,
                aborts: 1,
                early_timers: 1,
                ..faultless
            },
        ]
    }

    /// What takes minutes and gigabytes: two of what costs an agent its memory, and one of everything together.
    pub const fn large(strategy: Strategy) -> [Self; 3] {
        let faultless = Self::faultless(strategy);
        [
            Self {
                source_crashes: 2,
                destination_crashes: 2,
                cuts: 2,
                ..faultless
            },
            Self {
                source_crashes: 1,
                destination_crashes: 1,
                cuts: 1,
                aborts: 1,
                early_timers: 1,
                writes: 2,
                ..faultless
            },
            Self {
                source_crashes: 1,
                destination_crashes: 1,
                cuts: 1,
                journal_failures: 1,
                vm_failures: 1,
                ..faultless
            },
        ]
    }

    /// What seeded defects are looked for in.
    pub const fn seeded(strategy: Strategy) -> Self {
        Self {
            source_crashes: 1,
            destination_crashes: 1,
            cuts: 1,
            ..Self::faultless(strategy)
        }
    }
}

impl std::fmt::Display for Bounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: crashes {} + {}, cuts {}, journal failures {}, failing jobs and refusals {}, aborts {}, early deadlines {}, writes {}, \
             waits {}",
            self.strategy.name(),
            self.source_crashes,
            self.destination_crashes,
            self.cuts,
            self.journal_failures,
            self.vm_failures,
            self.aborts,
            self.early_timers,
            self.writes,
            self.waits,
        )
    }
}
