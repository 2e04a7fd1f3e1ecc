//! What holds whatever is observed.
#![forbid(unsafe_code)]

use palanquin_watch::{
    Calibration, FINDINGS_MAX, Finding, Level, Observation, ObservationError, PENDING_MAX, Reading,
    Role, TARGETS_MAX, TIME_US_MAX, TargetError, Watcher,
};
use proptest::prelude::*;

/// A detector that takes almost everything for something.
fn nervous() -> Calibration {
    let mut calibration = Calibration::built_in();
    for of in [
        &mut calibration.rise,
        &mut calibration.silence,
        &mut calibration.clock,
    ] {
        (of.weak, of.clear, of.strong) = (0.5, 1.0, 2.0);
    }
    for weights in [&mut calibration.hearing, &mut calibration.deaf] {
        weights.alarm_score = -100.0;
        weights.full_curve = [(0.0, 0.9); 10];
    }
    calibration
}

fn check(finding: &Finding) {
    assert!((0.0..=1.0).contains(&finding.likelihood));
    assert!(finding.score.is_finite());
    assert!(finding.onset_s <= finding.time_s);
    assert!(
        finding
            .ended_s
            .is_none_or(|ended_s| ended_s <= finding.time_s)
    );
    assert!(finding.level < Level::Alarm || finding.break_s.is_some());
    for evidence in &finding.evidence {
        assert!(evidence.value.is_finite() && evidence.log_likelihood_ratio.is_finite());
        assert!(evidence.channel.symbols().contains(&evidence.seen));
    }
}

fn absurd() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => 0.0..50.0_f64,
        1 => any::<f64>(),
        1 => Just(f64::NAN),
        1 => Just(f64::INFINITY),
        1 => Just(-0.0),
        1 => Just(f64::MIN_POSITIVE),
        1 => Just(4.3e12),
    ]
}

fn reading() -> impl Strategy<Value = Reading> {
    prop_oneof![
        6 => absurd().prop_map(|ms| Reading::Rtt { ms }),
        3 => Just(Reading::Lost),
        2 => absurd().prop_map(|ms| Reading::NtpOffset { ms }),
        2 => absurd().prop_map(|ms| Reading::IcmpOffset { ms: -ms }),
        1 => absurd().prop_map(|ms| Reading::NtpHeld { ms }),
        1 => any::<u8>().prop_map(|hops| Reading::Ttl { hops }),
        1 => Just(Reading::Announced),
    ]
}

