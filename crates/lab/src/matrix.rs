//! A guest that migrates from one step of the protocol to the next while something is killed, and the checks that it
//! survived: it lives once, never ran twice, its memory is whole, nothing is left behind, and everybody told the truth.

mod steps;

use std::collections::HashSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use palanquin_api::control::{
    AbortAnswer, AbortOutcome, MigrationInfo, Outcome, Phase, Side, VmState,
};
use uuid::Uuid;

pub use self::steps::{POST_COPY, PRE_COPY, Step};
use crate::fail_point::Mode;
use crate::guest::GuestSpec;
use crate::host::{Running, SHORT, Told};
use crate::process;
use crate::rig::{Rig, RigSpec};
use crate::wait;
use crate::witness::Witness;

const VM: &str = "cat";
/// A point is reached within this time, also on a busy machine.
const REACH: Duration = Duration::from_secs(40);
/// A doubt ends within this time once everybody is back.
const END: Duration = Duration::from_secs(60);

/// What happens at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL of the source's agent, which is started again at once.
    SourceAgent,
    /// SIGKILL of the destination's agent, which is started again at once.
    DestinationAgent,
    /// SIGKILL of the hypervisor on the destination.
    DestinationQemu,
    /// The link is cut, until both agents have noticed.
    Link,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::SourceAgent,
        Self::DestinationAgent,
        Self::DestinationQemu,
        Self::Link,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::SourceAgent => "source agent",
            Self::DestinationAgent => "destination agent",
            Self::DestinationQemu => "destination QEMU",
            Self::Link => "link",
        }
    }

    /// Its letter in a [`Step`].
    pub fn letter(self) -> char {
        match self {
            Self::SourceAgent => 'a',
            Self::DestinationAgent => 'b',
            Self::DestinationQemu => 'q',
            Self::Link => 'l',
        }
    }
}

/// Where the VM lives after a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where it was.
    Source,
    /// Where it was to go.
    Destination,
    /// Nowhere: the hypervisor that owned it was killed.
    Lost,
}

impl Place {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Lost => "ended",
        }
    }
}

/// How a cell of the matrix ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Where the VM lives.
    pub place: Place,
    /// From the fault until it lived there, and once.
    pub after: Duration,
}

/// A migration that stands at a step.
struct Begun {
    running: Running,
    before: HashSet<Uuid>,
}

/// Two hosts and a guest, which lives at one of them. Each cell begins where the one before has ended.
#[derive(Debug)]
pub struct Chain {
    rig: Rig,
    witness: Witness,
    strategy: &'static str,
    at: usize,
}

impl Chain {
    /// Boots a guest that is moved with this strategy.
    ///
    /// # Errors
    ///
    /// If the rig cannot be made or the guest does not boot.
    pub fn new(strategy: &'static str) -> Result<Self> {
        let rig = Rig::new(&RigSpec::default())?;
        let witness = witness_of(&rig)?;
        let chain = Self {
            rig,
            witness,
            strategy,
            at: 0,
        };
        chain.boot()?;
        Ok(chain)
    }

    fn boot(&self) -> Result<()> {
        let mut guest = GuestSpec::small(VM).filled(16);
        guest.buffer_mib = 4;
        guest.dirty_mib_s = 6;
        self.rig.hosts[self.at].boot(&guest)?;
        Ok(())
    }

    fn host_of(&self, side: Side) -> usize {
        match side {
            Side::Source => self.at,
            Side::Destination => 1 - self.at,
        }
    }

    /// The ends of the agents' logs, for an error.
    pub fn logs(&self) -> String {
        self.rig.logs()
    }

    /// Begins a migration and waits until it stands at the step.
    fn begin(&mut self, step: &Step, mode: Mode) -> Result<Begun> {
        let before = self.migrations()?.map(|info| info.id).collect();
        let host = self.host_of(step.side);
        self.rig.hosts[host].arm(step.point, mode)?;
        let to = self.rig.hosts[1 - self.at].name().to_owned();
        let mut words = vec!["migrate", VM, "--to", &to, "--strategy", self.strategy];
        if self.strategy == "post-copy" {
            // Slowly, so that the guest comes to want a page that is not there.
            words.extend(["--bandwidth", "200mbit", "--compress", "off"]);
        }
        let running = self.rig.hosts[self.at].palanquin_started(&words)?;
        if mode == Mode::Kill {
            self.rig.hosts[host].wait_agent_died(REACH)?;
            ensure!(
                self.rig.hosts[host].has_reached(step.point),
                "the agent died of something else: {}",
                self.logs()
            );
        } else {
            let reached = self.rig.hosts[host].wait_reached(step.point, REACH, || Ok(()));
            if let Err(error) = reached {
                let told = running.finish(Duration::from_secs(2));
                return Err(error.context(format!("the command: {told:?}; {}", self.logs())));
            }
        }
        Ok(Begun { running, before })
    }

