//! All targets. `docs/fuzzing.md` lists what each asserts.

mod arguments;
mod certificate;
mod frame;
mod local;
pub(crate) mod message;
mod operator;
mod page_set;
mod probe;
mod reduction;
mod trust;
mod watch;

use crate::ALLOCATOR;
use crate::entry::Target;
use crate::machines;

/// Every target, in the order in which they are run.
pub(crate) const ALL: &[Target] = &[
    message::MESSAGE,
    message::MESSAGE_PIECES,
    message::RECORDS,
    message::ORDER,
    message::OPENING,
    frame::FRAME,
    page_set::PAGE_SET,
    reduction::FRAMES,
    reduction::ROUND_TRIP,
    reduction::DELTA,
    machines::source::SOURCE,
    machines::destination::DESTINATION,
    arguments::ARRIVING_VM,
    arguments::DESCRIPTOR,
    arguments::IMAGE,
    arguments::ADOPTED_VM,
    local::MONITOR,
    local::PROC,
    local::TREE,
    operator::VM_SPEC,
    operator::CONFIG,
    operator::SIZES,
    operator::BODIES,
    certificate::CERTIFICATE,
    trust::CREDENTIALS,
    trust::ENVELOPE,
    trust::DOCUMENTS,
    trust::EVIDENCE,
    trust::POLICIES,
    watch::WATCH,
    probe::PROBE,
];

/// Runs `work`, which may allocate at most that many bytes at a time.
pub(crate) fn within<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    let result = work();
    let used = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(
        used <= bytes,
        "{used} bytes were allocated, at most {bytes} may be"
    );
    result
}

/// Texts as seeds.
pub(crate) fn seeds_of(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

/// Words for a dictionary.
pub(crate) fn words_of(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
