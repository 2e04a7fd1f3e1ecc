//! What happens: each action, and the time at which it did.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use palanquin_api::control::{MigrationInfo, Outcome, Phase, StartMigration};
use palanquin_lab::control;
use palanquin_lab::host::Host;
use palanquin_lab::network::Namespace;
use palanquin_lab::qemu::Qmp;
use palanquin_lab::rig::Rig;
use palanquin_lab::{process, wait};
use palanquin_watch::Class;
use palanquin_watch::synthetic::Chance;
use serde_json::json;

use super::guests::{Guest, Guests, PALANQUIN, QEMU, ask};
use super::plan::Action;
use super::{tidy, unix_s};
use crate::corpus::Event;

/// A migration ends within this time, or is aborted.
const MIGRATION: Duration = Duration::from_secs(120);
/// How often an agent is asked what it does.
const LOOK: Duration = Duration::from_millis(8);
const PORT: u16 = 4444;
const COPY_PORT: u16 = 4445;
const REBOOT: Duration = Duration::from_secs(90);
/// What fits through while everybody's way is full, in Mbit/s.
const CONGESTED_MBIT_S: u32 = 10;

/// Where it happens.
pub(super) struct Stage<'a> {
    pub(super) rig: &'a Rig,
    pub(super) guests: &'a mut Guests,
    pub(super) began_s: f64,
}

