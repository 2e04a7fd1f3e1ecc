//! How much may be done at once, and in an hour.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use palanquin_api::config::Limits;
use palanquin_trust::decision::{Gate, Reason};

use super::lock;

/// What the limits are about.
const HOUR: Duration = Duration::from_secs(3600);

/// Counts what begins.
#[derive(Debug)]
pub struct Quotas {
    limits: Limits,
    starts: Mutex<VecDeque<Start>>,
    arrivals: Mutex<VecDeque<(Instant, String)>>,
}

#[derive(Debug)]
struct Start {
    at: Instant,
    operator: String,
    target: String,
}

/// Migrations under way that leave this host, as the limits see them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaving {
    /// All.
    pub all: usize,
    /// Ordered by the same operator.
    pub of_operator: usize,
    /// To the same host.
    pub to_target: usize,
}

/// The right to begin: while it lives nobody else begins.
#[derive(Debug)]
pub struct Turn<'a> {
    starts: MutexGuard<'a, VecDeque<Start>>,
    operator: String,
    target: String,
}

impl Turn<'_> {
    /// It has begun, and counts.
    pub fn begun(mut self) {
        let (operator, target) = (
            std::mem::take(&mut self.operator),
            std::mem::take(&mut self.target),
        );
        self.starts.push_back(Start {
            at: Instant::now(),
            operator,
            target,
        });
    }
}

fn exceeded(code: &'static str, limit: &str, most: u32, what: &str) -> Reason {
    Reason::new(
        Gate::Quota,
        code,
        format!("{most} {what}, and more are not allowed"),
        &format!("Wait, or raise `limits.{limit}`."),
    )
}

fn reaches(count: usize, most: u32) -> bool {
    count >= usize::try_from(most).unwrap_or(usize::MAX)
}

impl Quotas {
    /// With these limits, and nothing begun.
    pub fn new(limits: &Limits) -> Self {
        Self {
            limits: limits.clone(),
            starts: Mutex::default(),
            arrivals: Mutex::default(),
        }
    }

