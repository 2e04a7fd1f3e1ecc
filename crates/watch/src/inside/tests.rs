use super::*;
use crate::synthetic::Chance;

/// A guest that is read every five seconds.
struct Guest {
    inside: Inside,
    chance: Chance,
    raw_ns: i64,
    day_ns: i64,
    rtc_ns: i64,
    asleep_ns: i64,
    tsc: u64,
    memory: f64,
    /// How long a first write takes.
    first_ns: f64,
    far: f64,
    /// How far the neighbours' clocks are ahead.
    ahead_ms: f64,
    brand: &'static str,
}

const EVERY_NS: i64 = 5_000_000_000;

impl Guest {
    fn new() -> Self {
        Self {
            inside: Inside::new(),
            chance: Chance::new(1),
            raw_ns: 9_000_000_000,
            day_ns: 1_700_000_000_000_000_000,
            rtc_ns: 1_700_000_000_400_000_000,
            asleep_ns: 0,
            tsc: 77_000_000,
            memory: 60.0,
            first_ns: 40.0,
            far: 1.0,
            ahead_ms: 0.0,
            brand: "One",
        }
    }

    /// Time goes on: all of its own clocks do, by the counter at 2 GHz.
    fn sample(&mut self) -> Sample {
        self.goes_on(EVERY_NS);
        // The hardware clock went on to this second a while ago.
        let since_ns = self.rtc_ns % 1_000_000_000;
        let error_ns = (self.chance.normal().abs() * 2e5) as i64;
        let edge = Edge {
            rtc_s: self.rtc_ns / 1_000_000_000,
            at_ns: self.raw_ns - since_ns + (self.chance.normal() * 2e5) as i64,
            error_ns,
        };
        let mut noise = |width: f64| (width * self.chance.normal()).exp();
        let speeds = Speeds {
            alu_ns: Some(1.5 * noise(0.2)),
            first_cache_ns: Some(1.2 * noise(0.02)),
            second_cache_ns: None,
            memory_ns: Some(self.memory * noise(0.02)),
            syscall_ns: Some(120.0 * noise(0.02)),
            cpuid_ns: Some(1500.0 * noise(0.02)),
        };
        let writes = Writes {
            first_ns: self.first_ns * noise(0.05),
            again_ns: 40.0 * noise(0.05),
        };
        let alu = speeds.alu_ns.unwrap();
        let speeds = Speeds {
            alu_ns: Some(alu),
            first_cache_ns: speeds.first_cache_ns.map(|ns| ns * alu),
            memory_ns: speeds.memory_ns.map(|ns| ns * alu),
            syscall_ns: speeds.syscall_ns.map(|ns| ns * alu),
            cpuid_ns: speeds.cpuid_ns.map(|ns| ns * alu),
            ..speeds
        };
        let neighbours = ["a", "b", "c"].map(|name| Neighbour {
            name: name.to_owned(),
            rtt_ms: Some(0.4 * self.far * noise(0.1)),
            offset_ms: Some((self.ahead_ms + 12.0).floor()),
        });
        let fingerprint = [("cpu.brand", self.brand), ("clocksource", "tsc")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        Sample {
            clocks: Clocks {
                raw_ns: self.raw_ns,
                monotonic_ns: self.raw_ns - self.asleep_ns,
                boottime_ns: self.raw_ns,
                realtime_ns: self.day_ns,
                tsc: Some(self.tsc),
                error_ns: 3000,
                rtc: Some(edge),
            },
            late_ms: 0.1,
            stolen_ms: Some(0.0),
            fingerprint: Some(fingerprint.into()),
            speeds: Some(speeds),
            writes: Some(writes),
            neighbours: neighbours.into(),
        }
    }

    fn goes_on(&mut self, ns: i64) {
        self.raw_ns += ns;
        self.day_ns += ns;
        self.rtc_ns += ns;
        self.tsc = self.tsc.wrapping_add((2 * ns).cast_unsigned());
    }

    fn stands_still(&mut self, ms: i64) {
        self.rtc_ns += ms * 1_000_000;
        self.ahead_ms += ms as f64;
    }

    fn watch(&mut self, samples: usize) -> Vec<Finding> {
        let mut all = Vec::new();
        for _ in 0..samples {
            let sample = self.sample();
            all.extend(self.inside.take(&sample).unwrap());
        }
        all
    }
}

/// What was told last of each episode.
fn last(findings: &[Finding]) -> Vec<(Level, Class)> {
    let mut episodes = BTreeMap::new();
    for finding in findings {
        episodes.insert(finding.episode, (finding.level, finding.class));
    }
    episodes.into_values().collect()
}

#[test]
fn a_guest_to_which_nothing_happens_finds_nothing_in_a_day() {
    let mut guest = Guest::new();
    assert_eq!(guest.watch(17_280), []);
}

#[test]
fn a_pause_is_found_with_its_length_and_is_not_said_to_be_a_migration() {
    for ms in [20, 400, 90_000] {
        let mut guest = Guest::new();
        guest.watch(100);
        guest.stands_still(ms);
        let found = guest.watch(60);
        assert_eq!(last(&found), [(Level::Warn, Class::Pause)], "{found:?}");
        let stood_ms = found[0].stood_still_ms.unwrap();
        assert!((stood_ms - ms as f64).abs() < 2.0, "{stood_ms}");
        assert!(found.last().unwrap().ended_s.is_some());
    }
}

#[test]
fn a_pause_is_found_by_the_neighbours_where_there_is_no_hardware_clock() {
    let mut guest = Guest::new();
    let mut found = Vec::new();
    for at in 0..150 {
        if at == 100 {
            guest.stands_still(300);
        }
        let mut sample = guest.sample();
        sample.clocks.rtc = None;
        found.extend(guest.inside.take(&sample).unwrap());
    }
    assert_eq!(last(&found), [(Level::Warn, Class::Pause)], "{found:?}");
    assert!((found[0].stood_still_ms.unwrap() - 300.0).abs() < 2.0);
}

#[test]
fn the_clock_of_an_only_neighbour_is_not_believed_alone() {
    let mut guest = Guest::new();
    let mut found = Vec::new();
    for at in 0..150 {
        if at == 100 {
            guest.stands_still(300);
        }
        let mut sample = guest.sample();
        sample.clocks.rtc = None;
        sample.neighbours.truncate(1);
        found.extend(guest.inside.take(&sample).unwrap());
    }
    assert_eq!(last(&found), [(Level::Note, Class::ClockStep)], "{found:?}");
}

#[test]
fn one_neighbour_whose_clock_was_set_or_who_is_far_says_nothing() {
    let mut guest = Guest::new();
    for at in 0..300 {
        let mut sample = guest.sample();
        if at > 100 {
            sample.neighbours[1].offset_ms = Some(5000.0);
            sample.neighbours[2].rtt_ms = Some(30.0);
        }
        assert_eq!(guest.inside.take(&sample).unwrap(), [], "{at}");
    }
}

#[test]
fn a_guest_that_goes_on_elsewhere_says_so_as_surely_as_it_can() {
    let moved = |change: &dyn Fn(&mut Guest)| {
        let mut guest = Guest::new();
        guest.watch(100);
        change(&mut guest);
        last(&guest.watch(60))
    };
    let confirmed = [(Level::Confirmed, Class::Migration)];
    let alarm = [(Level::Alarm, Class::Migration)];
    assert_eq!(
        moved(&|guest| {
            guest.stands_still(300);
            guest.brand = "Two";
        }),
        confirmed
    );
    assert_eq!(moved(&|guest| guest.brand = "Two"), alarm);
    assert_eq!(
        moved(&|guest| {
            guest.stands_still(300);
            guest.memory = 120.0;
        }),
        alarm
    );
    assert_eq!(
        moved(&|guest| {
            guest.stands_still(300);
            guest.memory = 120.0;
            guest.far = 2.0;
        }),
        confirmed
    );
    let warn = [(Level::Warn, Class::Migration)];
    assert_eq!(
        moved(&|guest| {
            guest.memory = 30.0;
            guest.far = 0.5;
        }),
        warn
    );
    assert_eq!(
        moved(&|guest| guest.far = 3.0),
        [(Level::Warn, Class::Congestion)]
    );
    assert_eq!(
        moved(&|guest| guest.memory = 120.0),
        [(Level::Note, Class::Load)]
    );
}

#[test]
fn what_the_guest_does_to_its_own_clocks_is_a_note() {
    let note = |change: &dyn Fn(&mut Guest)| {
        let mut guest = Guest::new();
        guest.watch(100);
        change(&mut guest);
        last(&guest.watch(60))
    };
    let step = [(Level::Note, Class::ClockStep)];
    assert_eq!(note(&|guest| guest.day_ns += 300_000_000), step);
    assert_eq!(note(&|guest| guest.day_ns -= 3_000_000_000), step);
    // The hardware clock is set by the time of day, as the kernel does every eleven minutes.
    assert_eq!(note(&|guest| guest.rtc_ns = guest.day_ns), step);
    assert_eq!(
        note(&|guest| {
            guest.goes_on(60_000_000_000);
            guest.asleep_ns += 60_000_000_000;
        }),
        // Its clock that is never corrected counts as this guest's counter does.
        [(Level::Note, Class::Pause)]
    );
    assert_eq!(
        note(&|guest| guest.tsc += 40_000_000),
        [(Level::Note, Class::Pause)]
    );
}

#[test]
fn absurd_clocks_are_told_and_break_nothing() {
    let mut guest = Guest::new();
    guest.watch(20);
    let mut sample = guest.sample();
    sample.clocks.raw_ns = 5;
    let error = guest.inside.take(&sample).unwrap_err();
    assert!(matches!(error, SampleError::Backwards { .. }), "{error}");
    for value in [i64::MIN, i64::MAX, 0, -1] {
        let mut guest = Guest::new();
        guest.watch(20);
        for tsc in [None, Some(0), Some(u64::MAX)] {
            let mut sample = guest.sample();
            let raw_ns = sample.clocks.raw_ns;
            sample.clocks = Clocks {
                raw_ns,
                monotonic_ns: value,
                boottime_ns: value.wrapping_neg(),
                realtime_ns: value,
                tsc,
                error_ns: value,
                rtc: Some(Edge {
                    rtc_s: value,
                    at_ns: value,
                    error_ns: value,
                }),
            };
            let _ = guest.inside.take(&sample);
        }
        guest.watch(20);
    }
    let mut guest = Guest::new();
    for raw_ns in [i64::MIN, 0, i64::MAX, i64::MAX] {
        let mut sample = guest.sample();
        sample.clocks.raw_ns = raw_ns;
        let _ = guest.inside.take(&sample);
    }
}

#[test]
fn what_cannot_have_been_read_is_refused() {
    let mut guest = Guest::new();
    let good = guest.sample();
    let refused = |change: &dyn Fn(&mut Sample)| {
        let mut sample = good.clone();
        change(&mut sample);
        Inside::new().take(&sample).is_err()
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|sample| sample.late_ms = f64::NAN));
    assert!(refused(&|sample| sample.neighbours[0].rtt_ms = Some(-1.0)));
    assert!(refused(
        &|sample| sample.neighbours[0].offset_ms = Some(f64::INFINITY)
    ));
    assert!(refused(&|sample| sample.speeds = Some(Speeds {
        memory_ns: Some(f64::NAN),
        ..Speeds::default()
    })));
    assert!(refused(&|sample| {
        let one = sample.neighbours[0].clone();
        sample.neighbours = vec![one; NEIGHBOURS_MAX + 1];
    }));
    assert!(refused(&|sample| {
        let long = "x".repeat(TEXT_MAX + 1);
        sample.fingerprint = Some([(long, String::new())].into());
    }));
}

