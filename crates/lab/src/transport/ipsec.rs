//! A tunnel of IPsec between two hosts: IKEv2 (RFC 7296) and ESP (RFC 4303) by strongSwan, with the packets encrypted in
//! user space (its plugin `kernel-libipsec`), because not every kernel has ESP. It carries addresses of its own, so that
//! its own packets do not go through it.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::host::Host;
use crate::process::{self, Kept};
use crate::wait;

/// A daemon starts, and two agree on keys, within this time, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
const DAEMON: &str = "/usr/lib/ipsec/charon";
/// The device that the plugin makes.
const DEVICE: &str = "ipsec0";
/// What a packet grows by: IPv4 (20), UDP (8), SPI and sequence number (8), vector (8), padding with its length and the
/// next header (up to 5), tag (16). ESP is in UDP because user space may not send it otherwise (RFC 3948).
const OVERHEAD: u32 = 20 + 8 + 8 + 8 + 5 + 16;
/// Largest packet within: the plugin reads no more from its device, and cuts off the rest.
const INNER_MAX: u32 = 1400;
/// Prefix of the addresses within: the host's own end after it.
const INSIDE: &str = "10.79.";

/// Two daemons, one at each end; both are killed when it is dropped.
#[derive(Debug)]
pub struct Tunnel {
    ends: [End; 2],
}

/// An end that belongs to no tunnel; killed when it is dropped.
#[derive(Debug)]
pub struct Impostor {
    _end: End,
}

#[derive(Debug)]
struct End {
    _daemon: Kept,
    /// Address that goes through the tunnel.
    inside: String,
}

impl Tunnel {
    /// Makes a tunnel between two hosts over a path with that MTU in bytes, with a new secret, and agrees on keys.
    ///
    /// # Errors
    ///
    /// If strongSwan is not installed, or the two do not agree.
    pub fn open(first: &Host, second: &Host, mtu: u32) -> Result<Self> {
        if !Path::new(DAEMON).exists() {
            bail!(
                "no {DAEMON}: install strongswan-charon, strongswan-swanctl, libcharon-extra-plugins and \
                 libstrongswan-standard-plugins"
            );
        }
        let secret = secret()?;
        let addresses = [&first.spec.address, &second.spec.address];
        let ends = [
            start(first, addresses, &secret)?,
            start(second, [addresses[1], addresses[0]], &secret)?,
        ];
        for host in [first, second] {
            load(host)?;
        }
        swanctl(
            first,
            &["--initiate", "--child", "migration", "--timeout", "20"],
            None,
        )?;
        let inner = mtu
            .saturating_sub(OVERHEAD)
            .clamp(68, INNER_MAX)
            .to_string();
        for host in [first, second] {
            host.namespace.ip(&["link", "set", DEVICE, "mtu", &inner])?;
        }
        Ok(Self { ends })
    }

    /// An end at one host in another's name, which knows no secret of its peer's: what an attacker has who took the address.
    ///
    /// # Errors
    ///
    /// If strongSwan is not installed.
    pub fn impostor(at: &Host, of: &Host, peer: &Host) -> Result<Impostor> {
        let end = start(at, [&of.spec.address, &peer.spec.address], &secret()?)?;
        load(at)?;
        Ok(Impostor { _end: end })
    }

    /// Address of the second host within the tunnel.
    pub fn far(&self) -> &str {
        &self.ends[1].inside
    }
}

fn secret() -> Result<String> {
    let mut bytes = [0_u8; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn dir_of(host: &Host) -> PathBuf {
    host.dir().join("ipsec")
}

/// The address within a tunnel that belongs to a host.
///
/// # Errors
///
/// If the host has no address.
pub(crate) fn inside_of(host: &Host) -> Result<String> {
    inside(&host.spec.address)
}

fn inside(address: &str) -> Result<String> {
    let own = address.rsplit('.').next();
    Ok(format!("{INSIDE}0.{}", own.context("no address")?))
}

/// Tells a host's daemon what it may agree on, and its secret.
fn load(host: &Host) -> Result<()> {
    let words = ["--load-all", "--noprompt", "--file"];
    swanctl(host, &words, Some("swanctl.conf"))
}

/// Starts a daemon at a host, for two addresses, and waits until it can be told something.
fn start(host: &Host, [own, other]: [&String; 2], secret: &str) -> Result<End> {
    let dir = dir_of(host);
    let run = dir.join("run");
    fs::create_dir_all(&run)?;
    let (inside, far) = (inside(own)?, inside(other)?);
    let address = format!("{inside}/32");
    // Still there from an earlier tunnel, perhaps.
    let _ = host
        .namespace
        .ip(&["address", "add", &address, "dev", "lo"]);
    fs::write(
        dir.join("strongswan.conf"),
        format!(
            "charon {{\n load = random nonce openssl kdf hmac kernel-libipsec kernel-netlink socket-default vici\n\
             install_virtual_ip = no\n plugins {{\n  vici {{\n socket = unix://{}\n }}\n }}\n\
             filelog {{\n stderr {{\n default = 1\n }}\n }}\n}}\n",
            dir.join("vici").display()
        ),
    )?;
    fs::write(
        dir.join("swanctl.conf"),
        format!(
            "connections {{\n hosts {{\n version = 2\n local_addrs = {own}\n remote_addrs = {other}\n\
             proposals = aes256gcm16-prfsha384-ecp384\n\
             local {{\n auth = psk\n id = {own}\n }}\n remote {{\n auth = psk\n id = {other}\n }}\n\
             children {{\n migration {{\n mode = tunnel\n local_ts = {inside}/32\n remote_ts = {far}/32\n\
             esp_proposals = aes256gcm16-ecp384\n }}\n }}\n }}\n}}\n\
             secrets {{\n ike-hosts {{\n id-1 = {own}\n id-2 = {other}\n secret = {secret}\n }}\n}}\n"
        ),
    )?;
    let log = dir.join("charon.log");
    // Its file of the process ID has a fixed place, which all namespaces share: each daemon sees another directory there.
    let mut command = host.namespace.command("unshare");
    command
        .args([
            "--mount",
            "sh",
            "-c",
            "mount --bind \"$1\" /run && exec \"$2\"",
            "sh",
        ])
        .arg(&run)
        .arg(DAEMON)
        .env("STRONGSWAN_CONF", dir.join("strongswan.conf"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log)?);
    let mut daemon = Kept::new(command.spawn().context("cannot start charon")?);
    wait::until_true("charon listens", PATIENCE, || {
        if daemon.ended()?.is_some() {
            bail!("charon ended: {}", fs::read_to_string(&log)?);
        }
        Ok(std::os::unix::net::UnixStream::connect(dir.join("vici")).is_ok())
    })?;
    Ok(End {
        _daemon: daemon,
        inside,
    })
}

/// Tells a host's daemon something; `file` of its directory is the last word.
fn swanctl(host: &Host, words: &[&str], file: Option<&str>) -> Result<()> {
    let dir = dir_of(host);
    let mut command = Command::new("swanctl");
    command
        .args(words)
        .env("STRONGSWAN_CONF", dir.join("strongswan.conf"));
    command.args(file.map(|file| dir.join(file)));
    command
        .arg("--uri")
        .arg(format!("unix://{}", dir.join("vici").display()));
    let output = process::output(&mut command, PATIENCE)?;
    if !output.status.success() {
        bail!(
            "swanctl {} failed at {}: {}{}; {}",
            words[0],
            host.name(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            fs::read_to_string(dir.join("charon.log")).unwrap_or_default()
        );
    }
    Ok(())
}
