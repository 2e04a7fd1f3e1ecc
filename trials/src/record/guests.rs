//! The three guests: one of an agent, one of nobody that QEMU itself moves, and one to which nothing is done.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use palanquin_lab::guest::{GuestSpec, mac};
use palanquin_lab::host::Host;
use palanquin_lab::network::Namespace;
use palanquin_lab::paths::guest_dir;
use palanquin_lab::qemu::{Qemu, Qmp};
use palanquin_lab::rig::Rig;
use serde_json::json;

use super::plan::Plan;

/// MiB of each guest.
pub(super) const MEMORY_MIB: u64 = 192;
const BOOT: Duration = Duration::from_secs(120);
/// A guest that arrived goes on within this time.
const REVIVE: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(20);

/// A guest's place in the network.
pub(super) struct Guest {
    pub(super) name: &'static str,
    pub(super) address: &'static str,
    pub(super) tap: &'static str,
}

/// Moved by Palanquin.
pub(super) const PALANQUIN: Guest = Guest {
    name: "p",
    address: "10.77.1.10",
    tap: "vm0",
};
/// Moved by QEMU.
pub(super) const QEMU: Guest = Guest {
    name: "q",
    address: "10.77.1.11",
    tap: "vm1",
};
/// Left alone.
const ALONE: Guest = Guest {
    name: "o",
    address: "10.77.1.12",
    tap: "vm2",
};
/// All.
pub(super) const ALL: [Guest; 3] = [PALANQUIN, QEMU, ALONE];

/// The guests, while they run.
pub(super) struct Guests {
    spec: GuestSpec,
    /// Number of the host where Palanquin's is.
    pub(super) palanquin_at: usize,
    /// The one that QEMU moves, and where it is.
    pub(super) qemu: Qemu,
    pub(super) qmp: Qmp,
    pub(super) qemu_at: usize,
    _alone: Qemu,
    started: u32,
    /// The guest did not survive what happened last.
    pub(super) is_dead: bool,
}

impl Guests {
    pub(super) fn boot(rig: &Rig, plan: &Plan) -> Result<Self> {
        let mut spec = GuestSpec::small(PALANQUIN.name).filled(plan.fill_mib);
        spec.memory_mib = vec![MEMORY_MIB];
        spec.buffer_mib = 8;
        spec.dirty_mib_s = plan.dirty_mib_s;
        spec.audit_mib_s = 0;
        let mut of_agent = spec.clone();
        of_agent.network = Some((PALANQUIN.address.to_owned(), PALANQUIN.tap.to_owned()));
        rig.hosts[0].boot(&of_agent)?;
        let alone = start(&rig.hosts[1], &spec, &ALONE, "alone", false)?;
        let qemu = start(&rig.hosts[0], &spec, &QEMU, "q0", false)?;
        for one in [&alone, &qemu] {
            one.console().wait_for("palanquin-workload ready", BOOT)?;
        }
        let qmp = qemu.qmp()?;
        Ok(Self {
            spec,
            palanquin_at: 0,
            qemu,
            qmp,
            qemu_at: 0,
            _alone: alone,
            started: 0,
            is_dead: false,
        })
    }

    /// Starts QEMU on a host to wait for the guest.
    pub(super) fn incoming(&mut self, host: &Host) -> Result<Qemu> {
        self.started += 1;
        start(host, &self.spec, &QEMU, &format!("q{}", self.started), true)
    }

    /// The guest is elsewhere now.
    pub(super) fn arrived(&mut self, qemu: Qemu, qmp: Qmp, at: usize) {
        self.qemu = qemu;
        (self.qmp, self.qemu_at) = (qmp, at);
        self.is_dead = !goes_on(&self.qemu);
    }

    /// Starts the guest anew if it did not survive.
    pub(super) fn mend(&mut self, rig: &Rig) -> Result<()> {
        if !self.is_dead {
            return Ok(());
        }
        self.qemu.kill();
        self.started += 1;
        let host = &rig.hosts[self.qemu_at];
        let name = format!("q{}", self.started);
        self.qemu = start(host, &self.spec, &QEMU, &name, false)?;
        let console = self.qemu.console();
        console.wait_for("palanquin-workload ready", BOOT)?;
        self.qmp = self.qemu.qmp()?;
        self.is_dead = false;
        palanquin_lab::wait::pause(Duration::from_secs(60))
    }
}

/// Whether the guest beats on, with its memory whole.
fn goes_on(qemu: &Qemu) -> bool {
    let beat = qemu.console().wait_beats(3, REVIVE);
    beat.is_ok() && !qemu.console().text().contains("Kernel panic")
}

fn start(
    host: &Host,
    spec: &GuestSpec,
    guest: &Guest,
    dir: &str,
    is_incoming: bool,
) -> Result<Qemu> {
    let files = guest_dir()?;
    let mut spec = spec.clone();
    spec.network = Some((guest.address.to_owned(), guest.tap.to_owned()));
    // Where memory is written meanwhile, many a guest does not survive QEMU's own migration under TCG.
    spec.dirty_mib_s = 0;
    let size = format!("{MEMORY_MIB}M");
    let mut arguments = [
        "-accel",
        "tcg",
        "-m",
        &size,
        "-object",
        &format!("memory-backend-memfd,id=ram0,size={size},share=on"),
        "-machine",
        "q35,memory-backend=ram0",
        "-kernel",
        &files.join("vmlinuz").display().to_string(),
        "-initrd",
        &files.join("initrd.gz").display().to_string(),
        "-append",
        &spec.command_line(),
        "-netdev",
        &format!("tap,id=net0,ifname={},script=no,downscript=no", guest.tap),
        "-device",
        &format!("virtio-net-pci,netdev=net0,mac={}", mac(guest.address)),
    ]
    .map(str::to_owned)
    .to_vec();
    if is_incoming {
        arguments.extend(["-incoming", "defer"].map(str::to_owned));
    }
    let command = host.namespace.command("qemu-system-x86_64");
    let qemu = Qemu::start(command, &host.dir().join(dir), arguments)?;
    // A guest that starts anew is what some events are.
    let action = json!({"reboot": "reset"});
    qemu.qmp()?.execute("set-action", &action)?;
    Ok(qemu)
}

/// Asks a guest by HTTP, and gives the body of its answer.
pub(super) fn ask(client: &Namespace, guest: &Guest, what: &str) -> Result<String> {
    let address: Ipv4Addr = guest.address.parse()?;
    let what = what.to_owned();
    client.inside(move || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((address, 80)), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {what} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if !answer.starts_with("HTTP/1.1 200") {
            bail!("{what}: {}", answer.lines().next().unwrap_or_default());
        }
        let body = answer.split("\r\n\r\n").nth(1).context("no body")?;
        Ok(body.to_owned())
    })
}
