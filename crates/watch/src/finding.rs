//! What the detector says.

use serde::{Deserialize, Serialize};

/// How sure it is that a VM has been moved, or is being moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Something happened, and it is not taken for a migration.
    Note,
    /// It may be about to be moved: round trips have grown as they do while memory is copied. Or, where announcements can't be
    /// heard: it may have been moved, and something else explains it as well.
    Warn,
    /// It was probably moved: it was silent, or its clock stood still.
    Alarm,
    /// It was probably moved, and at least two independent channels say so.
    Confirmed,
}

/// What happened, as far as can be told from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Nothing: chance.
    Quiet,
    /// The VM was moved, or is being moved.
    Migration,
    /// It was about to be moved and was not. From outside it looks like a copy of a file.
    AbortedMigration,
    /// It stood still and went on in its place, as for a snapshot.
    Pause,
    /// Much traffic on its host's network.
    CopyTraffic,
    /// Its CPU was busy.
    Load,
    /// The path was: others felt it too, or losses were scattered, or the route has changed.
    Congestion,
    /// Its clock was set.
    ClockStep,
    /// It was started anew.
    Reboot,
    /// It, or the path to it, was gone.
    Outage,
}

impl Class {
    /// Every class, in the order of the tables.
    pub const ALL: [Self; 10] = [
        Self::Quiet,
        Self::Migration,
        Self::AbortedMigration,
        Self::Pause,
        Self::CopyTraffic,
        Self::Load,
        Self::Congestion,
        Self::ClockStep,
        Self::Reboot,
        Self::Outage,
    ];

    /// As in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::Migration => "migration",
            Self::AbortedMigration => "aborted-migration",
            Self::Pause => "pause",
            Self::CopyTraffic => "copy-traffic",
            Self::Load => "load",
            Self::Congestion => "congestion",
            Self::ClockStep => "clock-step",
            Self::Reboot => "reboot",
            Self::Outage => "outage",
        }
    }

    pub(crate) fn index(self) -> usize {
        Self::ALL
            .iter()
            .position(|class| *class == self)
            .unwrap_or(0)
    }
}

/// How far an episode has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Round trips have grown, and nothing else yet: a migration would be copying memory.
    Early,
    /// The VM was silent, its clock has jumped, or what was unusual has ended.
    Full,
}

/// A kind of evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// How clearly round trips have grown; the value is the statistic.
    Rise,
    /// What came first; the value is for how many seconds round trips had grown before the break.
    Order,
    /// No answers; the value is the longest time without any, in milliseconds.
    Silence,
    /// Answers that came much later than usual; the value is by how many milliseconds.
    Late,
    /// Losses in many places; the value is how many within half a minute.
    Scatter,
    /// Its clock; the value is by how many milliseconds it jumped, negative if it lags.
    Clock,
    /// Hops on the way back; the value is by how many they have changed.
    Path,
    /// Announcements on the network; the value is how many.
    Announcement,
    /// Hypervisor hosts whose round trips have grown too; the value is how many.
    Hosts,
    /// Other VMs that were disturbed at the same time; the value is their share.
    Company,
    /// How it answered when its clock had jumped; the value is the longest round trip then, in milliseconds.
    Wake,
}

impl Channel {
    /// Every channel, in the order of the tables.
    pub const ALL: [Self; 11] = [
        Self::Rise,
        Self::Order,
        Self::Silence,
        Self::Late,
        Self::Scatter,
        Self::Clock,
        Self::Path,
        Self::Announcement,
        Self::Hosts,
        Self::Company,
        Self::Wake,
    ];

    /// What can be seen in it, in the order of the tables.
    #[must_use]
    pub fn symbols(self) -> &'static [&'static str] {
        match self {
            Self::Rise => &["none", "weak", "clear", "strong"],
            Self::Order => &[
                "nothing",
                "growth-only",
                "growth-then-break",
                "break-only",
                "break-then-growth",
                "growth-goes-on-over-break",
            ],
            Self::Silence => &["none", "usual-loss", "doubtful", "short", "medium", "long"],
            // Those that were kept back all come at once when they may go on.
            Self::Late => &["none", "late", "at-once"],
            Self::Scatter => &["none", "scattered"],
            Self::Clock => &[
                "steady",
                "lag-fits-silence",
                "lag-longer-than-silence",
                "forward",
                "slight-lag",
                // Nothing was lost or late: it may have stood still between two probes, or its clock was set.
                "lag-between-probes",
            ],
            Self::Path => &["same", "changed"],
            Self::Announcement => &["none", "seen", "repeated"],
            Self::Hosts => &["none", "one", "several"],
            Self::Company => &["alone", "with-others"],
            // Kept back is what may have waited where it stood still; who runs elsewhere for the first time is slow.
            Self::Wake => &["as-usual", "slow", "kept-back"],
        }
    }
}

/// What one channel says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evidence {
    /// The channel.
    pub channel: Channel,
    /// What was seen, one of [`Channel::symbols`].
    pub seen: &'static str,
    /// The measured value; its unit depends on the channel.
    pub value: f64,
    /// Logarithm of how many times more probable that is in a migration than otherwise, by itself.
    pub log_likelihood_ratio: f64,
}

/// Something that happened to a VM. A finding is made when its level rises, and once more when it has ended; what is
/// found then replaces what was found before of the same episode.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// Name of the VM.
    pub target: String,
    /// Number of the episode, counted for each target.
    pub episode: u64,
    /// End of the second after which this was found, in seconds of the observations' clock.
    pub time_s: f64,
    /// When it probably began.
    pub onset_s: f64,
    /// When the VM was first seen to be silent or its clock to have jumped, if so.
    pub break_s: Option<f64>,
    /// When it was over, if it is.
    pub ended_s: Option<f64>,
    /// How sure it is that the VM was moved or is being moved.
    pub level: Level,
    /// What most probably happened.
    pub class: Class,
    /// Probability that it is a migration, if one were as probable beforehand as all else together. The calibration says
    /// on what data it is calibrated.
    pub likelihood: f64,
    /// What is known so far.
    pub stage: Stage,
    /// Logarithm of the odds, before they were calibrated.
    pub score: f64,
    /// Why: every channel that saw anything or could have.
    pub evidence: Vec<Evidence>,
    /// Hypervisor hosts that were disturbed at the same time.
    pub hosts: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_and_channels_are_listed_once_and_in_order() {
        for (at, class) in Class::ALL.into_iter().enumerate() {
            assert_eq!(class.index(), at);
            assert_eq!(
                serde_json::to_value(class).unwrap(),
                serde_json::json!(class.name())
            );
        }
        for (at, channel) in Channel::ALL.into_iter().enumerate() {
            assert_eq!(channel as usize, at);
            assert!(channel.symbols().len() <= crate::calibration::SYMBOLS_MAX);
        }
    }
}
