//! States of a source, named for what they await.

use super::action::Op;
use super::judging::LastJudgement;
use crate::ids::{Root, Sha256};
use crate::message::{Accepted, Demand};
use crate::pages::PageSet;
use crate::time::Time;

#[derive(Clone, Debug, Hash)]
pub(super) enum State {
    Ordering(Op),
    Connecting,
    Greeting,
    /// Credentials are being made.
    Vouching(Op),
    Offering,
    /// The destination has a container, and its evidence, which is not in here any more, is being judged.
    Judging {
        op: Op,
        accepted: Accepted,
    },
    OpeningStreams {
        op: Op,
        opened: bool,
        ready: bool,
    },
    Arming(Op),
    Collecting(Op),
    Sending(Sending),
    /// Nothing is worth sending now; the deadline ends it.
    Calm,
    /// The connection broke in one of the four before this; the VM runs on here.
    Redialling(Box<Redialling>),
    Pausing {
        op: Op,
        pending: PageSet,
        began: Time,
        post_copy: bool,
    },
    Draining(Draining),
    AwaitReady {
        save: Op,
        root_op: Op,
        root: Option<Root>,
        theirs: Option<Root>,
        judged: LastJudgement,
    },
    Committing(Op),
    AwaitRunning,
    /// Post-copy: the VM runs on the destination and gets its pages.
    Serving,
    /// Post-copy, after a reconnection: until streams are open and it is known which pages are there.
    Rejoining {
        open: Option<Op>,
        ready: bool,
        find: Option<Op>,
        present: PageSet,
        all_present: bool,
        /// Pages that the VM waits for already.
        demands: Vec<Demand>,
    },
    /// All pages have arrived; whether they are the ones that were sent.
    Verifying {
        op: Op,
        theirs: Option<Root>,
    },
    InDoubt(Doubt),
    Releasing(Op),
    Erasing {
        op: Op,
    },
    Closing(Op),
    /// The step failed; it is tried again at the deadline.
    Retrying(Step),
    TakingBack(Op),
    Resuming {
        op: Option<Op>,
        attempts: u32,
        after: AfterResume,
    },
    RecordingAbort {
        op: Op,
    },
    Ended,
}

/// A round under way.
#[derive(Clone, Debug, Hash)]
pub(super) struct Sending {
    pub(super) step: SendingStep,
    /// Pages of the round that were given to the streams. Whether they have arrived the destination knows.
    pub(super) given: PageSet,
    /// Pages of the round that were not given to the streams yet.
    pub(super) rest: PageSet,
    /// Where the next slice begins.
    pub(super) cursor: (usize, u64),
}

/// Dialling again before the VM is paused.
#[derive(Clone, Debug, Hash)]
pub(super) struct Redialling {
    pub(super) link: Link,
    pub(super) work: Interrupted,
    /// When it is given up.
    pub(super) until: Time,
}

/// How far the new connection is.
#[derive(Clone, Debug, Hash)]
pub(super) enum Link {
    /// Until the deadline, then dial.
    Waiting,
    Dialling,
    Greeting,
    Asked,
    /// Until the streams are open and it is known what has arrived.
    Opening {
        open: Option<Op>,
        ready: bool,
        /// Whole rounds that have arrived.
        rounds: u32,
        /// Pages of the round after them that have.
        arrived: PageSet,
        all_told: bool,
    },
}

/// What was under way when the connection broke.
#[derive(Clone, Debug, Hash)]
pub(super) enum Interrupted {
    /// It goes on meanwhile.
    Arming(Op),
    Armed,
    /// It goes on meanwhile: what it finds is named only once.
    Collecting(Op),
    Collected(PageSet),
    Round {
        given: PageSet,
        rest: PageSet,
    },
    Calm,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum SendingStep {
    /// Looking which of the rest were written again.
    Peeking(Op),
    /// A slice; true for the last.
    Slice(Op, bool),
    /// All is sent; until the destination says so too.
    Acknowledged,
}

/// The VM is paused: its last pages and its device state are collected and sent side by side.
#[derive(Clone, Debug, Hash)]
pub(super) struct Draining {
    pub(super) save: Op,
    pub(super) saved: Option<(u64, Sha256)>,
    pub(super) pages: DrainingPages,
    /// Whether the last pages are sent after the switchover.
    pub(super) post_copy: bool,
    /// What devices look into while they are loaded, until it is sent.
    pub(super) looked_into: Option<PageSet>,
    /// Sending that.
    pub(super) ahead: Option<Op>,
}

#[derive(Clone, Debug, Hash)]
pub(super) enum DrainingPages {
    Collecting {
        op: Op,
        pending: PageSet,
    },
    Sending(Op),
    Sent,
    /// The destination loads meanwhile. Saving the device state may write guest memory: look once more.
    Rechecking(Op),
    Last(Op),
    Ended,
}

#[derive(Clone, Debug, Hash)]
pub(super) enum Doubt {
    /// Until the deadline, then dial.
    Waiting,
    Dialling,
    Greeting,
    Asked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum AfterResume {
    RecordAbort,
    Finish,
}

/// A step after the point of no return.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    Release,
    Erase,
    Close,
}
