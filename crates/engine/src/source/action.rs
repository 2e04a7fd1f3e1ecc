//! What goes into a source and what comes out of it.

use std::time::Duration;

use crate::convergence::Limits;
use crate::ids::{Challenge32, Root, Sha256, StreamSecret};
use crate::journal::SourceRecord;
use crate::message::{Message, Reason, WireBlocker};
use crate::order::Order;
use crate::pages::{Block, PageSet, RamLayout};
use crate::strategy::Strategy;
use crate::time::Timing;

/// Names an action whose end the driver reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Op(pub u64);

/// What a source is made of.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Who moves what where.
    pub order: Order,
    /// The algorithm.
    pub strategy: Strategy,
    /// What was asked for.
    pub limits: Limits,
    /// Deadlines.
    pub timing: Timing,
    /// Version of the software, told to the other side.
    pub software: String,
    /// Layout of the VM's RAM; absent where its hypervisor is gone.
    pub layout: Option<RamLayout>,
    /// Fresh random bytes that the destination's first evidence has to be bound to.
    pub challenge: Challenge32,
    /// Others, for the evidence that it makes when the VM is being paused.
    pub last_challenge: Challenge32,
}

/// What the driver has to do. Actions that concern the VM (`Pause`, `SaveDeviceState`, `Resume`, `Erase`) are
/// executed one at a time and in order; so are journal records.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceAction {
    /// Dial the destination; answer with [`handle_connected`](super::Source::handle_connected) or
    /// [`handle_connection_lost`](super::Source::handle_connection_lost)
    /// for this attempt.
    Connect {
        /// Names the connection in what is reported about it.
        attempt: u32,
    },
    /// Send on the newest connection.
    Send(Message),
    /// Close the newest connection once what was sent before has left.
    Disconnect,
    /// Make durable, then report.
    Journal(Op, SourceRecord),
    /// Make what speaks for this host and its order at the destination (evidence in it bound to the challenge), then report
    /// [`SourceDone::Vouched`].
    Vouch {
        /// To report with.
        op: Op,
        /// Of the destination.
        challenge: Challenge32,
    },
    /// Judge the destination by its evidence, which may be empty, then report. A failure refuses: the VM stays here, and the
    /// failure's reason is why.
    Judge {
        /// To report with.
        op: Op,
        /// What it has to be bound to: [`SourceConfig::challenge`], or at last [`SourceConfig::last_challenge`].
        challenge: Challenge32,
        /// What the destination says about itself, as opaque as it came, at most
        /// [`EVIDENCE_MAX`](crate::message::EVIDENCE_MAX) bytes.
        evidence: Vec<u8>,
        /// False: before anything is sent. True: before the commit, while the VM stands still.
        last: bool,
    },
    /// Open the data streams, then report. Nothing that is sent on them may refer to what was sent on others before.
    OpenStreams {
        /// To report with.
        op: Op,
        /// Number of streams.
        streams: u16,
        /// Whether one more is opened behind them, for pages that the VM waits for.
        urgent: bool,
        /// For the proofs that open them.
        secret: StreamSecret,
    },
    /// Start tracking writes, then report.
    StartTracking(Op),
    /// Collect the pages written since the last time, then report them. The first time: all pages that hold data.
    Collect {
        /// To report with.
        op: Op,
        /// Whether this is the first time.
        first: bool,
    },
    /// Report the pages written since the last collection, and let the next collection name them again.
    Peek(Op),
    /// Report all pages that hold data. The VM is paused.
    FindData(Op),
    /// Give the VM this share of its CPU time; 1 is all of it. Failures are told with
    /// [`handle_throttle_failed`](super::Source::handle_throttle_failed).
    Throttle(f64),
    /// Send these pages on the streams; behind the last of them mark the end of the round where asked to.
    SendPages {
        /// To report with.
        op: Op,
        /// The pages.
        pages: PageSet,
        /// The round they belong to.
        round: u32,
        /// What follows the pages.
        then: RoundMark,
    },
    /// The VM is paused: tell on the streams that these pages will come anew after the switchover, and nothing else was
    /// written (a `Drained` for post-copy follows on every stream); then report. From here on the streams do not refer to earlier versions of pages, because the VM may write them there.
    SendStale {
        /// To report with.
        op: Op,
        /// The pages: the destination forgets them.
        pages: PageSet,
    },
    /// Post-copy: send these pages before all others, on the stream for that.
    SendUrgent {
        /// To report with.
        op: Op,
        /// The pages.
        block: Block,
    },
    /// Stop the virtual CPUs, then report for how long they have been. What of the device state can be saved before that may be
    /// given to the first stream already.
    Pause {
        /// To report with.
        op: Op,
        /// Whether pages may be missing while devices are loaded there: those that devices look into are wanted, where
        /// the hypervisor tells.
        post_copy: bool,
    },
    /// Save the (rest of the) device state and give it to the first stream piece by piece while it is being saved; then
    /// report the length and digest of all of it. Until it is reported as done the VM may begin to run again by itself: then
    /// it is reported as failed.
    SaveDeviceState(Op),
    /// Compute the root over the digests of what was sent until the end of the last round, then report.
    ComputeRoot(Op),
    /// Compute the root over the digests of the pages that were sent after the last round, then report.
    ComputePulledRoot(Op),
    /// Close the data streams; what was under way need not be reported any more. When streams are opened again, nothing
    /// of these may read guest memory or note digests any more.
    CloseStreams,
    /// Stop sending pages and tracking writes; what was under way need not be reported any more.
    StopCopying,
    /// Let the VM run (or leave it paused where the order says so), then report.
    Resume(Op),
    /// Remove the VM from this host, then report.
    Erase(Op),
    /// Ended; nothing follows.
    Finish(Ending),
}

