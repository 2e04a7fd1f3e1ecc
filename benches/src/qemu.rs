//! QEMU's own migration between two hosts of the rig.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use palanquin_lab::guest::{Console, GuestSpec, mac};
use palanquin_lab::host::Host;
use palanquin_lab::paths::guest_dir;
use palanquin_lab::probe::Pings;
use palanquin_lab::qemu::{Qemu, Qmp};
use palanquin_lab::rig::Rig;
use palanquin_lab::wait;
use serde_json::{Value, json};

use crate::measure::{Inhabitants, Sample, Watch, sent_bytes, wait_quiet, warm_up};
use crate::peers::{Case, GUEST};
use crate::ssh::Tunnel;

/// What carries QEMU's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// TCP.
    Plain,
    /// QEMU's TLS with certificates of both ends.
    Tls,
    /// A UNIX socket forwarded by ssh.
    Ssh,
}

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

/// Longest wait for a guest's start.
pub(crate) const BOOT: Duration = Duration::from_secs(180);
/// QEMU ends a migration that was cancelled within this time.
const CANCEL: Duration = Duration::from_secs(60);
/// A guest that arrived goes on within this time.
const REVIVE: Duration = Duration::from_secs(30);
const PORT: u16 = 4444;

/// What a guest is started for.
pub(crate) enum Role<'a> {
    /// To be moved away.
    Outgoing,
    /// Waits for a migration.
    Incoming,
    /// Waits for a migration, and has the RAM that the file is: the very RAM of the source.
    Sharing(&'a Path),
}

/// Starts a guest in a host's namespace.
pub(crate) fn start(
    host: &Host,
    guest: &GuestSpec,
    tls: Option<&Path>,
    role: &Role<'_>,
) -> Result<Qemu> {
    let dir = guest_dir()?;
    let size = guest.memory_mib.iter().sum::<u64>();
    let backend = match role {
        Role::Sharing(file) => format!("memory-backend-file,mem-path={}", file.display()),
        _ => "memory-backend-memfd".to_owned(),
    };
    let mut arguments = [
        "-accel",
        "tcg",
        "-m",
        &format!("{size}M"),
        "-object",
        &format!("{backend},id=ram0,size={size}M,share=on"),
        "-machine",
        "q35,memory-backend=ram0",
        "-kernel",
        &dir.join("vmlinuz").display().to_string(),
        "-initrd",
        &dir.join("initrd.gz").display().to_string(),
        "-append",
        &guest.command_line(),
    ]
    .map(str::to_owned)
    .to_vec();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    if let Some((address, tap)) = &guest.network {
        add(
            "-netdev",
            format!("tap,id=net0,ifname={tap},script=no,downscript=no"),
        );
        add(
            "-device",
            format!("virtio-net-pci,netdev=net0,mac={}", mac(address)),
        );
    }
    let (name, end) = match role {
        Role::Outgoing => ("outgoing", "client"),
        Role::Incoming | Role::Sharing(_) => ("incoming", "server"),
    };
    if let Some(dir) = tls {
        let dir = dir.display();
        add(
            "-object",
            format!("tls-creds-x509,id=tls0,endpoint={end},dir={dir},verify-peer=on"),
        );
    }
    if name == "incoming" {
        add("-incoming", "defer".to_owned());
    }
    let command = host.namespace.command("qemu-system-x86_64");
    Qemu::start(command, &host.dir().join(name), arguments)
}

fn configure(qmp: &mut Qmp, way: Way) -> Result<()> {
    let capabilities = json!([{"capability": "multifd", "state": way.channels > 1}, {"capability": "events", "state": true}]);
    qmp.execute(
        "migrate-set-capabilities",
        &json!({"capabilities": capabilities}),
    )?;
    // As fast as it can, with the pause that Palanquin aims at by default too.
    let mut parameters = json!({"max-bandwidth": 10_000_000_000_u64, "downtime-limit": 300});
    if way.channels > 1 {
        parameters["multifd-channels"] = way.channels.into();
    }
    if way.transport == Transport::Tls {
        parameters["tls-creds"] = "tls0".into();
    }
    qmp.execute("migrate-set-parameters", &parameters)?;
    Ok(())
}

