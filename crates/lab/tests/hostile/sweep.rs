//! The man in the middle strikes at every record.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use palanquin_api::control::{MigrationInfo, Phase};
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::{PORT, SHORT, Told};
use palanquin_lab::middle::{Act, Link, Middle, Strike, Way, When};
use palanquin_lab::rig::{Rig, RigSpec};
use palanquin_lab::{process, wait};
use uuid::Uuid;

use crate::{Agent, agents, threads, unharmed};

const VM: &str = "parcel";
/// Where he stands on the way to the second host, and on the way to the first.
const TO_B: Ipv4Addr = Ipv4Addr::new(10, 77, 2, 1);
const TO_A: Ipv4Addr = Ipv4Addr::new(10, 77, 2, 2);
/// With `full` in this environment variable every act is tried, at every record of the control connection and at forty of each
/// stream: some two hours.
const FULL: &str = "PALANQUIN_SWEEP";
/// What a source says that completed without having compared what was pulled.
const NOT_COMPARED: &str =
    "the connection broke before the pages sent after the switchover were compared";
/// The records of the handshake: whoever misses one waits for it ten seconds.
const HANDSHAKE: u32 = 4;

/// Acts that are noticed at once, wherever.
const QUICK: [Act; 8] = [
    Act::Cut,
    Act::FlipType,
    Act::FlipLength,
    Act::FlipBody,
    Act::FlipTag,
    Act::Replay,
    Act::Truncate,
    Act::Inject,
];

/// Acts that are noticed when the next record comes, or when none has come for a while.
const SLOW: [Act; 3] = [Act::Drop, Act::Swap, Act::Delay];

/// One migration and what was done to it.
struct Cell {
    strike: Strike,
    more: &'static [&'static str],
}

/// How it ended.
struct Row {
    strike: Strike,
    struck: bool,
    status: i32,
    /// Whether both sides came together again.
    rejoined: bool,
    words: String,
    took: Duration,
}

/// Two hosts that see each other through him alone.
struct Path {
    rig: Rig,
    middle: Middle,
    agents: Vec<Agent>,
    at: usize,
}

impl Path {
    fn new(guest: &GuestSpec) -> Result<Self> {
        let mut rig = Rig::without_agents(&RigSpec::default())?;
        rig.client
            .ip(&["address", "add", &format!("{TO_A}/16"), "dev", "eth0"])?;
        rig.hosts[0].spec.peers = vec![("b".to_owned(), TO_B.to_string())];
        rig.hosts[1].spec.peers = vec![("a".to_owned(), TO_A.to_string())];
        let address = |host: usize| rig.hosts[host].spec.address.parse::<Ipv4Addr>();
        let pairs = [(TO_B, address(1)?), (TO_A, address(0)?)];
        let middle = Middle::start(&rig.client, &pairs)?;
        for host in &mut rig.hosts {
            host.write_config()?;
            host.start_agent()?;
        }
        rig.hosts[0].boot(guest)?;
        let agents = agents(&rig)?;
        Ok(Self {
            rig,
            middle,
            agents,
            at: 0,
        })
    }

    fn migrate(&self, when: When, more: &[&str]) -> Result<Told> {
        let to = self.rig.hosts[1 - self.at].name();
        let mut words = vec!["migrate", VM, "--to", to, "--deadline", "60s"];
        words.extend(more);
        let host = &self.rig.hosts[self.at];
        let known = host.migrations()?.into_iter().map(|info| info.id);
        let known: HashSet<Uuid> = known.collect();
        let running = host.palanquin_started(&words)?;
        if when == When::Told {
            self.await_pause(&known)?;
            self.middle.now();
        }
        running.finish(SHORT)
    }

    /// Waits until the VM is paused for a migration that was not known before, or that one has ended already.
    fn await_pause(&self, known: &HashSet<Uuid>) -> Result<()> {
        let deadline = Instant::now() + SHORT;
        // Without a pause between two looks: it lasts for milliseconds.
        while Instant::now() < deadline {
            let all = self.rig.hosts[self.at].migrations()?;
            let new = all.iter().find(|info| !known.contains(&info.id));
            let copies = |info: &MigrationInfo| {
                matches!(
                    info.phase,
                    Phase::Preparing | Phase::Reserving | Phase::PreCopy
                )
            };
            if new.is_some_and(|info| !copies(info)) {
                return Ok(());
            }
        }
        bail!("no migration: {}", self.rig.logs())
    }

