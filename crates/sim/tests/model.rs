//! Every state of a handover within bounds, and defects that exploring them must find.
#![forbid(unsafe_code)]

use palanquin_engine::strategy::Strategy;
use palanquin_sim::Mutation;
use palanquin_sim::model::{Bounds, explore};
use palanquin_sim::mutation::ALL;

/// Many times what is reached.
const STATES_MAX: u32 = 3_000_000;

fn holds_for(strategy: Strategy) {
    for bounds in Bounds::tested(strategy) {
        match explore(bounds, None, STATES_MAX) {
            Ok(counts) => {
                assert!(counts.states > 10_000, "{bounds}: {counts:?}");
                assert!(counts.good_ends > 100, "{bounds}: {counts:?}");
            }
            Err(violation) => panic!("{bounds}\n{violation}"),
        }
    }
}

#[test]
fn every_state_of_pre_copy_keeps_the_laws_and_leads_to_a_good_end() {
    holds_for(Strategy::PreCopy);
}

#[test]
fn every_state_of_post_copy_keeps_the_laws_and_leads_to_a_good_end() {
    holds_for(Strategy::PostCopy);
}

/// What the model leaves out: bytes on the path, hosts that lie, pages sent before a switchover to
/// post-copy, pages read late from a broken stream, and hypervisors that end between the record of ownership and the resuming.
const NOT_MODELLED: [Mutation; 7] = [
    Mutation::StaleEpochAccepted,
    Mutation::PathIsTrusted,
    Mutation::HalfMessageAccepted,
    Mutation::AbortUndoesCommit,
    Mutation::KeepStalePages,
    Mutation::LoseWhatNeverRan,
    Mutation::OldStreamsAccepted,
];

#[test]
fn every_seeded_defect_is_found() {
    let found = |mutation| {
        [Strategy::PreCopy, Strategy::PostCopy]
            .into_iter()
            .any(
                |strategy| match explore(Bounds::seeded(strategy), Some(mutation), STATES_MAX) {
                    Ok(_) => false,
                    Err(violation) => {
                        assert!(
                            violation.states < STATES_MAX,
                            "{mutation:?}: too many states"
                        );
                        true
                    }
                },
            )
    };
    let missed: Vec<_> = ALL
        .into_iter()
        .filter(|mutation| !NOT_MODELLED.contains(mutation) && !found(*mutation))
        .collect();
    assert_eq!(missed, []);
}
