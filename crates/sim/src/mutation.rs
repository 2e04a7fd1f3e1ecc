//! Defects that are switched on to see whether the simulation notices them.

/// A defect of the drivers around the engines; the engines themselves stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// The source resumes its VM when the connection is lost, also after its commit.
    ResumeOnLostConnection,
    /// The commit leaves before its record is durable.
    CommitBeforeDurable,
    /// The destination resumes before its ownership is durable.
    RunBeforeOwnedIsDurable,
    /// The destination says that it discarded while it goes on.
    ClaimDiscardWithoutDoing,
    /// A query about a migration that is still decided is answered with "discarded".
    AnswerUndecidedAsDiscarded,
    /// A restarted source resumes its VM whatever the journal says.
    RecoveryIgnoresCommit,
    /// A restarted destination resumes a container that is only reserved.
    RecoveryRunsReserved,
    /// A page of the last ones is not sent, and its digest forgotten.
    LastPagesNotSent,
    /// A page of every round is forgotten, and its digest with it.
    PagesForgotten,
    /// The source erases as soon as it has committed.
    EraseAtCommit,
    /// A restarted destination forgets that it owns the VM and discards it.
    RecoveryDiscardsOwned,
    /// The destination forgets its journal when it restarts.
    JournalLostOnRestart,
    /// The source removes its copy when the VM runs elsewhere, though pages are still missing there.
    EraseAtRunning,
    /// After a reconnection the destination names a page as present that is not.
    ClaimMissingPagePresent,
    /// The destination keeps pages that it was told to forget before the switchover.
    KeepStalePages,
    /// A restarted destination lets accesses to missing pages see zeros.
    RecoveryForgetsMissing,
    /// The source resumes its VM when the destination has not decided yet.
    ResumeOnUndecided,
    /// An order of an epoch that is over is accepted.
    StaleEpochAccepted,
    /// What somebody on the path altered, repeated or reordered is taken for what was sent.
    PathIsTrusted,
    /// A connection that broke delivers half a message as if it were whole.
    HalfMessageAccepted,
    /// The source takes the VM back when the other side says so, whatever it has recorded.
    AbortUndoesCommit,
    /// A VM whose hypervisor ended on the destination before it ran there is given up.
    LoseWhatNeverRan,
    /// After a reconnection before the switchover the destination names pages as arrived that have not.
    ClaimMissingReceived,
    /// What comes late on the streams of a connection that broke still counts.
    OldStreamsAccepted,
    /// Streams are opened to a destination whatever it says about itself.
    OpenUnjudged,
    /// The VM is given to a destination whatever it says about itself when the VM stands still.
    CommitUnjudged,
    /// The destination takes an order that its gates refuse.
    ReserveInSpiteOfGates,
}

/// All of them.
pub const ALL: [Mutation; 27] = [
    Mutation::ResumeOnLostConnection,
    Mutation::CommitBeforeDurable,
    Mutation::RunBeforeOwnedIsDurable,
    Mutation::ClaimDiscardWithoutDoing,
    Mutation::AnswerUndecidedAsDiscarded,
    Mutation::RecoveryIgnoresCommit,
    Mutation::RecoveryRunsReserved,
    Mutation::LastPagesNotSent,
    Mutation::PagesForgotten,
    Mutation::EraseAtCommit,
    Mutation::RecoveryDiscardsOwned,
    Mutation::JournalLostOnRestart,
    Mutation::EraseAtRunning,
    Mutation::ClaimMissingPagePresent,
    Mutation::KeepStalePages,
    Mutation::RecoveryForgetsMissing,
    Mutation::ResumeOnUndecided,
    Mutation::StaleEpochAccepted,
    Mutation::PathIsTrusted,
    Mutation::HalfMessageAccepted,
    Mutation::AbortUndoesCommit,
    Mutation::LoseWhatNeverRan,
    Mutation::ClaimMissingReceived,
    Mutation::OldStreamsAccepted,
    Mutation::OpenUnjudged,
    Mutation::CommitUnjudged,
    Mutation::ReserveInSpiteOfGates,
];
