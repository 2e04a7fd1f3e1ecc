//! A host says that it has what it has not, to draw VMs (T3).
//!
//! QEMU knows no advertisements. What users of its own migration have is a scheduler that asks hosts what they have and
//! believes it: the one here asks over TCP, as one asks an exporter of metrics, and takes the host with the most.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palanquin_api::advertisement::Advertisements;
use uuid::Uuid;

use super::mover::{MOVED, Mover, hosts, words};
use super::{Carrier, Found, VM, prey};
use crate::host::{Host, SHORT};
use crate::rig::Rig;
use crate::transport::Transport;
use crate::trust::JudgingRig;

const ID: Uuid = Uuid::from_u128(0x7a1c_0000_0000_4000_8000_0000_0000_00a2);
/// Where hosts say what they have.
const PORT: u16 = 9100;
const PATIENCE: Duration = Duration::from_secs(10);
/// What the liar says.
const LIE_MIB: u64 = 1 << 20;
/// Memory that a Palanquin agent keeps back when it has nothing to give, in MiB.
const ALL_MIB: u64 = 1 << 22;

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    match carrier {
        Carrier::Qemu(transport) => on_qemu(transport),
        Carrier::Palanquin => on_palanquin(),
    }
}

/// Memory that this machine has free, in MiB.
fn free_mib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("no MemAvailable")? / 1024)
}

/// A host that answers the next who asks.
fn says(host: &Host, mib: u64) -> Result<()> {
    let listener = host
        .namespace
        .inside(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?))?;
    std::thread::spawn(move || {
        if let Ok((mut stream, _)) = listener.accept() {
            let _ = writeln!(stream, "memory_available_mib {mib}");
        }
    });
    Ok(())
}

/// Asks these hosts and takes the one with the most.
fn choose(rig: &Rig, among: &[usize]) -> Result<(usize, u64)> {
    let mut best = None;
    for &host in among {
        let address: Ipv4Addr = rig.hosts[host].spec.address.parse()?;
        let mib: u64 = rig.client.inside(move || {
            let to = SocketAddr::from((address, PORT));
            let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut text = String::new();
            stream.take(256).read_to_string(&mut text)?;
            let number = text.trim().strip_prefix("memory_available_mib ");
            number.context("no number")?.parse().context("no number")
        })?;
        if best.is_none_or(|(_, most)| mib > most) {
            best = Some((host, mib));
        }
    }
    best.context("no host was asked")
}

fn on_qemu(transport: Transport) -> Result<Found> {
    let rig = hosts(&["a", "b", "c"])?;
    // The liar is a host like others: it has the certificates and keys that hosts have.
    let mut mover = Mover::boot(&rig, transport, 2)?;
    let honest = free_mib()?;
    says(&rig.hosts[1], honest)?;
    says(&rig.hosts[2], LIE_MIB)?;
    let (chosen, said) = choose(&rig, &[1, 2])?;
    ensure!(chosen == 2, "the scheduler has chosen the honest host");
    let ready = mover.ready(&rig, chosen)?;
    let sent = mover.send(&ready.connect, MOVED)?;
    let there = ready.receiver.beats_on()?;
    let what = format!(
        "QEMU has no advertisements: a scheduler of ours that believes what hosts say chose the one that said {said} MiB, and \
         has {honest}; the source says {sent}"
    );
    Ok(match there {
        Some(beat) => Found::succeeded(format!("{what}; the guest runs there, at beat {beat}")),
        None => Found::detected(format!("{what}; it does not run there")),
    })
}

fn on_palanquin() -> Result<Found> {
    let mut judging = JudgingRig::new()?;
    let passport = judging.passport(ID, 1, "")?;
    judging.rig.hosts[0].boot_with(&prey(), &["--passport", &passport])?;
    let out = judging.rig.hosts[1]
        .dir()
        .join("for-a")
        .display()
        .to_string();
    let words_of = [
        "advertisement",
        "make",
        "--for",
        "a",
        "--memory",
        "1GiB",
        "--out",
        &out,
    ];
    judging.rig.hosts[1]
        .palanquin(&words_of)?
        .expect_status(0)?;
    // From now on it has nothing of what it has signed.
    let liar = &mut judging.rig.hosts[1];
    liar.stop_agent()?;
    liar.spec.memory_reserve_mib = ALL_MIB;
    liar.write_config()?;
    liar.start_agent()?;
    let rig = &judging.rig;
    let source = &rig.hosts[0];
    source
        .palanquin(&["advertisement", "accept", &out])?
        .expect_status(0)?;
    let first = rig.migrate(VM, 0, 1, &[])?;
    let again = rig.migrate(VM, 0, 1, &[])?;
    let told = source
        .palanquin(&["advertisement", "ls"])?
        .expect_status(0)?;
    let known: Advertisements = serde_json::from_str(&told.stdout)?;
    let arrived = rig.hosts[1].vm(VM)?.is_some() || !rig.hosts[1].qemus()?.is_empty();
    let what = format!(
        "a host signed that it has 1 GiB for us, and had nothing: {}; hosts in quarantine since: {}; once more: {}",
        words(&first)?,
        known.quarantined.len(),
        words(&again)?
    );
    if arrived || first.status == 0 || again.status == 0 {
        return Ok(Found::succeeded(what));
    }
    source.console(VM)?.wait_beats(2, SHORT)?;
    let what = format!("{what}; the guest goes on at the source");
    Ok(if known.quarantined.is_empty() {
        Found::unnoticed(what)
    } else {
        Found::detected(what)
    })
}