/// Steps of time in microseconds, some backwards and some very far.
fn step() -> impl Strategy<Value = i64> {
    prop_oneof![
        20 => 0..800_000_i64,
        4 => -1_500_000..0_i64,
        1 => -100_000_000..1_000_000_000_000_i64,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn whatever_is_observed_is_judged_or_refused(
        steps in prop::collection::vec((step(), 0..4_usize, reading()), 1..1500),
        stall in any::<bool>(),
        hears in any::<bool>(),
    ) {
        let mut watcher = Watcher::new(nervous());
        watcher.listen(hears);
        let targets: Vec<_> = (0..4)
            .map(|number| {
                let role = if number == 3 { Role::Host } else { Role::Vm };
                watcher.add(&format!("t{number}"), role).unwrap()
            })
            .collect();
        let (mut now, mut found) = (1_000_000_000_i64, 0);
        for (step, target, reading) in steps {
            now = now.saturating_add(step).max(0);
            let sent_us = now as u64;
            let answer = watcher.observe(Observation { sent_us, target: targets[target], reading });
            match (answer, reading) {
                (Ok(()), Reading::Rtt { ms }) => prop_assert!(ms >= 0.0 && ms.is_finite()),
                (Ok(()), Reading::NtpOffset { ms } | Reading::IcmpOffset { ms }) => {
                    prop_assert!(ms.is_finite());
                }
                (Ok(()), _) => {}
                (Err(ObservationError::TooLate { sent_us, closed_us }), _) => {
                    prop_assert!(sent_us < closed_us);
                }
                (Err(_), _) => {}
            }
            if stall && step > 700_000 {
                watcher.stalled(sent_us.saturating_sub(300_000), sent_us);
            }
            while let Some(finding) = watcher.poll() {
                check(&finding);
                prop_assert_ne!(&finding.target, "t3");
                found += 1;
            }
        }
        watcher.finish();
        while let Some(finding) = watcher.poll() {
            check(&finding);
            found += 1;
        }
        prop_assert_eq!(watcher.dropped(), 0);
        prop_assert!(found < 100_000);
    }

    #[test]
    fn the_order_of_answers_within_their_time_changes_nothing(seed in any::<u64>()) {
        let mut chance = palanquin_watch::synthetic::Chance::new(seed);
        let mut readings: Vec<(u64, u64, Reading)> = (0..400_u64)
            .map(|at| {
                let sent_us = 50_000_000 + at * 500_000;
                let reading = if chance.happens(0.02) || (300..306).contains(&at) {
                    Reading::Lost
                } else {
                    Reading::Rtt { ms: 1.0 + chance.waiting() }
                };
                // Losses are known only after a while.
                let known_us = sent_us + if reading == Reading::Lost { 990_000 } else { 2000 };
                (known_us, sent_us, reading)
            })
            .collect();
        let run = |readings: &[(u64, u64, Reading)]| {
            let mut watcher = Watcher::new(nervous());
            let target = watcher.add("vm", Role::Vm).unwrap();
            for (_, sent_us, reading) in readings {
                let observation = Observation { sent_us: *sent_us, target, reading: *reading };
                watcher.observe(observation).unwrap();
            }
            watcher.finish();
            std::iter::from_fn(|| watcher.poll()).collect::<Vec<_>>()
        };
        let in_order = run(&readings);
        readings.sort_by_key(|(known_us, _, _)| *known_us);
        prop_assert_eq!(run(&readings), in_order);
    }
}

#[test]
fn what_is_not_judged_yet_is_bounded() {
    let mut watcher = Watcher::new(nervous());
    let target = watcher.add("vm", Role::Vm).unwrap();
    let observation = |sent_us| Observation {
        sent_us,
        target,
        reading: Reading::Lost,
    };
    for at in 0..PENDING_MAX as u64 {
        watcher.observe(observation(5_000_000 + at)).unwrap();
    }
    let refused = watcher.observe(observation(5_999_999));
    assert_eq!(refused, Err(ObservationError::TooMany));
    watcher.advance(10_000_000).unwrap();
    assert_eq!(watcher.observe(observation(11_000_000)), Ok(()));
}

#[test]
fn targets_are_named_once_and_bounded() {
    let mut watcher = Watcher::new(nervous());
    for number in 0..TARGETS_MAX {
        watcher.add(&number.to_string(), Role::Vm).unwrap();
    }
    assert_eq!(
        watcher.add("1", Role::Vm),
        Err(TargetError::Taken("1".to_owned()))
    );
    assert_eq!(watcher.add("more", Role::Vm), Err(TargetError::TooMany));
    for name in ["", "a\nb", &"x".repeat(200)] {
        assert_eq!(
            Watcher::new(nervous()).add(name, Role::Vm),
            Err(TargetError::Name)
        );
    }
}

#[test]
fn a_time_beyond_all_times_is_refused_and_years_of_silence_cost_nothing() {
    let mut watcher = Watcher::new(nervous());
    let target = watcher.add("vm", Role::Vm).unwrap();
    let lost = |sent_us| Observation {
        sent_us,
        target,
        reading: Reading::Lost,
    };
    assert_eq!(
        watcher.observe(lost(TIME_US_MAX + 1)),
        Err(ObservationError::Time(TIME_US_MAX + 1))
    );
    assert!(watcher.advance(u64::MAX).is_err());
    watcher.observe(lost(0)).unwrap();
    // 300 years: second by second that would take minutes.
    watcher.observe(lost(TIME_US_MAX)).unwrap();
    watcher.finish();
    let late = watcher.observe(lost(TIME_US_MAX / 2)).unwrap_err();
    assert!(matches!(late, ObservationError::TooLate { .. }));
}

#[test]
fn findings_that_nobody_takes_are_counted() {
    let mut watcher = Watcher::new(nervous());
    let target = watcher.add("vm", Role::Vm).unwrap();
    // Announcements and silences far apart: each an episode of its own, told when it is over.
    for at in 0..FINDINGS_MAX as u64 + 50 {
        let start_us = at * 200_000_000;
        for (after_us, reading) in [
            (0, Reading::Rtt { ms: 1.0 }),
            (500_000, Reading::Lost),
            (1_000_000, Reading::Lost),
            (1_500_000, Reading::Rtt { ms: 1.0 }),
            (1_600_000, Reading::Announced),
        ] {
            let sent_us = start_us + after_us;
            watcher
                .observe(Observation {
                    sent_us,
                    target,
                    reading,
                })
                .unwrap();
        }
    }
    watcher.finish();
    let taken = std::iter::from_fn(|| watcher.poll()).count();
    assert_eq!(taken, FINDINGS_MAX);
    assert!(watcher.dropped() > 0);
}

/// A quiet VM of which the probes in these seconds are lost, and that announces itself in others.
fn watched(lost: &[std::ops::Range<u64>], announced: &[u64]) -> Vec<Finding> {
    let mut watcher = Watcher::new(Calibration::built_in());
    let target = watcher.add("vm", Role::Vm);
    let target = target.expect("a good name");
    let mut see = |sent_us, reading| {
        let seen = watcher.observe(Observation {
            sent_us,
            target,
            reading,
        });
        seen.expect("what may be seen");
    };
    for at in 0..1800 {
        let (sent_us, second) = (at * 500_000, at / 2);
        let is_lost = lost.iter().any(|range| range.contains(&second));
        see(
            sent_us,
            if is_lost {
                Reading::Lost
            } else {
                Reading::Rtt {
                    ms: 0.8 + (at * 7919 % 97) as f64 / 200.0,
                }
            },
        );
        if announced.contains(&second) && at % 2 == 0 {
            for _ in 0..4 {
                see(sent_us, Reading::Announced);
            }
        }
    }
    watcher.finish();
    std::iter::from_fn(|| watcher.poll()).collect()
}

#[test]
fn what_breaks_again_after_a_while_is_another_episode() {
    let twice = watched(&[700..705, 727..732], &[732, 733]);
    let last = twice.last().unwrap();
    assert_eq!(last.episode, 2, "{twice:?}");
    assert!(last.onset_s >= 720.0, "{last:?}");
    assert_eq!(last.class, palanquin_watch::Class::Migration, "{last:?}");
    // Silent, and announced when it is over: that is one.
    let once = watched(&[700..702, 702..709], &[709, 710]);
    assert!(once.iter().all(|finding| finding.episode == 1), "{once:?}");
}

#[test]
fn many_channels_that_each_say_little_make_no_alarm() {
    let mut calibration = Calibration::built_in();
    calibration.hearing.alarm_score = -100.0;
    calibration.hearing.full_curve = [(0.0, 0.9); 10];
    // Nothing means more in a migration than otherwise.
    calibration.hearing.full = [[[0.1; 6]; 11]; 10];
    let mut watcher = Watcher::new(calibration);
    watcher.listen(true);
    let target = watcher.add("vm", Role::Vm).unwrap();
    for at in 0..1800 {
        let reading = if (1400..1410).contains(&at) {
            Reading::Lost
        } else {
            Reading::Rtt { ms: 1.0 }
        };
        let observation = Observation {
            sent_us: at * 500_000,
            target,
            reading,
        };
        watcher.observe(observation).unwrap();
    }
    watcher.finish();
    while let Some(finding) = watcher.poll() {
        assert!(finding.level < Level::Alarm, "{finding:?}");
    }
}

/// A VM with a clock, of which every answer in this time is lost or comes at its end, and that lags by as much from then on.
fn stopped(for_ms: u64, are_kept: bool, lag_ms: f64, hears: bool) -> Vec<Finding> {
    let mut watcher = Watcher::new(Calibration::built_in());
    watcher.listen(hears);
    let target = watcher.add("vm", Role::Vm).expect("a good name");
    let mut chance = palanquin_watch::synthetic::Chance::new(5);
    let (from_us, until_us) = (700_100_000, 700_100_000 + for_ms * 1000);
    let mut at_us = 0;
    while at_us < 900_000_000 {
        let mut see = |sent_us, reading| {
            let observation = Observation {
                sent_us,
                target,
                reading,
            };
            watcher.observe(observation).expect("what may be seen");
        };
        let waits_us = until_us - at_us.clamp(from_us, until_us);
        let waits_us = if at_us < from_us { 0 } else { waits_us };
        let mut ms = 1.0 + 0.2 * chance.waiting();
        let is_lost = waits_us > 0 && (!are_kept || waits_us > 900_000);
        if are_kept {
            ms += waits_us as f64 / 1e3;
        }
        see(
            at_us,
            if is_lost {
                Reading::Lost
            } else {
                Reading::Rtt { ms }
            },
        );
        let lags_ms = if at_us < until_us { 0.0 } else { -lag_ms };
        if waits_us == 0 && at_us % 1_000_000 == 0 {
            let ms = (lags_ms + 0.5 * chance.share()).floor();
            see(at_us, Reading::IcmpOffset { ms });
        }
        at_us += 500_000;
    }
    watcher.finish();
    std::iter::from_fn(|| watcher.poll()).collect()
}

fn seen(finding: &Finding, channel: palanquin_watch::Channel) -> Option<&'static str> {
    let mut all = finding.evidence.iter();
    all.find(|of| of.channel == channel).map(|of| of.seen)
}