    /// Whether that operator may begin to move something to that host. `leaving` is asked while nobody else begins.
    ///
    /// # Errors
    ///
    /// Every limit that is reached.
    pub fn turn(
        &self,
        operator: &str,
        target: &str,
        leaving: impl FnOnce() -> Leaving,
    ) -> Result<Turn<'_>, Vec<Reason>> {
        let mut starts = lock(&self.starts);
        while starts
            .front()
            .is_some_and(|start| start.at.elapsed() >= HOUR)
        {
            starts.pop_front();
        }
        let limits = &self.limits;
        let leaving = leaving();
        let of_operator = starts.iter().filter(|start| start.operator == operator);
        let to_target = starts.iter().filter(|start| start.target == target);
        let at_once = [
            (
                "quota-outbound",
                "max-outbound",
                leaving.all,
                limits.max_outbound,
                "migrations leave this host",
            ),
            (
                "quota-operator",
                "max-outbound-per-operator",
                leaving.of_operator,
                limits.max_outbound_per_operator,
                "migrations that this operator has ordered leave this host",
            ),
            (
                "quota-target",
                "max-outbound-per-target",
                leaving.to_target,
                limits.max_outbound_per_target,
                "migrations go to that host",
            ),
            (
                "quota-hour",
                "starts-per-hour",
                starts.len(),
                limits.starts_per_hour,
                "migrations have begun within an hour",
            ),
            (
                "quota-hour-operator",
                "starts-per-hour-per-operator",
                of_operator.count(),
                limits.starts_per_hour_per_operator,
                "migrations of this operator have begun within an hour",
            ),
            (
                "quota-hour-target",
                "starts-per-hour-per-target",
                to_target.count(),
                limits.starts_per_hour_per_target,
                "migrations to that host have begun within an hour",
            ),
        ];
        let reasons: Vec<Reason> = at_once
            .into_iter()
            .filter(|(_, _, count, most, _)| reaches(*count, *most))
            .map(|(code, limit, _, most, what)| exceeded(code, limit, most, what))
            .collect();
        if !reasons.is_empty() {
            return Err(reasons);
        }
        Ok(Turn {
            starts,
            operator: operator.to_owned(),
            target: target.to_owned(),
        })
    }

    /// Whether one more migration may arrive from that host, of which so many others are arriving; `counts` says whether
    /// this one is to be remembered.
    ///
    /// # Errors
    ///
    /// Every limit that is reached.
    pub fn arrive(&self, source: &str, arriving: usize, counts: bool) -> Result<(), Vec<Reason>> {
        let mut arrivals = lock(&self.arrivals);
        while arrivals.front().is_some_and(|(at, _)| at.elapsed() >= HOUR) {
            arrivals.pop_front();
        }
        let limits = &self.limits;
        let within = arrivals.iter().filter(|(_, from)| from == source).count();
        let mut reasons = Vec::new();
        if reaches(arriving, limits.max_inbound_per_source) {
            reasons.push(exceeded(
                "quota-source",
                "max-inbound-per-source",
                limits.max_inbound_per_source,
                "migrations arrive from that host",
            ));
        }
        if reaches(within, limits.arrivals_per_hour_per_source) {
            reasons.push(exceeded(
                "quota-hour-source",
                "arrivals-per-hour-per-source",
                limits.arrivals_per_hour_per_source,
                "migrations of that host have begun to arrive within an hour",
            ));
        }
        if !reasons.is_empty() {
            return Err(reasons);
        }
        if counts {
            arrivals.push_back((Instant::now(), source.to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            max_outbound: 3,
            max_outbound_per_operator: 2,
            max_outbound_per_target: 1,
            max_inbound_per_source: 1,
            starts_per_hour: 4,
            starts_per_hour_per_operator: 3,
            starts_per_hour_per_target: 2,
            arrivals_per_hour_per_source: 2,
            ..Limits::default()
        }
    }

    fn codes<T>(result: Result<T, Vec<Reason>>) -> Vec<&'static str> {
        let reasons = result.err().unwrap_or_default();
        assert!(reasons.iter().all(|reason| reason.gate == Gate::Quota));
        reasons.into_iter().map(|reason| reason.code).collect()
    }

    #[test]
    fn each_limit_of_what_leaves_at_once_has_its_code() {
        let quotas = Quotas::new(&limits());
        let turn = |all, of_operator, to_target| {
            codes(quotas.turn("alice", "b", || Leaving {
                all,
                of_operator,
                to_target,
            }))
        };
        assert!(turn(2, 1, 0).is_empty());
        assert_eq!(turn(3, 1, 0), ["quota-outbound"]);
        assert_eq!(turn(2, 2, 0), ["quota-operator"]);
        assert_eq!(
            turn(3, 2, 1),
            ["quota-outbound", "quota-operator", "quota-target"]
        );
    }

    #[test]
    fn each_limit_of_what_begins_in_an_hour_has_its_code() {
        let quotas = Quotas::new(&limits());
        let turn = |operator, target| quotas.turn(operator, target, Leaving::default);
        turn("alice", "b").unwrap().begun();
        // A turn that was not used does not count.
        drop(turn("alice", "b").unwrap());
        turn("alice", "b").unwrap().begun();
        assert_eq!(codes(turn("alice", "b")), ["quota-hour-target"]);
        turn("alice", "c").unwrap().begun();
        assert_eq!(codes(turn("alice", "c")), ["quota-hour-operator"]);
        turn("bob", "c").unwrap().begun();
        assert_eq!(codes(turn("carol", "d")), ["quota-hour"]);
    }

    #[test]
    fn a_source_that_brings_too_much_is_told_so_and_others_are_not() {
        let quotas = Quotas::new(&limits());
        assert_eq!(codes(quotas.arrive("a", 1, true)), ["quota-source"]);
        quotas.arrive("a", 0, false).unwrap();
        quotas.arrive("a", 0, true).unwrap();
        quotas.arrive("a", 0, true).unwrap();
        assert_eq!(codes(quotas.arrive("a", 0, true)), ["quota-hour-source"]);
        quotas.arrive("c", 0, true).unwrap();
    }
}