    fn migrations(&self) -> Result<impl Iterator<Item = MigrationInfo> + use<>> {
        let mut all = Vec::new();
        for host in &self.rig.hosts {
            all.extend(host.migrations()?);
        }
        Ok(all.into_iter())
    }

    /// One cell: the fault at the step, then everything that must hold.
    ///
    /// # Errors
    ///
    /// What does not hold. The chain is of no use then.
    pub fn cell(&mut self, step: &Step, fault: Fault) -> Result<Ended> {
        let (source, destination) = (self.at, 1 - self.at);
        let own = match step.side {
            Side::Source => Fault::SourceAgent,
            Side::Destination => Fault::DestinationAgent,
        };
        let mode = if fault == own { Mode::Kill } else { Mode::Stop };
        let begun = self.begin(step, mode)?;
        let struck = Instant::now();
        match fault {
            Fault::SourceAgent => self.rig.hosts[source].kill_agent(),
            Fault::DestinationAgent => self.rig.hosts[destination].kill_agent(),
            Fault::DestinationQemu => self.kill_qemu(destination)?,
            Fault::Link => self.link("down")?,
        }
        self.rig.hosts[self.host_of(step.side)].release(step.point)?;
        match fault {
            Fault::SourceAgent => self.rig.hosts[source].start_agent()?,
            Fault::DestinationAgent => self.rig.hosts[destination].start_agent()?,
            Fault::DestinationQemu => {}
            Fault::Link => {
                self.wait_noticed(&begun.before)?;
                self.link("up")?;
            }
        }
        let place = self.wait_place()?;
        let after = struck.elapsed();
        let told = begun.running.finish(END)?;
        self.check_told(&told, place, fault)?;
        self.settle(place, &begun.before)?;
        let allowed = step.ends_of(fault);
        ensure!(
            allowed.contains(&place),
            "it ended at {place:?} and not at {allowed:?}: {}",
            self.logs()
        );
        Ok(Ended { place, after })
    }

    /// Asks this side to abort at the step; gives its answer and where the VM lives. With `cut`, the link is cut first,
    /// and mended after the answer.
    ///
    /// # Errors
    ///
    /// If the answer is not true, or what does not hold otherwise.
    pub fn abort(&mut self, step: &Step, asked: Side, cut: bool) -> Result<(AbortOutcome, Place)> {
        const ASKED: &str = "abort-asked";
        let begun = self.begin(step, Mode::Stop)?;
        let id = self.new_migrations(&begun.before)?.first().map(|m| m.id);
        let id = id.context("nobody knows of the migration")?.to_string();
        let (stands, asked) = (self.host_of(step.side), self.host_of(asked));
        if cut {
            self.link("down")?;
        }
        self.rig.hosts[asked].arm(ASKED, Mode::Note)?;
        let abort = self.rig.hosts[asked].palanquin_started(&["migration", "abort", &id])?;
        self.rig.hosts[asked].wait_reached(ASKED, REACH, || Ok(()))?;
        self.rig.hosts[asked].release(ASKED)?;
        self.rig.hosts[stands].release(step.point)?;
        let told = abort.finish(END)?;
        let answer: AbortAnswer = serde_json::from_str(told.stdout.trim())
            .with_context(|| format!("no answer in {told:?}: {}", self.logs()))?;
        if cut {
            self.wait_noticed(&begun.before)?;
            self.link("up")?;
        }
        let place = self.wait_place()?;
        let true_answer = match answer.outcome {
            AbortOutcome::RunningOnSource => told.status == 0 && place == Place::Source,
            AbortOutcome::TooLateCommitted => told.status == 0 && place == Place::Destination,
            // Only where the destination could not be asked.
            AbortOutcome::InDoubt => told.status == 6 && cut,
        };
        ensure!(
            true_answer,
            "{answer:?} with status {}, and it lives at {place:?}: {}",
            told.status,
            self.logs()
        );
        let told = begun.running.finish(END)?;
        self.check_told(&told, place, Fault::Link)?;
        self.settle(place, &begun.before)?;
        Ok((answer.outcome, place))
    }

