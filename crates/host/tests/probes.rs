//! Probes on real sockets, between network namespaces.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use palanquin_host::probe::{
    Event, Kind, News, NtpSpec, ProbeError, Prober, ProberSpec, Reading, TargetSpec,
};
use palanquin_lab::network::{Namespace, PREFIX, Switch};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

const PATIENCE: Duration = Duration::from_secs(20);
const TARGET: &str = "10.78.0.2";
const TARGET_6: &str = "fd00:78::2";

/// A watcher and a target.
struct Net {
    watcher: Namespace,
    target: Namespace,
    _switch: Switch,
}

fn net() -> Net {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test makes network namespaces and needs root"
    );
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = format!(
        "{PREFIX}-{}-p{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let switch = Switch::new(format!("{id}-s")).unwrap();
    let ends = ["10.78.0.1", TARGET].map(|address| {
        let last = address.rsplit('.').next().unwrap();
        let namespace = Namespace::new(format!("{id}-{last}")).unwrap();
        switch.plug(&namespace, &format!("p{last}")).unwrap();
        let four = format!("{address}/24");
        namespace
            .ip(&["address", "add", &four, "dev", "eth0"])
            .unwrap();
        let enabled = namespace.inside(|| {
            for scope in ["all", "default", "eth0"] {
                fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "0")?;
            }
            Ok(())
        });
        if enabled.is_ok() {
            let six = format!("fd00:78::{last}/64");
            namespace
                .ip(&["-6", "address", "add", &six, "dev", "eth0", "nodad"])
                .unwrap();
        }
        namespace
    });
    let [watcher, target] = ends;
    Net {
        watcher,
        target,
        _switch: switch,
    }
}

fn spec(address: &str, ntp: bool) -> ProberSpec {
    let mut target = TargetSpec::new("t", address.parse().unwrap());
    target.interval = Duration::from_millis(100);
    target.timestamp_interval = target
        .timestamp_interval
        .map(|_| Duration::from_millis(200));
    target.ntp = ntp.then_some(NtpSpec {
        port: 123,
        interval: Duration::from_millis(200),
    });
    let mut spec = ProberSpec::new(vec![target]);
    spec.timeout = Duration::from_millis(500);
    // A machine that tests much at a time is late often.
    spec.stall = Duration::from_secs(2);
    spec
}

fn start(net: &Net, spec: ProberSpec) -> Result<(Prober, Receiver<Event>), ProbeError> {
    let (sender, events) = channel();
    let prober = net
        .watcher
        .inside(move || {
            Ok(Prober::start(spec, move |event| {
                let _ = sender.send(event);
            }))
        })
        .unwrap()?;
    Ok((prober, events))
}

/// Waits for events until one is as wanted; all that came before it.
fn until<T>(events: &Receiver<Event>, mut wanted: impl FnMut(&Event) -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    let mut before = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(event) = events.recv_timeout(left) else {
            panic!("it was not seen; what was: {before:?}");
        };
        if let Some(found) = wanted(&event) {
            return found;
        }
        before.push(event);
    }
}

fn reading(event: &Event) -> Option<Reading> {
    match event {
        Event::Seen { reading, .. } => Some(*reading),
        _ => None,
    }
}

/// A server of NTP whose answers are made by a function of the question and the time since 1900, in units of 2^-32 s.
fn serve_ntp(
    target: &Namespace,
    address: &str,
    mut answer: impl FnMut(&[u8], u64) -> Vec<u8> + Send + 'static,
) {
    let address: IpAddr = address.parse().unwrap();
    let (ready, is_ready) = channel();
    let _ = target
        .spawn(move || {
            let socket = UdpSocket::bind((address, 123))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            ready.send(())?;
            let mut question = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut question) {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
                let fraction = (u64::from(now.subsec_nanos()) << 32) / 1_000_000_000;
                let now = ((now.as_secs() + 2_208_988_800) << 32) + fraction;
                socket.send_to(&answer(&question[..length], now), from)?;
            }
            Ok(())
        })
        .unwrap();
    is_ready.recv_timeout(PATIENCE).unwrap();
}

