//! Other ways to move a guest between two hosts of a rig: QEMU's own migration, in the clear or through what is commonly
//! put around it. Palanquin is compared with them, and attacks are tried on them.

pub mod ipsec;
pub mod segment;
pub mod ssh;
pub mod tls;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::guest::{Console, GuestSpec, mac};
use crate::host::Host;
use crate::paths::guest_dir;
use crate::qemu::{Qemu, Qmp};
use crate::wait;

/// What carries QEMU's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Plain,
    /// QEMU's TLS with certificates of both ends.
    Tls,
    /// A UNIX socket forwarded by ssh.
    Ssh,
    /// TCP over a network of its own, which joins the hosts alone.
    Segment,
    /// TCP through a tunnel of IPsec.
    Ipsec,
}

impl Transport {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Plain,
        Self::Segment,
        Self::Tls,
        Self::Ssh,
        Self::Ipsec,
    ];

    /// As on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "qemu",
            Self::Segment => "qemu-segment",
            Self::Tls => "qemu-tls",
            Self::Ssh => "qemu-ssh",
            Self::Ipsec => "qemu-ipsec",
        }
    }

    /// What it is, for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Plain => "QEMU, plaintext",
            Self::Segment => "QEMU, plaintext on an isolated segment",
            Self::Tls => "QEMU, TLS",
            Self::Ssh => "QEMU through ssh",
            Self::Ipsec => "QEMU through IPsec",
        }
    }
}

/// What lies between the two ends; it is taken down when it is dropped.
#[derive(Debug)]
pub enum Between {
    /// Nothing but the network.
    Nothing,
    /// A client and a server of ssh.
    Ssh(ssh::Tunnel),
    /// A network of the hosts' own.
    Segment(segment::Segment),
    /// Two daemons of IKE.
    Ipsec(ipsec::Tunnel),
}

/// The two ends of a migration.
#[derive(Debug)]
pub struct Ends {
    /// Where the destination listens, as QEMU has it.
    pub listen: String,
    /// Where the source connects, as QEMU has it.
    pub connect: String,
    /// What lies between.
    pub between: Between,
}

/// Longest wait for a guest's start.
pub const BOOT: Duration = Duration::from_secs(180);
/// QEMU ends a migration that was cancelled within this time.
const CANCEL: Duration = Duration::from_secs(60);
/// A guest that arrived goes on within this time.
const REVIVE: Duration = Duration::from_secs(30);
/// Port at which a destination listens for TCP.
pub const PORT: u16 = 4444;

/// What a guest is started for.
#[derive(Clone, Copy, Debug)]
pub enum Role<'a> {
    /// To be moved away.
    Outgoing,
    /// Waits for a migration.
    Incoming,
    /// Waits for a migration, and has the RAM that the file is: the very RAM of the source.
    Sharing(&'a Path),
}

/// Starts a guest in a host's namespace.
///
/// # Errors
///
/// If QEMU does not start.
pub fn start(host: &Host, guest: &GuestSpec, tls: Option<&Path>, role: &Role<'_>) -> Result<Qemu> {
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

/// Sets what a migration needs, at both ends: as fast as it can, over `channels` connections; 1 is without `multifd`.
///
/// # Errors
///
/// If QEMU refuses.
pub fn configure(qmp: &mut Qmp, transport: Transport, channels: u32) -> Result<()> {
    let capabilities = json!([{"capability": "multifd", "state": channels > 1}, {"capability": "events", "state": true}]);
    qmp.execute(
        "migrate-set-capabilities",
        &json!({"capabilities": capabilities}),
    )?;
    // As fast as it can, with the pause that Palanquin aims at by default too.
    let mut parameters = json!({"max-bandwidth": 10_000_000_000_u64, "downtime-limit": 300});
    if channels > 1 {
        parameters["multifd-channels"] = channels.into();
    }
    if transport == Transport::Tls {
        parameters["tls-creds"] = "tls0".into();
    }
    qmp.execute("migrate-set-parameters", &parameters)?;
    Ok(())
}

/// How a migration ended that was waited for.
#[derive(Clone, Debug)]
pub struct End {
    /// Its last report.
    pub report: Value,
    /// Why it did not complete.
    pub reason: Option<String>,
    /// Until its end, or until it was cancelled.
    pub total: Duration,
}

/// Starts the migration and waits for its end; cancels it at the deadline.
///
/// # Errors
///
/// If it fails.
pub fn migrate(from: &mut Qmp, uri: &str, deadline: Duration) -> Result<End> {
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
///
/// # Errors
///
/// If one of the events does not come.
pub fn downtime(from: &mut Qmp, to: &mut Qmp) -> Result<f64> {
    let resumed = to.wait_event("RESUME")?;
    let mut stopped = from.wait_event("STOP")?;
    while let Some(later) = from.take_event("STOP") {
        stopped = later;
    }
    Ok(resumed.saturating_sub(stopped).as_secs_f64() * 1e3)
}

/// Waits until the guest beats on, with its memory whole. What becomes of a guest that QEMU says has arrived is part of
/// what is compared.
///
/// # Errors
///
/// If it does not.
pub fn goes_on(console: &Console) -> Result<()> {
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

/// Makes what lies between two hosts, and says where they meet.
///
/// # Errors
///
/// If what lies between cannot be started.
pub fn endpoints(transport: Transport, source: &Host, destination: &Host) -> Result<Ends> {
    let tcp = |address: &str, between| Ends {
        // An address of the path's own is the only one that listens.
        listen: match between {
            Between::Nothing => format!("tcp:0.0.0.0:{PORT}"),
            _ => format!("tcp:{address}:{PORT}"),
        },
        connect: format!("tcp:{address}:{PORT}"),
        between,
    };
    Ok(match transport {
        Transport::Plain | Transport::Tls => tcp(&destination.spec.address, Between::Nothing),
        Transport::Segment => {
            let segment = segment::Segment::open(source, destination, source.mtu()?)?;
            tcp(&segment.far(), Between::Segment(segment))
        }
        Transport::Ipsec => {
            let tunnel = ipsec::Tunnel::open(source, destination, source.mtu()?)?;
            let far = tunnel.far().to_owned();
            tcp(&far, Between::Ipsec(tunnel))
        }
        Transport::Ssh => {
            let dir = destination.dir().join("ssh");
            let far = dir.join("far.sock");
            let _ = std::fs::remove_file(&far);
            let tunnel = ssh::Tunnel::open(source, destination, &far, &dir)?;
            Ends {
                listen: format!("unix:{}", far.display()),
                connect: format!("unix:{}", tunnel.near().display()),
                between: Between::Ssh(tunnel),
            }
        }
    })
}
