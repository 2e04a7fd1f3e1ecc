//! Post-copy: the VM runs on the destination before all of its pages are there.
//!
//! The source stays paused and serves: pages that the VM waits for first, with their neighbours (Hines and Gopalan, VEE
//! 2009, "prepaging"), then all others, from where the last access was. It can never be resumed any more. A lost
//! connection is made again, and the destination tells which pages it has; both agents may restart on the way.

use std::collections::BTreeSet;

use super::{Op, RoundMark, Source, SourceAction, State};
use crate::ids::Root;
use crate::message::{Complete, Demand, Message, Present, Reason, Rejoin};
use crate::pages::{BLOCK_PAGES, PageSet};
use crate::time::Time;

/// Pages sent at once while nobody waits for them: 16 MiB, so that the streams never have much before them.
const SLICE_PAGES: u64 = 4096;
/// Most pages that are asked for and not given to the socket yet: a destination has as many as its VM has virtual CPUs.
const DEMANDS_MAX: usize = 4096;
/// Pages sent along with one that the VM waits for, aligned: 64 KiB.
const NEIGHBOURS: u64 = 16;
/// The same before it runs, when it is its devices that wait, for one page after the other, and the VM with them: 16 KiB.
/// They look at few places, and what nobody asked for delays the next that is.
const NEIGHBOURS_BEFORE: u64 = 4;

/// What is still to be sent.
#[derive(Clone, Debug, Hash)]
pub(super) struct PostCopy {
    /// All pages that the destination did not have at the switchover.
    pub(super) all: PageSet,
    /// Those that were not given to the streams yet.
    pub(super) rest: PageSet,
    cursor: (usize, u64),
    push: Option<Op>,
    urgent: BTreeSet<Op>,
    /// The end of all pages was given to the streams.
    ended: bool,
    /// The destination has said that the VM runs.
    pub(super) runs: bool,
}

impl PostCopy {
    pub(super) fn new(all: PageSet) -> Self {
        Self {
            rest: all.clone(),
            all,
            cursor: (0, 0),
            push: None,
            urgent: BTreeSet::new(),
            ended: false,
            runs: false,
        }
    }

    /// These pages are sent with the last round after all.
    pub(super) fn sent_before(&mut self, pages: &PageSet) {
        self.all.subtract(pages);
        self.rest.subtract(pages);
    }

    /// Whether this is one of ours.
    pub(super) fn is_current(&self, op: Op) -> bool {
        self.push == Some(op) || self.urgent.contains(&op)
    }

    fn interrupted(&mut self) {
        self.push = None;
        self.urgent.clear();
        self.ended = false;
    }
}

impl Source {
    /// The VM waits for a page.
    pub(super) fn demanded(&mut self, now: Time, demand: Demand) {
        if let State::Rejoining { demands, .. } = &mut self.state {
            // The streams for the answer are not known to be open yet.
            if demands.len() < DEMANDS_MAX {
                demands.push(demand);
            }
            return;
        }
        let op = self.op();
        let Some(post_copy) = &mut self.post_copy else {
            return;
        };
        let region = usize::from(demand.region);
        if demand.page >= post_copy.rest.layout().pages(region) || post_copy.ended {
            // What was asked for after the end is on its way already.
            return;
        }
        if post_copy.urgent.len() >= DEMANDS_MAX {
            let what = "it asks for pages and does not take them";
            if self.may_turn_back() {
                return self.misbehaved(now, what);
            }
            return self.connection_lost(now, Reason::new("peer-misbehaved", what));
        }
        let neighbours = if post_copy.runs {
            NEIGHBOURS
        } else {
            NEIGHBOURS_BEFORE
        };
        let first = demand.page - demand.page % neighbours;
        let mut block = post_copy
            .rest
            .take_within_block(demand.region, first..first + neighbours);
        // Also one that holds no data, or that was sent: it may be behind others on its stream.
        block.insert(demand.page);
        post_copy.cursor = (region, demand.page / BLOCK_PAGES);
        post_copy.urgent.insert(op);
        self.progress.demands += 1;
        self.actions
            .push_back(SourceAction::SendUrgent { op, block });
    }

    /// The VM runs on the destination.
    pub(super) fn serve(&mut self) {
        self.deadline = None;
        self.state = State::Serving;
        if let Some(post_copy) = &mut self.post_copy {
            post_copy.runs = true;
        }
        let rest = self.post_copy.as_ref().map(|post| post.rest.clone());
        if let Some(rest) = rest {
            self.progress.pages_before += self.progress.round_pages;
            self.progress.round_pages = rest.len();
        }
        self.push();
    }

