//! What a migration costs, measured the same way whoever does it.

use serde::Serialize;

/// One migration.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    /// Which way it was done.
    pub(crate) path: String,
    /// What the guest did meanwhile.
    pub(crate) workload: String,
    /// Whether the guest arrived; why not is in `reason`.
    pub(crate) completed: bool,
    /// Why it did not complete.
    pub(crate) reason: Option<String>,
    /// From the request to the answer that it is done or given up, in milliseconds, by the bench's clock.
    pub(crate) total_ms: f64,
    /// How long the guest stood still, in milliseconds. Of QEMU's own migration and the floor from the source's event
    /// STOP to the destination's event RESUME; of Palanquin what it reports, from before the pause to the
    /// destination's answer that the guest runs.
    pub(crate) downtime_ms: Option<f64>,
    /// Total time as the migrating program itself reports it.
    pub(crate) reported_total_ms: Option<f64>,
    /// Downtime as the migrating program itself reports it. QEMU's ends before the destination runs.
    pub(crate) reported_downtime_ms: Option<f64>,
    /// Longest time in which a client's pings were not answered, one each 5 ms.
    pub(crate) ping_gap_ms: f64,
    /// What the source's network device sent.
    pub(crate) bytes_on_wire: u64,
    /// CPU time of all processes that take part, both ends, the guest's own included.
    pub(crate) cpu_s: f64,
    /// Largest sum of the anonymous memory of all processes that take part, in MiB: agents, hypervisors and tunnels.
    /// Guest RAM is shared memory and not in it.
    pub(crate) rss_mib: f64,
    /// As `rss_mib`, of the agents alone; Palanquin only.
    pub(crate) agents_rss_mib: Option<f64>,
    /// Rounds over the memory, as the migrating program counts them.
    pub(crate) rounds: Option<u64>,
    /// What the guest rewrote each second before the migration, in MiB.
    pub(crate) rewritten_mib_s: Option<f64>,
    /// User-mode CPU time of everybody else during the migration, as a share of all CPUs' time, 0 to 1.
    pub(crate) foreign_share: f64,
}
