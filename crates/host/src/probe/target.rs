//! One target of a prober: when what is due, and what has been counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{BurstSpec, Kind, TargetSpec};

/// So many questions of a kind in a row without an answer, and they are asked less often.
const UNANSWERED: u32 = 8;
/// At most that many times less often.
const SELDOM_MAX: u32 = 64;
/// A server that refuses for good is asked again after that.
const DENIED_US: u64 = 3_600_000_000;
/// NTP servers refuse those who ask more often.
const NTP_BURST_US: u64 = 2_000_000;
/// So many answers with the same hops left are told; then only every so many.
const HOPS_TOLD: u32 = 4;
const HOPS_EVERY: u32 = 64;

/// What is counted of a target.
#[derive(Debug, Default)]
pub struct Counters {
    sent: [AtomicU64; 3],
    answered: [AtomicU64; 3],
    unanswered: [AtomicU64; 3],
    refused: AtomicU64,
    not_sent: AtomicU64,
    dropped: AtomicU64,
    announced: AtomicU64,
    bytes: AtomicU64,
}

/// What has been counted of a target since the start, by [`Kind`] where there are three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Questions.
    pub sent: [u64; 3],
    /// Answers in time.
    pub answered: [u64; 3],
    /// Questions without an answer in time.
    pub unanswered: [u64; 3],
    /// Answers that could not be used.
    pub refused: u64,
    /// Questions that could not be sent.
    pub not_sent: u64,
    /// Questions of which nothing is told, because the prober itself was late.
    pub dropped: u64,
    /// Announcements, also those of which nothing is told.
    pub announced: u64,
    /// Bytes of questions and answers, with the headers of IP.
    pub bytes: u64,
}

impl Counters {
    pub(crate) fn sent(&self, kind: Kind, bytes: usize) {
        add(&self.sent[kind as usize], 1);
        add(&self.bytes, bytes as u64);
    }

    pub(crate) fn answered(&self, kind: Kind, bytes: usize) {
        add(&self.answered[kind as usize], 1);
        add(&self.bytes, bytes as u64);
    }

    pub(crate) fn unanswered(&self, kind: Kind) {
        add(&self.unanswered[kind as usize], 1);
    }

    pub(crate) fn refused(&self) {
        add(&self.refused, 1);
    }

    pub(crate) fn not_sent(&self) {
        add(&self.not_sent, 1);
    }

    pub(crate) fn dropped(&self) {
        add(&self.dropped, 1);
    }

    pub(crate) fn announced(&self) {
        add(&self.announced, 1);
    }

    pub(crate) fn counted(&self) -> Counted {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let three = |counters: &[AtomicU64; 3]| [0, 1, 2].map(|at: usize| load(&counters[at]));
        Counted {
            sent: three(&self.sent),
            answered: three(&self.answered),
            unanswered: three(&self.unanswered),
            refused: load(&self.refused),
            not_sent: load(&self.not_sent),
            dropped: load(&self.dropped),
            announced: load(&self.announced),
            bytes: load(&self.bytes),
        }
    }
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

pub(crate) fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Questions of one kind.
#[derive(Debug, Default)]
struct Asking {
    in_vain: u32,
    /// How many times less often than usual.
    seldom: u32,
    not_before_us: u64,
}

/// A target's timetable.
pub(crate) struct Timetable {
    interval_us: [Option<u64>; 3],
    asking: [Asking; 3],
    is_answering: bool,
    burst: Burst,
    hops: Option<(u8, u32)>,
}

/// Bursts of one target.
struct Burst {
    spec: BurstSpec,
    until_us: Option<u64>,
    budget_us: u64,
    filled_us: u64,
}

impl Burst {
    /// A tenth of what has passed is added, and what is used is taken away.
    fn account(&mut self, now_us: u64) {
        let passed_us = now_us.saturating_sub(self.filled_us);
        self.filled_us = now_us;
        let used_us = if self.until_us.is_some() {
            passed_us
        } else {
            0
        };
        let filled_us = self.budget_us.saturating_add(passed_us / 10);
        self.budget_us = filled_us.saturating_sub(used_us).min(us(self.spec.budget));
    }
}

impl Timetable {
    pub(crate) fn new(spec: &TargetSpec, burst: BurstSpec, can: [bool; 3], now_us: u64) -> Self {
        let intervals = [
            Some(spec.interval),
            spec.timestamp_interval,
            spec.ntp.map(|ntp| ntp.interval),
        ];
        let interval_us = [0, 1, 2].map(|at: usize| intervals[at].filter(|_| can[at]).map(us));
        Self {
            interval_us,
            asking: [0; 3].map(|_| Asking {
                seldom: 1,
                ..Asking::default()
            }),
            is_answering: false,
            burst: Burst {
                spec: burst,
                until_us: None,
                budget_us: us(burst.budget),
                filled_us: now_us,
            },
            hops: None,
        }
    }

