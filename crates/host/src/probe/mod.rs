//! Probes: what can be measured of a machine by whoever may send it packets: ICMP echo and timestamp, and NTP. And what it
//! announces on a network that this machine is part of.
//!
//! A [`Prober`] has a thread of its own that sends and receives for all targets, and gives what it has seen to a function.
//! Round trips end when the kernel has taken the answer, not when we get to read it. Whoever suspects something asks for a
//! [`Prober::burst`] of probes. When the thread itself was late it says so, and drops what was under way.

mod announce;
mod arp;
mod clock;
mod control;
mod ear;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod icmp;
mod ntp;
mod socket;
mod target;
mod worker;

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

pub use announce::{Mac, MacError};
pub use arp::hardware_addresses;
pub use clock::Clock;
use rustix::event::{EventfdFlags, eventfd};
pub use target::{Counted, Counters};
use worker::Worker;

use self::ear::Ear;
use self::socket::{Socket, Use};

/// Most targets of one prober.
pub const TARGETS_MAX: usize = 1024;
/// Shortest time between two probes of a kind to one target.
pub const INTERVAL_MIN: Duration = Duration::from_millis(20);
/// Longest time between two probes of a kind to one target.
pub const INTERVAL_MAX: Duration = Duration::from_secs(3600);
/// Longest time that is waited for an answer.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(10);
/// Most targets that get bursts of probes at a time.
pub const BURSTING_MAX: usize = 32;

/// Most announcements of a target that are told of a second: they must not crowd out what probes see.
pub const ANNOUNCEMENTS_MAX: u32 = 16;

/// A kind of probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// ICMP echo: round trip, loss, hops.
    Echo,
    /// ICMP timestamp: the clock, in milliseconds of the day. There is none with IPv6.
    Timestamp,
    /// NTP: the clock.
    Ntp,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 3] = [Self::Echo, Self::Timestamp, Self::Ntp];

    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Echo => "ICMP echo",
            Self::Timestamp => "ICMP timestamp",
            Self::Ntp => "NTP",
        }
    }
}

/// How a target is asked for the time by NTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NtpSpec {
    /// Its port, usually 123.
    pub port: u16,
    /// Time between two questions. During a burst at most 2 s: servers refuse those who ask more often.
    pub interval: Duration,
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetSpec {
    /// Its name; only its owner needs it.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
    /// Time between two ICMP echoes at rest.
    pub interval: Duration,
    /// Time between two ICMP timestamps at rest; none to send none.
    pub timestamp_interval: Option<Duration>,
    /// Whether and how it is asked by NTP.
    pub ntp: Option<NtpSpec>,
    /// Its hardware address, by which RARP names it. If none is given it is learnt from ARP and neighbour advertisements,
    /// which anybody in that network can forge.
    pub mac: Option<Mac>,
}

impl TargetSpec {
    /// An echo twice, and a timestamp once a second (with IPv4); no NTP, and no hardware address.
    #[must_use]
    pub fn new(name: impl Into<String>, address: IpAddr) -> Self {
        Self {
            name: name.into(),
            address,
            interval: Duration::from_millis(500),
            timestamp_interval: address.is_ipv4().then_some(Duration::from_secs(1)),
            ntp: None,
            mac: None,
        }
    }
}

/// What a burst is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BurstSpec {
    /// Time between two ICMP echoes; timestamps are sent a quarter as often. Default 50 ms.
    pub interval: Duration,
    /// How long it lasts from when it was asked for last. Default 10 s.
    pub length: Duration,
    /// How long bursts of one target may last in all. A tenth of the time that passes is added again. Default 300 s.
    pub budget: Duration,
}

/// What a prober is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProberSpec {
    /// Whom it asks.
    pub targets: Vec<TargetSpec>,
    /// After this an echo is lost. Default 900 ms: the detector waits for a second.
    pub timeout: Duration,
    /// If it is late by more, it has stalled. Default 100 ms.
    pub stall: Duration,
    /// What a burst is.
    pub burst: BurstSpec,
    /// Interface on which it listens for announcements of targets. Default none.
    pub interface: Option<String>,
}

