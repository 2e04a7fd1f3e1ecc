//! One host: a namespace with an agent, its files and its VMs.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use palanquin_api::control::{ApiError, HostInfo, MigrationInfo, VmInfo, VmState};
use rustix::process::Signal;
use uuid::Uuid;

use crate::control;
use crate::guest::{Console, GuestSpec};
use crate::network::{self, Namespace};
use crate::paths;
use crate::process::{self, Kept};
use crate::wait;

/// An agent starts within this time, also on a busy machine.
const START: Duration = Duration::from_secs(20);
/// A short command ends within this time.
pub const SHORT: Duration = Duration::from_secs(60);
/// Port at which agents listen.
pub const PORT: u16 = 7810;

/// Where a host's files lie, and what its agent is told.
#[derive(Clone, Debug)]
pub struct HostSpec {
    /// Name.
    pub name: String,
    /// Address in 10.77.0.0/16.
    pub address: String,
    /// Names and addresses of the other hosts.
    pub peers: Vec<(String, String)>,
    /// Memory that the agent keeps back, in MiB.
    pub memory_reserve_mib: u64,
    /// Directory with `NAME.pem`, `NAME.key` and `ca.pem`.
    pub identity: PathBuf,
    /// Further lines of `[limits]`.
    pub limits: Vec<String>,
    /// The section `[trust]`; none where nothing is judged.
    pub trust: Option<String>,
}

/// A host.
#[derive(Debug)]
pub struct Host {
    /// What it was made from; [`Host::write_config`] after a change.
    pub spec: HostSpec,
    dir: PathBuf,
    /// Killed before the namespace is removed, because fields are dropped in order.
    agent: Option<Kept>,
    /// Its namespace.
    pub namespace: Namespace,
}

/// What a command of `palanquin` ended with.
#[derive(Debug)]
pub struct Told {
    /// Exit status.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Told {
    /// The migration in the last line of standard output, with `--json`.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn migration(&self) -> Result<MigrationInfo> {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| format!("no migration in {self:?}"))
    }

    /// The error in the last line of standard error, with `--json`.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn error(&self) -> Result<ApiError> {
        let line = self.stderr.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| format!("no error in {self:?}"))
    }

    /// Itself, if the status is that.
    ///
    /// # Errors
    ///
    /// If it is another.
    pub fn expect_status(self, status: i32) -> Result<Self> {
        if self.status != status {
            bail!(
                "exit status {} and not {status}: {}{}",
                self.status,
                self.stdout,
                self.stderr
            );
        }
        Ok(self)
    }
}

impl Host {
    /// A host with its directories and configuration, its agent not yet started.
    ///
    /// # Errors
    ///
    /// If files cannot be written.
    pub fn new(spec: HostSpec, dir: PathBuf, namespace: Namespace) -> Result<Self> {
        fs::create_dir_all(dir.join("points"))?;
        let host = Self {
            spec,
            dir,
            agent: None,
            namespace,
        };
        host.write_config()?;
        Ok(host)
    }

    /// Writes the agent's configuration; it counts from the agent's next start.
    ///
    /// # Errors
    ///
    /// If that is not possible.
    pub fn write_config(&self) -> Result<()> {
        let HostSpec {
            name,
            peers,
            memory_reserve_mib,
            identity,
            limits,
            trust,
            ..
        } = &self.spec;
        let guest = paths::guest_dir()?;
        let mut text = format!(
            "name = {name:?}\nstate-dir = {:?}\nruntime-dir = {:?}\n\
             [tls]\nca = {:?}\ncertificate = {:?}\nkey = {:?}\n\
             [listen]\nmigration = \"0.0.0.0:{PORT}\"\n\
             [limits]\nmemory-reserve = \"{memory_reserve_mib}MiB\"\npeer-silence = \"3s\"\nredial = \"12s\"\n{}\n\
             [qemu]\nallowed-paths = [{guest:?}]\nuser = \"nobody\"\n",
            self.dir.join("s"),
            self.dir.join("r"),
            identity.join("ca.pem"),
            identity.join(format!("{name}.pem")),
            identity.join(format!("{name}.key")),
            limits.join("\n"),
        );
        for (peer, address) in peers {
            text += &format!("[hosts.{peer}]\naddress = \"{address}:{PORT}\"\n");
        }
        if let Some(trust) = trust {
            text += trust;
        }
        fs::write(self.config(), text)?;
        Ok(())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The agent's configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.join("agent.toml")
    }