    /// Time until the next question of this kind; nothing if there is to be none.
    pub(crate) fn interval_us(&self, kind: Kind) -> Option<u64> {
        let usual_us = self.interval_us[kind as usize]?;
        let seldom = u64::from(self.asking[kind as usize].seldom);
        let burst_us = us(self.burst.spec.interval);
        let often_us = match kind {
            _ if self.burst.until_us.is_none() => usual_us,
            Kind::Echo => burst_us,
            Kind::Timestamp => burst_us * 4,
            Kind::Ntp => NTP_BURST_US,
        };
        Some(usual_us.min(often_us).saturating_mul(seldom))
    }

    /// Whether a question of this kind may be sent.
    pub(crate) fn may_ask(&self, kind: Kind, now_us: u64) -> bool {
        self.asking[kind as usize].not_before_us <= now_us
    }

    pub(crate) fn answered(&mut self, kind: Kind) {
        let asking = &mut self.asking[kind as usize];
        (asking.in_vain, asking.seldom) = (0, 1);
        if kind == Kind::Echo {
            self.is_answering = true;
        }
    }

    /// Whether it is to be told that questions of this kind are not answered.
    pub(crate) fn unanswered(&mut self, kind: Kind) -> bool {
        if kind == Kind::Echo {
            self.is_answering = false;
            return false;
        }
        // One that is gone for a while is to be asked as often when it comes back.
        if !self.is_answering {
            return false;
        }
        let asking = &mut self.asking[kind as usize];
        asking.in_vain += 1;
        if asking.in_vain < UNANSWERED {
            return false;
        }
        asking.in_vain = 0;
        let is_news = asking.seldom == 1;
        asking.seldom = (asking.seldom * 2).min(SELDOM_MAX);
        is_news
    }

    /// A server wants to be asked less often, or not at all.
    pub(crate) fn refuses(&mut self, kind: Kind, is_final: bool, now_us: u64) {
        if is_final {
            self.asking[kind as usize].not_before_us = now_us.saturating_add(DENIED_US);
        } else if let Some(interval_us) = &mut self.interval_us[kind as usize] {
            // For good: answers do not take it back.
            *interval_us = (*interval_us)
                .max(NTP_BURST_US)
                .saturating_mul(2)
                .min(us(super::INTERVAL_MAX));
            let interval_us = *interval_us;
            self.asking[kind as usize].not_before_us = now_us.saturating_add(interval_us);
        }
    }

    /// Begins or prolongs a burst; whether it goes on, and whether it begins.
    pub(crate) fn burst(&mut self, now_us: u64, may_begin: bool) -> (bool, bool) {
        self.burst.account(now_us);
        let is_new = self.burst.until_us.is_none();
        if is_new && !may_begin {
            return (false, false);
        }
        let length_us = us(self.burst.spec.length).min(self.burst.budget_us);
        if length_us < us(self.burst.spec.length) / 4 {
            return (!is_new, false);
        }
        self.burst.until_us = Some(now_us.saturating_add(length_us));
        (true, is_new)
    }

