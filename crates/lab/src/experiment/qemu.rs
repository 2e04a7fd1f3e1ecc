//! There and back by QEMU's own migration.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use palanquin_lab::guest::GuestSpec;
use palanquin_lab::host::Host;
use palanquin_lab::qemu::Qmp;
use palanquin_lab::results::Leg;
use palanquin_lab::rig::Rig;
use palanquin_lab::transport::{
    BOOT, Between, Role, Transport, configure, downtime, endpoints, goes_on, migrate, start,
};
use serde_json::json;

use super::leg::{Case, Moved, observe};

/// Longest migration.
const DEADLINE: Duration = Duration::from_secs(120);

/// Boots the guest at the first host, moves it there and back, and ends it. `credentials` are directories for TLS, of the
/// server at each host.
pub(crate) fn round(
    rig: &Rig,
    guest: &GuestSpec,
    transport: Transport,
    credentials: &[PathBuf; 2],
    keep: &mut dyn FnMut(Leg) -> Result<()>,
) -> Result<()> {
    let mut here = start(&rig.hosts[0], guest, None, &Role::Outgoing)?;
    here.console().wait_for("palanquin-workload ready", BOOT)?;
    here.console().wait_beats(3, BOOT)?;
    for (way, from, to) in [("there", 0, 1), ("back", 1, 0)] {
        let (source, destination) = (&rig.hosts[from], &rig.hosts[to]);
        let there = start(destination, guest, None, &Role::Incoming)?;
        let (mut outgoing, mut incoming) = (here.qmp()?, there.qmp()?);
        if transport == Transport::Tls {
            equip(&mut outgoing, "client", &credentials[to])?;
            equip(&mut incoming, "server", &credentials[to])?;
        }
        configure(&mut outgoing, transport, 1)?;
        configure(&mut incoming, transport, 1)?;
        let ends = endpoints(transport, source, destination)?;
        incoming.execute("migrate-incoming", &json!({"uri": ends.listen}))?;
        let case = Case {
            rig,
            source,
            segment: match &ends.between {
                Between::Segment(segment) => Some(segment),
                _ => None,
            },
            // The agents are there, but they do nothing now.
            but: rig.hosts.iter().filter_map(Host::agent_pid).collect(),
            transport: transport.name(),
            way,
        };
        let console = there.console();
        let end = RefCell::new((&mut outgoing, &mut incoming));
        let leg = observe(
            &case,
            || {
                let end = migrate(end.borrow_mut().0, &ends.connect, DEADLINE)?;
                Ok(Moved {
                    total: end.total,
                    downtime_ms: None,
                    reason: end.reason,
                })
            },
            |moved| {
                if moved.reason.is_none() {
                    // QEMU's word is not enough: the guest itself must go on.
                    moved.reason = goes_on(&console).err().map(|why| format!("{why:#}"));
                }
                if moved.reason.is_none() {
                    let (outgoing, incoming) = &mut *end.borrow_mut();
                    moved.downtime_ms = Some(downtime(outgoing, incoming)?);
                }
                Ok(())
            },
        )?;
        let completed = leg.completed;
        keep(leg)?;
        here = there;
        if !completed {
            break;
        }
    }
    drop(here);
    Ok(())
}

/// Gives QEMU the credentials of an end, in place of those it had.
fn equip(qmp: &mut Qmp, end: &str, dir: &Path) -> Result<()> {
    // None are there the first time.
    let _ = qmp.execute("object-del", &json!({"id": "tls0"}));
    let credentials = json!({
        "qom-type": "tls-creds-x509", "id": "tls0", "endpoint": end, "dir": dir, "verify-peer": true,
    });
    qmp.execute("object-add", &credentials)?;
    Ok(())
}
