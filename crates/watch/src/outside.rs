//! What else can be seen from outside than delay and time lag, which [`crate::Watcher`] judges: what the target looks like
//! on the network, and how fast it computes.
//!
//! Both see little. Looks change where another machine answers, or another hypervisor sets other defaults; a VM that is moved
//! whole keeps its own network stack. A server's time for an answer changes with the processor, and with its load.

use crate::inside::{Evidence, thresholds};
use crate::observation::Reading;
use crate::shift::Shift;
use crate::taxonomy::{Cell, Method, Place};

/// What is new counts once it was seen so often in a row.
const SETTLED: u32 = 4;
/// So many echoes are answered without a timestamp before timestamps count as not answered: they may be asked 64 times less
/// often.
const WITHOUT: u32 = 512;

/// Something that may be another now.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Settled<T> {
    usual: Option<T>,
    other: Option<(T, u32)>,
}

impl<T> Default for Settled<T> {
    fn default() -> Self {
        Self {
            usual: None,
            other: None,
        }
    }
}

impl<T: Copy + PartialEq> Settled<T> {
    /// Takes what is seen; gives what was usual, once, when something else has become so.
    fn see(&mut self, now: T) -> Option<T> {
        if self.usual == Some(now) {
            self.other = None;
            return None;
        }
        let count = match self.other {
            Some((other, count)) if other == now => count + 1,
            _ => 1,
        };
        if count < SETTLED {
            self.other = Some((now, count));
            return None;
        }
        self.other = None;
        self.usual.replace(now)
    }
}

/// What a target looks like: where its packets begin to count hops, whether it tells its time by ICMP, and who made its
/// network card.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Looks {
    hops: Settled<u8>,
    tells_time: Settled<bool>,
    maker: Settled<[u8; 3]>,
    without: u32,
}

impl Looks {
    /// Takes what a probe has seen; says what looks otherwise now.
    pub fn read(&mut self, reading: Reading) -> Option<Evidence> {
        match reading {
            Reading::Ttl { hops } => {
                let begin = begins_at(hops);
                let was = self.hops.see(begin)?;
                let text = format!("its packets began with {was} hops and begin with {begin}");
                Some(look("hops", f64::from(begin), text))
            }
            Reading::IcmpOffset { .. } => {
                self.without = 0;
                self.tells(true)
            }
            Reading::Rtt { .. } => {
                self.without = self.without.saturating_add(1);
                // It is counted from then on as often as it goes on so.
                (self.without >= WITHOUT).then(|| self.tells(false))?
            }
            _ => None,
        }
    }

    /// Takes the target's hardware address.
    pub fn hardware_address(&mut self, mac: [u8; 6]) -> Option<Evidence> {
        let maker = [mac[0], mac[1], mac[2]];
        let was = self.maker.see(maker)?;
        let (was, is) = (maker_name(was), maker_name(maker));
        let text = format!("its network card was of {was} and is of {is}");
        Some(look("network-card", 1.0, text))
    }

    fn tells(&mut self, now: bool) -> Option<Evidence> {
        self.tells_time.see(now)?;
        let text = if now {
            "it answers ICMP timestamps, which it did not".to_owned()
        } else {
            "it answers no ICMP timestamps any more, but echoes".to_owned()
        };
        Some(look("timestamps", f64::from(u8::from(now)), text))
    }
}

fn look(of: &str, value: f64, text: String) -> Evidence {
    Evidence {
        cell: Cell::new(Place::External, Method::HypervisorFingerprint),
        of: of.to_owned(),
        seen: "changed",
        value,
        unit: "values",
        text,
    }
}

/// What a packet's hops began with, if it has come that far: operating systems use these four.
fn begins_at(hops: u8) -> u8 {
    match hops {
        0..=32 => 32,
        33..=64 => 64,
        65..=128 => 128,
        129..=255 => 255,
    }
}

/// Who uses these hardware addresses, where that is a hypervisor.
#[must_use]
pub fn maker_name(maker: [u8; 3]) -> String {
    let name = match maker {
        [0x52, 0x54, 0x00] => "QEMU",
        [0x00, 0x16, 0x3e] => "Xen",
        [0x00, 0x05, 0x69] | [0x00, 0x0c, 0x29] | [0x00, 0x1c, 0x14] | [0x00, 0x50, 0x56] => {
            "VMware"
        }
        [0x00, 0x15, 0x5d] => "Hyper-V",
        [0x00, 0x1c, 0x42] => "Parallels",
        [0x08, 0x00, 0x27] => "VirtualBox",
        [a, b, c] => return format!("{a:02x}:{b:02x}:{c:02x}"),
    };
    name.to_owned()
}

/// How long a target takes to answer, by its own clock: what its NTP server needs for the few instructions of an answer.
#[derive(Default)]
pub struct Service {
    shift: Shift,
    is_told: bool,
}

impl Service {
    /// Takes what a probe has seen; says when it takes longer or less long than it did, once.
    pub fn read(&mut self, reading: Reading) -> Option<Evidence> {
        let Reading::NtpHeld { ms } = reading else {
            return None;
        };
        // A server whose clock is too coarse to show it, or that does not tell.
        if ms <= 0.0 {
            return None;
        }
        let least = thresholds::SERVICE_TIMES;
        let Some(shifted) = self.shift.read(ms, thresholds::SERVICE, least) else {
            self.is_told = false;
            return None;
        };
        if std::mem::replace(&mut self.is_told, true) {
            return None;
        }
        let times = shifted.times;
        Some(Evidence {
            cell: Cell::new(Place::External, Method::HardwareBenchmark),
            of: "ntp-service".to_owned(),
            seen: if times > 1.0 { "slower" } else { "faster" },
            value: times,
            unit: "times",
            text: format!("its NTP server needs {times:.2} times as long for an answer as it did"),
        })
    }

    /// The statistic of the last answer, for calibrating.
    #[must_use]
    pub fn statistic(&self) -> f64 {
        self.shift.statistic()
    }
}

/// Both, of one target.
#[derive(Default)]
pub struct Outside {
    /// What it looks like.
    pub looks: Looks,
    /// How fast it answers.
    pub service: Service,
}

impl Outside {
    /// Takes what a probe has seen; says what is new.
    pub fn read(&mut self, reading: Reading) -> Option<Evidence> {
        self.looks
            .read(reading)
            .or_else(|| self.service.read(reading))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_seen_now_and_then_is_not_another_look() {
        let mut looks = Looks::default();
        for at in 0..4000_u32 {
            let hops = if at % 7 == 0 {
                120
            } else {
                60 + (at % 3) as u8
            };
            assert_eq!(looks.read(Reading::Ttl { hops }), None);
            assert_eq!(looks.read(Reading::Rtt { ms: 1.0 }), None);
            if at % 400 == 0 {
                assert_eq!(looks.read(Reading::IcmpOffset { ms: 0.0 }), None);
            }
        }
    }

    #[test]
    fn a_target_that_tells_its_time_no_more_is_told_once() {
        let mut looks = Looks::default();
        for _ in 0..SETTLED {
            looks.read(Reading::IcmpOffset { ms: 0.0 });
        }
        let told = (0..4000)
            .filter_map(|_| looks.read(Reading::Rtt { ms: 1.0 }))
            .count();
        assert_eq!(told, 1);
    }
}