/// An answer of a server that nothing synchronises, with a clock that is ahead by so many milliseconds.
fn honest(question: &[u8], now: u64, ahead_ms: i64) -> Vec<u8> {
    let time = now.wrapping_add_signed(ahead_ms * (1 << 32) / 1000);
    let mut answer = vec![0; 48];
    // Not synchronised, version 4, server.
    (answer[0], answer[1]) = (0xe4, 16);
    answer[24..32].copy_from_slice(&question[40..48]);
    answer[32..40].copy_from_slice(&time.to_be_bytes());
    answer[40..48].copy_from_slice(&time.to_be_bytes());
    answer
}

#[test]
fn round_trips_hops_and_clocks_are_seen() {
    let net = net();
    serve_ntp(&net.target, TARGET, |question, now| {
        honest(question, now, -100)
    });
    let (prober, events) = start(&net, spec(TARGET, true)).unwrap();
    assert!(prober.without().is_empty(), "{:?}", prober.without());
    let ms = until(&events, |event| match reading(event)? {
        Reading::Rtt { ms } => Some(ms),
        _ => None,
    });
    assert!((0.0..500.0).contains(&ms), "{ms}");
    let hops = until(&events, |event| match reading(event)? {
        Reading::Ttl { hops } => Some(hops),
        _ => None,
    });
    assert_eq!(hops, 64);
    let (mut icmp, mut ntp) = (Vec::new(), Vec::new());
    until(&events, |event| {
        match reading(event)? {
            Reading::IcmpOffset { ms } => icmp.push(ms),
            Reading::NtpOffset { ms } => ntp.push(ms),
            _ => {}
        }
        (icmp.len() >= 5 && ntp.len() >= 5).then_some(())
    });
    icmp.sort_by(f64::total_cmp);
    ntp.sort_by(f64::total_cmp);
    assert!(icmp[2].abs() < 5.0, "{icmp:?}");
    assert!((ntp[2] + 100.0).abs() < 5.0, "{ntp:?}");
    let counted = prober.counted(0);
    assert!(
        counted.answered.iter().all(|answers| *answers > 0),
        "{counted:?}"
    );
    assert!(counted.bytes > 0);
}

#[test]
fn a_target_with_ipv6_is_probed_by_echo_and_ntp() {
    if !Path::new("/proc/sys/net/ipv6").exists() {
        eprintln!("SKIPPED: this kernel has no IPv6");
        return;
    }
    let net = net();
    serve_ntp(&net.target, TARGET_6, |question, now| {
        honest(question, now, 2_000)
    });
    let (prober, events) = start(&net, spec(TARGET_6, true)).unwrap();
    let mut seen = [None; 3];
    until(&events, |event| {
        match reading(event)? {
            Reading::Rtt { ms } => seen[0] = Some(ms),
            Reading::Ttl { hops } => seen[1] = Some(f64::from(hops)),
            Reading::NtpOffset { ms } => seen[2] = Some(ms),
            _ => {}
        }
        seen.iter().all(Option::is_some).then_some(())
    });
    assert_eq!(seen[1], Some(64.0));
    assert!((seen[2].unwrap() - 2_000.0).abs() < 50.0, "{seen:?}");
    assert_eq!(prober.counted(0).sent[Kind::Timestamp as usize], 0);
}

#[test]
fn an_echo_that_nobody_answers_is_lost_and_the_clock_is_read_all_the_same() {
    let net = net();
    let (_prober, events) = start(&net, spec(TARGET, false)).unwrap();
    let is_rtt = |event: &Event| matches!(reading(event)?, Reading::Rtt { .. }).then_some(());
    until(&events, is_rtt);
    let ignore = |ignored: &'static str| {
        let setting = "/proc/sys/net/ipv4/icmp_echo_ignore_all";
        net.target
            .inside(move || Ok(fs::write(setting, ignored)?))
            .unwrap();
    };
    ignore("1");
    let first_us = until(&events, |event| match event {
        Event::Seen {
            sent_us,
            reading: Reading::Lost,
            ..
        } => Some(*sent_us),
        _ => None,
    });
    let mut lost = 0;
    until(&events, |event| {
        match event {
            Event::Seen {
                reading: Reading::Lost,
                sent_us,
                ..
            } => {
                assert!(
                    *sent_us > first_us,
                    "each is told once, in the order of sending"
                );
                lost += 1;
            }
            Event::Seen {
                reading: Reading::Rtt { .. },
                ..
            } => panic!("nobody answers"),
            _ => {}
        }
        let is_clock = matches!(reading(event), Some(Reading::IcmpOffset { .. }));
        (lost >= 5 && is_clock).then_some(())
    });
    ignore("0");
    until(&events, is_rtt);
}

