//! The path leads to the attacker's host (T1, T10).

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use super::mover::{MOVED, Mover, Receiver, Sent, complains, hosts, log_line, spec, words};
use super::path::steal;
use super::{Carrier, Found, VM, prey};
use crate::host::{Host, SHORT};
use crate::process::{self, Kept};
use crate::rig::Rig;
use crate::transport::{PORT, Role, Transport, endpoints, ipsec, ssh, start, tls};

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    match carrier {
        Carrier::Qemu(transport) => on_qemu(transport),
        Carrier::Palanquin => on_palanquin(),
    }
}

fn on_qemu(transport: Transport) -> Result<Found> {
    let rig = hosts(&["a", "b", "c"])?;
    let mut mover = Mover::boot(&rig, transport, 1)?;
    let [source, honest, attacker] = [&rig.hosts[0], &rig.hosts[1], &rig.hosts[2]];
    let address = honest.spec.address.as_str();
    let _stolen = steal(&source.namespace, &attacker.namespace, "br0", address)?;
    // His certificates are for the same address, by an authority of his own.
    let credentials = if transport == Transport::Tls {
        let dir = rig.dir().join("tls-of-attacker");
        tls::make(&dir, address.parse()?)?;
        Some(dir)
    } else {
        None
    };
    let his = start(attacker, &prey(), credentials.as_deref(), &Role::Incoming)?;
    let mut control = his.qmp()?;
    crate::transport::configure(&mut control, transport, 1)?;
    let _server = (transport == Transport::Ssh)
        .then(|| false_server(attacker, honest))
        .transpose()?;
    let _impostor = (transport == Transport::Ipsec)
        .then(|| ipsec::Tunnel::impostor(attacker, honest, source))
        .transpose()?;
    if transport != Transport::Ssh {
        let uri = format!("tcp:0.0.0.0:{PORT}");
        control.execute("migrate-incoming", &json!({"uri": uri}))?;
    }
    let opened = endpoints(transport, source, honest);
    let ends = match opened {
        Ok(opened) => opened,
        Err(error) => {
            let why = format!("{error:#}");
            ensure!(mover.beats_on()?.is_some(), "the guest does not run: {why}");
            // What ssh and swanctl say fills a screen.
            let told = [
                "REMOTE HOST IDENTIFICATION HAS CHANGED",
                "Host key verification failed",
                "received AUTHENTICATION_FAILED notify error",
            ];
            let told: Vec<&str> = told
                .into_iter()
                .filter(|words| why.contains(words))
                .collect();
            let why = if told.is_empty() {
                why
            } else {
                told.join("; ")
            };
            return Ok(Found::detected(format!(
                "there is no way to the destination: {why}; the guest goes on at the source"
            )));
        }
    };
    if transport == Transport::Ssh {
        control.execute("migrate-incoming", &json!({"uri": ends.listen}))?;
    }
    // There the address on the switch is not the one that the source connects to.
    let _true_one = (transport == Transport::Segment)
        .then(|| mover.receiver(honest, ends.listen.clone(), &Role::Incoming))
        .transpose()?;
    let sent = mover.send(&ends.connect, MOVED)?;
    drop(control);
    let his = Receiver {
        qemu: his,
        listens: ends.listen,
    };
    let his_beat = his.beats_on()?;
    let stays = mover.beats_on()?.is_some();
    Ok(if let Some(beat) = his_beat {
        Found::succeeded(format!(
            "the source says {sent}; the guest runs at the attacker's host, at beat {beat}, and at the source: {stays}"
        ))
    } else {
        let what = format!(
            "the source says {sent}; no guest runs at the attacker's host, whose receiver says: {}; the guest goes on at the \
             source: {stays}",
            complains(attacker)
        );
        if matches!(sent, Sent::Completed(_)) {
            Found::unnoticed(what)
        } else {
            Found::detected(what)
        }
    })
}

/// The attacker's own server of ssh, with another key, which lets the source's user in.
fn false_server(attacker: &Host, honest: &Host) -> Result<Kept> {
    let dir = attacker.dir().join("false-ssh");
    fs::create_dir_all(&dir)?;
    fs::create_dir_all("/run/sshd")?;
    let key = dir.join("host-key");
    let shown = key.display().to_string();
    process::run(
        "ssh-keygen",
        &["-q", "-t", "ed25519", "-N", "", "-f", &shown],
    )?;
    // Public keys are public.
    let keys = honest.dir().join("ssh/authorized-keys");
    ssh::serve_with(attacker, "0.0.0.0", (&key, &keys), &dir)
}

fn on_palanquin() -> Result<Found> {
    let mut rig = Rig::without_agents(&spec(&["a", "b", "c"]))?;
    // The attacker's agent calls itself by the destination's name, with a certificate of an authority of his own.
    rig.authority("other")?;
    let identity = rig.issue("other", "host", "b")?;
    let attacker = &mut rig.hosts[2];
    attacker.spec.name = "b".to_owned();
    attacker.spec.identity = identity;
    attacker.write_config()?;
    for host in &mut rig.hosts {
        host.start_agent()?;
    }
    rig.hosts[0].boot(&prey())?;
    let address = rig.hosts[1].spec.address.clone();
    let thief = &rig.hosts[2].namespace;
    let _stolen = steal(&rig.hosts[0].namespace, thief, "br0", &address)?;
    let told =
        rig.hosts[0].palanquin_within(&["migrate", VM, "--to", "b"], Duration::from_secs(90))?;
    let his = rig.hosts[2].vm(VM)?;
    let qemus = rig.hosts[2].qemus()?.len();
    let said = log_line(&rig.hosts[2], &["connection refused", "handshake"]);
    let what = format!(
        "{}; at the attacker's host {qemus} processes of QEMU, and its agent says: {}",
        words(&told)?,
        said.unwrap_or_else(|| "nothing".to_owned())
    );
    if his.is_some() || qemus > 0 || told.status == 0 {
        return Ok(Found::succeeded(what));
    }
    rig.hosts[0].console(VM)?.wait_beats(2, SHORT)?;
    Ok(Found::detected(format!(
        "{what}; the guest goes on at the source"
    )))
}
