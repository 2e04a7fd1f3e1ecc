//! What goes into a destination and what comes out of it.

use crate::ids::{Challenge32, Root, StreamSecret};
use crate::journal::DestinationRecord;
use crate::message::{Complete, Message, Offer, Reason, Seal, WireBlocker};
use crate::pages::RamLayout;
pub use crate::source::Op;
use crate::time::Timing;

/// What a destination is made of.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// Deadlines.
    pub timing: Timing,
    /// Version of the software, told to the other side.
    pub software: String,
    /// Fresh random bytes, from which the proofs that open the streams are made.
    pub stream_secret: StreamSecret,
    /// Most data streams accepted, at least 1.
    pub streams_max: u16,
    /// Largest device state accepted, in bytes.
    pub device_state_max: u64,
    /// Fresh random bytes that the evidence in the source's credentials has to be bound to.
    pub challenge: Challenge32,
}

/// What the driver has to do. Actions that concern the container are executed one at a time and in order; so
/// are journal records.
#[derive(Clone, Debug, PartialEq)]
pub enum DestinationAction {
    /// Send on the connection.
    Send(Message),
    /// Look up what is known about the order of this offer, and let the gates judge it with its credentials; answer with
    /// [`Destination::handle_ledger`](super::Destination::handle_ledger).
    ConsultLedger(Box<Offer>),
    /// Make durable, then report.
    Journal(Op, DestinationRecord),
    /// Start an empty container, then report it with evidence that is bound to
    /// [`Destination::challenge`](super::Destination::challenge).
    Reserve(Op, Offer),
    /// Accept this many data streams that prove knowledge of the secret, report when all are open, and from
    /// then on apply what they bring, and nothing of earlier streams any more.
    ExpectStreams {
        /// To report with.
        op: Op,
        /// Number of streams.
        streams: u16,
        /// Whether one more is expected behind them, for pages that the VM waits for.
        urgent: bool,
        /// From this the proofs are made that open them.
        secret: StreamSecret,
        /// Layout that every frame must fit.
        layout: RamLayout,
    },
    /// Load the device state while it arrives, at first only the pieces that are marked as early. Report when it was
    /// released, was sealed ([`DestinationAction::SealDeviceState`]), is what was sealed, and is loaded.
    LoadDeviceState(Op),
    /// What is not early of the device state may be loaded from now on.
    ReleaseDeviceState {
        /// Whether accesses to pages that are not here have to wait from before that on, and the source is asked for
        /// them.
        post_copy: bool,
    },
    /// All of the device state was sent: this is its length and digest.
    SealDeviceState(Seal),
    /// The source begins to pause the VM: make evidence anew, bound to this, then report [`DestinationDone::Attested`].
    /// Everything else goes on meanwhile; the VM stands still until all of it has ended.
    Attest {
        /// To report with.
        op: Op,
        /// Of the source.
        challenge: Challenge32,
    },
    /// Compute the root over the digests of what arrived until the end of the last round, then report.
    ComputeRoot(Op),
    /// Tell the source on the connection which pages have arrived since the last whole round. Nothing of earlier streams
    /// may arrive any more.
    TellReceived,
    /// Post-copy: tell the source on the connection which pages are here, and ask again for those that the VM waits
    /// for.
    TellPresent,
    /// Post-copy: all pages have been sent. What is not here holds no data: let nothing wait any more, then report.
    EndPulling(Op),
    /// Close the connection and the streams. Nothing that was on its way on them may be reported any more.
    Disconnect,
    /// Let the VM run (or leave it paused where the order says so), then report.
    Activate(Op),
    /// Close the streams and end the container, also where it is loading, then report. It has never run.
    Terminate(Op),
    /// Ended; nothing follows.
    Finish(DestinationEnding),
}

/// How an action ended well.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DestinationDone {
    /// Just done.
    Done,
    /// The container is there.
    Reserved {
        /// Whether it can run before all of its pages are there.
        post_copy: bool,
        /// What this host says about itself and the container, at most [`EVIDENCE_MAX`](crate::message::EVIDENCE_MAX) bytes;
        /// empty where it has none.
        evidence: Vec<u8>,
    },
    /// The same made anew, see [`DestinationAction::Attest`].
    Attested(Vec<u8>),
    /// The container can't be had, for these reasons.
    Blocked(Vec<WireBlocker>),
    /// The container's hypervisor ended before anybody told it to let the VM run; never after a restart of the agent,
    /// which cannot know that.
    NeverRan,
    /// Nothing waits for pages any more.
    Pulled(Complete),
    /// The root asked for.
    Root(Root),
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq)]
pub enum DestinationEnding {
    /// The VM is ours and runs.
    Owned,
    /// The VM is ours, but its hypervisor ended when or after it was resumed.
    OwnedButEnded(Reason),
    /// Nothing of it is left here.
    Discarded(Reason),
    /// Nothing was ever here.
    Refused(Reason),
}

/// Where a destination is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationPhase {
    /// Greeting and order.
    Preparing,
    /// Starting the container.
    Reserving,
    /// Pages arrive.
    Receiving,
    /// Loading the device state, and `Ready`.
    Switchover,
    /// The VM runs here, and its last pages arrive.
    PostCopy,
    /// Owned, or being recorded as such.
    Committing,
    /// Discarding.
    Finishing,
    /// Ended.
    Ended,
}
