//! Each cell of the taxonomy: data in which its detector must find something, and data in which it must not.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use palanquin_watch::inside::{Clocks, Edge, Inside, Neighbour, Sample, Speeds, Writes};
use palanquin_watch::outside::Outside;
use palanquin_watch::synthetic::Chance;
use palanquin_watch::taxonomy::{Cell, Method, Place};
use palanquin_watch::{Calibration, Channel, Observation, Reading, Role, Watcher};

/// Samples, or probes, before and after the move.
const STEPS: i64 = 400;

/// What becomes of a VM half-way.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    /// Nothing.
    Stays,
    /// It goes on elsewhere, and what the cell looks at shows it.
    Moved,
    /// Something else happens that looks a little like it.
    Resembles,
}

/// Whether the cell's detector says anything of it.
fn fires(cell: Cell, fate: Fate) -> bool {
    match cell.place {
        Place::Internal => inside(cell.method, fate),
        Place::External => match cell.method {
            Method::HypervisorFingerprint | Method::HardwareBenchmark => outside(cell.method, fate),
            Method::TimeLag => watcher(Channel::Clock, fate),
            Method::Delay => watcher(Channel::Rise, fate),
        },
    }
}

fn inside(method: Method, fate: Fate) -> bool {
    let mut inside = Inside::new();
    let mut chance = Chance::new(7);
    let cell = Cell::new(Place::Internal, method);
    let mut has_fired = false;
    for at in 0..STEPS {
        let is_after = at >= STEPS / 2;
        let moved = |of| method == of && fate == Fate::Moved && is_after;
        let other = |of| method == of && fate == Fate::Resembles && is_after;
        let mut noise = |width: f64| (width * chance.normal()).exp();
        let raw_ns = 1_000_000_000 + at * 5_000_000_000;
        let day_ns = 1_700_000_000_000_000_000 + raw_ns;
        // The time of day being set is no lag: the guest did it itself.
        let set_ns = if other(Method::TimeLag) {
            400_000_000
        } else {
            0
        };
        let stood_ms = if moved(Method::TimeLag) { 120 } else { 0 };
        let alu_ns = 1.5 * noise(0.3);
        let memory = if moved(Method::HardwareBenchmark) {
            120.0
        } else {
            60.0
        };
        // All is slower alike where others take the processor.
        let busy = if other(Method::HardwareBenchmark) {
            3.0
        } else {
            1.0
        };
        let ratio = |ratio: f64| Some(ratio * alu_ns * busy);
        let speeds = Speeds {
            alu_ns: Some(alu_ns * busy),
            first_cache_ns: ratio(0.8 * noise(0.03)),
            second_cache_ns: ratio(3.0 * noise(0.03)),
            memory_ns: ratio(memory * noise(0.05)),
            syscall_ns: ratio(90.0 * noise(0.03)),
            cpuid_ns: ratio(900.0 * noise(0.05)),
        };
        let far = if moved(Method::Delay) { 2.0 } else { 1.0 };
        let neighbours = ["gateway", "peer", "store"].map(|name| {
            // One neighbour that is busy is its own matter.
            let own = if other(Method::Delay) && name == "peer" {
                5.0
            } else {
                1.0
            };
            Neighbour {
                name: name.to_owned(),
                rtt_ms: Some(0.3 * far * own * noise(0.15)),
                offset_ms: None,
            }
        });
        let brand = if moved(Method::HypervisorFingerprint) {
            "Other"
        } else {
            "One"
        };
        // A clock source the kernel may change by itself.
        let source = if other(Method::HypervisorFingerprint) {
            "hpet"
        } else {
            "tsc"
        };
        let fingerprint = BTreeMap::from([
            ("cpu.brand".to_owned(), brand.to_owned()),
            ("clocksource".to_owned(), source.to_owned()),
        ]);
        let sample = Sample {
            clocks: Clocks {
                raw_ns,
                monotonic_ns: raw_ns,
                boottime_ns: raw_ns,
                realtime_ns: day_ns + set_ns,
                tsc: Some(u64::try_from(raw_ns).unwrap()),
                error_ns: 2000,
                rtc: Some(Edge {
                    rtc_s: 1_700_000_000 + at * 5,
                    at_ns: raw_ns - stood_ms * 1_000_000 - 3_000_000,
                    error_ns: 400_000,
                }),
            },
            late_ms: 0.0,
            stolen_ms: None,
            fingerprint: Some(fingerprint),
            speeds: Some(speeds),
            writes: Some(Writes {
                first_ns: 3.0 * busy * noise(0.1),
                again_ns: 3.0 * busy * noise(0.1),
            }),
            neighbours: neighbours.into(),
        };
        for finding in inside.take(&sample).unwrap() {
            has_fired |= finding.evidence.iter().any(|evidence| {
                // What is only set or chosen by the guest itself is said, but is not what the cell is for.
                let is_own = ["set", "clock-source"].contains(&evidence.seen);
                evidence.cell == cell && !is_own
            });
        }
    }
    has_fired
}