    /// Migrates while he strikes, and checks everything that must hold afterwards.
    fn play(&mut self, cell: &Cell) -> Result<Row> {
        let Cell { strike, more } = *cell;
        self.middle.arm(Some(strike), false);
        let began = Instant::now();
        let told = self.migrate(strike.when, more)?;
        let struck = self.middle.seen().struck;
        let (from, to) = (self.at, 1 - self.at);
        let mut words = String::new();
        let mut rejoined = false;
        if told.status == 0 {
            let info = told.migration()?;
            // Struck at the last messages of a post-copy, the VM runs there, and nobody could compare what was pulled: then
            // that is said.
            let is_said = info.decisions.iter().any(|told| told.why == NOT_COMPARED);
            ensure!(
                info.verified != is_said,
                "completed without equal roots: {info:?}"
            );
            rejoined = info.rejoined > 0;
            if rejoined {
                words = format!("connected again {} times", info.rejoined);
            }
        } else {
            let error = told.error()?;
            ensure!(!error.message.is_empty(), "no reason: {told:?}");
            words = error.message;
        }
        self.at = match told.status {
            0 => to,
            // Refused, blocked, aborted: it never left.
            3..=5 => from,
            6 => self.rig.find_the_one(VM)?,
            _ => bail!("{strike:?} ended with {told:?}: {}", self.rig.logs()),
        };
        // One running VM, its own memory as it says itself, and no process elsewhere.
        self.rig
            .check_lives_once(VM, self.at)
            .with_context(|| format!("{strike:?} ended with {told:?}"))?;
        unharmed(&self.rig, &self.agents)?;
        self.nothing_left()?;
        Ok(Row {
            strike,
            struck,
            status: told.status,
            rejoined,
            words,
            took: began.elapsed(),
        })
    }

    fn nothing_left(&self) -> Result<()> {
        for (index, host) in self.rig.hosts.iter().enumerate() {
            let wanted = usize::from(index == self.at);
            let vms = host.dir().join("s/vms");
            wait::until_true(
                &format!("{} keeps {wanted} VMs", host.name()),
                SHORT,
                || {
                    let left = fs::read_dir(&vms).map_or(0, |entries| entries.flatten().count());
                    Ok(left == wanted)
                },
            )
            .with_context(|| self.rig.logs())?;
        }
        Ok(())
    }

    /// A migration that he only looks at: the records of each connection and direction.
    fn look_on(&mut self, more: &'static [&'static str]) -> Result<BTreeMap<(Link, Way), u32>> {
        self.middle.arm(None, false);
        self.migrate(When::Goodbye, more)?.expect_status(0)?;
        self.at = 1 - self.at;
        self.rig.check_lives_once(VM, self.at)?;
        Ok(self.middle.seen().records)
    }

    fn play_all(&mut self, cells: &[Cell]) -> Result<Vec<Row>> {
        let threads_before = self.threads()?;
        let mut rows = Vec::new();
        for cell in cells {
            let row = self.play(cell)?;
            println!("{}", row.line());
            rows.push(row);
        }
        // Whatever was cut or kept half: no thread waits for it for ever.
        wait::until_true("no thread is left over", SHORT, || {
            Ok(self.threads()? <= threads_before + 2)
        })
        .with_context(|| format!("{threads_before} before, now {:?}", self.threads()))?;
        // A whole sweep of the guest over its memory, after all of that.
        let console = self.rig.hosts[self.at].console(VM)?;
        let beat = console.wait_beats(2, SHORT)?;
        console.wait_verified(beat.verified + 4096, SHORT)?;
        Ok(rows)
    }

    fn threads(&self) -> Result<u64> {
        self.agents.iter().map(|agent| threads(*agent)).sum()
    }
}

impl Row {
    fn line(&self) -> String {
        let Strike {
            link,
            way,
            when,
            act,
        } = self.strike;
        let struck = if self.struck { "" } else { " (not reached)" };
        format!(
            "{link:?} {way:?} {when:?} {act:?}: status {} in {:.1} s{struck} {}",
            self.status,
            self.took.as_secs_f64(),
            self.words
        )
    }
}