#[test]
fn a_missing_right_is_named() {
    let net = net();
    let try_without = |range: &'static str| {
        net.watcher
            .inside(move || {
                fs::write("/proc/sys/net/ipv4/ping_group_range", range)?;
                let mut sets = capabilities(None)?;
                sets.effective.remove(CapabilitySet::NET_RAW);
                set_capabilities(None, sets)?;
                Ok(Prober::start(spec(TARGET, false), |_| {}))
            })
            .unwrap()
    };
    let error = try_without("1 0").unwrap_err();
    assert!(error.is_right());
    let told = error.to_string();
    assert!(
        told.contains("CAP_NET_RAW") && told.contains("ping_group_range"),
        "{told}"
    );
    let prober = try_without("0 0").unwrap();
    let [error] = prober.without() else {
        panic!("{:?}", prober.without());
    };
    assert!(
        error.is_right() && error.to_string().contains("CAP_NET_RAW"),
        "{error}"
    );
}

#[test]
fn a_clock_that_lies_is_told_as_such_or_read_and_never_more() {
    let net = net();
    let mut round = 0_u8;
    serve_ntp(&net.target, TARGET, move |question, now| {
        round = round.wrapping_add(1);
        let mut answer = honest(question, now, 0);
        match round % 6 {
            0 => answer[32..40].copy_from_slice(&(now + (1 << 40)).to_be_bytes()),
            1 => answer[32..48].fill(0),
            2 => answer[32..48].fill(0xff),
            3 => answer[1] = 200,
            4 => answer.truncate(20),
            _ => answer[24] ^= 1,
        }
        answer
    });
    let (_prober, events) = start(&net, spec(TARGET, true)).unwrap();
    let mut why = Vec::new();
    let mut far = None;
    until(&events, |event| {
        match event {
            Event::News {
                news: News::Refused(Kind::Ntp, reason),
                ..
            } => why.push(reason.clone()),
            Event::Seen {
                reading: Reading::NtpOffset { ms },
                ..
            } => far = Some(*ms),
            _ => {}
        }
        (why.len() == 3 && far.is_some()).then_some(())
    });
    why.sort();
    assert_eq!(
        why,
        [
            "it has no time",
            "it says to have kept the question for a time that can't be",
            "there is no stratum 200"
        ]
    );
    assert!(far.unwrap().abs() > 1e11, "as far as it says: {far:?}");
}

#[test]
fn a_server_that_refuses_is_asked_less_often() {
    let net = net();
    serve_ntp(&net.target, TARGET, |question, now| {
        let mut answer = honest(question, now, 0);
        answer[1] = 0;
        answer[12..16].copy_from_slice(b"RATE");
        answer
    });
    let (prober, events) = start(&net, spec(TARGET, true)).unwrap();
    let why = until(&events, |event| match event {
        Event::News {
            news: News::Refused(Kind::Ntp, why),
            ..
        } => Some(why.clone()),
        _ => None,
    });
    assert_eq!(why, "the server refuses with RATE");
    let mut echoes = 0;
    until(&events, |event| {
        echoes += u32::from(matches!(reading(event)?, Reading::Rtt { .. }));
        (echoes == 10).then_some(())
    });
    assert_eq!(prober.counted(0).sent[Kind::Ntp as usize], 1);
}

#[test]
fn a_burst_sends_more_often_and_ends() {
    let net = net();
    let mut spec = spec(TARGET, false);
    spec.targets[0].interval = Duration::from_secs(5);
    spec.burst.length = Duration::from_secs(2);
    let (prober, events) = start(&net, spec).unwrap();
    prober.burst(0);
    until(&events, |event| {
        matches!(
            event,
            Event::News {
                news: News::BurstBegan,
                ..
            }
        )
        .then_some(())
    });
    let mut answers = 0;
    until(&events, |event| {
        answers += u32::from(matches!(reading(event), Some(Reading::Rtt { .. })));
        matches!(
            event,
            Event::News {
                news: News::BurstEnded,
                ..
            }
        )
        .then_some(())
    });
    // Forty, if the machine is not busy; one without a burst.
    assert!((10..60).contains(&answers), "{answers}");
}

