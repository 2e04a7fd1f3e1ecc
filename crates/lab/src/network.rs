//! Network namespaces of one rig, joined by a bridge.
//!
//! Every host has a bridge of its own, with its uplink and the persistent taps of its guests; the uplinks of the hosts
//! and of the client meet in the namespace of the switch, where the observer listens.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::{self, run};

/// Beginning of the name of every namespace and directory of a rig.
pub const PREFIX: &str = "pqlab";
/// Taps that every host offers its guests.
pub const TAPS: [&str; 3] = ["vm0", "vm1", "vm2"];
/// Prefix length of the rig's network, 10.77.0.0.
pub const PREFIX_LENGTH: u8 = 16;
/// A killed process ends at once, but for a QEMU that gives gigabytes back.
const END: Duration = Duration::from_secs(10);

/// A network namespace; removed, with every process in it, when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes a namespace with a loopback device and no IPv6.
    ///
    /// # Errors
    ///
    /// If that is not possible, for example without root.
    pub fn new(name: String) -> Result<Self> {
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        namespace.inside(|| {
            // Its own chatter would be on the wire else.
            for scope in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
                if Path::new(&path).exists() {
                    fs::write(path, "1")?;
                }
            }
            Ok(())
        })?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` in it.
    ///
    /// # Errors
    ///
    /// If it fails.
    pub fn ip(&self, words: &[&str]) -> Result<String> {
        let mut all = vec!["-n", self.name.as_str()];
        all.extend(words);
        ip(&all)
    }

    /// A command that will run in it, in a process group of its own, so that an interrupt of the terminal does not
    /// reach it before we have cleaned up. Only its network is another: `ip netns exec` would hide the control groups.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name))
            .arg("--")
            .arg(program);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command
    }

    /// Runs a function on a thread of its own inside.
    ///
    /// # Errors
    ///
    /// If it cannot be entered, or as the function does.
    pub fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.spawn(work)?
            .join()
            .map_err(|_| anyhow!("a thread in {} panicked", self.name))?
    }

    /// Starts a thread inside.
    ///
    /// # Errors
    ///
    /// If there is no such namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<thread::JoinHandle<Result<T>>> {
        let path = Path::new("/run/netns").join(&self.name);
        let file = File::open(&path).with_context(|| format!("no {}", path.display()))?;
        Ok(thread::spawn(move || {
            // Only this thread moves, and it ends inside.
            move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&file),
                Some(LinkNameSpaceType::Network),
            )
            .context("cannot enter the namespace")?;
            work()
        }))
    }

    /// Processes inside.
    ///
    /// # Errors
    ///
    /// If there is no such namespace.
    pub fn processes(&self) -> Result<Vec<u32>> {
        processes(&self.name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

fn processes(name: &str) -> Result<Vec<u32>> {
    let list = ip(&["netns", "pids", name])?;
    let own = std::process::id();
    Ok(list
        .lines()
        .filter_map(|line| line.trim().parse().ok())
        .filter(|&pid| pid != own)
        .collect())
}

/// Ends every process in a namespace and removes it; what is gone already is no error.
pub fn remove(name: &str) {
    // Ends also after an interrupt, when no other wait goes on. A process may have started another meanwhile.
    for _ in 0..10 {
        let left = processes(name).unwrap_or_default();
        for pid in &left {
            process::kill(*pid);
        }
        if left.iter().all(|&pid| process::wait_for_end(pid, END)) && left.is_empty() {
            break;
        }
    }
    let _ = ip(&["netns", "del", name]);
}

/// Names of all namespaces of rigs on this machine.
pub fn all() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/run/netns") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(PREFIX))
        .collect()
}

/// The switch.
#[derive(Debug)]
pub struct Switch {
    /// Its namespace; the bridge in it is `br0`.
    pub namespace: Namespace,
}

impl Switch {
    /// Makes it, without ports.
    ///
    /// # Errors
    ///
    /// If that is not possible.
    pub fn new(name: String) -> Result<Self> {
        let namespace = Namespace::new(name)?;
        bridge(&namespace)?;
        Ok(Self { namespace })
    }

    /// Joins a namespace: its end of the cable is `eth0`, ours has the given name.
    ///
    /// # Errors
    ///
    /// If that is not possible.
    pub fn plug(&self, namespace: &Namespace, port: &str) -> Result<()> {
        self.namespace.ip(&[
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            namespace.name(),
        ])?;
        self.namespace
            .ip(&["link", "set", port, "master", "br0", "up"])?;
        namespace.ip(&["link", "set", "eth0", "up"])?;
        Ok(())
    }
}

fn bridge(namespace: &Namespace) -> Result<()> {
    let words = [
        "link",
        "add",
        "br0",
        "type",
        "bridge",
        "forward_delay",
        "0",
        "stp_state",
        "0",
    ];
    namespace.ip(&words)?;
    namespace.ip(&["link", "set", "br0", "up"])?;
    Ok(())
}

/// Runs `ip` with words.
fn ip(words: &[&str]) -> Result<String> {
    run("ip", words)
}

/// Makes a host's network: a bridge with its address, its uplink and its taps.
///
/// # Errors
///
/// If that is not possible.
pub fn equip_host(namespace: &Namespace, address: &str) -> Result<()> {
    bridge(namespace)?;
    namespace.ip(&["link", "set", "eth0", "master", "br0"])?;
    for tap in TAPS {
        namespace.ip(&["tuntap", "add", tap, "mode", "tap"])?;
        namespace.ip(&["link", "set", tap, "master", "br0", "up"])?;
    }
    let address = format!("{address}/{PREFIX_LENGTH}");
    namespace.ip(&["address", "add", &address, "dev", "br0"])?;
    Ok(())
}

/// What `ip` says of a device, its counters included.
///
/// # Errors
///
/// If there is no such device.
pub fn link(namespace: &Namespace, device: &str) -> Result<serde_json::Value> {
    let text = namespace.ip(&["-s", "-j", "link", "show", "dev", device])?;
    let mut links: serde_json::Value = serde_json::from_str(&text)?;
    Ok(links[0].take())
}

/// Sets the MTU of a device, in bytes, and lets the kernel cut what TCP sends into packets of that size before the device,
/// as for a real one without an engine for it: otherwise many segments would cross a virtual cable at once as one.
///
/// # Errors
///
/// If the device cannot have it, or ethtool is not installed.
pub fn set_mtu(namespace: &Namespace, device: &str, mtu: u32) -> Result<()> {
    let mtu = mtu.to_string();
    namespace.ip(&["link", "set", device, "mtu", &mtu])?;
    let mut ethtool = namespace.command("ethtool");
    let output = process::output(ethtool.args(["-K", device, "tso", "off"]), END)?;
    if !output.status.success() {
        bail!(
            "ethtool: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Limits what a host sends.
///
/// # Errors
///
/// If the kernel has no `tbf`.
pub fn limit_uplink(namespace: &Namespace, mbit_per_s: u32) -> Result<()> {
    let rate = format!("{mbit_per_s}mbit");
    // What may be sent at once is a millisecond's worth, at least two large segments.
    let burst = (mbit_per_s * 1000 / 8).max(131_072).to_string();
    let words = [
        "-n",
        namespace.name(),
        "qdisc",
        "replace",
        "dev",
        "eth0",
        "root",
        "tbf",
        "rate",
        &rate,
        "burst",
        &burst,
        "latency",
        "50ms",
    ];
    run("tc", &words)?;
    Ok(())
}