/// How often each act ended in which status.
fn table(rows: &[Row]) {
    let mut counts: BTreeMap<Act, BTreeMap<i32, u32>> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.struck) {
        let of_act = counts.entry(row.strike.act).or_default();
        *of_act.entry(row.status).or_default() += 1;
    }
    println!(
        "{:12} {:>5} {:>9} {:>9} {:>9} {:>9}",
        "act", "cells", "completed", "refused", "blocked", "aborted"
    );
    for (act, of_act) in counts {
        let of = |status| of_act.get(&status).copied().unwrap_or(0);
        let all: u32 = of_act.values().sum();
        println!(
            "{:12} {all:5} {:9} {:9} {:9} {:9}",
            format!("{act:?}"),
            of(0),
            of(3),
            of(4),
            of(5)
        );
    }
}

/// Acts that change, remove or reorder what is in a record: whoever lets them pass has not looked. The type on the outside
/// of an encrypted record says nothing (RFC 8446, section 5.2: it is always the same), and the library does not look at it.
fn is_seen(act: Act) -> bool {
    !matches!(act, Act::Delay | Act::FlipType)
}

/// What changes nothing on a stream: the second record is there for old middleboxes, and may be missing or come twice (RFC
/// 8446, appendix D.4), and in the handshake there may be none behind a record that could overtake it.
fn is_without_effect(when: When, act: Act) -> bool {
    match when {
        When::Record(1) => matches!(act, Act::Drop | Act::Replay),
        When::Record(number) => number < HANDSHAKE && act == Act::Swap,
        When::Told => false,
        When::Goodbye => true,
    }
}

fn is_full() -> bool {
    std::env::var_os(FULL).is_some_and(|value| value == "full")
}

#[test]
fn at_every_record_of_the_control_connection_he_can_only_end_or_delay() -> Result<()> {
    let mut path = Path::new(&GuestSpec::small(VM))?;
    let records = path.look_on(&[])?;
    let mut cells = Vec::new();
    let mut turn = 0;
    for way in [Way::There, Way::Back] {
        let count = records.get(&(Link::Control(0), way)).copied();
        let count = count.context("no control connection was seen")?;
        ensure!(count > 8, "{records:?}");
        for number in 0..count {
            let mut acts: Vec<Act> = if is_full() {
                Act::ALL.to_vec()
            } else {
                // Every other one of them at one record, the others at the next.
                let half = QUICK.iter().skip(number as usize % 2).step_by(2);
                half.copied().collect()
            };
            if !is_full() && number >= HANDSHAKE {
                turn += 1;
                acts.push(SLOW[turn % SLOW.len()]);
            }
            cells.extend(acts.into_iter().map(|act| Cell {
                strike: Strike {
                    link: Link::Control(0),
                    way,
                    when: When::Record(number),
                    act,
                },
                more: &[],
            }));
        }
    }
    let rows = path.play_all(&cells)?;
    table(&rows);
    let struck = rows.iter().filter(|row| row.struck).count();
    ensure!(
        struck * 4 >= rows.len() * 3,
        "he struck {struck} times only"
    );
    Ok(())
}