#[test]
fn a_prober_that_stood_still_says_so_and_tells_nothing_of_what_was_under_way() {
    let net = net();
    let mut spec = spec(TARGET, false);
    spec.stall = Duration::from_millis(100);
    spec.targets[0].timestamp_interval = None;
    let (sender, events) = channel();
    // Whoever is told keeps the thread for a while, once.
    let (_never, nothing) = channel::<()>();
    let mut answers = 0;
    let prober = net.watcher.inside(move || {
        Ok(Prober::start(spec, move |event| {
            if matches!(reading(&event), Some(Reading::Rtt { .. })) {
                answers += 1;
                if answers == 5 {
                    let _ = nothing.recv_timeout(Duration::from_millis(900));
                }
            }
            let _ = sender.send(event);
        }))
    });
    let _prober = prober.unwrap().unwrap();
    let mut seen = Vec::new();
    let (from_us, until_us) = until(&events, |event| match event {
        Event::Stalled { from_us, until_us } if until_us - from_us > 500_000 => {
            Some((*from_us, *until_us))
        }
        Event::Seen { sent_us, .. } => {
            seen.push(*sent_us);
            None
        }
        _ => None,
    });
    assert!(until_us - from_us < 10_000_000);
    let mut after = 0;
    until(&events, |event| match event {
        Event::Seen { sent_us, .. } => {
            assert!(
                *sent_us >= until_us,
                "sent at {sent_us}, stalled until {until_us}"
            );
            after += 1;
            (after == 3).then_some(())
        }
        _ => None,
    });
}

/// Sends a frame of Ethernet from the target, given in hexadecimal digits.
fn send(net: &Net, frame: &str) {
    let index = net.target.ip(&["-o", "link", "show", "eth0"]).unwrap();
    let index = index.split(':').next().unwrap().trim();
    let script = "socket(my $s, 17, 3, 0) or die $!; \
         my $to = pack('S n l S C C a8', 17, 0, $ARGV[0], 0, 0, 6, \"\\xff\" x 6); \
         for (1 .. $ARGV[2]) { defined send($s, pack('H*', $ARGV[1]), 0, $to) or die $! }";
    let (frame, count) = frame.split_once('*').unwrap_or((frame, "1"));
    let mut perl = net.target.command("perl");
    perl.args(["-e", script, index, &frame.replace(' ', ""), count]);
    let sent = palanquin_lab::process::output(&mut perl, PATIENCE).unwrap();
    assert!(sent.status.success(), "{sent:?}");
}

const ALL: &str = "ffffffffffff";
const VM: &str = "525400000001";
const STRANGER: &str = "525400000002";

fn rarp(mac: &str) -> String {
    format!("{ALL}{mac}8035 0001080006040003 {mac}00000000 {mac}00000000")
}

/// ARP of the target's address, from this hardware address.
fn gratuitous(mac: &str) -> String {
    format!("{ALL}{mac}0806 0001080006040001 {mac}0a4e0002 0000000000000a4e0002")
}

/// Announcements within this time.
fn announced(events: &Receiver<Event>, within: Duration) -> usize {
    let deadline = Instant::now() + within;
    let mut count = 0;
    while let Ok(event) = events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        count += usize::from(reading(&event) == Some(Reading::Announced));
    }
    count
}

#[test]
fn announcements_are_heard_of_whom_they_are_and_a_flood_is_not_told_in_full() {
    let net = net();
    let mut listening = spec(TARGET, false);
    listening.interface = Some("eth0".to_owned());
    let (prober, events) = start(&net, listening).unwrap();
    let is_announced = |event: &Event| (reading(event) == Some(Reading::Announced)).then_some(());
    until(&events, |event| {
        matches!(reading(event), Some(Reading::Rtt { .. })).then_some(())
    });
    // Nobody knows yet whose hardware address that is.
    send(&net, &rarp(VM));
    send(&net, &rarp(STRANGER));
    assert_eq!(announced(&events, Duration::from_millis(500)), 0);
    let before_us = prober.clock().now_us();
    send(&net, &gratuitous(VM));
    let at_us = until(&events, |event| match event {
        Event::Seen {
            sent_us,
            reading: Reading::Announced,
            ..
        } => Some(*sent_us),
        _ => None,
    });
    assert!((before_us..=prober.clock().now_us()).contains(&at_us));
    // Now it is known by the address that it claimed.
    send(&net, &rarp(VM));
    until(&events, is_announced);
    send(&net, &rarp(STRANGER));
    assert_eq!(announced(&events, Duration::from_millis(500)), 0);
    send(&net, &format!("{}*300", rarp(VM)));
    // It may fall into two seconds, or into that of the two before.
    let told = announced(&events, Duration::from_secs(2));
    assert!((14..=48).contains(&told), "{told}");
    palanquin_lab::wait::until_true("all are counted", PATIENCE, || {
        Ok(prober.counted(0).announced >= 302)
    })
    .unwrap();
}

