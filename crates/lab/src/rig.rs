//! Hosts, a switch, a client and an observer on one machine.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use palanquin_api::control::{MigrationInfo, Phase, VmState};
use uuid::Uuid;

use crate::guest::Console;
use crate::host::{Host, HostSpec, Running, SHORT, Told};
use crate::network::{self, Namespace, PREFIX, Switch, equip_host};
use crate::observer::Recording;
use crate::paths;
use crate::process;
use crate::wait;

/// What a rig is to be.
#[derive(Clone, Debug)]
pub struct RigSpec {
    /// Names of the hosts.
    pub hosts: Vec<String>,
    /// What each host may send, in Mbit/s; none for no limit.
    pub link_mbit_s: Option<u32>,
}

impl Default for RigSpec {
    fn default() -> Self {
        Self {
            hosts: vec!["a".to_owned(), "b".to_owned()],
            link_mbit_s: None,
        }
    }
}

/// Hosts, a switch, and a client. All processes, namespaces and files are gone when it is dropped, also by a panic;
/// with `PALANQUIN_KEEP_RIG` in the environment the files stay.
#[derive(Debug)]
pub struct Rig {
    /// The hosts, in the order of the specification. Dropped first.
    pub hosts: Vec<Host>,
    /// A machine that is no host.
    pub client: Namespace,
    /// What joins them.
    pub switch: Switch,
    dir: Directory,
}

