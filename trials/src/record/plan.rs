//! What happens in a session, and in which order.

use palanquin_watch::synthetic::Chance;

/// Something to do.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Action {
    /// Moved by Palanquin.
    Palanquin {
        strategy: &'static str,
        /// Mbit/s of the migration; none for as much as there is.
        limit_mbit_s: Option<u32>,
        /// Aborted after so many seconds.
        abort_s: Option<f64>,
    },
    /// Moved by QEMU itself.
    Qemu {
        channels: u32,
        limit_mbit_s: Option<u32>,
        abort_s: Option<f64>,
        /// Longest pause, in milliseconds.
        downtime_ms: u32,
    },
    /// A file of so many MiB is copied between the hosts.
    Copy { mib: u64 },
    /// A guest's CPU is kept busy.
    Load { of_palanquin: bool, seconds: u64 },
    /// Everybody's way to the guests is full.
    Congestion { seconds: u64 },
    /// A guest's link is lost for moments.
    Loss { of_palanquin: bool, seconds: u64 },
    /// A guest's link is down.
    Outage { of_palanquin: bool, seconds: f64 },
    /// The guest stands still, and goes on.
    Pause { seconds: f64 },
    /// A guest's clock is set.
    Step { of_palanquin: bool, ms: i64 },
    /// The guest starts anew.
    Reboot,
    /// Nothing.
    Quiet { seconds: u64 },
}

/// A session.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) link_mbit_s: Option<u32>,
    pub(super) fill_mib: u64,
    pub(super) dirty_mib_s: u64,
    pub(super) actions: Vec<Action>,
}

/// Migrations of each kind in every session.
const MIGRATIONS: usize = 3;

impl Plan {
    /// What a seed gives is the same each time.
    pub(super) fn new(seed: u64, count: usize) -> Self {
        let mut chance = Chance::new(seed);
        let pick = |chance: &mut Chance, of: usize| (chance.number() % of as u64) as usize;
        // Every other session is held out: both parts have everything.
        let pair = seed / 2;
        let link_mbit_s = [None, Some(1000), Some(300), Some(100)][(pair % 4) as usize];
        let fill_mib = [24, 48, 64][pick(&mut chance, 3)];
        let mut actions = Vec::new();
        for at in 0..MIGRATIONS {
            // Some take less than a second, some half a minute.
            let limit = |chance: &mut Chance| {
                let mbit = (fill_mib + 40) as f64 * 8.4 / chance.scale(2.0, 25.0);
                (!chance.happens(0.25)).then_some(mbit as u32)
            };
            let strategies = [
                "auto",
                "improved",
                "pre-copy",
                "hybrid",
                "post-copy",
                "stop-and-copy",
            ];
            let first = pair as usize * MIGRATIONS;
            actions.push(Action::Palanquin {
                strategy: strategies[(first + at) % strategies.len()],
                limit_mbit_s: limit(&mut chance),
                abort_s: None,
            });
            actions.push(Action::Qemu {
                channels: [2, 1, 4][at % 3],
                limit_mbit_s: limit(&mut chance),
                abort_s: None,
                downtime_ms: [300, 50, 1000][pick(&mut chance, 3)],
            });
        }
        let mut others = Self::others(&mut chance, link_mbit_s);
        shuffle(&mut others, &mut chance);
        others.truncate(count.saturating_sub(actions.len()));
        actions.extend(others);
        shuffle(&mut actions, &mut chance);
        actions.truncate(count);
        Self {
            link_mbit_s,
            fill_mib,
            dirty_mib_s: [0, 1, 4][pick(&mut chance, 3)],
            actions,
        }
    }

    fn others(chance: &mut Chance, link_mbit_s: Option<u32>) -> Vec<Action> {
        let of_palanquin = chance.happens(0.5);
        let sign = if chance.happens(0.5) { 1 } else { -1 };
        // Two gigabytes, or as much as twenty seconds are enough for.
        let most = link_mbit_s.map_or(2048, |mbit| u64::from(mbit) * 20 / 8);
        let abort_s = Some(chance.between(4.0, 12.0));
        vec![
            Action::Palanquin {
                strategy: "auto",
                limit_mbit_s: Some(12),
                abort_s,
            },
            Action::Qemu {
                channels: 2,
                limit_mbit_s: Some(12),
                abort_s,
                downtime_ms: 300,
            },
            Action::Copy {
                mib: most.min(2048),
            },
            Action::Copy {
                mib: (most / 2).min(2048),
            },
            Action::Load {
                of_palanquin,
                seconds: 10 + chance.number() % 20,
            },
            Action::Congestion {
                seconds: 10 + chance.number() % 15,
            },
            Action::Loss {
                of_palanquin,
                seconds: 10 + chance.number() % 15,
            },
            Action::Outage {
                of_palanquin: !of_palanquin,
                seconds: chance.scale(0.2, 10.0),
            },
            Action::Pause {
                seconds: chance.scale(0.05, 5.0),
            },
            Action::Pause {
                seconds: chance.scale(0.05, 1.0),
            },
            Action::Step {
                of_palanquin,
                ms: sign * (20 + (chance.number() % 480) as i64),
            },
            Action::Reboot,
            Action::Quiet { seconds: 20 },
        ]
    }
}

fn shuffle<T>(values: &mut [T], chance: &mut Chance) {
    for last in (1..values.len()).rev() {
        let other = (chance.number() % (last as u64 + 1)) as usize;
        values.swap(last, other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_follows_from_its_seed_and_has_migrations_of_both_kinds() {
        let (a, b) = (Plan::new(3, 14), Plan::new(3, 14));
        assert_eq!(a.actions, b.actions);
        assert_eq!(a.actions.len(), 14);
        let count = |is: &dyn Fn(&Action) -> bool| a.actions.iter().filter(|of| is(of)).count();
        let moved = |of: &Action| matches!(of, Action::Palanquin { abort_s: None, .. });
        assert_eq!(count(&moved), MIGRATIONS);
        let moved = |of: &Action| matches!(of, Action::Qemu { abort_s: None, .. });
        assert_eq!(count(&moved), MIGRATIONS);
    }

    #[test]
    fn four_sessions_give_both_parts_every_strategy() {
        for part in 0..2 {
            let strategies: std::collections::BTreeSet<_> = [8 + part, 10 + part]
                .into_iter()
                .flat_map(|seed| Plan::new(seed, 14).actions)
                .filter_map(|action| match action {
                    Action::Palanquin {
                        strategy,
                        abort_s: None,
                        ..
                    } => Some(strategy),
                    _ => None,
                })
                .collect();
            assert_eq!(strategies.len(), 6, "{strategies:?}");
        }
    }
}