impl ProberSpec {
    /// With the defaults.
    #[must_use]
    pub fn new(targets: Vec<TargetSpec>) -> Self {
        Self {
            targets,
            timeout: Duration::from_millis(900),
            stall: Duration::from_millis(100),
            burst: BurstSpec {
                interval: Duration::from_millis(50),
                length: Duration::from_secs(10),
                budget: Duration::from_secs(300),
            },
            interface: None,
        }
    }

    fn check(&self) -> Result<(), ProbeError> {
        if self.targets.is_empty() || self.targets.len() > TARGETS_MAX {
            return Err(ProbeError::Targets(self.targets.len()));
        }
        let range = INTERVAL_MIN..=INTERVAL_MAX;
        let of_targets = self.targets.iter().flat_map(|target| {
            let others = [
                target.timestamp_interval,
                target.ntp.map(|ntp| ntp.interval),
            ];
            others.into_iter().flatten().chain([target.interval])
        });
        for interval in of_targets.chain([self.burst.interval]) {
            if !range.contains(&interval) {
                return Err(ProbeError::Interval(interval));
            }
        }
        if !(INTERVAL_MIN..=TIMEOUT_MAX).contains(&self.timeout) {
            return Err(ProbeError::Timeout(self.timeout));
        }
        if !(Duration::from_millis(1)..=TIMEOUT_MAX).contains(&self.stall) {
            return Err(ProbeError::Stall(self.stall));
        }
        if let Some(target) = self.targets.iter().find(|target| is_group(target.address)) {
            return Err(ProbeError::Address(target.address));
        }
        let macs = self.targets.iter().filter_map(|target| target.mac);
        if let Some(mac) = macs.into_iter().find(|mac| !mac.is_own()) {
            return Err(ProbeError::Mac(mac));
        }
        match &self.interface {
            Some(name) if !ear::is_interface(name) => Err(ProbeError::InterfaceName(name.clone())),
            _ => Ok(()),
        }
    }
}

/// Whether that is not one machine.
fn is_group(address: IpAddr) -> bool {
    let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    address.is_multicast() || address.is_unspecified() || is_broadcast
}

/// What a probe has seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reading {
    /// An echo was answered.
    Rtt {
        /// After so many milliseconds.
        ms: f64,
    },
    /// An echo was not answered in time.
    Lost,
    /// Hops that were left to the answer. Told when they change, and now and then.
    Ttl {
        /// As in the header.
        hops: u8,
    },
    /// The target's clock less ours, by an ICMP timestamp.
    IcmpOffset {
        /// Milliseconds.
        ms: f64,
    },
    /// The target's clock less ours, by NTP.
    NtpOffset {
        /// Milliseconds.
        ms: f64,
    },
    /// For how long the target's NTP server has kept a question, by the target's own clock.
    NtpHeld {
        /// Milliseconds.
        ms: f64,
    },
    /// It has announced itself on the network: RARP, gratuitous ARP or an unsolicited neighbour advertisement. At most
    /// [`ANNOUNCEMENTS_MAX`] are told of a second.
    Announced,
}

/// Something that happened with probes, worth a line to people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// More probes are sent from now on.
    BurstBegan,
    /// No more than at rest are sent from now on.
    BurstEnded,
    /// No burst: bursts have lasted as long as they may, or there are [`BURSTING_MAX`].
    BurstRefused,
    /// An answer can't be used, with why. Told once for each reason.
    Refused(Kind, String),
    /// A probe could not be sent, with why. Told once for each reason.
    NotSent(Kind, String),
    /// Echoes are answered, and questions of this kind are not: they are asked less often.
    Unanswered(Kind),
}

/// What a prober tells.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// What a probe has seen.
    Seen {
        /// Number of the target in the specification.
        target: usize,
        /// When the probe was sent, or the announcement came, in microseconds of [`Prober::clock`].
        sent_us: u64,
        /// What was seen.
        reading: Reading,
    },
    /// The prober was late itself. Nothing is told of probes that were under way.
    Stalled {
        /// What was sent from then ...
        from_us: u64,
        /// ... until then is not to be believed.
        until_us: u64,
    },
    /// Announcements are not heard any more; it goes on trying.
    Deaf {
        /// Why.
        why: String,
    },
    /// Announcements are heard again.
    Hears,
    /// Something happened with a target's probes.
    News {
        /// Number of the target.
        target: usize,
        /// What.
        news: News,
    },
}