    /// Gives the streams their next pages, or the end.
    fn push(&mut self) {
        let op = self.op();
        let round = self.progress.rounds + 1;
        let Some(post_copy) = &mut self.post_copy else {
            return;
        };
        if post_copy.push.is_some() || post_copy.ended {
            return;
        }
        let (pages, cursor) = post_copy.rest.take(post_copy.cursor, SLICE_PAGES);
        post_copy.cursor = cursor;
        post_copy.push = Some(op);
        post_copy.ended = post_copy.rest.is_empty();
        let then = if post_copy.ended {
            RoundMark::Pushed
        } else {
            RoundMark::None
        };
        self.actions.push_back(SourceAction::SendPages {
            op,
            pages,
            round,
            then,
        });
    }

    /// The streams have sent what they were given.
    pub(super) fn post_copy_sent(&mut self, op: Op) {
        let Some(post_copy) = &mut self.post_copy else {
            return;
        };
        post_copy.urgent.remove(&op);
        if post_copy.push == Some(op) {
            post_copy.push = None;
            if matches!(self.state, State::Serving) {
                self.push();
            }
        }
    }

    /// All pages have arrived.
    pub(super) fn completed(&mut self, complete: Complete) {
        self.progress.fault_wait_log2_us = complete.fault_wait_log2_us;
        let op = self.op();
        self.state = State::Verifying {
            op,
            theirs: complete.root,
        };
        self.actions.push_back(SourceAction::ComputePulledRoot(op));
    }

    /// Whether what arrived is what was sent; the VM runs there in any case.
    pub(super) fn verified(&mut self, theirs: Option<Root>, ours: Option<Root>) {
        match (ours, theirs) {
            (Some(ours), Some(theirs)) if ours == theirs => {
                self.progress.pulled_verified = Some(true);
            }
            (Some(_), Some(_)) => {
                self.progress.pulled_verified = Some(false);
                self.note(
                    "the pages that arrived after the switchover are not those that were sent",
                );
            }
            _ => {
                self.progress.pulled_verified = Some(false);
                self.note(
                    "an agent was restarted: pages sent after the switchover could not be compared",
                );
            }
        }
        self.release(self.commit_epoch());
    }

    /// The destination runs the VM and has a new connection with us.
    pub(super) fn rejoin(&mut self, now: Time, rejoin: Rejoin) {
        // Without the hypervisor nothing can be served.
        let Some(layout) = self.layout.clone().filter(|_| !self.vm_gone) else {
            return self.lose_pages(now);
        };
        self.told_pulling = true;
        let open = self.op();
        self.actions.push_back(SourceAction::OpenStreams {
            op: open,
            streams: rejoin.streams,
            urgent: true,
            secret: rejoin.stream_secret,
        });
        // After a restart it is not known what was sent: all that holds data counts.
        let find = self.post_copy.is_none().then(|| self.op());
        if let Some(op) = find {
            self.actions.push_back(SourceAction::FindData(op));
        }
        if let Some(post_copy) = &mut self.post_copy {
            post_copy.interrupted();
            post_copy.runs = true;
        }
        self.redials = 0;
        self.deadline = Some(now + self.config.timing.handshake);
        self.state = State::Rejoining {
            open: Some(open),
            ready: false,
            find,
            present: PageSet::empty(&layout),
            all_present: false,
            demands: Vec::new(),
        };
    }

    pub(super) fn found_data(&mut self, pages: PageSet) {
        self.post_copy = Some(PostCopy::new(pages));
    }

    /// Pages that are on the destination.
    pub(super) fn told_present(&mut self, now: Time, told: &Present) {
        let State::Rejoining {
            present,
            all_present,
            ..
        } = &mut self.state
        else {
            return;
        };
        let region = usize::from(told.region);
        if *all_present || !present.insert_bits(region, told.first_page, &told.bits) {
            let what = "the destination named pages that the VM does not have";
            return self.doubt(now, Reason::new("peer-misbehaved", what));
        }
        *all_present = told.last;
        self.rejoined(now);
    }

    /// Goes on where streams, pages and the destination are ready.
    pub(super) fn rejoined(&mut self, now: Time) {
        let State::Rejoining {
            open: None,
            ready: true,
            find: None,
            present,
            all_present: true,
            demands,
        } = &mut self.state
        else {
            return;
        };
        let present = present.clone();
        let demands = std::mem::take(demands);
        if let Some(post_copy) = &mut self.post_copy {
            post_copy.rest = post_copy.all.clone();
            post_copy.rest.subtract(&present);
        }
        self.reason = None;
        self.progress.rejoined += 1;
        self.note("connected again; going on with the pages that are missing");
        self.state = State::Serving;
        for demand in demands {
            self.demanded(now, demand);
        }
        self.serve();
    }

    /// The VM's last pages are gone with its hypervisor here. It runs on the destination until it touches one.
    pub(super) fn lose_pages(&mut self, now: Time) {
        self.pages_lost = true;
        let what = "the hypervisor on the source ended before all pages had been fetched";
        let reason = Reason::new("pages-lost", what);
        self.send(now, Message::Abort(reason.clone()));
        self.reason = Some(reason);
        self.erase();
    }
}