#[test]
fn at_data_records_he_can_only_end_or_delay() -> Result<()> {
    let mut path = Path::new(&GuestSpec::small(VM).filled(16))?;
    let records = path.look_on(&[])?;
    let count = |index| {
        let of = records.get(&(Link::Data(index), Way::There)).copied();
        of.context("no such data stream was seen")
    };
    let mut cells = Vec::new();
    let mut add = |index, way, when, act, more| {
        cells.push(Cell {
            strike: Strike {
                link: Link::Data(index),
                way,
                when,
                act,
            },
            more,
        });
    };
    let mut turn = 0;
    let last = count(0)?.min(count(1)?);
    ensure!(last > 100, "{records:?}");
    // The handshake, the opening, and pages. Whoever waits for a stream that does not open does so for ten seconds.
    let early = if is_full() { 0..4 } else { 0..1 };
    let steps = if is_full() { 36 } else { 6 };
    let late = (1..=steps).map(|step| step * last / (steps + 2));
    let numbers: Vec<u32> = early.chain(late).collect();
    for index in 0..2 {
        for &number in &numbers {
            let acts: &[Act] = if is_full() {
                &Act::ALL
            } else {
                turn += 1;
                &QUICK[turn % QUICK.len()..][..1]
            };
            for &act in acts {
                add(index, Way::There, When::Record(number), act, &[][..]);
            }
        }
        add(index, Way::Back, When::Record(1), Act::FlipTag, &[]);
        add(index, Way::There, When::Goodbye, Act::Drop, &[]);
    }
    for act in Act::ALL {
        // While the VM is paused: its last pages and the state of its devices.
        add(0, Way::There, When::Told, act, &["--bandwidth", "300mbit"]);
    }
    add(0, Way::There, When::Record(2), Act::FlipBody, &[]);
    add(1, Way::There, When::Record(3), Act::FlipTag, &[]);
    for act in [Act::Drop, Act::Replay, Act::Swap, Act::Delay] {
        add(1, Way::There, When::Record(last / 2), act, &[]);
    }
    let rows = path.play_all(&cells)?;
    table(&rows);
    for row in &rows {
        let Strike { when, act, .. } = row.strike;
        let changed = row.struck && is_seen(act) && !is_without_effect(when, act);
        ensure!(
            !(changed && row.status == 0 && !row.rejoined && row.strike.way == Way::There),
            "pages were changed on the way, and nobody noticed: {}",
            row.line()
        );
    }
    let paused = |row: &&Row| row.struck && row.strike.when == When::Told;
    ensure!(
        rows.iter().filter(paused).count() >= 5,
        "the pause was missed"
    );
    Ok(())
}

#[test]
fn under_post_copy_he_can_only_make_the_vm_wait() -> Result<()> {
    let mut path = Path::new(&GuestSpec::small(VM).filled(16))?;
    let more = &["--strategy", "post-copy", "--bandwidth", "200mbit"];
    let records = path.look_on(more)?;
    let mut cells = Vec::new();
    let mut turn = 0;
    for (&(link, way), &count) in &records {
        if !matches!(
            (link, way),
            (Link::Control(0) | Link::Data(0..=2), Way::There)
        ) {
            continue;
        }
        let steps = if is_full() { count.min(40) } else { 3 };
        for step in 1..=steps {
            let acts: &[Act] = if is_full() {
                &Act::ALL
            } else {
                turn += 1;
                &QUICK[turn % QUICK.len()..][..1]
            };
            let number = (count - 1) * step / (steps + 1);
            cells.extend(acts.iter().map(|&act| Cell {
                strike: Strike {
                    link,
                    way,
                    when: When::Record(number),
                    act,
                },
                more,
            }));
        }
    }
    let rows = path.play_all(&cells)?;
    table(&rows);
    Ok(())
}

#[test]
fn a_whole_session_played_again_is_refused() -> Result<()> {
    let mut path = Path::new(&GuestSpec::small(VM))?;
    path.middle.arm(None, true);
    path.migrate(When::Goodbye, &[])?.expect_status(0)?;
    path.at = 1;
    path.rig.check_lives_once(VM, 1)?;
    let recorded = path.middle.seen().bytes;
    ensure!(recorded.len() >= 3, "{:?}", recorded.keys());
    // Back home, so that the destination would have room for it.
    path.look_on(&[])?;
    let address: Ipv4Addr = path.rig.hosts[1].spec.address.parse()?;
    let before = path.rig.hosts[1].migrations()?.len();
    for (link, bytes) in recorded {
        let answer = path.rig.client.inside(move || {
            let mut stream = TcpStream::connect((address, PORT))?;
            stream.set_read_timeout(Some(SHORT))?;
            // It may hang up in the middle.
            let _ = stream.write_all(&bytes);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            Ok(answer)
        })?;
        // Its own part of a handshake, and an alert: no more than that, and no byte of a session.
        ensure!(answer.len() < 8192, "{link:?}: {} bytes", answer.len());
    }
    wait::until_true("the log tells", SHORT, || {
        let log = fs::read_to_string(path.rig.hosts[1].log())?;
        Ok(log.contains("connection refused") || log.contains("no handshake"))
    })
    .with_context(|| path.rig.logs())?;
    ensure!(path.rig.hosts[1].migrations()?.len() == before);
    path.rig.check_lives_once(VM, 0)?;
    unharmed(&path.rig, &path.agents)?;
    ensure!(process::start_ticks(path.agents[1].privileged).is_some());
    Ok(())
}