#[derive(Debug)]
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        if std::env::var_os("PALANQUIN_KEEP_RIG").is_some() {
            eprintln!("kept: {}", self.0.display());
        } else {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

static NEXT: AtomicU32 = AtomicU32::new(0);
/// Rigs of one process are made one after the other, so that none takes another's half-made one for a leftover.
static MAKING: Mutex<()> = Mutex::new(());

impl Rig {
    /// Makes the namespaces and the authority, enrols the hosts and starts their agents.
    ///
    /// # Errors
    ///
    /// If a part is missing; then the message says how to get it.
    pub fn new(spec: &RigSpec) -> Result<Self> {
        let mut rig = Self::without_agents(spec)?;
        for host in &mut rig.hosts {
            host.start_agent()?;
        }
        Ok(rig)
    }

    /// As [`Rig::new`], with no agent started.
    ///
    /// # Errors
    ///
    /// If a part is missing.
    pub fn without_agents(spec: &RigSpec) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("the rig makes network namespaces and needs root: try again with `sudo -E`");
        }
        let _making = MAKING.lock();
        clean()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("{PREFIX}-{}-{number}", std::process::id());
        let dir = Directory(Path::new("/tmp").join(&id));
        fs::DirBuilder::new().mode(0o700).create(&dir.0)?;
        let own = std::process::id();
        let start = process::start_ticks(own).context("no start time of this process")?;
        fs::write(dir.0.join("owner"), format!("{own} {start}"))?;
        let switch = Switch::new(format!("{id}-switch"))?;
        let client = Namespace::new(format!("{id}-client"))?;
        switch.plug(&client, "client")?;
        let address = format!("10.77.2.1/{}", network::PREFIX_LENGTH);
        client.ip(&["address", "add", &address, "dev", "eth0"])?;
        let mut rig = Self {
            hosts: Vec::new(),
            client,
            switch,
            dir,
        };
        rig.authority("ca")?;
        for (index, name) in spec.hosts.iter().enumerate() {
            let host = rig.host(spec, &id, index, name)?;
            rig.hosts.push(host);
        }
        Ok(rig)
    }

    fn host(&self, spec: &RigSpec, id: &str, index: usize, name: &str) -> Result<Host> {
        let namespace = Namespace::new(format!("{id}-{name}"))?;
        self.switch.plug(&namespace, &format!("port-{name}"))?;
        equip_host(&namespace, &address(index))?;
        if let Some(rate) = spec.link_mbit_s {
            network::limit_uplink(&namespace, rate)?;
        }
        let others = spec
            .hosts
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != index);
        let host = HostSpec {
            name: name.to_owned(),
            address: address(index),
            peers: others
                .map(|(other, name)| (name.clone(), address(other)))
                .collect(),
            memory_reserve_mib: 256,
            identity: self.issue("ca", "host", name)?,
            limits: Vec::new(),
            trust: None,
        };
        // A short name, because sockets lie below it.
        Host::new(host, self.dir.0.join(index.to_string()), namespace)
    }

    /// Sets the MTU of the path between hosts and client, in bytes, and lets nothing larger cross it.
    ///
    /// # Errors
    ///
    /// If a device cannot have it.
    pub fn set_mtu(&self, mtu: u32) -> Result<()> {
        let of_hosts = self.hosts.iter().map(|host| {
            let port = format!("port-{}", host.name());
            (&host.namespace, port)
        });
        for (namespace, port) in of_hosts.chain([(&self.client, "client".to_owned())]) {
            network::set_mtu(namespace, "eth0", mtu)?;
            network::set_mtu(&self.switch.namespace, &port, mtu)?;
        }
        for host in &self.hosts {
            network::set_mtu(&host.namespace, "br0", mtu)?;
        }
        network::set_mtu(&self.switch.namespace, "br0", mtu)
    }

    /// Directory of the rig.
    pub fn dir(&self) -> &Path {
        &self.dir.0
    }

    /// Makes an authority with `palanquin ca init`; gives its directory.
    ///
    /// # Errors
    ///
    /// If it is there already.
    pub fn authority(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.0.join(name);
        palanquin(&["ca", "init", &dir.display().to_string()])?.expect_status(0)?;
        Ok(dir)
    }

    /// Issues a certificate for a `host` or `operator`; gives the directory with its files.
    ///
    /// # Errors
    ///
    /// If the authority is not there.
    pub fn issue(&self, authority: &str, kind: &str, name: &str) -> Result<PathBuf> {
        let dir = self.dir.0.join(authority);
        let out = self.dir.0.join(format!("{authority}-{kind}-{name}"));
        let (dir, shown) = (dir.display().to_string(), out.display().to_string());
        let words = ["ca", "issue", kind, name, "--dir", &dir, "--out", &shown];
        palanquin(&words)?.expect_status(0)?;
        Ok(out)
    }

    /// Begins to record what crosses the switch.
    ///
    /// # Errors
    ///
    /// If tcpdump is missing.
    pub fn record(&self) -> Result<Recording> {
        Recording::start(&self.switch, &self.dir.0)
    }

    /// Moves a VM with `palanquin migrate`; gives what the command ended with.
    ///
    /// # Errors
    ///
    /// If the command cannot be run.
    pub fn migrate(&self, vm: &str, from: usize, to: usize, more: &[&str]) -> Result<Told> {
        let mut words = vec!["migrate", vm, "--to", self.hosts[to].name()];
        words.extend(more);
        self.hosts[from].palanquin_within(&words, Duration::from_secs(180))
    }

    /// Moves a VM, and checks that it arrived whole and lives exactly once.
    ///
    /// # Errors
    ///
    /// If it did not.
    pub fn move_vm(&self, vm: &str, from: usize, to: usize) -> Result<MigrationInfo> {
        let told = self.migrate(vm, from, to, &[])?.expect_status(0);
        let info = told.with_context(|| self.logs())?.migration()?;
        if !info.verified {
            bail!("the migration completed without equal roots: {info:?}");
        }
        self.check_lives_once(vm, to)?;
        Ok(info)
    }

    /// Stops a VM wherever it is, and waits until no host runs a QEMU any more.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn stop_vm(&self, vm: &str) -> Result<()> {
        for host in &self.hosts {
            if host.vm(vm)?.is_some() {
                host.palanquin(&["vm", "stop", vm])?.expect_status(0)?;
            }
        }
        wait::until_true("the VM is gone", SHORT, || {
            for host in &self.hosts {
                if !host.qemus()?.is_empty() {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// Starts a migration that takes many seconds, and waits until pages flow.
    ///
    /// # Errors
    ///
    /// If none do.
    pub fn begin_slow_migration(
        &self,
        vm: &str,
        from: usize,
        to: usize,
    ) -> Result<(Running, Uuid)> {
        let words = [
            "migrate",
            vm,
            "--to",
            self.hosts[to].name(),
            "--bandwidth",
            "60mbit",
        ];
        let running = self.hosts[from].palanquin_started(&words)?;
        let id = wait::until("pages flow", SHORT, || {
            let all = self.hosts[from].migrations()?;
            let flows = |info: &&MigrationInfo| {
                info.vm == vm && info.phase == Phase::PreCopy && info.pages_sent > 0
            };
            Ok(all.iter().find(flows).map(|info| info.id))
        });
        let id = id.with_context(|| self.logs())?;
        Ok((running, id))
    }

    /// Waits until the VM runs at this host and nowhere else: as the agents say, as the processes show, and as the
    /// guest's own heartbeat proves. Nothing of it may be left elsewhere.
    ///
    /// # Errors
    ///
    /// If that is not so within a minute.
    pub fn check_lives_once(&self, vm: &str, at: usize) -> Result<Console> {
        wait::until_true(
            &format!("{vm} lives once, at {}", self.hosts[at].name()),
            SHORT,
            || self.lives_once(vm, at),
        )
        .with_context(|| self.logs())?;
        let console = self.hosts[at].console(vm)?;
        console.wait_beats(2, SHORT)?;
        // It goes on to beat here, and runs nowhere else. A container may have been made meanwhile for an offer that its
        // source had given up already; it ends without having run.
        wait::until_true(&format!("nothing of {vm} is left elsewhere"), SHORT, || {
            // At each look, and not only at the end.
            for (index, host) in self.hosts.iter().enumerate() {
                let there = host.vm(vm)?;
                let runs = there.is_some_and(|there| there.state == VmState::Running);
                if runs != (index == at) {
                    bail!("{vm} does not stay where it was");
                }
            }
            self.lives_once(vm, at)
        })
        .with_context(|| self.logs())?;
        Ok(console)
    }

    /// Whether the VM runs at this host and nothing of it runs elsewhere, as the agents say and the processes show.
    ///
    /// # Errors
    ///
    /// If an agent does not answer.
    pub fn lives_once(&self, vm: &str, at: usize) -> Result<bool> {
        for (index, host) in self.hosts.iter().enumerate() {
            let there = host.vm(vm)?;
            let qemus = host.qemus()?;
            let right = if index == at {
                let running = there.filter(|there| there.state == VmState::Running);
                qemus.len() == 1 && running.and_then(|there| there.pid) == qemus.first().copied()
            } else {
                there.is_none() && qemus.is_empty()
            };
            if !right {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits until the VM lives exactly once, wherever that is; gives the host.
    ///
    /// # Errors
    ///
    /// If it does not within a minute.
    pub fn find_the_one(&self, vm: &str) -> Result<usize> {
        let found = wait::until(&format!("{vm} lives exactly once"), SHORT, || {
            for at in 0..self.hosts.len() {
                if self.lives_once(vm, at)? {
                    return Ok(Some(at));
                }
            }
            Ok(None)
        })
        .with_context(|| self.logs())?;
        self.check_lives_once(vm, found)?;
        Ok(found)
    }

    /// The ends of the agents' logs, for an error.
    pub fn logs(&self) -> String {
        let logs: Vec<String> = self.hosts.iter().map(Host::log_tail).collect();
        logs.join("\n")
    }
}

fn address(index: usize) -> String {
    format!("10.77.0.{}", index + 1)
}

/// Runs `palanquin` without an agent.
pub(crate) fn palanquin(words: &[&str]) -> Result<Told> {
    let mut command = Command::new(paths::program("palanquin")?);
    let output = process::output(command.args(words), SHORT)?;
    Ok(Told {
        status: output.status.code().context("palanquin was killed")?,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Removes what killed processes left of their rigs; those of living ones stay. Gives the names of what it removed.
///
/// # Errors
///
/// If `/tmp` cannot be read.
pub fn clean() -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for name in network::all() {
        if !is_alive(&name) {
            network::remove(&name);
            removed.push(name);
        }
    }
    for entry in fs::read_dir("/tmp")?.flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if name.starts_with(&format!("{PREFIX}-")) && !is_alive(&name) {
            fs::remove_dir_all(entry.path())?;
            removed.push(name);
        }
    }
    Ok(removed)
}

/// Whether the process that made the rig of that name lives; the time of its start tells it from a later one with the
/// same number.
fn is_alive(name: &str) -> bool {
    let mut parts = name.split('-').skip(1);
    let (Some(pid), Some(number)) = (parts.next(), parts.next()) else {
        return false;
    };
    let Ok(pid) = pid.parse::<u32>() else {
        return false;
    };
    let Some(started) = process::start_ticks(pid) else {
        return false;
    };
    let owner = Path::new("/tmp").join(format!("{PREFIX}-{pid}-{number}/owner"));
    // Without the file, the rig is being made or taken down at this moment.
    fs::read_to_string(owner).map_or(true, |owner| owner == format!("{pid} {started}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rig_of_a_process_that_is_gone_is_not_alive() {
        assert!(!is_alive(&format!("{PREFIX}-4194304-0-a")));
        assert!(is_alive(&format!("{PREFIX}-{}-77-a", std::process::id())));
        assert!(!is_alive(PREFIX));
    }
}
