//! What must hold in every state.

use std::sync::Arc;

use palanquin_engine::journal::verdict;
use palanquin_engine::message::Verdict;
use palanquin_engine::{DestinationRecord, SourceAction, SourceRecord};

use super::world::{Run, World};

/// Whether ownership was recorded, and not given back since.
fn owns(records: &[DestinationRecord]) -> bool {
    let mut newest_first = records.iter().rev();
    let decides = newest_first.find(|record| !matches!(record, DestinationRecord::Activated));
    matches!(
        decides,
        Some(DestinationRecord::Owned(_) | DestinationRecord::Pulling(_))
    )
}

impl World {
    /// Removes the VM from the source.
    pub(super) fn erase(&mut self) {
        let needs_pages = self
            .destination
            .container
            .as_ref()
            .is_some_and(|c| c.waits && c.version == 0);
        if !owns(&self.destination.records) {
            self.broken = Some("erased before the destination owned the VM durably");
        } else if needs_pages {
            self.broken = Some("erased while the destination needed pages");
        }
        self.source.vm = None;
    }

    /// Lets the VM run on the destination, with all that must be true before.
    pub(super) fn run_there(&mut self) {
        let owned = owns(&self.destination.records);
        let committed = self
            .source
            .records
            .iter()
            .any(|record| matches!(record, SourceRecord::Committed(_)));
        let Some(container) = &mut self.destination.container else {
            return;
        };
        container.run = Run::Running;
        let missing = container.waits && container.version == 0;
        if !owned {
            self.broken = Some("resumed on the destination before its ownership was durable");
        } else if !committed {
            self.broken = Some("resumed on the destination before the commit was durable");
        } else if !self.ran_there && !missing && container.version != self.paused_version {
            self.broken = Some("the destination runs the VM with other memory than was paused");
        }
        self.ran_there = true;
    }

    /// What an action of the source must not come before.
    pub(super) fn check_judged(&mut self, action: &SourceAction) {
        let [first, last] = self.source.judged;
        let law = match action {
            SourceAction::OpenStreams { .. }
            | SourceAction::SendPages { .. }
            | SourceAction::SendStale { .. }
            | SourceAction::SendUrgent { .. }
                if !first =>
            {
                "something of the VM left before its destination was judged"
            }
            SourceAction::Journal(_, SourceRecord::Committed(_)) if !last => {
                "committed before the destination was judged once more"
            }
            _ => return,
        };
        self.broken = Some(law);
    }

    /// The law that is broken here.
    pub(super) fn check(&self) -> Option<&'static str> {
        if self.broken.is_some() {
            return self.broken;
        }
        let runs_here = self.source.vm.as_ref().is_some_and(|vm| vm.running);
        let container = self.destination.container.as_ref();
        let runs_there = container.is_some_and(|c| c.run == Run::Running);
        if runs_here && runs_there {
            return Some("both copies run");
        }
        if container.is_some_and(|c| !c.waits && c.version == 0 && self.ran_there) {
            return Some("the VM sees zeros where its page was");
        }
        let records = &self.destination.records;
        let owned_there = owns(records);
        let owned_here = matches!(
            self.source.records.last(),
            Some(SourceRecord::Ordered(_) | SourceRecord::Aborted(_) | SourceRecord::TakenBack(_))
                | None
        );
        if owned_here && owned_there {
            return Some("both journals say that the VM is theirs");
        }
        if self.source.vm.is_none() {
            // The copy on the destination is all there is.
            match container {
                None => return Some("no copy is left"),
                Some(_) if !owned_there => return Some("the only copy left belongs to nobody"),
                Some(copy) if copy.version == 0 => {
                    return Some("the only copy left lacks a page");
                }
                Some(_) => {}
            }
        }
        if verdict(records, false) == Verdict::Discarded && runs_there {
            return Some("a VM runs that was discarded");
        }
        let taken_back = matches!(self.source.records.last(), Some(SourceRecord::TakenBack(_)));
        if taken_back && !matches!(records.last(), Some(DestinationRecord::Discarded(_))) {
            return Some("taken back without the destination's durable discard");
        }
        if self.source.promised && owned_there {
            return Some("an abort was promised and the VM moved all the same");
        }
        None
    }

    /// Whether this is a good end: exactly one copy, which runs, and nobody has anything left to do.
    pub(super) fn is_good_end(&self) -> bool {
        let runs_here = self.source.vm.as_ref().map(|vm| vm.running);
        let runs_there = self
            .destination
            .container
            .as_ref()
            .map(|c| c.run == Run::Running);
        let one = matches!(
            (runs_here, runs_there),
            (Some(true), None) | (None, Some(true))
        );
        one && self.source.up
            && self.destination.up
            && self.source.engine.is_none()
            && self.destination.engine.is_none()
            && self.destination.recovery.is_empty()
    }

    /// Where both are, for people.
    pub(super) fn summary(&self) -> String {
        let source = self.source.engine.as_ref().map(|s| s.phase());
        let destination = self
            .destination
            .engine
            .as_ref()
            .map(|d| Arc::as_ref(d).phase());
        format!(
            "source {source:?}, VM {:?}, newest record {:?}; destination {destination:?}, container {:?}, newest record {:?}",
            self.source.vm.as_ref().map(|vm| vm.running),
            self.source.records.last().map(name),
            self.destination.container.as_ref().map(|c| c.run),
            self.destination.records.last().map(name),
        )
    }
}

fn name(record: &impl std::fmt::Debug) -> String {
    let text = format!("{record:?}");
    text.split('(').next().unwrap_or_default().to_owned()
}