#[test]
fn a_guest_that_says_by_itself_where_it_is_is_heard() {
    let net = net();
    let notify = "/proc/sys/net/ipv4/conf/eth0/arp_notify";
    let set = net.target.inside(move || Ok(fs::write(notify, "1")?));
    set.unwrap();
    let mut listening = spec(TARGET, false);
    listening.interface = Some("eth0".to_owned());
    let (_prober, events) = start(&net, listening).unwrap();
    let address = ["link", "set", "eth0", "address", "52:54:00:00:00:01"];
    net.target.ip(&address).unwrap();
    until(&events, |event| {
        (reading(event) == Some(Reading::Announced)).then_some(())
    });
}

#[test]
fn neighbour_advertisements_that_nobody_asked_for_are_heard() {
    let net = net();
    if !Path::new("/proc/sys/net/ipv6").exists() {
        eprintln!("SKIPPED: no IPv6");
        return;
    }
    let mut listening = spec(TARGET_6, false);
    listening.interface = Some("eth0".to_owned());
    let (_prober, events) = start(&net, listening).unwrap();
    until(&events, |event| {
        matches!(reading(event), Some(Reading::Rtt { .. })).then_some(())
    });
    // Probing makes both sides ask for each other's address: those who were asked announce nothing.
    assert_eq!(announced(&events, Duration::from_secs(1)), 0);
    let address = "fd000078000000000000000000000002";
    let group = "ff020000000000000000000000000001";
    let packet = |flags: &str, hops: &str| {
        format!(
            "333300000001{VM}86dd 6000000000183a{hops} {address}{group} 88000000{flags}000000 {address}"
        )
    };
    send(&net, &packet("60", "ff"));
    send(&net, &packet("20", "fe"));
    assert_eq!(announced(&events, Duration::from_millis(500)), 0);
    send(&net, &packet("20", "ff"));
    until(&events, |event| {
        (reading(event) == Some(Reading::Announced)).then_some(())
    });
}

#[test]
fn who_can_not_hear_any_more_says_so_and_hears_again() {
    let net = net();
    let mut listening = spec(TARGET, false);
    listening.interface = Some("eth0".to_owned());
    listening.targets[0].mac = Some("52:54:00:00:00:01".parse().unwrap());
    let (_prober, events) = start(&net, listening).unwrap();
    send(&net, &rarp(VM));
    let is_announced = |event: &Event| (reading(event) == Some(Reading::Announced)).then_some(());
    until(&events, is_announced);
    net.watcher.ip(&["link", "set", "eth0", "down"]).unwrap();
    let why = until(&events, |event| match event {
        Event::Deaf { why } => Some(why.clone()),
        _ => None,
    });
    assert!(why.contains("down"), "{why}");
    net.watcher.ip(&["link", "set", "eth0", "up"]).unwrap();
    until(&events, |event| matches!(event, Event::Hears).then_some(()));
    send(&net, &rarp(VM));
    until(&events, is_announced);
}

#[test]
fn what_can_not_be_listened_on_is_refused_by_its_rule() {
    let net = net();
    for (name, is_it) in [
        (
            "lo",
            (|error| matches!(error, ProbeError::NotEthernet(_))) as fn(&ProbeError) -> bool,
        ),
        ("none0", |error| {
            matches!(error, ProbeError::Interface { .. })
        }),
        ("../eth0", |error| {
            matches!(error, ProbeError::InterfaceName(_))
        }),
    ] {
        let mut listening = spec(TARGET, false);
        listening.interface = Some(name.to_owned());
        let error = start(&net, listening).map(|_| ()).unwrap_err();
        assert!(is_it(&error), "{name}: {error:?}");
    }
}
