//! QEMU's own migration between two hosts of the rig.

use std::path::Path;

use anyhow::Result;
use palanquin_lab::host::Host;
use palanquin_lab::probe::Pings;
use palanquin_lab::rig::Rig;
use palanquin_lab::transport::{
    BOOT, Role, Transport, configure, downtime, endpoints, goes_on, migrate, start,
};
use palanquin_lab::usage::{Inhabitants, Watch, sent_bytes, wait_quiet, warm_up};
use serde_json::{Value, json};

use crate::measure::Sample;
use crate::peers::{Case, GUEST};

/// How QEMU is to migrate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    /// Name in the table.
    pub(crate) name: &'static str,
    transport: Transport,
    /// Number of channels; 1 is without `multifd`.
    channels: u32,
}

/// All that are measured.
pub(crate) const WAYS: [Way; 5] = [
    Way {
        name: PLAIN,
        transport: Transport::Plain,
        channels: 1,
    },
    Way {
        name: PLAIN_MULTIFD,
        transport: Transport::Plain,
        channels: 2,
    },
    Way {
        name: "qemu tls",
        transport: Transport::Tls,
        channels: 1,
    },
    Way {
        name: TLS_MULTIFD,
        transport: Transport::Tls,
        channels: 2,
    },
    Way {
        name: "qemu ssh tunnel",
        transport: Transport::Ssh,
        channels: 1,
    },
];
/// Names that bars refer to.
pub(crate) const PLAIN: &str = "qemu plaintext";
/// As [`PLAIN`].
pub(crate) const PLAIN_MULTIFD: &str = "qemu plaintext multifd";
/// As [`PLAIN`].
pub(crate) const TLS_MULTIFD: &str = "qemu tls multifd";

/// Boots a guest on the first host and moves it to the second.
pub(crate) fn measure(rig: &Rig, case: &Case, way: Way, tls: &Path) -> Result<Sample> {
    let (source, destination) = (&rig.hosts[0], &rig.hosts[1]);
    let credentials = (way.transport == Transport::Tls).then_some(tls);
    let outgoing = start(source, &case.guest, credentials, &Role::Outgoing)?;
    let console = outgoing.console();
    console.wait_for("palanquin-workload ready", BOOT)?;
    let rewritten = case.wait_settled(&console)?;
    let incoming = start(destination, &case.guest, credentials, &Role::Incoming)?;
    let (mut from, mut to) = (outgoing.qmp()?, incoming.qmp()?);
    configure(&mut from, way.transport, way.channels)?;
    configure(&mut to, way.transport, way.channels)?;
    let ends = endpoints(way.transport, source, destination)?;
    to.execute("migrate-incoming", &json!({"uri": ends.listen}))?;
    let pings = Pings::start(&rig.client, GUEST)?;
    wait_quiet(rig)?;
    warm_up(case.memory_mib())?;
    // The agents are there, but they do nothing now.
    let agents = rig.hosts.iter().filter_map(Host::agent_pid).collect();
    let watch = Watch::start(Inhabitants::of(rig, agents)?)?;
    let sent = sent_bytes(source)?;
    let end = migrate(&mut from, &ends.connect, case.deadline)?;
    let watched = watch.finish();
    let bytes_on_wire = sent_bytes(source)? - sent;
    // QEMU's word is not enough: the guest itself must go on.
    let reason = end.reason.or_else(|| {
        goes_on(&incoming.console())
            .err()
            .map(|why| format!("{why:#}"))
    });
    let completed = reason.is_none();
    let downtime_ms = if completed {
        Some(downtime(&mut from, &mut to)?)
    } else {
        None
    };
    let number = |value: &Value| value.as_f64().filter(|_| completed);
    Ok(Sample {
        path: way.name.to_owned(),
        workload: case.workload.to_owned(),
        completed,
        reason,
        total_ms: end.total.as_secs_f64() * 1e3,
        downtime_ms,
        reported_total_ms: number(&end.report["total-time"]),
        reported_downtime_ms: number(&end.report["downtime"]),
        ping_gap_ms: pings.finish()?.longest_gap_ms,
        bytes_on_wire,
        cpu_s: watched.cpu_s,
        rss_mib: watched.rss_mib,
        agents_rss_mib: None,
        rounds: end.report["ram"]["dirty-sync-count"].as_u64(),
        rewritten_mib_s: Some(rewritten),
        foreign_share: watched.foreign_share,
    })
}
