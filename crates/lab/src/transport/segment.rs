//! An isolated segment: a network that joins two hosts alone, as operators give migration traffic a VLAN of its own.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

use crate::host::Host;
use crate::network::{self, Switch};

/// Address of the second host.
pub const FAR: &str = "10.78.0.2";
/// The device at each host.
pub const DEVICE: &str = "seg0";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// The segment; taken down when it is dropped.
#[derive(Debug)]
pub struct Segment {
    /// Where somebody stands who has come into the segment.
    pub switch: Switch,
}

impl Segment {
    /// Joins two hosts, with an MTU in bytes.
    ///
    /// # Errors
    ///
    /// If that is not possible.
    pub fn open(first: &Host, second: &Host, mtu: u32) -> Result<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // The rig's own name goes before: what is left of a killed one is removed with it.
        let rig = first.namespace.name().rsplit_once('-');
        let rig = rig.map_or(first.namespace.name(), |(rig, _)| rig);
        let switch = Switch::new(format!("{rig}-segment{number}"))?;
        for (index, host) in [first, second].into_iter().enumerate() {
            let port = format!("port{index}");
            switch.namespace.ip(&[
                "link",
                "add",
                &port,
                "type",
                "veth",
                "peer",
                "name",
                DEVICE,
                "netns",
                host.namespace.name(),
            ])?;
            switch
                .namespace
                .ip(&["link", "set", &port, "master", "br0", "up"])?;
            host.namespace.ip(&["link", "set", DEVICE, "up"])?;
            network::set_mtu(&switch.namespace, &port, mtu)?;
            network::set_mtu(&host.namespace, DEVICE, mtu)?;
            let address = format!("10.78.0.{}/24", index + 1);
            host.namespace
                .ip(&["address", "add", &address, "dev", DEVICE])?;
        }
        Ok(Self { switch })
    }

    /// Address of the second host in it.
    pub fn far(&self) -> String {
        FAR.to_owned()
    }
}
