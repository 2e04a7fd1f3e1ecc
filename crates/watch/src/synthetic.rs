//! Traces that nobody measured.
//!
//! They exist because thresholds and tables need more quiet days and more accidents than can be recorded in a build, and
//! because tests need to know what happened. What they can't show is how well the detector does on real migrations. The
//! model, and where each part is from:
//!
//! | part | is | from |
//! |---|---|---|
//! | round trips | log-normal around a base, neighbours correlated by 0.06 to 0.75 | measured on 50 public traces: median 0.32 |
//! | tail | 2.1 % of answers beyond 5 robust sigmas, Pareto with exponent 1.03 | the same traces: 99.9 % quantile at 96 sigmas |
//! | usual losses | bursts of 1 to 3, up to 0.4 % | the same traces: 0.17 % |
//! | blackout | log-normal, median 50 ms and 99 % at 300 ms, or 0.2 to 1 s | published for a production fleet; measured for QEMU here |
//! | lag | a few ms to 100 ms, or the whole blackout, or none (hidden by the platform) | QEMU's source for each clock |
//! | probes | one or two a second, or ten; twenty on suspicion | what the prober does |
//! | clock | drift up to 50 ppm, an NTP error of 0.02 to 0.5 ms, ICMP in whole milliseconds | kernel's documents |
//! | announcements | five, of half of the migrations: the others are beyond a router; one of some that start anew | how many: measured for QEMU here |
//! | first answer of who was moved or starts anew | 70 % and 50 % of them 4 to 120 ms late, for nothing is in caches; and 30 % when a clock is set | 5 to 160 ms measured under TCG; how often elsewhere is nobody's |
//! | growth while memory is copied | a queue of 1 to 20 times the jitter, tails 2 to 10 times as frequent, most at the start | shape: the paper of 2013; amounts: nobody's |
//! | all other amounts and shares | chosen | nobody's |

use crate::finding::Class;
use crate::observation::{Reading, Role};

/// Seconds before anything happens in a trial.
const BEFORE_S: u64 = 400;
/// Seconds after it.
const AFTER_S: u64 = 150;
/// An answer that takes longer is lost.
const PATIENCE_US: u64 = 1_000_000;
/// In a burst, time between two echoes ...
const BURST_ECHO_US: u64 = 50_000;
/// ... between two ICMP timestamps ...
const BURST_ICMP_US: u64 = 200_000;
/// ... and between two questions by NTP, in seconds.
const BURST_NTP_S: u64 = 2;

/// Chance that can be repeated (SplitMix64).
#[derive(Clone)]
pub struct Chance(u64);

impl Chance {
    /// The same seed gives the same.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Above 0, below 1.
    pub fn share(&mut self) -> f64 {
        ((self.number() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// Between two values.
    pub fn between(&mut self, from: f64, to: f64) -> f64 {
        from + (to - from) * self.share()
    }

    /// Between two values, each order of magnitude as often.
    pub fn scale(&mut self, from: f64, to: f64) -> f64 {
        self.between(from.ln(), to.ln()).exp()
    }

    /// Whether something of that probability happens.
    pub fn happens(&mut self, probability: f64) -> bool {
        self.share() < probability
    }

    /// Normally distributed.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.share().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.share()).cos()
    }

    /// Exponentially distributed, with mean 1.
    pub fn waiting(&mut self) -> f64 {
        -self.share().ln()
    }
}

/// What happens to an endpoint in a second.
#[derive(Clone, Debug, Default)]
struct Disturbance {
    queue_ms: f64,
    detour_ms: f64,
    tail_times: f64,
    loss: f64,
    silences: Vec<(u64, u64, bool)>,
    hops: u8,
    announced_us: Vec<u64>,
    /// From when on the first answer is slow, and by how much.
    cold: Option<(u64, f64)>,
}

/// A target whose probes are made up.
pub struct Endpoint {
    chance: Chance,
    base_ms: f64,
    jitter: f64,
    correlation: f64,
    state: f64,
    loss_begins: f64,
    is_losing: bool,
    in_burst: bool,
    echo_us: u64,
    ntp_s: Option<u64>,
    has_icmp: bool,
    drift: f64,
    clock_ms: f64,
    ntp_error_ms: f64,
    cold: Option<(u64, f64)>,
}

impl Endpoint {
    /// Any; what a seed gives is the same each time.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let echo_us = match chance.share() {
            ..0.6 => 500_000,
            ..0.9 => 1_000_000,
            _ => 100_000,
        };
        Self {
            base_ms: chance.scale(0.15, 30.0),
            jitter: chance.scale(0.02, 0.25),
            // The middle of three is near the median that was measured.
            correlation: 0.06 + 0.69 * chance.share() * chance.share().sqrt(),
            state: 0.0,
            loss_begins: if chance.happens(0.3) {
                0.0
            } else {
                chance.scale(1e-5, 4e-3)
            },
            is_losing: false,
            in_burst: false,
            echo_us,
            ntp_s: chance.happens(0.5).then_some(8),
            has_icmp: chance.happens(0.5),
            drift: 5e-5 * (2.0 * chance.share() - 1.0),
            clock_ms: chance.between(-50.0, 50.0),
            ntp_error_ms: chance.scale(0.02, 0.5),
            cold: None,
            chance,
        }
    }

