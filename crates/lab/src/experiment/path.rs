//! What the paths do by themselves: round trip of a ping, throughput of one TCP connection.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use palanquin_lab::host::Host;
use palanquin_lab::process::{self, Kept};
use palanquin_lab::results::PathCell;
use palanquin_lab::rig::Rig;
use palanquin_lab::transport::segment::Segment;
use palanquin_lab::transport::{Transport, ipsec, ssh};
use palanquin_lab::usage::median;
use palanquin_lab::wait;

/// Port of iperf3.
const PORT: u16 = 5201;
/// How long it sends, in seconds.
const SECONDS: &str = "3";
/// Both programs end within this time.
const PATIENCE: Duration = Duration::from_secs(30);

/// A path between two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// The network as it is.
    Bare,
    /// The isolated segment.
    Segment,
    /// A port forwarded by ssh.
    Ssh,
    /// A tunnel of IPsec.
    Ipsec,
}

/// All of them.
pub(crate) const PATHS: [Path; 4] = [Path::Bare, Path::Segment, Path::Ssh, Path::Ipsec];

impl Path {
    /// As in results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Segment => "segment",
            Self::Ssh => "ssh",
            Self::Ipsec => "ipsec",
        }
    }

    /// The transport that uses it, which is asked for with it.
    pub(crate) fn transport(self) -> &'static str {
        match self {
            Self::Bare => Transport::Plain,
            Self::Segment => Transport::Segment,
            Self::Ssh => Transport::Ssh,
            Self::Ipsec => Transport::Ipsec,
        }
        .name()
    }
}

/// Measures a path; what cannot be measured is said in the cell.
pub(crate) fn measure(rig: &Rig, path: Path, mtu: u32, run: u32) -> PathCell {
    let mut cell = PathCell {
        path: path.name().to_owned(),
        mtu,
        run,
        rtt_ms: None,
        mbit_s: None,
        reason: None,
    };
    if let Err(why) = fill(rig, path, &mut cell) {
        cell.reason = Some(format!("{why:#}"));
    }
    cell
}

fn fill(rig: &Rig, path: Path, cell: &mut PathCell) -> Result<()> {
    let (near, far) = (&rig.hosts[0], &rig.hosts[1]);
    let dir = far.dir().join("path");
    // What lies between must be there until the end.
    let (address, _between): (String, Box<dyn std::any::Any>) = match path {
        Path::Bare => (far.spec.address.clone(), Box::new(())),
        Path::Segment => {
            let segment = Segment::open(near, far, cell.mtu)?;
            (segment.far(), Box::new(segment))
        }
        Path::Ipsec => {
            let tunnel = ipsec::Tunnel::open(near, far, cell.mtu)?;
            (tunnel.far().to_owned(), Box::new(tunnel))
        }
        Path::Ssh => {
            let socket = dir.join("unused.sock");
            let tunnel = ssh::Tunnel::open_with_port(near, far, &socket, &dir, PORT)?;
            ("127.0.0.1".to_owned(), Box::new(tunnel))
        }
    };
    if path == Path::Ssh {
        cell.reason = Some("ssh carries no pings".to_owned());
    } else {
        cell.rtt_ms = Some(round_trip(near, &address)?);
    }
    cell.mbit_s = Some(throughput(near, far, &address)?);
    Ok(())
}

/// The median of twenty.
fn round_trip(near: &Host, address: &str) -> Result<f64> {
    let mut ping = near.namespace.command("ping");
    ping.args(["-n", "-c", "20", "-i", "0.05", "-w", "10", address]);
    let output = process::output(&mut ping, PATIENCE)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let times = said.lines().filter_map(|line| {
        let (_, rest) = line.split_once("time=")?;
        rest.split(' ').next()?.parse().ok()
    });
    median(times).with_context(|| format!("no ping was answered: {said}"))
}

/// What a client at the near host sends to a server at the far one, in Mbit/s.
fn throughput(near: &Host, far: &Host, address: &str) -> Result<f64> {
    let dir = far.dir().join("path");
    fs::create_dir_all(&dir)?;
    let log = dir.join("iperf3.log");
    let port = PORT.to_string();
    let mut command = far.namespace.command("iperf3");
    command
        .args(["-s", "-1", "--forceflush", "-p", &port])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log)?)
        .stderr(Stdio::null());
    let mut server = Kept::new(command.spawn().context("cannot start iperf3")?);
    wait::until_true("iperf3 listens", PATIENCE, || {
        if server.ended()?.is_some() {
            bail!("iperf3 ended: {}", fs::read_to_string(&log)?);
        }
        Ok(fs::read_to_string(&log)?.contains("listening"))
    })?;
    let mut client = near.namespace.command("iperf3");
    client.args(["-c", address, "-p", &port, "-t", SECONDS, "-J"]);
    let output = process::output(&mut client, PATIENCE)?;
    let said: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    let bits = bits.with_context(|| format!("iperf3: {}", said["error"]))?;
    Ok(bits / 1e6)
}
