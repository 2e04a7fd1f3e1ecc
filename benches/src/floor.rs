//! How short a pause can be with this QEMU and this guest: nothing but the state of CPUs and devices changes hands.
//!
//! The destination has the source's very RAM mapped, and `x-ignore-shared` leaves it where it is. No page is sent, and
//! nothing is made durable.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use palanquin_lab::host::Host;
use palanquin_lab::probe::Pings;
use palanquin_lab::qemu::{Qemu, Qmp};
use palanquin_lab::rig::Rig;
use palanquin_lab::transport::{BOOT, Role, downtime, migrate, start};
use palanquin_lab::usage::{Inhabitants, Watch, wait_quiet};
use serde_json::json;

use crate::measure::Sample;
use crate::peers::{Case, GUEST};

/// Somebody outside pauses the guest, lets the source save, lets the destination load, and resumes the guest: what an
/// agent has to do at least. This is the floor that the bars mean.
pub(crate) const FLOOR: &str = "floor (device state only)";
/// QEMU hands the state to QEMU by itself: saving and loading overlap, and nobody outside waits for an answer.
pub(crate) const HANDOVER: &str = "floor (QEMU to QEMU)";

/// A way to measure a floor.
type Floor = fn(&Rig, &Case) -> Result<Sample>;
/// Both, by name.
pub(crate) const ALL: [(&str, Floor); 2] = [(FLOOR, from_outside), (HANDOVER, by_itself)];

/// The state is saved and loaded within this time.
const PATIENCE: Duration = Duration::from_secs(20);
/// Largest device state read.
const LARGEST: u64 = 64 << 20;

/// A guest and a QEMU that shares its RAM.
struct Pair {
    incoming: Qemu,
    from: Qmp,
    to: Qmp,
    /// Last, so that the RAM outlives who shares it.
    _outgoing: Qemu,
}

fn pair(rig: &Rig, case: &Case) -> Result<Pair> {
    let (source, destination) = (&rig.hosts[0], &rig.hosts[1]);
    let outgoing = start(source, &case.guest, None, &Role::Outgoing)?;
    let console = outgoing.console();
    console.wait_for("palanquin-workload ready", BOOT)?;
    case.wait_settled(&console)?;
    let ram = guest_ram(outgoing.pid())?;
    let incoming = start(destination, &case.guest, None, &Role::Sharing(&ram))?;
    let (mut from, mut to) = (outgoing.qmp()?, incoming.qmp()?);
    let capabilities = json!([{"capability": "x-ignore-shared", "state": true}, {"capability": "events", "state": true}]);
    for qmp in [&mut from, &mut to] {
        let arguments = json!({"capabilities": capabilities});
        qmp.execute("migrate-set-capabilities", &arguments)?;
    }
    Ok(Pair {
        incoming,
        from,
        to,
        _outgoing: outgoing,
    })
}

/// The guest's RAM as a file: the descriptor of the memory backend's memfd (proc(5)).
fn guest_ram(pid: u32) -> Result<PathBuf> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        let target = std::fs::read_link(&path).unwrap_or_default();
        if target
            .to_string_lossy()
            .starts_with("/memfd:memory-backend-memfd")
        {
            return Ok(path);
        }
    }
    None.with_context(|| format!("process {pid} has no RAM in a memfd"))
}

/// Measures around `work`, which gives total and down time in milliseconds.
fn around(
    rig: &Rig,
    case: &Case,
    name: &str,
    work: impl FnOnce(&mut Pair) -> Result<(f64, f64)>,
) -> Result<Sample> {
    let mut pair = pair(rig, case)?;
    let pings = Pings::start(&rig.client, GUEST)?;
    wait_quiet(rig)?;
    let agents = rig.hosts.iter().filter_map(Host::agent_pid).collect();
    let watch = Watch::start(Inhabitants::of(rig, agents)?)?;
    let (total_ms, downtime_ms) = work(&mut pair)?;
    let watched = watch.finish();
    pair.incoming.console().wait_beats(3, BOOT)?;
    Ok(Sample {
        path: name.to_owned(),
        workload: case.workload.to_owned(),
        completed: true,
        reason: None,
        total_ms,
        downtime_ms: Some(downtime_ms),
        reported_total_ms: None,
        reported_downtime_ms: None,
        ping_gap_ms: pings.finish()?.longest_gap_ms,
        bytes_on_wire: 0,
        cpu_s: watched.cpu_s,
        rss_mib: watched.rss_mib,
        agents_rss_mib: None,
        rounds: None,
        rewritten_mib_s: None,
        foreign_share: watched.foreign_share,
    })
}

fn by_itself(rig: &Rig, case: &Case) -> Result<Sample> {
    let socket = rig.hosts[1].dir().join("incoming/handover.sock");
    around(rig, case, HANDOVER, |pair| {
        let uri = format!("unix:{}", socket.display());
        pair.to.execute("migrate-incoming", &json!({"uri": uri}))?;
        let end = migrate(&mut pair.from, &uri, PATIENCE)?;
        if let Some(reason) = end.reason {
            bail!("the device state was not handed over: {reason}");
        }
        let downtime = downtime(&mut pair.from, &mut pair.to)?;
        Ok((end.total.as_secs_f64() * 1e3, downtime))
    })
}

fn from_outside(rig: &Rig, case: &Case) -> Result<Sample> {
    let (out, into) = (
        rig.hosts[0].dir().join("outgoing/save.sock"),
        rig.hosts[1].dir().join("incoming/load.sock"),
    );
    for socket in [&out, &into] {
        let _ = std::fs::remove_file(socket);
    }
    around(rig, case, FLOOR, |pair| {
        let uri = |path: &PathBuf| json!({"uri": format!("unix:{}", path.display())});
        // All that can be done before the pause.
        let listener = UnixListener::bind(&out)?;
        pair.to.execute("migrate-incoming", &uri(&into))?;
        let mut loader = UnixStream::connect(&into)?;
        loader.set_write_timeout(Some(PATIENCE))?;
        let mut state = Vec::with_capacity(1 << 20);

        let began = Instant::now();
        pair.from.execute("stop", &json!({}))?;
        pair.from.execute("migrate", &uri(&out))?;
        let (saver, _) = listener.accept()?;
        saver.set_read_timeout(Some(PATIENCE))?;
        // QEMU closes the stream when all is in it.
        saver.take(LARGEST).read_to_end(&mut state)?;
        loader.write_all(&state)?;
        // The destination is in state "inmigrate" until all is loaded, and "paused" as the source was then.
        loop {
            let status = pair.to.execute("query-status", &json!({}))?;
            if status["status"] != "inmigrate" {
                break;
            }
            if began.elapsed() > PATIENCE {
                bail!("the device state was not loaded within {PATIENCE:?}");
            }
        }
        pair.to.execute("cont", &json!({}))?;
        let took = began.elapsed().as_secs_f64() * 1e3;
        Ok((took, took))
    })
}