    fn jitter_ms(&self) -> f64 {
        self.base_ms * self.jitter
    }

    /// From the next second on, whether probes are sent as often as on suspicion.
    pub fn burst(&mut self, is_suspected: bool) {
        self.in_burst = is_suspected;
    }

    /// What probes see in a second in which nothing happens.
    pub fn quiet(&mut self, second: u64, mut to: impl FnMut(u64, Reading)) {
        let nothing = Disturbance {
            tail_times: 1.0,
            ..Disturbance::default()
        };
        self.second(second, &nothing, &mut to);
    }

    fn second(&mut self, second: u64, now: &Disturbance, to: &mut impl FnMut(u64, Reading)) {
        let start_us = second * 1_000_000;
        self.cold = now.cold.or(self.cold);
        let mut at_us = 0;
        while at_us < 1_000_000 {
            // Timers are late by a little.
            let sent_us = start_us + at_us + self.chance.number() % 2000;
            at_us += if self.in_burst {
                self.echo_us.min(BURST_ECHO_US)
            } else {
                self.echo_us
            };
            match self.echo(sent_us, now) {
                Some(ms) => {
                    to(sent_us, Reading::Rtt { ms });
                }
                None => to(sent_us, Reading::Lost),
            }
        }
        let is_silent_at = |at_us: u64| {
            let mut silences = now.silences.iter();
            silences.any(|(from, until, _)| (*from..*until).contains(&at_us))
        };
        let is_silent = is_silent_at(start_us + 5000);
        if second.is_multiple_of(5) && !is_silent {
            let hops = 60 - now.hops;
            to(start_us + 5000, Reading::Ttl { hops });
        }
        let true_ms = self.clock_ms + self.drift * 1e3 * second as f64;
        let ntp_s = self.ntp_s.map(|every| {
            if self.in_burst {
                every.min(BURST_NTP_S)
            } else {
                every
            }
        });
        if ntp_s.is_some_and(|every| second.is_multiple_of(every)) && !is_silent {
            let asymmetry_ms = self.asymmetry_ms(now);
            let ms = true_ms + asymmetry_ms + self.ntp_error_ms * self.chance.normal();
            to(start_us + 6000, Reading::NtpOffset { ms });
        }
        let icmp_us = if self.in_burst {
            BURST_ICMP_US
        } else {
            1_000_000
        };
        for at_us in (start_us + 7000..start_us + 1_000_000).step_by(icmp_us as usize) {
            if self.has_icmp && !is_silent_at(at_us) && !self.chance.happens(now.loss) {
                let asymmetry_ms = self.asymmetry_ms(now);
                let ms = (true_ms + asymmetry_ms + self.chance.share()).floor();
                to(at_us, Reading::IcmpOffset { ms });
            }
        }
        for seen_us in &now.announced_us {
            to(*seen_us, Reading::Announced);
        }
    }

    /// By how much a reading of a clock is off because it took longer on one way than on the other. Each by itself.
    fn asymmetry_ms(&mut self, now: &Disturbance) -> f64 {
        let excess_ms = self.queued_ms(now).min(500.0);
        excess_ms / 2.0 * (2.0 * self.chance.share() - 1.0)
    }

    /// How much longer than usual something takes.
    fn queued_ms(&mut self, now: &Disturbance) -> f64 {
        let chance = &mut self.chance;
        let mut ms = 0.0;
        if now.queue_ms > 0.0 {
            ms += now.queue_ms * chance.waiting();
        }
        if chance.happens((0.021 * now.tail_times).min(0.5)) {
            let sigmas = 5.0 * chance.share().powf(-1.0 / 1.03);
            ms += (self.base_ms * self.jitter * sigmas).min(900.0);
        }
        ms
    }