/// What follows the pages of a [`SourceAction::SendPages`] on every stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RoundMark {
    /// More pages of the same round.
    None,
    /// The end of the round.
    End,
    /// The VM is paused and these were its last pages, but for what saving the device state writes.
    Drained,
    /// The end of the last round.
    Last,
    /// Post-copy: the end of all pages; also on the stream for pages that the VM waits for.
    Pushed,
}

/// How an action ended well.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceDone {
    /// Journal, judgement, streams, tracking, pages, pause, resume, erase: just done.
    Done,
    /// The credentials asked for, at most [`CREDENTIALS_MAX`](crate::message::CREDENTIALS_MAX) bytes.
    Vouched(Vec<u8>),
    /// The VM is paused. [`Self::Done`] means: perhaps since it was asked for, and nothing more is known.
    Paused {
        /// For so long already.
        since: Duration,
        /// Pages that devices look into while their state is loaded, as far as is known. A hint: it may name too many, too
        /// few, or be absent.
        looked_into: Option<PageSet>,
    },
    /// The pages asked for.
    Collected(PageSet),
    /// The device state is saved, and was given to the first stream.
    DeviceState {
        /// Its length.
        bytes: u64,
        /// Its digest.
        sha256: Sha256,
    },
    /// The root asked for.
    Root(Root),
    /// After a restart not all digests are known any more, see [`SourceAction::ComputePulledRoot`].
    NoRoot,
}

/// How an action failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Failure {
    /// What happened.
    pub reason: Reason,
    /// Whether the VM's hypervisor is gone.
    pub vm_gone: bool,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// The VM runs on the destination.
    Completed,
    /// The VM runs on the source.
    RunningOnSource(Reason, Vec<WireBlocker>),
    /// The VM's hypervisor ended on the source, by no doing of the migration; it runs nowhere.
    VmLost(Reason),
}

/// Answer to a wish to abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AbortDisposition {
    /// On the way: wait for the ending.
    Aborting,
    /// The commit record is durable or may be.
    TooLate,
}

/// Where a source is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourcePhase {
    /// Order, connection, greeting.
    Preparing,
    /// The destination makes a container.
    Reserving,
    /// Rounds.
    PreCopy,
    /// The VM is paused.
    Switchover,
    /// Commit record and `Running`.
    Committing,
    /// The VM runs on the destination, and gets its last pages.
    PostCopy,
    /// Asking the destination.
    InDoubt,
    /// Removing the VM here, or taking it back.
    Finishing,
    /// Ended.
    Ended,
}