    /// The agent's control socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("r/control.sock")
    }

    /// The agent's observe socket.
    pub fn observe_socket(&self) -> PathBuf {
        self.dir.join("r/observe.sock")
    }

    /// The agent's log, over all its lives.
    pub fn log(&self) -> PathBuf {
        self.dir.join("agent.log")
    }

    fn log_file(&self) -> Result<File> {
        let mut options = OpenOptions::new();
        let path = self.log();
        options
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Starts the agent, without waiting for it.
    ///
    /// # Errors
    ///
    /// If that is not possible.
    pub fn launch_agent(&mut self, environment: &[(&str, &str)]) -> Result<()> {
        let mut command = self.namespace.command(paths::program("palanquind")?);
        command
            .arg("--config")
            .arg(self.config())
            .env("PALANQUIN_FAIL_POINTS", self.dir.join("points"))
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(self.log_file()?)
            .stderr(self.log_file()?);
        let child = command.spawn().context("cannot start palanquind")?;
        self.agent = Some(Kept::new(child));
        Ok(())
    }

    /// Starts the agent and waits until it answers.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn start_agent(&mut self) -> Result<()> {
        self.start_agent_with(&[])
    }

    /// As [`Host::start_agent`], with environment variables.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn start_agent_with(&mut self, environment: &[(&str, &str)]) -> Result<()> {
        self.launch_agent(environment)?;
        wait::until_true(
            &format!("the agent of {} answers", self.name()),
            START,
            || {
                if let Some(status) = self
                    .agent
                    .as_mut()
                    .and_then(|agent| agent.ended().transpose())
                {
                    bail!("it ended: {}", status?);
                }
                Ok(control::get::<HostInfo>(&self.socket(), "/v1/host").is_ok())
            },
        )
        .with_context(|| self.log_tail())
    }

    /// Process ID of the agent's network process, while there is one.
    ///
    /// # Errors
    ///
    /// If the agent does not answer.
    pub fn network_pid(&self) -> Result<Option<u32>> {
        Ok(control::get::<HostInfo>(&self.socket(), "/v1/host")?.network_pid)
    }

    /// Process ID of the agent, while there is one.
    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Kept::pid)
    }

    /// Kills the agent by SIGKILL; its VMs go on.
    pub fn kill_agent(&mut self) {
        self.agent = None;
    }

    /// Lets the agent read policies and keys again, without waiting for it.
    pub fn reload_agent(&self) {
        if let Some(agent) = &self.agent {
            agent.signal(Signal::HUP);
        }
    }

    /// Asks the agent to end, and waits for it.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn stop_agent(&mut self) -> Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.signal(Signal::TERM);
            agent.wait(START).with_context(|| self.log_tail())?;
        }
        Ok(())
    }

    /// Waits until the agent has ended by itself, as at a fail point.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn wait_agent_died(&mut self, limit: Duration) -> Result<()> {
        let Some(mut agent) = self.agent.take() else {
            return Ok(());
        };
        let ended = agent.wait(limit).map(drop);
        ended.with_context(|| format!("the agent of {} lives on: {}", self.name(), self.log_tail()))
    }

    /// Runs `palanquin` with the agent's control socket and `--json`.
    ///
    /// # Errors
    ///
    /// If it cannot be run or does not end in time.
    pub fn palanquin(&self, words: &[&str]) -> Result<Told> {
        self.palanquin_within(words, SHORT)
    }

    fn palanquin_command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(paths::program("palanquin")?);
        command
            .arg("--socket")
            .arg(self.socket())
            .arg("--json")
            .args(words);
        Ok(command)
    }

    /// As [`Host::palanquin`], with a limit.
    ///
    /// # Errors
    ///
    /// If it cannot be run or does not end in time.
    pub fn palanquin_within(&self, words: &[&str], limit: Duration) -> Result<Told> {
        let output = process::output(&mut self.palanquin_command(words)?, limit)?;
        told(output)
    }

    /// As [`Host::palanquin`], in the host's own network.
    ///
    /// # Errors
    ///
    /// If it cannot be run or does not end in time.
    pub fn palanquin_inside(&self, words: &[&str]) -> Result<Told> {
        let outside = self.palanquin_command(words)?;
        let mut command = self.namespace.command(outside.get_program());
        command.args(outside.get_args());
        told(process::output(&mut command, SHORT)?)
    }

    /// Starts `palanquin` and lets it run.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn palanquin_started(&self, words: &[&str]) -> Result<Running> {
        let mut command = self.palanquin_command(words)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().context("cannot start palanquin")?;
        Ok(Running { child })
    }

    /// The VMs of this host.
    ///
    /// # Errors
    ///
    /// If the agent does not answer.
    pub fn vms(&self) -> Result<Vec<VmInfo>> {
        control::get(&self.socket(), "/v1/vms")
    }

    /// A VM of this host.
    ///
    /// # Errors
    ///
    /// If the agent does not answer.
    pub fn vm(&self, name: &str) -> Result<Option<VmInfo>> {
        Ok(self.vms()?.into_iter().find(|vm| vm.name == name))
    }

    /// Whether a VM of that name runs here, as the agent says.
    ///
    /// # Errors
    ///
    /// If the agent does not answer.
    pub fn runs(&self, name: &str) -> Result<bool> {
        Ok(self
            .vm(name)?
            .is_some_and(|vm| vm.state == VmState::Running))
    }

    /// Migrations of this host.
    ///
    /// # Errors
    ///
    /// If the agent does not answer.
    pub fn migrations(&self) -> Result<Vec<MigrationInfo>> {
        control::get(&self.socket(), "/v1/migrations")
    }

    /// One migration.
    ///
    /// # Errors
    ///
    /// If the agent does not answer or knows none of that identity.
    pub fn migration(&self, id: Uuid) -> Result<MigrationInfo> {
        control::get(&self.socket(), &format!("/v1/migrations/{id}"))
    }

    /// Console of a VM of this host.
    ///
    /// # Errors
    ///
    /// If there is no such VM, or it has no console.
    pub fn console(&self, name: &str) -> Result<Console> {
        let vm = self
            .vm(name)?
            .with_context(|| format!("no VM {name} at {}", self.name()))?;
        Ok(Console::new(vm.console.context("it has no console")?))
    }

    /// Boots a guest with `palanquin vm run` and waits until its workload is ready.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn boot(&self, guest: &GuestSpec) -> Result<Console> {
        self.boot_with(guest, &[])
    }

    /// As [`Host::boot`], with more words for `palanquin vm run`.
    ///
    /// # Errors
    ///
    /// If it does not boot.
    pub fn boot_with(&self, guest: &GuestSpec, more: &[&str]) -> Result<Console> {
        let spec = self.dir.join(format!("{}.toml", guest.name));
        fs::write(&spec, guest.to_toml()?)?;
        let shown = spec.display().to_string();
        let words = [&["vm", "run", &shown], more].concat();
        self.palanquin(&words)?
            .expect_status(0)
            .with_context(|| self.log_tail())?;
        let console = self.console(&guest.name)?;
        console.wait_for("palanquin-workload ready", Duration::from_secs(120))?;
        console.wait_beats(1, SHORT)?;
        Ok(console)
    }

    /// MTU of its uplink, in bytes.
    ///
    /// # Errors
    ///
    /// If it has none.
    pub fn mtu(&self) -> Result<u32> {
        let uplink = network::link(&self.namespace, "eth0")?;
        let mtu = uplink["mtu"].as_u64().context("eth0 has no MTU")?;
        Ok(mtu.try_into()?)
    }

    /// QEMU processes of this host, whoever started them.
    ///
    /// # Errors
    ///
    /// If they cannot be listed.
    pub fn qemus(&self) -> Result<Vec<u32>> {
        let mut all = self.namespace.processes()?;
        all.retain(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.starts_with("qemu-system")
        });
        Ok(all)
    }

    /// Directory of the host.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The end of the agent's log, for an error.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(25);
        format!("log of {}:\n{}", self.name(), lines[from..].join("\n"))
    }
}

fn told(output: std::process::Output) -> Result<Told> {
    Ok(Told {
        status: output.status.code().context("palanquin was killed")?,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// A command of `palanquin` under way.
#[derive(Debug)]
pub struct Running {
    child: Child,
}

impl Running {
    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// If it does not end in time; then it is killed.
    pub fn finish(self, limit: Duration) -> Result<Told> {
        let pid = self.child.id();
        let (sender, receiver) = std::sync::mpsc::channel();
        let child = self.child;
        std::thread::spawn(move || sender.send(child.wait_with_output()));
        let Ok(output) = receiver.recv_timeout(limit) else {
            process::kill(pid);
            bail!("palanquin has not ended within {limit:?}");
        };
        told(output?)
    }
}

/// Makes a private key readable for its owner alone.
///
/// # Errors
///
/// If it is not there.
pub fn protect_key(path: &Path) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}