    fn echo(&mut self, sent_us: u64, now: &Disturbance) -> Option<f64> {
        let chance = &mut self.chance;
        let rest = (1.0 - self.correlation * self.correlation).sqrt();
        self.state = self.correlation * self.state + rest * chance.normal();
        let mut ms = self.base_ms * (self.jitter * self.state).exp() + now.detour_ms;
        ms += self.queued_ms(now);
        let chance = &mut self.chance;
        self.is_losing = if self.is_losing {
            chance.happens(0.4)
        } else {
            chance.happens(self.loss_begins)
        };
        let is_lost = self.is_losing | chance.happens(now.loss);
        for (from_us, until_us, is_queued) in &now.silences {
            if (*from_us..*until_us).contains(&sent_us) {
                let wait_us = until_us - sent_us;
                if !is_queued || wait_us >= PATIENCE_US {
                    return None;
                }
                ms += wait_us as f64 / 1e3;
            }
        }
        if is_lost || ms >= 1000.0 {
            return None;
        }
        // Once only: then it is warm.
        let cold = self.cold.take_if(|(from_us, _)| *from_us <= sent_us);
        Some(ms + cold.map_or(0.0, |(_, more_ms)| more_ms))
    }
}

enum What {
    /// Round trips of a target grow.
    Rise {
        queue_ms: f64,
        tail_times: f64,
    },
    /// The way gets longer, for good.
    Detour {
        ms: f64,
        hops: u8,
    },
    Loss(f64),
    /// In microseconds, unlike the time of the effect, which holds it; queued packets are answered late.
    Silence {
        from_us: u64,
        until_us: u64,
        is_queued: bool,
    },
    Step(f64),
    Announced(u64),
    /// The first answer from then on, in microseconds, is slow.
    Cold {
        from_us: u64,
        ms: f64,
    },
}

struct Effect {
    target: usize,
    from_s: u64,
    until_s: u64,
    what: What,
}

/// A trial: some quiet time, something that happens, and some time after it.
pub struct Trial {
    /// What happens.
    pub class: Class,
    /// Names and roles of targets. The first is the one that it happens to.
    pub targets: Vec<(String, Role)>,
    /// When it begins, in seconds.
    pub from_s: u64,
    /// When it is over, in seconds.
    pub until_s: u64,
    /// When the VM stands still, if it does, in microseconds.
    pub blackout_us: Option<(u64, u64)>,
    /// Length of the trace, in seconds.
    pub length_s: u64,
    endpoints: Vec<Endpoint>,
    effects: Vec<Effect>,
}

impl Trial {
    /// Something of a class; what a seed gives is the same each time.
    #[must_use]
    pub fn new(class: Class, seed: u64) -> Self {
        let mut chance = Chance::new(seed ^ 0x5eed_0f7a_11a5_0000 ^ ((class as u64) << 56));
        let mut targets = vec![("vm".to_owned(), Role::Vm)];
        if chance.happens(0.5) {
            targets.extend((1..4).map(|number| (format!("other{number}"), Role::Vm)));
        }
        if chance.happens(0.5) {
            targets.extend(["host-a", "host-b"].map(|name| (name.to_owned(), Role::Host)));
        }
        let endpoints = targets
            .iter()
            .map(|_| Endpoint::new(chance.number()))
            .collect();
        let from_s = BEFORE_S + chance.number() % 8;
        let mut trial = Self {
            class,
            targets,
            from_s,
            until_s: from_s,
            blackout_us: None,
            length_s: 0,
            endpoints,
            effects: Vec::new(),
        };
        trial.happen(&mut chance);
        trial.length_s = trial.until_s + AFTER_S;
        trial
    }

    /// Every reading, second by second: number of the target, when the probe was sent, what it saw. `suspects` is asked
    /// behind each second, and says which targets get more probes in the next.
    pub fn run(
        &mut self,
        mut to: impl FnMut(usize, u64, Reading),
        mut suspects: impl FnMut(u64, usize) -> bool,
    ) {
        for second in 0..self.length_s {
            for target in 0..self.endpoints.len() {
                let now = self.disturbance(target, second);
                self.endpoints[target].second(second, &now, &mut |at, reading| {
                    to(target, at, reading);
                });
            }
            for target in 0..self.endpoints.len() {
                self.endpoints[target].burst(suspects(second, target));
            }
        }
    }