impl Stage<'_> {
    fn now_s(&self) -> f64 {
        tidy(unix_s() - self.began_s)
    }

    fn since(&self, of_day: Duration) -> f64 {
        tidy(of_day.as_secs_f64() - self.began_s)
    }

    fn event(&self, target: &Guest, class: Class, what: String) -> Event {
        let now_s = self.now_s();
        Event {
            target: target.name.to_owned(),
            class,
            what,
            from_s: now_s,
            until_s: now_s,
            blackout_s: None,
            tool: None,
            strategy: None,
            way: None,
            spoilt: None,
        }
    }

    pub(super) fn perform(&mut self, action: &Action) -> Result<Event> {
        let guest = |of_palanquin: bool| if of_palanquin { PALANQUIN } else { QEMU };
        match *action {
            Action::Palanquin {
                strategy,
                limit_mbit_s,
                abort_s,
            } => self.palanquin(strategy, limit_mbit_s, abort_s),
            Action::Qemu {
                channels,
                limit_mbit_s,
                abort_s,
                downtime_ms,
            } => self.qemu(channels, limit_mbit_s, abort_s, downtime_ms),
            Action::Copy { mib } => self.copy(mib),
            Action::Load {
                of_palanquin,
                seconds,
            } => self.load(&guest(of_palanquin), seconds),
            Action::Congestion { seconds } => self.congest(seconds),
            Action::Loss {
                of_palanquin,
                seconds,
            } => self.lose(&guest(of_palanquin), of_palanquin, seconds),
            Action::Outage {
                of_palanquin,
                seconds,
            } => self.outage(&guest(of_palanquin), of_palanquin, seconds),
            Action::Pause { seconds } => self.pause(seconds),
            Action::Step { of_palanquin, ms } => self.step(&guest(of_palanquin), ms),
            Action::Reboot => self.reboot(),
            Action::Quiet { seconds } => {
                let event = self.event(&PALANQUIN, Class::Quiet, "nothing".to_owned());
                self.lasts(event, seconds as f64)
            }
        }
    }

    /// The end of an event that is over after some seconds.
    fn lasts(&self, mut event: Event, seconds: f64) -> Result<Event> {
        wait::pause(Duration::from_secs_f64(seconds))?;
        event.until_s = self.now_s();
        Ok(event)
    }

    fn host(&self, of_palanquin: bool) -> &Host {
        let at = if of_palanquin {
            self.guests.palanquin_at
        } else {
            self.guests.qemu_at
        };
        &self.rig.hosts[at]
    }

    fn palanquin(
        &mut self,
        strategy: &str,
        limit_mbit_s: Option<u32>,
        abort_s: Option<f64>,
    ) -> Result<Event> {
        let from = self.guests.palanquin_at;
        let (source, destination) = (&self.rig.hosts[from], &self.rig.hosts[1 - from]);
        let mut request = StartMigration::of(PALANQUIN.name, destination.name());
        request.strategy = serde_json::from_value(json!(strategy))?;
        request.bandwidth_bytes_per_s = limit_mbit_s.map(|mbit| u64::from(mbit) * 125_000);
        request.deadline_ms = Some(MIGRATION.as_millis() as u64);
        let limit = limit_mbit_s.map_or("no limit".to_owned(), |mbit| format!("{mbit} Mbit/s"));
        let what = format!("palanquin, {strategy}, {limit}");
        let mut event = self.event(&PALANQUIN, Class::Migration, what);
        event.tool = Some("palanquin".to_owned());
        event.strategy = Some(strategy.to_owned());
        event.way = Some((source.name().to_owned(), destination.name().to_owned()));
        let began = Instant::now();
        let mut info: MigrationInfo = control::post(&source.socket(), "/v1/migrations", &request)?;
        // The last moment at which it was seen to run at the source, and the first at which it was not.
        let (mut ran_s, mut switched_s) = (self.now_s(), None);
        let mut is_aborted = false;
        while info.outcome.is_none() {
            if began.elapsed() > MIGRATION * 2 {
                bail!("it does not end: {info:?}");
            }
            if abort_s.is_some_and(|s| began.elapsed().as_secs_f64() >= s) && !is_aborted {
                let id = info.id.to_string();
                source.palanquin(&["migration", "abort", &id])?;
                is_aborted = true;
            }
            wait::pause(LOOK)?;
            let asked_s = self.now_s();
            info = source.migration(info.id)?;
            match info.phase {
                Phase::Preparing | Phase::Reserving | Phase::PreCopy => ran_s = asked_s,
                _ => switched_s = switched_s.or(Some(self.now_s())),
            }
        }
        event.until_s = self.now_s();
        if info.outcome == Some(Outcome::Completed) {
            self.guests.palanquin_at = 1 - from;
            let at_s = f64::midpoint(ran_s, switched_s.unwrap_or(event.until_s));
            event.blackout_s = Some((at_s, tidy(at_s + info.downtime_ms / 1e3)));
        } else {
            event.class = Class::AbortedMigration;
            if abort_s.is_none() {
                event.spoilt = Some(format!("it ended as {:?}: {:?}", info.outcome, info.reason));
            }
        }
        if abort_s.is_some() && event.class == Class::Migration {
            event.what += ", completed before it was aborted";
        }
        Ok(event)
    }

    fn qemu(
        &mut self,
        channels: u32,
        limit_mbit_s: Option<u32>,
        abort_s: Option<f64>,
        downtime_ms: u32,
    ) -> Result<Event> {
        let from = self.guests.qemu_at;
        let (source, destination) = (&self.rig.hosts[from], &self.rig.hosts[1 - from]);
        let incoming = self.guests.incoming(destination)?;
        let mut there = incoming.qmp()?;
        let limit = limit_mbit_s.map_or(10_000_000_000, |mbit| u64::from(mbit) * 125_000);
        for qmp in [&mut self.guests.qmp, &mut there] {
            configure(qmp, channels, limit, downtime_ms)?;
        }
        let listen = json!({"uri": format!("tcp:0.0.0.0:{PORT}")});
        there.execute("migrate-incoming", &listen)?;
        // What was raised before is of something else.
        while self.guests.qmp.take_event("STOP").is_some() {}
        let limit = limit_mbit_s.map_or("no limit".to_owned(), |mbit| format!("{mbit} Mbit/s"));
        let what = format!("qemu, {channels} channels, {limit}, downtime {downtime_ms} ms");
        let mut event = self.event(&QEMU, Class::Migration, what);
        event.tool = Some("qemu".to_owned());
        let strategy = if channels > 1 { "multifd" } else { "pre-copy" };
        event.strategy = Some(strategy.to_owned());
        event.way = Some((source.name().to_owned(), destination.name().to_owned()));
        let uri = json!({"uri": format!("tcp:{}:{PORT}", destination.spec.address)});
        let began = Instant::now();
        self.guests.qmp.execute("migrate", &uri)?;
        let mut is_cancelled = false;
        let status = loop {
            wait::pause(Duration::from_millis(50))?;
            let report = self.guests.qmp.execute("query-migrate", &json!({}))?;
            let status = report["status"].as_str().unwrap_or_default().to_owned();
            if matches!(status.as_str(), "completed" | "failed" | "cancelled") {
                break status;
            }
            let is_late = began.elapsed() > MIGRATION;
            let is_due = abort_s.is_some_and(|s| began.elapsed().as_secs_f64() >= s);
            if (is_late || is_due) && !is_cancelled {
                self.guests.qmp.execute("migrate_cancel", &json!({}))?;
                is_cancelled = true;
            }
            if began.elapsed() > MIGRATION * 2 {
                bail!("it does not end: {status}");
            }
        };
        event.until_s = self.now_s();
        if status == "completed" {
            let stopped = self.guests.qmp.wait_event("STOP")?;
            let resumed = there.wait_event("RESUME")?;
            event.blackout_s = Some((self.since(stopped), self.since(resumed)));
            event.until_s = event.until_s.max(self.since(resumed));
            // The source's QEMU ends here.
            self.guests.arrived(incoming, there, 1 - from);
            if self.guests.is_dead {
                event.spoilt = Some("the guest did not survive it".to_owned());
            }
        } else {
            event.class = Class::AbortedMigration;
            if abort_s.is_none() {
                event.spoilt = Some(format!("it {status}"));
            }
        }
        Ok(event)
    }

    /// As `scp` would, without its encryption: from the host where Palanquin's guest is to the other.
    fn copy(&self, mib: u64) -> Result<Event> {
        let from = self.guests.palanquin_at;
        let (source, destination) = (&self.rig.hosts[from], &self.rig.hosts[1 - from]);
        let what = format!("{mib} MiB from {} to {}", source.name(), destination.name());
        let mut event = self.event(&PALANQUIN, Class::CopyTraffic, what);
        event.way = Some((source.name().to_owned(), destination.name().to_owned()));
        let sent = transfer(
            &source.namespace,
            &destination.namespace,
            &destination.spec.address,
            Some(mib << 20),
            Duration::from_secs(60),
        )?;
        event.until_s = self.now_s();
        if sent < mib << 20 {
            event.what += &format!(", only {} within a minute", sent >> 20);
        }
        Ok(event)
    }

    fn load(&self, guest: &Guest, seconds: u64) -> Result<Event> {
        let event = self.event(guest, Class::Load, format!("a busy CPU for {seconds} s"));
        ask(&self.rig.client, guest, &format!("/load?seconds={seconds}"))?;
        self.lasts(event, seconds as f64)
    }

    /// Both hosts send the client more than fits through.
    fn congest(&self, seconds: u64) -> Result<Event> {
        let switch = &self.rig.switch.namespace;
        let what = format!("the client's link is full for {seconds} s");
        let mut event = self.event(&PALANQUIN, Class::Congestion, what);
        let rate = format!("{CONGESTED_MBIT_S}mbit");
        let tc = |words: &[&str]| {
            let start = ["-n", switch.name(), "qdisc"];
            process::run("tc", &[&start[..], words].concat())
        };
        tc(&[
            "replace", "dev", "client", "root", "tbf", "rate", &rate, "burst", "16384", "latency",
            "60ms",
        ])?;
        let client = "10.77.2.1";
        let limit = Duration::from_secs(seconds);
        let sent = transfer(
            &self.rig.hosts[0].namespace,
            &self.rig.client,
            client,
            None,
            limit,
        );
        tc(&["del", "dev", "client", "root"])?;
        sent?;
        event.until_s = self.now_s();
        Ok(event)
    }

    fn lose(&self, guest: &Guest, of_palanquin: bool, seconds: u64) -> Result<Event> {
        let what = format!("the link is lost for moments, for {seconds} s");
        let mut event = self.event(guest, Class::Congestion, what);
        let host = self.host(of_palanquin);
        let mut chance = Chance::new(event.from_s.to_bits());
        let until = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < until {
            host.namespace.ip(&["link", "set", guest.tap, "down"])?;
            wait::pause(Duration::from_secs_f64(chance.between(0.02, 0.12)))?;
            host.namespace.ip(&["link", "set", guest.tap, "up"])?;
            wait::pause(Duration::from_secs_f64(chance.between(0.2, 1.5)))?;
        }
        event.until_s = self.now_s();
        Ok(event)
    }

    fn outage(&self, guest: &Guest, of_palanquin: bool, seconds: f64) -> Result<Event> {
        let what = format!("the link is down for {seconds:.2} s");
        let event = self.event(guest, Class::Outage, what);
        let host = self.host(of_palanquin);
        host.namespace.ip(&["link", "set", guest.tap, "down"])?;
        let event = self.lasts(event, seconds);
        host.namespace.ip(&["link", "set", guest.tap, "up"])?;
        event
    }

    fn pause(&mut self, seconds: f64) -> Result<Event> {
        let what = format!("stopped for {:.0} ms", seconds * 1e3);
        let mut event = self.event(&QEMU, Class::Pause, what);
        let qmp = &mut self.guests.qmp;
        while qmp.take_event("STOP").is_some() {}
        qmp.execute("stop", &json!({}))?;
        wait::pause(Duration::from_secs_f64(seconds))?;
        qmp.execute("cont", &json!({}))?;
        let stopped = qmp.wait_event("STOP")?;
        let resumed = qmp.wait_event("RESUME")?;
        event.blackout_s = Some((self.since(stopped), self.since(resumed)));
        event.until_s = self.now_s();
        Ok(event)
    }

    fn step(&self, guest: &Guest, ms: i64) -> Result<Event> {
        let mut event = self.event(guest, Class::ClockStep, String::new());
        let told = ask(&self.rig.client, guest, &format!("/step?ms={ms}"))?;
        let told: serde_json::Value = serde_json::from_str(&told)?;
        let stepped = told["stepped_ms"]
            .as_f64()
            .context("it did not say how far")?;
        event.what = format!("the clock is set by {stepped:.0} ms");
        event.until_s = self.now_s();
        Ok(event)
    }

    fn reboot(&mut self) -> Result<Event> {
        let mut event = self.event(&QEMU, Class::Reboot, "reset".to_owned());
        let console = self.guests.qemu.console();
        let ready = "palanquin-workload ready";
        let before = console.text().matches(ready).count();
        self.guests.qmp.execute("system_reset", &json!({}))?;
        wait::until_true("the guest is ready again", REBOOT, || {
            Ok(console.text().matches(ready).count() > before)
        })?;
        event.until_s = self.now_s();
        Ok(event)
    }
}