fn outside(method: Method, fate: Fate) -> bool {
    let mut outside = Outside::default();
    let mut chance = Chance::new(9);
    let cell = Cell::new(Place::External, method);
    let mut has_fired = false;
    for at in 0..STEPS {
        let is_after = at >= STEPS / 2;
        let moved = |of| method == of && fate == Fate::Moved && is_after;
        let other = |of| method == of && fate == Fate::Resembles && is_after;
        // Another route has other hops left; another network stack begins with others.
        let hops = match () {
            () if moved(Method::HypervisorFingerprint) => 126,
            () if other(Method::HypervisorFingerprint) => 57,
            () => 62,
        };
        let times = if moved(Method::HardwareBenchmark) {
            2.5
        } else {
            1.0
        };
        // A long round trip is none of the server.
        let rtt_ms = if other(Method::HardwareBenchmark) {
            40.0
        } else {
            0.4
        };
        let readings = [
            Reading::Ttl { hops },
            Reading::Rtt { ms: rtt_ms },
            Reading::IcmpOffset { ms: 3.0 },
            Reading::NtpHeld {
                ms: 0.04 * times * (0.2 * chance.normal()).exp(),
            },
        ];
        for reading in readings {
            has_fired |= outside.read(reading).is_some_and(|of| of.cell == cell);
        }
    }
    has_fired
}

fn watcher(channel: Channel, fate: Fate) -> bool {
    let mut watcher = Watcher::new(Calibration::built_in());
    let target = watcher.add("vm", Role::Vm).unwrap();
    let mut chance = Chance::new(3);
    let mut has_fired = false;
    for at in 0..2 * STEPS {
        let is_after = at >= STEPS;
        let is_moved = fate == Fate::Moved && is_after;
        let is_other = fate == Fate::Resembles && is_after;
        let sent_us = u64::try_from(at).unwrap() * 1_000_000;
        let mut see = |reading| {
            watcher
                .observe(Observation {
                    sent_us,
                    target,
                    reading,
                })
                .unwrap();
        };
        let grown = if is_moved && channel == Channel::Rise && at < STEPS + 60 {
            3.0
        } else {
            1.0
        };
        // One answer that is late is not a growth.
        let late = if is_other && at == STEPS + 20 {
            20.0
        } else {
            1.0
        };
        see(Reading::Rtt {
            ms: 0.4 * grown * late * (0.1 * chance.normal()).exp(),
        });
        let lag_ms = if is_moved && channel == Channel::Clock {
            -150.0
        } else {
            0.0
        };
        // A clock that drifts is not one that lags.
        let drift_ms = if is_other {
            -0.02 * (at - STEPS) as f64
        } else {
            0.0
        };
        if at % 4 == 0 {
            see(Reading::NtpOffset {
                ms: lag_ms + drift_ms + 0.2 * chance.normal(),
            });
        }
        while let Some(finding) = watcher.poll() {
            let usual = match channel {
                Channel::Clock => "steady",
                _ => "none",
            };
            has_fired |= finding
                .evidence
                .iter()
                .any(|evidence| evidence.channel == channel && evidence.seen != usual);
        }
    }
    has_fired
}

#[test]
fn each_of_the_eight_cells_finds_what_it_is_for() {
    for cell in Cell::ALL {
        assert!(fires(cell, Fate::Moved), "{cell:?}: {}", cell.detector());
    }
}

#[test]
fn each_of_the_eight_cells_is_quiet_while_nothing_happens() {
    for cell in Cell::ALL {
        assert!(!fires(cell, Fate::Stays), "{cell:?}: {}", cell.detector());
    }
}

#[test]
fn each_of_the_eight_cells_is_quiet_where_something_resembles_it() {
    for cell in Cell::ALL {
        assert!(
            !fires(cell, Fate::Resembles),
            "{cell:?}: {}",
            cell.detector()
        );
    }
}