    fn disturbance(&mut self, target: usize, second: u64) -> Disturbance {
        let mut now = Disturbance {
            tail_times: 1.0,
            ..Disturbance::default()
        };
        for effect in &self.effects {
            if effect.target != target || !(effect.from_s..effect.until_s).contains(&second) {
                continue;
            }
            match effect.what {
                What::Rise {
                    queue_ms,
                    tail_times,
                } => {
                    now.queue_ms += queue_ms;
                    // Very high outliers mainly at the start.
                    let start = if second < effect.from_s + 3 { 3.0 } else { 1.0 };
                    now.tail_times *= tail_times * start;
                }
                What::Detour { ms, hops } => {
                    now.detour_ms += ms;
                    now.hops += hops;
                }
                What::Loss(share) => now.loss = share,
                What::Silence {
                    from_us,
                    until_us,
                    is_queued,
                } => {
                    now.silences.push((from_us, until_us, is_queued));
                }
                What::Step(ms) => self.endpoints[target].clock_ms += ms,
                What::Cold { from_us, ms } => now.cold = Some((from_us, ms)),
                What::Announced(times) => {
                    let first_us = second * 1_000_000 + 60_000;
                    now.announced_us
                        .extend((0..times).map(|at| first_us + at * 150_000));
                }
            }
        }
        now
    }

    fn happen(&mut self, chance: &mut Chance) {
        match self.class {
            Class::Quiet => self.until_s += 60,
            Class::Migration | Class::AbortedMigration => self.migrate(chance),
            Class::Pause => self.pause(chance),
            Class::CopyTraffic => {
                let length_s = chance.scale(10.0, 200.0);
                self.traffic(chance, length_s, 0.9);
            }
            Class::Load => {
                let length_s = chance.scale(20.0, 120.0);
                self.rise(chance, 0, length_s);
            }
            Class::Congestion => self.congest(chance),
            Class::ClockStep => {
                let sign = if chance.happens(0.5) { 1.0 } else { -1.0 };
                let most = if chance.happens(0.1) { 1e6 } else { 500.0 };
                let ms = sign * chance.scale(20.0, most);
                self.add(0, self.from_s, 1, What::Step(ms));
                self.wake_cold(chance, 0.3, self.from_s * 1_000_000);
                self.until_s += 1;
            }
            Class::Reboot => {
                let length_s = chance.scale(8.0, 90.0);
                self.silence(chance, 0, length_s, false);
                self.wake_cold(chance, 0.5, self.until_us());
                if chance.happens(0.7) {
                    let ms = 300.0 * chance.normal();
                    self.add(0, self.until_s, 1, What::Step(ms));
                }
                if chance.happens(0.3) {
                    self.add(0, self.until_s, 1, What::Announced(1));
                }
            }
            Class::Outage => {
                let length_s = chance.scale(0.1, 60.0);
                let is_shared = chance.happens(0.5);
                let count = if is_shared { self.targets.len() } else { 1 };
                for target in 0..count {
                    self.silence(&mut chance.clone(), target, length_s, false);
                }
            }
        }
        if chance.happens(0.01) {
            self.add(0, self.until_s, 1, What::Announced(1));
        }
    }

    fn add(&mut self, target: usize, from_s: u64, length_s: u64, what: What) {
        let until_s = from_s.saturating_add(length_s);
        self.effects.push(Effect {
            target,
            from_s,
            until_s,
            what,
        });
    }

    /// Round trips of a target grow from the beginning on.
    fn rise(&mut self, chance: &mut Chance, target: usize, length_s: f64) {
        let queue_ms = self.endpoints[target].jitter_ms() * chance.scale(1.0, 20.0);
        let tail_times = chance.scale(2.0, 10.0);
        let length_s = length_s.ceil() as u64;
        self.add(
            target,
            self.from_s,
            length_s,
            What::Rise {
                queue_ms,
                tail_times,
            },
        );
        self.until_s = self.until_s.max(self.from_s + length_s);
    }

    /// Traffic between two hosts: the one that sends feels it most.
    fn traffic(&mut self, chance: &mut Chance, length_s: f64, feels: f64) {
        self.until_s = self.from_s + length_s.ceil() as u64;
        if chance.happens(feels) {
            self.rise(chance, 0, length_s);
        }
        for target in 1..self.targets.len() {
            let probability = match self.targets[target].0.as_str() {
                "host-a" => 0.9,
                "host-b" => 0.5,
                _ => 0.0,
            };
            if chance.happens(probability) {
                self.rise(chance, target, length_s);
            }
        }
    }