fn configure(qmp: &mut Qmp, channels: u32, limit: u64, downtime_ms: u32) -> Result<()> {
    let capabilities = json!([
        {"capability": "multifd", "state": channels > 1},
        {"capability": "events", "state": true}
    ]);
    let capabilities = json!({"capabilities": capabilities});
    qmp.execute("migrate-set-capabilities", &capabilities)?;
    let mut parameters = json!({"max-bandwidth": limit, "downtime-limit": downtime_ms});
    if channels > 1 {
        parameters["multifd-channels"] = channels.into();
    }
    qmp.execute("migrate-set-parameters", &parameters)?;
    Ok(())
}

/// Sends bytes over TCP, so many or until the time is over; gives how many were sent.
fn transfer(
    from: &Namespace,
    to: &Namespace,
    address: &str,
    bytes: Option<u64>,
    limit: Duration,
) -> Result<u64> {
    let listener = to.inside(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, COPY_PORT))?))?;
    let receiver = to.spawn(move || {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(limit * 2))?;
        let mut buffer = vec![0; 1 << 18];
        while stream.read(&mut buffer)? > 0 {}
        Ok(())
    })?;
    let address = SocketAddr::new(address.parse()?, COPY_PORT);
    let sent = from.inside(move || {
        let mut stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_write_timeout(Some(limit * 2))?;
        let (buffer, until) = (vec![0x5a; 1 << 18], Instant::now() + limit);
        let mut sent = 0;
        while bytes.is_none_or(|all| sent < all) && Instant::now() < until {
            stream.write_all(&buffer)?;
            sent += buffer.len() as u64;
        }
        Ok(sent)
    })?;
    match receiver.join() {
        Ok(received) => received.context("receiving")?,
        Err(_) => bail!("the receiver panicked"),
    }
    Ok(sent)
}
