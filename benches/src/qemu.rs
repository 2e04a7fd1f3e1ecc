//! QEMU's own migration between two hosts of the rig.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use palanquin_lab::guest::{GuestSpec, mac};
use palanquin_lab::host::Host;
use palanquin_lab::paths::guest_dir;
use palanquin_lab::probe::Pings;
use palanquin_lab::qemu::{Qemu, Qmp};
use palanquin_lab::rig::Rig;
use palanquin_lab::wait;
use serde_json::{Value, json};

use crate::measure::{Sample, Watch, sent_bytes, wait_quiet};

/// How QEMU is to migrate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    /// Name in the table.
    pub(crate) name: &'static str,
    /// Whether with TLS.
    pub(crate) tls: bool,
    /// Number of channels; 1 is without `multifd`.
    pub(crate) channels: u32,
}

/// All that are measured.
pub(crate) const WAYS: [Way; 4] = [
    Way {
        name: "QEMU plaintext, 1 stream",
        tls: false,
        channels: 1,
    },
    Way {
        name: "QEMU plaintext, multifd 2",
        tls: false,
        channels: 2,
    },
    Way {
        name: "QEMU TLS, 1 stream",
        tls: true,
        channels: 1,
    },
    Way {
        name: "QEMU TLS, multifd 2",
        tls: true,
        channels: 2,
    },
];

/// Longest wait for a migration.
const PATIENCE: Duration = Duration::from_secs(300);
const PORT: u16 = 4444;

/// Starts a guest in a host's namespace; `incoming` waits for a migration.
pub(crate) fn start(
    host: &Host,
    guest: &GuestSpec,
    tls: Option<&Path>,
    incoming: bool,
) -> Result<Qemu> {
    let dir = guest_dir()?;
    let size = guest.memory_mib.iter().sum::<u64>();
    let mut arguments = [
        "-accel",
        "tcg",
        "-m",
        &format!("{size}M"),
        "-object",
        &format!("memory-backend-memfd,id=ram0,size={size}M,share=on"),
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
    if let Some(dir) = tls {
        let role = if incoming { "server" } else { "client" };
        let dir = dir.display();
        add(
            "-object",
            format!("tls-creds-x509,id=tls0,endpoint={role},dir={dir},verify-peer=on"),
        );
    }
    if incoming {
        add("-incoming", "defer".to_owned());
    }
    let name = if incoming { "incoming" } else { "outgoing" };
    let command = host.namespace.command("qemu-system-x86_64");
    Qemu::start(command, &host.dir().join(name), arguments)
}

fn configure(qmp: &mut Qmp, way: Way) -> Result<()> {
    let multifd = json!([{"capability": "multifd", "state": way.channels > 1}, {"capability": "events", "state": true}]);
    qmp.execute(
        "migrate-set-capabilities",
        &json!({"capabilities": multifd}),
    )?;
    // As fast as it can, with the pause that Palanquin aims at by default too.
    let mut parameters = json!({"max-bandwidth": 10_000_000_000_u64, "downtime-limit": 300});
    if way.channels > 1 {
        parameters["multifd-channels"] = way.channels.into();
    }
    if way.tls {
        parameters["tls-creds"] = "tls0".into();
    }
    qmp.execute("migrate-set-parameters", &parameters)?;
    Ok(())
}

/// Boots a guest on the first host and moves it to the second.
pub(crate) fn measure(rig: &Rig, guest: &GuestSpec, way: Way, tls: &Path) -> Result<Sample> {
    let (source, destination) = (&rig.hosts[0], &rig.hosts[1]);
    let credentials = way.tls.then_some(tls);
    let outgoing = start(source, guest, credentials, false)?;
    outgoing
        .console()
        .wait_for("palanquin-workload ready", PATIENCE)?;
    let incoming = start(destination, guest, credentials, true)?;
    let (mut from, mut to) = (outgoing.qmp()?, incoming.qmp()?);
    configure(&mut from, way)?;
    configure(&mut to, way)?;
    let address: Ipv4Addr = destination.spec.address.parse()?;
    to.execute(
        "migrate-incoming",
        &json!({"uri": format!("tcp:0.0.0.0:{PORT}")}),
    )?;
    let pings = Pings::start(&rig.client, crate::peers::GUEST)?;
    wait_quiet(&[outgoing.pid(), incoming.pid()])?;
    let watch = Watch::start(vec![outgoing.pid(), incoming.pid()], Vec::new());
    let sent = sent_bytes(source)?;
    let began = Instant::now();
    from.execute("migrate", &json!({"uri": format!("tcp:{address}:{PORT}")}))?;
    let stopped = from.wait_event("STOP")?;
    let resumed = to.wait_event("RESUME")?;
    let report = wait::until("QEMU's migration ends", PATIENCE, || {
        let report = from.execute("query-migrate", &json!({}))?;
        Ok(match report["status"].as_str() {
            Some("completed") => Some(report),
            Some(status @ ("failed" | "cancelled")) => bail!("QEMU's migration {status}: {report}"),
            _ => None,
        })
    })?;
    let total = began.elapsed();
    let watched = watch.finish(&[]);
    let wire_bytes = sent_bytes(source)? - sent;
    incoming.console().wait_beats(3, PATIENCE)?;
    let number = |key: &str| report.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
    Ok(Sample {
        path: way.name,
        total_ms: total.as_secs_f64() * 1e3,
        reported_total_ms: number("total-time"),
        reported_downtime_ms: number("downtime"),
        event_downtime_ms: Some(resumed.saturating_duration_since(stopped).as_secs_f64() * 1e3),
        ping_gap_ms: pings.finish()?.longest_gap_ms,
        cpu_s: watched.cpu_s,
        wire_bytes,
        agent_rss_anon_kib: None,
        foreign_share: watched.foreign_share,
    })
}
