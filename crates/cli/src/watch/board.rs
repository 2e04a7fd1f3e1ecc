//! What is shown: of each target the last minutes second by second, whether it is calm, and what happened.

use std::collections::VecDeque;

use palanquin_host::probe::{Event, Reading};
use palanquin_watch::{Joined, Level, Verdict};
use serde::Serialize;

use super::config::{Target, TargetRole};

/// Seconds that are kept of each target.
pub(crate) const HISTORY_S: usize = 600;
/// Things that happened that are kept.
const EVENTS_MAX: usize = 200;
/// An alarm that nobody explained is shown for so long after its end.
const ALARM_SHOWN_S: f64 = 3600.0;
/// Seconds that wait for late answers.
const OPEN_MAX: usize = 4;

/// One second of one target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Second {
    pub(crate) time_s: u64,
    /// Longest round trip; none if there was none.
    pub(crate) rtt_ms: Option<f64>,
    pub(crate) answers: u32,
    pub(crate) lost: u32,
    /// Its clock less ours: by NTP, or else by ICMP timestamps.
    pub(crate) offset_ms: Option<f64>,
    /// Of a migration, as told last of the episode that goes on; 0 if there is none.
    pub(crate) likelihood: f64,
    #[serde(skip)]
    is_ntp: bool,
}

/// How a target is, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mood {
    /// Nothing, or nothing like a migration.
    Calm,
    /// Somebody ordered what is seen.
    Ordered,
    /// It may be about to be moved, and nobody ordered it.
    Warn,
    /// It was moved, and nobody ordered it.
    Alarm,
}

impl Mood {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Calm => "calm",
            Self::Ordered => "ordered",
            Self::Warn => "warn",
            Self::Alarm => "alarm",
        }
    }
}

/// One target, as it is shown.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Shown {
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) role: &'static str,
    pub(crate) mood: Mood,
    /// Since when, in seconds since 1970.
    pub(crate) since_s: f64,
    pub(crate) likelihood: f64,
    /// What was told last, in a line.
    pub(crate) why: String,
    /// Latest round trip.
    pub(crate) rtt_ms: Option<f64>,
    /// Share of the last minute's echoes that were lost; none if there were none.
    pub(crate) loss: Option<f64>,
    pub(crate) offset_ms: Option<f64>,
    #[serde(skip)]
    pub(crate) history: VecDeque<Second>,
    #[serde(skip)]
    open: VecDeque<Second>,
    #[serde(skip)]
    until_s: Option<f64>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Happened {
    /// Counted from 1: who gets it twice knows it.
    pub(crate) number: u64,
    pub(crate) time_s: f64,
    /// Of which target; none if of the watcher itself.
    pub(crate) target: Option<String>,
    pub(crate) mood: Mood,
    pub(crate) text: String,
}

/// Everything that is shown.
#[derive(Clone, Debug, Default)]
pub(crate) struct Board {
    pub(crate) targets: Vec<Shown>,
    pub(crate) events: VecDeque<Happened>,
    happened: u64,
    pub(crate) observations: u64,
    /// Observations that came too late, or were refused for another reason.
    pub(crate) refused: u64,
    pub(crate) stalls: u64,
    pub(crate) stalled_s: f64,
    pub(crate) findings: [u64; 4],
}

impl Board {
    pub(crate) fn new(targets: &[Target], now_s: f64) -> Self {
        let shown = |target: &Target| Shown {
            name: target.name.clone(),
            address: target.address.to_string(),
            role: target.role.name(),
            mood: Mood::Calm,
            since_s: now_s,
            likelihood: 0.0,
            why: match target.role {
                TargetRole::Vm => String::new(),
                TargetRole::Host => "evidence about VMs, no findings of its own".to_owned(),
            },
            rtt_ms: None,
            loss: None,
            offset_ms: None,
            history: VecDeque::new(),
            open: VecDeque::new(),
            until_s: None,
        };
        Self {
            targets: targets.iter().map(shown).collect(),
            ..Self::default()
        }
    }

    /// Takes what the prober has told.
    pub(crate) fn take(&mut self, event: &Event) {
        match event {
            Event::Seen {
                target,
                sent_us,
                reading,
            } => {
                self.observations += 1;
                if let Some(target) = self.targets.get_mut(*target) {
                    target.seen(sent_us / 1_000_000, *reading);
                }
            }
            Event::Stalled { from_us, until_us } => {
                self.stalls += 1;
                self.stalled_s += until_us.saturating_sub(*from_us) as f64 / 1e6;
            }
            Event::News { .. } | Event::Deaf { .. } | Event::Hears => {}
        }
    }

    /// Notes what happened; what is to be shown of it.
    pub(crate) fn happened(
        &mut self,
        time_s: f64,
        target: Option<&str>,
        mood: Mood,
        text: &str,
    ) -> Happened {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.happened += 1;
        let happened = Happened {
            number: self.happened,
            time_s,
            target: target.map(str::to_owned),
            mood,
            text: text.to_owned(),
        };
        self.events.push_back(happened.clone());
        happened
    }