#[test]
fn a_copy_is_warned_of_while_it_is_made_and_an_alarm_once_the_guest_has_stood_still() {
    let mut guest = Guest::new();
    guest.watch(100);
    guest.first_ns = 600.0;
    let found = guest.watch(4);
    guest.first_ns = 40.0;
    assert_eq!(last(&found), [(Level::Warn, Class::Migration)], "{found:?}");
    assert_eq!(found[0].evidence[0].of, "first-write");
    guest.watch(4);
    guest.stands_still(60);
    let found = guest.watch(40);
    assert_eq!(
        last(&found),
        [(Level::Alarm, Class::Migration)],
        "{found:?}"
    );
}

#[test]
fn a_copy_without_a_stop_stays_a_warning() {
    let mut guest = Guest::new();
    guest.watch(100);
    guest.first_ns = 600.0;
    let mut found = guest.watch(8);
    guest.first_ns = 40.0;
    found.extend(guest.watch(60));
    assert_eq!(last(&found), [(Level::Warn, Class::Migration)], "{found:?}");
    assert!(found.last().unwrap().ended_s.is_some());
}

#[test]
fn impossible_writes_are_refused() {
    let mut guest = Guest::new();
    for ns in [f64::NAN, -1.0, f64::INFINITY, 1e16] {
        let mut sample = guest.sample();
        sample.writes = Some(Writes {
            first_ns: ns,
            again_ns: 40.0,
        });
        assert!(guest.inside.take(&sample).is_err(), "{ns}");
    }
    let mut sample = guest.sample();
    sample.writes = Some(Writes {
        first_ns: 5.0,
        again_ns: 0.0,
    });
    assert_eq!(guest.inside.take(&sample), Ok(Vec::new()));
}