    /// Moves the guest there and back, with nothing in its way.
    ///
    /// # Errors
    ///
    /// If that does not work.
    pub fn round_trip(&mut self) -> Result<()> {
        for _ in 0..2 {
            let (from, to) = (self.at, 1 - self.at);
            self.rig.move_vm(VM, from, to)?;
            self.at = to;
            self.rig.hosts[to].console(VM)?.wait_all_verified(SHORT)?;
        }
        self.witness.check().map(drop)
    }

    fn kill_qemu(&self, host: usize) -> Result<()> {
        let pids = self.rig.hosts[host].qemus()?;
        ensure!(
            !pids.is_empty(),
            "no QEMU at {}",
            self.rig.hosts[host].name()
        );
        for pid in pids {
            process::kill(pid);
            ensure!(process::wait_for_end(pid, SHORT), "QEMU {pid} lives on");
        }
        Ok(())
    }

    fn link(&self, state: &str) -> Result<()> {
        let words = ["link", "set", "eth0", state];
        self.rig.hosts[1].namespace.ip(&words).map(drop)
    }

    fn new_migrations(&self, before: &HashSet<Uuid>) -> Result<Vec<MigrationInfo>> {
        Ok(self
            .migrations()?
            .filter(|info| !before.contains(&info.id))
            .collect())
    }

    /// Waits until both agents know that the link is cut. Meanwhile the VM runs at one host at most.
    fn wait_noticed(&self, before: &HashSet<Uuid>) -> Result<()> {
        wait::until_true("both agents notice the cut", END, || {
            let mut running = 0;
            for host in &self.rig.hosts {
                running += usize::from(host.runs(VM)?);
            }
            ensure!(running <= 1, "it runs at {running} hosts: {}", self.logs());
            let news = self.new_migrations(before)?;
            Ok(news.iter().all(|info| match info.phase {
                Phase::Done | Phase::InDoubt => true,
                // Under post-copy the destination may be at resuming the VM, which waits for pages.
                Phase::PostCopy | Phase::Committing => info.reason.is_some(),
                // Dialling again, or waiting for who dials.
                Phase::PreCopy => info.reason.is_some(),
                _ => false,
            }))
        })
        .with_context(|| self.logs())
    }

    /// Waits until the VM lives exactly once, or its owner's hypervisor has ended and no other is there.
    fn wait_place(&self) -> Result<Place> {
        wait::until("it lives once, or has ended", END, || {
            if self.rig.lives_once(VM, self.at)? {
                return Ok(Some(Place::Source));
            }
            if self.rig.lives_once(VM, 1 - self.at)? {
                return Ok(Some(Place::Destination));
            }
            let mut left = 0;
            for host in &self.rig.hosts {
                left += host.qemus()?.len();
            }
            Ok((left == 0).then_some(Place::Lost))
        })
        .with_context(|| self.logs())
    }

    /// Whether the command that started the migration told the truth.
    fn check_told(&self, told: &Told, place: Place, fault: Fault) -> Result<()> {
        let fits = match told.status {
            0 => place == Place::Destination || fault == Fault::DestinationQemu,
            3..=5 => place == Place::Source,
            // It lost its agent, or the agent is in doubt.
            6 => true,
            1 => place == Place::Lost,
            _ => false,
        };
        ensure!(
            fits,
            "the command told {told:?}, and it lives at {place:?}: {}",
            self.logs()
        );
        Ok(())
    }

