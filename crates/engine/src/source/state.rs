//! States of a source, named for what they await.

use super::action::Op;
use crate::ids::{Root, Sha256};
use crate::message::Seal;
use crate::pages::PageSet;
use crate::time::Time;

#[derive(Debug)]
pub(super) enum State {
    Ordering(Op),
    Connecting,
    Greeting,
    Offering,
    OpeningStreams {
        op: Op,
        opened: bool,
        ready: bool,
    },
    Arming(Op),
    Collecting(Op),
    Sending(Option<Op>),
    Pausing {
        op: Op,
        pending: PageSet,
        began: Time,
    },
    Draining(Draining),
    Sealing {
        send: Option<Op>,
        root_op: Op,
        root: Option<Root>,
        seal: Seal,
    },
    AwaitReady {
        root_op: Op,
        root: Option<Root>,
        theirs: Option<Root>,
    },
    Committing(Op),
    AwaitRunning,
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

/// The VM is paused: its last pages and its device state are collected side by side.
#[derive(Debug)]
pub(super) struct Draining {
    pub(super) save: Option<Op>,
    pub(super) saved: Option<(u64, Sha256)>,
    pub(super) pages: DrainingPages,
}

#[derive(Debug)]
pub(super) enum DrainingPages {
    Collecting {
        op: Op,
        pending: PageSet,
    },
    Sending(Op),
    Sent,
    /// Saving the device state may write guest memory: look once more.
    Rechecking(Op),
    Last(Op),
}

#[derive(Debug)]
pub(super) enum Doubt {
    /// Until the deadline, then dial.
    Waiting,
    Dialling,
    Greeting,
    Asked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AfterResume {
    RecordAbort,
    Finish,
}

/// A step after the point of no return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Release,
    Erase,
    Close,
}
