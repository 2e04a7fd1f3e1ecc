//! The built-in calibration on synthetic traces that it was not made from. That shows that calibrating does what it says;
//! it says nothing about real migrations.
#![forbid(unsafe_code)]

use palanquin_watch::calibrate::{Watched, quiet_day, watch};
use palanquin_watch::synthetic::Trial;
use palanquin_watch::{Calibration, Class, Level};

/// Seeds that calibrating does not use.
const SEEDS: std::ops::Range<u64> = 900_000..900_025;

fn trials(class: Class) -> Vec<Watched> {
    let calibration = Calibration::built_in();
    SEEDS
        .map(|seed| watch(Trial::new(class, seed), &calibration, true))
        .collect()
}

fn alarms(watched: &[Watched]) -> usize {
    watched
        .iter()
        .filter(|one| one.level() >= Some(Level::Alarm))
        .count()
}

#[test]
fn quiet_days_are_as_quiet_as_calibrated() {
    let calibration = Calibration::built_in();
    for hears in [true, false] {
        let (mut warnings, mut alarms) = (0, 0);
        for day in 0..20 {
            quiet_day(800_000 + day, &calibration, hears, |_, watcher, _| {
                while let Some(finding) = watcher.poll() {
                    if finding.ended_s.is_none() {
                        warnings += usize::from(finding.level == Level::Warn);
                        alarms += usize::from(finding.level >= Level::Alarm);
                    }
                }
            });
        }
        // Expected are 20 and 2. Days differ more than chance alone would make them: some targets are noisier than others.
        assert!(warnings <= 45, "{warnings} warnings in 20 days");
        assert!(alarms <= 8, "{alarms} alarms in 20 days");
    }
}

#[test]
fn a_copy_of_a_file_is_hardly_ever_an_alarm_and_a_migration_often() {
    let (copies, migrations) = (trials(Class::CopyTraffic), trials(Class::Migration));
    let (of_copies, of_migrations) = (alarms(&copies), alarms(&migrations));
    assert!(of_copies <= 1, "{of_copies} of {}", copies.len());
    assert!(
        of_migrations >= 6,
        "{of_migrations} of {}",
        migrations.len()
    );
}

#[test]
fn most_migrations_are_warned_of_before_the_vm_stands_still() {
    let watched = trials(Class::Migration);
    let is_warned = |one: &&Watched| {
        let (from_us, _) = one.trial.blackout_us.unwrap();
        one.findings
            .iter()
            .any(|finding| finding.level == Level::Warn && finding.time_s * 1e6 < from_us as f64)
    };
    let long = watched.iter().filter(|one| {
        let (from_us, _) = one.trial.blackout_us.unwrap();
        from_us > (one.trial.from_s + 10) * 1_000_000
    });
    let (count, warned) = (long.clone().count(), long.filter(is_warned).count());
    assert!(count >= 5 && warned * 2 > count, "{warned} of {count}");
}

#[test]
fn the_same_silence_and_lag_without_a_growth_before_is_no_alarm() {
    let watched = trials(Class::Pause);
    let named = watched
        .iter()
        .filter(|one| one.class() == Some(Class::Pause))
        .count();
    assert!(named >= 3, "{named} of {}", watched.len());
    assert!(alarms(&watched) <= 2, "{} alarms", alarms(&watched));
}

#[test]
fn a_reboot_is_named() {
    let watched = trials(Class::Reboot);
    let named = watched
        .iter()
        .filter(|one| one.class() == Some(Class::Reboot))
        .count();
    assert!(
        named * 3 > watched.len() * 2,
        "{named} of {}",
        watched.len()
    );
    assert_eq!(alarms(&watched), 0);
}

#[test]
fn clocks_that_are_set_forward_are_never_alarms() {
    for one in trials(Class::ClockStep) {
        let forward = one.findings.iter().any(|finding| {
            finding
                .evidence
                .iter()
                .any(|evidence| evidence.seen == "forward")
        });
        assert!(
            !forward || one.level() < Some(Level::Alarm),
            "{:?}",
            one.findings
        );
    }
}