    pub(crate) fn burst_end_us(&self) -> Option<u64> {
        self.burst.until_us
    }

    pub(crate) fn end_burst(&mut self, now_us: u64) {
        self.burst.account(now_us);
        self.burst.until_us = None;
    }

    /// Whether these hops are worth telling.
    pub(crate) fn is_news(&mut self, hops: u8) -> bool {
        let count = match self.hops {
            Some((usual, count)) if usual == hops => count.wrapping_add(1),
            _ => 0,
        };
        self.hops = Some((hops, count));
        count < HOPS_TOLD || count.is_multiple_of(HOPS_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{NtpSpec, ProberSpec};
    use super::*;

    fn timetable() -> Timetable {
        let mut spec = TargetSpec::new("a", [127, 0, 0, 1].into());
        spec.ntp = Some(NtpSpec {
            port: 123,
            interval: Duration::from_secs(8),
        });
        let burst = ProberSpec::new(Vec::new()).burst;
        Timetable::new(&spec, burst, [true; 3], 0)
    }

    #[test]
    fn a_burst_asks_more_often_and_ends_with_its_budget() {
        let mut table = timetable();
        let all = |table: &Timetable| Kind::ALL.map(|kind| table.interval_us(kind).unwrap());
        assert_eq!(all(&table), [500_000, 1_000_000, 8_000_000]);
        assert_eq!(table.burst(0, true), (true, true));
        assert_eq!(all(&table), [50_000, 200_000, 2_000_000]);
        let mut now_us = 0;
        while table.burst(now_us, false).0 && table.burst_end_us() > Some(now_us) {
            now_us += 1_000_000;
            assert!(now_us < 400_000_000, "a burst without an end");
        }
        assert!(now_us >= 300_000_000, "{now_us}");
        table.end_burst(now_us);
        assert_eq!(table.burst(now_us, true), (false, false));
        assert_eq!(all(&table), [500_000, 1_000_000, 8_000_000]);
        assert_eq!(table.burst(now_us + 100_000_000, true), (true, true));
    }

    #[test]
    fn a_kind_that_nobody_answers_is_asked_less_often_until_somebody_does() {
        let mut table = timetable();
        for _ in 0..100 {
            assert!(!table.unanswered(Kind::Ntp), "the machine itself is silent");
        }
        table.answered(Kind::Echo);
        let told = (0..1000).filter(|_| table.unanswered(Kind::Ntp)).count();
        assert_eq!(told, 1);
        assert_eq!(table.interval_us(Kind::Ntp), Some(8_000_000 * 64));
        table.answered(Kind::Ntp);
        assert_eq!(table.interval_us(Kind::Ntp), Some(8_000_000));
        assert_eq!(table.interval_us(Kind::Echo), Some(500_000));
    }

    #[test]
    fn a_server_that_refuses_is_left_alone() {
        let mut table = timetable();
        table.refuses(Kind::Ntp, false, 0);
        assert!(!table.may_ask(Kind::Ntp, 15_000_000) && table.may_ask(Kind::Ntp, 16_000_000));
        assert_eq!(table.interval_us(Kind::Ntp), Some(16_000_000));
        table.refuses(Kind::Ntp, true, 0);
        assert!(!table.may_ask(Kind::Ntp, DENIED_US - 1) && table.may_ask(Kind::Ntp, DENIED_US));
        for _ in 0..100 {
            table.refuses(Kind::Ntp, false, u64::MAX);
        }
        assert_eq!(table.interval_us(Kind::Ntp), Some(3_600_000_000));
    }

    #[test]
    fn hops_are_told_when_they_change_and_now_and_then() {
        let mut table = timetable();
        let told: Vec<bool> = [64, 64, 64, 64, 64, 60, 64]
            .map(|hops| table.is_news(hops))
            .into();
        assert_eq!(told, [true, true, true, true, false, true, true]);
        let told = (0..640).filter(|_| table.is_news(64)).count();
        assert_eq!(told, 3 + 10);
    }
}
