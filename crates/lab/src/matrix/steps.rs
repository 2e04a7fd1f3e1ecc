//! The steps of the protocol, in their order.

use palanquin_api::control::Side;

use super::{Fault, Place};

/// A step at which a migration can be stopped.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The agent's fail point.
    pub point: &'static str,
    /// Whose.
    pub side: Side,
    /// For people.
    pub about: &'static str,
    /// How it may end, a letter for each of [`Fault::ALL`]: `s`ource, `d`estination, `e`ither of them, `L`ost with the
    /// hypervisor that owned it, `?` any of these, `-` makes no sense here.
    pub(super) ends: &'static str,
    /// Letters of the faults that continuous integration runs.
    pub(super) chosen: &'static str,
}

impl Step {
    /// Where the VM may live after this fault; empty where the fault makes no sense.
    pub fn ends_of(&self, fault: Fault) -> &'static [Place] {
        let index = Fault::ALL.iter().position(|other| *other == fault);
        match index.and_then(|index| self.ends.chars().nth(index)) {
            Some('s') => &[Place::Source],
            Some('d') => &[Place::Destination],
            Some('e') => &[Place::Source, Place::Destination],
            Some('L') => &[Place::Lost],
            Some('?') => &[Place::Source, Place::Destination, Place::Lost],
            _ => &[],
        }
    }

    /// Whether continuous integration runs this cell.
    pub fn is_chosen(&self, fault: Fault) -> bool {
        self.chosen.contains(fault.letter())
    }
}

const fn source(
    point: &'static str,
    about: &'static str,
    ends: &'static str,
    chosen: &'static str,
) -> Step {
    Step {
        point,
        side: Side::Source,
        about,
        ends,
        chosen,
    }
}

const fn destination(
    point: &'static str,
    about: &'static str,
    ends: &'static str,
    chosen: &'static str,
) -> Step {
    Step {
        side: Side::Destination,
        ..source(point, about, ends, chosen)
    }
}

/// Steps of a pre-copy migration.
#[rustfmt::skip]
pub const PRE_COPY: &[Step] = &[
    source("source-recorded-Ordered", "order recorded, nothing sent", "ss-s", "a"),
    source("source-sent-Offer", "offer sent", "ss-s", "l"),
    destination("destination-received-Offer", "offer received", "ss-s", ""),
    destination("destination-recorded-Reserved", "reservation recorded", "ss-s", "b"),
    destination("destination-reserving", "container started", "ssss", "q"),
    destination("destination-sent-Accepted", "offer accepted", "ssss", ""),
    source("source-received-Accepted", "acceptance received", "ssss", ""),
    destination("destination-sent-StreamsReady", "streams open", "ssse", ""),
    source("source-received-StreamsReady", "streams known to be open", "sssd", ""),
    source("source-round", "pages on their way", "sssd", "al"),
    destination("destination-round", "a round received", "sssd", "bql"),
    source("source-pausing", "VM about to be paused", "ssss", "a"),
    source("source-paused", "VM paused", "ssss", "a"),
    source("source-saving", "device state being saved", "ssss", ""),
    destination("destination-last-round", "last round received", "ssss", "b"),
    source("source-sent-Seal", "seal sent", "ssss", ""),
    destination("destination-loading", "device state about to be loaded", "ssss", "bq"),
    destination("destination-loaded", "device state loaded", "ssss", ""),
    destination("destination-sent-Ready", "`Ready` sent", "es?e", "abql"),
    source("source-received-Ready", "`Ready` received", "ssss", "abql"),
    source("source-recorded-Committed", "commit recorded, not sent", "ssss", "abql"),
    source("source-sent-Commit", "commit sent", "de?e", "bl"),
    destination("destination-received-Commit", "commit received", "dssd", "abq"),
    destination("destination-recorded-Owned", "ownership recorded, VM not resumed", "ddsd", "abql"),
    destination("destination-sends-Running", "VM resumed, not told", "ddLd", "abl"),
    destination("destination-sent-Running", "`Running` sent", "ddLd", ""),
    source("source-received-Running", "`Running` received", "ddLd", "al"),
    destination("destination-recorded-Activated", "activation recorded", "ddLd", ""),
    source("source-recorded-Released", "release recorded", "ddLd", "a"),
    source("source-erasing", "source's QEMU ended", "ddLd", "a"),
    source("source-recorded-Erased", "erasure recorded", "ddLd", ""),
    destination("destination-received-Erased", "erasure told", "ddLd", ""),
];

/// Steps of a post-copy migration. Up to the pause they are those of pre-copy: continuous integration runs them there.
#[rustfmt::skip]
pub const POST_COPY: &[Step] = &[
    source("source-recorded-Ordered", "order recorded, nothing sent", "ss-s", ""),
    source("source-sent-Offer", "offer sent", "ss-s", ""),
    destination("destination-received-Offer", "offer received", "ss-s", ""),
    destination("destination-recorded-Reserved", "reservation recorded", "ss-s", ""),
    destination("destination-reserving", "container started", "ssss", ""),
    destination("destination-sent-Accepted", "offer accepted", "ssss", ""),
    source("source-received-Accepted", "acceptance received", "ssss", ""),
    destination("destination-sent-StreamsReady", "streams open", "ssse", ""),
    // Nothing is between this and the pause: the cut may be noticed before it or after.
    source("source-received-StreamsReady", "streams known to be open", "ssse", ""),
    source("source-pausing", "VM about to be paused", "ssss", ""),
    source("source-paused", "VM paused", "ssss", ""),
    source("source-saving", "device state being saved", "ssss", ""),
    source("source-ahead", "pages that devices look into sent ahead", "ssss", "al"),
    source("source-sent-Seal", "seal sent", "ssss", ""),
    destination("destination-loading", "device state about to be loaded", "ssss", ""),
    source("source-serving-load", "a page demanded by a device that is loaded", "ssss", ""),
    destination("destination-loaded", "device state loaded", "ssss", ""),
    destination("destination-sent-Ready", "`Ready` sent", "es?e", "bl"),
    source("source-received-Ready", "`Ready` received", "ssss", "a"),
    source("source-recorded-Committed", "commit recorded, not sent", "ssss", "abl"),
    source("source-sent-Commit", "commit sent", "de?e", "b"),
    destination("destination-received-Commit", "commit received", "dssd", "bl"),
    destination("destination-recorded-Pulling", "ownership recorded, VM not resumed", "ddsd", "abql"),
    destination("destination-sends-Running", "VM resumed, not told", "ddLd", "al"),
    destination("destination-sent-Running", "`Running` sent", "ddLd", ""),
    source("source-received-Running", "`Running` received", "ddLd", "b"),
    source("source-round", "pages on their way", "ddLd", "abl"),
    source("source-serving", "a page demanded by the VM", "ddLd", "abl"),
    destination("destination-pulled", "all pages there, not recorded", "ddLd", "abl"),
    destination("destination-recorded-Activated", "completeness recorded, not told", "ddLd", "bl"),
    destination("destination-sent-Complete", "`Complete` sent", "ddLd", ""),
    source("source-received-Complete", "`Complete` received", "ddLd", "a"),
    source("source-recorded-Released", "release recorded", "ddLd", ""),
    source("source-erasing", "source's QEMU ended", "ddLd", ""),
    source("source-recorded-Erased", "erasure recorded", "ddLd", ""),
    destination("destination-received-Erased", "erasure told", "ddLd", ""),
];
