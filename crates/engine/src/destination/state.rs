//! States of a destination, named for what they await.

use super::action::Op;
use crate::ids::Root;
use crate::message::{Offer, Seal};
use crate::time::Time;

/// How far the device state is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Load {
    NotYet,
    Loading(Op),
    Loaded,
}

/// How far the evidence is that the source asks for when it begins to pause the VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Attest {
    /// It has not asked.
    NotYet,
    Attesting(Op),
    Attested(Vec<u8>),
}

#[derive(Clone, Debug, Hash)]
pub(super) enum State {
    Greeting,
    AwaitOffer,
    Consulting(Box<Offer>),
    Recording {
        op: Op,
        offer: Box<Offer>,
    },
    Reserving {
        op: Op,
    },
    OpeningStreams {
        op: Op,
    },
    /// Pages arrive; from a moment before the pause on, the device state is loaded meanwhile.
    Receiving {
        /// Once the VM is paused at the source: whether it runs here before its last pages are here.
        drained: Option<bool>,
        load: Load,
        attest: Attest,
        last: Option<u32>,
        seal: Option<Seal>,
    },
    /// The connection broke while pages arrived; they are kept for the source to come back.
    AwaitRejoin {
        /// When they are not any more.
        until: Time,
    },
    /// The source is back, and its streams are being opened anew.
    Reopening {
        op: Op,
        until: Time,
    },
    Loading {
        load: Load,
        attest: Attest,
        root_op: Op,
        root: Option<Root>,
    },
    AwaitCommit,
    Owning(Op),
    Activating {
        op: Option<Op>,
        attempts: u32,
    },
    /// Post-copy: the VM runs and its pages arrive.
    Pulling,
    /// Post-copy: streams are being opened anew.
    Rejoining(Op),
    /// Post-copy: everything has arrived. Without an operation it is tried again at the deadline.
    EndingPull(Option<Op>),
    /// Post-copy: the hypervisor ended; until that is recorded, the source keeps the pages. Without an operation it is
    /// tried again at the deadline.
    RecordingEnd(Option<Op>),
    Activated(Op),
    AwaitErased,
    /// Recording that a VM that is ours was never resumed and is not ours any more. Its container may be removed only
    /// then: a restarted agent would take one that is gone for a VM that ran and ended. Without an operation it is tried
    /// again at the deadline.
    GivingBack(Option<Op>),
    Terminating {
        op: Op,
    },
    /// Without an operation it is tried again at the deadline.
    RecordingDiscard {
        op: Option<Op>,
    },
    Ended,
}
