//! What a source sends ahead of a post-copy switchover, because devices look into it while they are loaded.

use palanquin_engine::message::{Demand, Message, Reason};
use palanquin_engine::source::{Failure, RoundMark, SourceDone};
use palanquin_engine::strategy::Strategy;
use palanquin_engine::{Epoch, PageSet, RamLayout, SourceAction};

use super::play::{OURS, PAGES, Play};

fn pages_of(layout_pages: u64, pages: &[u64]) -> PageSet {
    let layout = RamLayout::new(vec![layout_pages]).expect("a few pages");
    let mut set = PageSet::empty(&layout);
    for &page in pages {
        set.insert(0, page..page + 1);
    }
    set
}

/// Of a VM whose pages all hold data but the last.
fn paused(strategy: Strategy, looked_into: Option<PageSet>) -> Play {
    let mut play = Play::until_first_judgement(strategy);
    play.written = pages_of(PAGES, &[0, 1, 2, 3, 4, 5, 6]);
    play.looked_into = looked_into;
    let (op, ..) = play.judge.take().expect("a judgement");
    play.done(op, SourceDone::Done);
    play.pump();
    play
}

/// What was sent without the end of a round behind it.
fn ahead(play: &Play) -> Option<(usize, PageSet)> {
    play.did
        .iter()
        .enumerate()
        .find_map(|(at, action)| match action {
            SourceAction::SendPages {
                pages,
                then: RoundMark::None,
                ..
            } => Some((at, pages.clone())),
            _ => None,
        })
}

/// What the destination is told to forget before it loads devices.
fn forgotten(play: &Play) -> PageSet {
    let stale = play.did.iter().find_map(|action| match action {
        SourceAction::SendStale { pages, .. } => Some(pages.clone()),
        _ => None,
    });
    stale.expect("the pause is told")
}

/// Pages that are sent once the VM runs there.
fn pushed(mut play: Play) -> Vec<u64> {
    let op = play.ready(OURS);
    play.root();
    play.done(op, SourceDone::Done);
    play.pump();
    let commit = play.did.iter().find_map(|action| match action {
        SourceAction::Journal(op, record) if format!("{record:?}").starts_with("Committed") => {
            Some(*op)
        }
        _ => None,
    });
    play.done(commit.expect("a commit"), SourceDone::Done);
    play.pump();
    play.hears(Message::Running(Epoch(2)));
    let pages = play.did.iter().rev().find_map(|action| match action {
        SourceAction::SendPages {
            pages,
            then: RoundMark::Pushed,
            ..
        } => Some(pages.clone()),
        _ => None,
    });
    let pages = pages.expect("the rest");
    (0..PAGES).filter(|&page| pages.contains(0, page)).collect()
}

/// They have left.
fn sent_ahead(play: &mut Play) {
    let op = play.sends.take().expect("pages on their way");
    play.done(op, SourceDone::Done);
    play.pump();
    assert!(play.sent("Seal"));
}

#[test]
fn what_devices_look_into_is_there_before_they_are_loaded_and_is_not_sent_again() {
    let mut play = paused(Strategy::PostCopy, Some(pages_of(PAGES, &[2, 5, 7])));
    assert!(!play.sent("Seal"), "sealed before all has left");
    sent_ahead(&mut play);
    let (at, sent) = ahead(&play).expect("pages");
    // Page 7 holds nothing: it is nowhere, and not missing.
    assert_eq!(sent, pages_of(PAGES, &[2, 5]));
    let stale = play.position(|a| matches!(a, SourceAction::SendStale { .. }));
    assert!(at < stale.expect("the pause is told"));
    // Where the kernel gives out huge pages they have brought zeros in beside them, which are no data.
    assert_eq!(forgotten(&play), pages_of(PAGES, &[0, 1, 3, 4, 6]));
    assert_eq!(pushed(play), [0, 1, 3, 4, 6]);
}

#[test]
fn a_hypervisor_that_tells_nothing_or_nonsense_costs_nothing() {
    for looked_into in [
        None,
        Some(pages_of(PAGES, &[])),
        Some(pages_of(PAGES, &[7])),
        Some(pages_of(99, &[2, 98])),
    ] {
        let play = paused(Strategy::PostCopy, looked_into);
        assert_eq!(ahead(&play), None);
        assert!(forgotten(&play).is_empty());
        assert_eq!(pushed(play), [0, 1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn pages_that_could_not_be_sent_ahead_end_the_migration_on_the_source() {
    let mut play = paused(Strategy::PostCopy, Some(pages_of(PAGES, &[2])));
    let op = play.sends.take().expect("pages on their way");
    let failure = Failure {
        reason: Reason::new("memory", "it cannot be read"),
        vm_gone: false,
    };
    play.source.handle_done(play.now, op, Err(failure));
    play.pump();
    assert_eq!(play.why(), "memory");
    assert!(!play.committed());
}

#[test]
fn one_of_them_that_is_demanded_all_the_same_is_sent() {
    let mut play = paused(Strategy::PostCopy, Some(pages_of(PAGES, &[2])));
    play.hears(Message::Demand(Demand { region: 0, page: 2 }));
    assert!(play.did(|action| match action {
        SourceAction::SendUrgent { block, .. } => block.names(0, 2),
        _ => false,
    }));
}
