//! What can be told about a migration while it runs.

use std::time::Duration;

use crate::convergence::Predictor;
use crate::pages::PAGE_BYTES;
use crate::time::Time;

/// Counters of what a driver's streams have sent so far, over the whole migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SentCounters {
    /// Pages sent with their contents, in whatever encoding.
    pub pages_raw: u64,
    /// Those of them sent as what differs from the version before.
    pub pages_delta: u64,
    /// Those of them sent as a reference to an equal page.
    pub pages_duplicate: u64,
    /// Those of them that were compressed.
    pub pages_compressed: u64,
    /// Bytes that those three were shorter than their pages.
    pub saved_bytes: u64,
    /// Pages sent as all zeros.
    pub pages_zero: u64,
    /// Bytes handed to the sockets, encryption and framing included.
    pub wire_bytes: u64,
}

/// The pause in parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DowntimeParts {
    /// Stopping the virtual CPUs.
    pub pause: Duration,
    /// Until the last page was sent.
    pub final_pages: Duration,
    /// Until the destination had loaded everything.
    pub device_state: Duration,
    /// Until the commit record was durable.
    pub commit: Duration,
    /// Until the destination answered that the VM runs.
    pub resume: Duration,
}

impl DowntimeParts {
    /// The whole pause.
    pub fn total(&self) -> Duration {
        self.pause + self.final_pages + self.device_state + self.commit + self.resume
    }
}

/// Progress of a source.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// When the migration began.
    pub began: Time,
    /// Rounds begun.
    pub rounds: u32,
    /// Pages of all rounds before this one.
    pub pages_before: u64,
    /// Pages of this round.
    pub round_pages: u64,
    /// Pages sent more than once.
    pub pages_resent: u64,
    /// What the streams have sent.
    pub sent: SentCounters,
    /// Pause that a switchover now would take.
    pub predicted_downtime: Option<Duration>,
    /// The pause, as far as it is known.
    pub downtime: DowntimeParts,
    /// Smoothed rates.
    pub predictor: Predictor,
    /// Pages left out of a round because they were written again before their turn.
    pub pages_skipped: u64,
    /// Share of its CPU time that the VM gets; 0 before anything was decided, 1 is all.
    pub throttle_share: f64,
    /// Pages that the VM waited for on the destination.
    pub demands: u64,
    /// How long it waited, see [`crate::message::Complete`].
    pub fault_wait_log2_us: Vec<u64>,
    /// Times that both sides came together again after their connection broke.
    pub rejoined: u32,
    /// Whether the pages that arrived after the switchover are those that were sent; absent without such pages.
    pub pulled_verified: Option<bool>,
    notes: Vec<Note>,
    percent: f64,
}

/// Why something was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Rounds begun.
    pub rounds: u32,
    /// One lowercase sentence.
    pub why: String,
}

/// Most notes that are kept.
const NOTES_MAX: usize = 64;

impl Progress {
    /// Nothing done yet.
    pub fn new(began: Time) -> Self {
        Self {
            began,
            ..Self::default()
        }
    }

    /// Pages of this round that are still to be sent.
    pub fn round_remaining_pages(&self) -> u64 {
        let done = (self.sent.pages_raw + self.sent.pages_zero).saturating_sub(self.pages_before);
        self.round_pages.saturating_sub(done)
    }

    /// So many pages of this round are still to be sent, whatever was counted as sent already.
    pub(crate) fn round_left(&mut self, pages: u64) {
        let done = (self.sent.pages_raw + self.sent.pages_zero).saturating_sub(self.pages_before);
        self.round_pages = done.saturating_add(pages);
    }

    /// Counts what the streams have sent, and the share of the work done.
    pub fn sent(&mut self, sent: SentCounters) {
        self.sent = sent;
        let done = (sent.pages_raw + sent.pages_zero) as f64;
        let remaining = self.round_remaining_pages();
        let future = self.predictor.future_bytes(remaining * PAGE_BYTES) / PAGE_BYTES;
        let total = done + (remaining + future) as f64;
        if total > 0.0 {
            // The last percent is the switchover.
            self.percent = self.percent.max((99.0 * done / total).min(99.0));
        }
    }

    /// Why what was decided, oldest first; one for each change of mind, at most 64.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    pub(crate) fn note(&mut self, note: Note) {
        let repeats = self.notes.last().is_some_and(|last| last.why == note.why);
        if !repeats && self.notes.len() < NOTES_MAX {
            self.notes.push(note);
        }
    }

    /// The VM runs on the destination.
    pub fn complete(&mut self) {
        self.percent = 100.0;
    }

    /// Share of the work done, 0 to 100; never less than before.
    pub fn percent(&self) -> f64 {
        self.percent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentage_never_runs_backwards() {
        let mut progress = Progress {
            rounds: 1,
            round_pages: 1000,
            ..Progress::default()
        };
        let mut last = 0.0;
        for pages in [0, 500, 900, 1000] {
            progress.sent(SentCounters {
                pages_raw: pages,
                ..SentCounters::default()
            });
            assert!(progress.percent() >= last);
            last = progress.percent();
        }
        progress.pages_before = 1000;
        progress.round_pages = 800;
        progress.sent(SentCounters {
            pages_raw: 1000,
            ..SentCounters::default()
        });
        assert_eq!(progress.percent(), last);
        assert!(last <= 99.0);
        progress.complete();
        assert_eq!(progress.percent(), 100.0);
    }
}