/// How a migration ended that was waited for.
pub(crate) struct End {
    /// Its last report.
    pub(crate) report: Value,
    /// Why it did not complete.
    pub(crate) reason: Option<String>,
    /// Until its end, or until it was cancelled.
    pub(crate) total: Duration,
}

/// Starts the migration and waits for its end; cancels it at the deadline.
pub(crate) fn migrate(from: &mut Qmp, uri: &str, deadline: Duration) -> Result<End> {
    let began = Instant::now();
    from.execute("migrate", &json!({"uri": uri}))?;
    let mut cancelled = None;
    let (report, status) = wait::until("QEMU's migration ends", deadline + CANCEL, || {
        let report = from.execute("query-migrate", &json!({}))?;
        let status = report["status"].as_str().unwrap_or_default().to_owned();
        if matches!(status.as_str(), "completed" | "failed" | "cancelled") {
            return Ok(Some((report, status)));
        }
        if began.elapsed() >= deadline && cancelled.is_none() {
            from.execute("migrate_cancel", &json!({}))?;
            cancelled = Some(began.elapsed());
        }
        Ok(None)
    })?;
    let reason = match (status.as_str(), cancelled) {
        ("completed", _) => None,
        ("cancelled", Some(_)) => Some(format!("not within {deadline:?}, cancelled")),
        _ => bail!("QEMU's migration {status}: {report}"),
    };
    Ok(End {
        total: cancelled.unwrap_or_else(|| began.elapsed()),
        report,
        reason,
    })
}

/// Milliseconds from the source's STOP to the destination's RESUME. The source may have stopped and gone on before.
pub(crate) fn downtime(from: &mut Qmp, to: &mut Qmp) -> Result<f64> {
    let resumed = to.wait_event("RESUME")?;
    let mut stopped = from.wait_event("STOP")?;
    while let Some(later) = from.take_event("STOP") {
        stopped = later;
    }
    Ok(resumed.saturating_sub(stopped).as_secs_f64() * 1e3)
}

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
    configure(&mut from, way)?;
    configure(&mut to, way)?;
    let (listen, connect, _tunnel) = endpoints(way, source, destination)?;
    to.execute("migrate-incoming", &json!({"uri": listen}))?;
    let pings = Pings::start(&rig.client, GUEST)?;
    wait_quiet(rig)?;
    warm_up(case.memory_mib())?;
    // The agents are there, but they do nothing now.
    let agents = rig.hosts.iter().filter_map(Host::agent_pid).collect();
    let watch = Watch::start(Inhabitants::of(rig, agents)?)?;
    let sent = sent_bytes(source)?;
    let end = migrate(&mut from, &connect, case.deadline)?;
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

/// Waits until the guest beats on, with its memory whole. What becomes of a guest that QEMU says has arrived is part of
/// what is compared.
fn goes_on(console: &Console) -> Result<()> {
    let before = console.beats().len();
    wait::until("the guest goes on", REVIVE, || {
        let text = console.text();
        if let Some(panic) = text.lines().find(|line| line.contains("Kernel panic")) {
            bail!("QEMU completed, but the guest died: {}", panic.trim());
        }
        let beats = console.beats();
        match beats.last() {
            Some(beat) if beat.corrupt > 0 => {
                bail!("QEMU completed, but {} pages are corrupt", beat.corrupt)
            }
            _ => Ok((beats.len() >= before + 3).then_some(())),
        }
    })
}

/// Where the destination listens, where the source connects, and what lies between.
fn endpoints(
    way: Way,
    source: &Host,
    destination: &Host,
) -> Result<(String, String, Option<Tunnel>)> {
    if way.transport != Transport::Ssh {
        let address = &destination.spec.address;
        let at = |address: &str| format!("tcp:{address}:{PORT}");
        return Ok((at("0.0.0.0"), at(address), None));
    }
    let dir = destination.dir().join("ssh");
    let far = dir.join("far.sock");
    let _ = std::fs::remove_file(&far);
    let tunnel = Tunnel::open(source, destination, &far, &dir)?;
    let near = format!("unix:{}", tunnel.near().display());
    Ok((format!("unix:{}", far.display()), near, Some(tunnel)))
}