    /// Takes a finding; what is to be shown of it.
    pub(crate) fn found(&mut self, joined: &Joined, text: &str) -> Happened {
        let finding = &joined.finding;
        let mood = match (&joined.verdict, finding.level) {
            (Verdict::NoMigration, _) | (_, Level::Note) => Mood::Calm,
            (Verdict::Authorised { .. }, _) => Mood::Ordered,
            (_, Level::Warn) => Mood::Warn,
            (_, Level::Alarm | Level::Confirmed) => Mood::Alarm,
        };
        self.findings[finding.level as usize] += 1;
        let happened = self.happened(finding.time_s, Some(&finding.target), mood, text);
        if let Some(target) = self.targets.iter_mut().find(|of| of.name == finding.target) {
            let is_over = finding.ended_s.is_some();
            target.likelihood = if is_over { 0.0 } else { finding.likelihood };
            text.clone_into(&mut target.why);
            target.becomes(mood, finding.time_s);
            let shown_s = if mood == Mood::Alarm {
                ALARM_SHOWN_S
            } else {
                0.0
            };
            target.until_s = is_over.then_some(finding.time_s + shown_s);
        }
        happened
    }

    /// Closes seconds that nothing can be told of any more; gives them with the numbers of their targets.
    pub(crate) fn advance(&mut self, now_s: f64) -> Vec<(usize, Second)> {
        let mut closed = Vec::new();
        let end_s = (now_s - 2.0).max(0.0) as u64;
        for (at, target) in self.targets.iter_mut().enumerate() {
            while target
                .open
                .front()
                .is_some_and(|second| second.time_s < end_s)
            {
                closed.extend(target.close().map(|second| (at, second)));
            }
            if target.until_s.is_some_and(|until_s| until_s <= now_s) {
                target.until_s = None;
                target.becomes(Mood::Calm, now_s);
            }
        }
        closed
    }
}

impl Shown {
    fn becomes(&mut self, mood: Mood, time_s: f64) {
        if self.mood != mood {
            (self.mood, self.since_s) = (mood, time_s);
        }
    }

    fn seen(&mut self, time_s: u64, reading: Reading) {
        if self
            .history
            .back()
            .is_some_and(|last| last.time_s >= time_s)
        {
            return;
        }
        let at = self.open.partition_point(|second| second.time_s < time_s);
        if self
            .open
            .get(at)
            .is_none_or(|second| second.time_s != time_s)
        {
            self.open.insert(
                at,
                Second {
                    time_s,
                    ..Second::default()
                },
            );
        }
        let Some(second) = self.open.get_mut(at) else {
            return;
        };
        match reading {
            Reading::Rtt { ms } => {
                second.answers += 1;
                second.rtt_ms = Some(second.rtt_ms.map_or(ms, |longest| longest.max(ms)));
            }
            Reading::Lost => second.lost += 1,
            Reading::NtpOffset { ms } => (second.offset_ms, second.is_ntp) = (Some(ms), true),
            Reading::IcmpOffset { ms } if !second.is_ntp => second.offset_ms = Some(ms),
            Reading::IcmpOffset { .. }
            | Reading::NtpHeld { .. }
            | Reading::Ttl { .. }
            | Reading::Announced => {}
        }
        while self.open.len() > OPEN_MAX {
            self.close();
        }
    }

    fn close(&mut self) -> Option<Second> {
        let mut second = self.open.pop_front()?;
        second.likelihood = self.likelihood;
        if self.history.len() == HISTORY_S {
            self.history.pop_front();
        }
        self.history.push_back(second);
        self.rtt_ms = second.rtt_ms;
        self.offset_ms = second.offset_ms.or(self.offset_ms);
        let minute = self.history.iter().rev().take(60);
        let (lost, all) = minute.fold((0, 0), |(lost, all), second| {
            (lost + second.lost, all + second.lost + second.answers)
        });
        self.loss = (all > 0).then(|| f64::from(lost) / f64::from(all));
        Some(second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn board() -> Board {
        let target = r#"
            name = "web"
            address = "10.0.0.1"
            role = "vm"
        "#;
        Board::new(&[toml::from_str(target).unwrap()], 0.0)
    }

    fn see(board: &mut Board, sent_us: u64, reading: Reading) {
        let target = 0;
        board.take(&Event::Seen {
            target,
            sent_us,
            reading,
        });
    }

    #[test]
    fn a_second_is_closed_once_and_loss_is_not_bridged() {
        let mut board = board();
        see(&mut board, 10_100_000, Reading::Rtt { ms: 1.0 });
        see(&mut board, 11_100_000, Reading::Lost);
        see(&mut board, 10_600_000, Reading::Rtt { ms: 3.0 });
        see(&mut board, 10_700_000, Reading::NtpOffset { ms: -5.0 });
        see(&mut board, 10_800_000, Reading::IcmpOffset { ms: 9.0 });
        let closed = board.advance(13.9);
        let [(0, second)] = closed[..] else {
            panic!("{closed:?}");
        };
        assert_eq!((second.time_s, second.answers, second.lost), (10, 2, 0));
        assert_eq!((second.rtt_ms, second.offset_ms), (Some(3.0), Some(-5.0)));
        assert_eq!(board.advance(14.0)[0].1.rtt_ms, None);
        assert!(board.advance(14.0).is_empty());
        assert_eq!(board.targets[0].loss, Some(1.0 / 3.0));
        // What comes after its second was closed changes nothing.
        see(&mut board, 10_900_000, Reading::Lost);
        assert!(board.advance(99.0).is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let mut board = board();
        for second in 0..10_000_u64 {
            see(&mut board, second * 1_000_000, Reading::Lost);
            board.happened(0.0, None, Mood::Calm, "");
        }
        assert!(board.targets[0].open.len() <= OPEN_MAX);
        assert_eq!(board.targets[0].history.len(), HISTORY_S);
        assert_eq!(board.events.len(), EVENTS_MAX);
        assert_eq!(board.events.back().unwrap().number, 10_000);
    }
}
