//! Whether somebody takes note of what is written to memory: first writes take longer then.

use std::collections::VecDeque;

use super::sample::Writes;
use super::thresholds;

/// What is usual is judged by so many looks: at one every five seconds, those of 43 minutes ...
const USUAL: usize = 512;
/// ... of which so large a share was at most as slow. What is copied for most of that time is usual in the end.
const LOW: f64 = 0.2;
/// Before so many looks nothing is usual: it may be copied when this begins.
const KNOWN: usize = 64;
/// Slow looks that it takes, ...
const SLOW: usize = 2;
/// ... among so many. Each is at other pages.
const AMONG: usize = 4;

/// First writes are slow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Copied {
    /// How many times as long a first write takes as one right after it, in the middle of the slow looks.
    pub(super) times: f64,
    /// When the first of them was.
    pub(super) since_us: u64,
    /// Whether it was not so before.
    pub(super) is_new: bool,
}

/// Looks at writes so far.
#[derive(Default)]
pub(super) struct Copying {
    looks: VecDeque<f64>,
    /// Of the last ones when, and by how many times, first writes were slow.
    slow: VecDeque<Option<(u64, f64)>>,
    is_told: bool,
    statistic: f64,
}

impl Copying {
    /// Takes the next look. Tells as long as enough of the last ones were slow.
    pub(super) fn read(&mut self, writes: &Writes, at_us: u64) -> Option<Copied> {
        if writes.again_ns <= 0.0 {
            return None;
        }
        let times = writes.first_ns / writes.again_ns;
        let usual = at_share(self.looks.iter().copied(), LOW);
        let usual = usual.filter(|_| self.looks.len() >= KNOWN);
        let usual = usual.unwrap_or(1.0).max(1.0);
        self.statistic = times / usual;
        let is_slow = self.statistic >= thresholds::FIRST_WRITE_TIMES && writes.are_slow();
        keep(&mut self.looks, times, USUAL);
        keep(&mut self.slow, is_slow.then_some((at_us, times)), AMONG);
        let slow = self.slow.iter().copied().flatten();
        if slow.clone().count() < SLOW {
            // It goes on until no look among those is slow: a round may be long.
            self.is_told &= slow.count() > 0;
            return None;
        }
        let copied = Copied {
            times: at_share(slow.clone().map(|(_, times)| times), 0.5)?,
            since_us: slow.map(|(at_us, _)| at_us).min()?,
            is_new: !self.is_told,
        };
        self.is_told = true;
        Some(copied)
    }

    /// How many times as long as usual the last first write took, compared with one right after it.
    pub(super) fn statistic(&self) -> f64 {
        self.statistic
    }
}

fn keep<T>(values: &mut VecDeque<T>, value: T, most: usize) {
    if values.len() == most {
        values.pop_front();
    }
    values.push_back(value);
}

/// The value below which that share of them lies.
fn at_share(values: impl Iterator<Item = f64>, share: f64) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get((values.len() as f64 * share) as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(copying: &mut Copying, first_ns: f64) -> Option<Copied> {
        let again_ns = 40.0;
        copying.read(&Writes { first_ns, again_ns }, 0)
    }

    #[test]
    fn two_slow_looks_near_each_other_are_told_and_told_as_new_once() {
        let mut copying = Copying::default();
        for _ in 0..100 {
            assert_eq!(look(&mut copying, 42.0), None);
        }
        assert_eq!(look(&mut copying, 400.0), None);
        assert_eq!(look(&mut copying, 42.0), None);
        let copied = look(&mut copying, 480.0).unwrap();
        assert!(copied.is_new && copied.times >= 10.0, "{copied:?}");
        assert!(!look(&mut copying, 400.0).unwrap().is_new);
        for _ in 0..AMONG {
            look(&mut copying, 42.0);
        }
        look(&mut copying, 400.0);
        assert!(look(&mut copying, 400.0).unwrap().is_new);
    }

    #[test]
    fn a_copy_that_goes_on_from_the_beginning_is_told() {
        let mut copying = Copying::default();
        assert_eq!(look(&mut copying, 400.0), None);
        assert!(look(&mut copying, 400.0).is_some_and(|copied| copied.is_new));
    }

    #[test]
    fn one_slow_look_is_none_and_what_is_always_so_becomes_usual() {
        let mut copying = Copying::default();
        for at in 0..200 {
            let first_ns = if at % 10 == 9 { 800.0 } else { 42.0 };
            assert_eq!(look(&mut copying, first_ns), None, "{at}");
        }
        let told = (0..1000).filter(|_| look(&mut copying, 400.0).is_some());
        assert!((300..520).contains(&told.count()));
    }
}
