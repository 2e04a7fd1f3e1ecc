//! Hostile peers on a real network: whoever stands on the path, another host with a certificate, and strangers in their
//! thousands.
#![forbid(unsafe_code)]

mod flood;
mod impostor;
mod sweep;

use anyhow::{Context, Result, ensure};
use palanquin_lab::host::{Host, SHORT};
use palanquin_lab::rig::Rig;
use palanquin_lab::{process, wait};

/// Process IDs of an agent.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Agent {
    privileged: u32,
    network: u32,
}

impl Agent {
    fn of(host: &Host) -> Result<Self> {
        Ok(Self {
            privileged: host.agent_pid().context("an agent is missing")?,
            network: host.network_pid()?.context("no network process")?,
        })
    }

    fn sum(self, key: &str) -> Result<u64> {
        let value = |pid| process::status_value(pid, key).context("no such process");
        Ok(value(self.privileged)? + value(self.network)?)
    }
}

/// The agents.
fn agents(rig: &Rig) -> Result<Vec<Agent>> {
    rig.hosts.iter().map(Agent::of).collect()
}

/// No agent, and no network process, has panicked or was started again, and every migration that one knows of has ended.
fn unharmed(rig: &Rig, agents: &[Agent]) -> Result<()> {
    for (host, agent) in rig.hosts.iter().zip(agents) {
        ensure!(
            process::start_ticks(agent.privileged).is_some() && Agent::of(host)? == *agent,
            "the agent of {} is gone: {}",
            host.name(),
            host.log_tail()
        );
        let log = std::fs::read_to_string(host.log())?;
        ensure!(!log.contains("panicked"), "{}", host.log_tail());
    }
    wait::until_true("all migrations have ended", SHORT, || {
        for host in &rig.hosts {
            if host.migrations()?.iter().any(|info| info.outcome.is_none()) {
                return Ok(false);
            }
        }
        Ok(true)
    })
    .with_context(|| rig.logs())
}

/// Threads of both processes of an agent.
fn threads(agent: Agent) -> Result<u64> {
    agent.sum("Threads")
}

/// Resident memory of both processes of an agent, in KiB: what they share counts twice.
fn rss_kib(agent: Agent) -> Result<u64> {
    agent.sum("VmRSS")
}