#[test]
fn a_vm_that_stood_still_and_kept_what_it_was_asked_was_paused() {
    for hears in [true, false] {
        let findings = stopped(780, true, 780.0, hears);
        let last = findings.last().unwrap();
        assert_eq!(last.class, palanquin_watch::Class::Pause, "{last:?}");
        assert!(last.level < Level::Alarm, "{last:?}");
        let clock = seen(last, palanquin_watch::Channel::Clock);
        assert_eq!(clock, Some("lag-fits-silence"));
        let wake = seen(last, palanquin_watch::Channel::Wake);
        assert_eq!(wake, Some("kept-back"));
    }
}

#[test]
fn a_clock_that_lags_by_more_than_it_could_have_stood_still_was_set() {
    for hears in [true, false] {
        let findings = stopped(0, false, 900.0, hears);
        let last = findings.last().unwrap();
        assert_eq!(last.class, palanquin_watch::Class::ClockStep, "{last:?}");
        let clock = seen(last, palanquin_watch::Channel::Clock);
        assert_eq!(clock, Some("lag-longer-than-silence"));
    }
}

#[test]
fn without_an_ear_nobody_says_that_nothing_was_announced() {
    let announcement = palanquin_watch::Channel::Announcement;
    let (with, without) = (
        stopped(780, false, 780.0, true),
        stopped(780, false, 780.0, false),
    );
    assert!(!with.is_empty() && !without.is_empty());
    assert!(with.iter().all(|of| seen(of, announcement) == Some("none")));
    assert!(without.iter().all(|of| seen(of, announcement).is_none()));
    let likelihood = |of: &[Finding]| of.last().unwrap().likelihood;
    assert!(likelihood(&without) > likelihood(&with));
}

#[test]
fn who_has_heard_one_announcement_could_hear_others() {
    let mut watcher = Watcher::new(Calibration::built_in());
    let target = watcher.add("vm", Role::Vm).unwrap();
    assert!(!watcher.hears());
    let observation = |sent_us| Observation {
        sent_us,
        target,
        reading: Reading::Announced,
    };
    watcher.observe(observation(1_000_000)).unwrap();
    assert!(watcher.hears());
    watcher.listen(false);
    assert!(!watcher.hears());
}
