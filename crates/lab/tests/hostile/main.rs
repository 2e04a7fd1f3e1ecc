//! Hostile peers on a real network: whoever stands on the path, another host with a certificate, and strangers in their
//! thousands.
#![forbid(unsafe_code)]

mod flood;
mod impostor;
mod sweep;

use anyhow::{Context, Result, ensure};
use palanquin_lab::host::SHORT;
use palanquin_lab::rig::Rig;
use palanquin_lab::{process, wait};

/// Process IDs of the agents.
fn agents(rig: &Rig) -> Result<Vec<u32>> {
    let pids = rig.hosts.iter().map(|host| host.agent_pid());
    pids.collect::<Option<_>>().context("an agent is missing")
}

/// No agent has panicked or was started again, and every migration that one knows of has ended.
fn unharmed(rig: &Rig, agents: &[u32]) -> Result<()> {
    for (host, pid) in rig.hosts.iter().zip(agents) {
        ensure!(
            process::start_ticks(*pid).is_some() && host.agent_pid() == Some(*pid),
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

/// Threads of a process.
fn threads(pid: u32) -> Result<u64> {
    process::status_value(pid, "Threads").context("no such process")
}

/// Resident memory of a process, in KiB.
fn rss_kib(pid: u32) -> Result<u64> {
    process::status_value(pid, "VmRSS").context("no such process")
}
