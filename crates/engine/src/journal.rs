//! Records that must be durable before what follows them, and what a restarted agent does with them.
//!
//! The newest record of a migration alone decides how an agent that restarts goes on, see
//! [`SourceRecord::recovery`] and [`DestinationRecord::recovery`].

use minicbor::{Decode, Encode};

use crate::ids::Epoch;
use crate::message::{Reason, Verdict};
use crate::order::Order;

/// A record of the source.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum SourceRecord {
    /// A migration begins; the VM is ours.
    #[n(0)]
    Ordered(#[n(0)] Order),
    /// The VM is given away under this epoch. From here on only the destination's durable answer decides.
    #[n(1)]
    Committed(#[n(0)] Epoch),
    /// The destination owns the VM durably; what is left here must go.
    #[n(2)]
    Released(#[n(0)] Epoch),
    /// Nothing is left here.
    #[n(3)]
    Erased,
    /// Ended before the commit; the VM is ours.
    #[n(4)]
    Aborted(#[n(0)] Reason),
    /// Ended after the commit: the destination discarded it, the VM is ours again under this epoch.
    #[n(5)]
    TakenBack(#[n(0)] Epoch),
}

/// A record of the destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum DestinationRecord {
    /// An order was accepted; a container may exist. After `Owned` or `Pulling`: it could not be resumed, has never run
    /// and is given back; it may be removed from here on, and is discarded.
    #[n(0)]
    Reserved(#[n(0)] Order),
    /// The VM is ours under this epoch.
    #[n(1)]
    Owned(#[n(0)] Epoch),
    /// It was resumed here.
    #[n(2)]
    Activated,
    /// Given up; the VM never ran here and never will.
    #[n(3)]
    Discarded(#[n(0)] Reason),
    /// Post-copy: the VM is ours under this epoch, and needs pages that are still on the source.
    /// [`DestinationRecord::Activated`] follows when it does not any more.
    #[n(4)]
    Pulling(#[n(0)] Epoch),
}

/// What a restarted source does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceRecovery {
    /// Resume the VM if it is paused: the destination has discarded or will, it was never told to run.
    Resume,
    /// Keep the VM paused and ask the destination.
    AskDestination(Epoch),
    /// Remove what is left of the VM.
    Erase,
    /// Nothing to do.
    Nothing,
}

/// What a restarted destination does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationRecovery {
    /// End the container and record that it was discarded.
    Discard,
    /// Resume the VM if it is paused: it is ours.
    Activate(Epoch),
    /// The same, but accesses to pages that are not here have to wait until the source has sent them.
    Pull(Epoch),
    /// Nothing to do.
    Nothing,
}

impl SourceRecord {
    /// How a restarted agent goes on from the newest record.
    pub fn recovery(&self) -> SourceRecovery {
        match self {
            Self::Ordered(_) => SourceRecovery::Resume,
            Self::Committed(epoch) => SourceRecovery::AskDestination(*epoch),
            Self::Released(_) => SourceRecovery::Erase,
            Self::TakenBack(_) => SourceRecovery::Resume,
            Self::Erased | Self::Aborted(_) => SourceRecovery::Nothing,
        }
    }
}

impl DestinationRecord {
    /// How a restarted agent goes on from the newest record.
    pub fn recovery(&self) -> DestinationRecovery {
        match self {
            Self::Reserved(_) => DestinationRecovery::Discard,
            Self::Owned(epoch) => DestinationRecovery::Activate(*epoch),
            Self::Pulling(epoch) => DestinationRecovery::Pull(*epoch),
            Self::Activated | Self::Discarded(_) => DestinationRecovery::Nothing,
        }
    }
}

/// What a destination answers a source in doubt; `records` are its durable records of that migration, oldest
/// first. While a session still works on it, ownership is final only once the VM was resumed: until then the
/// session may find that it can't be, and give it back. Without a session, a migration that is only reserved has
/// to be discarded (durably) by the caller before it is answered, and until then counts as undecided.
///
/// A VM that still needs pages has a session, which answers for itself with [`Verdict::Pulling`]. Without one it is
/// undecided: the source must keep the pages.
pub fn verdict(records: &[DestinationRecord], session_at_work: bool) -> Verdict {
    // A reservation after `Owned` says that the VM never ran here and is about to be discarded.
    let since_reserved = records
        .rsplit(|record| matches!(record, DestinationRecord::Reserved(_)))
        .next();
    let mut newest_first = since_reserved.into_iter().flatten().rev();
    let owned = newest_first.find_map(|record| match record {
        DestinationRecord::Owned(epoch) | DestinationRecord::Pulling(epoch) => Some(*epoch),
        _ => None,
    });
    match (records.last(), owned) {
        // A discard after `Owned` means that the VM could not be resumed here and never ran.
        (Some(DestinationRecord::Discarded(_)), _) => Verdict::Discarded,
        (Some(DestinationRecord::Activated), Some(epoch)) => Verdict::Owned(epoch),
        (Some(DestinationRecord::Pulling(_)), _) => Verdict::Undecided,
        (_, Some(epoch)) if !session_at_work => Verdict::Owned(epoch),
        (Some(_), _) => Verdict::Undecided,
        (None, _) => Verdict::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::tests::order;

    #[test]
    fn only_durable_records_of_the_destination_decide() {
        let reserved = DestinationRecord::Reserved(order());
        let owned = DestinationRecord::Owned(Epoch(5));
        let discarded = DestinationRecord::Discarded(Reason::new("x", "y"));
        let decide = |records: &[_]| (verdict(records, true), verdict(records, false));
        let both = |verdict| (verdict, verdict);
        let owned_5 = Verdict::Owned(Epoch(5));
        assert_eq!(decide(&[]), both(Verdict::Unknown));
        assert_eq!(
            decide(std::slice::from_ref(&reserved)),
            both(Verdict::Undecided)
        );
        assert_eq!(
            decide(&[reserved.clone(), owned.clone()]),
            (Verdict::Undecided, owned_5)
        );
        let activated = [
            reserved.clone(),
            owned.clone(),
            DestinationRecord::Activated,
        ];
        assert_eq!(decide(&activated), both(owned_5));
        assert_eq!(
            decide(&[reserved.clone(), discarded.clone()]),
            both(Verdict::Discarded)
        );
        let pulling = DestinationRecord::Pulling(Epoch(5));
        assert_eq!(
            decide(&[reserved.clone(), pulling.clone()]),
            both(Verdict::Undecided)
        );
        assert_eq!(
            decide(&[pulling, DestinationRecord::Activated]),
            both(owned_5)
        );
        let given_back = [reserved.clone(), owned.clone(), reserved.clone()];
        assert_eq!(decide(&given_back), both(Verdict::Undecided));
        assert_eq!(
            given_back.last().map(DestinationRecord::recovery),
            Some(DestinationRecovery::Discard)
        );
        assert_eq!(
            decide(&[reserved, owned, discarded]),
            both(Verdict::Discarded)
        );
    }

    #[test]
    fn a_source_that_committed_never_resumes_by_itself() {
        assert_eq!(
            SourceRecord::Committed(Epoch(2)).recovery(),
            SourceRecovery::AskDestination(Epoch(2))
        );
        assert_eq!(
            SourceRecord::Released(Epoch(2)).recovery(),
            SourceRecovery::Erase
        );
        assert_eq!(
            SourceRecord::Ordered(order()).recovery(),
            SourceRecovery::Resume
        );
    }
}