    /// A target is silent from the beginning on.
    fn silence(&mut self, chance: &mut Chance, target: usize, length_s: f64, is_queued: bool) {
        let from_us = self.from_s * 1_000_000 + chance.number() % 1_000_000;
        let until_us = from_us + (length_s * 1e6) as u64;
        let what = What::Silence {
            from_us,
            until_us,
            is_queued,
        };
        let last_s = until_us / 1_000_000 + 1;
        self.add(target, self.from_s, last_s - self.from_s, what);
        self.until_s = self.until_s.max(last_s);
        if target == 0 {
            self.blackout_us = Some((from_us, until_us));
        }
    }

    /// When the VM goes on.
    fn until_us(&self) -> u64 {
        self.blackout_us.map_or(0, |(_, until_us)| until_us)
    }

    fn wake_cold(&mut self, chance: &mut Chance, probability: f64, from_us: u64) {
        if chance.happens(probability) {
            let ms = chance.scale(4.0, 120.0);
            self.add(0, from_us / 1_000_000, 1, What::Cold { from_us, ms });
        }
    }

    fn migrate(&mut self, chance: &mut Chance) {
        let copy_s = chance.scale(2.0, 60.0);
        self.traffic(chance, copy_s, 0.97);
        if self.class == Class::AbortedMigration {
            return;
        }
        let blackout_s = if chance.happens(0.5) {
            // 99 % are below six times the median.
            0.05 * (0.77 * chance.normal()).exp()
        } else {
            chance.between(0.2, 1.0)
        };
        let begin_s = self.from_s;
        self.from_s = self.until_s;
        self.silence(chance, 0, blackout_s, false);
        self.wake_cold(chance, 0.7, self.until_us());
        let lag_ms = match chance.share() {
            ..0.4 => chance.scale(2.0, 100.0).min(blackout_s * 1e3),
            ..0.8 => blackout_s * 1e3,
            _ => 0.0,
        };
        self.add(0, self.until_s, 1, What::Step(-lag_ms));
        if chance.happens(0.5) {
            self.add(0, self.until_s, 1, What::Announced(5));
        }
        if chance.happens(0.05) {
            self.add(0, self.until_s, u64::MAX, What::Detour { ms: 0.0, hops: 1 });
        }
        self.from_s = begin_s;
    }

    fn pause(&mut self, chance: &mut Chance) {
        let length_s = chance.scale(0.05, 5.0);
        let is_queued = chance.happens(0.5);
        self.silence(chance, 0, length_s, is_queued);
        if chance.happens(0.8) {
            self.add(0, self.until_s, 1, What::Step(-length_s * 1e3));
        }
    }

    fn congest(&mut self, chance: &mut Chance) {
        if chance.happens(0.3) {
            // The route to this one has changed.
            let ms = self.endpoints[0].base_ms * chance.between(0.1, 1.0);
            let hops = u8::from(chance.happens(0.5));
            self.until_s += 60;
            self.add(0, self.from_s, u64::MAX, What::Detour { ms, hops });
            if chance.happens(0.5) {
                let length_s = chance.scale(0.05, 1.0);
                self.silence(chance, 0, length_s, false);
            }
            return;
        }
        let length_s = chance.scale(10.0, 200.0);
        let share = chance.scale(0.005, 0.1);
        for target in 0..self.targets.len() {
            if chance.happens(0.9) {
                self.rise(chance, target, length_s);
                let length_s = length_s.ceil() as u64;
                self.add(target, self.from_s, length_s, What::Loss(share));
            }
        }
        self.until_s = self.from_s + length_s.ceil() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_trace() {
        let run = |seed| {
            let mut readings = Vec::new();
            let mut trial = Trial::new(Class::Migration, seed);
            trial.run(
                |target, at, reading| readings.push((target, at, reading)),
                |_, _| false,
            );
            readings
        };
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
    }

    #[test]
    fn quiet_round_trips_have_the_measured_tail() {
        let (mut beyond, mut far, mut total) = (0.0, 0.0, 0.0);
        for seed in 0..20 {
            let mut endpoint = Endpoint::new(seed);
            let sigma = endpoint.jitter_ms();
            let base = endpoint.base_ms;
            for second in 0..3000 {
                endpoint.quiet(second, |_, reading| {
                    if let Reading::Rtt { ms } = reading {
                        total += 1.0;
                        beyond += f64::from(u8::from(ms > base + 5.0 * sigma));
                        far += f64::from(u8::from(ms > base + 96.0 * sigma));
                    }
                });
            }
        }
        assert!(
            (0.017..0.026).contains(&(beyond / total)),
            "{}",
            beyond / total
        );
        assert!((0.0006..0.0016).contains(&(far / total)), "{}", far / total);
    }
}