    /// Checks everything that must hold once a migration is over, and goes on from there.
    fn settle(&mut self, place: Place, before: &HashSet<Uuid>) -> Result<()> {
        wait::until_true("all migrations have ended", END, || {
            Ok(self.migrations()?.all(|info| info.phase == Phase::Done))
        })
        .with_context(|| self.logs())?;
        for info in self.new_migrations(before)? {
            let fits = match info.outcome {
                Some(Outcome::Completed) => place != Place::Source,
                Some(Outcome::RunningOnSource) => place == Place::Source,
                Some(Outcome::VmEnded) => place == Place::Lost,
                _ => false,
            };
            ensure!(fits, "it lives at {place:?}, but {info:?}: {}", self.logs());
        }
        match place {
            Place::Source => {}
            Place::Destination => self.at = 1 - self.at,
            Place::Lost => {
                self.witness.check().with_context(|| self.logs())?;
                return self.boot_again();
            }
        }
        let console = self.rig.hosts[self.at].console(VM)?;
        console
            .wait_all_verified(SHORT)
            .with_context(|| self.logs())?;
        ensure!(
            self.rig.lives_once(VM, self.at)?,
            "it does not stay where it was: {}",
            self.logs()
        );
        self.witness.check().with_context(|| self.logs())?;
        self.nothing_is_left()
    }

    /// No directory of a VM is left where none lives.
    fn nothing_is_left(&self) -> Result<()> {
        for host in &self.rig.hosts {
            let vms = host.vms()?.len();
            let what = format!("{} keeps files of {vms} VMs", host.name());
            wait::until_true(&what, SHORT, || {
                let entries = fs::read_dir(host.dir().join("s/vms"));
                Ok(entries.map_or(0, |entries| entries.flatten().count()) == vms)
            })
            .with_context(|| self.logs())?;
        }
        Ok(())
    }

    /// Removes a VM whose hypervisor was killed, and boots another.
    fn boot_again(&mut self) -> Result<()> {
        for host in &self.rig.hosts {
            if let Some(vm) = host.vm(VM)? {
                ensure!(vm.state == VmState::Stopped, "{vm:?}: {}", self.logs());
                let told = host.palanquin(&["vm", "stop", VM])?;
                told.expect_status(0).with_context(|| self.logs())?;
            }
        }
        self.nothing_is_left()?;
        self.witness = witness_of(&self.rig)?;
        self.boot()
    }
}

fn witness_of(rig: &Rig) -> Result<Witness> {
    Witness::start(rig.hosts.iter().map(|host| host.dir().to_owned()).collect())
}

/// What `PALANQUIN_MATRIX` asks for: nothing for what continuous integration runs, `full` for all, `full:2/3` for every
/// third cell from the second on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// What continuous integration runs.
    Some,
    /// Of so many parts this one, counted from 0.
    Part(usize, usize),
}

impl Selection {
    /// Reads it.
    ///
    /// # Errors
    ///
    /// If it makes no sense.
    pub fn parse(text: &str) -> Result<Self> {
        if text.is_empty() {
            return Ok(Self::Some);
        }
        if text == "full" {
            return Ok(Self::Part(0, 1));
        }
        let parts = text.strip_prefix("full:").and_then(|t| t.split_once('/'));
        let (part, parts) = parts.with_context(|| format!("{text:?} is no part of a matrix"))?;
        match (part.parse::<usize>()?, parts.parse::<usize>()?) {
            (part, parts) if (1..=parts).contains(&part) => Ok(Self::Part(part - 1, parts)),
            _ => bail!("{text:?} is no part of a matrix"),
        }
    }

    /// Whether the cell of this number is part of it; `chosen` says whether continuous integration runs it.
    pub fn has(self, number: usize, chosen: bool) -> bool {
        match self {
            Self::Some => chosen,
            Self::Part(part, parts) => number % parts == part,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_of_the_full_matrix_is_in_exactly_one_part() {
        for number in 0..20 {
            let parts = ["full:1/3", "full:2/3", "full:3/3"].map(Selection::parse);
            let has = parts.map(|part| part.unwrap().has(number, false));
            assert_eq!(has.iter().filter(|has| **has).count(), 1);
            assert!(Selection::parse("full").unwrap().has(number, false));
        }
        for odd in ["full:0/3", "full:4/3", "half", "full:1"] {
            assert!(Selection::parse(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn steps_say_for_every_fault_how_it_ends() {
        for step in PRE_COPY.iter().chain(POST_COPY) {
            assert_eq!(step.ends.chars().count(), Fault::ALL.len(), "{step:?}");
            for (fault, end) in Fault::ALL.iter().zip(step.ends.chars()) {
                assert!("sde?L-".contains(end), "{step:?}");
                let chosen = step.chosen.contains(fault.letter());
                assert!(!(chosen && end == '-'), "{step:?}");
            }
        }
    }
}