/// Why nothing can be probed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No targets, or too many.
    #[error("{0} targets are not between 1 and {TARGETS_MAX}")]
    Targets(usize),
    /// An address of many or of none.
    #[error("{0} is no address of one machine")]
    Address(IpAddr),
    /// A hardware address of many or of none.
    #[error("{0} is no hardware address of one machine")]
    Mac(Mac),
    /// What no interface is called.
    #[error("{0:?} is no name of an interface")]
    InterfaceName(String),
    /// An interface that can't be listened on.
    #[error("announcements can't be heard on interface {name}")]
    Interface {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// One without hardware addresses, such as `lo`.
    #[error("interface {0} is no Ethernet: nobody announces anything on it")]
    NotEthernet(String),
    /// An interval out of bounds.
    #[error("an interval of {0:?} is not between {INTERVAL_MIN:?} and {INTERVAL_MAX:?}")]
    Interval(Duration),
    /// A timeout out of bounds.
    #[error("a timeout of {0:?} is not between {INTERVAL_MIN:?} and {TIMEOUT_MAX:?}")]
    Timeout(Duration),
    /// A threshold of stalls out of bounds.
    #[error("a stall of {0:?} is not between 1 ms and {TIMEOUT_MAX:?}")]
    Stall(Duration),
    /// No right to send echoes.
    #[error(
        "ICMP echo needs the capability CAP_NET_RAW, or a group of this process between {first} and {last} (net.ipv4.ping_group_range)"
    )]
    EchoRight {
        /// First group that may.
        first: u32,
        /// Last group that may; none may if it is less than the first.
        last: u32,
    },
    /// Another right.
    #[error("{0}")]
    Right(&'static str),
    /// A socket.
    #[error("no socket for {of} with {family}")]
    Socket {
        /// What it is for.
        of: &'static str,
        /// Which addresses.
        family: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The thread.
    #[error("no thread for probes")]
    Thread(#[source] io::Error),
}

impl ProbeError {
    fn socket(of: Use, is_v6: bool) -> impl FnOnce(io::Error) -> Self {
        let of = match of {
            Use::Echo => Kind::Echo.name(),
            Use::Timestamp => Kind::Timestamp.name(),
            Use::Ntp => Kind::Ntp.name(),
        };
        let family = if is_v6 { "IPv6" } else { "IPv4" };
        move |source| Self::Socket { of, family, source }
    }

    fn interface(name: &str) -> impl FnOnce(io::Error) -> Self {
        let name = name.to_owned();
        move |source| Self::Interface { name, source }
    }

    /// Whether a right is missing that others have.
    #[must_use]
    pub fn is_right(&self) -> bool {
        matches!(self, Self::EchoRight { .. } | Self::Right(_))
    }
}

enum Command {
    Burst(usize),
    Stop,
}

/// Asks its targets until it is dropped.
#[derive(Debug)]
pub struct Prober {
    clock: Clock,
    counters: Arc<[Counters]>,
    without: Vec<ProbeError>,
    hears: bool,
    commands: mpsc::Sender<Command>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Prober {
    /// Begins. Whatever happens is given to `tell`, on the prober's thread, which sends nothing meanwhile: it must not
    /// wait.
    ///
    /// # Errors
    /// If the specification breaks a bound, echoes can't be sent, or there is no such interface. What else can't be is in
    /// [`Self::without`].
    pub fn start(
        spec: ProberSpec,
        tell: impl FnMut(Event) + Send + 'static,
    ) -> Result<Self, ProbeError> {
        spec.check()?;
        let (mut sockets, mut without) = (Vec::new(), Vec::new());
        for is_v6 in [false, true] {
            let targets = || {
                spec.targets
                    .iter()
                    .filter(|of| of.address.is_ipv6() == is_v6)
            };
            if targets().next().is_some() {
                sockets.push(Socket::open(Use::Echo, is_v6)?);
            }
            if !is_v6 && targets().any(|target| target.timestamp_interval.is_some()) {
                match Socket::open(Use::Timestamp, is_v6) {
                    Ok(socket) => sockets.push(socket),
                    Err(error) => without.push(error),
                }
            }
            if targets().any(|target| target.ntp.is_some()) {
                match Socket::open(Use::Ntp, is_v6) {
                    Ok(socket) => sockets.push(socket),
                    Err(error) => without.push(error),
                }
            }
        }
        let has_v6 = spec.targets.iter().any(|target| target.address.is_ipv6());
        let mut ear = None;
        if let Some(interface) = &spec.interface {
            match Ear::open(interface, has_v6) {
                Ok(open) => ear = Some(open),
                Err(error) if error.is_right() => without.push(error),
                Err(error) => return Err(error),
            }
        }
        let hears = ear.is_some();
        let clock = Clock::start();
        let counters: Arc<[Counters]> = spec.targets.iter().map(|_| Counters::default()).collect();
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(|errno| ProbeError::Thread(errno.into()))?);
        let (commands, orders) = mpsc::channel();
        let mut worker = Worker::new(spec, (sockets, ear), clock, Arc::clone(&counters), tell);
        let woken = Arc::clone(&wake);
        let thread = std::thread::Builder::new()
            .name("probes".to_owned())
            .spawn(move || worker.run(&orders, &woken))
            .map_err(ProbeError::Thread)?;
        Ok(Self {
            clock,
            counters,
            without,
            hears,
            commands,
            wake,
            thread: Some(thread),
        })
    }

    /// The clock that events are timed by.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// What can't be asked on this machine, and why.
    #[must_use]
    pub fn without(&self) -> &[ProbeError] {
        &self.without
    }

    /// Whether it began to listen for announcements; [`Event::Deaf`] and [`Event::Hears`] say how that goes on.
    #[must_use]
    pub fn hears(&self) -> bool {
        self.hears
    }

    /// Asks for more probes of a target for some seconds; asked for again, it lasts longer. [`News`] says whether it was
    /// granted.
    pub fn burst(&self, target: usize) {
        self.command(Command::Burst(target));
    }

    /// What has been counted of a target.
    #[must_use]
    pub fn counted(&self, target: usize) -> Counted {
        self.counters
            .get(target)
            .map(Counters::counted)
            .unwrap_or_default()
    }

    fn command(&self, command: Command) {
        // A thread that has ended needs none.
        if self.commands.send(command).is_ok() {
            let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_breaks_a_bound_is_refused_by_its_name() {
        let localhost = IpAddr::from([127, 0, 0, 1]);
        let good = ProberSpec::new(vec![TargetSpec::new("a", localhost)]);
        assert!(good.check().is_ok());
        let refused = |change: &dyn Fn(&mut ProberSpec)| {
            let mut spec = good.clone();
            change(&mut spec);
            spec.check().unwrap_err().to_string()
        };
        assert!(refused(&|spec| spec.targets.clear()).starts_with("0 targets"));
        assert!(refused(&|spec| spec.timeout = Duration::ZERO).contains("timeout"));
        assert!(refused(&|spec| spec.stall = Duration::ZERO).contains("stall"));
        let at_once = Duration::from_millis(1);
        assert!(refused(&|spec| spec.burst.interval = at_once).contains("interval of 1ms"));
        assert!(refused(&|spec| spec.targets[0].interval = at_once).contains("interval"));
        let ntp = NtpSpec {
            port: 123,
            interval: at_once,
        };
        assert!(refused(&|spec| spec.targets[0].ntp = Some(ntp)).contains("interval"));
        for address in ["224.0.0.1", "255.255.255.255", "0.0.0.0", "ff02::1", "::"] {
            let address: IpAddr = address.parse().unwrap();
            let told = refused(&|spec| spec.targets[0].address = address);
            assert!(told.contains("no address of one machine"), "{told}");
        }
    }
}