#[test]
fn a_stop_before_a_copy_is_no_migration_that_is_over() {
    let mut guest = Guest::new();
    guest.watch(100);
    guest.stands_still(60);
    guest.first_ns = 600.0;
    let mut found = guest.watch(4);
    guest.first_ns = 40.0;
    found.extend(guest.watch(40));
    assert_eq!(last(&found), [(Level::Warn, Class::Migration)], "{found:?}");
    assert!(found.last().unwrap().stood_still_ms.is_some());
}

#[test]
fn every_copy_of_many_is_told() {
    let mut guest = Guest::new();
    guest.watch(100);
    for _ in 0..40 {
        guest.first_ns = 600.0;
        let found = guest.watch(2);
        assert!(!found.is_empty());
        assert!(
            found
                .iter()
                .all(|finding| finding.evidence.len() <= EVIDENCE_MAX)
        );
        guest.first_ns = 40.0;
        guest.watch(6);
    }
}

#[test]
fn a_stop_long_after_one_copy_and_before_another_is_of_neither() {
    let mut guest = Guest::new();
    guest.watch(100);
    let mut found = Vec::new();
    let mut copy = |guest: &mut Guest| {
        guest.first_ns = 600.0;
        found.extend(guest.watch(3));
        guest.first_ns = 40.0;
    };
    copy(&mut guest);
    // So that all of it is one episode.
    let set = |guest: &mut Guest| {
        guest.day_ns += 10_000_000_000;
        guest.watch(20);
    };
    set(&mut guest);
    set(&mut guest);
    guest.stands_still(60);
    guest.watch(4);
    copy(&mut guest);
    let found = guest.watch(1);
    assert!(found.is_empty() || found.iter().all(|finding| finding.level == Level::Warn));
    assert_eq!(guest.inside.finish().unwrap().level, Level::Warn);
}
